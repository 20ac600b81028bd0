"""Looks at a table and proposes a collection for it, as the text of a `defs.yaml` with every choice explained."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
import yaml
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from pydantic import ValidationError

from embeddings_pipeline.config.definition import COMPONENT_TYPE, CollectionAttributes
from embeddings_pipeline.config.mistakes import describe_validation_error
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import ConfigurationError, SourceError, did_you_mean
from embeddings_pipeline.store.database import open_database
from embeddings_pipeline.store.session import RUN_LIMITS, reading
from embeddings_pipeline.store.source_sql import table_identifier, tables
from embeddings_pipeline.store.source_url import connect_url
from embeddings_pipeline.store.sql import load_sql

SAMPLE_ROWS = 1000
TEXT_TYPES = ("text", "character varying", "character", "citext")
TITLES = ("title", "name", "headline", "subject", "label")
UPDATED = ("updated_at", "modified_at", "last_modified", "changed_at", "updated", "modified", "last_updated")
REMOVED = ("is_removed", "is_deleted", "is_archived", "is_trashed", "removed", "deleted", "archived", "trashed")
REMOVED_AT = ("deleted_at", "removed_at", "archived_at", "trashed_at", "deleted_on", "date_deleted", "deletion_date")
STATES = ("status", "state")
REMOVED_STATES = ("deleted", "removed", "archived", "trashed")
HEAVY_TYPES = ("bytea", "json", "jsonb", "xml", "tsvector", "vector", "halfvec", "sparsevec")
LONG_TEXT = 200  # characters on average: too long for a payload
WORDLESS = r"^(https?://\S*|/\S*|[\w.+-]+@[\w.-]+|[0-9a-fA-F-]{16,}|\d[\d:.,/ -]*)$"  # links, paths, hashes, numbers


@dataclass(frozen=True)
class _Column:
    name: str
    type: str
    key_position: int | None
    length: float  # average of a text column's sample
    wordless: float  # share of the sample that no reader would call text
    removed_states: tuple[str, ...]  # values of a status column's sample that say that the row is gone


@dataclass(frozen=True)
class _Proposal:
    """Which columns of a table play which part in its collection."""

    columns: list[_Column]
    key: list[str]
    texts: list[_Column]
    updated: str | None
    removed: dict[str, str]  # columns that mark a row as gone, with the condition that the others meet
    payload: list[str]


def propose_collection(name: str, table: str, url: str | None, settings: Settings, key: Sequence[str] = ()) -> str:
    """A `defs.yaml` for `table`, a table or a view. `key`: the columns that identify a row; left out, its primary key.

    Raises SourceError if the table cannot be read, has no key or no text; ConfigurationError for a name that a
    collection cannot have, or a password in the URL.
    """
    _refuse_password(url)
    proposal = _choose(table, _describe(table, url, settings), key)
    lines = [
        f"# Proposed from the table {_yaml(table)} by `dg scaffold defs`. Change what you know better, then",
        f"# `embeddings-pipeline sync --collection {name}`.",
        f"type: {COMPONENT_TYPE}",
        "",
        "attributes:",
        f"  name: {name}",
        "",
        *_source_lines(table, url, proposal),
        "",
        "  # The payload: what searches return. Short columns; changing one of them embeds nothing.",
        f"  columns: {_yaml(proposal.payload)}",
        "",
        *_filters_hint(proposal),
        f"  # What is embedded: the columns with text in {SAMPLE_ROWS:,} sampled rows, a title first. Left out: links,",
        "  # codes and numbers. An empty column takes what belongs to it along.",
        "  vectors:",
        f"    base: {_yaml(' | '.join(f'{{{c.name}}}' for c in proposal.texts))}",
        "",
        "  # The model: minilm, speed, quality … Left out, EMBEDDING_PROFILE chooses it, else minilm.",
        "  # profile: minilm",
        "",
        *_destination_hint(table, proposal.columns),
        "  # Items of one partition: some seconds of encoding. A crash costs those of one batch, or of up to 1,000",
        "  # texts of smaller batches, which go to the encoder together.",
        "  items_per_batch: 1000",
        "",
    ]
    _check(name, table, proposal.key, proposal.texts)
    return "\n".join(lines)


def _choose(table: str, columns: list[_Column], key: Sequence[str]) -> _Proposal:
    names = [c.name for c in columns]
    for column in key:
        if column not in names:
            raise SourceError(
                f"table {table!r} has no column {column!r} to be the key{did_you_mean(column, names)}; "
                f"it has {', '.join(names)}"
            )
    key = list(key) or [c.name for c in sorted(columns, key=lambda c: c.key_position or 0) if c.key_position]
    if not key:
        raise SourceError(
            f"{table!r} has no primary key and no unique index on NOT NULL columns; name the columns that identify a "
            f"row with --key"
        )
    texts = [c for c in columns if c.type in TEXT_TYPES and c.name not in key and not re.search(r"[{}]", c.name)]
    if any(c.length > 0 for c in columns):
        texts = [c for c in texts if c.length > 0 and c.wordless < 0.5]
    texts = [c for c in texts if not _remaining(c)]
    texts.sort(key=lambda c: TITLES.index(c.name.lower()) if c.name.lower() in TITLES else len(TITLES))
    if not texts:
        raise SourceError(f"{table!r} has no column with text in it; choose another table, or make a view with one")
    updated = next((c.name for wish in UPDATED for c in columns if c.name.lower() == wish and "time" in c.type), None)
    removed = {c.name: condition for c in columns if c.name not in key and (condition := _remaining(c))}
    skipped = {*key, updated, *removed}
    payload = [c.name for c in columns if c.name not in skipped and c.type not in HEAVY_TYPES and c.length <= LONG_TEXT]
    return _Proposal(columns, list(key), texts, updated, removed, payload)


def _remaining(column: _Column) -> str | None:
    """The condition that rows meet which are not marked as removed by the column; None if it marks none so."""
    name, quoted = column.name.lower(), quoted_identifier(column.name)
    if name in REMOVED and column.type == "boolean":
        return f"{quoted} IS NOT TRUE"
    if name in REMOVED and column.type in ("smallint", "integer", "bigint"):
        return f"coalesce({quoted}, 0) = 0"
    if name in REMOVED_AT and column.type in TEXT_TYPES:
        return f"coalesce({quoted}, '') = ''"
    if name in REMOVED_AT and (column.type == "date" or column.type.startswith("timestamp")):
        return f"{quoted} IS NULL"
    if column.removed_states:
        states = ", ".join(sql.Literal(state).as_string(None) for state in column.removed_states)
        return f"coalesce({quoted}::text, '') NOT IN ({states})"
    return None


def _source_lines(table: str, url: str | None, proposal: _Proposal) -> list[str]:
    lines = [
        "  source:",
        f"    table: {_yaml(table)}",
        "    # What identifies a row, which is an item.",
        f"    key: {_yaml(proposal.key)}",
    ]
    if proposal.updated:
        lines += ["    # Set at every change, by its name: newer rows are found without reading the rest. An edit that",
                  "    # leaves it as it was waits for a full scan; the page Keep it current has a trigger for that.",
                  f"    updated_at: {_yaml(proposal.updated)}"]  # fmt: skip
    else:
        lines.append("    # No column tells when a row changed: every sync compares the whole table, which finds all.")
    if proposal.removed:
        lines += [f"    # The others are marked as gone by {' or '.join(proposal.removed)}: no search finds them.",
                  f"    where: {_yaml(' AND '.join(proposal.removed.values()))}"]  # fmt: skip
    else:
        lines.append("    # where: a condition in SQL; rows that do not meet it are treated as gone.")
    if url:
        lines += ["    # Where the table is. Keep a password out of this file: ${NAME} is read from the environment.",
                  f"    url: {_yaml(url)}"]  # fmt: skip
    return lines


def _filters_hint(proposal: _Proposal) -> list[str]:
    """Of the payload's columns those that are no texts, as filters; nothing if there are none."""
    kinds = {c.name: kind for c in proposal.columns if c.name in proposal.payload and (kind := _filter_type(c.type))}
    if not kinds:
        return []
    return [
        "  # What searches filter by, `text` columns too. Adding or removing one embeds nothing.",
        f"  # filters: {_yaml(kinds)}",
        "",
    ]


