"""Runs in processes of the code server, as Dagster's default, and noticed when such a process is gone."""

from dagster import DagsterRun, DefaultRunLauncher

from embeddings_pipeline.orchestration.dagster_internals import CheckRunHealthResult, LaunchRunContext, WorkerStatus
from embeddings_pipeline.orchestration.instance.liveness import host_tags, worker_alive


class WatchedRunLauncher(DefaultRunLauncher):
    """The default launcher, whose runs fail within seconds when their process has gone (Dagster's run monitoring)."""

    def launch_run(self, context: LaunchRunContext) -> None:
        self._instance.add_run_tags(context.dagster_run.run_id, host_tags())
        super().launch_run(context)

    @property
    def supports_check_run_worker_health(self) -> bool:
        return True

    def check_run_worker_health(self, run: DagsterRun) -> CheckRunHealthResult:
        # What cannot be known counts as running: a failure would start the run a second time beside the first.
        if worker_alive(self._instance, run) is False:
            return CheckRunHealthResult(WorkerStatus.FAILED, "the process that executed the run has gone")
        return CheckRunHealthResult(WorkerStatus.RUNNING)
