"""ANN indexes as they are in the database, and what makes them what the definition says."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal

from psycopg import sql

from embeddings_pipeline.config.definition import IndexDefinition

if TYPE_CHECKING:
    from embeddings_pipeline.store.destination.base import Destination

MOST_LISTS = 32_768  # IVFFLAT_MAX_LISTS in pgvector's src/ivfflat.h
NEW = "_new"  # at the end of the name of an index on its way to replace another


@dataclass(frozen=True)
class AnnIndex:
    """An ANN index as it is in the database."""

    name: str
    vector_name: str  # empty on a stranger's index
    method: str
    parameters: dict[str, int]
    valid: bool
    bytes: int
    schema: str = "embeddings"
    operator_class: str = ""


@dataclass(frozen=True)
class IndexChange:
    """A statement that builds, drops or renames an ANN index. None in a plan locks out readers or writers."""

    action: Literal["create", "drop", "rename"]
    index: AnnIndex  # that is built or dropped, or as it is called after it was renamed
    statement: sql.Composed
    reason: str = ""  # why it is built
    memory: int = 0  # in bytes, for a build


def parse_options(options: Iterable[str]) -> dict[str, int]:
    """An index's storage parameters, from `name=value` as the catalog has them."""
    return {key: int(value) for key, value in (option.split("=") for option in options)}


def predicate_name(predicate: str | None) -> str:
    """The vector name of a partial index, from its predicate; empty if it is another kind of index."""
    match = re.fullmatch(r"\(vector_name = '(\w+)'::text\)", predicate or "")
    return match[1] if match else ""


def index_name(destination: "Destination", vector_name: str) -> str:
    """The name of our index for a vector name, within the schema `embeddings`; at most 58 characters."""
    digest = blake2b(f"{destination.name} {vector_name}".encode(), digest_size=3).hexdigest()
    return f"{destination.collection}_{vector_name}_{digest}"


def index_parameters(config: IndexDefinition, rows: int) -> dict[str, int]:
    """What an index over that many rows is to be built with."""
    if config.method == "ivfflat":
        return {"lists": min(max(1, round(rows**0.5)), MOST_LISTS)}
    return {"m": config.m, "ef_construction": config.ef_construction}


def why_rebuilt(index: AnnIndex | None, config: IndexDefinition, rows: int, *, sizes_known: bool) -> str:
    """Why an index does not do for that many rows; empty if it does."""
    if index is None:
        return "missing"
    if index.method != config.method:
        return f"was {index.method}"
    wanted = index_parameters(config, rows)
    if index.method == "ivfflat":
        lists = index.parameters["lists"]
        # lists = √rows, so that twice the lists mean four times the rows
        outgrown = wanted["lists"] >= 2 * lists or lists >= 2 * wanted["lists"]
        return f"{rows} rows in {lists} lists" if sizes_known and outgrown else ""
    changed = [f"{key} was {index.parameters.get(key)}" for key in wanted if index.parameters.get(key) != wanted[key]]
    return ", ".join(changed)


def build_memory(destination: "Destination", parameters: dict[str, int], rows: int) -> int:
    """Bytes of maintenance_work_mem with which a build stays in memory, generously.

    HNSW (pgvector's src/hnsw.h): a vector, an element and 2·m neighbours of 16 bytes each, and m for one in m of the
    higher levels. IVFFlat (src/ivfkmeans.c): 50 samples a list, and a lower bound of 4 bytes for each sample and list;
    it fails if that does not fit.
    """
    size, dimension = destination.bytes_per_vector, destination.dimension
    if "lists" in parameters:
        lists = parameters["lists"]
        samples = max(50 * lists, 10_000)
        needed = samples * (size + 4 * lists + 8) + lists * (12 * dimension + 4 * lists + 64)
    else:
        needed = rows * (size + 32 * parameters.get("m", 16) + 320)
    return (64 << 20) + needed * 5 // 4


def drop_index(index: AnnIndex, *, concurrently: bool = True) -> IndexChange:
    """Drops an index; if not concurrently, it locks out readers and writers, for some milliseconds."""
    drop = sql.SQL("DROP INDEX CONCURRENTLY IF EXISTS {}" if concurrently else "DROP INDEX IF EXISTS {}")
    statement = drop.format(sql.Identifier(index.schema, index.name))
    return IndexChange("drop", index, statement)


def after(indexes: Iterable[AnnIndex], changes: Iterable[IndexChange]) -> tuple[AnnIndex, ...]:
    """The indexes that there are when the changes are done, by name. A renamed index takes the place of the one built
    under the name that ends in NEW.
    """
    names = {index.name: index for index in indexes}
    for change in changes:
        if change.action == "drop":
            names.pop(change.index.name, None)
        elif change.action == "rename":
            names.pop(change.index.name + NEW, None)
        if change.action != "drop":
            names[change.index.name] = change.index
    return tuple(names[name] for name in sorted(names))
