"""Changing the model of a collection without a failed query: expand, backfill, swap, roll back, contract.

| phase | does |
|---|---|
| expand | makes the next model's table; from here on each landing keeps it current, where it has been filled |
| backfill | gives each batch's texts their vectors under the next model (`fill.py`); nothing is read from the source |
| swap | builds its index, checks it (`gate.py`), and then in one transaction makes it the active one |
| roll back | the same the other way: the former model has been kept current. Before a swap: drops the next model |
| contract | drops the former model, once the grace period is over |

Whatever fails or is killed, the active model serves, and the same step goes on where it was.
"""

import contextlib
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from psycopg import errors, sql
from psycopg.types.json import Jsonb

from embeddings_pipeline.config.profiles import Profile, fingerprint, resolve_profile
from embeddings_pipeline.encoders import load_encoder
from embeddings_pipeline.errors import MigrationError, ProfileError
from embeddings_pipeline.index.pgvector import MOST_DIMENSIONS, IndexReport, ensure_index, wants_index
from embeddings_pipeline.ledger.ledger import ActiveModel
from embeddings_pipeline.model_change.backfill import Filled, fill_batch, fill_batches
from embeddings_pipeline.model_change.gate import Gate, golden_queries, measure_gate
from embeddings_pipeline.pipeline.collection import OpenCollection
from embeddings_pipeline.store.database import Database, load_sql
from embeddings_pipeline.store.destination.column import LONGEST_NAME, AdoptedColumn, giving_way, model_table
from embeddings_pipeline.store.destination.table import ROW_BYTES, ModelTable

LOCK_TIMEOUT_MS = 100  # of a statement that excludes others; nobody waits longer behind it, and at first a tenth of it
OLD_MS = 40  # a transaction of that age may last: nobody queues for a lock behind it …
PATIENCE_SECONDS, OLDEST_MS = 10, 1280  # … but where there always is one, that age doubles each time
VACUUM_TIMEOUT_MS = 1200  # where the role may not set `deadlock_timeout`, an autovacuum gives way after a second
LONG_TRIES = 2  # of that length for what may be an autovacuum, or a person's VACUUM, which does not give way
DEADLOCK_TIMEOUT_MS = 50  # shorter than that, or an autovacuum would never give way
LOCK_SECONDS = 600  # tries to get such a lock for so long
SWAP_TRIES = 20  # rows that change while a swap is prepared are filled again
COUNT_BELOW = 100_000  # texts; more are not counted to see whether the disk has room
NOTE_GATE = "UPDATE embeddings.migration SET gate = %(gate)s WHERE id = %(id)s"
INDEX_FACTOR = 1.3  # an HNSW index beside the vectors it holds a copy of


@dataclass(frozen=True)
class Migration:
    """A change of the model that is under way."""

    id: int
    collection: str
    phase: str  # expanded: before the swap; swapped: until the former model is dropped
    former: ActiveModel
    next: ActiveModel
    expanded_at: datetime
    swapped_at: datetime | None
    gate: dict[str, Any] | None
    made_by_expand: bool  # the next model's table; else `profile add` keeps it


@dataclass(frozen=True)
class Progress:
    """How far a model beside the active one is filled, in batches that have landed."""

    batches: int
    filled: int

    @property
    def percent(self) -> float:
        return round(100 * self.filled / self.batches, 2) if self.batches else 100.0


@dataclass(frozen=True)
class Exclusive:
    """How a transaction that excludes others went."""

    tries: int
    locked_ms: float  # from the first statement that excludes others to the end: its own waiting, and the removal of
    # files after the locks are released, included
    transaction_ms: float  # the whole of it


@dataclass(frozen=True)
class Swapped:
    """What a swap did."""

    gate: Gate | None  # None: rolled back, where only coverage is asked for
    index: IndexReport | None
    exclusive: Exclusive
    seconds: float


def open_migration(opened: OpenCollection) -> Migration | None:
    """The change of the model that is under way, or None."""
    name = opened.collection.name
    with opened.database.connect(autocommit=True) as connection:
        row = connection.execute(load_sql("migrate/open"), {"collection": name}).fetchone()
    if row is None:
        return None
    number, phase, expanded_at, swapped_at, gate, expand_made_it, *models = row
    former, following = (
        ActiveModel(Profile(**profile), model_table(opened.collection, *table))
        for *table, profile in (models[:4], models[4:])
    )
    return Migration(number, name, phase, former, following, expanded_at, swapped_at, gate, expand_made_it)


