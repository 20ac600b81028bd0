"""The command line. Each command prints for people, with --json for programs; errors are one line and exit 1."""

import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import psycopg
import typer

from embeddings_pipeline.cli.console import print_json, progress_bar
from embeddings_pipeline.cli.profile import app as profile_app
from embeddings_pipeline.config.settings import Settings, load_settings
from embeddings_pipeline.errors import ConfigurationError, PipelineError
from embeddings_pipeline.store.retry import what_it_says

if TYPE_CHECKING:
    from embeddings_pipeline.config.definition import CollectionDefinition
    from embeddings_pipeline.ledger.ledger import Ledger

app = typer.Typer(
    help="Keeps the embeddings of a table up to date, in PostgreSQL (pgvector) and in FAISS.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

CollectionOption = Annotated[str | None, typer.Option("--collection", "-c", help="Left out: the only one, or `items`.")]
EachCollectionOption = Annotated[str | None, typer.Option("--collection", "-c", help="Left out: each one.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def main() -> None:
    """Entry point: errors that a user can cause are one line on stderr."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for noisy in ("sentence_transformers", "transformers", "dagster", "alembic"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    logging.getLogger("embeddings_pipeline.health.alerts").setLevel(logging.CRITICAL)  # whoever types sees what fails
    try:
        app()
    except (PipelineError, psycopg.Error) as error:
        print(one_line(error), file=sys.stderr)
        raise SystemExit(1) from None
    except BrokenPipeError:  # the reader of our output has left: `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def one_line(error: BaseException) -> str | None:
    """What a user is told of an error that a user can cause; None for any other."""
    if isinstance(error, PipelineError):
        return f"error: {error}"
    return f"error: {what_it_says(error)}" if isinstance(error, psycopg.Error) else None


@app.command()
def load(
    file: Annotated[Path, typer.Argument(help="A CSV (UTF-8, with a header) or Parquet file.")],
    table: Annotated[str, typer.Option(help="The table to create or to upsert into.")] = "movies",
    key: Annotated[list[str] | None, typer.Option(help="Its key column; again for a composite key.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Delete the rows that are there first.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Create or upsert a source table from a file: a stand-in for a database of your own."""
    from embeddings_pipeline.store.load import load_file

    database = _database(load_settings())
    loaded = load_file(database, file, table, key=tuple(key or ("id",)), replace=replace)
    if as_json:
        print_json({"table": table, **loaded})
    else:
        print(f"{table}: {loaded['rows']:,} rows, {loaded['inserted']:,} new, {loaded['updated']:,} changed")


@app.command()
def sync(
    collection_name: EachCollectionOption = None,
    full: Annotated[
        bool, typer.Option("--full", help="Also compare every copy with the next, mend what differs, run every check.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Encode every text anew.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Encode at most this many texts.")] = None,
    allow_deletes: Annotated[
        bool, typer.Option("--allow-deletes", help="Also when more than 20 % of the items are gone.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Bring the vectors and the indexes up to date with the source."""
    from embeddings_pipeline.orchestration.sync import sync as run_sync

    settings = load_settings()
    results, failed = [], []
    collections = _collections(collection_name)
    for one in collections:
        try:
            with progress_bar(one.name, show=not as_json and not dry_run) as progress:
                result = run_sync(
                    one,
                    settings,
                    full=full,
                    force=force,
                    dry_run=dry_run,
                    limit=limit,
                    allow_deletes=allow_deletes,
                    progress=progress,
                )
        except PipelineError as error:  # the others are no worse for it
            if len(collections) == 1:
                raise
            print(f"error: {one.name}: {error}", file=sys.stderr)
            failed.append(one.name)
            continue
        results.append(asdict(result))
        if not as_json:
            print(_sync_line(asdict(result)))
    if as_json:
        print_json(results[0] if len(collections) == 1 else results)
    if failed:
        raise PipelineError(f"{len(failed)} of {len(collections)} collections were not synced: {', '.join(failed)}")


def _sync_line(done: dict[str, Any]) -> str:
    items = f"{done['scanned']:,} items scanned: {done['new']:,} new, {done['changed']:,} changed"
    if done["dry_run"]:
        return (
            f"{done['collection']}: dry run, nothing was written. {items}, {done['deleted']:,} gone; "
            f"{done['left']:,} texts to embed, {done['reused']:,} reused"
        )
    left = f", {done['left']:,} left for the next sync" if done["left"] else ""
    return (
        f"{done['collection']}: {items}, {done['deleted']:,} deleted; {done['embedded']:,} texts embedded, "
        f"{done['reused']:,} reused, {done['quarantined']:,} in quarantine{left}; {done['seconds']:.1f} s"
    )


@app.command()
def status(collection_name: EachCollectionOption = None, as_json: JsonOption = False) -> None:
    """What is there, what is missing, and which model made it."""
    from embeddings_pipeline.health.status import collection_status

    settings = load_settings()
    database = _database(settings)
    found = [collection_status(one, database, settings) for one in _collections(collection_name)]
    if as_json:
        print_json(found[0] if len(found) == 1 else found)
        return
    for one in found:
        print(_status_text(one))


def _status_text(found: dict[str, Any]) -> str:
    name = found["collection"]
    if found["fingerprint"] is None:
        return f"{name}: nothing is there yet; run `embeddings-pipeline sync --collection {name}`"
    faiss, indexes = found["faiss"], found["pgvector_index"]
    ann = ", ".join(f"{index['vector_name']} {index['method']}" for index in indexes) or "none"
    search = (
        f"generation {faiss['generation']}, {faiss['vectors']:,} vectors, {'current' if faiss['current'] else 'behind'}"
        if faiss["generation"]
        else "none"
    )
    return "\n".join(
        [
            f"{name}: {found['coverage']:.1%} covered",
            f"  items           {found['items']:,}  ({found['missing']:,} missing, {found['stale']:,} stale, "
            f"{found['quarantined']:,} texts in quarantine)",
            f"  vectors         {found['vectors']:,}  ({found['orphans']:,} orphans)",
            f"  dirty batches   {found['dirty_batches']:,}",
            f"  profile         {found['profile']}  (fingerprint {found['fingerprint']})",
            f"  pgvector index  {ann}",
            f"  FAISS index     {search}",
        ]
    )


@app.command()
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
    from embeddings_pipeline.config.loading import find_collection, load_collections
    from embeddings_pipeline.search.query import search as run_search

    settings = load_settings()
    one = find_collection(load_collections(settings.defs_dir), collection_name)
    index = "faiss" if faiss else "pgvector"
    hits = run_search(one, settings, query, k=k, vector_name=vector, index=index, profile=profile)  # type: ignore[arg-type]
    if as_json:
        print_json([asdict(hit) for hit in hits])
        return
    for hit in hits:
        there = [(column, hit.item[column]) for column in one.attributes.columns if hit.item.get(column) is not None]
        # A number says nothing without its name.
        values = [f"{column} {value}" if isinstance(value, int | float) else str(value) for column, value in there]
        print(f"{hit.score:.3f}  {' · '.join(values) or hit.item_key}")
    if not hits:
        print("nothing found: the collection has no vectors of that name")


app.add_typer(profile_app, name="profile", no_args_is_help=True)

quarantine = typer.Typer(help="Texts that failed by themselves: the model refused them or gave no usable vector.")
app.add_typer(quarantine, name="quarantine", no_args_is_help=True)

HashesArgument = Annotated[
    list[str] | None, typer.Argument(help="Content hashes, or their beginnings, as `list` shows them.")
]
AllOption = Annotated[bool, typer.Option("--all", help="Every text in quarantine.")]


@quarantine.command("list")
def quarantine_list(collection_name: EachCollectionOption = None, as_json: JsonOption = False) -> None:
    """What is in quarantine, why, and when it is tried again."""
    ledgers = _ledgers(collection_name)
    entries = {ledger.definition.name: ledger.quarantine_entries(every_model=True) for ledger in ledgers}
    if as_json:
        print_json([{"collection": name, **asdict(entry)} for name, found in entries.items() for entry in found])
        return
    for name, found in entries.items():
        if not found:
            print(f"{name}: nothing is in quarantine")
        for entry in found:
            again = f"tried again from {entry.next_try:%Y-%m-%d %H:%M %Z}" if entry.next_try else "given up"
            others = f" and {entry.items - 1:,} more items" if entry.items > 1 else ""
            item = f"item {entry.item_key}{others}" if entry.item_key is not None else "of no item any more"
            attempts = f"{entry.attempts} attempts with {entry.profile}"
            print(f"{name}  {entry.content_hash[:12]}  {item}, {attempts}, {again}")
            print(f"    {entry.reason}")
            print(f"    {_shortened(entry.text)}")


@quarantine.command("retry")
def quarantine_retry(
    hashes: HashesArgument = None, every: AllOption = False, collection_name: EachCollectionOption = None
) -> None:
    """Have texts tried again with the next sync, with as many attempts as a new one."""
    meant = _chosen(_ledgers(collection_name), hashes, every)
    count = sum(ledger.quarantine_retry(chosen) for ledger, chosen in meant)
    print(f"{count:,} texts are tried again with the next `embeddings-pipeline sync`")


@quarantine.command("clear")
def quarantine_clear(
    hashes: HashesArgument = None, every: AllOption = False, collection_name: EachCollectionOption = None
) -> None:
    """Forget texts: what still stands in an item is embedded as if it were new."""
    meant = _chosen(_ledgers(collection_name), hashes, every)
    count = sum(ledger.quarantine_clear(chosen) for ledger, chosen in meant)
    print(f"{count:,} texts are no longer in quarantine; those that items still have are embedded with the next sync")


def _chosen(ledgers: "list[Ledger]", hashes: list[str] | None, every: bool) -> "Iterator[tuple[Ledger, list[bytes]]]":
    """Each ledger with the content hashes that are meant. ConfigurationError where a beginning fits none."""
    if bool(hashes) == every:
        raise ConfigurationError("name content hashes as `quarantine list` shows them, or give --all")
    entries = [
        (ledger, sorted({entry.content_hash for entry in ledger.quarantine_entries(every_model=True)}))
        for ledger in ledgers
    ]
    for beginning in hashes or ():
        if not re.fullmatch(r"[0-9a-fA-F]{4,}", beginning):
            raise ConfigurationError(
                f"{beginning!r} is not the beginning of a content hash: give at least 4 of its digits"
            )
        if not any(known.startswith(beginning.lower()) for _, found in entries for known in found):
            raise ConfigurationError(f"no text in quarantine has a content hash that begins with {beginning!r}")
    for ledger, found in entries:
        meant = [h for h in found if every or any(h.startswith(beginning.lower()) for beginning in hashes or ())]
        if meant:
            yield ledger, [bytes.fromhex(h) for h in meant]


def _shortened(text: str, width: int = 100) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else f"{flat[: width - 1]}…"


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def psql(context: typer.Context) -> None:
    """psql on the pipeline's database; arguments are passed on: `psql -c 'select …'`."""
    from embeddings_pipeline.store.database import psql_command

    path, arguments, environment = psql_command(_database(load_settings()), context.args)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for psql's own prompt
    raise SystemExit(subprocess.run(arguments, executable=path, env=environment, check=False).returncode)


@app.command()
def ui(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 3000,
) -> None:
    """The Dagster UI: webserver and daemon, until Ctrl-C."""
    from embeddings_pipeline.cli.ui import run_ui

    raise SystemExit(run_ui(load_settings(), host, port))


def _ledgers(name: str | None) -> "list[Ledger]":
    from embeddings_pipeline.ledger.ledger import Ledger

    database = _database(load_settings())
    return [Ledger(collection, database) for collection in _collections(name)]


def _database(settings: Settings) -> Any:
    from embeddings_pipeline.store.database import open_database
    from embeddings_pipeline.store.schema import ensure_schema

    database = open_database(settings)
    ensure_schema(database)
    return database


def _collections(name: str | None) -> "list[CollectionDefinition]":
    from embeddings_pipeline.config.loading import find_collection, load_collections

    collections = load_collections(load_settings().defs_dir)
    if name is None and collections:
        return list(collections.values())
    return [find_collection(collections, name)]
