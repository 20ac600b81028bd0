"""The database goes back, or is another one, and the files beside it are not."""

import logging
from dataclasses import replace

import pytest

from embeddings_pipeline.health.audit import audit
from embeddings_pipeline.health.status import collection_status
from embeddings_pipeline.orchestration.automation import evaluate
from embeddings_pipeline.orchestration.sync import sync
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline.search.query import search
from embeddings_pipeline_tests.support import databases
from embeddings_pipeline_tests.support.workbench import definition, edit, execute, films, make_films

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("superuser", "new_databases")]

FOREIGN = "of a state that the database no longer has (was it restored from a backup?); it is built again"
ZEBRA, OCTOPUS = "zebra bicycle zebra", "octopus kitchen octopus"


def faiss_of(database, project):
    return collection_status(definition(), database, project)["faiss"]


def nearest(project, query, caplog):
    """The key of FAISS's nearest item, and what was warned of."""
    caplog.clear()
    [hit] = search(definition(), project, query, k=1, index="faiss")
    return hit.item_key, caplog.text


@pytest.fixture
def restored(server, database, project, instance, tmp_path):
    """A database that was synced, backed up, edited, synced, and restored; its files know the edit."""
    make_films(database, films(25))
    sync(definition(), project, instance=instance)
    databases.dumped(database, tmp_path / "backup")
    edit(database, 5, ZEBRA)
    sync(definition(), project, instance=instance)
    databases.restored(server, database, tmp_path / "backup")
    return database


def test_the_files_of_the_lost_future_are_refused_told_and_replaced(
    restored, database, project, instance, caplog, tmp_path
):
    assert faiss_of(database, project)["standing"] == "foreign"
    assert "restored from a backup" in faiss_of(database, project)["foreign"]
    key, warned = nearest(project, "number 7", caplog)
    assert key == "7" and "PostgreSQL answers until the next" in warned

    edit(database, 5, OCTOPUS)  # at the same count, under the ids that the zebra had
    with caplog.at_level(logging.WARNING):
        sync(definition(), project, instance=instance)
    assert FOREIGN in caplog.text
    assert faiss_of(database, project)["current"]
    assert nearest(project, OCTOPUS, caplog) == ("5", "")
    sync(definition(), project, full=True, instance=instance)
    assert audit(open_collection(definition(), project)).agree


def test_the_sensor_asks_for_a_new_index_and_says_why(restored, database, project, instance):
    tick = evaluate(instance, definition(), 32)
    assert "films_index" in [request.job_name for request in tick.run_requests]
    assert FOREIGN in tick.cursor


def test_a_process_that_lives_on_makes_the_schema_of_a_database_that_was_made_anew(server, database, project, instance):
    make_films(database, films(5))
    sync(definition(), project, instance=instance)
    execute(database, "DROP SCHEMA embeddings CASCADE")
    sync(definition(), project, instance=instance)
    assert faiss_of(database, project)["current"]


def test_two_databases_behind_one_state_folder_keep_to_their_own_files(
    server, database, project, instance, monkeypatch, caplog
):
    make_films(database, [(n, "Film", f"horse {n}", 0) for n in range(1, 13)])
    sync(definition(), project, instance=instance)
    name = f"{databases.name_of(database)}_other"
    other = replace(server, url=server.ensure_sibling(name))
    there = project.model_copy(update={"database_url": other.url})
    try:
        make_films(other, [(n, "Film", f"whale {n}", 0) for n in range(1, 13)])
        monkeypatch.setenv("DATABASE_URL", other.url)
        caplog.clear()
        sync(definition(), there, instance=instance)
        assert f"{project.state_dir / 'faiss' / 'films'} is of another database" in caplog.text
        assert "give each its own, EMBEDDINGS_STATE_DIR" in caplog.text
        assert nearest(there, "whale 7", caplog) == ("7", "")
        key, warned = nearest(project, "horse 7", caplog)
        assert key == "7" and "of another database" in warned
        monkeypatch.setenv("DATABASE_URL", database.url)
        sync(definition(), project, instance=instance)
        assert nearest(project, "horse 7", caplog) == ("7", "")
        assert collection_status(definition(), other, there)["faiss"]["standing"] == "foreign"
        assert audit(open_collection(definition(), project)).agree and audit(open_collection(definition(), there)).agree
    finally:
        databases.dropped(server, name)
        databases.dropped(server, f"{name}_dagster")
