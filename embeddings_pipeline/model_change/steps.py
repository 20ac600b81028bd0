"""The phases of a model change as data: which statements, in which order, with which locks.

`phases` runs these lists, and `plan` prints the same ones. A parameter that only a run knows is LATER. What excludes
others comes last in its transaction, so that it is short.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb

from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.pipeline.shadow import note_changes
from embeddings_pipeline.store.destination.base import Destination, Layout
from embeddings_pipeline.store.destination.changes import Change
from embeddings_pipeline.store.destination.indexes import IndexChange
from embeddings_pipeline.store.destination.rights import ModelRights
from embeddings_pipeline.store.locks import vacuum_lock
from embeddings_pipeline.store.sql import load_sql

AT_ONCE = 0.01  # seconds of a statement whose time does not grow with the table
INDEXED_PER_SECOND = 3_000  # vectors of 384 dimensions into HNSW
LOOKED_PER_SECOND = 300_000  # texts, whether each has its vector
OWN_ROW = "ROW EXCLUSIVE of embeddings.model_change"


class Later:
    """The value of a parameter that only a run knows."""


LATER = Later()


@dataclass(frozen=True)
class Step:
    """One statement of a phase."""

    phase: str  # expand, backfill, swap, roll back, contract
    statement: sql.Composed
    lock: str  # PostgreSQL's name, and of what
    parameters: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""  # of the statement in sql/model_change.sql, if its answer is looked at
    excludes: bool = False  # others wait for it
    seconds: float = AT_ONCE
    bytes: int = 0


@dataclass(frozen=True)
class Transaction:
    """Steps of one transaction, and the relations that its last ones exclude others from."""

    steps: list[Step]
    relations: list[sql.Identifier]


@dataclass(frozen=True)
class Side:
    """One of the two models of an exchange, as it is in the catalog."""

    model: Destination
    layout: Layout
    rights: ModelRights


def side(connection: psycopg.Connection, model: Destination) -> Side:
    """A model as it is in the catalog now."""
    return Side(model, model.layout(connection), model.rights(connection))


def expand_transaction(
    current: Destination, candidate: Destination, profile: Profile, rights: Iterable[Change]
) -> Transaction:
    """The change is noted, and the candidate's place is made. rights: what gives it the current model's."""
    models = {"collection": current.collection, "current": current.fingerprint, "candidate": candidate.fingerprint}
    begin = _named_step("expand", "begin", OWN_ROW, {**models, "made": LATER})
    return _making("expand", candidate, profile, [begin], rights)


def add_transaction(candidate: Destination, profile: Profile, rights: Iterable[Change]) -> Transaction:
    """A shadow model without a change."""
    return _making("expand", candidate, profile, [], rights)


def _making(
    phase: str, candidate: Destination, profile: Profile, then: list[Step], rights: Iterable[Change]
) -> Transaction:
    values = {
        "collection": candidate.collection,
        "fingerprint": candidate.fingerprint,
        "profile": Jsonb(asdict(profile)),
        "dimension": candidate.dimension,
        "storage": candidate.storage,
        "identity": candidate.identity,
    }
    model = _named_step(phase, "model", "ROW EXCLUSIVE of embeddings.model", values)
    made = [_step(phase, change, excludes=True) for change in (*candidate.add_changes(), *rights)]
    return Transaction(
        [*_vacuum_kept_out(phase, candidate.user_tables), model, *then, *made], list(candidate.user_tables)
    )


def backfill_steps(
    candidate: Destination, settings: tuple[list[Change], list[Change]], texts: int, texts_per_second: int
) -> list[Step]:
    """What a backfill executes, whose vectors come in between (`pipeline/shadow.py`). settings: see
    `Destination.setting_changes`.
    """
    before, after = settings
    steps = [_step("backfill", change) for change in before]
    for change in candidate.put_changes():
        if change.grows:
            size = candidate.needed_bytes(texts, "none")
            steps.append(_step("backfill", change, seconds=texts / texts_per_second, size=size))
        else:
            steps.append(_step("backfill", change))
    known = {"collection": candidate.collection, "fingerprint": candidate.fingerprint}
    steps += [_step("backfill", change, known) for change in note_changes(candidate)]
    return steps + [_step("backfill", change) for change in after]


def index_steps(phase: str, shadow: Destination, changes: Iterable[IndexChange], texts: int, method: str) -> list[Step]:
    """What builds a shadow model's indexes (`index/pgvector.py` runs them)."""
    changes = list(changes)
    built = max(1, sum(change.action == "create" for change in changes))
    size = round((shadow.needed_bytes(texts, method) - shadow.needed_bytes(texts, "none")) / built)
    took = texts / built / INDEXED_PER_SECOND * shadow.dimension / 384
    lock = f"SHARE UPDATE EXCLUSIVE of {shadow.place}"
    return [
        _step(phase, Change(change.statement, lock), seconds=took, size=size)
        if change.action == "create"
        else _step(phase, Change(change.statement, lock))
        for change in changes
    ]


