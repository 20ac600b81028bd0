"""Which definition of a collection is in force: the newest one, which is proposed once."""

import socket
from typing import Any

import psycopg

from embeddings_pipeline.errors import StaleDefinitionError
from embeddings_pipeline.index.searching import search_definition, search_digest
from embeddings_pipeline.ledger.base import LedgerBase
from embeddings_pipeline.store.sql import load_sql


class Proposals(LedgerBase):
    """The part of the ledger that knows where definitions come from.

    A definition that is read anew from a file is proposed, and is in force from then on: what differs becomes dirty.
    It is not proposed again by the process that read it, by a file that has not changed, or by a file that nobody knows
    yet (a container has a new host name each time). So two that differ, on one database, do not undo each other's work,
    and the older one is told.
    """

    def propose(self, connection: psycopg.Connection, *, redefine: bool = False) -> None:
        """StaleDefinitionError if a newer definition is in force. `redefine`: this one is the newest all the same."""
        self._put_in_force(connection, redefine=redefine)
        known = {"collection": self.name, "digest": search_digest(self.definition)}
        if connection.execute(load_sql("register/knows_search"), known).fetchone() != (True,):
            connection.execute(load_sql("register/search"), known | search_definition(self.definition))

    def _put_in_force(self, connection: psycopg.Connection, *, redefine: bool) -> None:
        reading, values = self.definition.reading, self._proposal()
        if self.definition.path is None:  # a program's own: there is nothing to compare it with
            connection.execute(load_sql("register/propose"), values)
            return
        in_force, here, lately, _ = self._in_force(connection, values)
        own = self.definition.outcome_hash
        if in_force == own and (reading.proposed or (here == own and lately)):
            reading.proposed = True
            return
        with connection.transaction():
            connection.execute(load_sql("register/lock"), values)
            in_force, here, _, known = self._in_force(connection, values)
            older = reading.proposed or here == own or (here is None and known)
            if in_force not in (own, None) and older and not redefine:
                raise self._superseded(connection, values)
            connection.execute(load_sql("register/propose"), values)
            connection.execute(load_sql("register/proposed"), values)
        reading.proposed = True

    def step_aside(self, reason: str) -> None:
        """Note for `status` that a process of this place does nothing, because its definition is not the newest."""
        with self.database.connect(autocommit=True) as connection:
            connection.execute(load_sql("register/aside"), {**self._proposal(), "reason": reason})

    def check_newest(self) -> None:
        """StaleDefinitionError if a sync would refuse this definition as an older one. Writes nothing."""
        self._look()

    def definition_notice(self) -> str | None:
        """What there is to say of the definition: it is not the one in force, or a process has an older one."""
        try:
            return self._look()
        except StaleDefinitionError as error:
            return str(error)

    def _look(self) -> str | None:
        if self.definition.path is None:
            return None
        values, own = self._proposal(), self.definition.outcome_hash
        try:
            with self.database.connect(autocommit=True) as connection:
                in_force, here, _, known = self._in_force(connection, values)
                if in_force not in (own, None):
                    if here == own or (here is None and known):
                        raise self._superseded(connection, values)
                    return "defs.yaml has changed since the last sync: the next one takes it"
                aside = connection.execute(load_sql("register/who_is_aside"), values).fetchone()
        except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn):  # an older schema
            return None
        return aside[0] if aside else None

    def _proposal(self) -> dict[str, Any]:
        path = (
            self.definition.path.absolute() if self.definition.path else ""
        )  # which may be a link to each new version
        return {
            "collection": self.name,
            "place": f"{socket.gethostname()}:{path}",
            "definition_hash": self.definition.definition_hash,
            "outcome_hash": self.definition.outcome_hash,
        }

    def _in_force(self, connection: psycopg.Connection, values: dict[str, Any]) -> tuple[Any, ...]:
        return connection.execute(load_sql("register/in_force"), values).fetchone() or (None, None, False, False)

    def _superseded(self, connection: psycopg.Connection, values: dict[str, Any]) -> StaleDefinitionError:
        place, since = connection.execute(load_sql("register/by_whom"), values).fetchone() or ("elsewhere", None)
        if place == values["place"]:
            return StaleDefinitionError(
                f"collection {self.name!r}: defs.yaml has changed: reload the definitions (another process has read "
                f"{self.definition.path} since)"
            )
        return StaleDefinitionError(
            f"collection {self.name!r}: another definition of it is newer, and in force: {place}"
            f"{f', since {since:%Y-%m-%d %H:%M %Z}' if since else ''}. Make {self.definition.path} the same, or put it "
            f"in force with `embeddings-pipeline sync --collection {self.name} --redefine`"
        )
