"""Cross-encoders: the scores of sentence-transformers' `CrossEncoder.predict`, by OpenVINO and by torch."""

import logging
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder

from embeddings_pipeline.config.reranking import reranker_profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders import conversion, convert, convert_cross_encoder, cross_encoder
from embeddings_pipeline.encoders.cross_encoder import OpenVinoCrossEncoder, load_cross_encoder
from embeddings_pipeline.encoders.cross_encoder_torch import TorchCrossEncoder
from embeddings_pipeline.errors import OutOfMemoryError, PipelineError, ProfileError
from embeddings_pipeline_tests.support import tiny_models
from embeddings_pipeline_tests.support.tiny_models import WORDS, bert

QUERIES = ["one two three", "x", " ".join(WORDS * 9), "\ud800 seven"]
TEXTS = [
    *(" ".join(WORDS[n:] + WORDS[:n]) * (1 + n % 4) for n in range(10)),
    "",
    "   ",
    "word " * 20_000,
    "x" * 30_000,
    "one " + " " * 30_000 + " two",
    "🎬 eight",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.cross_encoder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Any]:
    """Load a model as a new process would. The conversion is done in this one, which has imported torch."""

    def here(command: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
        assert command[-3] == "embeddings_pipeline.encoders.convert_cross_encoder"
        convert.main(Path(command[-1]), convert_cross_encoder.answer_to)
        return subprocess.CompletedProcess(command, 0, "", "")

    def load(folder: Path, **settings: Any) -> Any:
        monkeypatch.setattr(cross_encoder, "_loaded", {})
        profile = reranker_profile(str(folder), device="cpu", **settings)
        return load_cross_encoder(profile, Settings(embeddings_state_dir=tmp_path / "state"))

    monkeypatch.setattr(conversion.subprocess, "run", here)
    return load


def predicted(folder: Path, query: str, texts: list[str]) -> np.ndarray:
    written = query.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return CrossEncoder(str(folder), device="cpu").predict([(written, text) for text in texts])


@pytest.mark.parametrize("activation", [None, "torch.nn.modules.linear.Identity"])
def test_scores_are_those_of_sentence_transformers(
    activation: str | None, load: Callable[[Path], Any], tmp_path: Path
) -> None:
    folder = tiny_models.cross_encoder(tmp_path / "tiny", activation=activation)
    encoder = load(folder)
    assert isinstance(encoder, OpenVinoCrossEncoder)
    for query in QUERIES:
        theirs = predicted(folder, query, TEXTS)
        ours = encoder.score(query, TEXTS)
        np.testing.assert_allclose(ours, theirs, atol=1e-3)
        assert np.ptp(theirs) > 0.01, "scores that are all alike would prove nothing"
        np.testing.assert_allclose(TorchCrossEncoder(encoder.profile).score(query, TEXTS), theirs, atol=1e-3)


def test_it_is_converted_once_and_kept_beside_encoders(
    load: Callable[[Path], Any], model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = load(model).score("one", TEXTS)
    assert "is converted for OpenVINO" in caplog.text
    caplog.clear()
    np.testing.assert_array_equal(load(model).score("one", TEXTS), expected)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    [folder] = (tmp_path / "state" / "encoders").glob("*-cross-encoder")
    assert {file.name for file in folder.iterdir()} == {"manifest.json", "model.bin", "model.xml", "tokenizer.json"}


def test_scores_that_differ_leave_torch(
    load: Callable[[Path], Any], model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_cross_encoder, "KEPT_SCORE", {"bf16": -1.0, "f32": -1.0})
    assert isinstance(load(model), TorchCrossEncoder)
    assert "runs on torch, not on OpenVINO: its scores are" in caplog.text


def test_threads_get_the_scores_that_one_gets(load: Callable[[Path], Any], model: Path) -> None:
    encoder = load(model)
    queries = [f"{a} {b}" for a in WORDS[:4] for b in WORDS[:4]]
    expected = [encoder.score(query, TEXTS[:8]) for query in queries]
    with ThreadPoolExecutor(8) as pool:
        for ours, alone in zip(pool.map(lambda q: encoder.score(q, TEXTS[:8]), queries * 3), expected * 3, strict=True):
            np.testing.assert_allclose(ours, alone, atol=1e-5)


def test_when_memory_runs_out_openvino_scores_fewer_pairs_at_once(
    load: Callable[[Path], Any], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load(model)
    expected, one_pass, rows = encoder.score("one", TEXTS[:10]), encoder._engine._pass, []

    def little_memory(inputs: Any) -> Any:
        rows.append(len(inputs()[0]))
        if rows[-1] > 4:
            raise RuntimeError("Exception from src/inference:\nstd::bad_alloc")
        return one_pass(inputs)

    monkeypatch.setattr(encoder._engine, "_pass", little_memory)
    np.testing.assert_allclose(encoder.score("one", TEXTS[:10]), expected, atol=1e-5)
    assert max(rows) > 4 and rows[-1] <= 4 and encoder.halved
    monkeypatch.setattr(encoder._engine, "_pass", lambda inputs: np.empty(1 << 55))
    with pytest.raises(OutOfMemoryError):
        encoder.score("one", TEXTS[:10])


def test_when_memory_runs_out_torch_scores_fewer_pairs_at_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = TorchCrossEncoder(reranker_profile(str(model), device="cpu", batch_size=8))
    expected, forward, rows = encoder.score("one", TEXTS[:10]), encoder.model.forward, []

    def little_memory(features: Any, **others: Any) -> Any:
        rows.append(len(features["input_ids"]))
        return torch.empty(1 << 55) if rows[-1] > 2 else forward(features, **others)

    monkeypatch.setattr(encoder.model, "forward", little_memory)
    np.testing.assert_allclose(encoder.score("one", TEXTS[:10]), expected, atol=1e-5)
    assert (rows[0], rows[-1], encoder.halved) == (8, 2, 2)
    monkeypatch.setattr(encoder.model, "forward", lambda features, **_: torch.empty(1 << 55))
    with pytest.raises(OutOfMemoryError, match=r"^Profile reranker: memory ran out while scoring one pair on cpu; "):
        encoder.score("one", TEXTS[:10])
    monkeypatch.setattr(encoder.model, "forward", lambda features, **_: features["nothing"])
    with pytest.raises(PipelineError, match=r"^Profile reranker: 1 pairs could not be scored: [^\n]+$"):
        encoder.score("one", ["two"])


def test_memory_that_runs_out_while_it_is_loaded_is_told(
    load: Callable[[Path], Any], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_encoder, "openvino_encoder", lambda *_: np.empty(1 << 55))
    with pytest.raises(OutOfMemoryError, match=r"^Profile reranker: memory ran out while [^\n]* was loaded; "):
        load(model)


def test_without_the_memory_to_make_it_ready_a_smaller_one_may_take_over(
    load: Callable[[Path], Any], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "memory_left", lambda: 90_000_000)
    with pytest.raises(OutOfMemoryError, match="about 300 MB of memory, once, and 90 MB are left"):
        load(model)


def no_cross_encoder(folder: Path) -> Path:
    bert(folder)
    return folder


def broken(folder: Path) -> Path:
    (tiny_models.cross_encoder(folder) / "config.json").write_text("{")
    return folder


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda f: tiny_models.cross_encoder(f, labels=3), r"gives each pair 3 scores \(num_labels\), and a reranker"),
        (lambda f: tiny_models.cross_encoder(f, labels=2), r"gives each pair 2 scores \(num_labels\), and a reranker"),
        (no_cross_encoder, "is no cross-encoder: its config.json names BertModel"),
        (broken, "config.json cannot be read"),
        (lambda f: f, "there is no folder .*; set RERANK_MODEL=/path/to/m "),
    ],
)
def test_what_is_no_reranker_is_refused_in_one_line(
    make: Callable[[Path], Path], said: str, load: Callable[[Path], Any], tmp_path: Path
) -> None:
    with pytest.raises(ProfileError, match=rf"^Profile reranker: [^\n]*{said}[^\n]*$"):
        load(make(tmp_path / "m"))
