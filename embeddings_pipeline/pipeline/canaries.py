"""Twenty texts whose first vectors under a model are kept, so that it can be seen whether it still gives them."""

from embeddings_pipeline.encoders.base import Encoder
from embeddings_pipeline.pipeline.collection import Collection

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

_known: set[tuple[str, str, str]] = set()  # what this process need not ask for again


def remember(collection: Collection, encoder: Encoder) -> bool:
    """Store what the canaries give now, unless that is already known; whether it was stored."""
    name, fingerprint = collection.definition.name, collection.fingerprint
    if _key(collection) in _known:
        return False
    stored = "SELECT EXISTS (SELECT FROM embeddings.canary WHERE collection = %s AND fingerprint = %s)"
    insert = """INSERT INTO embeddings.canary (collection, fingerprint, number, text, embedding)
                VALUES (%s, %s, %s, %s, %s) ON CONFLICT DO NOTHING"""
    with collection.database.session() as connection:
        if connection.execute(stored, [name, fingerprint]).fetchone() == (True,):
            _known.add(_key(collection))
            return False
        vectors = encoder.encode_documents(CANARIES)
        rows = [(name, fingerprint, n, CANARIES[n], vector.tolist()) for n, vector in enumerate(vectors)]
        with connection.transaction(), connection.cursor() as cursor:
            cursor.executemany(insert, rows)
    return True


def ask_again(collection: Collection) -> None:
    """Have the next `remember` look whether the canaries are stored, though this process has stored them."""
    _known.discard(_key(collection))


def renew(collection: Collection) -> None:
    """Every vector of the collection was made anew: what the canaries gave before counts no longer."""
    delete = "DELETE FROM embeddings.canary WHERE collection = %s AND fingerprint = %s"
    with collection.database.connect(autocommit=True) as connection:
        connection.execute(delete, [collection.definition.name, collection.fingerprint])
    ask_again(collection)
    remember(collection, collection.encoder())


def _key(collection: Collection) -> tuple[str, str, str]:
    return collection.database.url, collection.definition.name, collection.fingerprint


def forget_canaries() -> None:
    """Have the next `remember` look at every database and model, as a new process does."""
    _known.clear()
