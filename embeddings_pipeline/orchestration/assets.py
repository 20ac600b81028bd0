"""The assets of a collection. Each is thin: open the collection, call the function, report the metadata."""

import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import dagster as dg
from pydantic import Field

from embeddings_pipeline.config.definition import CollectionDefinition, batch_key
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.errors import ConfigurationError
from embeddings_pipeline.index.faiss_build import build as build_faiss
from embeddings_pipeline.index.filters import ensure_filters
from embeddings_pipeline.index.pgvector import ensure_index
from embeddings_pipeline.index.words import ensure_words
from embeddings_pipeline.orchestration.asset_metadata import (
    as_markdown,
    faiss_metadata,
    index_metadata,
    source_metadata,
    template_metadata,
    view_metadata,
)
from embeddings_pipeline.orchestration.asset_options import ENCODER_POOL, WRITER_POOL, asset_options
from embeddings_pipeline.orchestration.figures import metadata_of
from embeddings_pipeline.orchestration.instance.purge import forget_quiet_scans
from embeddings_pipeline.orchestration.names import embeddings_asset, job_name
from embeddings_pipeline.orchestration.partitions import add_partitions, keys_in_words
from embeddings_pipeline.orchestration.resources import PipelineResource, scanned_ahead
from embeddings_pipeline.orchestration.steps import each, each_alone, failures, failures_kept, open_logged
from embeddings_pipeline.pipeline.attempts import each_group
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.pipeline.embed import EmbedOptions
from embeddings_pipeline.pipeline.pending import quote_batches
from embeddings_pipeline.pipeline.quote import Quoter
from embeddings_pipeline.pipeline.read import read_items
from embeddings_pipeline.pipeline.render import render_texts
from embeddings_pipeline.pipeline.run_batch import commit_and_backfill, embed_under_each_model
from embeddings_pipeline.pipeline.submit import check_named

FAIL_HOURS, WARN_HOURS = 50, 26  # since the last full scan; the daily refresh makes one a day
AGAIN, WAIT = "materialize it again, or sync", "see batch_jobs"  # what is to be done for a partition that is not whole
ENCODER_KINDS = {"local": "huggingface", "openai": "openai"}  # of the profile's provider; Dagster has their icons


class ScanConfig(dg.Config):
    """Launchpad settings of item_ledger."""

    allow_deletes: bool = Field(default=False, description="Go on if more than 20 % of the items are gone.")


