"""`collection …`: which there are, giving one another name, and removing one."""

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embeddings_pipeline.cli.console import (
    JsonOption,
    YesOption,
    about_undefined,
    confirm,
    database_to_read,
    defined_collections,
    pipeline_database,
    print_json,
    printable,
    size,
    tell,
    warn_of_mistakes,
)
from embeddings_pipeline.config.settings import load_settings
from embeddings_pipeline.errors import ConfigurationError, RefusedError, did_you_mean
from embeddings_pipeline.wording import counted

if TYPE_CHECKING:
    from embeddings_pipeline.config.definition import CollectionDefinition
    from embeddings_pipeline.config.loading import Defined
    from embeddings_pipeline.pipeline.inventory import Inventory

app = typer.Typer(
    help="Collections: which there are, renaming one, and removing one.", no_args_is_help=True, suggest_commands=False
)

RELOAD = "If Dagster is running, reload its definitions now (Deployment → Reload): it still knows the former ones."


@app.command("list")
def list_collections(as_json: JsonOption = False) -> None:
    """Every collection that is defined, or that the database knows."""
    from embeddings_pipeline.pipeline.inventory import empty_inventory, known_collections, take_inventory
    from embeddings_pipeline.store.database import was_used

    settings, defined = load_settings(), _defined()
    names = dict.fromkeys(defined.collections)
    if was_used(settings):
        database = database_to_read(settings)
        names |= dict.fromkeys(known_collections(database))
        kept = [take_inventory(database, settings, name) for name in names]
    else:
        kept = [empty_inventory(name) for name in names]
    if as_json:
        print_json([_as_dict(each, defined.collections.get(each.name)) for each in kept])
        return
    for each in kept:
        figures = f"{each.items:>11,} items  {each.vectors:>11,} vectors  {size(each.bytes):>10}"
        print(f"{each.name:<20} {figures}  {each.profile or '-':<10} {printable(_state(each, defined))}".rstrip())
    if not names:
        print("there is no collection; `dg scaffold defs embeddings_pipeline.EmbeddingCollection` defines one")


def _as_dict(kept: "Inventory", definition: "CollectionDefinition | None") -> dict[str, Any]:
    return {**asdict(kept), "bytes": kept.bytes, "defined_in": definition.path if definition else None}


def _state(kept: "Inventory", defined: "Defined") -> str:
    if kept.renamed_from:
        return f"being renamed: `collection rename {kept.renamed_from} {kept.name}` finishes it"
    if kept.name not in defined.collections:
        return about_undefined(kept.name, defined)
    return "" if kept.in_database else "not synced yet"


@app.command()
def remove(
    name: Annotated[str, typer.Argument(help="The collection.")], yes: YesOption = False, as_json: JsonOption = False
) -> None:
    """Drop all that is kept of a collection: vectors, texts, ledger, lake, indexes. Your own tables stay."""
    from embeddings_pipeline.orchestration.collections import partition_keys, remove_everywhere
    from embeddings_pipeline.orchestration.runner import open_instance
    from embeddings_pipeline.pipeline.inventory import known_collections, take_inventory

    settings, defined = load_settings(), _defined()
    definition = defined.collections.get(name)
    database = pipeline_database(settings)
    with open_instance() as instance:
        kept, batches = take_inventory(database, settings, name), len(partition_keys(instance, name))
        if not kept.exists and not batches:
            known = known_collections(database)
            raise ConfigurationError(f"nothing is kept of a collection {name!r}{did_you_mean(name, known)}")
        if definition is None and defined.mistakes:
            raise RefusedError(f"{name}: {about_undefined(name, defined)}; nothing was removed")
        if not yes:
            print(_description(kept, batches), file=sys.stderr)
            if definition is None:
                tell(f"No defs.yaml in {settings.defs_dir} defines it.")
            confirm(f"Remove {name}?", "there is no terminal to ask on: give --yes to remove it")
        remove_everywhere(database, settings, kept, instance)
    if as_json:
        print_json({**_as_dict(kept, definition), "partition_keys": batches})
    else:
        print(
            f"{name}: removed, {counted(kept.items, 'item')} and {counted(kept.vectors, 'vector')}, {size(kept.bytes)}"
        )
    if definition is not None:
        print(f"Delete {definition.path} as well: the next sync would make it anew.", file=sys.stderr)
    print(RELOAD, file=sys.stderr)


def _description(kept: "Inventory", batches: int) -> str:
    """What a removal drops, and what it leaves."""
    relations = [f"embeddings.{name}" for name in (*kept.tables, *kept.views)]
    lines = [
        f"{kept.name}: {counted(kept.items, 'item')}, {counted(kept.vectors, 'vector')}, {size(kept.bytes)}. "
        "This drops",
        f"  in the database   {', '.join(relations) or 'nothing'} ({size(kept.database_bytes)}),",
        "                    and its rows in the tables that all collections share",
        f"  in the lake       {kept.lake or 'nothing'} ({size(kept.lake_bytes)})",
        f"  FAISS             {kept.faiss or 'nothing'} ({size(kept.faiss_bytes)})",
        f"  in Dagster        {counted(batches, 'partition key')}",
    ]
    if kept.user_columns:
        columns = ", ".join(kept.user_columns)
        lines.append(f"Your own table stays as it is, with its vectors, its indexes and its column: {columns}")
    return "\n".join(lines)


@app.command()
def rename(
    name: Annotated[str, typer.Argument(help="The collection.")],
    new: Annotated[str, typer.Argument(help="Its new name.")],
    as_json: JsonOption = False,
) -> None:
    """Give a collection another name, in the database, the lake, the indexes, Dagster and its defs.yaml."""
    from embeddings_pipeline.config.definition import collection_name
    from embeddings_pipeline.orchestration.collections import rename_everywhere

    try:
        collection_name(new)
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    if new == name:
        raise ConfigurationError(f"{name!r} is its name already")
    settings, defined = load_settings(), _defined(of=name).collections
    if name in defined and new in defined:
        raise RefusedError(f"a collection {new!r} is defined in {defined[new].path}; choose another name")
    rename_everywhere(pipeline_database(settings), settings, name, new, defined.get(name))
    if as_json:
        print_json({"collection": new, "renamed_from": name})
    else:
        print(f"{name}: is now called {new}. The sensor and the schedules of {new} are off until you switch them on.")
    if name not in defined and new not in defined:
        print(f"No defs.yaml defines it: write one with `name: {new}`.", file=sys.stderr)
    print(RELOAD, file=sys.stderr)


def _defined(of: str | None = None) -> "Defined":
    """What is defined. ConfigurationError if `of` is not among them, but may be in a file that has a
    mistake; other mistakes are told.
    """
    defined = defined_collections()
    if of is not None and of not in defined.collections and defined.mistakes:
        defined.find(of)
    warn_of_mistakes(defined)
    return defined
