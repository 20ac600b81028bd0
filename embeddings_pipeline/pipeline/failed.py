"""Items that fail as a whole: their rows cannot be read, rendered or stored.

They go from step to step in the metadata of the lake's files, and the commit puts them into quarantine.
"""

import json
from collections.abc import Mapping
from typing import NamedTuple

import psycopg
import pyarrow as pa

from embeddings_pipeline.config.templates import clean
from embeddings_pipeline.errors import ConfigurationError
from embeddings_pipeline.store.halves import is_of_data, is_of_its_value
from embeddings_pipeline.store.lake import FAILED_ITEMS

REASON_CHARACTERS = 300


class FailedItem(NamedTuple):
    """Why an item has no texts."""

    row_hash: bytes
    step: str  # read, render or store
    reason: str


def with_failed(table: pa.Table, definition_hash: Mapping[bytes, bytes], failed: Mapping[str, FailedItem]) -> pa.Table:
    """The table with metadata that says which items are not in it."""
    values = {key: (item.row_hash.hex(), item.step, item.reason) for key, item in failed.items()}
    return table.replace_schema_metadata({**definition_hash, FAILED_ITEMS: json.dumps(values).encode()})


def failed_items(table: pa.Table) -> dict[str, FailedItem]:
    """What `with_failed` noted."""
    values = json.loads((table.schema.metadata or {}).get(FAILED_ITEMS, b"{}"))
    return {key: FailedItem(bytes.fromhex(digest), step, reason) for key, (digest, step, reason) in values.items()}


def is_of_an_item(error: Exception) -> bool:
    """Whether a commit failed because of what an item holds: the database, or the user's own table, refused a value."""
    return is_of_data(_cause(error))


def is_certainly_of_an_item(error: Exception) -> bool:
    """Whether that stands though no item of a batch is taken."""
    return is_of_its_value(_cause(error))


def _cause(error: Exception) -> BaseException | None:
    return error.__cause__ if isinstance(error, ConfigurationError) else error


def reason_of(error: BaseException) -> str:
    """One line for people, and for the database."""
    return clean(_words_of(error))


def _words_of(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "its JSON is nested too deeply to be written as text"
    if isinstance(error, psycopg.Error) and error.diag.message_primary:
        return " ".join(error.diag.message_primary.split())[:REASON_CHARACTERS]
    lines = str(error).strip().splitlines()
    said = lines[0][:REASON_CHARACTERS] if lines else ""
    return said if isinstance(error, ConfigurationError) else f"{type(error).__name__}: {said}"
