"""Texts that are longer than a model reads: noted when they are embedded, counted while they are there."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from psycopg import errors

from embeddings_pipeline.ledger.base import LedgerBase
from embeddings_pipeline.store.sql import load_sql

TOGETHER = 1000  # texts read at once


@dataclass(frozen=True)
class Truncation:
    """How many of a collection's texts lose their ends under a model."""

    texts: int  # blank ones aside
    truncated: int
    longest: int  # in tokens, of the truncated ones; 0 for none
    known: bool = True  # False: texts that were embedded before this was noted have not been looked at

    @property
    def share(self) -> float:
        return self.truncated / self.texts if self.texts else 0.0


class Truncated(LedgerBase):
    """The part of the ledger that knows texts which are too long."""

    def note_truncated(self, fingerprint: str, tokens: Mapping[bytes, int]) -> None:
        """Note texts that are longer than this model reads: content hash → number of tokens."""
        if not tokens:
            return
        parameters = {"content_hashes": list(tokens), "tokens": list(tokens.values())}
        with self.database.session() as connection:
            connection.execute(
                load_sql("truncated/note"), {"collection": self.name, "fingerprint": fingerprint, **parameters}
            )

    def truncation(self, fingerprint: str) -> Truncation:
        """How many texts there are, and how many of them are longer than this model reads."""
        parameters = {"collection": self.name, "fingerprint": fingerprint}
        try:
            with self.database.session() as connection:
                row = connection.execute(self.tables.statement("truncated/count"), parameters).fetchone()
        except (errors.UndefinedTable, errors.UndefinedColumn):  # whoever only looks brings no schema up to date
            return Truncation(0, 0, 0, known=False)
        assert row is not None
        return Truncation(*row)

    def all_texts(self) -> Iterator[dict[bytes, str]]:
        """Every text, blank ones aside, by content hash, some at a time."""
        with self.database.connect() as connection, connection.cursor("texts") as cursor:
            cursor.execute(self.tables.statement("truncated/texts"))
            while rows := cursor.fetchmany(TOGETHER):
                yield dict(rows)

    def lengths_known(self, fingerprint: str) -> None:
        """Note that each text was looked at under this model."""
        parameters = {"collection": self.name, "fingerprint": fingerprint}
        with self.database.session() as connection:
            connection.execute(load_sql("truncated/known"), parameters)

    def forget_truncated(self) -> None:
        """Forget texts that are long gone."""
        with self.database.session() as connection:
            connection.execute(self.tables.statement("truncated/forget"), {"collection": self.name})
