"""Agents find the same tools by the official client, in the protocol of today and in that of before."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx2
import pytest
from mcp.client.client import Client
from mcp.client.streamable_http import streamable_http_client

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline_tests.support.serving import Serving, serving

KEY = "0123456789"
MODES = pytest.mark.parametrize("mode", ["auto", "legacy"])


def talk(service: Serving, mode: str, talking: Callable[[Client], Awaitable[None]], key: str = KEY) -> None:
    async def run() -> None:
        headers = {"Authorization": f"Bearer {key}"}
        async with httpx2.AsyncClient(headers=headers, trust_env=False) as http:
            transport = streamable_http_client(f"{service.url}/mcp", http_client=http)
            async with Client(transport, mode=mode) as client:
                await talking(client)

    asyncio.run(run())


async def told(client: Client, tool: str, **arguments: Any) -> tuple[bool, str]:
    result = await client.call_tool(tool, arguments)
    [content] = result.content
    return bool(result.is_error), content.text  # type: ignore[union-attr]


@MODES
def test_an_agent_finds_what_others_find(served: Settings, mode: str) -> None:
    async def talking(client: Client) -> None:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) == {"list_collections", "search", "similar", "recommend"}
        assert all(tool.description and tool.annotations.read_only_hint for tool in tools.values())
        failed, text = await told(client, "list_collections")
        assert not failed and json.loads(text)["collections"][0]["filters"]["revenue"] == {"type": "number"}
        failed, text = await told(client, "search", query="Film 25 number 25", k=1, where={"revenue": {"gte": 1}})
        assert not failed and json.loads(text)["hits"][0]["item"]["revenue"] == 9007199254740993
        failed, text = await told(client, "similar", item_key=7, collection="films", k=3)
        assert not failed and len(json.loads(text)["hits"]) == 3
        where = {"revenue": {"lte": 1010}}
        failed, text = await told(client, "recommend", liked=[7, "8"], disliked=[9], k=3, where=where, diversity=0.1)
        found = [hit["item_key"] for hit in json.loads(text)["hits"]]
        assert not failed and len(found) == 3 and set(found) <= {str(n) for n in (1, 2, 3, 4, 5, 6, 10)}

    with serving(served, key=KEY) as service:
        talk(service, mode, talking)


@MODES
def test_an_agents_mistake_is_one_line_that_it_can_read(served: Settings, mode: str) -> None:
    async def talking(client: Client) -> None:
        for tool, arguments, line in (
            ("search", {"query": " "}, "the query is blank"),
            ("search", {"query": "x", "k": 0}, "k: "),
            ("search", {"query": "x" * 100_000}, "query: "),
            ("search", {"query": "x", "where": {"titel": 1}}, "did you mean 'title'"),
            ("search", {"query": "x", "collection": "film"}, "did you mean 'films'"),
            ("search", {"query": "x", "mode": "text"}, "no lexical index"),
            ("similar", {"item_key": "99"}, "no item '99'"),
            ("recommend", {}, "nothing was liked"),
            ("recommend", {"liked": [1], "diversity": 7}, "diversity"),
            ("recommend", {"liked": [1], "where": {"revenue": "many"}}, "is a number"),
        ):
            failed, text = await told(client, tool, **arguments)
            assert failed and line in text and "\n" not in text and "Traceback" not in text, text

    with serving(served, key=KEY) as service:
        talk(service, mode, talking)


@MODES
def test_an_agent_looks_for_words_too(worded: Settings, mode: str) -> None:
    async def talking(client: Client) -> None:
        for way in ("text", "hybrid", None):
            failed, text = await told(client, "search", query="number 25", mode=way, k=2, where={"revenue": {"gte": 1}})
            hits = json.loads(text)["hits"]
            assert not failed and len(hits) == 2 and hits[0]["item"]["revenue"] == 9007199254740993

    with serving(worded, key=KEY) as service:
        talk(service, mode, talking)


def test_an_agent_needs_the_key(served: Settings) -> None:
    async def talking(client: Client) -> None:
        raise AssertionError("it was let in")

    with serving(served, key=KEY) as service:
        for mode in ("auto", "legacy"):
            with pytest.raises(Exception) as caught:
                talk(service, mode, talking, key="another")
            assert "it was let in" not in repr(caught.value)
        assert service.get("/mcp").status_code == 405
