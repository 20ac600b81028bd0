"""What people are shown: progress, results, help and mistakes."""

import errno
import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import click
import pytest
import typer
from psycopg import errors

from embeddings_pipeline.cli import console
from embeddings_pipeline.cli.main import _long_work, app, main, one_line
from embeddings_pipeline.cli.search import print_hit
from embeddings_pipeline.errors import PipelineError
from embeddings_pipeline.search.hits import Hit
from embeddings_pipeline_tests.support.command_line import PROJECT


def test_in_a_pipe_long_work_says_now_and_then_what_it_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "FIRST_LINE_SECONDS", 0.02)
    monkeypatch.setattr(console, "LINE_SECONDS", 0.02)
    with console.progress_bar("films", show=True) as progress:
        time.sleep(0.1)
        progress("embedding", 0, 1200)
        time.sleep(0.5)  # while the model is loaded
        progress("embedding", 100, 1200)
        progress("embedding", 300, 1200)
        time.sleep(0.1)
    first, *_, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"films: starting; \d+ s", first)
    pattern = r"films: embedding, 300 of 1,200 texts, ([\d,]+) texts/s, \d+ s left; \d+ s"
    assert (told := re.fullmatch(pattern, last)) and int(told[1].replace(",", "")) > 300 / 0.5


def test_a_command_that_says_nothing_for_long_gives_a_sign_of_life(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "FIRST_LINE_SECONDS", 0.02)
    monkeypatch.setattr(console, "LINE_SECONDS", 0.02)
    with console.sign_of_life("profile test"):
        time.sleep(0.1)
        with console.waiting("loading the model"):
            time.sleep(0.1)
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"profile test: still at work; \d+ s", lines[0])
    assert re.fullmatch(r"loading the model; \d+ s", lines[-1])
    assert len(lines) < 12  # not both at once


def test_a_program_and_a_command_that_waits_for_a_person_get_no_sign_of_life() -> None:
    assert _long_work(["profile", "test", "minilm"]) == "profile test" and _long_work(["sync", "--full"]) == "sync"
    for arguments in ([], ["ui"], ["live"], ["psql", "-c", "select 1"], ["status", "--json"]):
        assert _long_work(arguments) is None


def test_on_a_terminal_long_work_is_a_bar_with_texts_their_speed_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with console.progress_bar("films", show=True) as progress:
        progress("embedding", 0, 1200)
        progress("embedding", 100, 1200)
        time.sleep(0.05)
        progress("embedding", 300, 1200)
        time.sleep(0.3)
    shown = capsys.readouterr().err
    assert re.search(r"films: embedding.*300 of 1,200 texts, [\d,]+ texts/s, \d+ s left", shown)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 seconds ago"),
        (1, "1 second ago"),
        (119, "119 seconds ago"),
        (180, "3 minutes ago"),
        (-5, "0 seconds ago"),
    ],
)
def test_an_age_is_in_words(seconds: float, words: str) -> None:
    assert console.ago(seconds) == words
    assert console.ago(datetime.now(UTC) - timedelta(seconds=seconds + 0.01)) == words


def test_short_work_and_work_for_a_program_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for show in (True, False):
        with console.progress_bar("films", show=show) as progress:
            progress("encoding", 1, 1)
    assert capsys.readouterr().err == ""


def test_json_has_every_digit_and_an_output_without_letters_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    value = {"big": Decimal("12345678901234567890.123456789"), "price": Decimal("12.50"), "title": "Amélie 🎬"}
    for encoding in ("utf-8", "ascii", "latin-1"):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, write_through=True))
        console.print_json(value)
        written = raw.getvalue().decode(encoding)
        assert json.loads(written, parse_float=Decimal) == value
        assert "Amélie" in written or encoding != "utf-8"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("two\nlines\r\tand a tab", "two\\nlines\\r\\tand a tab"),
        ("\x1b[31mred\x1b[0m\x07", "\\x1b[31mred\\x1b[0m\\x07"),
        ("\x9b2J clear, \u202eturned, \u2028 \ufeff", "\\x9b2J clear, \\u202eturned, \\u2028 \\ufeff"),
        ("café à\u00a0la 👩\u200d🚀 e\u0301 नमस्ते", "café à\u00a0la 👩\u200d🚀 e\u0301 नमस्ते"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text: str, shown: str) -> None:
    assert console.printable(text) == shown


