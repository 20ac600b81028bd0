"""The statements of `sql/`: each file holds named ones, each after a line `-- name: NAME`.

`{names}` in a statement are filled in by `psycopg.sql`; `%(names)s` are parameters. The comments of a file or statement
say them, but for those that stand for the same everywhere (`statement` of a collection's tables and of a destination):

    {item}, {text}, {view}   the collection's tables, and the view of its current model
    {words}                  the words of its texts, if its definition has `words:`
    {vector}                 a model's vectors: text_id, vector_name, content_hash, embedding
    {written}                text_id and content_hash of the texts that have their vector
    {hash}                   the table where that is noted
    {lacking}                the texts that have none: see `lacking` in sql/models.sql
"""

import re
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

_NAME = re.compile(r"^-- name: (\w+)\n", re.MULTILINE)


def load_sql(name: str) -> str:
    """The statement `FILE/NAME`: NAME of sql/FILE.sql. KeyError if there is none."""
    file, _, statement = name.partition("/")
    return _statements(file)[statement]


def schema_versions() -> list[tuple[int, str]]:
    """The numbered files of sql/schema, in order: version and statements."""
    numbered = [file for file in (_folder() / "schema").iterdir() if file.name.endswith(".sql")]
    return sorted((int(file.name[:4]), file.read_text(encoding="utf-8")) for file in numbered)


@cache
def _statements(file: str) -> dict[str, str]:
    _, *parts = _NAME.split((_folder() / f"{file}.sql").read_text(encoding="utf-8"))
    names, bodies = parts[::2], parts[1::2]
    if len(set(names)) < len(names):
        raise ValueError(f"sql/{file}.sql has a name twice: {sorted(names)}")
    return {name: body.strip() for name, body in zip(names, bodies, strict=True)}


def _folder() -> Traversable:
    """`sql/` of the installed package, or of the checkout."""
    packaged = files("embeddings_pipeline") / "sql"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[2] / "sql"
