"""A `defs.yaml` with a mistake gets one line that names file, line, key and remedy."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from embeddings_pipeline.config.definition import CollectionAttributes
from embeddings_pipeline.config.loading import find_collection, load_collections
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.config.templates import RENDERING_RULES
from embeddings_pipeline.errors import ConfigurationError
from embeddings_pipeline_tests.support.workbench import definition

GOOD = """\
type: embeddings_pipeline.EmbeddingCollection
attributes:
  name: films
  source:
    table: films
    key: [id]
  columns: [title]
  vectors:
    base: "{title} | {overview}"
  items_per_batch: 1000
"""


def written(folder: Path, text: str, name: str = "films") -> Path:
    path = folder / name / "defs.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


MISTAKES = {
    # replaced → by, the line, what the message says
    "unknown key": ("  columns:", "  colums:", 7, ["colums", "did you mean 'columns'"]),
    "unknown key in source": ("    table:", "    tabel:", 5, ["source.tabel", "did you mean 'table'"]),
    "unknown top key": ("attributes:", "atributes:", 2, ["atributes", "did you mean 'attributes'"]),
    "mistyped type": ("EmbeddingCollection", "EmbedingCollection", 1, ["did you mean", "EmbeddingCollection"]),
    "mistyped package": ("embeddings_pipeline.", "embedings_pipeline.", 1, ["did you mean", "embeddings_pipeline."]),
    "missing type": ("type: embeddings_pipeline.EmbeddingCollection\n", "", 1, ["type: this key is missing"]),
    "missing source": ("  source:\n    table: films\n    key: [id]\n", "", 2, ["source: this key is missing"]),
    "missing name": ("  name: films\n", "", 2, ["name: this key is missing"]),
    "missing key": ("    key: [id]\n", "", 4, ["source.key: this key is missing", "identify an item"]),
    "empty key": ("[id]", "[]", 4, ["source", "`key:` needs at least one column"]),
    "key twice": ("[id]", "[id, id]", 6, ["source.key", "'id' stands there twice"]),
    "key of a number": ("[id]", "[1]", 6, ["source.key.0", "1 is not text"]),
    "bad name": ("name: films", "name: My Films", 3, ["'My Films' is not a collection name", "a-z, 0-9"]),
    "name is a number": ("name: films", "name: 5", 3, ["name: 5 is not text", "quotes"]),
    "reserved name": ("name: films", "name: films_item", 3, ["collide", "choose another"]),
    "name of a shared table": ("name: films", "name: batch", 3, ["collide", "choose another"]),
    "neither table nor query": ("    table: films\n", "", 4, ["source", "`table:` or `query:`"]),
    "both table and query": (
        "table: films",
        "table: films\n    query: SELECT 1",
        4,
        ["source", "`table:` or `query:`, and not both"],
    ),
    "blank table": ("table: films", 'table: " "', 5, ["source.table", "blank"]),
    "source is a text": (
        "  source:\n    table: films\n    key: [id]\n",
        "  source: films\n",
        4,
        ["source: 'films' is not a mapping"],
    ),
    "vectors empty": ('  vectors:\n    base: "{title} | {overview}"\n', "  vectors: {}\n", 2, ["`vectors:` needs"]),
    "vectors null": ('    base: "{title} | {overview}"\n', "", 8, ["vectors: None is not a mapping"]),
    "vectors a text": (
        '  vectors:\n    base: "{title} | {overview}"\n',
        '  vectors: "{title}"\n',
        8,
        ["vectors: '{title}' is not a mapping"],
    ),
    "template without column": ('"{title} | {overview}"', '"title"', 9, ["vectors.base", "at least one {column}"]),
    "open brace": ('"{title} | {overview}"', '"{title | overview}}"', 9, ["vectors.base", "brace"]),
    "bad vector name": ("    base:", "    Base Name:", 9, ["'Base Name' is not a vector name"]),
    "items_per_batch a text": ("items_per_batch: 1000", 'items_per_batch: "1000"', 10, ["'1000'", "1 to 100000"]),
    "items_per_batch zero": ("items_per_batch: 1000", "items_per_batch: 0", 10, ["items_per_batch: 0 is not"]),
    "items_per_batch true": ("items_per_batch: 1000", "items_per_batch: true", 10, ["items_per_batch: True is not"]),
    "items_per_batch 1.5": ("items_per_batch: 1000", "items_per_batch: 1.5", 10, ["items_per_batch: 1.5 is not"]),
    "items_per_batch null": ("items_per_batch: 1000", "items_per_batch:", 10, ["items_per_batch: None is not"]),
    "storage": ("items_per_batch: 1000", "storage: float16", 10, ["'float16' is not 'halfvec' or 'vector'"]),
    "profile a number": ("items_per_batch: 1000", "profile: 5", 10, ["profile: 5 is not a profile's name"]),
    "chunk a number": ("items_per_batch: 1000", "chunk: 500", 10, ["chunk: 500 is not a mapping"]),
    "chunk overlap": ("items_per_batch: 1000", "chunk: {characters: 100, overlap: 80}", 10, ["at most half"]),
    "chunk key": ("items_per_batch: 1000", "chunk: {character: 100}", 10, ["did you mean 'characters'"]),
    "time of day": ("items_per_batch: 1000", "automation: {daily_refresh: noon}", 10, ["'noon' is not a time of day"]),
    "time zone": (
        "items_per_batch: 1000",
        "automation: {timezone: Europe/Berln}",
        10,
        ["'Europe/Berln' is not a time zone", "did you mean 'Europe/Berlin'"],
    ),
    "hours": ("items_per_batch: 1000", "automation: {recent_every_hours: 25}", 10, ["25 is not a whole number from 1"]),
    "automation key": ("items_per_batch: 1000", "automation: {recent_day: 3}", 10, ["did you mean 'recent_days'"]),
    "quarantine share": ("items_per_batch: 1000", "quarantine: {error_percent: 200}", 10, ["from 0 to 100"]),
    "quarantine text": ("items_per_batch: 1000", "quarantine: {error_percent: much}", 10, ["error_percent"]),
    "index method": ("items_per_batch: 1000", "index: {method: hsnw}", 10, ["'hsnw' is not 'hnsw'"]),
    "columns twice": ("[title]", "[title, title]", 7, ["columns", "'title' stands there twice"]),
    "columns a mapping": ("[title]", "{title: 1}", 7, ["columns: {'title': 1} is not a list"]),
    "tab": ("    table:", "\ttable:", 5, ["not valid YAML", "spaces"]),
    "bad YAML": ("[id]", "[id", 7, ["not valid YAML"]),
    "a key twice": ("  name: films", "  name: films\n  name: movies", 4, ["name: this key stands there twice"]),
    "attributes null": (GOOD.partition("attributes:")[2], "\n", 2, ["name: this key is missing"]),
    "a bad value": ("name: films", "name: *films", 3, ["not valid YAML", "undefined alias"]),
    "not a mapping": (GOOD, "just a text\n", 1, ["type: this key is missing"]),
    "empty file": (GOOD, "", 1, ["the file is empty", "dg scaffold defs"]),
    "comments only": (GOOD, "# nothing yet\n", 1, ["the file is empty"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_names_file_line_key_and_remedy(tmp_path, mistake):
    old, new, line, says = MISTAKES[mistake]
    assert GOOD.count(old) == 1
    path = written(tmp_path, GOOD.replace(old, new))
    with pytest.raises(ConfigurationError) as error:
        load_collections(tmp_path)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{path}:{line}: "), message
    for part in says:
        assert part in message


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    written(tmp_path, GOOD).write_bytes(GOOD.replace("films", "fil\xe9").encode("latin-1"))
    with pytest.raises(ConfigurationError, match=r"defs.yaml: not valid YAML: 'utf-8' codec"):
        load_collections(tmp_path)


def test_two_collections_of_one_name_are_refused_with_both_files(tmp_path):
    first, second = written(tmp_path, GOOD, "a"), written(tmp_path, GOOD, "b")
    with pytest.raises(ConfigurationError, match="also defined in") as error:
        load_collections(tmp_path)
    assert str(first) in str(error.value) and str(second) in str(error.value)


def test_a_folder_that_is_not_there_is_named_with_its_setting(tmp_path):
    with pytest.raises(ConfigurationError, match=r"nowhere: there is no such folder; correct EMBEDDINGS_DEFS_DIR"):
        load_collections(tmp_path / "nowhere")


def test_a_file_that_is_a_link_into_a_hidden_folder_is_read_once(tmp_path):
    """As Kubernetes mounts a ConfigMap."""
    hidden = written(tmp_path, GOOD, "films/..2026_11_25")
    (tmp_path / "films/defs.yaml").symlink_to(hidden)
    assert load_collections(tmp_path)["films"].path == tmp_path / "films/defs.yaml"


def test_other_components_are_none_of_our_business(tmp_path):
    written(tmp_path, GOOD)
    written(tmp_path, "type: dagster.DefsFolderComponent\nwhatever: 1\n", "other")
    written(
        tmp_path, f"type: dagster.PythonScriptComponent\nattributes: {{}}\n---\n{GOOD}".replace("films", "two"), "two"
    )
    assert set(load_collections(tmp_path)) == {"films", "two"}


def test_a_key_may_be_one_text_and_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    written(tmp_path, "\ufeff" + GOOD.replace("[id]", "id"))
    assert load_collections(tmp_path)["films"].attributes.source.key == ("id",)


def test_the_collections_are_those_of_this_package_unless_a_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    assert set(load_collections(Settings().defs_dir)) == {"items"}
    written(tmp_path / "src/mine/defs", GOOD)
    assert set(load_collections(Settings(embeddings_defs_dir=Path("src/mine/defs")).defs_dir)) == {"films"}


def test_a_collection_is_found_by_name_or_there_are_suggestions(tmp_path):
    films, movies = definition("films"), definition("movies")
    assert find_collection({"films": films}, None) is films
    with pytest.raises(ConfigurationError, match=r"'film'; defined are: films, movies \(did you mean 'films'\?\)"):
        find_collection({"films": films, "movies": movies}, "film")


def test_the_command_line_shows_a_mistake_as_one_line_and_ends_with_1(tmp_path):
    path = written(tmp_path / "defs", GOOD.replace("columns:", "colums:"))
    environment = {**os.environ, "EMBEDDINGS_DEFS_DIR": str(tmp_path / "defs"), "DAGSTER_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "embeddings_pipeline", "search", "a thing", "-c", "films"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"error: {path}:7: colums: this key is not known (did you mean 'columns'?)\n"


DIFFERENT: dict[str, dict] = {
    "template": {"vectors": {"base": "{title} || {overview}"}},
    "another vector": {"vectors": {"base": "{title} | {overview}", "title": "{title}"}},
    "vector name": {"vectors": {"other": "{title} | {overview}"}},
    "chunk": {"chunk": {"characters": 500}},
    "overlap": {"chunk": {"characters": 500, "overlap": 10}},
    "key": {"source": {"table": "films", "key": ["id", "title"]}},
    "columns": {"columns": ["title"]},
}


def test_the_definition_hash_changes_with_what_turns_a_row_into_texts():
    hashes = {definition(**change).definition_hash for change in DIFFERENT.values()}
    assert len(hashes | {definition().definition_hash}) == len(DIFFERENT) + 1


@pytest.mark.parametrize(
    "change",
    [
        {"profile": "speed"},
        {"items_per_batch": 7},
        {"source": {"table": "films", "key": ["id"], "where": "revenue > 0"}},
        {"source": {"query": "SELECT * FROM films", "key": "id"}},
        {"storage": "vector"},
        {"index": {"method": "none"}},
        {"vectors": {"base": "{title} | {overview}"}},
    ],
)
def test_the_definition_hash_stays_with_what_does_not(change):
    assert definition(**change).definition_hash == definition().definition_hash


def test_the_definition_hash_changes_with_the_rules_of_rendering(monkeypatch):
    before = definition().definition_hash
    monkeypatch.setattr("embeddings_pipeline.config.definition.RENDERING_RULES", RENDERING_RULES + 1)
    assert definition().definition_hash != before


def test_the_definition_hash_is_the_same_in_every_version_of_the_same_rules():
    assert definition(columns=[]).definition_hash.hex() == "1353696ed68046aa1df5208db2f47685"


@pytest.mark.parametrize(
    ("written", "meant"), [("'04:00'", "04:00"), ("14:30", "14:30"), ("00:05", "00:05"), ("", None)]
)
def test_a_time_of_day_needs_no_quotes(tmp_path: Path, written: str, meant: str | None) -> None:
    text = GOOD.replace(
        "items_per_batch: 1000",
        f"automation: {{daily_refresh: {written}}}" if written else "automation:\n    daily_refresh:",
    )
    (tmp_path / "defs.yaml").write_text(text)
    [one] = load_collections(tmp_path).values()
    assert one.attributes.automation.daily_refresh == meant


OWN = "profile: {name: mine, provider: local, model: a/b, dimensions: 8}"
PROFILE_MISTAKES = {
    "unknown key": (OWN.replace("model:", "modell:"), 10, ["profile.modell", "did you mean 'model'"]),
    "wrong type": (OWN.replace("8", "'8'"), 10, ["profile.dimensions: '8' is not a whole number"]),
    "missing key": (OWN.replace("provider: local, ", ""), 10, ["profile.provider: this key is missing"]),
    "without a name": (OWN.replace("name: mine, ", ""), 10, ["profile.name: this key is missing"]),
    "in profiles": (
        "profiles:\n    mine:\n      provider: hugging\n      model: a/b\n      dimensions: 8",
        12,
        ["profiles.mine.provider: 'hugging' is not 'local', 'openai' or 'python'"],
    ),
    "a key of profiles": (
        "profiles:\n    mine: {provider: local, model: a/b, dimensions: 8, promt: x}",
        11,
        ["profiles.mine.promt", "query_prompt"],
    ),
}


@pytest.mark.parametrize("mistake", PROFILE_MISTAKES)
def test_a_mistake_in_a_profile_names_its_line_and_key_too(tmp_path: Path, mistake: str) -> None:
    new, line, says = PROFILE_MISTAKES[mistake]
    path = written(tmp_path, GOOD.replace("items_per_batch: 1000", new))
    with pytest.raises(ConfigurationError) as error:
        load_collections(tmp_path)
    assert str(error.value).startswith(f"{path}:{line}: ")
    for part in says:
        assert part in str(error.value)


def test_an_editor_gets_the_keys_of_profiles_from_the_schema() -> None:
    schema = CollectionAttributes.model_json_schema()
    keys = schema["$defs"]["Profile"]["properties"]
    assert {"name", "provider", "model", "dimensions", "query_prompt"} <= set(keys)
    assert keys["provider"]["enum"] == ["local", "openai", "python"]
    assert keys["query_prompt"]["description"].startswith("Put before each query.")
    assert "ProfileSettings" in str(schema["properties"]["profiles"])
    choices = {"$ref": "#/$defs/Profile"}
    assert choices in schema["properties"]["profile"]["anyOf"][0]["oneOf"]
