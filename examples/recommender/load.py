"""Make the tables `films` and `ratings` as an application has them: a catalogue, and what people thought of it.

python examples/recommender/load.py

The films are the sample catalogue's. People, ratings and revenues are made up: each person likes some genres, and rates
films of these with more stars than others. Existing tables are left alone.
"""

import csv
import random
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1]
PEOPLE, RATINGS = 200, 30  # ratings of each
TABLES = """
CREATE TABLE films (
    id           bigint PRIMARY KEY,
    title        text NOT NULL,
    overview     text NOT NULL,
    genres       text[] NOT NULL,
    release_year integer,
    revenue      bigint NOT NULL,
    updated_at   timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE ratings (
    person   integer NOT NULL,
    film     bigint NOT NULL REFERENCES films,
    stars    numeric(2, 1) NOT NULL,
    rated_at timestamptz NOT NULL,
    PRIMARY KEY (person, film)
)
"""


def main() -> int:
    sys.path.insert(0, str(EXAMPLES.parent))
    from embeddings_pipeline.config.settings import load_settings
    from embeddings_pipeline.store.database import open_database

    chance = random.Random(4)
    with (EXAMPLES / "movies.csv").open(encoding="utf-8", newline="") as file:
        films = list(csv.DictReader(file))
    genres = {film["id"]: film["genres"].split(", ") for film in films}
    with open_database(load_settings()).connect() as connection:
        if connection.execute("SELECT coalesce(to_regclass('films'), to_regclass('ratings'))").fetchone() != (None,):
            print("error: there is a table films or ratings already; DROP TABLE ratings, films first", file=sys.stderr)
            return 1
        for statement in TABLES.split(";"):
            connection.execute(statement)  # type: ignore[arg-type]
        with connection.cursor().copy(
            "COPY films (id, title, overview, genres, release_year, revenue) FROM STDIN"
        ) as copy:
            for film in films:
                revenue = round(chance.paretovariate(1.1) * 20_000_000)
                year = int(film["release_year"]) if film["release_year"] else None
                copy.write_row((film["id"], film["title"], film["overview"], genres[film["id"]], year, revenue))
        with connection.cursor().copy("COPY ratings FROM STDIN") as copy:
            for row in ratings(genres, chance):
                copy.write_row(row)
    print(f"films: {len(films)}; ratings: {PEOPLE * RATINGS:,} of {PEOPLE} people")
    return 0


def ratings(genres: dict[str, list[str]], chance: random.Random) -> list[tuple[int, str, float, datetime]]:
    """Person, film, stars and time of each rating."""
    known = sorted({genre for names in genres.values() for genre in names})
    rows = []
    for person in range(1, PEOPLE + 1):
        liked = set(chance.sample(known, 2))
        weights = [5 if liked & set(names) else 1 for names in genres.values()]
        chosen = sorted(set(chance.choices(list(genres), weights, k=3 * RATINGS)))
        for film in chance.sample(chosen, RATINGS):
            stars = chance.choice((4, 4.5, 5) if liked & set(genres[film]) else (1, 2, 3))
            rows.append((person, film, stars, datetime.now(UTC) - timedelta(days=chance.uniform(0, 1000))))
    return rows


if __name__ == "__main__":
    sys.exit(main())
