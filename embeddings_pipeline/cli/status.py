"""`status`: what is there of a collection."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from embeddings_pipeline.cli.console import (
    EachCollectionOption,
    JsonOption,
    about_undefined,
    ago,
    check_all_defined,
    chosen_collections,
    database_to_read,
    defined_collections,
    print_json,
    printable,
    size,
    tell,
)
from embeddings_pipeline.config.settings import Settings, load_settings
from embeddings_pipeline.errors import ConfigurationError, DatabaseError
from embeddings_pipeline.health.activity import Activity, described
from embeddings_pipeline.wording import counted

if TYPE_CHECKING:
    from embeddings_pipeline.health.growth import DagsterSize
    from embeddings_pipeline.store.database import Database

STEPS = {"pgvector_index": "pgvector", "faiss_index": "FAISS", "incremental_scan": "reading"}


def status(collection_name: EachCollectionOption = None, as_json: JsonOption = False) -> None:
    """What is there, what is missing, which model made it, what checks found, and who is at work."""
    from embeddings_pipeline.health.growth import dagster_size
    from embeddings_pipeline.health.status import collection_status, empty_status
    from embeddings_pipeline.store.database import was_used

    settings = load_settings()
    try:
        database = database_to_read(settings) if was_used(settings) else None
    except DatabaseError:
        _tell_of_files(settings)
        raise
    try:
        collections = chosen_collections(collection_name)
    except ConfigurationError:
        if collection_name is None and database is not None:
            _name_undefined(database)
        raise
    statuses = [
        collection_status(definition, database, settings) if database else empty_status(definition)
        for definition in collections
    ]
    grown = dagster_size(database, settings) if database else None
    if as_json:
        sizes = asdict(grown) if grown else None
        shown = [{**each, "dagster": sizes} for each in statuses]
        print_json(shown[0] if len(shown) == 1 else shown)
    else:
        for each in statuses:
            print("\n".join(map(printable, _lines(each))))
        if grown:
            print(_growth_text(grown))
    if collection_name is None and database is not None:
        _name_undefined(database)
    check_all_defined(collection_name)


def _tell_of_files(settings: Settings) -> None:
    """Which collections' searches are answered while the database cannot be reached, and from when."""
    from embeddings_pipeline.index.faiss_read import current_or_none

    for name in defined_collections().collections:
        manifest = current_or_none(settings.state_dir / "faiss" / name)
        if manifest is not None and manifest.items is not None:
            tell(f"note: {name}: searches are answered meanwhile, from files of {manifest.built_at}")


def _growth_text(grown: "DagsterSize") -> str:
    kept = f"kept for {counted(grown.keep_days, 'day')}" if grown.keep_days else "kept for ever"
    in_database = "an unknown size" if grown.database_bytes is None else size(grown.database_bytes)
    return (
        f"Dagster's runs and events: {in_database} in its database, {counted(grown.files, 'log file')} of "
        f"{size(grown.file_bytes)}; {kept} (EMBEDDINGS_KEEP_DAYS)"
    )


def _too_long(figures: dict[str, Any]) -> str:
    if figures["truncated"] is None:
        return "not known yet: `embeddings-pipeline sync --full` looks at each text"
    if not figures["truncated"]:
        return "0  (texts longer than the model reads)"
    longest = f"the longest {counted(figures['longest_tokens'], 'token')}"
    return f"{figures['truncated']:,}  (texts longer than the model reads, {longest})"


def _name_undefined(database: "Database") -> None:
    from embeddings_pipeline.health.status import undefined_collections

    defined = defined_collections()
    for name in undefined_collections(database, list(defined.collections)):
        tell(f"warning: {name}: all of it is kept, but {about_undefined(name, defined)}")


def _lines(figures: dict[str, Any]) -> Iterator[str]:
    yield f"{figures['collection']}: {_headline(figures)}"
    for label, text in [*_work(figures), *(_counts(figures) if figures["items"] or figures["vectors"] else [])]:
        yield f"  {label:<15} {text}"
    for label, text in _checks(figures):
        yield f"  {label:<15} {text}"


