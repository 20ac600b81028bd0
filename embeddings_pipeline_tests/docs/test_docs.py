"""The docs say what the code says: names, numbers of rules, keys and files that they mention are there."""

import ast
import inspect
import re
import runpy
from pathlib import Path

import dagster as dg
import pytest
import yaml

from embeddings_pipeline import errors
from embeddings_pipeline.config.definition import CollectionAttributes
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.definitions import defs
from embeddings_pipeline.store.sql import load_sql

PROJECT = Path(__file__).parents[2]
DOCS = PROJECT / "docs"
PACKAGE = PROJECT / "embeddings_pipeline"
PAGES = [PROJECT / "README.md", *sorted(DOCS.rglob("*.md"))]
TYPE = "type: embeddings_pipeline.EmbeddingCollection"


def read(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def named_in_code() -> set[str]:
    """Every function, class and constant of the package."""
    names: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Assign):
                names |= {name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return names


def test_the_generated_reference_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    generate = runpy.run_path(str(DOCS / "generate_reference.py"))
    assert generate["main"](["--check"]) == 0, capsys.readouterr().out


def test_every_rule_that_code_cites_is_in_the_architecture() -> None:
    rules = set(re.findall(r"^### Rule (\d+):", read("architecture.md"), re.MULTILINE))
    assert rules == {str(n) for n in range(1, 16)}
    sources = [*PACKAGE.rglob("*.py"), *(PROJECT / "sql").rglob("*.sql")]
    cited = {
        n for path in sources for n in re.findall(r"\brule (\d+)", path.read_text(encoding="utf-8"), re.IGNORECASE)
    }
    assert cited and cited <= rules


def test_find_it_fast_names_what_is_there() -> None:
    table = read("architecture.md").split("## Find it fast")[1].split("## Glossary")[0]
    rows = [line.split("|")[3] for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    known = named_in_code()
    for row in rows:
        for part in row.split(";"):
            place, _, names = part.rpartition(": ")
            file = re.search(r"`(sql/\w+)\.sql`", place)
            for name in re.findall(r"`(\w+)`", names):
                assert load_sql(f"{file[1].removeprefix('sql/')}/{name}") if file else name in known, (row, name)


def test_every_file_of_sql_is_in_the_architecture() -> None:
    table = read("architecture.md").split("## Where SQL is")[1].split("## State")[0]
    named = set(re.findall(r"`sql/(\w+)\.sql`", table))
    assert named == {path.stem for path in (PROJECT / "sql").glob("*.sql")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_of_the_project_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    rooms = "|".join(folder.name for folder in PACKAGE.iterdir() if folder.is_dir() and folder.name[0] != "_")
    for name in re.findall(rf"`((?:sql|examples|docs|{rooms})/[\w./]*)`", text):
        assert (PROJECT / name).exists() or (PACKAGE / name).exists(), (page.name, name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_whole_definitions_in_a_page_are_valid(page: Path) -> None:
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        if block.startswith(TYPE):
            assert CollectionAttributes.model_validate(yaml.safe_load(block)["attributes"]).name


def test_the_launchpad_that_a_page_shows_is_what_the_job_takes() -> None:
    [block] = re.findall(r"```yaml\n(ops:.*?)```", read("how-to/fresh-within-seconds.md"), re.DOTALL)
    job = defs().get_repository_def().get_job("items_live")
    assert dg.validate_run_config(job, yaml.safe_load(block))["ops"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_start_commands_in_one_way(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace(". .venv/bin/activate", "")
    assert ".venv/bin" not in text and "-m embeddings_pipeline " not in text


def test_every_setting_is_in_the_reference() -> None:
    documented = set(re.findall(r"`([A-Z_]+)`", read("reference/environment.md")))
    assert {name.upper() for name in Settings.model_fields} <= documented


def test_every_error_is_in_the_reference() -> None:
    raised = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}
    assert set(re.findall(r"^\| `(\w+)` \|", read("reference/errors.md"), re.MULTILINE)) == raised


def test_everything_of_a_collection_that_dagster_shows_is_in_the_reference() -> None:
    repository = defs().get_repository_def()
    shown = {key.to_user_string() for key in repository.asset_graph.get_all_asset_keys()}
    shown |= {key.name for key in repository.asset_graph.asset_check_keys}
    shown |= {job.name for job in repository.get_all_jobs() if not job.name.startswith("__")}
    shown |= {sensor.name for sensor in repository.sensor_defs} | {one.name for one in repository.schedule_defs}
    assert shown <= set(re.findall(r"`([\w/]+)`", read("reference/dagster.md")))


def test_every_launchpad_setting_is_in_the_reference() -> None:
    defs()
    ours = [one for one in dg.Config.__subclasses__() if one.__module__.startswith("embeddings_pipeline.")]
    settings = {name for one in ours for name in one.model_fields}
    assert settings and settings <= set(re.findall(r"`(\w+)`", read("reference/dagster.md")))
