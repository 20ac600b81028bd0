"""What a run has for a batch, as its commit takes it: whole items only."""

from collections.abc import Collection as Keys
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.pipeline.failed import FailedItem, failed_items
from embeddings_pipeline.store.lake import DEFINITION_HASH


@dataclass(frozen=True)
class BatchResult:
    """What a run has for a batch, of whole items only: those with each text embedded, quarantined or blank."""

    batch: int
    items: pa.Table  # item_key, encoded_hash, payload
    failed: dict[str, FailedItem]  # by item key: those that have no texts
    texts: pa.Table  # row_number, item_key, vector_name, chunk, content_hash, text, blank
    vectors: pa.Table  # row_number (of the text), content_hash, encoded, embedding
    definition_hash: bytes | None  # that the texts were rendered with
    file: str  # of the vectors, in the lake

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return int(self.items.nbytes + self.texts.nbytes + self.vectors.nbytes)

    def row_hash(self, item_key: str) -> bytes | None:
        """What this run read of an item; None if it is not among these."""
        place = pc.index(self.items["item_key"], item_key).as_py()
        row_hash: bytes | None = self.items["encoded_hash"][place].as_py() if place >= 0 else None
        return row_hash

    def of_items(self, item_keys: Keys[str]) -> "BatchResult":
        """What there is for these items, and no other."""
        return self._filtered(pa.array(list(item_keys), pa.string()))

    def without(self, item_keys: Keys[str]) -> "BatchResult":
        """What there is for other items."""
        return self._filtered(pa.array(list(item_keys), pa.string()), others=True)

    def places_of_vectors(self) -> NDArray[np.int64]:
        """Where in `texts` the text of each vector is."""
        places: NDArray[np.int64] = pc.index_in(
            self.vectors["row_number"], value_set=self.texts["row_number"]
        ).to_numpy()
        return places

    def with_failed(self, failed: Mapping[str, FailedItem]) -> "BatchResult":
        """The same, with items that have no texts after all."""
        others = self._filtered(pa.array(list(failed), pa.string()), others=True) if failed else self
        return replace(others, failed={**self.failed, **failed})

    def _filtered(self, item_keys: pa.Array, *, others: bool = False) -> "BatchResult":
        def chosen(column: pa.ChunkedArray) -> pa.ChunkedArray:
            mask = pc.is_in(column, value_set=item_keys)
            return pc.invert(mask) if others else mask

        texts = self.texts.filter(chosen(self.texts["item_key"]))
        with_text = pc.is_in(self.vectors["row_number"], value_set=texts["row_number"])
        return replace(
            self,
            items=self.items.filter(chosen(self.items["item_key"])),
            failed={},
            texts=texts,
            vectors=self.vectors.filter(with_text),
        )


def batch_result(collection: Collection, batch: int, run: str) -> BatchResult:
    """What the run's files, or else the newest, say of a batch. LakeError without any."""
    _, texts = collection.newest("item_texts", batch, run)
    path, embeddings = collection.newest("embeddings", batch, run)
    definition_hash = (texts.schema.metadata or {}).get(DEFINITION_HASH)
    vector_at = pc.index_in(text_places(texts), value_set=text_places(embeddings))
    missing = texts.filter(pc.and_(pc.is_null(vector_at), pc.invert(texts["blank"])))
    if missing.num_rows:
        hashes = missing["content_hash"].to_pylist()
        excused = collection.ledger.quarantined(collection.fingerprint, hashes)
        lacking = missing["item_key"].filter(pa.array([digest not in excused for digest in hashes]))
        whole = pc.invert(pc.is_in(texts["item_key"], value_set=lacking))
        texts, vector_at = texts.filter(whole), vector_at.filter(whole)

    texts = texts.append_column("row_number", pa.array(np.arange(texts.num_rows)))
    with_vector = pc.is_valid(vector_at)
    vectors = embeddings.select(["content_hash", "encoded", "embedding"]).take(vector_at.filter(with_vector))
    _, first = np.unique(texts["item_key"].combine_chunks().dictionary_encode().indices.to_numpy(), return_index=True)
    items = texts.select(["item_key", "row_hash", "payload"]).take(first)
    return BatchResult(
        batch,
        items.rename_columns(["item_key", "encoded_hash", "payload"]),
        failed_items(texts),
        texts.select(["row_number", "item_key", "vector_name", "chunk", "content_hash", "text", "blank"]),
        vectors.append_column("row_number", texts["row_number"].filter(with_vector)),
        definition_hash,
        path.rsplit("/", 1)[-1],
    )


def text_places(texts: pa.Table) -> pa.ChunkedArray:
    """Which text of which item each row is, in one value: PostgreSQL's texts have no NUL."""
    chunk = texts["chunk"].cast(pa.string())
    parts = [part.cast(pa.binary()) for part in (texts["content_hash"], chunk, texts["vector_name"], texts["item_key"])]
    return pc.binary_join_element_wise(*parts, b"\x00")
