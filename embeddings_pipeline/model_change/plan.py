"""What a change of the model would do, before anything is done: its price, and its statements with their locks."""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from embeddings_pipeline.config.definition import CollectionAttributes
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.encoders import load_encoder
from embeddings_pipeline.errors import ModelChangeError
from embeddings_pipeline.index.pgvector import column_indexes, index_statements
from embeddings_pipeline.model_change.phases import (
    NOTE_GATE,
    candidate_destination,
    needed_bytes,
    show_statements,
)
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.store.copy_binary import copy_statement
from embeddings_pipeline.store.destination.column import ColumnDestination
from embeddings_pipeline.store.destination.table import TableDestination
from embeddings_pipeline.store.locks import vacuum_lock
from embeddings_pipeline.store.sql import load_sql

SAMPLE_TEXTS = 64  # encoded to see how fast the model is here
WRITTEN_PER_SECOND = 20_000  # rows, through the lake; see BENCHMARKS.md
BACKFILLED_PER_SECOND = {"": 6_000, "ivfflat": 6_000, "hnsw": 2_500}  # rows of a user's own table, by the index on it
INDEXED_PER_SECOND = 3_000  # vectors of 384 dimensions into HNSW
LOOKED_PER_SECOND = 300_000  # texts, whether each has its vector
AT_ONCE = 0.01  # seconds of a statement whose time does not grow with the table


@dataclass(frozen=True)
class Price:
    """What backfilling the next model takes. Tokens and seconds are estimates from a sample of the texts."""

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


def price(collection: Collection, profile: Profile) -> Price:
    """Encodes a sample of the texts, so it takes some seconds and the model's memory. Writes nothing."""
    table = candidate_destination(collection, profile)
    there = table.fingerprint in {model.table.fingerprint for model in collection.ledger.shadow_models()}
    with collection.database.connect(autocommit=True) as connection:
        lacking = sql.SQL("NOT EXISTS (SELECT FROM {} WHERE text_id = text.id)").format(table.identifier)
        counted = table.statement("model_change/to_encode", lacking=lacking if there else sql.SQL("true"))
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
    method = collection.definition.attributes.index.method
    return Price(texts, tokens, round(seconds, 1), 0 if there else needed_bytes(texts, table, method))


def plan(collection: Collection, profile: Profile) -> list[Planned]:
    """Every statement that changes something, in order. Does nothing. ModelChangeError where it is current already."""
    of, to = collection.current.table, candidate_destination(collection, profile)
    if of.fingerprint == to.fingerprint:
        raise ModelChangeError(f"collection {to.collection!r}: profile {profile.name!r} is its current model already")
    config = collection.definition.attributes
    with collection.database.connect(autocommit=True) as connection:
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

        where: _Tables | _Columns = _Tables(of, to, config)
        if isinstance(of, ColumnDestination) and isinstance(to, ColumnDestination):
            where = _Columns(of, to, config, connection, texts)

        def kept_out(step: str, *tables: sql.Identifier) -> list[Planned]:
            only = "SHARE UPDATE EXCLUSIVE, which only VACUUM and the like wait for"
            return [said(step, vacuum_lock(table), only) for table in tables]

        own_row = "ROW EXCLUSIVE of embeddings.model_change"
        made = [said("expand", statement, lock) for statement, lock in where.made()]
        noted = [
            said(
                "expand",
                load_sql("model_change/model"),
                "ROW EXCLUSIVE of embeddings.model",
                fingerprint=to.fingerprint,
            ),
            said("expand", load_sql("model_change/begin"), own_row),
        ]
        # What excludes others comes last, so that it is short.
        planned = made + noted
        if isinstance(where, _Columns):
            planned = [*kept_out("expand", where.to.relation), *noted, *made]
        planned += [said("backfill", statement, lock) for statement, lock in where.prepared()]
        planned.append(said("backfill", *where.written(), texts / where.written_per_second(), rows))
        planned.append(
            said(
                "backfill",
                load_sql("backfill/done"),
                "ROW EXCLUSIVE of embeddings.backfill",
                fingerprint=to.fingerprint,
            )
        )
        planned += [said("backfill", statement, lock) for statement, lock in where.restored()]
        indexes = where.indexes(texts)
        for statement in indexes:
            seconds = texts / len(indexes) / INDEXED_PER_SECOND * to.dimension / 384
            lock = f"SHARE UPDATE EXCLUSIVE {where.own}"
            planned.append(said("swap", statement, lock, seconds, round((whole - rows) / len(indexes))))
        marked = to.statement("model_change/mark_lacking")
        backfill_lock = "ROW EXCLUSIVE of embeddings.backfill"
        planned.append(said("swap", marked, backfill_lock, texts / LOOKED_PER_SECOND, fingerprint=to.fingerprint))
        planned.append(said("swap", NOTE_GATE, own_row))
        users = [where.of.relation] if isinstance(where, _Columns) else []
        planned += kept_out("swap", *users, of.marker)
        row_lock = "ROW EXCLUSIVE of embeddings.collection: commits wait for the end of the transaction"
        planned.append(said("swap", load_sql("model_change/flip"), row_lock))
        planned.append(
            said(
                "swap", load_sql("model_change/incomplete"), "ACCESS SHARE of embeddings.batch and embeddings.backfill"
            )
        )
        planned.append(said("swap", load_sql("model_change/swapped"), own_row, phase="swapped", from_phase="expanded"))
        view, marker = show_statements(of, to)
        planned.append(said("swap", view, f"ACCESS EXCLUSIVE of the view embeddings.{to.collection}"))
        planned += [said("swap", statement, lock) for statement, lock in where.renamed()]
        planned.append(said("swap", marker, "ACCESS EXCLUSIVE of the marker, an empty table"))
        planned += kept_out("contract", *of.exclusive())
        planned.append(
            said("contract", load_sql("model_change/swapped"), own_row, phase="contracted", from_phase="swapped")
        )
        forgotten = "ROW EXCLUSIVE of embeddings.model, .backfill and .quarantine"
        planned.append(said("contract", load_sql("model_change/forget"), forgotten, fingerprint=of.fingerprint))
        former = -needed_bytes(texts, of, config.index.method)
        if isinstance(where, _Columns):  # what its vectors take is free again when VACUUM FULL or pg_repack has run
            former += needed_bytes(texts, of, "none")
        *others, last = where.dropped()
        planned += [said("contract", statement, lock) for statement, lock in others]
        planned.append(said("contract", *last, AT_ONCE, former))
    return planned


