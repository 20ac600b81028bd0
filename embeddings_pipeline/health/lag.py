"""Are the indexes what the model table asks for?"""

from datetime import datetime

from embeddings_pipeline.errors import VectorIndexError
from embeddings_pipeline.index.bm25_read import open_words
from embeddings_pipeline.index.faiss_delta import has_grown
from embeddings_pipeline.index.faiss_read import current_or_none, open_index, read_manifest
from embeddings_pipeline.index.filters import filters_fit
from embeddings_pipeline.index.map_build import why_made
from embeddings_pipeline.index.pgvector import indexes_fit
from embeddings_pipeline.index.standing import Standing, standing, why_foreign
from embeddings_pipeline.index.words import words_fit
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.store.models import collection_state


def indexes_lag(collection: Collection, *, verify: bool = False) -> bool:
    """Whether an index is missing, of another kind than declared, or behind the table. `verify`: or damaged."""
    if not _pgvector_fits(collection) or not _bm25_fits(collection, verify=verify):
        return True
    return faiss_standing(collection, verify=verify) is not Standing.CURRENT


def indexes_due(collection: Collection) -> bool:
    """Whether it is time to build an index. Not if FAISS is behind by a little: searches take that from the table."""
    if not _pgvector_fits(collection) or not _bm25_fits(collection):
        return True
    stands = faiss_standing(collection)
    if stands is not Standing.BEHIND:
        return stands is not Standing.CURRENT
    manifest = read_manifest(collection.settings.state_dir / "faiss", collection.definition.name)
    with collection.database.session() as connection:
        return manifest is not None and has_grown(connection, collection.model.destination, manifest)


def _pgvector_fits(collection: Collection) -> bool:
    with collection.database.session() as connection:
        if collection_state(connection, collection.definition.name) is None:
            return False
        config = collection.definition.attributes
        fit = indexes_fit(connection, collection.model.destination, config.index, config.vectors)
        return fit and filters_fit(connection, collection.definition) and words_fit(connection, collection.definition)


def _bm25_fits(collection: Collection, *, verify: bool = False) -> bool:
    """Whether the generation, if there is one, has the words that are declared. `verify`: its files are read, too."""
    folder, words = collection.settings.state_dir / "faiss", collection.definition.attributes.words
    try:
        manifest = read_manifest(folder, collection.definition.name)
        if verify:
            open_words(folder, collection.definition.name)
    except VectorIndexError:
        return False
    if manifest is None:  # which `faiss_standing` says
        return True
    return (manifest.words and manifest.words.stem) == (words and words.stem) and (manifest.words is None) == (
        words is None
    )


def map_due(collection: Collection) -> bool:
    """Whether the map is to be made, for another reason than that the table has changed lately."""
    if collection.definition.attributes.map.method == "none":
        return False
    return bool(why_made(collection.database, collection.settings.state_dir / "faiss", collection.definition)[0])


def faiss_standing(collection: Collection, *, verify: bool = False) -> Standing:
    """How the FAISS index stands; one that is damaged is missing. `verify`: its files are looked at, too."""
    folder, name = collection.settings.state_dir / "faiss", collection.definition.name
    try:
        # Opened, a damaged file is noticed; its manifest alone costs nothing.
        manifest = open_index(folder, name).manifest if verify else read_manifest(folder, name)
    except VectorIndexError:
        return Standing.MISSING
    with collection.database.session() as connection:
        return standing(connection, name, manifest)


def about_foreign(collection: Collection) -> str | None:
    """Of a FAISS index that is foreign to the database: which, why, and what becomes of it; None of any other."""
    folder, name = collection.settings.state_dir / "faiss", collection.definition.name
    manifest = current_or_none(folder / name)
    with collection.database.session() as connection:
        if manifest is None or standing(connection, name, manifest) is not Standing.FOREIGN:
            return None
        return f"the FAISS index in {folder / name} is {why_foreign(connection, manifest)}; it is built again"


def lagging_since(collection: Collection) -> datetime | None:
    """Since when a FAISS index that lags may have lagged: its last build, or the first commit; None without either."""
    name = collection.definition.name
    try:
        manifest = read_manifest(collection.settings.state_dir / "faiss", name)
    except VectorIndexError:
        manifest = None
    first = "SELECT min(committed_at) FROM embeddings.batch WHERE collection = %s"
    with collection.database.session() as connection:
        if manifest is not None and standing(connection, name, manifest) in (Standing.CURRENT, Standing.BEHIND):
            return datetime.fromisoformat(manifest.built_at)
        row = connection.execute(first, [name]).fetchone()
    return row[0] if row else None
