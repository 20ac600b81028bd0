"""What the tests of the page share: a browser, films that have all that the page shows, and words of the page."""

import importlib.util
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.index.faiss_build import build
from embeddings_pipeline.index.map_build import ensure_map
from embeddings_pipeline.index.words import ensure_words
from embeddings_pipeline.pipeline.collection import Collection, open_collection
from embeddings_pipeline_tests.support.serving import Serving, write_definitions
from embeddings_pipeline_tests.support.workbench import definition, execute, sync_once

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "<img src=x onerror=\"document.title = 'run'\">"
SOURCE = "SELECT *, 'Drama, Crime' || id % 3 || CASE WHEN id = 24 THEN ',' || title ELSE '' END AS genres FROM films"


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


def with_all(**others: Any) -> CollectionDefinition:
    """Words, filters of three types, a map."""
    return definition(
        source={"query": SOURCE, "key": ["id"]},
        columns=["title", "revenue", "genres"],
        filters={"revenue": "number", "title": "text", "genres": {"type": "texts", "separator": ","}},
        **{"words": {}, **others},
    )


@pytest.fixture
def films(served: Settings) -> Settings:
    """The films once more, with all that the page shows, and one with markup for a title, a genre and an overview."""
    execute(open_collection(with_all(), served).database, "UPDATE films SET title = %s WHERE id = 24", [EVIL])
    publish(served, with_all())
    return served


def publish(settings: Settings, one: CollectionDefinition) -> Collection:
    """Have it served, with indexes and map."""
    write_definitions(settings.defs_dir, one)
    opened, _ = sync_once(one, settings, "again")
    folder = settings.state_dir / "faiss"
    ensure_words(opened.database, one)
    build(opened.database, opened.model.destination, folder, one.attributes.words)
    if one.attributes.map.method != "none":
        ensure_map(opened.database, opened.model.destination, folder, one)
    return opened


@contextmanager
def opened(browser: "Browser", service: Serving, path: str = "/", **options: Any) -> Iterator["Page"]:
    """The page. Whatever its scripts throw, and whatever it asks of another host, fails the test."""
    context = browser.new_context(base_url=service.url, viewport={"width": 1400, "height": 900}, **options)
    context.set_default_timeout(20_000)
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(service.url) else faults.append(request.url))
    page.goto(path)
    yield page
    context.close()
    assert not faults


def keys(page: "Page", way: str) -> list[str]:
    hits = page.get_by_role("region", name=way, exact=True).get_by_role("listitem").all()
    return [hit.get_attribute("data-key") or "" for hit in hits]


def ask(page: "Page", words: str) -> None:
    page.get_by_label("What to look for").fill(words)
    page.get_by_role("button", name="Search", exact=True).click()


def says(page: "Page", words: str) -> None:
    page.get_by_role("status").filter(has_text=re.compile(words)).wait_for()


def map_is_there(page: "Page") -> None:
    page.locator("#map-note").filter(has_text=re.compile("item")).wait_for()
