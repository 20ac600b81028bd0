"""What may refuse a phase of a model change. Everything that can be refused is refused before anything is touched."""

import contextlib
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
from psycopg import errors, sql

from embeddings_pipeline.config.prices import is_paid
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.encoders import load_encoder
from embeddings_pipeline.encoders.base import HARMLESS
from embeddings_pipeline.errors import ModelChangeError, ProfileError, profile_command
from embeddings_pipeline.model_change.state import (
    ModelChange,
    candidate_destination,
    named,
    open_change,
    progress,
)
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.search.evaluate import golden_judgements, missing_items
from embeddings_pipeline.store.destination.base import MOST_DIMENSIONS, Destination
from embeddings_pipeline.store.destination.rights import check_rights
from embeddings_pipeline.store.sql import load_sql
from embeddings_pipeline.store.vector_range import why_not

COUNT_BELOW = 100_000  # texts; more are not counted to see whether the disk has room


# --- expand ------------------------------------------------------------------------------------------------------


def check_no_other_change(collection: Collection, profile: Profile) -> ModelChange | None:
    """The open change if it is to that very model; None if none is open. ModelChangeError if it is to another."""
    change = open_change(collection)
    if change is None:
        return None
    if change.phase == "expanded" and change.candidate.profile.name == profile.name:
        if change.candidate.destination.fingerprint == candidate_destination(collection, profile).fingerprint:
            return change
        raise ModelChangeError(
            f"collection {change.collection!r}: profile {profile.name!r} is not what it was when the change to it "
            f"began ({change.candidate.destination.fingerprint}); put it back, or end the change with "
            f"`{profile_command('rollback', change.collection)}` and begin anew"
        )
    before, after = (change.current, change.shadow) if change.phase == "expanded" else (change.shadow, change.current)
    command = "contract" if change.phase == "swapped" else f"switch {after.profile.name}"
    raise ModelChangeError(
        f"collection {change.collection!r}: a change from {named(before)} to {named(after)} is open ({change.phase}); "
        f"finish it with `{profile_command(command, change.collection)}`, or undo it with "
        f"`{profile_command('rollback', change.collection)}`"
    )


def check_candidate(collection: Collection, profile: Profile) -> Destination:
    """The destination of a model that may be made, and that answers. ModelChangeError or ProfileError says why it may
    not be.
    """
    candidate = _check_place(collection, profile)
    check_encoder(collection, profile, candidate)
    return candidate


def check_unasked(collection: Collection, profile: Profile) -> Destination:
    """As `check_candidate`, but a model that takes money is asked nothing: its key and settings are looked at."""
    if not is_paid(profile):
        return check_candidate(collection, profile)
    candidate = _check_place(collection, profile)
    load_encoder(profile, collection.settings)
    return candidate


def _check_place(collection: Collection, profile: Profile) -> Destination:
    name, key = collection.definition.name, "profile"
    if collection.definition.attributes.destination is not None:
        key = "destination.profile"
    if not collection.ledger.has_vectors():
        raise ModelChangeError(
            f"collection {name!r} has no vectors yet, so there is nothing to migrate: declare the profile (`{key}: "
            f"{profile.name}` in its defs.yaml) and sync"
        )
    candidate = candidate_destination(collection, profile)
    if candidate.fingerprint == collection.fingerprint:
        raise ModelChangeError(f"collection {name!r}: profile {profile.name!r} is its current model already")
    is_kept = candidate.fingerprint in {model.destination.fingerprint for model in collection.ledger.shadow_models()}
    with collection.database.connect(autocommit=True) as connection:
        _check_dimensions(connection, collection, candidate, profile)
        current = collection.model.destination
        check_rights(connection, name, [*current.kept, current.tables.view, current.marker])
        current.check_candidate(connection, candidate, is_kept=is_kept)
        if not is_kept:
            _check_disk(connection, collection, candidate)
    if golden := golden_judgements(collection.definition):  # what is wrong is said now, not after the backfill
        missing_items(collection.definition, collection.settings, golden)
    return candidate


