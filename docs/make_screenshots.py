"""docs/*.png, from a running UI of the sample after a sync, and page.jpg, from a running service that has `films`:

python docs/make_screenshots.py [http://127.0.0.1:3000 [http://127.0.0.1:8000]]
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

DOCS = Path(__file__).parent
GROUP = "/locations/embeddings_pipeline/asset-groups/items/lineage"


def asset_graph(page: Page) -> None:
    """The group's graph, cut to its nodes and a margin. On a wider page each node would show its state too."""
    page.set_viewport_size({"width": 1240, "height": 1000})
    page.goto(GROUP)
    page.get_by_text("faiss_index", exact=True).first.wait_for()
    page.wait_for_timeout(3000)  # the nodes' states come one by one
    boxes = [box for node in page.locator("foreignObject").all() if (box := node.bounding_box())]
    left, top = min(box["x"] for box in boxes), min(box["y"] for box in boxes)
    right, bottom = max(box["x"] + box["width"] for box in boxes), max(box["y"] + box["height"] for box in boxes)
    clip = {"x": left - 15, "y": top - 15, "width": right - left + 30, "height": bottom - top + 30}
    page.screenshot(path=DOCS / "asset-graph.png", clip=clip)  # type: ignore[arg-type]


def checks(page: Page) -> None:
    page.set_viewport_size({"width": 1250, "height": 760})
    page.goto("/assets/pgvector_index?view=checks&checkDetail=coverage")
    page.get_by_text("Passed", exact=True).wait_for()
    page.wait_for_timeout(1500)
    page.screenshot(path=DOCS / "checks.png")


def sensor(page: Page) -> None:
    """Switches the sensor on, and waits for some ticks; a row that is edited meanwhile makes a run."""
    page.set_viewport_size({"width": 1250, "height": 840})
    page.goto("/locations/embeddings_pipeline/sensors/new_rows_sensor")
    page.get_by_text("Running", exact=True).wait_for()
    if page.get_by_text("Sensor has never run").count():
        page.locator("label:has(input[type=checkbox]), [role=switch]").first.click()
    page.wait_for_timeout(120_000)
    page.screenshot(path=DOCS / "sensor.png")


def service_page(page: Page, address: str) -> None:
    """A question in each way of searching."""
    page.set_viewport_size({"width": 1400, "height": 880})
    page.goto(f"{address}/#in=films&q=time+travel+gone+wrong")
    page.get_by_role("status").filter(has_text="hits").wait_for()
    page.locator("#map-note").filter(has_text="items").wait_for()
    page.wait_for_timeout(1000)
    page.screenshot(path=DOCS / "page.jpg", type="jpeg", quality=70)


if __name__ == "__main__":
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--headless", "--no-sandbox"])
        address = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:3000"
        page = browser.new_page(base_url=address, color_scheme="light", device_scale_factor=2)
        asset_graph(page)
        checks(page)
        sensor(page)
        service_page(page, sys.argv[2] if len(sys.argv) > 2 else "http://127.0.0.1:8000")
        browser.close()
