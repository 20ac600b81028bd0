"""Models made ready for OpenVINO: once, whole, checked; and torch, with a reason, where that cannot be."""

import errno
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import CNN, Pooling, StaticEmbedding

from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.encoders import conversion, convert
from embeddings_pipeline.encoders.batches import lowest_cosine
from embeddings_pipeline.encoders.local import LocalEncoder
from embeddings_pipeline.encoders.openvino import OpenVinoEncoder
from embeddings_pipeline.errors import ProfileError
from embeddings_pipeline_tests.support.conversions import Load, kept, profile_of, said
from embeddings_pipeline_tests.support.tiny_models import POSITIONS, WORDS, sentence_model, tokenizer_of


def damaged(state: Path) -> None:
    file = kept(state) / "model.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def of_another_version(state: Path) -> None:
    manifest = json.loads((kept(state) / "manifest.json").read_text())
    (kept(state) / "manifest.json").write_text(json.dumps({**manifest, "openvino": "2025.1.0"}))


def otherwise_sealed(state: Path) -> None:
    """A changed digit in the manifest: texts would be cut elsewhere."""
    file = kept(state) / "manifest.json"
    file.write_text(file.read_text().replace(f'"max_length": {POSITIONS}', '"max_length": 2'))


def half_gone(state: Path) -> None:
    (kept(state) / "tokenizer.json").unlink()