def progress(opened: OpenCollection, model: ActiveModel) -> Progress:
    """How far a model beside the active one is filled."""
    parameters = {"collection": opened.collection.name, "fingerprint": model.table.fingerprint}
    with opened.database.connect(autocommit=True) as connection:
        row = connection.execute(load_sql("migrate/progress"), parameters).fetchone()
    return Progress(*row) if row else Progress(0, 0)


def target_table(opened: OpenCollection, profile: Profile) -> ModelTable:
    """Where this profile's vectors are, or would be."""
    storage = opened.active.table.storage
    return model_table(opened.collection, _fingerprint(opened, profile), profile.dimensions, storage)


def target_profile(opened: OpenCollection, name: str) -> Profile:
    """The profile of that name: the collection's own or a built-in one. ProfileError if there is none."""
    return resolve_profile(opened.collection.profile_named(name), opened.settings)


# --- expand ------------------------------------------------------------------------------------------------------


def expand(opened: OpenCollection, profile: Profile) -> Migration:
    """Make the next model's table. Everything that can be refused is refused before anything is touched.

    Where a migration to that very model is open, it is returned as it is. Raises MigrationError, ProfileError.
    """
    there = open_migration(opened)
    if there is not None:
        if there.phase == "expanded" and there.next.table.fingerprint == _fingerprint(opened, profile):
            return there
        if there.next.profile.name == profile.name and there.phase == "expanded":
            raise MigrationError(
                f"collection {there.collection!r}: profile {profile.name!r} is not what it was when the change to it "
                f"began ({there.next.table.fingerprint}); put it back, or end the change with "
                f"`embeddings-pipeline profile rollback` and begin anew"
            )
        raise MigrationError(
            f"collection {there.collection!r}: a change from {_named(there.former)} to {_named(there.next)} is open "
            f"({there.phase}); finish it with `embeddings-pipeline profile "
            f"{'contract' if there.phase == 'swapped' else 'switch ' + there.next.profile.name}`, or undo it with "
            f"`embeddings-pipeline profile rollback`"
        )
    table = _check_target(opened, profile)
    name = opened.collection.name

    def begin(connection: psycopg.Connection) -> None:
        made = _note_model(connection, profile, table)
        parameters = {"collection": name, "from": opened.fingerprint, "to": table.fingerprint, "made": made}
        try:
            if connection.execute(load_sql("migrate/begin"), parameters).rowcount == 0:
                raise MigrationError(f"collection {name!r}: its models have just been changed; try again")
        except errors.UniqueViolation as error:
            raise MigrationError(f"collection {name!r}: another change of the model has just been opened") from error

    _make(opened, table, begin)
    migration = open_migration(opened)
    assert migration is not None
    return migration


def add_model(opened: OpenCollection, profile: Profile) -> ActiveModel:
    """Keep a second model current beside the active one, to be searched by its name; `sync` fills it."""
    table = _check_target(opened, profile)
    _make(opened, table, partial(_note_model, profile=profile, table=table))
    return ActiveModel(profile, table)


def remove_model(opened: OpenCollection, name: str) -> ActiveModel:
    """Drop a model that `add_model` keeps beside the active one."""
    migration = open_migration(opened)
    open_ones = [migration.former, migration.next] if migration else []
    for model in opened.ledger.beside():
        free = model.table not in [one.table for one in open_ones]
        if free and name in (model.profile.name, model.table.fingerprint):
            _drop_model(opened, model.table, partial(_not_in_a_migration, table=model.table))
            return model
    if any(name in (one.profile.name, one.table.fingerprint) for one in open_ones):
        raise MigrationError(
            f"collection {opened.collection.name!r}: {name!r} is part of a change that is under way; end that with "
            f"`embeddings-pipeline profile contract` or `profile rollback`"
        )
    raise MigrationError(
        f"collection {opened.collection.name!r}: no profile {name!r} is kept beside the active one; see "
        f"`embeddings-pipeline profile status`"
    )