def _check_dimensions(
    connection: psycopg.Connection, collection: Collection, candidate: Destination, profile: Profile
) -> None:
    """ModelChangeError if the index that a swap builds cannot hold so many dimensions."""
    most = MOST_DIMENSIONS[candidate.storage]
    if candidate.dimension <= most:
        return
    methods = collection.model.destination.index_methods(connection, collection.definition.attributes.index)
    if methods:
        raise ModelChangeError(
            f"collection {candidate.collection!r}: pgvector's {methods[0]} takes up to {most} dimensions of a "
            f"{candidate.storage}, and profile {profile.name!r} has {candidate.dimension}; set `index: {{method: "
            f"none}}` in its defs.yaml first"
        )


def _check_disk(connection: psycopg.Connection, collection: Collection, candidate: Destination) -> None:
    """ModelChangeError if the server's disk can be seen from here and has not the room."""
    method = collection.definition.attributes.index.method
    needed = candidate.needed_bytes(_count_texts(connection, candidate), method)
    with contextlib.suppress(errors.InsufficientPrivilege, OSError):
        row = connection.execute("SELECT current_setting('data_directory', true)").fetchone()
        if row and row[0] and Path(row[0]).is_dir():
            free = shutil.disk_usage(row[0]).free
            if free < needed:
                raise ModelChangeError(
                    f"collection {candidate.collection!r}: the candidate's vectors and their index need about "
                    f"{needed / 1e9:.1f} GB beside the present ones, and the database's disk has {free / 1e9:.1f} GB "
                    f"free; make room first"
                )


def _count_texts(connection: psycopg.Connection, candidate: Destination) -> int:
    """How many texts are to have a vector; the planner's estimate if they are many."""
    table = candidate.tables.text
    estimate = "SELECT reltuples::bigint FROM pg_class WHERE oid = to_regclass(%s)"
    row = connection.execute(estimate, [table.as_string(connection)]).fetchone()
    if row is None or row[0] < COUNT_BELOW:
        row = connection.execute(sql.SQL("SELECT count(*) FROM {} WHERE NOT blank").format(table)).fetchone()
    return row[0] if row else 0


def check_encoder(collection: Collection, profile: Profile, destination: Destination) -> None:
    """ProfileError if the model cannot be loaded, or does not give vectors as its profile says, that can be kept."""
    vectors = load_encoder(profile, collection.settings).encode_documents([HARMLESS])
    if vectors.shape != (1, profile.dimensions):
        raise ProfileError(f"Profile {profile.name}: it gives vectors of shape {vectors.shape}")
    for reason in why_not(vectors, destination.storage).values():
        raise ProfileError(f"Profile {profile.name}: of a plain sentence, {reason}")


# --- backfill and swap -------------------------------------------------------------------------------------------


def expanded_change(collection: Collection, phase: str) -> ModelChange:
    """The open change, before its swap. ModelChangeError if there is none, or it is swapped."""
    change = open_change(collection)
    if change is None:
        raise ModelChangeError(
            f"collection {collection.definition.name!r}: no change of its model is open, so there is nothing to "
            f"{phase}; begin with `{profile_command('switch NAME', collection.definition.name)}`, or materialize "
            f"migration/expand"
        )
    if change.phase != "expanded":
        raise ModelChangeError(
            f"collection {collection.definition.name!r}: {named(change.current)} is the current model already; go on "
            f"with `{profile_command('contract', change.collection)}`, or back with "
            f"`{profile_command('rollback', change.collection)}`"
        )
    return change


