"""The first hits put into order by a reranker, which reads query and text together. It never fails a search: where it
cannot be asked, the order stays as it was, which is said once in a process and in each explanation.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.reranking import RERANKED, RERANKER, SMALLER_RERANKER, Reranker, reranker_profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders.cross_encoder import CrossEncoder, forget_cross_encoder, load_cross_encoder
from embeddings_pipeline.errors import OutOfMemoryError, PipelineError
from embeddings_pipeline.forks import ProcessLock
from embeddings_pipeline.search.hits import Hit, Reranking

log = logging.getLogger(__name__)

FIRST_TEXTS = 4  # scored together to begin with, if time is limited: they say how long more will take
AGAIN_SECONDS = 600  # until a reranker that could not be loaded is tried again


@dataclass
class _Known:
    """What this process knows of rerankers: what it has said, which are too large for its memory, which failed."""

    lock: ProcessLock = field(default_factory=ProcessLock)
    said: set[str] = field(default_factory=set)
    too_large: set[str] = field(default_factory=set)
    failed: dict[str, tuple[float, str]] = field(default_factory=dict)  # when, and why


_known = _Known()


def forget_rerankers() -> None:
    """As in a process that has not reranked yet."""
    _known.said.clear()
    _known.too_large.clear()
    _known.failed.clear()


def candidates_of(settings: Settings) -> int:
    """How many hits are given to a reranker."""
    return settings.rerank_top_k or RERANKED


def reranked(
    definition: CollectionDefinition, settings: Settings, query: str, hits: Sequence[Hit]
) -> tuple[list[Hit], Reranking]:
    """The hits, the first of them in the order of a reranker's scores, and what was done.

    Equal texts are scored once. A hit that was scored has that score; the others follow in their order.
    """
    began = time.perf_counter()
    first, rest = list(hits[: candidates_of(settings)]), hits[candidates_of(settings) :]
    texts = list(dict.fromkeys(hit.text or "" for hit in first))
    ranks = {hit.item_key: (rank, hit.score) for rank, hit in enumerate(first, 1)}
    if why := _not_needed(first, texts, definition.attributes.rerank.sure_margin):
        return [*first, *rest], Reranking(None, why, len(first), 0, 0.0, (), ranks)
    model, how, scores, fell_back = _scores_of_any(settings, query, texts)
    score_of = dict(zip(texts, scores, strict=False))
    scored = next((n for n, hit in enumerate(first) if (hit.text or "") not in score_of), len(first))
    order = sorted(range(scored), key=lambda n: (-score_of[first[n].text or ""], n))
    if scored < len(first) and model:
        fell_back.append(f"time ran out after {scored} of {len(first)}: the rest keeps its order")
    milliseconds = round(1000 * (time.perf_counter() - began), 3)
    best = [replace(first[n], score=score_of[first[n].text or ""]) for n in order]
    done = Reranking(model, how, len(first), scored, milliseconds, tuple(fell_back), ranks)
    return [*best, *first[scored:], *rest], done


def _not_needed(first: Sequence[Hit], texts: Sequence[str], margin: float | None) -> str:
    """Why no reranker is asked; empty if one is."""
    if len(texts) < 2:
        return "there are no two texts to choose between"
    if margin is not None:
        best, second = first[0].score, first[1].score
        if best - second >= margin * abs(best):
            return f"the search is sure: {best:.4f} before {second:.4f}"
    return ""


def _scores_of_any(
    settings: Settings, query: str, texts: Sequence[str]
) -> tuple[str | None, str, list[float], list[str]]:
    """The model that scored, what it ran on, the scores of the first texts, as many as time allows, and what failed.

    Where the memory does not suffice for the chosen model a smaller one takes its place.
    """
    fell_back: list[str] = []
    for name in dict.fromkeys((settings.rerank_model or RERANKER, SMALLER_RERANKER)):
        profile = reranker_profile(name, device=settings.embedding_device, batch_size=settings.rerank_batch_size)
        if name in _known.too_large:
            fell_back.append(f"memory ran out for {name} before")
            continue
        try:
            encoder = _loaded(profile, settings)
            scores = _scores(encoder, query, texts, settings.rerank_milliseconds)
        except OutOfMemoryError as error:
            _known.too_large.add(name)
            forget_cross_encoder(profile)
            fell_back.append(_said(f"memory ran out for reranker {name}: {error}"))
            continue
        except PipelineError as error:
            fell_back.append(_said(f"{error}"))
            break
        if encoder.halved:
            _said(f"memory ran out for reranker {name}: fewer pairs are scored at once")
        return name, encoder.runs_on, scores, fell_back
    fell_back.append(_said("hits keep the order in which they were found"))
    return None, "not reranked", [], fell_back


def _loaded(profile: Reranker, settings: Settings) -> CrossEncoder:
    """The model. One that could not be had is not asked for again with each search."""
    with _known.lock:
        when, why = _known.failed.get(profile.model, (0.0, ""))
        if why and time.monotonic() - when < AGAIN_SECONDS:
            raise PipelineError(why)
        try:
            return load_cross_encoder(profile, settings)
        except OutOfMemoryError:
            raise
        except PipelineError as error:
            _known.failed[profile.model] = (time.monotonic(), str(error))
            raise


def _scores(encoder: CrossEncoder, query: str, texts: Sequence[str], milliseconds: int | None) -> list[float]:
    """Of the first texts; of all, unless that takes longer. Raises PipelineError."""
    if not milliseconds:
        return _finite(encoder.score(query, texts))
    began = time.perf_counter()
    scores: list[float] = []
    size = FIRST_TEXTS
    while size and len(scores) < len(texts):
        scores += _finite(encoder.score(query, texts[len(scores) : len(scores) + size]))
        passed = time.perf_counter() - began
        fit = int((milliseconds / 1000 - passed) * len(scores) / passed)
        size = 0 if fit < FIRST_TEXTS else max(FIRST_TEXTS, fit // 2)  # half, since later texts may be longer
    return scores


def _finite(scores: np.ndarray) -> list[float]:
    if not np.isfinite(scores).all():
        raise PipelineError("the reranker gives scores that are no finite numbers; set RERANK_MODEL to another one")
    return [float(score) for score in scores]


def _said(words: str) -> str:
    """The words, which people are told once in a process."""
    with _known.lock:
        is_new = words not in _known.said
        _known.said.add(words)
    if is_new:
        log.warning("warning: %s", words)
    return words
