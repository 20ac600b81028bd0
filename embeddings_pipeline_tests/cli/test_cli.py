"""The command line as a user has it: its output and its exit codes, here and in real processes."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from embeddings_pipeline.config.definition import COMPONENT_TYPE
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support import tiny_models
from embeddings_pipeline_tests.support.command_line import PROGRESS, run_here, run_process
from embeddings_pipeline_tests.support.workbench import definition, execute

ROOT = Path(__file__).resolve().parents[2]
STATUS = {
    *("collection", "profile", "fingerprint", "items", "vectors", "coverage", "missing", "stale", "orphans"),
    *("quarantined", "dirty_batches", "pgvector_index", "faiss"),
}
SYNC = {"scanned", "new", "changed", "deleted", "embedded", "reused", "quarantined", "seconds"}
FILMS = "id,title,overview,revenue\n1,Alien,A crew meets a monster,104\n2,Heat,A thief and a policeman,187\n3,Up,,735\n"

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def environment(database: Database, settings: Settings, tmp_path: Path) -> dict[str, str]:
    """Of processes that use this test's database, with the workbench's collection as the only one."""
    config = definition().attributes.model_dump(exclude_defaults=True, mode="json")
    folder = tmp_path / "defs" / "films"
    folder.mkdir(parents=True)
    (folder / "defs.yaml").write_text(yaml.safe_dump({"type": COMPONENT_TYPE, "attributes": config}))
    return {
        **os.environ,
        "DATABASE_URL": database.url,
        "DAGSTER_HOME": str(ROOT),
        "EMBEDDINGS_STATE_DIR": str(settings.state_dir),
        "EMBEDDINGS_DEFS_DIR": str(tmp_path / "defs"),
    }


@pytest.fixture
def command(environment: dict[str, str], dagster_tables: None) -> Command:
    """`embeddings-pipeline …` in that environment, in this process."""
    return lambda *arguments: run_here(arguments, environment)


@pytest.fixture
def process(environment: dict[str, str], dagster_tables: None) -> Command:
    """As `command`, in a process of its own."""
    return lambda *arguments, **changed: run_process(arguments, {**environment, **changed})


@pytest.fixture
def loaded(command: Command, tmp_path: Path) -> Command:
    (tmp_path / "films.csv").write_text(FILMS)
    assert command("load", str(tmp_path / "films.csv"), "--table", "films").returncode == 0
    return command


NEVER = {"dagster", "sqlalchemy", "grpc", "pandas", "torch", "transformers", "sentence_transformers"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "without"),
    [
        (("search", "monster"), {"pyarrow", "stamina", "rich"}),
        (("similar", "1"), {"pyarrow", "stamina", "rich"}),
        (("sync",), {"stamina", "rich"}),
        (("status",), {"rich"}),
    ],
)
def test_a_command_imports_no_more_than_it_needs(
    loaded: Command, environment: dict[str, str], arguments: tuple[str, ...], without: set[str]
) -> None:
    assert loaded("sync").returncode == 0
    command = [sys.executable, "-X", "importtime", "-m", "embeddings_pipeline", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    lines = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")]
    packages = {name.partition(".")[0] for name in lines}
    assert {"psycopg", "pydantic"} < packages
    assert not packages & (NEVER | without)


def fails_in_one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1, done
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_from_a_file_to_a_search_with_json_at_every_step(loaded: Command, database: Database) -> None:
    before = json.loads(loaded("status", "--json").stdout)
    assert set(before) >= STATUS and before["fingerprint"] is None
    synced = json.loads(loaded("sync", "--json").stdout)
    assert set(synced) >= SYNC
    assert (synced["scanned"], synced["new"], synced["embedded"], synced["deleted"]) == (3, 3, 3, 0)
    status = json.loads(loaded("status", "--json").stdout)
    assert set(status) >= STATUS
    assert (status["items"], status["vectors"], status["coverage"], status["dirty_batches"]) == (3, 3, 1.0, 0)
    assert status["faiss"]["vectors"] == 3 and status["faiss"]["current"] is True
    hits = json.loads(loaded("search", "a crew meets a monster", "-k", "1", "--json").stdout)
    assert [(hit["item_key"], hit["item"]["title"]) for hit in hits] == [("1", "Alien")]
    [faiss] = json.loads(loaded("search", "a crew meets a monster", "-k", "1", "--faiss", "--json").stdout)
    assert faiss["item"] == hits[0]["item"] and faiss["score"] == pytest.approx(hits[0]["score"], abs=1e-3)
    execute(database, "UPDATE films SET revenue = 999 WHERE id = 1")
    again = json.loads(loaded("sync", "--json").stdout)
    assert (again["changed"], again["embedded"]) == (1, 0)
    [hit] = json.loads(loaded("search", "a crew meets a monster", "-k", "1", "--json").stdout)
    assert hit["item"]["revenue"] == 999


def test_load_tells_the_types_and_takes_the_files_name(command: Command, tmp_path: Path) -> None:
    (tmp_path / "shops.csv").write_text("id,zip,name\n1,02134,a\n2,01001,b\n")
    made = command("load", str(tmp_path / "shops.csv"))
    assert made.stdout == "shops: 2 rows, 2 new, 0 changed\n"
    assert made.stderr == (
        "note: column 'zip' is text, since row 1 says '02134'; drop the table and load it with --type zip=numeric for "
        "numbers\n"
        "note: shops is a new table (bigint: id; text: the others); --types shows each, --type COLUMN=TYPE decides\n"
    )
    again = command("load", str(tmp_path / "shops.csv"), "--types")
    assert again.stdout == "shops: 2 rows, 0 new, 0 changed\n  id    bigint\n  zip   text\n  name  text\n"
    assert again.stderr == ""
    chosen = command("load", str(tmp_path / "shops.csv"), "--table", "other", "--type", "zip=bigint", "--json")
    shown = json.loads(chosen.stdout)
    assert shown["table"] == "other" and shown["types"] == {"id": "bigint", "zip": "bigint", "name": "text"}
    assert shown["notes"] == ["column 'zip', row 1: '02134' is 2134 as bigint; in 2 rows in all"]
    (tmp_path / "mine.csv").write_text("id,zip,name\n3,3,c\n")
    command("psql", "-c", "CREATE TABLE mine (id int PRIMARY KEY, zip text, name text)")
    assert "that load has not made; name it with --table" in fails_in_one_line(
        command("load", str(tmp_path / "mine.csv"))
    )
    replaced = command("load", str(tmp_path / "mine.csv"), "--table", "shops", "--replace")
    assert replaced.stdout == "shops: 1 row, 1 new, 0 changed, 2 deleted first\n"
    assert replaced.stderr == f"note: 2 of its rows were deleted, and it was loaded from {tmp_path / 'shops.csv'}\n"


@pytest.mark.slow
def test_people_get_text_and_nothing_but_progress_on_stderr(loaded: Command, process: Command) -> None:
    for arguments, expected in (
        (["sync", "--dry-run"], "dry run, nothing was written"),
        (["sync"], "3 texts embedded"),
        (["status"], "100.0% covered"),
        (["search", "thief"], "Heat · revenue 187"),
        (["psql", "-Atc", "select count(*) from embeddings.films"], "3"),
    ):
        done = process(*arguments)
        assert (done.returncode, PROGRESS.sub("", done.stderr)) == (0, ""), done
        assert expected in done.stdout


def test_psql_passes_arguments_and_exit_code_on(process: Command) -> None:
    assert process("psql", "-At", "-F", "|", "-c", "select 1, 'a b'").stdout == "1|a b\n"
    assert process("psql", "-v", "ON_ERROR_STOP=1", "-c", "select nothing").returncode == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["load", "nowhere.csv"], "there is no such file"),
        (["load", "nowhere.csv", "--type", "zip"], "--type zip: write COLUMN=TYPE"),
        (["sync"], 'relation "films" does not exist; create it'),
        (["sync", "--collection", "film"], "did you mean 'films'"),
        (["search", "thief"], "run `embeddings-pipeline sync` first"),
        (["search", "  "], "the query is blank"),
        (["search", "thief", "--vector", "bas"], "did you mean 'base'"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(command: Command, arguments: list[str], says: str) -> None:
    assert says in fails_in_one_line(command(*arguments))


def test_a_process_that_fails_says_the_same_line(command: Command, process: Command) -> None:
    line = fails_in_one_line(process("search", "thief"))
    assert line == fails_in_one_line(command("search", "thief"))
    assert process("search").returncode == 2


@pytest.mark.parametrize("arguments", [["nonsense"], ["sync", "--limit", "0"], ["search"], ["search", "x", "-k", "0"]])
def test_wrong_usage_exits_2(command: Command, arguments: list[str]) -> None:
    assert command(*arguments).returncode == 2


def test_an_unknown_profile_is_named_before_anything_is_made(loaded: Command, tmp_path: Path) -> None:
    path = tmp_path / "defs" / "films" / "defs.yaml"
    document = yaml.safe_load(path.read_text())
    document["attributes"]["profile"] = "minlm"
    path.write_text(yaml.safe_dump(document))
    assert "minilm" in fails_in_one_line(loaded("sync"))


def test_a_model_that_cannot_be_had_names_profile_model_and_ways_out(
    loaded: Command, process: Command, tmp_path: Path
) -> None:
    path = tmp_path / "defs" / "films" / "defs.yaml"
    document = yaml.safe_load(path.read_text())
    document["attributes"]["profile"] = "speed"
    path.write_text(yaml.safe_dump(document))
    line = fails_in_one_line(process("sync", HF_HUB_OFFLINE="1"))
    assert all(word in line for word in ("speed", "BAAI/bge-small-en-v1.5", "EMBEDDING_MODEL"))


def test_a_taken_port_is_one_line(process: Command) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = fails_in_one_line(process("ui", "--port", str(port)))
    assert f"port {port}" in line and "--port" in line


@pytest.mark.slow
def test_status_and_search_start_without_dagster_and_status_without_torch(
    loaded: Command, environment: dict[str, str]
) -> None:
    loaded("sync")
    program = (
        "import sys; sys.argv = ['embeddings-pipeline', *sys.argv[1:]]\n"
        "from embeddings_pipeline.cli.main import app\n"
        "try: app()\n"
        "except SystemExit as done: assert not done.code\n"
        "print([name for name in ('dagster', 'torch', 'faiss') if name in sys.modules], file=sys.stderr)"
    )

    def imported(*arguments: str) -> str:
        command = [sys.executable, "-c", program, *arguments]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stderr.splitlines()[-1]

    assert imported("status") == "[]"
    assert "dagster" not in imported("search", "thief")


class TestQuarantine:
    @pytest.fixture
    def bad(self, loaded: Command, database: Database) -> str:
        """The content hash of a text that the encoder is said to have refused."""
        assert loaded("sync").returncode == 0
        statement = """
            INSERT INTO embeddings.quarantine (collection, fingerprint, content_hash, text, reason)
            SELECT 'films', fingerprint, content_hash, text, 'ValueError: it was refused'
            FROM embeddings.films_text, embeddings.collection
            WHERE item_key = '2'
            RETURNING encode(content_hash, 'hex')"""
        [(digest,)] = execute(database, statement)
        [(table,)] = execute(database, "SELECT 'films_vector_' || fingerprint FROM embeddings.collection")
        execute(database, f"DELETE FROM embeddings.{table} WHERE encode(content_hash, 'hex') = '{digest}'")
        return str(digest)

    def test_list_shows_what_and_why_and_when(self, loaded: Command, bad: str) -> None:
        shown = loaded("quarantine", "list")
        assert shown.returncode == 0 and not shown.stderr
        assert f"films  {bad[:12]}  item 2, at encode, 1 attempt with test, tried again from" in shown.stdout
        assert "ValueError: it was refused" in shown.stdout and "Heat" in shown.stdout
        [entry] = json.loads(loaded("quarantine", "list", "--json").stdout)
        assert (entry["collection"], entry["content_hash"], entry["item_key"]) == ("films", bad, "2")

    def test_retry_and_clear_take_the_beginning_of_a_hash_or_all(
        self, loaded: Command, database: Database, bad: str
    ) -> None:
        assert loaded("quarantine", "retry", bad[:6]).stdout.startswith("1 text or item is tried again")
        assert execute(database, "SELECT attempts, next_try <= now() FROM embeddings.quarantine") == [(0, True)]
        assert loaded("quarantine", "clear", "--all").returncode == 0
        assert loaded("quarantine", "list").stdout == "films: nothing is in quarantine\n"
        assert json.loads(loaded("sync", "--json").stdout)["reused"] == 3

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["retry", "ffff"], "begins with 'ffff'"),
            (["retry"], "give --all"),
            (["clear", "--all", "ab"], "give --all"),
            (["clear"], "quarantine list"),
        ],
    )
    def test_what_fits_nothing_is_one_line(self, loaded: Command, bad: str, arguments: list[str], says: str) -> None:
        done = loaded("quarantine", *arguments)
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and says in done.stderr
        assert len(json.loads(loaded("quarantine", "list", "--json").stdout)) == 1


@pytest.mark.slow
def test_a_full_sync_audits_and_runs_every_check(loaded: Command, database: Database) -> None:
    assert loaded("sync").returncode == 0
    execute(database, "DELETE FROM embeddings.films_text WHERE item_key = '2'")
    done = loaded("sync", "--full", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["embedded"] == 0
    assert execute(database, "SELECT count(*) FROM embeddings.films") == [(3,)]


def test_searches_take_conditions_items_and_explain_themselves(
    loaded: Command, environment: dict[str, str], database: Database
) -> None:
    assert loaded("sync").returncode == 0
    path = Path(environment["EMBEDDINGS_DEFS_DIR"]) / "films" / "defs.yaml"
    written = yaml.safe_load(path.read_text())
    written["attributes"]["filters"] = {"revenue": "number", "title": "text"}
    path.write_text(yaml.safe_dump(written))
    assert json.loads(loaded("sync", "--json").stdout)["embedded"] == 0
    indexes = "SELECT count(*) FROM pg_indexes WHERE indexname LIKE 'films_filter_%'"
    assert execute(database, indexes) == [(2,)]  # though there was nothing else to do
    for command in (("search", "monster"), ("similar", "3")):
        found = loaded(*command, "--where", "revenue>=150", "--where", "title!=Up", "--json")
        assert [hit["item_key"] for hit in json.loads(found.stdout)] == ["2"]
        told = loaded(*command, "--where", '{"revenue": [104, 187]}', "--explain")
        assert "filter: about" in told.stdout and "vector base: pgvector, all that match compared" in told.stdout
        told = loaded(*command, "--explain", "--json")
        legs = json.loads(told.stdout)["explanation"]["legs"]
        assert legs[0]["ranks"]["1"]["rank"] >= 1
    for words, what in (
        ("revenue>=much", "'revenue' is a number"),
        ("revenu=3", "did you mean 'revenue'"),
        ("x", "no condition"),
    ):
        refused = loaded("search", "monster", "--where", words)
        assert refused.returncode == 1 and what in refused.stderr and len(refused.stderr.splitlines()) == 1
    assert loaded("search", "monster", "--where", "revenue>5000").stdout.startswith("nothing found: no item")
    refused = loaded("similar", "99")
    assert refused.returncode == 1 and "has no item '99'" in refused.stderr


def test_a_search_is_reranked_if_it_is_told_to(
    loaded: Command, environment: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert loaded("sync").returncode == 0
    environment["RERANK_MODEL"] = str(tiny_models.cross_encoder(tmp_path / "reranker"))
    told = loaded("search", "monster", "--rerank", "--explain")
    assert "; 3 of 3 hits scored; " in told.stdout and "  was 1. 1 " in told.stdout
    said = json.loads(loaded("search", "monster", "--rerank", "--explain", "--json").stdout)
    assert said["explanation"]["rerank"]["ranks"]["1"]["rank"] == 1
    assert "rerank" not in loaded("search", "monster", "--explain").stdout
    environment |= {"ENABLE_RERANKER": "true", "RERANK_MODEL": str(tmp_path / "gone")}
    assert loaded("search", "monster", "--no-rerank").returncode == 0 and "hits keep" not in caplog.text
    assert loaded("search", "monster").returncode == 0 and "hits keep the order in which they" in caplog.text
