"""An item that cannot be read, rendered or stored goes into quarantine with its step, and the others are committed."""

from collections.abc import Iterator
from typing import Any

import pytest

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.config.templates import Template
from embeddings_pipeline.health.audit import audit
from embeddings_pipeline.health.coverage import coverage
from embeddings_pipeline.model_change.phases import add_model
from embeddings_pipeline.model_change.state import candidate_profile
from embeddings_pipeline.pipeline.collection import Collection, open_collection
from embeddings_pipeline.pipeline.failed import reason_of
from embeddings_pipeline.pipeline.pending import pending_texts
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.workbench import (
    PROFILE,
    by_name,
    commit_batch,
    committed,
    definition,
    execute,
    later,
    prepare_batch,
    run_batch,
    sync_once,
)

DEEP = "(repeat('{\"a\":', 400) || '1' || repeat('}', 400))::json"
HUGE = "'{\"n\": 1e1000000}'::json"  # a json, and no jsonb
WIDE = {**PROFILE, "name": "wide", "dimensions": 48}
VIEW = """CREATE VIEW readable AS
    SELECT id, title, 10 / CASE WHEN title = 'UNREADABLE' THEN 0 ELSE 1 END AS number, extra FROM films"""


@pytest.fixture(autouse=True)
def _films(database: Database) -> Iterator[None]:
    execute(database, "CREATE TABLE films (id bigint PRIMARY KEY, title text, extra json)")
    execute(database, "INSERT INTO films SELECT n, 'Film ' || n, '{\"n\": 1}' FROM generate_series(1, 9) n")
    execute(database, VIEW)
    yield


def breaking(step: str) -> str:
    """What makes the fifth film fail at a step."""
    broken = {"read": "title = 'UNREADABLE'", "render": f"extra = {DEEP}", "store": f"extra = {HUGE}"}[step]
    return f"UPDATE films SET {broken} WHERE id = 5"


MEND = "UPDATE films SET title = 'Film 5', extra = '{\"n\": 1}' WHERE id = 5"


def films_definition(**attributes: Any) -> Any:
    defaults = {"source": {"table": "readable", "key": ["id"]}, "columns": ["title", "number", "extra"]}
    return definition(**{**defaults, "vectors": {"base": "{title} {extra}"}, **attributes})


def entries(collection: Collection) -> list[tuple[str | None, str, int]]:
    return [(entry.item_key, entry.step, entry.attempts) for entry in collection.ledger.quarantine_entries()]


