"""Listing, removing and renaming collections: what goes, what stays, and what a kill in the middle leaves."""

import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from embeddings_pipeline.config.definition import COMPONENT_TYPE
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import RefusedError
from embeddings_pipeline.failpoints import at_failpoint
from embeddings_pipeline.model_change.phases import expand, roll_back
from embeddings_pipeline.model_change.state import candidate_profile
from embeddings_pipeline.orchestration.collections import partition_keys
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support import databases
from embeddings_pipeline_tests.support.command_line import PROJECT, run_here, run_process
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.workbench import PROFILE, definition, execute, films, make_films

WIDE = {**PROFILE, "name": "wide", "dimensions": 48}
Command = Callable[..., subprocess.CompletedProcess[str]]

LEFT = """SELECT relname FROM pg_class
          WHERE relnamespace = 'embeddings'::regnamespace AND relname ~ '^films(_|$)' AND relkind <> 'c'"""


def write_definition(folder: Path, name: str, **attributes: Any) -> Path:
    config = definition(name, **attributes).attributes.model_dump(exclude_defaults=True, mode="json")
    path = folder / name / "defs.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump({"type": COMPONENT_TYPE, "attributes": config}, sort_keys=False))
    return path


@pytest.fixture
def defs(tmp_path: Path) -> Path:
    return tmp_path / "defs"


@pytest.fixture
def command(project: Settings, dagster_tables: None, defs: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setenv("EMBEDDINGS_DEFS_DIR", str(defs))
    return lambda *arguments: run_here(arguments)


@pytest.fixture(scope="module")
def synced_once(server: Database, template: str, dagster_template: str, open_folder: Path) -> Iterator[Path]:
    """A folder with `defs` and `.state`, and two databases of its name, after a sync: `synced` is a copy of it all."""
    folder = open_folder / f"tests_{uuid.uuid4().hex[:8]}"
    database = databases.copied(server, folder.name, template)
    databases.copied(server, f"{folder.name}_dagster", dagster_template)
    make_films(database, films(25))
    for name in ("films", "films_too"):
        write_definition(folder / "defs", name, profiles={"wide": {k: v for k, v in WIDE.items() if k != "name"}})
    environment = {
        "DAGSTER_HOME": str(PROJECT),
        "DATABASE_URL": database.url,
        "EMBEDDINGS_STATE_DIR": str(folder / ".state"),
        "EMBEDDINGS_DEFS_DIR": str(folder / "defs"),
    }
    done = run_here(("sync",), environment)
    assert done.returncode == 0, done
    database.close()
    yield folder
    for name in (folder.name, f"{folder.name}_dagster"):
        databases.dropped(server, name)


@pytest.fixture
def synced(command: Command, synced_once: Path, server: Database, database: Database, tmp_path: Path) -> Command:
    """The collections `films`, of 25 items in three batches, and `films_too`, whose name begins alike."""
    for suffix in ("", "_dagster"):
        name = f"{databases.name_of(database)}{suffix}"
        databases.dropped(server, name)
        databases.copied(server, name, f"{synced_once.name}{suffix}")
    shutil.copytree(synced_once, tmp_path, dirs_exist_ok=True)
    return command


def rows_of(database: Database, name: str) -> int:
    """Rows that the shared tables have of a collection."""
    tables = execute(
        database,
        """SELECT table_name
           FROM information_schema.columns JOIN information_schema.tables USING (table_schema, table_name)
           WHERE table_schema = 'embeddings' AND column_name = 'collection' AND table_type = 'BASE TABLE'""",
    )
    counts = [f"SELECT count(*) FROM embeddings.{table} WHERE collection = '{name}'" for (table,) in tables]
    counts.append(f"SELECT count(*) FROM embeddings.collection WHERE name = '{name}'")
    return sum(execute(database, count)[0][0] for count in counts)


def listed(command: Command) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in json.loads(command("collection", "list", "--json").stdout)}


