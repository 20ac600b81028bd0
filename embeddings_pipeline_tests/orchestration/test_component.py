"""A second collection is a second `defs.yaml` and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
import yaml

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.loading import load_collections
from embeddings_pipeline.errors import ConfigurationError
from embeddings_pipeline.orchestration.component import definitions_below
from embeddings_pipeline.orchestration.sync import sync
from embeddings_pipeline.search.query import search
from embeddings_pipeline_tests.support.workbench import PROFILE, committed, execute, sync_once

TITLES = """\
type: embeddings_pipeline.EmbeddingCollection
attributes:
  name: titles
  source:
    table: catalogue
    key: [tmdb_id, media_type]
    where: is_removed = false
  columns: [headline, "Release Date", tags]
  vectors:
    base: "{headline} ({Release Date}) | {plot} | {tags}"
    headline: "{headline}"
  items_per_batch: 4
"""

CREDITS = """\
type: embeddings_pipeline.EmbeddingCollection
attributes:
  name: credits
  source:
    query: |
      SELECT c.tmdb_id || '-' || c.media_type AS id, c.headline,
             coalesce(p.people, 'nobody') AS people, 100 * 0.5 AS "50%"
      FROM catalogue c
      LEFT JOIN (SELECT tmdb_id, media_type, string_agg(name, ', ' ORDER BY name) AS people
                 FROM person GROUP BY 1, 2) p USING (tmdb_id, media_type)
      WHERE c.headline NOT LIKE '%;--%'; -- each title once
    key: id
  columns: [headline, people, 50%]
  vectors:
    people: "{headline} with {people}"
