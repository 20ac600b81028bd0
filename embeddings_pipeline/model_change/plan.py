"""What a change of the model would do, before anything is done: its price, and its statements with their locks."""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import itemgetter
from typing import Any

import psycopg
from psycopg import sql

from embeddings_pipeline.config.definition import batch_key
from embeddings_pipeline.config.prices import Api, is_paid
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.templates import content_hash
from embeddings_pipeline.encoders import load_encoder
from embeddings_pipeline.encoders.batch_api import HOURS
from embeddings_pipeline.index.pgvector import planned_changes
from embeddings_pipeline.model_change import steps
from embeddings_pipeline.model_change.preflight import check_no_other_change, check_unasked
from embeddings_pipeline.model_change.state import candidate_destination
from embeddings_pipeline.model_change.steps import Step
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.pipeline.pending import counted_tokens
from embeddings_pipeline.pipeline.quote import Quote, Quoter
from embeddings_pipeline.pipeline.submit import check_api
from embeddings_pipeline.store.destination.base import Destination
from embeddings_pipeline.store.destination.indexes import after
from embeddings_pipeline.store.models import Model

PRICED_TEXTS = 64  # encoded to see how fast the model is here


@dataclass(frozen=True)
class Price:
    """What backfilling the candidate takes. Tokens and seconds are estimates from a sample of the texts."""

    texts: int  # that have no vector under the profile yet, here or in the lake; equal ones of a batch counted once
    tokens: int
    seconds: float
    bytes: int  # on the database's disk, with the index
    quote: Quote | None = None  # of a model that takes money: what its answers cost; `seconds` are at its limits then
    quotes: Mapping[str, Quote] = field(default_factory=dict)  # the same for each batch, by partition key
    basis: str = ""  # what the quote rests on


NOBODYS = ("which is new", "which is ours")  # relations that nobody else reads yet, or at all
UNDO = {
    "expand": "`profile rollback` drops the candidate",
    "backfill": "`profile rollback` drops the candidate",
    "swap": "`profile rollback` brings the previous model back at once",
    "roll back": "`profile switch` swaps again",
    "contract": "none",
}


@dataclass(frozen=True)
class PlannedPhase:
    """One phase of a change as a whole."""

    phase: str
    seconds: float  # with the encoding
    locks: list[str]  # what others are kept from, for some milliseconds
    bytes: int
    undo: str


@dataclass(frozen=True)
class Planned:
    """One statement of a change, in order."""

    phase: str
    statement: str  # on one line; what only a run knows is a `:name`
    lock: str  # PostgreSQL's name, and of what
    seconds: float
    bytes: int = 0


def price(collection: Collection, profile: Profile, api: Api = "direct") -> Price:
    """Encodes a sample of the texts, so it takes some seconds and the model's memory; a model that takes money is not
    asked. Writes nothing.
    """
    check_api(profile, api)
    candidate = candidate_destination(collection, profile)
    is_kept = candidate.fingerprint in {model.destination.fingerprint for model in collection.ledger.shadow_models()}
    with collection.database.connect(autocommit=True) as connection:
        lacking = sql.SQL("NOT EXISTS (SELECT FROM {} WHERE text_id = text.id)").format(candidate.identifier)
        statement = candidate.statement("model_change/to_encode", wanted=lacking if is_kept else sql.SQL("true"))
        wanted = connection.execute(statement).fetchall()
        lacking_by_batch = _not_in_lake(collection, candidate, wanted)
        digests = [digest for batch in lacking_by_batch.values() for digest in batch]
        texts = len(digests)
        method = collection.definition.attributes.index.method
        needed = 0 if is_kept else candidate.needed_bytes(len(wanted), method)
        if is_paid(profile):
            quoter = Quoter(collection.with_model(Model(profile, candidate)), api)
            quotes = {batch_key(n): _quoted(quoter, connection, batch) for n, batch in lacking_by_batch.items()}
            total = quoter.total(list(quotes.values()))
            seconds = 3600.0 * HOURS if total.jobs else 60 * total.minutes
            return Price(total.texts, total.tokens, seconds, needed, total, quotes, quoter.basis)
        chosen = sorted(set(digests))[:PRICED_TEXTS]  # hashes are in no order, and these are the same each time
        sampled = connection.execute(candidate.statement("model_change/sample"), {"content_hashes": chosen})
        sample = [row[0] for row in sampled]
    tokens, seconds = 0, 0.0
    if sample:
        encoder = load_encoder(profile, collection.settings)
        encoder.encode_documents(sample[:1])  # the first pass is slower than those to come
        began = time.perf_counter()
        encoder.encode_documents(sample)
        seconds = (time.perf_counter() - began) * texts / len(sample)
        tokens = round(int(encoder.count_tokens(sample).sum()) * texts / len(sample))
    return Price(texts, tokens, round(seconds, 1), needed)


