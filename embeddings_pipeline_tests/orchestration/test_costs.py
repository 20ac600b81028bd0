"""A price first, a budget that stops before it is spent, nothing paid for twice: in a sync, the UI and a terminal."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders.budget import Purse
from embeddings_pipeline.encoders.cache import PostgresCache
from embeddings_pipeline.errors import BudgetError
from embeddings_pipeline.orchestration.component import build_definitions
from embeddings_pipeline.orchestration.jobs import build_pipeline
from embeddings_pipeline.orchestration.names import asset_key
from embeddings_pipeline.orchestration.partitions import range_tags
from embeddings_pipeline.orchestration.switch import switch
from embeddings_pipeline.orchestration.sync import SyncResult, sync
from embeddings_pipeline.pipeline.collection import look_at_collection
from embeddings_pipeline.pipeline.quote import Quote, Quoter
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.command_line import Done, run_here, run_process
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.workbench import (
    PROFILE,
    by_name,
    committed,
    definition,
    execute,
    films,
    forget_vectors,
    make_films,
)

BATCHES = ["000000", "000001", "000002"]
FILMS, TOKENS = 30, 11  # tokens: of each text, which the encoder counts as words
PAID = {**PROFILE, "cache": True, "price": 1_000_000 / TOKENS}  # a dollar a text


def paid(**attributes: Any) -> CollectionDefinition:
    return definition(profile=PAID, **attributes)


@pytest.fixture(autouse=True)
def _films(database: Database) -> None:
    make_films(database, films(FILMS))


@pytest.fixture
def run_sync(project: Settings, instance: dg.DagsterInstance) -> Callable[..., SyncResult]:
    def run(one: CollectionDefinition | None = None, **options: Any) -> SyncResult:
        return sync(one or paid(), project, instance=instance, **options)

    return run


@pytest.fixture
def command(database: Database, project: Settings, tmp_path: Path) -> Callable[..., Done]:
    folder = tmp_path / "defs" / "films"
    folder.mkdir(parents=True)
    attributes = paid().attributes.model_dump(exclude_defaults=True, mode="json")
    written = yaml.safe_dump({"type": "embeddings_pipeline.EmbeddingCollection", "attributes": attributes})
    (folder / "defs.yaml").write_text(written)
    return lambda *arguments: run_here(arguments, {"EMBEDDINGS_DEFS_DIR": str(folder.parent)})


class TestPaidOnce:
    def test_what_the_cache_knows_is_not_encoded(
        self, database: Database, project: Settings, run_sync: Callable[..., SyncResult]
    ) -> None:
        first = run_sync()
        assert (first.embedded, first.cached, first.usd) == (FILMS, 0, pytest.approx(FILMS))
        forget_vectors(database, project)
        again = run_sync()
        assert (again.embedded, again.cached, again.usd) == (0, FILMS, 0)
        assert len(committed(database)) == FILMS
        films_encoded = {n for text, n in DeterministicEncoder.texts_encoded.items() if text.startswith("Film")}
        assert films_encoded == {1}

    def test_force_passes_the_cache_by(self, run_sync: Callable[..., SyncResult]) -> None:
        run_sync()
        assert run_sync(force=True).embedded == FILMS

    def test_a_collection_with_the_same_model_takes_the_same_answers(self, run_sync: Callable[..., SyncResult]) -> None:
        run_sync()
        other = run_sync(paid(name="others"))
        assert (other.embedded, other.cached) == (0, FILMS)

    def test_a_poison_text_is_not_kept(self, database: Database, run_sync: Callable[..., SyncResult]) -> None:
        DeterministicEncoder.nan_on = "number 7 "
        assert run_sync().quarantined == 1
        assert execute(database, "SELECT count(*) FROM embeddings.embedding_cache") == [(FILMS - 1,)]

    def test_the_ui_has_hits_and_dollars(
        self, database: Database, project: Settings, instance: dg.DagsterInstance, run_sync: Callable[..., SyncResult]
    ) -> None:
        run_sync()
        forget_vectors(database, project)
        run_sync()
        key = asset_key(paid(), "embeddings_32")
        records = instance.fetch_materializations(dg.AssetRecordsFilter(asset_key=key, asset_partitions=["000000"]), 10)
        values = [record.asset_materialization.metadata for record in records.records if record.asset_materialization]
        newest, first = [{name: value.value for name, value in each.items()} for each in values if each][:2]
        assert (newest["cached"], newest["cache_hit_percent"], newest["usd"]) == (10, 100.0, 0.0)
        assert (first["embedded"], first["cache_hit_percent"], first["usd"]) == (10, 0.0, pytest.approx(10))

    def test_a_change_of_the_model_pays_once_and_says_before_how_much(
        self, database: Database, project: Settings, run_sync: Callable[..., SyncResult]
    ) -> None:
        wide = {**PAID, "name": "wide", "dimensions": 48}
        one = paid(profiles=by_name(wide))
        run_sync(one)
        with pytest.raises(BudgetError, match="usd_per_day"):
            switch(paid(profiles=by_name(wide), budget={"usd_per_day": FILMS + 10}), project, "wide")
        switch(one, project, "wide")
        assert execute(database, "SELECT round(sum(usd)) FROM embeddings.embedding_spend") == [(2 * FILMS,)]
        execute(database, "INSERT INTO films VALUES (100, 'New', 'a new film', 1)")
        run_sync(one)  # the previous model is kept current beside it
        assert execute(database, "SELECT sum(texts) FROM embeddings.embedding_spend") == [(2 * FILMS + 2,)]


class TestAPriceFirst:
    def test_a_dry_run_says_what_the_sync_then_costs(
        self, database: Database, run_sync: Callable[..., SyncResult]
    ) -> None:
        said = run_sync(dry_run=True)
        assert said.quote is not None
        assert (said.quote["texts"], said.quote["tokens"], said.quote["usd"]) == (FILMS, FILMS * TOKENS, FILMS)
        assert {key: quote["texts"] for key, quote in said.quotes.items()} == dict.fromkeys(BATCHES, 10)
        assert execute(database, "SELECT count(*) FROM embeddings.embedding_spend") == [(0,)]
        assert execute(database, "SELECT count(*) FROM embeddings.embedding_cache") == [(0,)]
        assert run_sync().usd == pytest.approx(said.quote["usd"])

    def test_it_leaves_out_what_the_cache_knows(
        self, database: Database, project: Settings, run_sync: Callable[..., SyncResult]
    ) -> None:
        run_sync()
        forget_vectors(database, project)
        execute(database, "UPDATE films SET overview = 'edited' WHERE id = 3")
        said = run_sync(dry_run=True, full=True)
        assert said.quote is not None
        assert run_sync(dry_run=True, force=True).quote["texts"] == FILMS  # type: ignore[index]
        done = run_sync(full=True)
        assert (said.quote["texts"], said.quote["cached"]) == (done.embedded, done.cached)

    def test_a_price_that_is_not_known_is_said(self, run_sync: Callable[..., SyncResult]) -> None:
        unknown = {
            "name": "own",
            "provider": "openai",
            "model": "a-model",
            "dimensions": 32,
            "url": "http://127.0.0.1:1/v1",
        }
        said = run_sync(definition(profile=unknown), dry_run=True)
        assert said.quote is not None and said.quote["usd"] is None
        assert "no price is known for a-model" in said.basis

    def test_requests_and_minutes_follow_from_the_limits(self, settings: Settings) -> None:
        profile = {"name": "small", "provider": "openai", "model": "text-embedding-3-small", "dimensions": 1536}
        limits = {"requests_per_minute": 2, "tokens_per_minute": 300_000}
        for changed, requests, minutes in (
            ({}, 6, 3.0),  # the permitted requests suffice for the permitted tokens
            ({"requests_per_minute": 0}, 304, 3.0),  # a request takes less than a hundredth of a minute's tokens
            ({"requests_per_minute": 1, "tokens_per_minute": 0}, 3, 3.0),
        ):
            collection = look_at_collection(definition(profile={**profile, **limits, **changed}), settings)
            halves = [Quote(texts=2500, tokens=450_000), Quote(texts=2500, tokens=450_000)]
            total = Quoter(collection).total(halves)
            assert (total.texts, total.tokens, total.usd) == (5000, 900_000, pytest.approx(0.018))
            assert total.requests == requests
            assert total.minutes == minutes

    def test_what_servers_billed_corrects_the_estimate(
        self, database: Database, run_sync: Callable[..., SyncResult]
    ) -> None:
        run_sync(limit=10)
        execute(database, "UPDATE embeddings.embedding_spend SET told = 15, counted = 10")
        said = run_sync(dry_run=True)
        assert said.quote is not None
        assert said.quote["tokens"] == pytest.approx(20 * TOKENS * 1.5)

    def test_the_terminal_has_it_by_batch_and_in_all(self, command: Callable[..., Done]) -> None:
        done = command("sync", "--dry-run")
        assert done.returncode == 0
        assert "batch 000001: 10 texts to encode (0 more are in the cache), 110 tokens" in done.stdout
        assert "in all: 30 texts to encode (0 more are in the cache), 330 tokens, $30.0000" in done.stdout
        told = json.loads(command("sync", "--dry-run", "--json").stdout)
        assert told["quote"]["usd"] == FILMS and len(told["quotes"]) == 3

    def test_the_launchpad_says_it_in_the_log(
        self, project: Settings, instance: dg.DagsterInstance, run_sync: Callable[..., SyncResult]
    ) -> None:
        run_sync(limit=1)
        job = build_pipeline(paid()).resolve_job_def("films_batches")
        config = {"ops": {"films__embeddings_32": {"config": {"dry_run": True}}}}
        result = job.execute_in_process(
            run_config=config, tags=range_tags(0, 2), instance=instance, raise_on_error=False
        )
        said = [
            event.user_message for event in instance.all_logs(result.run_id) if "dry run" in (event.user_message or "")
        ]
        assert len(said) == 4
        assert "29 texts to encode (0 more are in the cache), 319 tokens" in said[-1]


class TestBudget:
    def test_max_cost_stops_before_it_is_spent_and_the_next_sync_goes_on(
        self, database: Database, run_sync: Callable[..., SyncResult]
    ) -> None:
        purse = Purse(most=12.5)
        with pytest.raises(BudgetError, match="max-cost"):
            run_sync(purse=purse)
        assert purse.spent == pytest.approx(12)
        assert execute(database, "SELECT count(*) FROM embeddings.embedding_cache") == [(12,)]
        done = run_sync()
        assert (done.embedded, done.cached) == (FILMS - 12, 12)

    def test_a_days_budget_stops_every_run_until_the_next_day(
        self, database: Database, run_sync: Callable[..., SyncResult]
    ) -> None:
        limited = paid(budget={"usd_per_day": 20})
        for _ in range(2):
            with pytest.raises(BudgetError, match=r"budget: \{usd_per_day: 20\}"):
                run_sync(limited)
        assert execute(database, "SELECT round(sum(usd)) FROM embeddings.embedding_spend") == [(20,)]
        execute(database, "UPDATE embeddings.embedding_spend SET day = day - 1")
        assert run_sync(limited).embedded == FILMS - 20

    def test_the_terminal_exits_with_3(self, command: Callable[..., Done], tmp_path: Path) -> None:
        environment = {**os.environ, "EMBEDDINGS_DEFS_DIR": str(tmp_path / "defs")}
        done = run_process(("sync", "--max-cost", "5"), environment)
        assert done.returncode == 3
        assert "error: --max-cost $5 is reached: $5.0000 are spent" in done.stderr
        assert "Traceback" not in done.stderr
        assert command("sync").returncode == 0

    @pytest.mark.parametrize("budget", [{"usd_per_day": -1}, {"usd_per_day": "x"}, {}, {"usd": 1}])
    def test_what_is_no_budget_is_refused(self, budget: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="usd"):
            paid(budget=budget)

    @pytest.mark.parametrize("most", ["-1", "nan", "much"])
    def test_what_is_no_cost_is_refused(self, command: Callable[..., Done], most: str) -> None:
        assert "max-cost" in command("sync", "--max-cost", most).stderr

    def test_what_is_no_price_is_refused(self) -> None:
        with pytest.raises(ValueError, match="price"):
            definition(profile={**PROFILE, "price": -1})


class TestInTheUI:
    def test_the_check_says_dollars_a_day(
        self, database: Database, instance: dg.DagsterInstance, run_sync: Callable[..., SyncResult]
    ) -> None:
        run_sync(paid(budget={"usd_per_day": 100}))
        check = dg.AssetCheckKey(asset_key(paid(), "pgvector_index"), "spend")
        [record] = instance.event_log_storage.get_asset_check_execution_history(check, limit=1)
        evaluation = record.event.dagster_event.event_specific_data  # type: ignore[union-attr]
        assert evaluation.passed
        assert evaluation.metadata["usd_today"].value == pytest.approx(FILMS)
        assert evaluation.metadata["usd_per_day"].value == 100
        observed = instance.fetch_observations(check.asset_key, limit=1).records[0].asset_observation
        assert observed is not None
        assert observed.metadata["usd_today"].value == pytest.approx(FILMS)
        [row] = evaluation.metadata["days"].value.records
        assert row.data["texts"] == FILMS

    def test_only_a_model_that_is_paid_for_has_it_and_its_trickle_is_on(self) -> None:
        for one, status in ((paid(), "RUNNING"), (definition(), "STOPPED")):
            definitions = build_definitions(one)
            checks = {key.name for key in definitions.resolve_asset_graph().asset_check_keys}
            assert ("spend" in checks) == (status == "RUNNING")
            schedule = definitions.get_repository_def().get_schedule_def("films_recent_refresh")
            assert schedule.default_status.value == status
            assert schedule.cron_schedule == "0 */6 * * *"


class TestCommands:
    def test_statistics_sweep_and_purge(self, database: Database, command: Callable[..., Done]) -> None:
        assert "0 answers" in command("cache", "statistics").stdout
        command("sync")
        shown = command("cache", "statistics").stdout
        assert "in PostgreSQL, kept 30 days: 30 answers" in shown and "used by films (test)" in shown
        [told] = json.loads(command("cache", "statistics", "--json").stdout)
        assert (told["answers"], told["used_by"]) == (FILMS, ["films (test)"])
        assert command("cache", "purge").returncode == 1
        assert "keeps nothing of nobody" in command("cache", "purge", "nobody", "--yes").stderr
        execute(database, "UPDATE embeddings.embedding_cache SET written_at = now() - interval '40 days'")
        assert "30 answers older than 30 days are gone" in command("cache", "sweep").stdout
        PostgresCache(database).put(told["fingerprint"], {})
        assert "0 answers are forgotten" in command("cache", "purge", "--all", "--yes").stdout
