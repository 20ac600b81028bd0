"""What checks found, what failed and who is at work is told by `sync` and `status`, and ends with exit code 1."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from embeddings_pipeline.config.definition import COMPONENT_TYPE
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import OutageError
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.command_line import PROGRESS, PROJECT, run_here
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.workbench import definition, execute, films, make_films, wait_until

Command = Callable[..., subprocess.CompletedProcess[str]]


def define(folder: Path, name: str) -> None:
    config = definition(name).attributes.model_dump(exclude_defaults=True, mode="json")
    (folder / name).mkdir(parents=True)
    (folder / name / "defs.yaml").write_text(yaml.safe_dump({"type": COMPONENT_TYPE, "attributes": config}))


@pytest.fixture
def command(project: Settings, tmp_path: Path) -> Command:
    """`embeddings-pipeline …` in this process, over a table `films`."""
    define(tmp_path / "defs", "films")
    environment = {**os.environ, "DAGSTER_HOME": str(PROJECT), "EMBEDDINGS_DEFS_DIR": str(tmp_path / "defs")}
    return lambda *arguments: run_here(arguments, environment)


@pytest.fixture
def vector_table(database: Database, command: Command) -> str:
    """The model table of ten films that are synced."""
    make_films(database, films(10))
    assert command("sync").returncode == 0
    [(table,)] = execute(database, "SELECT 'films_vector_' || fingerprint FROM embeddings.collection")
    return f"embeddings.{table}"


def status(command: Command) -> dict:
    return json.loads(command("status", "--json").stdout)


def check(command: Command, name: str) -> dict:
    [found] = [each for each in status(command)["checks"] if each["name"] == name]
    return found


class TestChecks:
    def test_a_check_that_fails_is_one_line_with_its_remedy_and_exit_code_1(
        self, database, command, vector_table
    ) -> None:
        execute(database, f"UPDATE {vector_table} SET embedding = (SELECT embedding FROM {vector_table} LIMIT 1)")
        done = command("sync", "--full")
        assert done.returncode == 1 and "10 items scanned" in done.stdout
        [line] = [line for line in done.stderr.splitlines() if "integrity" in line]
        assert line.startswith("error: films: check integrity: 10 vectors: ")
        assert "all the same" in line and line.endswith("run `embeddings-pipeline sync --force --collection films`")

    def test_it_is_told_until_it_is_mended_though_nothing_else_is_to_be_done(
        self, database, command, vector_table
    ) -> None:
        execute(database, f"UPDATE {vector_table} SET embedding = (SELECT embedding FROM {vector_table} LIMIT 1)")
        assert command("sync", "--full").returncode == 1
        again = command("sync", "--json")
        assert again.returncode == 1 and "check integrity" in again.stderr
        [found] = json.loads(again.stdout)["checks"]
        assert (found["name"], found["passed"], found["severity"]) == ("integrity", False, "error")
        assert "sync --force" in found["remedy"]
        mended = command("sync", "--force")
        assert (mended.returncode, PROGRESS.sub("", mended.stderr)) == (0, "")
        assert check(command, "integrity")["passed"] is True

    def test_what_a_model_has_become_is_told_until_all_is_encoded_anew(
        self, database, command, vector_table, tmp_path
    ) -> None:
        define(tmp_path / "defs", "other")
        assert command("sync").returncode == 0
        execute(database, "UPDATE embeddings.canary SET embedding[1] = embedding[1] + 0.5")
        for arguments in (["--full"], []):
            done = command("sync", "-c", "films", *arguments)
            assert done.returncode == 1 and "films: check model_drift: 20 texts, lowest cosine" in done.stderr
        assert command("sync", "-c", "films", "--force").returncode == 0
        assert command("sync", "-c", "films", "--full").returncode == 0
        assert command("sync", "-c", "other", "--full").returncode == 1  # its vectors are as they were

    def test_a_sync_of_all_collections_goes_on_and_ends_with_1(self, database, command, vector_table, tmp_path) -> None:
        define(tmp_path / "defs", "other")
        execute(database, f"UPDATE {vector_table} SET embedding = (SELECT embedding FROM {vector_table} LIMIT 1)")
        done = command("sync", "--full")
        assert done.returncode == 1
        assert "error: films: check integrity" in done.stderr and "other: 10 items scanned" in done.stdout
        assert "error: other" not in done.stderr

    def test_a_warning_is_told_and_is_no_failure(self, database, command, tmp_path) -> None:
        make_films(database, films(50))
        DeterministicEncoder.fail_on = "number 42 "
        done = command("sync")
        assert done.returncode == 0
        [line] = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
        assert line.startswith("warning: films: check quarantine: 1 text or item (2.00 %) in quarantine")
        assert ": item 42 at encode, ValueError: a text holds 'number 42 ';" in line
        assert line.endswith("see `embeddings-pipeline quarantine list --collection films`")
        shown = command("status").stdout
        assert re.search(r"quarantine +warned \d+ seconds? ago: 1 text or item", shown)
        assert re.search(r"quarantine +1 text +\(tried again from \d\d:\d\d", shown)

    def test_many_in_quarantine_are_an_error(self, database, command) -> None:
        make_films(database, films(50))
        DeterministicEncoder.fail_on = "Film 1"
        done = command("sync")
        assert done.returncode == 1
        assert (
            "error: films: check quarantine: 11 texts and items (22.00 %) in quarantine, 0 of them given up: "
            in done.stderr
        )
        assert "; and 8 more; see `embeddings-pipeline quarantine list --collection films`" in done.stderr

    def test_what_the_next_sync_is_about_to_do_is_a_warning(self, database, command) -> None:
        make_films(database, films(10))
        done = command("sync", "--limit", "4")
        assert done.returncode == 0 and "warning: films: check coverage: 10 items, 6 missing" in done.stderr

    def test_status_shows_each_check_and_its_age(self, database, command, vector_table) -> None:
        shown = command("status").stdout
        for name in ("coverage", "integrity", "quarantine", "freshness", "index_parity"):
            assert re.search(rf"\b{name} +passed \d+ seconds? ago", shown)
        assert re.search(r"model_drift +never run; `sync --full` runs it", shown)
        execute(database, "UPDATE embeddings.check_result SET checked_at = checked_at - interval '3 hours'")
        assert re.search(r"coverage +passed 3 hours ago", command("status").stdout)
        assert check(command, "coverage")["age_seconds"] > 3 * 3600
        assert check(command, "model_drift")["passed"] is None


class TestFailures:
    def test_a_missing_table_is_nothing_yet_and_says_why(self, database, command) -> None:
        assert command("sync").returncode == 1
        shown = command("status").stdout
        assert "films: nothing is there yet" in shown and "100" not in shown
        assert re.search(r'scan failed +\d+ seconds? ago: .*relation "films" does not exist', shown)
        assert status(command)["coverage"] == 0.0
        make_films(database, films(3))
        assert command("sync").returncode == 0
        assert status(command)["failures"] == [] and "100.0% covered" in command("status").stdout

    def test_a_table_that_goes_is_not_covered(self, database, command, vector_table) -> None:
        execute(database, "ALTER TABLE films RENAME TO gone")
        assert command("sync", "--full").returncode == 1
        shown = command("status").stdout
        assert "how much is covered is not known" in shown and "covered" in shown and "100.0%" not in shown
        found = check(command, "coverage")
        assert found["passed"] is False and 'relation "films" does not exist' in found["description"]
        execute(database, "ALTER TABLE gone RENAME TO films")
        assert command("sync").returncode == 0
        assert check(command, "coverage")["passed"] is True

    def test_a_refused_scan_is_told_until_it_is_mended(self, database, command, vector_table) -> None:
        execute(database, "CREATE TABLE kept AS TABLE films; TRUNCATE films")
        assert command("sync").returncode == 1
        [failure] = status(command)["failures"]
        assert failure["step"] == "scan" and "--allow-deletes" in failure["reason"]
        execute(database, "INSERT INTO films SELECT * FROM kept")
        assert command("sync").returncode == 0
        assert status(command)["failures"] == []

    def test_a_key_that_comes_twice_is_told_in_lines_that_a_terminal_may_have(
        self, database: Database, command: Command, tmp_path: Path
    ) -> None:
        execute(database, "CREATE TABLE films (id text, title text, overview text, revenue bigint)")
        execute(database, "INSERT INTO films SELECT E'a\\x1b[2J\\nb', 'Film', 'story', n FROM generate_series(1, 2) n")
        refused = command("sync")
        told = refused.stderr.splitlines()[-1]
        assert refused.returncode == 1 and "the key (a\\x1b[2J\\nb) more than once" in told and told.isprintable()
        shown = command("status").stdout
        assert "the key (a\\x1b[2J\\nb) more than once" in shown and shown.replace("\n", "").isprintable()
        define(tmp_path / "defs", "actors")  # of several collections, each is told in its place
        of_several = command("sync").stderr
        assert "error: films: " in of_several and of_several.replace("\n", "").isprintable()

    def test_an_empty_table_is_nothing_yet(self, database, command) -> None:
        make_films(database, [])
        assert command("sync").returncode == 0
        assert command("status").stdout.startswith("films: nothing is there yet: the last full scan saw no rows\n")

    def test_what_waits_says_how_often_it_was_tried_and_why_it_failed(self, database, command) -> None:
        make_films(database, films(10))
        DeterministicEncoder.fail_on = " "
        assert command("sync").returncode == 1
        waiting = status(command)["waiting"]
        assert (waiting["batches"], waiting["attempts"]) == (1, 1) and "a text holds ' '" in waiting["reason"]
        assert re.search(r"waiting +1 batch after up to 1 attempt, tried again .*: .*holds", command("status").stdout)
        DeterministicEncoder.reset()
        assert command("sync").returncode == 0
        assert status(command)["waiting"]["batches"] == 0


def test_a_collection_that_is_no_longer_defined_is_named(database, command, vector_table, tmp_path) -> None:
    define(tmp_path / "defs", "other")
    assert command("sync", "-c", "other").returncode == 0
    assert "other" not in command("status", "-c", "films").stdout
    shutil.rmtree(tmp_path / "defs" / "other")
    for arguments in (["status"], ["status", "--json"]):
        assert "`embeddings-pipeline collection remove other` drops it" in command(*arguments).stderr
    assert command("collection", "remove", "other", "--yes").returncode == 0
    assert command("status").stderr == ""


@pytest.mark.slow
def test_an_interrupt_is_no_attempt(database, command, project) -> None:
    make_films(database, films(40))
    DeterministicEncoder.fail_on, DeterministicEncoder.error = "number 3 ", OutageError
    assert command("sync").returncode == 1
    attempts = "SELECT attempts, next_try > now() FROM embeddings.batch ORDER BY batch"
    assert execute(database, attempts) == [(1, True)] * 4
    execute(database, "UPDATE embeddings.batch SET next_try = now() WHERE batch = 0")
    running = subprocess.Popen([sys.executable, "-m", "embeddings_pipeline_tests.support.sync_process", "30"])
    try:
        wait_until(lambda: any(each["phase"] == "embedding" for each in status(command)["under_way"]))
        wait_until(lambda: execute(database, "SELECT attempts FROM embeddings.batch WHERE batch = 0") == [(2,)])
        running.send_signal(signal.SIGINT)
        assert running.wait(60) != 0
    finally:
        running.kill()
        running.wait()
    assert execute(database, attempts) == [(1, False), *[(1, True)] * 3]


@pytest.mark.slow
def test_a_sync_that_is_under_way_is_told_with_its_process_and_gone_with_it(database, command, project) -> None:
    make_films(database, films(40))
    running = subprocess.Popen([sys.executable, "-m", "embeddings_pipeline_tests.support.sync_process", "30"])
    try:
        wait_until(lambda: any(each["phase"] == "embedding" for each in status(command)["under_way"]))
        [sync] = status(command)["under_way"]
        assert status(command)["waiting"]["batches"] == 0 and "waiting" not in command("status").stdout
        assert sync["what"] == "sync" and f"process {running.pid}" in sync["who"]
        assert re.search(
            rf"under way +sync by .*, process {running.pid}, since .*: embedding", command("status").stdout
        )
        found = command("search", "a story")
        assert re.search(rf"wait for what is under way: sync by .*, process {running.pid}", found.stdout + found.stderr)
    finally:
        running.kill()
        running.wait()
    wait_until(lambda: status(command)["under_way"] == [])
    assert command("sync").returncode == 0
    assert execute(database, "SELECT count(*) FROM embeddings.activity") == [(0,)]
    assert re.search(r"last full scan +\d+ seconds? ago", command("status").stdout)
