"""A condition on items, as a part of statements."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from psycopg import sql

from embeddings_pipeline.store.destination.base import CollectionTables

NOTHING = sql.SQL("")


@dataclass(frozen=True)
class Condition:
    """What is asked of the table {item}, called `item`, and the parameters of that."""

    statement: sql.Composable
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def joined(self, tables: CollectionTables) -> dict[str, sql.Composable]:
        """{joined} and {matching} of a statement that reads a model's vectors, called `vector`: who matches is found in
        the way that PostgreSQL's planner likes best.
        """
        items = sql.SQL("JOIN {text} AS text ON text.id = vector.text_id {item}")
        return {
            "joined": items.format(text=tables.text, item=_join_item(tables)),
            "matching": sql.SQL("AND ({})").format(self.statement),
        }

    def asked(self, tables: CollectionTables) -> dict[str, sql.Composable]:
        """The same for one vector after another, in the order in which an ANN index gives them: with OFFSET the planner
        makes no join of it, since it does not know how soon there are enough.
        """
        exists = sql.SQL(
            "AND EXISTS (SELECT FROM {text} AS text {item} WHERE text.id = vector.text_id AND ({condition}) OFFSET 0)"
        )
        matching = exists.format(text=tables.text, item=_join_item(tables), condition=self.statement)
        return {"joined": NOTHING, "matching": matching}


def _join_item(tables: CollectionTables) -> sql.Composed:
    return sql.SQL("JOIN {} AS item ON item.item_key = text.item_key").format(tables.item)


def parts_of(
    condition: Condition | None, tables: CollectionTables, *, one_by_one: bool = False
) -> dict[str, sql.Composable]:
    """{joined} and {matching} of a statement, both empty without a condition."""
    if condition is None:
        return {"joined": NOTHING, "matching": NOTHING}
    return condition.asked(tables) if one_by_one else condition.joined(tables)