def mark_step(phase: str, shadow: Destination, texts: int = 0) -> Step:
    """Marks the batches in which a text lacks its vector, as the data itself says, whatever was noted of them."""
    parameters = {"collection": shadow.collection, "fingerprint": shadow.fingerprint}
    marked = Change(shadow.statement("model_change/mark_lacking"), "ROW EXCLUSIVE of embeddings.backfill")
    return _step(phase, marked, parameters, seconds=max(AT_ONCE, texts / LOOKED_PER_SECOND))


def gate_step() -> Step:
    """Notes what the gate measured."""
    return _named_step("swap", "note_gate", OWN_ROW, {"id": LATER, "gate": LATER})


def swap_transaction(current: Side, candidate: Side) -> Transaction:
    """The candidate becomes the current model."""
    return _exchange("swap", "swapped", current, candidate)


def roll_back_transaction(current: Side, previous: Side) -> Transaction:
    """The previous model becomes the current one again."""
    return _exchange("roll back", "rolled_back", current, previous)


def _exchange(phase: str, entered: str, own: Side, other: Side) -> Transaction:
    """The view comes first of what excludes others, as those who read it lock it before the table."""
    current, shadow = own.model, other.model
    models = {"collection": current.collection, "current": current.fingerprint, "shadow": shadow.fingerprint}
    waited = "ROW EXCLUSIVE of embeddings.collection: commits wait for the end of the transaction"
    looked = "ACCESS SHARE of embeddings.batch and embeddings.backfill"
    rights = shadow.rights_changes(other.rights, own.rights)
    exclusive = [
        shadow.view_change(),
        *shadow.view_option_changes(own.rights),
        *rights,
        *current.exchange(own.layout, other.layout).changes,
        current.marker_change(shadow),
    ]
    written = [shadow.counted[0]] if rights else []
    steps = [
        *_vacuum_kept_out(phase, [*current.user_tables, current.marker, *written]),
        _named_step(phase, "flip", waited, models),
        _named_step(phase, "incomplete", looked, {"collection": shadow.collection, "shadow": shadow.fingerprint}),
        _named_step(phase, entered, OWN_ROW, {"id": LATER}),
        *(_step(phase, change, excludes=True) for change in exclusive),
    ]
    return Transaction(steps, [*current.user_tables, current.tables.view, current.marker, *written])


def contract_transaction(previous: Destination, layout: Layout, freed: int = 0) -> Transaction:
    """The previous model is dropped, and the change is over."""
    return drop_transaction("contract", previous, layout, [_end("contract", "swapped", "contracted")], freed)


def abandon_transaction(candidate: Destination, layout: Layout) -> Transaction:
    """The candidate is dropped before a swap, and the change is over."""
    return drop_transaction("roll back", candidate, layout, [end_step()])


def end_step() -> Step:
    """The change is over before a swap; `profile add` keeps its candidate."""
    return _end("roll back", "expanded", "abandoned")


def _end(phase: str, before: str, after: str) -> Step:
    return _named_step(phase, "end", OWN_ROW, {"id": LATER, "from_phase": before, "phase": after})


def drop_transaction(phase: str, shadow: Destination, layout: Layout, first: list[Step], freed: int = 0) -> Transaction:
    """A shadow model is dropped. Its row goes before its table: commits that hold it are waited for there, and those to
    come pass the table by.
    """
    parameters = {"collection": shadow.collection, "fingerprint": shadow.fingerprint}
    forget = _named_step(phase, "forget", "ROW EXCLUSIVE of embeddings.model, .backfill and .quarantine", parameters)
    relations = shadow.drop_relations if layout.column else []  # the user may have dropped column and table
    *others, last = shadow.drop_changes(layout)
    dropped = [_step(phase, change, excludes=True) for change in others]
    dropped.append(_step(phase, last, excludes=True, size=-freed))
    return Transaction([*_vacuum_kept_out(phase, relations), *first, forget, *dropped], relations)


def _vacuum_kept_out(phase: str, tables: Iterable[sql.Identifier]) -> list[Step]:
    only = "SHARE UPDATE EXCLUSIVE, which only VACUUM and the like wait for"
    return [_step(phase, Change(vacuum_lock(table), only)) for table in tables]


def _named_step(phase: str, name: str, lock: str, parameters: Mapping[str, Any]) -> Step:
    statement = sql.SQL(load_sql(f"model_change/{name}")).format()
    return Step(phase, statement, lock, parameters, name)


def _step(
    phase: str,
    change: Change,
    parameters: Mapping[str, Any] | None = None,
    *,
    excludes: bool = False,
    seconds: float = AT_ONCE,
    size: int = 0,
) -> Step:
    return Step(phase, change.statement, change.lock, parameters or {}, "", excludes, seconds, size)
