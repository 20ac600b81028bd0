"""The ANN indexes of a model table in PostgreSQL: a partial one for each vector name, built concurrently.

report = ensure_index(database, table, collection.config.index, ["base", "title"])

Neither building nor replacing one locks the table against readers or writers, and an old index serves until the new
one is valid. A killed build leaves an invalid index, which the next call removes. Queries use an index where they name
the vector as a constant: `WHERE vector_name = 'base' ORDER BY embedding <=> … LIMIT 10`.
"""

import contextlib
import logging
import os
import random
import re
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

import psycopg
from psycopg import errors, sql
from psycopg.rows import class_row

from embeddings_pipeline.config.definition import IndexDefinition
from embeddings_pipeline.errors import PipelineError, VectorIndexError
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.destination.column import ColumnDestination, ColumnIndex, named_like
from embeddings_pipeline.store.destination.table import TableDestination
from embeddings_pipeline.store.sql import load_sql

logger = logging.getLogger(__name__)

DEADLINE_SECONDS = 6 * 3600.0
SAY_AFTER_SECONDS = 10.0
MOST_DIMENSIONS = {"halfvec": 4000, "vector": 2000}  # of an index: README of pgvector, "HNSW", "IVFFlat"
MOST_LISTS = 32_768  # IVFFLAT_MAX_LISTS in pgvector's src/ivfflat.h
MOST_MEMORY = 2 << 30  # bytes for a build on a server that is not ours

_NEW = "_new"  # an index on its way to replace another


@dataclass(frozen=True)
class AnnIndex:
    """An ANN index as it is in the database."""

    name: str
    vector_name: str
    method: str
    parameters: dict[str, int]
    valid: bool
    bytes: int


@dataclass(frozen=True)
class BuiltIndex:
    """What `ensure_index` did for one vector name."""

    vector_name: str
    name: str
    method: str
    parameters: dict[str, int]
    rows: int
    bytes: int
    build_seconds: float  # 0 where there was nothing to do
    reason: str  # why it was built; empty where it was not


@dataclass(frozen=True)
class IndexReport:
    """Every vector name's index (none under method `none`), and the names of the indexes that were removed."""

    indexes: tuple[BuiltIndex, ...]
    dropped: tuple[str, ...]

    @property
    def build_seconds(self) -> float:
        return sum(index.build_seconds for index in self.indexes)

    @property
    def bytes(self) -> int:
        return sum(index.bytes for index in self.indexes)


@dataclass(frozen=True)
class _Row:
    name: str
    method: str
    options: list[str]
    valid: bool
    predicate: str | None
    bytes: int


def index_name(table: TableDestination, vector_name: str) -> str:
    """The name of our index for a vector name, within the schema `embeddings`; at most 58 characters."""
    digest = blake2b(f"{table.name} {vector_name}".encode(), digest_size=3).hexdigest()
    return f"{table.collection}_{vector_name}_{digest}"


def describe_indexes(connection: psycopg.Connection, table: TableDestination) -> list[AnnIndex]:
    """The ANN indexes of a model table or column, by name, those that are invalid or being built included."""
    if isinstance(table, ColumnDestination):
        return [_described(table, index) for index in table.indexes(connection, table.column(connection))]
    with connection.cursor(row_factory=class_row(_Row)) as cursor:
        rows = cursor.execute(load_sql("pgvector/describe"), {"table": table.name}).fetchall()
    described = []
    for row in rows:
        named = re.fullmatch(r"\(vector_name = '(\w+)'::text\)", row.predicate or "")
        parameters = _parse_options(row.options)
        described.append(AnnIndex(row.name, named[1] if named else "", row.method, parameters, row.valid, row.bytes))
    return described


def _described(table: ColumnDestination, index: ColumnIndex) -> AnnIndex:
    return AnnIndex(
        index.name, table.vector_name, index.method, _parse_options(index.options), index.valid, index.bytes
    )


def _parse_options(options: Iterable[str]) -> dict[str, int]:
    return {key: int(value) for key, value in (option.split("=") for option in options)}


def indexes_fit(
    connection: psycopg.Connection, table: TableDestination, config: IndexDefinition, names: Iterable[str]
) -> bool:
    """Whether `ensure_index` would find each index there, of the method and with the parameters that `config` says."""
    valid = [index for index in describe_indexes(connection, table) if index.valid]
    if isinstance(table, ColumnDestination):
        return not wants_index(table, config) or any(index.method == config.method for index in valid)
    there = {index.name: index for index in valid if index.name == index_name(table, index.vector_name)}
    if set(there) != ({index_name(table, name) for name in names} if config.method != "none" else set()):
        return False
    hnsw = {"m": config.m, "ef_construction": config.ef_construction}
    return all(
        index.method == config.method and (config.method != "hnsw" or index.parameters == hnsw)
        for index in there.values()
    )


