"""Ways of searching side by side: what is measured, what is left out and told, and the command that prints it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from embeddings_pipeline.config.definition import COMPONENT_TYPE, CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import ConfigurationError, DatabaseError, ProfileError, VectorIndexError
from embeddings_pipeline.index.faiss_build import build
from embeddings_pipeline.index.words import ensure_words
from embeddings_pipeline.model_change.phases import add_model
from embeddings_pipeline.model_change.state import candidate_profile
from embeddings_pipeline.pipeline.collection import Collection, open_collection
from embeddings_pipeline.pipeline.shadow import backfill_batch
from embeddings_pipeline.search.evaluate import RerankerError, Way, choose_ways, evaluate, self_judgements
from embeddings_pipeline.search.judgements import JudgedQuery, Judgements
from embeddings_pipeline.search.measures import MRR, NDCG, RECALL
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support import tiny_models
from embeddings_pipeline_tests.support.command_line import Done, run_here
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.workbench import (
    PROFILE,
    by_name,
    definition,
    execute,
    films,
    make_films,
    sync_once,
)

WIDE = {**PROFILE, "name": "wide", "dimensions": 48}
TWO: dict[str, Any] = {"vectors": {"base": "{title} | {overview}", "title": "{title}"}}


def golden(*numbers: int, extra: tuple[str, ...] = ()) -> Judgements:
    queries = (JudgedQuery(f"Film {n} number {n}", dict.fromkeys([str(n), *extra], 1)) for n in numbers)
    return Judgements("golden", tuple(queries))


@pytest.fixture
def made(database: Database, settings: Settings) -> Callable[..., Collection]:
    def make(number: int = 25, *, faiss: bool = True, **attributes: Any) -> Collection:
        make_films(database, films(number))
        collection, _ = sync_once(definition(profiles=by_name(WIDE), **attributes), settings)
        if faiss:
            build(database, collection.model.destination, settings.state_dir / "faiss")
        return collection

    return make


def names(ways: Any) -> list[str]:
    return [way.name for way in ways]


def test_each_index_and_vector_is_a_way_and_the_first_is_how_search_goes(made: Callable[..., Collection]) -> None:
    one = made(**TWO)
    chosen = choose_ways(one.definition, one.settings, golden(1))
    assert names(chosen.ways) == [
        f"test {index} {vectors}" for index in ("pgvector", "faiss") for vectors in ("base", "title", "base+title")
    ]
    evaluation = evaluate(one.definition, one.settings, golden(3, 7), chosen.ways)
    first, *others = evaluation.ways
    assert first.against_first is None and all(way.against_first for way in others)
    assert first.figures[NDCG].mean == 1 and 0 < first.p50_ms <= first.p95_ms
    assert {way.figures[RECALL].mean for way in evaluation.ways} == {1}
    assert evaluation.told == []


def test_words_and_both_together_are_ways_too(made: Callable[..., Collection], database: Database) -> None:
    one = made(faiss=False, words={})
    chosen = choose_ways(one.definition, one.settings, golden(1), indexes=["pgvector"])
    assert names(chosen.ways) == ["test pgvector base"]  # the words are not in PostgreSQL yet
    assert set(chosen.left_out) == {"test pgvector hybrid base", "text base"}
    with pytest.raises(DatabaseError, match="the words do not answer"):
        choose_ways(one.definition, one.settings, golden(1), indexes=["pgvector"], modes=["hybrid"])
    ensure_words(database, one.definition)
    build(database, one.model.destination, one.settings.state_dir / "faiss", one.definition.attributes.words)
    ways = choose_ways(one.definition, one.settings, golden(1)).ways
    assert names(ways) == [
        "test pgvector hybrid base",
        "test faiss hybrid base",
        "test pgvector base",
        "test faiss base",
        "text base",
    ]
    evaluation = evaluate(one.definition, one.settings, golden(1, 2, 3), ways)
    assert [way.fell_back for way in evaluation.ways] == [0] * 5
    assert evaluation.ways[-1].figures[NDCG].mean > 0.5


def test_reranked_is_a_way_if_it_is_asked_for(made: Callable[..., Collection], tmp_path: Path) -> None:
    one, folder = made(), tiny_models.cross_encoder(tmp_path / "reranker")
    settings = one.settings.model_copy(update={"rerank_model": str(folder), "embedding_device": "cpu"})
    plain = ["test pgvector base", "test faiss base"]
    assert names(choose_ways(one.definition, settings, golden(1)).ways) == plain
    chosen = choose_ways(one.definition, settings, golden(1), rerank=True)
    assert names(chosen.ways) == [*plain, "test pgvector base reranked"]
    evaluation = evaluate(one.definition, settings, golden(1, 2, 3), chosen.ways)
    assert evaluation.told == [] and evaluation.ways[0].figures[NDCG].mean == 1
    assert chosen.ways[2].search(one.definition, settings, "Film 1").explanation.rerank.model == str(folder)
    always = settings.model_copy(update={"enable_reranker": True})
    assert names(choose_ways(one.definition, always, golden(1)).ways) == ["test pgvector base reranked", *plain]
    assert names(choose_ways(one.definition, always, golden(1), rerank=False).ways) == plain
    gone = always.model_copy(update={"rerank_model": str(tmp_path / "gone")})
    chosen = choose_ways(one.definition, gone, golden(1))
    assert names(chosen.ways) == plain
    assert "the reranker does not answer: " in chosen.left_out["test pgvector base reranked"]
    with pytest.raises(RerankerError, match="gone"):
        choose_ways(one.definition, gone, golden(1), rerank=True)


def test_a_better_way_is_told_from_a_worse_one(made: Callable[..., Collection], database: Database) -> None:
    one = made(60, **TWO)
    table = one.model.destination.name
    execute(database, f"UPDATE embeddings.{table} SET embedding = ('[1' || repeat(',0', 31) || ']')::halfvec "
                      "WHERE vector_name = 'title'")  # fmt: skip
    ways = [Way(vectors=("base",)), Way(vectors=("title",))]
    evaluation = evaluate(one.definition, one.settings, golden(*range(41, 61)), ways)
    against = evaluation.ways[1].against_first
    assert against is not None and against[NDCG].mean < -0.5 and against[NDCG].high < 0 and against[NDCG].p < 0.01


def test_a_shadow_model_is_side_by_side_and_its_queries_are_encoded_once(made: Callable[..., Collection]) -> None:
    one = made(**TWO)
    add_model(one, candidate_profile(one, "wide"))
    [shadow] = one.ledger.shadow_models()
    first, *others = one.ledger.batches()
    backfill_batch(one.with_model(shadow), first, "run")
    incomplete = choose_ways(one.definition, one.settings, golden(1))
    assert incomplete.told[0] == "profile 'wide' has no vectors of 15 items, which no search finds"
    for batch in others:
        backfill_batch(one.with_model(shadow), batch, "run")
    chosen = choose_ways(one.definition, one.settings, golden(1))
    assert chosen.uncovered == {}
    assert names(chosen.ways)[-3:] == ["wide pgvector base", "wide pgvector title", "wide pgvector base+title"]
    assert list(chosen.left_out) == ["wide faiss base", "wide faiss title", "wide faiss base+title"]
    assert "kept beside the current one" in chosen.left_out["wide faiss base"]
    DeterministicEncoder.reset()
    evaluation = evaluate(one.definition, one.settings, golden(3, 7), chosen.ways)
    assert len(evaluation.ways) == 9
    assert DeterministicEncoder.texts_encoded == {"Film 3 number 3": 2, "Film 7 number 7": 2}  # once a model


def test_what_cannot_answer_is_left_out_unless_it_was_asked_for(made: Callable[..., Collection]) -> None:
    one = made(faiss=False)
    chosen = choose_ways(one.definition, one.settings, golden(1))
    assert names(chosen.ways) == ["test pgvector base"] and list(chosen.left_out) == ["test faiss base"]
    assert chosen.told[0].startswith("left out: test faiss base: ")
    for options, error, words in (
        ({"indexes": ["faiss"]}, VectorIndexError, "sync"),
        ({"profiles": ["wide"]}, ConfigurationError, "has no vectors of profile 'wide'"),
        ({"vectors": [("titel",)]}, ConfigurationError, "has no vector 'titel'"),
    ):
        with pytest.raises(error, match=words):
            choose_ways(one.definition, one.settings, golden(1), **options)  # type: ignore[arg-type]


def test_faiss_of_another_model_is_no_way_of_faiss(made: Callable[..., Collection], database: Database) -> None:
    one = made()
    execute(database, "UPDATE embeddings.database_identity SET id = gen_random_uuid()")
    assert "faiss does not answer" in choose_ways(one.definition, one.settings, golden(1)).left_out["test faiss base"]
    with pytest.raises(VectorIndexError, match="faiss does not answer: the FAISS index is"):
        choose_ways(one.definition, one.settings, golden(1), indexes=["faiss"])
    evaluation = evaluate(one.definition, one.settings, golden(1, 2), [Way(index="faiss")])
    assert evaluation.told == ["faiss: 2 queries of 2 did not go that way"]


def test_missing_items_are_counted_once_and_count_as_not_found(made: Callable[..., Collection]) -> None:
    one = made()
    evaluation = evaluate(one.definition, one.settings, golden(3, 7, extra=("gone", "lost")), [Way()])
    assert (evaluation.missing_items, evaluation.relevant_items) == (2, 4)
    assert evaluation.told == ["2 of 4 relevant items are not in the collection, and count as not found"]
    assert evaluation.ways[0].figures[RECALL].mean == pytest.approx(1 / 3)
    strangers = Judgements("golden.jsonl", (JudgedQuery("a", {"tt0111161": 1}),))
    with pytest.raises(ConfigurationError, match=r"none of the 1 item that it names, such as 'tt0111161'; its keys"):
        evaluate(one.definition, one.settings, strangers, [Way()])


def test_a_collection_without_vectors_or_with_other_weights(database: Database, settings: Settings) -> None:
    make_films(database, films(3))
    with pytest.raises(DatabaseError, match="no vectors yet"):
        choose_ways(definition(), settings, golden(1))
    with pytest.raises(DatabaseError, match="no vectors yet"):
        self_judgements(definition(), settings)
    collection = open_collection(definition(), settings)
    collection.ledger.full_scan(collection.source)
    with pytest.raises(DatabaseError, match="no items yet"):
        evaluate(definition(), settings, golden(1), [Way()])
    sync_once(definition(), settings)
    execute(database, """UPDATE embeddings.model SET profile = jsonb_set(profile, '{model}', '"gone:Encoder"')""")
    other = definition(profile={**PROFILE, "document_prompt": "x: "})
    with pytest.raises((ConfigurationError, ProfileError)):
        choose_ways(other, settings, golden(1))


def test_titles_find_their_items_as_a_smoke_test(database: Database, settings: Settings) -> None:
    make_films(
        database, [*films(9), (10, "Film 3", "another of that name", 0), (11, " ", "blank", 0), (12, None, "", 0)]
    )
    one, _ = sync_once(definition(columns=["revenue", "title"], **TWO), settings)
    judgements = self_judgements(one.definition, settings)
    assert len(judgements.queries) == 9 and "title" in judgements.source
    assert {query.text: sorted(query.relevant) for query in judgements.queries}["Film 3"] == ["10", "3"]
    figures = evaluate(one.definition, settings, judgements, [Way(vectors=("title",))]).ways[0].figures
    assert figures[MRR].mean == 1
    with pytest.raises(ConfigurationError, match="has no `columns:`"):
        self_judgements(definition(columns=[]), settings)


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(
    made: Callable[..., Collection], database: Database, settings: Settings, tmp_path: Path
) -> Callable[..., Done]:
    """`evaluate …` on 25 films, with a `defs.yaml` that declares golden queries and a floor."""
    one = made()
    attributes = {**one.definition.attributes.model_dump(mode="json", exclude_unset=True)}
    attributes["evaluation"] = {"queries": "golden.jsonl", "least_ndcg": 0.9}
    folder = tmp_path / "defs" / "films"
    folder.mkdir(parents=True)
    (folder / "defs.yaml").write_text(yaml.safe_dump({"type": COMPONENT_TYPE, "attributes": attributes}))
    write(folder / "golden.jsonl", {"query": "Film 3 number 3", "relevant": {"3": 2}})
    environment = {
        "DATABASE_URL": database.url,
        "EMBEDDINGS_STATE_DIR": str(settings.state_dir),
        "EMBEDDINGS_DEFS_DIR": str(tmp_path / "defs"),
    }
    return lambda *arguments: run_here(("evaluate", *arguments), environment)


def write(file: Path, *queries: Any) -> Path:
    file.write_text("\n".join(map(json.dumps, queries)))
    return file


def test_the_command_prints_every_way_side_by_side(command: Callable[..., Done], tmp_path: Path) -> None:
    file = write(
        tmp_path / "mine.jsonl",
        *({"query": f"Film {n} number {n}", "relevant": [n]} for n in range(1, 9)),
        {"query": "nothing", "relevant": {"1": 0}},
        {"query": "gone", "relevant": ["1", "gone"]},
    )
    done = command("--queries", str(file))
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert told[0].startswith("9 queries from mine.jsonl, 9 relevant items; in brackets: intervals of 95 %")
    assert told[1].split()[:3] == ["nDCG@10", "recall@100", "MRR"]
    assert [" ".join(line.split()[:3]) for line in told[2:4]] == ["test pgvector base", "test faiss base"]
    assert told[5].startswith("against test pgvector base, query by query")
    assert "p=1.000" in told[7]
    assert done.stderr.splitlines() == [
        "warning: 1 query without a relevant item is left out",
        "warning: 1 of 9 relevant items is not in the collection, and counts as not found",
    ]


def test_json_has_everything(command: Callable[..., Done], tmp_path: Path) -> None:
    file = write(tmp_path / "mine.jsonl", *({"query": f"Film {n}", "relevant": [n]} for n in range(1, 4)))
    said = json.loads(command("--queries", str(file), "--index", "pgvector", "--index", "faiss", "--json").stdout)
    assert (said["collection"], said["queries"], said["smoke_test"], said["left_out"]) == ("films", 3, False, {})
    first, second = said["ways"]
    assert first["way"] == {
        "profile": "test",
        "index": "pgvector",
        "vectors": ["base"],
        "mode": "dense",
        "rerank": False,
    }
    assert set(first["figures"]) == {"ndcg_at_10", "recall_at_100", "mrr", "hit_rate_at_10"}
    assert set(second["against_first"]["ndcg_at_10"]) == {"mean", "low", "high", "p"}
    assert first["against_first"] is None and first["p95_ms"] >= first["p50_ms"] > 0


def test_a_smoke_test_says_that_it_is_one(command: Callable[..., Done]) -> None:
    done = command("--self", "--index", "pgvector")
    assert done.returncode == 0 and "a smoke test: it says whether" in done.stdout
    assert json.loads(command("--self", "--json").stdout)["smoke_test"] is True


def test_without_queries_the_declared_ones_are_asked_and_their_floor_counts(
    command: Callable[..., Done], tmp_path: Path
) -> None:
    assert command().returncode == 0
    write(tmp_path / "defs" / "films" / "golden.jsonl", {"query": "Film 3 number 3", "relevant": {"gone": 3, "3": 1}})
    done = command()
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: collection 'films': nDCG@10 of 1 query is 0.")
    other = write(tmp_path / "mine.jsonl", {"query": "Film 3", "relevant": ["4", "gone"]})
    assert command("--queries", str(other)).returncode == 0  # the floor is of the declared ones


def test_what_is_wrong_is_one_line(command: Callable[..., Done], tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.jsonl", {"query": "a"})
    qrels = tmp_path / "qrels"
    for arguments, words in (
        (("--queries", str(bad)), "line 1"),
        (("--queries", str(tmp_path / "none")), "cannot be read"),
        (("--queries", str(bad), "--profile", "nope"), "line 1"),
        (("--self", "--profile", "nope"), "has no vectors of profile 'nope'"),
        (("--self", "--vectors", "base,nope"), "has no vector 'nope'"),
        (("--self", "--queries", str(bad)), "leave --queries and --qrels out"),
        (("--qrels", str(qrels)), "that --queries names"),
        (("--self", "--index", "hnsw"), "hnsw"),
    ):
        done = command(*arguments)
        told = " ".join(done.stderr.replace("│", " ").split())
        assert done.returncode in (1, 2) and words in told, (arguments, told)


def test_a_collection_without_declared_queries_asks_for_some(
    command: Callable[..., Done], tmp_path: Path, made: Any
) -> None:
    path = tmp_path / "defs" / "films" / "defs.yaml"
    said = yaml.safe_load(path.read_text())
    del said["attributes"]["evaluation"]
    path.write_text(yaml.safe_dump(said))
    done = command()
    assert done.returncode == 2 and "has no `evaluation:` in its defs.yaml" in done.stderr


@pytest.mark.parametrize(
    ("evaluation", "words"),
    [
        ({}, "queries"),
        ({"queries": " "}, "blank"),
        ({"queries": "a", "least_ndcg": 1.2}, "from 0 to 1"),
        ({"queries": "a", "least_ndcg": "high"}, "is not a number"),
        ({"queries": "a", "least_ndgc": 0.5}, "least_ndgc"),
        ("golden.jsonl", "dictionary"),
    ],
)
def test_a_wrong_declaration_is_told(evaluation: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        definition(evaluation=evaluation)


def test_declared_queries_that_are_not_there_are_named(tmp_path: Path) -> None:
    from embeddings_pipeline.search.evaluate import golden_judgements

    attributes = definition(evaluation={"queries": "golden.jsonl"}).attributes
    with pytest.raises(ConfigurationError, match=r"golden\.jsonl cannot be read: No such file"):
        golden_judgements(CollectionDefinition(attributes, tmp_path / "defs.yaml"))
    assert golden_judgements(CollectionDefinition(definition().attributes, tmp_path / "defs.yaml")) is None