def _not_in_a_migration(connection: psycopg.Connection, table: ModelTable) -> None:
    parameters = {"collection": table.collection, "fingerprint": table.fingerprint}
    if connection.execute(load_sql("migrate/holds"), parameters).fetchone() is not None:
        raise MigrationError(
            f"collection {table.collection!r}: a change of its model has just been opened with this one; see "
            f"`embeddings-pipeline profile status`"
        )


def _fingerprint(opened: OpenCollection, profile: Profile) -> str:
    return fingerprint(profile, opened.settings.state_dir)


def _check_target(opened: OpenCollection, profile: Profile) -> ModelTable:
    """The table of a model that may be made; nothing is touched. MigrationError or ProfileError says why not."""
    name = opened.collection.name
    table = target_table(opened, profile)
    if table.fingerprint == opened.fingerprint:
        raise MigrationError(f"collection {name!r}: profile {profile.name!r} is its active model already")
    there = table.fingerprint in {model.table.fingerprint for model in opened.ledger.beside()}
    method = opened.collection.config.index.method
    with opened.database.connect(autocommit=True) as connection:
        landed = "SELECT version > 0 FROM embeddings.collection WHERE name = %s"
        if connection.execute(landed, [name]).fetchone() != (True,):
            raise MigrationError(
                f"collection {name!r} has no vectors yet, so there is nothing to migrate: declare the profile "
                f"(`profile: {profile.name}` in its defs.yaml) and sync"
            )
        _check_dimensions(connection, opened, table, profile)
        if isinstance(table, AdoptedColumn) and isinstance(opened.active.table, AdoptedColumn):
            _check_column(connection, opened.active.table, table, there=there)
        if not there:
            [(stranger,)] = connection.execute("SELECT to_regclass(%s)", [table.identifier.as_string(connection)])
            if stranger is not None:
                raise MigrationError(
                    f"there is a table {stranger} that the pipeline has not made: rename or drop it, then try again"
                )
            texts = _count_texts(opened, connection)
            _check_disk(connection, needed_bytes(texts, table, method), table)
    golden_queries(opened)  # what is wrong with them is said now, not after the backfill
    _check_encoder(profile)
    return table


def _check_dimensions(
    connection: psycopg.Connection, opened: OpenCollection, table: ModelTable, profile: Profile
) -> None:
    """MigrationError where the index that a swap builds cannot hold so many dimensions."""
    index, most, active = opened.collection.config.index, MOST_DIMENSIONS[table.storage], opened.active.table
    if table.dimension <= most:
        return
    remedy = "set `index: {method: none}` in its defs.yaml first"
    methods: list[str] = [index.method] if wants_index(table, index) else []
    if isinstance(active, AdoptedColumn) and not index.model_fields_set:  # the new column gets what the old one has
        methods = [one.method for one in active.indexes(connection, active.column(connection))]
    if methods:
        raise MigrationError(
            f"collection {table.collection!r}: pgvector's {methods[0]} takes up to {most} dimensions of a "
            f"{table.storage}, and profile {profile.name!r} has {table.dimension}; {remedy}"
        )


def _check_encoder(profile: Profile) -> None:
    """ProfileError where the model cannot be loaded, or does not give the vectors that its profile says."""
    vectors = load_encoder(profile).encode_documents(["a plain sentence"])
    if vectors.shape != (1, profile.dimensions):
        raise ProfileError(f"Profile {profile.name}: it gives vectors of shape {vectors.shape}")
    if not np.isfinite(vectors).all() or not vectors.any():
        raise ProfileError(f"Profile {profile.name}: its vector of a plain sentence is not finite, or zero")


def needed_bytes(texts: int, table: ModelTable, method: str) -> int:
    """What that many vectors take on disk, with their index, in bytes."""
    rows = texts * (table.bytes_per_vector + ROW_BYTES)
    return round(rows + (INDEX_FACTOR * texts * table.bytes_per_vector if method != "none" else 0))


