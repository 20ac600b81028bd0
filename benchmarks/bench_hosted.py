"""A hosted model's rate, speed and storms against the tests' own server, with 50 ms before each answer, on loopback.

    python benchmarks/bench_hosted.py                   # a minute: speed without a limit, a storm of 429, the rate
    python benchmarks/bench_hosted.py --texts 10000 --processes 2 rate
    python benchmarks/bench_hosted.py --texts 20000 speed kept     # kept: with the embedding cache and its claims

The server is a process of its own and counts what it bills: `share` is of the permitted rate, over the time from the
first answer to the last; `worst minute` the most in any 60 s. The database is an embedded one in a temporary folder.
"""

import argparse
import json
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.config.templates import content_hash
from embeddings_pipeline.encoders.answers import Answers
from embeddings_pipeline.encoders.base import OnAnswer
from embeddings_pipeline.encoders.budget import Terms
from embeddings_pipeline.encoders.cache import PostgresCache
from embeddings_pipeline.encoders.hosted import HostedEncoder
from embeddings_pipeline.store.database import open_database
from embeddings_pipeline.store.schema import ensure_schema

REQUESTS, TOKENS = 3_000, 1_000_000
WORDS = "a film about two brothers who cross the mountains in winter to bring back a stolen bicycle "
SERVER = [sys.executable, "-m", "embeddings_pipeline_tests.support.embedding_server", "--latency", "0.05"]


def texts_of(number: int, tokens: int, first: int = 0) -> list[str]:
    """So many different texts of so many tokens, as the server counts them: four bytes each."""
    return [f"{n:08d} {WORDS * (tokens // 20 + 1)}"[: 4 * tokens] for n in range(first, first + number)]


def encode(url: str, state: str, texts: list[str], limits: dict[str, int]) -> None:
    """What each process does."""
    model = {"provider": "openai", "model": "text-embedding-3-small", "dimensions": 1536}
    kept = limits.pop("kept", 0)
    profile = Profile(**{"name": "bench", "url": url, **model, **limits})
    settings = Settings(embeddings_state_dir=Path(state))
    encoder = HostedEncoder(profile, settings)
    if kept:
        database = open_database(settings)
        terms = Terms("bench", "0123456789ab", 1536, profile.model, encoder.account, paid=True, usd_per_million=0.02)
        answers = Answers(database, PostgresCache(database), terms)
    for start in range(0, len(texts), 8192):
        part = texts[start : start + 8192]
        if not kept:
            encoder.encode_documents(part)
            continue
        counted = encoder.count_tokens(part).tolist()
        contents = dict(zip(map(content_hash, part), part, strict=True))
        answers.of(contents, dict(zip(contents, counted, strict=True)), partial(ask, encoder))


def ask(encoder: HostedEncoder, texts: Mapping[bytes, str], on_answer: OnAnswer) -> dict[bytes, Any]:
    return dict(zip(texts, encoder.encode_documents(list(texts.values()), on_answer), strict=True))


def counts(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url.replace("/v1", "/counts")) as answer:
        result: dict[str, Any] = json.loads(answer.read())
        return result


def post(url: str, path: str, **values: Any) -> None:
    urllib.request.urlopen(url.replace("/v1", path), data=json.dumps(values).encode()).close()