def _headline(figures: dict[str, Any]) -> str:
    nothing = not (figures["items"] or figures["vectors"])
    scan = any(failure["step"] == "scan" for failure in figures["failures"])
    if nothing and figures["last_scan"] and not scan:
        return "nothing is there yet: the last full scan saw no rows"
    if nothing:
        remedy = (
            "" if figures["under_way"] else f"; run `embeddings-pipeline sync --collection {figures['collection']}`"
        )
        return f"nothing is there yet{remedy}"
    if scan:
        return "how much is covered is not known, since the last scan failed"
    return f"{figures['coverage']:.1%} covered"


def _work(figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Who is at work, what failed, and what waits."""
    for each in figures["under_way"]:
        yield "under way", described(Activity(**each))
    for failure in figures["failures"]:
        yield (
            f"{STEPS.get(failure['step'], failure['step'])} failed",
            f"{ago(failure['age_seconds'])}: {failure['reason']}",
        )
    if jobs := figures["batch_jobs"]:
        done, texts = (sum(job[name] for job in jobs) for name in ("remote_done", "texts"))
        price = f"about ${sum(job['usd'] for job in jobs):,.4f}"
        yield (
            "batch jobs",
            f"{len(jobs)} at work, {done:,} of {counted(texts, 'text')} done, {price}, the oldest made "
            f"{ago(min(job['made_at'] for job in jobs))}: `embeddings-pipeline batch-job list`",
        )
    waits = figures["waiting"]
    if waits["batches"]:
        when = f", tried again from {waits['next_try']:%H:%M %Z}" if waits["next_try"] else ""
        reason = f": {waits['reason']}" if waits["reason"] else ""
        yield (
            "waiting",
            f"{counted(waits['batches'], 'batch')} after up to {counted(waits['attempts'], 'attempt')}{when}{reason}",
        )


def _counts(figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    faiss, indexes = figures["faiss"], figures["pgvector_index"]
    yield "items", f"{figures['items']:,}  ({figures['missing']:,} missing, {figures['stale']:,} stale)"
    yield "vectors", f"{figures['vectors']:,}  ({counted(figures['orphans'], 'orphan')})"
    yield "too long", _too_long(figures)
    yield "quarantine", _quarantine(figures)
    yield "dirty batches", f"{figures['dirty_batches']:,}"
    yield "last full scan", ago(figures["last_scan"]) if figures["last_scan"] else "never"
    yield "profile", f"{figures['profile']}  (fingerprint {figures['fingerprint']})"
    yield "pgvector index", ", ".join(f"{index['vector_name']} {index['method']}" for index in indexes) or "none"
    search = "none"
    if faiss["generation"]:
        search = f"generation {faiss['generation']}, {counted(faiss['vectors'], 'vector')}, {faiss['standing']}"
    if "foreign" in faiss:
        search += f": {faiss['foreign']}; the next sync builds it again"
    yield "FAISS index", search
    if figures["definition"]:
        yield "definition", figures["definition"]
    database = figures["database"]
    yield "database", f"{database['name']}  (id {database['id']}, epoch {database['epoch']})"


def _quarantine(figures: dict[str, Any]) -> str:
    quarantine = figures["quarantine"]
    if not (figures["quarantined"] or figures["quarantined_items"]):
        return "0 texts"
    when = f"tried again from {quarantine['next_try']:%H:%M %Z}" if quarantine["next_try"] else ""
    given_up = f"{quarantine['given_up']:,} given up" if quarantine["given_up"] else ""
    items = f" and {counted(figures['quarantined_items'], 'whole item')}" if figures["quarantined_items"] else ""
    return f"{counted(figures['quarantined'], 'text')}{items}  ({', '.join(filter(None, (given_up, when)))})"


def _checks(figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The last result of each check and its age; nothing before the first was run."""
    checks = figures["checks"]
    if all(check["passed"] is None for check in checks):
        return
    for label, check in zip(["checks", *[""] * len(checks)], checks, strict=False):
        if check["passed"] is None:
            yield label, f"{check['name']:<14}  never run; `sync --full` runs it"
        elif check["passed"]:
            yield label, f"{check['name']:<14}  passed {ago(check['age_seconds'])}"
        else:
            found = "FAILED" if check["severity"] == "error" else "warned"
            told = "; ".join(filter(None, (check["description"], check["remedy"])))
            yield label, f"{check['name']:<14}  {found} {ago(check['age_seconds'])}: {told}"
