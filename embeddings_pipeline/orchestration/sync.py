"""`sync`: scan, then every dirty batch, then the indexes, as Dagster runs in this process.

It looks first. Dagster is imported only if there is something to do, or something that Dagster has to show: its import
takes longer than all that a collection at rest needs.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from embeddings_pipeline.config.definition import CollectionDefinition, batch_key
from embeddings_pipeline.config.prices import Api
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders.budget import Purse, spending
from embeddings_pipeline.errors import ConfigurationError, RunFailed
from embeddings_pipeline.health.activity import activity
from embeddings_pipeline.health.check_results import CheckResult
from embeddings_pipeline.health.failures import failure_kept
from embeddings_pipeline.orchestration.at_rest import dagster_is_at_rest, look_first
from embeddings_pipeline.orchestration.progress import both
from embeddings_pipeline.pipeline.collection import Collection, look_at_collection, open_collection
from embeddings_pipeline.pipeline.pending import pending_texts
from embeddings_pipeline.pipeline.submit import check_api, look_at_jobs
from embeddings_pipeline.progress import Progress, silent
from embeddings_pipeline.store.database import open_database

if TYPE_CHECKING:
    import dagster as dg

log = logging.getLogger(__name__)


@dataclass
class SyncResult:
    """What a sync did: items (scanned, new, changed, deleted), texts (embedded, cached, reused), dollars, seconds; and
    how many texts and items are in quarantine after it, and how many texts are longer than the model reads. Indexes
    that were built, for people.
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
    usd: float = 0.0  # billed, and what batch jobs are expected to cost
    in_jobs: int = 0  # texts of the batches of this sync that batch jobs have: a later sync commits them
    left: int = 0  # texts that `limit` or `dry_run` left for later
    truncated: int = 0  # texts of the collection that are longer than the model reads; of a dry run: of those left
    longest_tokens: int = 0  # the longest of them
    indexed: list[str] = field(default_factory=list)
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


@dataclass(frozen=True)
class Options:
    """What a sync was asked for: see `sync`."""

    force: bool = False
    limit: int | None = None
    allow_deletes: bool = False
    full: bool = False
    recent: Recent | None = None
    api: Api = "direct"

    @property
    def plain(self) -> bool:
        """Whether it is asked for what there is to do, and no more."""
        return not (self.force or self.allow_deletes or self.full or self.recent)


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
    api: Api = "direct",
    redefine: bool = False,
    purse: Purse | None = None,
    progress: Progress = silent,
    instance: "dg.DagsterInstance | None" = None,
) -> SyncResult:
    """Bring a collection up to date, and say what was done.

    `force` encodes every text anew; `limit` encodes at most that many; `dry_run` counts and writes nothing; `full`
    audits every copy first and runs every check last; `recent` leaves all but new items to others; `api: batch` hands
    texts to a hosted model's Batch API, whose answers a later sync commits; `redefine` puts the
    definition in force, though a newer one is. `purse`: what may be spent. `progress(phase, done, total)`: called as
    texts are embedded (total 0: not known yet). `instance`: Dagster's; left out, the one of dagster.yaml. Raises
    PipelineError in one line if a run failed, BudgetError; a check that did not pass is told in the result.
    """
    if api == "batch" and force:
        raise ConfigurationError("`force` and `api: batch` exclude each other: leave one of them out")
    started, purse = time.perf_counter(), purse or Purse()
    result, spent_before = SyncResult(definition.name, dry_run=dry_run), purse.spent
    if dry_run:
        _look(definition, settings, result, force=force, redefine=redefine, api=api)
    else:
        options = Options(force, limit, allow_deletes, full, recent, api)
        with _failure_kept(definition, settings), spending(purse):
            collection = _warned(open_collection(definition, settings, redefine=redefine))
            check_api(collection.profile, api)
            look_at_jobs(collection, progress)
            with activity(collection.database, definition.name, "sync") as told:
                _bring_up_to_date(collection, result, options, both(progress, told), instance)
            _note_what_is_amiss(collection, result)
    result.usd = round(purse.spent - spent_before, 6)
    result.seconds = round(time.perf_counter() - started, 2)
    return result


def _bring_up_to_date(
    collection: Collection,
    result: SyncResult,
    options: Options,
    progress: Progress,
    instance: "dg.DagsterInstance | None",
) -> None:
    scan = None
    if options.plain and instance is None and dagster_is_at_rest(collection):
        progress("scanning", 0, 0)
        if (look := look_first(collection)) is not None:
            scan = look.scan
            result.scanned, result.new, result.changed = scan.scanned, scan.new, scan.changed
            if look.at_rest:
                return
    from embeddings_pipeline.orchestration.sync_runs import bring_up_to_date

    bring_up_to_date(collection, result, options, progress, instance, scan)


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


def _note_what_is_amiss(collection: Collection, result: SyncResult) -> None:
    result.quarantined = sum(entry.items > 0 for entry in collection.ledger.quarantine_entries())
    current = collection.ledger.current() or collection.model
    counted = collection.ledger.truncation(current.destination.fingerprint)
    result.truncated, result.longest_tokens = counted.truncated, counted.longest


def _look(
    definition: CollectionDefinition, settings: Settings, result: SyncResult, *, force: bool, redefine: bool, api: Api
) -> None:
    collection = _warned(look_at_collection(definition, settings))
    if not redefine:
        collection.ledger.check_newest()
    scan, batches = collection.ledger.look(collection.source, everything=force)
    result.scanned, result.new, result.changed = scan.scanned, scan.new, scan.changed
    result.deleted = scan.gone
    pending = pending_texts(collection, batches, force=force, api=api)
    result.left, result.reused = pending.texts, pending.reused
    result.truncated, result.longest_tokens = pending.truncated, pending.longest
    result.quotes = {batch_key(batch): quote.as_dict() for batch, quote in pending.quotes.items()}
    result.quote, result.basis = pending.total.as_dict(), pending.basis
