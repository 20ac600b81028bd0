"""A collection of films whose model is changed: its profiles, the phases by hand, and what is looked at after each."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.failpoints import at_failpoint
from embeddings_pipeline.model_change import phases
from embeddings_pipeline.model_change.phases import expand
from embeddings_pipeline.model_change.state import (
    ModelChange,
    candidate_profile,
)
from embeddings_pipeline.pipeline.collection import Collection, open_collection
from embeddings_pipeline.pipeline.run_batch import run_batch
from embeddings_pipeline_tests.support.workbench import (
    PROFILE,
    by_name,
    execute,
)
from embeddings_pipeline_tests.support.workbench import definition as plain_definition

WIDE = {**PROFILE, "name": "wide", "dimensions": 48}
OTHER = {**PROFILE, "name": "other", "document_prompt": "passage: "}  # other vectors of the same dimension
NEXT = pytest.mark.parametrize("name", ["wide", "other"])


def definition(**attributes: Any) -> CollectionDefinition:
    return plain_definition(**{"profiles": by_name(WIDE, OTHER), **attributes})


def begin(collection: Collection, name: str) -> ModelChange:
    return expand(collection, candidate_profile(collection, name))


def backfill_all(collection: Collection, *batches: int) -> int:
    backfilled = phases.backfill(collection, batches or collection.ledger.batches(), "backfill")
    return sum(one.embedded for _, one in backfilled)


@contextmanager
def written_together() -> Iterator[list[list[int]]]:
    """The batches of each transaction that a backfill writes in the block."""
    together: list[list[int]] = []

    def note(batches: list[int]) -> None:
        together.append(batches)

    with at_failpoint("backfill.group", note):
        yield together


def again(collection: Collection) -> Collection:
    return open_collection(collection.definition, collection.settings)


def commit(collection: Collection, batch: int, run: str) -> None:
    """A batch as a run does it, with the shadow models."""
    run_batch(collection, [batch], run)


def commit_all(collection: Collection, run: str = "later") -> None:
    collection.ledger.full_scan(collection.source)
    for batch in collection.ledger.work():
        commit(collection, batch, run)


def assert_whole(collection: Collection) -> None:
    """Every text has the vector that its model makes of it, in each model, and the view shows the current one."""
    for model in [again(collection), *again(collection).shadow_models()]:
        query = f"""SELECT text.text, vector.embedding::real[] FROM embeddings.films_text AS text
                    LEFT JOIN embeddings.{model.model.destination.name} AS vector ON vector.text_id = text.id"""
        rows = execute(collection.database, query)
        count = f"SELECT count(*) FROM embeddings.{model.model.destination.name}"
        assert execute(collection.database, count) == [(len(rows),)]
        assert all(vector is not None for _, vector in rows), model.profile.name
        expected = model.encoder().encode_documents([text for text, _ in rows])
        assert np.allclose(np.array([vector for _, vector in rows]), expected, atol=1e-3), model.profile.name
    shown = execute(collection.database, "SELECT text, embedding::real[] FROM embeddings.films")
    expected = again(collection).encoder().encode_documents([text for text, _ in shown])
    assert np.allclose(np.array([vector for _, vector in shown]), expected, atol=1e-3)


def assert_whole_but(collection: Collection, marker: str) -> None:
    execute(collection.database, f"UPDATE films SET overview = 'mended' WHERE overview = '{marker}'")
    commit_all(again(collection))
    assert_whole(collection)
