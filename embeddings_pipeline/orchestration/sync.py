"""`sync`: scan, then every dirty batch, then the indexes, as Dagster runs in this process."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import dagster as dg

from embeddings_pipeline.config.definition import CollectionDefinition, batch_key
from embeddings_pipeline.config.profiles import resolve_profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders.budget import Purse, spending
from embeddings_pipeline.errors import PipelineError
from embeddings_pipeline.health.activity import activity
from embeddings_pipeline.health.audit import audit
from embeddings_pipeline.health.check_results import CheckResult, last_results
from embeddings_pipeline.health.failures import failure_kept
from embeddings_pipeline.health.lag import FOREIGN_INDEX, faiss_standing, indexes_lag
from embeddings_pipeline.index.standing import Standing
from embeddings_pipeline.orchestration.checks import QUICK, check_keys
from embeddings_pipeline.orchestration.figures import run_figures, scan_figures
from embeddings_pipeline.orchestration.instance.purge import purge_daily
from embeddings_pipeline.orchestration.names import embeddings_asset, partitions_name
from embeddings_pipeline.orchestration.partitions import add_partitions, batches_of, range_tags, run_ranges
from embeddings_pipeline.orchestration.progress import TextMeter, both, index_watched
from embeddings_pipeline.orchestration.resources import batch_done
from embeddings_pipeline.orchestration.runner import JobRunner, RunFailed, open_instance
from embeddings_pipeline.pipeline.canaries import renew
from embeddings_pipeline.pipeline.collection import Collection, look_at_collection, open_collection
from embeddings_pipeline.pipeline.pending import pending_texts
from embeddings_pipeline.progress import Progress, counting, silent
from embeddings_pipeline.store.database import open_database

log = logging.getLogger(__name__)

PASSES = 3  # rows that change while a sync runs are dirty again at once


@dataclass
class SyncResult:
    """What a sync did: items (scanned, new, changed, deleted), texts (embedded, cached, reused), dollars, seconds; and
    how many texts and items are in quarantine after it, and how many texts are longer than the model reads.
    """

    collection: str
    scanned: int = 0
    new: int = 0
    changed: int = 0
    deleted: int = 0
    embedded: int = 0
    cached: int = 0  # texts whose vector the embedding cache knew
    reused: int = 0
    quarantined: int = 0
    usd: float = 0.0  # billed
    left: int = 0  # texts that `limit` or `dry_run` left for later
    truncated: int = 0  # texts of the collection that are longer than the model reads; of a dry run: of those left
    longest_tokens: int = 0  # the longest of them
    seconds: float = 0.0
    dry_run: bool = False
    quotes: dict[str, dict[str, Any]] = field(default_factory=dict)  # of a dry run: what each batch would cost
    quote: dict[str, Any] | None = None  # … and all of them together
    basis: str = ""  # what that rests on
    checks: list[CheckResult] = field(default_factory=list)  # those that did not pass

    @property
    def failed(self) -> bool:
        """Whether a check of severity error did not pass."""
        return any(check.failed for check in self.checks)


@dataclass(frozen=True)
class Recent:
    """Work on items first seen in the last `days` of which nothing is committed, at most `items` of them, alone."""

    days: int
    items: int


def sync(
    definition: CollectionDefinition,
    settings: Settings,
    *,
    force: bool = False,
    dry_run: bool = False,
    limit: int | None = None,
    allow_deletes: bool = False,
    full: bool = False,
    recent: Recent | None = None,
    redefine: bool = False,
    purse: Purse | None = None,
    progress: Progress = silent,
    instance: dg.DagsterInstance | None = None,
) -> SyncResult:
    """Bring a collection up to date, and say what was done.

    `force` encodes every text anew; `limit` encodes at most that many; `dry_run` counts and writes nothing.
    `full` audits every copy first and runs every check last; `recent` leaves the full scan to others, and everything
    but new items. `redefine` puts the definition in force, though a newer one is. `purse`: what may be spent.
    `progress(phase, done, total)` is called as texts are embedded (total 0: not known yet). `instance`: Dagster's, the
    one of dagster.yaml if left out. Raises PipelineError with one line if a run failed, BudgetError if a budget stopped
    it; a check that did not pass is told in the result.
    """
    started = time.perf_counter()
    result = SyncResult(definition.name, dry_run=dry_run)
    purse = purse or Purse()
    spent_before = purse.spent
    if dry_run:
        _look(_warned(look_at_collection(definition, settings)), result, force)
    else:
        with _failure_kept(definition, settings), spending(purse):
            collection = _warned(open_collection(definition, settings, redefine=redefine))
            with (
                activity(collection.database, definition.name, "sync") as told,
                open_instance(instance) as instance,
            ):
                tell = both(progress, told)
                _Sync(collection, instance, result, tell).run(_Options(force, limit, allow_deletes, full, recent))
                purge_daily(instance, settings)
            current = collection.ledger.current() or collection.model
            counted = collection.ledger.truncation(current.destination.fingerprint)
            result.truncated, result.longest_tokens = counted.truncated, counted.longest
    result.usd = round(purse.spent - spent_before, 6)
    result.seconds = round(time.perf_counter() - started, 2)
    return result


def _warned(collection: Collection) -> Collection:
    for warning in collection.warnings:
        log.warning("warning: %s", warning)
    return collection


@contextmanager
def _failure_kept(definition: CollectionDefinition, settings: Settings) -> Iterator[None]:
    """As `failure_kept`, of what is no run's: the steps of runs keep why they failed themselves."""
    failed: RunFailed | None = None
    with failure_kept(open_database(settings), definition.name, "sync"):
        try:
            yield
        except RunFailed as error:
            failed = error
    if failed is not None:
        raise failed


