"""Brings .venv up to what pyproject.toml and constraints.txt say; `.ci/install` runs it with a Python that will do.

Standard library only. uv installs, which pip fetches first unless there is one; pip itself does if uv cannot be had, or
with INSTALLER=pip. What was installed is noted in .venv by a hash of everything that decides it, so that a second call
costs a moment; two calls at once wait for each other.
"""

import ast
import contextlib
import fcntl
import hashlib
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / ".venv"
PYTHON = ENVIRONMENT / "bin" / "python"
TORCH = "torch==2.13.0"  # named exactly: a looser request takes a CUDA build of gigabytes over the CPU wheel at hand
INCLUDED = {
    "run": (),
    "test": ("run",),
    "bench": ("run",),
    "serve": ("run",),
    "docs": ("run",),
    "dev": ("run", "test", "docs"),
}  # by what is asked for
SILENT_SECONDS = 5  # after which a line says that the work goes on
# Imported once, by two processes side by side, so that Python's bytecode is there for what is used: a fourth of all
# files. Later processes start in a third of the time, also if they may not write it.
USED = (
    "import torch, sentence_transformers, transformers.models.bert.tokenization_bert",
    "import sympy, scipy.stats, sklearn.metrics, pandas, faiss, pyarrow.parquet, psycopg, dagster_postgres; "
    "import embeddings_pipeline.cli.main, embeddings_pipeline.definitions; "
    "from embeddings_pipeline.encoders.openvino import openvino; openvino()",
)


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
    """The version of .venv's Python; None if it does not run, is too old, or was moved here from elsewhere."""
    if any(noted(extra).get("place", str(ROOT)) != str(ROOT) for extra in INCLUDED):
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


def say(line: str) -> None:
    print(line, flush=True)


