"""The seven assets of a collection. Each is thin: open the collection, call the function, report the metadata."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import dagster as dg

from embeddings_pipeline.collection import Collection, batch_key
from embeddings_pipeline.errors import PipelineError
from embeddings_pipeline.index.faiss_index import Manifest
from embeddings_pipeline.index.faiss_index import build as build_faiss
from embeddings_pipeline.index.pgvector_index import IndexReport, ensure_index
from embeddings_pipeline.opened import OpenCollection
from embeddings_pipeline.orchestration.resources import PipelineResource
from embeddings_pipeline.steps import embed_texts, read_items, render_texts
from embeddings_pipeline.store.landing import land_batch

CODE_VERSION = "1"  # of the steps; what a collection's definition adds is in `definition_hash`
BATCHES_PER_RUN = 25
ENCODER_POOL = "encoder"
WRITER_POOL = "writer"
OWNERS = ["team:embeddings"]


class ScanConfig(dg.Config):
    """Launchpad settings of item_ledger."""

    allow_deletes: bool = False


class EmbedConfig(dg.Config):
    """Launchpad settings of embeddings: encode all anew, encode nothing, encode at most so many texts in the run …"""

    force: bool = False
    dry_run: bool = False
    limit: int | None = None
    batch_size: int | None = None
    tokens_per_batch: int | None = None


def asset_key(collection: Collection, name: str) -> dg.AssetKey:
    """Every collection but `items` has its name as prefix."""
    return dg.AssetKey([name] if collection.name == "items" else [collection.name, name])


def build_partitions(collection: Collection) -> dg.DynamicPartitionsDefinition:
    return dg.DynamicPartitionsDefinition(name=collection.partitions_name)


def add_partitions(instance: dg.DagsterInstance, collection: Collection, batches: list[int]) -> list[str]:
    """Make the partition keys of these batches known to Dagster, in ascending order; those that were new."""
    known = set(instance.get_dynamic_partitions(collection.partitions_name))
    new = [key for key in map(batch_key, sorted(batches)) if key not in known]
    if new:
        instance.add_dynamic_partitions(collection.partitions_name, new)
    return new


def build_assets(collection: Collection, dimensions: int) -> list[dg.AssetsDefinition]:
    """The assets of one collection whose declared profile has vectors of that many dimensions."""
    partitions = build_partitions(collection)
    code_version = f"{CODE_VERSION}-{collection.definition_hash.hex()[:8]}"

    def options(name: str, kinds: set[str], deps: list[str], *, partitioned: bool = True) -> dict[str, Any]:
        common: dict[str, Any] = {
            "key": asset_key(collection, name),
            "deps": [asset_key(collection, dep) for dep in deps],
            "group_name": collection.name,
            "kinds": kinds,
            "owners": OWNERS,
            "code_version": code_version,
            "tags": {"collection": collection.name},
        }
        if partitioned:
            policy = dg.BackfillPolicy.multi_run(max_partitions_per_run=BATCHES_PER_RUN)
            common |= {"partitions_def": partitions, "backfill_policy": policy}
        return common

    embeddings = f"embeddings_{dimensions}"

    @dg.asset(**options("item_ledger", {"postgres"}, [], partitioned=False))
    def item_ledger(
        context: dg.AssetExecutionContext, config: ScanConfig, pipeline: PipelineResource
    ) -> dg.MaterializeResult:
        """What exists in the source. Reads the whole source once, compares it with what has landed by content hash,
        notes new, changed and vanished items, and adds a partition for each new batch. Embeds and deletes nothing.
        """
        with failures():
            opened = _open(context, pipeline, collection)
            found = opened.ledger.scan(opened.source, allow_deletes=config.allow_deletes)
            added = add_partitions(context.instance, collection, opened.ledger.batches())
            dirty = opened.ledger.dirty_batches()
        return dg.MaterializeResult(metadata={**vars(found), "new_partitions": len(added), "dirty_batches": len(dirty)})

    @dg.asset(**options("raw_items", {"postgres", "parquet"}, ["item_ledger"]))
    def raw_items(context: dg.AssetExecutionContext, pipeline: PipelineResource) -> None:
        """The batch's rows, read by key from the source: the columns that templates and searches use, no others."""
        _each(context, pipeline, collection, lambda opened, batch: read_items(opened, batch, context.run.run_id))

    @dg.asset(**options("item_texts", {"python", "parquet"}, ["raw_items"]))
    def item_texts(context: dg.AssetExecutionContext, pipeline: PipelineResource) -> None:
        """What will be embedded: each template rendered for each row of the batch, with the hash of its content."""
        _each(context, pipeline, collection, lambda opened, batch: render_texts(opened, batch, context.run.run_id))

    @dg.asset(
        **options(embeddings, {"huggingface", "parquet"}, ["item_texts"]),
        pool=ENCODER_POOL,
        output_required=False,
        description=(
            f"The batch's vectors of {dimensions} dimensions. A text whose content hash already has a vector under the "
            f"active model keeps it; only the others are encoded. Launchpad: `force` encodes all anew, `dry_run` "
            f"counts without encoding or writing, `limit` encodes at most so many texts in the run."
        ),
    )
    def embed(
        context: dg.AssetExecutionContext, config: EmbedConfig, pipeline: PipelineResource
    ) -> Iterator[dg.MaterializeResult]:
        left = config.limit

        def step(opened: OpenCollection, batch: int) -> Mapping[str, Any]:
            nonlocal left
            sizes = {"batch_size": config.batch_size, "tokens_per_batch": config.tokens_per_batch}
            opened = opened.with_batch_settings(**sizes)
            done = embed_texts(
                opened, batch, context.run.run_id, force=config.force, dry_run=config.dry_run, limit=left
            )
            if left is not None:
                left -= done.embedded
            if config.dry_run:
                context.log.info(
                    f"dry run, batch {batch_key(batch)}: {done.left_to_embed} texts to encode, {done.reused} reused"
                )
            return done.metadata()

        _each(context, pipeline, collection, step, report=not config.dry_run)
        if not config.dry_run:
            yield dg.MaterializeResult()

    @dg.asset(**options("pgvector_table", {"postgres"}, ["item_texts", embeddings]), pool=WRITER_POOL)
    def pgvector_table(context: dg.AssetExecutionContext, pipeline: PipelineResource) -> None:
        """The batch in PostgreSQL: items with payload, texts and vectors, in one transaction. It reads the source once
        more, so that what changed meanwhile is done again and nothing newer is overwritten.
        """
        _each(
            context,
            pipeline,
            collection,
            lambda opened, batch: vars(land_batch(opened, batch, context.run.run_id)).copy(),
        )

    @dg.asset(**options("pgvector_index", {"postgres"}, ["pgvector_table"], partitioned=False))
    def pgvector_index(context: dg.AssetExecutionContext, pipeline: PipelineResource) -> dg.MaterializeResult:
        """The ANN index that PostgreSQL searches with, one for each vector name. Built beside the one in use and
        swapped in when it is valid; nothing is done where it is there and fits.
        """
        with failures():
            opened = _open(context, pipeline, collection)
            config = collection.config
            report = ensure_index(opened.database, opened.active.table, config.index, list(config.vectors))
        return dg.MaterializeResult(metadata=_index_metadata(report))

    @dg.asset(**options("faiss_index", {"faiss"}, ["pgvector_table"], partitioned=False))
    def faiss_index(context: dg.AssetExecutionContext, pipeline: PipelineResource) -> dg.MaterializeResult:
        """A FAISS index for search without a database round trip, built from the table (never from the model) and
        published whole, with checksums. Former generations stay until two newer ones are there.
        """
        with failures():
            opened = _open(context, pipeline, collection)
            folder = opened.settings.state_dir / "faiss"
            manifest = build_faiss(opened.database, opened.active.table, folder)
        return dg.MaterializeResult(metadata=_faiss_metadata(manifest))

    return [item_ledger, raw_items, item_texts, embed, pgvector_table, pgvector_index, faiss_index]


