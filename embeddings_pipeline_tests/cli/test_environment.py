"""Environments that are not as they should be: one line that names the thing and the remedy, never a traceback."""

import json
import os
from pathlib import Path

import pytest

from embeddings_pipeline.cli.main import one_line
from embeddings_pipeline.config.settings import Settings, load_settings
from embeddings_pipeline.definitions import defs
from embeddings_pipeline.errors import ConfigurationError
from embeddings_pipeline.orchestration.component import definitions_below
from embeddings_pipeline.orchestration.instance.home import project_instance
from embeddings_pipeline_tests.support.command_line import PROJECT, run_process
from embeddings_pipeline_tests.support.workbench import films, make_films


@pytest.mark.parametrize("home", [".", "state", "/nonexistent", "~nobody-of-that-name"])
def test_a_home_that_is_relative_or_not_there_is_one_line(monkeypatch, home: str) -> None:
    monkeypatch.setenv("DAGSTER_HOME", home)
    with pytest.raises(ConfigurationError) as refused:
        load_settings()
    assert home in str(refused.value) and "\n" not in str(refused.value)


OURS = (PROJECT / "dagster.yaml").read_text().partition("\n\n")[2].partition("\n\n")[0]


@pytest.mark.parametrize("content", [None, "", "# nothing\n", "{}", "storage:\n", "telemetry: {enabled: false}\n"])
def test_a_home_where_dagster_would_make_a_storage_of_its_own_is_one_line(monkeypatch, tmp_path: Path, content) -> None:
    if content is not None:
        (tmp_path / "dagster.yaml").write_text(content)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"DAGSTER_HOME|that this package comes with") as refused:
        project_instance().__enter__()
    assert str(refused.value).startswith(str(tmp_path)) and "\n" not in str(refused.value)
    for load in (defs, lambda: definitions_below(tmp_path)):  # what `dagster dev` and `dg dev` load there
        with pytest.raises(ConfigurationError) as not_loaded:
            load()
        assert str(not_loaded.value) == str(refused.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_home_counts_as_none(monkeypatch, project: Settings) -> None:
    monkeypatch.setenv("DAGSTER_HOME", "")
    monkeypatch.chdir(PROJECT)
    with project_instance():
        assert os.environ["DAGSTER_HOME"] == str(PROJECT)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("storage: [oops\n", "expected ',' or ']'"),
        ("storag: {}\n", "storag"),
        ("storage: {custom: {module: embeddings_pipeline.gone, class: X, config: {}}}\n", "embeddings_pipeline.gone"),
        (f"{OURS}\nrun_launcher: {{module: embeddings_pipeline.errors, class: Gone}}\n", "Gone"),
        (f"{OURS}\ncompute_logs: {{module: embeddings_pipeline.gone, class: X}}\n", "embeddings_pipeline.gone"),
        (f"{OURS}\ntelemetry: yes please\n", "telemetry"),
        (b"storage: \xff\xfe\n", "dagster.yaml"),
    ],
)
def test_a_broken_dagster_yaml_is_named_in_one_line(
    monkeypatch, project: Settings, tmp_path: Path, content: str | bytes, said
) -> None:
    data = content.encode() if isinstance(content, str) else content
    (tmp_path / "dagster.yaml").write_bytes(data)
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    with pytest.raises(ConfigurationError) as refused, project_instance():
        pass
    message = str(refused.value)
    assert message.startswith(str(tmp_path / "dagster.yaml")) and said in message and "\n" not in message


@pytest.mark.parametrize(("name", "value"), [("EMBEDDINGS_KEEP_DAYS", "a month"), ("EMBEDDINGS_KEEP_DAYS", "-1")])
def test_a_number_that_is_none_is_one_line(monkeypatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=f"{name} cannot be '{value}': "):
        load_settings()


def test_an_env_file_that_is_not_text_is_one_line(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"LAKE_URI=\xff\n")
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"\.env cannot be read .*: write it as UTF-8"):
        load_settings()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    settings = Settings(embeddings_state_dir=tmp_path / "a file" / "state")
    with pytest.raises(OSError) as error:
        settings.state_dir.mkdir(parents=True)
    line = one_line(error.value)
    assert line is not None and str(tmp_path / "a file") in line and "EMBEDDINGS_STATE_DIR" in line
    assert one_line(OSError("of no file")) is None


DEFINITION = """
type: embeddings_pipeline.EmbeddingCollection
attributes:
  name: films
  source: {table: films, key: [id]}
  columns: [title]
  vectors: {base: "{title}"}
  profile:
    {name: t, provider: python, dimensions: 32,
     model: "embeddings_pipeline_tests.support.deterministic:DeterministicEncoder"}
"""


@pytest.mark.slow
def test_an_output_that_is_not_utf_8_gets_what_it_can_show(database, project, tmp_path: Path) -> None:
    make_films(database, [(1, "Amélie 東京", "", 0), *films(12)[1:]])
    (tmp_path / "defs" / "films").mkdir(parents=True)
    (tmp_path / "defs" / "films" / "defs.yaml").write_text(DEFINITION)
    environment = {**os.environ, "EMBEDDINGS_DEFS_DIR": str(tmp_path / "defs"), "DAGSTER_HOME": str(PROJECT)}
    assert run_process(("sync",), environment).returncode == 0

    def printed(*arguments: str, encoding: str) -> str:
        done = run_process(arguments, {**environment, "PYTHONIOENCODING": encoding})
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return done.stdout

    assert "Am?lie ??" in printed("search", "Amélie", encoding="ascii")
    [hit, *_] = json.loads(printed("search", "Amélie 東京", "--json", encoding="ascii"))
    assert hit["item"]["title"] == "Amélie 東京"
    assert "sync" in printed("--help", encoding="ascii")
