"""The pages of a study as a reader sees them: on a telephone, in MLflow's frame for artifacts, on a desk, in the dark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from browser import contrast, is_wider_than_window, luminance, opened, overlaps, texts
from test_leaderboard import GOALS, measured
from test_leaderboard import record as topology
from test_study_effects import Ledger, npz, predictions

from results.attachments import attach_leaderboard
from results.curves import CURVE_NAMES
from results.mlflow_store import MlflowTracker, mlflow_client
from results.paths import RunPaths
from search.studies.ablations import LEVELS, ablation_design
from space import catalog

pytestmark = pytest.mark.slow

PHONE, ARTIFACT, WIDE_ARTIFACT, DESK = (390, 844), (514, 568), (800, 600), (1400, 900)
"""Pixels. MLflow's frame for an artifact has 514 x 568 in a window of 1280 x 800, beside its assistant, and 800 x 600 in a larger one."""

READABLE_PX = 8
WCAG_TEXT = 4.5
STUDY = "as_vit_topologies_at_64_px_grown_for_224_px"
PAGES = ("leaderboard", "ablations", "robustness")


def robustness(seed: int) -> bytes:
    """All curves of a network that gets worse with the level."""
    correct = np.random.default_rng(seed).random((60, 5)) < np.linspace(0.9, 0.3, 5)
    levels = {f"{name}_levels": np.arange(0, 10, 2.0) if name == "permutation" else np.linspace(0, 60, 5) for name in CURVE_NAMES}
    return npz(ids=np.arange(60), **dict.fromkeys(CURVE_NAMES, correct), **levels)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The addresses of the pages that two studies leave in MLflow: a search that grew a family, and an ablation of all factors."""
    root = tmp_path_factory.mktemp("runs")
    objectives = {"topology": GOALS, "growth": GOALS}
    search = MlflowTracker(RunPaths(root).mlflow_uri, STUDY, invocation={"command": "run.py as_vit " * 9}, objectives=objectives)
    for number in range(12):
        for phase, condition in (("topology", 10.0 + (number * 7) % 12), ("growth", 50.0 - number)):
            trial = replace(topology(phase, number, proxy_digest=f"{number:016x}"), study_name=STUDY)
            search.record(trial, measured(1 + number, condition, params_m=2.0 + number))
    search.mark_family("growth", [0, 4, 9])
    ledger = Ledger(root)
    ablation = ledger.open(ablation_design(LEVELS, catalog.resolve("vit_digits"), has_robustness=True))
    for factor, levels in LEVELS.items():
        for level in levels:
            for seed in range(2):
                files = {"predictions.npz": predictions(ledger.number), "robustness.npz": robustness(ledger.number)}
                ledger.record(ablation, factor, level, seed, files)
    for tracker in (search, ablation):
        attach_leaderboard(tracker)
        tracker.close("FINISHED")
    pages = {"leaderboard": (search, "leaderboard"), "ablations": (ablation, "leaderboard"), "robustness": (ablation, "robustness_mixing")}

    def address_of(name: str) -> str:
        tracker, file = pages[name]
        return Path(mlflow_client(tracker.uri).download_artifacts(tracker.parent_run_id, f"{file}.html")).as_uri()

    return address_of


@pytest.mark.parametrize("window", [PHONE, ARTIFACT, WIDE_ARTIFACT, DESK], ids=lambda window: f"{window[0]}px")
@pytest.mark.parametrize("name", PAGES)
def test_nothing_overlaps_is_too_small_or_wider_than_the_window(browser, address: Callable[[str], str], name: str, window: tuple[int, int]):
    with opened(browser, address(name), *window) as page:
        assert not is_wider_than_window(page)
        assert overlaps(page) == []
        assert [text for text in texts(page) if text["size"] < READABLE_PX] == []


@pytest.mark.parametrize("name", PAGES)
def test_in_the_dark_a_page_is_dark_and_every_text_can_be_read(browser, address: Callable[[str], str], name: str):
    with opened(browser, address(name), *DESK, dark=True) as page:
        found = texts(page)
        assert {text["text"] for text in found if luminance(text["paper"]) > 0.1} == set()
        assert {text["text"]: text for text in found if contrast(text["colour"], text["paper"]) < WCAG_TEXT} == {}


def test_a_drawn_page_follows_the_reader_into_the_dark(browser, address: Callable[[str], str]):
    with opened(browser, address("leaderboard"), *DESK) as page:
        before = {text["text"]: text["colour"] for text in texts(page)}
        page.emulate_media(color_scheme="dark")
        page.wait_for_function("() => getComputedStyle(document.querySelector('.xtick text')).fill != 'rgb(27, 42, 58)'")
        after = {text["text"]: text["colour"] for text in texts(page)}
    assert before.keys() == after.keys()
    assert [text for text in before if before[text] == after[text]] == []


@pytest.mark.parametrize("window", [WIDE_ARTIFACT, DESK], ids=lambda window: f"{window[0]}px")
def test_the_verdict_of_every_contrast_is_in_sight(browser, address: Callable[[str], str], window: tuple[int, int]):
    verdicts = """() => [...document.querySelectorAll("table")].flatMap(table => {
      const column = [...table.tHead.rows[0].cells].findIndex(head => head.textContent == "verdict");
      return column < 0 ? [] : [...table.tBodies[0].rows].map(row => row.cells[column].getBoundingClientRect());
    })"""
    with opened(browser, address("ablations"), *window) as page:
        found = page.evaluate(verdicts)
    assert len(found) > 100
    assert [box for box in found if box["left"] < 0 or box["right"] > window[0]] == []
