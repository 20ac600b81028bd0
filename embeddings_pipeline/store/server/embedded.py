"""The embedded PostgreSQL: started by the first process that needs it, shared by all, stopped with the last one.

Only the wheel's binaries are used. Its own life cycle keeps process ids in a file, which SIGTERM and SIGKILL leave
wrong; here the kernel keeps count, through locks on two files (see `supervisor.py`). They are bare `flock`s and not
`filelock`'s, since a lock here is shared by many processes, and its descriptor is handed on to a program that outlives
the process which took it. In the server's folder:

    data/         PostgreSQL's data folder          lease          who uses the server
    server.log    what PostgreSQL and initdb say    guard          who runs it

The socket is there too, unless its path would be too long or libpq could not read it. PostgreSQL refuses to run as
root; root's server runs as the user that owns its data, at first as the system user `pgserver`. If that user cannot
enter the folder, as below /root, everything is kept in /var/lib/embeddings-pipeline instead: no permission of
anybody's folder is widened.
"""

import atexit
import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import psycopg

from embeddings_pipeline.errors import DatabaseError
from embeddings_pipeline.forks import ProcessLock
from embeddings_pipeline.store.server.binaries import check_version, server_binaries
from embeddings_pipeline.store.server.folders import as_user, server_user, socket_folder_of, usable_folder

logger = logging.getLogger(__name__)

SUPERUSER = "postgres"
START_SECONDS = 90  # with crash recovery, and until a server that is just stopping has written its checkpoint
LEAVE_SECONDS = 20
LOG_BYTES = 16 * 2**20
_NOT_ACCEPTING = re.compile(r"the database system is (starting up|shutting down|not (yet )?accepting|in recovery)")
_NOT_THERE = re.compile(r"No such file or directory|Connection refused|Connection reset|server closed the connection")