def _check_disk(connection: psycopg.Connection, needed: int, table: ModelTable) -> None:
    """MigrationError where the server's disk can be seen from here and has not the room."""
    with contextlib.suppress(errors.InsufficientPrivilege, OSError):
        row = connection.execute("SELECT current_setting('data_directory', true)").fetchone()
        if row and row[0] and Path(row[0]).is_dir():
            free = shutil.disk_usage(row[0]).free
            if free < needed:
                raise MigrationError(
                    f"collection {table.collection!r}: the vectors of the next model and their index need about "
                    f"{needed / 1e9:.1f} GB beside the present ones, and the database's disk has {free / 1e9:.1f} GB "
                    f"free; make room first"
                )


def _count_texts(opened: OpenCollection, connection: psycopg.Connection) -> int:
    """How many texts are to have a vector; the planner's estimate where they are many."""
    table = opened.active.table.tables.text
    estimate = "SELECT reltuples::bigint FROM pg_class WHERE oid = to_regclass(%s)"
    row = connection.execute(estimate, [table.as_string(connection)]).fetchone()
    if row is None or row[0] < COUNT_BELOW:
        row = connection.execute(sql.SQL("SELECT count(*) FROM {} WHERE NOT blank").format(table)).fetchone()
    return row[0] if row else 0


def _make(opened: OpenCollection, table: ModelTable, note: Callable[[psycopg.Connection], Any]) -> None:
    """Make what holds a model's vectors, in the transaction in which it is noted."""
    if isinstance(table, AdoptedColumn):
        exclusively(opened.database, [table.relation], note, table.add_statements())
        return
    with opened.database.connect() as connection:
        table.create(connection)
        note(connection)


def _note_model(connection: psycopg.Connection, profile: Profile, table: ModelTable) -> bool:
    """Whether it was not there yet."""
    parameters = {
        "collection": table.collection,
        "fingerprint": table.fingerprint,
        "profile": Jsonb(asdict(profile)),
        "dimension": table.dimension,
        "storage": table.storage,
    }
    return connection.execute(load_sql("migrate/model"), parameters).rowcount == 1


def _check_column(connection: psycopg.Connection, of: AdoptedColumn, to: AdoptedColumn, *, there: bool) -> None:
    """MigrationError where the next model's column cannot stand beside the active one's. there: it does already."""
    where = f"collection {to.collection!r}: "
    column = of.column(connection)
    found = of.look(connection, column)
    if not found["is_owner"]:
        raise MigrationError(
            f"{where}only the owner of {to.target.table} can add and rename its columns, and the pipeline's role is "
            f"not: ALTER TABLE … OWNER TO it, or GRANT it the owner's role"
        )
    check_follows(connection, of, column, [of, to] if there else [of])
    names = [index.name for index in of.indexes(connection, column)]
    for name in (column, *names):
        if max(len(named.encode()) for named in (name + to.suffix(to.next_column), name + "_previous")) > LONGEST_NAME:
            raise MigrationError(f"{where}the name {name!r} is too long to be told apart from the next one: shorten it")
        if name in names and (taken := [one for one in (name + "_previous",) if of.is_relation(connection, one)]):
            raise MigrationError(f"{where}there is a relation {taken[0]!r} already, and {name!r} is to be called so")
    for name in (to.previous_column,) if there else (to.next_column, to.previous_column):
        taken_by = to.look(connection, name)
        if taken_by["type"] is None:
            continue
        if name == to.next_column and (taken_by["type"], taken_by["dimension"]) == (to.storage, to.dimension):
            empty = sql.SQL("SELECT FROM {} WHERE {} IS NOT NULL LIMIT 1").format(to.relation, sql.Identifier(name))
            if not to.dependants(connection, name, []) and connection.execute(empty).fetchone() is None:
                continue  # of a try by hand, perhaps; it is what we need
        raise MigrationError(
            f"{where}{to.target.table} has a column {name!r} already: where another model has it, end that first "
            f"(`embeddings-pipeline profile status`); else rename it, or drop it"
        )


def check_follows(
    connection: psycopg.Connection, table: AdoptedColumn, column: str, ours: Sequence[AdoptedColumn]
) -> None:
    """MigrationError where something of the active model's column would not come to the next one's with its name."""
    if table.look(connection, column)["has_grants"]:
        raise MigrationError(
            f"collection {table.collection!r}: roles have rights on the column {column!r} by itself, which would not "
            f"come to the new one: GRANT them on {table.target.table}, and REVOKE them on the column"
        )
    check_dependants(connection, table, column, ours)


