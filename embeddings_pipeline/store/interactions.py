"""What people did with items, read from the table or query of `interactions:`. Nothing is ever written to it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

import psycopg
from psycopg import sql

from embeddings_pipeline.config.recommending import InteractionsDefinition
from embeddings_pipeline.errors import ConfigurationError, SourceError, did_you_mean, shown
from embeddings_pipeline.store.session import RUN_LIMITS, ReadLimits, reading
from embeddings_pipeline.store.source import Source
from embeddings_pipeline.store.source_sql import (
    TIMESTAMPS,
    column_of,
    column_types,
    key_of,
    primary,
    relation_of,
)
from embeddings_pipeline.store.sql import load_sql

PERSON_LIMITS = ReadLimits(lock_seconds=2, statement_seconds=10)  # somebody waits
ROWS_AT_ONCE = 10_000
NUMBERS = ("smallint", "integer", "bigint", "numeric", "real", "double precision", "boolean")


class Interaction(NamedTuple):
    """That somebody did something with an item: liked it (above 0) or not (below), and when."""

    item_key: str
    weight: float
    at: datetime | None


@dataclass(frozen=True)
class Interactions:
    """The interactions of a collection."""

    source: Source

    @property
    def _config(self) -> InteractionsDefinition:
        config = self.source.definition.attributes.interactions
        if config is None:
            raise ConfigurationError(
                f"collection {self._name!r}: nobody's history is known: declare `interactions:` in {self._file}, or "
                "give the history with the call"
            )
        return config

    def of_user(self, user: object, most: int) -> list[Interaction]:
        """A person's interactions, newest first; none of somebody unknown. SourceError, ConfigurationError."""
        with self._reading(PERSON_LIMITS) as connection:
            parts, types = self._parts(connection)
            asked = sql.SQL("CAST({} AS {})").format(sql.Literal(str(user)), sql.SQL(types[self._config.user]))
            statement = sql.SQL(load_sql("interactions/of_user")).format(**parts, asked=asked, most=sql.Literal(most))
            try:
                rows = connection.execute(statement).fetchall()
            except psycopg.errors.DataError as error:
                kind = f"of type {types[self._config.user]}"
                raise ConfigurationError(
                    f"collection {self._name!r}: user {shown(user)}: {primary(error)}; `interactions.user:` is a "
                    f"column {kind}"
                ) from error
        return [Interaction(key, weight, at) for key, weight, at in rows if math.isfinite(weight)]

    def liked(self) -> Iterator[list[tuple[str, str]]]:
        """Who liked what, as (user, item_key), each pair once, some thousand at a time. SourceError."""
        with self._reading(RUN_LIMITS) as connection, connection.cursor("liked") as cursor:
            parts, _ = self._parts(connection)
            cursor.execute(sql.SQL(load_sql("interactions/liked")).format(**parts))
            while rows := cursor.fetchmany(ROWS_AT_ONCE):
                yield rows

    def _parts(self, connection: psycopg.Connection) -> tuple[dict[str, sql.Composable], dict[str, str]]:
        """The parts of statements, and column → type."""
        config, relation = self._config, relation_of(self._config)
        named = [name for name in (config.user, *config.item, config.weight, config.at) if name]
        types = column_types(connection, relation, named)
        for name in named:
            if name not in types:
                raise SourceError(
                    f"collection {self._name!r}: `interactions:` names a column {name!r} that is not there"
                    f"{did_you_mean(name, types)}; correct it in {self._file}"
                )
        weight: sql.Composable = sql.SQL("1::double precision")
        if config.weight:
            self._check_type("weight", config.weight, types, NUMBERS, "a number")
            number = "{}::integer::double precision" if types[config.weight] == "boolean" else "{}::double precision"
            weight = sql.SQL(f"coalesce(nullif({number}, 'NaN') - {{}}::double precision, 0)").format(
                column_of(config.weight), sql.Literal(config.neutral)
            )
        at: sql.Composable = sql.SQL("NULL::timestamptz")
        if config.at:
            self._check_type("at", config.at, types, (*TIMESTAMPS, "date"), "a timestamp")
            at = sql.SQL("{}::timestamptz").format(column_of(config.at))
        parts = {"relation": relation, "user": column_of(config.user), "key": key_of(config.item)}
        return {**parts, "weight": weight, "at": at}, types

    def _check_type(self, what: str, name: str, types: dict[str, str], known: tuple[str, ...], wanted: str) -> None:
        if types[name].split("(")[0] not in known:
            raise SourceError(
                f"collection {self._name!r}: `interactions.{what}:` names {name!r} of type {types[name]}, which is not "
                f"{wanted}; correct it in {self._file}"
            )

    @contextmanager
    def _reading(self, limits: ReadLimits) -> Iterator[psycopg.Connection]:
        config = self._config
        some_rows_do = self.source.definition.attributes.source.row_security
        with self.source.connect() as connection:
            try:
                with reading(connection, limits, some_rows_do=some_rows_do):
                    yield connection
            except psycopg.Error as error:
                what = f"table {config.table!r}" if config.table else "the query"
                raise SourceError(
                    f"collection {self._name!r}: `interactions:` cannot be read from {what}: {primary(error)}; correct "
                    f"it in {self._file}"
                ) from error

    @property
    def _name(self) -> str:
        return self.source.definition.name

    @property
    def _file(self) -> str:
        return str(self.source.definition.path or "defs.yaml")
