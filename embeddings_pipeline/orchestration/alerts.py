"""Failed runs and failed checks are told to people; see alerts.py for how."""

from collections.abc import Mapping

import dagster as dg

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import load_settings
from embeddings_pipeline.health.alerts import alert
from embeddings_pipeline.orchestration.dagster_internals import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
    PARTITION_NAME_TAG,
    AssetCheckExecutionRecordStatus,
)
from embeddings_pipeline.orchestration.instance.liveness import SYNC_TAG
from embeddings_pipeline.orchestration.names import JOBS, asset_op_name, automation_name, is_of, job_name, op_name


def build_alerts(definition: CollectionDefinition) -> dg.SensorDefinition:
    """`failure_alerts`: tells of each failed run of the collection. It is on from the start."""

    @dg.run_failure_sensor(
        name=automation_name(definition, "failure_alerts"),
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Logs a structured line for each run that fails, and posts it to ALERT_WEBHOOK_URL if that is set.",
    )
    def failure_alerts(context: dg.RunFailureSensorContext) -> None:
        run = context.dagster_run
        if not _concerns(run, definition) or SYNC_TAG in run.tags:  # a sync says itself what failed
            return
        error, step = context.failure_event.message or "it failed", None
        with_reason = [event for event in context.get_step_failure_events() if event.step_failure_data]
        for event in with_reason[:1]:
            data, step = event.step_failure_data, _step_name(definition, event.step_key or "")
            error = (data.user_failure_data and data.user_failure_data.description) or (
                data.error_display_string.strip().splitlines()[0] if data.error_display_string else error
            )
        error = error.removeprefix(f"collection {definition.name!r}: ")
        job = None if run.job_name.startswith("__") else run.job_name  # Dagster's own, of a materialization in the UI
        alert(
            load_settings(),
            "run_failed",
            f"collection {definition.name!r}: {step or job or 'a materialization'} failed: {error}",
            collection=definition.name,
            job=job,
            step=step,
            run_id=run.run_id,
            partitions=run.tags.get(PARTITION_NAME_TAG) or _range_of(run.tags),
        )

    return failure_alerts


def _concerns(run: dg.DagsterRun, definition: CollectionDefinition) -> bool:
    own = {job_name(definition, job) for job in JOBS}
    return run.job_name in own or any(is_of(definition, key) for key in run.asset_selection or ())


def _step_name(definition: CollectionDefinition, op: str) -> str:
    """The asset's or op's name, less the collection's."""
    prefix = asset_op_name(definition, "x").removesuffix("x")
    return op.removeprefix(prefix).removeprefix(op_name(definition, "")).replace("__", "/")


def _range_of(tags: Mapping[str, str]) -> str | None:
    first, last = tags.get(ASSET_PARTITION_RANGE_START_TAG), tags.get(ASSET_PARTITION_RANGE_END_TAG)
    return f"{first}…{last}" if first else None


def alert_of_check(
    context: dg.AssetCheckExecutionContext | dg.AssetExecutionContext,
    definition: CollectionDefinition,
    key: dg.AssetCheckKey,
    text: str,
) -> None:
    """Tell of a check that fails, unless it failed the last time too."""
    before = context.instance.event_log_storage.get_asset_check_execution_history(key, limit=5)
    ended = (AssetCheckExecutionRecordStatus.SUCCEEDED, AssetCheckExecutionRecordStatus.FAILED)
    last = next((record for record in before if record.status in ended), None)
    if last is not None and last.status == AssetCheckExecutionRecordStatus.FAILED and last.event is not None:
        evaluation = last.event.get_dagster_event().asset_check_evaluation_data
        if evaluation.severity == dg.AssetCheckSeverity.ERROR:
            return
    alert(
        load_settings(),
        "check_failed",
        f"collection {definition.name!r}: check {key.name} failed: {text}",
        collection=definition.name,
        check=key.name,
        asset=key.asset_key.to_user_string(),
        run_id=context.run.run_id,
    )
