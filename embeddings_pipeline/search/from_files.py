"""Answers while the database cannot be reached: from the current generation's files, and saying how old they are."""

import hashlib
import logging
import reprlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import numpy as np
import psycopg
from numpy.typing import NDArray

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.fingerprint import fingerprint
from embeddings_pipeline.config.profiles import resolve_profile
from embeddings_pipeline.config.settings import Settings, revealed
from embeddings_pipeline.errors import ConfigurationError, DatabaseError, ProfileError
from embeddings_pipeline.forks import ProcessLock
from embeddings_pipeline.index.bm25_read import WordsIndex, open_words
from embeddings_pipeline.index.exact import unit
from embeddings_pipeline.index.faiss_read import FaissIndex, open_index
from embeddings_pipeline.index.items_file import ItemsIndex, ItemText, open_items
from embeddings_pipeline.index.searching import texts_per_item
from embeddings_pipeline.search.arguments import Request
from embeddings_pipeline.search.encoding import fingerprint_lately, query_vector
from embeddings_pipeline.search.fusion import candidates, fused
from embeddings_pipeline.search.hits import Explanation, Hit, Hits, Leg, best_of, exact_json
from embeddings_pipeline.search.nearest import GROWTH, leg_of
from embeddings_pipeline.search.where_in_files import meets
from embeddings_pipeline.store.database import Database, open_database_to_read
from embeddings_pipeline.wording import counted

log = logging.getLogger(__name__)

AGAIN_SECONDS = 5.0  # from an attempt to reach the database until the next one
MOST_TEXTS = 20_000
ATTEMPTS = 3  # a generation may be replaced while it is asked

Of = TypeVar("Of", FaissIndex, WordsIndex)
Ranked = Callable[[int], Iterator[tuple[int, float]]]
"""Ids and scores of the best texts, so many."""


class Outage:
    """Whether this process knows that a database cannot be reached, so that not each search waits for it."""

    def __init__(self) -> None:
        self._error: DatabaseError | None = None
        self._again = 0.0
        self._told: set[str] = set()  # collections
        self._mutex = ProcessLock()

    def known(self, database: Callable[[], Database]) -> DatabaseError | None:
        """Why it cannot be reached; None if it is not known to be so. One caller in some seconds tries."""
        with self._mutex:
            if self._error is None or time.monotonic() < self._again:
                return self._error
            self._again = time.monotonic() + AGAIN_SECONDS
        try:
            database().connect().close()  # which does not wait for a session of the pool
        except DatabaseError as error:
            self.began(error)
            return error
        with self._mutex:
            self._error = None
            self._told.clear()
        log.warning("warning: the database answers again")
        return None

    def began(self, error: DatabaseError) -> None:
        """Note a failure."""
        with self._mutex:
            self._error, self._again = error, time.monotonic() + AGAIN_SECONDS

    def tell(self, definition: CollectionDefinition, what: str) -> None:
        """What answers meanwhile, once for each collection."""
        with self._mutex:
            first = definition.name not in self._told
            self._told.add(definition.name)
        if first:
            log.warning("warning: collection %r: %s", definition.name, what)


_outages: dict[tuple[str | None, Path], Outage] = {}  # of this process, by database


def outage_of(settings: Settings) -> Outage:
    """What this process knows of the database."""
    return _outages.setdefault((revealed(settings.database_url), settings.state_dir), Outage())


def known_outage(settings: Settings) -> DatabaseError | None:
    """Why the database cannot be reached, if this process knows, so that nobody waits to be told once more."""
    return outage_of(settings).known(lambda: open_database_to_read(settings))


def outage_behind(settings: Settings, error: DatabaseError | psycopg.OperationalError) -> DatabaseError | None:
    """Why the database cannot be reached, if that is behind an error, which is noted; None if it can: a session was
    lost, or all were busy.
    """
    if not is_outage(error):
        return None
    try:
        open_database_to_read(settings).connect().close()
    except DatabaseError as gone:
        outage_of(settings).began(gone)
        return gone
    return None


def is_outage(error: BaseException) -> bool:
    """Whether the database could not be reached, or went away; not that it refuses what it was asked."""
    at_fault = error.__cause__ if isinstance(error, DatabaseError) else error
    return isinstance(at_fault, psycopg.OperationalError) and not isinstance(at_fault, psycopg.errors.QueryCanceled)


