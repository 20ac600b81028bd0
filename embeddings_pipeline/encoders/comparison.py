"""Our vectors beside those that sentence-transformers itself makes of the same model."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.encoders.local import LocalEncoder, load_model


class Likeness(NamedTuple):
    """The lowest cosines to what sentence-transformers gives."""

    documents: float  # to `encode_document`
    queries: float  # to `encode_query`


def compare(profile: Profile, encoder: LocalEncoder, texts: Sequence[str]) -> Likeness:
    """Encode texts with `encoder` and with the model loaded anew, in float32.

    The library is given the prompts that the profile says itself, its maximum length and attention, and chooses what it
    leaves open. Raises ProfileError if the model cannot be loaded.
    """
    model = load_model(profile, encoder.device)
    documents = model.encode_document(list(texts), prompt=profile.document_prompt, show_progress_bar=False)
    queries = model.encode_query(list(texts), prompt=profile.query_prompt, show_progress_bar=False)
    return Likeness(
        _lowest_cosine(encoder.encode_documents(texts), documents),
        _lowest_cosine(encoder.encode_queries(texts), queries),
    )


def _lowest_cosine(ours: NDArray, theirs: NDArray) -> float:
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return round(float(((a * b).sum(axis=1) / np.where(lengths > 0, lengths, 1)).min()), 6)
