"""How `ui` ends: by a person with 0, by itself with another code; and what a person reads meanwhile."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from embeddings_pipeline_tests.process.test_ui import END_SECONDS, PROJECT, START_SECONDS, alive, answers, free_port
from embeddings_pipeline_tests.support.workbench import wait_until

UI = [sys.executable, "-m", "embeddings_pipeline", "ui"]
MAKEFILE = "ui:\n\t@exec $(UI)\n"  # as the project's, less the set-up


class Started:
    """A `ui` that answers, started by `command`; PORT stands for its port."""

    def __init__(self, folder: Path, command: list[str]) -> None:
        (folder / "defs").mkdir(exist_ok=True)
        port = free_port()
        self.log = folder / f"{port}.log"
        settings = {"EMBEDDINGS_STATE_DIR": folder / "state", "EMBEDDINGS_DEFS_DIR": folder / "defs"}
        environment = {**os.environ, "DAGSTER_HOME": str(PROJECT), **{name: str(it) for name, it in settings.items()}}
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [part.replace("PORT", str(port)) for part in command],
                cwd=folder,
                env=environment | {"UI": f"{shlex.join(UI)} --port {port}"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        address = f"http://127.0.0.1:{port}/server_info"
        wait_until(lambda: answers(address) or self.process.poll() is not None, START_SECONDS, pause=0.3)
        assert self.process.poll() is None, self.printed
        self.processes = psutil.Process(self.process.pid).children(recursive=True)

    @property
    def printed(self) -> str:
        return self.log.read_text()

    def daemon(self) -> psutil.Process:
        [daemon, *_] = [each for each in self.processes if "dagster._daemon" in each.cmdline()]
        return daemon

    def ended(self) -> int:
        """Its exit code, once everything that it started has gone."""
        code = self.process.wait(END_SECONDS)
        wait_until(lambda: not any(alive(each) for each in self.processes), END_SECONDS)
        return code


@pytest.fixture
def start(open_folder: Path) -> Iterator[Callable[[list[str]], Started]]:
    folder = open_folder / "ends"
    folder.mkdir(mode=0o711, exist_ok=True)
    (folder / "Makefile").write_text(MAKEFILE)
    every: list[Started] = []

    def starting(command: list[str]) -> Started:
        every.append(Started(folder, command))
        return every[-1]

    yield starting
    for one in every:
        for process in (*one.processes, psutil.Process(one.process.pid) if one.process.poll() is None else None):
            if process is not None and alive(process):
                process.kill()
        one.process.wait()


def test_a_signal_to_it_alone_ends_all_of_it_with_0_and_a_person_has_read_only_the_address(start) -> None:
    ui = start([*UI, "--port", "PORT"])
    wait_until(lambda: "Dagster UI: http://127.0.0.1:" in ui.printed)
    ui.process.send_signal(signal.SIGINT)
    assert ui.ended() == 0
    assert [line.split(" http")[0] for line in ui.printed.splitlines()] == ["starting Dagster", "Dagster UI:"]


def test_a_daemon_that_is_killed_ends_it_with_another_code_and_a_line(start) -> None:
    ui = start([*UI, "--port", "PORT"])
    ui.daemon().kill()
    assert ui.ended() != 0
    assert "Dagster ended by itself" in ui.printed


@pytest.mark.parametrize(
    ("command", "number"),
    [
        (["make", "ui"], signal.SIGINT),
        # A script's background job, which ignores SIGINT.
        (["/bin/sh", "-c", "trap '' INT; exec make ui"], signal.SIGTERM),
    ],
)
def test_a_signal_to_make_ends_all_of_it(start, command: list[str], number: signal.Signals) -> None:
    ui = start(command)
    ui.process.send_signal(number)
    ui.ended()
    assert "Traceback" not in ui.printed and "by itself" not in ui.printed


def test_a_script_s_background_job_ends_by_sigint_too(start) -> None:
    ui = start(["/bin/sh", "-c", "trap '' INT; eval exec \"$UI\""])
    ui.process.send_signal(signal.SIGINT)
    assert ui.ended() == 0
