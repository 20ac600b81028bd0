"""Twenty texts whose first vectors under a model are kept, so that it can be seen whether it still gives them."""

from embeddings_pipeline.encoders.base import Encoder
from embeddings_pipeline.store.database import Database

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

_known: set[tuple[str, str]] = set()  # what this process need not ask for again


def remember(database: Database, fingerprint: str, encoder: Encoder) -> bool:
    """Store what the canaries give now, unless that is already known; whether it was stored."""
    if (database.url, fingerprint) in _known:
        return False
    stored = "SELECT EXISTS (SELECT FROM embeddings.canary WHERE fingerprint = %s)"
    with database.connect(autocommit=True) as connection:
        if connection.execute(stored, [fingerprint]).fetchone() == (True,):
            _known.add((database.url, fingerprint))
            return False
        vectors = encoder.encode_documents(CANARIES)
        rows = [(fingerprint, n, CANARIES[n], vector.tolist()) for n, vector in enumerate(vectors)]
        with connection.transaction(), connection.cursor() as cursor:
            cursor.executemany("INSERT INTO embeddings.canary VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING", rows)
    return True


def ask_again(database: Database, fingerprint: str) -> None:
    """Have the next `remember` look whether the canaries are stored, though this process has stored them."""
    _known.discard((database.url, fingerprint))


def forget_canaries() -> None:
    """Have the next `remember` look at every database and model, as a new process does."""
    _known.clear()
