"""Batch jobs of some texts on the test server, without a collection's pipeline: submitted, looked at, counted."""

from collections.abc import Mapping
from typing import Any

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.config.templates import content_hash
from embeddings_pipeline.encoders.batch_jobs import BatchJobs
from embeddings_pipeline.encoders.batch_submit import Submission, Submitter
from embeddings_pipeline.encoders.budget import Terms
from embeddings_pipeline.encoders.cache import PostgresCache
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.embedding_server import EmbeddingServer, tokens_of
from embeddings_pipeline_tests.support.hosted import SMALL, profile
from embeddings_pipeline_tests.support.workbench import committed, execute

FILMS = 30
HOSTED = {"name": "hosted", "provider": "openai", "model": SMALL, "dimensions": 32, "requests_per_minute": 0}
FINGERPRINT = "0123456789ab"
TEXTS = {content_hash(text): text for text in (f"a film about number {n}" for n in range(30))}
TERMS = Terms("films", FINGERPRINT, 64, SMALL, paid=True, usd_per_million=1.0)


def submit(
    database: Database,
    service: EmbeddingServer,
    texts: Mapping[bytes, str] = TEXTS,
    settings: Settings | None = None,
    **terms: Any,
) -> Submission:
    of = profile(service, **terms.pop("profile", {}))
    tokens = {digest: tokens_of(text) for digest, text in texts.items()}
    with Submitter(database, settings or Settings(), of, Terms(**{**vars(TERMS), **terms})) as submitter:
        return submitter.submit(texts, tokens, {0: texts})


def look_at_all(jobs: BatchJobs, **options: Any) -> list[str | None]:
    return [jobs.look(job, **options) for job in jobs.due(now=True)]


def kept(database: Database) -> dict[bytes, Any]:
    return PostgresCache(database).known(FINGERPRINT, 64, list(TEXTS))


def claims(database: Database) -> int:
    return int(execute(database, "SELECT count(*) FROM embeddings.embedding_claim WHERE NOT refused")[0][0])


def pass_time(database: Database, seconds: float) -> None:
    execute(
        database,
        "UPDATE embeddings.batch_job SET asked_at = asked_at - make_interval(secs => %(s)s), "
        "missing_since = missing_since - make_interval(secs => %(s)s), "
        "looked_at = looked_at - make_interval(secs => %(s)s)",
        {"s": seconds},
    )


def billed_once(service: EmbeddingServer) -> bool:
    return set(service.billed) == set(TEXTS.values()) and set(service.billed.values()) == {1}


def of_films(service: EmbeddingServer) -> dict[str, int]:
    """How often the films' texts were billed, without the canaries'."""
    return {text: number for text, number in service.billed.items() if text.startswith("Film")}


def assert_once(database: Database, service: EmbeddingServer, number: int = FILMS) -> None:
    assert len(committed(database)) == number
    assert list(of_films(service).values()) == [1] * number
