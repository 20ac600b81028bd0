"""`live`: stay, and keep answers fresh within seconds."""

import os
import signal
import sys
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embeddings_pipeline.cli.console import EachCollectionOption, JsonOption, chosen_collections, json_of, tell
from embeddings_pipeline.config.settings import load_settings
from embeddings_pipeline.wording import counted

if TYPE_CHECKING:
    from embeddings_pipeline.live.done import Done


def live(
    collection_name: EachCollectionOption = None,
    no_log: Annotated[
        bool,
        typer.Option("--no-slot", help="Never follow the server's log, only `updated_at`."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Stay, watch the source, and bring each change into the answers within seconds. Ctrl-C ends it."""
    from embeddings_pipeline.live.follow import Told, follow
    from embeddings_pipeline.live.reports import MinuteReports

    settings, ended = load_settings(), threading.Event()
    definitions = chosen_collections(collection_name)

    def line(text: str) -> None:
        if as_json:
            _print({"event": "told", "text": text}, as_json=True)
        else:
            tell(text)

    def report(done: "Mapping[str, Done]") -> None:
        from embeddings_pipeline.orchestration.live import report as report_to_dagster  # which costs 100 MB

        report_to_dagster({each.name: each for each in definitions}, settings, done)

    reports = MinuteReports(report, line)

    def started(watched: Mapping[str, str]) -> None:
        _print({"event": "started", "collections": watched}, as_json=as_json)

    def minute(done: "Mapping[str, Done]") -> None:
        _print({"event": "done", "collections": {name: _figures(each) for name, each in done.items()}}, as_json=as_json)
        reports.add(done)

    def end(*_: object) -> None:
        if ended.is_set():  # asked again: what is not committed is done again
            os._exit(0)
        ended.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    whole = follow(definitions, settings, ended, Told(line, started, minute), use_log=not no_log)
    reports.close()
    sys.stdout.flush()
    if not whole:  # a batch is still being worked on; what is not committed is done again
        os._exit(0)


def _figures(done: "Done") -> dict[str, Any]:
    total = done.total
    names = ("inserted", "updated", "deleted", "embedded", "reused", "quarantined")
    return {"batches": len(done.batches), "commits": done.commits, **{name: getattr(total, name) for name in names}}


def _print(event: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json_of({"at": datetime.now(UTC), **event}), flush=True)
    elif event["event"] == "started":
        watched = "; ".join(f"{name} by {words}" for name, words in event["collections"].items())
        print(f"live: {watched}", flush=True)
    else:
        now = f"{datetime.now(UTC):%H:%M:%S}"
        for name, done in event["collections"].items():
            items = f"{counted(done['inserted'], 'item')} new, {done['updated']:,} changed, {done['deleted']:,} deleted"
            texts = f"{counted(done['embedded'], 'text')} embedded"
            print(f"{now} {name}: {items}; {texts}; {counted(done['commits'], 'commit')}", flush=True)