def answer_from_files(
    definition: CollectionDefinition,
    settings: Settings,
    request: Request,
    outage: Outage,
    why: DatabaseError,
    *,
    text: str = "",
    item_key: str | None = None,
) -> Hits:
    """The best items for a text, or like an item, as the files have them. Raises `why` if they cannot say."""
    for _ in range(ATTEMPTS):
        items = open_items(settings.state_dir / "faiss", definition.name)
        if items is None or request.profile is not None:
            raise why  # there is nothing here, or what is asked for needs the database
        with suppress(_ReplacedError):
            return _answer(definition, settings, request, items, outage, why, text, item_key)
    raise why


class _ReplacedError(Exception):
    """Another generation is the current one now."""


def _answer(
    definition: CollectionDefinition,
    settings: Settings,
    request: Request,
    items: ItemsIndex,
    outage: Outage,
    why: DatabaseError,
    text: str,
    item_key: str | None,
) -> Hits:
    """As `answer_from_files`, from that generation. _ReplacedError."""
    began = time.perf_counter()
    try:
        files = _Files(definition, settings, request, items)
    except KeyError:
        raise why from None  # the files are older than a column of the condition
    legs, fell_back = list[Leg](), [_told(items, why)]
    outage.tell(definition, fell_back[0])
    rankings: dict[str, list[Hit]] = {}
    vectors: Mapping[str, NDArray[np.float32]] = {}
    try:
        if request.mode != "text":
            vectors = files.vectors_of(item_key) if item_key is not None else files.encoded(text)
    except ProfileError as error:
        if request.mode != "hybrid":
            raise
        fell_back.append(f"{error}: words alone answered")
    k = candidates(request.k) if request.mode == "hybrid" else request.k + (item_key is not None)
    for name, vector in vectors.items():
        hits, leg = files.dense(name, vector, k)
        rankings.setdefault("dense", []).extend(hits)
        legs.append(leg)
    if request.mode != "dense":
        try:
            rankings["text"], leg = files.by_words(text, k)
            legs.append(leg)
        except DatabaseError as error:
            if not vectors:
                raise
            fell_back.append(f"{error}: vectors alone answered")
    found = _joined(definition, rankings)
    hits = [hit for hit in found if hit.item_key != item_key][: request.k]
    manifest, milliseconds = items.manifest, {"search": round(1000 * (time.perf_counter() - began), 3)}
    explanation = Explanation(
        files.profile.name,
        manifest.fingerprint,
        tuple(legs),
        milliseconds=milliseconds,
        mode=request.mode,
        fell_back=tuple(fell_back),
    )
    return Hits(hits, explanation)


def _joined(definition: CollectionDefinition, rankings: Mapping[str, list[Hit]]) -> list[Hit]:
    words = definition.attributes.words
    if len(rankings) == 2 and words is not None:
        return fused(best_of(rankings["dense"], MOST_TEXTS), rankings["text"], words.fusion)
    return best_of([hit for hits in rankings.values() for hit in hits], MOST_TEXTS)


