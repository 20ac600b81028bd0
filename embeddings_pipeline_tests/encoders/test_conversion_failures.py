"""Conversions that end early, for want of room or memory, or of files that change or go meanwhile."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.encoders import conversion
from embeddings_pipeline.encoders.base import Encoder
from embeddings_pipeline.encoders.batches import lowest_cosine
from embeddings_pipeline.encoders.converted_files import workshop
from embeddings_pipeline.encoders.local import LocalEncoder
from embeddings_pipeline.encoders.openvino import OpenVinoEncoder
from embeddings_pipeline.errors import OutageError, ProfileError
from embeddings_pipeline_tests.support.conversions import Load, said
from embeddings_pipeline_tests.support.tiny_models import WORDS, bert


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
