"""Changing the model of a collection without a failed query: expand, backfill, swap, roll back, contract.

| phase | does |
|---|---|
| expand | makes the next model's table; from here on each commit keeps it current, where it has been backfilled |
| backfill | gives each batch's texts their vectors under the next model (`backfill.py`); the source is not read |
| swap | builds its index, checks it (`gate.py`), and then in one transaction makes it the current one |
| roll back | the same the other way: the former model has been kept current. Before a swap: drops the next model |
| contract | drops the former model, once the grace period is over |

Whatever fails or is killed, the current model serves, and the same step goes on where it was.
"""

import contextlib
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
from embeddings_pipeline.errors import ModelChangeError, ProfileError
from embeddings_pipeline.index.pgvector import MOST_DIMENSIONS, IndexReport, ensure_index, wants_index
from embeddings_pipeline.model_change.backfill import backfill_batches
from embeddings_pipeline.model_change.gate import Gate, golden_queries, measure_gate
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.pipeline.shadow import Backfilled, backfill_batch
from embeddings_pipeline.store.destination.column import LONGEST_NAME, ColumnDestination, model_table
from embeddings_pipeline.store.destination.table import ROW_BYTES, TableDestination
from embeddings_pipeline.store.locks import Exclusive, exclusively, giving_way
from embeddings_pipeline.store.models import Model
from embeddings_pipeline.store.sql import load_sql

SWAP_TRIES = 20  # rows that change while a swap is prepared are backfilled again
COUNT_BELOW = 100_000  # texts; more are not counted to see whether the disk has room
NOTE_GATE = "UPDATE embeddings.model_change SET gate = %(gate)s WHERE id = %(id)s"
INDEX_FACTOR = 1.3  # an HNSW index beside the vectors it holds a copy of


@dataclass(frozen=True)
class ModelChange:
    """A change of the model that is under way."""

    id: int
    collection: str
    phase: str  # expanded: before the swap; swapped: until the former model is dropped
    former: Model
    next: Model
    expanded_at: datetime
    swapped_at: datetime | None
    gate: dict[str, Any] | None
    made_by_expand: bool  # the next model's table; else `profile add` keeps it


@dataclass(frozen=True)
class Progress:
    """How far a shadow model is backfilled, in batches that are committed."""

    batches: int
    backfilled: int

    @property
    def percent(self) -> float:
        return round(100 * self.backfilled / self.batches, 2) if self.batches else 100.0


@dataclass(frozen=True)
class Swapped:
    """What a swap did."""

    gate: Gate | None  # None: rolled back, where only coverage is asked for
    index: IndexReport | None
    exclusive: Exclusive
    seconds: float


def open_change(collection: Collection) -> ModelChange | None:
    """The change of the model that is under way, or None."""
    name = collection.definition.name
    with collection.database.connect(autocommit=True) as connection:
        row = connection.execute(load_sql("model_change/open"), {"collection": name}).fetchone()
    if row is None:
        return None
    number, phase, expanded_at, swapped_at, gate, expand_made_it, *models = row
    former, following = (
        Model(Profile(**profile), model_table(collection.definition, *table))
        for *table, profile in (models[:4], models[4:])
    )
    return ModelChange(number, name, phase, former, following, expanded_at, swapped_at, gate, expand_made_it)


def progress(collection: Collection, model: Model) -> Progress:
    """How far a shadow model is backfilled."""
    parameters = {"collection": collection.definition.name, "fingerprint": model.table.fingerprint}
    with collection.database.connect(autocommit=True) as connection:
        row = connection.execute(load_sql("model_change/progress"), parameters).fetchone()
    return Progress(*row) if row else Progress(0, 0)


def candidate_destination(collection: Collection, profile: Profile) -> TableDestination:
    """Where this profile's vectors are, or would be."""
    storage = collection.current.table.storage
    return model_table(collection.definition, _fingerprint(collection, profile), profile.dimensions, storage)


