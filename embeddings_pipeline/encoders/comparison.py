"""Our vectors beside those that sentence-transformers itself makes of the same model."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.encoders.base import Encoder
from embeddings_pipeline.encoders.batches import lowest_cosine
from embeddings_pipeline.encoders.local import load_model


class Vectors(NamedTuple):
    """What one of the two makes of the same texts."""

    documents: NDArray[np.float32]
    queries: NDArray[np.float32]


class Likeness(NamedTuple):
    """The lowest cosines to what sentence-transformers gives."""

    documents: float  # to `encode_document`
    queries: float  # to `encode_query`


def compare(profile: Profile, encoder: Encoder, texts: Sequence[str]) -> Likeness:
    """Encode texts with `encoder` and with the model loaded anew, in float32.

    The library is given the prompts that the profile says itself, its maximum length and attention, and chooses what it
    leaves open. Raises ProfileError if the model cannot be loaded.
    """
    device = torch.device(str(getattr(encoder, "device", "cpu")))
    return likeness(encoder, texts, reference(profile, load_model(profile, device), texts))


def reference(profile: Profile, model: SentenceTransformer, texts: Sequence[str]) -> Vectors:
    """What sentence-transformers makes of the texts."""
    return Vectors(
        model.encode_document(list(texts), prompt=profile.document_prompt, show_progress_bar=False),
        model.encode_query(list(texts), prompt=profile.query_prompt, show_progress_bar=False),
    )


def likeness(encoder: Encoder, texts: Sequence[str], theirs: Vectors) -> Likeness:
    """How near an encoder's vectors of the texts are to those."""
    return Likeness(
        round(lowest_cosine(encoder.encode_documents(texts), theirs.documents), 6),
        round(lowest_cosine(encoder.encode_queries(texts), theirs.queries), 6),
    )
