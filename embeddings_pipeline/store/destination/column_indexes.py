"""The ANN indexes on a column of the user's table: which it is to have, and what they are called after a swap."""

from dataclasses import replace
from typing import TYPE_CHECKING

from psycopg import sql

from embeddings_pipeline.config.definition import IndexDefinition
from embeddings_pipeline.store.destination.base import Exchange, Layout
from embeddings_pipeline.store.destination.changes import Change
from embeddings_pipeline.store.destination.column_checks import LONGEST_NAME
from embeddings_pipeline.store.destination.indexes import (
    AnnIndex,
    IndexChange,
    build_memory,
    drop_index,
    index_parameters,
)

if TYPE_CHECKING:
    from embeddings_pipeline.store.destination.column import ColumnDestination


def index_changes(
    destination: "ColumnDestination", config: IndexDefinition, rows: int, own: Layout, current: Layout
) -> list[IndexChange]:
    """On the current column, one of the declared method if there is none; on another, indexes like those on the
    current one if none is declared.
    """
    wanted = _wanted_indexes(destination, config, rows, own, current)
    names = {index.name for index in wanted}
    # On the current model's column an invalid index may be one that somebody else is building.
    is_current = own.column == destination.declared.column
    broken = [index for index in own.indexes if not index.valid and (not is_current or index.name in names)]
    present = {index.name for index in own.indexes if index not in broken}
    changes = [drop_index(index) for index in broken]
    for index in wanted:
        if index.name not in present:
            statement = _create_index(destination, own.column, index)
            memory = build_memory(destination, index.parameters, rows)
            changes.append(IndexChange("create", index, statement, "missing", memory))
    return changes


def _wanted_indexes(
    destination: "ColumnDestination", config: IndexDefinition, rows: int, own: Layout, current: Layout
) -> list[AnnIndex]:
    declared, suffix = destination.declared.column, destination.suffix(own.column)
    if config.model_fields_set:
        if config.method == "none" or any(index.valid and index.method == config.method for index in own.indexes):
            return []
        name = named_like(f"{destination.collection}_{declared}_{config.method}", suffix)
        parameters, operators = index_parameters(config, rows), f"{destination.storage}_cosine_ops"
        return [AnnIndex(name, destination.vector_name, config.method, parameters, True, 0, own.schema, operators)]
    if own.column == declared:
        return []
    return [
        replace(index, name=named_like(index.name, suffix), bytes=0, schema=own.schema)
        for index in current.indexes
        if index.valid
    ]


def _create_index(destination: "ColumnDestination", column: str, index: AnnIndex) -> sql.Composed:
    options = [sql.SQL("{}={}").format(sql.SQL(key), sql.Literal(number)) for key, number in index.parameters.items()]
    given = sql.SQL("WITH ({})").format(sql.SQL(", ").join(options)) if options else sql.SQL("")
    return destination.column_statement(
        "column/create_index",
        index=sql.Identifier(index.name),
        method=sql.SQL(index.method),
        column=sql.Identifier(column),
        operator_class=sql.SQL(index.operator_class),
        parameters=given,
    )


def exchange(destination: "ColumnDestination", own: Layout, shadow: Layout) -> Exchange:
    """What gives the shadow model's column the name of this current one's, and the indexes theirs."""
    back = shadow.column == destination.previous_column
    aside = destination.candidate_column if back else destination.previous_column
    names = ((own.column, aside), (shadow.column, own.column))
    changes = [
        Change(
            sql.SQL("ALTER TABLE {} RENAME COLUMN {} TO {}").format(
                destination.relation, sql.Identifier(before), sql.Identifier(after)
            ),
            f"ACCESS EXCLUSIVE of {destination.place}",
        )
        for before, after in names
    ]
    layouts = []
    for layout, (before, after) in zip((own, shadow), names, strict=True):
        indexes = []
        for index in layout.indexes:
            name = named_like(index.name.removesuffix(destination.suffix(before)), destination.suffix(after))
            if name != index.name:
                renamed = sql.SQL("ALTER INDEX {} RENAME TO {}").format(
                    sql.Identifier(index.schema, index.name), sql.Identifier(name)
                )
                changes.append(Change(renamed, "SHARE UPDATE EXCLUSIVE of the index"))
            indexes.append(replace(index, name=name))
        layouts.append(replace(layout, column=after, indexes=tuple(indexes)))
    return Exchange(changes, *layouts)


def named_like(name: str, suffix: str) -> str:
    """An index's name with a suffix, at most 63 bytes long."""
    return name.encode()[: LONGEST_NAME - len(suffix)].decode(errors="ignore") + suffix
