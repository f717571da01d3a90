"""Effects from the runs of a study alone: damaged artifacts, designs that grew, failures, and the files that come of them."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run_here, run_pasted

from results import leaderboard
from results.attachments import attach_leaderboard
from results.effects.design import Contrast, Design
from results.effects.study import Effects, merge_designs
from results.effects.text import effects_markdown, effects_summary
from results.mlflow_store import DESIGNS_FILE, MlflowTracker, mlflow_client
from results.page import render
from results.paths import RunPaths
from results.records import Failure, Measurement, Metric
from results.report import load_report
from results.text import markdown, print_results
from results.tracking import TrialRecord

TOP1, NLL = Metric("top1_pct", "maximize"), Metric("nll", "minimize")
DROP = Metric("patch_drop_auc", "maximize")
REFERENCE = {"pooling": "class_token", "mixing": "none"}
NUM_IMAGES = 60


def contrast(factor: str, level: str, baseline: str = "", **options) -> Contrast:
    return Contrast(**{"factor": factor, "levels": (level,), "baseline": baseline or REFERENCE[factor], "outcome": "top1_pct", **options})


def design(*contrasts: Contrast, outcomes: Sequence[Metric] = (TOP1, NLL), **options) -> Design:
    return Design(name="ablations", contrasts=contrasts, outcomes=tuple(outcomes), **options)


MEAN = contrast("pooling", "mean", is_primary=True)
CUTMIX = contrast("mixing", "cutmix", is_primary=True)


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def predictions(seed: int, num_images: int = NUM_IMAGES) -> bytes:
    generator = np.random.default_rng(seed)
    return npz(ids=np.arange(num_images), labels=np.arange(num_images) % 3, logits=generator.normal(size=(num_images, 3)))


def robustness(seed: int, ids: np.ndarray | None = None) -> bytes:
    correct = np.random.default_rng(seed).random((NUM_IMAGES, 3)) < [0.9, 0.6, 0.3]
    return npz(ids=np.arange(NUM_IMAGES) if ids is None else ids, patch_drop=correct, patch_drop_levels=np.array([0.0, 30.0, 60.0]))


class Ledger:
    """A study's tracker, and trials that are recorded in it as the driver does."""

    def __init__(self, root: Path):
        self.root, self.number = root, 0

    @property
    def uri(self) -> str:
        return RunPaths(self.root).mlflow_uri

    def open(self, *plans: Design) -> MlflowTracker:
        designs: dict[str, Any] = {phase: plan.to_json() for phase, plan in zip(("train", "probe"), plans, strict=False)}
        objectives = {"train": [Metric("val_top1_pct", "maximize")]}
        return MlflowTracker(self.uri, "ablations", invocation={"command": "run"}, objectives=objectives, designs=designs)

    def record(self, tracker: MlflowTracker, factor: str, level: str, seed: int, files: Mapping[str, bytes] | Failure) -> None:
        folder = self.root / "files" / str(self.number)
        folder.mkdir(parents=True)
        trial = TrialRecord(
            study_name="ablations",
            phase="train",
            number=self.number,
            label=f"{factor}={level}",
            digest=f"{factor} {level}",
            params={"factor": factor, factor: level, "seed": seed},
            candidate={},
            recipe_digest=str(seed),
        )
        self.number += 1
        if isinstance(files, Failure):
            tracker.record(trial, files, folder)
            return
        for name, content in files.items():
            (folder / name).write_bytes(content)
        tracker.record(trial, Measurement(values={"val_top1_pct": 50.0}, elapsed_s=1.0, device="cpu", versions={}, seed=seed), folder)

    def record_arms(self, tracker: MlflowTracker, factor: str, *levels: str, seeds: int = 2) -> None:
        for seed in range(seeds):
            for level in levels:
                self.record(tracker, factor, level, seed, {"predictions.npz": predictions(seed)})

    def effects(self) -> Effects:
        (found,) = load_report(self.uri, "ablations").effects
        return found


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path)


def truncated(files: dict[str, bytes]) -> dict[str, bytes]:
    return {**files, "predictions.npz": files["predictions.npz"][:-50]}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncated, "unreadable: predictions.npz: BadZipFile: File is not a zip file"),
        (lambda files: {**files, "predictions.npz": b""}, "unreadable: predictions.npz: EOFError: No data left in file"),
        (lambda files: {**files, "predictions.npz": npz(ids=np.arange(3))}, "unreadable: predictions.npz: no labels, logits in it"),
        (
            lambda files: {**files, "robustness.npz": robustness(0, np.arange(NUM_IMAGES) + 1)},
            "unreadable: robustness.npz and predictions.npz are not of the same test images: only the first has 60, only the second 0",
        ),
        (lambda files: {}, "no predictions.npz"),
    ],
)
def test_a_damaged_artifact_costs_its_trial_and_is_named_wherever_effects_are_shown(ledger: Ledger, damage: Callable, reason: str):
    tracker = ledger.open(design(MEAN))
    ledger.record_arms(tracker, "pooling", "class_token", "mean")
    ledger.record(tracker, "pooling", "class_token", 2, {"predictions.npz": predictions(2)})
    ledger.record(tracker, "pooling", "mean", 2, damage({"predictions.npz": predictions(2)}))
    report = attach_leaderboard(tracker)
    tracker.close("FINISHED")
    row = report.effects[0].table.iloc[0]
    assert (row["n_seeds"], row["missing"]) == (2, f"mean lacks seed 2 ({reason})")
    assert len(report.results.frame) == 6
    for shown in (" ".join(effects_summary(report.effects[0]).split()), markdown(report), render(report)):
        assert f"missing: {row['missing']}" in shown


