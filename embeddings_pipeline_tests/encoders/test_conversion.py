"""Models made ready for OpenVINO: once, whole, checked; and torch, with a reason, where that cannot be."""

import errno
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import CNN, Pooling, StaticEmbedding

from embeddings_pipeline.config.profiles import BUILT_IN, Profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders import conversion, convert, load_encoder
from embeddings_pipeline.encoders.base import Encoder
from embeddings_pipeline.encoders.batches import lowest_cosine
from embeddings_pipeline.encoders.converted_files import workshop
from embeddings_pipeline.encoders.local import LocalEncoder
from embeddings_pipeline.encoders.openvino import OpenVinoEncoder
from embeddings_pipeline.errors import OutageError, ProfileError
from embeddings_pipeline_tests.support.tiny_models import POSITIONS, WORDS, bert, sentence_model, tokenizer_of
from embeddings_pipeline_tests.support.workbench import wait_until

Load = Callable[..., Encoder]


def profile_of(folder: Path, **settings: Any) -> Profile:
    return Profile(
        **{"name": "mine", "provider": "local", "model": str(folder), "dimensions": 32, "device": "cpu", **settings}
    )


@pytest.fixture
def mine(tmp_path: Path) -> Profile:
    return profile_of(sentence_model(tmp_path / "model", Pooling(32)))


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def load(state: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Load]:
    """Load a profile as a new process would. The conversion is done in this one, which has imported torch."""

    def here(command: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
        convert.main(Path(command[-1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    def load(profile: Profile, settings: Settings | None = None) -> Encoder:
        caplog.clear()
        monkeypatch.setattr("embeddings_pipeline.encoders._loaded", {})
        return load_encoder(profile, settings or Settings(embeddings_state_dir=state))

    monkeypatch.setattr(conversion.subprocess, "run", here)
    yield load


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the last `load` told people."""
    ours = (record for record in caplog.records if record.name.startswith("embeddings_pipeline"))
    return [record.getMessage() for record in ours if record.levelno >= logging.WARNING]


def kept(state: Path) -> Path:
    [folder] = [each for each in (state / "encoders").iterdir() if (each / "manifest.json").exists()]
    return folder


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


@pytest.mark.parametrize(
    ("ended", "said", "how", "next_time"),
    [
        (-9, "", "signal 9", OpenVinoEncoder),
        (1, "Traceback\nMemoryError", "exit code 1 MemoryError", OpenVinoEncoder),
        (1, "ImportError: x.so: failed to map segment from y", "exit code 1 ImportError: x.so", OpenVinoEncoder),
        (-6, "memory allocation of 9 bytes failed\nnote: run with", "signal 6 note: run with", OpenVinoEncoder),
        (-6, "terminate called\n  what():  std::bad_alloc", "signal 6 what():  std::bad_alloc", OpenVinoEncoder),
        (-4, "", "signal 4", LocalEncoder),  # the processor lacks an instruction
        (1, "Traceback\nKeyError: 'a mistake of ours'", "exit code 1 KeyError", LocalEncoder),
    ],
)
def test_a_conversion_that_ended_early_is_tried_again_where_that_may_help(
    ended: int,
    said: str,
    how: str,
    next_time: type[Encoder],
    load: Load,
    mine: Profile,
    state: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(
            conversion.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, ended, "", said)
        )
        assert isinstance(load(mine), LocalEncoder)
        assert f"its conversion ended with {how}" in caplog.text
    assert isinstance(load(mine), next_time)
    if next_time is LocalEncoder:
        [verdict] = (state / "encoders" / "verdicts").iterdir()
        os.utime(verdict, (0, time.time() - 2 * 24 * 3600))
        assert isinstance(load(mine), OpenVinoEncoder), "after a day it is tried again"


def test_a_disk_without_room_for_a_temporary_file_leaves_torch(
    load: Load, mine: Profile, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    assert isinstance(load(mine), LocalEncoder)
    assert "it cannot be converted: [Errno 2]" in caplog.text


def test_a_disk_that_does_not_hold_the_conversion_leaves_torch_until_there_is_room(
    load: Load, mine: Profile, caplog: pytest.LogCaptureFixture
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # the largest file is of 60 kB
    try:
        assert isinstance(load(mine), LocalEncoder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    [*_, line] = said(caplog)
    assert re.search(rf"{tempfile.gettempdir()} does not hold it: make room there, or set TMPDIR", line), line
    assert isinstance(load(mine), OpenVinoEncoder)


@pytest.mark.parametrize("left", ["for torch", "for nothing"])
def test_without_the_memory_nothing_is_begun_that_a_container_would_be_ended_for(
    left: str, load: Load, mine: Profile, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(conversion, "memory_left", lambda: 290_000_000 if left == "for torch" else 90_000_000)
        if left == "for torch":
            assert isinstance(load(mine), LocalEncoder)
            assert said(caplog) == [
                "profile mine runs on torch, not on OpenVINO: there is too little memory left to convert it"
            ]
        else:
            with pytest.raises(OutageError, match=r"^Profile mine: to make .* about 300 MB of memory, once, and 90 MB"):
                load(mine)
    assert isinstance(load(mine), OpenVinoEncoder)


def test_memory_that_runs_out_in_the_conversion_is_not_tried_for_torch(
    load: Load, mine: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter([500_000_000, 100_000_000])
    monkeypatch.setattr(conversion, "memory_left", lambda: next(left))
    monkeypatch.setattr(
        conversion.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, -9, "", "")
    )
    with pytest.raises(OutageError, match="100 MB are left"):
        load(mine)


def test_what_killed_conversions_left_is_removed_by_the_next_and_what_living_ones_use_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    script = """
import os, signal
from embeddings_pipeline.encoders.converted_files import workshop
with workshop() as folder:
    (folder / "model").mkdir()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", script], env={**os.environ, "TMPDIR": str(tmp_path)}, check=False)
    assert killed.returncode == -signal.SIGKILL
    [left_over] = tmp_path.iterdir()
    with workshop() as living, workshop() as mine:
        assert not left_over.exists() and living.is_dir() and mine.is_dir()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("times", [1, 99])
def test_files_that_change_while_they_are_converted(
    times: int, load: Load, mine: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = conversion.subprocess.run
    changes: list[int] = []

    def change(command: list[str], **how: Any) -> Any:
        done = here(command, **how)
        if len(changes) < times:
            changes.append(len(changes))
            bert(tmp_path / "other", initializer_range=0.1 + len(changes) / 100)
            shutil.copy(tmp_path / "other" / "model.safetensors", mine.model)
            task = json.loads(Path(command[-1]).read_text())
            Path(task["answer"]).unlink()
            return here(command, **how)
        return done

    monkeypatch.setattr(conversion.subprocess, "run", change)
    if times == 1:
        ours = load(mine).encode_documents(WORDS)
        assert lowest_cosine(ours, LocalEncoder(mine, half=None).encode_documents(WORDS)) >= 0.9998
    else:
        with pytest.raises(ProfileError, match=r"^Profile mine: the files of [^\n]* change while they are read"):
            load(mine)


def test_other_weights_of_the_same_size_and_time_are_other_weights(load: Load, mine: Profile, tmp_path: Path) -> None:
    weights = Path(mine.model) / "model.safetensors"
    before, stat = load(mine).encode_documents(WORDS), weights.stat()
    bert(tmp_path / "other", initializer_range=0.2)
    shutil.copy(tmp_path / "other" / "model.safetensors", weights)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert weights.stat().st_size == stat.st_size
    after = load(mine)
    assert lowest_cosine(after.encode_documents(WORDS), before) < 0.9
    assert lowest_cosine(after.encode_documents(WORDS), LocalEncoder(mine, half=None).encode_documents(WORDS)) > 0.9998


def test_a_file_that_cannot_be_read_is_one_line(load: Load, mine: Profile) -> None:
    weights = Path(mine.model) / "model.safetensors"
    weights.unlink()
    weights.symlink_to("/proc/self/mem")  # opened, it cannot be read, by whomever
    with pytest.raises(ProfileError, match=r"^Profile mine: the files in [^\n]* cannot be read: \[Errno 5\][^\n]*$"):
        load(mine)


def test_a_folder_that_goes_away_meanwhile_is_one_line(
    load: Load, mine: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = conversion.subprocess.run

    def gone(command: list[str], **how: Any) -> Any:
        shutil.rmtree(mine.model)
        return here(command, **how)

    monkeypatch.setattr(conversion.subprocess, "run", gone)
    with pytest.raises(ProfileError, match=r"^Profile mine: there is no folder [^\n]*$"):
        load(mine)


TOGETHER = """
import logging, sys
from pathlib import Path
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders import load_encoder
logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
mine = Profile(name="mine", provider="local", model=sys.argv[1], dimensions=32, device="cpu")
encoder = load_encoder(mine, Settings(embeddings_state_dir=Path(sys.argv[2])))
print(type(encoder).__name__, *("torch" in sys.modules, "openvino_telemetry" in sys.modules))
"""


@pytest.mark.slow
def test_of_two_processes_one_converts_and_nothing_is_told_or_written_elsewhere(
    mine: Profile, state: Path, tmp_path: Path
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    (here / "sentence_transformers.py").write_text("raise ImportError('not for us')")
    environment = {**os.environ, "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", TOGETHER, mine.model, str(state)]
    start = partial(subprocess.Popen, command, env=environment, cwd=here, stdout=subprocess.PIPE, text=True)
    both = [start() for _ in range(2)]
    said = [process.communicate(timeout=200)[0] for process in both]
    assert all(lines.endswith("OpenVinoEncoder False False\n") for lines in said), said
    assert sum("is converted for OpenVINO" in lines for lines in said) == 1
    assert not list(home.iterdir())


@pytest.mark.slow
def test_ctrl_c_ends_who_waits_for_a_conversion_and_decides_nothing(mine: Profile, state: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", TOGETHER, mine.model, str(state)]
    wanting = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_until(lambda: bool(psutil.Process(wanting.pid).children()))
    [converting] = psutil.Process(wanting.pid).children()
    assert os.getpgid(converting.pid) != os.getpgid(wanting.pid), "a terminal's Ctrl-C is for a group"
    os.killpg(wanting.pid, signal.SIGINT)
    gone, _ = psutil.wait_procs([converting], timeout=20)
    assert gone and wanting.wait(20) != 0
    assert not (state / "encoders" / "verdicts").exists()


@pytest.mark.slow
def test_a_conversion_whose_parent_has_gone_before_it_begins_ends(mine: Profile, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "embeddings_pipeline.encoders.convert", "1", str(tmp_path / "task.json")]
    assert subprocess.run(command, capture_output=True, check=False).stderr == b""


@pytest.mark.slow
def test_a_conversion_ends_with_whoever_wanted_it(mine: Profile, state: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", TOGETHER, mine.model, str(state)]
    wanting = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_until(lambda: bool(psutil.Process(wanting.pid).children()))
    [converting] = psutil.Process(wanting.pid).children()
    wait_until(lambda: any("libopenvino" in file.path for file in converting.memory_maps()))
    converting.suspend()
    wanting.kill()
    wanting.wait()
    gone, _ = psutil.wait_procs([converting], timeout=10)
    assert gone


@pytest.mark.slow
@pytest.mark.parametrize(("most", "precisions"), [("AVX2", {"f32"}), ("SSE41", {None, "f32"})])
def test_a_processor_with_fewer_instructions_has_a_path_that_works(
    most: str, precisions: set[str | None], encoder_settings: Settings, tmp_path: Path
) -> None:
    minilm = replace(BUILT_IN["minilm"], device="cpu")
    load_encoder(minilm, encoder_settings)  # converted
    script = """
import sys
from dataclasses import replace
from pathlib import Path
from embeddings_pipeline.config.profiles import BUILT_IN
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders import load_encoder
encoder = load_encoder(replace(BUILT_IN["minilm"], device="cpu"), Settings(embeddings_state_dir=Path(sys.argv[1])))
print(getattr(encoder, "precision", None), abs(encoder.encode_documents(["a dog"])[0, :8]).sum() > 0)
"""
    command = [sys.executable, "-W", "ignore", "-c", script, str(encoder_settings.state_dir)]
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": most}
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True, timeout=200)
    assert done.stdout in {f"{precision} True\n" for precision in precisions}


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
