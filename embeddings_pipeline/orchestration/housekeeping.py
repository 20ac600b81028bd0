"""What belongs to no collection: old runs go every day, and each collection has a partition from the start."""

import dagster as dg

from embeddings_pipeline.config.definition import batch_key
from embeddings_pipeline.config.settings import load_settings
from embeddings_pipeline.orchestration.instance.home import check_home
from embeddings_pipeline.orchestration.instance.purge import purge
from embeddings_pipeline.orchestration.instance.workers import warm_up
from embeddings_pipeline.orchestration.names import AUTOMATION, FOR_TAG, partitions_of
from embeddings_pipeline.orchestration.resources import EXECUTOR, LOGGERS
from embeddings_pipeline.orchestration.steps import failures
from embeddings_pipeline.wording import counted

FIRST_BATCH = batch_key(0)
LOOK_SECONDS = 60


def build_housekeeping() -> dg.Definitions:
    """The job `remove_old_runs` with its schedule, and the sensor `first_partitions`; both are on from the start.

    ConfigurationError if DAGSTER_HOME is a folder without a dagster.yaml.
    """
    check_home()

    @dg.op(out=dg.Out(dg.Nothing))
    def remove_runs(context: dg.OpExecutionContext) -> None:
        settings = load_settings()
        with failures():
            purged = purge(context.instance, settings)
        context.log.info(
            f"{counted(purged.runs, 'run')} older than {counted(settings.keep_days, 'day')} removed, and "
            f"{counted(purged.folders, 'folder')} of runs that were gone; {purged.kept:,} older ones are kept: an "
            "asset's, a partition's or a check's last"
        )

    @dg.job(
        executor_def=EXECUTOR,
        logger_defs=LOGGERS,
        tags={FOR_TAG: AUTOMATION},
        description=(
            "By itself, every day: remove Dagster's runs, with their events and log files, that are older than "
            "EMBEDDINGS_KEEP_DAYS (30; 0: keep all). The last of each asset, partition and check stays."
        ),
    )
    def remove_old_runs() -> None:
        remove_runs()

    @dg.sensor(
        minimum_interval_seconds=LOOK_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Gives a new collection its first partition, so that its assets can be materialized in the UI.",
    )
    def first_partitions(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        warm_up()  # for the first run, whoever starts it
        added = []
        for collection in _collections(context.repository_def):
            if not context.instance.get_dynamic_partitions(partitions_of(collection)):
                context.instance.add_dynamic_partitions(partitions_of(collection), [FIRST_BATCH])
                added.append(collection)
        return dg.SkipReason(f"first partition of: {', '.join(added)}" if added else "each collection has partitions")

    schedule = dg.ScheduleDefinition(
        name="daily_removal_of_old_runs",
        job=remove_old_runs,
        cron_schedule="30 3 * * *",
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description=remove_old_runs.description,
    )
    return dg.Definitions(jobs=[remove_old_runs], schedules=[schedule], sensors=[first_partitions])


def _collections(repository: dg.RepositoryDefinition | None) -> list[str]:
    """The names of the collections whose assets the code location has."""
    assert repository is not None  # the daemon gives it
    graph = repository.asset_graph
    return sorted({name for key in graph.get_all_asset_keys() if (name := graph.get(key).tags.get("collection"))})
