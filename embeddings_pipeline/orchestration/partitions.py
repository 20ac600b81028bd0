"""Batches as Dagster's partitions, and which of them a run takes together."""

import re
from collections.abc import Mapping, Sequence
from itertools import groupby

import dagster as dg

from embeddings_pipeline.config.definition import CollectionDefinition, batch_key
from embeddings_pipeline.ledger.work import contiguous_ranges
from embeddings_pipeline.orchestration.dagster_internals import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
)
from embeddings_pipeline.orchestration.names import partitions_name
from embeddings_pipeline.wording import counted

MOST_KEYS, MOST_CHARACTERS = 10, 60  # keys, or ranges of them, that are shown of a batch; characters of each
BATCHES_PER_RUN = 10  # of a backfill: searchable after a minute or two, at a second of overhead a run
MOST_BATCHES_PER_RUN = 100  # of a run whose batches are small or have little to do
LEAST_ITEMS_PER_RUN = 1000  # of small batches, if there are so many


def build_partitions(definition: CollectionDefinition) -> dg.DynamicPartitionsDefinition:
    """One partition for each batch."""
    return dg.DynamicPartitionsDefinition(name=partitions_name(definition))


def add_partitions(instance: dg.DagsterInstance, definition: CollectionDefinition, batches: list[int]) -> list[str]:
    """Make the partition keys of these batches known to Dagster, in ascending order; those that were new."""
    known = set(instance.get_dynamic_partitions(partitions_name(definition)))
    new = [key for key in map(batch_key, sorted(batches)) if key not in known]
    if new:
        instance.add_dynamic_partitions(partitions_name(definition), new)
    return new


def batches_per_run(items_per_batch: int) -> int:
    """How many full batches a run takes."""
    return max(BATCHES_PER_RUN, min(MOST_BATCHES_PER_RUN, LEAST_ITEMS_PER_RUN // items_per_batch))


def run_ranges(work: Mapping[int, int], existing: Sequence[int | None], items_per_batch: int) -> list[tuple[int, int]]:
    """The runs, as (first, last) batch, that do this work (batch → items)."""
    most_items = batches_per_run(items_per_batch) * items_per_batch
    return contiguous_ranges(work, existing, most_batches=MOST_BATCHES_PER_RUN, most_items=most_items)


def range_tags(first: int, last: int) -> dict[str, str]:
    """The tags of a run over these batches."""
    return {ASSET_PARTITION_RANGE_START_TAG: batch_key(first), ASSET_PARTITION_RANGE_END_TAG: batch_key(last)}


def keys_in_words(keys: Sequence[str]) -> str:
    """Which item keys a batch holds, in some hundred characters: `1–998, 1000 (999 items)`, or the first and last."""
    if all(re.fullmatch(r"0|-?[1-9]\d{0,17}", key) for key in keys):
        numbers = sorted(map(int, keys))
        runs = [list(group) for _, group in groupby(enumerate(numbers), lambda at: at[1] - at[0])]
        parts = [f"{run[0][1]}" if len(run) == 1 else f"{run[0][1]}–{run[-1][1]}" for run in runs]
    else:
        parts = sorted(keys)
    if len(parts) > MOST_KEYS:
        parts = [*parts[: MOST_KEYS // 2], "…", *parts[-MOST_KEYS // 2 :]]
    return f"{', '.join(part[:MOST_CHARACTERS] for part in parts)} ({counted(len(keys), 'item')})"


def batches_of(partitions: Sequence[str]) -> list[int | None]:
    """The batches in the order in which Dagster knows their partitions; None for what was added by hand."""
    return [int(key) if key.isdecimal() and batch_key(int(key)) == key else None for key in partitions]
