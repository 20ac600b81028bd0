"""Changing the model of a collection without a failed query: expand, backfill, swap, roll back, contract.

| phase | does |
|---|---|
| expand | makes the candidate's place; from here on each commit keeps it current, in the batches that it has |
| backfill | gives each batch's texts their vectors under the candidate (`backfill.py`); the source is not read |
| swap | builds its index, checks it (`gate.py`), and then in one transaction makes it the current one |
| roll back | the same the other way: the previous model has been kept current. Before a swap: drops the candidate |
| contract | drops the previous model, once the grace period is over |

Whatever fails or is killed, the current model serves, and the same phase goes on where it was.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import psycopg
from psycopg import errors
from psycopg.types.json import Jsonb

from embeddings_pipeline.config.prices import Api
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.errors import ModelChangeError, profile_command
from embeddings_pipeline.index.pgvector import IndexReport, ensure_index
from embeddings_pipeline.model_change import steps
from embeddings_pipeline.model_change.backfill import backfill_batches, submit_batches
from embeddings_pipeline.model_change.gate import Gate, measure_gate
from embeddings_pipeline.model_change.preflight import (
    check_candidate,
    check_contract,
    check_exchange,
    check_no_other_change,
    check_not_in_a_change,
    check_roll_back,
    check_swap,
    expanded_change,
)
from embeddings_pipeline.model_change.state import ModelChange, incomplete_batches, named, open_change
from embeddings_pipeline.model_change.steps import Step, Transaction
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.pipeline.shadow import Backfilled, backfill_batch
from embeddings_pipeline.store.destination.base import Destination, Layout
from embeddings_pipeline.store.destination.changes import Change
from embeddings_pipeline.store.locks import Exclusive, exclusively, giving_way
from embeddings_pipeline.store.models import Model

SWAP_TRIES = 20  # rows that change while a swap is prepared are backfilled again

Answered = Callable[[Step, psycopg.Cursor], Any]  # looks at the answer of a step, before the next one


@dataclass(frozen=True)
class Swapped:
    """What a swap did."""

    gate: Gate | None  # None: rolled back, for which only coverage is asked
    index: IndexReport
    exclusive: Exclusive
    seconds: float


# --- the phases --------------------------------------------------------------------------------------------------


def expand(collection: Collection, profile: Profile) -> ModelChange:
    """Make the candidate's place. Everything that can be refused is refused before anything is touched.

    If a change to that very model is open, it is returned as it is. Raises ModelChangeError, ProfileError.
    """
    change = check_no_other_change(collection, profile)
    if change is not None:
        return change
    candidate = check_candidate(collection, profile)
    name, values = collection.definition.name, dict[str, Any]()

    def answered(step: Step, cursor: psycopg.Cursor) -> None:
        if step.name == "model":
            values["made"] = cursor.rowcount == 1
        if step.name == "begin" and cursor.rowcount == 0:
            raise ModelChangeError(f"collection {name!r}: its models have just been changed; try again")

    rights = _rights_to_give(collection, candidate)
    transaction = steps.expand_transaction(collection.model.destination, candidate, profile, rights)
    try:
        _run(collection, transaction, values, answered)
    except errors.UniqueViolation as error:
        raise ModelChangeError(f"collection {name!r}: another change of the model has just been opened") from error
    change = open_change(collection)
    assert change is not None
    return change


def backfill(
    collection: Collection, batches: Iterable[int], run: str, api: Api = "direct"
) -> Iterator[tuple[int, Backfilled]]:
    """Backfill batches of the candidate; yields each when it is done. ModelChangeError unless a change is expanded and
    not yet swapped, StaleRunError if it was given up meanwhile. By the Batch API, most of a batch comes later.
    """
    candidate, chosen = collection.with_model(expanded_change(collection, "backfill").candidate), list(batches)
    # File by file: a job that has failed by the time its texts are backfilled leaves them to be asked about directly.
    for group in submit_batches(candidate, chosen, run) if api == "batch" else [chosen]:
        yield from backfill_batches(candidate, group, run)


def swap(collection: Collection, run: str) -> Swapped:
    """Make the candidate the current model, if it passes the gate. ModelChangeError, with the figures, if not."""
    started = time.perf_counter()
    change = expanded_change(collection, "swap")
    check_swap(collection, change)
    candidate = collection.with_model(change.candidate)
    index = _make_ready(candidate, "swap", run)
    gate = _pass_gate(collection, candidate, change)
    exclusive = _exchange(collection, change, candidate, run)
    return Swapped(gate, index, exclusive, round(time.perf_counter() - started, 3))


def roll_back(collection: Collection, run: str, *, drop_candidate: bool = True) -> Swapped | None:
    """Make the previous model the current one again; before a swap, drop the candidate instead, and return None.

    Without `drop_candidate` that is refused, since a roll back done twice would come to it.
    """
    started = time.perf_counter()
    change = check_roll_back(collection, drop_candidate=drop_candidate)
    if change.phase == "expanded":
        _abandon(collection, change)
        return None
    check_exchange(collection, change)
    previous = collection.with_model(change.previous)
    index = _make_ready(previous, "roll back", run)
    exclusive = _exchange(collection, change, previous, run)
    return Swapped(None, index, exclusive, round(time.perf_counter() - started, 3))


def contract(collection: Collection, *, now: bool = False) -> Exclusive:
    """Drop the previous model, after which there is no way back. `now`: also within the grace period."""
    change = check_contract(collection, now=now)
    layout = _removal(collection, change.previous.destination)
    transaction = steps.contract_transaction(change.previous.destination, layout)
    return _run(collection, transaction, {"id": change.id}, _not_meanwhile(change))


# --- their parts, in order ---------------------------------------------------------------------------------------


def _make_ready(shadow: Collection, phase: str, run: str) -> IndexReport:
    """A shadow model gets its index, and what commits have marked in it since it was complete."""
    destination, config = shadow.model.destination, shadow.definition.attributes
    with shadow.database.connect(autocommit=True) as connection:
        destination.restore(connection)
    index = ensure_index(shadow.database, destination, config.index, list(config.vectors))
    mark = steps.mark_step(phase, destination)
    with shadow.database.connect(autocommit=True) as connection:
        giving_way(lambda: connection.execute(mark.statement, mark.parameters))
    for batch in incomplete_batches(shadow, shadow.model):
        backfill_batch(shadow, batch, run)
    return index


def _pass_gate(collection: Collection, candidate: Collection, change: ModelChange) -> Gate:
    """What the gate measures, noted. ModelChangeError if the candidate is refused."""
    gate = measure_gate(collection, candidate)
    step = steps.gate_step()
    with collection.database.connect() as connection:
        connection.execute(step.statement, {"gate": Jsonb(asdict(gate)), "id": change.id})
    if gate.refused:
        raise ModelChangeError(
            f"collection {change.collection!r}: {named(change.candidate)} does not take over: "
            f"{'; '.join(gate.refused)}. {named(change.current)} goes on serving"
        )
    return gate


def _exchange(collection: Collection, change: ModelChange, shadow: Collection, run: str) -> Exclusive:
    """One transaction: the current model, its marker and the view. If a text lacks its vector: backfill, and again."""
    current, other = change.current.destination, change.shadow.destination
    build = steps.swap_transaction if change.phase == "expanded" else steps.roll_back_transaction
    meanwhile = _not_meanwhile(change)

    def answered(step: Step, cursor: psycopg.Cursor) -> None:
        if step.name == "flip" and cursor.fetchone() is None:
            raise ModelChangeError(f"collection {change.collection!r}: somebody else has changed its model meanwhile")
        if step.name == "incomplete" and (batches := [row[0] for row in cursor]):
            raise _AgainError(batches)
        meanwhile(step, cursor)
        if step.name in ("swapped", "rolled_back"):  # what is granted while we wait for locks is carried over, too
            rights = current.rights(cursor.connection), other.rights(cursor.connection)
            if rights != (own.rights, shadows.rights):
                raise _AgainError([])

    for _ in range(SWAP_TRIES):
        with collection.database.connect(autocommit=True) as connection:
            own, shadows = steps.side(connection, current), steps.side(connection, other)
        transaction = build(own, shadows)
        try:
            return _run(collection, transaction, {"id": change.id}, answered)
        except _AgainError as error:
            for batch in error.batches:
                backfill_batch(shadow, batch, run)
    raise ModelChangeError(
        f"collection {change.collection!r}: rows change faster than {named(change.shadow)} can be backfilled; nothing "
        f"was swapped, try again when fewer change"
    )


class _AgainError(Exception):
    """Since the last look a commit has marked batches, or somebody has granted or revoked something."""

    def __init__(self, batches: list[int]) -> None:
        self.batches = batches


def _abandon(collection: Collection, change: ModelChange) -> None:
    """End the change before its swap. A candidate that `profile add` keeps stays."""
    if change.made_by_expand:
        layout = _removal(collection, change.candidate.destination)
        transaction = steps.abandon_transaction(change.candidate.destination, layout)
    else:
        transaction = Transaction([steps.end_step()], [])
    _run(collection, transaction, {"id": change.id}, _not_meanwhile(change))


# --- a second model ----------------------------------------------------------------------------------------------


def add_model(collection: Collection, profile: Profile) -> Model:
    """Keep a second model current beside the current one, to be searched by its name; `sync` backfills it."""
    candidate = check_candidate(collection, profile)
    _run(collection, steps.add_transaction(candidate, profile, _rights_to_give(collection, candidate)), {})
    return Model(profile, candidate)


def remove_model(collection: Collection, name: str) -> Model:
    """Drop a model that `add_model` keeps beside the current one."""
    change = open_change(collection)
    in_change = [change.current, change.shadow] if change else []
    for model in collection.ledger.shadow_models():
        free = model.destination not in [each.destination for each in in_change]
        if free and name in (model.profile.name, model.destination.fingerprint):
            layout = _removal(collection, model.destination)
            transaction = steps.drop_transaction("contract", model.destination, layout, [])
            _run(collection, transaction, {}, first=partial(check_not_in_a_change, shadow=model.destination))
            return model
    if any(name in (model.profile.name, model.destination.fingerprint) for model in in_change):
        raise ModelChangeError(
            f"collection {collection.definition.name!r}: {name!r} is part of a change that is under way; end that with "
            f"`{profile_command('contract', collection.definition.name)}` or "
            f"`{profile_command('rollback', collection.definition.name)}`"
        )
    raise ModelChangeError(
        f"collection {collection.definition.name!r}: no profile {name!r} is kept beside the current one; see "
        f"`{profile_command('status', collection.definition.name)}`"
    )


# --- running steps -----------------------------------------------------------------------------------------------


def _run(
    collection: Collection,
    transaction: Transaction,
    values: Mapping[str, Any],
    answered: Answered = lambda step, cursor: None,
    *,
    first: Callable[[psycopg.Connection], Any] = lambda connection: None,
) -> Exclusive:
    """Execute the steps of a transaction. values: of the parameters that are LATER."""

    def prepare(connection: psycopg.Connection) -> None:
        first(connection)
        for step in transaction.steps:
            if not step.excludes:
                later = {name: values[name] for name, value in step.parameters.items() if value is steps.LATER}
                parameters = {**step.parameters, **later} or None  # None: a name in it may have a percent sign
                answered(step, connection.execute(step.statement, parameters))

    exclusive = [step.statement for step in transaction.steps if step.excludes]
    return exclusively(collection.database, transaction.relations, prepare, exclusive)


def _not_meanwhile(change: ModelChange) -> Answered:
    """ModelChangeError if somebody else has brought the change into another phase meanwhile."""

    def answered(step: Step, cursor: psycopg.Cursor) -> None:
        if step.name in ("swapped", "rolled_back", "end") and cursor.rowcount == 0:
            raise ModelChangeError(
                f"collection {change.collection!r}: somebody else has gone on with the change of its model meanwhile; "
                f"see `{profile_command('status', change.collection)}`"
            )

    return answered


def _rights_to_give(collection: Collection, candidate: Destination) -> list[Change]:
    """What gives a candidate, made or not, the current model's owner, grants and policies."""
    with collection.database.connect(autocommit=True) as connection:
        wanted = collection.model.destination.rights(connection)
        return candidate.rights_changes(candidate.rights(connection), wanted)


def _removal(collection: Collection, shadow: Destination) -> Layout:
    """What there is to drop of a shadow model, after what a killed backfill left is restored."""
    with collection.database.connect(autocommit=True) as connection:
        shadow.restore(connection)
        return shadow.removal(connection)
