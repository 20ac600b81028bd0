"""What users' tables, disks and settings have in store: the right result, or one clear error, and nothing is lost."""

import os
import subprocess
from pathlib import Path

import pytest

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.templates import RENDERING_RULES, Template
from embeddings_pipeline.errors import LakeError, RefusedError, SourceError
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline_tests.support.workbench import (
    PROFILE,
    committed,
    definition,
    execute,
    films,
    make_films,
    run_batch,
    sync_once,
)


def everything(database, name: str = "films") -> list[list[tuple]]:
    """All that is stored of a collection: items, texts with their ids, vectors."""
    tables = (f"{name}_item", f"{name}_text", name)
    rows = [execute(database, f"SELECT t::text FROM embeddings.{table} t ORDER BY 1") for table in tables]
    return rows


def test_an_empty_table_is_no_items_and_stays_usable(database, settings):
    make_films(database, [])
    collection, encoded = sync_once(definition(), settings)
    assert encoded == 0 and committed(database) == {} and collection.ledger.batches() == []
    execute(database, "INSERT INTO films VALUES (1, 'Heat', 'A heist')")
    assert sync_once(definition(), settings, "second")[1] == 1


def test_null_and_blank_texts_in_every_column_are_items_without_vectors(database, settings):
    blank = [None, "", " ", "\n\t", "\u00a0\u2003"]
    make_films(database, [(n, a, b, None) for n, (a, b) in enumerate((a, b) for a in blank for b in blank)])
    execute(database, "INSERT INTO films VALUES (100, NULL, 'A heist'), (101, 'Heat', ' ')")
    collection, encoded = sync_once(definition(items_per_batch=100), settings)
    assert encoded == 2
    assert {key: text for key, (text, _, _) in committed(database).items()} == {"100": "A heist", "101": "Heat"}
    assert execute(database, "SELECT count(*), count(*) FILTER (WHERE blank) FROM embeddings.films_text") == [(27, 25)]
    assert (
        collection.ledger.dirty_batches() == []
        and sync_once(definition(items_per_batch=100), settings, "again")[1] == 0
    )


def test_a_text_that_turns_blank_loses_its_vector_and_gets_it_back(database, settings):
    make_films(database, films(3))
    sync_once(definition(), settings)
    execute(database, "UPDATE films SET title = ' ', overview = NULL WHERE id = 2")
    assert sync_once(definition(), settings, "second")[1] == 0
    assert set(committed(database)) == {"1", "3"}
    execute(database, "UPDATE films SET title = 'Back' WHERE id = 2")
    assert sync_once(definition(), settings, "third")[1] == 1
    assert committed(database)["2"][0] == "Back"


def test_emoji_right_to_left_and_broken_unicode_are_committed_as_they_are(database, settings):
    texts = [
        "🎬 𠜎 👨‍👩‍👧",
        "שלום עולם",
        "e\u0301",
        "a\u200bb",
        "\ufffd\ufffe\U0010ffff",
        "tab\there",
        "\x01a\x1f\x7f",
        "%s {title} \\ ' \"",
    ]
    make_films(database, [(n, text, None, None) for n, text in enumerate(texts)])
    sync_once(definition(), settings)
    assert {key: (text, item["title"]) for key, (text, _, item) in committed(database).items()} == {
        str(n): (text.strip(), text) for n, text in enumerate(texts)
    }


def test_columns_of_every_type_are_words_in_a_template(database, settings):
    execute(
        database,
        """CREATE TABLE films AS SELECT 1 AS id, 12.50::numeric AS price, 12345678901234567890123::numeric AS big,
               0.1::real AS ratio, date '1999-12-31' AS day, timestamptz '2024-02-29 12:00+01' AS at,
               ARRAY['Drama', NULL, 'Sci-Fi'] AS genres, '{}'::text[] AS none, false AS seen,
               '{"b": 1.50, "a": [null, "x"]}'::jsonb AS extra, NULL::date AS no_day, 'x'::bytea AS raw""",
    )
    template = "{price} | {big} | {ratio} | {day} | {no_day} | {at} | {genres} | {none} | {seen} | {extra} | {raw}"
    sync_once(definition(columns=["price", "extra", "big"], vectors={"base": template}), settings)
    text, _, payload = committed(database)["1"]
    assert text == (
        '12.50 | 12345678901234567890123 | 0.1 | 1999-12-31 | 2024-02-29T11:00:00+00:00 | Drama, Sci-Fi | false | '
        '{"a": [null, "x"], "b": 1.50} | \\x78'
    )  # fmt: skip
    assert payload["extra"] == {"a": [None, "x"], "b": 1.5}
    assert execute(database, "SELECT payload->>'price', payload->>'big' FROM embeddings.films") == [
        ("12.50", "12345678901234567890123")
    ]


def broken_sources(database) -> list[tuple[str, CollectionDefinition]]:
    """Each breaks the source after a sync; what is shown, and the collection as it then is."""
    with_key = {"query": "SELECT * FROM films UNION ALL SELECT * FROM films WHERE id = 1", "key": "id"}
    return [
        ("more than once", definition(source=with_key)),
        ("names a column 'titel'", definition(vectors={"base": "{titel}"})),
        ("'title.__class__'", definition(vectors={"base": "{title.__class__}"})),
        ("does not exist", definition(source={"table": "filmz", "key": "id"})),
        ("more than 20%", definition(source={"table": "films", "key": "id", "where": "id > 4"})),
        ("more than 20%", definition(source={"query": "SELECT * FROM films WHERE false", "key": "id"})),
        ("syntax error", definition(source={"table": "films", "key": "id", "where": "id >"})),
        (
            "NULL",
            definition(
                source={"query": "SELECT nullif(id, 3) AS id, title, overview, revenue FROM films", "key": "id"}
            ),
        ),
    ]


