"""A process that has searched forks its workers, as gunicorn --preload, uwsgi and Celery do."""

import subprocess
import sys

import pytest

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.index.faiss_build import build
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.workbench import definition, films, make_films, sync_once

PRELUDE = """
import json, os, sys, threading, time
from pathlib import Path
from embeddings_pipeline.config.definition import CollectionAttributes, CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.search.query import search
attributes, url, state = sys.argv[1:]
one = CollectionDefinition(CollectionAttributes.model_validate(json.loads(attributes)))
settings = Settings(database_url=url, embeddings_state_dir=Path(state))
backends = []

def ask(index="pgvector"):
    query = "a man, his dog and the winter they spent in the mountains; " * 8
    return [(hit.item_key, round(hit.score, 3)) for hit in search(one, settings, query, k=3, index=index)]

def in_thread(work):
    result = []
    thread = threading.Thread(target=lambda: result.append(work()))
    thread.start()
    thread.join()
    return result[0]

def in_child(work):
    '''What work() returns in a forked process; fails if that does not come back.'''
    receives, sends = os.pipe()
    if (child := os.fork()) == 0:
        with os.fdopen(sends, "w") as out:
            out.write(json.dumps(work()))
        os._exit(0)
    os.close(sends)
    deadline = time.monotonic() + 90
    while not os.waitpid(child, os.WNOHANG)[0]:
        if time.monotonic() > deadline:
            os.kill(child, 9)
            sys.exit("a search in a forked worker hangs")
        time.sleep(0.05)
    return [tuple(hit) for hit in json.load(os.fdopen(receives))]

expected = ask(), ask("faiss")
"""

CASES = {
    "in the worker's own thread": """
for _ in range(2):
    assert in_child(ask) == expected[0]
    assert in_child(lambda: ask("faiss")) == expected[1]
""",
    "in a thread of the worker": """
assert in_child(lambda: in_thread(ask)) == expected[0]
assert in_child(lambda: in_thread(lambda: ask("faiss"))) == expected[1]
""",
    "in a worker's worker": """
assert in_child(lambda: (ask(), in_child(ask))[1]) == expected[0]
""",
    "while other threads search": """
def go_on():
    while not ended.is_set():
        ask(), ask("faiss")

ended = threading.Event()
threads = [threading.Thread(target=go_on) for _ in range(3)]
[thread.start() for thread in threads]
for _ in range(6):
    time.sleep(0.1)
    assert in_child(ask) == expected[0]
ended.set()
[thread.join() for thread in threads]
""",
}
AFTERWARDS = """
assert (ask(), ask("faiss")) == expected  # no worker has ended the parent's sessions
print("well")
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_search_in_a_forked_worker_answers(database: Database, settings: Settings, case: str) -> None:
    make_films(database, films(60))
    collection, _ = sync_once(definition(profile="minilm", items_per_batch=100), settings)
    build(database, collection.model.destination, settings.state_dir / "faiss")
    command = [sys.executable, "-W", "ignore", "-c", PRELUDE + CASES[case] + AFTERWARDS]
    command += [collection.definition.attributes.model_dump_json(), database.url, str(settings.state_dir)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=400)
    assert (done.returncode, done.stdout) == (0, "well\n"), done.stderr
