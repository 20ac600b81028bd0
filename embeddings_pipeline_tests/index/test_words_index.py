"""The lexical index: files as bm25s makes them, words in PostgreSQL that follow the texts, both added and removed."""

import json
from pathlib import Path

import bm25s
import numpy as np
import pytest

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.config.words import LANGUAGES, WordsDefinition
from embeddings_pipeline.health.lag import indexes_due, indexes_lag
from embeddings_pipeline.index import bm25_build, words
from embeddings_pipeline.index.bm25_read import open_words
from embeddings_pipeline.index.faiss_build import build
from embeddings_pipeline.index.faiss_read import checksum_of, read_manifest
from embeddings_pipeline.index.pgvector import ensure_index
from embeddings_pipeline.index.terms import query_words, terms_of_word, words_of
from embeddings_pipeline.index.words import ensure_words, words_fit
from embeddings_pipeline.pipeline.inventory import take_inventory
from embeddings_pipeline.pipeline.removal import remove_collection
from embeddings_pipeline.pipeline.renaming import rename_in_database
from embeddings_pipeline.search.query import search
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.workbench import definition, execute, films, make_films, sync_once

TEXTS = [f"Film {n} | the B-{n % 5} and {'many ' * (n % 4)}friends of number {n % 13}" for n in range(60)]


def with_words(**settings: object) -> CollectionDefinition:
    return definition(words=settings)


def fits(database: Database, one: CollectionDefinition) -> bool:
    with database.connect(autocommit=True) as connection:
        return words_fit(connection, one)


def words_there(database: Database) -> list[tuple[int, str]]:
    return execute(database, "SELECT text_id, words::text FROM embeddings.films_text_words ORDER BY 1")  # type: ignore[return-value]


def words_expected(database: Database, configuration: str) -> list[tuple[int, str]]:
    statement = f"SELECT id, embeddings.words('{configuration}', text)::text FROM embeddings.films_text ORDER BY 1"
    return execute(database, statement)  # type: ignore[return-value]


@pytest.mark.parametrize("block", [1, 40, 10**6])
def test_the_files_are_those_that_bm25s_would_make(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bm25_build, "WORDS_IN_A_BLOCK", block)
    index = bm25_build._Index("english")
    for n, text in enumerate(TEXTS):
        index.add(100 + n, text)
    part = index.write("base", tmp_path)
    tokens = [[term for word in words_of(text) for term in terms_of_word(word, "english")] for text in TEXTS]
    expected = bm25s.BM25(k1=bm25_build.K1, b=bm25_build.B)
    expected.index(tokens, show_progress=False)
    ours = bm25s.BM25.load(
        tmp_path,
        data_name="base.words.scores.npy",
        indices_name="base.words.texts.npy",
        indptr_name="base.words.starts.npy",
        params_name="base.words.json",
        load_vocab=False,
        mmap=True,
    )
    hashes = np.load(tmp_path / "base.words.terms.npy")
    for term in {term for of_text in tokens for term in of_text}:
        place = int(np.searchsorted(hashes, np.uint64(bm25_build.term_hash(term))))
        assert ours.get_scores_from_ids([place]) == pytest.approx(expected.get_scores([term]), rel=1e-5), term
    assert (part.texts, part.terms) == (60, len({term for of_text in tokens for term in of_text}))
    assert np.load(tmp_path / "base.words.ids.npy").tolist() == list(range(100, 160))


def test_texts_without_any_word_have_no_files(tmp_path: Path) -> None:
    index = bm25_build._Index(None)
    index.add(1, "?! …")
    assert index.write("base", tmp_path) is None and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("query", "settings", "words"),
    [
        ("The lamp of the B-52", {}, ["lamp", "b", "52", "b52"]),
        ("to be or not to be", {}, ["to", "be", "or", "not"]),
        ("The lamp", {"language": "simple"}, ["the", "lamp"]),
        ("The lamp", {"stop_words": ["Lamp"]}, ["the"]),
        ("der Hund", {"language": "german"}, ["hund"]),
        ("lamp Lamp LAMP", {}, ["lamp"]),
        ("ＡＢＣ", {}, ["abc"]),
    ],
)
def test_stop_words_are_left_out_unless_there_are_no_others(
    query: str, settings: dict[str, object], words: list[str]
) -> None:
    assert query_words(query, WordsDefinition.model_validate(settings)) == words


