"""`quarantine …`: texts that failed by themselves, and items that failed as a whole."""

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from embeddings_pipeline.cli.console import (
    EachCollectionOption,
    JsonOption,
    chosen_collections,
    database_to_read,
    pipeline_database,
    print_json,
    printable,
)
from embeddings_pipeline.config.settings import Settings, load_settings
from embeddings_pipeline.errors import ConfigurationError
from embeddings_pipeline.wording import counted, many, texts_and_items

if TYPE_CHECKING:
    from embeddings_pipeline.ledger.ledger import Ledger
    from embeddings_pipeline.store.database import Database

app = typer.Typer(
    help="Texts and items that failed by themselves, and why.", no_args_is_help=True, suggest_commands=False
)

HashesArgument = Annotated[list[str] | None, typer.Argument(help="Hashes, or their beginnings, as `list` shows them.")]
AllOption = Annotated[bool, typer.Option("--all", help="Every text and item in quarantine.")]


@app.command("list")
def quarantine_list(collection_name: EachCollectionOption = None, as_json: JsonOption = False) -> None:
    """What is in quarantine, which step failed and why, and when it is tried again."""
    ledgers = _ledgers(collection_name, database_to_read)
    entries = {ledger.definition.name: ledger.quarantine_entries(every_model=True) for ledger in ledgers}
    if as_json:
        print_json([{"collection": name, **asdict(entry)} for name, texts in entries.items() for entry in texts])
        return
    for name, texts in entries.items():
        if not texts:
            print(f"{name}: nothing is in quarantine")
        for entry in texts:
            if entry.step == "key":
                print(f"{name}  {entry.content_hash[:12]}  row {printable(entry.item_key or '')}, at key, left out")
                print(f"    {printable(entry.reason)}; each full scan looks at it again")
                continue
            again = f"tried again from {entry.next_try:%Y-%m-%d %H:%M %Z}" if entry.next_try else "given up"
            others = f" and {counted(entry.items - 1, 'more item')}" if entry.items > 1 else ""
            item = f"item {printable(entry.item_key)}{others}" if entry.item_key is not None else "of no item any more"
            attempts = f"{counted(entry.attempts, 'attempt')}" + (f" with {entry.profile}" if entry.profile else "")
            print(f"{name}  {entry.content_hash[:12]}  {item}, at {entry.step}, {attempts}, {again}")
            print(f"    {printable(entry.reason)}")
            if entry.text:
                print(f"    {printable(_shortened(entry.text))}")


@app.command("retry")
def quarantine_retry(
    hashes: HashesArgument = None,
    every: AllOption = False,
    collection_name: EachCollectionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Have texts and items tried again with the next sync, with as many attempts as new ones."""
    meant = _chosen(_ledgers(collection_name), hashes, every)
    count = sum(ledger.quarantine_retry(chosen) for ledger, chosen in meant)
    if as_json:
        print_json({"texts": count})
        return
    print(f"{texts_and_items(count)} {many(count, 'is')} tried again with the next `embeddings-pipeline sync`")


@app.command("clear")
def quarantine_clear(
    hashes: HashesArgument = None,
    every: AllOption = False,
    collection_name: EachCollectionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Forget texts and items: what is still there is read and embedded as if it were new."""
    meant = _chosen(_ledgers(collection_name), hashes, every)
    count = sum(ledger.quarantine_clear(chosen) for ledger, chosen in meant)
    if as_json:
        print_json({"texts": count})
        return
    left = f"{texts_and_items(count)} {many(count, 'is')} no longer in quarantine"
    print(f"{left}; what is still there is embedded with the next sync")


def _chosen(ledgers: "list[Ledger]", hashes: list[str] | None, every: bool) -> "Iterator[tuple[Ledger, list[bytes]]]":
    """Each ledger with the hashes that are meant. ConfigurationError if a beginning fits none."""
    if bool(hashes) == every:
        raise ConfigurationError("name content hashes as `quarantine list` shows them, or give --all")
    kept = [
        (ledger, sorted({entry.content_hash for entry in ledger.quarantine_entries(every_model=True)}))
        for ledger in ledgers
    ]
    beginnings = [beginning.lower() for beginning in hashes or ()]
    for beginning in beginnings:
        if not re.fullmatch(r"[0-9a-f]{4,}", beginning):
            raise ConfigurationError(
                f"{beginning!r} is not the beginning of a content hash: give at least 4 of its digits"
            )
        if not any(digest.startswith(beginning) for _, digests in kept for digest in digests):
            raise ConfigurationError(f"no text in quarantine has a content hash that begins with {beginning!r}")
    for ledger, digests in kept:
        meant = [digest for digest in digests if every or digest.startswith(tuple(beginnings))]
        if meant:
            yield ledger, [bytes.fromhex(digest) for digest in meant]


def _shortened(text: str, width: int = 100) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else f"{flat[: width - 1]}…"


def _ledgers(name: str | None, opened: "Callable[[Settings], Database]" = pipeline_database) -> "list[Ledger]":
    from embeddings_pipeline.ledger.ledger import Ledger

    database = opened(load_settings())
    return [Ledger(definition, database) for definition in chosen_collections(name)]