def wants_index(table: TableDestination, config: IndexDefinition) -> bool:
    """Whether an index is declared. On a user's own column the default does not count."""
    return config.method != "none" and not (isinstance(table, ColumnDestination) and not config.model_fields_set)


def ensure_index(
    database: Database,
    table: TableDestination,
    config: IndexDefinition,
    vector_names: Iterable[str],
    *,
    deadline_seconds: float = DEADLINE_SECONDS,
) -> IndexReport:
    """Make the ANN indexes what `config` says: one valid index for each vector name, and none for any other name.

    Where all is well nothing is done. An index is replaced where method, `m` or `ef_construction` changed, and an
    IVFFlat one where its rows have become four times as many, or a fourth. One process at a time works on a table;
    others wait. Indexes that are not named by `index_name` are somebody else's and stay.

    On the column of a user's own table it makes one of the declared method where there is none; where none is declared
    (`config` has nothing set), the next model's column gets indexes like those on the current one.

    Raises VectorIndexError where pgvector cannot index so many dimensions, the table is missing, or it was not done by
    the deadline; what serves queries stays.
    """
    names = list(dict.fromkeys(vector_names))
    most = MOST_DIMENSIONS[table.storage]
    if wants_index(table, config) and table.dimension > most:
        remedy = "`storage: halfvec` (up to 4000) or " if table.dimension <= MOST_DIMENSIONS["halfvec"] else ""
        raise VectorIndexError(
            f"collection {table.collection!r}: pgvector's {config.method} takes up to {most} dimensions of a "
            f"{table.storage}, and the model has {table.dimension}; set {remedy}`index: {{method: none}}` in its "
            "defs.yaml"
        )
    deadline = time.monotonic() + deadline_seconds
    with _explained(table, deadline_seconds), database.connect(autocommit=True) as connection:
        # A server that has such a setting stops a build whose client is gone.
        with contextlib.suppress(errors.InvalidParameterValue, errors.UndefinedObject):
            connection.execute("SET client_connection_check_interval = '1s'")
        _wait_for_turn(connection, table, deadline)
        builder = _Builder(database, connection, table, config, deadline)
        return builder.ensure_on_column(table) if isinstance(table, ColumnDestination) else builder.ensure(names)


