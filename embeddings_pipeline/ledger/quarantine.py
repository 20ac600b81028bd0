"""Poison texts, each under one model, and items that fail as a whole: excused, and tried again later (rule 7)."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import psycopg

from embeddings_pipeline.config.templates import clean
from embeddings_pipeline.ledger.base import LedgerBase
from embeddings_pipeline.store.locks import lock_batch
from embeddings_pipeline.store.source_keys import LeftOut
from embeddings_pipeline.store.source_rows import ScannedRow
from embeddings_pipeline.store.sql import load_sql

log = logging.getLogger(__name__)

FIRST_TEXT_WAIT, LONGEST_TEXT_WAIT = timedelta(minutes=10), timedelta(days=1)
"""A poison text is tried again after 10, 40, 160 … minutes, at most a day later, until its attempts
(`quarantine.attempts:`) are used up.
"""


@dataclass(frozen=True)
class QuarantineEntry:
    """A poison text, and an item that has it (None: no longer any); or an item that fails as a whole."""

    content_hash: str  # hexadecimal; of an item, its row hash
    item_key: str | None
    items: int  # that lack a vector because of it
    step: str  # that failed: encode or store of a text; read, render or store of an item; key: no item can have it
    reason: str
    attempts: int
    last_try: datetime
    next_try: datetime | None  # None: given up, or looked at by each full scan
    text: str  # "": of an item
    profile: str | None  # of the model that a text failed with


class Quarantine(LedgerBase):
    """The part of the ledger that knows poison texts."""

    @property
    def _attempts(self) -> int:
        return self.definition.attributes.quarantine.attempts

    def quarantine(self, fingerprint: str, bad: Mapping[bytes, tuple[str, str]], *, step: str) -> None:
        """Put texts that failed at a step (content hash → text and reason) into quarantine. The commit takes out what
        went well.
        """
        if not bad:
            return
        waits = {"first": FIRST_TEXT_WAIT, "longest": LONGEST_TEXT_WAIT}
        with self.database.connect() as connection:
            for digest, (text, said) in bad.items():
                reason = clean(said)
                log.warning("collection %r: a text went to quarantine: %s", self.name, reason)
                parameters: dict[str, Any] = {"collection": self.name, "fingerprint": fingerprint, **waits}
                parameters |= {"content_hash": digest, "text": text, "step": step, "reason": reason}
                connection.execute(load_sql("quarantine/add"), parameters)

    def quarantined(self, fingerprint: str, content_hashes: Sequence[bytes], *, waiting: bool = False) -> set[bytes]:
        """Which of these are in quarantine under this fingerprint; `waiting`: and not to be tried now."""
        if not content_hashes:
            return set()
        parameters = {
            "collection": self.name,
            "fingerprint": fingerprint,
            "content_hashes": list(content_hashes),
            "waiting": waiting,
            "attempts": self._attempts,
            "longest": LONGEST_TEXT_WAIT,
        }
        with self.database.session() as connection:
            if not self.any_quarantined(connection, fingerprint):
                return set()
            return {row[0] for row in connection.execute(load_sql("quarantine/among"), parameters)}

    def any_quarantined(self, connection: psycopg.Connection, fingerprint: str) -> bool:
        """Whether any text is in quarantine under this fingerprint."""
        parameters = {"collection": self.name, "fingerprint": fingerprint}
        return connection.execute(load_sql("quarantine/any"), parameters).fetchone() is not None

    def waiting_items(self, batches: Sequence[int]) -> dict[str, tuple[bytes, str]]:
        """Item key → row hash and reason, of the batches' items that could not be stored, not to be tried now."""
        parameters: dict[str, Any] = {"collection": self.name, "batches": list(batches)}
        parameters |= {"attempts": self._attempts, "longest": LONGEST_TEXT_WAIT}
        with self.database.session() as connection:
            rows = connection.execute(self.tables.statement("quarantine/waiting_items"), parameters)
            return {item_key: (row_hash, reason) for item_key, row_hash, reason in rows}

    def left_out(self, connection: psycopg.Connection) -> LeftOut:
        """The rows that stopped a scan before: items whose rows could not be read, and keys that no item can have."""
        failed = connection.execute(load_sql("quarantine/unreadable"), {"collection": self.name}).fetchall()
        rows = [ScannedRow(*row) for row in failed]
        return LeftOut([row.item_key for row in rows if row.is_item], [row for row in rows if not row.is_item])

    def note_unusable_keys(self, connection: psycopg.Connection, unusable: Sequence[ScannedRow]) -> None:
        """What a full scan found of keys that no item can have: these, and no others, are in quarantine."""
        keys, hashes, reasons = zip(*(row[:3] for row in unusable), strict=True) if unusable else ((), (), ())
        parameters = {"collection": self.name, "item_keys": list(keys), "hashes": list(hashes)}
        parameters["reasons"] = [clean(reason) for reason in reasons]
        connection.execute(load_sql("quarantine/replace_unusable"), parameters)

    def note_failed_items(self, connection: psycopg.Connection) -> None:
        """Within a commit: what it found to fail as a whole goes into quarantine, and what did not leaves it."""
        waits = {"first": FIRST_TEXT_WAIT, "longest": LONGEST_TEXT_WAIT}
        parameters = {"collection": self.name, "attempts": self._attempts, **waits}
        connection.execute(load_sql("quarantine/add_items"), parameters)
        connection.execute(load_sql("quarantine/mended_items"), parameters)

    def quarantine_entries(self, *, every_model: bool = False) -> list[QuarantineEntry]:
        """What is in quarantine: items, and texts under the current model, newest first; `every_model`: then texts
        under shadow models.
        """
        current = self.current()
        if current is None:
            return []
        parameters = {"collection": self.name, "attempts": self._attempts}
        with self.database.session() as connection:
            items = connection.execute(load_sql("quarantine/list_items"), parameters).fetchall()
            entries = [QuarantineEntry(*row) for row in items]
            for model in [current, *(self.shadow_models() if every_model else [])]:
                own = {**parameters, "fingerprint": model.destination.fingerprint, "profile": model.profile.name}
                rows = connection.execute(model.destination.statement("quarantine/list"), own).fetchall()
                entries += [QuarantineEntry(*row) for row in rows]
        return entries

    def quarantine_retry(self, content_hashes: Sequence[bytes] | None = None) -> int:
        """Have these texts and items (None: all) tried with the next run, with as many attempts as new ones."""
        with self.database.session() as connection:
            [(count,)] = connection.execute(load_sql("quarantine/retry"), self._chosen(content_hashes)).fetchall()
        return int(count)

    def quarantine_clear(self, content_hashes: Sequence[bytes] | None = None) -> int:
        """Forget these texts and items (None: all), which are new then: the items are dirty. How many."""
        parameters = self._chosen(content_hashes)
        with self.database.session() as connection:
            batches = [row[0] for row in connection.execute(self.tables.statement("quarantine/batches"), parameters)]
            with connection.transaction():
                for batch in batches:
                    lock_batch(connection, self.name, batch)
                connection.execute(self.tables.statement("quarantine/suspect"), parameters)
                connection.execute(load_sql("quarantine/look_again"), {**parameters, "batches": batches})
                [(count,)] = connection.execute(load_sql("quarantine/clear"), parameters).fetchall()
        return int(count)

    def _chosen(self, content_hashes: Sequence[bytes] | None) -> dict[str, Any]:
        chosen = None if content_hashes is None else list(content_hashes)
        return {"collection": self.name, "content_hashes": chosen}