"""


@pytest.fixture
def catalogue(database):
    """Ten titles, five of them films, one removed; people of the first."""
    execute(
        database,
        """CREATE TABLE catalogue (tmdb_id bigint, media_type text, headline text, plot text, "Release Date" date,
               tags text[], is_removed boolean NOT NULL DEFAULT false, PRIMARY KEY (tmdb_id, media_type))""",
    )
    execute(
        database,
        """INSERT INTO catalogue SELECT n / 2, CASE n %% 2 WHEN 0 THEN 'movie' ELSE 'tv' END, 'Headline ' || n,
               'A plot of number ' || n, date '2000-01-01' + n, ARRAY['tag' || n], n = 9
           FROM generate_series(0, 9) n""".replace("%%", "%"),
    )
    execute(database, "CREATE TABLE person (tmdb_id bigint, media_type text, name text)")
    execute(database, "INSERT INTO person VALUES (0, 'movie', 'Zoë'), (0, 'movie', 'Al Pacino')")
    return database


def write(folder: Path, **documents: str) -> Path:
    """A defs folder with a `defs.yaml` for each document, all with the deterministic encoder."""
    for name, text in documents.items():
        (folder / name).mkdir(parents=True)
        profile = f"  profile: {json.dumps(PROFILE)}\n"
        (folder / name / "defs.yaml").write_text(text + profile, encoding="utf-8")
    return folder


def collections(folder: Path) -> dict[str, CollectionDefinition]:
    return load_collections(write(folder / "defs", titles=TITLES, credits=CREDITS))


def test_a_composite_key_with_a_condition_is_committed_with_item_keys_as_json_arrays(catalogue, settings, tmp_path):
    titles = collections(tmp_path)["titles"]
    assert sync_once(titles, settings)[1] == 18
    rows = committed(catalogue, "titles")
    assert {tuple(json.loads(key)) for key in rows} == {(str(n // 2), ("movie", "tv")[n % 2]) for n in range(9)}
    assert '["0", "tv"]' in rows
    texts = execute(
        catalogue, 'SELECT vector_name, text FROM embeddings.titles WHERE item_key = \'["0", "tv"]\' ORDER BY 1'
    )
    assert texts == [("base", "Headline 1 (2000-01-02) | A plot of number 1 | tag1"), ("headline", "Headline 1")]
    assert rows['["0", "tv"]'][2] == {"headline": "Headline 1", "Release Date": "2000-01-02", "tags": ["tag1"]}


def test_rows_that_stop_meeting_the_condition_lose_their_vectors_and_get_them_back(catalogue, settings, tmp_path):
    titles = collections(tmp_path)["titles"]
    sync_once(titles, settings)
    execute(catalogue, "UPDATE catalogue SET is_removed = true WHERE tmdb_id = 0 AND media_type = 'tv'")
    assert sync_once(titles, settings, "second")[1] == 0
    assert '["0", "tv"]' not in committed(catalogue, "titles") and len(committed(catalogue, "titles")) == 8
    execute(catalogue, "UPDATE catalogue SET is_removed = false WHERE tmdb_id = 0 AND media_type = 'tv'")
    sync_once(titles, settings, "third")
    assert len(committed(catalogue, "titles")) == 9


def test_a_query_with_a_join_is_a_source_and_follows_both_tables(catalogue, settings, tmp_path):
    credits = collections(tmp_path)["credits"]
    assert sync_once(credits, settings)[1] == 10
    rows = committed(catalogue, "credits")
    assert rows["0-movie"][0] == "Headline 0 with Al Pacino, Zoë"
    assert rows["0-tv"][0] == "Headline 1 with nobody"
    assert rows["0-tv"][2] == {"headline": "Headline 1", "people": "nobody", "50%": 50.0}
    execute(catalogue, "INSERT INTO person VALUES (0, 'tv', 'Judi Dench')")
    assert sync_once(credits, settings, "second")[1] == 1
    assert committed(catalogue, "credits")["0-tv"][0] == "Headline 1 with Judi Dench"


def test_a_second_collection_is_synced_by_dagster_and_searched(catalogue, settings, tmp_path, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", catalogue.url)
    monkeypatch.setenv("EMBEDDINGS_STATE_DIR", str(settings.state_dir))
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    found = collections(tmp_path)
    with dg.DagsterInstance.ephemeral() as instance:
        done = {name: sync(one, settings, instance=instance) for name, one in found.items()}
        again = sync(found["titles"], settings, instance=instance)
        partitions = instance.get_dynamic_partitions("titles_batches")
    assert (done["titles"].scanned, done["titles"].new, done["titles"].embedded) == (9, 9, 18)
    assert (done["credits"].scanned, done["credits"].embedded) == (10, 10)
    assert (again.embedded, again.new, again.changed) == (0, 0, 0)
    assert partitions == ["000000", "000001", "000002"]
    hit = search(found["titles"], settings, "Headline 4", k=1, vectors="headline")[0]
    assert (hit.item_key, hit.item["headline"]) == ('["2", "movie"]', "Headline 4")
    for index in ("pgvector", "faiss"):
        hit = search(found["credits"], settings, "Headline 0 with Al Pacino, Zoë", k=1, index=index)[0]
        assert (hit.item_key, round(hit.score, 2)) == ("0-movie", 1.0)


# --- in Dagster --------------------------------------------------------------------------------------------------

ASSETS = {"item_ledger", "raw_items", "item_texts", "embeddings_32", "pgvector_table"}
PHASES = ("expand", "backfill", "swap", "contract")
ASSETS |= {"pgvector_index", "faiss_index", "map", "audit"}


def test_each_collection_has_its_name_as_prefix_and_group_and_only_items_has_none(tmp_path):
    items = TITLES.replace("name: titles", "name: items")
    definitions = definitions_below(write(tmp_path, items=items, titles=TITLES, credits=CREDITS))
    graph = definitions.resolve_asset_graph()
    keys = {
        tuple(key.path): graph.get(key).group_name
        for key in graph.get_all_asset_keys()
        if graph.get(key).is_materializable
    }
    expected: dict[tuple[str, ...], str] = {(name,): "items" for name in ASSETS}
    expected |= {(group, name): group for group in ("titles", "credits") for name in ASSETS}
    prefixes: dict[str, tuple[str, ...]] = {"items": (), "titles": ("titles",), "credits": ("credits",)}
    expected |= {(*p, "migration", phase): f"{name}_migration" for name, p in prefixes.items() for phase in PHASES}
    assert keys == expected
    jobs = {job.name for job in definitions.resolve_all_job_defs()} - {"__ASSET_JOB"}
    assert jobs >= {
        f"{name}_{what}" for name in ("items", "titles", "credits") for what in ("scan", "batches", "index")
    }


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A Dagster project of somebody's, with this package installed: its folder, on sys.path."""
    name = f"project_{os.urandom(4).hex()}"
    (tmp_path / name / "defs").mkdir(parents=True)
    for folder in (tmp_path / name, tmp_path / name / "defs"):
        (folder / "__init__.py").touch()
    (tmp_path / "pyproject.toml").write_text(
        f'[project]\nname = "{name}"\nversion = "0"\n[tool.dg]\ndirectory_type = "project"\n'
        f'[tool.dg.project]\nroot_module = "{name}"\n'
    )
    (tmp_path / name / "definitions.py").write_text(
        "from pathlib import Path\nimport dagster as dg\n\n@dg.definitions\ndef defs():\n"
        "    return dg.load_from_defs_folder(path_within_project=Path(__file__).parent)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / name


def dg_command(project: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(project.parent), "COLUMNS": "200", **environment}
    command = [str(Path(sys.executable).with_name("dg")), *arguments]
    return subprocess.run(command, cwd=project.parent, env=environment, capture_output=True, text=True, check=False)


def test_a_project_that_has_the_package_installed_loads_its_own_collections(project):
    write(project / "defs", titles=TITLES, credits=CREDITS)
    definitions = dg.load_from_defs_folder(path_within_project=project)
    groups = {spec.group_name for spec in definitions.resolve_all_asset_specs()}
    assert groups == {"titles", "credits", "titles_migration", "credits_migration"}
    below = definitions_below(project / "defs")
    versions = [{spec.key: spec.code_version for spec in d.resolve_all_asset_specs()} for d in (definitions, below)]
    assert versions[0] == versions[1]


def causes(error: BaseException | None) -> str:
    said = []
    while error is not None:
        said.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(said)


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("items_per_batch: 4", 'items_per_batch: "4"', 12, "'4' is not a whole number from 1 to 100000"),
        ("columns:", "colums:", 8, "Extra inputs are not permitted"),
        ("table: catalogue", "query: SELECT 1", 4, ""),
        ('"{headline}"', '"headline"', 11, "needs at least one {column}"),
    ],
)
def test_loading_definitions_names_file_and_line_of_a_mistake(project, old, new, line, says):
    if old == "table: catalogue":
        old, new, says = "    table: catalogue\n", "", "it needs `table:` or `query:`"
    write(project / "defs", titles=TITLES.replace(old, new))
    with pytest.raises(Exception, match="titles") as error:
        dg.load_from_defs_folder(path_within_project=project)
    assert f"defs.yaml:{line}" in causes(error.value)
    assert says in causes(error.value)