def test_what_is_logged_is_lines_that_a_terminal_may_have(
    run_main: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    with pytest.raises(SystemExit, match="0"):
        run_main("--help")
    capsys.readouterr()
    try:
        raise ValueError("\x1b[2J")
    except ValueError:
        logging.getLogger("films").warning("a text: %s", "\x1b[31mred\nline", exc_info=True)
    first, *traceback, last = capsys.readouterr().err.splitlines()
    assert first == "a text: \\x1b[31mred\\nline"
    assert traceback[0].startswith("Traceback") and last == "ValueError: \\x1b[2J"


@pytest.mark.parametrize(
    "error",
    [
        PipelineError("\x1b[2J\nline"),
        OSError(errno.EACCES, "refused", "/\x1b[2J\nline"),
        errors.DataError("\x1b[2J\nline"),
    ],
)
def test_an_error_is_a_line_that_a_terminal_may_have(error: Exception) -> None:
    line = one_line(error)
    assert line is not None and line.isprintable() and "\\x1b[2J" in line


HIT = Hit(
    "22",
    0.3204,
    {"title": "Fight\nClub", "year": 1999, "note": None, "tags": ["a", "b"]},
    "a \x1b text " * 30,
    "base",
    0,
)


def test_a_hit_in_a_pipe_is_one_whole_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_hit(HIT, ["title", "year", "note", "tags"])
    assert capsys.readouterr().out == "0.320  22  Fight\\nClub · year 1999 · a, b · " + "a \\x1b text " * 30 + "\n"


def test_a_hit_on_a_terminal_is_bold_dimmed_and_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        print_hit(HIT, ["title", "year"])
        terminal.flush()
        [line] = os.read(ours, 10_000).decode().splitlines()
    os.close(ours)
    assert line.startswith("\x1b[1m0.320  22  Fight\\nClub\x1b[0m\x1b[2m · year 1999 · a")
    assert len(re.sub(r"\x1b\[\d*m", "", line)) == 60


def test_numbers_in_lists_and_objects_and_deep_documents_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    deep: list[object] = []
    for _ in range(500):
        deep = [deep]
    print_hit(
        Hit("1", 0.5, {"a": [Decimal("1.5"), 2], "b": {"price": Decimal("12.50")}, "c": deep}, "t", "base", 0),
        ["a", "b", "c"],
    )
    assert capsys.readouterr().out.startswith('0.500  1  [1.5, 2] · {"price": 12.50} · [[[[')


def test_a_full_disk_behind_the_output_is_one_line() -> None:
    command = [sys.executable, "-m", "embeddings_pipeline", "--help"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, cwd=PROJECT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: the output cannot be written: No space left on device; make room where it goes\n"


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`main` with these arguments, in this process; what it says to the loggers is taken back."""
    levels = {logger: logger.level for logger in logging.root.manager.loggerDict.values() if hasattr(logger, "level")}
    handlers, level = logging.root.handlers[:], logging.root.level

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["embeddings-pipeline", *arguments])
        main()

    yield run
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    for name in list(logging.root.manager.loggerDict):
        logger = logging.getLogger(name)
        logger.setLevel(levels.get(logger, logging.NOTSET))


def commands(command: click.Command, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], click.Command]]:
    if isinstance(command, click.Group):
        return [one for name, part in command.commands.items() for one in commands(part, (*path, name))]
    return [(path, command)]


@pytest.mark.parametrize(("path", "command"), commands(typer.main.get_command(app)), ids=lambda part: str(part)[:40])
def test_help_shows_the_text_of_each_parameter(
    path: tuple[str, ...],
    command: click.Command,
    run_main: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="0"):
        run_main(*path, "--help")
    words = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    for parameter in command.params:
        text = " ".join((getattr(parameter, "help", None) or "").split())
        assert text, f"{parameter.name} has no help"
        assert all(word in words for word in text.split()), f"{parameter.name}: {text}"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["simlar"], "error: No such command 'simlar'. Did you mean 'similar'? (see `embeddings-pipeline --help`)"),
        (["profile", "swich"], "error: No such command 'swich'. Did you mean 'switch'? (see `embeddings-pipeline pro"),
        (["search", "-k", "1001", "x"], "error: Invalid value for '-k': 1001 is not in the range 1<=x<=1000. (see `"),
        (["search"], "error: Missing argument 'QUERY'. (see `embeddings-pipeline search --help`)"),
        (["sync", "--ful"], "error: No such option '--ful'. Did you mean '--full'? (see `embeddings-pipeline sync --"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    arguments: list[str], line: str, run_main: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_main(*arguments)
    shown = capsys.readouterr().err
    assert shown.startswith(line) and shown.count("\n") == 1
