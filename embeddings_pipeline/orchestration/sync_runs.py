"""The runs of a `sync` that has something to do: scan, then every dirty batch, then the indexes, in this process."""

import logging
import time
from contextlib import suppress
from typing import Any

import dagster as dg
import psycopg

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.profiles import resolve_profile
from embeddings_pipeline.errors import InterruptedRunError, PipelineError, RunFailed
from embeddings_pipeline.health.audit import audit
from embeddings_pipeline.health.check_results import checks_of, last_results
from embeddings_pipeline.health.lag import about_foreign, indexes_lag, map_due
from embeddings_pipeline.index.cooccurrence import is_built
from embeddings_pipeline.ledger.full_scan import FullScan
from embeddings_pipeline.orchestration.checks import QUICK, check_keys
from embeddings_pipeline.orchestration.figures import run_figures, scan_figures
from embeddings_pipeline.orchestration.instance.purge import purge_daily
from embeddings_pipeline.orchestration.names import embeddings_asset, partitions_name
from embeddings_pipeline.orchestration.partitions import add_partitions, batches_of, range_tags, run_ranges
from embeddings_pipeline.orchestration.progress import TextMeter, index_watched
from embeddings_pipeline.orchestration.resources import batch_done, scanned_ahead
from embeddings_pipeline.orchestration.runner import JobRunner, open_instance
from embeddings_pipeline.orchestration.sync import Options, SyncResult
from embeddings_pipeline.pipeline.canaries import renew
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.progress import Progress, counting
from embeddings_pipeline.wording import counted

log = logging.getLogger(__name__)

PASSES = 3  # rows that change while a sync runs are dirty again at once


def bring_up_to_date(
    collection: Collection,
    result: SyncResult,
    options: Options,
    progress: Progress,
    instance: dg.DagsterInstance | None = None,
    scan: FullScan | None = None,
) -> None:
    """Do what there is to do, and add it to `result`. `scan`: what the source was just seen to hold."""
    scanned = scanned_ahead.set(scan)
    try:
        with open_instance(instance) as instance:
            _Sync(collection, instance, result, progress).run(options)
            purge_daily(instance, collection.settings)
    finally:
        scanned_ahead.reset(scanned)


