"""Make the table `segments` as an application has it: spoken lines of films, most with vectors of 1536 dimensions.

python examples/segments/load.py

The lines are the sentences of the sample catalogue's overviews. The last fifty have no vector yet. An IVFFlat index of
the application's own is on the column. An existing table `segments` is left alone.
"""

import csv
import re
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1]
WITHOUT = 50  # the newest lines
TABLE = """
CREATE TABLE segments (
    id         bigint PRIMARY KEY,
    film       text NOT NULL,
    line       text NOT NULL,
    embedding  vector(1536),
    updated_at timestamptz NOT NULL DEFAULT now()
)
"""
INDEX = "CREATE INDEX segments_embedding_idx ON segments USING ivfflat (embedding vector_cosine_ops) WITH (lists = 32)"


def main() -> int:
    sys.path.insert(0, str(EXAMPLES.parent))
    from embeddings_pipeline.config.profiles import resolve_profile
    from embeddings_pipeline.config.settings import load_settings
    from embeddings_pipeline.store.database import open_database
    from embeddings_pipeline.store.schema import ensure_schema
    from examples.segments.former_model import FormerModel

    settings = load_settings()
    profile = {"name": "former", "provider": "python", "model": "examples.segments.former_model", "dimensions": 1536}
    model = FormerModel(resolve_profile(profile, settings))
    with (EXAMPLES / "movies.csv").open(encoding="utf-8", newline="") as file:
        films = [(row["title"], row["overview"]) for row in csv.DictReader(file)]
    lines = [(title, line) for title, overview in films for line in re.split(r"(?<=[.!?])\s+", overview) if line]
    database = open_database(settings)
    ensure_schema(database)
    with database.connect() as connection:
        if connection.execute("SELECT to_regclass('segments')").fetchone() != (None,):
            print("error: there is a table segments already; DROP TABLE segments CASCADE first", file=sys.stderr)
            return 1
        connection.execute(TABLE)
        vectors = model.encode_documents([line for _, line in lines])
        with connection.cursor().copy("COPY segments (id, film, line, embedding) FROM STDIN") as copy:
            for number, ((title, line), vector) in enumerate(zip(lines, vectors, strict=True), 1):
                there = number <= len(lines) - WITHOUT
                copy.write_row((number, title, line, str(vector.tolist()) if there else None))
        connection.execute(INDEX)
    print(f"segments: {len(lines):,} lines, {WITHOUT} of them without a vector")
    return 0


if __name__ == "__main__":
    sys.exit(main())
