"""Whose the server is, and where its files and its socket are. See `embedded.py`."""

import contextlib
import hashlib
import logging
import os
import pwd
import re
import secrets
import stat
import subprocess
from pathlib import Path
from typing import Any

from embeddings_pipeline.errors import DatabaseError

logger = logging.getLogger(__name__)

ROOTS_FOLDER = Path("/var/lib/embeddings-pipeline")
SOCKET_PATH_BYTES = 100  # sockaddr_un holds 108 on Linux, 104 on macOS


def server_user(folder: Path) -> list[int] | None:
    """[uid, gid] of the user that PostgreSQL runs as: the data's owner, else `pgserver`; None: as we are, not root."""
    if os.geteuid() != 0:
        return None
    for owned in (folder / "data", folder):
        if owned.exists() and (owner := owned.stat()).st_uid != 0:
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


def usable_folder(folder: Path, user: list[int] | None) -> Path:
    """`folder`, made and owned by the server's user; or its stand-in, if that user cannot enter it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if user is None:
        return folder
    if not can_enter(folder.parent, user):
        # The random name is kept in the folder: without it the stand-in is out of use. A copy of the folder has
        # the same name, but another inode, and gets a stand-in of its own; two servers never share one.
        name = folder / "stand-in"
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            os.write(descriptor, secrets.token_hex(8).encode())
            os.close(descriptor)
        stand_in = ROOTS_FOLDER / digest(name.read_text(), str(name.stat().st_ino))
        if not stand_in.exists():
            logger.warning("%s is not open to the user that runs PostgreSQL: its data is in %s", folder, stand_in)
        folder = stand_in
        ROOTS_FOLDER.mkdir(mode=0o755, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid == 0:
        os.chown(folder, user[0], user[1])
    return folder


def socket_folder_of(folder: Path, user: list[int] | None) -> Path:
    """`folder`, or a short one below /tmp if the socket's path would be too long or need quoting."""
    plain = re.fullmatch(r"[A-Za-z0-9/._+-]+", str(folder))
    if plain and len(os.fsencode(folder / ".s.PGSQL.5432")) <= SOCKET_PATH_BYTES:
        return folder
    uid, gid = user or (os.geteuid(), os.getegid())
    # Not TMPDIR: all processes must come to the same folder.
    short = Path("/tmp") / f"embeddings-pg-{uid}-{digest(str(folder), str(folder.stat().st_ino))}"
    with contextlib.suppress(FileExistsError):
        short.mkdir(mode=0o700)
        if user:
            os.chown(short, uid, gid)
    status = short.lstat()
    if user and status.st_uid == 0 and stat.S_ISDIR(status.st_mode):  # root was killed between mkdir and chown
        os.chown(short, uid, gid, follow_symlinks=False)
        status = short.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != uid or status.st_mode & 0o077:
        raise DatabaseError(
            f"{short} is to hold PostgreSQL's socket and is not a private folder of its user: remove it, or set "
            "EMBEDDINGS_STATE_DIR to a folder with a short path without spaces"
        )
    return short


def digest(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()


def can_enter(folder: Path, user: list[int]) -> bool:
    """Whether [uid, gid] may go through `folder` and all above it."""
    for step in (folder, *folder.parents):
        status = step.stat()
        bit = stat.S_IXUSR if status.st_uid == user[0] else stat.S_IXGRP if status.st_gid == user[1] else stat.S_IXOTH
        if not status.st_mode & bit:
            return False
    return True


def as_user(user: list[int] | None) -> dict[str, Any]:
    """What makes `subprocess` run a program as [uid, gid]."""
    return {"user": user[0], "group": user[1], "extra_groups": []} if user else {}