def _told(items: ItemsIndex, why: DatabaseError) -> str:
    """What answered, how old it is, and why."""
    built = datetime.fromisoformat(items.manifest.built_at)
    minutes = max(0, round((datetime.now(UTC) - built).total_seconds() / 60))
    age = counted(minutes, "minute") if minutes < 120 else counted(minutes // 60, "hour")
    return f"answered from files that are {age} old ({items.manifest.built_at}): {why}"


class _Files:
    """The current generation, as one search asks it."""

    def __init__(
        self, definition: CollectionDefinition, settings: Settings, request: Request, items: ItemsIndex
    ) -> None:
        self.definition, self.settings, self.request, self.items = definition, settings, request, items
        self.folder = settings.state_dir / "faiss"
        self.profile = resolve_profile(definition.declared_profile, settings)
        self.only: NDArray[np.int64] | None = None
        if request.where is not None:
            meets_it = meets(definition.attributes.filters, request.where)
            asked = hashlib.sha256(repr((definition.attributes.filters, request.where)).encode()).hexdigest()
            self.only = items.texts_where(asked, lambda payload: meets_it(exact_json(payload) if payload else {}))

    def encoded(self, text: str) -> dict[str, NDArray[np.float32]]:
        """What to compare each vector name's vectors with. ProfileError if the files are another model's."""
        self._check_model(fingerprint(self.profile, self.settings.state_dir))
        vector = query_vector(self.definition, self.profile, self.settings, text)
        self._check_model(fingerprint_lately(self.profile, self.settings))  # its files may have changed meanwhile
        return dict.fromkeys(self.request.vectors, vector)

    def _check_model(self, fingerprint: str) -> None:
        if fingerprint != self.items.manifest.fingerprint:
            raise ProfileError(
                f"collection {self.definition.name!r}: the files are of another model than profile "
                f"{self.profile.name!r}, which is declared"
            )

    def _index(self) -> FaissIndex:
        return self._of_this_generation(open_index(self.folder, self.definition.name))

    def _of_this_generation(self, index: Of) -> Of:
        """The same. _ReplacedError if it is of another generation than the items: its texts may be others', or its
        vectors another model's.
        """
        if index.manifest != self.items.manifest:
            raise _ReplacedError
        return index

    def vectors_of(self, item_key: str) -> dict[str, NDArray[np.float32]]:
        """The directions of an item's vectors, by name. ConfigurationError if it has none."""
        index, found = self._index(), {}
        for name in self.request.vectors:
            if ids := self.items.texts_of(item_key, name):
                vectors = index.vectors(name, ids)
                found[name] = unit(unit(vectors).mean(axis=0, keepdims=True))[0]
        if not found:
            raise ConfigurationError(
                f"collection {self.definition.name!r}: the files have no vector of item {reprlib.repr(item_key)}"
            )
        return found

    def dense(self, name: str, vector: NDArray[np.float32], k: int) -> tuple[list[Hit], Leg]:
        """The `k` items nearest to a vector, by FAISS."""
        index = self._index()
        chosen = None if self.only is None else index.choice(name, self.only)

        def best(n: int) -> Iterator[tuple[int, float]]:
            scores, ids = index.search(name, vector[None, :], n, chosen=chosen)
            if ids[0][-1] < 0 and chosen is None:  # it has looked into too few of its lists, or has no more
                scores, ids = index.search(name, vector[None, :], n, thorough=True)
            return ((int(i), float(score)) for i, score in zip(ids[0], scores[0], strict=True) if i >= 0)

        return self._leg(name, "faiss", best, k)

    def by_words(self, text: str, k: int) -> tuple[list[Hit], Leg]:
        """The `k` items with words of a text, by BM25. DatabaseError if no words were published."""
        from embeddings_pipeline.index.terms import query_words, stems_of

        words, index = self.definition.attributes.words, open_words(self.folder, self.definition.name)
        index = index and self._of_this_generation(index)
        names = [name for name in self.request.vectors if index and name in index.parts]
        if words is None or index is None:
            raise DatabaseError(
                f"collection {self.definition.name!r}: the files have no words; search with mode 'dense'"
            )
        terms = stems_of(query_words(text, words), index.stem)

        def best(n: int) -> Iterator[tuple[int, float]]:
            found = [index.parts[name].best(index.parts[name].scores(terms), n, self.only) for name in names]
            pairs = [(int(i), float(score)) for ids, scores in found for i, score in zip(ids, scores, strict=True)]
            return iter(sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:n])

        return self._leg(", ".join(names), "bm25", best, k)

    def _leg(self, name: str, by: str, best: Ranked, k: int) -> tuple[list[Hit], Leg]:
        """The `k` items of the best texts, each with its best one."""
        began, n = time.perf_counter(), k * texts_per_item(self.definition)
        while True:
            hits, texts = dict[str, Hit](), 0
            for text_id, score in best(n):
                texts += 1
                if (found := self.items.text(text_id)) is not None:
                    hits.setdefault(found.item_key, _hit(found, score))
            if len(hits) >= k or texts < n or n >= MOST_TEXTS:
                break
            n = min(n * GROWTH, MOST_TEXTS)
        some = list(hits.values())[:k]
        among = "" if self.only is None else f", among {counted(len(self.only), 'text')} that match"
        how = f"the published files alone{among}"
        return some, leg_of(some, name, by, how, texts, began, [])


def _hit(found: ItemText, score: float) -> Hit:
    payload = exact_json(found.payload) if found.payload else {}
    return Hit(found.item_key, score, payload, found.text, found.vector_name, found.chunk)