def candidate_profile(collection: Collection, name: str) -> Profile:
    """The profile of that name: the collection's own or a built-in one. ProfileError if there is none."""
    return resolve_profile(collection.definition.profile_named(name), collection.settings)


# --- expand ------------------------------------------------------------------------------------------------------


def expand(collection: Collection, profile: Profile) -> ModelChange:
    """Make the next model's table. Everything that can be refused is refused before anything is touched.

    Where a migration to that very model is open, it is returned as it is. Raises ModelChangeError, ProfileError.
    """
    there = open_change(collection)
    if there is not None:
        if there.phase == "expanded" and there.next.table.fingerprint == _fingerprint(collection, profile):
            return there
        if there.next.profile.name == profile.name and there.phase == "expanded":
            raise ModelChangeError(
                f"collection {there.collection!r}: profile {profile.name!r} is not what it was when the change to it "
                f"began ({there.next.table.fingerprint}); put it back, or end the change with "
                f"`embeddings-pipeline profile rollback` and begin anew"
            )
        raise ModelChangeError(
            f"collection {there.collection!r}: a change from {_named(there.former)} to {_named(there.next)} is open "
            f"({there.phase}); finish it with `embeddings-pipeline profile "
            f"{'contract' if there.phase == 'swapped' else 'switch ' + there.next.profile.name}`, or undo it with "
            f"`embeddings-pipeline profile rollback`"
        )
    table = _check_candidate(collection, profile)
    name = collection.definition.name

    def begin(connection: psycopg.Connection) -> None:
        made = _note_model(connection, profile, table)
        parameters = {"collection": name, "from": collection.fingerprint, "to": table.fingerprint, "made": made}
        try:
            if connection.execute(load_sql("model_change/begin"), parameters).rowcount == 0:
                raise ModelChangeError(f"collection {name!r}: its models have just been changed; try again")
        except errors.UniqueViolation as error:
            raise ModelChangeError(f"collection {name!r}: another change of the model has just been opened") from error

    _make(collection, table, begin)
    change = open_change(collection)
    assert change is not None
    return change


def add_model(collection: Collection, profile: Profile) -> Model:
    """Keep a second model current beside the current one, to be searched by its name; `sync` backfills it."""
    table = _check_candidate(collection, profile)
    _make(collection, table, partial(_note_model, profile=profile, table=table))
    return Model(profile, table)


def remove_model(collection: Collection, name: str) -> Model:
    """Drop a model that `add_model` keeps beside the current one."""
    change = open_change(collection)
    open_ones = [change.former, change.next] if change else []
    for model in collection.ledger.shadow_models():
        free = model.table not in [one.table for one in open_ones]
        if free and name in (model.profile.name, model.table.fingerprint):
            _drop_model(collection, model.table, partial(_not_in_a_change, table=model.table))
            return model
    if any(name in (one.profile.name, one.table.fingerprint) for one in open_ones):
        raise ModelChangeError(
            f"collection {collection.definition.name!r}: {name!r} is part of a change that is under way; end that with "
            f"`embeddings-pipeline profile contract` or `profile rollback`"
        )
    raise ModelChangeError(
        f"collection {collection.definition.name!r}: no profile {name!r} is kept beside the current one; see "
        f"`embeddings-pipeline profile status`"
    )


def _not_in_a_change(connection: psycopg.Connection, table: TableDestination) -> None:
    parameters = {"collection": table.collection, "fingerprint": table.fingerprint}
    if connection.execute(load_sql("model_change/holds"), parameters).fetchone() is not None:
        raise ModelChangeError(
            f"collection {table.collection!r}: a change of its model has just been opened with this one; see "
            f"`embeddings-pipeline profile status`"
        )


def _fingerprint(collection: Collection, profile: Profile) -> str:
    return fingerprint(profile, collection.settings.state_dir)


