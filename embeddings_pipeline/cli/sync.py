"""`sync`: bring collections up to date."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embeddings_pipeline.cli.console import (
    ApiOption,
    EachCollectionOption,
    JsonOption,
    a_number,
    check_all_defined,
    chosen_collections,
    print_json,
    progress_bar,
    start_database,
    tell,
)
from embeddings_pipeline.config.settings import load_settings
from embeddings_pipeline.errors import BudgetError, InterruptedRunError, PipelineError
from embeddings_pipeline.wording import counted

if TYPE_CHECKING:
    from embeddings_pipeline.orchestration.sync import SyncResult


BATCH_JOBS = "answered within a day; the next sync commits what has been: `embeddings-pipeline batch-job list`"


def sync(
    collection_name: EachCollectionOption = None,
    full: Annotated[
        bool, typer.Option("--full", help="Also compare every copy with the next, mend what differs, run every check.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Encode every text anew.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Encode at most this many texts.")] = None,
    max_cost: Annotated[
        float | None,
        typer.Option(
            min=0,
            callback=a_number,
            help="Stop, with exit code 3, before a hosted model has cost this many US dollars.",
        ),
    ] = None,
    allow_deletes: Annotated[
        bool, typer.Option("--allow-deletes", help="Also when more than 20 % of the items are gone.")
    ] = False,
    api: ApiOption = "direct",
    redefine: Annotated[
        bool, typer.Option("--redefine", help="Put this definition in force, though another checkout has a newer one.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Bring the vectors and the indexes up to date with the source."""
    from embeddings_pipeline.encoders.budget import Purse

    settings, purse = load_settings(), Purse(max_cost)
    results, failed, unsound = [], {}, False
    collections = chosen_collections(collection_name)
    start_database(settings)
    from embeddings_pipeline.orchestration.sync import sync as run_sync

    for definition in collections:
        try:
            with progress_bar(definition.name, show=not as_json and not dry_run) as progress:
                result = run_sync(
                    definition,
                    settings,
                    full=full,
                    force=force,
                    dry_run=dry_run,
                    limit=limit,
                    allow_deletes=allow_deletes,
                    redefine=redefine,
                    api="batch" if api == "batch" else "direct",
                    purse=purse,
                    progress=progress,
                )
        except PipelineError as error:  # the others are no worse for it
            if len(collections) == 1 or isinstance(error, InterruptedRunError):
                raise
            tell(f"error: {definition.name}: {error}")
            failed[definition.name] = error
            continue
        results.append({**asdict(result), "checks": [check.as_dict(definition.name) for check in result.checks]})
        _say(result, results[-1], as_json=as_json)
        unsound |= result.failed
    if as_json:
        print_json(results[0] if len(collections) == 1 else results)
    if failed:
        kind = BudgetError if all(isinstance(error, BudgetError) for error in failed.values()) else PipelineError
        raise kind(f"{len(failed)} of {len(collections)} collections were not synced: {', '.join(failed)}")
    check_all_defined(collection_name)
    if unsound:  # each check that failed is told above
        raise typer.Exit(1)


def _say(result: "SyncResult", shown: dict[str, Any], *, as_json: bool) -> None:
    if not as_json:
        _print_quote(result)
        print(_sync_line(shown))
    for check in result.checks:
        tell(f"{check.severity}: {result.collection}: check {check.name}: {check.told(result.collection)}")


def _print_quote(result: "SyncResult") -> None:
    """What a dry run says of a model that takes money."""
    from embeddings_pipeline.pipeline.quote import Quote

    if result.quote is None or not (result.quote["usd"] != 0 or result.quote["cached"] or result.quote["in_jobs"]):
        return
    for batch, quote in result.quotes.items():
        print(f"{result.collection}: batch {batch}: {Quote(**quote).in_words()}")
    print(f"{result.collection}: in all: {Quote(**result.quote).in_words()}; {result.basis}")


def _sync_line(done: dict[str, Any]) -> str:
    longer = (
        f"; texts longer than the model reads: {done['truncated']:,} "
        f"(the longest {counted(done['longest_tokens'], 'token')})"
        if done["truncated"]
        else ""
    )
    items = f"{counted(done['scanned'], 'item')} scanned: {done['new']:,} new, {done['changed']:,} changed"
    if done["dry_run"]:
        return (
            f"{done['collection']}: dry run, nothing was written. {items}, {done['deleted']:,} gone; "
            f"{counted(done['left'], 'text')} to embed, {done['reused']:,} reused{longer}"
        )
    cached = f"{done['cached']:,} from the cache, " if done["cached"] else ""
    cost = f"; ${done['usd']:,.4f}" if done["usd"] else ""
    in_jobs = f", {done['in_jobs']:,} with batch jobs ({BATCH_JOBS})" if done["in_jobs"] else ""
    left = f", {done['left']:,} left for the next sync" if done["left"] else ""
    indexed = f"; indexed: {', '.join(done['indexed'])}" if done["indexed"] else ""
    return (
        f"{done['collection']}: {items}, {done['deleted']:,} deleted; {counted(done['embedded'], 'text')} embedded, "
        f"{cached}{done['reused']:,} reused, {done['quarantined']:,} in quarantine{in_jobs}{left}{indexed}; "
        f"{done['seconds']:.1f} s{cost}{longer}"
    )
