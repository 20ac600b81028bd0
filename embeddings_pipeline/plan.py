"""What a change of the model would do, before anything is done: its price, and its statements with their locks."""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from embeddings_pipeline.encoders import load_encoder
from embeddings_pipeline.index.pgvector_index import index_statements
from embeddings_pipeline.migration import needed_bytes, swap_statements
from embeddings_pipeline.opened import OpenCollection
from embeddings_pipeline.profiles import Profile, fingerprint
from embeddings_pipeline.store.copy_binary import copy_statement
from embeddings_pipeline.store.postgres import load_sql
from embeddings_pipeline.store.targets import ModelTable

SAMPLE_TEXTS = 64  # encoded to see how fast the model is here
WRITTEN_PER_SECOND = 80_000  # rows; see BENCHMARKS.md
INDEXED_PER_SECOND = 3_000  # vectors of 384 dimensions into HNSW
AT_ONCE = 0.01  # seconds of a statement whose time does not grow with the table


@dataclass(frozen=True)
class Price:
    """What filling the next model takes. Tokens and seconds are estimates from a sample of the texts."""

    texts: int  # that have no vector under the profile yet, equal ones of a batch counted once
    tokens: int
    seconds: float
    bytes: int  # on the database's disk, with the index


@dataclass(frozen=True)
class Planned:
    """One statement of a change, in order."""

    phase: str
    statement: str
    lock: str  # PostgreSQL's name, and of what
    seconds: float
    bytes: int = 0


def target_table(opened: OpenCollection, profile: Profile) -> ModelTable:
    """The table that this profile's vectors have, or would have."""
    name, digest = opened.collection.name, fingerprint(profile, opened.settings.state_dir)
    return ModelTable(name, digest, profile.dimensions, opened.active.table.storage)


def price(opened: OpenCollection, profile: Profile) -> Price:
    """Encodes a sample of the texts, so it takes some seconds and the model's memory. Writes nothing."""
    table = target_table(opened, profile)
    there = table.fingerprint in {model.table.fingerprint for model in opened.ledger.beside()}
    with opened.database.connect(autocommit=True) as connection:
        lacking = sql.SQL("NOT EXISTS (SELECT FROM {} WHERE text_id = text.id)").format(table.identifier)
        counted = sql.SQL(load_sql("migrate/to_encode")).format(
            text=table.tables.text, lacking=lacking if there else sql.SQL("true")
        )
        row = connection.execute(counted, {"sample": SAMPLE_TEXTS}).fetchone()
    assert row is not None
    texts, sample = row
    tokens, seconds = 0, 0.0
    if sample:
        encoder = load_encoder(profile)
        encoder.encode_documents(sample[:1])  # the first pass is slower than those to come
        began = time.perf_counter()
        encoder.encode_documents(sample)
        seconds = (time.perf_counter() - began) * texts / len(sample)
        tokens = round(int(encoder.count_tokens(sample).sum()) * texts / len(sample))
    method = opened.collection.config.index.method
    return Price(texts, tokens, round(seconds, 1), 0 if there else needed_bytes(texts, table, method))


def plan(opened: OpenCollection, profile: Profile) -> list[Planned]:
    """Every statement that changes something, in order. Does nothing."""
    of, to = opened.active.table, target_table(opened, profile)
    config = opened.collection.config
    with opened.database.connect(autocommit=True) as connection:
        count = sql.SQL("SELECT count(*) FROM {} WHERE NOT blank").format(to.tables.text)
        row = connection.execute(count).fetchone()
        texts = row[0] if row else 0
        rows = needed_bytes(texts, to, "none")
        whole = needed_bytes(texts, to, config.index.method)

        values = {
            "collection": to.collection,
            "from": of.fingerprint,
            "to": to.fingerprint,
            "dimension": to.dimension,
            "storage": to.storage,
        }

        def said(
            step: str,
            statement: sql.Composable | str,
            lock: str,
            seconds: float = AT_ONCE,
            size: int = 0,
            **others: str,
        ) -> Planned:
            return Planned(step, _readable(connection, statement, {**values, **others}), lock, seconds, size)

        own = f"of embeddings.{to.name}"
        planned = [
            said("expand", one, f"ACCESS EXCLUSIVE {own}, which is new") for one in _parts(to.create_statement())
        ]
        planned.append(
            said("expand", load_sql("migrate/model"), "ROW EXCLUSIVE of embeddings.model", fingerprint=to.fingerprint)
        )
        planned.append(said("expand", load_sql("migrate/begin"), "ROW EXCLUSIVE of embeddings.migration"))
        columns = ("text_id", "vector_name", "content_hash", "embedding")
        planned.append(
            said(
                "backfill",
                copy_statement(to.identifier, columns),
                f"ROW EXCLUSIVE {own}, and the batch's advisory lock",
                texts / WRITTEN_PER_SECOND,
                rows,
            )
        )
        planned.append(
            said("backfill", load_sql("fill/done"), "ROW EXCLUSIVE of embeddings.fill", fingerprint=to.fingerprint)
        )
        indexes = index_statements(to, config.index, list(config.vectors), texts)
        for statement in indexes:
            seconds = texts / max(1, len(indexes)) / INDEXED_PER_SECOND * to.dimension / 384
            lock = f"SHARE UPDATE EXCLUSIVE {own}"
            planned.append(said("swap", statement, lock, seconds, round((whole - rows) / len(indexes))))
        own_row = "ROW EXCLUSIVE of embeddings.migration"
        row_lock = "ROW EXCLUSIVE of embeddings.collection: landings wait for the end of the transaction"
        planned.append(said("swap", load_sql("migrate/flip"), row_lock))
        planned.append(
            said("swap", load_sql("migrate/unfilled"), "ACCESS SHARE of embeddings.batch and embeddings.fill")
        )
        planned.append(said("swap", load_sql("migrate/exchange_files"), "ROW EXCLUSIVE of embeddings.fill, .batch"))
        planned.append(said("swap", load_sql("migrate/swapped"), own_row, phase="swapped", from_phase="expanded"))
        view, marker = swap_statements(of, to)
        planned.append(said("swap", view, f"ACCESS EXCLUSIVE of the view embeddings.{to.collection}"))
        planned.append(said("swap", marker, "ACCESS EXCLUSIVE of the marker, an empty table"))
        planned.append(said("contract", load_sql("migrate/swapped"), own_row, phase="contracted", from_phase="swapped"))
        forgotten = "ROW EXCLUSIVE of embeddings.model, .fill and .quarantine"
        planned.append(said("contract", load_sql("migrate/forget"), forgotten, fingerprint=of.fingerprint))
        former = -needed_bytes(texts, of, config.index.method)
        drop = of.statement("migrate/drop")
        planned.append(said("contract", drop, f"ACCESS EXCLUSIVE of embeddings.{of.name}", AT_ONCE, former))
    return planned


def _parts(statements: sql.Composed) -> list[sql.Composable]:
    """The single statements of a file that holds several."""
    text = statements.as_string(None)
    return [sql.SQL(one) for one in re.sub(r"--[^\n]*", "", text).split(";") if one.strip()]


def _readable(connection: psycopg.Connection, statement: sql.Composable | str, values: Mapping[str, Any]) -> str:
    """One line, without comments; what is not known before is a `:name`."""
    text = statement if isinstance(statement, str) else statement.as_string(connection)
    text = " ".join(re.sub(r"--[^\n]*", "", text).split()).rstrip(";")

    def value(found: re.Match[str]) -> str:
        name = found[1]
        return sql.Literal(values[name]).as_string(connection) if name in values else f":{name}"

    return re.sub(r"%\((\w+)\)s", value, text)