def _check_candidate(collection: Collection, profile: Profile) -> TableDestination:
    """The table of a model that may be made; nothing is touched. ModelChangeError or ProfileError says why not."""
    name = collection.definition.name
    table = candidate_destination(collection, profile)
    if table.fingerprint == collection.fingerprint:
        raise ModelChangeError(f"collection {name!r}: profile {profile.name!r} is its current model already")
    there = table.fingerprint in {model.table.fingerprint for model in collection.ledger.shadow_models()}
    method = collection.definition.attributes.index.method
    with collection.database.connect(autocommit=True) as connection:
        committed = "SELECT version > 0 FROM embeddings.collection WHERE name = %s"
        if connection.execute(committed, [name]).fetchone() != (True,):
            raise ModelChangeError(
                f"collection {name!r} has no vectors yet, so there is nothing to migrate: declare the profile "
                f"(`profile: {profile.name}` in its defs.yaml) and sync"
            )
        _check_dimensions(connection, collection, table, profile)
        if isinstance(table, ColumnDestination) and isinstance(collection.current.table, ColumnDestination):
            _check_column(connection, collection.current.table, table, there=there)
        if not there:
            [(stranger,)] = connection.execute("SELECT to_regclass(%s)", [table.identifier.as_string(connection)])
            if stranger is not None:
                raise ModelChangeError(
                    f"there is a table {stranger} that the pipeline has not made: rename or drop it, then try again"
                )
            texts = _count_texts(collection, connection)
            _check_disk(connection, needed_bytes(texts, table, method), table)
    golden_queries(collection)  # what is wrong with them is said now, not after the backfill
    _check_encoder(profile)
    return table


