"""Jobs as runs in this process, which the UI shows like any other."""

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import dagster as dg
import psycopg
import sqlalchemy.exc

from embeddings_pipeline.encoders.budget import purse, spending
from embeddings_pipeline.errors import BudgetError, DatabaseError, InterruptedRunError, PipelineError, RunFailed
from embeddings_pipeline.health.check_results import CheckResult, Severity
from embeddings_pipeline.orchestration.dagster_internals import (
    MAX_RETRIES_TAG,
    REPOSITORY_LABEL_TAG,
    DagsterPostgresException,
    InMemoryJob,
    RegisteredCodeLocationOrigin,
    RemoteRepositoryOrigin,
    SerializableErrorInfo,
    execute_run_iterator,
    make_new_run_id,
)
from embeddings_pipeline.orchestration.figures import Materialization
from embeddings_pipeline.orchestration.instance.home import location_name, project_instance
from embeddings_pipeline.orchestration.instance.liveness import SYNC_TAG, RunWatch, cancel_dead_runs, process_tags
from embeddings_pipeline.orchestration.instance.storage import StateComputeLogs
from embeddings_pipeline.orchestration.jobs import build_pipeline
from embeddings_pipeline.orchestration.names import asset_key, asset_op_name, job_name, step_of
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.store.locks import run_lock

WATCH_SECONDS = 5.0


@contextmanager
def open_instance(given: dg.DagsterInstance | None = None) -> Iterator[dg.DagsterInstance]:
    """Dagster's instance, the one of dagster.yaml if none is given, for runs in this process: it prints for itself."""
    with nullcontext(given) if given else project_instance() as instance:
        if isinstance(instance.compute_log_manager, StateComputeLogs):
            instance.compute_log_manager.capturing = False
        try:
            yield instance
        except (DagsterPostgresException, sqlalchemy.exc.OperationalError) as error:
            cause: BaseException = error
            while cause.__cause__:
                cause = cause.__cause__
            said = str(cause).strip().partition("\n")[0]
            raise DatabaseError(f"Dagster's database does not answer ({said}): start it, and try again") from error


class BudgetReached(RunFailed, BudgetError):
    """A run failed since a budget is spent."""


class JobRunner:
    """Runs a collection's jobs in this process, as runs that the UI shows."""

    def __init__(self, collection: Collection, instance: dg.DagsterInstance) -> None:
        self.collection, self.instance = collection, instance
        self.definitions = build_pipeline(collection.definition)
        location = RegisteredCodeLocationOrigin(location_name())
        self.repository = RemoteRepositoryOrigin(location, "__repository__")  # Dagster's name for all definitions
        self.checked: dict[str, CheckResult] = {}  # what the checks of our runs found, by name

    def op(self, asset: str) -> str:
        """The op of an asset, as runs' configuration names it."""
        return asset_op_name(self.collection.definition, asset)

    @contextmanager
    def others_watched(self) -> Iterator[None]:
        """A run that is killed while ours waits for its place in a pool must not keep us waiting."""
        done, runs = threading.Event(), RunWatch()
        cancel_dead_runs(self.instance, self.collection.database, runs)

        def watch() -> None:
            while not done.wait(WATCH_SECONDS):
                with suppress(PipelineError, psycopg.Error, sqlalchemy.exc.SQLAlchemyError):  # until the next round
                    cancel_dead_runs(self.instance, self.collection.database, runs)

        watching = threading.Thread(target=watch, daemon=True)
        watching.start()
        try:
            yield
        finally:
            done.set()
            watching.join()

    def execute(self, job: str, config: Mapping[str, Any], tags: Mapping[str, str]) -> list[Materialization]:
        """Run one of the collection's jobs to its end; what it materialized. RunFailed with its step's message."""
        return self._execute(self._job(job), config, tags)

    def materialize(self, job: str, asset: str) -> None:
        """Run one asset of a job, without the job's checks. RunFailed with its step's message."""
        keys = {asset_key(self.collection.definition, asset)}
        self._execute(self._job(job).get_subset(asset_selection=keys, asset_check_selection=set()), {}, {})

    def check(self, keys: Iterable[dg.AssetCheckKey]) -> None:
        """Run these checks of the job `audit`, and nothing else. RunFailed if one could not be run."""
        self._execute(self._job("audit").get_subset(asset_check_selection=set(keys)), {}, {})

    def _job(self, job: str) -> dg.JobDefinition:
        return self.definitions.resolve_job_def(job_name(self.collection.definition, job))

    def _execute(
        self, definition: dg.JobDefinition, config: Mapping[str, Any], tags: Mapping[str, str]
    ) -> list[Materialization]:
        run_id, paying = make_new_run_id(), purse()
        paying.refused = None
        with run_lock(self.collection.database, run_id), spending(paying):
            run = self.instance.create_run_for_job(
                definition,
                run_id=run_id,
                run_config={**config, "loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
                # Where it comes from, without which the UI's first page leaves it out.
                remote_job_origin=self.repository.get_job_origin(definition.name),
                # A run that was killed is not repeated by the daemon: the next sync goes on.
                tags={
                    **tags,
                    **process_tags(run_id),
                    SYNC_TAG: "true",
                    REPOSITORY_LABEL_TAG: self.repository.get_label(),
                    MAX_RETRIES_TAG: "0",
                },
            )
            materializations: list[Materialization] = []
            failure, interrupted = None, False
            for event in execute_run_iterator(InMemoryJob(definition), run, self.instance):
                if event.is_step_materialization:
                    reported = event.step_materialization_data.materialization
                    values = {name: value.value for name, value in reported.metadata.items()}
                    materializations.append(Materialization(step_of(reported.asset_key.path[-1]), values))
                elif event.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION:
                    found = check_result(event.asset_check_evaluation_data)
                    self.checked[found.name] = found
                elif event.is_step_failure:
                    failure, interrupted = _failure(event), _is_interrupted(event)
                elif event.is_failure and failure is None:
                    failure = _innermost(event.job_failure_data.error) or event.message or "the run failed"
        if failure:
            told = f"{failure} (run {run_id[:8]}: see it in the Dagster UI)"
            if interrupted:
                raise InterruptedRunError(told)
            raise RunFailed(told) if paying.refused is None else BudgetReached(told)
        return materializations


def check_result(evaluation: dg.AssetCheckEvaluation) -> CheckResult:
    """What a check found, as Dagster has it."""
    severity: Severity = "error" if evaluation.severity == dg.AssetCheckSeverity.ERROR else "warning"
    return CheckResult(evaluation.check_name, evaluation.passed, severity, evaluation.description or "")


def _failure(event: dg.DagsterEvent) -> str:
    data = event.step_failure_data
    if data.user_failure_data and data.user_failure_data.description:
        return data.user_failure_data.description
    if _is_interrupted(event):
        return "interrupted; what is committed stays"
    return _innermost(data.error) or event.message or "a step failed"


def _is_interrupted(event: dg.DagsterEvent) -> bool:
    error = event.step_failure_data.error
    return error is not None and error.cls_name == "DagsterExecutionInterruptedError"


def _innermost(error: SerializableErrorInfo | None) -> str:
    while error and error.cause:
        error = error.cause
    return " ".join(error.message.split()) if error else ""
