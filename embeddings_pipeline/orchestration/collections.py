"""Removing and renaming a collection everywhere: in Dagster, in the files, in the database and in its `defs.yaml`."""

import dagster as dg

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.editing import write_name
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import ConfigurationError, RefusedError
from embeddings_pipeline.failpoints import failpoint
from embeddings_pipeline.orchestration.instance.liveness import RunWatch, cancel_dead_runs
from embeddings_pipeline.orchestration.names import collections_of, partitions_of
from embeddings_pipeline.orchestration.runner import open_instance
from embeddings_pipeline.pipeline.inventory import Inventory, take_inventory
from embeddings_pipeline.pipeline.removal import check_idle, check_no_batch_jobs, remove_collection
from embeddings_pipeline.pipeline.renaming import (
    check_not_being_renamed,
    end_renaming,
    rename_files,
    rename_in_database,
)
from embeddings_pipeline.store.database import Database

OPEN_STATUSES = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


def partition_keys(instance: dg.DagsterInstance, name: str) -> list[str]:
    """The keys of the batches that Dagster knows of a collection, in its order."""
    return list(instance.get_dynamic_partitions(partitions_of(name)))


def remove_everywhere(
    database: Database, settings: Settings, kept: Inventory, instance: dg.DagsterInstance | None = None
) -> None:
    """Remove all that is kept of a collection, but neither its `defs.yaml` nor a table of the user's.

    RefusedError while a run or a model change of it is under way. What was killed goes on when it is called again.
    """
    with open_instance(instance) as instance:
        _check_no_run(instance, database, kept.name)
        with database.connect(autocommit=True) as connection:
            check_not_being_renamed(connection, kept.name)
            check_idle(connection, kept.name)
            check_no_batch_jobs(connection, kept.name)
        _delete_partitions(instance, kept.name)
    failpoint("remove.partitions")
    remove_collection(database, settings, kept)


def rename_everywhere(
    database: Database,
    settings: Settings,
    old: str,
    new: str,
    definition: CollectionDefinition | None = None,
    instance: dg.DagsterInstance | None = None,
) -> None:
    """Give a collection another name, in its `defs.yaml` (of `definition`) too.

    RefusedError while a run or a model change of it is under way, or if the new name is taken; ConfigurationError, all
    else being done, if its `defs.yaml` has to be changed by hand. What was killed goes on when it is called again.
    """
    with open_instance(instance) as instance:
        _check_no_run(instance, database, old)
        if take_inventory(database, settings, new).renamed_from != old:
            with database.connect(autocommit=True) as connection:
                for name in (old, new):
                    check_not_being_renamed(connection, name)
            _check_names(database, settings, old, new)
            rename_in_database(database, take_inventory(database, settings, old), new)
        failpoint("rename.database")
        keys, known = partition_keys(instance, old), set(partition_keys(instance, new))
        if missing := [key for key in keys if key not in known]:
            instance.add_dynamic_partitions(partitions_of(new), missing)
        failpoint("rename.partitions")
        _delete_partitions(instance, old)
    rename_files(settings, old, new)
    try:
        if definition is not None and definition.path is not None:
            write_name(definition.path, old, new)
    except ConfigurationError:  # it says what to do by hand, and that the rest is done
        end_renaming(database, new)
        raise
    failpoint("rename.definition")
    end_renaming(database, new)


def _check_names(database: Database, settings: Settings, old: str, new: str) -> None:
    if not take_inventory(database, settings, old).in_database:
        raise ConfigurationError(f"there is no collection {old!r} in the database; see `collection list`")
    if take_inventory(database, settings, new).exists:
        raise RefusedError(f"there is a collection {new!r} already; choose another name, or remove it first")


def _check_no_run(instance: dg.DagsterInstance, database: Database, name: str) -> None:
    cancel_dead_runs(instance, database, RunWatch())
    records = instance.get_run_records(dg.RunsFilter(statuses=OPEN_STATUSES))
    runs = [
        run.run_id[:8]
        for run in (record.dagster_run for record in records)
        if name in collections_of(run.job_name, run.asset_selection or ())
    ]
    if runs:
        raise RefusedError(
            f"collection {name!r}: {len(runs)} of its runs are under way ({', '.join(runs)}); wait for them, or end "
            "them in the Dagster UI"
        )


def _delete_partitions(instance: dg.DagsterInstance, name: str) -> None:
    for key in partition_keys(instance, name):
        instance.delete_dynamic_partition(partitions_of(name), key)
