"""`embeddings-pipeline …` in a process of its own, or in this one, which saves the seconds that imports take."""

import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from typer.testing import CliRunner

from embeddings_pipeline.cli.main import app, one_line

PROJECT = Path(__file__).resolve().parents[2]
PROGRESS = re.compile(r"(films: .*|[\w ]+: still at work|loading the model); \d+ s\n")  # from the fifth second on
Done = subprocess.CompletedProcess[str]


def run_process(arguments: tuple[str, ...], environment: Mapping[str, str]) -> Done:
    """In its own process, with this environment and no other."""
    command = [sys.executable, "-m", "embeddings_pipeline", *arguments]
    how = {"cwd": PROJECT, "env": dict(environment), "capture_output": True, "text": True, "timeout": 120}
    return subprocess.run(command, check=False, **how)  # type: ignore[call-overload, no-any-return]


def run_here(arguments: tuple[str, ...], environment: Mapping[str, str] | None = None) -> Done:
    """In this process, with these variables added; what a user can cause is one line on stderr, as in `main`."""
    done = CliRunner(env=environment or {}).invoke(app, arguments)
    stderr = done.stderr
    if done.exception and not isinstance(done.exception, SystemExit):
        line = one_line(done.exception)
        if line is None:
            raise done.exception
        stderr += f"{line}\n"
    return Done(arguments, done.exit_code, done.stdout, stderr)


def commands_of(page: str) -> list[str]:
    """The commands of a page that are this project's, as the words that follow the interpreter."""
    named = re.findall(r"^(python|embeddings-pipeline) (.+?)(?: +#.*)?$", page, re.MULTILINE)
    return [words if program == "python" else f"-m embeddings_pipeline {words}" for program, words in named]


def run_words(arguments: str) -> str:
    """What the interpreter prints, given the words that follow it on a page; it has to end well."""
    words = tuple(shlex.split(arguments))
    if words[:2] == ("-m", "embeddings_pipeline") and words[2] != "psql":  # which prints past Python
        done = run_here(words[2:])
    else:
        done = subprocess.run([sys.executable, *words], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (arguments, done.stdout, done.stderr)
    return done.stdout
