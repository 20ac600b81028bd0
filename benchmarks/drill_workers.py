"""Those who go on working while `drill_migration.py` changes the model: what each does again and again, in a process
of its own, and how it looks at every answer.
"""

import contextlib
import json
import random
import re
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray

from embeddings_pipeline.config.definition import CollectionAttributes, CollectionDefinition
from embeddings_pipeline.config.profiles import Profile, resolve_profile
from embeddings_pipeline.config.settings import Settings, load_settings
from embeddings_pipeline.encoders import load_encoder
from embeddings_pipeline.errors import PipelineError, StaleRunError
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline.pipeline.run_batch import run_batch
from embeddings_pipeline.search.query import search
from embeddings_pipeline.store.database import open_database

TOPICS, SUBTOPICS, PARTS = 200, 50, 4096
READERS = {"library": "drill_library", "foreign": "drill_reader"}  # worker → its role in the database
RIGHT = 0.99  # cosine of a row's own text; of the next best it is 0.9
AGAIN = ("EMB01", "22000", "0A000", "42804", "42P01")  # what the docs tell other programs to try again on
REST = "rest"
FOREIGN = """
SELECT item_key, 1 - (embedding <=> %(query)s::halfvec) AS score
FROM embeddings.items
WHERE vector_name = 'base' AND (SELECT embeddings.assert_model('items', %(fingerprint)s))
ORDER BY embedding <=> %(query)s::halfvec({dimension}) LIMIT 1
"""
FOREIGN_ADOPTED = """
SELECT id::text, 1 - (embedding <=> %(query)s::vector) AS score
FROM films
WHERE (SELECT embeddings.assert_model('items', %(fingerprint)s))
ORDER BY embedding <=> %(query)s::vector({dimension}) LIMIT 1
"""


class NumberEncoder:
    """Vectors from the numbers in a text: topic, subtopic, film and version."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.dimensions = profile.dimensions
        tables = np.random.default_rng(len(profile.document_prompt) + profile.dimensions)
        self.tables = [
            tables.standard_normal((size, profile.dimensions), np.float32) for size in (997, 997, PARTS, PARTS)
        ]

    def encode_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        numbers = [([*map(int, re.findall(r"\d+", text)), 0, 0, 0, 0])[:4] for text in texts]
        topic, sub, film, version = np.array(numbers, np.uint64).T
        mixed = film * np.uint64(0x9E3779B97F4A7C15) + version * np.uint64(0xD1B54A32D192ED03)
        one, two = (mixed >> np.uint64(20)) % np.uint64(PARTS), (mixed >> np.uint64(40)) % np.uint64(PARTS)
        vectors = self.tables[0][topic % np.uint64(997)] + 0.6 * self.tables[1][(sub + topic) % np.uint64(997)]
        vectors += 0.3 * (self.tables[2][one] + self.tables[3][two])
        unit: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return unit.astype(np.float32)

    encode_queries = encode_documents

    def count_tokens(self, texts: Sequence[str]) -> NDArray[np.int64]:
        return np.array([len(text.split()) for text in texts], np.int64)


def definition(current: int, candidate: int, index: str, adopted: bool) -> CollectionDefinition:
    model = {"provider": "python", "model": "drill_workers:NumberEncoder"}
    profile = {"name": "first", "dimensions": current, **model}
    # The same dimension is another model by its prompt.
    other = {"dimensions": candidate, "document_prompt": "second: ", **model}
    where: dict[str, Any] = {"profile": profile, "index": {"method": index}}
    if adopted:
        where = {"destination": {"table": "films", "profile": profile}}
    return CollectionDefinition(
        CollectionAttributes.model_validate(
            {
                **where,
                "name": "items",
                "source": {"table": "films", "key": ["id"], "updated_at": "updated_at"},
                "columns": ["title"],
                "vectors": {"base": "{title}"},
                "profiles": {"second": other},
                "model_change": {"grace_hours": 24},
            }
        )
    )


def work(role: str, one: CollectionDefinition, rows: int) -> None:
    """Until stdin is closed; then a line of JSON: what was done, milliseconds by phase, and what failed."""
    stop, phase = threading.Event(), ["before"]

    def listen() -> None:
        for line in sys.stdin:
            phase[0] = line.strip()
        stop.set()

    threading.Thread(target=listen, daemon=True).start()
    settings, chance = load_settings(), random.Random(role)
    if role in READERS:
        url = open_database(settings).url.replace("//postgres@", f"//{READERS[role]}@", 1)
        settings = settings.model_copy(update={"database_url": url})
    took: dict[str, list[float]] = {}
    failed: list[str] = []
    wrong: list[str] = []
    act = {"library": _library, "foreign": _foreign, "writer": _writer, "sync": _sync, "blocker": _blocker}.get(
        role, _vacuum
    )
    state: dict[str, Any] = {"again": 0}
    for _ in range(3 if role in ("library", "foreign") else 0):  # imports, connections, the first plan
        act(one, settings, chance, rows, state)
    while not stop.is_set():
        if phase[0] == REST:
            stop.wait(0.05)
            continue
        began, during = time.perf_counter(), phase[0]
        try:
            answer = act(one, settings, chance, rows, state)
            if answer:
                wrong.append(f"{during}: {answer}")
        except StaleRunError:
            state["again"] += 1
        except (PipelineError, psycopg.Error) as error:
            failed.append(f"{during}: {type(error).__name__}: {str(error).splitlines()[0]}")
        took.setdefault(during, []).append(1000 * (time.perf_counter() - began))
        stop.wait(state.get("pause", 0.02))
    print(json.dumps({"role": role, "took": took, "failed": failed, "wrong": wrong, "again": state["again"]}))


def _row(chance: random.Random, rows: int) -> tuple[int, str]:
    """A row of the first half, which nobody edits."""
    n = chance.randint(1, rows // 2)
    return n, f"topic {n % TOPICS} sub {n // TOPICS % SUBTOPICS} film {n}"


def _library(one: CollectionDefinition, settings: Settings, chance: random.Random, rows: int, _: Any) -> str | None:
    n, text = _row(chance, rows)
    hits = search(one, settings, text, k=1)
    return None if hits and hits[0].item_key == str(n) and hits[0].score > RIGHT else f"{text}: {hits}"


def _foreign(
    one: CollectionDefinition, settings: Settings, chance: random.Random, rows: int, state: dict[str, Any]
) -> str | None:
    """A program of somebody else's, as the documentation tells it to ask."""
    if "connection" not in state:
        state["connection"] = open_database(settings).connect(autocommit=True)
        state["model"] = None
    connection = state["connection"]
    n, text = _row(chance, rows)
    for _ in range(10):
        if state["model"] is None:
            row = connection.execute("SELECT * FROM embeddings.current_model('items')").fetchone()
            profile = resolve_profile(one.profile_named(row[0]), settings)
            state["model"] = (row[1], row[2], load_encoder(profile, settings))
        fingerprint, dimension, encoder = state["model"]
        statement = (FOREIGN_ADOPTED if one.attributes.destination else FOREIGN).format(dimension=dimension)
        query = str(encoder.encode_queries([text])[0].tolist())
        try:
            found = connection.execute(statement, {"query": query, "fingerprint": fingerprint}).fetchone()
        except psycopg.Error as error:
            if error.sqlstate not in AGAIN:
                raise
            state["model"], state["again"] = None, state["again"] + 1
            continue
        return None if found and found[0] == str(n) and found[1] > RIGHT else f"{text}: {found}"
    return f"{text}: no answer after ten tries"


