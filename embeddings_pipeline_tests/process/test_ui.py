"""What a user sees in the Dagster UI, in a real browser: `ui` as its own processes, on a small collection."""

import csv
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import yaml

from embeddings_pipeline_tests.support.workbench import PROFILE, by_name, films, wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PROJECT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
START_SECONDS, RUN_SECONDS, END_SECONDS = 120, 90, 60  # on a busy machine; 15, 5 and 8 on an idle one
GRAPH = "/locations/embeddings_pipeline/asset-groups/items/lineage"
LAUNCHPAD = "/locations/embeddings_pipeline/jobs/items_batches/playground"
ASSETS = ["item_ledger", "raw_items", "item_texts", "embeddings_32", "pgvector_table"]
ASSETS += ["pgvector_index", "faiss_index", "map", "audit"]


@dataclass(frozen=True)
class Project:
    """A deployment of its own: twelve films in three batches of five, synced from the command line."""

    folder: Path
    port: int

    @property
    def environment(self) -> dict[str, str]:
        settings = {"EMBEDDINGS_STATE_DIR": self.folder / "state", "EMBEDDINGS_DEFS_DIR": self.folder / "defs"}
        return {**os.environ, "DAGSTER_HOME": str(PROJECT), **{name: str(path) for name, path in settings.items()}}

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "embeddings_pipeline", *arguments]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = self.command(*arguments)
        how = {"cwd": PROJECT, "env": self.environment, "capture_output": True, "text": True, "timeout": 120}
        return subprocess.run(command, check=False, **how)  # type: ignore[call-overload, no-any-return]


@pytest.fixture(scope="module")
def project(open_folder: Path, skip_without: Callable[[str, bool], None]) -> Project:
    skip_without("chromium", CHROMIUM is not None)
    skip_without("playwright", importlib.util.find_spec("playwright") is not None)
    folder = open_folder / "ui"
    (folder / "defs" / "items").mkdir(parents=True)
    attributes = {
        "name": "items",
        "source": {"table": "films", "key": ["id"], "updated_at": "updated_at"},
        "columns": ["title"],
        "vectors": {"base": "{title} | {overview}"},
        "profile": PROFILE,
        "profiles": by_name({**PROFILE, "name": "wide", "dimensions": 48}),
        "items_per_batch": 5,
    }
    component = {"type": "embeddings_pipeline.EmbeddingCollection", "attributes": attributes}
    (folder / "defs" / "items" / "defs.yaml").write_text(yaml.safe_dump(component))
    with (folder / "films.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "title", "overview", "revenue"), *films(12)])
    return Project(folder, free_port())


@pytest.fixture(scope="module")
def ui(project: Project) -> Iterator[str]:
    """The address of a running UI. Ctrl-C ends it at last, with everything that it started, PostgreSQL too."""
    for arguments in (["load", str(project.folder / "films.csv"), "--table", "films"], ["sync"]):
        done = project.run(*arguments)
        assert done.returncode == 0, done.stderr
    log = project.folder / "ui.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            project.command("ui", "--port", str(project.port)),
            cwd=PROJECT,
            env=project.environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    started: list[psutil.Process] = []
    try:
        address = f"http://127.0.0.1:{project.port}"
        wait_until(lambda: answers(f"{address}/server_info") or process.poll() is not None, START_SECONDS, pause=0.3)
        assert process.poll() is None, log.read_text()
        yield address
        started = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        process.wait(END_SECONDS)
        postmaster = project.folder / "state" / "postgres" / "data" / "postmaster.pid"
        wait_until(lambda: not any(alive(child) for child in started) and not postmaster.exists(), END_SECONDS)
    finally:
        left = [*started, *(psutil.Process(process.pid).children(recursive=True) if process.poll() is None else [])]
        for child in left:
            if alive(child):
                child.kill()
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def browser(project: Project) -> Iterator["Browser"]:
    from playwright.sync_api import sync_playwright

    arguments = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=[*arguments.split(), "--disable-component-update", "--disable-sync"]
        )
        yield browser
        browser.close()


@pytest.fixture
def page(ui: str, browser: "Browser") -> Iterator["Page"]:
    """A fresh page, whose addresses are the UI's. Whatever its scripts throw fails the test."""
    context = browser.new_context(base_url=ui, viewport={"width": 1500, "height": 1000})
    context.set_default_timeout(30_000)
    page = context.new_page()
    thrown: list[str] = []
    page.on("pageerror", lambda error: thrown.append(str(error)))
    yield page
    context.close()
    assert not thrown


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_asset_graph_shows_the_assets_of_the_group(page: "Page") -> None:
    page.goto(GRAPH)
    for name in ASSETS:
        page.get_by_text(name, exact=True).first.wait_for()
    page.get_by_text("Asset Group in").wait_for()


