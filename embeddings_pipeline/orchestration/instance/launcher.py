"""Runs in processes of the code server, as Dagster's default, and noticed when such a process is gone."""

import psycopg
from dagster import DagsterRun, DefaultRunLauncher

from embeddings_pipeline.config.settings import load_settings
from embeddings_pipeline.errors import PipelineError
from embeddings_pipeline.orchestration.dagster_internals import CheckRunHealthResult, LaunchRunContext, WorkerStatus
from embeddings_pipeline.orchestration.instance.liveness import RunWatch, launcher_tags
from embeddings_pipeline.store.database import open_database


class WatchedRunLauncher(DefaultRunLauncher):
    """The default launcher, whose runs fail within seconds when their process has gone (Dagster's run monitoring)."""

    _watch: RunWatch | None = None

    def launch_run(self, context: LaunchRunContext) -> None:
        self._instance.add_run_tags(context.dagster_run.run_id, launcher_tags())
        super().launch_run(context)

    @property
    def supports_check_run_worker_health(self) -> bool:
        return True

    def check_run_worker_health(self, run: DagsterRun) -> CheckRunHealthResult:
        # What cannot be known counts as running: a failure would start the run a second time beside the first.
        self._watch = self._watch or RunWatch()
        try:
            with open_database(load_settings()).session() as connection:
                dead = self._watch.is_dead(self._instance, connection, run)
        except (PipelineError, psycopg.Error):
            dead = False
        if dead:
            return CheckRunHealthResult(WorkerStatus.FAILED, "the process that executed the run has gone")
        return CheckRunHealthResult(WorkerStatus.RUNNING)