def _look(collection: Collection, result: SyncResult, force: bool) -> None:
    scan, batches = collection.ledger.look(collection.source, everything=force)
    result.scanned, result.new, result.changed = scan.scanned, scan.new, scan.changed
    result.deleted = scan.gone
    pending = pending_texts(collection, batches, force=force)
    result.left, result.reused = pending.texts, pending.reused
    result.truncated, result.longest_tokens = pending.truncated, pending.longest
    result.quotes = {batch_key(batch): quote.as_dict() for batch, quote in pending.quotes.items()}
    result.quote, result.basis = pending.total.as_dict(), pending.basis


@dataclass(frozen=True)
class _Options:
    force: bool
    limit: int | None
    allow_deletes: bool
    full: bool
    recent: Recent | None


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
        self.dimensions = resolve_profile(collection.definition.declared_profile, collection.settings).dimensions

    def run(self, options: _Options) -> None:
        listening = batch_done.set(self.meter.batch_done)
        try:
            with self.runner.others_watched(), counting(self.meter.count):
                self._run(options)
        finally:
            batch_done.reset(listening)

    def _run(self, options: _Options) -> None:
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
        last = last_results(self.collection.database, self.definition.name)
        failed = {check.name: check for check in last if check.failed and check.name not in self.runner.checked}
        if again := [name for name in failed if name in QUICK or name == "model_drift"]:
            self.progress("checking", 0, 0)
            self.runner.check(check_keys(self.definition, tuple(again)))
        for name in failed.keys() - self.runner.checked.keys():  # only an audit can tell
            self.runner.checked[name] = failed[name]

    def _run_every_check(self) -> None:
        self.progress("checking", 0, 0)
        self.runner.execute("audit", {}, {})

    def _bring_up_to_date(self, options: _Options) -> None:
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
                if limit is not None and result.embedded + result.cached >= limit:
                    break
                left = None if limit is None else limit - result.embedded - result.cached
                self._execute_batches(first, last, {"force": force, "limit": left, "items": items})
            # Rows that changed while we ran; what `limit` and `recent` leave is left on purpose.
            work = {} if limit is not None or items is not None else ledger.dirty_items()
            if not work:
                break
            force = False
            self.meter.expect(len(work))
        if work:
            log.warning(
                "warning: collection %r: rows of %s batches changed again while they were synced; sync again, and see "
                "whether a column changes at each read",
                *(name, len(work)),
            )
        if options.force and limit is None and items is None and result.embedded:
            renew(self.collection)
        result.quarantined = sum(entry.items > 0 for entry in ledger.quarantine_entries())
        if indexes_lag(self.collection, verify=True):
            if faiss_standing(self.collection) is Standing.FOREIGN:
                log.warning("warning: collection %r: %s", name, FOREIGN_INDEX)
            self.progress("indexing", 0, 0)
            with index_watched(self.collection, self.progress):
                self.runner.execute("index", {}, {})

    def _scan(self, allow_deletes: bool) -> None:
        config = {"ops": {self.runner.op("item_ledger"): {"config": {"allow_deletes": allow_deletes}}}}
        scan, result = scan_figures(self.runner.execute("scan", config, {})), self.result
        result.scanned, result.new, result.changed = scan.scanned, scan.new, scan.changed

    def _current_fingerprint(self) -> str | None:
        current = self.collection.ledger.current()
        return current.destination.fingerprint if current else None

    def _execute_batches(self, first: int, last: int, embed: dict[str, Any]) -> None:
        config = {"ops": {self.runner.op(embeddings_asset(self.dimensions)): {"config": embed}}}
        self.meter.tell("reading")
        before = self._current_fingerprint()
        try:
            figures = run_figures(self.runner.execute("batches", config, range_tags(first, last)))
        except RunFailed:
            if self._current_fingerprint() == before:
                raise
            return  # another model became current meanwhile: what this run did not commit is dirty, for the next pass
        self.result.deleted += figures.deleted
        self.result.embedded += figures.embedded
        self.result.cached += figures.cached
        self.result.reused += figures.reused
        self.result.left += 0 if embed["force"] else figures.left_to_embed
