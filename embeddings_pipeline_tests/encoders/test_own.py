"""A class of the user's own: what it does wrong is one line that names it and what it gave."""

from typing import Any

import numpy as np
import pytest

from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders import load_encoder
from embeddings_pipeline.errors import OutOfMemoryError, PipelineError, ProfileError

MODULE = "embeddings_pipeline_tests.encoders.test_own"


class Small:
    """Gives what `given` says for two texts; it does not count tokens."""

    dimensions = 4
    given: Any = np.ones((2, 4), np.float32)

    def __init__(self, profile: Profile) -> None:
        self.profile = profile

    def encode_documents(self, texts: Any) -> Any:
        if isinstance(self.given, Exception):
            raise self.given
        return self.given

    encode_queries = encode_documents


class Counting(Small):
    counted: Any = (3, 4)

    def count_tokens(self, texts: Any) -> Any:
        return self.counted


class WithoutQueries:
    dimensions = 4

    def __init__(self, profile: Profile) -> None: ...

    def encode_documents(self, texts: Any) -> Any: ...


class WithoutDimensions:
    def __init__(self, profile: Profile) -> None: ...


def own(name: str, **others: Any) -> Profile:
    return Profile(**{"name": name, "provider": "python", "model": f"{MODULE}:{name}", "dimensions": 4, **others})


@pytest.mark.parametrize("method", ["encode_documents", "encode_queries"])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (np.ones((1, 4), np.float32), "an array of float32 with the shape (1, 4)"),
        (np.ones((2, 3), np.float32), "an array of float32 with the shape (2, 3)"),
        (np.ones(4, np.float32), "an array of float32 with the shape (4,)"),
        (np.ones((2, 4), int), "an array of int64 with the shape (2, 4)"),
        ([[1.0] * 4] * 2, "a list of 2"),
        (None, "nothing"),
    ],
)
def test_what_is_not_a_row_of_numbers_for_each_text_is_one_line(
    monkeypatch: pytest.MonkeyPatch, method: str, given: Any, said: str
) -> None:
    monkeypatch.setattr(Small, "given", given)
    with pytest.raises(ProfileError) as error:
        getattr(load_encoder(own("Small"), Settings()), method)(["one", "two"])
    message = str(error.value)
    assert message.startswith(f"Profile Small: {MODULE}:Small.{method} gave {said} for 2 texts; it must give")
    assert "(2, 4)" in message and "\n" not in message


@pytest.mark.parametrize(
    ("raised", "kind", "said"),
    [
        (ValueError("no such\nword"), PipelineError, "encode_queries failed: ValueError: no such"),
        (KeyError(), PipelineError, "encode_queries failed: KeyError"),
        (MemoryError(), OutOfMemoryError, "memory ran out for 1 texts"),
        (ProfileError("log in first"), ProfileError, "log in first"),
    ],
)
def test_an_exception_is_one_line(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, kind: type[Exception], said: str
) -> None:
    monkeypatch.setattr(Small, "given", raised)
    with pytest.raises(kind) as error:
        load_encoder(own("Small"), Settings()).encode_queries(["one"])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_counting_tokens_is_optional_and_other_floats_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Small, "given", np.ones((2, 4)))
    encoder = load_encoder(own("Small"), Settings())
    assert encoder.count_tokens(["one", "two"]).tolist() == [0, 0]
    assert encoder.encode_documents(["one", "two"]).dtype == np.float32
    assert load_encoder(own("Counting"), Settings()).count_tokens(["one", "two"]).tolist() == [3, 4]


@pytest.mark.parametrize("counted", [[1], [1.5, 2.0], None, 7])
def test_a_wrong_count_of_tokens_is_one_line(monkeypatch: pytest.MonkeyPatch, counted: Any) -> None:
    monkeypatch.setattr(Counting, "counted", counted)
    with pytest.raises(ProfileError, match=r"Counting.count_tokens gave .* for 2 texts; .* or be left out"):
        load_encoder(own("Counting"), Settings()).count_tokens(["one", "two"])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("WithoutQueries", "WithoutQueries has no method encode_queries"),
        ("WithoutDimensions", "cannot be loaded: AttributeError: .* no attribute 'dimensions'"),
        ("Small", "gives 4 dimensions, the profile says 5"),
    ],
)
def test_a_class_that_is_no_encoder_is_refused_when_it_is_loaded(name: str, said: str) -> None:
    with pytest.raises(ProfileError, match=said):
        load_encoder(own(name, dimensions=5 if name == "Small" else 4), Settings())
