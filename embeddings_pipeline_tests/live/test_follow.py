"""A committed change is in the answers within seconds, whatever happens beside it."""

import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.loading import read_collections
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import ConfigurationError, LakeError, OutageError, SourceError
from embeddings_pipeline.health.activity import under_way
from embeddings_pipeline.health.lag import indexes_due
from embeddings_pipeline.index.faiss_read import read_manifest
from embeddings_pipeline.index.map_read import read_map_manifest
from embeddings_pipeline.live import chores, follower
from embeddings_pipeline.live.watch import UpdatedRows
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline.pipeline.inventory import take_inventory
from embeddings_pipeline.pipeline.removal import remove_collection
from embeddings_pipeline.search.query import search
from embeddings_pipeline.store.database import MOST_SESSIONS, Database
from embeddings_pipeline_tests.support import databases
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.following import following
from embeddings_pipeline_tests.support.workbench import (
    committed,
    definition,
    execute,
    films,
    later,
    make_films,
    plain_role,
    sync_once,
    wait_until,
)

SOON = 20.0  # seconds; what is asked of `live` is a tenth, on a machine that has nothing else to do


def with_updates(**attributes: Any) -> CollectionDefinition:
    """The films, with `updated_at`."""
    source = {"table": "films", "key": ["id"], "updated_at": "at"}
    return definition(**{"source": source, **attributes})


@pytest.fixture
def synced(database: Database, settings: Settings) -> Database:
    """25 films, synced."""
    make_films(database, films(25))
    execute(database, "ALTER TABLE films ADD at timestamptz NOT NULL DEFAULT now()")
    execute(database, "CREATE INDEX ON films (at)")
    sync_once(with_updates(), settings)
    return database


def write(folder: Path, one: CollectionDefinition) -> None:
    """The definition as a file of this folder."""
    folder.mkdir(exist_ok=True)
    attributes = one.attributes.model_dump(mode="json", exclude_unset=True)
    component = {"type": "embeddings_pipeline.EmbeddingCollection", "attributes": attributes}
    (folder / "defs.yaml").write_text(yaml.safe_dump(component))


def soon(holds: Callable[[], bool]) -> None:
    wait_until(holds, SOON)


def texts(database: Database) -> dict[str, str]:
    return {key: text for key, (text, *_) in committed(database).items()}


def insert(database: Database, film: int, overview: str = "a new story") -> None:
    execute(database, "INSERT INTO films VALUES (%s, 'New', %s, 1)", [film, overview])


def edit(database: Database, film: int, overview: str) -> None:
    execute(database, "UPDATE films SET overview = %s, at = now() WHERE id = %s", [overview, film])


def test_rows_that_are_inserted_and_edited_are_found_by_a_search(synced: Database, settings: Settings) -> None:
    with following(with_updates(), settings=settings) as heard:
        insert(synced, 100, "walruses")
        edit(synced, 3, "xylophones")
        soon(lambda: texts(synced).get("100") == "New | walruses" and texts(synced)["3"] == "Film 3 | xylophones")
        assert search(with_updates(), settings, "xylophones", k=1)[0].item_key == "3"
        assert heard.watched == {"films": UpdatedRows.words}
        [activity] = under_way(synced, "films")
        assert activity.what == "live"
    assert under_way(synced, "films") == []
    assert heard.minutes[-1]["films"].total.inserted == 1 and not heard.lines


def test_a_row_of_an_earlier_time_is_seen_though_it_is_committed_later(synced: Database, settings: Settings) -> None:
    with following(with_updates(), settings=settings), synced.connect() as slow:
        slow.execute("UPDATE films SET overview = 'slow', at = now() WHERE id = 1")
        insert(synced, 100)
        soon(lambda: "100" in texts(synced))
        slow.commit()
        soon(lambda: texts(synced)["1"] == "Film 1 | slow")


def test_a_row_that_hides_its_key_stops_no_other(database: Database, settings: Settings) -> None:
    make_films(database, films(25))
    execute(database, "ALTER TABLE films ADD at timestamptz NOT NULL DEFAULT now()")
    execute(
        database,
        """CREATE FUNCTION told(text) RETURNS text LANGUAGE plpgsql VOLATILE AS $$
           BEGIN IF $1 = 'bad' THEN RAISE EXCEPTION USING MESSAGE = 'no such story', ERRCODE = '22023'; END IF;
               RETURN $1; END $$""",
    )
    execute(database, "CREATE VIEW told_films AS SELECT id, title, told(overview) AS overview, revenue, at FROM films")
    one = with_updates(source={"table": "told_films", "key": ["id"], "updated_at": "at"})
    edit(database, 7, "bad")
    sync_once(one, settings)
    assert len(committed(database)) == 24
    with following(one, settings=settings) as heard:
        edit(database, 7, "bad")
        edit(database, 3, "xylophones")
        soon(lambda: texts(database)["3"] == "Film 3 | xylophones")
    assert not heard.lines