def check_dependants(
    connection: psycopg.Connection, table: AdoptedColumn, column: str, ours: Sequence[AdoptedColumn]
) -> None:
    """MigrationError where something would go on following a column that is renamed or dropped."""
    if others := table.dependants(connection, column, ours):
        raise MigrationError(
            f"collection {table.collection!r}: {'; '.join(others)}: would go on following {column!r} when it is "
            f"renamed; drop that first, and make it again afterwards"
        )


def _check_both(opened: OpenCollection, of: ModelTable, to: ModelTable) -> None:
    """The same for the two columns of a swap, either way."""
    if isinstance(of, AdoptedColumn) and isinstance(to, AdoptedColumn):
        with opened.database.connect(autocommit=True) as connection:
            check_follows(connection, of, of.column(connection), [of, to])
            check_dependants(connection, to, to.column(connection), [of, to])


# --- backfill ----------------------------------------------------------------------------------------------------


def backfill(opened: OpenCollection, batches: Iterable[int], run: str) -> Iterator[tuple[int, Filled]]:
    """Fill batches of the next model; yields each when it is done. MigrationError unless a migration is expanded and
    not yet swapped, StaleRunError where it was given up meanwhile.
    """
    model = opened.with_model(_expanded(opened, "backfill").next)
    yield from fill_batches(model, batches, run)


def unfilled_batches(opened: OpenCollection, model: ActiveModel) -> list[int]:
    """The batches in which a model beside the active one lacks vectors, in order."""
    with opened.database.connect(autocommit=True) as connection:
        return _unfilled(connection, opened.collection.name, model.table.fingerprint)


def _unfilled(connection: psycopg.Connection, collection: str, to: str) -> list[int]:
    parameters = {"collection": collection, "to": to}
    return [row[0] for row in connection.execute(load_sql("migrate/unfilled"), parameters)]


def _expanded(opened: OpenCollection, step: str) -> Migration:
    migration = open_migration(opened)
    if migration is None:
        raise MigrationError(
            f"collection {opened.collection.name!r}: no change of its model is open, so there is nothing to {step}; "
            f"begin with `embeddings-pipeline profile switch NAME`, or materialize migration/expand"
        )
    if migration.phase != "expanded":
        raise MigrationError(
            f"collection {opened.collection.name!r}: {_named(migration.next)} is the active model already; go on with "
            f"`embeddings-pipeline profile contract`, or back with `embeddings-pipeline profile rollback`"
        )
    return migration


# --- swap and roll back ------------------------------------------------------------------------------------------


def swap(opened: OpenCollection, run: str) -> Swapped:
    """Make the next model the active one, if it passes the gate. MigrationError, with the figures, if it does not."""
    started = time.perf_counter()
    migration = _expanded(opened, "swap")
    following = opened.with_model(migration.next)
    done = progress(opened, migration.next)
    never = _never_filled(opened, migration)
    if never:
        raise MigrationError(
            f"collection {migration.collection!r}: {never:,} of {done.batches:,} batches are not backfilled; "
            f"materialize migration/backfill first, or run `embeddings-pipeline profile switch "
            f"{migration.next.profile.name}`"
        )
    config = opened.collection.config
    _check_both(opened, migration.former.table, migration.next.table)
    _check_encoder(migration.next.profile)  # searches are going to need it
    if isinstance(following.active.table, AdoptedColumn):
        with opened.database.connect(autocommit=True) as connection:
            following.active.table.restore(connection)
    index = ensure_index(opened.database, migration.next.table, config.index, list(config.vectors))
    _mark_lacking(following)
    _fill_marked(following, run)
    gate = measure_gate(opened, following)
    with opened.database.connect() as connection:
        connection.execute(NOTE_GATE, {"gate": Jsonb(asdict(gate)), "id": migration.id})
    if gate.refused:
        raise MigrationError(
            f"collection {migration.collection!r}: {_named(migration.next)} does not take over: "
            f"{'; '.join(gate.refused)}. {_named(migration.former)} goes on serving"
        )
    exclusive = _exchange(opened, migration, migration.former.table, migration.next.table, "swapped", following, run)
    return Swapped(gate, index, exclusive, round(time.perf_counter() - started, 3))