def run(url: str, state: str, texts: list[str], processes: int, limits: dict[str, int]) -> tuple[dict[str, Any], float]:
    """The server's counts, and the seconds that it took, with the work shared out among so many processes."""
    post(url, "/forget")
    began = time.perf_counter()
    share = -(-len(texts) // processes)
    parts = [texts[n * share : (n + 1) * share] for n in range(processes)]
    if processes == 1:
        encode(url, state, texts, limits)
    else:
        context = multiprocessing.get_context("spawn")
        workers = [context.Process(target=encode, args=(url, state, part, limits)) for part in parts]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    return counts(url), time.perf_counter() - began


def rate(url: str, state: str, number: int, tokens: int, processes: int) -> None:
    limits = {"requests_per_minute": REQUESTS, "tokens_per_minute": TOKENS}
    counted, _ = run(url, state, texts_of(number, tokens), processes, limits)
    share = counted["tokens"] / (TOKENS / 60 * counted["seconds"])
    print(
        f"rate: {number:,} texts of {tokens} tokens, {processes} process(es), {TOKENS:,} tokens a minute: "
        f"{counted['seconds']:.1f} s, {share:.1%} of the permitted rate, worst minute {counted['worst_minute']}, "
        f"billed twice {counted['twice']}"
    )


def storm(url: str, state: str, number: int, tokens: int, answers: int) -> None:
    limits = {"requests_per_minute": 0, "tokens_per_minute": TOKENS}
    post(url, "/forget")
    post(url, "/faults", kind="status", times=answers // 2, status=429)
    post(url, "/faults", kind="status", times=answers - answers // 2, status=429, headers={"retry-after-ms": "100"})
    began = time.perf_counter()
    encode(url, state, texts_of(number, tokens), limits)
    seconds, counted = time.perf_counter() - began, counts(url)
    share = counted["tokens"] / (TOKENS / 60 * counted["seconds"])
    print(
        f"storm: {answers:,} answers of 429, then quiet: {seconds - counted['seconds']:.1f} s of storm, then "
        f"{counted['seconds']:.1f} s at {share:.1%} of the permitted rate; {counted['distinct']:,} of {number:,} "
        f"texts, billed twice {counted['twice']}"
    )


def speed(url: str, state: str, number: int, tokens: int, *, kept: bool = False) -> None:
    how = ["new, and kept", "known to the cache"] if kept else ["without a limit"]
    for each in how:
        counted, seconds = run(url, state, texts_of(number, tokens), 1, {"requests_per_minute": 0, "kept": kept})
        print(f"speed: {number / seconds:,.0f} texts/s {each} ({counted['requests']} requests)")


def memory(url: str, state: str, number: int, tokens: int) -> None:
    for times in (1, 10):
        for n in range(times):
            encode(url, state, texts_of(number, tokens, n * number), {"requests_per_minute": 0})
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(f"memory: {peak:,} MB at most after {times * number:,} texts")


def calls(url: str, state: str) -> None:
    """1,000 texts at 500 requests a minute: a tool that sends one text a request needs two minutes at that limit."""
    counted, seconds = run(url, state, texts_of(1000, 100), 1, {"requests_per_minute": 500})
    print(f"calls: 1,000 texts in {counted['requests']} requests and {seconds:.1f} s at 500 requests a minute")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = "of: speed kept storm rate memory calls"
    parser.add_argument("what", nargs="*", default=["speed", "storm", "rate"], help=choices)
    parser.add_argument("--texts", type=int, default=4_000)
    parser.add_argument("--tokens", type=int, default=100, help="of a text")
    parser.add_argument("--processes", type=int, default=1, help="at once, for `rate`")
    parser.add_argument("--answers", type=int, default=100, help="of 429, for `storm`")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as state, subprocess.Popen(SERVER, stdout=subprocess.PIPE, text=True) as server:
        Path(state).chmod(0o711)  # as root, PostgreSQL runs as another user
        database = open_database(Settings(embeddings_state_dir=Path(state)))
        try:
            ensure_schema(database)
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            encode(url, state, ["warm"], {"requests_per_minute": 0})
            if "speed" in given.what:
                speed(url, state, 5 * given.texts, 25)
            if "memory" in given.what:
                memory(url, state, 2 * given.texts, 25)
            if "calls" in given.what:
                calls(url, state)
            if "kept" in given.what:
                speed(url, state, 5 * given.texts, 25, kept=True)
            if "storm" in given.what:
                storm(url, state, given.texts, given.tokens, given.answers)
            if "rate" in given.what:
                rate(url, state, given.texts, given.tokens, given.processes)
        finally:
            database.close()
            server.terminate()


if __name__ == "__main__":
    main()
