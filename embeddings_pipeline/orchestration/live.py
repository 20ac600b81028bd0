"""What Dagster has of `live`: materializations of what it did, and the job `…_live`, which is `live` as a run."""

import threading
from collections.abc import Mapping

import dagster as dg
from pydantic import Field

from embeddings_pipeline.config.definition import CollectionDefinition, batch_key
from embeddings_pipeline.config.profiles import resolve_profile
from embeddings_pipeline.config.settings import Settings, load_settings
from embeddings_pipeline.live.done import Done
from embeddings_pipeline.live.follow import Told, follow
from embeddings_pipeline.live.reports import MinuteReports
from embeddings_pipeline.orchestration.figures import BATCH_FIGURES, figures_of_step
from embeddings_pipeline.orchestration.instance.event_log import materializations_together
from embeddings_pipeline.orchestration.names import (
    AUTOMATION,
    asset_key,
    embeddings_asset,
    job_name,
    job_tags,
    op_name,
)
from embeddings_pipeline.orchestration.partitions import add_partitions
from embeddings_pipeline.orchestration.resources import known_to_live
from embeddings_pipeline.orchestration.runner import open_instance
from embeddings_pipeline.orchestration.steps import failures


def report(
    definitions: Mapping[str, CollectionDefinition],
    settings: Settings,
    done: Mapping[str, Done],
    instance: dg.DagsterInstance | None = None,
) -> None:
    """Materializations, by no run, of the assets of each batch that was done, with their figures.

    `instance`: Dagster's, the one of dagster.yaml if left out.
    """
    with open_instance(instance) as instance, materializations_together(instance):
        for name, each in done.items():
            definition = definitions[name]
            add_partitions(instance, definition, list(each.batches))
            dimensions = resolve_profile(definition.declared_profile, settings).dimensions
            for batch, figures in each.batches.items():
                for step in BATCH_FIGURES:
                    key = asset_key(definition, embeddings_asset(dimensions) if step == "embeddings" else step)
                    metadata = {"done_by": "live", **figures_of_step(step, figures)}
                    event = dg.AssetMaterialization(key, partition=batch_key(batch), metadata=metadata)
                    instance.report_runless_asset_event(event)


class LiveConfig(dg.Config):
    """Launchpad settings of the job `live`."""

    minutes: float | None = Field(default=None, description="End after so long. Left out: when the run is ended.")


def build_live_job(definition: CollectionDefinition) -> dg.JobDefinition:
    """`…_live`: a run that stays until somebody ends it."""

    @dg.op(name=op_name(definition, "follow_changes"), out=dg.Out(dg.Nothing))
    def follow_changes(context: dg.OpExecutionContext, config: LiveConfig) -> None:
        settings, ended = load_settings(), threading.Event()
        reports = MinuteReports(
            lambda done: report({definition.name: definition}, settings, done, context.instance), context.log.warning
        )

        def started(watched: Mapping[str, str]) -> None:
            context.log.info(f"following {watched[definition.name]}")

        timer = None if config.minutes is None else threading.Timer(60 * config.minutes, ended.set)
        if timer is not None:
            timer.start()
        try:
            with known_to_live(context.instance, context.run_id), failures():
                follow([definition], settings, ended, Told(context.log.warning, started, reports.add))
        finally:
            if timer is not None:
                timer.cancel()
            reports.close()

    @dg.job(
        name=job_name(definition, "live"),
        **job_tags(definition, AUTOMATION),
        description=(
            f"Stays, follows the source of {definition.name!r}, and brings each change into the answers within seconds,"
            " until the run is ended. What it did is reported each minute."
        ),
    )
    def live() -> None:
        follow_changes()

    return live
