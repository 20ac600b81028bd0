"""`load`: a source table from a file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embeddings_pipeline.cli.console import JsonOption, pipeline_database, print_json, progress_bar, tell
from embeddings_pipeline.config.settings import load_settings
from embeddings_pipeline.errors import ConfigurationError
from embeddings_pipeline.wording import counted

if TYPE_CHECKING:
    from embeddings_pipeline.store.load import Loaded


def load(
    file: Annotated[Path, typer.Argument(help="A CSV (UTF-8, with a header) or Parquet file.")],
    table: Annotated[
        str | None, typer.Option(help="The table to create or to upsert into. Left out: it is called after the file.")
    ] = None,
    key: Annotated[list[str] | None, typer.Option(help="Its key column; again for a composite key.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Delete the rows that are there first.")] = False,
    chosen: Annotated[
        list[str] | None,
        typer.Option("--type", metavar="COLUMN=TYPE", help="The type of a new table's column; again for others."),
    ] = None,
    types: Annotated[bool, typer.Option("--types", help="Also show the type of each column.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Create or upsert a source table from a file: a stand-in for a database of your own."""
    from dataclasses import asdict

    from embeddings_pipeline.store.load import load_file
    from embeddings_pipeline.store.load_types import printable

    by_column = dict(map(_column_and_type, chosen or ()))
    database = pipeline_database(load_settings())
    with progress_bar(file.name, show=not as_json, unit="row") as progress:
        loaded = load_file(
            database,
            file,
            table,
            key=tuple(key or ("id",)),
            replace=replace,
            types=by_column,
            progress=progress,
        )
    if as_json:
        print_json(asdict(loaded))
        return
    deleted = f", {loaded.deleted:,} deleted first" if loaded.deleted else ""
    print(
        f"{loaded.table}: {counted(loaded.rows, 'row')}, {loaded.inserted:,} new, {loaded.updated:,} changed{deleted}"
    )
    if types:
        width = max(len(printable(name)) for name in loaded.types)
        for name, kind in loaded.types.items():
            print(f"  {printable(name):{width}}  {kind}")
    for note in [*loaded.notes, *([_decided(loaded)] if loaded.created and not types else [])]:
        tell(f"note: {note}")


def _column_and_type(choice: str) -> tuple[str, str]:
    column, equals, kind = choice.rpartition("=")
    if not (equals and column and kind.strip()):
        raise ConfigurationError(f"--type {choice}: write COLUMN=TYPE, such as --type zip=text")
    return column, kind.strip()


def _decided(loaded: "Loaded") -> str:
    """The types of a new table, in one line."""
    from embeddings_pipeline.store.load_types import printable

    by_type: dict[str, list[str]] = {}
    for name, kind in loaded.types.items():
        by_type.setdefault(kind, []).append(printable(name))
    texts = by_type.pop("text", [])
    told = [f"{kind}: {', '.join(names)}" for kind, names in by_type.items()]
    told += [f"text: {'the others' if told else 'all columns'}"] if texts else []
    return f"{loaded.table} is a new table ({'; '.join(told)}); --types shows each, --type COLUMN=TYPE decides"
