"""The order of a batch: read, render, embed, then commit, and what shadow models need beside it.

    figures = run_batch(collection, [0, 1], run)

Each step reads what the step before wrote into the lake, so it can be done again, alone, or after a crash. Dagster's
assets (`orchestration/assets.py`) call these very steps one by one, and depend on each other in this order; whatever
else works on batches calls `run_batch`.
"""

from collections.abc import Callable, Iterator, Sequence

from embeddings_pipeline.pipeline.attempts import each_batch
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.pipeline.commit import commit_batch
from embeddings_pipeline.pipeline.embed import DEFAULTS, EmbedOptions, embed_batches
from embeddings_pipeline.pipeline.figures import Committed, Embedded, ItemsRead, RunFigures, TextsRendered
from embeddings_pipeline.pipeline.read import read_items
from embeddings_pipeline.pipeline.render import render_texts
from embeddings_pipeline.pipeline.shadow import backfill_shadows, embed_shadows

Report = Callable[[int, ItemsRead | TextsRendered | Embedded | Committed], None]


def run_batch(
    collection: Collection,
    batches: Sequence[int],
    run: str,
    *,
    options: EmbedOptions = DEFAULTS,
    report: Report = lambda batch, figures: None,
) -> RunFigures:
    """Bring these batches from the source into PostgreSQL, under the current model and the shadow models.

    `run` names the files in the lake. Returns the sums over the batches; `report` gets what each step did for each. A
    batch whose step fails waits before it is tried again, and the error is raised: OutageError, StaleRunError or
    another PipelineError.
    """
    figures = RunFigures()
    for batch, items in each_batch(collection, batches, lambda _, batch: read_items(collection, batch, run)):
        figures.add(items)
        report(batch, items)
    for batch, texts in each_batch(collection, batches, lambda _, batch: render_texts(collection, batch, run)):
        figures.add(texts)
        report(batch, texts)
    for batch, embedded in embed_under_each_model(collection, batches, run, options):
        figures.add(embedded)
        report(batch, embedded)
    if options.dry_run:
        return figures
    commits = each_batch(collection, batches, lambda _, batch: commit_and_backfill(collection, batch, run))
    for batch, committed in commits:
        figures.add(committed)
        report(batch, committed)
    return figures


def embed_under_each_model(
    collection: Collection, batches: Sequence[int], run: str, options: EmbedOptions = DEFAULTS
) -> Iterator[tuple[int, Embedded]]:
    """The third step: the vectors of the current model, batch by batch; then, unless `options` choose texts, those of
    the shadow models.
    """
    yield from embed_batches(collection, batches, run, options)
    if options.everything:
        embed_shadows(collection.shadow_models(), batches, run)


def commit_and_backfill(collection: Collection, batch: int, run: str) -> Committed:
    """The fourth step: a batch's commit, and after it the vectors of its shadow models."""
    committed = commit_batch(collection, batch, run)
    backfill_shadows(collection.shadow_models(), batch, run)
    return committed
