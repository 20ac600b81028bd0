"""The page at `/`, in a real browser: typed, clicked, by keyboard, and as screen readers are told it."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline_tests.serve.browsing import (
    EVIL,
    ask,
    browser,
    films,
    keys,
    map_is_there,
    opened,
    publish,
    says,
    with_all,
)
from embeddings_pipeline_tests.support import tiny_models
from embeddings_pipeline_tests.support.serving import serving
from embeddings_pipeline_tests.support.workbench import execute

if TYPE_CHECKING:
    from playwright.sync_api import Browser

__all__ = ["browser", "films"]  # fixtures

pytestmark = pytest.mark.slow
KEY = "ein Schlüssel £"


def test_a_question_its_filters_and_what_is_similar(films: Settings, browser: "Browser") -> None:
    with serving(films) as service, opened(browser, service) as page:
        ask(page, "Film 7 number 7")
        says(page, "Meaning: 10 hits; Words: 10 hits; Both: 10 hits")
        assert keys(page, "Meaning")[0] == keys(page, "Both")[0] == "7"
        first = page.get_by_role("region", name="Meaning").get_by_role("listitem").first
        assert "A story about number 7" in first.inner_text() and re.search(r"[01]\.\d{3}", first.inner_text())
        assert "also: " in first.inner_text() and "Both 1" in first.inner_text()
        assert page.get_by_role("region", name="Words").locator("mark").first.inner_text() in ("Film", "number")
        first.get_by_role("button", name="Filter: genres is Crime1").click()
        page.get_by_role("button", name="Remove the filter genres is Crime1").wait_for()
        says(page, "Meaning: 9 hits; Words: 9 hits; Both: 9 hits")
        assert all(int(key) % 3 == 1 for key in keys(page, "Meaning"))
        first.get_by_role("button", name="Filter: revenue ≥ 1007").click()
        says(page, "Meaning: 7 hits")
        page.get_by_role("button", name="revenue ≥ 1007: make it ≤").click()
        says(page, "Meaning: 3 hits")
        page.get_by_role("button", name="Remove the filter revenue ≤ 1007").click()
        says(page, "Meaning: 9 hits")
        first.get_by_role("button", name="Similar to Film 7").click()
        page.get_by_text("similar to Film 7").wait_for()
        says(page, "Similar: 8 hits")
        assert "7" not in keys(page, "Similar")
        page.go_back()
        says(page, "Meaning: 9 hits")
        page.reload()
        says(page, "Meaning: 9 hits; Words: 9 hits; Both: 9 hits")
        page.get_by_role("checkbox", name="Words").uncheck()
        says(page, r"^Meaning: 9 hits; Both: 9 hits$")


def test_filters_are_chosen_in_menus(films: Settings, browser: "Browser") -> None:
    with serving(films) as service, opened(browser, service) as page:
        map_is_there(page)
        ask(page, "A story")
        says(page, "Meaning: 10 hits")
        page.get_by_text("genres", exact=True).locator("visible=true").first.click()
        menu = page.get_by_role("group", name="genres")
        menu.get_by_label("Another value of genres").fill("Crime1")
        page.keyboard.press("Enter")
        says(page, "Meaning: 9 hits")
        menu.get_by_label("Another value of genres").fill("Crime2")
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Remove the filter genres is Crime2").wait_for()
        says(page, "Meaning: 10 hits")
        assert {int(key) % 3 for key in keys(page, "Meaning")} <= {1, 2}
        page.keyboard.press("Escape")
        assert not menu.is_visible()
        page.locator("summary", has_text="revenue").click()
        menu = page.get_by_role("group", name="revenue")
        menu.get_by_label("revenue from").fill("1020")
        menu.get_by_label("revenue to").fill("1022")
        page.keyboard.press("Enter")
        says(page, "Meaning: 2 hits")  # 21 is among the others
        menu.get_by_label("revenue from").fill("")
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Remove the filter revenue ≥ 1020").wait_for(state="detached")
        page.locator("summary", has_text="title").click()
        assert not menu.is_visible()
        title = page.get_by_role("group", name="title")
        assert title.get_by_role("checkbox").count() == 10  # the most frequent, from the map


def test_what_is_in_the_database_is_text_and_keeps_its_digits(films: Settings, browser: "Browser") -> None:
    execute(open_collection(with_all(), films).database, "UPDATE films SET overview = %s WHERE id = 24", [EVIL])
    publish(films, with_all(map={"colour": ["title", "genres"]}))
    with serving(films) as service, opened(browser, service) as page:
        map_is_there(page)
        page.get_by_label("Hits").fill("25")
        ask(page, "A story")
        says(page, "Meaning: 25 hits")
        hits = page.get_by_role("region", name="Meaning", exact=True)
        assert hits.get_by_role("heading", name=EVIL).count() == 1
        assert hits.get_by_role("button", name=f"Filter: genres is {EVIL}").count() == 1
        hits.get_by_role("button", name="Filter: revenue ≥ 9007199254740993").click()
        says(page, "Meaning: 1 hit;")
        assert keys(page, "Meaning") == ["25"]
        hits.get_by_role("button", name="Similar to Film 25").click()
        page.get_by_role("button", name="Remove the filter revenue ≥ 9007199254740993").click()
        says(page, "Similar: 24 hits")
        page.get_by_role("button", name=f"Similar to {EVIL}").click()
        page.get_by_text(f"similar to {EVIL}").wait_for()
        page.goto(f"/#in=films&q={EVIL}&like=[1]&where={EVIL}")
        page.reload()
        says(page, "hits")
        assert page.title() == "Search" and page.locator("img, iframe, object, #results script").count() == 0


def test_it_is_used_without_a_mouse(films: Settings, browser: "Browser") -> None:
    with serving(films) as service, opened(browser, service) as page:
        map_is_there(page)
        assert page.evaluate("document.activeElement.id") == "query"
        page.keyboard.type("Film 3")
        page.keyboard.press("Enter")
        says(page, "Meaning: 10 hits")
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.getAttribute('aria-label') || ''").startswith("Similar to"):
                break
        page.keyboard.press("Enter")
        page.get_by_text("similar to Film").wait_for()
        says(page, "hits")
        page.locator("#results:focus").wait_for()
        page.keyboard.press("/")
        assert page.evaluate("document.activeElement.id") == "query"
        unnamed = (
            "[...document.querySelectorAll('button, input, select, canvas')].filter(e => !e.labels?.length && "
            "!e.innerText && !e.getAttribute('aria-label') && !e.getAttribute('aria-labelledby')).length"
        )
        assert page.evaluate(unnamed) == 0


# Of each element with text of its own: what it is, if its contrast is below 4.5 (WCAG 2.2, 1.4.3).
FAINT = """() => {
  const pixel = Object.assign(document.createElement('canvas'), { width: 1, height: 1 }).getContext('2d');
  const rgba = (colour) => {
    pixel.clearRect(0, 0, 1, 1);
    pixel.fillStyle = colour;
    pixel.fillRect(0, 0, 1, 1);
    return [...pixel.getImageData(0, 0, 1, 1).data];
  };
  const bright = (colour) => {
    const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = rgba(colour).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (e) => {
    const ground = getComputedStyle(e).backgroundColor;
    return rgba(ground)[3] === 255 ? ground : e.parentElement ? behind(e.parentElement) : 'white';
  };
  return [...document.querySelectorAll('body *')].filter((e) => e.checkVisibility() && e.tagName !== 'OPTION'
    && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())).map((e) => {
    const [a, b] = [bright(getComputedStyle(e).color), bright(behind(e))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), e.tagName, e.className, e.innerText];
  }).filter(([contrast]) => contrast < 4.5);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(films: Settings, browser: "Browser", scheme: str) -> None:
    with serving(films) as service, opened(browser, service, color_scheme=scheme) as page:
        map_is_there(page)
        ask(page, "Film 3")
        says(page, "Meaning: 10 hits")
        page.get_by_role("button", name="Filter: genres is Drama").first.click()
        page.get_by_text("genres is Drama").wait_for()
        assert page.evaluate(FAINT) == []
        dark = page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(20, 22, 26)"
        assert dark == (scheme == "dark")


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
        page.route("**/search", lambda route: route.fulfill(status=502, body="<html>Bad gateway</html>"))
        ask(page, "another story")
        says(page, "the service answers 502, and nothing that could be read")


