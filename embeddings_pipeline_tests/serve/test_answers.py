"""What the service answers: what searches find, and of mistakes one line."""

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.loading import read_collections
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.search.query import search, similar
from embeddings_pipeline.search.recommend import recommend
from embeddings_pipeline_tests.support import tiny_models
from embeddings_pipeline_tests.support.serving import Serving, serving, write_definitions
from embeddings_pipeline_tests.support.workbench import definition, sync_once


def keys(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    return [hit["item_key"] for hit in response.json()["hits"]]


def test_hits_are_those_that_python_finds(served: Settings, one: CollectionDefinition) -> None:
    where = {"revenue": {"gte": 1010}, "not": {"title": "Film 12"}}
    with serving(served) as service:
        answer = service.post("/search", query="Film 25 number 25", k=3, where=where, explain=True)
        hits = search(one, served, "Film 25 number 25", k=3, where=where)
        assert keys(answer) == [hit.item_key for hit in hits]
        assert json.loads(answer.text)["hits"][0]["item"] == {"title": "Film 25", "revenue": 9007199254740993}
        assert answer.json()["explanation"]["legs"][0]["ranks"][hits[0].item_key]["rank"] == 1
        assert answer.json()["fingerprint"] == hits.explanation.fingerprint
        dense = service.post("/search", query="number 7", k=3, mode="dense", explain=True)
        assert (len(keys(dense)), dense.json()["explanation"]["mode"]) == (3, "dense")
        for item_key in (7, "7"):
            found = keys(service.post("/similar", item_key=item_key, k=4, collection="films"))
            assert found == [hit.item_key for hit in similar(one, served, "7", k=4)]
        liked: dict[str, Any] = {
            "liked": [7],
            "history": ["9", {"item": 11, "weight": -2, "at": "2026-01-31"}],
            "k": 4,
            "diversity": 0,
        }
        hits = recommend(one, served, **liked)
        assert keys(service.post("/recommend", **liked)) == [hit.item_key for hit in hits]
        assert "explanation" not in service.post("/search", query="a story").json()


def test_words_and_filters_are_asked_for_as_in_python(worded: Settings, tmp_path: Path) -> None:
    one = read_collections(worded.defs_dir).find("films")
    where = {"revenue": {"any": [1003, 1007, 1011]}, "not": {"title": "Film 3"}}
    with serving(worded) as service:
        for mode in ("text", "hybrid", None, "dense"):
            answer = service.post("/search", query="number 7", k=5, mode=mode, where=where, explain=True)
            hits = search(one, worded, "number 7", k=5, mode=mode, where=where)  # type: ignore[arg-type]
            assert keys(answer) == [hit.item_key for hit in hits] == ["7", "11"]
            legs = [leg["answered_by"] for leg in answer.json()["explanation"]["legs"]]
            assert legs == [leg.answered_by for leg in hits.explanation.legs]
        assert keys(service.post("/similar", item_key=7, where=where)) == ["11"]
        assert set(keys(service.post("/recommend", liked=[3], where=where))) == {"7", "11"}
        for query in ("😀🎬", '" & | ! :* \\', "x" * 10_000, "кошки"):
            assert len(keys(service.post("/search", query=query, k=5))) == 5
        for fields in ({"mode": "words"}, {"query": " "}, {"where": {"titel": 1}}, {"where": {"revenue": "2000"}}):
            refused = service.post("/search", **{"query": "x", **fields})
            assert refused.status_code == 422 and "\n" not in refused.json()["error"]


def test_hits_are_reranked_if_the_request_says_so(served: Settings, one: CollectionDefinition, tmp_path: Path) -> None:
    folder = tiny_models.cross_encoder(tmp_path / "reranker")
    reranking = served.model_copy(update={"rerank_model": str(folder), "embedding_device": "cpu"})
    with serving(reranking) as service:
        plain = service.post("/search", query="number 7")
        reranked = service.post("/search", query="number 7", rerank=True, explain=True)
        three = service.post("/search", query="number 7", rerank=True, k=3)
    hits = search(one, reranking, "number 7", rerank=True)
    assert [len(keys(answer)) for answer in (plain, reranked, three)] == [10, 20, 3]
    assert keys(reranked) == [hit.item_key for hit in hits] and keys(three) == keys(reranked)[:3]
    assert [hit["score"] for hit in reranked.json()["hits"]] == [hit.score for hit in hits]
    told = reranked.json()["explanation"]["rerank"]
    assert (told["model"], told["scored"]) == (str(folder), 25)
    assert told["ranks"][keys(plain)[0]]["rank"] == 1


def test_collections_say_what_may_be_asked(served: Settings) -> None:
    with serving(served) as service:
        [films] = service.get("/collections").json()["collections"]
    assert (films["name"], films["columns"], films["vectors"]) == ("films", ["title", "revenue"], ["base"])
    assert films["filters"] == {"revenue": {"type": "number"}, "title": {"type": "text"}}
    assert [way["fields"] for way in films["models"]] == [{}, {"index": "faiss"}]
    assert [(mode["fields"]["mode"], bool(mode["why_not"])) for mode in films["modes"]] == [
        ("dense", False),
        ("text", True),
        ("hybrid", True),
    ]
    assert films["profile"] == "test" and re.fullmatch("[0-9a-f]{12}", films["fingerprint"])


MISTAKES = [
    ("/search", {"query": "x", "k": 0}, 422, "k: .*greater"),
    ("/search", {"query": "x", "k": 10_000}, 422, "k: .*1000"),
    ("/search", {"query": "x", "k": True}, 422, "k: "),
    ("/search", {"query": "x", "k": "10"}, 422, "k: "),
    ("/search", {"query": "x" * 100_000}, 422, "query: .*10000"),
    ("/search", {"query": " \u200b\n"}, 422, "the query is blank"),
    ("/search", {}, 422, "query: .*required"),
    ("/search", {"query": 5}, 422, "query: "),
    ("/search", {"query": "x", "limit": 3}, 422, "limit: there is no such field"),
    ("/search", {"query": "x", "where": {"titel": "Film 1"}}, 422, "no filter 'titel'.*did you mean 'title'"),
    ("/search", {"query": "x", "where": {"revenue": "a"}}, 422, "'revenue' is a number"),
    ("/search", {"query": "x", "where": {"title": {"any": ["\ud800"]}}}, 422, "title"),
    ("/search", {"query": "x", "vectors": "plot"}, 422, "no vector 'plot'"),
    ("/search", {"query": "x", "profile": "others"}, 422, "no vectors of profile 'others'"),
    ("/search", {"query": "x", "index": "lucene"}, 422, "index: "),
    ("/search", {"query": "x", "collection": "film"}, 404, "no collection 'film'.*did you mean 'films'"),
    ("/search", {"query": "x", "mode": "words"}, 422, "mode: "),
    ("/search", {"query": "x", "mode": "text"}, 422, "no lexical index"),
    ("/similar", {"item_key": "99"}, 404, "no item '99'"),
    ("/similar", {"item_key": ""}, 422, "item_key"),
    *(
        ("/similar", {"item_key": key}, 422, "^item_key: it is an item's key, a text or a whole number, or a list")
        for key in (None, True, 1.5, {"a": 1})
    ),
    ("/recommend", {"liked": [7, True]}, 422, "^liked.1: it is an item's key"),
    ("/similar", {"item_key": "a\0b"}, 422, "item_key"),
    ("/similar", {"query": "x"}, 422, "item_key.*query: there is no such field"),
    ("/recommend", {}, 422, "nothing was liked"),
    ("/recommend", {"liked": ["7"], "history": [{"item": 3, "weight": float("nan")}]}, 422, "weight"),
    ("/recommend", {"liked": ["7"], "history": [{"film": 3}]}, 422, "history"),
    ("/recommend", {"liked": "7"}, 422, "liked"),
    ("/recommend", {"liked": [7], "diversity": 2}, 422, "diversity"),
    ("/nothing", {}, 404, "/nothing: not found"),
]


@pytest.fixture
def running(served: Settings) -> Any:
    with serving(served) as service:
        yield service


def one_line(response: httpx.Response) -> str:
    [error] = response.json().values()
    assert list(response.json()) == ["error"] and "\n" not in error and "Traceback" not in response.text
    assert len(error) < 1000
    return str(error)


def test_a_mistake_is_one_line(running: Serving) -> None:
    for path, fields, status, line in MISTAKES:
        with running.client() as client:
            body = json.dumps(fields).encode()
            response = client.post(path, content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == status, (fields, response.text)
        assert re.search(line, one_line(response)), (fields, response.text)


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b'{"query":', "application/json", 422),
        (b"[1, 2]", "application/json", 422),
        (b"", "application/json", 422),
        (b'{"query": "x"}', "text/plain", 422),  # which a page of another site may send
        (b'{"query": "\xff"}', "application/json", 400),
        (b'{"query": "x", "where": ' + b"[" * 100_000, "application/json", 400),
        (b"x" * (4 << 20) + b"y", "application/json", 413),
    ],
)
def test_a_body_that_is_no_request_is_one_line(running: Serving, body: bytes, kind: str, status: int) -> None:
    with running.client() as client:
        response = client.post("/search", content=body, headers={"Content-Type": kind})
        assert response.status_code == status
        assert one_line(response)
        assert client.get("/search").status_code == 405
    assert len(keys(running.post("/search", query="a story", k=25))) == 25