_Step = tuple[sql.Composable, str]  # a statement, and its lock


@dataclass(frozen=True)
class _Tables:
    """What is done where each model has a table of our own."""

    of: TableDestination
    to: TableDestination
    config: CollectionAttributes

    @property
    def own(self) -> str:
        return f"of embeddings.{self.to.name}"

    def made(self) -> list[_Step]:
        return [(one, f"ACCESS EXCLUSIVE {self.own}, which is new") for one in _parts(self.to.create_statement())]

    def prepared(self) -> list[_Step]:
        return []

    def restored(self) -> list[_Step]:
        return []

    def written(self) -> _Step:
        columns = ("text_id", "vector_name", "content_hash", "embedding")
        return copy_statement(self.to.identifier, columns), f"ROW EXCLUSIVE {self.own}, and the batch's advisory lock"

    def written_per_second(self) -> int:
        return WRITTEN_PER_SECOND

    def indexes(self, texts: int) -> list[sql.Composed]:
        return index_statements(self.to, self.config.index, list(self.config.vectors), texts)

    def renamed(self) -> list[_Step]:
        return []

    def dropped(self) -> list[_Step]:
        view, table = _parts(self.of.drop_statement())
        return [
            (view, "ACCESS EXCLUSIVE of it, which is ours"),
            (table, f"ACCESS EXCLUSIVE of embeddings.{self.of.name}"),
        ]


@dataclass(frozen=True)
class _Columns:
    """The same where each model has a column of the user's own table."""

    of: ColumnDestination
    to: ColumnDestination
    config: CollectionAttributes
    connection: psycopg.Connection
    texts: int

    @property
    def own(self) -> str:
        return f"of {self.to.declared.table}"

    def made(self) -> list[_Step]:
        column, create = self.to.add_statements()
        new = [(one, f"ACCESS SHARE {self.own}; the rest is new") for one in _parts(create)]
        return [(column, f"ACCESS EXCLUSIVE {self.own}"), *new]

    def prepared(self) -> list[_Step]:
        return self._altered("SET (toast_tuple_target = :bytes)", ":what_it_was")

    def restored(self) -> list[_Step]:
        return self._altered("RESET (toast_tuple_target)", "NULL")

    def _altered(self, change: str, said: str) -> list[_Step]:
        comment, alter = self.to.alter_statements(change, sql.SQL(said))
        own = "SHARE UPDATE EXCLUSIVE of a table of ours"
        return [(comment, own), (alter, f"SHARE UPDATE EXCLUSIVE {self.own}, which only VACUUM and the like wait for")]

    def written(self) -> _Step:
        return self.to.backfill_statement(), f"ROW EXCLUSIVE {self.own}, and its rows, a batch at a time"

    def written_per_second(self) -> int:
        indexes = self.of.indexes(self.connection, self.of.column(self.connection))
        return min((BACKFILLED_PER_SECOND[index.method] for index in indexes), default=BACKFILLED_PER_SECOND[""])

    def indexes(self, texts: int) -> list[sql.Composed]:
        return list(self._coming().values())

    def _coming(self) -> dict[str, sql.Composed]:
        return column_indexes(self.connection, self.to, self.config.index, self.to.next_column, self.texts)

    def renamed(self) -> list[_Step]:
        column = self.of.column(self.connection)
        statements = self.of.renames(self.connection, self.to, column, self.to.next_column, coming=list(self._coming()))
        light = "SHARE UPDATE EXCLUSIVE of the index"
        return [
            (one, light if "ALTER INDEX" in one.as_string(None) else f"ACCESS EXCLUSIVE {self.own}")
            for one in statements
        ]

    def dropped(self) -> list[_Step]:
        ours, column = self.of.removal(self.of.previous_column)
        views = [(one, "ACCESS EXCLUSIVE of it, which is ours") for one in _parts(ours)]
        return [*views, (column, f"ACCESS EXCLUSIVE {self.own}")]


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
