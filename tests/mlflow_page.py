"""MLflow's pages in a real browser.

Run as `python tests/mlflow_page.py ADDRESS FILE.png`, it takes a picture of a view.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from browser import chromium, wait_until_drawn

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Frame, Page

TIMEOUT_MS = 120_000
"""MLflow's page is 10 MB of scripts, and the machine may be busy."""

ALL_COLUMNS = {"width": 3200, "height": 800}
"""Pixels. MLflow draws only the columns that are in sight, beside its assistant."""


@contextmanager
def run_table(browser: Browser, address: str) -> Iterator[Page]:
    """The page at the address of a view, with the rows of its run table loaded and the view applied."""
    page = browser.new_page(viewport=ALL_COLUMNS)
    page.set_default_timeout(TIMEOUT_MS)
    page.goto(address)
    page.locator(".ag-center-cols-container .ag-row").first.wait_for()
    # MLflow shows columns of its own until it has applied the view; the last of ours is none of them.
    page.locator('.ag-header-cell[col-id="tags.`label`"]').wait_for()
    yield page
    page.close()


@contextmanager
def artifact(browser: Browser, address: str) -> Iterator[Frame]:
    """The frame in which MLflow shows a page among the artifacts of a run, its charts drawn, in a window of 1280 x 800 pixels."""
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.set_default_timeout(TIMEOUT_MS)
    page.goto(address)
    element = page.locator("iframe.mlflow-html-iframe").element_handle()
    frame = element.content_frame()
    assert frame is not None
    frame.locator("body > script").wait_for(state="attached")
    wait_until_drawn(frame)
    yield frame
    page.close()


def columns(page: Page) -> list[str]:
    """The titles of the run table's columns, from left to right."""
    titles = {cell.bounding_box()["x"]: cell.inner_text().strip() for cell in page.locator(".ag-header-cell").all()}
    return [titles[x] for x in sorted(titles) if titles[x]]


def cells(page: Page, column: str) -> list[str]:
    """The texts of a column, from top to bottom; `column` as MLflow names it, such as metrics.`gmacs`.

    A run's name comes after the text of its colour.
    """
    found = page.locator(f'.ag-cell[col-id="{column}"]').all()
    return [cell.inner_text().split("\n")[-1].strip() for cell in sorted(found, key=lambda cell: cell.bounding_box()["y"])]


if __name__ == "__main__":
    with chromium() as browser, run_table(browser, sys.argv[1]) as page:
        page.get_by_role("button", name="Close").first.click()
        page.set_viewport_size({"width": 1500, "height": 620})
        page.wait_for_timeout(2000)
        page.screenshot(path=sys.argv[2])
