"""Does the model still give the vectors that it gave? A fingerprint knows its weights by their files, not what a
library, a processor or a service makes of them, so twenty texts are encoded again and compared with what they gave.
"""

from dataclasses import dataclass

import numpy as np

from embeddings_pipeline.encoders.base import Encoder
from embeddings_pipeline.pipeline.canaries import ask_again, remember
from embeddings_pipeline.pipeline.collection import Collection

LEAST_COSINE = 0.999


@dataclass(frozen=True)
class Drift:
    """How the canaries compare with what they gave at first; `texts` is 0 if nothing was stored."""

    texts: int
    lowest_cosine: float
    mean_cosine: float
    worst_text: str

    @property
    def same(self) -> bool:
        return self.texts == 0 or self.lowest_cosine >= LEAST_COSINE


def measure(collection: Collection, encoder: Encoder) -> Drift:
    """Encode the stored canaries again and compare by cosine. The first time, they are stored."""
    ask_again(collection)
    remember(collection, encoder)
    query = "SELECT text, embedding FROM embeddings.canary WHERE collection = %s AND fingerprint = %s ORDER BY number"
    with collection.database.connect(autocommit=True) as connection:
        stored = connection.execute(query, [collection.definition.name, collection.fingerprint]).fetchall()
    texts = [text for text, _ in stored]
    then = np.array([vector for _, vector in stored], np.float64)
    now = encoder.encode_documents(texts).astype(np.float64)
    if then.shape != now.shape:
        return Drift(len(texts), 0.0, 0.0, texts[0])
    lengths = np.linalg.norm(then, axis=1) * np.linalg.norm(now, axis=1)
    cosines = np.nan_to_num(np.einsum("ij,ij->i", then, now) / np.where(lengths > 0, lengths, 1), nan=0.0)
    cosines[~then.any(axis=1) & ~now.any(axis=1)] = 1.0  # it knows no word of the text, then as now
    worst = int(cosines.argmin())
    return Drift(len(texts), round(float(cosines[worst]), 6), round(float(cosines.mean()), 6), texts[worst])
