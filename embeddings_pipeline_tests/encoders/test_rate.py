"""The rate of a hosted model: what may be sent, and when, by a bucket that all who use one database share."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
from pydantic import SecretStr

from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.encoders.api import ServiceOutageError
from embeddings_pipeline.encoders.hosted import HostedEncoder
from embeddings_pipeline.encoders.pace import Pace
from embeddings_pipeline.encoders.rate import Rate
from embeddings_pipeline_tests.support.workbench import execute, plain_role

URL, MODEL = "https://api.example/v1", "text-embedding-3-small"


def profile(requests: int = 0, tokens: int = 0, **others: Any) -> Profile:
    limits = {"requests_per_minute": requests, "tokens_per_minute": tokens}
    defaults: dict[str, Any] = {"name": "test", "provider": "openai", "model": MODEL, "dimensions": 64}
    return Profile(**{**defaults, **limits, **others})


def bucket(settings, requests: int = 0, tokens: int = 0, key: str = "key") -> Rate:
    return Rate(profile(requests, tokens), settings, URL, key)


def scheduled(database, costs: Sequence[float], requests: int | None, tokens: int | None) -> list[float]:
    """When each of these would be sent, in seconds from now, if all were asked for at once."""
    call = """SELECT extract(epoch FROM clock_timestamp() - statement_timestamp())::float
                  + embeddings.take_rate('account', %s, cost, %s, %s, 1e9)
              FROM unnest(%s::float[]) AS cost"""
    return [moment for (moment,) in execute(database, call, [MODEL, requests, tokens, list(costs)])]


def worst_minute(moments: Sequence[float], costs: Sequence[float]) -> float:
    return max(
        sum(cost for other, cost in zip(moments, costs, strict=True) if moment <= other < moment + 60)
        for moment in moments
    )


@pytest.mark.parametrize("limit", [3, 60, 500, 1200])
def test_no_minute_has_more_requests_than_permitted_and_few_less(database, limit) -> None:
    number = int(2.5 * limit)
    moments = scheduled(database, [0] * number, limit, None)
    assert worst_minute(moments, [1] * number) <= limit
    assert (number - 1) / moments[-1] >= 0.95 * limit / 60


@pytest.mark.parametrize(
    ("limit", "costs"),
    [
        (1_000_000, [9_900] * 300),  # as they are packed
        (1_000_000, [100, 9_000, 3_000] * 200),
        (1_000_000, [250_000] * 10),
        (40_000, [8_000] * 12),
        (1_000, [4_000] * 4),  # one text that is more than a minute's
    ],
)
def test_no_minute_has_more_tokens_than_permitted(database, limit, costs) -> None:
    moments = scheduled(database, costs, None, limit)
    assert worst_minute(moments, costs) <= max(limit, costs[0])
    assert sum(costs[:-1]) / moments[-1] >= 0.95 * limit / 60


def test_whoever_uses_the_account_has_the_same_bucket_and_others_have_their_own(settings) -> None:
    one, other = bucket(settings, requests=1), bucket(settings, requests=1)
    assert one.take(MODEL, 0) == 0
    assert other.take(MODEL, 0) < -30
    assert bucket(settings, requests=1, key="another").take(MODEL, 0) == 0
    assert one.take("another-model", 0) == 0


def test_nothing_is_taken_for_what_would_wait_long(settings) -> None:
    rate = bucket(settings, requests=1)
    assert rate.take(MODEL, 0) == 0
    first = rate.take(MODEL, 0)
    assert first < -30
    assert first - 30 < rate.take(MODEL, 0) < -30  # it is as if it had not asked


def test_the_key_is_not_in_the_database(settings, database) -> None:
    bucket(settings, requests=60, key="sk-secret").take(MODEL, 0)
    [(row,)] = execute(database, "SELECT rate::text FROM embeddings.rate")
    assert "sk-secret" not in row and URL not in row


def test_the_servers_limit_counts_if_it_is_tighter_for_everybody(settings) -> None:
    one, other = bucket(settings, requests=6000), bucket(settings, requests=6000)
    one.take(MODEL, 0)
    one.settle(MODEL, 0, {"x-ratelimit-limit-requests": "1", "x-ratelimit-remaining-requests": "1"})
    waits = [other.take(MODEL, 0) for _ in range(2)]
    assert waits[-1] < -30


def test_what_the_server_has_left_counts(settings) -> None:
    rate = bucket(settings, tokens=60_000)
    rate.take(MODEL, 1)
    headers = {"x-ratelimit-limit-tokens": "60000", "x-ratelimit-remaining-tokens": "0"}
    began = time.monotonic()
    rate.settle(MODEL, 0, headers)
    assert abs(rate.take(MODEL, 590)) + time.monotonic() - began > 0.5  # else 600 would be at hand


def test_a_wait_that_the_server_asks_for_holds_for_everybody(settings) -> None:
    one, other = bucket(settings, requests=6000), bucket(settings, requests=6000)
    one.take(MODEL, 0)
    one.settle(MODEL, 0, {}, closed=30)
    assert -30 <= other.take(MODEL, 0) < -20


def test_tokens_that_were_taken_too_many_come_back(settings) -> None:
    rate = bucket(settings, tokens=60_000)
    began = time.monotonic()
    assert rate.take(MODEL, 590) == 0
    assert abs(rate.take(MODEL, 590)) + time.monotonic() - began > 0.5
    rate.settle(MODEL, -1180, {})
    assert rate.take(MODEL, 590) == 0


@pytest.mark.parametrize("hours", [1, -1])
def test_a_clock_that_jumps_an_hour_stops_nothing_and_opens_nothing(settings, database, hours) -> None:
    """All that is noted is moved the other way, which is the same as moving the clock."""
    rate = bucket(settings, requests=60)
    for _ in range(3):
        rate.take(MODEL, 0)
    rate.settle(MODEL, 0, {}, closed=0.1)
    columns = ("requests_at", "tokens_at", "closed_until", "asked_at")
    moved = ", ".join(f"{column} = {column} - interval '{hours} hours'" for column in columns)
    execute(database, f"UPDATE embeddings.rate SET {moved}")
    began = time.monotonic()
    waits = [abs(rate.take(MODEL, 0)) for _ in range(3)]
    assert max(waits) < 4  # nobody waits for an hour
    assert waits[-1] + time.monotonic() - began > 0.5  # nor is more than one at hand


def test_nobody_holds_a_transaction_while_waiting(service, settings, database) -> None:
    limited = profile(requests=20, url=service.url, batch_size=1)
    encoder = HostedEncoder(limited, settings)
    thread = threading.Thread(target=encoder.encode_documents, args=(["one", "two"],))
    began = time.monotonic()
    thread.start()
    kept_open = """SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
                   AND pid <> pg_backend_pid() AND xact_start < now() - interval '1 s'"""
    seen = []
    while thread.is_alive():
        seen += execute(database, kept_open)
        time.sleep(0.1)
    thread.join()
    encoder.close()
    assert len(seen) > 10 and set(seen) == {(0,)}
    assert time.monotonic() - began > 3  # so it did wait


def test_two_at_once_are_together_no_faster_than_one_may_be(service, settings) -> None:
    limited = profile(requests=1200, url=service.url, batch_size=1)
    encoders = [HostedEncoder(limited, settings) for _ in range(2)]
    parts = [[f"{n} of {part}" for n in range(50)] for part in range(2)]
    threads = [
        threading.Thread(target=encoder.encode_documents, args=(part,))
        for encoder, part in zip(encoders, parts, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for encoder in encoders:
        encoder.close()
    counts = service.counts()
    assert counts["distinct"] == 100
    assert 99 / counts["seconds"] <= 1200 / 60 * 1.12  # 12 of the 1,200 at once, at first


def test_who_may_not_write_goes_without_and_is_told_once(settings, database, superuser, caplog) -> None:
    with plain_role(database, "rate_reader") as url:
        execute(database, "ALTER TABLE embeddings.rate OWNER TO CURRENT_USER")
        rate = Rate(profile(60), settings.model_copy(update={"database_url": url}), URL, "key")
        assert [rate.take(MODEL, 0) for _ in range(3)] == [0, 0, 0]
    assert caplog.text.count("no rate is shared with others") == 1


def test_a_database_that_is_down_is_an_outage(settings) -> None:
    gone = settings.model_copy(update={"database_url": "postgresql://nobody:s3cret@127.0.0.1:9/none"})
    with pytest.raises(ServiceOutageError, match="the rate cannot be asked for") as error:
        Rate(profile(60), gone, URL, "key").take(MODEL, 0)
    assert "s3cret" not in str(error.value)


def test_the_environment_limits_what_the_profile_leaves_open(service, settings) -> None:
    given = settings.model_copy(update={"embedding_requests_per_minute": 6, "openai_api_key": SecretStr("key")})
    rate = Rate(Profile(name="t", provider="openai", model=MODEL, dimensions=64), given, URL, "key")
    assert rate.take(MODEL, 0) == 0 and rate.take(MODEL, 0) < -8


def test_fewer_requests_are_under_way_after_a_429_and_more_again_while_answers_are_quick() -> None:
    async def at_once() -> list[float]:
        pace = Pace()
        seen = [pace.at_once]
        before = time.monotonic() - 1
        for _ in range(3):
            pace.too_many(before)  # sent together: they count as one
        seen.append(pace.at_once)
        for _ in range(40):
            async with contextlib.AsyncExitStack() as slots:
                for _ in range(int(pace.at_once)):
                    await slots.enter_async_context(pace.slot())
                pace.quick(0.05)
        seen.append(pace.at_once)
        for _ in range(40):
            async with contextlib.AsyncExitStack() as slots:
                for _ in range(int(pace.at_once)):
                    await slots.enter_async_context(pace.slot())
                pace.quick(5.0)  # the server is busy
        return [*seen, pace.at_once]

    first, lowered, raised, kept = asyncio.run(at_once())
    assert (lowered, kept) == (first / 2, raised) and raised > lowered