class EmbedConfig(dg.Config):
    """Launchpad settings of embeddings_<dimensions>."""

    force: bool = Field(default=False, description="Encode every text anew, also those whose vector is current.")
    dry_run: bool = Field(
        default=False,
        description="Encode and change nothing: the run's log says how many texts would be encoded, and their price.",
    )
    limit: int | None = Field(default=None, description="Encode at most this many texts in the run.")
    items: list[str] | None = Field(default=None, description="Encode only texts of the items with these keys.")
    batch_size: int | None = Field(default=None, description="Most texts that the model gets at once.")
    tokens_per_batch: int | None = Field(default=None, description="Most tokens that the model gets at once.")
    api: str = Field(
        default="direct",
        description="`batch`: hand texts to the hosted model's Batch API, at half the price, within a day. The run "
        "ends when they are submitted; `batch_jobs` shows them, and its sensor starts the run that commits them.",
    )

    def check(self) -> None:
        """Raises ConfigurationError if a number is not a count."""
        for name in ("limit", "batch_size", "tokens_per_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"`{name}: {value}` in the run's configuration: give 1 or more, or nothing")

        check_named(self.api)
        if self.api == "batch" and self.force:
            raise ConfigurationError("`force` and `api: batch` exclude each other: leave one of them out")

    def options(self) -> EmbedOptions:
        """What the steps take; the sizes of the encoder's batches are the collection's."""
        items = None if self.items is None else frozenset(self.items)
        return EmbedOptions(self.force, self.dry_run, self.limit, items, check_named(self.api))


def build_assets(definition: CollectionDefinition, profile: Profile) -> list[dg.AssetsDefinition]:
    """The assets of one collection; `profile` is the declared one."""
    options = partial(asset_options, definition)
    embeddings = embeddings_asset(profile.dimensions)

    @dg.asset(
        **options("item_ledger", {"postgres"}, [], partitioned=False),
        metadata=source_metadata(definition),
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
        with failures_kept(definition, "scan"):
            collection = open_logged(context, pipeline, definition)
            scan = scanned_ahead.get() or collection.ledger.full_scan(
                collection.source, allow_deletes=config.allow_deletes
            )
            added = add_partitions(context.instance, definition, collection.ledger.batches())
            dirty = collection.ledger.dirty_batches()
            if not (scan.new or scan.changed or scan.gone) and context.run.job_name == job_name(definition, "scan"):
                forget_quiet_scans(context.instance, context.run)
        numbers = {"new_partitions": len(added), "dirty_batches": len(dirty), "seconds": _since(started)}
        return dg.MaterializeResult(metadata={**metadata_of(scan), **numbers})

    @dg.asset(**options("raw_items", {"postgres", "parquet"}, ["item_ledger"]))
    def raw_items(context: dg.AssetExecutionContext, pipeline: PipelineResource) -> None:
        """The batch's rows as they are in the source now, in a Parquet file: the columns that templates and searches
        use, and no others.

        `item_keys`: which items the partition holds. Numbers: `rows` read; items that are `gone` from the source.
        """

        def step(collection: Collection, batches: Sequence[int]) -> Mapping[int, Mapping[str, Any]]:
            done, keys = read_items(collection, batches, context.run.run_id), collection.ledger.keys_of_batches(batches)
            return {
                batch: {"item_keys": keys_in_words(keys[batch]), **metadata_of(read)} for batch, read in done.items()
            }

        each(context, pipeline, definition, lambda collection, batches: each_group(collection, batches, step))

    @dg.asset(**options("item_texts", {"python", "parquet"}, ["raw_items"]), metadata=template_metadata(definition))
    def item_texts(context: dg.AssetExecutionContext, pipeline: PipelineResource) -> None:
        """What will be embedded: each template rendered for each row of the batch, with the hash of its content.

        Numbers: `texts` to embed, their `characters`, and `longest_characters`, those of the longest; `blank` texts
        have no vector.
        """

        def step(collection: Collection, batch: int) -> Mapping[str, Any]:
            texts = render_texts(collection, batch, context.run.run_id)
            return {**metadata_of(texts), "sample": dg.MetadataValue.md(as_markdown(texts.sample))}

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
            f"many texts in the run, `api: batch` hands them to a hosted model's Batch API.\n\n"
            f"Numbers: texts `embedded`, `cached` (the embedding cache knew their vectors) and `reused`; `usd`, what "
            f"the batch cost; `quarantined`, which fail by themselves and are tried again "
            f"later; `truncated`, longer than the model reads; `left_to_embed` by `limit`; `in_jobs`, which batch jobs "
            f"have."
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
            options = config.options()
            if options.dry_run:
                yield from _dry_run(context, collection, batches, options)
                return
            for batch, embedded in embed_under_each_model(collection, batches, context.run.run_id, options):
                missing = _missing(embedded.left_to_embed, "left out by `limit`")
                missing = missing or _missing(embedded.in_jobs, "with batch jobs, and come later", remedy=WAIT)
                yield batch, {**missing, **metadata_of(embedded)}

        each(context, pipeline, definition, steps, dry_run=config.dry_run)
        if not config.dry_run:
            yield dg.MaterializeResult()

    @dg.asset(
        **options("pgvector_table", {"postgres"}, ["item_texts", embeddings]),
        pool=WRITER_POOL,
        metadata=view_metadata(definition, profile.dimensions),
    )
    def pgvector_table(context: dg.AssetExecutionContext, pipeline: PipelineResource) -> None:
        """What searches read: the batch's items with payload, texts and vectors in PostgreSQL, written in one
        transaction. It looks at the source once more, so that what changed meanwhile is done again and nothing newer
        is overwritten.

        Numbers: items `inserted`, `updated`, `deleted`, `unchanged`; items `left` for the next run because they changed
        meanwhile or have a text without vector; `coverage_percent` of the batch's items that are committed;
        `vectors_written` and `vectors_deleted`.
        """

        def step(collection: Collection, batches: Sequence[int]) -> Mapping[int, Mapping[str, Any]]:
            done = commit_and_backfill(collection, batches, context.run.run_id)
            return {
                batch: {**_missing(committed.left, "not committed", "items"), **metadata_of(committed)}
                for batch, committed in done.items()
            }

        each(context, pipeline, definition, lambda collection, batches: each_group(collection, batches, step))

    @dg.asset(**options("pgvector_index", {"postgres"}, ["pgvector_table"], partitioned=False))
    def pgvector_index(context: dg.AssetExecutionContext, pipeline: PipelineResource) -> dg.MaterializeResult:
        """The approximate index that PostgreSQL searches with, one for each vector name. Built beside the one in use
        and swapped in when it is valid; nothing is done if it is there and fits. And the indexes that `filters:`
        and `words:` ask for.
        """
        with failures_kept(definition, "pgvector_index"):
            collection = open_logged(context, pipeline, definition)
            config = definition.attributes
            report = ensure_index(collection.database, collection.model.destination, config.index, list(config.vectors))
            ensure_filters(collection.database, definition)
            ensure_words(collection.database, definition)
        return dg.MaterializeResult(metadata=index_metadata(report))

    @dg.asset(**options("faiss_index", {"faiss"}, ["pgvector_table"], partitioned=False))
    def faiss_index(context: dg.AssetExecutionContext, pipeline: PipelineResource) -> dg.MaterializeResult:
        """A FAISS index for fast local search, built from the table (never from the model) and published whole, with
        checksums, and with `words:` a BM25 index of the same texts. The last three generations stay.

        Numbers: `recall_at_10` is the share of the ten nearest vectors that it finds, compared with an exact search.
        """
        with failures_kept(definition, "faiss_index"):
            collection = open_logged(context, pipeline, definition)
            folder = collection.settings.state_dir / "faiss"
            words = definition.attributes.words
            manifest = build_faiss(collection.database, collection.model.destination, folder, words)
        location = dg.MetadataValue.path(str(folder / definition.name / manifest.generation))
        return dg.MaterializeResult(metadata={**faiss_metadata(manifest), "folder": location})

    return [item_ledger, raw_items, item_texts, embed, pgvector_table, pgvector_index, faiss_index]


def _dry_run(
    context: dg.AssetExecutionContext, collection: Collection, batches: list[int], options: EmbedOptions
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Say what the run would do and cost."""
    quoter, quotes = Quoter(collection, options.api), []
    for batch, embedded, quote in quote_batches(quoter, batches, context.run.run_id, options):
        quotes.append(quote)
        counts = f"{embedded.left_to_embed} texts to encode, {embedded.reused} reused"
        context.log.info(f"dry run, batch {batch_key(batch)}: {counts}; with the cache: {quote.in_words()}")
        yield batch, metadata_of(embedded)
    context.log.info(f"dry run, in all: {quoter.total(quotes).in_words()}; {quoter.basis}")


def _missing(count: int, why: str, what: str = "texts", remedy: str = AGAIN) -> dict[str, str]:
    """First of all, if a partition is not whole: the UI shows it as materialized."""
    if not count:
        return {}
    return {"MISSING": f"{count:,} {what} of this partition are {why}: {remedy}"}


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 3)
