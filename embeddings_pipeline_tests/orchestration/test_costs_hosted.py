"""A hosted model that takes money: what it bills is noted, a plan asks it nothing, and no answer is paid for twice."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.orchestration.sync import SyncResult, sync
from embeddings_pipeline.pipeline.quote import Quote
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support import redis_server
from embeddings_pipeline_tests.support.command_line import Done, run_here
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.embedding_server import EmbeddingServer, tokens_of
from embeddings_pipeline_tests.support.workbench import (
    PROFILE,
    by_name,
    definition,
    execute,
    films,
    forget_vectors,
    make_films,
)

FILMS, TOKENS = 30, 11  # tokens: of each text, which the tests' encoder counts as words
PAID = {**PROFILE, "name": "paid", "dimensions": 48, "cache": True, "price": 1_000_000 / TOKENS}  # a dollar a text


@pytest.fixture(autouse=True)
def _films(database: Database) -> None:
    make_films(database, films(FILMS))


@pytest.fixture
def run_sync(project: Settings, instance: dg.DagsterInstance) -> Callable[..., SyncResult]:
    return lambda one, **options: sync(one, project, instance=instance, **options)


@pytest.fixture
def service() -> Iterator[EmbeddingServer]:
    with EmbeddingServer(key="sk-a-secret-key") as service:
        yield service


@pytest.fixture
def hosted(service: EmbeddingServer, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("SERVICE_KEY", "sk-a-secret-key")
    return {
        "name": "hosted",
        "provider": "openai",
        "model": "text-embedding-3-small",
        "dimensions": 1536,
        "url": service.url,
        "key_variable": "SERVICE_KEY",
    }


@pytest.fixture
def change(project: Settings, hosted: dict[str, Any], tmp_path: Path) -> Callable[..., Done]:
    """`profile VERB …` of films on a model that is not paid for, with two that are; and variables."""
    folder = tmp_path / "defs" / "films"
    folder.mkdir(parents=True)
    attributes = definition(profiles=by_name(hosted, PAID)).attributes.model_dump(exclude_defaults=True, mode="json")
    written = yaml.safe_dump({"type": "embeddings_pipeline.EmbeddingCollection", "attributes": attributes})
    (folder / "defs.yaml").write_text(written)
    where = {"EMBEDDINGS_DEFS_DIR": str(folder.parent)}
    return lambda *words, **variables: run_here(("profile", *words), {**where, **variables})


def test_what_the_server_bills_is_noted_without_the_key(
    database: Database,
    project: Settings,
    service: EmbeddingServer,
    hosted: dict[str, Any],
    run_sync: Callable[..., SyncResult],
) -> None:
    one = definition(profile=hosted)
    done = run_sync(one)
    tokens = sum(tokens_of(text) for text in service.billed if text.startswith("Film"))
    row = execute(database, "SELECT texts, tokens, told, unpriced, model, account FROM embeddings.embedding_spend")[0]
    assert row[:5] == (FILMS, tokens, tokens, 0, "text-embedding-3-small")
    assert "secret" not in row[5]
    assert done.usd == pytest.approx(0.02 * tokens / 1e6, abs=1e-6)
    forget_vectors(database, project)
    assert run_sync(one).cached == FILMS
    assert {number for text, number in service.billed.items() if text.startswith("Film")} == {1}


def test_a_price_needs_no_key_and_asks_nothing(
    service: EmbeddingServer,
    hosted: dict[str, Any],
    run_sync: Callable[..., SyncResult],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SERVICE_KEY")
    said = run_sync(definition(profile=hosted), dry_run=True)
    assert said.quote is not None and said.quote["texts"] == FILMS and 0 < said.quote["usd"] < 0.001
    assert service.requests == 0


def test_a_plan_says_the_price_of_a_change_to_it_and_asks_nothing(
    service: EmbeddingServer, run_sync: Callable[..., SyncResult], change: Callable[..., Done]
) -> None:
    run_sync(definition())
    said = change("plan", "hosted", EMBEDDING_REQUESTS_PER_MINUTE="1")
    assert said.returncode == 0, said.stderr
    assert "test → hosted: 30 texts to encode (0 more are in the cache)" in said.stdout
    assert "-- batch 000002: 10 texts to encode" in said.stdout
    assert "$0.02 for a million tokens, from the table of" in said.stdout
    assert "-- hosted was asked nothing" in said.stdout
    told = json.loads(change("plan", "hosted", "--json", EMBEDDING_REQUESTS_PER_MINUTE="1").stdout)
    price, batches = told["price"]["quote"], told["price"]["quotes"]
    assert (told["current"], told["candidate"]) == ("test", "hosted")
    assert (price["texts"], price["cached"], price["requests"], list(batches)) == (
        FILMS,
        0,
        1,
        ["000000", "000001", "000002"],
    )
    assert sum(batch["tokens"] for batch in batches.values()) == price["tokens"] > 0
    assert price["usd"] == pytest.approx(0.02 * price["tokens"] / 1e6) and price["minutes"] == 1.0
    assert Quote(**price).in_words() in said.stdout and told["price"]["basis"] in said.stdout
    assert {phase["phase"] for phase in told["phases"]} == {step["phase"] for step in told["statements"]}
    assert change("plan", "hosted", EMBEDDING_ENABLED="false").returncode == 0
    assert service.requests == 0


def test_a_plan_needs_what_the_switch_needs(
    service: EmbeddingServer, run_sync: Callable[..., SyncResult], change: Callable[..., Done]
) -> None:
    run_sync(definition())
    assert "SERVICE_KEY is not set" in change("plan", "hosted", SERVICE_KEY="").stderr
    switched = change("switch", "hosted", "--yes", EMBEDDING_ENABLED="false")
    assert "EMBEDDING_ENABLED=false forbids every request" in switched.stderr
    assert service.requests == 0


def test_a_test_of_a_profile_says_before_what_it_sends(service: EmbeddingServer, change: Callable[..., Done]) -> None:
    off = change("test", "hosted", EMBEDDING_ENABLED="false")
    assert (off.returncode, off.stdout, service.requests) == (1, "", 0)
    assert "EMBEDDING_ENABLED=false forbids" in off.stderr and "are sent" not in off.stderr
    service.fail("status", status=401)
    assert "hosted: 332 texts are sent, about " in change("test", "hosted").stderr
    done = change("test", "hosted")
    assert done.returncode == 0 and f"about {service.tokens_billed:,} tokens, about $0.0003" in done.stderr
    assert sum(service.billed.values()) == 332


def test_a_class_of_ones_own_that_takes_money_is_not_asked_either(
    run_sync: Callable[..., SyncResult], change: Callable[..., Done]
) -> None:
    run_sync(definition())
    DeterministicEncoder.texts_encoded.clear()
    assert "30 texts to encode (0 more are in the cache), 330 tokens, $30.00" in change("plan", "paid").stdout
    off = change("switch", "paid", "--yes", EMBEDDING_ENABLED="false")
    assert "takes money, which EMBEDDING_ENABLED=false forbids" in off.stderr
    assert not DeterministicEncoder.texts_encoded


def test_redis_keeps_the_answers(
    skip_without: Callable[[str, bool], None],
    database: Database,
    project: Settings,
    service: EmbeddingServer,
    hosted: dict[str, Any],
    run_sync: Callable[..., SyncResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    skip_without("redis-server", redis_server.is_there())
    one = definition(profile=hosted)
    with redis_server.redis_server(tmp_path) as server:
        monkeypatch.setenv("EMBEDDING_CACHE_URL", server.url)
        assert run_sync(one).embedded == FILMS
        assert server.client.dbsize() == FILMS
        assert execute(database, "SELECT count(*) FROM embeddings.embedding_cache") == [(0,)]
        forget_vectors(database, project)
        assert run_sync(one).cached == FILMS
    forget_vectors(database, project)
    assert run_sync(one).embedded == FILMS  # it is down, and the work goes on
