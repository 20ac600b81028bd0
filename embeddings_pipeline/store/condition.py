"""A condition on items, as a part of statements."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from psycopg import sql

from embeddings_pipeline.store.destination.base import CollectionTables

NOTHING = sql.SQL("")


@dataclass(frozen=True)
class Condition:
    """What is asked of the table {item}, called `item`, and the parameters of that; columns: of the payload."""

    statement: sql.Composable
    parameters: Mapping[str, Any] = field(default_factory=dict)
    columns: frozenset[str] = frozenset()

    def parts(self, tables: CollectionTables) -> dict[str, sql.Composable]:
        """{joined} and {matching} of a statement that reads a model's vectors, called `vector`."""
        joined = sql.SQL(
            "JOIN {text} AS text ON text.id = vector.text_id JOIN {item} AS item ON item.item_key = text.item_key"
        )
        return {
            "joined": joined.format(text=tables.text, item=tables.item),
            "matching": sql.SQL("AND ({})").format(self.statement),
        }


def parts_of(condition: Condition | None, tables: CollectionTables) -> dict[str, sql.Composable]:
    """{joined} and {matching} of a statement, both empty without a condition."""
    return condition.parts(tables) if condition else {"joined": NOTHING, "matching": NOTHING}
