"""The map on the page, in a real browser, and over HTTP."""

import json
from typing import TYPE_CHECKING

import pytest

from embeddings_pipeline.config.settings import Settings
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
from embeddings_pipeline_tests.support.serving import serving
from embeddings_pipeline_tests.support.workbench import execute, sync_once

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page, Route

__all__ = ["browser", "films"]  # fixtures

pytestmark = pytest.mark.slow
# How many pixels of the canvas have another colour than its ground.
DRAWN = """canvas => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height)
    .data.filter((value, place) => place % 4 === 3 && value > 40).length"""


def drawn(page: "Page") -> int:
    page.wait_for_timeout(150)  # the next frame
    return int(page.locator("#canvas").evaluate(DRAWN))


def found_by_mouse(page: "Page", canvas: "Locator") -> str:
    """Move over the canvas until the pointer is on a point; what is said of it."""
    box = canvas.bounding_box()
    assert box is not None
    for down in range(10, int(box["height"]), 20):
        for right in range(10, int(box["width"]), 20):
            page.mouse.move(box["x"] + right, box["y"] + down)
            if page.locator("#tip").is_visible():
                return page.locator("#tip b").inner_text()
    raise AssertionError("no point was found")


def test_it_is_hovered_clicked_zoomed_and_coloured(films: Settings, browser: "Browser") -> None:
    with serving(films) as service, opened(browser, service) as page:
        map_is_there(page)
        canvas = page.get_by_role("application", name="Map of films")
        assert "25 items" in page.locator("#map-note").inner_text()
        all_of_them = drawn(page)
        assert all_of_them > 25 * 9
        page.locator("#colour").select_option("title")
        page.get_by_role("button", name=EVIL).wait_for()
        one = page.get_by_role("group", name="What the colours mean").get_by_role("button").first
        one.click()
        assert one.get_attribute("aria-pressed") == "true" and drawn(page) < all_of_them / 3
        one.click()
        page.get_by_role("button", name="Zoom in").click()
        page.get_by_role("button", name="Zoom in").click()
        assert drawn(page) != all_of_them
        page.get_by_role("button", name="Show the whole map").click()
        label = found_by_mouse(page, canvas)
        page.mouse.down()
        page.mouse.up()
        page.get_by_text(f"similar to {label}").wait_for()
        says(page, "Similar: 10 hits")


def test_it_is_used_by_keyboard_and_says_where_one_is(films: Settings, browser: "Browser") -> None:
    with serving(films) as service, opened(browser, service) as page:
        map_is_there(page)
        page.locator("#canvas").focus()
        said = []
        for key in ("ArrowRight", "ArrowUp", "ArrowLeft"):
            page.keyboard.press(key)
            said.append(page.locator("#map-said").inner_text())
        assert len(set(said)) == 3 and all(words.endswith(", Drama") for words in said)
        assert page.locator("#map-said").get_attribute("aria-live") == "polite"
        whole = drawn(page)
        page.keyboard.press("+")
        page.keyboard.press("Shift+ArrowLeft")
        assert drawn(page) != whole
        page.keyboard.press("0")
        page.keyboard.press("Enter")
        page.get_by_text(f"similar to {said[-1].removesuffix(', Drama')}").wait_for()


def test_hits_are_marked_on_it_though_they_are_in_no_sample(films: Settings, browser: "Browser") -> None:
    def few(route: "Route") -> None:
        fields = json.loads(route.request.post_data or "{}")
        route.continue_(post_data=json.dumps({"points": 7, **fields}))

    with serving(films) as service, opened(browser, service) as page:
        page.route("**/map", few)
        page.reload()
        page.get_by_text("A sample of 7 of 25 items").wait_for()
        before = drawn(page)
        ask(page, "Film 7 number 7")
        says(page, "Meaning: 10 hits")
        page.wait_for_timeout(300)
        assert drawn(page) > before
        page.locator("#canvas").focus()
        page.keyboard.press("ArrowRight")
        item = page.locator("#results li.same").first
        assert item.get_attribute("data-key") in keys(page, "Meaning") + keys(page, "Words") + keys(page, "Both")


def test_what_it_is_not_is_said(films: Settings, browser: "Browser") -> None:
    opened_collection = publish(films, with_all())
    database = opened_collection.database
    execute(database, "INSERT INTO films VALUES (26, 'Film 26', 'It came later', 1)")
    sync_once(with_all(), films, "later")
    with serving(films) as service:
        with opened(browser, service) as page:
            page.get_by_text("the table has changed since, and the map will be made anew").wait_for()
        (films.state_dir / "faiss" / "films" / "map.json").unlink()
        with opened(browser, service) as page:
            page.get_by_text("collection 'films' has no map yet: `embeddings-pipeline sync` makes it").wait_for()
            assert not page.locator("#canvas").is_visible()
            ask(page, "Film 7 number 7")
            says(page, "Meaning: 10 hits")


def test_it_is_given_over_http(films: Settings) -> None:
    with serving(films) as service:
        answer = service.post("/map", colour="revenue", points=5, keys=["25", "24", "no such", "25"]).json()
        assert (answer["items"], answer["left_out"], answer["standing"], answer["method"]) == (25, 0, "current", "pca")
        assert {len(column) for column in answer["points"].values()} == {5}
        assert answer["found"]["keys"] == ["25", "24"] and answer["found"]["labels"] == ["Film 25", EVIL]
        assert answer["found"]["colours"] == [9007199254740992.0, 1024.0]
        again = service.post("/map", points=3).json()["points"]
        assert again["keys"] == answer["points"]["keys"][:3] and again["colours"] == []
        for fields, status, words in (
            ({"collection": "film"}, 404, "did you mean 'films'"),
            ({"colour": "genre"}, 422, "the map has no colour 'genre'; it has genres, revenue, title"),
            ({"vector": "bse"}, 422, "the map has no vector 'bse'; it has base (did you mean 'base'?)"),
            ({"points": 50_001}, 422, "points: Input should be less than or equal to 50000"),
            ({"keys": ["1"] * 1001}, 422, "keys: List should have at most 1000 items"),
            ({"k": 5}, 422, "k: there is no such field"),
        ):
            refused = service.post("/map", **fields)
            assert refused.status_code == status and words in refused.json()["error"]


def test_the_map_of_a_foreign_database_is_not_shown(films: Settings) -> None:
    opened_collection = publish(films, with_all())
    with serving(films) as service:
        execute(opened_collection.database, "UPDATE embeddings.collection SET epoch = gen_random_uuid()")
        answer = service.post("/map")
    assert answer.status_code == 404 and "its map is of another database" in answer.json()["error"]
