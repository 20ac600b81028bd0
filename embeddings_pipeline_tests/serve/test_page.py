"""The page at `/`, in a real browser: typed, clicked, by keyboard, and as screen readers are told it."""

import importlib.util
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.index.faiss_build import build
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline_tests.support.serving import Serving, serving, write_definitions
from embeddings_pipeline_tests.support.workbench import definition, execute, sync_once

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KEY = "ein Schlüssel £"
EVIL = "<img src=x onerror=\"document.title = 'run'\">"


@pytest.fixture(scope="module")
def browser(skip_without: Callable[[str, bool], None]) -> Iterator["Browser"]:
    skip_without("chromium", CHROMIUM is not None)
    skip_without("playwright", importlib.util.find_spec("playwright") is not None)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        )
        yield browser
        browser.close()


@pytest.fixture
def films(served: Settings) -> Settings:
    """The films once more, one with markup for a title, genres in one text, and an index of FAISS's."""
    collection = definition(
        source={"query": "SELECT *, 'Drama, Crime' || id % 3 AS genres FROM films", "key": ["id"]},
        columns=["title", "revenue", "genres"],
        filters={"revenue": "number", "title": "text", "genres": {"type": "texts", "separator": ","}},
    )
    write_definitions(served.defs_dir, collection)
    with open_collection(collection, served).database.connect() as connection:
        connection.execute("UPDATE films SET title = %s WHERE id = 24", [EVIL])
    opened, _ = sync_once(collection, served, "again")
    build(opened.database, opened.model.destination, served.state_dir / "faiss")
    return served


@contextmanager
def opened(browser: "Browser", service: Serving) -> Iterator["Page"]:
    """The page. Whatever its scripts throw, and whatever it asks of another host, fails the test."""
    context = browser.new_context(base_url=service.url, viewport={"width": 1300, "height": 900})
    context.set_default_timeout(20_000)
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(service.url) else faults.append(request.url))
    page.goto("/")
    yield page
    context.close()
    assert not faults


def keys(page: "Page", way: str) -> list[str]:
    hits = page.get_by_role("region", name=way).get_by_role("listitem").all()
    return [hit.get_attribute("data-key") or "" for hit in hits]


def ask(page: "Page", words: str) -> None:
    page.get_by_label("What to look for").fill(words)
    page.get_by_role("button", name="Search", exact=True).click()


def says(page: "Page", words: str) -> None:
    page.get_by_role("status").filter(has_text=re.compile(words)).wait_for()


def test_a_question_its_filters_and_what_is_similar(films: Settings, browser: "Browser") -> None:
    with serving(films) as service, opened(browser, service) as page:
        ask(page, "Film 7 number 7")
        says(page, "PostgreSQL: 10 hits; FAISS: 10 hits")
        assert keys(page, "PostgreSQL")[0] == keys(page, "FAISS")[0] == "7"
        first = page.get_by_role("region", name="PostgreSQL").get_by_role("listitem").first
        assert "A story about number 7" in first.inner_text() and re.search(r"[01]\.\d{3}", first.inner_text())
        first.get_by_role("button", name="Filter: genres has Crime1").click()
        page.get_by_role("button", name="Remove the filter genres has Crime1").wait_for()
        says(page, "PostgreSQL: 9 hits; FAISS: 9 hits")
        assert all(int(key) % 3 == 1 for key in keys(page, "PostgreSQL"))
        first.get_by_role("button", name="Filter: revenue ≥ 1007").click()
        says(page, "PostgreSQL: 7 hits")
        page.get_by_role("button", name="revenue ≥ 1007: make it ≤").click()
        says(page, "PostgreSQL: 3 hits")
        page.get_by_role("button", name="Remove the filter revenue ≤ 1007").click()
        says(page, "PostgreSQL: 9 hits")
        first.get_by_role("button", name="Similar to Film 7").click()
        page.get_by_text("similar to Film 7").wait_for()
        says(page, "PostgreSQL: 8 hits")
        assert "7" not in keys(page, "PostgreSQL")
        page.get_by_role("checkbox", name="FAISS").uncheck()
        says(page, r"^PostgreSQL: 8 hits$")


def test_what_is_in_the_database_is_text_and_keeps_its_digits(films: Settings, browser: "Browser") -> None:
    with serving(films) as service, opened(browser, service) as page:
        page.get_by_label("Hits").fill("25")
        ask(page, "A story")
        says(page, "PostgreSQL: 25 hits")
        assert page.get_by_role("heading", name=EVIL).count() == 2 and page.title() == "Search"
        assert page.get_by_role("button", name="Filter: revenue ≥ 9007199254740993").count() == 2


def test_it_is_used_without_a_mouse(films: Settings, browser: "Browser") -> None:
    with serving(films) as service, opened(browser, service) as page:
        page.get_by_label("What to look for").focus()
        page.keyboard.type("Film 3")
        page.keyboard.press("Enter")
        says(page, "PostgreSQL: 10 hits")
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.getAttribute('aria-label') || ''").startswith("Similar to"):
                break
        page.keyboard.press("Enter")
        page.get_by_text("similar to Film").wait_for()
        says(page, "hits")
        assert page.evaluate("document.activeElement.id") == "results"
        unnamed = (
            "[...document.querySelectorAll('button, input, select')].filter(e => !e.labels?.length && !e.innerText"
        )
        assert page.evaluate(f"{unnamed} && !e.getAttribute('aria-label')).length") == 0


def test_mistakes_and_a_service_that_has_gone_are_said(films: Settings, browser: "Browser") -> None:
    with serving(films) as service, opened(browser, service) as page:
        ask(page, "  ")
        says(page, "Type what to look for")
        page.get_by_label("Hits").evaluate("box => { box.max = 100000 }")
        page.get_by_label("Hits").fill("10000")
        ask(page, "a story")
        says(page, "k: Input should be less than or equal to 1000")
        page.route("**/search", lambda route: route.abort())
        page.get_by_label("Hits").fill("10")
        ask(page, "a story")
        says(page, "the service does not answer")


def test_it_asks_for_the_key_and_keeps_it_for_the_tab_alone(films: Settings, browser: "Browser") -> None:
    with serving(films, key=KEY) as service, opened(browser, service) as page:
        for key in ("wrong", KEY):
            page.get_by_label("This service wants its key").fill(key)
            page.get_by_role("button", name="Use it").click()
        page.get_by_role("checkbox", name="FAISS").wait_for()
        ask(page, "Film 7 number 7")
        says(page, "PostgreSQL: 10 hits")
        assert page.evaluate("Object.keys(localStorage).length") == 0 and KEY not in page.url
        assert service.get("/").headers["Content-Security-Policy"].startswith("default-src 'none'")


def test_another_model_is_one_column_more(served: Settings, one: CollectionDefinition, browser: "Browser") -> None:
    from embeddings_pipeline_tests.support.model_change import backfill_all, begin

    collection = open_collection(one, served)
    begin(collection, "other")
    backfill_all(collection)
    assert execute(collection.database, "SELECT count(*) FROM embeddings.model") == [(2,)]
    with serving(served) as service, opened(browser, service) as page:
        page.get_by_role("checkbox", name="FAISS").uncheck()
        ask(page, "Film 7 number 7")
        says(page, "PostgreSQL: 10 hits; other: 10 hits")
