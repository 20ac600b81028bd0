"""Are the indexes what the model table asks for?"""

from datetime import datetime

from embeddings_pipeline.errors import VectorIndexError
from embeddings_pipeline.health.coverage import CollectionState, collection_state
from embeddings_pipeline.index.faiss_index import is_current, open_index, read_manifest
from embeddings_pipeline.index.pgvector import indexes_fit
from embeddings_pipeline.pipeline.collection import OpenCollection


def indexes_lag(opened: OpenCollection, *, verify: bool = False) -> bool:
    """Whether an index is missing, of another kind than declared, or behind the table. `verify`: or damaged."""
    with opened.database.connect(autocommit=True) as connection:
        state = collection_state(connection, opened.collection.name)
        if state is None:
            return True
        config = opened.collection.config
        if not indexes_fit(connection, opened.active.table, config.index, config.vectors):
            return True
    return _faiss_lags(opened, state, verify)


def _faiss_lags(opened: OpenCollection, state: CollectionState, verify: bool) -> bool:
    folder = opened.settings.state_dir / "faiss"
    try:
        # Opened, a damaged file is noticed; its manifest alone costs nothing.
        name = opened.collection.name
        manifest = open_index(folder, name).manifest if verify else read_manifest(folder, name)
    except VectorIndexError:
        return True
    return manifest is None or not is_current(manifest, opened.fingerprint, state.epoch, state.version)


def lagging_since(opened: OpenCollection) -> datetime | None:
    """Since when a FAISS index that lags may have lagged: its last build, or the first landing; None without either."""
    try:
        manifest = read_manifest(opened.settings.state_dir / "faiss", opened.collection.name)
    except VectorIndexError:
        manifest = None
    if manifest is not None and manifest.fingerprint == opened.fingerprint:
        return datetime.fromisoformat(manifest.built_at)
    first = "SELECT min(landed_at) FROM embeddings.batch WHERE collection = %s"
    with opened.database.connect(autocommit=True) as connection:
        row = connection.execute(first, [opened.collection.name]).fetchone()
    return row[0] if row else None
