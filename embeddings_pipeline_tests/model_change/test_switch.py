"""Switching profiles: the command line, and the phases as Dagster's assets."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
import yaml
from typer.testing import CliRunner, Result

from embeddings_pipeline.cli.main import app
from embeddings_pipeline.config.loading import load_collections
from embeddings_pipeline.config.settings import Settings, load_settings
from embeddings_pipeline.errors import PipelineError
from embeddings_pipeline.model_change import backfill
from embeddings_pipeline.model_change.plan import price
from embeddings_pipeline.model_change.state import candidate_profile, open_change
from embeddings_pipeline.orchestration import migration_assets
from embeddings_pipeline.orchestration.component import build_definitions
from embeddings_pipeline.orchestration.partitions import range_tags
from embeddings_pipeline.orchestration.sync import sync
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.model_change import OTHER, WIDE, definition
from embeddings_pipeline_tests.support.workbench import PROFILE, by_name, execute, films, make_films

DEFINITION = """
type: embeddings_pipeline.EmbeddingCollection
attributes:
  name: films
  source: {table: films, key: [id]}
  columns: [title]      # what searches return
  vectors:
    base: "{title} | {overview}"
  items_per_batch: 10
  profile: test         # the model
  profiles:
"""

HUGE = {**PROFILE, "name": "huge", "dimensions": 4001}
BROKEN = {**PROFILE, "name": "broken", "model": "no_such_module:Encoder"}

Command = Callable[..., Result]


@pytest.fixture
def defs_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "defs" / "films" / "defs.yaml"
    path.parent.mkdir(parents=True)
    known = by_name(PROFILE, WIDE, OTHER, HUGE, BROKEN)
    profiles = "".join(f"    {name}: {json.dumps(one)}\n" for name, one in known.items())
    path.write_text(DEFINITION + profiles)
    return path


@pytest.fixture
def command(database: Database, project: Settings, defs_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs `embeddings-pipeline …` in this process; what a user can cause is raised."""
    monkeypatch.setenv("EMBEDDINGS_DEFS_DIR", str(defs_yaml.parents[1]))
    make_films(database, films(25))

    def run(*arguments: str) -> Result:
        done = CliRunner().invoke(app, list(arguments), catch_exceptions=True)
        if isinstance(done.exception, PipelineError):
            raise done.exception
        return done

    assert run("sync").exit_code == 0
    return run


