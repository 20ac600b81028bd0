"""What long work shows while it lasts."""

import re
import time

import pytest

from embeddings_pipeline.cli import console


def test_in_a_pipe_long_work_says_now_and_then_what_it_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "LINE_SECONDS", 0.02)
    with console.progress_bar("films", show=True) as progress:
        time.sleep(0.1)
        progress("encoding", 3, 1200)
        time.sleep(0.1)
    first, *_, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"films: starting; \d+ s", first)
    assert re.fullmatch(r"films: encoding, 3 of 1,200 batches; \d+ s", last)


def test_short_work_and_work_for_a_program_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for show in (True, False):
        with console.progress_bar("films", show=show) as progress:
            progress("encoding", 1, 1)
    assert capsys.readouterr().err == ""
