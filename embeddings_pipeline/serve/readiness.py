"""Whether searches can be answered, looked at again and again in a thread: so a probe never waits for what is away.

The same look reads definitions that have changed, and loads a model that has become current, before a search does.
"""

import logging
import threading
import time
from dataclasses import dataclass, replace

import psycopg

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.prices import is_paid
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import DatabaseError, PipelineError
from embeddings_pipeline.search.query import search
from embeddings_pipeline.serve.searches import patiently
from embeddings_pipeline.serve.served import Served
from embeddings_pipeline.store.database import open_database_to_read
from embeddings_pipeline.store.models import current_model
from embeddings_pipeline.store.retry import what_it_says
from embeddings_pipeline.store.schema import is_current

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
LATEST_SECONDS = 15.0  # a look that takes longer waits for something that is away
RELOAD_SECONDS = 60.0  # after which a model that could not be loaded is tried again


@dataclass(frozen=True)
class State:
    """What the last look has seen, and when by `time.monotonic()` it ended."""

    at: float
    database: bool = False
    schema: bool = False
    models: bool = False  # each collection that has vectors has answered a search here

    @property
    def ready(self) -> bool:
        return self.database and self.schema and self.models


class Readiness:
    """Looks from `start` until `close`."""

    def __init__(self, served: Served, settings: Settings) -> None:
        self._served, self._settings = served, settings
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="readiness", daemon=True)
        self._state = State(time.monotonic())
        self._loaded: dict[str, str] = {}  # collection → fingerprint that has answered here
        self._failed: dict[str, tuple[str, float]] = {}  # collection → fingerprint that could not, and when
        self._told, self._loading = "", False

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._ended.set()

    @property
    def state(self) -> State:
        """What is known; nothing counts any more if the last look was long ago."""
        state = self._state
        if time.monotonic() - state.at < LATEST_SECONDS:
            return state
        return replace(state, models=False) if self._loading else State(state.at)

    @property
    def lacks_database(self) -> bool:
        """Whether the last look found none."""
        return bool(self._told) and not self._state.database

    def _run(self) -> None:
        while not self._ended.is_set():
            self._refresh()
            try:
                patiently(self._look, time.monotonic(), lambda: not self._ended.is_set())
            except (PipelineError, psycopg.Error) as error:
                if self._ended.is_set():
                    return
                self._tell(what_it_says(error) if isinstance(error, psycopg.Error) else str(error))
                self._state = State(time.monotonic())
            except Exception:
                log.exception("readiness could not be looked at")
                self._state = State(time.monotonic())
            self._ended.wait(LOOK_SECONDS)

    def _refresh(self) -> None:
        try:
            self._served.refresh()
        except PipelineError as error:  # what was read before stays in force
            log.error("error: %s", error)

    def _look(self) -> None:
        database = open_database_to_read(self._settings)
        collections = self._served.collections
        with database.session() as connection:
            schema = is_current(connection)
            models = {name: current_model(connection, each) for name, each in collections.items()} if schema else {}
        if not schema:
            where = database.name_and_host
            self._tell(f"{where}: its schema is not this version's: `embeddings-pipeline sync` brings it up to date")
            self._state = State(time.monotonic(), database=True)
            return
        self._told = ""
        self._state = replace(self._state, at=time.monotonic(), database=True, schema=schema)
        for name, model in models.items():
            if model is not None:
                self._load(collections[name], model.destination.fingerprint, paid=is_paid(model.profile))
        ready = all(model is None or name in self._loaded for name, model in models.items())
        self._state = State(time.monotonic(), database=True, schema=schema, models=ready)

    def _tell(self, said: str) -> None:
        """Once, as long as it is the same."""
        if said != self._told:
            log.error("error: %s", said)
        self._told = said

    def _load(self, definition: CollectionDefinition, fingerprint: str, *, paid: bool) -> None:
        """Have the current model answer a search here, once; one that costs money is not asked."""
        name = definition.name
        if self._loaded.get(name) == fingerprint:
            return
        failed, at = self._failed.get(name, ("", 0.0))
        if failed == fingerprint and time.monotonic() - at < RELOAD_SECONDS:
            return
        self._loading = True
        try:
            if not paid:
                search(definition, self._settings, "ready?", k=1)
            self._loaded[name] = fingerprint
        except DatabaseError:
            return  # it has no vectors yet, or the database has just gone: the next look says which
        except PipelineError as error:
            log.error("error: %s", error)
            self._failed[name] = fingerprint, time.monotonic()
        finally:
            self._loading = False