def syncs_nothing(command: Command, name: str) -> None:
    done = json.loads(command("sync", "--collection", name, "--json").stdout)
    assert [done[figure] for figure in ("scanned", "new", "changed", "deleted", "embedded")] == [25, 0, 0, 0, 0]


def test_list_shows_what_is_defined_and_what_the_database_knows(synced: Command, defs: Path) -> None:
    write_definition(defs, "planned")
    (defs / "films" / "defs.yaml").unlink()
    shown = listed(synced)
    assert {name: (each["items"], each["vectors"], each["in_database"]) for name, each in shown.items()} == {
        "films": (25, 25, True),
        "films_too": (25, 25, True),
        "planned": (0, 0, False),
    }
    assert shown["films"]["defined_in"] is None and shown["films"]["profile"] == "test"
    assert min(shown["films"][part] for part in ("database_bytes", "lake_bytes", "faiss_bytes")) > 0
    lines = {line.split()[0]: line for line in synced("collection", "list").stdout.splitlines()}
    assert "which EMBEDDINGS_DEFS_DIR names: only if all of your collections are there" in lines["films"]
    assert lines["films"].endswith("`embeddings-pipeline collection remove films` drops it")
    assert "not synced yet" in lines["planned"] and lines["films_too"].endswith("test")


class TestRemove:
    def test_everything_of_it_goes_and_nothing_of_another(
        self, synced: Command, database: Database, project: Settings, instance: dg.DagsterInstance
    ) -> None:
        done = synced("collection", "remove", "films", "--yes")
        assert done.returncode == 0 and "films: removed, 25 items and 25 vectors" in done.stdout
        assert "the next sync would make it anew" in done.stderr
        assert [name for (name,) in execute(database, LEFT) if not name.startswith("films_too")] == []
        assert rows_of(database, "films") == 0
        assert not (project.state_dir / "faiss" / "films").exists()
        assert not (project.state_dir / "lake" / "films").exists()
        assert partition_keys(instance, "films") == [] and len(partition_keys(instance, "films_too")) == 3
        syncs_nothing(synced, "films_too")
        again = json.loads(synced("sync", "--collection", "films", "--json").stdout)
        assert (again["new"], again["embedded"]) == (25, 25)

    @pytest.mark.parametrize("name", ["", ".", "..", "films.*", "(", "/tmp", "films/..", "Films"])
    def test_what_is_no_name_is_refused_and_removes_nothing(
        self, synced: Command, project: Settings, tmp_path: Path, name: str
    ) -> None:
        precious = tmp_path / "precious"
        precious.mkdir()
        for each in (name, str(precious)):
            refused = synced("collection", "remove", each, "--yes")
            assert refused.returncode == 1 and f"{each!r} is not a collection name" in refused.stderr
        assert precious.is_dir() and (project.state_dir / "lake" / "films").is_dir()
        syncs_nothing(synced, "films")

    def test_it_says_what_it_drops_and_asks(self, synced: Command, project: Settings) -> None:
        refused = synced("collection", "remove", "films")
        assert refused.returncode == 1 and "give --yes" in refused.stderr
        for part in (
            "25 items, 25 vectors",
            "embeddings.films_item",
            "embeddings.films,",
            "3 partition keys",
            str(project.state_dir / "lake/films"),
        ):
            assert part in refused.stderr
        assert listed(synced)["films"]["items"] == 25

    def test_one_whose_definition_is_gone_is_removed_too(self, synced: Command, database: Database, defs: Path) -> None:
        (defs / "films" / "defs.yaml").unlink()
        assert synced("collection", "remove", "films", "--yes").returncode == 0
        assert rows_of(database, "films") == 0
        nothing = synced("collection", "remove", "film", "--yes")
        assert nothing.returncode == 1 and "nothing is kept of a collection 'film'" in nothing.stderr

    def test_a_change_of_the_model_and_a_run_are_ended_first(
        self, synced: Command, project: Settings, defs: Path, instance: dg.DagsterInstance
    ) -> None:
        profiles = {"wide": {k: v for k, v in WIDE.items() if k != "name"}}
        collection = open_collection(definition("films", profiles=profiles), project)
        expand(collection, candidate_profile(collection, "wide"))
        for arguments in (["remove", "films", "--yes"], ["rename", "films", "movies"]):
            refused = synced("collection", *arguments)
            assert refused.returncode == 1 and "a change of its model is under way" in refused.stderr
            assert partition_keys(instance, "films") == ["000000", "000001", "000002"]
        roll_back(collection, "test")
        waiting = dg.DagsterRun("films_batches", run_id=str(uuid.uuid4()), status=dg.DagsterRunStatus.NOT_STARTED)
        run = instance.add_run(waiting)
        refused = synced("collection", "remove", "films", "--yes")
        assert refused.returncode == 1 and run.run_id[:8] in refused.stderr
        instance.report_run_canceled(run)
        assert synced("collection", "remove", "films", "--yes").returncode == 0

    @pytest.mark.parametrize("place", ["remove.partitions", "remove.faiss", "remove.lake"])
    def test_one_that_was_killed_is_repeated_to_its_end(
        self, synced: Command, database: Database, project: Settings, place: str
    ) -> None:
        interrupted(synced, place, "collection", "remove", "films", "--yes")
        assert synced("collection", "remove", "films", "--yes").returncode == 0
        assert rows_of(database, "films") == 0 and not (project.state_dir / "lake" / "films").exists()

    def test_a_column_of_the_users_own_stays_as_it_is(self, command: Command, database: Database, defs: Path) -> None:
        make_films(database, films(25))
        execute(database, "ALTER TABLE films ADD COLUMN embedding vector(32)")
        destination = {"table": "films", "profile": PROFILE}
        write_definition(defs, "films", destination=destination, profile=None)
        assert command("sync").returncode == 0
        described = (
            "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute WHERE attrelid = 'films'::regclass"
        )
        before = execute(database, described), execute(database, "SELECT id, embedding::text FROM films ORDER BY id")
        assert all(vector for _, vector in before[1])
        asked = command("collection", "remove", "films")
        assert "Your own table stays as it is" in asked.stderr and "films.embedding" in asked.stderr
        assert command("collection", "remove", "films", "--yes").returncode == 0
        after = execute(database, described), execute(database, "SELECT id, embedding::text FROM films ORDER BY id")
        assert after == before
        assert execute(database, LEFT) == []


