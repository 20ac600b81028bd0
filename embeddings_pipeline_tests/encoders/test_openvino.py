"""The encoder that runs on OpenVINO: sentence-transformers' vectors, whatever the texts, threads and forks are."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import pre_tokenizers
from transformers import Qwen2Config, Qwen2Model, Qwen2Tokenizer

from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.encoders.batches import lowest_cosine
from embeddings_pipeline.encoders.comparison import compare
from embeddings_pipeline.encoders.local import LocalEncoder
from embeddings_pipeline.encoders.openvino import OpenVinoEncoder
from embeddings_pipeline.errors import OutOfMemoryError, PipelineError, ProfileError
from embeddings_pipeline_tests.support.converted import convert
from embeddings_pipeline_tests.support.tiny_models import POSITIONS, WORDS, sentence_model

LINES = [" ".join(WORDS[n:] + WORDS[:n]) * (1 + n % 4) for n in range(10)]


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    folder = sentence_model(tmp_path_factory.mktemp("tiny"), Pooling(32))
    return Profile(name="tiny", provider="local", model=str(folder), dimensions=32, device="cpu")


@pytest.fixture(scope="module")
def folder(profile: Profile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the model is, converted."""
    convert(profile, folder := tmp_path_factory.mktemp("converted") / "model")
    return folder


@pytest.fixture(scope="module")
def tiny(profile: Profile, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> OpenVinoEncoder:
    return convert(profile, tmp_path_factory.mktemp("again") / "model")


def other(encoder: OpenVinoEncoder, folder: Path, **settings: Any) -> OpenVinoEncoder:
    """The same model under a profile with other settings."""
    profile = replace(encoder.profile, **settings)
    return OpenVinoEncoder(profile, folder, encoder._ready, encoder.precision, threads=2)


def shapes_of_each_pass(encoder: OpenVinoEncoder, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    shapes: list[tuple[int, int]] = []
    padded = encoder._padded

    def noted(tokens: list) -> list:
        inputs = padded(tokens)
        shapes.append(inputs[0].shape)
        return inputs

    monkeypatch.setattr(encoder, "_padded", noted)
    return shapes


def decoder(folder: Path, pooling: str, side: str) -> Profile:
    """A two-layer Qwen2 that reads bytes."""
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=letters, merges=[], add_eos_token=True, padding_side=side)
    tokenizer.save_pretrained(folder / "transformer")
    size: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    config = Qwen2Config(vocab_size=len(tokenizer), intermediate_size=64, initializer_range=0.3, **size)
    Qwen2Model(config).save_pretrained(folder / "transformer")
    modules = [Transformer(str(folder / "transformer")), Pooling(32, pooling)]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder / "model"))
    return Profile(
        name="decoder", provider="local", model=str(folder / "model"), dimensions=32, device="cpu", max_length=100
    )


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("pooling", "side"), [("lasttoken", "left"), ("lasttoken", "right"), ("cls", "left")])
def test_a_decoder_gives_its_vectors_whichever_side_is_padded(
    pooling: str, side: str, bidirectional: bool, tmp_path: Path
) -> None:
    profile = replace(decoder(tmp_path, pooling, side), bidirectional=bidirectional)
    encoder = convert(profile, tmp_path / "converted")
    assert min(compare(profile, encoder, ["abc", "abd", "one two three " * 5, "x" * 300, "x"])) >= 0.9999


def test_one_conversion_serves_every_prompt_length_and_normalisation(
    tiny: OpenVinoEncoder, profile: Profile, folder: Path
) -> None:
    settings: dict[str, Any] = {
        "document_prompt": "seven ",
        "query_prompt": "one two ",
        "max_length": 12,
        "normalize": False,
    }
    ours, theirs = other(tiny, folder, **settings), LocalEncoder(replace(profile, **settings), half=None)
    for method in ("encode_documents", "encode_queries"):
        a, b = (getattr(encoder, method)(LINES) for encoder in (ours, theirs))
        assert lowest_cosine(a, b) >= 0.9998
        np.testing.assert_allclose(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1), rtol=0.01)
    assert ours.count_tokens(LINES).tolist() == theirs.count_tokens(LINES).tolist()
    assert ours.max_length == 12


