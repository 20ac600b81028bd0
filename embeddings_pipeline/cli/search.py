"""`search`: the items nearest in meaning."""

from dataclasses import asdict
from typing import Annotated, Literal

import typer

from embeddings_pipeline.cli.console import CollectionOption, JsonOption, chosen_collection, print_json
from embeddings_pipeline.config.settings import load_settings


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
    from embeddings_pipeline.search.query import search as run_search

    settings = load_settings()
    definition = chosen_collection(collection_name)
    index: Literal["faiss", "pgvector"] = "faiss" if faiss else "pgvector"
    hits = run_search(definition, settings, query, k=k, vector_name=vector, index=index, profile=profile)
    if as_json:
        print_json([asdict(hit) for hit in hits])
        return
    for hit in hits:
        payload = [(column, hit.item.get(column)) for column in definition.attributes.columns]
        print(
            f"{hit.score:.3f}  {' · '.join(_shown(*each) for each in payload if each[1] is not None) or hit.item_key}"
        )
    if not hits:
        print("nothing found: the collection has no vectors of that name")


def _shown(column: str, value: object) -> str:
    # A number says nothing without its name.
    return f"{column} {value}" if isinstance(value, int | float) else str(value)
