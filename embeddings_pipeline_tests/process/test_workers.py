"""A run's process is forked from one that has imported everything; whatever of these is killed is found and mended."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import psutil
import pytest
import yaml

from embeddings_pipeline.config.loading import read_collections
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.orchestration.component import build_definitions
from embeddings_pipeline.orchestration.dagster_internals import (
    RegisteredCodeLocationOrigin,
    RemoteRepositoryOrigin,
    grpc_client,
)
from embeddings_pipeline.orchestration.instance.home import LOCATION
from embeddings_pipeline.orchestration.instance.liveness import RunWatch, cancel_dead_runs, noted_process
from embeddings_pipeline.orchestration.instance.workers import PRELOADED
from embeddings_pipeline.orchestration.partitions import range_tags
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.command_line import PROJECT
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.workbench import PROFILE, committed, films, make_films, wait_until

START_SECONDS, END_SECONDS = 60, 30  # on a busy machine
HEAVY = {"dagster", "dagster_postgres", "dagster_shared", "grpc", "sqlalchemy", "psycopg2", "pyarrow", "numpy", "upath"}


class HeldEncoder(DeterministicEncoder):
    """Notes what its process has imported, and encodes once the file `hold` is gone."""

    def __init__(self, profile: Profile) -> None:
        super().__init__(profile)
        self.folder = Path(os.environ["EMBEDDINGS_DEFS_DIR"])
        (self.folder / "imported").write_text("\n".join(sys.modules))
        while (self.folder / "hold").exists():
            time.sleep(0.05)


class CodeServer:
    """`dagster api grpc`, which serves the collection in `folder`, and what a launcher asks of it."""

    def __init__(self, instance: dg.DagsterInstance, folder: Path) -> None:
        self.instance, self.folder = instance, folder
        socket = str(folder / "socket")
        command = [sys.executable, "-m", "dagster", "api", "grpc", "--socket", socket, "--location-name", LOCATION]
        command += ["--module-name", "embeddings_pipeline.definitions"]
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen(command, cwd=PROJECT, stdout=log, stderr=log, start_new_session=True)
        self.client = grpc_client(socket=socket)
        wait_until(self.answers, START_SECONDS, pause=0.2)

    def answers(self) -> bool:
        assert self.process.poll() is None, (self.folder / "log").read_text()
        try:
            return bool(self.client.ping("?"))
        except dg.DagsterError:
            return False

    def launch(self, job: str, **tags: str) -> dg.DagsterRun:
        """A run, as the daemon launches it."""
        [definition] = read_collections(self.folder).collections.values()
        made = build_definitions(definition).resolve_job_def(job)
        origin = RemoteRepositoryOrigin(RegisteredCodeLocationOrigin(LOCATION), "__repository__")
        run = self.instance.create_run_for_job(made, tags=tags, remote_job_origin=origin.get_job_origin(job))
        dg.DefaultRunLauncher.launch_run_from_grpc_client(self.instance, run, self.client)
        return run

    def worker(self, run: dg.DagsterRun) -> psutil.Process:
        """The process of a run that encodes now."""
        wait_until((self.folder / "imported").exists, START_SECONDS)
        noted = noted_process(self.again(run))
        assert noted is not None
        return psutil.Process(noted.pid)

    def again(self, run: dg.DagsterRun) -> dg.DagsterRun:
        found = self.instance.get_run_by_id(run.run_id)
        assert found is not None
        return found

    def ended(self, run: dg.DagsterRun) -> dg.DagsterRunStatus:
        """How a run ended."""
        wait_until(lambda: self.again(run).is_finished, END_SECONDS, pause=0.1)
        return self.again(run).status

    def fork_server(self) -> psutil.Process:
        children = psutil.Process(self.process.pid).children()
        [fork_server] = [each for each in children if "multiprocessing.forkserver" in " ".join(each.cmdline())]
        return fork_server

    def end(self) -> None:
        left = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        for process in left:
            process.kill()
        self.process.kill()
        self.process.wait()


def preloaded(what: str) -> str:
    """What a process prints that has imported what runs are forked from."""
    lines = ["import sys, threading", f"for name in {PRELOADED}: __import__(name)", f"print({what})"]
    command = [sys.executable, "-c", "\n".join(lines)]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def held(
    database: Database, project: Settings, instance: dg.DagsterInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[CodeServer, dg.DagsterRun]]:
    """A code server, and a run of its that has begun to encode and is held there, until the file `hold` goes."""
    folder = tmp_path / "defs"
    (folder / "films").mkdir(parents=True)
    attributes = {
        "name": "films",
        "source": {"table": "films", "key": ["id"]},
        "columns": ["title"],
        "vectors": {"base": "{title} | {overview}"},
        "profile": {**PROFILE, "model": f"{__name__}:HeldEncoder"},
    }
    component = {"type": "embeddings_pipeline.EmbeddingCollection", "attributes": attributes}
    (folder / "films" / "defs.yaml").write_text(yaml.safe_dump(component))
    monkeypatch.setenv("EMBEDDINGS_DEFS_DIR", str(folder))
    make_films(database, films(12))
    server = CodeServer(instance, folder)
    try:
        assert server.ended(server.launch("films_scan")) == dg.DagsterRunStatus.SUCCESS
        (folder / "hold").touch()
        yield server, server.launch("films_batches", **range_tags(0, 0))
    finally:
        server.end()


def test_a_run_is_forked_and_finds_all_of_dagster_imported(held: tuple[CodeServer, dg.DagsterRun]) -> None:
    server, run = held
    worker = server.worker(run)
    assert worker.parent() == server.fork_server()
    since = set((server.folder / "imported").read_text().split()) - set(preloaded("*sys.modules").split())
    assert " ".join(sorted(name for name in since if name.partition(".")[0] in HEAVY)) == ""
    (server.folder / "hold").unlink()
    assert server.ended(run) == dg.DagsterRunStatus.SUCCESS


def test_what_runs_are_forked_from_has_one_thread_of_python() -> None:
    assert preloaded("threading.active_count()") == "1\n"


def test_runs_end_with_what_they_were_forked_from_and_the_next_one_is_forked_from_another(
    held: tuple[CodeServer, dg.DagsterRun], database: Database
) -> None:
    server, run = held
    worker, former = server.worker(run), server.fork_server()
    former.kill()
    wait_until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, END_SECONDS)
    assert server.ended(run) == dg.DagsterRunStatus.FAILURE
    (server.folder / "hold").unlink()
    server.instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)  # as run monitoring does
    assert server.ended(server.launch("films_batches", **range_tags(0, 0))) == dg.DagsterRunStatus.SUCCESS
    assert server.fork_server() != former
    assert len(committed(database)) == 12


def test_a_worker_that_is_killed_is_noticed_by_its_code_server(held: tuple[CodeServer, dg.DagsterRun]) -> None:
    server, run = held
    server.worker(run).kill()
    assert server.ended(run) == dg.DagsterRunStatus.FAILURE


def test_a_run_that_a_person_ends_is_over(held: tuple[CodeServer, dg.DagsterRun]) -> None:
    server, run = held
    server.worker(run)
    assert server.instance.run_launcher.terminate(run.run_id)
    assert server.ended(run) == dg.DagsterRunStatus.CANCELED


def test_a_run_outlives_its_code_server_and_nothing_is_left_after_it(
    held: tuple[CodeServer, dg.DagsterRun], database: Database, instance: dg.DagsterInstance
) -> None:
    server, run = held
    worker, fork_server = server.worker(run), server.fork_server()
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    assert cancel_dead_runs(instance, database, RunWatch()) == []
    (server.folder / "hold").unlink()
    assert server.ended(run) == dg.DagsterRunStatus.SUCCESS
    wait_until(lambda: not fork_server.is_running() or fork_server.status() == psutil.STATUS_ZOMBIE, END_SECONDS)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