def succeeds(what: str, command: list[str], environment: dict[str, str] | None = None) -> bool:
    """Run the command and show what it prints, less the list of packages; a line every few seconds if it is silent."""
    started = time.monotonic()
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | (environment or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        output = process.stdout or []
        threading.Thread(target=lambda: [*map(lines.put, output), lines.put(None)], daemon=True).start()
        while True:
            try:
                line = lines.get(timeout=SILENT_SECONDS)
            except queue.Empty:
                say(f"  still {what}: {time.monotonic() - started:.0f} s")
                continue
            if line is None:
                break
            if not line.startswith((" + ", " - ", " ~ ")):
                say(f"  {line.strip()}")
    return process.returncode == 0


def run(what: str, command: list[str], environment: dict[str, str] | None = None, remedy: str = "") -> None:
    if not succeeds(what, command, environment):
        sys.exit(f"error: {what} failed; the reason stands above{remedy}")


def pip_configuration() -> dict[str, str]:
    """pip's settings by name (`find-links`, `cert` …), as pip itself would read them for `pip install`."""
    command = [str(PYTHON), "-m", "pip", "config", "list"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    by_section: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}  # later ones win
    for line in printed.splitlines():
        name, separator, value = line.partition("=")
        section, _, option = name.rpartition(".")
        if separator and section in by_section:
            by_section[section][option] = str(ast.literal_eval(value))
    return {option: value for settings in by_section.values() for option, value in settings.items()}


def as_uv_takes_it(pip: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """(arguments, environment) that give uv the same indexes, folders, certificates and constraints as pip has.

    uv reads none of pip's configuration. What is set for uv itself stays. Indexes may hold passwords, so they are not
    arguments, which everybody on the machine can read.
    """
    names = {
        "UV_DEFAULT_INDEX": pip.get("index-url"),
        "UV_EXTRA_INDEX_URL": " ".join(pip.get("extra-index-url", "").split()),
        "UV_FIND_LINKS": ",".join(pip.get("find-links", "").split()),
        "UV_INSECURE_HOST": " ".join(pip.get("trusted-host", "").split()),
        "UV_HTTP_TIMEOUT": pip.get("timeout") or pip.get("default-timeout"),
        "SSL_CERT_FILE": pip.get("cert"),
        "SSL_CLIENT_CERT": pip.get("client-cert"),
        "HTTPS_PROXY": pip.get("proxy"),
        "HTTP_PROXY": pip.get("proxy"),
        # pip takes the best version of all indexes, uv by itself that of the first index that has the package.
        "UV_INDEX_STRATEGY": "unsafe-best-match" if pip.get("extra-index-url") else None,
    }
    arguments = [part for path in pip.get("constraint", "").split() for part in ("-c", path)]
    if pip.get("no-index", "").lower() in {"1", "true", "yes", "on"}:
        arguments.append("--no-index")
    return arguments, {name: value for name, value in names.items() if value and name not in os.environ}


def uv_command(pip: list[str]) -> list[str] | None:
    """How to call uv, which pip installs into .venv unless there is one; None if it cannot be had."""
    if os.environ.get("INSTALLER") == "pip":
        return None
    there = ENVIRONMENT / "bin" / "uv"
    if not there.exists():
        if found := shutil.which("uv"):
            return [found]
        say("fetching uv, which installs the rest")
        if not succeeds("fetching uv", [*pip, "-c", "constraints.txt", "uv"]):
            say("uv cannot be had (the reason stands above): pip installs, which takes longer")
            return None
    return [str(there)]


def size(folder: Path) -> str:
    """What the folder takes on the disk, for people."""
    files = (Path(path, name) for path, _, names in os.walk(folder) for name in names)
    return f"{sum(file.lstat().st_blocks * 512 for file in files) / 1e9:.1f} GB"


def compile_used() -> None:
    """Have Python compile what USED imports. If that fails, whoever needs the module will say why."""
    started = time.monotonic()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    output = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    processes = [subprocess.Popen([PYTHON, "-c", imports], cwd=ROOT, env=environment, **output) for imports in USED]
    for process in processes:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=SILENT_SECONDS)
                break
            say(f"  still compiling: {time.monotonic() - started:.0f} s")


def silence_dg() -> None:
    """Outside `make` nobody names `dg` the dagster.yaml that forbids telemetry: whenever .venv's Python starts, it is
    told of a configuration that does, unless the user has one.
    """
    users = 'os.path.join(os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"), "dg.toml")'
    ours = f'os.environ.setdefault("DG_CLI_CONFIG", {str(ROOT / ".ci" / "dg.toml")!r})'
    for folder in (ENVIRONMENT / "lib").glob("python3*/site-packages"):
        (folder / "quiet_dg.pth").write_text(f"import os; os.path.exists({users}) or {ours}\n")


def install(extra: str, version: str | None) -> None:
    started = time.monotonic()
    there = version_there()
    if there is None or (version is not None and there != version):
        say(f"making .venv with Python {sys.version.split()[0]}")
        run("making .venv", [sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)])
    pip = [str(PYTHON), "-m", "pip", "install", "-qq", "--no-compile", "--disable-pip-version-check"]  # errors only
    uv = uv_command(pip)
    first = ": about 0.6 GB to download and 2.1 GB on disk" if not any(map(noted, INCLUDED)) else ""
    say(f"installing the packages into .venv{first}")
    what = ["-c", "constraints.txt", TORCH, "-e", "." if extra == "run" else f".[{extra}]"]
    if uv:
        arguments, environment = as_uv_takes_it(pip_configuration())
        command = [*uv, "pip", "install", "--python", str(PYTHON), *arguments, *what]
        run("installing", command, environment, "; INSTALLER=pip before the command takes pip instead")
    else:
        run("installing", [*pip, *what])
    silence_dg()
    say("compiling what is used of them")
    compile_used()
    for done in (extra, *INCLUDED[extra]):
        note(done).write_text(json.dumps(wanted(done) | {"python": version_there() or ""}))
    say(f"installed in {time.monotonic() - started:.0f} s; .venv has {size(ENVIRONMENT)}")


def main() -> None:
    extra = sys.argv[1]
    if extra not in INCLUDED:
        sys.exit(f"error: {extra} is none of {', '.join(INCLUDED)}")
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
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
