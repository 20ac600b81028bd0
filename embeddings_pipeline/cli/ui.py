"""`ui`: Dagster's webserver and daemon on this machine, one such pair a project."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
from typing import Annotated

import typer

from embeddings_pipeline.config.settings import Settings, load_settings, project_root
from embeddings_pipeline.errors import ConfigurationError
from embeddings_pipeline.store.database import open_database


def ui(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 3000,
) -> None:
    """The Dagster UI: webserver and daemon, until Ctrl-C."""
    raise SystemExit(run_ui(load_settings(), host, port))


def run_ui(settings: Settings, host: str, port: int) -> int:
    """Run until Ctrl-C; the exit code. ConfigurationError if the port is taken or this project's UI runs."""
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
        if settings.database_url:
            open_database(settings).connect().close()  # which says in one line why it cannot be used
        root = project_root()
        command = [sys.executable, "-m", "dagster", "dev", "--host", host, "--port", str(port)]
        command += ["--log-level", "warning"]  # else each tick of the sensor is two lines here
        # `dg dev` starts this very command, and prints more beside it.
        filters = [os.environ.get("PYTHONWARNINGS"), "ignore:Function `dev_command` is superseded"]
        warnings = ",".join(filter(None, filters))
        environment = {**os.environ, "DAGSTER_HOME": str(root), "PYTHONWARNINGS": warnings}
        print(f"Dagster UI: http://{host}:{port}  (Ctrl-C ends it)", flush=True)
        # The lock's descriptor goes with it, so it is held as long as any of its processes lives.
        os.set_inheritable(lock.fileno(), True)
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a script's background job, whose children would ignore
            signal.signal(signal.SIGINT, signal.default_int_handler)  # SIGTERM too: Dagster gives both one handler
        process = subprocess.Popen(command, cwd=root, env=environment, close_fds=False)
        # From a service manager or `kill`; Dagster ends as after Ctrl-C.
        signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGTERM))
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue  # the terminal sent it to Dagster too, which ends in its own time


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
