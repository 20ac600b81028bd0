"""The plan of a model change: its exact statements, and that a run executes these and no others."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg import pq

from embeddings_pipeline.config.profiles import resolve_profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import ModelChangeError
from embeddings_pipeline.model_change import phases
from embeddings_pipeline.model_change.plan import plan, shown
from embeddings_pipeline.model_change.state import candidate_destination, candidate_profile
from embeddings_pipeline.pipeline.collection import Collection, open_collection
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.destination.column import VECTORS_PER_SECOND
from embeddings_pipeline_tests.support import model_change, segments
from embeddings_pipeline_tests.support.workbench import PROFILE, execute, films, make_films, sync_once

# What the proof leaves out, of what was executed and of the plan alike: what reads (a COPY of a query, too), what sets
# something of the session
# (for the transaction, mostly: lock_timeout, deadlock_timeout, synchronous_commit), and what the encoder notes of
# itself whenever it encodes, whether for a model change or not.
LEFT_OUT = re.compile(r"SELECT |COPY \(|SET |RESET |INSERT INTO embeddings\.canary |$")


@pytest.fixture
def own(database: Database, settings: Settings) -> Collection:
    """Twenty-five films in a table of our own."""
    make_films(database, films(25))
    return sync_once(model_change.definition(), settings)[0]


@pytest.fixture
def adopted(table: Database, settings: Settings) -> Collection:
    """Twenty-five segments with a column of vectors, and an index on it."""
    return segments.sync(segments.definition(), settings)


class Recorder:
    """Records every statement that sessions of the pipeline execute, in order; not those of a transaction that failed
    and is tried again.
    """

    def __init__(self) -> None:
        self.statements: list[tuple[int, str]] = []
        self.in_transaction: dict[int, int] = {}  # by backend: where its open transaction begins

    def note(self, connection: psycopg.Connection, statement: Any, parameters: Any) -> None:
        backend = connection.info.backend_pid
        if connection.info.transaction_status == pq.TransactionStatus.IDLE:
            self.in_transaction[backend] = len(self.statements)
        text = statement.decode() if isinstance(statement, bytes) else statement
        self.statements.append(
            (backend, shown(connection, text, parameters if isinstance(parameters, Mapping) else {}))
        )

    def forget(self, connection: psycopg.Connection) -> None:
        backend = connection.info.backend_pid
        began = self.in_transaction.get(backend, len(self.statements))
        kept = [own for own in self.statements[began:] if own[0] != backend]
        self.statements[began:] = kept

    def take(self) -> list[str]:
        """What was executed since the last call, and changes something."""
        statements, self.statements = self.statements, []
        return [statement for _, statement in statements if not LEFT_OUT.match(statement)]


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    recorder = Recorder()

    class RecordingCursor(psycopg.Cursor):
        def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
            recorder.note(self.connection, query, params)
            try:
                return super().execute(query, params, **options)
            except psycopg.Error:
                recorder.forget(self.connection)
                raise

        def executemany(self, query: Any, params_seq: Any, **options: Any) -> None:
            recorder.note(self.connection, query, None)
            super().executemany(query, params_seq, **options)

        def copy(self, statement: Any, params: Any = None, **options: Any) -> Any:
            recorder.note(self.connection, statement, params)
            return super().copy(statement, params, **options)

    opened = Database._open

    def opens_recording(database: Database, application_name: str) -> psycopg.Connection:
        connection = opened(database, application_name)
        connection.cursor_factory = RecordingCursor
        return connection

    with monkeypatch.context() as patch:
        patch.setattr(Database, "_open", opens_recording)
        yield recorder


def as_planned(planned: str) -> re.Pattern[str]:
    """What a planned statement may be when it is executed: each `:name` is something that only the run knew."""
    return re.compile(re.sub(r"(?<!:):[a-z_]+", lambda _: "(?s:.+?)", re.escape(planned)))


def assert_executed(executed: list[str], planned: list[str]) -> None:
    wanted = [statement for statement in planned if not LEFT_OUT.match(statement)]
    for statement, own in zip(executed, wanted, strict=False):
        assert as_planned(own).fullmatch(statement), (statement, own)
    assert len(executed) == len(wanted), executed[len(wanted) :] or wanted[len(executed) :]


@pytest.mark.parametrize(
    ("destination", "profile", "setting"),
    [("own", "wide", ""), ("own", "other", ""), ("adopted", "widest", "default"), ("adopted", "widest", "1900")],
)
def test_a_run_executes_exactly_what_the_plan_printed(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, destination: str, profile: str, setting: str
) -> None:
    collection: Collection = request.getfixturevalue(destination)
    if setting.isdecimal():
        execute(collection.database, f"ALTER TABLE segments SET (toast_tuple_target = {setting})")
    execute(collection.database, "GRANT SELECT ON ALL TABLES IN SCHEMA embeddings TO PUBLIC")
    view = collection.model.destination.tables.view.as_string(None)
    execute(collection.database, f"ALTER VIEW {view} SET (security_barrier = true)")
    if destination == "adopted":
        execute(collection.database, "GRANT SELECT (embedding) ON segments TO PUBLIC")
    printed: dict[str, list[str]] = {}
    for step in plan(collection, candidate_profile(collection, profile)):
        printed.setdefault(step.phase, []).append(step.statement)
    executed: dict[str, list[str]] = {}
    with recorded(monkeypatch) as recorder:

        def record(phase: str, run: Callable[[Collection], Any]) -> None:
            again = open_collection(collection.definition, collection.settings)
            recorder.take()
            run(again)
            executed[phase] = recorder.take()

        record("expand", lambda again: phases.expand(again, candidate_profile(again, profile)))
        record("backfill", lambda again: list(phases.backfill(again, again.ledger.batches(), "backfill")))
        record("swap", lambda again: phases.swap(again, "swap"))
        record("roll back", lambda again: phases.roll_back(again, "back"))
        record("swapped again", lambda again: phases.swap(again, "again"))
        record("contract", lambda again: phases.contract(again, now=True))
    assert list(printed) == ["expand", "backfill", "swap", "roll back", "contract"]
    for phase, statements in printed.items():
        assert_executed(executed[phase], statements)
    if destination == "adopted":
        told = "\n".join(statement for statements in executed.values() for statement in statements)
        back = f"SET (toast_tuple_target = {setting})" if setting.isdecimal() else "RESET (toast_tuple_target)"
        for said in ("CREATE INDEX CONCURRENTLY", "RENAME COLUMN", "ALTER INDEX", "DROP COLUMN", back):
            assert said in told


def test_the_plan_of_tables_of_our_own(own: Collection) -> None:
    planned = plan(own, candidate_profile(own, "wide"))
    first, second = own.fingerprint, candidate_destination(own, candidate_profile(own, "wide")).fingerprint
    assert [(step.phase, " ".join(step.statement.split()[:3])) for step in planned] == [
        ("expand", "INSERT INTO embeddings.model"),
        ("expand", "INSERT INTO embeddings.model_change"),
        ("expand", "CREATE TABLE IF"),
        ("expand", f'ALTER TABLE "embeddings"."films_vector_{second}"'),
        ("expand", "CREATE OR REPLACE"),
        ("backfill", f'COPY "embeddings"."films_vector_{second}" ("text_id",'),
        ("backfill", "DELETE FROM embeddings.quarantine"),
        ("backfill", "INSERT INTO embeddings.backfill"),
        ("swap", "CREATE INDEX CONCURRENTLY"),
        ("swap", "UPDATE embeddings.backfill SET"),
        ("swap", "UPDATE embeddings.model_change SET"),
        ("swap", f'LOCK TABLE "embeddings"."films_current_{first}"'),
        ("swap", "UPDATE embeddings.collection SET"),
        ("swap", "SELECT batch.batch FROM"),
        ("swap", "UPDATE embeddings.model_change SET"),
        ("swap", "CREATE OR REPLACE"),
        ("swap", f'ALTER TABLE "embeddings"."films_current_{first}"'),
        ("roll back", "CREATE INDEX CONCURRENTLY"),  # the current model has none yet
        ("roll back", "UPDATE embeddings.backfill SET"),
        ("roll back", f'LOCK TABLE "embeddings"."films_current_{second}"'),
        ("roll back", "UPDATE embeddings.collection SET"),
        ("roll back", "SELECT batch.batch FROM"),
        ("roll back", "UPDATE embeddings.model_change SET"),
        ("roll back", "CREATE OR REPLACE"),
        ("roll back", f'ALTER TABLE "embeddings"."films_current_{second}"'),
        ("contract", f'LOCK TABLE "embeddings"."films_vector_{first}"'),
        ("contract", "UPDATE embeddings.model_change SET"),
        ("contract", "WITH quarantined AS"),
        ("contract", "DROP VIEW IF"),
        ("contract", f'DROP TABLE "embeddings"."films_vector_{first}"'),
    ]
    assert all(step.seconds <= 0.01 for step in planned if step.lock.startswith("ACCESS EXCLUSIVE"))
    assert planned[-1].bytes < 0 < sum(step.bytes for step in planned[:-1])
    assert not any("%(" in step.statement for step in planned)


def test_the_plan_of_a_users_own_column(adopted: Collection) -> None:
    planned = plan(adopted, candidate_profile(adopted, "widest"))
    first, second = (
        adopted.fingerprint,
        candidate_destination(adopted, candidate_profile(adopted, "widest")).fingerprint,
    )
    wanted = [
        ("expand", 'LOCK TABLE "segments" IN SHARE UPDATE EXCLUSIVE MODE'),
        ("expand", "INSERT INTO embeddings.model "),
        ("expand", "INSERT INTO embeddings.model_change "),
        ("expand", 'ALTER TABLE "segments" ADD COLUMN IF NOT EXISTS "embedding_320" vector(320)'),
        ("expand", f'CREATE TABLE IF NOT EXISTS "embeddings"."segments_hash_{second}" '),
        ("expand", "DO $$ BEGIN IF NOT EXISTS (SELECT FROM pg_index "),
        ("expand", f'CREATE UNIQUE INDEX IF NOT EXISTS "segments_hash_{second}_key" '),
        ("expand", f'CREATE OR REPLACE VIEW "embeddings"."segments_vector_{second}" '),
        ("expand", f'CREATE OR REPLACE VIEW "embeddings"."segments_written_{second}" '),
        ("expand", f'CREATE OR REPLACE VIEW "embeddings"."segments_lacking_{second}" '),
        ("backfill", "UPDATE embeddings.model SET toast_tuple_target = 'default' "),
        ("backfill", 'ALTER TABLE "segments" SET (toast_tuple_target = '),
        ("backfill", "CREATE TEMPORARY TABLE backfill_vector "),
        ("backfill", 'COPY "backfill_vector" '),
        ("backfill", "CREATE TEMPORARY TABLE backfill_layer "),
        ("backfill", "CREATE INDEX ON backfill_layer "),
        ("backfill", 'LOCK TABLE "segments" IN ROW EXCLUSIVE MODE'),
        ("backfill", "WITH put AS MATERIALIZED "),
        ("backfill", "DROP TABLE IF EXISTS backfill_vector, backfill_layer"),
        ("backfill", "DELETE FROM embeddings.quarantine "),
        ("backfill", "INSERT INTO embeddings.backfill "),
        ("backfill", "UPDATE embeddings.model SET toast_tuple_target = NULL "),
        ("backfill", 'ALTER TABLE "segments" RESET (toast_tuple_target)'),
        (
            "swap",
            'CREATE INDEX CONCURRENTLY "segments_embedding_320" ON "segments" '
            'USING ivfflat ("embedding_320" vector_cosine_ops) WITH (lists=2)',
        ),
        ("swap", "UPDATE embeddings.backfill SET "),
        ("swap", "UPDATE embeddings.model_change SET gate "),
        ("swap", 'LOCK TABLE "segments" IN SHARE UPDATE EXCLUSIVE MODE'),
        ("swap", f'LOCK TABLE "embeddings"."segments_current_{first}" '),
        ("swap", "UPDATE embeddings.collection SET "),
        ("swap", "SELECT batch.batch FROM "),
        ("swap", "UPDATE embeddings.model_change SET "),
        ("swap", 'CREATE OR REPLACE VIEW "embeddings"."segments" '),
        ("swap", 'ALTER TABLE "segments" RENAME COLUMN "embedding" TO "embedding_previous"'),
        ("swap", 'ALTER TABLE "segments" RENAME COLUMN "embedding_320" TO "embedding"'),
        ("swap", 'ALTER INDEX "public"."segments_embedding" RENAME TO "segments_embedding_previous"'),
        ("swap", 'ALTER INDEX "public"."segments_embedding_320" RENAME TO "segments_embedding"'),
        ("swap", f'ALTER TABLE "embeddings"."segments_current_{first}" RENAME TO "segments_current_{second}"'),
        ("roll back", "UPDATE embeddings.backfill SET "),
        ("roll back", 'LOCK TABLE "segments" IN SHARE UPDATE EXCLUSIVE MODE'),
        ("roll back", f'LOCK TABLE "embeddings"."segments_current_{second}" '),
        ("roll back", "UPDATE embeddings.collection SET "),
        ("roll back", "SELECT batch.batch FROM "),
        ("roll back", "UPDATE embeddings.model_change SET "),
        ("roll back", 'CREATE OR REPLACE VIEW "embeddings"."segments" '),
        ("roll back", 'ALTER TABLE "segments" RENAME COLUMN "embedding" TO "embedding_320"'),
        ("roll back", 'ALTER TABLE "segments" RENAME COLUMN "embedding_previous" TO "embedding"'),
        ("roll back", 'ALTER INDEX "public"."segments_embedding" RENAME TO "segments_embedding_320"'),
        ("roll back", 'ALTER INDEX "public"."segments_embedding_previous" RENAME TO "segments_embedding"'),
        ("roll back", f'ALTER TABLE "embeddings"."segments_current_{second}" RENAME TO "segments_current_{first}"'),
        ("contract", 'LOCK TABLE "segments" IN SHARE UPDATE EXCLUSIVE MODE'),
        ("contract", "UPDATE embeddings.model_change SET "),
        ("contract", "WITH quarantined AS "),
        ("contract", f'DROP VIEW IF EXISTS "embeddings"."segments_lacking_{first}"'),
        ("contract", f'DROP VIEW IF EXISTS "embeddings"."segments_written_{first}"'),
        ("contract", f'DROP VIEW IF EXISTS "embeddings"."segments_vector_{first}"'),
        ("contract", f'DROP TABLE IF EXISTS "embeddings"."segments_hash_{first}"'),
        ("contract", 'ALTER TABLE "segments" DROP COLUMN IF EXISTS "embedding_previous"'),
    ]
    begun = [(step.phase, step.statement[: len(start)]) for step, (_, start) in zip(planned, wanted, strict=True)]
    assert begun == wanted
    assert all(step.seconds <= 0.01 for step in planned if step.lock.startswith("ACCESS EXCLUSIVE"))
    assert not any(
        "%(" in step.statement or "{" in step.statement for step in planned if "profile" not in step.statement
    )


def test_a_setting_that_wins_nothing_is_not_planned(adopted: Collection) -> None:
    planned = plan(adopted, candidate_profile(adopted, "test"))
    assert not any("toast_tuple_target" in step.statement for step in planned)


def test_a_plan_to_the_current_model_is_refused(adopted: Collection) -> None:
    with pytest.raises(ModelChangeError, match="is its current model already"):
        plan(adopted, candidate_profile(adopted, "wide"))


@pytest.mark.parametrize("method", ["hnsw", "ivfflat", None])
def test_it_says_beforehand_how_an_index_slows_the_backfill(
    table: Database, settings: Settings, method: str | None
) -> None:
    execute(table, "DROP INDEX segments_embedding")
    if method:
        execute(table, f"CREATE INDEX ON segments USING {method} (embedding vector_l2_ops)")
    collection = segments.sync(segments.definition(), settings)
    profile = resolve_profile(PROFILE, settings)
    [write] = [step for step in plan(collection, profile) if "WITH put" in step.statement]
    assert write.seconds == 25 / VECTORS_PER_SECOND[method or ""]