def test_failures_are_told_from_cells_that_were_not_run(ledger: Ledger):
    tracker = ledger.open(design(MEAN))
    ledger.record_arms(tracker, "pooling", "class_token", seeds=4)
    ledger.record_arms(tracker, "pooling", "mean", seeds=2)
    ledger.record(tracker, "pooling", "mean", 2, Failure(kind="non_finite", message="loss is nan at step 3"))
    # What failed and was done again is not missing.
    ledger.record(tracker, "pooling", "class_token", 4, Failure(kind="lost", message="killed"))
    ledger.record(tracker, "pooling", "class_token", 4, {"predictions.npz": predictions(4)})
    effects = ledger.effects()
    assert effects.table["missing"][0] == "mean lacks seed 2 (failed: non_finite), seed 3, 4 (not run)"
    assert "| pooling: mean |" in effects_markdown(effects)
    assert "| 2 | mean lacks seed 2 (failed: non_finite), seed 3, 4 (not run) |" in effects_markdown(effects)


def test_the_leaderboard_stands_when_effects_cannot_be_stated(ledger: Ledger, capsys):
    tracker = ledger.open(design(MEAN))
    for level in ("class_token", "mean"):
        ledger.record(tracker, "pooling", level, 0, {"predictions.npz": predictions(0, num_images=1)})
    report = attach_leaderboard(tracker)
    assert len(report.results.frame) == 2
    reason = "ValueError: one seed and one image have no interval: nothing can be resampled"
    assert report.effects_failure == f"effects could not be stated: {reason}"
    print_results(report, 5)
    for shown in (" ".join(capsys.readouterr().out.split()), markdown(report), render(report)):
        assert report.effects_failure in shown


def test_designs_that_cannot_be_read_are_named_and_the_others_count(ledger: Ledger):
    for plan in (design(MEAN), design(MEAN, CUTMIX)):
        tracker = ledger.open(plan)
        ledger.record_arms(tracker, plan.factors[-1], REFERENCE[plan.factors[-1]], plan.contrasts[-1].levels[0])
        tracker.close("FINISHED")
    client = mlflow_client(ledger.uri)
    client.log_text(tracker.parent_run_id, '{"train": {"cont', DESIGNS_FILE)
    effects = ledger.effects()
    assert effects.design == design(MEAN)
    assert f"{DESIGNS_FILE} of run {tracker.parent_run_id} is unreadable (JSONDecodeError" in effects.registration


def test_another_factor_takes_nothing_from_what_was_measured(ledger: Ledger):
    for factor, plan in (("pooling", design(MEAN)), ("mixing", design(CUTMIX))):
        tracker = ledger.open(plan)
        ledger.record_arms(tracker, factor, *(REFERENCE[factor], plan.contrasts[0].levels[0]))
        tracker.close("FINISHED")
    effects = ledger.effects()
    assert effects.design.factors == ("pooling", "mixing")
    assert set(effects.table["n_seeds"]) == {2}
    # Trials of pooling say nothing of mixing.
    assert "pooling registered before its first trial; mixing registered before its first trial" in effects.registration
    assert effects.digests == (design(MEAN).digest, design(CUTMIX).digest)
    assert not any("registered after" in verdict for verdict in effects.table["verdict"])


def test_a_phase_that_is_no_longer_asked_for_keeps_its_effects(ledger: Ledger):
    tracker = ledger.open(design(MEAN), design(contrast("pooling", "gem", is_primary=True)))
    ledger.record_arms(tracker, "pooling", "class_token", "mean")
    tracker.close("FINISHED")
    ledger.open(design(MEAN)).close("FINISHED")
    assert [one.phase for one in load_report(ledger.uri, "ablations").effects] == ["train", "probe"]


