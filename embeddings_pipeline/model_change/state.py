"""How far a change of the model has come, as the database says."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from psycopg import errors

from embeddings_pipeline.config.definition import named_profile
from embeddings_pipeline.config.model_words import with_model_prompts
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.store.destination.base import Destination
from embeddings_pipeline.store.destination.factory import destination_of
from embeddings_pipeline.store.models import Model, stored_profile
from embeddings_pipeline.store.sql import load_sql


@dataclass(frozen=True)
class ModelChange:
    """A change of the model that is under way: before the swap from `current` to `candidate`, after it `previous` is
    the model that was current.
    """

    id: int
    collection: str
    phase: str  # expanded: before the swap; swapped: until the previous model is dropped
    current: Model
    shadow: Model  # the candidate before the swap, the previous model after it
    expanded_at: datetime
    swapped_at: datetime | None
    gate: dict[str, Any] | None
    made_by_expand: bool  # the candidate's place; else `profile add` keeps it

    @property
    def candidate(self) -> Model:
        """The model that may become the current one, before the swap."""
        assert self.phase == "expanded", self.phase
        return self.shadow

    @property
    def previous(self) -> Model:
        """The model that was the current one, after the swap."""
        assert self.phase == "swapped", self.phase
        return self.shadow


@dataclass(frozen=True)
class Progress:
    """How far a shadow model is backfilled, in batches that are committed."""

    batches: int
    backfilled: int

    @property
    def percent(self) -> float:
        return round(100 * self.backfilled / self.batches, 2) if self.batches else 100.0


def open_change(collection: Collection) -> ModelChange | None:
    """The change of the model that is under way, or None."""
    name = collection.definition.name
    with collection.database.connect(autocommit=True) as connection:
        try:
            row = connection.execute(load_sql("model_change/open"), {"collection": name}).fetchone()
        except (errors.UndefinedTable, errors.InvalidSchemaName):  # nothing has been synced into this database
            return None
    if row is None:
        return None
    number, phase, expanded_at, swapped_at, gate, made_by_expand, *models = row
    current, shadow = (
        Model(stored_profile(profile), destination_of(collection.definition, *destination))
        for *destination, profile in (models[:4], models[4:])
    )
    return ModelChange(number, name, phase, current, shadow, expanded_at, swapped_at, gate, made_by_expand)


def progress(collection: Collection, model: Model) -> Progress:
    """How far a shadow model is backfilled."""
    parameters = {"collection": collection.definition.name, "fingerprint": model.destination.fingerprint}
    with collection.database.connect(autocommit=True) as connection:
        row = connection.execute(load_sql("model_change/progress"), parameters).fetchone()
    return Progress(*row) if row else Progress(0, 0)


def texts_done(collection: Collection, model: Model) -> tuple[int, int]:
    """How many texts have their vector in a shadow model, and how many are to have one."""
    with collection.database.connect(autocommit=True) as connection:
        row = connection.execute(model.destination.statement("model_change/texts_done")).fetchone()
    return (row[0], row[1]) if row else (0, 0)


def incomplete_batches(collection: Collection, model: Model) -> list[int]:
    """The batches in which a shadow model lacks vectors, in order."""
    parameters = {"collection": collection.definition.name, "shadow": model.destination.fingerprint}
    with collection.database.connect(autocommit=True) as connection:
        return [row[0] for row in connection.execute(load_sql("model_change/incomplete"), parameters)]


def candidate_profile(collection: Collection, name: str) -> Profile:
    """The profile of that name, the collection's own or a built-in one, with its model's own prompts where it says
    nothing. ProfileError if there is none, or its weights cannot be had.
    """
    return with_model_prompts(named_profile(collection.definition, name, collection.settings))


def candidate_destination(collection: Collection, profile: Profile) -> Destination:
    """Where this profile's vectors are, or would be."""
    digest = collection.made_by(profile)
    return destination_of(collection.definition, digest, profile.dimensions, collection.model.destination.storage)


def named(model: Model) -> str:
    """A model for people: its profile and fingerprint."""
    return f"{model.profile.name} ({model.destination.fingerprint})"