def test_what_the_command_line_did_is_there(page: "Page") -> None:
    page.goto("/runs")
    for job in ("items_scan", "items_batches", "items_index"):
        page.get_by_role("link", name=job).first.wait_for()
    page.goto("/assets/item_texts?view=partitions&partition=000002")
    page.get_by_text("Materialized", exact=True).first.wait_for()
    page.get_by_text(re.compile(r"Film \d+ \| A story about number")).wait_for()  # the sample


def test_checks_are_green(page: "Page") -> None:
    for asset, checks in {"pgvector_index": ["coverage", "integrity"], "faiss_index": ["index_parity"]}.items():
        for check in checks:
            page.goto(f"/assets/{asset}?view=checks&checkDetail={check}")
            page.get_by_text("Passed", exact=True).wait_for()
    page.get_by_text("12 vectors, 0 missing, 0 not in the table").wait_for()


def test_numbers_are_plotted_over_time(page: "Page") -> None:
    page.goto("/assets/item_ledger")
    page.get_by_role("button", name="Plots").click()
    page.locator("canvas").first.wait_for()
    page.get_by_text("dirty_batches", exact=True).first.wait_for()


@pytest.mark.parametrize(
    ("setting", "seen"),
    [
        # With `dry_run` nothing is left to encode, since the command line has embedded all; and nothing is committed.
        ("dry_run", "dry run, batch 000001: 0 texts to encode, 5 reused"),
        ("force", "RUN_SUCCESS"),
    ],
)
def test_a_partition_is_materialized_from_the_launchpad(page: "Page", setting: str, seen: str) -> None:
    page.goto(LAUNCHPAD)
    page.get_by_placeholder("Partition").click()
    page.get_by_text("000001", exact=True).last.click()
    page.locator(".CodeMirror-line", has_text=f"{setting}:").get_by_text("false").dblclick()
    page.keyboard.type("true")
    page.locator(".CodeMirror-line", has_text=f"{setting}: true").wait_for()
    page.get_by_role("button", name="Launch Run").click()
    page.wait_for_url(re.compile("/runs/"))
    page.get_by_text("Success", exact=True).first.wait_for(timeout=RUN_SECONDS * 1000)
    page.get_by_text(seen).first.wait_for()
    page.goto("/assets/embeddings_32?view=partitions&partition=000001")
    embedded = page.locator("tr", has=page.get_by_text("embedded", exact=True))
    embedded.get_by_text("5", exact=True).wait_for()
    # A dry run is no materialization; encoding anew is one more than that of the command line.
    events = 2 if setting == "force" else 1
    page.get_by_text(f"View all historical events ({events})").wait_for()


def launch_backfill(page: "Page", settings: str, job: str = "items_batches") -> None:
    """Backfill every partition of the job, with these settings of embeddings_32."""
    page.goto(f"/locations/embeddings_pipeline/jobs/{job}/partitions")
    page.get_by_role("button", name="Materialize").first.click()
    page.get_by_role("button", name="All", exact=True).click()
    page.get_by_role("dialog").get_by_text("3 partitions").wait_for()
    if settings:
        page.get_by_text("Config", exact=True).click()
        page.get_by_role("button", name="Add config").click()
        page.locator(".CodeMirror").last.click()
        page.keyboard.press("Control+A")
        page.keyboard.insert_text(f"ops: {{embeddings_32: {{config: {{{settings}}}}}}}")
        page.get_by_role("button", name="Save config").click()
    page.get_by_role("button", name="Launch backfill").click()
    page.get_by_role("link", name=re.compile("View|Backfill")).first.wait_for()


