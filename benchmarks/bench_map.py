"""The map of many items: how long it takes, what memory, and how long the service needs for what the page shows.

    python benchmarks/bench_map.py [--items 1000000] [--method pca]

Uses made-up vectors of 384 dimensions in clusters, no model, and an embedded server of its own. The map is made, and
asked, in processes of their own, whose memory is looked at.
"""

import argparse
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from datetime import date
from functools import partial
from pathlib import Path

import bench_search
import numpy as np
import psutil
from bench_store import remove

from embeddings_pipeline.config.definition import CollectionAttributes, CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.index.map_build import ensure_map
from embeddings_pipeline.index.map_read import open_map
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline.serve.maps import MapRequest
from embeddings_pipeline.serve.served import Served
from embeddings_pipeline_tests.support.serving import write_definitions

ASKED = 20
MIB = 1 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--method", choices=("pca", "umap"), default="pca")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-map-"))
    folder.chmod(0o711)  # as root, PostgreSQL runs as another user
    settings = Settings(database_url=None, embeddings_state_dir=folder)
    collection = open_collection(definition(arguments.method), settings)
    try:
        vectors, clusters = bench_search.made_up(arguments.items, 1)
        parts = np.random.default_rng(3).permutation(arguments.items) % bench_search.PARTS
        bench_search.copy(collection, vectors, clusters, parts)
        print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, {arguments.items:,} items")
        for work in (make, show):
            spawned = multiprocessing.get_context("spawn").Process(target=work, args=(folder, arguments.method))
            spawned.start()
            spawned.join()
    finally:
        collection.database.close()
        remove(folder)
    return 0


def definition(method: str) -> CollectionDefinition:
    attributes = bench_search.definition("none").attributes.model_dump(exclude_defaults=True, mode="json")
    return CollectionDefinition(CollectionAttributes.model_validate({**attributes, "map": {"method": method}}))


def make(folder: Path, method: str) -> None:
    one, settings = definition(method), Settings(database_url=None, embeddings_state_dir=folder)
    collection = open_collection(one, settings)
    before, began = psutil.Process().memory_info().rss, time.perf_counter()
    made = ensure_map(collection.database, collection.model.destination, folder / "faiss", one)
    seconds, peak = time.perf_counter() - began, highest_memory()
    print(
        f"made by {method} in {seconds:.1f} s; {made.manifest.bytes / MIB:.0f} MiB; memory {before / MIB:.0f} MiB "
        f"before, {peak / MIB:.0f} MiB at most"
    )


def highest_memory() -> int:
    """Of this process, in bytes. Not getrusage's, which has what its parent held when it was begun."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(line.split()[1])


def show(folder: Path, method: str) -> None:
    """What the page asks for: a sample, and where hits are."""
    settings = Settings(database_url=None, embeddings_state_dir=folder)
    served = Served(write_definitions(folder / "defs", definition(method)))
    open_collection(definition(method), settings)
    before, began = psutil.Process().memory_info().rss, time.perf_counter()
    chart = open_map(folder / "faiss", "bench")
    opened = time.perf_counter() - began
    assert chart is not None
    keys = [str(number) for number in range(30)]
    asked = {
        "20,000 points": partial(MapRequest(colour="part").answer, served, settings),
        "30 items by key": partial(MapRequest(points=0, keys=keys).answer, served, settings),
    }
    for name, ask in asked.items():
        times = []
        for _ in range(ASKED):
            at = time.perf_counter()
            ask()
            times.append(1000 * (time.perf_counter() - at))
        print(f"{name}: p50 {statistics.median(times):.1f} ms, longest {max(times):.1f} ms")
    full = psutil.Process().memory_full_info()
    print(
        f"opened and verified in {opened:.2f} s; memory {before / MIB:.0f} MiB before, {full.uss / MIB:.0f} MiB after"
    )


if __name__ == "__main__":
    raise SystemExit(main())
