"""How much Dagster has written: runs and events in its database, log files in the state folder."""

import os
from dataclasses import dataclass
from pathlib import Path

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.store.dagster_database import dagster_bytes
from embeddings_pipeline.store.database import Database


@dataclass(frozen=True)
class DagsterSize:
    """What Dagster's history takes, of all collections together."""

    database_bytes: int | None  # None: there is none yet, or this role may not know
    files: int
    file_bytes: int
    keep_days: int  # 0: for ever


def dagster_size(database: Database, settings: Settings) -> DagsterSize:
    with database.connect(autocommit=True) as connection:
        in_database = dagster_bytes(connection, database)
    files, file_bytes = _below(settings.state_dir / "dagster")
    return DagsterSize(in_database, files, file_bytes, settings.keep_days)


def _below(folder: Path) -> tuple[int, int]:
    """Number and bytes of the files below a folder."""
    files = total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(parent) / name).lstat().st_size
            except FileNotFoundError:  # deleted meanwhile
                continue
            files += 1
    return files, total
