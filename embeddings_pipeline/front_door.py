"""The front door for programs: `open_collection("items").search("a man ages backwards")`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import psycopg

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.loading import read_collections
from embeddings_pipeline.config.settings import Settings, load_settings
from embeddings_pipeline.errors import DatabaseError, unusable
from embeddings_pipeline.forks import ProcessLock
from embeddings_pipeline.store.database import Database, DatabaseUse, join_database
from embeddings_pipeline.store.retry import what_it_says
from embeddings_pipeline.store.schema import has_schema

if TYPE_CHECKING:
    from embeddings_pipeline.orchestration.sync import SyncResult
    from embeddings_pipeline.search.hits import Hits


class CollectionClient:
    """One collection for a program: search it, bring it up to date, ask how it is.

    Threads may share it. `close`, or the end of a `with` block, lets go of the database.
    """

    def __init__(self, definition: CollectionDefinition, settings: Settings) -> None:
        self.definition, self.settings = definition, settings
        self._one_sync, self._mutex = ProcessLock(), ProcessLock()
        self._use: DatabaseUse | None = None

    def search(
        self,
        query: str,
        k: int | None = None,
        *,
        where: Mapping[str, Any] | None = None,
        vectors: str | list[str] | None = None,
        index: Literal["pgvector", "faiss"] = "pgvector",
        profile: str | None = None,
        mode: Literal["dense", "text", "hybrid"] | None = None,
        rerank: bool | None = None,
    ) -> "Hits":
        """The `k` best items, best first: `Hit(item_key, score, item, text, …)`.

        `mode`: `dense`, the nearest in meaning, scored by their cosine; `text`, those with the query's words; `hybrid`,
        both rankings joined. Left out: hybrid if the collection has `words:`, else dense.
        `where`: a condition on the columns of `filters:`, as `{"release_year": {"gte": 2000}, "genres": ["Drama"]}`; as
        many items as meet it are found. `vectors`: which of the items' vectors, one or several; the first if left out.
        `index`: where to look. `profile`: a shadow model's. `rerank`: have a cross-encoder put the first hits into
        order; left out: if ENABLE_RERANKER says so. `k` left out: 10, or RETURN_TOP_K if hits are reranked. The first
        search loads the model. What is returned is a list, with an `explanation`. Raises PipelineError, in one line
        that names the remedy.
        """
        from embeddings_pipeline.search.query import search

        with self._database():
            return search(
                self.definition,
                self.settings,
                query,
                k=k,
                where=where,
                vectors=vectors,
                index=index,
                profile=profile,
                mode=mode,
                rerank=rerank,
            )

    def similar(
        self,
        item_key: str | int | list[Any],
        k: int = 10,
        *,
        where: Mapping[str, Any] | None = None,
        vectors: str | list[str] | None = None,
        index: Literal["pgvector", "faiss"] = "pgvector",
        profile: str | None = None,
    ) -> "Hits":
        """The `k` items nearest to an item, itself left out. It loads no model.

        `item_key`: as a hit has it, or the values of several key columns. The rest is as in `search`.
        """
        from embeddings_pipeline.search.query import similar

        with self._database():
            return similar(
                self.definition,
                self.settings,
                item_key,
                k=k,
                where=where,
                vectors=vectors,
                index=index,
                profile=profile,
            )

    def recommend(
        self,
        *,
        liked: Sequence[Any] = (),
        disliked: Sequence[Any] = (),
        history: Sequence[Any] = (),
        user: str | int | None = None,
        k: int = 10,
        where: Mapping[str, Any] | None = None,
        vectors: str | list[str] | None = None,
        index: Literal["pgvector", "faiss"] = "pgvector",
        profile: str | None = None,
        strategy: Literal["mean", "best"] | None = None,
        diversity: float | None = None,
        half_life_days: float | None = None,
    ) -> "Hits":
        """The `k` items that suit somebody best, without those that they know; `score` is from 0 to 1.

        `liked`, `disliked`: items' keys. `history`: keys, or mappings `{"item": key, "weight": 1.0, "at": time}`, a
        weight below 0 for what was disliked. `user`: whose history to read from `interactions:`. `strategy`: `mean`
        looks near the middle of what was liked, `best` near any one of it. `diversity`: from 0, the best whatever they
        have in common, to 1. `half_life_days`: after which an interaction counts half. What is left out is as
        `recommend:` of the definition says. Nobody's history: what is popular. It loads no model. The rest is as in
        `search`.
        """
        from embeddings_pipeline.search.recommend import recommend

        with self._database():
            return recommend(
                self.definition,
                self.settings,
                liked=liked,
                disliked=disliked,
                history=history,
                user=user,
                k=k,
                where=where,
                vectors=vectors,
                index=index,
                profile=profile,
                strategy=strategy,
                diversity=diversity,
                half_life_days=half_life_days,
            )

    def sync(
        self,
        *,
        full: bool = False,
        force: bool = False,
        dry_run: bool = False,
        limit: int | None = None,
        allow_deletes: bool = False,
    ) -> "SyncResult":
        """Bring vectors and indexes up to date with the source, as `embeddings-pipeline sync` does; what was done.

        One at a time: another thread waits. It imports Dagster if there is work. Raises PipelineError, in one line.
        """
        from embeddings_pipeline.orchestration.sync import sync

        if limit is not None and (not isinstance(limit, Integral) or isinstance(limit, bool) or limit < 1):
            raise unusable("limit", limit, "a whole number from 1, or None for no limit")
        with self._one_sync, self._database():
            return sync(
                self.definition,
                self.settings,
                full=full,
                force=force,
                dry_run=dry_run,
                limit=limit,
                allow_deletes=allow_deletes,
            )

    def status(self) -> dict[str, Any]:
        """What `embeddings-pipeline status --json` prints: items, vectors, coverage, model, indexes."""
        from embeddings_pipeline.health.status import collection_status

        with self._database() as database:
            has_schema(database)
            return collection_status(self.definition, database, self.settings)

    def close(self) -> None:
        """Let go of the database, once what other threads and other clients do with it has ended.

        It is opened again if the collection is used again.
        """
        with self._mutex:
            use, self._use = self._use, None
        if use is not None:
            use.leave()

    @contextmanager
    def _database(self) -> Iterator[Database]:
        """The database, which stays until the block ends, and this client's until `close`."""
        now = join_database(self.settings)
        try:
            with self._mutex:
                if self._use is None or not self._use.lasts:
                    self._use = join_database(self.settings)
            yield now.database
        except psycopg.Error as error:
            raise DatabaseError(f"collection {self.definition.name!r}: {what_it_says(error)}") from error
        finally:
            now.leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def open_collection(
    name: str | None = None,
    *,
    defs_dir: str | Path | None = None,
    state_dir: str | Path | None = None,
    database_url: str | None = None,
) -> CollectionClient:
    """A collection by its name; without one, the only one or `items`.

    What is left out comes from the environment and `.env`, as on the command line: `defs_dir`, the folder with the
    `defs.yaml` files (EMBEDDINGS_DEFS_DIR); `state_dir` (EMBEDDINGS_STATE_DIR); `database_url` (DATABASE_URL). Nothing
    is connected to yet. Raises ConfigurationError if there is no such collection or its `defs.yaml` has a mistake.
    """
    if name is not None and not isinstance(name, str):
        raise unusable("name", name, "the name of a collection, or None for the only one")
    for argument, folder in (("defs_dir", defs_dir), ("state_dir", state_dir)):
        if folder is not None and not isinstance(folder, str | Path):
            raise unusable(argument, folder, "the path of a folder, or None for what the environment says")
    if database_url is not None and not isinstance(database_url, str):
        raise unusable("database_url", "…", "a URL as text, or None for what the environment says")
    given = {
        "embeddings_defs_dir": None if defs_dir is None else Path(defs_dir).resolve(),
        "embeddings_state_dir": None if state_dir is None else Path(state_dir).resolve(),
        "database_url": database_url,
    }
    settings = load_settings().model_copy(update={key: value for key, value in given.items() if value is not None})
    return CollectionClient(read_collections(settings.defs_dir).find(name), settings)
