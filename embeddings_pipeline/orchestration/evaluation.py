"""How good searches are, in the UI: an asset whose numbers are plotted over time, and a check of the declared floor."""

from collections.abc import Sequence
from typing import Any

import dagster as dg

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.health.check_results import SEARCH_QUALITY, CheckResult, note_result
from embeddings_pipeline.orchestration.alerts import alert_of_check
from embeddings_pipeline.orchestration.asset_options import ENCODER_POOL, asset_options
from embeddings_pipeline.orchestration.checks import check_keys
from embeddings_pipeline.orchestration.resources import PipelineResource
from embeddings_pipeline.orchestration.steps import failures_kept, open_logged
from embeddings_pipeline.search.evaluate import Evaluation, choose_ways, evaluate, floor_missed, golden_judgements
from embeddings_pipeline.search.measures import NDCG, WORDS
from embeddings_pipeline.store.database import Database


def build_evaluation(definition: CollectionDefinition) -> list[dg.AssetsDefinition]:
    """The asset `evaluation` with its check `search_quality`, if `evaluation:` is declared, and a floor in it."""
    if (declared := definition.attributes.evaluation) is None:
        return []
    has_floor, [key] = declared.least_ndcg is not None, check_keys(definition, (SEARCH_QUALITY,))
    floor = dg.AssetCheckSpec(
        key.name,
        asset=key.asset_key,
        description=(
            f"nDCG@10 of the golden queries is at least {declared.least_ndcg}, as searches go by default. If it fails, "
            "see `embeddings-pipeline evaluate`, and what has changed: the model, the texts, or the queries."
        ),
    )
    indexes = ["pgvector_index", "faiss_index"]
    options = asset_options(definition, "evaluation", {"postgres", "faiss"}, indexes, partitioned=False)

    @dg.asset(**options, pool=ENCODER_POOL, check_specs=[floor] if has_floor else [])
    def evaluation_asset(context: dg.AssetExecutionContext, pipeline: PipelineResource) -> dg.MaterializeResult:
        """How good searches are: the golden queries asked in each way of searching, as `embeddings-pipeline evaluate`
        does.

        Numbers: `ndcg_at_10`, `recall_at_100`, `mrr`, `hit_rate_at_10`, `p50_ms` and `p95_ms` of searches as they go by
        default; nDCG@10 of each other way by its name. The table has all of them, with intervals of 95 % and how each
        way is against the first (p: how often chance does as much).
        """
        with failures_kept(definition, "evaluation"):
            collection = open_logged(context, pipeline, definition)
            golden = golden_judgements(definition)
            assert golden is not None  # `evaluation:` names it
            chosen = choose_ways(definition, collection.settings, golden)
            evaluation = evaluate(definition, collection.settings, golden, chosen.ways)
        for told in [*chosen.told, *evaluation.told]:
            context.log.warning(told)
        found = _check(context, definition, collection.database, evaluation) if has_floor else []
        return dg.MaterializeResult(metadata=evaluation_metadata(evaluation), check_results=found)

    return [evaluation_asset]


def _check(
    context: dg.AssetExecutionContext, definition: CollectionDefinition, database: Database, evaluation: Evaluation
) -> Sequence[dg.AssetCheckResult]:
    [key] = check_keys(definition, (SEARCH_QUALITY,))
    ndcg = evaluation.ways[0].figures[NDCG]
    missed = floor_missed(definition, evaluation)
    words = missed or f"nDCG@10 of {evaluation.queries:,} queries is {ndcg.mean:.4f}"
    note_result(database, definition.name, CheckResult(key.name, missed is None, "error", words))
    if missed:
        alert_of_check(context, definition, key, words)
    metadata = {NDCG: round(ndcg.mean, 4), "queries": evaluation.queries}
    return [dg.AssetCheckResult(check_name=key.name, passed=missed is None, description=words, metadata=metadata)]


def evaluation_metadata(evaluation: Evaluation) -> dict[str, Any]:
    """Numbers of the first way, nDCG@10 of the others by name, and a table of all."""
    first, *others = evaluation.ways
    rows = []
    for way in evaluation.ways:
        row: dict[str, str | float] = {"way": way.name}
        for name, words in WORDS.items():
            figure = way.figures[name]
            row[words] = f"{figure.mean:.3f}" + ("" if figure.low is None else f" [{figure.low:.3f} {figure.high:.3f}]")
        row |= {"p50 ms": round(way.p50_ms, 1), "p95 ms": round(way.p95_ms, 1)}
        against = way.against_first[NDCG] if way.against_first else None
        row["against the first"] = (
            f"{against.mean:+.3f}, p = {against.p:.3f}" if against and against.p is not None else ""
        )
        rows.append(dg.TableRecord(row))
    return {
        **{name: round(figure.mean, 4) for name, figure in first.figures.items()},
        "p50_ms": round(first.p50_ms, 2),
        "p95_ms": round(first.p95_ms, 2),
        **{f"{NDCG} {way.name}": round(way.figures[NDCG].mean, 4) for way in others},
        "queries": evaluation.queries,
        "missing_items": evaluation.missing_items,
        "asked": first.name,
        "ways": dg.MetadataValue.table(rows),
    }