def roll_back(opened: OpenCollection, run: str, *, drop_next: bool = True) -> Swapped | None:
    """Make the former model the active one again; before a swap, drop the next model instead, and return None.

    Without `drop_next` that is refused, since a roll back done twice would come to it.
    """
    started = time.perf_counter()
    migration = open_migration(opened)
    if migration is None:
        raise MigrationError(
            f"collection {opened.collection.name!r}: no change of its model is open, so there is nothing to roll back"
        )
    if migration.phase == "expanded":
        if not drop_next:
            raise MigrationError(
                f"collection {migration.collection!r}: {_named(migration.former)} is the active model, and nothing has "
                f"been swapped; to drop what was embedded for {_named(migration.next)}, say `drop_next: true` in the "
                f"launchpad, or `embeddings-pipeline profile rollback`"
            )
        if migration.made_by_expand:
            _drop_model(opened, migration.next.table, lambda connection: _enter(connection, migration, "abandoned"))
        else:  # `profile add` keeps it, before and after
            with opened.database.connect() as connection:
                _enter(connection, migration, "abandoned")
        return None
    former = opened.with_model(migration.former)
    _check_both(opened, migration.next.table, migration.former.table)
    _mark_lacking(former)
    _fill_marked(former, run)
    config = opened.collection.config
    ensure_index(opened.database, migration.former.table, config.index, list(config.vectors))
    exclusive = _exchange(opened, migration, migration.next.table, migration.former.table, "expanded", former, run)
    return Swapped(None, None, exclusive, round(time.perf_counter() - started, 3))


def _enter(connection: psycopg.Connection, migration: Migration, phase: str) -> None:
    """The migration's next phase. MigrationError where somebody else has changed it meanwhile."""
    parameters = {"id": migration.id, "from_phase": migration.phase, "phase": phase}
    if connection.execute(load_sql("migrate/swapped"), parameters).rowcount == 0:
        raise MigrationError(
            f"collection {migration.collection!r}: somebody else has gone on with the change of its model meanwhile; "
            f"see `embeddings-pipeline profile status`"
        )


def _mark_lacking(model: OpenCollection) -> None:
    """Mark the batches in which a text lacks its vector, as the data itself says, whatever was noted of them."""
    parameters = {"collection": model.collection.name, "fingerprint": model.fingerprint}
    with model.database.connect(autocommit=True) as connection:
        giving_way(lambda: connection.execute(model.active.table.statement("fill/mark_lacking"), parameters))


def _never_filled(opened: OpenCollection, migration: Migration) -> int:
    """Batches that the backfill has not come to."""
    query = "SELECT count(*) FROM embeddings.fill WHERE collection = %s AND fingerprint = %s"
    with opened.database.connect(autocommit=True) as connection:
        row = connection.execute(query, [migration.collection, migration.next.table.fingerprint]).fetchone()
    done = progress(opened, migration.next)
    return max(0, done.batches - (row[0] if row else 0))


def _fill_marked(model: OpenCollection, run: str) -> None:
    """Fill what landings have marked since the model was last whole."""
    for batch in unfilled_batches(model, model.active):
        fill_batch(model, batch, run)


def _exchange(
    opened: OpenCollection,
    migration: Migration,
    of: ModelTable,
    to: ModelTable,
    phase: str,
    following: OpenCollection,
    run: str,
) -> Exclusive:
    """One transaction: the active model, its marker and the view. Where a text lacks its vector: fill, and again."""
    pair = {"collection": migration.collection, "from": of.fingerprint, "to": to.fingerprint}

    def flip(connection: psycopg.Connection) -> None:
        if connection.execute(load_sql("migrate/flip"), pair).fetchone() is None:
            raise MigrationError(f"collection {migration.collection!r}: somebody else has changed its model meanwhile")
        if unfilled := _unfilled(connection, migration.collection, to.fingerprint):
            raise _UnfilledError(unfilled)
        _enter(connection, migration, phase)

    for _ in range(SWAP_TRIES):
        try:
            with opened.database.connect(autocommit=True) as connection:
                statements = swap_statements(connection, of, to)
            return exclusively(opened.database, _swapped(of), flip, statements)
        except _UnfilledError as error:
            for batch in error.batches:
                fill_batch(following, batch, run)
    raise MigrationError(
        f"collection {migration.collection!r}: rows change faster than {_named(following.active)} can be filled; "
        f"nothing was swapped, try again when fewer change"
    )


