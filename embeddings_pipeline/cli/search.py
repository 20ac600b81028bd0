"""`search`: the items nearest in meaning."""

from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from embeddings_pipeline.cli.console import (
    CollectionOption,
    JsonOption,
    chosen_collection,
    json_of,
    print_cut,
    print_json,
    printable,
    start_database,
    waiting,
)
from embeddings_pipeline.config.settings import load_settings

if TYPE_CHECKING:
    from embeddings_pipeline.search.query import Hit


def search(
    query: Annotated[str, typer.Argument(help="What to look for, in words.")],
    k: Annotated[int, typer.Option("-k", min=1, max=1000, help="How many items.")] = 10,
    collection_name: CollectionOption = None,
    vector: Annotated[str | None, typer.Option(help="Which of the items' vectors; left out: the first.")] = None,
    faiss: Annotated[bool, typer.Option("--faiss", help="Ask the FAISS index instead of PostgreSQL.")] = False,
    profile: Annotated[
        str | None, typer.Option(help="Another model that `profile add` keeps; left out: the current one.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """The items nearest in meaning, best first, with their cosine."""
    settings = load_settings()
    definition = chosen_collection(collection_name)
    start_database(settings)
    from embeddings_pipeline.search.query import nothing_found
    from embeddings_pipeline.search.query import search as run_search

    index: Literal["faiss", "pgvector"] = "faiss" if faiss else "pgvector"
    with waiting("loading the model"):
        hits = run_search(definition, settings, query, k=k, vector_name=vector, index=index, profile=profile)
    if as_json:
        print_json([vars(hit) for hit in hits])
        return
    for hit in hits:
        print_hit(hit, definition.attributes.columns)
    if not hits:
        print(printable(nothing_found(definition, settings)))


def print_hit(hit: "Hit", columns: Sequence[str]) -> None:
    """Score, key and first column of the payload, then the rest and the text that was near, cut to the terminal."""
    payload = [(column, hit.item.get(column)) for column in columns]
    shown = [_shown(*each) for each in payload if each[1] is not None]
    first, rest = shown[:1], [*shown[1:], printable(hit.text)]
    print_cut("  ".join([f"{hit.score:.3f}", printable(hit.item_key), *first]), " · ".join(["", *rest]))


def _shown(column: str, value: object) -> str:
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):  # says nothing without its name
        return f"{column} {value}"
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return printable(", ".join(value))
    return printable(value if isinstance(value, str) else json_of(value))
