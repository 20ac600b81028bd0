"""A query's vector, and which model makes it."""

import reprlib
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.fingerprint import fingerprint
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders import Encoder, Loaded, load
from embeddings_pipeline.errors import ProfileError
from embeddings_pipeline.forks import compute

LOOK_AGAIN_SECONDS = 1.0  # at a model's files: a look takes a millisecond


@dataclass(frozen=True)
class _Ready:
    """A model that is loaded, whose files were looked at lately."""

    loaded: Loaded
    until: float  # by `time.monotonic()`


_ready: dict[tuple[Profile, Settings], _Ready] = {}


def fingerprint_lately(profile: Profile, settings: Settings) -> str:
    """The profile's fingerprint, by files that were looked at within the last second, once its model is loaded."""
    ready = _ready.get((profile, settings))
    if ready is None or ready.until < time.monotonic():
        return fingerprint(profile, settings.state_dir)
    return ready.loaded.fingerprint


def _encoder(profile: Profile, settings: Settings) -> Encoder:
    ready = _ready.get((profile, settings))
    if ready is None or ready.until < time.monotonic():
        ready = _Ready(load(profile, settings), time.monotonic() + LOOK_AGAIN_SECONDS)
        _ready[profile, settings] = ready
    return ready.loaded.encoder


def query_vector(
    definition: CollectionDefinition, profile: Profile, settings: Settings, query: str
) -> NDArray[np.float32]:
    """(dimensions,), as the profile's model gives it. ProfileError if nothing can be compared with it."""
    [vector] = compute(_encoder(profile, settings).encode_queries, [query])
    length = np.linalg.norm(vector.astype(np.float64))
    if not (np.isfinite(length) and length > 0):
        raise ProfileError(
            f"collection {definition.name!r}: profile {profile.name!r} gives a vector that is not finite, or zero, for "
            f"the query {reprlib.repr(query)}: nothing can be compared with it; ask in other words"
        )
    result: NDArray[np.float32] = vector
    return result
