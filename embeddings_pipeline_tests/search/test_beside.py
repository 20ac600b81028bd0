"""Two things of one search at once."""

import threading
import time
from contextlib import ExitStack, suppress
from functools import partial

import pytest

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders.processor import share_of_cores
from embeddings_pipeline.index.words import ensure_words
from embeddings_pipeline.search import encoding
from embeddings_pipeline.search.beside import beside, search_alone
from embeddings_pipeline.search.query import search
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.session import end_statements
from embeddings_pipeline_tests.support.workbench import definition, films, make_films, sync_once


def sleep_in(database: Database, began: threading.Event) -> None:
    with database.session() as connection:
        began.set()
        connection.execute("SELECT pg_sleep(60)")


def test_an_error_ends_what_runs_beside_it(database: Database) -> None:
    began, at = threading.Event(), time.monotonic()
    with pytest.raises(ZeroDivisionError), beside(partial(sleep_in, database, began)):
        assert began.wait(10)
        _ = 1 / 0
    assert time.monotonic() - at < 20


def test_who_ends_the_statements_of_a_thread_ends_those_that_run_for_it(database: Database) -> None:
    began, errors = threading.Event(), list[Exception]()

    def ask() -> None:
        try:
            with beside(partial(sleep_in, database, began)) as answer:
                answer()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    assert began.wait(10) and thread.ident is not None
    while thread.is_alive():
        end_statements([thread.ident])
        thread.join(0.1)
    assert "canceling statement" in str(errors[0])


def test_a_search_knows_whether_another_is_under_way() -> None:
    with search_alone() as first:
        with search_alone() as second, search_alone() as third:
            assert (first, second, third) == (True, False, False)
        with suppress(ZeroDivisionError), search_alone():
            _ = 1 / 0
    with search_alone() as last:
        assert last


def test_a_search_beside_others_finds_the_same(database: Database, settings: Settings) -> None:
    make_films(database, films(30))
    one = definition(words={})
    sync_once(one, settings)
    ensure_words(database, one)
    alone = search(one, settings, "Film 7 number 7", mode="hybrid")
    with search_alone():
        beside_another = search(one, settings, "Film 7 number 7", mode="hybrid")
    assert list(beside_another) == list(alone) and alone[0].item_key == "7"
    legs = [[(leg.answered_by, leg.ranks) for leg in hits.explanation.legs] for hits in (alone, beside_another)]
    assert legs[0] == legs[1] and len(legs[0]) == 2


def test_without_a_free_thread_it_is_asked_in_this_one() -> None:
    until, own = threading.Event(), threading.get_ident()
    with ExitStack() as busy:
        for _ in range(share_of_cores()):
            busy.enter_context(beside(until.wait))
        with beside(threading.get_ident) as answer:
            assert answer() == own
        until.set()


def test_a_models_files_are_looked_at_again_after_a_second(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, fingerprint = list[object](), encoding.fingerprint

    def counted(*arguments: object) -> str:
        looks.append(arguments)
        return fingerprint(*arguments)  # type: ignore[arg-type]

    make_films(database, films(5))
    sync_once(definition(), settings)
    monkeypatch.setattr(encoding, "fingerprint", counted)
    monkeypatch.setattr(encoding, "LOOK_AGAIN_SECONDS", 30.0)
    encoding._ready.clear()
    for _ in range(5):
        search(definition(), settings, "a story")
    assert len(looks) == 1  # before the model was loaded, which looks itself
    monkeypatch.setattr(encoding, "LOOK_AGAIN_SECONDS", 0.0)
    encoding._ready.clear()
    for _ in range(5):
        search(definition(), settings, "a story")
    assert len(looks) == 11  # before a query is encoded, and after it
