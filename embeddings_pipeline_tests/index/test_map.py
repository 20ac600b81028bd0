"""The map: where items lie, what it is coloured by, how it stands to the table, and how it is published."""

import importlib.util
import json
import struct
import sys
import zlib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import ConfigurationError, VectorIndexError
from embeddings_pipeline.health.lag import map_due
from embeddings_pipeline.index import map_build, map_points
from embeddings_pipeline.index.map_build import ensure_map, why_made
from embeddings_pipeline.index.map_picture import CATEGORIES, HEIGHT, WIDTH, picture
from embeddings_pipeline.index.map_points import place_items
from embeddings_pipeline.index.map_read import NONE, OTHER, Legend, open_map, read_map_manifest
from embeddings_pipeline.pipeline.collection import Collection, open_collection
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.model_tables import unit_vectors
from embeddings_pipeline_tests.support.workbench import definition, execute, films, make_films, sync_once

EVIL = "</script><script>alert(1)</script>"
SOURCE = "SELECT *, ARRAY['Drama', 'Crime'] AS tags, id % 3 = 0 AS seen, '2020-01-01'::date + id::int AS day FROM films"


def coloured(**others: Any) -> CollectionDefinition:
    return definition(
        source={"query": SOURCE, "key": ["id"]},
        columns=["title", "revenue", "tags", "seen", "day"],
        filters={"revenue": "number", "tags": "texts", "seen": "boolean", "day": "timestamp", "title": "text"},
        **others,
    )


@pytest.fixture
def collection(database: Database, settings: Settings) -> Collection:
    """Thirty films, of which one has no number, one a name with markup, and one no title."""
    rows = films(30)
    rows[4] = (5, "Film 5", "Its revenue is not known", None)
    rows[6] = (7, EVIL, "It tries something", 1007)
    rows[8] = (9, None, "It has no title", 1009)
    make_films(database, rows)
    return sync_once(coloured(), settings)[0]


def made(collection: Collection, one: CollectionDefinition | None = None) -> map_build.MadeMap:
    return ensure_map(
        collection.database, collection.model.destination, folder(collection), one or collection.definition
    )


def folder(collection: Collection) -> Path:
    return collection.settings.state_dir / "faiss"


def chart_of(collection: Collection) -> Any:
    chart = open_map(folder(collection), "films")
    assert chart is not None
    return chart


def test_each_item_is_a_point_with_its_name_and_colours(collection: Collection) -> None:
    manifest = made(collection).manifest
    assert (manifest.items, manifest.left_out, manifest.vectors["base"].method) == (30, 0, "pca")
    chart = chart_of(collection)
    for column in manifest.legends:
        points = chart.points("base", column, 1000)
        assert sorted(map(int, points.keys)) == list(range(1, 31)) and np.isfinite(points.at).all()
        by_key = dict(zip(points.keys, points.colours.tolist(), strict=True))
        legend = manifest.legends[column]
        if column == "revenue":
            assert by_key["30"] == 1030 and np.isnan(by_key["5"]) and 1000 < legend.low < legend.high <= 1030
        elif column == "day":
            assert by_key["1"] == datetime(2020, 1, 2, tzinfo=UTC).timestamp()
        elif column == "seen":
            assert legend.categories == ["false", "true"] and legend.counts == [20, 10] and by_key["3"] == 1
        elif column == "tags":
            assert legend.categories == ["Drama"] and set(by_key.values()) == {0}
        else:
            assert len(legend.categories) == map_build.CATEGORIES and by_key["9"] == NONE
            assert list(by_key.values()).count(OTHER) == 19
    labels = dict(zip(points.keys, points.labels, strict=True))
    assert (labels["1"], labels["7"], labels["9"]) == ("Film 1", EVIL, "9")


def test_a_sample_is_the_same_each_time_and_each_item_is_found_by_its_key(collection: Collection) -> None:
    made(collection)
    chart = chart_of(collection)
    few, all_of_them = chart.points("base", None, 7), chart.points("base", None, 1000)
    assert few.keys == all_of_them.keys[:7] and few.keys != sorted(few.keys, key=int)
    some = chart.of_keys(["30", "1", "1", "no such", "17", ""], "base", "revenue")
    assert some.keys == ["30", "1", "17"] and some.colours.tolist() == [1030, 1001, 1017]
    places = dict(zip(all_of_them.keys, all_of_them.at.tolist(), strict=True))
    assert some.at.tolist() == [places[key] for key in some.keys]
    for vector, colour in (("bse", None), ("base", "revenu")):
        with pytest.raises(ConfigurationError, match="did you mean"):
            chart.points(vector, colour, 5)


