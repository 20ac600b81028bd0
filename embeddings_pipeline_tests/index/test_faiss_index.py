"""FAISS generations: exact, verified, and compared with the table."""

import shutil
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from embeddings_pipeline.index import faiss_build, faiss_read
from embeddings_pipeline.index.faiss_build import build
from embeddings_pipeline.index.faiss_read import open_index, read_manifest
from embeddings_pipeline.index.parity import check_parity
from embeddings_pipeline.index.snapshot import TableVersion, table_version
from embeddings_pipeline_tests.support.generations import generations, in_process, make_table
from embeddings_pipeline_tests.support.model_tables import (
    add_vectors,
    make_collection,
    unit_vectors,
)


@pytest.mark.parametrize("storage", ["halfvec", "vector"])
def test_search_returns_the_exact_nearest(database, folder, storage):
    table = make_collection(database, storage=storage)
    vectors = unit_vectors(300)
    add_vectors(database, table, vectors, first_id=1000)
    manifest = build(database, table, folder)
    queries = unit_vectors(7, seed=1) * 3  # of another length: cosine does not mind
    scores, ids = open_index(folder, "things").search("base", queries, 10)

    exact = (queries / 3) @ vectors.astype(np.float16 if storage == "halfvec" else np.float32).T.astype(np.float32)
    order = np.argsort(-exact, axis=1)[:, :10]
    np.testing.assert_array_equal(ids, order + 1000)
    np.testing.assert_allclose(scores, np.take_along_axis(exact, order, 1), atol=1e-5)
    assert (scores.dtype, ids.dtype) == (np.float32, np.int64)
    assert manifest.vectors["base"].exact and manifest.recall_at_10 == 1


def test_vectors_that_are_not_of_length_one_are_ranked_by_cosine(database, folder):
    table = make_collection(database)
    vectors = unit_vectors(100)
    add_vectors(database, table, vectors * np.linspace(0.1, 9, 100, dtype=np.float32)[:, None])
    build(database, table, folder)
    scores, ids = open_index(folder, "things").search("base", vectors, 1)
    np.testing.assert_array_equal(ids[:, 0], np.arange(1, 101))
    np.testing.assert_allclose(scores, 1, atol=2e-3)


def test_manifest_says_what_the_generation_was_made_from(database, folder, table):
    add_vectors(database, table, unit_vectors(20, seed=3), name="title", first_id=9000)
    manifest = build(database, table, folder)
    assert read_manifest(folder, "things") == manifest
    of = (manifest.fingerprint, manifest.database, manifest.epoch, manifest.version, manifest.stamp)
    with database.connect() as connection:
        assert table_version(connection, "things") == TableVersion(*of)
    assert (manifest.version, manifest.dimension, manifest.count) == (2, 32, 520)
    assert {name: part.vectors for name, part in manifest.vectors.items()} == {"base": 500, "title": 20}


def test_reading_the_manifest_does_not_import_faiss(database, folder, table):
    build(database, table, folder)
    code = "print(faiss_read.read_manifest(folder, 'things').count, 'faiss' in sys.modules)"
    assert in_process(code, database, folder).communicate()[0].strip() == "500 False"


def test_an_empty_table_gives_an_empty_generation(database, folder):
    manifest = build(database, make_collection(database), folder)
    opened = open_index(folder, "things")
    scores, ids = opened.search("base", unit_vectors(2), 3)
    assert manifest.count == 0
    assert ids.tolist() == [[-1] * 3] * 2 and np.isneginf(scores).all()
    assert check_parity(database, make_table(), opened).ok


def test_fewer_vectors_than_asked_for_are_padded(database, folder):
    table = make_collection(database)
    add_vectors(database, table, unit_vectors(2))
    build(database, table, folder)
    scores, ids = open_index(folder, "things").search("base", unit_vectors(1), 5)
    assert ids[0, 0] == 1 and ids[0, 2:].tolist() == [-1, -1, -1] and np.isneginf(scores[0, 2:]).all()


def test_queries_of_another_dimension_are_an_error(database, folder, table):
    build(database, table, folder)
    with pytest.raises(ValueError, match="need \\(n, 32\\)"):
        open_index(folder, "things").search("base", unit_vectors(1, 16), 5)


