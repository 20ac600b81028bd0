"""The sample catalogue with the real model: a description in other words finds the film."""

import csv
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from embeddings_pipeline.config.loading import load_collections
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.index import faiss_build
from embeddings_pipeline.index.pgvector import ensure_index
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline.search.evaluate import choose_ways, evaluate, self_judgements
from embeddings_pipeline.search.judgements import JudgedQuery, Judgements
from embeddings_pipeline.search.measures import HIT_RATE, NDCG, RECALL
from embeddings_pipeline.search.query import search
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.load import load_file
from embeddings_pipeline_tests.support import databases
from embeddings_pipeline_tests.support.workbench import run_batch

CATALOGUE = Path(__file__).resolve().parents[2] / "examples" / "movies.csv"
COLUMNS = (
    "id,title,overview,tagline,genres,keywords,cast_members,director,production_companies,release_year,"
    "runtime_minutes,popularity,vote_count,vote_average,budget,revenue,updated_at"
)
QUERIES = {
    "a man ages backwards": "The Curious Case of Benjamin Button",
    "a television weatherman is trapped in a time loop": "Groundhog Day",
    "a pig learns to herd livestock on a farm": "Babe",
    "a boy travels back in time and meets his parents as teenagers": "Back to the Future",
    "a photographer with a broken leg watches his neighbours through the window": "Rear Window",
    "one person holds out against the rest while deliberating on a murder verdict": "12 Angry Men",
    "a language expert decodes the writing of extraterrestrial visitors": "Arrival",
    "an old man ties balloons to his house and flies away": "Up",
    "a rodent with a refined palate secretly becomes a gourmet cook": "Ratatouille",
    "teenager adrift at sea sharing a lifeboat with a wild predator": "Life of Pi",
    "villagers play cricket against British officers to escape a tax": "Lagaan",
    "an old man crosses several states on a riding lawn mower to see his estranged brother": "The Straight Story",
    "a son hides the collapse of communism from his sick mother": "Good Bye, Lenin!",
    "music lover hauls a steamship over a mountain in the jungle": "Fitzcarraldo",
    "an angel gives up immortality for a circus acrobat": "Wings of Desire",
}


pytestmark = pytest.mark.slow  # MiniLM embeds the sample


@pytest.fixture(scope="module")
def catalogue(
    server: Database, new_databases: None, template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Settings]:
    """The sample, synced once for all tests of this file."""
    database = databases.copied(server, f"test_{uuid.uuid4().hex[:12]}", template)
    settings = Settings(database_url=database.url, embeddings_state_dir=tmp_path_factory.mktemp("meaning"))
    load_file(database, CATALOGUE, "movies")
    collection = open_collection(load_collections()["items"], settings)
    collection.ledger.full_scan(collection.source)
    run_batch(collection, 0, "run")
    ensure_index(database, collection.model.destination, collection.definition.attributes.index, ["base"])
    faiss_build.build(database, collection.model.destination, settings.state_dir / "faiss")
    yield settings
    databases.dropped(server, databases.name_of(database))


@pytest.mark.parametrize("index", ["pgvector", "faiss"])
@pytest.mark.parametrize("query", QUERIES)
def test_a_description_in_other_words_finds_the_film(
    catalogue: Settings, query: str, index: Literal["pgvector", "faiss"]
) -> None:
    hits = search(load_collections()["items"], catalogue, query, k=3, index=index)
    assert QUERIES[query] in [hit.item["title"] for hit in hits]


def test_the_evaluation_says_that_descriptions_find_their_films(catalogue: Settings) -> None:
    with CATALOGUE.open(newline="", encoding="utf-8") as file:
        keys = {row["title"]: row["id"] for row in csv.DictReader(file)}
    items = load_collections()["items"]
    golden = Judgements("golden", tuple(JudgedQuery(query, {keys[title]: 1}) for query, title in QUERIES.items()))
    chosen = choose_ways(items, catalogue, golden)
    evaluation = evaluate(items, catalogue, golden, chosen.ways)
    assert [way.name for way in evaluation.ways] == ["minilm pgvector base", "minilm faiss base"]
    for way in evaluation.ways:
        figure = way.figures[NDCG]
        assert 0.85 < figure.mean <= figure.high <= 1 and way.figures[RECALL].mean == 1
    by_title = evaluate(items, catalogue, self_judgements(items, catalogue), chosen.ways[:1]).ways[0]
    assert by_title.figures[HIT_RATE].mean > 0.9


def test_the_catalogue_is_whole_and_its_facts_are_plausible() -> None:
    with CATALOGUE.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert ",".join(rows[0]) == COLUMNS
    assert len(rows) >= 400
    assert len({row["id"] for row in rows}) == len({(row["title"], row["release_year"]) for row in rows}) == len(rows)
    for row in rows:
        assert all(row[column] for column in ("title", "overview", "genres", "keywords", "cast_members", "director"))
        assert 1890 < int(row["release_year"]) < 2030 and 5 < int(row["runtime_minutes"]) < 500
