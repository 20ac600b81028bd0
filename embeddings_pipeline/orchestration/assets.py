"""The assets of a collection. Each is thin: open the collection, call the function, report the metadata."""

import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import dagster as dg
import psycopg
from pydantic import Field

from embeddings_pipeline.config.definition import CollectionDefinition, batch_key
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.errors import ConfigurationError, PipelineError
from embeddings_pipeline.index.faiss_index import Manifest
from embeddings_pipeline.index.faiss_index import build as build_faiss
from embeddings_pipeline.index.pgvector import BuiltIndex, IndexReport, ensure_index
from embeddings_pipeline.orchestration.resources import PipelineResource, batch_done
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.pipeline.commit import commit_batch
from embeddings_pipeline.pipeline.shadow import backfill_shadows, embed_shadows
from embeddings_pipeline.pipeline.steps import each_batch, embed_batches, read_items, render_texts
from embeddings_pipeline.store.retry import what_it_says

FAIL_HOURS, WARN_HOURS = 50, 26  # since the last full scan; the daily refresh makes one a day
CODE_VERSION = "1"  # of the steps; what a collection's definition adds is in `definition_hash`
BATCHES_PER_RUN = 10  # of a backfill: searchable after a minute or two, at a second of overhead a run
MOST_BATCHES_PER_RUN = 100  # of a run whose batches have little to do: as many items as BATCHES_PER_RUN full ones
SAMPLE_WIDTH = 64  # characters a line; the UI does not wrap code
ENCODER_POOL = "encoder"
WRITER_POOL = "writer"
OWNERS = ["team:embeddings"]
ENCODER_KINDS = {"local": "huggingface", "openai": "openai"}  # of the profile's provider; Dagster has their icons


class ScanConfig(dg.Config):
    """Launchpad settings of item_ledger."""

    allow_deletes: bool = Field(default=False, description="Go on where more than 20 % of the items are gone.")


