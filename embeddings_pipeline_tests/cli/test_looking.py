"""Commands that only look write nothing, register nothing and choose nothing: neither in the database nor on disk."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from embeddings_pipeline.config.definition import COMPONENT_TYPE
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.model_change.phases import add_model
from embeddings_pipeline.model_change.state import candidate_profile
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.schema import forget_schemas, schema_versions
from embeddings_pipeline_tests.support.command_line import Done, run_here
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.workbench import (
    PROFILE,
    by_name,
    definition,
    execute,
    films,
    make_films,
    sync_once,
)

WIDE = {**PROFILE, "name": "wide", "dimensions": 48}
OWN = by_name(PROFILE, WIDE)
LOOKS = {
    "status": ("status",),
    "dry run": ("sync", "--dry-run", "--json"),
    "forced dry run": ("sync", "--dry-run", "--force"),
    "profile list": ("profile", "list"),
    "profile show": ("profile", "show", "minilm"),
    "profile plan": ("profile", "plan", "wide"),
    "profile status": ("profile", "status"),
    "collection list": ("collection", "list"),
    "quarantine list": ("quarantine", "list"),
    "search": ("search", "Film 7 number 7"),
    "faiss": ("search", "Film 7 number 7", "--faiss"),
    "evaluate": ("evaluate", "--self"),
}
NEEDS_VECTORS = {"profile plan", "search", "faiss", "evaluate"}
SERVERS_OWN = "nspname ~ '^pg_(toast_)?temp_'"  # a session's temporary tables have their schema for good
CATALOGS = {
    "pg_namespace": f"NOT {SERVERS_OWN}",
    "pg_class": f"relnamespace NOT IN (SELECT oid FROM pg_namespace WHERE {SERVERS_OWN})",
    "pg_proc": "true",
    "pg_extension": "true",
    "pg_default_acl": "true",
    "pg_policy": "true",
}

Look = Callable[..., Done]


@pytest.fixture(autouse=True)
def _as_a_new_process() -> Iterator[None]:
    forget_schemas()
    DeterministicEncoder.reset()
    yield
    forget_schemas()


@pytest.fixture
def look(database: Database, settings: Settings, tmp_path: Path) -> Look:
    """Runs a command with these attributes of the only collection; what it left in database and state folder differs
    from before by nothing.
    """

    def run(*arguments: str, **attributes: Any) -> Done:
        environment = environment_of(database, settings, tmp_path, **attributes)
        forget_schemas()
        before = dump(database), files(settings.state_dir)
        done = run_here(arguments, environment)
        assert (dump(database), files(settings.state_dir)) == before, arguments
        return done

    return run


def environment_of(database: Database, settings: Settings, folder: Path, **attributes: Any) -> dict[str, str]:
    config = definition(**{"profiles": OWN, **attributes}).attributes.model_dump(exclude_defaults=True, mode="json")
    path = folder / "defs" / "films" / "defs.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"type": COMPONENT_TYPE, "attributes": config}))
    return {
        **os.environ,
        "DATABASE_URL": database.url,
        "EMBEDDINGS_STATE_DIR": str(settings.state_dir),
        "EMBEDDINGS_DEFS_DIR": str(folder / "defs"),
    }


def dump(database: Database) -> dict[str, Any]:
    """Which rows the catalog and every table have, and which transaction wrote each."""
    found: dict[str, Any] = {}
    with database.connect(autocommit=True) as connection:
        for catalog, which in CATALOGS.items():
            query = f"SELECT oid, xmin::text FROM {catalog} WHERE {which} ORDER BY oid"
            found[catalog] = connection.execute(query).fetchall()  # type: ignore[arg-type]
        tables = """SELECT format('%I.%I', nspname, relname), relkind = 'S' FROM pg_class
                    JOIN pg_namespace ON pg_namespace.oid = relnamespace
                    WHERE relkind IN ('r', 'S') AND nspname !~ '^(pg_|information_schema)'"""
        for table, is_sequence in connection.execute(tables).fetchall():
            columns = "last_value, is_called" if is_sequence else "xmin::text, whole::text"
            found[table] = connection.execute(f"SELECT {columns} FROM {table} AS whole ORDER BY 1, 2").fetchall()
    return found


def files(folder: Path) -> dict[str, tuple[int, str]]:
    return {
        str(path): (path.stat().st_mtime_ns, hashlib.md5(path.read_bytes()).hexdigest() if path.is_file() else "")
        for path in [folder, *folder.rglob("*")]
        if path.exists() and path.name != "encoders"  # a model is converted when it is first asked for anything
    }


@pytest.fixture
def empty(database: Database) -> Database:
    """The database before anything of ours was in it, but for pgvector."""
    execute(database, "DROP SCHEMA embeddings CASCADE")
    return database


@pytest.fixture
def synced(database: Database, settings: Settings) -> Database:
    make_films(database, films(12))
    sync_once(definition(profiles=OWN), settings)
    return database


@pytest.mark.parametrize("profile", ["test", "minilm"])
def test_on_a_fresh_database(empty: Database, look: Look, profile: str) -> None:
    make_films(empty, films(12))
    for name, command in LOOKS.items():
        done = look(*command, profile=profile)
        if name in NEEDS_VECTORS:
            assert done.returncode == 1 and "has no vectors yet" in done.stderr
        else:
            assert done.returncode == 0, done.stderr
    result = json.loads(look(*LOOKS["dry run"], profile=profile).stdout)
    assert [result[figure] for figure in ("scanned", "new", "left", "reused")] == [12, 12, 12, 0]


@pytest.mark.parametrize("profile", ["test", "wide", "minilm"])
def test_on_a_database_that_is_in_use(synced: Database, look: Look, profile: str) -> None:
    template = {"base": "{title}: {overview}"}  # another one, of which nothing is noted
    for name, command in LOOKS.items():
        if (profile, name) != ("minilm", "faiss"):
            done = look(*command, profile=profile, vectors=template)
            assert done.returncode == (1 if name == "faiss" else 0), done.stderr
    assert json.loads(look(*LOOKS["dry run"], profile=profile, vectors=template).stdout)["left"] == 12
    lines = look("profile", "list", profile=profile).stdout.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("*")] == ["test"]
    assert [line.split()[0] for line in lines if line.endswith("(declared)")] == [profile] * (profile != "test")


def test_where_nothing_is_committed_yet_what_is_declared_now_counts(
    database: Database, settings: Settings, look: Look
) -> None:
    make_films(database, films(12))
    collection = open_collection(definition(profiles=OWN), settings)
    collection.ledger.full_scan(collection.source)
    execute(database, "UPDATE embeddings.collection SET version = 7")  # raised by what commits no vector, too
    now = {"profile": "wide", "storage": "vector"}
    for name, command in LOOKS.items():
        done = look(*command, **now)
        assert done.returncode == (name in ("profile plan", "faiss", "evaluate")), done.stderr
    assert json.loads(look(*LOOKS["dry run"], **now).stdout)["left"] == 12
    assert "makes them with wide" in look("profile", "status", **now).stdout
    assert "*" not in look("profile", "list", **now).stdout
    taken = sync_once(definition(profiles=OWN, **now), settings)[0]
    assert (taken.profile.name, taken.model.destination.storage, taken.warning) == ("wide", "vector", None)


def test_a_dry_run_before_the_first_sync_counts_what_a_users_own_column_has(empty: Database, look: Look) -> None:
    vector = "[" + ",".join(["1"] + ["0"] * 31) + "]"
    execute(
        empty, "CREATE TABLE films (id bigint, part text, title text, embedding vector(32), PRIMARY KEY (id, part))"
    )
    execute(empty, "INSERT INTO films SELECT n, 'a', 'Film ' || n FROM generate_series(1, 12) AS n")
    execute(empty, "UPDATE films SET embedding = %s WHERE id < 9", [vector])
    done = look(
        *LOOKS["dry run"],
        source={"table": "films", "key": ["id", "part"]},
        columns=["title"],
        vectors={"base": "{title}"},
        profile=None,
        destination={"table": "films", "column": "embedding", "profile": "test"},
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(done.stdout)[figure] for figure in ("new", "left", "reused")] == [12, 4, 8]


def test_a_schema_of_an_older_version_is_named_and_left(synced: Database, look: Look) -> None:
    newest = schema_versions()[-1][0]
    execute(synced, "DELETE FROM embeddings.schema_migration WHERE version = %s", [newest])
    done = look("status")
    assert done.returncode == 1 and f"has version {newest - 1} and this embeddings-pipeline has {newest}" in done.stderr


def test_the_list_marks_the_models_that_are_kept(synced: Database, settings: Settings, look: Look) -> None:
    one = definition(profiles=OWN)
    collection = open_collection(one, settings)
    add_model(collection, candidate_profile(collection, "wide"))
    marks = {each["name"]: each["marks"] for each in json.loads(look("profile", "list", "--json").stdout)}
    assert marks["test"] == ["current", "declared"] and marks["wide"] == ["beside it"]
    assert sum(map(bool, marks.values())) == 2
    undeclared = look("profile", "list", profiles={}, profile="minilm").stdout  # the vectors are there all the same
    assert "(current)" in undeclared and "(beside it)" in undeclared


def test_where_the_embedded_server_was_never_started_nothing_is_made(tmp_path: Path) -> None:
    settings = Settings(embeddings_state_dir=tmp_path / "state")
    environment = environment_of(Database(""), settings, tmp_path)
    for name, command in LOOKS.items():
        done = run_here(command, environment)
        assert not settings.state_dir.exists(), name
        told = done.stdout if done.returncode == 0 else done.stderr
        assert name in ("profile list", "profile show") or "not synced yet" in told or "nothing is there yet" in told