def _not_in_lake(
    collection: Collection, candidate: Destination, wanted: Sequence[tuple[int, bytes]]
) -> dict[int, list[bytes]]:
    """Of the contents (batch, content hash), by batch, those that no earlier try has left in the lake."""
    folder = f"{collection.definition.name}/embeddings/{candidate.fingerprint}"
    left: dict[int, list[bytes]] = {}
    for batch, group in groupby(wanted, itemgetter(0)):
        there = collection.lake.newest_hashes(folder, batch)
        if lacking := [digest for _, digest in group if digest not in there]:
            left[batch] = lacking
    return left


def _quoted(quoter: Quoter, connection: psycopg.Connection, digests: list[bytes]) -> Quote:
    """What the texts of one batch would cost."""
    statement = quoter.collection.model.destination.statement("model_change/sample")
    texts = [row[0] for row in connection.execute(statement, {"content_hashes": digests})]
    return quoter.quote(counted_tokens(quoter.collection, {content_hash(text): text for text in texts}))


def plan(collection: Collection, profile: Profile) -> list[Planned]:
    """Every statement that changes something and is not done yet, in order. Does nothing.

    Raises ModelChangeError or ProfileError if such a change would be refused.
    """
    change = check_no_other_change(collection, profile)
    candidate = change.candidate.destination if change else check_unasked(collection, profile)
    current = collection.model.destination
    with collection.database.connect(autocommit=True) as connection:
        planned = _steps(connection, collection, profile, current, candidate)
        return [
            Planned(step.phase, shown(connection, step.statement, step.parameters), step.lock, step.seconds, step.bytes)
            for step in planned
            if change is None or step.phase != "expand"
        ]


def phases(planned: list[Planned], cost: Price) -> list[PlannedPhase]:
    """The phases that planned statements make up. cost: the encoding belongs to the backfill."""
    found: dict[str, PlannedPhase] = {}
    for step in planned:
        seconds = cost.seconds if step.phase == "backfill" else 0.0
        phase = found.setdefault(step.phase, PlannedPhase(step.phase, seconds, [], 0, UNDO[step.phase]))
        alone, _, relation = step.lock.partition("ACCESS EXCLUSIVE of ")
        locks = [*phase.locks, relation] if not alone and not relation.endswith(NOBODYS) else phase.locks
        found[step.phase] = replace(
            phase,
            seconds=phase.seconds + step.seconds,
            locks=list(dict.fromkeys(locks)),
            bytes=phase.bytes + step.bytes,
        )
    return list(found.values())


def _steps(
    connection: psycopg.Connection,
    collection: Collection,
    profile: Profile,
    current: Destination,
    candidate: Destination,
) -> list[Step]:
    """The steps of all phases, each with what the ones before it will have left."""
    index = collection.definition.attributes.index
    rows = _texts(connection, candidate, list(collection.definition.attributes.vectors))
    texts = sum(rows.values())
    changes = planned_changes(connection, candidate, index, rows)
    own, shadow = steps.side(connection, current), steps.side(connection, candidate)
    rights = candidate.rights_changes(shadow.rights, own.rights)
    given = replace(own.rights, column=shadow.rights.column)
    shadow = replace(shadow, layout=replace(shadow.layout, indexes=after(shadow.layout.indexes, changes)), rights=given)
    swapped = current.exchange(own.layout, shadow.layout)
    back = current.index_changes(index, rows, swapped.previous, swapped.current)
    previous = replace(swapped.previous, indexes=after(swapped.previous.indexes, back))
    written = candidate.vectors_per_second(connection)
    return [
        *steps.expand_transaction(current, candidate, profile, rights).steps,
        *steps.backfill_steps(candidate, candidate.setting_changes(connection), texts, written),
        *steps.index_steps("swap", candidate, changes, texts, index.method),
        steps.mark_step("swap", candidate, texts),
        steps.gate_step(),
        *steps.swap_transaction(own, shadow).steps,
        *steps.index_steps("roll back", current, back, texts, index.method),
        steps.mark_step("roll back", current, texts),
        *steps.roll_back_transaction(replace(shadow, layout=swapped.current), replace(own, layout=previous)).steps,
        *steps.contract_transaction(current, swapped.previous, current.freed_bytes(texts, index.method)).steps,
    ]


def _texts(connection: psycopg.Connection, candidate: Destination, vector_names: list[str]) -> dict[str, int]:
    """How many texts are to have a vector, by vector name."""
    query = sql.SQL("SELECT vector_name, count(*) FROM {} WHERE NOT blank GROUP BY 1").format(candidate.tables.text)
    counted: dict[str, int] = dict(connection.execute(query).fetchall())
    return {name: counted.get(name, 0) for name in vector_names}


def shown(connection: psycopg.Connection, statement: sql.Composable | str, parameters: Mapping[str, Any]) -> str:
    """A statement with its parameters on one line, without comments; what only a run knows is a `:name`."""
    text = statement if isinstance(statement, str) else statement.as_string(connection)
    text = " ".join(re.sub(r"--[^\n]*", "", text).split()).rstrip(";")

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if isinstance(parameters.get(name, steps.LATER), steps.Later):
            return f":{name}"
        return sql.Literal(parameters[name]).as_string(connection)

    return re.sub(r"%\((\w+)\)s", value, text)