def test_a_watch_keeps_none_of_the_sessions_that_the_process_shares(synced: Database, settings: Settings) -> None:
    watch = UpdatedRows(open_collection(with_updates(), settings))
    with closing(watch), ExitStack() as sessions:
        for _ in range(MOST_SESSIONS):
            sessions.enter_context(synced.session())


def test_a_collection_that_was_never_synced_is_built(database: Database, settings: Settings) -> None:
    make_films(database, films(25))
    execute(database, "ALTER TABLE films ADD at timestamptz DEFAULT now()")
    with following(with_updates(), settings=settings):
        soon(lambda: len(committed(database)) == 25)
        insert(database, 100)
        soon(lambda: "100" in texts(database))


def test_rows_that_vanish_are_found_by_a_full_scan(
    synced: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chores, "OTHERS_SECONDS", -3600.0)
    monkeypatch.setattr(chores, "SCAN_SHARE", 10.0)
    with following(with_updates(), settings=settings):
        execute(synced, "DELETE FROM films WHERE id = 7")
        soon(lambda: "7" not in texts(synced))


def test_more_than_a_fifth_that_vanishes_is_refused_and_told_once(
    synced: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chores, "OTHERS_SECONDS", -3600.0)
    monkeypatch.setattr(chores, "FAILED_SECONDS", 0.5)
    with following(with_updates(), settings=settings) as heard:
        execute(synced, "DELETE FROM films WHERE id > 5")
        soon(lambda: heard.says("nothing was deleted"))
        insert(synced, 100)
        soon(lambda: "100" in texts(synced))
    assert len(committed(synced)) == 26 and len([line for line in heard.lines if "deleted" in line]) == 1


def test_rows_that_no_longer_meet_where_go_but_not_a_fifth_of_them(synced: Database, settings: Settings) -> None:
    source = {"table": "films", "key": ["id"], "updated_at": "at", "where": "revenue > 0"}
    one = with_updates(source=source)
    sync_once(one, settings)
    with following(one, settings=settings):
        execute(synced, "UPDATE films SET revenue = 0, at = now() WHERE id <= 3")
        soon(lambda: len(committed(synced)) == 22)
        execute(synced, "UPDATE films SET revenue = 0, at = now() WHERE id <= 12")
        insert(synced, 100)
        soon(lambda: "100" in texts(synced))
        assert len(committed(synced)) == 23


def test_updated_at_in_the_future_is_found_by_the_wider_read_and_hides_nothing(
    synced: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chores, "RECENT_SECONDS", 1.0)
    with following(with_updates(), settings=settings):
        execute(synced, "UPDATE films SET overview = 'future', at = now() + interval '1 year' WHERE id = 4")
        soon(lambda: texts(synced)["4"] == "Film 4 | future")
        edit(synced, 5, "present")
        soon(lambda: texts(synced)["5"] == "Film 5 | present")


def test_where_the_lake_cannot_be_written_nothing_is_begun(
    synced: Database, settings: Settings, tmp_path: Path
) -> None:
    insert(synced, 100)
    (tmp_path / "file").touch()
    elsewhere = settings.model_copy(update={"lake_uri": str(tmp_path / "file" / "lake")})
    with following(with_updates(), settings=elsewhere) as heard:
        pass
    assert isinstance(heard.error, LakeError) and "the lake cannot be written at" in str(heard.error)
    assert execute(synced, "SELECT max(attempts) FROM embeddings.batch") == [(0,)]


def test_without_updated_at_one_line_says_what_to_do(synced: Database, settings: Settings) -> None:
    with following(definition(), settings=settings) as heard:
        pass
    assert isinstance(heard.error, ConfigurationError)
    assert "declares no `source.updated_at:`" in str(heard.error) and "\n" not in str(heard.error)


