"""Are the indexes what the model table asks for?"""

from datetime import datetime

from embeddings_pipeline.errors import VectorIndexError
from embeddings_pipeline.index.faiss_read import is_current, open_index, read_manifest
from embeddings_pipeline.index.pgvector import indexes_fit
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.store.models import CollectionState, collection_state


def indexes_lag(collection: Collection, *, verify: bool = False) -> bool:
    """Whether an index is missing, of another kind than declared, or behind the table. `verify`: or damaged."""
    with collection.database.connect(autocommit=True) as connection:
        state = collection_state(connection, collection.definition.name)
        if state is None:
            return True
        config = collection.definition.attributes
        if not indexes_fit(connection, collection.model.destination, config.index, config.vectors):
            return True
    return _faiss_lags(collection, state, verify)


def _faiss_lags(collection: Collection, state: CollectionState, verify: bool) -> bool:
    folder = collection.settings.state_dir / "faiss"
    try:
        # Opened, a damaged file is noticed; its manifest alone costs nothing.
        name = collection.definition.name
        manifest = open_index(folder, name).manifest if verify else read_manifest(folder, name)
    except VectorIndexError:
        return True
    return manifest is None or not is_current(manifest, collection.fingerprint, state.epoch, state.version)


def lagging_since(collection: Collection) -> datetime | None:
    """Since when a FAISS index that lags may have lagged: its last build, or the first commit; None without either."""
    try:
        manifest = read_manifest(collection.settings.state_dir / "faiss", collection.definition.name)
    except VectorIndexError:
        manifest = None
    if manifest is not None and manifest.fingerprint == collection.fingerprint:
        return datetime.fromisoformat(manifest.built_at)
    first = "SELECT min(committed_at) FROM embeddings.batch WHERE collection = %s"
    with collection.database.connect(autocommit=True) as connection:
        row = connection.execute(first, [collection.definition.name]).fetchone()
    return row[0] if row else None
