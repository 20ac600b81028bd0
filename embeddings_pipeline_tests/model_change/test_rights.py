"""Rights survive a change of the model: owner, grants, policies, of every table and view that takes another's place."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import ModelChangeError
from embeddings_pipeline.model_change.phases import add_model, contract, expand, roll_back, swap
from embeddings_pipeline.model_change.plan import plan
from embeddings_pipeline.model_change.state import candidate_profile
from embeddings_pipeline.pipeline.collection import Collection, open_collection
from embeddings_pipeline.pipeline.shadow import backfill_batch
from embeddings_pipeline.search.query import search
from embeddings_pipeline.store import locks
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.destination.rights import ModelRights
from embeddings_pipeline_tests.support import segments
from embeddings_pipeline_tests.support.databases import as_role, name_of
from embeddings_pipeline_tests.support.model_change import again, backfill_all, begin, definition
from embeddings_pipeline_tests.support.workbench import PROFILE, execute, films, make_films, plain_role, sync_once

pytestmark = pytest.mark.usefixtures("superuser")
READ_SHOWN = "GRANT USAGE ON SCHEMA embeddings TO {0}; GRANT SELECT ON embeddings.films TO {0}"
READ_ALL = "GRANT USAGE ON SCHEMA embeddings TO {0}; GRANT SELECT ON ALL TABLES IN SCHEMA embeddings TO {0}"
READ_VIEW = "SELECT count(*) FROM embeddings.films"
ASK = "SELECT count(*) FROM embeddings.films WHERE (SELECT embeddings.assert_model('films', %s))"


@contextmanager
def roles(database: Database, *names: str) -> Iterator[None]:
    for name in names:
        execute(database, f"CREATE ROLE {name} LOGIN PASSWORD '{name}'")
    try:
        yield
    finally:
        for name in names:
            execute(database, f"REASSIGN OWNED BY {name} TO CURRENT_USER")
            execute(database, f"DROP OWNED BY {name}")
            execute(database, f"DROP ROLE {name}")


@pytest.fixture
def reader(database: Database) -> Iterator[str]:
    """A role that may do nothing yet; its name is this database's own, since roles are the server's."""
    name = f"reader_{name_of(database)}"
    with roles(database, name):
        yield name


def as_reader(database: Database, name: str, statement: str, parameters: Any = None) -> list[tuple[Any, ...]]:
    return execute(as_role(database, name, name), statement, parameters)


def rights(collection: Collection) -> dict[str, ModelRights]:
    """By profile, of every model of the collection."""
    models = [again(collection).model, *collection.ledger.shadow_models()]
    with collection.database.connect() as connection:
        return {model.profile.name: model.destination.rights(connection) for model in models}


def change(collection: Collection) -> Iterator[str]:
    """A change of the model to and fro; yields after each phase."""
    begin(collection, "wide")
    yield "expand"
    backfill_all(collection)
    yield "backfill"
    swap(again(collection), "swap")
    yield "swap"
    roll_back(again(collection), "back")
    yield "roll back"
    swap(again(collection), "again")
    yield "swap again"
    contract(again(collection), now=True)
    yield "contract"


class TestReaders:
    def test_a_reader_of_the_view_alone_reads_on_and_may_ask_which_model_it_shows(
        self, database, collection, reader
    ) -> None:
        execute(database, READ_SHOWN.format(reader))
        seen = set()
        for _ in change(collection):
            [(profile, fingerprint, dimension)] = as_reader(
                database, reader, "SELECT * FROM embeddings.current_model('films')"
            )
            seen.add((profile, dimension))
            assert as_reader(database, reader, ASK, [fingerprint]) == [(25,)]
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                as_reader(database, reader, "SELECT * FROM embeddings.model")
        assert seen == {("test", 32), ("wide", 48)}

    def test_whoever_may_read_all_tables_searches_on(self, database, settings, collection, reader) -> None:
        execute(database, READ_ALL.format(reader))
        own = Settings(
            database_url=as_role(database, reader, reader).url, embeddings_state_dir=settings.state_dir / "reader"
        )
        for _ in change(collection):
            assert search(definition(), own, "Film 7 number 7", k=1)[0].item_key == "7"

    def test_a_kept_model_is_read_as_the_current_one_is(self, database, settings, collection, reader) -> None:
        execute(database, READ_ALL.format(reader))
        kept = add_model(collection, candidate_profile(collection, "wide"))
        backfill_batch(collection.with_model(kept), 0, "added")
        own = Settings(database_url=as_role(database, reader, reader).url, embeddings_state_dir=settings.state_dir)
        assert search(definition(), own, "Film 7 number 7", k=1, profile="wide")

    def test_default_privileges_do_not_open_what_was_closed(self, database, collection, reader) -> None:
        execute(database, f"ALTER DEFAULT PRIVILEGES IN SCHEMA embeddings GRANT SELECT, INSERT ON TABLES TO {reader}")
        execute(database, "ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO PUBLIC")
        try:
            for _ in change(collection):
                assert len(set(rights(collection).values())) == 1
                model = again(collection).model.destination
                query = "SELECT has_table_privilege(%s, %s, 'SELECT')"
                assert execute(database, query, [reader, f"embeddings.{model.name}"]) == [(False,)]
        finally:
            execute(database, "ALTER DEFAULT PRIVILEGES REVOKE SELECT ON TABLES FROM PUBLIC")


class TestGrants:
    def test_every_kind_of_grant_is_given_and_what_changes_meanwhile_is_carried_over(
        self, database, collection, reader
    ) -> None:
        other = f"other_{name_of(database)}"
        current = f"embeddings.{collection.model.destination.name}"
        with roles(database, other):
            execute(
                database,
                f"""GRANT USAGE ON SCHEMA embeddings TO {reader};
                    GRANT SELECT ON {current} TO {reader} WITH GRANT OPTION; GRANT SELECT ON {current} TO PUBLIC;
                    GRANT UPDATE (embedding, text_id), REFERENCES (text_id) ON {current} TO {other};
                    GRANT INSERT (embedding) ON {current} TO {other} WITH GRANT OPTION;
                    GRANT DELETE, TRUNCATE ON {collection.model.destination.lacking.as_string(None)} TO {other};
                    SET ROLE {reader}; GRANT SELECT ON {current} TO {other}; RESET ROLE""",
            )
            for phase in change(collection):
                given = rights(collection)
                if phase == "backfill":
                    execute(
                        database,
                        f"""REVOKE SELECT ON {current} FROM {reader} CASCADE; REVOKE ALL ON {current} FROM PUBLIC;
                            GRANT SELECT (vector_name) ON {current} TO {reader};
                            GRANT DELETE ON {current} TO {other}""",
                    )
                if phase == "swap":
                    wide = f"embeddings.{again(collection).model.destination.name}"
                    execute(database, f"GRANT TRIGGER ON {wide} TO {reader}")
                assert len(set(given.values())) == 1, phase
                kept, _ = given["wide" if phase.startswith(("swap", "contract")) else "test"].kept
                granted = {(grant.role, grant.privilege, grant.column, grant.grantable) for grant in kept.grants}
                assert (other, "INSERT", "embedding", True) in granted
                assert ((reader, "SELECT", "", True) in granted) == (phase in ("expand", "backfill"))
                assert (("", "SELECT", "", False) in granted) == (phase in ("expand", "backfill"))
                assert ((reader, "SELECT", "vector_name", False) in granted) == (phase not in ("expand", "backfill"))
                assert ((reader, "TRIGGER", "", False) in granted) == (phase not in ("expand", "backfill", "swap"))

    def test_what_is_granted_while_a_swap_waits_for_its_lock_is_carried_over(
        self, database, collection, reader, monkeypatch
    ) -> None:
        begin(collection, "wide")
        backfill_all(collection)
        granted: list[Any] = []
        waits = locks._short_waits

        def granted_then(connection: psycopg.Connection, long: bool) -> None:
            if not granted:
                granted.append(execute(database, f"GRANT SELECT ON {collection.model.destination.place} TO {reader}"))
            waits(connection, long)

        monkeypatch.setattr(locks, "_short_waits", granted_then)
        swap(collection, "swap")
        query = "SELECT has_table_privilege(%s, %s, 'SELECT')"
        assert execute(database, query, [reader, again(collection).model.destination.place]) == [(True,)]

    def test_a_view_keeps_its_options_and_its_reader(self, database, collection, reader) -> None:
        execute(database, "ALTER VIEW embeddings.films SET (security_invoker = true, security_barrier = true)")
        execute(database, READ_SHOWN.format(reader))
        options = "SELECT unnest(reloptions) FROM pg_class WHERE oid = 'embeddings.films'::regclass ORDER BY 1"
        expected = execute(database, options)
        for _ in change(collection):
            assert execute(database, options) == expected
            with pytest.raises(psycopg.errors.InsufficientPrivilege):  # as before: the tables are asked for him
                as_reader(database, reader, READ_VIEW)

    def test_policies_come_along(self, database, collection, reader) -> None:
        current = collection.model.destination
        execute(
            database,
            f"""{READ_ALL.format(reader)};
                ALTER TABLE {current.place} ENABLE ROW LEVEL SECURITY;
                CREATE POLICY few ON {current.place} FOR SELECT TO {reader} USING (EXISTS (
                    SELECT FROM embeddings.films_text AS text
                    WHERE text.id = {current.name}.text_id AND text.item_key < '2'));
                CREATE POLICY "no % writes" ON {current.place} AS RESTRICTIVE FOR UPDATE USING (false)
                    WITH CHECK (vector_name <> '100 %')""",
        )
        for _ in change(collection):
            shown = f"SELECT count(*) FROM {again(collection).model.destination.place}"
            assert as_reader(database, reader, shown) == [(11,)]
            assert len(set(rights(collection).values())) == 1
        assert len(rights(collection)["wide"].kept[0].policies) == 2

    def test_before_anything_is_committed_another_declared_profile_leaves_the_reader(
        self, database, settings, reader
    ) -> None:
        make_films(database, films(3))
        open_collection(definition(), settings)
        execute(database, READ_ALL.format(reader))
        sync_once(definition(profile={**PROFILE, "name": "other", "dimensions": 48}), settings)
        own = Settings(database_url=as_role(database, reader, reader).url, embeddings_state_dir=settings.state_dir)
        assert as_reader(database, reader, READ_VIEW) == [(3,)]
        assert search(definition(), own, "Film 2 number 2", k=1)


class TestOwners:
    def test_the_candidate_belongs_to_whom_the_current_model_belongs(self, database, collection, reader) -> None:
        with plain_role(database, f"plain_{name_of(database)}") as url:
            plain = f"plain_{name_of(database)}"
            execute(database, f"GRANT SELECT ON films TO {plain}; GRANT {reader} TO {plain}")
            execute(database, f"GRANT USAGE, CREATE ON SCHEMA embeddings TO {reader}")
            owned = [*collection.model.destination.kept, collection.model.destination.tables.view]
            for relation in owned:
                execute(database, f"ALTER TABLE {relation.as_string(None)} OWNER TO {reader}")
            execute(database, f"GRANT SELECT ON ALL TABLES IN SCHEMA embeddings TO {reader}")
            own = Settings(database_url=url, embeddings_state_dir=collection.settings.state_dir)
            for _ in change(open_collection(collection.definition, own)):
                found = rights(collection)
                assert {each.owner for model in found.values() for each in model.kept} == {reader}
                assert execute(as_role(database, reader, reader), READ_VIEW) == [(25,)]

    @pytest.mark.parametrize(
        ("member", "create", "says"),
        [
            (False, True, "belongs to the role .* is no member of it.*: GRANT .* TO .*, or ALTER TABLE .* OWNER TO"),
            (True, False, "could not belong: GRANT CREATE ON SCHEMA embeddings TO"),
        ],
    )
    def test_an_owner_that_the_next_model_cannot_have_is_named_before_anything_is_made(
        self, database, collection, reader, member, create, says
    ) -> None:
        plain = f"plain_{name_of(database)}"
        with plain_role(database, plain) as url:
            execute(database, f"GRANT SELECT ON films TO {plain}")
            if member:
                execute(database, f"GRANT {reader} TO {plain}")
            if create:
                execute(database, f"GRANT CREATE ON SCHEMA embeddings TO {reader}")
            execute(database, f"ALTER TABLE {collection.model.destination.place} OWNER TO {reader}")
            execute(database, f"GRANT ALL ON {collection.model.destination.place} TO {plain}")
            own = open_collection(
                collection.definition, Settings(database_url=url, embeddings_state_dir=collection.settings.state_dir)
            )
            for refused in (expand, plan):
                with pytest.raises(ModelChangeError, match=says):
                    refused(own, candidate_profile(own, "wide"))
            assert own.ledger.shadow_models() == []

    def test_row_level_security_that_hides_rows_from_the_pipeline_itself_is_named(self, database, collection) -> None:
        plain = f"plain_{name_of(database)}"
        with plain_role(database, plain) as url:
            execute(database, f"GRANT SELECT ON films TO {plain}")
            place = collection.model.destination.place
            execute(database, f"ALTER TABLE {place} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
            execute(database, f"CREATE POLICY every ON {place} USING (true)")
            own = open_collection(
                collection.definition, Settings(database_url=url, embeddings_state_dir=collection.settings.state_dir)
            )
            with pytest.raises(ModelChangeError, match=r"hides rows .* NO FORCE ROW LEVEL SECURITY, or ALTER ROLE"):
                expand(own, candidate_profile(own, "wide"))


def test_the_plan_lists_what_is_granted(database, collection, reader) -> None:
    execute(database, f"GRANT SELECT ON ALL TABLES IN SCHEMA embeddings TO {reader}")
    execute(database, "ALTER VIEW embeddings.films SET (security_barrier = true)")
    planned = plan(collection, candidate_profile(collection, "wide"))
    given = [(each.phase, re.sub("(?<=vector|acking)_[0-9a-f]{12}", "", each.statement)) for each in planned]
    assert [each for each in given if each[1].startswith(("GRANT", "REVOKE", "ALTER VIEW"))] == [
        ("expand", f'GRANT SELECT ON "embeddings"."films_vector" TO "{reader}"'),
        ("expand", f'GRANT SELECT ON "embeddings"."films_lacking" TO "{reader}"'),
        ("swap", """ALTER VIEW "embeddings"."films" SET ("security_barrier" = 'true')"""),
        ("roll back", """ALTER VIEW "embeddings"."films" SET ("security_barrier" = 'true')"""),
    ]


def test_grants_on_a_users_own_column_follow_its_name(table, settings) -> None:
    name = f"reader_{name_of(table)}"
    with roles(table, name):
        one = segments.definition()
        collection = segments.sync(one, settings)
        execute(
            table, f"GRANT SELECT (id, embedding) ON segments TO {name}; GRANT SELECT (embedding) ON segments TO PUBLIC"
        )
        execute(table, f"GRANT USAGE ON SCHEMA embeddings TO {name}")
        query = "SELECT count(embedding) FROM segments WHERE (SELECT embeddings.assert_model('segments', %s))"
        expand(collection, candidate_profile(collection, "test"))
        segments.backfill_all(collection)
        execute(table, f"GRANT UPDATE (embedding) ON segments TO {name} WITH GRANT OPTION")

        def seen() -> tuple[int, set[tuple[Any, ...]]]:
            now = open_collection(one, settings)
            acl = """SELECT grantee <> 0, privilege_type, is_grantable FROM pg_attribute, aclexplode(attacl)
                     WHERE attrelid = 'segments'::regclass AND attname = 'embedding'"""
            [(count,)] = as_reader(table, name, query, [now.fingerprint])
            return count, set(execute(table, acl))

        expected = (25, {(True, "SELECT", False), (False, "SELECT", False), (True, "UPDATE", True)})
        assert seen() == expected
        swap(open_collection(one, settings), "swap")
        assert seen() == expected
        execute(table, "REVOKE SELECT (embedding) ON segments FROM PUBLIC")
        roll_back(open_collection(one, settings), "back")
        assert seen() == (25, expected[1] - {(False, "SELECT", False)})
        swap(open_collection(one, settings), "again")
        contract(open_collection(one, settings), now=True)
        assert seen() == (25, expected[1] - {(False, "SELECT", False)})


def test_a_column_that_is_adopted_anew_keeps_its_own_rights_and_the_view_its_reader(table, settings) -> None:
    name = f"reader_{name_of(table)}"
    with roles(table, name):
        segments.sync(segments.definition(), settings)
        execute(table, READ_ALL.format(name))
        execute(table, "ALTER TABLE segments ADD COLUMN second vector(48)")
        execute(table, f"GRANT SELECT (embedding) ON segments TO {name}; GRANT UPDATE (second) ON segments TO {name}")
        elsewhere = {"table": "segments", "profile": "wide", "column": "second"}
        segments.sync(segments.definition(destination=elsewhere), settings)
        assert as_reader(table, name, "SELECT count(*) FROM embeddings.segments") == [(25,)]
        acl = """SELECT attname, privilege_type FROM pg_attribute, aclexplode(attacl)
                 WHERE attrelid = 'segments'::regclass ORDER BY 1"""
        assert execute(table, acl) == [("embedding", "SELECT"), ("second", "UPDATE")]