class TestCommands:
    def test_switch_roll_back_and_contract(self, database, command, defs_yaml) -> None:
        done = command("profile", "switch", "wide", "--yes", "--write")
        assert done.exit_code == 0, done.output
        assert "films: test → wide: 25 texts embedded, 0 in quarantine; recall@10 of its index 1.000" in done.stdout
        assert "profile: wide         # the model\n" in defs_yaml.read_text()
        assert yaml.safe_load(defs_yaml.read_text())["attributes"]["columns"] == ["title"]
        found = json.loads(command("profile", "status", "--json").stdout)
        assert (found["current"]["profile"], found["migration"]["phase"]) == ("wide", "swapped")
        assert found["beside"][0]["profile"] == "test" and found["beside"][0]["backfilled"] == 3
        assert json.loads(command("status", "--json").stdout)["faiss"]["current"]
        assert json.loads(command("search", "Film 7 number 7", "-k", "1", "--json").stdout)[0]["item_key"] == "7"
        with pytest.raises(PipelineError, match="grace period runs until"):
            command("profile", "contract")
        assert "test is the current model again" in command("profile", "rollback").stdout
        command("profile", "switch", "wide", "--yes")
        assert "test was dropped" in command("profile", "contract", "--now").stdout
        assert "no change of the model is under way" in command("profile", "status").stdout
        assert execute(database, "SELECT count(*) FROM embeddings.model") == [(1,)]

    @pytest.mark.parametrize("verb", ["plan", "switch"])
    def test_what_a_switch_refuses_the_plan_refuses(self, database, command, project, verb) -> None:
        from embeddings_pipeline.model_change.phases import expand

        how = ["--yes"] if verb == "switch" else []
        with pytest.raises(PipelineError, match="hnsw takes up to 4000 dimensions"):
            command("profile", verb, "huge", *how)
        with pytest.raises(PipelineError, match=r"quality: the weights of .* are not on this machine"):
            command("profile", verb, "quality", *how)
        with pytest.raises(PipelineError, match="no_such_module:Encoder cannot be loaded"):
            command("profile", verb, "broken", *how)
        with pytest.raises(PipelineError, match="'test' is its current model already"):
            command("profile", verb, "test", *how)
        assert execute(database, "SELECT count(*) FROM embeddings.model_change") == [(0,)]
        collection = open_collection(definition(), project)
        expand(collection, candidate_profile(collection, "wide"))
        with pytest.raises(PipelineError, match=r"a change .*wide.* is open"):
            command("profile", verb, "other", *how)

    def test_the_plan_of_an_open_change_is_what_is_left_of_it(self, command, project) -> None:
        from embeddings_pipeline.model_change.phases import expand

        collection = open_collection(definition(), project)
        expand(collection, candidate_profile(collection, "wide"))
        planned = json.loads(command("profile", "plan", "wide", "--json").stdout)["statements"]
        assert list(dict.fromkeys(step["phase"] for step in planned)) == ["backfill", "swap", "roll back", "contract"]

    def test_write_is_refused_before_the_change_if_it_could_not_be_done(self, database, command, defs_yaml) -> None:
        inline = json.dumps(PROFILE)
        defs_yaml.write_text(defs_yaml.read_text().replace("  profile: test ", f"  profile: {inline} "))
        with pytest.raises(PipelineError, match="--write cannot set `profile: wide` there"):
            command("profile", "switch", "wide", "--yes", "--write")
        assert execute(database, "SELECT count(*) FROM embeddings.model_change") == [(0,)]
        done = command("profile", "switch", "wide", "--yes")
        assert done.exit_code == 0 and "--write" not in done.output and "Set `profile: wide` in" in done.stderr

    def test_what_is_advised_works_whichever_other_collections_there_are(self, database, command, defs_yaml) -> None:
        other = defs_yaml.parents[1] / "items" / "defs.yaml"
        other.parent.mkdir()
        other.write_text(defs_yaml.read_text().replace("name: films", "name: items"))
        switched = command("profile", "switch", "wide", "--yes", "--collection", "films").stdout
        for _ in range(2):
            [advised] = re.findall("`embeddings-pipeline (profile rollback[^`]*)`", switched)
            assert "test is the current model again" in command(*advised.split()).stdout
            [advised] = re.findall(
                "`embeddings-pipeline (profile switch[^`]*)`", command("profile", "status", "-c", "films").stdout
            )
            switched = command(*advised.split(), "--yes").stdout
        warned = open_collection(load_collections(defs_yaml.parents[1])["films"], load_settings()).warning
        [advised] = re.findall("`embeddings-pipeline (profile switch[^`]*)`", str(warned))
        assert advised == "profile switch test --collection films"

    def test_what_the_environment_makes_of_a_profile_is_what_its_name_moves_to(
        self, command, defs_yaml, monkeypatch
    ) -> None:
        defs_yaml.write_text(defs_yaml.read_text().replace("  profile: test ", "  # "))
        for name, value in {"PROVIDER": "python", "MODEL": PROFILE["model"], "DIMENSIONS": "48"}.items():
            monkeypatch.setenv(f"EMBEDDING_{name}", value)
        warned = open_collection(load_collections(defs_yaml.parents[1])["films"], load_settings()).warning
        [advised] = re.findall("`embeddings-pipeline (profile switch[^`]*)`", str(warned))
        assert advised == "profile switch minilm --collection films"
        done = command(*advised.split(), "--yes")
        assert done.exit_code == 0 and "test → minilm: 25 texts embedded" in done.stdout and "Set " not in done.stderr
        assert "48 dimensions, current" in command("profile", "status").stdout

    def test_nothing_starts_unasked(self, command) -> None:
        with pytest.raises(PipelineError, match="give --yes"):
            command("profile", "switch", "wide")
        with pytest.raises(PipelineError, match="name the profile to switch to"):
            command("profile", "switch")
        assert json.loads(command("profile", "status", "--json").stdout)["migration"] is None

    def test_a_change_that_is_open_is_named(self, database, command, project) -> None:
        from embeddings_pipeline.model_change.phases import expand

        collection = open_collection(load_collections(load_settings().defs_dir)["films"], project)
        expand(collection, candidate_profile(collection, "wide"))
        assert "a change to wide began" in command("profile", "status").stdout
        with pytest.raises(PipelineError, match="a change to wide is open"):
            command("profile", "switch", "other", "--yes")
        with pytest.raises(PipelineError, match="--yes drops"):
            command("profile", "rollback")
        assert "test serves as before" in command("profile", "rollback", "--yes").stdout

    def test_a_second_model_beside_the_first(self, command) -> None:
        assert "the next `embeddings-pipeline sync` backfills it" in command("profile", "add", "wide").stdout
        command("sync")
        hits = json.loads(command("search", "Film 7 number 7", "--profile", "wide", "--json").stdout)
        assert hits[0]["item_key"] == "7"
        assert "3 of 3 batches backfilled" in command("profile", "status").stdout
        assert "was dropped" in command("profile", "remove", "wide").stdout

    def test_list_show_and_test(self, command) -> None:
        names = [one["name"] for one in json.loads(command("profile", "list", "--json").stdout)]
        assert names == ["minilm", "speed", "quality", "openai", "test", "wide", "other", "huge", "broken"]
        assert json.loads(command("profile", "show", "wide", "--json").stdout)["fingerprint"]
        assert "48" in command("profile", "show", "wide").stdout
        [measured] = json.loads(command("profile", "test", "wide", "--json").stdout)  # `quality` is not here
        assert measured["texts_per_second"].keys() == {"1", "8", "32", "128"}
        assert min(measured["texts_per_second"].values()) > 0
        assert "quality" not in command("profile", "test", "wide").output
        with pytest.raises(PipelineError, match="There is no profile 'nope'"):
            command("profile", "show", "nope")

    def test_the_plan_begins_with_its_phases_and_does_nothing(self, database, command) -> None:
        said = command("profile", "plan", "wide").stdout
        table, _, statements = said.partition("-- expand\nINSERT INTO embeddings.model ")
        first, head, *lines = table.splitlines()
        assert first.startswith("-- films: test → wide: 25 texts to encode, about ")
        assert head.split()[1:5] == ["phase", "duration", "disk", "undo"]
        phases = {re.split("  +", line.removeprefix("-- "))[0]: re.split("  +", line) for line in lines}
        assert list(phases) == ["expand", "backfill", "swap", "roll back", "contract"]
        assert phases["expand"][2:] == ["-", "`profile rollback` drops the candidate", "nothing"]
        assert phases["swap"][4] == "the view embeddings.films, the marker, an empty table"
        assert phases["contract"][3] == "none" and phases["contract"][2].startswith("-")
        assert "\nCREATE TABLE IF NOT EXISTS" in statements and "-- roll back" in statements
        assert execute(database, "SELECT count(*) FROM embeddings.model") == [(1,)]


