"""Two definitions of one collection at once: the newest one counts, once; the older one steps aside and says so."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from embeddings_pipeline import front_door
from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.loading import load_collections
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import PipelineError, StaleDefinitionError
from embeddings_pipeline.health.status import collection_status
from embeddings_pipeline.orchestration.automation import evaluate
from embeddings_pipeline.orchestration.component import build_definitions, definitions_below
from embeddings_pipeline.orchestration.dagster_internals import InMemoryJob
from embeddings_pipeline.orchestration.sync import sync
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.dagster_internals import execute_run
from embeddings_pipeline_tests.support.workbench import PROFILE, execute, films, make_films, run_batch, sync_once

FILMS = f"""\
type: embeddings_pipeline.EmbeddingCollection
attributes:
  name: films
  source: {{table: films, key: [id]}}
  columns: [title]
  vectors: {{base: "{{title}} | {{overview}}"}}
  profile: {json.dumps(PROFILE)}
"""
CHANGED = "defs.yaml has changed: reload the definitions"


def saved(folder: Path, text: str = FILMS) -> CollectionDefinition:
    """The definition as a process reads it that begins now."""
    (folder / "films").mkdir(parents=True, exist_ok=True)
    (folder / "films/defs.yaml").write_text(text)
    return load_collections(folder)["films"]


WITH_REVENUE = FILMS.replace("[title]", "[title, revenue]")


def in_force(database: Database) -> bytes:
    [(digest,)] = execute(database, "SELECT definition_hash FROM embeddings.collection")
    return bytes(digest)


@pytest.mark.slow
def test_a_sensor_with_an_older_definition_starts_nothing_and_says_so(
    database: Database, project: Settings, instance: dg.DagsterInstance, tmp_path: Path, caplog
) -> None:
    make_films(database, films(5))
    old = saved(tmp_path)
    [sensor] = [s for s in build_definitions(old).sensors or () if s.name == "films_new_rows_sensor"]
    context = dg.build_sensor_context(instance=instance)
    assert [request.job_name for request in sensor(context).run_requests] == ["films_scan"]
    new = saved(tmp_path, WITH_REVENUE)
    sync(new, project, instance=instance)
    for _ in range(2):
        result = sensor(dg.build_sensor_context(instance=instance))
        assert not result.run_requests and CHANGED in result.skip_reason.skip_message
    assert CHANGED in caplog.text
    status = collection_status(new, database, project)
    assert CHANGED in status["definition"]
    assert (status["coverage"], status["dirty_batches"], in_force(database)) == (1.0, 0, new.definition_hash)
    again = evaluate(instance, saved(tmp_path, WITH_REVENUE), 32)  # as after a reload
    assert not again.run_requests and CHANGED not in again.skip_reason.skip_message


@pytest.mark.slow
def test_a_run_with_an_older_definition_commits_nothing(
    database: Database, project: Settings, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    make_films(database, films(5))
    old = saved(tmp_path)
    jobs = build_definitions(old)
    sync(old, project, instance=instance)
    new = saved(tmp_path, WITH_REVENUE)
    sync(new, project, instance=instance)
    job = jobs.resolve_job_def("films_batches")
    run = instance.create_run_for_job(job, tags={"dagster/partition": "000000"})
    assert not execute_run(InMemoryJob(job), run, instance, raise_on_error=False).success
    assert in_force(database) == new.definition_hash
    assert collection_status(new, database, project)["coverage"] == 1.0


def test_a_commit_of_an_older_definition_gives_way_to_a_newer_one(
    database: Database, settings: Settings, tmp_path: Path
) -> None:
    make_films(database, films(5))
    collection, _ = sync_once(saved(tmp_path), settings)
    execute(database, "UPDATE films SET overview = 'another'")
    collection.ledger.full_scan(collection.source)
    newer, _ = sync_once(saved(tmp_path, WITH_REVENUE), settings)
    with pytest.raises(PipelineError, match="a newer definition came into force"):
        run_batch(collection, 0, "old")
    assert newer.ledger.dirty_batches() == []


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text + "\n# a remark\n",
        lambda text: text.replace("columns: [title]", "columns:\n  - title"),
        lambda text: text + "---\n" + text.replace("name: films", "name: others"),
        lambda text: "\ufeff" + text,
    ],
)
def test_what_says_the_same_of_the_collection_is_no_change(settings, database, tmp_path, change) -> None:
    make_films(database, films(1))
    old = saved(tmp_path)
    saved(tmp_path, change(FILMS))
    open_collection(old, settings)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("name: films", "name: movies"),
        lambda text: text.replace("[title]", "[title"),
        lambda text: "",
        lambda text: text + "  automation: {full_scan_minutes: 5}\n",
    ],
)
def test_whoever_has_an_older_definition_than_the_file_does_nothing(settings, database, tmp_path, change) -> None:
    make_films(database, films(1))
    old = saved(tmp_path)
    (tmp_path / "films/defs.yaml").write_text(change(FILMS))
    with pytest.raises(StaleDefinitionError, match=CHANGED) as error:
        open_collection(old, settings)
    assert "\n" not in str(error.value)
    (tmp_path / "films/defs.yaml").unlink()
    with pytest.raises(StaleDefinitionError, match=r"reload the definitions \(.*defs.yaml is gone\)"):
        open_collection(old, settings)


def test_two_checkouts_are_told_of_each_other_and_the_newer_one_counts_once(database, settings, tmp_path) -> None:
    make_films(database, films(3))
    first, second = tmp_path / "first", tmp_path / "second"
    sync_once(saved(first), settings)
    sync_once(saved(second, WITH_REVENUE), settings)
    for _ in range(2):  # with each process that reads the file that has not changed
        with pytest.raises(StaleDefinitionError, match=rf"{second}/films/defs.yaml, since .* --redefine"):
            open_collection(load_collections(first)["films"], settings)
        with pytest.raises(StaleDefinitionError, match=rf"{second}/films/defs.yaml, since .* --redefine"):
            sync(load_collections(first)["films"], settings, dry_run=True)
        assert sync(load_collections(first)["films"], settings, dry_run=True, redefine=True).scanned == 3
        sync_once(load_collections(second)["films"], settings)
    assert in_force(database) == load_collections(second)["films"].definition_hash
    assert str(second) in str(collection_status(load_collections(first)["films"], database, settings)["definition"])
    assert collection_status(load_collections(second)["films"], database, settings)["definition"] is None
    open_collection(saved(first, WITH_REVENUE), settings)  # made the same


def test_an_older_definition_does_not_come_back_with_the_host_name_of_each_new_container(
    database, settings, tmp_path, monkeypatch
) -> None:
    make_films(database, films(3))
    count = itertools.count()
    monkeypatch.setattr("embeddings_pipeline.ledger.proposal.socket.gethostname", lambda: f"container-{next(count)}")
    sync_once(saved(tmp_path), settings)
    sync_once(saved(tmp_path, WITH_REVENUE), settings)
    with pytest.raises(StaleDefinitionError, match="--redefine"):
        open_collection(saved(tmp_path), settings)
    open_collection(saved(tmp_path, FILMS.replace("[title]", "[revenue]")), settings)  # a new one counts


def test_a_file_that_was_changed_counts_again_also_back_to_what_it_was(database, settings, tmp_path) -> None:
    make_films(database, films(3))
    for text in (FILMS, WITH_REVENUE, FILMS):
        collection, _ = sync_once(saved(tmp_path, text), settings)
        assert in_force(database) == collection.definition.definition_hash
        assert collection.ledger.dirty_batches() == []
    status = collection_status(saved(tmp_path, WITH_REVENUE), database, settings)
    assert status["definition"] == "defs.yaml has changed since the last sync: the next one takes it"


def test_a_person_can_put_a_definition_in_force(database, settings, tmp_path) -> None:
    make_films(database, films(3))
    first = saved(tmp_path / "first")
    sync_once(first, settings)
    second = saved(tmp_path / "second", WITH_REVENUE)
    sync_once(second, settings)
    open_collection(load_collections(tmp_path / "first")["films"], settings, redefine=True)
    assert in_force(database) == first.definition_hash
    with pytest.raises(StaleDefinitionError):
        open_collection(second, settings)


def test_a_process_that_was_superseded_at_its_own_place_does_not_come_back(
    database, settings, tmp_path, monkeypatch
) -> None:
    """A package with other rules was installed under a process that runs: the file says the same to both."""
    make_films(database, films(3))
    old = saved(tmp_path)
    sync_once(old, settings)
    monkeypatch.setattr("embeddings_pipeline.config.definition.RENDERING_RULES", "other rules")
    sync_once(load_collections(tmp_path)["films"], settings)
    with pytest.raises(StaleDefinitionError, match=CHANGED):
        open_collection(old, settings)


@pytest.mark.parametrize("where", ["source: {table: films, key: [id], where: id > 1}", "index: {method: none}"])
def test_definitions_that_differ_in_what_is_stored_are_two(tmp_path, where) -> None:
    key = where.partition(":")[0]
    other = "".join(line for line in FILMS.splitlines(keepends=True) if not line.startswith(f"  {key}:"))
    one, two = saved(tmp_path / "a"), saved(tmp_path / "b", f"{other}  {where}\n")
    assert one.outcome_hash != two.outcome_hash and one.definition_hash == two.definition_hash


def test_definitions_that_store_the_same_are_one(tmp_path) -> None:
    other = FILMS + "  automation: {full_scan_minutes: 5}\n  items_per_batch: 7\n  storage: halfvec\n"
    assert saved(tmp_path / "a").outcome_hash == saved(tmp_path / "b", other).outcome_hash


def test_only_a_file_without_a_mistake_is_loaded_anew(database, project, instance, tmp_path, monkeypatch) -> None:
    make_films(database, films(1))
    old, asked = saved(tmp_path), []
    monkeypatch.setattr("embeddings_pipeline.orchestration.reload.code_server", lambda: asked.append(1))
    (tmp_path / "films/defs.yaml").write_text(WITH_REVENUE.replace("columns", "colums"))
    assert CHANGED in evaluate(instance, old, 32).skip_reason.skip_message and not asked
    saved(tmp_path, WITH_REVENUE)
    evaluate(instance, old, 32)
    assert asked == [1]


def test_one_broken_defs_yaml_stops_its_own_collection_in_the_code_location(tmp_path, caplog) -> None:
    saved(tmp_path)
    mistakes = {"broken": ("columns", "colums"), "unknown": (f"profile: {json.dumps(PROFILE)}", "profile: minlm")}
    for name, (right, wrong) in mistakes.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "defs.yaml").write_text(FILMS.replace("name: films", f"name: {name}").replace(right, wrong))
    definitions = definitions_below(tmp_path)
    keys = {spec.key.to_user_string(): spec.description for spec in definitions.resolve_all_asset_specs()}
    assert "films/item_ledger" in keys and "broken/item_ledger" not in keys
    assert "did you mean 'columns'" in keys["broken/NOT_LOADED"] and "minlm" in keys["unknown/NOT_LOADED"]
    assert "a collection is not loaded" in caplog.text
    assert "films_scan" in {job.name for job in definitions.resolve_all_job_defs()}


# A process as the one in front of a code server, by its command line, and its child that asks for it.
IN_FRONT = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', sys.argv[-1]]).returncode)"
CHILD = """
from embeddings_pipeline.orchestration.reload import code_server
found = code_server()
print(found and (found.socket or found.port))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["code-server", "start", "--socket", "/tmp/a.sock"], "/tmp/a.sock"),
        (["code-server", "start", "-p", "4000", "--host", "0.0.0.0"], "4000"),
        (["api", "grpc", "--port", "4000"], "None"),
    ],
)
def test_the_process_in_front_of_a_code_server_is_known_by_its_command(words: list[str], found: str) -> None:
    command = [sys.executable, "-c", IN_FRONT, *words, CHILD]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == found


def test_a_program_that_has_an_older_definition_is_told(database, project, tmp_path) -> None:
    make_films(database, films(1))
    saved(tmp_path)
    with front_door.open_collection("films", defs_dir=tmp_path) as client:
        saved(tmp_path, WITH_REVENUE)
        with pytest.raises(StaleDefinitionError, match=CHANGED):
            client.sync()
