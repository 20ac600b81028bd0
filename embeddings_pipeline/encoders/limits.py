"""What hosted models take in one request, and how many numbers they give: one table, which a profile may override."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from embeddings_pipeline.config.profiles import Profile


class Limits(NamedTuple):
    """Of one request, and of one input of it; None: not known."""

    inputs: int
    tokens_per_input: int | None
    tokens: int | None


class KnownModel(NamedTuple):
    """What its maker says of a model."""

    dimensions: int
    shortens: bool  # whether it gives fewer dimensions if it is asked to
    limits: Limits


_OPENAI = Limits(inputs=2048, tokens_per_input=8192, tokens=300_000)
KNOWN = {
    "text-embedding-3-small": KnownModel(1536, True, _OPENAI),
    "text-embedding-3-large": KnownModel(3072, True, _OPENAI),
    "text-embedding-ada-002": KnownModel(1536, False, _OPENAI),
}
OTHERS = Limits(inputs=32, tokens_per_input=None, tokens=None)  # as text-embeddings-inference, unless it is told more

BYTES_PER_TOKEN = 4


def limits_of(profile: Profile) -> Limits:
    """The limits of a profile's model: what the profile says, else what the table says."""
    known = KNOWN.get(profile.model)
    limits = known.limits if known else OTHERS
    return Limits(
        profile.batch_size or limits.inputs,
        profile.max_length or limits.tokens_per_input,
        profile.tokens_per_batch or limits.tokens,
    )


def estimated_tokens(texts: Sequence[str]) -> NDArray[np.int64]:
    """About how many tokens each text is: a token is four bytes of English. The model's tokenizer is not here."""
    return np.array([max(1, math.ceil(len(text.encode()) / BYTES_PER_TOKEN)) for text in texts], dtype=np.int64)


def packed(tokens: Sequence[float], inputs: int, most_tokens: float) -> list[list[int]]:
    """Places of texts, in their order, in requests of at most so many texts and tokens; a longer text has its own."""
    requests: list[list[int]] = []
    room = 0.0
    for place, count in enumerate(tokens):
        if not requests or len(requests[-1]) == inputs or count > room:
            requests.append([])
            room = most_tokens
        requests[-1].append(place)
        room -= count
    return requests
