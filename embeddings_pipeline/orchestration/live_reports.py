"""What `live` did becomes materializations, gathered a minute. Dagster is imported when there is one."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import PipelineError
from embeddings_pipeline.live.done import Done
from embeddings_pipeline.pipeline.figures import RunFigures

if TYPE_CHECKING:
    from dagster import DagsterInstance

log = logging.getLogger(__name__)

CLOSE_SECONDS = 15.0  # what is left to be reported may take at the end


class MinuteReports:
    """Reports in a thread of its own, so that nothing waits for Dagster; what cannot be reported is kept for later."""

    def __init__(
        self,
        definitions: Sequence[CollectionDefinition],
        settings: Settings,
        line: Callable[[str], None],
        instance: "DagsterInstance | None" = None,
    ) -> None:
        self._definitions = {definition.name: definition for definition in definitions}
        self._settings, self._line, self._instance = settings, line, instance
        self._kept: dict[str, Done] = {}
        self._mutex, self._woken = threading.Lock(), threading.Event()
        self._closed = self._told = False
        self._thread: threading.Thread | None = None

    def add(self, done: Mapping[str, Done]) -> None:
        """Report this soon."""
        with self._mutex:
            for name, each in done.items():
                self._kept.setdefault(name, Done()).add(each)
        self._woken.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="live reports", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Report what is left, if that does not take too long."""
        self._closed = True
        self._woken.set()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while True:
            self._woken.wait()
            self._woken.clear()
            with self._mutex:
                kept, self._kept = self._kept, {}
            try:
                self._report(kept)
                self._told = False
            except Exception as error:  # Dagster's storage may be away: with the next minute's
                if not isinstance(error, PipelineError):
                    log.debug("live: what was done could not be reported", exc_info=True)
                if not self._told:
                    said = " ".join(str(error).split()).partition(". ")[0]
                    self._line(f"warning: Dagster cannot be told what was done, and is told later: {said}")
                self._told = True
                with self._mutex:
                    for name, each in kept.items():
                        self._kept.setdefault(name, Done()).add(each)
            if self._closed:
                return

    def _report(self, done: Mapping[str, Done]) -> None:
        from embeddings_pipeline.orchestration.runner import open_instance

        if not done:
            return
        with open_instance(self._instance) as instance:
            for name, each in done.items():
                report(instance, self._definitions[name], self._settings, each.batches)


def report(
    instance: "DagsterInstance",
    definition: CollectionDefinition,
    settings: Settings,
    batches: Mapping[int, RunFigures],
) -> None:
    """Materializations of these batches, by no run: each asset of a batch with its figures."""
    import dagster as dg

    from embeddings_pipeline.config.definition import batch_key
    from embeddings_pipeline.config.profiles import resolve_profile
    from embeddings_pipeline.orchestration.figures import BATCH_FIGURES, figures_of_step
    from embeddings_pipeline.orchestration.names import asset_key, embeddings_asset
    from embeddings_pipeline.orchestration.partitions import add_partitions

    add_partitions(instance, definition, list(batches))
    dimensions = resolve_profile(definition.declared_profile, settings).dimensions
    for batch, figures in batches.items():
        for step in BATCH_FIGURES:
            asset = embeddings_asset(dimensions) if step == "embeddings" else step
            metadata = {"done_by": "live", **figures_of_step(step, figures)}
            key = asset_key(definition, asset)
            instance.report_runless_asset_event(
                dg.AssetMaterialization(key, partition=batch_key(batch), metadata=metadata)
            )
