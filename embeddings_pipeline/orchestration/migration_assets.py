"""Changing a collection's model as assets: expand, backfill by batch, swap, contract; and the job that rolls back."""

import contextlib
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping
from typing import Any

import dagster as dg
import psycopg
from pydantic import Field

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.errors import DatabaseError
from embeddings_pipeline.model_change.gate import Gate
from embeddings_pipeline.model_change.phases import (
    backfill,
    contract,
    expand,
    roll_back,
    swap,
)
from embeddings_pipeline.model_change.state import ModelChange, candidate_profile, open_change, progress
from embeddings_pipeline.orchestration.asset_options import ENCODER_POOL, asset_options
from embeddings_pipeline.orchestration.figures import metadata_of
from embeddings_pipeline.orchestration.names import MODEL_CHANGE, asset_key, job_name, job_tags, op_name
from embeddings_pipeline.orchestration.resources import PipelineResource
from embeddings_pipeline.orchestration.steps import each, failures, open_logged
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.pipeline.submit import check_named
from embeddings_pipeline.store.locks import Exclusive


class ExpandConfig(dg.Config):
    """Launchpad settings of migration/expand."""

    candidate_profile: str = Field(
        description="The profile to change to: speed, quality, … or one of the collection's own."
    )


class BackfillConfig(dg.Config):
    """Launchpad settings of migration/backfill."""

    api: str = Field(
        default="direct",
        description="`batch`: hand texts to the candidate's Batch API, at half the price, within a day; `batch_jobs` "
        "shows them, and its sensor starts the backfill that writes them.",
    )


class RollBackConfig(dg.Config):
    """Launchpad settings of the job that rolls back."""

    drop_candidate: bool = Field(
        default=False, description="If nothing has been swapped: drop what was embedded for the candidate."
    )


class ContractConfig(dg.Config):
    """Launchpad settings of migration/contract."""

    now: bool = Field(default=False, description="Drop the previous model within the grace period too.")


def build_migration_assets(definition: CollectionDefinition) -> list[dg.AssetsDefinition]:
    """migration/expand, migration/backfill, migration/swap and migration/contract of one collection."""

    def options(name: str, kinds: set[str], deps: list[str], *, partitioned: bool = False) -> dict[str, Any]:
        common = asset_options(definition, f"migration/{name}", kinds, deps, partitioned=partitioned)
        return {**common, "group_name": f"{definition.name}_migration"}

    @dg.asset(**options("expand", {"postgres"}, ["pgvector_table"]))
    def migration_expand(
        context: dg.AssetExecutionContext, config: ExpandConfig, pipeline: PipelineResource
    ) -> dg.MaterializeResult:
        """The place of the candidate, beside the model that serves. What cannot be done is refused here, before
        anything is touched: an unknown profile, weights that are not there, a disk that is too small.

        Launchpad: `candidate_profile`. Then materialize migration/backfill.
        """
        with failures():
            collection = open_logged(context, pipeline, definition)
            change = expand(collection, candidate_profile(collection, config.candidate_profile))
        return dg.MaterializeResult(metadata=_state(collection, change))

    @dg.asset(**options("backfill", {"postgres"}, ["migration/expand"], partitioned=True), pool=ENCODER_POOL)
    def migration_backfill(
        context: dg.AssetExecutionContext, config: BackfillConfig, pipeline: PipelineResource
    ) -> None:
        """The batch's vectors under the candidate, from the texts that are there; nothing is read from the source, and
        what a killed run had encoded is not encoded again.

        Launchpad: `api: batch`, half the price of a hosted model, within a day.

        Numbers: `texts` of the batch, of which `embedded`, `reused`, `quarantined` or `in_jobs`; `texts_done` by this
        run so far; `percent` of the batches done, and `minutes_left` at this run's speed.
        """
        started = time.monotonic()

        def steps(collection: Collection, batches: list[int]) -> Iterator[tuple[int, Mapping[str, Any]]]:
            change = open_change(collection)
            state = _state(collection, change) if change else {}
            before, texts = state.get("backfilled_batches", 0), 0
            for batch, backfilled in backfill(collection, batches, context.run.run_id, check_named(config.api)):
                assert change is not None  # else there were nothing to backfill
                with contextlib.suppress(DatabaseError, psycopg.OperationalError):  # `backfill` waits for it
                    state = _state(collection, change)
                newly = max(1, state["backfilled_batches"] - before)
                left = (state["batches"] - state["backfilled_batches"]) * (time.monotonic() - started) / newly / 60
                texts += backfilled.texts
                yield batch, {**metadata_of(backfilled), **state, "texts_done": texts, "minutes_left": round(left, 1)}

        each(context, pipeline, definition, steps)

    @dg.asset(**options("swap", {"postgres"}, ["migration/backfill"]), pool=ENCODER_POOL)
    def migration_swap(context: dg.AssetExecutionContext, pipeline: PipelineResource) -> dg.MaterializeResult:
        """The candidate becomes the current model, if it passes: its index is built beside the one in use, coverage,
        recall and golden queries are checked, and one transaction changes model, fingerprint and view. Queries go on
        all the while. Until migration/contract the previous model is kept current, and the job `…_migration_roll_back`
        brings it back at once.

        Numbers: `recall_at_10` of its index, `neighbour_overlap` of the two models, `ndcg_current` and `ndcg_candidate`
        if golden queries are given; `locked_ms` of the transaction.
        """
        with failures():
            collection = open_logged(context, pipeline, definition)
            done = swap(collection, context.run.run_id)
            change = open_change(collection)
        assert done.gate is not None and done.index is not None
        figures = {
            name: value
            for name, value in vars(done.gate).items()
            if value is not None and isinstance(value, int | float)
        }
        metadata = {
            **figures,
            **_locks(done.exclusive),
            "index_build_seconds": done.index.build_seconds,
            "seconds": done.seconds,
            "scores": dg.MetadataValue.md(f"![cosines of the nearest ten]({_picture(done.gate)})"),
        }
        return dg.MaterializeResult(metadata={**metadata, **(_state(collection, change) if change else {})})

    @dg.asset(**options("contract", {"postgres"}, ["migration/swap"]))
    def migration_contract(
        context: dg.AssetExecutionContext, config: ContractConfig, pipeline: PipelineResource
    ) -> dg.MaterializeResult:
        """Drops the previous model; after it there is no way back. Refuses within the grace period.

        Launchpad: `now` drops it all the same.
        """
        with failures():
            collection = open_logged(context, pipeline, definition)
            done = contract(collection, now=config.now)
        return dg.MaterializeResult(metadata={**_locks(done), "phase": "contracted"})

    return [migration_expand, migration_backfill, migration_swap, migration_contract]


