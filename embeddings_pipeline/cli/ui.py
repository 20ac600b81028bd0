"""`ui`: Dagster's webserver and daemon on this machine, one such pair a project."""

import contextlib
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Annotated

import typer

from embeddings_pipeline.cli.console import printable
from embeddings_pipeline.config.settings import Settings, load_settings, project_root, revealed
from embeddings_pipeline.errors import ConfigurationError
from embeddings_pipeline.store.database import open_database

# What Dagster says of itself, and nobody has to do anything about; and the tracebacks of runs, which the UI shows:
# an alert says in a sentence what failed.
NOISE = re.compile(r" - (DEBUG|INFO) - |No cursor for event type| - (STEP|RUN)_FAILURE - ")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
MESSAGE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S+ - ")  # what one of Dagster's begins with
ALERT = re.compile(r"(?:^|: )alert (\{.*\})$")
LOOK_SECONDS = 1.0


def ui(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 3000,
) -> None:
    """The Dagster UI: webserver and daemon, until Ctrl-C."""
    raise SystemExit(run_ui(load_settings(), host, port))


def run_ui(settings: Settings, host: str, port: int) -> int:
    """Run until Ctrl-C or SIGTERM; the exit code, which is 0 if that ended it and nothing else.

    ConfigurationError if the port is taken, this project's UI runs, or Dagster cannot use `dagster.yaml`.
    """
    _refuse_taken(host, port)
    settings.state_dir.mkdir(parents=True, exist_ok=True)
    with (settings.state_dir / "ui.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigurationError(
                "the Dagster UI of this project is already running, and two daemons on one database quarrel; "
                "use that one, or stop it first"
            ) from error
        print("starting Dagster", flush=True)
        if revealed(settings.database_url):
            open_database(settings).connect().close()  # which says in one line why it cannot be used
        _check_instance()
        # The lock's descriptor goes with it, so it is held as long as any of its processes lives.
        os.set_inheritable(lock.fileno(), True)
        return _Dagster(host, port).run()


class _Dagster:
    """`dagster dev` as our child: what it says is passed on, and a person's wish to end it too."""

    def __init__(self, host: str, port: int) -> None:
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self.asked_to_end = False
        # `dg dev` starts this very command, and prints more beside it.
        command = [sys.executable, "-m", "dagster", "dev", "--host", host, "--port", str(port)]
        self.command = [*command, "--log-level", "warning"]  # else each tick of the sensor is two lines

    def run(self) -> int:
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a script's background job, whose children would ignore
            signal.signal(signal.SIGINT, signal.default_int_handler)  # SIGTERM too: Dagster gives both one handler
        root = project_root()
        filters = [os.environ.get("PYTHONWARNINGS"), "ignore:Function `dev_command` is superseded"]
        environment = {**os.environ, "DAGSTER_HOME": str(root), "PYTHONUNBUFFERED": "1"}
        environment["PYTHONWARNINGS"] = ",".join(filter(None, filters))
        with subprocess.Popen(
            self.command,
            cwd=root,
            env=environment,
            close_fds=False,
            process_group=0,  # Ctrl-C is for us, who end Dagster: two signals would cut its own shutdown short
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            assert process.stdout is not None
            telling = threading.Thread(target=tell, args=(process.stdout,), daemon=True)
            telling.start()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:  # as `nohup` has it
                    signal.signal(number, lambda *_: self._end(process))
            print(f"Dagster UI: {self.address}  (Ctrl-C ends it)", flush=True)
            code = self._wait(process)
            telling.join(timeout=5)
        if self.asked_to_end:
            return 0
        print("error: Dagster ended by itself, for the reason above: start it again", file=sys.stderr)
        return code or 1

    def _end(self, process: "subprocess.Popen[str]") -> None:
        if not self.asked_to_end:
            self.asked_to_end = True
            process.send_signal(signal.SIGTERM)

    def _wait(self, process: "subprocess.Popen[str]") -> int:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(LOOK_SECONDS)
            if _make_was_interrupted(os.getppid()):
                self._end(process)


def tell(output: IO[str]) -> None:
    """Print what a person needs of what Dagster says."""
    noise = False
    for coloured in output:
        line = COLOUR.sub("", coloured)
        if alert := ALERT.search(line.rstrip()):
            noise, line = False, f"ALERT: {_sentence(alert[1])}"
        elif MESSAGE.match(line):
            noise = NOISE.search(line) is not None
        if not noise:
            print(printable(line.rstrip("\r\n")), flush=True)


def _sentence(alert: str) -> str:
    try:
        return str(json.loads(alert)["text"])
    except (ValueError, KeyError):  # two processes wrote at once
        return alert


def _make_was_interrupted(pid: int) -> bool:
    """Whether our parent is a `make` that got SIGINT: it takes it for the terminal's, passes it on to nobody, and waits
    for us with the signal blocked. Only Linux says so.
    """
    try:
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except (OSError, ValueError):
        return False
    interrupted = int(status["SigBlk"], 16) >> (signal.SIGINT - 1) & 1
    return bool(interrupted) and status["Name"].strip() in {"make", "gmake"}


def _check_instance() -> None:
    """Say in one line what Dagster would say in a traceback: a `dagster.yaml` that is broken, a database that is not
    there.
    """
    from embeddings_pipeline.orchestration.instance.home import project_instance

    with project_instance():
        pass


def _refuse_taken(host: str, port: int) -> None:
    # Dagster prints an error and hangs when its port is taken.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigurationError(
                f"port {port} on {host} cannot be used ({error.strerror}); choose another: "
                f"`embeddings-pipeline ui --port {port + 1}`"
            ) from error