def test_it_asks_for_the_key_and_keeps_it_for_the_tab_alone(films: Settings, browser: "Browser") -> None:
    with serving(films, key=KEY) as service, opened(browser, service) as page:
        for key in ("wrong", KEY):
            page.get_by_label("This service wants its key").fill(key)
            page.get_by_role("button", name="Use it").click()
        map_is_there(page)
        ask(page, "Film 7 number 7")
        says(page, "Meaning: 10 hits")
        assert page.evaluate("Object.keys(localStorage).length") == 0 and KEY not in page.url
        assert service.get("/").headers["Content-Security-Policy"].startswith("default-src 'none'")


def test_two_profiles_are_compared(films: Settings, one: CollectionDefinition, browser: "Browser") -> None:
    from embeddings_pipeline_tests.support.model_change import backfill_all, begin

    collection = open_collection(with_all(profiles=one.attributes.model_dump()["profiles"]), films)
    begin(collection, "other")
    backfill_all(collection)
    assert execute(collection.database, "SELECT count(*) FROM embeddings.model") == [(2,)]
    with serving(films) as service, opened(browser, service) as page:
        page.get_by_role("checkbox", name="other").check()
        page.get_by_role("checkbox", name="FAISS").check()
        page.get_by_role("checkbox", name="Both").uncheck()
        ask(page, "Film 7 number 7")
        says(page, "^Meaning · test: 10 hits; Meaning · FAISS: 10 hits; Meaning · other: 10 hits; Words: 10 hits$")
        heading = page.get_by_role("region", name="Meaning · FAISS").get_by_role("heading").first
        assert heading.inner_text().endswith("10 of 10 also by Meaning · test")
        page.get_by_role("button", name="Similar to Film 7", exact=True).first.click()
        says(page, "^Similar · test: 10 hits; Similar · FAISS: 10 hits; Similar · other: 10 hits$")