def test_words_in_postgresql_follow_the_texts_and_are_those_of_the_files(
    database: Database, settings: Settings
) -> None:
    make_films(database, films(30))
    one = with_words()
    sync_once(one, settings)
    assert ensure_words(database, one) and not ensure_words(database, one) and fits(database, one)
    execute(database, "UPDATE films SET overview = 'about O''Brien' WHERE id < 5")
    execute(database, "DELETE FROM films WHERE id = 9")
    execute(database, "INSERT INTO films VALUES (99, 'A ' || repeat('long-word ', 30000), NULL, 1)")
    different = " ".join(f"w{n}" for n in range(200_000))  # more than a tsvector can hold
    execute(database, "INSERT INTO films VALUES (98, %s, NULL, 1)", [different])
    sync_once(one, settings)
    assert len(words_there(database)) == 31
    assert words_there(database) == words_expected(database, "embeddings.english")
    typed = "O’Brien's B-52, ran"
    statement = "SELECT tsvector_to_array(embeddings.words('embeddings.english', %s))"
    [(lexemes,)] = execute(database, statement, [typed])
    ours = {term for word in words_of(typed) for term in terms_of_word(word, "english")}
    assert set(lexemes) == ours


def test_a_lexical_index_is_added_changed_and_removed_without_embedding_anything(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "TEXTS_AT_A_TIME", 7)
    make_films(database, films(40))
    collection, _ = sync_once(definition(), settings)
    table, folder = collection.model.destination, settings.state_dir / "faiss"
    ensure_index(database, table, collection.definition.attributes.index, ["base"])
    build(database, table, folder)
    calls = DeterministicEncoder.calls
    for one in (with_words(), with_words(language="german"), with_words(stemmer=False), definition(), with_words()):
        collection, encoded = sync_once(one, settings)
        assert encoded == 0 and not fits(database, one) and indexes_due(collection) and indexes_lag(collection)
        assert ensure_words(database, one) and fits(database, one)
        assert indexes_due(collection)  # the files are still of other words
        declared = one.attributes.words
        manifest = build(database, table, folder, declared)
        assert not indexes_due(collection) and not indexes_lag(collection, verify=True)
        assert (manifest.words is None) == (declared is None)
        if declared:
            configuration = words.configuration_of(declared)
            assert words_there(database) == words_expected(database, configuration)
        else:
            assert execute(database, "SELECT to_regclass('embeddings.films_text_words')") == [(None,)]
            assert open_words(folder, "films") is None
    assert DeterministicEncoder.calls == calls


def test_a_build_that_was_ended_is_gone_on_with(database: Database, settings: Settings) -> None:
    make_films(database, films(20))
    one = with_words()
    sync_once(one, settings)
    ensure_words(database, one)
    execute(database, "DROP INDEX embeddings.films_text_words_index")
    execute(database, "DELETE FROM embeddings.films_text_words WHERE text_id % 2 = 0")
    assert not fits(database, one)
    assert ensure_words(database, one) and fits(database, one) and len(words_there(database)) == 20


def test_words_follow_a_collection_that_is_renamed_and_go_with_it(database: Database, settings: Settings) -> None:
    make_films(database, films(5))
    sync_once(with_words(), settings)
    ensure_words(database, with_words())
    rename_in_database(database, take_inventory(database, settings, "films"), "movies")
    renamed = definition("movies", words={})
    assert fits(database, renamed)
    execute(database, "UPDATE embeddings.collection SET renamed_from = NULL")
    execute(database, "UPDATE films SET overview = 'a walrus' WHERE id = 3")
    sync_once(renamed, settings)
    assert [hit.item_key for hit in search(renamed, settings, "walrus", mode="text")] == ["3"]
    remove_collection(database, settings, take_inventory(database, settings, "movies"))
    assert execute(database, "SELECT to_regclass('embeddings.movies_text_words')") == [(None,)]


def test_every_language_has_both_stemmers(database: Database, settings: Settings) -> None:
    make_films(database, films(2))
    stems = {row[0] for row in execute(database, "SELECT dictname FROM pg_ts_dict")}
    for language in LANGUAGES:
        assert terms_of_word("films", language) and (f"{language}_stem" in stems or not settings.database_url)
    for language in ("simple", "russian"):
        one = with_words(language=language)
        sync_once(one, settings)
        ensure_words(database, one)
        assert fits(database, one)


def test_a_generation_of_an_earlier_version_is_read(database: Database, settings: Settings) -> None:
    make_films(database, films(3))
    collection, _ = sync_once(definition(), settings)
    build(database, collection.model.destination, settings.state_dir / "faiss")
    [path] = (settings.state_dir / "faiss" / "films").glob("*/manifest.json")
    content = json.loads(path.read_bytes())
    del content["words"]
    content["format"] = 3
    path.write_text(json.dumps({**content, "checksum": checksum_of(content)}))
    assert read_manifest(settings.state_dir / "faiss", "films").words is None