def test_whatever_is_wrong_with_the_source_nothing_that_is_stored_is_lost(database, settings):
    make_films(database, films(9))
    sync_once(definition(), settings)
    before = everything(database)
    for says, broken in broken_sources(database):
        with pytest.raises((SourceError, RefusedError)) as error:
            sync_once(broken, settings, "broken")
        assert says in str(error.value) and "\n" not in str(error.value)
        assert everything(database) == before
    execute(database, "ALTER TABLE films RENAME TO gone")
    with pytest.raises(SourceError, match='relation "films" does not exist'):
        sync_once(definition(), settings, "broken")
    assert everything(database) == before
    execute(database, "ALTER TABLE gone RENAME TO films")
    assert sync_once(definition(), settings, "mended")[1] == 0
    assert everything(database) == before


def test_a_profile_that_does_not_match_the_vectors_warns_and_the_current_one_stays(database, settings):
    make_films(database, films(3))
    sync_once(definition(), settings)
    before = everything(database)
    other = definition(profile={**PROFILE, "name": "other", "dimensions": 64})
    collection, encoded = sync_once(other, settings, "second")
    assert encoded == 0 and collection.profile.name == "test" and everything(database) == before
    assert collection.warning and "'other'" in collection.warning and "EMBEDDING_PROFILE" in collection.warning
    assert all(
        part in collection.warning for part in ("'films'", "'other'", "'test'", "stays current", "profile switch other")
    )
    execute(database, "UPDATE films SET title = 'New' WHERE id = 1")
    assert sync_once(other, settings, "third")[1] == 1
    assert execute(database, "SELECT DISTINCT vector_dims(embedding) FROM embeddings.films") == [(32,)]


def test_a_lake_that_is_no_folder_is_one_line_and_loses_nothing(database, settings, tmp_path):
    make_films(database, films(3))
    sync_once(definition(), settings)
    execute(database, "UPDATE films SET title = 'New' WHERE id = 1")
    before = everything(database)
    (tmp_path / "file").touch()
    broken = settings.model_copy(update={"lake_uri": str(tmp_path / "file/lake")})
    with pytest.raises(LakeError, match=r"the lake cannot be (written|read) at .*file/lake") as error:
        sync_once(definition(), broken, "broken")
    assert "\n" not in str(error.value)
    assert [rows for n, rows in enumerate(everything(database)) if n] == before[1:]  # the item is noted as dirty
    assert sync_once(definition(), settings, "mended")[1] == 1


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_read_only_lake_is_one_line_and_loses_nothing(database, settings, small_disk):
    lake = settings.model_copy(update={"lake_uri": str(small_disk)})
    lake_fails_and_mends(
        database, lake, lambda state: subprocess.run(["mount", "-o", f"remount,{state}", small_disk], check=True)
    )


def test_a_full_disk_is_one_line_and_loses_nothing(database, settings, small_disk):
    lake = settings.model_copy(update={"lake_uri": str(small_disk)})
    filler = small_disk / "filler"

    def set_state(state: str) -> None:
        if state == "rw":
            filler.unlink()
            return
        with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)

    lake_fails_and_mends(database, lake, set_state)
    assert not list(Path(small_disk).rglob("*.tmp"))


def lake_fails_and_mends(database, lake, set_state) -> None:
    make_films(database, films(3))
    sync_once(definition(), lake)
    execute(database, "UPDATE films SET title = 'New' WHERE id = 1")
    collection = open_collection(definition(), lake)
    collection.ledger.full_scan(collection.source)
    before = everything(database)
    set_state("ro")
    with pytest.raises(
        LakeError, match=r"the lake cannot be written at .*(Read-only|No space left).*sync again"
    ) as error:
        run_batch(collection, 0, "broken")
    assert "\n" not in str(error.value)
    assert everything(database) == before
    set_state("rw")
    assert sync_once(definition(), lake, "mended")[1] == 1
    assert committed(database)["1"][0].startswith("New |")


def test_after_a_change_of_the_rules_of_rendering_only_texts_that_come_out_otherwise_are_embedded(
    database, settings, monkeypatch
):
    make_films(database, [(n, f"Film {n}", None, None) for n in range(25)])
    join = Template.join
    with monkeypatch.context() as earlier:
        earlier.setattr("embeddings_pipeline.config.definition.RENDERING_RULES", RENDERING_RULES - 1)
        earlier.setattr(Template, "join", lambda self, values: join(self, values).replace("Film 7", "Film 7 |"))
        assert sync_once(definition(), settings)[1] == 25
    assert committed(database)["7"][0] == "Film 7 |"
    collection, encoded = sync_once(definition(), settings, "later")
    assert encoded == 1
    assert {key: text for key, (text, _, _) in committed(database).items()} == {str(n): f"Film {n}" for n in range(25)}
    assert collection.ledger.dirty_batches() == []