def test_each_test_counts_the_trials_of_its_arms_that_came_before_it(ledger: Ledger):
    first = ledger.open(design(MEAN, outcomes=(TOP1,)))
    ledger.record_arms(first, "pooling", "class_token", "mean")
    first.close("FINISHED")
    second = ledger.open(design(contrast("pooling", "gem", "mean", is_primary=True), contrast("pooling", "mean"), outcomes=(TOP1, NLL)))
    ledger.record_arms(second, "pooling", "gem")
    second.close("FINISHED")
    effects = ledger.effects()
    counts = {(row["contrast"], row["outcome"]): row["num_trials_before"] for row in effects.table.to_dict("records")}
    # `mean - class_token` is tested no more strictly than it was registered; nll was not an outcome then.
    assert counts == {
        ("gem - mean", "top1_pct"): 2,
        ("gem - mean", "nll"): 2,
        ("mean - class_token", "top1_pct"): 0,
        ("mean - class_token", "nll"): 4,
    }
    assert "pooling: 3 of 4 tests registered after up to 4 trials of their arms" in effects.registration


def test_merged_designs_keep_every_contrast_and_the_newest_primary():
    old = design(MEAN, contrast("pooling", "gem"), outcomes=(TOP1, DROP))
    new = design(CUTMIX, contrast("pooling", "gem", is_primary=True, alternative="greater"), margin_pct=2.0)
    merged = merge_designs([old, new])
    assert merged.contrasts == (new.contrasts[1], dataclasses.replace(MEAN, is_primary=False), CUTMIX)
    assert merged.outcomes == (TOP1, DROP, NLL)
    assert merged.margin_pct == 2
    assert merge_designs([new, new]) == merge_designs([new]) == new
    assert merge_designs([merged, Design.from_json(json.loads(json.dumps(merged.to_json())))]) == merged


def test_curves_of_all_levels_are_drawn_over_their_seeds(ledger: Ledger):
    tracker = ledger.open(design(MEAN, outcomes=(TOP1, NLL, DROP)))
    for seed in range(2):
        for level in ("class_token", "mean"):
            stored = {"predictions.npz": predictions(seed), "robustness.npz": robustness(seed + 10 * (level == "mean"))}
            ledger.record(tracker, "pooling", level, seed, stored)
    (effects,) = attach_leaderboard(tracker).effects
    drawn = effects.robustness["pooling"]
    assert drawn.chance_pct == pytest.approx(100 / 3)
    assert list(drawn.curves) == ["class_token", "mean"]
    levels, accuracy = drawn.curves["mean"]["patch_drop"]
    with np.load(io.BytesIO(robustness(11))) as stored:
        assert accuracy[1] == pytest.approx(100 * stored["patch_drop"].mean(axis=0))
    assert levels.tolist() == [0, 30, 60]
    row = effects.table.set_index("outcome").loc["patch_drop_auc"]
    areas = [np.trapezoid(drawn.curves[level]["patch_drop"][1].mean(axis=0), levels) / 60 for level in ("mean", "class_token")]
    assert row["effect"] == pytest.approx(areas[0] - areas[1])
    client = mlflow_client(ledger.uri)
    names = {file.path for file in client.list_artifacts(tracker.parent_run_id)}
    assert {"effects.csv", "levels.csv", "effects.json", "forest.png", "forest.html", "robustness.png", "robustness.html"} <= names
    page = Path(client.download_artifacts(tracker.parent_run_id, "robustness.html", str(ledger.root))).read_text()
    assert "mean of 2 seeds" in page


def test_hints_are_commands_that_can_be_pasted(ledger: Ledger, tmp_path: Path):
    tracker = ledger.open(design(MEAN))
    ledger.record_arms(tracker, "pooling", "class_token", "mean")
    tracker.close("FINISHED")
    here = effects_summary(ledger.effects())
    assert "1 row on other outcomes in effects.csv of the parent run and in this page:\npython -m results.leaderboard ablations" in here
    printed = run_here(leaderboard.main, "ablations", "--runs", ledger.root, cwd=tmp_path).stdout
    (hint,) = [line for line in printed.splitlines() if line.startswith("python -m results.leaderboard")]
    done = run_pasted(hint, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "leaderboard.html").exists()


def test_single_seeds_have_no_rank_and_are_kept_in_the_table(ledger: Ledger, capsys):
    tracker = ledger.open(design(MEAN))
    ledger.record_arms(tracker, "pooling", "class_token", "mean", seeds=3)
    report = attach_leaderboard(tracker)
    tracker.close("FINISHED")
    frame = report.results.frame
    assert len(frame) == 6
    assert frame["rank"].isna().all()
    assert not frame["is_front"].any()
    parent = mlflow_client(ledger.uri).get_run(tracker.parent_run_id).data
    assert not [name for name in {**parent.metrics, **parent.params} if name.startswith("best/")]
    print_results(report, 5)
    for shown in (capsys.readouterr().out, markdown(report)):
        assert "single seeds and have no rank" in " ".join(shown.split())
        assert "pooling=class_token" not in shown
    assert "too few" not in render(report)
