"""The embedded server: started with the first process that needs it, stopped with the last, however they end."""

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import DatabaseError
from embeddings_pipeline.store.database import EMBEDDED_DATABASE, Database, open_database, psql_command
from embeddings_pipeline.store.server.binaries import server_binaries
from embeddings_pipeline.store.server.folders import ROOTS_FOLDER, digest
from embeddings_pipeline_tests.support.workbench import wait_until

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
# Uses the database in the state folder argv[1] until its standard input ends.
USER = """
import sys
from pathlib import Path
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.store.database import open_database
from embeddings_pipeline.store.schema import ensure_schema
database = open_database(Settings(embeddings_state_dir=Path(sys.argv[1])))
ensure_schema(database)
print("ready", flush=True)
for line in sys.stdin:
    with database.connect() as connection:
        print(connection.execute(line).fetchone()[0], flush=True)
"""


class User:
    """Another process that uses the database."""

    def __init__(self, state: Path, prefix: tuple[str, ...] = ()) -> None:
        command = [*prefix, sys.executable, "-c", USER, str(state)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, start_new_session=True, **pipes)  # type: ignore[call-overload]

    def ready(self) -> "User":
        assert self.process.stdout.readline() == "ready\n", self.process.stderr.read()
        return self

    def ask(self, query: str) -> str:
        self.process.stdin.write(query + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def leave(self) -> None:
        _, errors = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, errors

    def kill(self, how: int = signal.SIGKILL) -> None:
        os.killpg(self.process.pid, how)
        self.process.communicate(timeout=60)


@pytest.fixture
def state(embedded: None, open_folder: Path) -> Iterator[Path]:
    """A state folder of this test's own, without a server yet; no process may be left when the test ends."""
    folder = open_folder / uuid.uuid4().hex[:8]
    folder.mkdir(mode=0o711)
    yield folder
    wait_until(lambda: not processes(folder))
    # Only this test's: another session's may be empty because its server is about to start.
    servers = [path for path in folder.rglob("postgres") if path.is_dir()]
    ours = [digest(str(path), str(path.stat().st_ino)) for path in servers]
    shutil.rmtree(folder)
    for left in (path for name in ours for path in Path("/tmp").glob(f"embeddings-pg-*-{name}")):
        with contextlib.suppress(OSError):
            left.rmdir()


def processes(state: Path) -> list[psutil.Process]:
    """PostgreSQL's processes on the state folder, and their supervisor."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if any(f"{state}/postgres/data" in word for word in words) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def postmaster(state: Path) -> psutil.Process:
    return psutil.Process(int((state / "postgres" / "data" / "postmaster.pid").read_text().split()[0]))


@contextlib.contextmanager
def opened(state: Path) -> Iterator[Database]:
    database = open_database(Settings(embeddings_state_dir=state))
    try:
        yield database
    finally:
        database.close()


def test_last_process_to_leave_stops_the_server(state: Path) -> None:
    first, second = User(state).ready(), User(state).ready()
    first.leave()
    assert second.ask("SELECT 'still here'") == "still here"
    second.leave()
    assert not processes(state)


def test_killed_processes_do_not_keep_the_server(state: Path) -> None:
    starter, other = User(state).ready(), User(state).ready()
    starter.kill()
    assert other.ask("SELECT 1") == "1"
    other.kill()
    wait_until(lambda: not processes(state), 10)


def test_terminated_process_does_not_keep_the_server(state: Path) -> None:
    User(state).ready().kill(signal.SIGTERM)
    wait_until(lambda: not processes(state), 10)


def test_interrupt_from_the_terminal_spares_the_server(state: Path) -> None:
    starter, other = User(state).ready(), User(state).ready()
    server = postmaster(state)
    starter.kill(signal.SIGINT)
    assert other.ask("SELECT 1") == "1"
    assert postmaster(state) == server
    other.leave()


def test_killed_server_is_started_again_and_has_what_was_committed(state: Path) -> None:
    with opened(state) as database:
        with database.connect() as connection:
            connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
        postmaster(state).kill()
        with database.connect() as connection:
            assert connection.execute("SELECT answer FROM kept").fetchone() == (42,)


def test_several_processes_start_a_killed_server_once(state: Path) -> None:
    users = [User(state).ready() for _ in range(3)]
    for process in processes(state):  # the supervisor as well
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    with ThreadPoolExecutor() as pool:
        starts = set(pool.map(lambda user: user.ask("SELECT pg_postmaster_start_time()"), users))
    assert len(starts) == 1
    for user in users:
        user.leave()
    assert not processes(state)


def test_server_without_its_supervisor_stops_too(state: Path) -> None:
    with opened(state) as database:
        postmaster(state).parent().kill()
        with database.connect(autocommit=True) as connection:
            connection.execute("SELECT 1")
    wait_until(lambda: not processes(state), 10)


def test_processes_that_start_together_share_one_server_and_one_schema(state: Path) -> None:
    users = [User(state) for _ in range(4)]
    starts = {user.ready().ask("SELECT pg_postmaster_start_time()") for user in users}
    assert len(starts) == 1
    for user in users:
        user.leave()


def test_stale_pid_file_with_a_living_foreign_pid_does_not_hinder(state: Path) -> None:
    with opened(state):
        pass
    pid_file = state / "postgres" / "data" / "postmaster.pid"
    pid_file.write_text(f"{os.getpid()}\n{pid_file.parent}\n1\n5432\n\n\n0 0\nready\n")
    with opened(state) as database:
        database.connect().close()


def test_initialisation_that_was_killed_is_done_again(state: Path) -> None:
    half_made = state / "postgres" / "data.new"
    half_made.mkdir(parents=True)
    (half_made / "PG_VERSION").write_text("18\n")
    with opened(state) as database:
        database.connect().close()
    assert not half_made.exists()


@pytest.mark.parametrize("name", ["with a space, and more", "long" * 30, "größe-'\"%20"])
def test_any_path_will_do(state: Path, name: str) -> None:
    folder = state / name
    folder.mkdir(mode=0o711)
    user = User(folder).ready()
    assert user.ask("SELECT 1") == "1"
    path, argv, environment = psql_command(
        database := open_database(Settings(embeddings_state_dir=folder)), ["-Atc", "SELECT 2"]
    )
    assert (
        subprocess.run([path, *argv[1:]], env=environment, check=False, capture_output=True, text=True).stdout == "2\n"
    )
    database.close()
    user.leave()
    assert not processes(folder)


def test_server_is_the_users_alone(state: Path) -> None:
    with opened(state) as database, database.connect() as connection:
        assert connection.execute("SHOW listen_addresses").fetchone() == ("",)
        assert stat.S_IMODE((state / "postgres").stat().st_mode) == 0o700
        assert stat.S_IMODE((state / "postgres" / "data").stat().st_mode) == 0o700


def test_a_second_start_does_not_take_long(state: Path) -> None:
    with opened(state):
        pass
    begin = time.monotonic()
    with opened(state):
        assert time.monotonic() - begin < 5  # 0.2 s on an idle machine


@needs_root
def test_any_user_can_have_a_server(state: Path) -> None:
    # Kept: the right to read, since the interpreter may be root's own (below /root).
    as_nobody: tuple[str, ...] = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    as_nobody += ("--inh-caps=-all,+dac_read_search", "--ambient-caps=+dac_read_search")
    if (
        shutil.which("setpriv") is None
        or subprocess.run([*as_nobody, sys.executable, "-c", ""], check=False).returncode
        or subprocess.run([*as_nobody, "test", "-x", server_binaries() / "postgres"], check=False).returncode
    ):
        pytest.skip("setpriv cannot start this interpreter, or its PostgreSQL, as another user")
    os.chown(state, 65534, 65534)
    user = User(state, as_nobody).ready()
    assert {process.uids().real for process in processes(state)} == {65534}
    user.leave()
    assert not processes(state)


@needs_root
def test_roots_private_folder_stays_private(state: Path) -> None:
    private = state / "private"
    private.mkdir(mode=0o700)
    before = set(ROOTS_FOLDER.iterdir()) if ROOTS_FOLDER.exists() else set()
    try:
        user = User(private).ready()
        assert user.ask("SELECT 1") == "1"
        user.leave()
        assert stat.S_IMODE(private.stat().st_mode) == 0o700
    finally:
        for stand_in in set(ROOTS_FOLDER.iterdir()) - before:
            shutil.rmtree(stand_in)


def test_server_that_cannot_start_names_its_log(state: Path) -> None:
    with opened(state):
        pass
    with (state / "postgres" / "data" / "postgresql.auto.conf").open("a") as settings:
        settings.write("shared_buffers = much\n")
    with pytest.raises(
        DatabaseError, match=r"^the embedded PostgreSQL did not start: .*shared_buffers|auto.conf.*server.log$"
    ) as caught:
        opened(state).__enter__()
    assert "\n" not in str(caught.value)


def test_data_of_another_postgresql_is_refused(state: Path) -> None:
    with opened(state):
        pass
    (state / "postgres" / "data" / "PG_VERSION").write_text("15\n")
    with pytest.raises(DatabaseError, match="was made by PostgreSQL 15"):
        opened(state).__enter__()


def test_folder_that_cannot_be_written_is_named(state: Path) -> None:
    (state / "postgres").write_text("in the way")
    with pytest.raises(DatabaseError, match=f"cannot use its folder {state}/postgres .*: make room there or"):
        opened(state).__enter__()


def test_a_killed_server_is_started_again_for_a_session(state: Path) -> None:
    with opened(state) as database:
        with database.session() as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
        backends = postmaster(state).children()
        postmaster(state).kill()
        psutil.wait_procs(backends, timeout=10)  # until then one may still answer
        with database.session() as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)


@pytest.mark.usefixtures("embedded")
def test_threads_share_one_server_object(open_folder: Path, server: Database) -> None:
    found: list[Database] = []
    settings = Settings(embeddings_state_dir=open_folder)
    threads = [threading.Thread(target=lambda: found.append(open_database(settings))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {id(database.server) for database in found} == {id(server.server)}


def test_program_that_replaces_the_process_keeps_the_server(state: Path) -> None:
    script = """
import os, sys
from pathlib import Path
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.store.database import open_database, psql_command
database = open_database(Settings(embeddings_state_dir=Path(sys.argv[1])))
os.execve(*psql_command(database, ["-Atc", "SELECT pg_sleep(0.3); SELECT current_database()"]))
"""
    done = subprocess.run([sys.executable, "-c", script, str(state)], check=False, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == [EMBEDDED_DATABASE], done.stderr
    wait_until(lambda: not processes(state), 10)
