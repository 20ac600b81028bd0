"""The example of clips on a hosted model, as its page says it; the test server stands in for OpenAI."""

import re
import subprocess
import sys
from collections.abc import Iterator

import dagster as dg
import pytest
import yaml

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.loading import load_collections
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.orchestration.component import build_definitions
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.command_line import PROJECT, commands_of, run_words
from embeddings_pipeline_tests.support.embedding_server import EmbeddingServer
from embeddings_pipeline_tests.support.hosted import KEY
from embeddings_pipeline_tests.support.workbench import execute

PAGE = PROJECT / "docs" / "how-to" / "clips.md"
EXAMPLE = PROJECT / "examples" / "clips"
CLIPS, REMOVED = 1160, 58
KEPT = CLIPS - REMOVED


@pytest.fixture
def openai(project: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddingServer]:
    """What the environment takes for OpenAI."""
    with EmbeddingServer(key=KEY) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setenv("EMBEDDINGS_DEFS_DIR", str(EXAMPLE))
        yield server


@pytest.fixture
def clips(openai: EmbeddingServer) -> CollectionDefinition:
    """The collection; its table is there."""
    assert run_words("examples/clips/load.py") == f"clips: {CLIPS:,}, {REMOVED} of them removed\n"
    return load_collections(EXAMPLE)["clips"]


def of_clips(server: EmbeddingServer) -> list[str]:
    """The texts that were billed, each as often as it was, without those that only try the model."""
    return [text for text in server.billed.elements() if "|" in text and "," in text.split("|")[-1]]


@pytest.mark.timeout(600)
def test_the_page_does_what_it_says_and_pays_for_each_clip_once(database: Database, openai: EmbeddingServer) -> None:
    blocks = PAGE.read_text(encoding="utf-8").split("```")[1::2]
    blocks = [block for block in blocks if block.startswith("\n") and "embedding_server" not in block]
    commands = commands_of("\n".join(blocks))
    said = [run_words(command) for command in commands]
    assert len(commands) == 13
    _, dry, first, rest, found, status, cached, spend, _, removed, _, back, anew = said
    assert f"in all: {KEPT:,} texts to encode (0 more are in the cache)" in dry and "1 request, $0.00" in dry
    assert "100 texts embedded" in first and "1,002 left for the next sync" in first
    assert f"{KEPT - 100:,} texts embedded" in rest
    assert len(found.splitlines()) > 1 and str(KEPT) in status.replace(",", "")
    assert f"{KEPT:,} answers" in cached and "used by clips (openai)" in cached and "text-embedding-3-small" in spend
    assert "1 deleted; 0 texts embedded" in removed and "0 texts embedded, 1 from the cache" in back
    assert f"in all: {KEPT:,} texts to encode" in anew
    texts = of_clips(openai)
    assert len(texts) == len(set(texts)) == KEPT
    [(usd,)] = execute(database, "SELECT sum(usd) FROM embeddings.embedding_spend")
    [tokens] = re.findall(r"in all: .* ([\d,]+) tokens", dry)
    assert float(usd) == pytest.approx(0.02 * int(tokens.replace(",", "")) / 1e6, rel=0.01) and float(usd) < 0.0015


def test_the_page_shows_the_examples_own_definition() -> None:
    [shown] = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert yaml.safe_load(shown) == yaml.safe_load((EXAMPLE / "defs.yaml").read_text(encoding="utf-8"))


def test_the_price_needs_no_key(
    clips: CollectionDefinition, openai: EmbeddingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    assert f"{KEPT:,} texts to encode" in run_words("-m embeddings_pipeline sync --dry-run")
    assert openai.requests == 0


def test_the_trickle_is_on_and_embeds_a_hundred_a_run_of_what_is_new(
    clips: CollectionDefinition, database: Database, openai: EmbeddingServer, instance: dg.DagsterInstance
) -> None:
    definitions = build_definitions(clips)
    schedule = definitions.get_repository_def().get_schedule_def("clips_recent_refresh")
    assert (schedule.cron_schedule, schedule.default_status.value) == ("0 */6 * * *", "RUNNING")
    job = definitions.resolve_job_def(schedule.job_name)
    for committed in (100, 200):
        assert job.execute_in_process(instance=instance).success
        assert execute(database, "SELECT count(*) FROM embeddings.clips") == [(committed,)]
        assert len(of_clips(openai)) == committed
    week_ago = "UPDATE embeddings.clips_item SET first_seen_at = now() - interval '8 days'"
    execute(database, f"{week_ago} WHERE item_key NOT IN ('998', '999')")
    assert job.execute_in_process(instance=instance).success
    assert execute(database, "SELECT count(*) FROM embeddings.clips") == [(202,)]


def test_an_existing_table_is_left_alone(database: Database, openai: EmbeddingServer) -> None:
    execute(database, "CREATE TABLE clips (mine int)")
    command = [sys.executable, "examples/clips/load.py"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "") and "DROP TABLE clips" in done.stderr
