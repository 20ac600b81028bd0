"""What an encoder is: texts in, unit vectors out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.errors import PipelineError

OnAnswer = Callable[[Mapping[bytes, NDArray[np.float32]], int | None], None]
"""Called with each answer of a service as it arrives, in any thread, before it is used: its vectors by content hash,
and the tokens that it says were billed; None if it does not say."""
HARMLESS = "a plain sentence"  # an encoder that fails for it too is at fault itself


class PoisonTextsError(PipelineError):
    """Some texts of a call are refused by themselves; the others have their vectors.

    `reasons`: by place in the call. `vectors`: what the call would have returned, with NaN for those texts.
    """

    def __init__(self, message: str, reasons: Mapping[int, str], vectors: NDArray[np.float32]) -> None:
        super().__init__(message)
        self.reasons, self.vectors = dict(reasons), vectors


class Encoder(Protocol):
    """Turns texts into vectors. Implementations are safe to call from several threads.

    A class of the user's own (`provider: python`) is constructed with the `Profile` as its only argument, and may leave
    `count_tokens` out; `OwnEncoder` looks at what it gives. One that counts while it encodes has `encode_counted`
    (`CountingEncoder`).
    """

    @property
    def dimensions(self) -> int:
        """Length of each vector."""

    def encode_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Encode texts that will be searched; the profile's document prompt is put before each one.

        Returns float32 of shape (len(texts), dimensions), unit length if the profile normalises, in the
        order given; a row may hold NaN or infinity, which the caller quarantines. Raises OutageError for what
        another try may mend (memory, network), PoisonTextsError if it knows which texts fail, PipelineError else.
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