class TestPrice:
    def test_its_price_counts_what_is_to_be_encoded(self, database, project, instance) -> None:
        make_films(database, films(25))
        sync(definition(), project, instance=instance)
        collection = open_collection(definition(), project)
        found = price(collection, candidate_profile(collection, "wide"))
        assert found.texts == 25 and found.tokens > 25 * 5 and found.bytes > 25 * 48 * 2


class TestAssets:
    @pytest.fixture
    def synced(self, database, project, instance) -> dg.DagsterInstance:
        make_films(database, films(25))
        sync(definition(), project, instance=instance)
        return instance

    def run(self, instance: dg.DagsterInstance, job: str, **options: Any) -> dg.ExecuteInProcessResult:
        job_def = build_definitions(definition()).resolve_job_def(f"films_migration_{job}")
        return job_def.execute_in_process(instance=instance, raise_on_error=False, **options)

    def test_the_phases_as_materializations(self, database, project, synced) -> None:
        config = {"ops": {"films__migration__expand": {"config": {"candidate_profile": "wide"}}}}
        assert self.run(synced, "expand", run_config=config).success
        assert self.run(synced, "backfill", tags=range_tags(0, 1)).success
        early = self.run(synced, "swap")
        assert not early.success
        [failed] = [event for event in early.all_events if event.is_step_failure]
        assert "1 of 3 batches are not backfilled" in failed.step_failure_data.user_failure_data.description
        last = self.run(synced, "backfill", partition_key="000002")
        [numbers] = last.asset_materializations_for_node("films__migration__backfill")
        assert (numbers.metadata["percent"].value, numbers.metadata["phase"].value) == (100.0, "expanded")
        [swapped] = self.run(synced, "swap").asset_materializations_for_node("films__migration__swap")
        assert swapped.metadata["recall_at_10"].value == 1.0
        assert "cosine" in swapped.metadata["scores"].value
        assert open_collection(definition(), project).profile.name == "wide"
        assert self.run(synced, "roll_back").success
        assert open_collection(definition(), project).profile.name == "test"
        again = self.run(synced, "roll_back")  # as a run that is retried does
        [failed] = [event for event in again.all_events if event.is_step_failure]
        assert "nothing has been swapped; to drop" in failed.step_failure_data.user_failure_data.description
        assert self.run(synced, "swap").success
        assert not self.run(synced, "contract").success
        now = {"ops": {"films__migration__contract": {"config": {"now": True}}}}
        assert self.run(synced, "contract", run_config=now).success
        assert open_change(open_collection(definition(), project)) is None
        assert self.run(
            synced,
            "expand",
            run_config={"ops": {"films__migration__expand": {"config": {"candidate_profile": "test"}}}},
        ).success
        dropping = {"ops": {"films_roll_back_model": {"config": {"drop_candidate": True}}}}
        assert self.run(synced, "roll_back", run_config=dropping).success
        assert open_change(open_collection(definition(), project)) is None

    def test_what_the_database_says_is_one_line(self, database, project, synced) -> None:
        config = {"ops": {"films__migration__expand": {"config": {"candidate_profile": "wide"}}}}
        assert self.run(synced, "expand", run_config=config).success
        assert self.run(synced, "backfill", tags=range_tags(0, 2)).success
        assert self.run(synced, "swap").success
        previous = (
            f"films_vector_{open_change(open_collection(definition(), project)).previous.destination.fingerprint}"
        )
        execute(database, f"CREATE VIEW theirs AS SELECT * FROM embeddings.{previous}")
        now = {"ops": {"films__migration__contract": {"config": {"now": True}}}}
        refused = self.run(synced, "contract", run_config=now)
        [failed] = [event for event in refused.all_events if event.is_step_failure]
        said = failed.step_failure_data.user_failure_data.description
        assert said.startswith("the database says: cannot drop table") and "\n" not in said

    def test_the_time_left_is_what_the_batches_took_that_this_run_filled(
        self, database, project, instance, monkeypatch
    ) -> None:
        make_films(database, films(55))
        sync(definition(), project, instance=instance)
        config = {"ops": {"films__migration__expand": {"config": {"candidate_profile": "wide"}}}}
        assert self.run(instance, "expand", run_config=config).success
        assert self.run(instance, "backfill", partition_key="000000").success
        monkeypatch.setattr(backfill, "BATCHES_TOGETHER", 2)
        clock = iter([0.0, 600.0, 600.0, 900.0])  # two batches of six within ten minutes, one in the next five
        monkeypatch.setattr(migration_assets, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        done = self.run(instance, "backfill", tags=range_tags(1, 3))
        told = list(done.asset_materializations_for_node("films__migration__backfill"))
        told.sort(key=lambda one: str(one.partition))
        assert [one.metadata["backfilled_batches"].value for one in told] == [3, 3, 4]
        assert [one.metadata["minutes_left"].value for one in told] == [15.0, 15.0, 10.0]
        assert [one.metadata["texts_done"].value for one in told] == [10, 20, 30]

    def test_a_sync_beside_it_keeps_both_models_current(self, database, project, synced) -> None:
        config = {"ops": {"films__migration__expand": {"config": {"candidate_profile": "wide"}}}}
        assert self.run(synced, "expand", run_config=config).success
        assert self.run(synced, "backfill", tags=range_tags(0, 2)).success
        execute(database, "UPDATE films SET overview = 'edited' WHERE id = 3")
        execute(database, "INSERT INTO films SELECT n, 'Film ' || n, 'new ' || n FROM generate_series(26, 45) AS n")
        done = sync(definition(), project, instance=synced)
        assert (done.embedded, done.new) == (21, 20)
        collection = open_collection(definition(), project)
        assert collection.ledger.work() == {}
        [shadow] = collection.ledger.shadow_models()
        assert execute(database, f"SELECT count(*) FROM embeddings.{shadow.destination.name}") == [(45,)]
        assert self.run(synced, "swap").success
