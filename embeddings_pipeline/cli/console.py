"""What the commands share: their options, what they open, and what they print."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embeddings_pipeline.config.settings import Settings, load_settings
from embeddings_pipeline.errors import ConfigurationError

if TYPE_CHECKING:
    from embeddings_pipeline.config.definition import CollectionDefinition
    from embeddings_pipeline.store.database import Database

CollectionOption = Annotated[str | None, typer.Option("--collection", "-c", help="Left out: the only one, or `items`.")]
EachCollectionOption = Annotated[str | None, typer.Option("--collection", "-c", help="Left out: each one.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before it starts.")]


def pipeline_database(settings: Settings) -> "Database":
    """The pipeline's database, with its schema."""
    from embeddings_pipeline.store.database import open_database
    from embeddings_pipeline.store.schema import ensure_schema

    database = open_database(settings)
    ensure_schema(database)
    return database


def chosen_collection(name: str | None) -> "CollectionDefinition":
    """The collection of that name; without a name, the only one or `items`."""
    from embeddings_pipeline.config.loading import find_collection, load_collections

    return find_collection(load_collections(load_settings().defs_dir), name)


def chosen_collections(name: str | None) -> "list[CollectionDefinition]":
    """The collection of that name; without a name, each one."""
    from embeddings_pipeline.config.loading import find_collection, load_collections

    collections = load_collections(load_settings().defs_dir)
    if name is None and collections:
        return list(collections.values())
    return [find_collection(collections, name)]


def confirm(question: str, otherwise: str) -> None:
    """Ask, and end unless the answer is yes. ConfigurationError, saying `otherwise`, if there is nobody to ask."""
    if not sys.stdin.isatty():
        raise ConfigurationError(otherwise)
    typer.confirm(question, abort=True, err=True)


@contextmanager
def progress_bar(name: str, *, show: bool) -> Iterator[Callable[[str, int, int], None]]:
    """`progress(phase, done, total)` for long work; a bar in batches if stderr is a terminal."""
    if not show or not sys.stderr.isatty():
        yield lambda phase, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("batches")]
    columns += [TimeElapsedColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"{name}: starting", total=None)
        yield lambda phase, done, total: bar.update(
            task, description=f"{name}: {phase}", completed=done, total=total or None
        )


def print_json(value: Any) -> None:
    """One JSON document; what JSON has no form for, such as a time, as text."""
    print(json.dumps(value, ensure_ascii=False, default=str))


def size(count: int) -> str:
    """A number of bytes for people."""
    sign, count = ("-" if count < 0 else ""), abs(count)
    return f"{sign}{count / 1e9:.1f} GB" if count >= 1e9 else f"{sign}{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """A length of time for people."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