def test_above_the_limit_recall_is_measured_and_reached(database, folder, monkeypatch):
    monkeypatch.setattr(faiss_build, "EXACT_BELOW", 5000)
    table = make_collection(database)
    centres = unit_vectors(50, seed=5)
    vectors = centres[np.random.default_rng(0).integers(0, 50, 6000)] + 0.1 * unit_vectors(6000)
    add_vectors(database, table, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    manifest = build(database, table, folder)
    assert manifest.vectors["base"].index_type.startswith("IVF77,SQfp16,nprobe=")
    assert not manifest.vectors["base"].exact
    assert manifest.recall_at_10 >= faiss_build.WANTED_RECALL
    parity = check_parity(database, table, open_index(folder, "things"))
    assert parity.ok and parity.recall_at_10 >= faiss_build.LEAST_RECALL and parity.sampled == 50


@pytest.mark.parametrize("lists", [True, False])
def test_of_chosen_texts_all_are_compared_and_none_is_left_out(database, folder, monkeypatch, lists):
    monkeypatch.setattr(faiss_build, "EXACT_BELOW", 2000 if lists else 10_000)
    table, vectors = make_collection(database), unit_vectors(5000)
    add_vectors(database, table, vectors)
    build(database, table, folder)
    opened, query = open_index(folder, "things"), unit_vectors(1, seed=9)
    chosen = np.random.default_rng(1).choice(np.arange(1, 5001), 60, replace=False)
    _, ids = opened.search("base", query, 80, chosen=opened.choice("base", np.append(chosen, 99_999)))
    order = chosen[np.argsort(-(vectors[chosen - 1] @ query[0]))]
    assert ids[0, :60].tolist()[:10] == order[:10].tolist() and set(ids[0, :60]) == set(chosen)
    assert (ids[0, 60:] == -1).all()
    _, ids = opened.search("base", query, 5000, thorough=True)
    assert len(set(ids[0])) == 5000 and -1 not in ids
    assert (opened.search("base", query, 5, chosen=opened.choice("base", np.array([], np.int64)))[1] == -1).all()


def test_three_generations_stay_and_an_open_one_still_answers(database, folder, table):
    first = build(database, table, folder)
    opened = open_index(folder, "things")
    for _ in range(4):
        last = build(database, table, folder)
    assert len(generations(folder)) == 3 and first.generation not in generations(folder)
    assert read_manifest(folder, "things") == last
    assert opened.search("base", unit_vectors(1), 1)[1].tolist() == [[1]]


def test_opening_is_done_once_a_generation(database, folder, table):
    build(database, table, folder)
    assert open_index(folder, "things") is open_index(folder, "things")
    before = open_index(folder, "things")
    build(database, table, folder)
    assert open_index(folder, "things") is not before


def watched_hashing(monkeypatch):
    """The names of the files that are hashed from now on."""
    hashed: list[str] = []
    verify = faiss_read.verify

    def watched(path, expected):
        hashed.append(path.name)
        verify(path, expected)

    monkeypatch.setattr(faiss_read, "verify", watched)
    return hashed


def mapped(folder):
    """The index files below the folder that this process has mapped into its memory."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split(maxsplit=5)[5] for line in lines if ".faiss" in line and str(folder) in line}


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/maps is Linux's")
def test_a_process_maps_the_current_generation_of_each_collection_and_no_other(database, folder, table, monkeypatch):
    hashed = watched_hashing(monkeypatch)
    build(database, table, folder)
    for n in range(12):  # more collections than a small cache would hold
        shutil.copytree(folder / "things", folder / f"other{n}")
    names = ["things", *(f"other{n}" for n in range(12))]
    for name in [*names, *names]:
        open_index(folder, name)
    assert len(hashed) == 2 * len(names) and len(mapped(folder)) == len(names)
    new = build(database, table, folder)
    for n in range(3):
        shutil.rmtree(folder / f"other{n}")
    open_index(folder, "things")
    assert len(mapped(folder)) == len(names) - 3
    assert {path.split("/")[-2] for path in mapped(folder / "things")} == {new.generation}


def test_threads_that_open_a_new_generation_hash_it_once(database, folder, table, monkeypatch):
    hashed = watched_hashing(monkeypatch)
    build(database, table, folder)
    with ThreadPoolExecutor(8) as threads:
        opened = list(threads.map(lambda _: open_index(folder, "things"), range(16)))
    assert sorted(hashed) == ["base.faiss", "base.ids.npy"] and len({id(each) for each in opened}) == 1


@pytest.mark.parametrize("order", ["torch, faiss", "faiss, torch"])
def test_torch_and_faiss_work_in_one_process(order):
    code = f"""
    import {order}
    import numpy as np
    x = np.random.default_rng(0).standard_normal((20000, 64)).astype("float32")
    index = faiss.IndexFlatIP(64)
    index.add(x)
    for _ in range(3):
        torch.from_numpy(x) @ torch.from_numpy(x[:500]).T
        index.search(x[:200], 10)
    print("well")
    """
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == "well", (done.stderr, time.monotonic() - began)
