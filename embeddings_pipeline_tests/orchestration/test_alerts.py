"""Failed runs and failed checks are told, once."""

import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, ClassVar

import dagster as dg
import pytest

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.health.alerts import alert
from embeddings_pipeline.orchestration.component import build_definitions
from embeddings_pipeline.orchestration.dagster_internals import InMemoryJob
from embeddings_pipeline.orchestration.instance.liveness import SYNC_TAG
from embeddings_pipeline.orchestration.sync import sync
from embeddings_pipeline_tests.support.dagster_internals import execute_run
from embeddings_pipeline_tests.support.workbench import (
    definition,
    execute,
    films,
    make_films,
)


class _Hook(BaseHTTPRequestHandler):
    bodies: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        self.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What is posted to ALERT_WEBHOOK_URL."""
    _Hook.bodies = []
    server = HTTPServer(("127.0.0.1", 0), _Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("ALERT_WEBHOOK_URL", f"http://127.0.0.1:{server.server_port}/hook?token=SECRET")
    yield _Hook.bodies
    server.shutdown()


def tell(definitions: dg.Definitions, instance: dg.DagsterInstance, run: dg.DagsterRun) -> None:
    """The alert of a failed run, as Dagster's daemon asks for it."""
    [failed] = instance.all_logs(run.run_id, of_type=dg.DagsterEventType.RUN_FAILURE)
    sensor = definitions.get_repository_def().get_sensor_def("films_failure_alerts")
    context = dg.build_run_status_sensor_context(
        sensor_name=sensor.name, dagster_instance=instance, dagster_run=run, dagster_event=failed.get_dagster_event()
    ).for_run_failure()
    sensor(context)


class TestAlerts:
    def test_a_check_that_begins_to_fail_is_posted_once(self, database, project, instance, webhook) -> None:
        make_films(database, films(5))
        sync(definition(), project, instance=instance)
        assert webhook == []
        execute(database, "UPDATE embeddings.canary SET embedding[1] = embedding[1] + 0.5")
        job = build_definitions(definition()).resolve_job_def("films_audit")
        for _ in range(2):
            job.execute_in_process(instance=instance)
        [body] = webhook
        assert (body["event"], body["collection"], body["check"]) == ("check_failed", "films", "model_drift")
        assert "lowest cosine" in body["text"]

    def test_a_failed_run_is_posted_with_its_reason(self, database, project, instance, webhook) -> None:
        make_films(database, films(5))
        execute(database, "ALTER TABLE films RENAME COLUMN title TO headline")
        definitions = build_definitions(definition())
        done = definitions.resolve_job_def("films_scan").execute_in_process(instance=instance, raise_on_error=False)
        tell(definitions, instance, done.dagster_run)
        [body] = webhook
        assert (body["event"], body["job"], body["run_id"]) == ("run_failed", "films_scan", done.run_id)
        assert "names a column 'title'" in body["text"]

    def test_a_failed_materialization_names_the_collection_and_the_step(
        self, database, project, instance, webhook
    ) -> None:
        make_films(database, films(5))
        execute(database, "ALTER TABLE films RENAME COLUMN title TO headline")
        definitions = build_definitions(definition())
        ledger = frozenset([dg.AssetKey(["films", "item_ledger"])])  # as the UI materializes it
        job = definitions.resolve_implicit_global_asset_job_def().get_subset(asset_selection=ledger)
        run = instance.create_run_for_job(job, asset_selection=ledger)
        execute_run(InMemoryJob(job), run, instance, raise_on_error=False)
        assert run.job_name == "__ASSET_JOB"
        tell(definitions, instance, run)
        [body] = webhook
        assert body["text"].startswith(
            "collection 'films': item_ledger failed: template `base:` names a column 'title'"
        )
        assert (body["job"], body["step"]) == (None, "item_ledger")

    def test_a_run_of_a_sync_is_told_by_the_sync_alone(self, database, project, instance, webhook) -> None:
        make_films(database, films(5))
        definitions = build_definitions(definition())
        execute(database, "ALTER TABLE films RENAME COLUMN title TO headline")
        job = definitions.resolve_job_def("films_scan")
        done = job.execute_in_process(instance=instance, raise_on_error=False, tags={SYNC_TAG: "true"})
        tell(definitions, instance, done.dagster_run)
        assert webhook == []

    def test_a_webhook_that_does_not_answer_fails_nothing_and_shows_no_secret(self, caplog, monkeypatch) -> None:
        caplog.set_level("WARNING", logger="embeddings_pipeline.health.alerts")  # whatever the command line has set
        monkeypatch.setattr(logging.getLogger("embeddings_pipeline.health.alerts"), "disabled", False)
        settings = Settings(alert_webhook_url="http://127.0.0.1:9/hook?token=SECRET")
        assert alert(settings, "run_failed", "it failed") is False
        assert "did not take an alert" in caplog.text and "SECRET" not in caplog.text
        assert '"event": "run_failed"' in caplog.text
        assert alert(Settings(alert_webhook_url="no url"), "run_failed", "it failed") is False