@pytest.mark.parametrize("step", ["read", "render", "store"])
class TestOneItem:
    def test_it_goes_into_quarantine_and_the_others_are_committed(
        self, database: Database, settings: Settings, step: str
    ) -> None:
        execute(database, breaking(step))
        collection, embedded = sync_once(films_definition(), settings)
        assert embedded == (9 if step == "store" else 8)
        assert set(committed(database)) == {str(n) for n in range(1, 10) if n != 5}
        assert entries(collection) == [("5", step, 1)]
        assert collection.ledger.dirty_batches() == [] and collection.ledger.work() == {}
        covered = coverage(collection.database, collection.model)
        assert (covered.items, covered.missing, covered.stale, covered.quarantined_items) == (9, 0, 0, 1)
        assert audit(collection).agree and collection.ledger.repair() == 0

    def test_its_earlier_vector_goes_and_a_repaired_row_heals_by_itself(
        self, database: Database, settings: Settings, step: str
    ) -> None:
        sync_once(films_definition(), settings)
        execute(database, breaking(step))
        collection, _ = sync_once(films_definition(), settings, "broken")
        assert "5" not in committed(database) and entries(collection) == [("5", step, 1)]
        execute(database, MEND)
        collection, _ = sync_once(films_definition(), settings, "mended")
        assert set(committed(database)) == {str(n) for n in range(1, 10)} and entries(collection) == []

    def test_it_is_tried_again_a_bounded_number_of_times(
        self, database: Database, settings: Settings, step: str
    ) -> None:
        execute(database, breaking(step))
        collection, _ = sync_once(films_definition(quarantine={"attempts": 3}), settings)
        tried = []
        for n in range(5):
            tried.append(collection.ledger.work(due=True))
            run_batch(collection, 0, f"try{n}")  # also while it waits, which is no attempt
            later(database, 24 * 3600)
        assert tried == [{}, {0: 1}, {0: 1}, {}, {}]
        assert entries(collection) == [("5", step, 3)]

    def test_retry_and_clear_have_it_tried_again(self, database: Database, settings: Settings, step: str) -> None:
        execute(database, breaking(step))
        collection, _ = sync_once(films_definition(), settings)
        [entry] = collection.ledger.quarantine_entries()
        assert collection.ledger.quarantine_retry([bytes.fromhex(entry.content_hash)]) == 1
        assert collection.ledger.work() == {0: 1}
        run_batch(collection, 0, "again")
        assert entries(collection) == [("5", step, 1)] and collection.ledger.work() == {}
        assert collection.ledger.quarantine_clear([bytes.fromhex(entry.content_hash)]) == 1
        assert entries(collection) == [] and collection.ledger.dirty_items() == {0: 1}

    def test_it_leaves_with_its_row(self, database: Database, settings: Settings, step: str) -> None:
        execute(database, breaking(step))
        sync_once(films_definition(), settings)
        execute(database, "DELETE FROM films WHERE id = 5")
        collection, _ = sync_once(films_definition(), settings, "gone")
        assert entries(collection) == []
        assert execute(database, "SELECT count(*) FROM embeddings.films_item") == [(8,)]

    def test_a_commit_that_is_late_leaves_what_is_newer(
        self, database: Database, settings: Settings, step: str
    ) -> None:
        execute(database, breaking(step))
        collection = open_collection(films_definition(), settings)
        collection.ledger.full_scan(collection.source)
        prepare_batch(collection, 0, "late")
        execute(database, MEND)
        sync_once(films_definition(), settings, "fast")
        late = commit_batch(collection, 0, "late")
        assert late.left == 1 and late.quarantined == 0
        assert "5" in committed(database) and entries(collection) == []

    def test_a_dry_look_does_not_fail(self, database: Database, settings: Settings, step: str) -> None:
        execute(database, breaking(step))
        collection = open_collection(films_definition(), settings)
        result, keys = collection.ledger.look(collection.source)
        assert (result.scanned, result.new, sum(map(len, keys.values()))) == (9, 9, 9)
        assert pending_texts(collection, keys).texts == (9 if step == "store" else 8)


def test_several_items_of_several_kinds(database: Database, settings: Settings) -> None:
    execute(database, "UPDATE films SET title = 'UNREADABLE' WHERE id = 2")
    execute(database, f"UPDATE films SET extra = {DEEP} WHERE id IN (3, 4)")
    execute(database, f"UPDATE films SET extra = {HUGE} WHERE id IN (5, 8)")
    collection, _ = sync_once(films_definition(), settings)
    assert set(committed(database)) == {"1", "6", "7", "9"}
    steps = [("2", "read"), ("3", "render"), ("4", "render"), ("5", "store"), ("8", "store")]
    assert sorted(entry[:2] for entry in entries(collection)) == steps
    reasons = {entry.item_key: entry.reason for entry in collection.ledger.quarantine_entries()}
    assert reasons["2"] == "division by zero" and "nested too deeply" in reasons["3"]
    assert reasons["5"] == "value overflows numeric format"


def test_of_a_batch_each_item_may_be_refused_for_its_value(database: Database, settings: Settings) -> None:
    execute(database, "INSERT INTO films SELECT n, 'Film ' || n, '{\"n\": 1}' FROM generate_series(10, 20) n")
    execute(database, f"UPDATE films SET extra = {HUGE} WHERE id <= 10")
    collection, _ = sync_once(films_definition(), settings)
    reasons = {entry.item_key: (entry.step, entry.reason) for entry in collection.ledger.quarantine_entries()}
    assert len(reasons) == 10 and set(reasons.values()) == {("store", "value overflows numeric format")}
    assert len(committed(database)) == 10 and collection.ledger.work() == {}


def test_an_index_of_the_users_that_refuses_a_payload_costs_that_item_alone(
    database: Database, settings: Settings
) -> None:
    execute(database, "UPDATE films SET title = '1999'")
    collection, _ = sync_once(films_definition(), settings)
    execute(database, "CREATE INDEX ON embeddings.films_item (((payload->>'title')::int))")
    execute(database, "UPDATE films SET title = 'n/a' WHERE id = 5")
    collection, _ = sync_once(films_definition(), settings, "again")
    assert entries(collection) == [("5", "store", 1)] and len(committed(database)) == 8