class _UnfilledError(Exception):
    """Batches that a landing has marked since the last look."""

    def __init__(self, batches: list[int]) -> None:
        self.batches = batches


def _swapped(of: ModelTable) -> list[sql.Identifier]:
    """What the swap excludes others from."""
    users = [of.relation] if isinstance(of, AdoptedColumn) else []
    return [*users, of.tables.view, of.marker]


def swap_statements(connection: psycopg.Connection, of: ModelTable, to: ModelTable) -> list[sql.Composed]:
    """The statements of the swap that exclude others: the view, the columns of an adopted table with their indexes, and
    the marker of the active model. The view first, as those who read it lock it before the table.
    """
    view, marker = show_statements(of, to)
    renames = []
    if isinstance(of, AdoptedColumn) and isinstance(to, AdoptedColumn):
        renames = of.exchange_statements(connection, to)
    return [view, *renames, marker]


def show_statements(of: ModelTable, to: ModelTable) -> list[sql.Composed]:
    """The view, and the marker of the active model, from one model to the other."""
    marker = sql.Identifier(f"{to.collection}_active_{to.fingerprint}")
    return [
        to.statement("view", bare_type=sql.SQL(to.storage)),
        sql.SQL(load_sql("migrate/marker")).format(marker=of.marker, next_marker=marker),
    ]


# --- contract ----------------------------------------------------------------------------------------------------


def contract(opened: OpenCollection, *, now: bool = False) -> Exclusive:
    """Drop the former model, after which there is no way back. `now`: also within the grace period."""
    migration = open_migration(opened)
    name = opened.collection.name
    if migration is None or migration.swapped_at is None or migration.phase != "swapped":
        raise MigrationError(
            f"collection {name!r}: nothing has been swapped, so there is no former model to drop; "
            f"{'swap first' if migration else 'see `embeddings-pipeline profile status`'}"
        )
    grace = timedelta(hours=opened.collection.config.migration.grace_hours)
    ends = migration.swapped_at + grace
    if not now and datetime.now(UTC) < ends:
        raise MigrationError(
            f"collection {name!r}: the grace period runs until {ends:%Y-%m-%d %H:%M %Z}; until then "
            f"`embeddings-pipeline profile rollback` brings {_named(migration.former)} back at once. `--now` (in the "
            f"launchpad `now: true`) drops it all the same"
        )
    if isinstance(migration.former.table, AdoptedColumn) and not now:
        _check_left(opened, migration.former.table)
    return _drop_model(opened, migration.former.table, lambda connection: _enter(connection, migration, "contracted"))


def _check_left(opened: OpenCollection, former: AdoptedColumn) -> None:
    """MigrationError where rows have a vector in the former column alone, which would be lost with it."""
    with opened.database.connect(autocommit=True) as connection:
        names = {"former": former.column(connection), "column": former.target.column}
        query = "SELECT count(*) FROM {table} WHERE {former} IS NOT NULL AND {column} IS NULL"
        parts = {name: sql.Identifier(value) for name, value in names.items()}
        row = connection.execute(sql.SQL(query).format(table=former.relation, **parts)).fetchone()
    if row and row[0]:
        raise MigrationError(
            f"collection {former.collection!r}: {row[0]:,} rows of {former.target.table} have a vector in "
            f"{names['former']!r} and none in {names['column']!r}: they are outside the collection (`where:`), or in "
            f"quarantine. `--now` (in the launchpad `now: true`) drops those vectors all the same"
        )


