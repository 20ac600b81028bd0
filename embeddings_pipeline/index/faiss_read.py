"""The published FAISS index of a collection: its manifest, and searches in it.

index = open_index(state_dir / "faiss", "items")
scores, ids = index.search("base", queries, k=10)

On disk, below `<folder>/<collection>/`: `<generation>/` with `manifest.json` and, a vector name, `<name>.faiss` and
`<name>.ids.npy` (text ids in the order of the index), and with `words:` the files of `bm25_build`; `CURRENT`, which
names the generation that counts; `.lock`, held while one is published. A generation never changes: readers need no
lock.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings_pipeline.errors import VectorIndexError
from embeddings_pipeline.forks import ProcessLock, compute
from embeddings_pipeline.index.exact import unit
from embeddings_pipeline.index.snapshot import BUILD_AGAIN

TUNED_FOR = 50  # vectors; asked for more, an index of lists looks into more of them
FORMAT = 5  # of manifest.json and the files that it names
READ_TOO = (3, 4)  # earlier formats, which say nothing else


@dataclass(frozen=True)
class VectorFiles:
    """What a generation holds of one vector name."""

    vectors: int
    index_type: str  # in FAISS's words: `SQfp16`, `Flat`, `IVF447,SQfp16` and the lists that a search visits
    exact: bool
    recall_at_10: float  # against an exact search, on a sample of the vectors
    bytes: int
    files: dict[str, str]  # file name → SHA-256


@dataclass(frozen=True)
class WordsPart:
    """What a generation holds of the words of one vector name's texts."""

    texts: int
    terms: int
    average_length: float  # of a text, in terms
    bytes: int
    files: dict[str, str]  # file name → SHA-256


@dataclass(frozen=True)
class WordsFiles:
    """The lexical index of a generation."""

    stem: str | None  # the stemmer's language
    parts: dict[str, WordsPart]


@dataclass(frozen=True)
class ItemFiles:
    """What a generation holds of items and texts: see `items_file`."""

    items: int
    texts: int
    bytes: int
    files: dict[str, str]  # file name → SHA-256


@dataclass(frozen=True)
class Manifest:
    """What a generation was made from. `checksum` covers all the rest, and through `vectors` and `words` every file."""

    collection: str
    generation: str
    fingerprint: str
    database: str
    epoch: str
    version: int
    stamp: str
    dimension: int
    storage: str
    vectors: dict[str, VectorFiles]
    newest_text: int  # a text of a higher id came after it: see `faiss_delta`
    lacking: list[int]  # older texts that had no vector, and may have got one since
    built_at: str  # ISO 8601, UTC
    seconds: float
    words: WordsFiles | None = None  # with `words:`
    items: ItemFiles | None = None  # of a generation of format 5
    checksum: str = ""

    @property
    def count(self) -> int:
        """Vectors of all names."""
        return sum(each.vectors for each in self.vectors.values())

    @property
    def recall_at_10(self) -> float:
        """The lowest of all vector names."""
        return min((each.recall_at_10 for each in self.vectors.values()), default=1.0)

    @property
    def bytes(self) -> int:
        return sum(each.bytes for each in self.vectors.values())


def read_manifest(folder: Path, collection: str) -> Manifest | None:
    """The current generation's manifest, or None if nothing was published yet. Does not import FAISS.

    Raises VectorIndexError if the manifest is missing or damaged.
    """
    parent = folder / collection
    before = None
    while True:
        generation = _read_current(parent)
        if generation is None:
            return None
        try:
            return _read_manifest(parent / generation)
        except VectorIndexError:
            if generation == before:  # else it was swept between the two reads
                raise
            before = generation


def open_index(folder: Path, collection: str) -> "FaissIndex":
    """The current generation, its checksums verified: the first time in a process; later calls return the same one.

    A process holds the current generation of each collection, and lets go of those that were replaced. Raises
    VectorIndexError, naming the file, if one is missing or damaged.
    """
    parent = folder / collection
    manifest = read_manifest(folder, collection)
    opened = _opened.get(parent)
    if manifest is not None and opened is not None and opened.manifest == manifest:
        return opened
    with _opening.setdefault(parent, ProcessLock()):  # so that each file is hashed once
        return _open_current(folder, collection)