class EmbedConfig(dg.Config):
    """Launchpad settings of embeddings_<dimensions>."""

    force: bool = Field(default=False, description="Encode every text anew, also those whose vector is current.")
    dry_run: bool = Field(
        default=False, description="Encode and change nothing: the run's log says how many texts would be encoded."
    )
    limit: int | None = Field(default=None, description="Encode at most this many texts in the run.")
    items: list[str] | None = Field(default=None, description="Encode only texts of the items with these keys.")
    batch_size: int | None = Field(default=None, description="Most texts that the model gets at once.")
    tokens_per_batch: int | None = Field(default=None, description="Most tokens that the model gets at once.")

    def check(self) -> None:
        """Raises ConfigurationError where a number is not a count."""
        for name in ("limit", "batch_size", "tokens_per_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"`{name}: {value}` in the run's configuration: give 1 or more, or nothing")


def asset_key(definition: CollectionDefinition, name: str) -> dg.AssetKey:
    """Every collection but `items` has its name as prefix; `name` may have several parts, `migration/swap`."""
    return dg.AssetKey([*([] if definition.name == "items" else [definition.name]), *name.split("/")])


def named(definition: CollectionDefinition, name: str) -> str:
    """As asset keys: every collection but `items` has its name as prefix."""
    return name if definition.name == "items" else f"{definition.name}_{name}"


def build_partitions(definition: CollectionDefinition) -> dg.DynamicPartitionsDefinition:
    return dg.DynamicPartitionsDefinition(name=definition.partitions_name)


def add_partitions(instance: dg.DagsterInstance, definition: CollectionDefinition, batches: list[int]) -> list[str]:
    """Make the partition keys of these batches known to Dagster, in ascending order; those that were new."""
    known = set(instance.get_dynamic_partitions(definition.partitions_name))
    new = [key for key in map(batch_key, sorted(batches)) if key not in known]
    if new:
        instance.add_dynamic_partitions(definition.partitions_name, new)
    return new


def asset_options(
    definition: CollectionDefinition, name: str, kinds: set[str], deps: list[str], *, partitioned: bool = True
) -> dict[str, Any]:
    """What every asset of a definition is declared with."""
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
        policy = dg.BackfillPolicy.multi_run(max_partitions_per_run=BATCHES_PER_RUN)
        common |= {"partitions_def": build_partitions(definition), "backfill_policy": policy}
    return common


def build_assets(definition: CollectionDefinition, profile: Profile) -> list[dg.AssetsDefinition]:
    """The assets of one collection; `profile` is the declared one."""
    options = partial(asset_options, definition)
    embeddings = f"embeddings_{profile.dimensions}"

    @dg.asset(
        **options("item_ledger", {"postgres"}, [], partitioned=False),
        metadata=_source_metadata(definition),
        freshness_policy=dg.FreshnessPolicy.time_window(
            fail_window=timedelta(hours=FAIL_HOURS), warn_window=timedelta(hours=WARN_HOURS)
        ),
    )
    def item_ledger(
        context: dg.AssetExecutionContext, config: ScanConfig, pipeline: PipelineResource
    ) -> dg.MaterializeResult:
        """What exists in the source. Reads the whole source once, compares each row's hash with what is committed,
        notes new, changed and vanished items, and adds a partition for each new batch of items. Embeds and deletes
        nothing.

        Numbers: items `scanned`, of which `new`, `changed` or `unchanged`; items `gone` from the source;
        `dirty_batches`, whose partitions are to be materialized.
        """
        started = time.perf_counter()
        with failures():
            collection = open_logged(context, pipeline, definition)
            found = collection.ledger.full_scan(collection.source, allow_deletes=config.allow_deletes)
            added = add_partitions(context.instance, definition, collection.ledger.batches())
            dirty = collection.ledger.dirty_batches()
        numbers = {"new_partitions": len(added), "dirty_batches": len(dirty), "seconds": _since(started)}
        return dg.MaterializeResult(metadata={**vars(found), **numbers})

    @dg.asset(**options("raw_items", {"postgres", "parquet"}, ["item_ledger"]))
    def raw_items(context: dg.AssetExecutionContext, pipeline: PipelineResource) -> None:
        """The batch's rows as they are in the source now, in a Parquet file: the columns that templates and searches
        use, and no others.

        Numbers: `rows` read; items of the batch that are `gone` from the source.
        """
        each_alone(
            context, pipeline, definition, lambda collection, batch: read_items(collection, batch, context.run.run_id)
        )

    @dg.asset(**options("item_texts", {"python", "parquet"}, ["raw_items"]), metadata=_template_metadata(definition))
    def item_texts(context: dg.AssetExecutionContext, pipeline: PipelineResource) -> None:
        """What will be embedded: each template rendered for each row of the batch, with the hash of its content.

        Numbers: `texts` to embed, their `characters`, and `longest_characters`, those of the longest; `blank` texts
        have no vector.
        """

        def step(collection: Collection, batch: int) -> Mapping[str, Any]:
            done = render_texts(collection, batch, context.run.run_id)
            return {**done, "sample": dg.MetadataValue.md(_as_markdown(done["sample"]))}

        each_alone(context, pipeline, definition, step)

    @dg.asset(
        **options(embeddings, {ENCODER_KINDS.get(profile.provider, "python"), "parquet"}, ["item_texts"]),
        pool=ENCODER_POOL,
        output_required=False,
        metadata={"declared_profile": profile.name, "model": profile.model},
        description=(
            f"The batch's vectors of {profile.dimensions} dimensions, in a Parquet file. A text whose content hash has "
            f"a vector under the current model keeps it; only the others are encoded.\n\n"
            f"Launchpad: `force` encodes all anew, `dry_run` counts and changes nothing, `limit` encodes at most so "
            f"many texts in the run.\n\n"
            f"Numbers: texts `embedded` and `reused`; `quarantined`, which fail by themselves and are tried again "
            f"later; `truncated`, longer than the model reads; `left_to_embed` by `limit`."
        ),
    )
    def embed(
        context: dg.AssetExecutionContext, config: EmbedConfig, pipeline: PipelineResource
    ) -> Iterator[dg.MaterializeResult]:
        with failures():
            config.check()

        def steps(collection: Collection, batches: list[int]) -> Iterator[tuple[int, Mapping[str, Any]]]:
            collection = collection.with_batch_settings(
                batch_size=config.batch_size, tokens_per_batch=config.tokens_per_batch
            )
            embedding = embed_batches(
                collection,
                batches,
                context.run.run_id,
                force=config.force,
                dry_run=config.dry_run,
                limit=config.limit,
                items=config.items,
            )
            for batch, done in embedding:
                if config.dry_run:
                    context.log.info(
                        f"dry run, batch {batch_key(batch)}: {done.left_to_embed} texts to encode, {done.reused} reused"
                    )
                yield batch, done.metadata()
            if not config.dry_run and config.limit is None and config.items is None:
                embed_shadows(collection.shadow_models(), batches, context.run.run_id)

        each(context, pipeline, definition, steps, report=not config.dry_run)
        if not config.dry_run:
            yield dg.MaterializeResult()

    @dg.asset(
        **options("pgvector_table", {"postgres"}, ["item_texts", embeddings]),
        pool=WRITER_POOL,
        metadata=_view_metadata(definition, profile.dimensions),
    )
    def pgvector_table(context: dg.AssetExecutionContext, pipeline: PipelineResource) -> None:
        """What searches read: the batch's items with payload, texts and vectors in PostgreSQL, written in one
        transaction. It looks at the source once more, so that what changed meanwhile is done again and nothing newer
        is overwritten.

        Numbers: items `inserted`, `updated`, `deleted`, `unchanged`; items `left` for the next run because they changed
        meanwhile or have a text without vector; `coverage_percent` of the batch's items that are committed;
        `vectors_written` and `vectors_deleted`.
        """

        def step(collection: Collection, batch: int) -> Mapping[str, Any]:
            committed = commit_batch(collection, batch, context.run.run_id)
            backfill_shadows(collection.shadow_models(), batch, context.run.run_id)
            return committed.metadata()

        each_alone(context, pipeline, definition, step)

    @dg.asset(**options("pgvector_index", {"postgres"}, ["pgvector_table"], partitioned=False))
    def pgvector_index(context: dg.AssetExecutionContext, pipeline: PipelineResource) -> dg.MaterializeResult:
        """The approximate index that PostgreSQL searches with, one for each vector name. Built beside the one in use
        and swapped in when it is valid; nothing is done where it is there and fits.
        """
        with failures():
            collection = open_logged(context, pipeline, definition)
            config = definition.attributes
            report = ensure_index(collection.database, collection.current.table, config.index, list(config.vectors))
        return dg.MaterializeResult(metadata=_index_metadata(report))

    @dg.asset(**options("faiss_index", {"faiss"}, ["pgvector_table"], partitioned=False))
    def faiss_index(context: dg.AssetExecutionContext, pipeline: PipelineResource) -> dg.MaterializeResult:
        """A FAISS index for fast local search, built from the table (never from the model) and published whole, with
        checksums. The last three generations stay.

        Numbers: `recall_at_10` is the share of the ten nearest vectors that it finds, compared with an exact search.
        """
        with failures():
            collection = open_logged(context, pipeline, definition)
            folder = collection.settings.state_dir / "faiss"
            manifest = build_faiss(collection.database, collection.current.table, folder)
        location = dg.MetadataValue.path(str(folder / definition.name / manifest.generation))
        return dg.MaterializeResult(metadata={**_faiss_metadata(manifest), "folder": location})

    return [item_ledger, raw_items, item_texts, embed, pgvector_table, pgvector_index, faiss_index]


def _source_metadata(definition: CollectionDefinition) -> dict[str, Any]:
    source = definition.attributes.source
    columns = {
        "key": source.key,
        "template_columns": definition.template_columns,
        "payload": definition.attributes.columns,
    }
    return {
        "source": source.table or dg.MetadataValue.md(f"```sql\n{source.query}\n```"),
        **({"where": source.where} if source.where else {}),
        **{name: ", ".join(values) for name, values in columns.items() if values},
    }


def _template_metadata(definition: CollectionDefinition) -> dict[str, Any]:
    return {f"template_{name}": template for name, template in definition.attributes.vectors.items()}


def _view_metadata(definition: CollectionDefinition, dimensions: int) -> dict[str, Any]:
    columns = {
        "item_key": ("text", "the item's key; several key columns are a JSON array"),
        "vector_name": ("text", "which of the item's vectors"),
        "chunk": ("bigint", "number of the chunk, where long texts are split"),
        "text": ("text", "what was embedded"),
        "payload": ("jsonb", ", ".join(definition.attributes.columns) or "empty"),
        "embedding": (f"{definition.attributes.storage}({dimensions})", "the vector under the current model"),
    }
    schema = [dg.TableColumn(name, kind, description) for name, (kind, description) in columns.items()]
    return {
        "dagster/table_name": f"embeddings.{definition.name}",
        "dagster/column_schema": dg.TableSchema(schema),
    }


def _as_markdown(texts: list[str]) -> str:
    """The texts as one code block, in which nothing counts as markup."""
    wrapped = (textwrap.fill(text.replace("`", "'"), SAMPLE_WIDTH) for text in texts)
    return "```text\n" + "\n\n".join(wrapped) + "\n```" if texts else "no text"


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 3)


