"""`live` follows the current model through each phase of a change, and keeps the other one whole beside it."""

import itertools

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.model_change.phases import contract, roll_back, swap
from embeddings_pipeline.search.query import search
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.live.test_follow import soon
from embeddings_pipeline_tests.support.following import following
from embeddings_pipeline_tests.support.model_change import (
    OTHER,
    WIDE,
    again,
    assert_whole,
    backfill_all,
    begin,
)
from embeddings_pipeline_tests.support.workbench import (
    by_name,
    definition,
    execute,
    films,
    make_films,
    sync_once,
    wait_until,
)


def test_changes_are_followed_in_each_phase_of_a_model_change(database: Database, settings: Settings) -> None:
    make_films(database, films(25))
    execute(database, "ALTER TABLE films ADD at timestamptz NOT NULL DEFAULT now()")
    source = {"table": "films", "key": ["id"], "updated_at": "at"}
    one = definition(source=source, profiles=by_name(WIDE, OTHER))
    collection, _ = sync_once(one, settings)
    count = itertools.count(1)

    def changes_are_followed() -> None:
        number = next(count)
        execute(database, "INSERT INTO films VALUES (%s, 'New', %s, 1)", [100 + number, f"walrus{number}"])
        execute(database, "UPDATE films SET overview = %s, at = now() WHERE id = 3", [f"xylophone{number}"])
        newest = (f"New walrus{number}", str(100 + number)), (f"xylophone{number}", "3")
        for query, key in newest:
            soon(lambda query=query, key=key: search(one, settings, query, k=1)[0].item_key == key)  # type: ignore[misc]

    with following(one, settings=settings) as heard:
        changes_are_followed()
        begin(collection, "wide")
        changes_are_followed()
        backfill_all(again(collection))
        changes_are_followed()
        swap(again(collection), "swap")
        changes_are_followed()
        roll_back(again(collection), "back", drop_candidate=False)
        changes_are_followed()
        swap(again(collection), "swap again")
        changes_are_followed()
        contract(again(collection), now=True)
        changes_are_followed()
        assert again(collection).profile.name == "wide"
        wait_until(lambda: not again(collection).ledger.work())
    assert_whole(collection)
    assert not [line for line in heard.lines if "unexpected" in line]