def test_points_are_the_two_directions_in_which_vectors_differ_most() -> None:
    vectors = unit_vectors(5000, 16) * np.array([9, 4, *[1] * 14], np.float32)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    order = np.random.default_rng(1).permutation(5000)

    def blocks() -> Any:
        for start in range(0, 5000, 700):
            yield order[start : start + 700], vectors[order[start : start + 700]]

    points = place_items("pca", 5000, 5000, blocks)
    centred = unit - unit.mean(axis=0)
    expected = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
    for axis in (0, 1):
        assert abs(np.corrcoef(points.at[:, axis], expected[:, axis])[0, 1]) > 0.9999
    values = np.linalg.svd(centred, compute_uv=False) ** 2
    assert points.variance == pytest.approx(values[:2].sum() / values.sum(), abs=1e-3)


def test_axes_are_measured_on_a_sample_that_is_spread_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.concatenate([unit_vectors(2000, 8), unit_vectors(2000, 8, 1) + 2]).astype(np.float32)

    def blocks() -> Any:
        for start in range(0, 4000, 300):
            yield np.arange(start, min(start + 300, 4000)), vectors[start : start + 300]

    whole = place_items("pca", 4000, 4000, blocks)
    monkeypatch.setattr(map_points, "MEASURED", 500)
    sampled = place_items("pca", 4000, 4000, blocks)
    assert abs(np.corrcoef(whole.at[:, 0], sampled.at[:, 0])[0, 1]) > 0.99
    assert sampled.variance == pytest.approx(whole.variance, abs=0.05)


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_few_items_and_equal_ones_have_points_too(rows: int) -> None:
    vectors = np.ones((rows, 4), np.float16)
    points = place_items("umap", 3, rows, lambda: iter([(np.arange(rows), vectors)]))
    assert np.isfinite(points.at).all(axis=1).sum() == rows and points.variance == 0


def test_an_item_of_several_chunks_lies_in_their_middle() -> None:
    vectors = np.array([[1, 0], [0, 1], [1, 0], [0, 1]], np.float32)
    places = np.array([0, 0, 1, 2])
    points = place_items("pca", 4, 4, lambda: iter([(places, vectors)])).at
    assert points[0] == pytest.approx((points[1] + points[2]) / 2, abs=1e-6) and np.isnan(points[3]).all()


def test_items_without_a_vector_are_left_out_and_counted(
    database: Database, settings: Settings, collection: Collection
) -> None:
    execute(database, "INSERT INTO films VALUES (31, NULL, NULL, 1), (32, 'Film 32', 'It waits', 1)")
    blank = coloured(vectors={"base": "{overview}", "named": "{title}"})
    opened, _ = sync_once(blank, settings, "again")
    execute(database, "INSERT INTO films VALUES (33, 'Film 33', 'It waits for longer', 1)")
    opened.ledger.full_scan(opened.source)
    manifest = made(opened).manifest
    counts = {name: each.items for name, each in manifest.vectors.items()}
    assert (manifest.items, manifest.left_out, counts) == (31, 2, {"base": 31, "named": 30})
    assert "9" in chart_of(opened).points("base", None, 100).keys
    assert "9" not in chart_of(opened).points("named", None, 100).keys


def test_it_is_made_anew_when_it_has_to_be_and_not_before(
    database: Database, settings: Settings, collection: Collection
) -> None:
    assert made(collection).reason == "there was none" and made(collection).reason == ""
    first = read_map_manifest(folder(collection), "films")
    other = coloured(map={"colour": "tags"})
    assert made(collection, other).reason == "`map:` or the filters have changed"
    assert list(read_map_manifest(folder(collection), "films").legends) == ["tags"]
    assert len(list((folder(collection) / "films").glob("map-*.arrow"))) == 1
    assert not (folder(collection) / "films" / first.file).exists()

    execute(database, "UPDATE films SET overview = 'another' WHERE id = 1")
    sync_once(other, settings, "again")
    assert why_made(database, folder(collection), other)[0] == ""  # behind by a moment
    age_map(collection, timedelta(hours=21))
    assert why_made(database, folder(collection), other)[0] == "the one before was behind the table"
    assert made(collection, other).reason == "the one before was behind the table"
    age_map(collection, timedelta(hours=21))
    assert why_made(database, folder(collection), other)[0] == ""  # it is current, whatever its age

    execute(database, "UPDATE embeddings.database_identity SET id = gen_random_uuid()")
    assert made(collection, other).reason == "the one before was foreign"
    (folder(collection) / "films" / "map.json").write_text("{}")
    assert made(collection, other).reason == "it was damaged"


def age_map(collection: Collection, by: timedelta) -> None:
    path = folder(collection) / "films" / "map.json"
    content = json.loads(path.read_text())
    content["made_at"] = (datetime.now(UTC) - by).isoformat()
    path.write_text(json.dumps(content))


def test_a_map_that_is_quickly_made_follows_the_table_sooner(
    database: Database, settings: Settings, collection: Collection
) -> None:
    made(collection)
    execute(database, "UPDATE films SET overview = 'another' WHERE id = 1")
    sync_once(coloured(), settings, "again")
    age_map(collection, timedelta(minutes=10))
    assert made(collection).reason == "the one before was behind the table"


