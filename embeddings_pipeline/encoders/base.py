"""What an encoder is: texts in, unit vectors out."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from embeddings_pipeline.config.profiles import Profile


class Encoder(Protocol):
    """Turns texts into vectors. Implementations are safe to call from several threads.

    A class of the user's own (`provider: python`) is constructed with the `Profile` as its only argument, and may leave
    `count_tokens` out; `OwnEncoder` looks at what it gives.
    """

    @property
    def dimensions(self) -> int:
        """Length of each vector."""

    def encode_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Encode texts that will be searched; the profile's document prompt is put before each one.

        Returns float32 of shape (len(texts), dimensions), unit length if the profile normalises, in the
        order given; a row may hold NaN or infinity, which the caller quarantines. Raises OutageError for what
        another try may mend (memory, network), PipelineError else.
        """

    def encode_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """As `encode_documents`, with the profile's query prompt."""

    def count_tokens(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Number of tokens of each text as the model would see it, before truncation (with the document prompt).

        Special tokens count, so a text is truncated if this is more than `tokens_read`.
        """


def tokens_read(encoder: Encoder, profile: Profile) -> int | None:
    """How many tokens of a text, prompt included, the encoder reads; None if all.

    An encoder may have an attribute `max_length`, if it knows better than its profile.
    """
    length: int | None = getattr(encoder, "max_length", profile.max_length)
    return length