def _index_metadata(report: IndexReport) -> dict[str, Any]:
    def row(index: BuiltIndex) -> dg.TableRecord:
        parameters = ", ".join(f"{name} = {value}" for name, value in index.parameters.items())
        return dg.TableRecord(
            {
                "vector_name": index.vector_name,
                "vectors": index.rows,
                "index": f"{index.method} ({parameters})",
                "built_because": index.reason or "not built: it is there and fits",
            }
        )

    return {
        "vectors": sum(index.rows for index in report.indexes),
        "build_seconds": report.build_seconds,
        "bytes": report.bytes,
        **({"indexes": dg.MetadataValue.table([row(index) for index in report.indexes])} if report.indexes else {}),
    }


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


@contextmanager
def failures() -> Iterator[None]:
    """What a user can cause becomes one line in the UI; its traceback stays in the log."""
    try:
        yield
    except PipelineError as error:
        raise dg.Failure(description=str(error), allow_retries=False) from error
    except psycopg.Error as error:
        raise dg.Failure(description=what_it_says(error), allow_retries=False) from error


def open_logged(
    context: dg.AssetExecutionContext, pipeline: PipelineResource, definition: CollectionDefinition
) -> Collection:
    collection = pipeline.open(definition)
    if collection.warning:
        context.log.warning(collection.warning)
    return collection


