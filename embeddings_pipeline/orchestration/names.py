"""The names that Dagster shows: assets, ops, jobs, partitions, sensors and schedules. They are made nowhere else."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypedDict

from embeddings_pipeline.config.definition import CollectionDefinition

if TYPE_CHECKING:
    import dagster as dg

PHASES = ("expand", "backfill", "swap", "roll_back", "contract")  # of a model change, which is a `migration` here
# `all` is `refresh` for people: Dagster sorts jobs by name, so that it comes first.
_PLAIN = ("all", "scan", "batches", "index", "audit", "refresh", "recent", "live", "batch_jobs", "cooccurrence")
JOBS = (*_PLAIN, *(f"migration_{phase}" for phase in PHASES))
# A tag of jobs: whom they are for. Dagster sorts jobs by name, and their descriptions begin with it too.
FOR_TAG = "for"
PEOPLE, AUTOMATION, MODEL_CHANGE = "people", "automation", "model-change"
COLLECTION_TAG = "collection"
BATCH_STEPS = ("raw_items", "item_texts", "embeddings", "pgvector_table")  # the assets with a partition for each batch
_AFTER_BATCHES = ("pgvector_index", "faiss_index", "audit", "evaluation", "map", "batch_jobs", "cooccurrence")
ASSETS = ("item_ledger", *BATCH_STEPS, *_AFTER_BATCHES)


def asset_path(definition: CollectionDefinition, name: str) -> list[str]:
    """Every collection but `items` has its name as prefix; `name` may have several parts, `migration/swap`."""
    return [*([] if definition.name == "items" else [definition.name]), *name.split("/")]


def asset_key(definition: CollectionDefinition, name: str) -> "dg.AssetKey":
    """The key that consists of `asset_path`."""
    from dagster import AssetKey  # names alone are needed where Dagster is not

    return AssetKey(asset_path(definition, name))


def embeddings_asset(dimensions: int) -> str:
    """The asset of the vectors: `embeddings_384`."""
    return f"embeddings_{dimensions}"


def step_of(asset: str) -> str:
    """The asset's name less the number of dimensions: `embeddings` of `embeddings_384`."""
    return "embeddings" if asset.startswith("embeddings_") else asset


def batch_assets(dimensions: int) -> tuple[str, ...]:
    """The assets of a batch, in the order of its steps."""
    return tuple(embeddings_asset(dimensions) if step == "embeddings" else step for step in BATCH_STEPS)


def is_of(definition: CollectionDefinition, key: "dg.AssetKey") -> bool:
    """Whether an asset is one of the collection's."""
    *prefix, name = key.path
    own = asset_path(definition, "item_ledger")[:-1]
    return prefix == [*own, "migration"] or (prefix == own and step_of(name) in ASSETS)


def collections_of(job: str, assets: "Iterable[dg.AssetKey]") -> set[str]:
    """The collections of a run: by its job, or, of a materialization from the UI, by its assets."""
    for known in JOBS:
        if job.endswith(f"_{known}"):
            return {job.removesuffix(f"_{known}")}
    prefixes = (key.path[0] if len(key.path) > 1 and key.path[0] != "migration" else "items" for key in assets)
    return set(prefixes)


def automation_name(definition: CollectionDefinition, name: str) -> str:
    """A sensor's or schedule's: as asset keys, every collection but `items` has its name as prefix."""
    return name if definition.name == "items" else f"{definition.name}_{name}"


def job_name(definition: CollectionDefinition, job: str) -> str:
    """`films_scan`; `job` is one of JOBS."""
    return f"{definition.name}_{job}"


class JobTags(TypedDict):
    """What a job gets as its tags, and as those of its runs."""

    tags: dict[str, str]
    run_tags: dict[str, str]


def job_tags(definition: CollectionDefinition, whom: str) -> JobTags:
    """The tags of a job, and of its runs, whose list they would fill: `whom` is PEOPLE, AUTOMATION or MODEL_CHANGE."""
    collection = {COLLECTION_TAG: definition.name}
    return {"tags": {**collection, FOR_TAG: whom}, "run_tags": collection}


def op_name(definition: CollectionDefinition, op: str) -> str:
    """Of an op that is no asset: `films_refresh_everything`."""
    return f"{definition.name}_{op}"


def asset_op_name(definition: CollectionDefinition, asset: str) -> str:
    """The op of an asset, as runs' configuration names it: `films__item_ledger`."""
    return "__".join(asset_path(definition, asset))


def partitions_name(definition: CollectionDefinition) -> str:
    """Of the Dagster partitions: one set of batches a collection."""
    return partitions_of(definition.name)


def partitions_of(collection: str) -> str:
    """As `partitions_name`, of a collection that need not be defined any more."""
    return f"{collection}_batches"
