"""`load`: a source table from a file."""

from pathlib import Path
from typing import Annotated

import typer

from embeddings_pipeline.cli.console import JsonOption, pipeline_database, print_json
from embeddings_pipeline.config.settings import load_settings


def load(
    file: Annotated[Path, typer.Argument(help="A CSV (UTF-8, with a header) or Parquet file.")],
    table: Annotated[str, typer.Option(help="The table to create or to upsert into.")] = "movies",
    key: Annotated[list[str] | None, typer.Option(help="Its key column; again for a composite key.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Delete the rows that are there first.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Create or upsert a source table from a file: a stand-in for a database of your own."""
    from embeddings_pipeline.store.load import load_file

    database = pipeline_database(load_settings())
    loaded = load_file(database, file, table, key=tuple(key or ("id",)), replace=replace)
    if as_json:
        print_json({"table": table, **loaded})
    else:
        print(f"{table}: {loaded['rows']:,} rows, {loaded['inserted']:,} new, {loaded['updated']:,} changed")
