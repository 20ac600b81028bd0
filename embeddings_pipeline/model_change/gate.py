"""Is the candidate good enough to take over? Coverage, what its index finds, and both models compared.

If the collection has golden queries (`evaluation:`, or a file `golden_queries.jsonl` beside its `defs.yaml`), both
models answer them as `evaluate` asks them, and nDCG@10 decides; without them, how far the nearest ten of the two agree
is told, and decides nothing.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql

from embeddings_pipeline.index.exact import TIE, nearest, unit
from embeddings_pipeline.index.snapshot import vector_blocks
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.search.evaluate import Evaluation, Way, evaluate, golden_judgements
from embeddings_pipeline.search.measures import NDCG
from embeddings_pipeline.search.nearest import nearest_texts
from embeddings_pipeline.store.copy_binary import copy_out

log = logging.getLogger(__name__)

SAMPLES = 100  # texts whose neighbours are compared
NEAREST = 10
BINS = 20
CHART_WIDTH = 560
CURRENT_COLOUR, CANDIDATE_COLOUR = "#9aa5b1", "#2563eb"


@dataclass(frozen=True)
class Gate:
    """What was measured, and why the candidate is refused (empty: it may take over)."""

    texts: int
    missing: int  # texts without a vector under the candidate, less those in quarantine
    quarantined: int
    recall_at_10: float  # of searches with the candidate's ANN index, against an exact search
    neighbour_overlap: float | None  # the share of the nearest ten that both models agree on
    ndcg_current: float | None
    ndcg_candidate: float | None
    golden_queries: int
    histogram_current: list[int]  # cosines of the sampled texts' nearest ten, in BINS bins from 0 to 1
    histogram_candidate: list[int]
    refused: list[str] = field(default_factory=list)

    def plot(self) -> str:
        """Both distributions of scores in one chart, as SVG."""
        return plot(self.histogram_current, self.histogram_candidate)


def measure_gate(current: Collection, candidate: Collection) -> Gate:
    """Compare the candidate with the current model, both of the same collection. Nothing is written."""
    limits = current.definition.attributes.model_change
    golden = _evaluated(current, candidate)
    with current.database.connect() as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.read_only = True
        texts, lacking, quarantined = _coverage(connection, candidate)
        _, _, excused = _coverage(connection, current)
        name = next(iter(current.definition.attributes.vectors))
        samples = _samples(connection, current, candidate, name)
        before, after = (_neighbours(connection, model, name, samples) for model in (current, candidate))
        recall = _recall(connection, candidate, name, samples, after)
    both = [len(set(a) & set(b)) / max(1, len(b)) for a, b in zip(before.ids, after.ids, strict=True)]
    ndcg = [way.figures[NDCG].mean for way in golden.ways] if golden else [None, None]
    golden_queries = golden.queries if golden else 0
    missing = lacking - quarantined
    refused = []
    if texts > quarantined + excused and not samples:
        refused.append(f"no text has a vector {name!r} under both models, so nothing could be compared")
    if missing:
        refused.append(f"{missing:,} of {texts:,} texts have no vector")
    percent = current.definition.attributes.quarantine.error_percent
    if quarantined > max(excused, texts * percent / 100):
        refused.append(
            f"{quarantined:,} of {texts:,} texts are in quarantine under it, more than {percent:g} % "
            f"(`quarantine.error_percent`)"
        )
    if recall < limits.least_recall:
        refused.append(f"its index finds {recall:.1%} of the nearest ten, and {limits.least_recall:.1%} are asked for")
    if ndcg[0] is not None and ndcg[1] is not None and ndcg[1] < ndcg[0] - limits.golden_tolerance:
        refused.append(
            f"nDCG@10 of {golden_queries} golden queries drops from {ndcg[0]:.3f} to {ndcg[1]:.3f}, by more than "
            f"{limits.golden_tolerance}"
        )
    return Gate(
        texts,
        missing,
        quarantined,
        round(recall, 4),
        round(float(np.mean(both)), 4) if both else None,
        ndcg[0] if ndcg[0] is None else round(ndcg[0], 4),
        ndcg[1] if ndcg[1] is None else round(ndcg[1], 4),
        golden_queries,
        _histogram(before.scores),
        _histogram(after.scores),
        refused,
    )


def _evaluated(current: Collection, candidate: Collection) -> Evaluation | None:
    """Both models by the golden queries, if there are any."""
    definition = current.definition
    if (golden := golden_judgements(definition)) is None:
        return None
    first = next(iter(definition.attributes.vectors))
    ways = [Way(model.fingerprint, vectors=(first,)) for model in (current, candidate)]
    evaluation = evaluate(definition, current.settings, golden, ways)
    for told in evaluation.told:
        log.warning("warning: golden queries of collection %r: %s", definition.name, told)
    return evaluation


def _coverage(connection: psycopg.Connection, model: Collection) -> tuple[int, int, int]:
    parameters = {"collection": model.definition.name, "fingerprint": model.fingerprint}
    row = connection.execute(model.model.destination.statement("model_change/coverage"), parameters).fetchone()
    assert row is not None
    return row[0], row[1], row[2]


@dataclass(frozen=True)
class _Nearest:
    vectors: NDArray  # (samples, dimension), of the samples themselves
    scores: NDArray  # (samples, NEAREST) cosines, -inf if there are fewer
    ids: list[list[int]]


def _samples(connection: psycopg.Connection, current: Collection, candidate: Collection, name: str) -> list[int]:
    """Ids of texts that have a vector under both models."""
    query = sql.SQL(
        "SELECT text_id FROM {} AS a JOIN {} AS b USING (text_id) WHERE a.vector_name = %s ORDER BY random() LIMIT %s"
    ).format(current.model.destination.identifier, candidate.model.destination.identifier)
    return sorted(row[0] for row in connection.execute(query, [name, SAMPLES]))


def _neighbours(connection: psycopg.Connection, model: Collection, name: str, samples: Sequence[int]) -> _Nearest:
    """The exact nearest ten of each sample, itself left out, in one pass over the table."""
    table = model.model.destination
    columns: Mapping[str, object] = {"text_id": "bigint", "embedding": table.storage}
    own = sql.SQL("SELECT text_id, embedding FROM {} WHERE text_id = ANY ({}::bigint[]) ORDER BY text_id")
    chosen = copy_out(
        connection,
        own.format(table.identifier, sql.Literal(list(samples))),
        columns,  # type: ignore[arg-type]
        dimension=table.dimension,
    )
    queries = unit(chosen["embedding"].astype(np.float32))
    blocks = vector_blocks(connection, table, name)
    scores, ids = nearest(queries, blocks, NEAREST, own=chosen["text_id"])
    return _Nearest(queries, scores, [[int(i) for i in row if i >= 0] for row in ids])


def _recall(
    connection: psycopg.Connection, model: Collection, name: str, samples: Sequence[int], exact: _Nearest
) -> float:
    """Recall@10 of searches as `search` makes them, ties aside."""
    hit = wanted = 0
    for n, own in enumerate(samples):
        tenth = [score for score in exact.scores[n] if np.isfinite(score)]
        if not tenth:
            continue
        hits = nearest_texts(connection, model.model.destination, name, exact.vectors[n], NEAREST + 1)
        good = sum(text_id != own and score >= min(tenth) - TIE for text_id, score in hits)
        hit, wanted = hit + min(int(good), len(tenth)), wanted + len(tenth)
    return hit / wanted if wanted else 1.0


def _histogram(scores: NDArray) -> list[int]:
    finite = np.clip(scores[np.isfinite(scores)], 0, 1)
    return np.histogram(finite, bins=BINS, range=(0, 1))[0].tolist()


def plot(current: Sequence[int], candidate: Sequence[int]) -> str:
    """Two histograms over cosines from 0 to 1, in one chart, as SVG."""
    most = max([*current, *candidate, 1])
    left, bottom, wide, high = 48, 190, CHART_WIDTH / BINS, 150
    parts = [f'<text x="4" y="{bottom - high + 4}">{most:,}</text><text x="34" y="{bottom}">0</text>']
    for which, (counts, colour) in enumerate(((current, CURRENT_COLOUR), (candidate, CANDIDATE_COLOUR))):
        for n, count in enumerate(counts):
            x, height = left + (n + 0.08 + 0.42 * which) * wide, high * count / most
            parts.append(
                f'<rect x="{x:.1f}" y="{bottom - height:.1f}" width="{0.42 * wide:.1f}" height="{height:.1f}" '
                f'fill="{colour}"/>'
            )
        x, name = left + 90 * which, ("current", "candidate")[which]
        parts.append(
            f'<rect x="{x}" y="8" width="12" height="12" fill="{colour}"/><text x="{x + 18}" y="19">{name}</text>'
        )
    for tenth in range(0, 11, 2):
        x = left + tenth / 10 * CHART_WIDTH
        parts.append(f'<text x="{x:.0f}" y="{bottom + 18}" text-anchor="middle">{tenth / 10}</text>')
    parts.append(f'<text x="{left + CHART_WIDTH / 2}" y="{bottom + 38}" text-anchor="middle">cosine</text>')
    size = f'width="{left + CHART_WIDTH + 20}" height="{bottom + 48}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13" fill="#444">'
        f'<rect width="100%" height="100%" fill="white"/><path d="M{left} {bottom}h{CHART_WIDTH}" stroke="#888"/>'
        f"{''.join(parts)}</svg>"
    )
