"""An audit counts what somebody did by hand, and a sync mends it."""

from typing import Any

import pytest

from embeddings_pipeline.health.audit import audit
from embeddings_pipeline.orchestration.component import build_definitions
from embeddings_pipeline.orchestration.sync import sync
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline_tests.support.workbench import (
    committed,
    definition,
    execute,
    films,
    make_films,
)

OTHER_HASH = "UPDATE embeddings.{vector} SET content_hash = decode(repeat('00', 16), 'hex') WHERE text_id = 3"


@pytest.mark.slow
class TestAudit:
    @pytest.fixture
    def collection(self, database, project, instance) -> Any:
        make_films(database, films(25))
        sync(definition(), project, instance=instance)
        collection = open_collection(definition(), project)
        assert audit(collection).agree
        return collection

    @pytest.mark.parametrize(
        ("damage", "found"),
        [
            ("DELETE FROM embeddings.films_text WHERE item_key = '3'", "items_without_texts vectors_without_text"),
            ("DELETE FROM embeddings.films_item WHERE item_key = '3'", "texts_without_item"),
            ("DELETE FROM embeddings.{vector} WHERE text_id = 3", "texts_without_vector vectors_not_in_faiss"),
            (
                "UPDATE embeddings.{vector} SET text_id = 999 WHERE text_id = 3",
                "vectors_without_text texts_without_vector",
            ),
            (OTHER_HASH, "vectors_of_another_text"),
        ],
    )
    def test_what_somebody_did_by_hand_is_counted_and_mended(
        self, database, project, instance, collection, damage, found
    ) -> None:
        before = committed(database)
        execute(database, damage.format(vector=collection.model.destination.name))
        counted = audit(collection)
        assert not counted.agree
        for name in found.replace("vectors_not_in_faiss", "").split():
            assert getattr(counted, name) == 1, counted
        sync(definition(), project, instance=instance)
        assert audit(collection).agree
        assert committed(database) == before

    @pytest.mark.parametrize("damage", ["unlink", "truncate"])
    def test_a_lake_file_that_is_gone_or_damaged_is_written_again(
        self, database, project, instance, collection, damage
    ) -> None:
        [file] = (project.state_dir / "lake" / collection.folder("embeddings") / "000001").glob("*.parquet")
        file.unlink() if damage == "unlink" else file.write_bytes(file.read_bytes()[:100])
        counted = audit(collection)
        assert (counted.batches_without_lake_file, counted.batches_marked) == (1, 1)
        done = sync(definition(), project, instance=instance)
        assert done.embedded == 0  # from the table
        assert audit(collection).agree

    def test_an_index_with_other_ids_than_the_table_is_built_again(
        self, database, project, instance, collection
    ) -> None:
        vector = f"embeddings.{collection.model.destination.name}"
        text = "embeddings.films_text (item_key, vector_name, chunk, content_hash, text, blank)"
        copied = "item_key, vector_name, 7, content_hash, text, blank FROM embeddings.films_text WHERE id = 3"
        [(new,)] = execute(database, f"INSERT INTO {text} SELECT {copied} RETURNING id")
        copied = f"SELECT {new}, vector_name, content_hash, embedding FROM {vector} WHERE text_id = 3"
        execute(database, f"INSERT INTO {vector} {copied}")
        assert audit(collection).vectors_not_in_faiss == 1
        sync(definition(), project, instance=instance)
        assert audit(collection).agree

    def test_the_check_names_what_is_wrong_and_the_command(self, database, project, instance, collection) -> None:
        execute(database, "DELETE FROM embeddings.films_text WHERE item_key = '3'")
        job = build_definitions(definition()).resolve_job_def("films_audit")
        done = job.execute_in_process(instance=instance)
        by_name = {evaluation.check_name: evaluation for evaluation in done.get_asset_check_evaluations()}
        assert not by_name["agreement"].passed
        assert "1 item without texts" in by_name["agreement"].description
        assert "sync --full" in by_name["agreement"].description
        full = sync(definition(), project, full=True, instance=instance)
        assert full.embedded == 0  # its vector is in the lake
        assert audit(collection).agree
