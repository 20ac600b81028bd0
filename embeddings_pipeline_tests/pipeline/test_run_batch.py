"""The order of a batch, in one call; and steps of several batches that overlap."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest

from embeddings_pipeline.errors import OutageError, PipelineError
from embeddings_pipeline.failpoints import at_failpoint
from embeddings_pipeline.pipeline import commit, read
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline.pipeline.commit import commit_batches
from embeddings_pipeline.pipeline.embed import EmbedOptions
from embeddings_pipeline.pipeline.read import read_items
from embeddings_pipeline.pipeline.run_batch import run_batch
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.workbench import (
    PROFILE,
    committed,
    definition,
    execute,
    films,
    make_films,
    prepare_batch,
    wait_until,
)


@pytest.fixture
def collection(database, settings):
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

    gone = collection.ledger.keys_of_batches([0])[0][:3]
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
    chosen = collection.ledger.keys_of_batches([0])[0][3:5]
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


# --- steps that overlap ------------------------------------------------------------------------------------------


class WatchingEncoder(DeterministicEncoder):
    """Calls `before` with the texts before it encodes them."""

    before: ClassVar[Callable[[str], None]]

    def encode_documents(self, texts):
        for text in texts:
            type(self).before(text)
        return super().encode_documents(texts)


TOGETHER = 600  # items of a batch: the texts of two are too many for one call of the encoder


@pytest.fixture
def large(database, settings):
    """Three batches, each of which goes to the encoder alone; and the first text of each."""
    make_films(database, films(3 * TOGETHER))
    profile = {**PROFILE, "model": f"{__name__}:WatchingEncoder"}
    collection = open_collection(definition(profile=profile, items_per_batch=TOGETHER), settings)
    collection.ledger.full_scan(collection.source)
    firsts = [f"Film {keys[0]} |" for keys in collection.ledger.keys_of_batches(range(3)).values()]
    WatchingEncoder.reset()
    WatchingEncoder.before = lambda text: None
    return collection, firsts


def committed_batches(database: Database) -> list[int]:
    rows = execute(database, "SELECT batch FROM embeddings.batch WHERE committed_at IS NOT NULL ORDER BY batch")
    return [batch for (batch,) in rows]


def tried_batches(database: Database) -> list[int]:
    return [batch for (batch,) in execute(database, "SELECT batch FROM embeddings.batch WHERE failure IS NOT NULL")]


def test_a_batch_is_committed_while_a_later_one_is_encoded(large, database) -> None:
    collection, firsts = large

    def before(text: str) -> None:
        if text.startswith(firsts[2]):
            wait_until(lambda: committed_batches(database) == [0], 30)

    WatchingEncoder.before = before
    run_batch(collection, [0, 1, 2], "run")
    assert committed_batches(database) == [0, 1, 2]
    assert len(committed(database)) == 3 * TOGETHER and collection.ledger.dirty_batches() == []


def test_a_commit_that_fails_is_its_own_batchs_failure(large, database) -> None:
    collection, _ = large

    def fail(batch: int) -> None:
        if batch == 1:
            raise OutageError("the database is away, for this batch")

    with at_failpoint("batch.lock", fail), pytest.raises(OutageError, match="for this batch"):
        run_batch(collection, [0, 1, 2], "run")
    assert 0 in committed_batches(database) and 1 not in committed_batches(database)
    assert tried_batches(database) == [1]
    assert 1 in collection.ledger.dirty_batches()


def test_batches_are_read_and_committed_together_as_far_as_memory_allows(collection, database, monkeypatch) -> None:
    run_batch(collection, [0, 1, 2], "first")
    locked: list[int] = []
    looks: list[int] = []

    def lock(batch: int) -> None:
        locked.append(batch)

    for most, transactions in ((1 << 30, 1), (1, 3)):
        monkeypatch.setattr(commit, "BYTES_TOGETHER", most)
        monkeypatch.setattr(read, "BYTES_TOGETHER", most)
        execute(database, "UPDATE films SET title = title || ' again'")
        collection.ledger.full_scan(collection.source)
        for batch in range(3):
            prepare_batch(collection, batch, f"run{most}")
        reads = read_items(collection, [0, 1, 2], f"run{most}")
        assert {batch: figures.rows for batch, figures in reads.items()} == {0: 10, 1: 10, 2: 5}
        looks.clear()
        with (
            at_failpoint("commit.second_look", lambda: looks.append(1)),
            at_failpoint("batch.lock", lock),
        ):
            done = commit_batches(collection, [0, 1, 2], f"run{most}")
        assert len(looks) == transactions
        assert [(figures.updated, figures.vectors_written) for figures in done.values()] == [(10, 10), (10, 10), (5, 5)]
        assert [done[batch].version for batch in range(3)] == sorted(figures.version for figures in done.values())
        assert collection.ledger.dirty_batches() == []
    assert locked == [0, 1, 2] * 2


@pytest.mark.parametrize("step", ["raw_items", "item_texts", "encode"])
def test_what_is_before_a_batch_that_fails_is_committed(large, database, step) -> None:
    collection, firsts = large

    def before(text: str) -> None:
        if step == "encode" and text.startswith(firsts[2]):
            raise OutageError("the encoder is away")

    WatchingEncoder.before = before
    if step != "encode":  # a file where the lake wants a folder, for the last batch
        folder = Path(collection.lake.root, "films", step)
        folder.mkdir(parents=True)
        (folder / "000002").touch()
    with pytest.raises(PipelineError, match=r"away|cannot be written"):
        run_batch(collection, [0, 1, 2], "run")
    assert committed_batches(database) == [0, 1]
    assert tried_batches(database) == [2]


def test_no_thread_of_a_run_outlives_it(large, database) -> None:
    collection, firsts = large
    before = {thread.ident for thread in threading.enumerate()}

    def interrupt(text: str) -> None:
        if text.startswith(firsts[1]):
            raise KeyboardInterrupt

    WatchingEncoder.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        run_batch(collection, [0, 1, 2], "run")
    others = {t.ident for t in threading.enumerate() if not t.name.startswith("pool-")} - before
    assert {thread.ident for thread in threading.enumerate()} - before <= others


def test_an_interrupt_ends_a_step_that_waits(collection, database) -> None:
    with database.connect() as other:
        other.execute("LOCK TABLE films")
        timer = threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            run_batch(collection, [0, 1], "run")
        assert time.monotonic() - began < 60  # and not until the read gives up by itself
    run_batch(collection, [0, 1], "again")
    assert len(committed(database)) == 20
