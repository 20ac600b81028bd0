"""Texts into vectors, and which of them are at fault if that fails (rule 7)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeGuard

import numpy as np
from numpy.typing import NDArray

from embeddings_pipeline.encoders.base import HARMLESS, Encoder, OnAnswer, PoisonTextsError
from embeddings_pipeline.errors import OutageError, OutOfMemoryError, PipelineError, ProfileError
from embeddings_pipeline.forks import compute
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.store.vector_range import NOT_A_VECTOR, usable, why_not

MOST_HELPLESS = 10  # texts without a vector, of which none has one alone either


@dataclass
class Encoding:
    """What is known of texts that are encoded, beside their vectors."""

    bad: dict[bytes, str] = field(default_factory=dict)  # content hash → why the text is poison
    tokens: dict[bytes, int] = field(default_factory=dict)  # content hash → number of tokens


class CountingEncoder(Encoder, Protocol):
    """One that counts tokens while it encodes, so that each text is tokenised once."""

    def encode_counted(self, texts: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """What `encode_documents` and `count_tokens` give."""


def counts_while_encoding(encoder: Encoder) -> TypeGuard[CountingEncoder]:
    return hasattr(encoder, "encode_counted")


def encode(
    encoder: Encoder, texts: Mapping[bytes, str], made: Encoding, on_answer: OnAnswer | None = None
) -> NDArray[np.float32]:
    """Vectors of texts (by content hash); those that fail by themselves get zeros, and a reason in `made`, which is
    given the numbers of tokens too if the encoder says them. on_answer: for an encoder that takes it.
    """
    digests, values = list(texts), list(texts.values())
    vectors = _encode(encoder, digests, values, made, on_answer)
    _encode_alone(encoder, digests, values, vectors, made)
    return vectors


def _encode(
    encoder: Encoder, digests: list[bytes], texts: list[str], made: Encoding, on_answer: OnAnswer | None = None
) -> NDArray[np.float32]:
    told: dict[str, Any] = {} if on_answer is None else {"on_answer": on_answer}
    try:
        if not counts_while_encoding(encoder):
            return compute(partial(encoder.encode_documents, **told), texts)
        vectors, counts = compute(encoder.encode_counted, texts)
        made.tokens.update(zip(digests, counts.tolist(), strict=True))
        return vectors
    except PoisonTextsError as error:
        made.bad |= {digests[place]: reason for place, reason in error.reasons.items()}
        return np.where(np.isnan(error.vectors), np.float32(0), error.vectors)
    except Exception as error:
        if _no_texts_fault(error):
            raise
        if len(texts) == 1:
            if not _works(encoder):
                raise
            made.bad[digests[0]] = _reason(error, texts[0])
            return np.zeros((1, encoder.dimensions), np.float32)
        half = len(texts) // 2
        first = _encode(encoder, digests[:half], texts[:half], made, on_answer)
        return np.concatenate([first, _encode(encoder, digests[half:], texts[half:], made, on_answer)])


def count_tokens(encoder: Encoder, texts: list[str]) -> list[int]:
    """As the encoder counts them; 0 for a text that it cannot count."""
    try:
        counts: list[int] = encoder.count_tokens(texts).tolist()
    except Exception as error:
        if _no_texts_fault(error):
            raise
        half = len(texts) // 2
        return [0] if half == 0 else count_tokens(encoder, texts[:half]) + count_tokens(encoder, texts[half:])
    return counts


def _no_texts_fault(error: Exception) -> bool:
    return isinstance(error, OutageError | ProfileError) and not isinstance(error, OutOfMemoryError)


def _encode_alone(encoder: Encoder, digests: list[bytes], texts: list[str], vectors: NDArray, made: Encoding) -> None:
    """Put what the model gives for a text alone in the place of what is no vector: with some models and processors that
    is because of the longer texts beside it. Ends after the first few for which that does not help.
    """
    helpless = 0
    for row in np.flatnonzero(~usable(vectors)) if len(texts) > 1 else ():
        if digests[row] in made.bad:
            continue
        vectors[row] = _encode(encoder, [digests[row]], [texts[row]], made)[0]
        helpless += not usable(vectors[row : row + 1])[0]
        if helpless == MOST_HELPLESS:
            break


def refused(
    collection: Collection, encoder: Encoder, digests: list[bytes], vectors: NDArray, bad: dict[bytes, str]
) -> dict[bytes, str]:
    """Why vectors of texts that are not bad cannot be stored. Those that are none at all become `bad`.

    ProfileError if a harmless text's vector cannot be stored either: then it is the model that does not fit.
    """
    storage = collection.model.destination.storage
    reasons = {digests[row]: reason for row, reason in why_not(vectors, storage).items() if digests[row] not in bad}
    bad |= {digest: reason for digest, reason in reasons.items() if reason == NOT_A_VECTOR}
    not_kept = {digest: reason for digest, reason in reasons.items() if reason != NOT_A_VECTOR}
    if not_kept and len(not_kept) + len(bad) == len(digests):
        for reason in why_not(encoder.encode_documents([HARMLESS]), storage).values():
            if reason != NOT_A_VECTOR:
                raise ProfileError(
                    f"Profile {collection.profile.name}: no vector of {collection.profile.model} can be stored: of "
                    f"{HARMLESS!r} {reason}"
                )
    return not_kept


def _reason(error: BaseException, text: str) -> str:
    if isinstance(error, MemoryError | OutOfMemoryError):
        return f"memory ran out for this text of {len(text):,} characters alone: `chunk:` splits long texts"
    if type(error) is PipelineError and error.__cause__ is not None:  # of the model, or of a class of the user's own
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"


def _works(encoder: Encoder) -> bool:
    """Whether the encoder takes a harmless text: if not, the texts are not to blame."""
    try:
        encoder.encode_documents([HARMLESS])
    except Exception:
        return False
    return True