def _index_metadata(report: IndexReport) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "vectors": sum(index.rows for index in report.indexes),
        "build_seconds": report.build_seconds,
        "bytes": report.bytes,
    }
    for index in report.indexes:
        parameters = ", ".join(f"{name} = {value}" for name, value in index.parameters.items())
        built = f"; built: {index.reason}" if index.reason else ""
        metadata[index.vector_name] = f"{index.method} ({parameters}){built}"
    return metadata


def _faiss_metadata(manifest: Manifest) -> dict[str, Any]:
    return {
        "vectors": manifest.count,
        "seconds": manifest.seconds,
        "recall_at_10": manifest.recall_at_10,
        "bytes": manifest.bytes,
        "version": manifest.version,
        "generation": manifest.generation,
        "checksum": manifest.checksum,
        "index_type": ", ".join(f"{name} {part.index_type}" for name, part in manifest.vectors.items()),
    }


def build_jobs(collection: Collection, dimensions: int) -> list[Any]:
    """`…_scan`, `…_batches` (partitioned) and `…_index`; checks run with the last, which sees the whole collection."""

    def select(*names: str) -> dg.AssetSelection:
        return dg.AssetSelection.assets(*(asset_key(collection, name) for name in names))

    batch_assets = ("raw_items", "item_texts", f"embeddings_{dimensions}", "pgvector_table")
    return [
        dg.define_asset_job(
            f"{collection.name}_scan",
            select("item_ledger").without_checks(),
            description="Look for new, changed and vanished items.",
        ),
        dg.define_asset_job(
            f"{collection.name}_batches",
            select(*batch_assets).without_checks(),
            description="Read, render, embed and land batches.",
        ),
        dg.define_asset_job(
            f"{collection.name}_index",
            select("pgvector_index", "faiss_index"),
            description="Bring the indexes up to date, and run every check.",
        ),
    ]


@contextmanager
def failures() -> Iterator[None]:
    """A PipelineError becomes one line in the UI; its traceback stays in the log."""
    try:
        yield
    except PipelineError as error:
        raise dg.Failure(description=str(error), allow_retries=False) from error


def _open(context: dg.AssetExecutionContext, pipeline: PipelineResource, collection: Collection) -> OpenCollection:
    opened = pipeline.open(collection)
    if opened.warning:
        context.log.warning(opened.warning)
    return opened


def _each(
    context: dg.AssetExecutionContext,
    pipeline: PipelineResource,
    collection: Collection,
    step: Callable[[OpenCollection, int], Mapping[str, Any]],
    *,
    report: bool = True,
) -> None:
    """Do a step for each batch of the run, with metadata for each partition."""
    with failures():
        opened = _open(context, pipeline, collection)
        for key in context.partition_keys:
            try:
                done = step(opened, int(key))
            except Exception:
                opened.ledger.failed(int(key))
                raise
            if report:
                context.add_asset_metadata(done, partition_key=key)
