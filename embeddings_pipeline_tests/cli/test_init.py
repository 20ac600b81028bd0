"""`init`: a project of one's own that works at once, and the sample that steps back."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from embeddings_pipeline.cli.init import module_name
from embeddings_pipeline.config.definition import COMPONENT_TYPE
from embeddings_pipeline.config.loading import PACKAGE_DEFS, find_collection, load_collections, without_sample
from embeddings_pipeline.config.settings import Settings, load_settings
from embeddings_pipeline.errors import ConfigurationError
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.command_line import PROJECT, run_here
from embeddings_pipeline_tests.support.workbench import definition, films, make_films

LOADED = """
import sys
import dagster as dg
from dagster._core.workspace.load import location_origins_from_yaml_paths
[origin] = location_origins_from_yaml_paths(["workspace.yaml"])
sys.path.insert(0, origin.loadable_target_origin.working_directory)
module = __import__(origin.loadable_target_origin.module_name, fromlist=["defs"])
print(*sorted({spec.group_name for spec in module.defs().resolve_all_asset_specs()}))
"""


def test_a_project_of_ones_own_syncs_and_searches(
    database: Database, project: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "My shop"
    made = run_here(("init", str(folder)))
    assert made.returncode == 0 and made.stdout.startswith(f"{folder}: made. ")
    monkeypatch.setenv("DAGSTER_HOME", str(folder))
    assert load_settings().defs_dir == folder / "my_shop" / "defs"
    assert run_here(("sync",)).stderr.startswith("error: no collection is defined yet: `dg scaffold defs ")
    make_films(database, films(4))
    write(folder / "my_shop" / "defs", "films")
    assert "4 new" in run_here(("sync",)).stdout
    assert len(run_here(("search", "a story")).stdout.splitlines()) == 4
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-c", LOADED]
    groups = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout
    assert groups == "films films_migration\n"


def test_what_is_there_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "workspace.yaml").write_text("mine")
    refused = run_here(("init", str(tmp_path)))
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    assert "has workspace.yaml already, and nothing was written" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["workspace.yaml"]
    assert run_here(("init", " ")).stderr.startswith("error: the folder has no name")
    (tmp_path / "file").touch()
    assert run_here(("init", str(tmp_path / "file" / "below"))).stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("folder", "name"),
    [("My shop", "my_shop"), ("dagster", "project_dagster"), ("7", "project_7"), ("class", "project_class"),
     ("é", "project"), ("json", "project_json")],
)  # fmt: skip
def test_the_projects_package_has_a_name_that_nothing_else_has(folder: str, name: str) -> None:
    assert module_name(folder) == name


def test_docker_takes_two_projects_for_two_and_installs_what_is_named(tmp_path: Path) -> None:
    for folder in ("My shop", "a__b"):
        assert run_here(("init", str(tmp_path / folder))).returncode == 0
    shop, other = (yaml.safe_load((tmp_path / folder / "compose.yaml").read_text()) for folder in ("My shop", "a__b"))
    assert (shop["name"], shop["x-pipeline"]["image"], other["name"]) == ("my-shop", "my-shop", "a--b")
    dockerfile = (tmp_path / "My shop" / "Dockerfile").read_text()
    defaults = dict(re.findall(r"^ARG (\w+)=(.*)$", dockerfile, re.MULTILINE))
    assert defaults.keys() == {"PIPELINE", "TORCH_BACKEND"}
    for service in ("webserver", "daemon", "live", "serve"):
        build = shop["services"][service]["build"]
        assert build == {"context": ".", "args": {arg: f"${{{arg}:-{value}}}" for arg, value in defaults.items()}}
    ours = yaml.safe_load((PROJECT / "compose.yaml").read_text())
    assert (shop["services"]["daemon"]["environment"], shop["volumes"]) == (
        ours["services"]["daemon"]["environment"],
        ours["volumes"],
    )


def test_every_setting_reaches_the_containers() -> None:
    services = yaml.safe_load((PROJECT / "compose.yaml").read_text())["services"]
    of_the_image = {"EMBEDDINGS_STATE_DIR", "EMBEDDINGS_DEFS_DIR"}
    settings = {name.upper() for name in Settings.model_fields} - of_the_image
    assert settings <= services["serve"]["environment"].keys()
    for service in ("webserver", "daemon", "live"):
        given = services[service]["environment"]
        assert settings - {"SERVE_API_KEY"} <= given.keys() and not of_the_image & given.keys()


def write(defs: Path, name: str) -> None:
    config = definition(name).attributes.model_dump(exclude_defaults=True, mode="json")
    path = defs / name / "defs.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump({"type": COMPONENT_TYPE, "attributes": config}))


def test_the_sample_steps_back_for_ones_own_collections(tmp_path: Path) -> None:
    sample = load_collections(PACKAGE_DEFS)
    write(tmp_path, "films")
    both = {**sample, **load_collections(tmp_path)}
    assert list(without_sample(both)) == ["films"] and list(without_sample(sample)) == ["items"]
    assert find_collection(both, None).name == "films" and find_collection(both, "items").name == "items"
    write(tmp_path, "shows")
    three = {**sample, **load_collections(tmp_path)}
    assert set(without_sample(three)) == {"films", "shows"}
    with pytest.raises(ConfigurationError, match="which collection: films or shows"):
        find_collection(three, None)
    write(tmp_path, "items")  # one's own of that name
    assert find_collection(load_collections(tmp_path), None).path == tmp_path / "items" / "defs.yaml"
