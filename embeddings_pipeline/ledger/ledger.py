"""The pipeline's own record of which items exist, what was last seen of them, and what is committed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Literal

import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb

from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.errors import ConfigurationError, profile_command
from embeddings_pipeline.ledger.full_scan import FullScans
from embeddings_pipeline.ledger.incremental_scan import IncrementalScans
from embeddings_pipeline.ledger.proposal import Proposals
from embeddings_pipeline.ledger.truncated import Truncated
from embeddings_pipeline.store.destination.base import Destination, all_there
from embeddings_pipeline.store.destination.factory import declared_storage, destination_of
from embeddings_pipeline.store.destination.rights import rights_changes, rights_of
from embeddings_pipeline.store.locks import lock_collection
from embeddings_pipeline.store.models import Model, current_model, has_vectors
from embeddings_pipeline.store.sql import load_sql


class Ledger(FullScans, IncrementalScans, Proposals, Truncated):
    """The ledger of one collection: its parts have a module each, and here it comes into being."""

    def register(self, *, redefine: bool = False) -> None:
        """Make the collection's tables if they are missing, and propose its definition: what differs becomes dirty.

        StaleDefinitionError if a newer one is in force.
        """
        with self.database.session() as connection:
            if not self.tables.are_made(connection):
                # By itself, and only if needed: even IF NOT EXISTS waits for commits, which wait for the row below.
                with connection.transaction():
                    lock_collection(connection, self.name)
                    self.tables.create(connection)
            definition = {"collection": self.name, "definition_hash": self.definition.definition_hash}
            connection.execute(load_sql("register/register"), definition)
            self.propose(connection, redefine=redefine)
            model = current_model(connection, self.definition)
            if model is None:
                return
            if not model.destination.is_as_declared(connection):
                self._adopt_again(connection, model.destination)
            if not all_there(connection, [model.destination.identifier, model.destination.lacking, self.tables.view]):
                with connection.transaction():  # somebody dropped one; a new epoch begins
                    lock_collection(connection, self.name)
                    model.destination.create(connection)
                    model.destination.show(connection)
                    model.destination.mark(connection)
                    connection.execute(load_sql("register/new_epoch"), {"collection": self.name})

    def _adopt_again(self, connection: psycopg.Connection, table: Destination) -> None:
        """Make anew what we made for a column whose definition has changed, or whose table was made anew."""
        with connection.transaction():
            lock_collection(connection, self.name)
            if table.is_as_declared(connection):  # by another process, for which we waited
                return
            if self.shadow_models():
                raise ConfigurationError(
                    f"collection {self.name!r}: its key, its vector's name or its `destination:` is not what it was "
                    "when a change of its model began; put it back, and end that first, with "
                    f"`{profile_command('contract', self.name)}` or `{profile_command('rollback', self.name)}`"
                )
            with self._rights_kept(connection, table, table):
                connection.execute(sql.SQL("DROP VIEW IF EXISTS {}").format(self.tables.view))
                table.release(connection)
                table.create(connection)
                table.show(connection)
            model = {"collection": self.name, "fingerprint": table.fingerprint, "identity": table.identity}
            connection.execute(load_sql("register/identity"), model)
            connection.execute(load_sql("register/new_epoch"), {"collection": self.name})

    def activate(self, profile: Profile, fingerprint: str) -> Model:
        """Make this model the collection's current one, stored as declared, if no vector is committed yet; the one that
        is current.
        """
        with self.database.connect() as connection:
            lock_collection(connection, self.name)
            storage = declared_storage(connection, self.definition)
            model = current_model(connection, self.definition)
            made = model and (model.destination.fingerprint, model.destination.storage)
            if made != (fingerprint, storage) and not has_vectors(connection, self.name):
                self._replace_models(connection, profile, fingerprint, storage)
            model = current_model(connection, self.definition)
        assert model is not None
        return model

    def _replace_models(
        self, connection: psycopg.Connection, profile: Profile, fingerprint: str, storage: Literal["halfvec", "vector"]
    ) -> None:
        """Forget every model of the collection, none of which has a vector, and make this one the current one."""
        table = destination_of(self.definition, fingerprint, profile.dimensions, storage)
        before = current_model(connection, self.definition)
        with self._rights_kept(connection, before.destination if before else table, table):
            connection.execute(sql.SQL("DROP VIEW IF EXISTS {}").format(self.tables.view))
            for unused in self.model_tables(connection):
                unused.release(connection)
                connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(unused.marker))
            connection.execute("DELETE FROM embeddings.model WHERE collection = %s", [self.name])
            table.create(connection)
            table.show(connection)
        model = {
            "collection": self.name,
            "fingerprint": fingerprint,
            "profile": Jsonb(asdict(profile)),
            "dimension": profile.dimensions,
            "storage": storage,
            "identity": table.identity,
        }
        connection.execute(load_sql("register/activate"), model)
        table.mark(connection)

    @contextmanager
    def _rights_kept(self, connection: psycopg.Connection, before: Destination, after: Destination) -> Iterator[None]:
        """What is made anew within the block, the view too, gets the rights of what was there before; a user's own
        column has rights of its own.
        """
        rights, [view] = before.rights(connection), rights_of(connection, [self.tables.view])
        yield
        [new] = rights_of(connection, [self.tables.view])
        made = after.rights(connection)
        wanted = replace(rights, column_grants=made.column_grants)
        for change in [*rights_changes(self.tables.view, new, view), *after.rights_changes(made, wanted)]:
            connection.execute(change.statement)
