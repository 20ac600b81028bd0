"""Do ledger, texts, model table, lake and FAISS index agree? What does not is counted, and dirty for the next sync.

Coverage (coverage.py) says how far the vectors have come. An audit finds what no run has left behind: rows that
somebody deleted or wrote by hand, files that are gone, an index that holds other vectors than the table.
"""

from dataclasses import dataclass, fields

from psycopg.rows import dict_row

from embeddings_pipeline.errors import VectorIndexError
from embeddings_pipeline.index.faiss_delta import GROWN_COMMITS
from embeddings_pipeline.index.faiss_read import open_index
from embeddings_pipeline.index.parity import check_parity
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.store.locks import lock_batch
from embeddings_pipeline.store.sql import load_sql


@dataclass(frozen=True)
class Audit:
    """Disagreements, each counted in what its name begins with; `batches_marked` are dirty because of them."""

    items_without_texts: int = 0
    texts_without_item: int = 0
    texts_without_vector: int = 0  # neither blank nor in quarantine
    vectors_without_text: int = 0
    vectors_of_another_text: int = 0
    batches_without_lake_file: int = 0
    vectors_not_in_lake: int = 0
    vectors_not_in_faiss: int = 0
    faiss_ids_not_in_table: int = 0
    batches_marked: int = 0

    @property
    def agree(self) -> bool:
        return not any(getattr(self, field.name) for field in fields(self) if field.name != "batches_marked")


def audit(collection: Collection) -> Audit:
    """Compare every copy with the next one. What disagrees is dirty afterwards, or behind, so that a sync mends it."""
    counts = _count(collection)
    collection.ledger.repair()
    collection.ledger.forget_truncated()
    file_missing, not_in_lake, marked = _compare_lake(collection)
    if marked:
        with collection.database.connect(autocommit=True) as connection:
            parameters = {"collection": collection.definition.name, "batches": marked}
            connection.execute(load_sql("audit/render_again"), parameters)
    missing, unknown = _compare_faiss(collection)
    return Audit(
        **counts,
        batches_without_lake_file=file_missing,
        vectors_not_in_lake=not_in_lake,
        vectors_not_in_faiss=missing,
        faiss_ids_not_in_table=unknown,
        batches_marked=len(marked),
    )


def _count(collection: Collection) -> dict[str, int]:
    parameters = {"collection": collection.definition.name, "fingerprint": collection.fingerprint}
    with collection.database.connect(autocommit=True) as connection, connection.cursor(row_factory=dict_row) as cursor:
        row = cursor.execute(collection.model.destination.statement("audit/count"), parameters).fetchone()
    return row or {}


def _compare_lake(collection: Collection) -> tuple[int, int, list[int]]:
    """Batches whose committed file is gone or damaged, vectors of the table that their batch's file lacks, and the
    batches that either is true of.
    """
    missing = lacking = 0
    marked = []
    name = {"collection": collection.definition.name, "fingerprint": collection.fingerprint}
    hashes_of = collection.model.destination.statement("audit/hashes_of_batch")
    with collection.database.connect(autocommit=True) as connection:
        committed = connection.execute(load_sql("audit/committed_files"), name).fetchall()
        for batch, file in committed:
            lacks = _lacks(collection, batch, file, [row[0] for row in connection.execute(hashes_of, {"batch": batch})])
            if lacks != 0:  # once more: a commit may have come between
                with connection.transaction():
                    lock_batch(connection, collection.definition.name, batch)
                    newest = connection.execute(load_sql("audit/committed_file"), {**name, "batch": batch}).fetchone()
                    hashes = [row[0] for row in connection.execute(hashes_of, {"batch": batch})]
                lacks = _lacks(collection, batch, newest[0] if newest else file, hashes)
            missing += lacks is None
            lacking += lacks or 0
            if lacks != 0:
                marked.append(batch)
    return missing, lacking, marked


def _lacks(collection: Collection, batch: int, file: str, in_table: list[bytes]) -> int | None:
    """How many of these content hashes the batch's file lacks; None if there is no such file."""
    if not in_table:
        return 0
    in_file = collection.lake.content_hashes(collection.folder("embeddings"), batch, file)
    return None if in_file is None else sum(digest not in in_file for digest in in_table)


def _compare_faiss(collection: Collection) -> tuple[int, int]:
    """Vectors that the index lacks and ids that the table lacks; an index that is behind has neither."""
    try:
        index = open_index(collection.settings.state_dir / "faiss", collection.definition.name)
    except VectorIndexError:  # none yet, or damaged: built by the next sync
        return 0, 0
    parity = check_parity(collection.database, collection.model.destination, index, samples=1)
    if not parity.comparable:
        return 0, 0
    if parity.missing_in_index or parity.not_in_table:
        build_again(collection)
    return parity.missing_in_index, parity.not_in_table


def build_again(collection: Collection) -> None:
    """Have the next sync, or the sensor, build the FAISS index, which is not what the table says."""
    behind = {"collection": collection.definition.name, "versions": GROWN_COMMITS + 1}
    with collection.database.connect(autocommit=True) as connection:
        connection.execute(load_sql("audit/index_again"), behind)
