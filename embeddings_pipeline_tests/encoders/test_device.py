"""The path of a GPU, run on the processor: the same vectors, passes ahead, tokens ahead, passes as large as it pays."""

import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling

from embeddings_pipeline.config.profiles import BUILT_IN, Profile
from embeddings_pipeline.encoders import batches, local
from embeddings_pipeline.encoders.batches import lowest_cosine
from embeddings_pipeline.encoders.device import FEWEST_TOKENS, MOST_TOKENS, useful_tokens
from embeddings_pipeline.encoders.local import KEPT_COSINE, PASSES_AHEAD, WINDOWS_AHEAD, LocalEncoder
from embeddings_pipeline.encoders.token_rows import Tokens
from embeddings_pipeline.encoders.windows import Window, windows_of
from embeddings_pipeline.errors import OutOfMemoryError, PipelineError
from embeddings_pipeline.pipeline.encode import Encoding, encode
from embeddings_pipeline_tests.support.tiny_models import WORDS, sentence_model

TEXTS = [" ".join(words * (1 + n % 9)) for n, words in enumerate(product(WORDS, repeat=4))][:3000]
"""Of three windows, and of 6 to 38 tokens."""
FAILS = "ten ten ten ten"  # which is in none of them


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    folder = sentence_model(tmp_path_factory.mktemp("tiny"), Pooling(32, "mean"))
    return Profile(name="tiny", provider="local", model=str(folder), dimensions=32, device="cpu")


@pytest.fixture
def encoder(profile: Profile) -> LocalEncoder:
    """Its passes are small, so that there are many."""
    return LocalEncoder(replace(profile, tokens_per_batch=8000), half=None, pipelined=True)


@pytest.fixture
def finding(profile: Profile) -> LocalEncoder:
    """It has to find how large its passes are."""
    return LocalEncoder(profile, half=None, pipelined=True)


@pytest.fixture(scope="module")
def theirs(profile: Profile) -> np.ndarray:
    return SentenceTransformer(profile.model, device="cpu").encode(TEXTS, batch_size=256, normalize_embeddings=True)


def before_each_pass(encoder: LocalEncoder, look: Callable[[torch.Tensor], None]) -> None:
    encoder.model[0].register_forward_pre_hook(lambda module, arguments: look(arguments[0]["input_ids"]))


def passes_of(encoder: LocalEncoder) -> list[int]:
    """How many tokens each pass has, padding included."""
    passes: list[int] = []
    before_each_pass(encoder, lambda ids: passes.append(ids.numel()))
    return passes


def test_vectors_are_those_of_sentence_transformers_in_the_order_given(
    encoder: LocalEncoder, theirs: np.ndarray
) -> None:
    vectors, tokens = encoder.encode_counted(TEXTS)
    assert vectors.dtype == np.float32
    assert lowest_cosine(vectors, theirs) >= 0.99999
    assert tokens.tolist() == encoder.count_tokens(TEXTS).tolist()