@pytest.mark.parametrize("others", [1, 2])
def test_what_refuses_all_but_items_with_a_bad_value_is_no_items_fault_unless_it_refuses_one(
    database: Database, settings: Settings, others: int
) -> None:
    sync_once(films_definition(), settings)
    execute(
        database,
        """CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
           $$ BEGIN IF NEW.payload->>'title' LIKE '%!' THEN RAISE 'not now'; END IF; RETURN NEW; END $$""",
    )
    execute(
        database,
        "CREATE TRIGGER refuse BEFORE UPDATE ON embeddings.films_item FOR EACH ROW EXECUTE FUNCTION refuse()",
    )
    execute(database, f"UPDATE films SET title = title || '!', extra = CASE WHEN id > {others} THEN {HUGE} END")
    if others == 1:
        collection, _ = sync_once(films_definition(), settings, "refused")
        assert {entry.reason for entry in collection.ledger.quarantine_entries()} == {
            "not now",
            "value overflows numeric format",
        }
        assert len(entries(collection)) == 9 and collection.ledger.work() == {}
        return
    with pytest.raises(Exception, match=r"not now|overflows"):
        sync_once(films_definition(), settings, "refused")
    assert entries(open_collection(films_definition(), settings)) == []


def test_a_reason_can_be_stored() -> None:
    assert reason_of(ValueError("NUL \x00 and half \ud83d a character")) == (
        "ValueError: NUL \ufffd and half \ufffd a character"
    )


def test_what_the_database_refuses_of_every_item_is_no_items_fault(database: Database, settings: Settings) -> None:
    sync_once(films_definition(), settings)
    before = committed(database)
    execute(
        database,
        """CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
           $$ BEGIN IF NEW.payload IS NOT NULL THEN RAISE 'not now'; END IF; RETURN NEW; END $$""",
    )
    execute(
        database,
        "CREATE TRIGGER refuse BEFORE UPDATE ON embeddings.films_item FOR EACH ROW EXECUTE FUNCTION refuse()",
    )
    execute(database, "UPDATE films SET title = title || '!'")
    with pytest.raises(Exception, match="not now"):
        sync_once(films_definition(), settings, "refused")
    collection = open_collection(films_definition(), settings)
    assert committed(database) == before and entries(collection) == []


def test_a_template_that_fails_for_a_harmless_row_too_blames_no_row(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(Template, "join", fail)
    with pytest.raises(ZeroDivisionError):
        sync_once(films_definition(), settings)
    assert entries(open_collection(films_definition(), settings)) == []


def test_a_shadow_model_loses_the_items_vector_too_and_gets_it_back(database: Database, settings: Settings) -> None:
    both = films_definition(profiles=by_name(PROFILE, WIDE))
    collection, _ = sync_once(both, settings)
    wide = add_model(collection, candidate_profile(collection, "wide")).destination.name
    count = f"SELECT count(*) FROM embeddings.{wide}"
    run_batch(collection, 0, "fill")
    assert execute(database, count) == [(9,)]
    execute(database, breaking("render"))
    sync_once(both, settings, "broken")
    assert execute(database, count) == [(8,)]
    execute(database, MEND)
    sync_once(both, settings, "mended")
    assert execute(database, count) == [(9,)]


def test_a_column_of_the_users_table_loses_the_vector_and_refuses_one_row(
    database: Database, settings: Settings
) -> None:
    execute(database, "ALTER TABLE films ADD COLUMN embedding vector(32) CHECK (title <> 'n/a' OR embedding IS NULL)")
    own = films_definition(
        source={"table": "films", "key": ["id"]},
        columns=["title"],
        profile=None,
        profiles=by_name(PROFILE),
        destination={"table": "films", "profile": "test"},
    )
    sync_once(own, settings)
    execute(database, "UPDATE films SET title = 'n/a', embedding = NULL WHERE id = 4")
    execute(database, breaking("render"))
    collection, _ = sync_once(own, settings, "again")
    assert sorted(entry[:2] for entry in entries(collection)) == [("4", "store"), ("5", "render")]
    without = execute(database, "SELECT id FROM films WHERE embedding IS NULL ORDER BY id")
    assert without == [(4,), (5,)]