class Interrupted(BaseException):
    """In place of a kill: nothing of ours catches it."""


def interrupted(command: Command, place: str, *arguments: str) -> None:
    def kill() -> None:
        raise Interrupted

    with at_failpoint(place, kill), pytest.raises(Interrupted):
        command(*arguments)


class TestRename:
    def moved(self, command: Command, database: Database, project: Settings, instance: dg.DagsterInstance) -> None:
        """Everything is there under the new name, and nothing under the old one."""
        assert [name for (name,) in execute(database, LEFT) if not name.startswith("films_too")] == []
        assert rows_of(database, "films") == 0
        for folder in ("lake", "faiss"):
            assert not (project.state_dir / folder / "films").exists()
            assert (project.state_dir / folder / "movies").is_dir()
        assert partition_keys(instance, "films") == []
        assert partition_keys(instance, "movies") == ["000000", "000001", "000002"]
        syncs_nothing(command, "movies")
        [hit] = json.loads(command("search", "Film 7 number 7", "-k", "1", "-c", "movies", "--faiss", "--json").stdout)
        assert hit["item_key"] == "7"

    def test_everything_goes_along_and_nothing_is_done_anew(
        self, synced: Command, database: Database, project: Settings, defs: Path, instance: dg.DagsterInstance
    ) -> None:
        text = (defs / "films" / "defs.yaml").read_text()
        index = "SELECT indexrelid FROM pg_index JOIN pg_class ON oid = indrelid WHERE relname ~ '_vector_' ORDER BY 1"
        before = execute(database, index)
        done = synced("collection", "rename", "films", "movies")
        assert done.returncode == 0 and "films: is now called movies" in done.stdout
        assert (defs / "films" / "defs.yaml").read_text() == text.replace("name: films", "name: movies", 1)
        self.moved(synced, database, project, instance)
        assert execute(database, index) == before  # no index was built again
        syncs_nothing(synced, "films_too")
        assert synced("collection", "rename", "movies", "films").returncode == 0
        syncs_nothing(synced, "films")

    def test_no_other_name_joins_a_renaming_that_was_killed(
        self, synced: Command, database: Database, project: Settings, instance: dg.DagsterInstance
    ) -> None:
        interrupted(synced, "rename.database", "collection", "rename", "films", "movies")
        for arguments in (["rename", "movies", "shows"], ["rename", "films", "shows"], ["remove", "films", "--yes"]):
            refused = synced("collection", *arguments)
            assert refused.returncode == 1 and "`embeddings-pipeline collection rename films movies`" in refused.stderr
        assert synced("collection", "rename", "films", "movies").returncode == 0
        self.moved(synced, database, project, instance)

    def test_a_name_that_yaml_reads_otherwise_is_quoted(self, synced: Command, defs: Path) -> None:
        assert synced("collection", "rename", "films", "no").returncode == 0
        assert 'name: "no"' in (defs / "films" / "defs.yaml").read_text()
        syncs_nothing(synced, "no")

    def test_its_poison_texts_stay_excused(self, synced: Command, database: Database, defs: Path) -> None:
        execute(database, "UPDATE films SET overview = 'a poisoned story' WHERE id = 7")
        DeterministicEncoder.fail_on = "poisoned"
        assert json.loads(synced("sync", "--collection", "films", "--json").stdout)["quarantined"] == 1
        assert synced("collection", "rename", "films", "movies").returncode == 0
        status = json.loads(synced("status", "--collection", "movies", "--json").stdout)
        assert (status["coverage"], status["quarantined"], status["dirty_batches"]) == (1.0, 1, 0)
        syncs_nothing(synced, "movies")

    @pytest.mark.parametrize(
        "place", ["rename.database", "rename.partitions", "rename.lake", "rename.faiss", "rename.definition"]
    )
    def test_one_that_was_killed_keeps_syncs_out_and_is_repeated_to_its_end(
        self, synced: Command, database: Database, project: Settings, instance: dg.DagsterInstance, place: str
    ) -> None:
        interrupted(synced, place, "collection", "rename", "films", "movies")
        for name in ("films", "movies"):
            with pytest.raises(RefusedError, match=r"finish it with .* rename films movies`"):
                open_collection(definition(name), project)
        assert "being renamed" in synced("collection", "list").stdout
        assert synced("collection", "rename", "films", "movies").returncode == 0
        self.moved(synced, database, project, instance)

    @pytest.mark.slow
    def test_a_process_that_is_killed_is_repeated_to_its_end(
        self, synced: Command, database: Database, project: Settings, instance: dg.DagsterInstance
    ) -> None:
        killing = {**os.environ, "EMBEDDINGS_FAILPOINTS": "rename.lake=kill"}
        assert run_process(("collection", "rename", "films", "movies"), killing).returncode == -9
        assert synced("collection", "rename", "films", "movies").returncode == 0
        self.moved(synced, database, project, instance)

    @pytest.mark.parametrize(
        ("names", "says"),
        [
            (("films", "films_too"), "choose another name"),
            (("films", "films"), "its name already"),
            (("films", "Films"), "is not a collection name"),
            (("films", "batch"), "would collide"),
            (("nowhere", "movies"), "there is no collection 'nowhere'"),
        ],
    )
    def test_a_name_that_cannot_be_is_one_line(self, synced: Command, names: tuple[str, str], says: str) -> None:
        done = synced("collection", "rename", *names)
        assert done.returncode == 1 and says in done.stderr and done.stderr.count("\n") == 1