def test_sync_sensor_and_live_ask_for_a_map_that_is_missing(settings: Settings, collection: Collection) -> None:
    assert map_due(collection)
    made(collection)
    assert not map_due(collection)
    (folder(collection) / "films" / "map.json").unlink()
    assert map_due(collection)
    assert not map_due(open_collection(coloured(map={"method": "none"}), settings))


def test_another_model_makes_another_map(database: Database, settings: Settings, collection: Collection) -> None:
    made(collection)
    execute(database, "UPDATE embeddings.collection SET fingerprint = 'another00000'")
    assert why_made(database, folder(collection), collection.definition)[0] == "the one before was of another model"
    with pytest.raises(VectorIndexError, match="is not the current one"):
        made(collection)


def test_a_build_that_fails_leaves_the_map_and_nothing_else(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(collection)
    before = sorted(path.name for path in (folder(collection) / "films").iterdir())

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(map_build, "write_file", fail)
    with pytest.raises(VectorIndexError, match=r"No space left on device; the one before stays\. Make room"):
        made(collection, coloured(map={"colour": "tags"}))
    assert sorted(path.name for path in (folder(collection) / "films").iterdir()) == before
    assert len(chart_of(collection).points("base", None, 100).keys) == 30


def test_a_damaged_file_is_named(collection: Collection) -> None:
    manifest = made(collection).manifest
    path = folder(collection) / "films" / manifest.file
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(VectorIndexError, match=f"{manifest.file} is damaged"):
        open_map(folder(collection), "films")


def test_a_reader_keeps_a_map_that_is_replaced_meanwhile(collection: Collection) -> None:
    made(collection)
    chart = chart_of(collection)
    made(collection, coloured(map={"colour": "tags"}))
    assert len(chart.points("base", "revenue", 100).keys) == 30
    assert list(chart_of(collection).manifest.legends) == ["tags"]


def test_the_picture_is_a_png_of_the_colours_and_never_large() -> None:
    random = np.random.default_rng(0)
    at, colours = random.standard_normal((200_000, 2)).astype(np.float32), random.integers(0, 10, 200_000)
    png = picture(at, colours.astype(np.uint8), Legend("text", list("abcdefghij"), [1] * 10))
    assert len(png) < 150_000
    header, palette, pixels = read_png(png)
    assert header == (WIDTH, HEIGHT) and set(palette[1 : len(CATEGORIES) + 1]) == {rgb(c) for c in CATEGORIES}
    assert set(np.unique(pixels)) == set(range(11))
    numbers = picture(at[:500], np.append(np.arange(499.0), np.nan), Legend("number", low=0, high=400))
    assert len(np.unique(read_png(numbers)[2])) == 9
    assert read_png(picture(np.full((3, 2), np.nan, np.float32), None, None))[2].max() == 0


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


def read_png(png: bytes) -> tuple[tuple[int, int], list[tuple[int, ...]], Any]:
    """Size, palette and pixels; each chunk's CRC is looked at."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, rest = {}, png[8:]
    while rest:
        (length,) = struct.unpack(">I", rest[:4])
        kind, data = rest[4:8], rest[8 : 8 + length]
        assert struct.unpack(">I", rest[8 + length : 12 + length]) == (zlib.crc32(kind + data),)
        chunks[kind], rest = data, rest[12 + length :]
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    palette = [tuple(chunks[b"PLTE"][n : n + 3]) for n in range(0, len(chunks[b"PLTE"]), 3)]
    return (width, height), palette, rows[:, 1:]


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"method": "ummap"}, "did you mean 'umap'"),
        ({"colour": "tittle"}, r"'tittle' is not among `filters:` \(did you mean 'title'\?\)"),
        ({"colour": ["tags", "tags"]}, "stands there twice"),
        ({"colors": "tags"}, "colors"),
    ],
)
def test_mistakes_in_the_definition_are_told(rules: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        coloured(map=rules)


def test_umap_keeps_neighbours_together_and_places_what_it_was_not_fitted_on(
    monkeypatch: pytest.MonkeyPatch, skip_without: Any
) -> None:
    skip_without("umap-learn", importlib.util.find_spec("umap") is not None)
    monkeypatch.setattr(map_points, "UMAP_FITTED", 60)
    centres = unit_vectors(3, 16)
    groups = np.arange(90) % 3
    vectors = centres[groups] + 0.05 * unit_vectors(90, 16, 1)
    points = place_items("umap", 90, 90, lambda: iter([(np.arange(90), vectors)]))
    assert points.method == "umap" and np.isfinite(points.at).all()
    middles = np.stack([points.at[:60][groups[:60] == group].mean(axis=0) for group in range(3)])
    nearest = np.linalg.norm(points.at[:, None] - middles[None], axis=2).argmin(axis=1)
    assert (nearest == groups).all()


def test_umap_that_is_not_installed_says_how_to_get_it(collection: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(VectorIndexError, match=r"pip install 'embeddings-pipeline\[umap\]', or say `method: pca`"):
        made(collection, coloured(map={"method": "umap"}))