def newest_run(ui: str) -> tuple[str, str]:
    """The id and the status of the newest run."""
    query = b'{"query": "{ runsOrError(limit: 1) { ... on Runs { results { runId status } } } }"}'
    request = urllib.request.Request(f"{ui}/graphql", query, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        [run] = json.load(response)["data"]["runsOrError"]["results"]
    return run["runId"], run["status"]


def ended_well(ui: str, before: tuple[str, str]) -> bool:
    """Whether the newest run is another one than `before`, and a success."""
    newest = newest_run(ui)
    return newest != before and newest[1] == "SUCCESS"


def test_a_backfill_of_three_partitions_dry_changes_nothing(page: "Page", ui: str, project: Project) -> None:
    newest = newest_run(ui)
    state = ("psql", "-Atc", "SELECT max(committed_at), max(version) FROM embeddings.batch")
    before = project.run(*state).stdout
    launch_backfill(page, "dry_run: true")
    wait_until(lambda: ended_well(ui, newest), 2 * RUN_SECONDS, pause=0.5)
    page.goto(f"/runs/{newest_run(ui)[0]}")
    for dry in ("000000: 0 texts to encode, 5 reused", "000002: 0 texts to encode, 2 reused"):
        page.get_by_text(f"dry run, batch {dry}").first.wait_for()
    assert project.run(*state).stdout == before


def test_a_backfill_of_three_partitions_takes_configuration_and_runs(page: "Page", project: Project) -> None:
    launch_backfill(page, "force: true")
    committed = "SELECT min(committed_at) > now() - interval '2 minutes' FROM embeddings.batch"

    def all_committed() -> bool:
        return project.run("psql", "-Atc", committed).stdout.strip() == "t"

    wait_until(all_committed, 2 * RUN_SECONDS, pause=1)
    page.goto("/runs")
    page.get_by_text("3 partitions").first.wait_for()
    page.goto("/assets/embeddings_32?view=partitions&partition=000002")
    embedded = page.locator("tr", has=page.get_by_text("embedded", exact=True))
    embedded.get_by_text("2", exact=True).wait_for()  # by force: the last batch holds two


def test_the_sensor_is_switched_on_and_brings_a_new_row_to_the_search(page: "Page", project: Project) -> None:
    page.goto("/locations/embeddings_pipeline/sensors/new_rows_sensor")
    page.get_by_text("Sensor has never run").wait_for()
    page.locator("label:has(input[type=checkbox]), [role=switch]").first.click()
    requested = page.get_by_text(re.compile(r"\bruns? requested")).first  # one run or several, as the ticks fall
    requested.wait_for(timeout=60_000)
    project.run("psql", "-qc", "INSERT INTO films (id, title, overview) VALUES (99, 'Late', 'a latecomer')")

    def searchable() -> bool:
        return '"99"' in project.run("search", "Late a latecomer", "-k", "1", "--json").stdout

    wait_until(searchable, 3 * RUN_SECONDS, pause=2)
    requested.wait_for()
    page.locator("label:has(input[type=checkbox]), [role=switch]").first.click()


def test_the_schedules_are_there_with_their_times(page: "Page") -> None:
    page.goto("/locations/embeddings_pipeline/schedules/daily_refresh")
    page.get_by_text("At 04:00 AM").first.wait_for()
    page.goto("/locations/embeddings_pipeline/schedules/recent_refresh")
    page.get_by_text("items_recent").first.wait_for()


def launch(page: "Page", job: str, settings: str = "") -> None:
    """Start a job from its launchpad, and wait until its run has ended well."""
    page.goto(f"/locations/embeddings_pipeline/jobs/items_migration_{job}/playground")
    page.get_by_role("button", name="Launch Run").wait_for()
    if settings:
        page.locator(".CodeMirror").first.click()
        page.keyboard.press("Control+A")
        page.keyboard.insert_text(f"ops: {{migration__{job}: {{config: {{{settings}}}}}}}")
    page.get_by_role("button", name="Launch Run").click()
    page.wait_for_url(re.compile("/runs/"))
    page.get_by_text("Success", exact=True).first.wait_for(timeout=RUN_SECONDS * 1000)


def test_the_phases_of_a_migration_from_the_launchpad(page: "Page", ui: str, project: Project) -> None:
    def current() -> str:
        return project.run("psql", "-Atc", "SELECT profile FROM embeddings.current_model('items')").stdout.strip()

    page.goto("/locations/embeddings_pipeline/asset-groups/items_migration/lineage")
    for phase in ("expand", "backfill", "swap", "contract"):
        page.get_by_text(phase, exact=False).first.wait_for()
    launch(page, "expand", "candidate_profile: wide")
    newest = newest_run(ui)
    launch_backfill(page, "", job="items_migration_backfill")
    wait_until(lambda: ended_well(ui, newest), 2 * RUN_SECONDS, pause=0.5)
    assert current() == "test"
    launch(page, "swap")
    assert current() == "wide"
    page.goto("/assets/migration/swap")
    page.get_by_text("recall_at_10", exact=True).first.wait_for()
    page.get_by_text("neighbour_overlap", exact=True).first.wait_for()
    page.get_by_text("Show Markdown").first.click()
    picture = page.get_by_role("img", name="cosines of the nearest ten")
    picture.wait_for()
    assert picture.evaluate("image => image.naturalWidth") > 500
    launch(page, "roll_back")
    assert current() == "test"
    launch(page, "swap")
    launch(page, "contract", "now: true")
    assert current() == "wide"
    assert project.run("profile", "status").stdout.count("no change of the model is under way") == 1


def test_a_second_ui_and_a_taken_port_are_refused_in_one_line(ui: str, project: Project) -> None:
    taken = project.run("ui", "--port", str(project.port))
    assert taken.returncode == 1 and taken.stderr.count("\n") == 1
    assert f"port {project.port} on 127.0.0.1 cannot be used" in taken.stderr
    second = project.run("ui", "--port", str(free_port()))
    assert second.returncode == 1 and second.stderr.count("\n") == 1
    assert "already running" in second.stderr