class _Builder:
    def __init__(
        self,
        database: Database,
        connection: psycopg.Connection,
        table: TableDestination,
        config: IndexDefinition,
        deadline: float,
    ) -> None:
        self.database, self.connection, self.table, self.config = database, connection, table, config
        self.deadline, self.memory = deadline, _memory_limit(database)
        self.dropped: list[str] = []

    def ensure(self, names: list[str]) -> IndexReport:
        kept = names if self.config.method != "none" else []
        for index in self._ours():
            if not index.valid or index.vector_name not in kept:
                self._drop(index.name)
        rows = self._rows()
        return IndexReport(tuple([self._ensure_one(name, rows.get(name, 0)) for name in kept]), tuple(self.dropped))

    def _ensure_one(self, vector_name: str, rows: int) -> BuiltIndex:
        name = index_name(self.table, vector_name)
        there = {index.name: index for index in self._ours() if index.vector_name == vector_name}
        old, new = there.get(name), there.get(name + _NEW)
        parameters, reason, seconds = self._parameters(rows), self._reason(old, rows), 0.0
        if new is not None and (not reason or self._reason(new, rows)):
            self._drop(new.name)
            new = None
        if reason and new is None:
            began = time.perf_counter()
            self._create(name if old is None else name + _NEW, vector_name, parameters, rows)
            seconds = time.perf_counter() - began
        if reason and (old is not None or new is not None):
            if old is not None:
                self._drop(name)
            # Locks out neither readers nor writers of the table.
            self._execute(
                sql.SQL("ALTER INDEX {} RENAME TO {}").format(self._identifier(name + _NEW), sql.Identifier(name))
            )
        index = next(index for index in self._ours() if index.name == name)
        return BuiltIndex(
            vector_name, name, index.method, index.parameters, rows, index.bytes, round(seconds, 3), reason
        )

    def ensure_on_column(self, table: ColumnDestination) -> IndexReport:
        column = table.column(self.connection)
        (rows,) = self._rows().values() or (0,)
        wanted = column_indexes(self.connection, table, self.config, column, rows)
        for index in table.indexes(self.connection, column):
            # On the current model's column an invalid index may be one that somebody else is building.
            if not index.valid and (column != table.declared.column or index.name in wanted):
                self._drop(index.name, index.schema)
        built = []
        there = {index.name: index for index in table.indexes(self.connection, column)}
        for name, statement in wanted.items():
            began = time.perf_counter()
            if name not in there:
                parameters = _parameters(self.config, rows)
                self._execute(statement, min(self.memory, build_memory(table, parameters, rows)))
                built.append((name, round(time.perf_counter() - began, 3)))
        seconds = dict(built)
        described = describe_indexes(self.connection, table)
        if broken := [index.name for index in described if index.name in seconds and not index.valid]:
            raise VectorIndexError(f"index {broken[0]} was built and is not valid; run the step again")
        return IndexReport(
            tuple(
                BuiltIndex(
                    table.vector_name,
                    index.name,
                    index.method,
                    index.parameters,
                    rows,
                    index.bytes,
                    seconds.get(index.name, 0.0),
                    "missing" if index.name in seconds else "",
                )
                for index in described
            ),
            tuple(self.dropped),
        )

    def _parameters(self, rows: int) -> dict[str, int]:
        return _parameters(self.config, rows)

    def _reason(self, index: AnnIndex | None, rows: int) -> str:
        """Why `index` does not do for that many rows; empty where it does."""
        if index is None:
            return "missing"
        if index.method != self.config.method:
            return f"was {index.method}"
        wanted = self._parameters(rows)
        if index.method == "ivfflat":
            # lists = √rows, so that twice the lists mean four times the rows
            if wanted["lists"] >= 2 * index.parameters["lists"] or index.parameters["lists"] >= 2 * wanted["lists"]:
                return f"{rows} rows in {index.parameters['lists']} lists"
            return ""
        changed = [
            f"{key} was {index.parameters.get(key)}" for key in wanted if index.parameters.get(key) != wanted[key]
        ]
        return ", ".join(changed)

    def _create(self, name: str, vector_name: str, parameters: dict[str, int], rows: int) -> None:
        statement = _create_statement(self.table, self.config, name, vector_name, parameters)
        memory = min(self.memory, build_memory(self.table, parameters, rows))
        try:
            with self._saying_what_it_waits_for():
                self._execute(statement, memory)
        except errors.DiskFull:
            # A parallel build keeps its graph in /dev/shm, of which a container has 64 MB: build it in one process.
            self._drop(name)
            self._execute(sql.SQL("SET max_parallel_maintenance_workers = 0"))
            self._execute(statement, memory)
            self._execute(sql.SQL("RESET max_parallel_maintenance_workers"))
        if not any(index.valid for index in self._ours() if index.name == name):
            raise VectorIndexError(
                f"index embeddings.{name} was built and is not valid; run `embeddings-pipeline sync` again"
            )

    @contextlib.contextmanager
    def _saying_what_it_waits_for(self) -> Iterator[None]:
        """A concurrent build waits for every older transaction, whatever table it is about: say whose."""
        done, pid = threading.Event(), self.connection.info.backend_pid

        def watch() -> None:
            while not done.wait(SAY_AFTER_SECONDS):
                with contextlib.suppress(PipelineError, psycopg.Error):
                    with self.database.connect(autocommit=True) as connection:
                        found = connection.execute(
                            load_sql("pgvector/waits_for"), {"pid": pid, "seconds": SAY_AFTER_SECONDS}
                        ).fetchone()
                    if found:
                        blocker, name, age = found
                        logger.warning(
                            "collection %r: the new index waits for a transaction that %s has had open for %s; end "
                            "it, or SELECT pg_terminate_backend(%s)",
                            *(self.table.collection, name, age, blocker),
                        )
                        return

        watching = threading.Thread(target=watch, daemon=True)
        watching.start()
        try:
            yield
        finally:
            done.set()
            watching.join()

    def _drop(self, name: str, schema: str = "embeddings") -> None:
        self._execute(sql.SQL("DROP INDEX CONCURRENTLY IF EXISTS {}").format(sql.Identifier(schema, name)))
        self.dropped.append(name)

    def _execute(self, statement: sql.SQL | sql.Composed, memory: int = 0) -> None:
        milliseconds = max(1, round((self.deadline - time.monotonic()) * 1000))
        self.connection.execute(
            load_sql("pgvector/session"), {"milliseconds": milliseconds, "memory": max(memory // 1024, 1024)}
        )
        self.connection.execute(statement)

    def _identifier(self, name: str) -> sql.Identifier:
        return sql.Identifier("embeddings", name)

    def _ours(self) -> list[AnnIndex]:
        found = describe_indexes(self.connection, self.table)
        return [each for each in found if each.name.removesuffix(_NEW) == index_name(self.table, each.vector_name)]

    def _rows(self) -> dict[str, int]:
        query = sql.SQL("SELECT vector_name, count(*) FROM {} GROUP BY 1").format(self.table.identifier)
        return dict(self.connection.execute(query).fetchall())


def build_memory(table: TableDestination, parameters: dict[str, int], rows: int) -> int:
    """Bytes of maintenance_work_mem with which a build stays in memory, generously.

    HNSW (pgvector's src/hnsw.h): a vector, an element and 2·m neighbours of 16 bytes each, and m for one in m of the
    higher levels. IVFFlat (src/ivfkmeans.c): 50 samples a list, and a lower bound of 4 bytes for each sample and list;
    it fails where that does not fit.
    """
    if "lists" in parameters:
        lists = parameters["lists"]
        samples = max(50 * lists, 10_000)
        needed = samples * (table.bytes_per_vector + 4 * lists + 8) + lists * (12 * table.dimension + 4 * lists + 64)
    else:
        needed = rows * (table.bytes_per_vector + 32 * parameters["m"] + 320)
    return (64 << 20) + needed * 5 // 4


def column_indexes(
    connection: psycopg.Connection, table: ColumnDestination, config: IndexDefinition, column: str, rows: int
) -> dict[str, sql.Composed]:
    """The ANN indexes that a column of the user's table is to have, by name, and what makes each."""
    suffix = table.suffix(column)
    there = {index.name: index for index in table.indexes(connection, column) if index.valid}
    if config.model_fields_set:
        if config.method == "none" or any(index.method == config.method for index in there.values()):
            return {}
        name = named_like(f"{table.collection}_{table.declared.column}_{config.method}", suffix)
        options = [f"{key}={value}" for key, value in _parameters(config, rows).items()]
        operators = f"{table.storage}_cosine_ops"
        return {name: table.index_statement(column, name, config.method, operators, options)}
    if column == table.declared.column:
        return {}
    like = {named_like(one.name, suffix): one for one in table.indexes(connection, table.declared.column) if one.valid}
    return {
        name: table.index_statement(column, name, one.method, one.operator_class, one.options)
        for name, one in like.items()
    }


def index_statements(
    table: TableDestination, config: IndexDefinition, vector_names: Iterable[str], rows: int
) -> list[sql.Composed]:
    """What `ensure_index` runs for a table without indexes, with that many rows of each vector name."""
    if config.method == "none":
        return []
    parameters = _parameters(config, rows)
    return [_create_statement(table, config, index_name(table, one), one, parameters) for one in vector_names]


def _create_statement(
    table: TableDestination, config: IndexDefinition, name: str, vector_name: str, parameters: dict[str, int]
) -> sql.Composed:
    given = (sql.SQL("{} = {}").format(sql.SQL(key), sql.Literal(value)) for key, value in parameters.items())
    return table.statement(
        "pgvector/create",
        index=sql.Identifier(name),
        method=sql.SQL(config.method),
        operator_class=sql.SQL(f"{table.storage}_cosine_ops"),
        parameters=sql.SQL(", ").join(given),
        vector_name=sql.Literal(vector_name),
    )


def _parameters(config: IndexDefinition, rows: int) -> dict[str, int]:
    if config.method == "ivfflat":
        return {"lists": _lists(rows)}
    return {"m": config.m, "ef_construction": config.ef_construction}


def _lists(rows: int) -> int:
    return min(max(1, round(rows**0.5)), MOST_LISTS)


def _memory_limit(database: Database) -> int:
    if database.embedded:
        return max(MOST_MEMORY, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4)
    return MOST_MEMORY


def _wait_for_turn(connection: psycopg.Connection, table: TableDestination, deadline: float) -> None:
    """Take the table's advisory lock for index builds, which the session holds to its end.

    By asking again and again: a session that waits in `pg_advisory_lock` holds a snapshot, for whose end the builder,
    CREATE INDEX CONCURRENTLY, would wait in turn.
    """
    key = int.from_bytes(blake2b(f"index {table.name}".encode(), digest_size=8).digest(), "big", signed=True)
    while connection.execute("SELECT pg_try_advisory_lock(%s)", [key]).fetchone() != (True,):
        if time.monotonic() > deadline:
            raise errors.QueryCanceled("another process is still building indexes on this table")
        time.sleep(random.uniform(0.1, 0.4))


@contextlib.contextmanager
def _explained(table: TableDestination, deadline_seconds: float) -> Iterator[None]:
    where = f"ANN index on embeddings.{table.name}"
    try:
        yield
    except errors.UndefinedTable as error:
        raise VectorIndexError(f"{where}: there is no such table; run `embeddings-pipeline sync`") from error
    except errors.QueryCanceled as error:
        raise VectorIndexError(
            f"{where}: not done within {deadline_seconds:.0f} s ({_one_line(error)}); an older transaction may hold it "
            "up: see pg_stat_activity, end it, and run `embeddings-pipeline sync` again"
        ) from error
    except psycopg.Error as error:
        raise VectorIndexError(
            f"{where}: {_one_line(error)}; correct that and run `embeddings-pipeline sync` again"
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
