"""Brings .venv up to what pyproject.toml and constraints.txt say; `.ci/install` runs it with a Python that will do.

Standard library only. What was installed is noted in .venv by a hash of everything that decides it, so that a second
call costs a moment; two calls at once wait for each other.
"""

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / ".venv"
PYTHON = ENVIRONMENT / "bin" / "python"
TORCH = "torch==2.13.0"  # named exactly: a looser request takes a CUDA build of gigabytes over the CPU wheel at hand


def wanted(extra: str) -> dict[str, str]:
    """What decides whether the environment is as it should be."""
    digest = hashlib.blake2b(digest_size=16)
    for name in ("pyproject.toml", "constraints.txt", ".ci/install.py"):
        digest.update((ROOT / name).read_bytes() + b"\0")
    # An environment belongs to its place: scripts and the editable install name it.
    return {"requirements": digest.hexdigest(), "place": str(ROOT), "extra": extra}


def note(extra: str) -> Path:
    return ENVIRONMENT / f"installed-{extra}.json"


def noted(extra: str) -> dict[str, str]:
    """What `wanted` was when it was installed, and the Python it was installed for."""
    try:
        return json.loads(note(extra).read_text())
    except (OSError, ValueError):
        return {}


def version_there() -> str | None:
    """The version of .venv's Python; None where it does not run, is too old, or was moved here from elsewhere."""
    if any(noted(extra).get("place", str(ROOT)) != str(ROOT) for extra in ("test", "dev")):
        return None
    ask = "import sys, pip; assert sys.version_info >= (3, 11); print(sys.version)"
    try:
        done = subprocess.run([str(PYTHON), "-c", ask], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def is_current(extra: str, version: str | None) -> bool:
    """Whether nothing is to do; `version`: the Python that was asked for, if any."""
    there = noted(extra)
    return PYTHON.exists() and wanted(extra).items() <= there.items() and version in (None, there.get("python"))


def run(what: str, command: list[str]) -> None:
    if subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, check=False).returncode:
        sys.exit(f"error: {what} failed; the reason stands above")


def install(extra: str, version: str | None) -> None:
    there = version_there()
    if there is None or (version is not None and there != version):
        print(f"making .venv with Python {sys.version.split()[0]}", flush=True)
        run("making .venv", [sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)])
    print("installing the packages into .venv; the first time takes some minutes", flush=True)
    pip = [str(PYTHON), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]  # errors only
    run("installing", [*pip, "-c", "constraints.txt", TORCH, "-e", f".[{extra}]"])
    for done in {extra, "test"}:  # `dev` has all of `test`
        note(done).write_text(json.dumps(wanted(done) | {"python": version_there() or ""}))


def main() -> None:
    extra = sys.argv[1]
    version = sys.version if os.environ.get("PYTHON") else None
    if is_current(extra, version):  # seen without the lock: another user may use what is there and may not write
        return
    if "--check" in sys.argv:
        sys.exit(1)
    try:
        (ROOT / ".state").mkdir(exist_ok=True)
        with (ROOT / ".state" / "install.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_current(extra, version):
                install(extra, version)
    except OSError as error:
        sys.exit(f"error: {error.filename or ROOT} cannot be written: {error.strerror}")


if __name__ == "__main__":
    main()