def _writer(
    _: CollectionDefinition, settings: Settings, chance: random.Random, rows: int, state: dict[str, Any]
) -> None:
    """Edits and inserts in the second half, and new rows."""
    if "connection" not in state:
        state["connection"], state["next"] = open_database(settings).connect(autocommit=True), rows
    n = chance.randint(rows // 2 + 1, rows)
    if chance.random() < 0.8:
        edit = "UPDATE films SET title = title || ' version 1', updated_at = clock_timestamp() WHERE id = %s"
        state["connection"].execute(edit, [n])
    else:
        state["next"] += 1
        insert = "INSERT INTO films (id, title, updated_at) VALUES (%s, 'topic 1 sub 1 film ' || %s, clock_timestamp())"
        state["connection"].execute(insert, [state["next"], state["next"]])


def _sync(one: CollectionDefinition, settings: Settings, *_: Any) -> None:
    collection = open_collection(one, settings)
    collection.ledger.incremental_scan(collection.source, seconds=1)
    for batch in list(collection.ledger.work())[:3]:
        run_batch(open_collection(one, settings), [batch], f"sync-{time.time_ns()}")


def _blocker(_: CollectionDefinition, settings: Settings, __: random.Random, ___: int, state: dict[str, Any]) -> None:
    """A report that reads the view and takes two seconds over it."""
    state["pause"] = 3.0
    with open_database(settings).connect() as connection:
        connection.execute("SELECT count(*) FROM (SELECT 1 FROM embeddings.items LIMIT 10) AS few")
        time.sleep(2)


def _vacuum(_: CollectionDefinition, settings: Settings, __: random.Random, ___: int, state: dict[str, Any]) -> None:
    """VACUUM all that the change works with; a fifth of the time, where it takes long."""
    began = time.perf_counter()
    with open_database(settings).connect(autocommit=True) as connection:
        tables = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'embeddings'").fetchall()
        for (table,) in tables:
            if "_vector_" in table or "_hash_" in table or table.endswith("_text"):
                with contextlib.suppress(psycopg.errors.UndefinedTable):
                    connection.execute(f'VACUUM embeddings."{table}"')
        connection.execute("VACUUM films")
    state["pause"] = max(2.0, 4 * (time.perf_counter() - began))
