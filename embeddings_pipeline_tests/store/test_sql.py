"""The statements of sql/: each file has one room that reads it, each statement a use, and says what is filled in."""

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path
from string import Formatter

import pytest

import embeddings_pipeline
from embeddings_pipeline.store.sql import load_sql

PACKAGE = Path(embeddings_pipeline.__file__).parent
SQL = PACKAGE.parent / "sql"
FILES = sorted(path.stem for path in SQL.glob("*.sql"))
RELATIONS = {
    "{words}",
    "{item}",
    "{text}",
    "{view}",
    "{vector}",
    "{written}",
    "{hash}",
    "{lacking}",
}  # store/sql.py
NAMED = re.compile(r"^-- name: (\w+)\n", re.MULTILINE)


@cache
def statements(file: str) -> dict[str, str]:
    names = NAMED.findall((SQL / f"{file}.sql").read_text(encoding="utf-8"))
    return {name: load_sql(f"{file}/{name}") for name in names}


def head(file: str) -> str:
    return NAMED.split((SQL / f"{file}.sql").read_text(encoding="utf-8"))[0]


def comments(text: str) -> str:
    return " ".join(re.findall(r"--(.*)", text))


def code(text: str) -> str:
    return re.sub(r"--.*", "", text)


def rooms() -> dict[str, tuple[set[str], set[str]]]:
    """The strings of each room's code, and the beginnings of its f-strings."""
    found: dict[str, tuple[set[str], set[str]]] = defaultdict(lambda: (set(), set()))
    for path in sorted(PACKAGE.rglob("*.py")):
        strings, beginnings = found[path.relative_to(PACKAGE).parts[0]]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.add(node.value)
            if isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
                beginnings.add(str(node.values[0].value))
    return found


@cache
def readers() -> dict[str, dict[str, set[str]]]:
    """File of sql/ → statement → the rooms whose code names it, as `file/statement` or by `f"file/{statement}"`."""
    found: dict[str, dict[str, set[str]]] = {file: defaultdict(set) for file in FILES}
    for room, (strings, beginnings) in rooms().items():
        for file in FILES:
            for name in statements(file):
                if f"{file}/{name}" in strings or (f"{file}/" in beginnings and name in strings):
                    found[file][name].add(room)
    return found


@pytest.mark.parametrize("file", FILES)
def test_a_file_is_read_by_one_room(file: str) -> None:
    reading = set().union(*readers()[file].values())
    assert len(reading) == 1, reading


@pytest.mark.parametrize("file", FILES)
def test_every_statement_is_used(file: str) -> None:
    assert set(statements(file)) == set(readers()[file])


@pytest.mark.parametrize("file", FILES)
def test_every_placeholder_and_parameter_is_said_in_a_comment(file: str) -> None:
    unsaid = []
    for name, text in statements(file).items():
        said = comments(head(file)) + comments(text)
        placeholders = {f"{{{field}}}" for _, field, *_ in Formatter().parse(code(text)) if field} - RELATIONS
        unsaid += [f"{name}: {placeholder}" for placeholder in placeholders if placeholder not in said]
        parameters = set(re.findall(r"%\((\w+)\)[sb]", code(text)))
        unsaid += [f"{name}: {parameter}" for parameter in parameters if not re.search(rf"\b{parameter}\b", said)]
    assert unsaid == []


def test_a_statement_that_is_not_there_is_an_error() -> None:
    with pytest.raises(KeyError):
        load_sql("work/nothing_of_that_name")
