"""The order of a batch, in one call."""

import pytest

from embeddings_pipeline.errors import OutageError
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline.pipeline.embed import EmbedOptions
from embeddings_pipeline.pipeline.run_batch import run_batch
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.workbench import committed, definition, execute, films, make_films


@pytest.fixture
def collection(database, settings):
    DeterministicEncoder.reset()
    make_films(database, films(25))
    collection = open_collection(definition(), settings)
    collection.ledger.full_scan(collection.source)
    yield collection
    DeterministicEncoder.reset()


def test_the_figures_are_sums_over_the_batches(collection, database) -> None:
    figures = run_batch(collection, collection.ledger.dirty_batches(), "run")
    assert (figures.rows, figures.texts, figures.embedded, figures.inserted, figures.vectors_written) == (25,) * 5
    assert figures.gone == figures.left == figures.quarantined == figures.reused == 0
    assert len(committed(database)) == 25 and collection.ledger.dirty_batches() == []

    gone = collection.ledger.item_keys(0)[:3]
    execute(database, "DELETE FROM films WHERE id::text = ANY (%s)", [gone])
    collection.ledger.full_scan(collection.source, allow_deletes=True)
    figures = run_batch(collection, [0], "second")
    assert (figures.rows, figures.gone, figures.embedded, figures.reused) == (7, 3, 0, 7)
    assert (figures.deleted, figures.unchanged, figures.vectors_deleted) == (3, 7, 3)


def test_a_dry_run_counts_and_writes_nothing_that_is_searched(collection, database) -> None:
    figures = run_batch(collection, [0, 1], "dry", options=EmbedOptions(dry_run=True))
    assert (figures.texts, figures.left_to_embed, figures.embedded, figures.inserted) == (20, 20, 0, 0)
    assert committed(database) == {} and DeterministicEncoder.texts_encoded == {}


def test_a_limit_holds_for_all_batches_together(collection) -> None:
    figures = run_batch(collection, [0, 1], "limited", options=EmbedOptions(limit=12))
    assert (figures.embedded, figures.left_to_embed, figures.inserted, figures.left) == (12, 8, 12, 8)


def test_few_items_of_a_batch_can_be_chosen(collection, database) -> None:
    chosen = collection.ledger.item_keys(0)[3:5]
    figures = run_batch(collection, [0], "chosen", options=EmbedOptions(items=chosen))
    assert (figures.embedded, figures.inserted, figures.left) == (2, 2, 8)
    assert sorted(committed(database)) == sorted(chosen)


def test_a_batch_whose_step_fails_waits_and_the_others_are_as_they_were(collection, database) -> None:
    run_batch(collection, [1], "well")
    DeterministicEncoder.fail_on, DeterministicEncoder.error = "Film 1", OutageError
    with pytest.raises(OutageError):
        run_batch(collection, [0], "outage")
    assert execute(database, "SELECT attempts > 0 FROM embeddings.batch ORDER BY batch") == [
        (True,),
        (False,),
        (False,),
    ]
    assert len(committed(database)) == 10
