"""`status`: what is there of a collection."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from embeddings_pipeline.cli.console import (
    EachCollectionOption,
    JsonOption,
    check_all_defined,
    chosen_collections,
    database_to_read,
    print_json,
    size,
)
from embeddings_pipeline.config.settings import load_settings

if TYPE_CHECKING:
    from embeddings_pipeline.health.growth import DagsterSize


def status(collection_name: EachCollectionOption = None, as_json: JsonOption = False) -> None:
    """What is there, what is missing, and which model made it."""
    from embeddings_pipeline.health.growth import dagster_size
    from embeddings_pipeline.health.status import collection_status, empty_status
    from embeddings_pipeline.store.database import was_used

    settings, collections = load_settings(), chosen_collections(collection_name)
    grown = None
    if was_used(settings):
        database = database_to_read(settings)
        grown = dagster_size(database, settings)
        statuses = [collection_status(definition, database, settings) for definition in collections]
    else:
        statuses = [empty_status(definition) for definition in collections]
    if as_json:
        sizes = asdict(grown) if grown else None
        shown = [{**each, "dagster": sizes} for each in statuses]
        print_json(shown[0] if len(shown) == 1 else shown)
    else:
        for each in statuses:
            print(_status_text(each))
        if grown:
            print(_growth_text(grown))
    check_all_defined(collection_name)


def _growth_text(grown: "DagsterSize") -> str:
    kept = f"kept for {grown.keep_days} days" if grown.keep_days else "kept for ever"
    in_database = "an unknown size" if grown.database_bytes is None else size(grown.database_bytes)
    return (
        f"Dagster's runs and events: {in_database} in its database, {grown.files:,} log files of "
        f"{size(grown.file_bytes)}; {kept} (EMBEDDINGS_KEEP_DAYS)"
    )


def _status_text(figures: dict[str, Any]) -> str:
    name = figures["collection"]
    if figures["fingerprint"] is None:
        return f"{name}: nothing is there yet; run `embeddings-pipeline sync --collection {name}`"
    faiss, indexes = figures["faiss"], figures["pgvector_index"]
    ann = ", ".join(f"{index['vector_name']} {index['method']}" for index in indexes) or "none"
    search = "none"
    if faiss["generation"]:
        search = f"generation {faiss['generation']}, {faiss['vectors']:,} vectors, {faiss['standing']}"
    if "foreign" in faiss:
        search += f": {faiss['foreign']}; the next sync builds it again"
    database = figures["database"]
    return "\n".join(
        [
            f"{name}: {figures['coverage']:.1%} covered",
            f"  items           {figures['items']:,}  ({figures['missing']:,} missing, {figures['stale']:,} stale, "
            f"{figures['quarantined']:,} texts and {figures['quarantined_items']:,} whole items in quarantine)",
            f"  vectors         {figures['vectors']:,}  ({figures['orphans']:,} orphans)",
            f"  dirty batches   {figures['dirty_batches']:,}",
            f"  profile         {figures['profile']}  (fingerprint {figures['fingerprint']})",
            f"  pgvector index  {ann}",
            f"  FAISS index     {search}",
            *([f"  definition      {figures['definition']}"] if figures["definition"] else []),
            f"  database        {database['name']}  (id {database['id']}, epoch {database['epoch']})",
        ]
    )