def test_a_model_is_converted_once_and_leaves_nothing_else(
    load: Load, mine: Profile, state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = load(mine)
    assert isinstance(first, OpenVinoEncoder)
    assert said(caplog) == [f"profile mine: {mine.model} is converted for OpenVINO, which takes some seconds, once"]
    folder = kept(state)
    assert sorted(file.name for file in folder.iterdir()) == [
        "manifest.json",
        "model.bin",
        "model.xml",
        "tokenizer.json",
    ]
    second = load(replace(mine, batch_size=3))
    assert isinstance(second, OpenVinoEncoder) and not said(caplog)
    assert (second.encode_documents(WORDS) == second.encode_documents(WORDS)).all()
    assert {each.name for each in (state / "encoders").iterdir()} == {folder.name, f"{folder.name}.lock", "verdicts"}


@pytest.mark.parametrize("harm", [damaged, of_another_version, otherwise_sealed, half_gone])
def test_what_is_damaged_or_of_another_version_is_made_anew(
    harm: Callable[[Path], None], load: Load, mine: Profile, state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = load(mine).encode_documents(WORDS)
    harm(state)
    again = load(mine)
    assert isinstance(again, OpenVinoEncoder)
    assert "is converted for OpenVINO" in caplog.text
    assert lowest_cosine(again.encode_documents(WORDS), expected) >= 0.9998
    load(mine)
    assert not said(caplog)


@pytest.mark.parametrize("written", ['"precision": "f16"', '"precision": null', '"precision": '])
def test_a_damaged_verdict_is_none(
    written: str, load: Load, mine: Profile, state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = load(mine).encode_documents(WORDS)
    [verdict] = (state / "encoders" / "verdicts").iterdir()
    verdict.write_text(re.sub(r'"precision": "\w+"', written, verdict.read_text()))
    again = load(mine)
    assert "its model is tried on this processor" in caplog.text
    assert (again.encode_documents(WORDS) == expected).all()


def test_with_another_version_of_the_tokenizers_the_model_is_compared_again(
    load: Load, mine: Profile, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(mine)
    monkeypatch.setattr(conversion, "version", lambda name: "99" if name == "tokenizers" else version(name))
    load(mine)
    assert "its model is tried on this processor" in caplog.text


def test_on_another_processor_the_model_is_compared_again_and_not_converted(
    load: Load,
    mine: Profile,
    state: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load(mine)
    before = (kept(state) / "model.bin").stat().st_mtime_ns
    monkeypatch.setattr(conversion, "kind_of_processor", lambda: "another")
    assert isinstance(load(mine), OpenVinoEncoder)
    assert "its model is tried on this processor" in caplog.text
    assert (kept(state) / "model.bin").stat().st_mtime_ns == before


@pytest.mark.parametrize("place", ["not a folder", "full"])
def test_a_state_folder_that_cannot_be_written_is_said_once_and_does_no_harm(
    place: str,
    load: Load,
    mine: Profile,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = LocalEncoder(mine, half=None).encode_documents(WORDS)

    def full(source: Path, target: Path) -> None:
        Path(target).write_bytes(source.read_bytes()[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if place == "full":
        monkeypatch.setattr(conversion.shutil, "copyfile", full)
    else:
        (tmp_path / "state").write_text("")
    encoder = load(mine)
    assert isinstance(encoder, OpenVinoEncoder)
    [_, line] = said(caplog)
    assert f"{tmp_path}/state/encoders cannot be written (N" in line and "each process converts the model anew" in line
    assert lowest_cosine(encoder.encode_documents(WORDS), expected) >= 0.9998
    if place == "full":
        assert not list((tmp_path / "state" / "encoders").glob("*/model.xml"))


def static(folder: Path) -> Path:
    tokenizer = tokenizer_of(folder / "tokenizer")
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=32)], device="cpu").save(str(folder / "m"))
    return folder / "m"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (static, "it has no tokenizer of the fast kind"),
        (lambda folder: sentence_model(folder, CNN(32, 32, [1]), Pooling(32)), "its module CNN is none of those"),
    ],
)
def test_a_model_that_is_not_converted_runs_on_torch_and_the_log_says_why_once(
    make: Callable[[Path], Path],
    reason: str,
    load: Load,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    profile = profile_of(make(tmp_path / "model"))
    assert isinstance(load(profile), LocalEncoder)
    [_, line] = said(caplog)
    assert line.startswith(f"profile mine runs on torch, not on OpenVINO: {reason}")
    assert isinstance(load(profile), LocalEncoder) and not said(caplog)
    monkeypatch.setattr(conversion, "_libraries", lambda: {"torch": "another"})
    load(profile)
    assert reason in caplog.text, "other libraries may convert it"


def test_a_model_with_code_of_its_own_runs_on_torch(
    load: Load, mine: Profile, caplog: pytest.LogCaptureFixture
) -> None:
    assert isinstance(load(replace(mine, trust_remote_code=True)), LocalEncoder)
    assert "runs on torch, not on OpenVINO: trust_remote_code" in caplog.text


def test_vectors_that_differ_are_not_used(
    load: Load, mine: Profile, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "KEPT_COSINE", {"f32": 1.1, "bf16": 1.1})
    assert isinstance(load(mine), LocalEncoder)
    assert "the cosine to sentence-transformers' vectors is" in caplog.text


def test_weights_in_8_bits_are_another_conversion_with_its_own_vectors(load: Load, mine: Profile, state: Path) -> None:
    whole, eight = load(mine), load(replace(mine, weights="int8"))
    assert isinstance(whole, OpenVinoEncoder) and isinstance(eight, OpenVinoEncoder) and eight.precision == "i8"
    folders = [each for each in (state / "encoders").iterdir() if (each / "manifest.json").exists()]
    [small] = [each for each in folders if each.name.endswith("-int8")]
    assert len(folders) == 2 and 'element_type="i8"' in (small / "model.xml").read_text()
    alike = lowest_cosine(eight.encode_documents(WORDS), LocalEncoder(mine, half=None).encode_documents(WORDS))
    assert 0.99 <= alike < 0.99999
    again = load(replace(mine, weights="int8"))
    assert lowest_cosine(again.encode_documents(WORDS), eight.encode_documents(WORDS)) > 0.99999


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"trust_remote_code": True}, "trust_remote_code lets the model run code of its own"),
        ({"model": StaticEmbedding}, "it has no tokenizer of the fast kind"),
    ],
    ids=["trust_remote_code", "a static model"],
)
def test_weights_in_8_bits_that_openvino_cannot_run_are_refused_each_time(
    settings: dict[str, Any], reason: str, load: Load, mine: Profile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if "model" in settings:
        static = StaticEmbedding(tokenizer_of(tmp_path / "tokenizer").backend_tokenizer, embedding_dim=32)
        SentenceTransformer(modules=[static], device="cpu").save(str(tmp_path / "static"))
        settings = {"model": str(tmp_path / "static")}
    for _ in range(2):
        with pytest.raises(ProfileError, match=f"^Profile mine: `weights: int8` is for .*: {reason}; leave it out$"):
            load(replace(mine, weights="int8", **settings))
        assert "runs on torch" not in caplog.text
