"""Failpoints: what a test or the environment asks for happens there, and nothing else ever does."""

import os
import signal
import subprocess
import sys

import pytest

from embeddings_pipeline.failpoints import at_failpoint, failpoint


def test_an_action_is_told_what_the_place_knows_until_its_block_ends() -> None:
    told: list[int] = []

    def note(batch: int) -> None:
        told.append(batch)

    failpoint("a", batch=1)
    with at_failpoint("a", note):
        failpoint("a", batch=2)
        failpoint("b", batch=3)
    failpoint("a", batch=4)
    assert told == [2]


@pytest.mark.parametrize(
    ("asked", "code", "says"),
    [
        ("a=kill", -signal.SIGKILL, ""),
        ("b=kill, a=fail", 1, "RuntimeError: failpoint a: fail"),
        ("a=sleep:0", 0, ""),
        ("b=kill", 0, ""),
    ],
)
def test_another_process_takes_its_actions_from_the_environment(asked: str, code: int, says: str) -> None:
    script = "from embeddings_pipeline.failpoints import failpoint; failpoint('a')"
    environment = {**os.environ, "EMBEDDINGS_FAILPOINTS": asked}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == code and says in done.stderr