def check_swap(collection: Collection, change: ModelChange) -> None:
    """ModelChangeError or ProfileError if the candidate cannot take over, whatever its vectors are like."""
    parameters = {"collection": change.collection, "fingerprint": change.candidate.destination.fingerprint}
    with collection.database.connect(autocommit=True) as connection:
        row = connection.execute(load_sql("model_change/never_backfilled"), parameters).fetchone()
    if row and row[0]:
        raise ModelChangeError(
            f"collection {change.collection!r}: {row[0]:,} of {progress(collection, change.candidate).batches:,} "
            f"batches are not backfilled; materialize migration/backfill first, or run "
            f"`{profile_command(f'switch {change.candidate.profile.name}', change.collection)}`"
        )
    check_exchange(collection, change)
    check_encoder(collection, change.candidate.profile, change.candidate.destination)  # searches are going to need it


def check_exchange(collection: Collection, change: ModelChange) -> None:
    """ModelChangeError if something stands in the way of exchanging the two models, either way."""
    current, shadow = change.current.destination, change.shadow.destination
    with collection.database.connect(autocommit=True) as connection:
        kept = [*current.kept, *shadow.kept, current.tables.view, current.marker]
        check_rights(connection, change.collection, kept)
        current.check_exchange(connection, shadow)


# --- roll back and contract --------------------------------------------------------------------------------------


def check_roll_back(collection: Collection, *, drop_candidate: bool) -> ModelChange:
    """The open change. ModelChangeError if there is none, or it would drop the candidate unasked."""
    change = open_change(collection)
    if change is None:
        raise ModelChangeError(
            f"collection {collection.definition.name!r}: no change of its model is open, so there is nothing to roll "
            f"back"
        )
    if change.phase == "expanded" and not drop_candidate:
        raise ModelChangeError(
            f"collection {change.collection!r}: {named(change.current)} is the current model, and nothing has been "
            f"swapped; to drop what was embedded for {named(change.candidate)}, say `drop_candidate: true` in the "
            f"launchpad, or `{profile_command('rollback', change.collection)}`"
        )
    return change


def check_contract(collection: Collection, *, now: bool) -> ModelChange:
    """The open change, after its swap. ModelChangeError if the previous model may not be dropped yet. `now`: it may
    be dropped within the grace period, and with vectors that the current one has not.
    """
    change = open_change(collection)
    name = collection.definition.name
    if change is None or change.swapped_at is None or change.phase != "swapped":
        raise ModelChangeError(
            f"collection {name!r}: nothing has been swapped, so there is no previous model to drop; "
            + ("swap first" if change else f"see `{profile_command('status', name)}`")
        )
    if now:
        return change
    with collection.database.connect(autocommit=True) as connection:
        row = connection.execute(load_sql("model_change/grace"), {"change": change.id}).fetchone()
    since, asked_at = row or (change.swapped_at, datetime.now(UTC))
    ends = since + timedelta(hours=collection.definition.attributes.model_change.grace_hours)
    if asked_at < ends:
        raise ModelChangeError(
            f"collection {name!r}: the grace period runs until {ends:%Y-%m-%d %H:%M %Z}; until then "
            f"`{profile_command('rollback', name)}` brings {named(change.previous)} back at once. `--now` (in the "
            f"launchpad `now: true`) drops it all the same"
        )
    with collection.database.connect(autocommit=True) as connection:
        lost, where = change.previous.destination.lost_vectors(connection)
    if lost:
        raise ModelChangeError(
            f"collection {name!r}: {lost:,} {where}: they are outside the collection (`where:`), or in quarantine. "
            f"`--now` (in the launchpad `now: true`) drops those vectors all the same"
        )
    return change


# --- a second model ----------------------------------------------------------------------------------------------


def check_not_in_a_change(connection: psycopg.Connection, shadow: Destination) -> None:
    """Within the transaction that removes a shadow model: ModelChangeError if an open change has it."""
    parameters = {"collection": shadow.collection, "fingerprint": shadow.fingerprint}
    if connection.execute(load_sql("model_change/holds"), parameters).fetchone() is not None:
        raise ModelChangeError(
            f"collection {shadow.collection!r}: a change of its model has just been opened with this one; see "
            f"`{profile_command('status', shadow.collection)}`"
        )
