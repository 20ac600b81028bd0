"""What Dagster does not promise is imported in one module."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import embeddings_pipeline
from embeddings_pipeline.orchestration import dagster_internals

PACKAGES = ("dagster_postgres", "dagster_shared", "dagster_graphql", "dagster_webserver")


def private_imports(path: Path) -> Iterator[str]:
    """The modules of Dagster that a file imports and whose names, or whose package, are not for users."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = [name.name for name in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            modules = [f"{node.module}.{name.name}" for name in node.names]
        for module in modules:
            package, *parts = module.split(".")
            if package in PACKAGES or (package == "dagster" and any(part.startswith("_") for part in parts)):
                yield module


@pytest.mark.parametrize("package", ["embeddings_pipeline", "embeddings_pipeline_tests"])
def test_only_one_module_of_a_package_imports_what_dagster_does_not_promise(package: str) -> None:
    root = Path(embeddings_pipeline.__file__).parents[1] / package
    importing = {path.name for path in root.rglob("*.py") if list(private_imports(path))}
    assert importing == {"dagster_internals.py"}


def test_a_private_import_is_seen_however_it_is_written(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import dagster._core.events\n"
        "from dagster import _check\n"
        "from dagster_postgres import PostgresRunStorage\n"
        "def late():\n    from dagster._utils import touch_file\n"
        "import dagster as dg\nfrom dagster import RunsFilter\n"
    )
    assert len(list(private_imports(script))) == 4


def test_it_imports_nothing_that_nobody_uses() -> None:
    room = Path(dagster_internals.__file__).parent
    text = "".join(
        path.read_text(encoding="utf-8") for path in room.rglob("*.py") if path.name != "dagster_internals.py"
    )
    assert [name for name in dagster_internals.__all__ if name not in text] == []