def _filter_type(column_type: str) -> str | None:
    kind = column_type.split("(")[0]
    if kind == "date" or kind.startswith("timestamp"):
        return "timestamp"
    if kind in ("smallint", "integer", "bigint", "numeric", "real", "double precision"):
        return "number"
    return {"boolean": "boolean", "text[]": "texts", "character varying[]": "texts"}.get(column_type)


def _destination_hint(table: str, columns: list[_Column]) -> list[str]:
    """How vectors that the table has already could be adopted; nothing if it has none."""
    vector = next((c.name for c in columns if c.type.split("(")[0] in ("vector", "halfvec")), None)
    if vector is None:
        return []
    return [
        f"  # The table has vectors in {vector}: to keep them there, say which profile made them.",
        f"  # destination: {{table: {_yaml(table)}, column: {_yaml(vector)}, profile: minilm}}",
        "",
    ]


def _refuse_password(url: str | None) -> None:
    """What stands in a defs.yaml is soon in a repository."""
    try:
        password = url and conninfo_to_dict(re.sub(r"^postgres(ql)?(\+psycopg2?)?://", "postgresql://", url)).get(
            "password"
        )
    except psycopg.ProgrammingError:
        return  # connecting says what is wrong with it
    if password and "${" not in str(password):
        raise ConfigurationError(
            "--url holds a password, which would stand in defs.yaml: put it into .env as SOURCE_PASSWORD=… and write "
            "--url 'postgresql://user:${SOURCE_PASSWORD}@host:5432/name'"
        )