def each_alone(
    context: dg.AssetExecutionContext,
    pipeline: PipelineResource,
    definition: CollectionDefinition,
    step: Callable[[Collection, int], Mapping[str, Any]],
) -> None:
    each(context, pipeline, definition, lambda collection, batches: each_batch(collection, batches, step))


def each(
    context: dg.AssetExecutionContext,
    pipeline: PipelineResource,
    definition: CollectionDefinition,
    steps: Callable[[Collection, list[int]], Iterator[tuple[int, Mapping[str, Any]]]],
    *,
    report: bool = True,
) -> None:
    """Do a step for the batches of the run, with metadata for each partition."""
    with failures():
        collection = open_logged(context, pipeline, definition)
        existing = {batch_key(batch): batch for batch in collection.ledger.batches()}
        strays = [key for key in context.partition_keys if key not in existing]  # the UI lets people add any partition
        if strays:
            message = (
                f"collection {definition.name!r} has no batch {', '.join(strays)}: delete what was added by hand; "
                f"item_ledger adds the partitions"
            )
            if len(strays) == len(context.partition_keys):
                raise ConfigurationError(message)
            context.log.warning(message)
        batches = [existing[key] for key in context.partition_keys if key in existing]
        for batch, done in steps(collection, batches):
            batch_done.get()(context.asset_key.path[-1], batch)
            if report:
                context.add_asset_metadata(done, partition_key=batch_key(batch))
