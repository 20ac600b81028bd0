"""`status`: what is there of a collection."""

from typing import Any

from embeddings_pipeline.cli.console import (
    EachCollectionOption,
    JsonOption,
    check_all_defined,
    chosen_collections,
    database_to_read,
    print_json,
)
from embeddings_pipeline.config.settings import load_settings


def status(collection_name: EachCollectionOption = None, as_json: JsonOption = False) -> None:
    """What is there, what is missing, and which model made it."""
    from embeddings_pipeline.health.status import collection_status, empty_status
    from embeddings_pipeline.store.database import was_used

    settings, collections = load_settings(), chosen_collections(collection_name)
    if was_used(settings):
        database = database_to_read(settings)
        statuses = [collection_status(definition, database, settings) for definition in collections]
    else:
        statuses = [empty_status(definition) for definition in collections]
    if as_json:
        print_json(statuses[0] if len(statuses) == 1 else statuses)
    else:
        for each in statuses:
            print(_status_text(each))
    check_all_defined(collection_name)


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
