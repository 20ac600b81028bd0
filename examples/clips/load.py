"""Make the table `clips` as an application has it: clips of films with title and tags, some of them removed.

python examples/clips/load.py

A clip is a sentence of an overview in the sample catalogue; its tags are the film's genres and keywords. An existing
table `clips` is left alone.
"""

import csv
import re
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1]
REMOVED = 20  # each clip whose number this divides
TABLE = """
CREATE TABLE clips (
    id         bigint PRIMARY KEY,
    film       text NOT NULL,
    title      text NOT NULL,
    tags       text[] NOT NULL,
    is_removed boolean NOT NULL DEFAULT false,
    updated_at timestamptz NOT NULL DEFAULT now()
)
"""


def main() -> int:
    sys.path.insert(0, str(EXAMPLES.parent))
    from embeddings_pipeline.config.settings import load_settings
    from embeddings_pipeline.store.database import open_database

    with (EXAMPLES / "movies.csv").open(encoding="utf-8", newline="") as file:
        films = list(csv.DictReader(file))
    clips = [
        (film["title"], sentence, [*film["genres"].split(", "), *film["keywords"].split(", ")])
        for film in films
        for sentence in re.split(r"(?<=[.!?])\s+", film["overview"])
        if sentence
    ]
    with open_database(load_settings()).connect() as connection:
        if connection.execute("SELECT to_regclass('clips')").fetchone() != (None,):
            print("error: there is a table clips already; DROP TABLE clips CASCADE first", file=sys.stderr)
            return 1
        connection.execute(TABLE)
        with connection.cursor().copy("COPY clips (id, film, title, tags, is_removed) FROM STDIN") as copy:
            for number, (film, title, tags) in enumerate(clips, 1):
                copy.write_row((number, film, title, tags, number % REMOVED == 0))
    print(f"clips: {len(clips):,}, {len(clips) // REMOVED} of them removed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