def build_migration_jobs(definition: CollectionDefinition) -> list[Any]:
    """A job for each phase, and one that rolls back."""

    @dg.op(name=op_name(definition, "roll_back_model"), out=dg.Out(dg.Nothing))
    def roll_back_model(context: dg.OpExecutionContext, config: RollBackConfig, pipeline: PipelineResource) -> None:
        with failures():
            done = roll_back(pipeline.open(definition), context.run_id, drop_candidate=config.drop_candidate)
        context.log.info(
            "the candidate was dropped: nothing had been swapped"
            if done is None
            else f"the previous model is the current one again; locked for {done.exclusive.locked_ms} ms"
        )

    @dg.job(
        name=job_name(definition, "migration_roll_back"),
        **job_tags(definition, MODEL_CHANGE),
        description=(
            "Change of the model, undone: bring the previous model back; before a swap, drop the candidate (launchpad: "
            "drop_candidate)."
        ),
    )
    def migration_roll_back() -> None:
        roll_back_model()

    phases = {
        "expand": "Change of the model, 1: make the candidate's place (launchpad: candidate_profile).",
        "backfill": "Change of the model, 2: backfill batches of the candidate.",
        "swap": "Change of the model, 3: check the candidate, and make it the current model.",
        "contract": "Change of the model, 4, a day later: drop the previous model (launchpad: now).",
    }
    jobs: list[Any] = [
        dg.define_asset_job(
            job_name(definition, f"migration_{phase}"),
            dg.AssetSelection.assets(asset_key(definition, f"migration/{phase}")),
            description=description,
            **job_tags(definition, MODEL_CHANGE),
        )
        for phase, description in phases.items()
    ]
    return [*jobs, migration_roll_back]


def _state(collection: Collection, change: ModelChange) -> dict[str, Any]:
    """What every step tells: phase, models, and how far the one beside the current model is backfilled."""
    done = progress(collection, change.shadow)
    role = "candidate" if change.phase == "expanded" else "previous"
    return {
        "phase": change.phase,
        "current_profile": change.current.profile.name,
        f"{role}_profile": change.shadow.profile.name,
        f"{role}_fingerprint": change.shadow.destination.fingerprint,
        "batches": done.batches,
        "backfilled_batches": done.backfilled,
        "percent": done.percent,
    }


def _picture(gate: Gate) -> str:
    """The plot of scores as a data URL, which is all that the page's policy lets a picture be."""
    return "data:image/svg+xml;base64," + b64encode(gate.plot().encode()).decode()


def _locks(exclusive: Exclusive) -> dict[str, Any]:
    return vars(exclusive)
