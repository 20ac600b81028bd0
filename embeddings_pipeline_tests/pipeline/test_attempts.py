"""A step for many batches: which it takes together, and whose a failure is."""

import threading
from collections.abc import Iterator, Sequence

import pytest

from embeddings_pipeline.errors import OutageError
from embeddings_pipeline.pipeline.attempts import each_batch, each_group
from embeddings_pipeline.pipeline.collection import Collection, open_collection
from embeddings_pipeline_tests.support.workbench import definition, films, make_films

BATCHES = range(8)


@pytest.fixture
def collection(database, settings) -> Collection:
    """One of eight batches, of which each has 1,000 items at most."""
    make_films(database, films(8))
    one = definition(items_per_batch=1000)
    return open_collection(one, settings)


def tried(collection: Collection) -> list[int]:
    """The batches of which an attempt failed."""
    query = "SELECT batch FROM embeddings.batch WHERE failure IS NOT NULL ORDER BY batch"
    with collection.database.session() as connection:
        return [batch for (batch,) in connection.execute(query)]


def add_batches(collection: Collection) -> None:
    query = "INSERT INTO embeddings.batch (collection, batch) SELECT 'films', n FROM generate_series(0, 7) AS n"
    with collection.database.session() as connection:
        connection.execute(query)


def test_batches_that_wait_are_taken_together_and_come_in_their_order(collection) -> None:
    groups: list[list[int]] = []
    all_there = threading.Event()

    def step(_: Collection, group: Sequence[int]) -> dict[int, str]:
        groups.append(list(group))
        if len(groups) <= 2:
            all_there.wait(30)
        return {batch: f"done {batch}" for batch in group}

    def coming() -> Iterator[int]:
        yield from BATCHES
        all_there.set()

    done = list(each_group(collection, coming(), step))
    assert done == [(batch, f"done {batch}") for batch in BATCHES]
    assert sorted(batch for group in groups for batch in group) == list(BATCHES)
    assert max(map(len, groups)) > 1 and max(map(len, groups)) <= 5  # 5,000 items
    assert len(groups) < len(BATCHES)


def test_a_batch_that_comes_alone_is_not_kept_waiting(collection) -> None:
    begun = threading.Event()

    def step(_: Collection, group: Sequence[int]) -> dict[int, None]:
        begun.set()
        return dict.fromkeys(group)

    def coming() -> Iterator[int]:
        yield 0
        assert begun.wait(30)  # before it is known whether another one comes
        yield 1

    assert [batch for batch, _ in each_group(collection, coming(), step)] == [0, 1]


def test_if_several_fail_together_each_is_done_by_itself(collection) -> None:
    add_batches(collection)
    alone: list[int] = []

    def step(_: Collection, group: Sequence[int]) -> dict[int, None]:
        if len(group) > 1:
            raise OutageError("too many")
        alone.append(group[0])
        if group[0] == 5:
            raise OutageError("this one")
        return dict.fromkeys(group)

    done = []
    with pytest.raises(OutageError, match="this one"):
        for batch, _ in each_group(collection, BATCHES, step):
            done.append(batch)
    assert done[:5] == [0, 1, 2, 3, 4] and 5 not in done
    assert len(alone) == len(set(alone))
    assert tried(collection) == [5]


def test_a_step_that_takes_one_batch_gets_one(collection) -> None:
    assert list(each_batch(collection, BATCHES, lambda _, batch: batch * 2)) == [(n, n * 2) for n in BATCHES]
