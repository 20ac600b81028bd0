"""The BM25 files of a published generation: their texts with the words of a query, best first.

index = open_words(state_dir / "faiss", "items")
ids, scores = index.parts["base"].best(index.parts["base"].scores(["lamp"]), 10)
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings_pipeline.errors import VectorIndexError
from embeddings_pipeline.forks import ProcessLock
from embeddings_pipeline.index.bm25_build import K1, B, term_hash
from embeddings_pipeline.index.faiss_read import Manifest, WordsPart, read_manifest, verify
from embeddings_pipeline.index.snapshot import BUILD_AGAIN
from embeddings_pipeline.index.terms import terms_of_word, words_of


@dataclass(frozen=True)
class Bm25:
    """The texts of one vector name; several threads may ask at once."""

    stem: str | None
    described: WordsPart
    ids: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    retriever: Any  # bm25s.BM25

    def scores(self, terms: Sequence[str]) -> NDArray[np.float32]:
        """What each text (n,) counts for these terms; 0 without any of them."""
        known = [place for place in map(self._place, terms) if place is not None]
        if not known:
            return np.zeros(len(self.ids), np.float32)
        scores: NDArray[np.float32] = self.retriever.get_scores_from_ids(known)
        return scores

    def best(
        self, scores: NDArray[np.float32], n: int, only: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ids and scores of the `n` best texts that have a term; equal ones by their ids. only: of these texts."""
        if only is not None:
            scores = np.where(np.isin(self.ids, only), scores, 0)
        rows = np.flatnonzero(scores > 0)
        found = scores[rows]
        if n < len(rows):
            # From the other end NumPy takes thirty times as long if most are equal, as with a word that all texts have.
            least = -np.partition(-found, n - 1)[n - 1]
            above, tied = np.flatnonzero(found > least), np.flatnonzero(found == least)
            rows = rows[np.concatenate([above, tied[: n - len(above)]])]
        rows = rows[np.lexsort((rows, -scores[rows]))]
        return self.ids[rows], scores[rows]

    def score(self, text: str, terms: Sequence[str]) -> float:
        """What a text counts that is not in the files, by what is known of the others."""
        counts = Counter(term for word in words_of(text) for term in terms_of_word(word, self.stem))
        penalty = K1 * (1 - B + B * counts.total() / self.described.average_length)
        return sum(self._weight(term) * counts[term] / (penalty + counts[term]) for term in terms if counts[term])

    def _weight(self, term: str) -> float:
        place, starts = self._place(term), self.retriever.scores["indptr"]
        holding = 0 if place is None else int(starts[place + 1] - starts[place])
        return float(np.log(1 + (len(self.ids) - holding + 0.5) / (holding + 0.5)))

    def _place(self, term: str) -> int | None:
        wanted = np.uint64(term_hash(term))
        place = int(np.searchsorted(self.hashes, wanted))
        return place if place < len(self.hashes) and self.hashes[place] == wanted else None


@dataclass(frozen=True)
class WordsIndex:
    """The lexical files of a generation, mapped into memory, read-only."""

    manifest: Manifest
    stem: str | None
    parts: dict[str, Bm25]  # by vector name; none of one whose texts have no words


def open_words(folder: Path, collection: str) -> WordsIndex | None:
    """The current generation's, its checksums verified the first time in a process; None if it has none.

    VectorIndexError names a file that is missing or damaged.
    """
    parent = folder / collection
    manifest = read_manifest(folder, collection)
    if manifest is None or manifest.words is None:
        _opened.pop(parent, None)
        return None
    opened = _opened.get(parent)
    if opened is not None and opened.manifest == manifest:
        return opened
    with _opening.setdefault(parent, ProcessLock()):
        return _open_current(folder, collection)


def _open_current(folder: Path, collection: str) -> WordsIndex | None:
    parent, before = folder / collection, None
    while True:
        manifest = read_manifest(folder, collection)
        if manifest is None or manifest.words is None:
            return None
        opened = _opened.get(parent)
        if opened is not None and opened.manifest == manifest:
            return opened
        try:
            opened = _opened[parent] = _open(parent / manifest.generation, manifest)
            return opened
        except VectorIndexError:
            if manifest.generation == before:  # else it was swept between the two reads
                raise
            before = manifest.generation


def _open(generation: Path, manifest: Manifest) -> WordsIndex:
    import bm25s

    assert manifest.words is not None
    parts = {}
    for name, described in manifest.words.parts.items():
        for file, expected in described.files.items():
            verify(generation / file, expected)
        try:
            retriever = bm25s.BM25.load(
                generation,
                data_name=f"{name}.words.scores.npy",
                indices_name=f"{name}.words.texts.npy",
                indptr_name=f"{name}.words.starts.npy",
                params_name=f"{name}.words.json",
                load_vocab=False,
                mmap=True,
            )
            ids, hashes = (np.load(generation / f"{name}.words.{kind}.npy", mmap_mode="r") for kind in ("ids", "terms"))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise VectorIndexError(
                f"{generation}: the words of {name!r} cannot be read: {error}; {BUILD_AGAIN}"
            ) from error
        # Without the class of mapped arrays, slices are cut several times faster.
        retriever.scores.update({kind: np.asarray(retriever.scores[kind]) for kind in ("data", "indices", "indptr")})
        parts[name] = Bm25(manifest.words.stem, described, np.asarray(ids), np.asarray(hashes), retriever)
    return WordsIndex(manifest, manifest.words.stem, parts)


# Of this process, by the collection's folder.
_opened: dict[Path, WordsIndex] = {}
_opening: dict[Path, ProcessLock] = {}
