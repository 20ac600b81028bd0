"""Does the model still give the vectors that it gave? A fingerprint knows its weights by their files, not what a
library, a processor or a service makes of them, so twenty texts are encoded again and compared with what they gave.
"""

from dataclasses import dataclass

import numpy as np

from embeddings_pipeline.encoders.base import Encoder
from embeddings_pipeline.store.database import Database

LEAST_COSINE = 0.999

# Short and long, of several languages and scripts, with numbers, code and symbols: what takes different paths.
CANARIES = (
    "A plain sentence in English.",
    "cat",
    "The quick brown fox jumps over the lazy dog while the band plays on until three in the morning.",
    "A retired detective returns to the village where his first case was never solved, and finds that everybody there "
    "remembers it differently. As the winter closes the roads, he has one week, one witness and no proof.",
    "Zwei Brüder überqueren die Alpen, um ein verlorenes Fahrrad zurückzubringen.",
    "Une comédie douce-amère sur trois générations de boulangères à Lyon.",
    "El niño que soñaba con trenes llegó a Ñuñoa a las 7 de la mañana.",
    "Женщина находит письмо, отправленное сорок лет назад.",
    "老人在海边等待一艘再也不会回来的船。",
    "雨の日の図書館で二人は出会った。",
    "قصة عن صداقة بين طبيب وصياد",
    "सर्दियों की एक रात की कहानी",
    "1984, 2001, 3.14159, -40 °C, 1.000.000 €",
    "SELECT title FROM films WHERE year > 1999 ORDER BY revenue DESC;",
    'def area(r: float) -> float:\n    return 3.14159 * r ** 2  # "circle"',
    "https://example.com/films?id=42&lang=en#cast",
    "🎬🍿 film night!!! 😂 👩‍👩‍👧",
    "ALL CAPITALS, EXCEPT THE LAST word",
    "love love love love love love love love",
    "Science fiction, adventure, drama | space, time travel, astronaut, wormhole, father and daughter | 2014",
)


@dataclass(frozen=True)
class Drift:
    """How the canaries compare with what they gave at first; `texts` is 0 where nothing was stored."""

    texts: int
    lowest_cosine: float
    mean_cosine: float
    worst_text: str

    @property
    def same(self) -> bool:
        return self.texts == 0 or self.lowest_cosine >= LEAST_COSINE


_known: set[tuple[str, str]] = set()  # what this process need not ask for again


def remember(database: Database, fingerprint: str, encoder: Encoder) -> bool:
    """Store what the canaries give now, unless that is already known; whether it was stored."""
    if (database.url, fingerprint) in _known:
        return False
    there = "SELECT EXISTS (SELECT FROM embeddings.canary WHERE fingerprint = %s)"
    with database.connect(autocommit=True) as connection:
        if connection.execute(there, [fingerprint]).fetchone() == (True,):
            _known.add((database.url, fingerprint))
            return False
        vectors = encoder.encode_documents(CANARIES)
        rows = [(fingerprint, n, CANARIES[n], vector.tolist()) for n, vector in enumerate(vectors)]
        with connection.transaction(), connection.cursor() as cursor:
            cursor.executemany("INSERT INTO embeddings.canary VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING", rows)
    return True


def measure(database: Database, fingerprint: str, encoder: Encoder) -> Drift:
    """Encode the stored canaries again and compare by cosine. The first time, they are stored."""
    _known.discard((database.url, fingerprint))
    remember(database, fingerprint, encoder)
    query = "SELECT text, embedding FROM embeddings.canary WHERE fingerprint = %s ORDER BY number"
    with database.connect(autocommit=True) as connection:
        stored = connection.execute(query, [fingerprint]).fetchall()
    texts = [text for text, _ in stored]
    then = np.array([vector for _, vector in stored], np.float64)
    now = encoder.encode_documents(texts).astype(np.float64)
    if then.shape != now.shape:
        return Drift(len(texts), 0.0, 0.0, texts[0])
    lengths = np.linalg.norm(then, axis=1) * np.linalg.norm(now, axis=1)
    cosines = np.nan_to_num(np.einsum("ij,ij->i", then, now) / np.where(lengths > 0, lengths, 1), nan=0.0)
    worst = int(cosines.argmin())
    return Drift(len(texts), round(float(cosines[worst]), 6), round(float(cosines.mean()), 6), texts[worst])