class _Sync:
    def __init__(
        self,
        collection: Collection,
        instance: dg.DagsterInstance,
        result: SyncResult,
        progress: Progress,
    ) -> None:
        self.collection, self.instance, self.result, self.progress = collection, instance, result, progress
        self.meter = TextMeter(progress)
        self.definition = collection.definition
        self.runner = JobRunner(collection, instance)
        self.size = collection.definition.attributes.items_per_batch
        self.declared = resolve_profile(collection.definition.declared_profile, collection.settings)

    def run(self, options: Options) -> None:
        listening = batch_done.set(self.meter.batch_done)
        try:
            with self.runner.others_watched(), counting(self.meter.count):
                self._run(options)
        finally:
            batch_done.reset(listening)

    def _run(self, options: Options) -> None:
        try:
            self._bring_up_to_date(options)
        except PipelineError:
            if options.full:  # then most of all; what failed first is what is told
                with suppress(PipelineError):
                    self._run_every_check()
            raise
        if options.full:
            self._run_every_check()
        else:
            self._check_again()
        self.result.checks = [check for check in self.runner.checked.values() if not check.passed]

    def _check_again(self) -> None:
        """A check that failed the last time, and that no run of ours has run since: what it says now is told."""
        last = last_results(self.collection.database, self.definition.name, checks_of(self.definition, self.declared))
        failed = {check.name: check for check in last if check.failed and check.name not in self.runner.checked}
        if again := [name for name in failed if name in QUICK or name == "model_drift"]:
            self.progress("checking", 0, 0)
            self.runner.check(check_keys(self.definition, tuple(again)))
        for name in failed.keys() - self.runner.checked.keys():  # only an audit can tell
            self.runner.checked[name] = failed[name]

    def _run_every_check(self) -> None:
        self.progress("checking", 0, 0)
        self.runner.execute("audit", {}, {})

    def _bring_up_to_date(self, options: Options) -> None:
        ledger, name, result = self.collection.ledger, self.definition.name, self.result
        self.progress("scanning", 0, 0)
        items = None
        if options.recent is None:
            self._scan(options.allow_deletes)
            if options.full:
                self.progress("auditing", 0, 0)
                audit(self.collection)
            else:
                ledger.repair()
            work = dict.fromkeys(ledger.batches(), self.size) if options.force else ledger.work()
        else:
            if self.definition.attributes.source.updated_at:
                scan = ledger.incremental_scan(self.collection.source)
                result.scanned, result.new, result.changed = scan.read, scan.new, scan.changed
            recent = ledger.recent_items(options.recent.days, options.recent.items)
            work = {batch: len(keys) for batch, keys in recent.items()}
            items = [key for keys in recent.values() for key in keys]

        force, limit = options.force, options.limit
        self.meter.expect(len(work))
        for _ in range(PASSES):
            add_partitions(self.instance, self.definition, ledger.batches())
            existing = batches_of(self.instance.get_dynamic_partitions(partitions_name(self.definition)))
            for first, last in run_ranges(work, existing, self.size):
                done = result.embedded + result.cached + result.in_jobs
                if limit is not None and done >= limit:
                    break
                left = None if limit is None else limit - done
                chosen = {"force": force, "limit": left, "items": items, "api": options.api}
                self._execute_batches(first, last, chosen)
            # Rows that changed while we ran; what `limit` and `recent` leave is left on purpose.
            work = {} if limit is not None or items is not None else ledger.dirty_items(free=True)
            if not work:
                break
            force = False
            self.meter.expect(len(work))
        if work:
            log.warning(
                "warning: collection %r: rows of %s changed again while they were synced; sync again, and see "
                "whether a column changes at each read",
                *(name, counted(len(work), "batch")),
            )
        if options.force and limit is None and items is None and result.embedded:
            renew(self.collection)
        lag = indexes_lag(self.collection, verify=True)
        if lag or map_due(self.collection):
            if foreign := about_foreign(self.collection):
                log.warning("warning: collection %r: %s", name, foreign)
            self.progress("indexing", 0, 0)
            with index_watched(self.collection, self.progress):
                if lag:
                    self.runner.execute("index", {}, {})
                    self.result.indexed = _indexes_of(self.definition)
                else:
                    self.runner.materialize("index", "map")
                    self.result.indexed = ["map"]
        if self.definition.attributes.interactions and (options.full or not is_built(self.collection.database, name)):
            self.runner.execute("cooccurrence", {}, {})

    def _scan(self, allow_deletes: bool) -> None:
        config = {"ops": {self.runner.op("item_ledger"): {"config": {"allow_deletes": allow_deletes}}}}
        scan, result = scan_figures(self.runner.execute("scan", config, {})), self.result
        result.scanned, result.new, result.changed = scan.scanned, scan.new, scan.changed

    def _current_fingerprint(self) -> str | None:
        current = self.collection.ledger.current()
        return current.destination.fingerprint if current else None

    def _execute_batches(self, first: int, last: int, embed: dict[str, Any]) -> None:
        config = {"ops": {self.runner.op(embeddings_asset(self.declared.dimensions)): {"config": embed}}}
        self.meter.tell("reading")
        before, began = self._current_fingerprint(), time.monotonic()
        try:
            figures = run_figures(self.runner.execute("batches", config, range_tags(first, last)))
        except (InterruptedRunError, KeyboardInterrupt):
            with suppress(PipelineError, psycopg.Error):
                self.collection.ledger.take_back_attempts(first, last, seconds=time.monotonic() - began)
            raise
        except RunFailed:
            if self._current_fingerprint() == before:
                raise
            return  # another model became current meanwhile: what this run did not commit is dirty, for the next pass
        self.result.deleted += figures.deleted
        self.result.embedded += figures.embedded
        self.result.cached += figures.cached
        self.result.reused += figures.reused
        self.result.in_jobs += figures.in_jobs
        self.result.left += 0 if embed["force"] else figures.left_to_embed


def _indexes_of(definition: CollectionDefinition) -> list[str]:
    """What is searched by, for people: all that one build makes."""
    config = definition.attributes
    return [
        *([] if config.index.method == "none" else [f"pgvector ({config.index.method})"]),
        "FAISS",
        *([f"words ({config.words.language})"] if config.words else []),
        *([counted(len(config.filters), "filter")] if config.filters else []),
        *([] if config.map.method == "none" else ["map"]),
    ]
