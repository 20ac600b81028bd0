"""BM25 files of a generation: of each vector name, what each term of each text counts, in the form that bm25s reads.

bm25s makes such files of Python lists of all tokens, for which a million texts are too many. Here texts go by in
blocks, and of each stay three numbers for each of its terms; Python looks at words that differ alone. The formula is
bm25s's "lucene", and bm25s answers the queries.
"""

import functools
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql

from embeddings_pipeline.config.words import WordsDefinition
from embeddings_pipeline.index.faiss_publish import HashingWriter, write_file
from embeddings_pipeline.index.faiss_read import WordsFiles, WordsPart
from embeddings_pipeline.index.terms import terms_of_word, words_of
from embeddings_pipeline.store.destination.base import Destination

K1, B = 1.5, 0.75  # bm25s's defaults
WORDS_IN_A_BLOCK = 2_000_000


def term_hash(term: str) -> int:
    """What a term is called in the files: 64 bits, which two of ten million terms share once in 370,000 such files."""
    return int.from_bytes(blake2b(term.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def write_words(
    connection: psycopg.Connection, table: Destination, names: list[str], words: WordsDefinition, folder: Path
) -> WordsFiles:
    """Write the files of these vector names into `folder`: of each text that has a vector in the session's snapshot."""
    parts = {}
    for name in names:
        index = _Index(words.stem)
        statement = table.statement("faiss/texts", vector_name=sql.Literal(name))
        with connection.cursor() as cursor, cursor.copy(statement) as copy:
            copy.set_types(["int8", "text"])
            for text_id, text in copy.rows():
                index.add(text_id, text)
        if part := index.write(name, folder):
            parts[name] = part
    return WordsFiles(words.stem, parts)


@dataclass
class _Vocabulary:
    """The words that texts have, and their terms: each gets a number when it is first seen."""

    stem: str | None
    words: dict[str, int] = field(default_factory=dict)
    terms: dict[str, int] = field(default_factory=dict)
    numbers: array = field(default_factory=lambda: array("i"))  # the terms of all words, one after the other …
    ends: array = field(default_factory=lambda: array("q", [0]))  # … and where those of each word end

    def add(self, word: str) -> int:
        """A new word's number."""
        for term in terms_of_word(word, self.stem):
            self.numbers.append(self.terms.setdefault(term, len(self.terms)))
        self.ends.append(len(self.numbers))
        return self.words.setdefault(word, len(self.words))


@dataclass(frozen=True)
class _Block:
    """Of some texts: each term of each text, ordered by term, and how often it is there."""

    terms: NDArray[np.int32]
    texts: NDArray[np.int32]
    counts: NDArray[np.uint16]


class _Index:
    """One vector name's postings on their way."""

    def __init__(self, stem: str | None) -> None:
        self.vocabulary = _Vocabulary(stem)
        self.ids, self.lengths = array("q"), array("i")
        self.blocks: list[_Block] = []
        self._words, self._ends = array("i"), array("q")  # of the texts that are in no block yet

    def add(self, text_id: int, text: str) -> None:
        known, vocabulary = self.vocabulary.words, self.vocabulary
        self._words.extend([known[word] if word in known else vocabulary.add(word) for word in words_of(text)])
        self._ends.append(len(self._words))
        self.ids.append(text_id)
        if len(self._words) > WORDS_IN_A_BLOCK:
            self._end_block()

    def _end_block(self) -> None:
        words, ends = np.array(self._words, np.int32), np.array(self._ends, np.int64)
        self._words, self._ends = array("i"), array("q")
        first = len(self.ids) - len(ends)
        texts = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))
        starts = np.frombuffer(self.vocabulary.ends, np.int64)
        counts = starts[words + 1] - starts[words]
        places = np.repeat(starts[words] - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        terms = np.frombuffer(self.vocabulary.numbers, np.int32)[places] if len(places) else np.empty(0, np.int32)
        texts = np.repeat(texts, counts)
        self.lengths.extend(np.bincount(texts, minlength=len(ends)).astype(np.int32).tolist())
        pairs, times = np.unique((terms.astype(np.int64) << 32) | (texts + first), return_counts=True)
        self.blocks.append(
            _Block(
                (pairs >> 32).astype(np.int32),
                (pairs & 0xFFFFFFFF).astype(np.int32),
                np.minimum(times, 0xFFFF).astype(np.uint16),
            )
        )

    def write(self, name: str, folder: Path) -> WordsPart | None:
        """The files; None if no text has a word."""
        if self._ends:
            self._end_block()
        hashes = np.fromiter(map(term_hash, self.vocabulary.terms), np.uint64, len(self.vocabulary.terms))
        self.vocabulary = _Vocabulary(None)  # frees its memory
        if not len(hashes):
            return None
        order = np.argsort(hashes)
        rank = np.empty(len(order), np.int32)
        rank[order] = np.arange(len(order), dtype=np.int32)
        lengths = np.frombuffer(self.lengths, np.int32)
        average = float(lengths.mean())
        starts, texts, scores = self._columns(rank, lengths / average)
        params = {"k1": K1, "b": B, "delta": 0.5, "method": "lucene", "idf_method": "lucene", "dtype": "float32"}
        params |= {"int_dtype": "int32", "num_docs": len(lengths), "backend": "numpy"}
        arrays: dict[str, NDArray] = {
            "ids": np.frombuffer(self.ids, np.int64),
            "terms": hashes[order],
            "starts": starts,
            "texts": texts,
            "scores": scores,
        }
        files, size = {}, 0
        for kind, values in arrays.items():
            write = functools.partial(_save, values)
            files[f"{name}.words.{kind}.npy"], written = write_file(folder / f"{name}.words.{kind}.npy", write)
            size += written
        content = json.dumps(params).encode()
        files[f"{name}.words.json"], written = write_file(
            folder / f"{name}.words.json", lambda writer: writer.write(content)
        )
        return WordsPart(len(lengths), len(hashes), average, size + written, files)

    def _columns(
        self, rank: NDArray[np.int32], lengths: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]:
        """Where each term's texts begin, the texts of all terms, ascending, and the scores. lengths: of the average."""
        holding = np.zeros(len(rank), np.int64)
        for block in self.blocks:
            holding += np.bincount(block.terms, minlength=len(rank))
        weights = np.log(1 + (len(lengths) - holding + 0.5) / (holding + 0.5))
        in_order = np.empty(len(rank), np.int64)
        in_order[rank] = holding
        starts = np.concatenate([[0], np.cumsum(in_order)])
        free = starts[rank]  # of each term, the next place that is free
        texts, scores = np.empty(starts[-1], np.int32), np.empty(starts[-1], np.float32)
        penalty = K1 * (1 - B + B * lengths)
        for block in self._emptied():
            firsts = np.flatnonzero(np.diff(block.terms, prepend=-1))
            sizes = np.diff(firsts, append=len(block.terms))
            places = np.repeat(free[block.terms[firsts]] - firsts, sizes) + np.arange(len(block.terms))
            free[block.terms[firsts]] += sizes
            texts[places] = block.texts
            scores[places] = weights[block.terms] * block.counts / (penalty[block.texts] + block.counts)
        return starts, texts, scores

    def _emptied(self) -> Iterator[_Block]:
        self.blocks.reverse()
        while self.blocks:
            yield self.blocks.pop()


def _save(values: NDArray, writer: HashingWriter) -> None:
    np.save(writer, values)