def test_what_does_not_fit_the_model_is_refused_as_torch_refuses_it(tiny: OpenVinoEncoder, folder: Path) -> None:
    with pytest.raises(ProfileError, match=f"max_length {POSITIONS + 1} is more than the {POSITIONS} tokens"):
        other(tiny, folder, max_length=POSITIONS + 1)
    with pytest.raises(ProfileError, match="gives 32 dimensions, the profile says 48"):
        other(tiny, folder, dimensions=48)
    with pytest.raises(ProfileError, match="of the 2 tokens that are read, 2 are the tokenizer's own"):
        other(tiny, folder, max_length=2)


def test_batches_keep_to_few_shapes_and_never_beyond_what_the_model_reads(
    tiny: OpenVinoEncoder, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = other(tiny, folder, max_length=13, tokens_per_batch=100)
    shapes = shapes_of_each_pass(encoder, monkeypatch)
    texts = [" ".join(WORDS[:n] * 2) for n in range(1, 11)]
    vectors = encoder.encode_documents(texts)
    assert {width for _, width in shapes} <= {8, 13}
    assert all(height <= 4 or height % 4 == 0 for height, _ in shapes)
    alone = np.concatenate([encoder.encode_documents([text]) for text in texts])
    assert lowest_cosine(alone, vectors) >= 0.9998


def test_when_memory_runs_out_the_batch_is_halved_until_it_fits(
    tiny: OpenVinoEncoder, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = other(tiny, folder)
    expected = encoder.encode_documents(LINES)
    one_pass, rows = encoder._engine._pass, []

    def little_memory(inputs: Any) -> Any:
        rows.append(len(inputs()[0]))
        if rows[-1] > 4:
            raise RuntimeError("Exception from src/inference:\nstd::bad_alloc")
        return one_pass(inputs)

    monkeypatch.setattr(encoder._engine, "_pass", little_memory)
    assert lowest_cosine(encoder.encode_documents(LINES), expected) >= 0.9998
    assert rows[0] > 4 and rows[-1] <= 4
    monkeypatch.setattr(encoder._engine, "_pass", lambda inputs: np.empty(1 << 55))
    with pytest.raises(OutOfMemoryError, match="while encoding one text of 12 tokens on cpu"):
        encoder.encode_documents([" ".join(WORDS)])


def test_a_failure_is_one_line_that_says_what_openvino_says(
    tiny: OpenVinoEncoder, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = other(tiny, folder)
    monkeypatch.setattr(encoder, "_padded", lambda tokens: [np.zeros((1, 1, 1), np.int64)] * 3)
    with pytest.raises(PipelineError, match=r"^Profile tiny: 1 texts could not be encoded: (?!Exception from)[^\n]+$"):
        encoder.encode_documents(["one"])


def test_several_threads_get_the_vectors_that_one_gets(tiny: OpenVinoEncoder) -> None:
    groups = [[f"{a} {b}" for a in WORDS] for b in WORDS]
    expected = [tiny.encode_documents(group) for group in groups]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(tiny.encode_documents, groups * 3))
        counts = list(pool.map(tiny.count_tokens, groups * 3))
    for position, vectors in enumerate(results):
        assert lowest_cosine(vectors, expected[position % len(groups)]) >= 0.9998
    assert all((each == 4).all() for each in counts)


def test_memory_ends_as_it_began(tiny: OpenVinoEncoder, folder: Path) -> None:
    encoder = other(tiny, folder, tokens_per_batch=200)
    rng = np.random.default_rng(0)

    def encode(batches: int) -> int:
        for _ in range(batches):
            lengths = rng.integers(1, 60, size=8)
            encoder.encode_documents([" ".join(rng.choice(WORDS, length)) for length in lengths])
        return psutil.Process().memory_info().rss

    before = encode(200)
    assert encode(1000) - before < 16 << 20


FORKING = """
import json, os, sys
from pathlib import Path
import numpy as np
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.encoders.openvino import OpenVinoEncoder, Readiness
profile, folder, ready = json.loads(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
encoder = OpenVinoEncoder(Profile(**profile), folder, Readiness(**ready), "f32", threads=2)
expected = encoder.encode_documents(["one two", "three"])
for works in (False, True, True):
    if os.fork() == 0:
        if works:
            assert np.allclose(encoder.encode_documents(["one two", "three"]), expected, atol=1e-3)
        sys.exit(7)  # as programs end: what they hold is destroyed
    ended = os.waitstatus_to_exitcode(os.wait()[1])
    assert ended == 7, ended
assert np.allclose(encoder.encode_documents(["one two", "three"]), expected, atol=1e-3)
print("torch" in sys.modules, "openvino_telemetry" in sys.modules)
"""


def test_forked_workers_encode_and_end(tiny: OpenVinoEncoder, folder: Path) -> None:
    done = in_a_process(FORKING, tiny, folder)
    assert (done.returncode, done.stdout) == (0, "False False\n"), done.stderr


COMING_AND_GOING = """
import json, os, signal, sys, threading
from pathlib import Path
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.encoders.openvino import OpenVinoEncoder, Readiness
profile, folder, ready = json.loads(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
signal.signal(signal.SIGUSR1, lambda *_: print("heard", flush=True))
encoders = [OpenVinoEncoder(Profile(**profile), folder, Readiness(**ready), "f32", threads=1) for _ in range(3)]
while encoders:
    encoders[0].encode_documents(["one two"])
    del encoders[0]
    os.kill(os.getpid(), signal.SIGUSR1)
made = []
making = threading.Thread(
    target=lambda: made.append(OpenVinoEncoder(Profile(**profile), folder, Readiness(**ready), "f32", threads=1))
)
making.start(); making.join()
made.clear()
os.kill(os.getpid(), signal.SIGUSR1)
"""


def in_a_process(code: str, encoder: OpenVinoEncoder, folder: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-W", "ignore", "-c", code, json.dumps(asdict(encoder.profile)), str(folder)]
    command.append(json.dumps(asdict(encoder._ready)))
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)


def test_signals_are_heard_while_models_come_and_go(tiny: OpenVinoEncoder, folder: Path) -> None:
    done = in_a_process(COMING_AND_GOING, tiny, folder)
    assert (done.returncode, done.stdout) == (0, 4 * "heard\n"), done.stderr


AT_ONCE = """
import json, sys
from pathlib import Path
from threading import Barrier
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.encoders.openvino import OpenVinoEncoder, Readiness
profile, folder, ready = json.loads(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
encoder = OpenVinoEncoder(Profile(**profile), folder, Readiness(**ready), "f32", threads=2)
tokens, together = encoder._tokenize(["one two"], "").tokens, Barrier(encoder._engine.streams)
def inputs():
    together.wait()
    return encoder._padded(tokens)
sys.setswitchinterval(1e-6)
for passing in [encoder._engine.start(inputs) for _ in range(encoder._engine.streams)]:
    passing()
print(encoder._engine.streams)
"""


@pytest.mark.parametrize("attempt", range(3))
def test_first_passes_at_once_do_not_wait_for_each_other(tiny: OpenVinoEncoder, folder: Path, attempt: int) -> None:
    done = in_a_process(AT_ONCE, tiny, folder)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr


@pytest.fixture
def one_core() -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


def test_one_core_suffices(one_core: None, tiny: OpenVinoEncoder, folder: Path) -> None:
    encoder = OpenVinoEncoder(tiny.profile, folder, tiny._ready, "f32", threads=1)
    assert lowest_cosine(encoder.encode_documents(LINES), tiny.encode_documents(LINES)) >= 0.9998
