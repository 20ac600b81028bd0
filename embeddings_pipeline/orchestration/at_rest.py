"""Whether a collection is at rest: nothing is to be done, and Dagster has nothing to show. It is not imported here."""

import json
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psycopg

from embeddings_pipeline.config.definition import batch_key
from embeddings_pipeline.config.profiles import resolve_profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import PipelineError
from embeddings_pipeline.health.check_results import checks_of, last_results
from embeddings_pipeline.health.failures import failure_kept
from embeddings_pipeline.health.lag import indexes_lag, map_due
from embeddings_pipeline.ledger.full_scan import FullScan
from embeddings_pipeline.orchestration.names import asset_path, partitions_name
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.store.dagster_database import connect_to_dagsters
from embeddings_pipeline.store.sql import load_sql

SHOWN_EVERY = timedelta(hours=20)  # so often at least, Dagster shows that the source was read: `item_ledger` is fresh
PURGE_EVERY = timedelta(hours=20)  # of Dagster's old runs, where no schedule does it


@dataclass(frozen=True)
class Look:
    """What a first look found: the scan that it made, and whether all else is current too."""

    scan: FullScan
    at_rest: bool


def purge_mark(settings: Settings) -> Path:
    """The file that is touched when Dagster's old runs were removed."""
    return settings.state_dir / "dagster" / "purged"


def purge_is_due(settings: Settings) -> bool:
    """Whether it is time to remove Dagster's old runs."""
    try:
        since = time.time() - purge_mark(settings).stat().st_mtime
    except FileNotFoundError:
        return True
    return not 0 <= since < PURGE_EVERY.total_seconds()  # a time that is yet to come counts as none


def dagster_is_at_rest(collection: Collection) -> bool:
    """Whether Dagster need not be told anything of a collection that has no work: no run is under way that might be
    dead, it knows each batch, it has shown lately that the source was read, and its old runs are gone.
    """
    if purge_is_due(collection.settings):
        return False
    parameters = {
        "asset": json.dumps(asset_path(collection.definition, "item_ledger")),
        "partitions": partitions_name(collection.definition),
        "keys": list(map(batch_key, collection.ledger.batches())),
        "every": SHOWN_EVERY,
    }
    try:
        with connect_to_dagsters(collection.database) as connection:
            return connection.execute(load_sql("dagster/at_rest"), parameters).fetchone() == (True,)
    except (PipelineError, psycopg.Error):  # it was never used, or is kept elsewhere
        return False


def look_first(collection: Collection) -> Look | None:
    """Scan the source, and see whether there is anything to do. None if that fails: the run that does so shows why."""
    database, name, ledger = collection.database, collection.definition.name, collection.ledger
    checks = checks_of(
        collection.definition, resolve_profile(collection.definition.declared_profile, collection.settings)
    )
    try:
        with failure_kept(database, name, "scan"):
            scan = ledger.full_scan(collection.source)
        idle = (
            not (scan.new or scan.changed or scan.gone)
            and not ledger.repair()
            and not ledger.work()
            and all(check.passed for check in last_results(database, name, checks))
            and not indexes_lag(collection, verify=True)
            and not map_due(collection)
        )
    except (PipelineError, psycopg.Error):
        return None
    return Look(scan, idle)