def test_queries_of_emoji_quotes_and_operators_are_texts(running: Serving) -> None:
    for query in ("🎬🍿", '"a" & b | !c :* \\', "'; DROP TABLE films; --", "Фильм 3", "x" * 10_000):
        assert len(keys(running.post("/search", query=query, k=5))) == 5
    values = {"revenue": {"any": list(range(50_000))}}
    assert len(keys(running.post("/search", query="a story", k=24, where=values))) == 24


def test_of_several_collections_one_has_to_be_named(served: Settings) -> None:
    other = definition("books")
    sync_once(other, served)
    write_definitions(served.defs_dir, other)
    with serving(served) as service:
        assert "there are books, films" in one_line(service.post("/search", query="x"))
        assert service.post("/search", query="x", collection="books").json()["collection"] == "books"


def test_the_documents_load_nothing_from_the_network(served: Settings) -> None:
    with serving(served) as service:
        page = service.get("/docs").text
        assert not re.findall(r"https?://", page)
        for asset in re.findall(r'(?:src|href)="(/[^"]+)"', page):
            assert service.get(asset).status_code == 200
        schema = service.get("/openapi.json").json()
    assert {"/search", "/similar", "/recommend", "/collections", "/healthz", "/readyz", "/metrics"} <= set(
        schema["paths"]
    )
    assert schema["paths"]["/search"]["post"]["responses"].keys() >= {"200", "404", "422", "429", "503"}
