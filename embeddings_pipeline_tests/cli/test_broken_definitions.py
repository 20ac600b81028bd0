"""A mistake in one `defs.yaml` stops its own collection, and no other one."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from embeddings_pipeline.config.settings import Settings, project_root
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.command_line import run_here
from embeddings_pipeline_tests.support.workbench import PROFILE, films, make_films

FILMS = f"""\
type: embeddings_pipeline.EmbeddingCollection
attributes:
  name: NAME
  source: {{table: films, key: [id]}}
  columns: [title]
  vectors: {{base: "{{title}} | {{overview}}"}}
  profile: {json.dumps(PROFILE)}
"""
BROKEN = {
    "an unknown key": FILMS.replace("columns", "colums"),
    "no YAML": FILMS.replace("[title]", "[title"),
    "nothing": "",
    "nested too deep": FILMS + "  where: " + "[" * 2000 + "]" * 2000 + "\n",
    "a name that is taken": FILMS.replace("NAME", "alpha"),
}
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def defs(tmp_path: Path, database: Database) -> Path:
    """Two collections that are right, over the table `films`."""
    make_films(database, films(3))
    for name in ("beta", "gamma"):
        save(tmp_path / "defs", name, FILMS)
    return tmp_path / "defs"


def save(folder: Path, name: str, text: str) -> Path:
    (folder / name).mkdir(parents=True, exist_ok=True)
    path = folder / name / "defs.yaml"
    path.write_text(text.replace("NAME", name))
    return path


@pytest.fixture
def command(defs: Path, database: Database, settings: Settings, dagster_tables: None) -> Command:
    environment = {
        **os.environ,
        "DATABASE_URL": database.url,
        "DAGSTER_HOME": str(project_root()),
        "EMBEDDINGS_STATE_DIR": str(settings.state_dir),
        "EMBEDDINGS_DEFS_DIR": str(defs),
    }
    return lambda *arguments: run_here(arguments, environment)


def test_commands_that_name_another_go_on_and_the_rest_says_what_is_wrong(command: Command, defs: Path) -> None:
    broken = save(defs, "delta", BROKEN["an unknown key"])
    for arguments in (["sync"], ["status"], ["search", "film"]):
        done = command(*arguments, "-c", "beta")
        assert done.returncode == 0, done.stderr
        assert f"warning: {broken}:5: colums:" in done.stderr
    done = command("sync")
    assert done.returncode == 1
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == ["beta", "gamma"]
    assert f"error: {broken}: left out because of the mistake that is told above" in done.stderr
    done = command("status", "--json")
    assert done.returncode == 1 and [each["collection"] for each in json.loads(done.stdout)] == ["beta", "gamma"]
    done = command("sync", "-c", "delta")
    assert done.returncode == 1 and done.stderr.startswith(f"error: {broken}:5: colums:")
    done = command("collection", "list")
    assert done.returncode == 0 and "beta" in done.stdout and str(broken) in done.stderr


@pytest.mark.parametrize("mistake", BROKEN)
def test_each_kind_of_mistake_stops_its_own_file(command: Command, defs: Path, mistake: str) -> None:
    save(defs, "alpha", FILMS)
    broken = save(defs, "delta", BROKEN[mistake])
    done = command("status", "-c", "beta")
    assert done.returncode == 0 and done.stderr.count("\n") == 1 and str(broken) in done.stderr
    assert command("status", "-c", "alpha").returncode == (mistake == "a name that is taken")
    done = command("status", "-c", "delta")
    assert done.returncode == 1 and done.stderr.startswith(f"error: {broken}")


def test_a_collection_whose_file_has_a_mistake_is_not_taken_for_one_that_is_gone(command: Command, defs: Path) -> None:
    assert command("sync", "-c", "beta").returncode == 0
    path = defs / "beta" / "defs.yaml"

    def is_refused(file: Path) -> None:
        for arguments in (("collection", "list"), ("status",)):
            done = command(*arguments)
            assert f"{file} has a mistake" in done.stdout + done.stderr
            assert "collection remove" not in done.stdout + done.stderr
        refused = command("collection", "remove", "beta", "--yes")
        assert refused.returncode == 1 and refused.stderr.splitlines()[-1].startswith("error: beta: ")
        assert str(file) in refused.stderr.splitlines()[-1] and "nothing was removed" in refused.stderr

    for mistake in ("an unknown key", "no YAML", "nothing"):
        save(defs, "beta", BROKEN[mistake])
        is_refused(path)
    path.unlink()
    path.symlink_to(defs / "gone.yaml")
    is_refused(path)
    assert f"{path}: a link to {defs / 'gone.yaml'}, where no file is" in command("status").stderr
    path.unlink()
    save(defs, "beta", FILMS)
    is_refused(save(defs, "delta", FILMS.replace("NAME", "beta")))
    (defs / "delta" / "defs.yaml").unlink()
    status = json.loads(command("status", "-c", "beta", "--json").stdout)
    assert status["vectors"] == 3


def test_a_folder_without_collections_is_looked_at_before_anything_is_removed(
    command: Command, defs: Path, tmp_path: Path
) -> None:
    assert command("sync", "-c", "beta").returncode == 0
    defs.rename(tmp_path / "moved")
    defs.mkdir()
    for arguments in (("collection", "list"), ("status",)):
        done = command(*arguments)
        [line] = [line for line in (done.stdout + done.stderr).splitlines() if "collection remove beta" in line]
        assert line.index(f"{defs}: does EMBEDDINGS_DEFS_DIR name") < line.index("collection remove")


def test_without_a_name_the_only_one_is_not_guessed_beside_a_broken_file(command: Command, defs: Path) -> None:
    (defs / "gamma/defs.yaml").write_text("type: [")
    done = command("search", "film")
    assert done.returncode == 1 and done.stderr.startswith(f"error: {defs / 'gamma/defs.yaml'}")
    save(defs, "items", FILMS)
    assert command("sync", "-c", "items").returncode == 0
    assert command("search", "film").returncode == 0


def test_a_folder_of_nothing_but_mistakes_is_one_line(command: Command, defs: Path) -> None:
    for name in ("beta", "gamma"):
        save(defs, name, BROKEN["an unknown key"])
    done = command("sync")
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1


def test_an_older_checkout_is_told_and_can_be_put_in_force(
    command: Command, defs: Path, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("sync", "-c", "beta").returncode == 0
    other = save(tmp_path / "other", "beta", FILMS.replace("[title]", "[title, revenue]"))
    environment = {"DATABASE_URL": database.url, "EMBEDDINGS_DEFS_DIR": str(tmp_path / "other")}
    environment["EMBEDDINGS_STATE_DIR"] = str(tmp_path / ".state")
    assert run_here(("sync",), {**os.environ, "DAGSTER_HOME": str(project_root()), **environment}).returncode == 0
    done = command("sync", "-c", "beta")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert str(other) in done.stderr and "sync --collection beta --redefine" in done.stderr
    assert "  definition      collection 'beta': another definition" in command("status", "-c", "beta").stdout
    assert command("sync", "-c", "beta", "--redefine").returncode == 0
    assert "definition" not in command("status", "-c", "beta").stdout