def _open_current(folder: Path, collection: str) -> "FaissIndex":
    parent, before = folder / collection, None
    while True:
        manifest = read_manifest(folder, collection)
        if manifest is None:
            _opened.pop(parent, None)
            raise VectorIndexError(f"collection {collection!r} has no FAISS index in {parent}; {BUILD_AGAIN}")
        opened = _opened.get(parent)
        if opened is not None and opened.manifest == manifest:
            return opened
        try:
            opened = _opened[parent] = _open(parent / manifest.generation, manifest.checksum)
        except VectorIndexError:
            if manifest.generation == before:
                raise
            before = manifest.generation
        else:
            _let_go_of_replaced()
            return opened


def _let_go_of_replaced() -> None:
    for parent, opened in list(_opened.items()):
        current = current_or_none(parent)
        if current is None or current.checksum != opened.manifest.checksum:
            _opened.pop(parent, None)


def _read_current(parent: Path) -> str | None:
    path = parent / "CURRENT"
    try:
        generation = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise VectorIndexError(f"{path} cannot be read: {error}; {BUILD_AGAIN}") from error
    if not re.fullmatch(r"\d{6}-[0-9a-f]{8}", generation):
        raise VectorIndexError(f"{path} is damaged: it names no generation; {BUILD_AGAIN}")
    return generation


def _read_manifest(generation: Path) -> Manifest:
    """A generation's, read again only if its file is another."""
    path, known = generation / "manifest.json", _manifests.get(generation.parent)
    try:
        status = path.stat()
        state = path, status.st_mtime_ns, status.st_size, status.st_ino
        if known is None or known[0] != state:
            known = _manifests[generation.parent] = state, _parsed(path)
        return known[1]
    except OSError as error:
        raise VectorIndexError(f"{path} cannot be read: {error.strerror}; {BUILD_AGAIN}") from error


