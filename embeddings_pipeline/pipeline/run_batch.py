"""The order of a batch: read, render, embed, then commit, and what shadow models need beside it.

    figures = run_batch(collection, [0, 1], run)

Each step reads what the step before wrote into the lake, so it can be done again, alone, or after a crash. Dagster's
assets (`orchestration/assets.py`) call these very steps one by one, and depend on each other in this order; whatever
else works on batches calls `run_batch`.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from embeddings_pipeline.pipeline.attempts import each_batch, each_group
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.pipeline.commit import commit_batches
from embeddings_pipeline.pipeline.embed import DEFAULTS, TEXTS_TOGETHER, EmbedOptions, embed_batches
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

    `run` names the files in the lake. The steps overlap: while one batch is encoded, the ones before are committed and
    the next are read. Returns the sums over the batches; `report` gets what each step did for each. A batch whose step
    fails waits before it is tried again, and the error is raised once the batches before it are committed: OutageError,
    StaleRunError or another PipelineError.
    """
    figures = RunFigures()

    def taken(reports: Iterator[tuple[int, Any]]) -> Iterator[int]:
        """The batches that a step has done, for the next one."""
        for batch, done in reports:
            figures.add(done)
            report(batch, done)
            yield batch

    read = each_group(collection, batches, lambda _, group: read_items(collection, group, run))
    rendered = each_batch(collection, taken(read), lambda _, batch: render_texts(collection, batch, run))
    done: Iterator[tuple[int, Any]] = embed_under_each_model(collection, taken(rendered), run, options)
    if not options.dry_run:
        done = each_group(collection, taken(done), lambda _, group: commit_and_backfill(collection, group, run))
    deque(taken(done), maxlen=0)
    return figures


def embed_under_each_model(
    collection: Collection, batches: Iterable[int], run: str, options: EmbedOptions = DEFAULTS
) -> Iterator[tuple[int, Embedded]]:
    """The third step: the vectors of the current model, batch by batch, and, unless `options` choose texts, those of
    the shadow models.
    """
    shadows, api = collection.shadow_models() if options.everything else [], options.api
    waiting: list[tuple[int, Embedded]] = []
    for done in embed_batches(collection, batches, run, options):
        waiting.append(done)
        if not shadows or sum(embedded.embedded for _, embedded in waiting) >= TEXTS_TOGETHER:
            embed_shadows(shadows, [batch for batch, _ in waiting], run, api)
            yield from waiting
            waiting = []
    embed_shadows(shadows, [batch for batch, _ in waiting], run, api)
    yield from waiting


def commit_and_backfill(collection: Collection, batches: Sequence[int], run: str) -> dict[int, Committed]:
    """The fourth step: the commit of batches, and after it the vectors of their shadow models."""
    committed = commit_batches(collection, batches, run)
    shadows = collection.shadow_models()
    for batch in batches if shadows else ():
        backfill_shadows(shadows, batch, run)
    return committed
