"""A query's vector."""

import reprlib

import numpy as np
from numpy.typing import NDArray

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders import load_encoder
from embeddings_pipeline.errors import ProfileError
from embeddings_pipeline.forks import compute


def query_vector(
    definition: CollectionDefinition, profile: Profile, settings: Settings, query: str
) -> NDArray[np.float32]:
    """(dimensions,), as the profile's model gives it. ProfileError if nothing can be compared with it."""
    [vector] = compute(load_encoder(profile, settings).encode_queries, [query])
    length = np.linalg.norm(vector.astype(np.float64))
    if not (np.isfinite(length) and length > 0):
        raise ProfileError(
            f"collection {definition.name!r}: profile {profile.name!r} gives a vector that is not finite, or zero, for "
            f"the query {reprlib.repr(query)}: nothing can be compared with it; ask in other words"
        )
    result: NDArray[np.float32] = vector
    return result
