"""What a published FAISS generation is to the database as it is now: current, behind, of another model, or foreign.

A generation carries what it was made from: database, epoch, version, and the version's random stamp. A count comes
again once the database has gone back (restored from a backup, failed over to a server that lacked the last commits); a
stamp does not. Text ids come again as well, so nothing may be looked up in a foreign generation.
"""

from enum import StrEnum
from typing import Protocol

import psycopg

from embeddings_pipeline.index.faiss_read import Manifest
from embeddings_pipeline.index.snapshot import table_version
from embeddings_pipeline.store.sql import load_sql

OF_ANOTHER_DATABASE = (
    "of another database (was DATABASE_URL changed? databases that share a state folder replace each other's index: "
    "give each its own, EMBEDDINGS_STATE_DIR)"
)


class Published(Protocol):
    """What is published from a model table: a generation, or a map."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def database(self) -> str: ...
    @property
    def epoch(self) -> str: ...
    @property
    def version(self) -> int: ...
    @property
    def stamp(self) -> str: ...


class Standing(StrEnum):
    """Of a generation, as the database sees it."""

    MISSING = "missing"
    CURRENT = "current"  # it holds exactly what the current model table holds
    BEHIND = "behind"  # what the table held some versions ago: its text ids are the table's
    OTHER_MODEL = "of another model"
    FOREIGN = "foreign"  # of another database, or of a state that this one does not have any more


def standing(connection: psycopg.Connection, collection: str, manifest: Published | None) -> Standing:
    """How the generation stands. Read the manifest first: one that is published meanwhile may be of a newer version.

    VectorIndexError if the database has no such collection.
    """
    if manifest is None:
        return Standing.MISSING
    now = table_version(connection, collection)
    if (manifest.database, manifest.epoch) != (now.database, now.epoch):
        return Standing.FOREIGN
    if manifest.stamp != now.stamp:
        former = {"collection": collection, "version": manifest.version, "stamp": manifest.stamp}
        if connection.execute(load_sql("faiss/was"), former).fetchone() != (True,):
            return Standing.FOREIGN
    if manifest.fingerprint != now.fingerprint:
        return Standing.OTHER_MODEL
    return Standing.CURRENT if manifest.stamp == now.stamp else Standing.BEHIND


def why_foreign(connection: psycopg.Connection, manifest: Manifest) -> str:
    """In words, why a foreign generation is not used."""
    now = table_version(connection, manifest.collection)
    if manifest.database != now.database:
        return OF_ANOTHER_DATABASE
    if manifest.epoch != now.epoch:
        return "of tables that were made anew since"
    return "of a state that the database no longer has (was it restored from a backup?)"
