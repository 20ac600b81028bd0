"""`batch-job …`, and what other commands say of batch jobs."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.batch_jobs import FILMS, HOSTED, assert_once
from embeddings_pipeline_tests.support.command_line import Done, run_here
from embeddings_pipeline_tests.support.embedding_server import EmbeddingServer
from embeddings_pipeline_tests.support.workbench import definition, edit, films, make_films


@pytest.fixture(autouse=True)
def _films(database: Database) -> None:
    make_films(database, films(FILMS))


@pytest.fixture
def hosted(service: EmbeddingServer) -> CollectionDefinition:
    return definition(profile={**HOSTED, "url": service.url})


class TestTerminal:
    @pytest.fixture
    def command(self, project: Settings, hosted: CollectionDefinition, tmp_path: Path) -> Iterator[Callable[..., Done]]:
        folder = tmp_path / "defs" / "films"
        folder.mkdir(parents=True)
        attributes = hosted.attributes.model_dump(exclude_defaults=True, mode="json")
        written = yaml.safe_dump({"type": "embeddings_pipeline.EmbeddingCollection", "attributes": attributes})
        (folder / "defs.yaml").write_text(written)
        yield lambda *arguments: run_here(arguments, {"EMBEDDINGS_DEFS_DIR": str(folder.parent)})

    def test_the_price_before_is_half(self, command: Callable[..., Done], service: EmbeddingServer) -> None:
        direct, half = (
            json.loads(command("sync", "--dry-run", "--json", "--api", api).stdout)["quote"]
            for api in ("direct", "batch")
        )
        assert half["usd"] == pytest.approx(direct["usd"] / 2) and (half["jobs"], half["requests"]) == (1, 0)
        told = command("sync", "--dry-run", "--api", "batch").stdout
        assert "1 batch job, within 24 hours" in told and "half of which batch jobs cost" not in told.split(";")[0]
        assert service.batches.uploads == service.requests == 0

    def test_jobs_are_listed_fetched_and_cancelled(
        self, database: Database, command: Callable[..., Done], service: EmbeddingServer
    ) -> None:
        service.batches.seconds = 3600
        done = command("sync", "--api", "batch")
        assert f"{FILMS} with batch jobs" in done.stdout, done.stderr
        listed = command("batch-job", "list").stdout
        assert "films (hosted): submitted" in listed and f"{FILMS} texts, 0 answered" in listed
        assert f"1 at work, 0 of {FILMS} texts done" in command("status").stdout
        [job] = json.loads(command("status", "--json").stdout)["batch_jobs"]
        for name in ("nothing", ""):
            assert command("batch-job", "cancel", name).stderr.startswith("error: no batch job")
        assert command("batch-job", "list", "--days", "9" * 12).returncode == 2
        assert command("batch-job", "cancel", job["id"][:8]).returncode == 0
        assert command("batch-job", "fetch").stdout.startswith("0 batch jobs at work")
        [job] = json.loads(command("batch-job", "list", "--json").stdout)
        assert (job["state"], job["remote_state"], job["answered"]) == ("done", "cancelled", FILMS // 2)
        assert f"{FILMS // 2} from the cache" in command("sync").stdout
        assert_once(database, service)

    def test_each_job_that_cannot_be_looked_at_is_told_and_may_be_forgotten(
        self,
        database: Database,
        command: Callable[..., Done],
        service: EmbeddingServer,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        service.batches.seconds = 3600
        command("sync", "--api", "batch")
        edit(database, 31, "new")
        command("sync", "--api", "batch")
        service.batches.pages = True
        failed = command("batch-job", "fetch")
        assert failed.returncode == 1 and failed.stderr.count("gave an answer that cannot be read") == 2
        ids = [job["id"] for job in json.loads(command("batch-job", "list", "--json").stdout)]
        assert [json.loads(command("batch-job", "forget", each, "--json").stdout)["id"] for each in ids] == ids
        assert command("batch-job", "forget", ids[0]).stderr.startswith(
            f"error: batch job {ids[0]} cannot be forgotten"
        )
        assert command("batch-job", "fetch").stdout.startswith("0 batch jobs at work")