def test_an_unknown_profile_is_named_with_its_file(project):
    (project / "defs/titles").mkdir()
    (project / "defs/titles/defs.yaml").write_text(TITLES + "  profile: minlm\n")
    with pytest.raises(Exception, match="titles") as error:
        dg.load_from_defs_folder(path_within_project=project)
    said = causes(error.value)
    assert f"{project}/defs/titles/defs.yaml: " in said and "did you mean 'minilm'?" in said


def test_two_collections_of_one_name_do_not_load(project):
    write(project / "defs", titles=TITLES, again=TITLES)
    with pytest.raises(Exception, match=r"titles") as error:
        dg.load_from_defs_folder(path_within_project=project).resolve_asset_graph()
    assert "titles" in causes(error.value) and "item_ledger" in causes(error.value)


def test_dg_check_yaml_names_the_line_of_a_mistake_and_nothing_else(project):
    write(project / "defs", titles=TITLES.replace("columns:", "colums:").replace(": 4", ': "4"'), credits=CREDITS)
    done = dg_command(project, "check", "yaml")
    assert done.returncode == 1
    assert "titles/defs.yaml:8 " in done.stdout + done.stderr and "colums" in done.stdout + done.stderr
    assert "titles/defs.yaml:12 " in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr and "credits" not in done.stdout + done.stderr


def test_the_default_collection_is_what_the_package_defines():
    document = yaml.safe_load((Path(__file__).parents[2] / "embeddings_pipeline/defs/items/defs.yaml").read_text())
    assert document["attributes"]["name"] == "items" and set(load_collections()) == {"items"}


def test_definitions_below_a_folder_with_a_mistake_are_one_line(tmp_path):
    write(tmp_path, titles=TITLES.replace("columns:", "colums:"))
    with pytest.raises(ConfigurationError, match=r"titles/defs.yaml:8: colums: .*did you mean 'columns'"):
        definitions_below(tmp_path)