def _drop_model(opened: OpenCollection, table: ModelTable, also: Callable[[psycopg.Connection], Any]) -> Exclusive:
    def forget(connection: psycopg.Connection) -> None:
        # Its row first: landings that hold it are waited for here, and those to come pass the table by.
        also(connection)
        parameters = {"collection": table.collection, "fingerprint": table.fingerprint}
        connection.execute(load_sql("migrate/forget"), parameters)

    with opened.database.connect(autocommit=True) as connection:
        if isinstance(table, AdoptedColumn):
            table.restore(connection)
            if (column := table.column_or_none(connection)) is not None:
                check_dependants(connection, table, column, [table])
        statements = table.drop_statements(connection)
    return exclusively(opened.database, table.exclusive(), forget, statements)


# --- locks -------------------------------------------------------------------------------------------------------


def exclusively(
    database: Database,
    relations: Sequence[sql.Identifier],
    prepare: Callable[[psycopg.Connection], Any],
    statements: Sequence[sql.Composed],
    *,
    seconds: float | None = None,
) -> Exclusive:
    """One transaction: what `prepare` does, and then statements that exclude others from `relations`.

    Waits first until no longer transaction holds a lock there, since whoever came after would wait behind us; then
    tries, with a short `lock_timeout`, again and again. Where slow queries follow one another without end, it tries
    among them after a while, more rarely and with a longer one. VACUUM is kept out beforehand, by a lock that neither
    readers nor writers wait for. MigrationError after `seconds` (LOCK_SECONDS).
    """
    seconds = LOCK_SECONDS if seconds is None else seconds
    started = time.monotonic()
    tries = long_tries = 0
    with database.connect(autocommit=True) as connection:
        names = [relation.as_string(connection) for relation in relations]
        is_table = "SELECT FROM pg_class WHERE oid = to_regclass(%s) AND relkind = 'r'"
        tables = [
            one for one, name in zip(relations, names, strict=True) if connection.execute(is_table, [name]).rowcount
        ]
        while True:
            waited = time.monotonic() - started
            old = min(OLDEST_MS, OLD_MS * 2 ** int(waited / PATIENCE_SECONDS))
            parameters = {"relations": names, "milliseconds": old, "young_unseen": old > OLD_MS}
            [held] = connection.execute(load_sql("migrate/held"), parameters).fetchall()
            older, vacuums, unseen, perhaps_vacuums = held
            if not older:
                tries += 1
                long_tries += perhaps_vacuums > 0
                long = vacuums > 0 or 0 < long_tries <= LONG_TRIES
                with contextlib.suppress(errors.LockNotAvailable, errors.DeadlockDetected):
                    entered = time.perf_counter()
                    with connection.transaction():
                        _short_waits(connection, long)
                        for table in tables:
                            connection.execute(vacuum_lock(table))
                        prepare(connection)
                        connection.execute(f"SET LOCAL lock_timeout = {min(LOCK_TIMEOUT_MS, old // 4)}")
                        began = time.perf_counter()
                        for statement in statements:
                            connection.execute(statement)
                    locked, whole = (1000 * (time.perf_counter() - since) for since in (began, entered))
                    return Exclusive(tries, round(locked, 2), round(whole, 2))
            if waited > seconds:
                whose = "; GRANT pg_read_all_stats TO the pipeline's role lets it see whose" if unseen else ""
                raise MigrationError(
                    f"{', '.join(names)} could not be locked within {seconds:.0f} s: long transactions hold it (see "
                    f"pg_stat_activity{whose}); nothing was changed, try again"
                )
            failed_among_others = not older and old > OLD_MS
            time.sleep(random.uniform(0.5, 1) if failed_among_others else random.uniform(0.01, 0.05))


def vacuum_lock(table: sql.Identifier) -> sql.Composed:
    """Keeps VACUUM and the like out until the transaction ends; an autovacuum gives way to it."""
    return sql.SQL("LOCK TABLE {} IN SHARE UPDATE EXCLUSIVE MODE").format(table)


def _short_waits(connection: psycopg.Connection, long: bool) -> None:
    connection.execute(f"SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}")
    try:
        with connection.transaction():
            connection.execute(f"SET LOCAL deadlock_timeout = {DEADLOCK_TIMEOUT_MS}")
    except errors.InsufficientPrivilege:
        if long:
            connection.execute(f"SET LOCAL lock_timeout = {VACUUM_TIMEOUT_MS}")


def _named(model: ActiveModel) -> str:
    return f"{model.profile.name} ({model.table.fingerprint})"
