"""Poison texts: they fail by themselves, are excused under one model, and are tried again later (rule 7)."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from embeddings_pipeline.ledger.base import LedgerBase
from embeddings_pipeline.store.locks import lock_batch
from embeddings_pipeline.store.sql import load_sql

log = logging.getLogger(__name__)

FIRST_TEXT_WAIT, LONGEST_TEXT_WAIT = timedelta(minutes=10), timedelta(days=1)
"""A poison text is tried again after 10, 40, 160 … minutes, at most a day later, until its attempts
(`quarantine.attempts:`) are used up.
"""


@dataclass(frozen=True)
class QuarantineEntry:
    """A poison text, and an item that has it (None: no longer any)."""

    content_hash: str  # hexadecimal
    item_key: str | None
    items: int  # that lack a vector because of it
    reason: str
    attempts: int
    last_try: datetime
    next_try: datetime | None  # None: given up
    text: str
    profile: str  # of the model that it failed with


class Quarantine(LedgerBase):
    """The part of the ledger that knows poison texts."""

    @property
    def _attempts(self) -> int:
        return self.definition.attributes.quarantine.attempts

    def quarantine(self, fingerprint: str, bad: Mapping[bytes, tuple[str, str]]) -> None:
        """Put bad texts (content hash → text and reason) into quarantine. The commit takes out what went well."""
        if not bad:
            return
        waits = {"first": FIRST_TEXT_WAIT, "longest": LONGEST_TEXT_WAIT}
        with self.database.connect() as connection:
            for digest, (text, reason) in bad.items():
                log.warning("collection %r: a text went to quarantine: %s", self.name, reason)
                parameters: dict[str, Any] = {"collection": self.name, "fingerprint": fingerprint, **waits}
                parameters |= {"content_hash": digest, "text": text, "reason": reason}
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
        with self.database.connect(autocommit=True) as connection:
            return {row[0] for row in connection.execute(load_sql("quarantine/among"), parameters)}

    def quarantine_entries(self, *, every_model: bool = False) -> list[QuarantineEntry]:
        """What is in quarantine under the current model, newest first; `every_model`: then what is under shadow
        models.
        """
        current = self.current()
        if current is None:
            return []
        parameters = {"collection": self.name, "attempts": self._attempts}
        entries = []
        with self.database.connect(autocommit=True) as connection:
            for model in [current, *(self.shadow_models() if every_model else [])]:
                own = {**parameters, "fingerprint": model.destination.fingerprint, "profile": model.profile.name}
                rows = connection.execute(model.destination.statement("quarantine/list"), own).fetchall()
                entries += [QuarantineEntry(*row) for row in rows]
        return entries

    def quarantine_retry(self, content_hashes: Sequence[bytes] | None = None) -> int:
        """Have these texts (None: all) tried with the next run, with as many attempts as a new one; how many."""
        with self.database.connect(autocommit=True) as connection:
            return connection.execute(load_sql("quarantine/retry"), self._chosen(content_hashes)).rowcount

    def quarantine_clear(self, content_hashes: Sequence[bytes] | None = None) -> int:
        """Forget these texts (None: all), which are new ones then: their items are dirty. How many."""
        parameters = self._chosen(content_hashes)
        with self.database.connect(autocommit=True) as connection:
            batches = [row[0] for row in connection.execute(self.tables.statement("quarantine/batches"), parameters)]
            with connection.transaction():
                for batch in batches:
                    lock_batch(connection, self.name, batch)
                connection.execute(self.tables.statement("quarantine/suspect"), parameters)
                connection.execute(load_sql("quarantine/look_again"), {**parameters, "batches": batches})
                return connection.execute(load_sql("quarantine/clear"), parameters).rowcount

    def _chosen(self, content_hashes: Sequence[bytes] | None) -> dict[str, Any]:
        chosen = None if content_hashes is None else list(content_hashes)
        return {"collection": self.name, "content_hashes": chosen}