def _check_dimensions(
    connection: psycopg.Connection, collection: Collection, table: TableDestination, profile: Profile
) -> None:
    """ModelChangeError where the index that a swap builds cannot hold so many dimensions."""
    index, most, current = (
        collection.definition.attributes.index,
        MOST_DIMENSIONS[table.storage],
        collection.current.table,
    )
    if table.dimension <= most:
        return
    remedy = "set `index: {method: none}` in its defs.yaml first"
    methods: list[str] = [index.method] if wants_index(table, index) else []
    if (
        isinstance(current, ColumnDestination) and not index.model_fields_set
    ):  # the new column gets what the old one has
        methods = [one.method for one in current.indexes(connection, current.column(connection))]
    if methods:
        raise ModelChangeError(
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


def needed_bytes(texts: int, table: TableDestination, method: str) -> int:
    """What that many vectors take on disk, with their index, in bytes."""
    rows = texts * (table.bytes_per_vector + ROW_BYTES)
    return round(rows + (INDEX_FACTOR * texts * table.bytes_per_vector if method != "none" else 0))


def _check_disk(connection: psycopg.Connection, needed: int, table: TableDestination) -> None:
    """ModelChangeError where the server's disk can be seen from here and has not the room."""
    with contextlib.suppress(errors.InsufficientPrivilege, OSError):
        row = connection.execute("SELECT current_setting('data_directory', true)").fetchone()
        if row and row[0] and Path(row[0]).is_dir():
            free = shutil.disk_usage(row[0]).free
            if free < needed:
                raise ModelChangeError(
                    f"collection {table.collection!r}: the vectors of the next model and their index need about "
                    f"{needed / 1e9:.1f} GB beside the present ones, and the database's disk has {free / 1e9:.1f} GB "
                    f"free; make room first"
                )


def _count_texts(collection: Collection, connection: psycopg.Connection) -> int:
    """How many texts are to have a vector; the planner's estimate where they are many."""
    table = collection.current.table.tables.text
    estimate = "SELECT reltuples::bigint FROM pg_class WHERE oid = to_regclass(%s)"
    row = connection.execute(estimate, [table.as_string(connection)]).fetchone()
    if row is None or row[0] < COUNT_BELOW:
        row = connection.execute(sql.SQL("SELECT count(*) FROM {} WHERE NOT blank").format(table)).fetchone()
    return row[0] if row else 0


def _make(collection: Collection, table: TableDestination, note: Callable[[psycopg.Connection], Any]) -> None:
    """Make what holds a model's vectors, in the transaction in which it is noted."""
    if isinstance(table, ColumnDestination):
        exclusively(collection.database, [table.relation], note, table.add_statements())
        return
    with collection.database.connect() as connection:
        table.create(connection)
        note(connection)


def _note_model(connection: psycopg.Connection, profile: Profile, table: TableDestination) -> bool:
    """Whether it was not there yet."""
    parameters = {
        "collection": table.collection,
        "fingerprint": table.fingerprint,
        "profile": Jsonb(asdict(profile)),
        "dimension": table.dimension,
        "storage": table.storage,
    }
    return connection.execute(load_sql("model_change/model"), parameters).rowcount == 1


def _check_column(connection: psycopg.Connection, of: ColumnDestination, to: ColumnDestination, *, there: bool) -> None:
    """ModelChangeError where the next model's column cannot stand beside the current one's. there: it does already."""
    where = f"collection {to.collection!r}: "
    column = of.column(connection)
    found = of.look(connection, column)
    if not found["is_owner"]:
        raise ModelChangeError(
            f"{where}only the owner of {to.declared.table} can add and rename its columns, and the pipeline's role is "
            f"not: ALTER TABLE … OWNER TO it, or GRANT it the owner's role"
        )
    check_follows(connection, of, column, [of, to] if there else [of])
    names = [index.name for index in of.indexes(connection, column)]
    for name in (column, *names):
        if max(len(named.encode()) for named in (name + to.suffix(to.next_column), name + "_previous")) > LONGEST_NAME:
            raise ModelChangeError(
                f"{where}the name {name!r} is too long to be told apart from the next one: shorten it"
            )
        if name in names and (taken := [one for one in (name + "_previous",) if of.is_relation(connection, one)]):
            raise ModelChangeError(f"{where}there is a relation {taken[0]!r} already, and {name!r} is to be called so")
    for name in (to.previous_column,) if there else (to.next_column, to.previous_column):
        taken_by = to.look(connection, name)
        if taken_by["type"] is None:
            continue
        if name == to.next_column and (taken_by["type"], taken_by["dimension"]) == (to.storage, to.dimension):
            empty = sql.SQL("SELECT FROM {} WHERE {} IS NOT NULL LIMIT 1").format(to.relation, sql.Identifier(name))
            if not to.dependants(connection, name, []) and connection.execute(empty).fetchone() is None:
                continue  # of a try by hand, perhaps; it is what we need
        raise ModelChangeError(
            f"{where}{to.declared.table} has a column {name!r} already: where another model has it, end that first "
            f"(`embeddings-pipeline profile status`); else rename it, or drop it"
        )


def check_follows(
    connection: psycopg.Connection, table: ColumnDestination, column: str, ours: Sequence[ColumnDestination]
) -> None:
    """ModelChangeError where something of the current model's column would not come to the next one's with its name."""
    if table.look(connection, column)["has_grants"]:
        raise ModelChangeError(
            f"collection {table.collection!r}: roles have rights on the column {column!r} by itself, which would not "
            f"come to the new one: GRANT them on {table.declared.table}, and REVOKE them on the column"
        )
    check_dependants(connection, table, column, ours)


def check_dependants(
    connection: psycopg.Connection, table: ColumnDestination, column: str, ours: Sequence[ColumnDestination]
) -> None:
    """ModelChangeError where something would go on following a column that is renamed or dropped."""
    if others := table.dependants(connection, column, ours):
        raise ModelChangeError(
            f"collection {table.collection!r}: {'; '.join(others)}: would go on following {column!r} when it is "
            f"renamed; drop that first, and make it again afterwards"
        )


def _check_both(collection: Collection, of: TableDestination, to: TableDestination) -> None:
    """The same for the two columns of a swap, either way."""
    if isinstance(of, ColumnDestination) and isinstance(to, ColumnDestination):
        with collection.database.connect(autocommit=True) as connection:
            check_follows(connection, of, of.column(connection), [of, to])
            check_dependants(connection, to, to.column(connection), [of, to])


# --- backfill ----------------------------------------------------------------------------------------------------


def backfill(collection: Collection, batches: Iterable[int], run: str) -> Iterator[tuple[int, Backfilled]]:
    """Fill batches of the next model; yields each when it is done. ModelChangeError unless a change is expanded and
    not yet swapped, StaleRunError where it was given up meanwhile.
    """
    model = collection.with_model(_expanded(collection, "backfill").next)
    yield from backfill_batches(model, batches, run)


def incomplete_batches(collection: Collection, model: Model) -> list[int]:
    """The batches in which a shadow model lacks vectors, in order."""
    with collection.database.connect(autocommit=True) as connection:
        return _incomplete(connection, collection.definition.name, model.table.fingerprint)


def _incomplete(connection: psycopg.Connection, collection: str, to: str) -> list[int]:
    parameters = {"collection": collection, "to": to}
    return [row[0] for row in connection.execute(load_sql("model_change/incomplete"), parameters)]


def _expanded(collection: Collection, step: str) -> ModelChange:
    change = open_change(collection)
    if change is None:
        raise ModelChangeError(
            f"collection {collection.definition.name!r}: no change of its model is open, so there is nothing to "
            f"{step}; "
            f"begin with `embeddings-pipeline profile switch NAME`, or materialize migration/expand"
        )
    if change.phase != "expanded":
        raise ModelChangeError(
            f"collection {collection.definition.name!r}: {_named(change.next)} is the current model already; go on "
            "with "
            f"`embeddings-pipeline profile contract`, or back with `embeddings-pipeline profile rollback`"
        )
    return change


# --- swap and roll back ------------------------------------------------------------------------------------------


def swap(collection: Collection, run: str) -> Swapped:
    """Make the next model the current one, if it passes the gate. ModelChangeError, with the figures, if it does
    not.
    """
    started = time.perf_counter()
    change = _expanded(collection, "swap")
    following = collection.with_model(change.next)
    done = progress(collection, change.next)
    never = _never_backfilled(collection, change)
    if never:
        raise ModelChangeError(
            f"collection {change.collection!r}: {never:,} of {done.batches:,} batches are not backfilled; "
            f"materialize migration/backfill first, or run `embeddings-pipeline profile switch "
            f"{change.next.profile.name}`"
        )
    config = collection.definition.attributes
    _check_both(collection, change.former.table, change.next.table)
    _check_encoder(change.next.profile)  # searches are going to need it
    if isinstance(following.current.table, ColumnDestination):
        with collection.database.connect(autocommit=True) as connection:
            following.current.table.restore(connection)
    index = ensure_index(collection.database, change.next.table, config.index, list(config.vectors))
    _mark_lacking(following)
    _backfill_marked(following, run)
    gate = measure_gate(collection, following)
    with collection.database.connect() as connection:
        connection.execute(NOTE_GATE, {"gate": Jsonb(asdict(gate)), "id": change.id})
    if gate.refused:
        raise ModelChangeError(
            f"collection {change.collection!r}: {_named(change.next)} does not take over: "
            f"{'; '.join(gate.refused)}. {_named(change.former)} goes on serving"
        )
    exclusive = _exchange(collection, change, change.former.table, change.next.table, "swapped", following, run)
    return Swapped(gate, index, exclusive, round(time.perf_counter() - started, 3))


def roll_back(collection: Collection, run: str, *, drop_next: bool = True) -> Swapped | None:
    """Make the former model the current one again; before a swap, drop the next model instead, and return None.

    Without `drop_next` that is refused, since a roll back done twice would come to it.
    """
    started = time.perf_counter()
    change = open_change(collection)
    if change is None:
        raise ModelChangeError(
            f"collection {collection.definition.name!r}: no change of its model is open, so there is nothing to roll "
            "back"
        )
    if change.phase == "expanded":
        if not drop_next:
            raise ModelChangeError(
                f"collection {change.collection!r}: {_named(change.former)} is the current model, and nothing has "
                f"been swapped; to drop what was embedded for {_named(change.next)}, say `drop_next: true` in the "
                f"launchpad, or `embeddings-pipeline profile rollback`"
            )
        if change.made_by_expand:
            _drop_model(collection, change.next.table, lambda connection: _enter(connection, change, "abandoned"))
        else:  # `profile add` keeps it, before and after
            with collection.database.connect() as connection:
                _enter(connection, change, "abandoned")
        return None
    former = collection.with_model(change.former)
    _check_both(collection, change.next.table, change.former.table)
    _mark_lacking(former)
    _backfill_marked(former, run)
    config = collection.definition.attributes
    ensure_index(collection.database, change.former.table, config.index, list(config.vectors))
    exclusive = _exchange(collection, change, change.next.table, change.former.table, "expanded", former, run)
    return Swapped(None, None, exclusive, round(time.perf_counter() - started, 3))


def _enter(connection: psycopg.Connection, change: ModelChange, phase: str) -> None:
    """The migration's next phase. ModelChangeError where somebody else has changed it meanwhile."""
    parameters = {"id": change.id, "from_phase": change.phase, "phase": phase}
    if connection.execute(load_sql("model_change/swapped"), parameters).rowcount == 0:
        raise ModelChangeError(
            f"collection {change.collection!r}: somebody else has gone on with the change of its model meanwhile; "
            f"see `embeddings-pipeline profile status`"
        )


def _mark_lacking(model: Collection) -> None:
    """Mark the batches in which a text lacks its vector, as the data itself says, whatever was noted of them."""
    parameters = {"collection": model.definition.name, "fingerprint": model.fingerprint}
    with model.database.connect(autocommit=True) as connection:
        giving_way(lambda: connection.execute(model.current.table.statement("model_change/mark_lacking"), parameters))


def _never_backfilled(collection: Collection, change: ModelChange) -> int:
    """Batches that the backfill has not come to."""
    query = "SELECT count(*) FROM embeddings.backfill WHERE collection = %s AND fingerprint = %s"
    with collection.database.connect(autocommit=True) as connection:
        row = connection.execute(query, [change.collection, change.next.table.fingerprint]).fetchone()
    done = progress(collection, change.next)
    return max(0, done.batches - (row[0] if row else 0))


def _backfill_marked(model: Collection, run: str) -> None:
    """Fill what commits have marked since the model was last whole."""
    for batch in incomplete_batches(model, model.current):
        backfill_batch(model, batch, run)


def _exchange(
    collection: Collection,
    change: ModelChange,
    of: TableDestination,
    to: TableDestination,
    phase: str,
    following: Collection,
    run: str,
) -> Exclusive:
    """One transaction: the current model, its marker and the view. Where a text lacks its vector: backfill, and
    again.
    """
    pair = {"collection": change.collection, "from": of.fingerprint, "to": to.fingerprint}

    def flip(connection: psycopg.Connection) -> None:
        if connection.execute(load_sql("model_change/flip"), pair).fetchone() is None:
            raise ModelChangeError(f"collection {change.collection!r}: somebody else has changed its model meanwhile")
        if incomplete := _incomplete(connection, change.collection, to.fingerprint):
            raise _IncompleteError(incomplete)
        _enter(connection, change, phase)

    for _ in range(SWAP_TRIES):
        try:
            with collection.database.connect(autocommit=True) as connection:
                statements = swap_statements(connection, of, to)
            return exclusively(collection.database, _swapped(of), flip, statements)
        except _IncompleteError as error:
            for batch in error.batches:
                backfill_batch(following, batch, run)
    raise ModelChangeError(
        f"collection {change.collection!r}: rows change faster than {_named(following.current)} can be backfilled; "
        f"nothing was swapped, try again when fewer change"
    )


class _IncompleteError(Exception):
    """Batches that a commit has marked since the last look."""

    def __init__(self, batches: list[int]) -> None:
        self.batches = batches


def _swapped(of: TableDestination) -> list[sql.Identifier]:
    """What the swap excludes others from."""
    users = [of.relation] if isinstance(of, ColumnDestination) else []
    return [*users, of.tables.view, of.marker]


def swap_statements(connection: psycopg.Connection, of: TableDestination, to: TableDestination) -> list[sql.Composed]:
    """The statements of the swap that exclude others: the view, the columns of an adopted table with their indexes, and
    the marker of the current model. The view first, as those who read it lock it before the table.
    """
    view, marker = show_statements(of, to)
    renames = []
    if isinstance(of, ColumnDestination) and isinstance(to, ColumnDestination):
        renames = of.exchange_statements(connection, to)
    return [view, *renames, marker]


def show_statements(of: TableDestination, to: TableDestination) -> list[sql.Composed]:
    """The view, and the marker of the current model, from one model to the other."""
    marker = sql.Identifier(f"{to.collection}_current_{to.fingerprint}")
    return [
        to.show_statement(),
        sql.SQL(load_sql("model_change/marker")).format(marker=of.marker, next_marker=marker),
    ]


# --- contract ----------------------------------------------------------------------------------------------------


def contract(collection: Collection, *, now: bool = False) -> Exclusive:
    """Drop the former model, after which there is no way back. `now`: also within the grace period."""
    change = open_change(collection)
    name = collection.definition.name
    if change is None or change.swapped_at is None or change.phase != "swapped":
        raise ModelChangeError(
            f"collection {name!r}: nothing has been swapped, so there is no former model to drop; "
            f"{'swap first' if change else 'see `embeddings-pipeline profile status`'}"
        )
    grace = timedelta(hours=collection.definition.attributes.model_change.grace_hours)
    ends = change.swapped_at + grace
    if not now and datetime.now(UTC) < ends:
        raise ModelChangeError(
            f"collection {name!r}: the grace period runs until {ends:%Y-%m-%d %H:%M %Z}; until then "
            f"`embeddings-pipeline profile rollback` brings {_named(change.former)} back at once. `--now` (in the "
            f"launchpad `now: true`) drops it all the same"
        )
    if isinstance(change.former.table, ColumnDestination) and not now:
        _check_left(collection, change.former.table)
    return _drop_model(collection, change.former.table, lambda connection: _enter(connection, change, "contracted"))


def _check_left(collection: Collection, former: ColumnDestination) -> None:
    """ModelChangeError where rows have a vector in the former column alone, which would be lost with it."""
    with collection.database.connect(autocommit=True) as connection:
        names = {"former": former.column(connection), "column": former.declared.column}
        query = "SELECT count(*) FROM {table} WHERE {former} IS NOT NULL AND {column} IS NULL"
        parts = {name: sql.Identifier(value) for name, value in names.items()}
        row = connection.execute(sql.SQL(query).format(table=former.relation, **parts)).fetchone()
    if row and row[0]:
        raise ModelChangeError(
            f"collection {former.collection!r}: {row[0]:,} rows of {former.declared.table} have a vector in "
            f"{names['former']!r} and none in {names['column']!r}: they are outside the collection (`where:`), or in "
            f"quarantine. `--now` (in the launchpad `now: true`) drops those vectors all the same"
        )


def _drop_model(
    collection: Collection, table: TableDestination, also: Callable[[psycopg.Connection], Any]
) -> Exclusive:
    def forget(connection: psycopg.Connection) -> None:
        # Its row first: commits that hold it are waited for here, and those to come pass the table by.
        also(connection)
        parameters = {"collection": table.collection, "fingerprint": table.fingerprint}
        connection.execute(load_sql("model_change/forget"), parameters)

    with collection.database.connect(autocommit=True) as connection:
        if isinstance(table, ColumnDestination):
            table.restore(connection)
            if (column := table.column_or_none(connection)) is not None:
                check_dependants(connection, table, column, [table])
        statements = table.drop_statements(connection)
    return exclusively(collection.database, table.exclusive(), forget, statements)


def _named(model: Model) -> str:
    return f"{model.profile.name} ({model.table.fingerprint})"