def test_passes_are_begun_before_the_first_one_is_asked_for(
    encoder: LocalEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    fetch = encoder._link.fetch

    def noted(tensor: torch.Tensor) -> Callable[[], Any]:
        happened.append("begun")
        numbers = fetch(tensor)

        def asked_for() -> Any:
            happened.append("asked for")
            return numbers()

        return asked_for

    monkeypatch.setattr(encoder._link, "fetch", noted)
    encoder.encode_documents(TEXTS)
    assert happened[: PASSES_AHEAD + 2] == ["begun"] * PASSES_AHEAD + ["asked for", "begun"]
    under_way = np.cumsum([1 if what == "begun" else -1 for what in happened])
    assert under_way.max() == PASSES_AHEAD and under_way[-1] == 0


def test_threads_make_the_tokens_of_what_comes_and_no_more(
    encoder: LocalEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows: weakref.WeakSet[Window] = weakref.WeakSet()
    made_by, held = set(), []
    tokenize = encoder._tokenize

    def noted(*arguments: Any, **settings: Any) -> Window:
        window = tokenize(*arguments, **settings)
        windows.add(window)
        made_by.add(threading.current_thread().name.rpartition("_")[0])
        return window

    monkeypatch.setattr(encoder, "_tokenize", noted)
    before_each_pass(encoder, lambda ids: held.append(len(windows)))
    texts = [f"{text} {number}" for number in range(4) for text in TEXTS]  # a number is an unknown word
    monkeypatch.setattr(encoder, "texts_of_window", (1024, 1024))
    assert len(windows_of(len(texts), 1024, 1024)) == 12
    encoder.encode_documents(texts)
    assert made_by == {"tokens"}
    assert max(held) <= 3 + WINDOWS_AHEAD  # one that is read, two whose passes are under way, those that come


@pytest.mark.parametrize(
    ("rates", "found"),
    [
        ([100, 190, 350, 360, 365, 700], 4 * FEWEST_TOKENS),  # four times as much gave 4 % more: not looked beyond
        ([100, 90, 95], FEWEST_TOKENS),
        ([100, 90, 190, 195, 180], 4 * FEWEST_TOKENS),  # the 90 was chance
        ([100, 200, None], 2 * FEWEST_TOKENS),  # memory ended
        ([None], FEWEST_TOKENS),
        ([2.0**n for n in range(20)], MOST_TOKENS),
    ],
)
def test_a_pass_is_doubled_while_it_pays(rates: list[float | None], found: int) -> None:
    coming: Iterator[float | None] = iter(rates)

    def rate(tokens: int) -> float:
        known = next(coming)
        if known is None:
            raise MemoryError
        return known

    assert useful_tokens(rate, lambda error: isinstance(error, MemoryError)) == found


def test_an_error_that_is_not_memory_is_not_taken_for_the_end_of_memory() -> None:
    def rate(tokens: int) -> float:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        useful_tokens(rate, lambda error: isinstance(error, MemoryError))


def test_the_size_of_passes_is_found_with_the_first_texts_that_need_it_and_kept(
    finding: LocalEncoder, theirs: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device whose passes take the same time whatever their size, and which has memory for 33,000 tokens."""

    def little_memory(ids: torch.Tensor) -> None:
        if ids.numel() > 33_000:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    passes = passes_of(finding)
    before_each_pass(finding, little_memory)
    monkeypatch.setattr(local, "time", SimpleNamespace(perf_counter=lambda: float(len(passes))))
    finding.encode_queries(["one two"])
    assert passes == [4]
    assert lowest_cosine(finding.encode_documents(TEXTS), theirs) >= 0.99999
    assert finding.tokens_per_batch == 32_768
    tried = len([tokens for tokens in passes if tokens > 33_000])
    assert tried == 1
    del passes[:]
    monkeypatch.setattr(finding, "_rate", None)  # nothing is tried again
    finding.encode_documents(TEXTS)
    assert max(passes) <= 32_768


def test_the_profiles_word_on_tokens_counts(finding: LocalEncoder) -> None:
    finding.profile = replace(finding.profile, tokens_per_batch=1000)
    passes = passes_of(finding)
    finding.encode_documents(TEXTS)
    assert max(passes) <= 1000 and sum(passes) < 1.2 * finding.count_tokens(TEXTS).sum()


def test_memory_that_runs_out_in_the_middle_halves_that_window_and_loses_nothing(
    encoder: LocalEncoder, theirs: np.ndarray
) -> None:
    passes = passes_of(encoder)
    failed: list[int] = []

    def fail_twice(ids: torch.Tensor) -> None:
        if len(passes) in (3, 4):  # while others are under way
            failed.append(ids.numel())
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    before_each_pass(encoder, fail_twice)
    assert lowest_cosine(encoder.encode_documents(TEXTS), theirs) >= 0.99999
    assert len(failed) == 2
    assert max(passes[-2:]) > 4000  # the next windows have whole passes again


def test_what_a_failed_pass_had_made_is_let_go_before_the_next_one(encoder: LocalEncoder) -> None:
    kept: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    def fail_once(module: Any, arguments: Any, features: Any) -> None:
        alive.append(bool(kept) and kept[0]() is not None)
        if not kept:
            kept.append(weakref.ref(features["token_embeddings"]))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    encoder.model[0].register_forward_hook(fail_once)
    encoder.encode_documents(TEXTS)
    assert len(alive) > 2 and not any(alive)


def test_memory_too_small_for_one_text_says_so(encoder: LocalEncoder) -> None:
    def fail(ids: torch.Tensor) -> None:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    before_each_pass(encoder, fail)
    with pytest.raises(OutOfMemoryError, match="one text of 4 tokens"):
        encoder.encode_documents(["one two", "one"])


@pytest.mark.parametrize("step", ["pass", "tokens"])
def test_a_failing_text_in_the_middle_is_alone_to_blame(
    step: str, encoder: LocalEncoder, theirs: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = f"{TEXTS[2111]} {FAILS}"
    if step == "pass":
        [ids, _] = encoder._tokens([FAILS]).tokens[0]
        before_each_pass(encoder, lambda rows: fail_if(bool((rows.unfold(1, 4, 1) == ids[1]).all(dim=2).any())))
    else:
        read = encoder._tokens

        def failing(texts: list[str]) -> Tokens:
            fail_if(bad in texts)
            return read(texts)

        monkeypatch.setattr(encoder, "_tokens", failing)
    texts = {text.encode(): text for text in [*TEXTS[:2111], bad, *TEXTS[2112:]]}
    made = Encoding()
    vectors = encode(encoder, texts, made)
    assert made.bad == {bad.encode(): "RuntimeError: a text that fails"}
    assert len(made.tokens) == len(texts) - 1
    others = np.arange(len(TEXTS)) != 2111
    assert lowest_cosine(vectors[others], theirs[others]) >= 0.99999


def fail_if(condition: bool) -> None:
    if condition:
        raise RuntimeError("a text that fails")


def test_an_error_is_one_line_and_leaves_the_encoder_as_it_was(encoder: LocalEncoder, theirs: np.ndarray) -> None:
    passes = passes_of(encoder)
    before_each_pass(encoder, lambda ids: fail_if(len(passes) == 9))
    with pytest.raises(PipelineError, match=r"^Profile tiny: 3000 texts could not be encoded: a text that fails$"):
        encoder.encode_documents(TEXTS)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tokens")]
    assert lowest_cosine(encoder.encode_documents(TEXTS), theirs) >= 0.99999


def test_several_threads_get_the_vectors_that_one_gets_and_find_the_size_once(
    finding: LocalEncoder, theirs: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    searches: list[int] = []
    rate = finding._rate

    def noted(window: Window, use: Any, tokens: int) -> float:
        searches.append(tokens)
        return rate(window, use, tokens)

    monkeypatch.setattr(finding, "_rate", noted)
    parts = [slice(start, start + 750) for start in range(0, 3000, 750)] * 2
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda part: finding.encode_documents(TEXTS[part]), parts))
    assert all(lowest_cosine(vectors, theirs[part]) >= 0.99999 for part, vectors in zip(parts, made, strict=True))
    assert len(searches) == len(set(searches)) >= 2


def test_memory_ends_as_it_began(encoder: LocalEncoder) -> None:
    def grown(rounds: int) -> int:
        for _ in range(rounds):
            encoder.encode_counted(TEXTS)
        return psutil.Process().memory_info().rss

    before = grown(3)
    assert grown(8) - before < 24 << 20


def test_the_whole_model_runs_in_16_bits_if_that_keeps_its_vectors() -> None:
    minilm = replace(BUILT_IN["minilm"], device="cpu")
    encoder = LocalEncoder(minilm, half=torch.float16, pipelined=True)
    assert encoder.whole_in_half and encoder.attention == "sdpa"
    assert {parameter.dtype for parameter in encoder.model.parameters()} == {torch.float16}
    texts = ["A shark.", "Dinosaurs break out of a theme park. " * 40, "海の映画"]
    vectors = encoder.encode_documents(texts)
    assert vectors.dtype == np.float32 and (vectors == vectors.astype(np.float16)).all()
    full = LocalEncoder(minilm, half=None).encode_documents(
        ["A shark.", "Dinosaurs break out of a theme park. " * 40, "海の映画"]
    )
    assert lowest_cosine(vectors, full) >= 0.9999


def test_else_only_its_matrix_products_do(tmp_path: Path) -> None:
    folder = sentence_model(tmp_path, Pooling(32, ("cls", "mean")))
    profile = Profile(name="two poolings", provider="local", model=str(folder), dimensions=64, device="cpu")
    encoder = LocalEncoder(profile, half=torch.bfloat16, pipelined=True)
    assert not encoder.whole_in_half
    types = {type(module): module.weight.dtype for module in encoder.model.modules() if hasattr(module, "weight")}
    assert types[torch.nn.Linear] == torch.bfloat16 and types[torch.nn.LayerNorm] == torch.float32
    full = LocalEncoder(profile, half=None).encode_documents(WORDS)
    assert KEPT_COSINE > lowest_cosine(encoder.encode_documents(WORDS), full) > 0.99


def test_texts_are_tokenised_in_parts_of_bounded_size(encoder: LocalEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "CHARACTERS_TOGETHER", 200)
    together: list[int] = []
    read = encoder._tokens

    def noted(texts: list[str]) -> Tokens:
        together.append(sum(map(len, texts)))
        return read(texts)

    monkeypatch.setattr(encoder, "_tokens", noted)
    texts = [*TEXTS[:50], "one " * 300, *TEXTS[50:60]]
    vectors, tokens = encoder.encode_counted(texts)
    assert sorted(together)[-1] == 1200 and sorted(together)[-2] <= 200
    assert tokens[50] == 302 and np.isfinite(vectors).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_gives_these_vectors(profile: Profile, theirs: np.ndarray) -> None:
    encoder = LocalEncoder(replace(profile, device="cuda"))
    assert encoder.pipelined and encoder.half == torch.float16
    assert lowest_cosine(encoder.encode_documents(TEXTS), theirs) >= 0.9999
    assert encoder.tokens_per_batch >= FEWEST_TOKENS


BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "bench_gpu.py"


def benchmark(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(BENCHMARK), *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=BENCHMARK.parents[1], timeout=250)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_the_benchmark_says_that_no_gpu_is_here() -> None:
    done = benchmark()
    assert (done.returncode, done.stdout) == (77, "")
    assert done.stderr.startswith("no GPU that torch ") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_benchmark_runs_and_finds_both_sides_alike() -> None:
    done = benchmark("--device", "cpu", "--texts", "40", "--rounds", "1", "--batch-sizes", "16", "--models", "minilm")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["min_cosine"] >= 0.999 > report["mean_cosine_of_neighbours"]
    assert report["ours_tokens_per_s"] > 0 and report["sentence_transformers_texts_per_s"]["16"] > 0
