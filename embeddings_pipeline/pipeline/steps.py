"""The first three steps of a batch, each a plain function: read its rows, render its texts, embed them.

Each reads what the step before wrote into the lake, so a step can be run again, alone, or after a crash. The fourth
step is the commit.
"""

import logging
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from psycopg import sql

from embeddings_pipeline.config.templates import clean, clean_json, content_hash, parse_row, split_chunks
from embeddings_pipeline.encoders.base import Encoder
from embeddings_pipeline.errors import OutageError, OutOfMemoryError, PipelineError, ProfileError
from embeddings_pipeline.health.drift import remember
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.store import lake as files
from embeddings_pipeline.store.copy_binary import copy_out

log = logging.getLogger(__name__)

LOOK_AT_ONCE = 1000  # items of a dry run
SAMPLE_TEXTS, SAMPLE_CHARACTERS = 3, 300
TEXTS_TOGETHER = 1000  # of several batches in one call of the encoder; a kill loses no more


def each_batch(
    collection: Collection, batches: Iterable[int], step: Callable[[Collection, int], Mapping[str, Any]]
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Do a step batch by batch; yields each batch with what the step returns."""
    for batch in batches:
        with _failure_noted(collection, [batch]):
            done = step(collection, batch)
        yield batch, done


@contextmanager
def _failure_noted(collection: Collection, batches: Sequence[int]) -> Iterator[None]:
    """Batches of which a step failed wait before they are tried again."""
    try:
        yield
    except Exception:
        with suppress(PipelineError, psycopg.Error):  # the database may be what failed
            collection.ledger.note_attempts(batches)
        raise


# --- raw_items ---------------------------------------------------------------------------------------------------


def read_items(collection: Collection, batch: int, run: str) -> dict[str, Any]:
    """Read the batch's rows by key and write them to the lake. Returns rows and gone, in items."""
    keys = collection.ledger.item_keys(batch)
    with collection.source.connect() as connection:
        rows = collection.source.read(connection, keys)
    columns = [list(column) for column in zip(*rows, strict=True)] or [[], [], [], []]
    table = pa.table(columns, schema=files.RAW_ITEMS)
    table = table.replace_schema_metadata({files.DEFINITION_HASH: collection.definition.definition_hash})
    collection.lake.write(table, collection.folder("raw_items"), batch, run)
    return {"rows": len(rows), "gone": len(keys) - len(rows)}


# --- item_texts --------------------------------------------------------------------------------------------------


def render_texts(collection: Collection, batch: int, run: str) -> dict[str, Any]:
    """Render every template of every item of the batch.

    Returns texts, blank, characters, longest_characters, and the beginnings of the first texts as `sample`.
    """
    _, items = collection.newest("raw_items", batch, run)
    columns: dict[str, list[Any]] = {name: [] for name in files.ITEM_TEXTS.names}
    for item in items.to_pylist():
        payload = clean_json(item["payload"])
        for vector_name, chunk, text in _render(collection, item["row"]):
            values = (item["item_key"], item["row_hash"], payload, vector_name, chunk, text, content_hash(text))
            for column, value in zip(columns.values(), (*values, not text), strict=True):
                column.append(value)
    table = pa.table(columns, schema=files.ITEM_TEXTS)
    # Rows that were read for another definition may hold an older payload: these are not this definition's texts.
    same = (items.schema.metadata or {}).get(files.DEFINITION_HASH) == collection.definition.definition_hash
    table = table.replace_schema_metadata(
        {files.DEFINITION_HASH: collection.definition.definition_hash if same else b""}
    )
    collection.lake.write(table, collection.folder("item_texts"), batch, run)
    lengths = [len(text) for text in columns["text"] if text]
    return {
        "texts": len(lengths),
        "blank": sum(columns["blank"]),
        "characters": sum(lengths),
        "longest_characters": max(lengths, default=0),
        "sample": [text[:SAMPLE_CHARACTERS] for text in filter(None, columns["text"][:SAMPLE_TEXTS])],
    }


def _render(collection: Collection, row_json: str) -> Iterator[tuple[str, int, str]]:
    """Vector name, chunk and text of every text of a row; blank texts too."""
    chunking = collection.definition.attributes.chunk
    characters, overlap = (chunking.characters, chunking.overlap) if chunking else (None, 0)
    row = parse_row(row_json)
    for vector_name, template in collection.definition.templates.items():
        for chunk, text in enumerate(split_chunks(clean(template.render(row)), characters, overlap)):
            yield vector_name, chunk, text


# --- embeddings --------------------------------------------------------------------------------------------------


@dataclass
class Embedded:
    """What embedding one batch did, in texts."""

    embedded: int = 0
    reused: int = 0
    quarantined: int = 0
    truncated: int = 0
    tokens: int = 0
    left_to_embed: int = 0  # because of `limit` or `dry_run`
    seconds: float = 0.0

    def metadata(self) -> dict[str, Any]:
        rate = self.embedded / self.seconds if self.embedded and self.seconds else 0.0
        return {**vars(self), "seconds": round(self.seconds, 3), "texts_per_second": round(rate, 1)}


@dataclass
class _Plan:
    """What is to be done for one batch."""

    batch: int
    texts: pa.Table
    have: dict[bytes, NDArray]  # content hash → vector
    wanted: dict[bytes, str]  # content hash → text to encode
    result: Embedded


def embed_batches(
    collection: Collection,
    batches: Iterable[int],
    run: str,
    *,
    force: bool = False,
    dry_run: bool = False,
    limit: int | None = None,
    items: Sequence[str] | None = None,
) -> Iterator[tuple[int, Embedded]]:
    """Give every text of these batches its vector: the one that is there for its content hash, else a new one.

    Yields each batch when its file is written. Batches with few texts to encode go to the encoder together. `force`
    encodes all anew, `limit` at most that many texts altogether, `dry_run` none and writes nothing; `items` are the
    keys of the items whose texts are encoded, all of them if left out.
    """
    group: list[_Plan] = []
    chosen_items = None if items is None else set(items)
    for batch in batches:
        with _failure_noted(collection, [batch]):
            plan = _plan(collection, batch, run, force, chosen_items)
        chosen = dict(islice(plan.wanted.items(), 0 if dry_run else limit))
        plan.result.left_to_embed = len(plan.wanted) - len(chosen)
        plan.wanted = chosen
        if limit is not None:
            limit -= len(chosen)
        if group and sum(len(other.wanted) for other in group) + len(plan.wanted) > TEXTS_TOGETHER:
            yield from _embed_group(collection, group, run, dry_run)
            group = []
        group.append(plan)
    yield from _embed_group(collection, group, run, dry_run)


def _plan(collection: Collection, batch: int, run: str, force: bool, items: set[str] | None) -> _Plan:
    started = time.perf_counter()
    _, texts = collection.newest("item_texts", batch, run)
    texts = texts.filter(pc.invert(texts["blank"]))
    hashes, values = texts["content_hash"].to_pylist(), texts["text"].to_pylist()
    have = {} if force else {**vectors_adopted(collection, texts), **vectors_there(collection, batch)}
    excused = set() if force else collection.ledger.quarantined(collection.fingerprint, list(set(hashes)), waiting=True)
    wanted = {
        digest: text
        for digest, text, item_key in zip(hashes, values, texts["item_key"].to_pylist(), strict=True)
        if digest not in have and digest not in excused and (items is None or item_key in items)
    }
    result = Embedded(reused=sum(digest in have for digest in hashes), quarantined=len(excused))
    result.seconds = time.perf_counter() - started
    return _Plan(batch, texts, have, wanted, result)


def _embed_group(collection: Collection, group: list[_Plan], run: str, dry_run: bool) -> Iterator[tuple[int, Embedded]]:
    texts = {digest: text for plan in group for digest, text in plan.wanted.items()}
    started = time.perf_counter()
    if texts:
        collection.ledger.note_attempts([plan.batch for plan in group])
    made, bad, tokens = embed_texts(collection, texts) if texts else ({}, {}, {})
    seconds = time.perf_counter() - started
    longest = collection.profile.max_length
    for plan in group:
        result = plan.result
        result.embedded = sum(digest in made for digest in plan.wanted)
        result.quarantined += sum(digest in bad for digest in plan.wanted)
        result.tokens = sum(tokens[digest] for digest in plan.wanted)
        result.truncated = sum(tokens[digest] > longest for digest in plan.wanted) if longest else 0
        result.seconds += seconds * len(plan.wanted) / max(1, len(texts))
        if not dry_run:
            with _failure_noted(collection, [plan.batch]):
                table = embeddings_table(collection, plan.texts, {**plan.have, **made}, made)
                collection.lake.write(table, collection.folder("embeddings"), plan.batch, run)
        yield plan.batch, result


def embed_texts(
    collection: Collection, texts: dict[bytes, str]
) -> tuple[dict[bytes, NDArray], dict[bytes, str], dict[bytes, int]]:
    """Vectors, reasons of those that failed by themselves, and numbers of tokens, by content hash."""
    encoder = collection.encoder()
    digests, values = list(texts), list(texts.values())
    tokens = dict(zip(digests, encoder.count_tokens(values).tolist(), strict=True))
    bad: dict[bytes, str] = {}
    vectors = _encode(encoder, digests, values, bad)
    made = {digest: vector for digest, vector in zip(digests, vectors, strict=True) if digest not in bad}
    reasons = {digest: (texts[digest], reason) for digest, reason in bad.items()}
    collection.ledger.quarantine(collection.fingerprint, reasons)
    if made:
        try:
            remember(collection.database, collection.fingerprint, encoder)
        except Exception as error:  # the check of model drift says so again; the texts are not to blame
            log.warning("collection %r: the canaries could not be encoded: %s", collection.definition.name, error)
    return made, bad, tokens


def pending_texts(collection: Collection, item_keys: list[str], *, force: bool = False) -> tuple[int, int]:
    """How many texts of these items a sync would encode, and how many already have their vector. Writes nothing."""
    pending = reused = 0
    with collection.source.connect() as reading, collection.database.connect(autocommit=True) as connection:
        for start in range(0, len(item_keys), LOOK_AT_ONCE):
            rows = collection.source.read(reading, item_keys[start : start + LOOK_AT_ONCE])
            theirs: set[str] = set()
            if collection.adopts and not force:
                theirs = collection.current.table.adoptable_items(connection, [row.item_key for row in rows])
            reused += len(theirs)
            others = [row for row in rows if row.item_key not in theirs]
            wanted = [text for row in others for text in _render(collection, row.row_json) if text[2]]
            digests = {content_hash(text) for _, _, text in wanted}
            statement = collection.current.table.statement("embed/content_hashes")
            there = connection.execute(statement, {"keys": [row.item_key for row in rows]}).fetchall()
            have = set() if force else digests & {row[0] for row in there}
            lacking = digests - have
            excused = (
                set() if force else collection.ledger.quarantined(collection.fingerprint, list(lacking), waiting=True)
            )
            pending += len(lacking - excused)
            reused += len(have)
    return pending, reused


def _encode(encoder: Encoder, digests: list[bytes], texts: list[str], bad: dict[bytes, str]) -> NDArray[np.float32]:
    """Vectors of `texts`; those that fail by themselves get zeros and a reason in `bad` (rule 7)."""
    try:
        vectors = encoder.encode_documents(texts)
    except Exception as error:
        if isinstance(error, OutageError | ProfileError) and not isinstance(error, OutOfMemoryError):
            raise
        if len(texts) == 1:
            if not _works(encoder):
                raise
            bad[digests[0]] = _reason(error, texts[0])
            return np.zeros((1, encoder.dimensions), np.float32)
        half = len(texts) // 2
        first = _encode(encoder, digests[:half], texts[:half], bad)
        return np.concatenate([first, _encode(encoder, digests[half:], texts[half:], bad)])
    length = np.linalg.norm(vectors.astype(np.float64), axis=1)
    for n in np.flatnonzero(~(np.isfinite(length) & (length > 0))):
        bad[digests[n]] = "the model gave a vector that is not finite, or zero"
    return vectors


def _reason(error: Exception, text: str) -> str:
    if isinstance(error, MemoryError | OutOfMemoryError):
        return f"memory ran out for this text of {len(text):,} characters alone: `chunk:` splits long texts"
    return f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"


def _works(encoder: Encoder) -> bool:
    """Whether the encoder takes a harmless text: if not, the texts are not to blame."""
    try:
        encoder.encode_documents(["a plain sentence"])
    except Exception:
        return False
    return True


def vectors_there(collection: Collection, batch: int, *, committed: bool = True) -> dict[bytes, NDArray]:
    """Content hash → vector: what a run of this batch encoded before it was killed, and (`committed`) what is
    committed.
    """
    there: dict[bytes, NDArray] = {}
    newest = collection.lake.newest(collection.folder("embeddings"), batch)
    if newest and newest[1].num_rows and newest[1]["embedding"].type.list_size == collection.current.table.dimension:
        vectors = files.vectors_from_arrow(newest[1]["embedding"])
        there.update(zip(newest[1]["content_hash"].to_pylist(), vectors, strict=True))
    if not committed:
        return there
    table = collection.current.table
    query = table.statement("embed/vectors_of_batch", batch=sql.Literal(batch))
    with collection.database.connect(autocommit=True) as connection:
        found = copy_out(
            connection, query, {"content_hash": "bytea16", "embedding": table.storage}, dimension=table.dimension
        )
    there.update(zip((digest.tobytes() for digest in found["content_hash"]), found["embedding"], strict=True))
    return there


def vectors_adopted(collection: Collection, texts: pa.Table) -> dict[bytes, NDArray]:
    """Content hash → vector: what the user's own column had before we came, of items that are never committed.

    Those are the declared profile's; nothing is taken where another is the current one.
    """
    table = collection.current.table
    if not texts.num_rows or not collection.adopts:
        return {}
    keys, row_hashes = texts["item_key"].to_pylist(), texts["row_hash"].to_pylist()
    with collection.database.connect(autocommit=True) as connection:
        vectors = table.adopted_vectors(connection, keys, row_hashes)
    hashes = texts["content_hash"].to_pylist()
    return {hashes[place]: vector for place, vector in vectors.items()}


def embeddings_table(
    collection: Collection, texts: pa.Table, vectors: Mapping[bytes, NDArray], made: Container[bytes]
) -> pa.Table:
    table = collection.current.table
    schema = files.embeddings_schema(table.dimension, table.storage)
    hashes = texts["content_hash"].to_pylist()
    rows = [n for n, digest in enumerate(hashes) if digest in vectors]
    digests = [hashes[n] for n in rows]
    kept = texts.take(pa.array(rows, pa.int64()))
    matrix = np.stack([vectors[digest] for digest in digests]) if rows else np.zeros((0, table.dimension), np.float32)
    columns = [
        kept["item_key"],
        kept["vector_name"],
        kept["chunk"],
        kept["content_hash"],
        pa.array([table.fingerprint] * len(rows), pa.string()),
        pa.array([digest in made for digest in digests], pa.bool_()),
        files.vectors_to_arrow(matrix, schema),
    ]
    return pa.table(columns, schema=schema)