def test_what_a_collection_cannot_do_is_said(films: Settings, browser: "Browser") -> None:
    publish(films, with_all(words=None, map={"method": "none"}))
    with serving(films) as service, opened(browser, service) as page:
        page.get_by_text("Words, Both: collection 'films' has no lexical index").wait_for()
        page.get_by_text("collection 'films' has no map: its `map:` says `method: none`").wait_for()
        ask(page, "Film 7 number 7")
        says(page, "^Meaning: 10 hits$")
        page.get_by_role("checkbox", name="Words").check()
        words = page.get_by_role("region", name="Words")
        words.get_by_text("has no lexical index, which mode 'text' needs: add `words: {}`").wait_for()
        says(page, "collection 'films' has no lexical index")
        assert keys(page, "Meaning")[0] == "7"


def test_a_reranker_that_is_set_is_one_column_more(films: Settings, browser: "Browser", tmp_path: Path) -> None:
    model = tiny_models.cross_encoder(tmp_path / "tiny")
    settings = films.model_copy(update={"rerank_model": str(model), "enable_reranker": True})
    with serving(settings) as service, opened(browser, service) as page:
        ask(page, "Film 7 number 7")
        says(page, "Meaning: 10 hits; Words: 10 hits; Both: 10 hits; Reranked: 10 hits")
        assert "25 of 25 scored" in page.get_by_role("region", name="Reranked").inner_text()
        assert "scored" not in page.get_by_role("region", name="Both").inner_text()