def _parsed(path: Path) -> Manifest:
    try:
        content = json.loads(path.read_bytes())
        if content.pop("format") not in (*READ_TOO, FORMAT):
            raise VectorIndexError(f"{path} is of another version of embeddings-pipeline; {BUILD_AGAIN}")
        if content["checksum"] != checksum_of(content):
            raise VectorIndexError(f"{path} is damaged: its checksum differs; {BUILD_AGAIN}")
        vectors = {name: VectorFiles(**each) for name, each in content.pop("vectors").items()}
        words, items = _words_files(content.pop("words", None)), content.pop("items", None)
        return Manifest(vectors=vectors, words=words, items=ItemFiles(**items) if items else None, **content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise VectorIndexError(f"{path} is damaged: it is no manifest; {BUILD_AGAIN}") from error


def _words_files(content: dict[str, Any] | None) -> WordsFiles | None:
    if content is None:
        return None
    return WordsFiles(content["stem"], {name: WordsPart(**each) for name, each in content["parts"].items()})


def current_or_none(parent: Path) -> Manifest | None:
    """The current manifest; None too if it is damaged, since anything is better."""
    try:
        generation = _read_current(parent)
        return _read_manifest(parent / generation) if generation else None
    except VectorIndexError:
        return None


def checksum_of(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key not in ("checksum", "format")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class FaissIndex:
    """A generation, read-only, its vectors mapped into memory; several threads may search it at once."""

    def __init__(self, manifest: Manifest, parts: dict[str, tuple[Any, NDArray[np.int64]]]) -> None:
        self.manifest = manifest
        self._parts = parts

    def search(
        self,
        vector_name: str,
        queries: NDArray,
        k: int,
        *,
        chosen: NDArray[np.uint8] | None = None,
        thorough: bool = False,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The `k` nearest texts of each query (n, dimension): cosines (n, k) float32, best first, and text ids (n, k).

        If there are fewer than `k`, the rest has the id -1 and the score -inf. `thorough`: all texts are compared, and
        not those alone that an index of lists takes for near; `chosen`: those that `choice` says. ValueError if the
        queries have another dimension.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.manifest.dimension or k < 1:
            raise ValueError(
                f"queries {queries.shape} and k={k}: need (n, {self.manifest.dimension}) and k of at least 1"
            )
        found_scores = np.full((len(queries), k), -np.inf, np.float32)
        found_ids = np.full((len(queries), k), -1, np.int64)
        index, ids = self._parts.get(vector_name, (None, np.empty(0, np.int64)))
        if len(queries) and len(ids):
            parameters = _parameters(index, k, thorough=thorough, chosen=chosen)
            scores, rows = compute(index.search, unit(queries), min(k, len(ids)), params=parameters)
            hit = rows >= 0
            found_scores[:, : rows.shape[1]][hit] = scores[hit]
            found_ids[:, : rows.shape[1]][hit] = ids[rows[hit]]
        return found_scores, found_ids

    def choice(self, vector_name: str, text_ids: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Of each vector of that name, in the index's order, whether it is of one of these texts: a bit each."""
        return np.packbits(np.isin(self.ids(vector_name), text_ids), bitorder="little")

    def vectors(self, vector_name: str, text_ids: Sequence[int]) -> NDArray[np.float32]:
        """The vectors (n, dimension), of length 1, of those of these texts that are here."""
        import faiss

        index, ids = self._parts.get(vector_name, (None, np.empty(0, np.int64)))
        if isinstance(index, faiss.IndexIVF):
            index.make_direct_map()  # once: else it does not know in which list a row is
        rows = np.flatnonzero(np.isin(ids, np.array(text_ids, np.int64)))
        found = [index.reconstruct(int(row)) for row in rows]
        return np.stack(found) if found else np.zeros((0, self.manifest.dimension), np.float32)

    def ids(self, vector_name: str) -> NDArray[np.int64]:
        """The text ids (n,) of a vector name, in no order; none if there is no such name."""
        return self._parts.get(vector_name, (None, np.empty(0, np.int64)))[1]


def _parameters(index: Any, k: int, *, thorough: bool, chosen: NDArray[np.uint8] | None) -> Any:
    """FAISS's parameters of one search; None: as the index is tuned, which is for 10 vectors: those that come later are
    in more of its lists. chosen: see `FaissIndex.choice`.
    """
    import faiss

    given: dict[str, Any] = {}
    if chosen is not None:
        selector: Any = faiss.IDSelectorBitmap  # FAISS's Python layer takes other arguments than its stubs say
        given["sel"] = selector(chosen)
    if isinstance(index, faiss.IndexIVF):
        probed = (
            index.nlist if thorough or given else min(round(index.nprobe * max(1, k / TUNED_FOR) ** 0.5), index.nlist)
        )
        of_lists: Any = faiss.SearchParametersIVF
        return of_lists(nprobe=probed, **given)
    return faiss.SearchParameters(**given) if given else None


# Of this process, by the collection's folder.
_manifests: dict[Path, tuple[tuple[Path, int, int, int], Manifest]] = {}
_opened: dict[Path, FaissIndex] = {}
_opening: dict[Path, ProcessLock] = {}


def _open(generation: Path, checksum: str) -> FaissIndex:
    import faiss

    manifest = _read_manifest(generation)
    if manifest.checksum != checksum:
        raise VectorIndexError(f"{generation / 'manifest.json'} changed while it was read; {BUILD_AGAIN}")
    parts: dict[str, tuple[Any, NDArray[np.int64]]] = {}
    for name, described in manifest.vectors.items():
        for file, expected in described.files.items():
            verify(generation / file, expected)
        mapped = getattr(faiss, "IO_FLAG_MMAP_IFC", 0)  # vectors stay in the page cache, shared by all processes
        path = generation / f"{name}.faiss"
        try:
            index = faiss.read_index(str(path), mapped)
        except RuntimeError as error:
            raise VectorIndexError(f"{path}: not for this FAISS ({faiss.__version__}); {BUILD_AGAIN}") from error
        parts[name] = (index, np.load(generation / f"{name}.ids.npy", mmap_mode="r"))
    return FaissIndex(manifest, parts)


def verify(path: Path, expected: str) -> None:
    """VectorIndexError if a file is not there, or not the one that was written."""
    try:
        with path.open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise VectorIndexError(f"{path} cannot be read: {error.strerror}; {BUILD_AGAIN}") from error
    if actual != expected:
        raise VectorIndexError(f"{path} is damaged: its checksum differs from the manifest's; {BUILD_AGAIN}")