def _yaml(value: Any) -> str:
    """A text or list of texts in YAML, on one line, every text in double quotes."""
    return yaml.safe_dump(value, default_style='"', default_flow_style=True, allow_unicode=True, width=1 << 30).strip()


def quoted_identifier(name: str) -> str:
    """A column name quoted for SQL."""
    return sql.Identifier(name).as_string(None)


def _check(name: str, table: str, key: list[str], texts: list[_Column]) -> None:
    vectors = {"base": f"{{{texts[0].name}}}"}
    try:
        CollectionAttributes.model_validate({"name": name, "source": {"table": table, "key": key}, "vectors": vectors})
    except ValidationError as error:
        raise ConfigurationError(
            f"cannot scaffold {name!r}:{describe_validation_error(error, CollectionAttributes)}"
        ) from error


def _describe(table: str, url: str | None, settings: Settings) -> list[_Column]:
    identifier = table_identifier(table)
    with connect_url(url) if url else open_database(settings).connect(autocommit=True) as connection:
        try:
            with reading(connection, RUN_LIMITS, some_rows_do=True):
                rows = connection.execute(
                    load_sql("propose/describe_table"), {"table": identifier.as_string(None)}
                ).fetchall()
                texts = [name for name, kind, _ in rows if kind in TEXT_TYPES]
                measures = [sql.SQL("0, 0")] + [
                    sql.SQL(", avg(length({0})), avg((btrim({0}) ~ {1})::int)").format(
                        sql.Identifier(name), sql.Literal(WORDLESS)
                    )
                    for name in texts
                ]
                sample = sql.SQL("SELECT {} FROM (SELECT * FROM {} LIMIT {}) AS sample").format(
                    sql.Composed(measures), identifier, sql.Literal(SAMPLE_ROWS)
                )
                measured = [float(value or 0) for value in connection.execute(sample).fetchone() or ()][2:]
                states = {
                    name: _removed_states(connection, identifier, name) for name, _, _ in rows if name.lower() in STATES
                }
        except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName) as error:
            nearest = did_you_mean(table, tables(connection)) or (
                f"; give its name as `schema.table` in its exact case, set DATABASE_URL if it is elsewhere, or make it "
                f"with `embeddings-pipeline load FILE --table {table}`"
            )
            where = "the address of --url" if url else open_database(settings).name_and_host
            raise SourceError(f"there is no table {table!r} in {where}{nearest}") from error
        except psycopg.errors.InsufficientPrivilege as error:
            raise SourceError(
                f"table {table!r} cannot be read: {error.diag.message_primary}; GRANT SELECT on it"
            ) from error
        except psycopg.Error as error:
            raise SourceError(f"table {table!r} cannot be read: {error.diag.message_primary or error}") from error
    pairs = zip(measured[::2], measured[1::2], strict=True)
    lengths: dict[str, tuple[float, float]] = dict(zip(texts, pairs, strict=True))
    return [
        _Column(name, kind, position, *lengths.get(name, (0.0, 0.0)), states.get(name, ()))
        for name, kind, position in rows
    ]


def _removed_states(connection: psycopg.Connection, table: sql.Identifier, column: str) -> tuple[str, ...]:
    statement = sql.SQL(load_sql("propose/removed_states")).format(
        column=sql.Identifier(column), table=table, rows=sql.Literal(SAMPLE_ROWS)
    )
    return tuple(state for (state,) in connection.execute(statement, {"states": list(REMOVED_STATES)}))
