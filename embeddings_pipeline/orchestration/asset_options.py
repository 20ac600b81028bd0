"""What every asset of a collection is declared with."""

from typing import Any

import dagster as dg

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.orchestration.names import asset_key
from embeddings_pipeline.orchestration.partitions import batches_per_run, build_partitions

CODE_VERSION = "1"  # of the steps; what a collection's definition adds is in `definition_hash`
ENCODER_POOL = "encoder"
WRITER_POOL = "writer"
OWNERS = ["team:embeddings"]


def asset_options(
    definition: CollectionDefinition, name: str, kinds: set[str], deps: list[str], *, partitioned: bool = True
) -> dict[str, Any]:
    """Key, dependencies, group, tags and, unless it has none, partitions of an asset."""
    common: dict[str, Any] = {
        "key": asset_key(definition, name),
        "deps": [asset_key(definition, dep) for dep in deps],
        "group_name": definition.name,
        "kinds": kinds,
        "owners": OWNERS,
        "code_version": f"{CODE_VERSION}-{definition.definition_hash.hex()[:8]}",
        "tags": {"collection": definition.name},
    }
    if partitioned:
        most = batches_per_run(definition.attributes.items_per_batch)
        policy = dg.BackfillPolicy.multi_run(max_partitions_per_run=most)
        common |= {"partitions_def": build_partitions(definition), "backfill_policy": policy}
    return common
