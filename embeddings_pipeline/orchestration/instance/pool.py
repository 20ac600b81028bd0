"""The connections of Dagster's storages: a pool, which outlives the server's being killed."""

import select
import time
from typing import Any

import sqlalchemy
from sqlalchemy import event, exc

from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.session import lifting_limits

WAIT_SECONDS = (2, 8)  # for a server that does not answer; Dagster itself tries for a second
ASK_SECONDS = 2.0  # so often, the server is asked whether a session that is in use lives


class Pooled:
    """A pool instead of a connection an event; its connections outlive the server's being killed."""

    database: Database
    _engine: sqlalchemy.Engine

    def optimize_for_webserver(self, statement_timeout: int, pool_recycle: int, max_overflow: int) -> None:
        self._engine.dispose()
        super().optimize_for_webserver(  # type: ignore[misc]
            statement_timeout=statement_timeout, pool_recycle=pool_recycle, max_overflow=max_overflow
        )
        event.listen(self._engine, "do_connect", self._connect_again)
        event.listen(self._engine, "checkout", self._refuse_dead)

    def _connect_again(self, dialect: Any, _: Any, arguments: list[Any], parameters: dict[str, Any]) -> Any:
        for wait in WAIT_SECONDS:
            try:
                return _lasting(dialect.connect(*arguments, **parameters))
            except dialect.loaded_dbapi.OperationalError:
                if self.database.server is not None:
                    self.database.server.ensure_running()
                    break
                time.sleep(wait)
        return _lasting(dialect.connect(*arguments, **parameters))

    def _refuse_dead(self, connection: Any, record: Any, *_: Any) -> None:
        asked, now = record.info.get("asked"), time.monotonic()
        if asked is not None and now - asked < ASK_SECONDS and not _has_something_to_read(connection):
            return
        record.info["asked"] = now
        try:
            self._engine.dialect.do_ping(connection)
        except self._engine.dialect.loaded_dbapi.Error as error:
            raise exc.DisconnectionError from error  # the pool replaces it

    def dispose(self) -> None:
        super().dispose()  # type: ignore[misc]
        self._engine.dispose()


def _has_something_to_read(connection: Any) -> bool:
    """Of a session that is not in use: whether its end, as when the server was killed, or a message has come."""
    waiting = select.poll()
    waiting.register(connection, select.POLLIN)
    return bool(waiting.poll(0))


def _lasting(connection: Any) -> Any:
    """A connection of psycopg 2 that no limit of the role's or the server's ends while the pool keeps it."""
    with connection.cursor() as cursor:
        cursor.execute(lifting_limits())
    connection.commit()
    return connection
