"""Pages in a real browser, Debian's chromium driven by playwright: what a reader sees of them, and pictures.

    python tests/browser.py ADDRESS FILE.png [--width 1400] [--height 900] [--dark] [--start SELECTOR]

takes a picture of a page, of `file:///PATH/leaderboard.html` for example, from an element such as `h2:text("growth")` downwards.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Frame, Page

CHROMIUM = shutil.which("chromium")

BOXES = """() => [...document.querySelectorAll("figure, .js-plotly-plot")].flatMap((chart, number) => {
  const parts = chart.matches("figure .js-plotly-plot") ? [] :
    chart.querySelectorAll('figcaption, .legend, text[class$="title"], [class$="tick"] > text, [id^="text_"] > text, rect.nsewdrag');
  return [...parts].map(part => ({part, box: part.getBoundingClientRect()})).filter(({box}) => box.width > 0)
    .map(({part, box}) => ({chart: number, what: part.textContent || part.getAttribute("class"),
      left: box.left, right: box.right, top: box.top, bottom: box.bottom}));
})"""
"""The titles, legends, labels and plot areas of each chart. Beside plotly's names of them it knows matplotlib's, in which a text has the
identity text_3, and HTML's."""

TEXTS = """() => {
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, style = getComputedStyle(element);
    const scale = element.getScreenCTM?.();
    if (!walker.currentNode.data.trim() || !element.getBoundingClientRect().width || /SCRIPT|STYLE|title/.test(element.tagName)) continue;
    let paper = element;
    while (paper && /rgba\\(.*, 0\\)/.test(getComputedStyle(paper).backgroundColor)) paper = paper.parentElement;
    found.push({text: walker.currentNode.data.trim(), size: parseFloat(style.fontSize) * (scale ? Math.hypot(scale.a, scale.b) : 1),
      colour: element.closest("svg") ? style.fill : style.color,
      paper: paper ? getComputedStyle(paper).backgroundColor : "rgb(255, 255, 255)"});
  }
  return found;
}"""
"""Every text that is drawn, with the size of its letters in pixels, its colour and that of the nearest background, as `rgb(R, G, B)`."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, address: str, width: int = 1400, height: int = 900, *, dark: bool = False) -> Iterator[Page]:
    """The page at the address, its charts drawn, in a window of so many pixels."""
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light")
    page.goto(address)
    wait_until_drawn(page)
    yield page
    page.close()


def wait_until_drawn(frame: Page | Frame) -> None:
    """Wait for every chart of the page."""
    frame.wait_for_function("() => [...document.querySelectorAll('.chart')].every(chart => chart.matches('.js-plotly-plot'))")


def is_wider_than_window(frame: Page | Frame) -> bool:
    """Whether the page as a whole scrolls sideways."""
    return frame.evaluate("() => document.documentElement.scrollWidth > window.innerWidth")


def overlaps(frame: Page | Frame) -> list[str]:
    """The titles, legends, labels and plot areas that cover each other, two and two; neighbours may touch by a pixel."""
    return [
        f"{a['what']} | {b['what']}"
        for a, b in combinations(frame.evaluate(BOXES), 2)
        if min(a["right"], b["right"]) - max(a["left"], b["left"]) > 1 and min(a["bottom"], b["bottom"]) - max(a["top"], b["top"]) > 1
    ]


def texts(frame: Page | Frame) -> list[dict[str, Any]]:
    """Every text with the `size` of its letters in pixels, its `colour` and the colour of the `paper` behind it."""
    return frame.evaluate(TEXTS)


def contrast(one: str, other: str) -> float:
    """The contrast of two colours, `rgb(R, G, B)`, from 1 to 21 (WCAG 2.2, https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio)."""
    darker, lighter = sorted(map(luminance, (one, other)))
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    """The relative luminance of `rgb(R, G, B)`, from 0 to 1."""
    channels = [int(channel) / 255 for channel in colour.removeprefix("rgb(").removesuffix(")").split(", ")]
    linear = [channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4 for channel in channels]
    return sum(weight * channel for weight, channel in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Take a picture of a page.")
    parser.add_argument("address")
    parser.add_argument("picture")
    parser.add_argument("--width", type=int, default=1400)
    parser.add_argument("--height", type=int, default=900)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--start", default="body")
    options = parser.parse_args()
    with chromium() as browser, opened(browser, options.address, options.width, options.height, dark=options.dark) as page:
        page.locator(options.start).evaluate("element => element.scrollIntoView()")
        page.screenshot(path=options.picture)