class EmbeddedServer:
    """This process's use of the server in `folder`. From the first `ensure_running` until `leave` the server stays."""

    def __init__(self, folder: Path) -> None:
        self._mutex = ProcessLock()
        self._lease: int | None = None
        with _explained(folder):
            self._user = server_user(folder)
            self.folder = usable_folder(folder, self._user)
            self._socket_folder = socket_folder_of(self.folder, self._user)

    @property
    def log(self) -> Path:
        """PostgreSQL's log file."""
        return self.folder / "server.log"

    @property
    def in_use(self) -> bool:
        """Whether this process uses the server now."""
        return self._lease is not None

    def url(self, database: str) -> str:
        """Where `database` is reached; it stays the same over restarts."""
        return f"postgresql://{SUPERUSER}@/{quote(database)}?host={quote(str(self._socket_folder))}&port=5432"

    def ensure_running(self) -> None:
        """Return once the server answers; start it if nobody has, or if it was killed. Threads may race here."""
        with self._mutex, _explained(self.folder):
            deadline = time.monotonic() + START_SECONDS
            self._hold_lease(deadline)
            log_end: int | None = None
            pause = 0.01
            while not self._answers():
                guard = _locked(self.folder / "guard")
                if guard is not None and log_end is not None:
                    os.close(guard)
                    raise DatabaseError(f"the embedded PostgreSQL did not start: {self._complaint(log_end)}")
                if guard is not None:
                    log_end = self._start(guard)
                if time.monotonic() > deadline:
                    raise DatabaseError(
                        f"the embedded PostgreSQL in {self.folder} does not answer after {START_SECONDS} s; "
                        f"its log is {self.log}"
                    )
                time.sleep(pause)
                pause = min(pause * 1.5, 0.25)

    def leave(self) -> None:
        """Stop using the server. If nobody else does, return once it has stopped."""
        with self._mutex:
            if self._lease is None:
                return
            os.close(self._lease)
            self._lease = None
            with contextlib.suppress(OSError):  # the folder may be gone by now
                alone = _locked(self.folder / "lease")
                if alone is None and (shared := _locked(self.folder / "lease", fcntl.LOCK_SH)) is not None:
                    os.close(shared)
                    return
                if alone is not None:
                    os.close(alone)
                deadline = time.monotonic() + LEAVE_SECONDS
                while time.monotonic() < deadline:
                    guard = _locked(self.folder / "guard")
                    if guard is not None:
                        os.close(guard)
                        return
                    time.sleep(0.02)

    def keep_through_exec(self) -> None:
        """Let a program that replaces this process (`os.execve`) go on using the server."""
        with self._mutex:
            if self._lease is not None:
                os.set_inheritable(self._lease, True)

    def _hold_lease(self, deadline: float) -> None:
        while self._lease is None:
            self._lease = _locked(self.folder / "lease", fcntl.LOCK_SH)
            if self._lease is None:  # the server is stopping, because everybody had left
                if time.monotonic() > deadline:
                    raise DatabaseError(f"the embedded PostgreSQL in {self.folder} has been stopping for too long")
                time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.url("postgres"), connect_timeout=10, application_name="is it up?").close()
        except psycopg.OperationalError as error:
            # Any other answer (too many clients, say) comes from a server that runs.
            return not (_NOT_ACCEPTING.search(str(error)) or _NOT_THERE.search(str(error)))
        return True

    def _start(self, guard: int) -> int:
        """Hand the guard lock to a new supervisor; returns where in the log its words begin."""
        try:
            binaries = server_binaries(self._user)
            if self.log.exists() and self.log.stat().st_size > LOG_BYTES:
                self.log.replace(self.log.with_suffix(".log.1"))
            with self.log.open("ab") as log:
                begin = log.tell()
                data = self.folder / "data"
                if not data.exists():
                    self._initialise(binaries, data, log.fileno())
                check_version(data, binaries)
                # Nothing of it runs, since we hold the guard; but somebody else, or a zombie, may have its number.
                for left in (data / "postmaster.pid", self._socket_folder / ".s.PGSQL.5432.lock"):
                    left.unlink(missing_ok=True)
                lease = os.open(self.folder / "lease", os.O_RDWR)
                try:
                    todo = {
                        "lease": lease,
                        "guard": guard,
                        "command": [str(binaries / "postgres"), "-D", str(data), *self._start_settings()],
                        "user": self._user,
                        "folder": str(data),
                    }
                    script = str(Path(__file__).with_name("supervisor.py"))
                    subprocess.run(
                        [sys.executable, "-I", "-S", script, json.dumps(todo)],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        pass_fds=(lease, guard),
                        start_new_session=True,  # Ctrl-C in the terminal is not for PostgreSQL
                        check=True,
                    )
                finally:
                    os.close(lease)
            return begin
        finally:
            os.close(guard)

    def _initialise(self, binaries: Path, data: Path, log: int) -> None:
        # Under another name until it is complete, so that a process killed here leaves nothing half-made behind.
        fresh = self.folder / "data.new"
        if fresh.exists():
            shutil.rmtree(fresh)
        command = [binaries / "initdb", "-D", fresh, "-U", SUPERUSER, "--encoding=UTF8", "--auth-local=trust"]
        # Bytewise order, as fast as locale C, with Unicode's upper and lower case.
        command += ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--auth-host=scram-sha-256"]
        command += ["--no-instructions", "--no-sync"]  # fsync would cost seconds, for a database that is still empty
        for name, value in _first_settings().items():
            command += ["-c", f"{name}={value}"]
        os.write(log, f"--- new data folder {data}\n".encode())
        done = subprocess.run(
            [str(part) for part in command],
            check=False,
            cwd="/",
            env={"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            **as_user(self._user),
        )
        os.write(log, done.stderr)
        if done.returncode:
            shutil.rmtree(fresh, ignore_errors=True)
            raise DatabaseError(
                f"the embedded PostgreSQL cannot make its data folder: {_last_complaint(done.stderr)}; "
                f"its log is {self.log}"
            )
        fresh.rename(data)

    def _start_settings(self) -> list[str]:
        settings = {
            "listen_addresses": "",
            "port": "5432",
            "unix_socket_directories": '"{}"'.format(str(self._socket_folder).replace('"', '""')),
            "unix_socket_permissions": "0700",
        }
        # Parallel index builds share up to maintenance_work_mem; containers often have 64 MB in /dev/shm.
        with contextlib.suppress(OSError):
            shm = os.statvfs("/dev/shm")
            if shm.f_frsize * shm.f_blocks < 2 * 2**30:
                settings["dynamic_shared_memory_type"] = "mmap"
        return [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]

    def _complaint(self, begin: int) -> str:
        with self.log.open("rb") as log:
            log.seek(begin)
            return f"{_last_complaint(log.read(2**20))}; its log is {self.log}"


def _first_settings() -> dict[str, str]:
    """What a new data folder's postgresql.conf says; to be changed there or with ALTER SYSTEM."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # a container's limit; "max" if there is none
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    megabytes = memory // 2**20
    settings = {
        "max_connections": "200",  # Dagster's webserver, daemon and code server, sync, and runs beside each other
        "shared_buffers": f"{min(max(megabytes // 16, 64), 512)}MB",
        "maintenance_work_mem": f"{min(max(megabytes // 16, 64), 1024)}MB",  # an HNSW build that fits is much faster
        "effective_cache_size": f"{megabytes // 2}MB",
        "max_wal_size": "2GB",
        "checkpoint_timeout": "15min",
        "random_page_cost": "1.1",
        "huge_pages": "off",
        "jit": "off",
        "timezone": "UTC",
        "log_timezone": "UTC",
        "log_checkpoints": "off",
        "log_line_prefix": "%m [%p] %a ",
    }
    if sys.platform == "linux":
        settings["recovery_init_sync_method"] = "syncfs"  # one call after a crash, not an fsync for each file
    return settings


def _locked(path: Path, how: int = fcntl.LOCK_EX) -> int | None:
    """A new descriptor of the file with the lock, or None if somebody else's is in the way."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if os.geteuid() == 0 and os.fstat(descriptor).st_uid == 0:
            owner = path.parent.stat()  # so that the folder's owner can use the server without root, too
            os.fchown(descriptor, owner.st_uid, owner.st_gid)
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _last_complaint(output: bytes) -> str:
    lines = [line.strip() for line in output.decode(errors="replace").splitlines() if line.strip()]
    bad = [line for line in lines if re.search(r"FATAL|PANIC|\berror\b|could not", line)]
    if not (bad or lines):
        return "it said nothing"
    return re.sub(r"^.*?(FATAL|PANIC|error):\s*", "", (bad or lines)[-1])


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = f"{error.filename or folder}: {error.strerror or error}"
        raise DatabaseError(
            f"the embedded PostgreSQL cannot use its folder {folder} ({reason}): make room there or give this user "
            "the right to write, or set EMBEDDINGS_STATE_DIR or DATABASE_URL"
        ) from error


_servers: dict[Path, EmbeddedServer] = {}
_servers_mutex = ProcessLock()


def embedded_server(folder: Path) -> EmbeddedServer:
    """The one object of this process for the server in `folder`; the server is left when the process exits."""
    folder = folder.resolve()
    with _servers_mutex:
        if folder not in _servers:
            server = EmbeddedServer(folder)
            atexit.register(_leave_in(os.getpid(), server.leave))
            _servers[folder] = server
        return _servers[folder]


def _leave_in(process: int, leave: Callable[[], None]) -> Callable[[], None]:
    # A forked child's descriptors are its own: it may leave, but must not wait for what its parent still uses.
    return lambda: leave() if os.getpid() == process else None
