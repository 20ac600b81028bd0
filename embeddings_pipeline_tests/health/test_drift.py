"""Does the model still give the vectors that it gave?"""

import dagster as dg

from embeddings_pipeline.errors import ProfileError
from embeddings_pipeline.health.drift import measure
from embeddings_pipeline.orchestration.component import build_definitions
from embeddings_pipeline.orchestration.sync import sync
from embeddings_pipeline.pipeline.canaries import CANARIES
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.store import schema
from embeddings_pipeline.store.sql import schema_versions
from embeddings_pipeline_tests.support.workbench import (
    definition,
    execute,
    films,
    make_films,
    sync_once,
)


class TestDrift:
    def test_the_canaries_are_stored_with_the_first_vectors_and_compared_later(self, database, settings) -> None:
        make_films(database, films(3))
        collection, _ = sync_once(definition(), settings)
        assert execute(database, "SELECT count(*) FROM embeddings.canary") == [(len(CANARIES),)]
        found = measure(collection, collection.encoder())
        assert (found.texts, found.lowest_cosine, found.same) == (20, 1.0, True)
        execute(database, "UPDATE embeddings.canary SET embedding[1] = embedding[1] + 0.5 WHERE number = 7")
        changed = measure(collection, collection.encoder())
        assert changed.lowest_cosine < 0.999 and not changed.same and changed.worst_text == CANARIES[7]

    def test_weights_that_are_not_those_of_the_fingerprint_fail_the_check_in_one_line(
        self, database, project, instance, monkeypatch
    ) -> None:
        make_films(database, films(3))
        sync(definition(), project, instance=instance)

        def other_weights(_: object) -> None:
            raise ProfileError("Profile test: the weights are not those that the vectors were made with")

        monkeypatch.setattr(Collection, "encoder", other_weights)
        done = build_definitions(definition()).resolve_job_def("films_audit").execute_in_process(instance=instance)
        by_name = {evaluation.check_name: evaluation for evaluation in done.get_asset_check_evaluations()}
        assert not by_name["model_drift"].passed and by_name["agreement"].passed
        assert "the weights are not those" in by_name["model_drift"].description

    def test_the_audit_keeps_its_checks_evaluated_when_the_indexes_are_built_again(
        self, database, project, instance
    ) -> None:
        make_films(database, films(3))
        sync(definition(), project, full=True, instance=instance)
        numbers = instance.get_latest_materialization_event(dg.AssetKey(["films", "audit"]))
        assert numbers.asset_materialization.metadata["vectors_not_in_faiss"].value == 0
        again = build_definitions(definition()).resolve_job_def("films_index").execute_in_process(instance=instance)
        checked = {evaluation.check_name for evaluation in again.get_asset_check_evaluations()}
        assert checked == {"coverage", "integrity", "quarantine", "freshness", "truncation", "index_parity"}

    def test_a_model_of_other_dimensions_or_without_a_number_is_drift(self, database, settings) -> None:
        make_films(database, films(3))
        collection, _ = sync_once(definition(), settings)
        execute(database, "UPDATE embeddings.canary SET embedding = array_fill(0, ARRAY[32]) WHERE number = 0")
        assert not measure(collection, collection.encoder()).same
        execute(database, "UPDATE embeddings.canary SET embedding = ARRAY[1, 2]")
        assert not measure(collection, collection.encoder()).same


def test_an_upgrade_gives_each_collection_the_canaries_of_its_models(database, monkeypatch) -> None:
    versions = schema_versions()
    execute(database, "DROP SCHEMA embeddings CASCADE")
    with monkeypatch.context() as patch:
        patch.setattr(schema, "schema_versions", lambda: versions[:1])
        schema.forget_schemas()
        schema.ensure_schema(database)
    execute(
        database,
        """INSERT INTO embeddings.collection (name, definition_hash) VALUES ('a', ''), ('b', ''), ('c', '');
        INSERT INTO embeddings.model (collection, fingerprint, profile, dimension, storage)
        VALUES ('a', 'f', '{}', 2, 'vector'), ('b', 'f', '{}', 2, 'vector'), ('c', 'g', '{}', 2, 'vector');
        INSERT INTO embeddings.canary VALUES ('f', 0, 'cat', '{1,0}'), ('gone', 0, 'cat', '{0,1}')""",
    )
    schema.forget_schemas()
    schema.ensure_schema(database)
    kept = "SELECT collection, fingerprint, embedding FROM embeddings.canary ORDER BY collection"
    assert execute(database, kept) == [("a", "f", [1, 0]), ("b", "f", [1, 0])]