def test_one_that_cannot_be_followed_leaves_the_others_alone(synced: Database, settings: Settings) -> None:
    other = definition("other", source={"table": "nowhere", "key": ["id"], "updated_at": "at"})
    with following(with_updates(), other, settings=settings) as heard:
        insert(synced, 100)
        soon(lambda: "100" in texts(synced))
    assert list(heard.watched) == ["films"] and heard.says('relation "nowhere" does not exist')
    with following(other, settings=settings) as heard:
        pass
    assert isinstance(heard.error, SourceError)


def test_poison_goes_to_quarantine_and_the_rest_is_committed(synced: Database, settings: Settings) -> None:
    DeterministicEncoder.fail_on = "poison"
    with following(with_updates(), settings=settings):
        execute(synced, "UPDATE films SET overview = 'poison', at = now() WHERE id = 2")
        edit(synced, 3, "healthy")
        soon(lambda: texts(synced)["3"] == "Film 3 | healthy" and "2" not in texts(synced))
        DeterministicEncoder.fail_on = None
        later(synced, 3600)
        soon(lambda: texts(synced).get("2") == "Film 2 | poison")


def test_a_new_definition_is_followed(synced: Database, settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "defs"
    write(folder, with_updates())
    with following(read_collections(folder).find("films"), settings=settings) as heard:
        write(folder, with_updates(vectors={"base": "{title} / {overview}"}))
        soon(lambda: texts(synced)["1"] == "Film 1 / A story about number 1 and its friends")
        insert(synced, 100)
        soon(lambda: texts(synced).get("100") == "New / a new story")
    assert heard.says("its new definition is followed")


def test_a_collection_that_is_removed_is_not_made_anew(synced: Database, settings: Settings) -> None:
    with following(with_updates(), settings=settings) as heard:
        insert(synced, 100)
        remove_collection(synced, settings, take_inventory(synced, settings, "films"))
        soon(lambda: heard.ended)
    assert heard.says("removed or renamed")
    assert execute(synced, "SELECT name FROM embeddings.collection") == []


def test_a_session_that_is_ended_is_waited_for_and_told_once(synced: Database, settings: Settings) -> None:
    with following(with_updates(), settings=settings) as heard:
        execute(
            synced,
            """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
               WHERE pid <> pg_backend_pid() AND datname = current_database()""",
        )
        insert(synced, 100)
        soon(lambda: "100" in texts(synced) and heard.says("followed again"))
    assert len([line for line in heard.lines if "it waits" in line]) == 1


def test_two_do_no_batch_twice(synced: Database, settings: Settings) -> None:
    with following(with_updates(), settings=settings), following(with_updates(), settings=settings):
        DeterministicEncoder.reset()
        DeterministicEncoder.seconds_per_call = 0.3
        for n in range(8):
            edit(synced, 1 + 3 * n, f"changed {n}")
        soon(lambda: sum("changed" in text for text in texts(synced).values()) == 8)
    encoded = {text: count for text, count in DeterministicEncoder.texts_encoded.items() if "changed" in text}
    assert len(encoded) == 8 and set(encoded.values()) == {1}


def test_of_a_row_that_changes_faster_than_it_is_encoded_only_newest_texts_are(
    synced: Database, settings: Settings
) -> None:
    with following(with_updates(), settings=settings):
        DeterministicEncoder.reset()
        DeterministicEncoder.seconds_per_call = 1.0
        for n in range(40):
            edit(synced, 3, f"changed {n}")
            time.sleep(0.05)
        soon(lambda: texts(synced)["3"] == "Film 3 | changed 39")
    encoded = {text: count for text, count in DeterministicEncoder.texts_encoded.items() if "changed" in text}
    assert len(encoded) <= 8 and set(encoded.values()) == {1}


def test_the_files_of_its_last_runs_do_not_pile_up(synced: Database, settings: Settings) -> None:
    with following(with_updates(), settings=settings):
        for n in range(5):
            edit(synced, 1, f"changed {n}")
            soon(lambda n=n: texts(synced)["1"] == f"Film 1 | changed {n}")  # type: ignore[misc]
    folders = [folder for folder in (settings.state_dir / "lake").rglob("000000") if folder.is_dir()]
    assert len(folders) == 3
    assert all(len(list(folder.iterdir())) <= 3 for folder in folders)  # the sync's, and two of ours


@pytest.mark.usefixtures("superuser", "new_databases")
def test_a_source_that_goes_away_is_waited_for_and_told_once(
    server: Database, database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "LONGEST_WAIT", 0.5)
    name = f"{databases.name_of(database)}_source"
    shop = Database(server.ensure_sibling(name))
    try:
        make_films(shop, films(25))
        execute(shop, "ALTER TABLE films ADD at timestamptz NOT NULL DEFAULT now()")
        one = with_updates(source={"table": "films", "key": ["id"], "updated_at": "at", "url": shop.url})
        sync_once(one, settings)
        with following(one, settings=settings) as heard:
            execute(database, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
            execute(database, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
            soon(lambda: heard.says("it waits"))
            time.sleep(3)
            execute(database, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
            soon(lambda: heard.says("followed again"))
            insert(shop, 100)
            soon(lambda: "100" in texts(database))
        assert len(heard.lines) == 2, "\n".join(heard.lines)
        execute(database, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        execute(database, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
        with following(one, settings=settings) as heard:
            assert heard.watched == {one.name: "nothing yet, since the database or the source is away"}
            execute(database, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
            soon(lambda: heard.says("it is watched now by updated_at, each second"))
    finally:
        databases.dropped(server, name)


def test_a_permission_that_is_missing_for_a_while_is_told(
    synced: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "LONGEST_WAIT", 0.5)
    with plain_role(synced, "live_reader") as url:
        execute(synced, "GRANT SELECT ON films TO live_reader")
        with following(with_updates(), settings=settings.model_copy(update={"database_url": url})) as heard:
            execute(synced, "REVOKE SELECT ON films FROM live_reader")
            soon(lambda: heard.says("GRANT SELECT on it to the pipeline's role"))
            insert(synced, 100)
            execute(synced, "GRANT SELECT ON films TO live_reader")
            soon(lambda: "100" in texts(synced))
    assert len([line for line in heard.lines if "GRANT" in line]) == 1


def test_an_outage_of_the_encoder_is_told_once_and_blames_no_text(synced: Database, settings: Settings) -> None:
    with following(with_updates(), settings=settings) as heard:
        DeterministicEncoder.fail_on, DeterministicEncoder.error = " ", OutageError
        edit(synced, 3, "later")
        soon(lambda: heard.says("waits for its next try"))
        DeterministicEncoder.fail_on = None
        later(synced, 3600)
        soon(lambda: texts(synced)["3"] == "Film 3 | later")
    assert execute(synced, "SELECT count(*) FROM embeddings.quarantine") == [(0,)]


def test_indexes_are_built_where_nobody_else_does(
    synced: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chores, "INDEX_SECONDS", 0.3)
    monkeypatch.setattr(chores, "INDEX_PATIENCE", 0.0)
    one = with_updates()
    with following(one, settings=settings):
        wait_until(lambda: read_manifest(settings.state_dir / "faiss", "films") is not None)
        for n in range(1, 9):
            edit(synced, n, f"walrus {n}")
        soon(lambda: search(one, settings, "walrus 8", k=1, index="faiss")[0].item_key == "8")
        soon(lambda: all(texts(synced)[str(n)] == f"Film {n} | walrus {n}" for n in range(1, 9)))
        wait_until(lambda: not indexes_due(open_collection(one, settings)))
        generation = read_manifest(settings.state_dir / "faiss", "films").generation
        (settings.state_dir / "faiss" / "films" / "map.json").unlink()
        wait_until(lambda: read_map_manifest(settings.state_dir / "faiss", "films") is not None)
        assert read_manifest(settings.state_dir / "faiss", "films").generation == generation
    indexes = execute(synced, "SELECT count(*) FROM pg_indexes WHERE indexdef LIKE '%USING hnsw%'")
    assert indexes == [(1,)]


def test_neither_a_new_row_nor_an_old_batch_waits_for_ever(synced: Database, settings: Settings) -> None:
    """All batches are to be done anew, by a slow model, while rows are inserted without end."""
    execute(synced, "INSERT INTO films SELECT n, 'Film', 'old ' || n, 1 FROM generate_series(1001, 1300) AS n")
    sync_once(with_updates(), settings)
    edited = with_updates(vectors={"base": "{title} / {overview}"})
    with following(edited, settings=settings):
        DeterministicEncoder.seconds_per_call = 0.1
        for n in range(2000, 2010):
            insert(synced, n)
            soon(lambda n=n: str(n) in texts(synced))  # type: ignore[misc]
        old = [text for text in texts(synced).values() if " | " in text]
        assert len(old) < 325
        DeterministicEncoder.seconds_per_call = 0
        soon(lambda: not [text for text in texts(synced).values() if " | " in text])
