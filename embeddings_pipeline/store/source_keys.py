"""The keys of a source's rows: of rows that hide them too, and keys that no item can have.

What a volatile function of a view raises for one row, and bytes that are no text, stop every statement that comes by
their row, also one that asks for its key alone. So the rows are asked for by ranges of a hash of their keys, in halves,
until each such row is alone; then an error that is raised on purpose tells its key.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NamedTuple

import psycopg
from psycopg import sql

from embeddings_pipeline.errors import SourceError
from embeddings_pipeline.store.halves import is_of_data
from embeddings_pipeline.store.source_rows import ScannedRow
from embeddings_pipeline.store.source_sql import primary
from embeddings_pipeline.store.sql import load_sql
from embeddings_pipeline.wording import counted

MAX_KEY_BYTES = 2000  # a B-tree entry of PostgreSQL holds about 2,700
MOST_HIDDEN = 20  # rows that hide their keys: each is found with some sixty reads of a part of the source
SHOWN_CHARACTERS = 60


class LeftOut(NamedTuple):
    """Rows that a read leaves out, since they would stop it: items by their keys, and keys that no item can have."""

    item_keys: Sequence[str] = ()
    unusable: Sequence[ScannedRow] = ()

    def condition(self, key: sql.Composable) -> sql.Composable:
        """Which rows are read."""
        others = sql.SQL("{} <> ALL ({}::text[])").format(key, sql.Literal(list(self.item_keys)))
        return sql.SQL("{} AND NOT {}").format(others, _have_keys(key, self.unusable)) if self.unusable else others


NOTHING = LeftOut()


def too_long(item_key: str) -> ScannedRow | None:
    """What is told of a key that does not fit into an index; None for any other."""
    if len(item_key) <= MAX_KEY_BYTES // 4 or len(written := item_key.encode()) <= MAX_KEY_BYTES:
        return None
    return _unusable(written, f"its key has {len(written):,} bytes, and may have {MAX_KEY_BYTES:,}")


@dataclass(frozen=True)
class SourceKeys:
    """Asks a source for keys alone. `rows` gives the rows of a statement one by one, or raises SourceError."""

    key: sql.Composable
    columns: sql.Composable  # of the key
    where: sql.Composable
    relation: sql.Composable
    rows: Callable[[sql.Composable], Iterator[tuple[Any, ...]]]

    def all(self) -> tuple[list[str], list[ScannedRow]]:
        """The key of each row; of each whatever `where:` says, if it cannot be asked of one of them. And the keys of
        rows of the collection that no item can have.
        """
        keys: list[str] = []
        unusable: list[ScannedRow] = []
        if self._ask(self.where, keys) and self._ask(sql.SQL("true"), keys):
            last = f", the last of them with the key ({keys[-1]})" if keys else ""
            keys, unusable = self._by_ranges(f"it is read after {counted(len(keys), 'other')}{last}")
        usable = [key for key in keys if not too_long(key)]
        return usable, [*filter(None, map(too_long, keys)), *self.still_there(unusable)]

    def can_ask(self, condition: sql.Composable) -> bool:
        """Whether no row makes the condition fail."""
        return self._ask(condition, []) is None

    def still_there(self, unusable: Sequence[ScannedRow]) -> list[ScannedRow]:
        """Which of the rows with keys that no item can have are of the collection."""
        if not unusable:
            return []
        theirs = sql.SQL("CASE WHEN {} THEN ({}\n) END").format(_have_keys(self.key, unusable), self.where)
        digests: list[str] = []
        if self._ask(theirs, digests, sql.SQL(load_sql("source/key_digest")).format(key=self.key)):
            return list(unusable)
        return [row for row in unusable if row.row_hash.hex() in digests]

    def _ask(
        self, condition: sql.Composable, into: list[str], column: sql.Composable | None = None
    ) -> SourceError | None:
        """Put the keys (or another expression) of the rows that meet a condition into a list; of those before the first
        row that makes it fail, with its error.
        """
        parts = {"key": self.key, "columns": self.columns, "relation": self.relation, "condition": condition}
        return self._run(sql.SQL(load_sql("source/keys")).format(**parts, column=column or self.key), into)

    def _run(self, statement: sql.Composable, into: list[str]) -> SourceError | None:
        into.clear()
        try:
            for row in self.rows(statement):
                into.append(row[0])
        except SourceError as error:
            if not is_of_data(error.__cause__):
                raise
            return error
        return None

    def _by_ranges(self, place: str) -> tuple[list[str], list[ScannedRow]]:
        """All keys, also of rows that hide them. SourceError if a row does not tell its key either, or if more than
        MOST_HIDDEN hide theirs. `place`: where the first of them stands.
        """
        keys: list[str] = []
        unusable: list[ScannedRow] = []
        part: list[str] = []
        if error := self._ask(sql.SQL("{} IS NULL").format(self.key), part):  # such a row is in no range
            raise SourceError(f"{error}; {place}, and the view tells no row's key: mend it in the view itself")
        ranges, hidden = [(-(2**31), 2**31 - 1)], 0
        while ranges:
            low, high = ranges.pop()
            bounds = {"key": self.key, "low": sql.Literal(low), "high": sql.Literal(high)}
            error = self._ask(sql.SQL(load_sql("source/key_range")).format(**bounds), part)
            if error is None:
                keys += part
                continue
            if low < high:
                middle = (low + high) // 2
                ranges += [(middle + 1, high), (low, middle)]
                continue
            told = self._told(low)
            hidden += len(told)
            if not told or hidden > MOST_HIDDEN:
                many = f"so do more than {MOST_HIDDEN} rows" if told else "the view does not tell its key"
                raise SourceError(f"{error}; {place}, and {many}: mend it in the view itself")
            for written in told:
                statement = sql.SQL(load_sql("source/decoded")).format(written=sql.Literal(written))
                undecodable = self._run(statement, part)
                keys += part
                if undecodable:
                    reason = f"its key is no text: {_words_of(undecodable)}"
                    unusable.append(_unusable(bytes.fromhex(written), reason))
        return keys, unusable

    def _told(self, key_hash: int) -> list[str]:
        """In hexadecimal, the keys with a hash, one or more of which hide; none if the view keeps that back."""
        told: list[str] = []
        while True:
            parts = {"key": self.key, "hash": sql.Literal(key_hash), "told": sql.Literal(told)}
            error = self._ask(sql.SQL(load_sql("source/tell_key")).format(**parts), [])
            found = re.search(r"the key ([0-9a-f]+) hides", _words_of(error)) if error else None
            if not found:
                return told
            told.append(found[1])


def _have_keys(key: sql.Composable, unusable: Sequence[ScannedRow]) -> sql.Composable:
    digests = sql.Literal([row.row_hash.hex() for row in unusable])
    return sql.SQL(load_sql("source/have_keys")).format(key=key, digests=digests)


def _words_of(error: SourceError) -> str:
    return primary(error.__cause__) if isinstance(error.__cause__, psycopg.Error) else str(error)


def _unusable(written: bytes, reason: str) -> ScannedRow:
    """A key as people can read it, and no other has it."""
    digest = sha256(written).digest()
    text = written.decode(errors="backslashreplace")
    shown = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"
    return ScannedRow(f"{shown} (sha256 {digest.hex()[:12]})", digest, reason, is_item=False)
