"""FAISS generations in a folder, and processes that build and read them."""

import subprocess
import sys
import textwrap
from typing import Any

from embeddings_pipeline.store.destination.table import TableDestination
from embeddings_pipeline_tests.support.model_tables import (
    FINGERPRINT,
)


def generations(folder):
    return sorted(path.name for path in (folder / "things").iterdir() if path.is_dir())


def in_process(code, database, folder, **popen):
    """A Python process that has `database`, `table` (of `things`) and `folder`."""
    prelude = f"""
    import sys
    from pathlib import Path
    from embeddings_pipeline.index import faiss_build, faiss_publish, faiss_read, parity
    from embeddings_pipeline.store.database import Database
    from embeddings_pipeline.store.destination.table import TableDestination
    database, folder = Database({database.url!r}), Path({str(folder)!r})
    table = TableDestination("things", {FINGERPRINT!r}, 32)
    """
    script = textwrap.dedent(prelude) + textwrap.dedent(code)
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, **popen)


def make_table(**changes: Any) -> TableDestination:
    fields: dict[str, Any] = {"collection": "things", "fingerprint": FINGERPRINT, "dimension": 32} | changes
    return TableDestination(**fields)
