"""The table of effects: every contrast of a design on every outcome, from the per-image outcomes of its trials."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from results.effects.convergence import MAX_LOSS_FALL, loss_fall
from results.effects.design import Contrast, Design
from results.effects.predictions import Cell, CellKey, image_positions, some_ids
from results.effects.statistics import (
    Bootstrap,
    holm,
    mcnemar_test,
    minimum_detectable_effect,
    resample,
    shown_detectable_effect,
    sign_flip_detectable_effect,
    sign_flip_test,
    spread_of,
    tost,
)
from results.effects.verdict import excludes_zero, verdict
from results.records import Metric

if TYPE_CHECKING:
    import pandas as pd

TestKey = tuple[str, str, str]
"""Factor, contrast as text, outcome: a row of the table of effects."""


def effects_table(
    cells: Iterable[Cell],
    design: Design,
    *,
    absent: Mapping[CellKey, str] | None = None,
    num_trials_before: Mapping[TestKey, int] | None = None,
    seed: int = 0,
    num_resamples: int = 10_000,
) -> pd.DataFrame:
    """A row per contrast and outcome, primary ones first.

    factor, contrast, outcome, unit, goal; n_seeds, n_images, missing (which arms lack which seeds, and why); mean and
    baseline_mean of the arms; effect, low, high (`calibrated` 95 % interval over seeds and images) and low_90, high_90; p of
    the sign-flip test over seeds against `alternative`, is_exact, smallest_p (the least p that so many seeds can give),
    p_holm and family_size (nan and 1 for primary rows), is_primary, rejected at the design's alpha, is_shown (rejected, the
    interval excludes 0, and no arm is known not to have converged); p_mcnemar, of the two networks of a single seed, on accuracy.

    is_converged (None if an arm's training losses were not kept) and unconverged, the arms that `results.effects.convergence` finds
    still learning, with the fall of their training loss in nats. What such a row says of harm and equivalence is False.

    margin, and whether the 90 % interval says no_harm (its harmful end is inside) or equivalent (both ends are): the two
    one-sided tests by interval inclusion, for seeds and images together, not corrected for how many there are; equivalent_p, the p-value of
    TOST over seeds alone. mde, the smallest effect that is shown with 80 % power, by test at alpha / family_size and interval together;
    mde_seeds and mde_images, what sign flips over seeds alone and a t-test over images alone would need: the larger one says which of the
    two a sharper experiment needs more of. published, source and could_have_seen (mde is at most the published effect; None when nothing
    is published); num_trials_before, as given: trials of the arms that had finished when
    the row was registered; verdict; majority_pct, the accuracy of always guessing the most frequent class of the test set.

    A row uses the seeds that all its arms have, from trials on the test images that most trials have. `absent` says why a cell
    has no predictions. A row that was not measured stays in its family with p = 1, because families were fixed before the run.
    Raises ValueError for two trials of one cell.
    """
    import pandas as pd

    tested = _on_same_images(cells, absent or {})
    made = [_row(tested, contrast, outcome, design) for contrast in design.contrasts for outcome in design.outcomes]
    measured = [(row, differences) for row, differences in made if differences is not None]
    bootstraps = resample([differences for _, differences in measured], seed=seed, num_resamples=num_resamples)
    for (row, differences), bootstrap in zip(measured, bootstraps, strict=True):
        row |= _numbers(row, differences, bootstrap, design, seed)
    rows = [row for row, _ in made]
    for factor, outcome in dict.fromkeys((row["factor"], row["outcome"]) for row in rows):
        family = [row for row in rows if (row["factor"], row["outcome"]) == (factor, outcome) and not row["is_primary"]]
        adjusted = holm([1.0 if math.isnan(row["p"]) else row["p"] for row in family])
        for row, p in zip(family, adjusted, strict=True):
            row["p_holm"] = math.nan if math.isnan(row["p"]) else float(p)
    for row in rows:
        row["rejected"] = (row["p"] if row["is_primary"] else row["p_holm"]) <= design.alpha
        row["is_shown"] = row["rejected"] and excludes_zero(row) and row["is_converged"] is not False
        row["num_trials_before"] = (num_trials_before or {}).get((row["factor"], row["contrast"], row["outcome"]))
        row["verdict"] = verdict(row, design)
    table = pd.DataFrame(rows).astype(dict.fromkeys(("could_have_seen", "num_trials_before", "is_converged"), object))
    return table.sort_values(by="is_primary", ascending=False, kind="stable", ignore_index=True)


@dataclass(frozen=True, kw_only=True)
class _Tested:
    """Trials on one set of test images; each outcome is (N,), images in the same order."""

    trials: Mapping[CellKey, Mapping[str, np.ndarray]]
    absent: Mapping[CellKey, str]
    labels: np.ndarray
    loss_falls: Mapping[CellKey, float]
    """Of the trials whose training losses were kept."""

    def arm(self, factor: str, level: str, outcome: str) -> dict[int, np.ndarray]:
        """The trials of a level that have the outcome, by seed."""
        found = {seed: has for (name, value, seed), has in self.trials.items() if (name, value) == (factor, level)}
        return {seed: has[outcome] for seed, has in sorted(found.items()) if outcome in has}

    def loss_fall(self, factor: str, level: str, seeds: Iterable[int]) -> float:
        """The mean over these seeds of a level; nan if it is not known of all."""
        return float(np.mean([self.loss_falls.get((factor, level, seed), math.nan) for seed in seeds] or [math.nan]))

    def missing(self, factor: str, level: str, outcome: str, wanted: Collection[int]) -> str:
        """The seeds that a level lacks, of the wanted ones and of those that failed, with the reasons; empty if it lacks none."""
        failed = {seed for name, value, seed in self.absent if (name, value) == (factor, level)}
        seeds_by_reason: dict[str, list[int]] = {}
        for seed in sorted({*wanted, *failed} - self.arm(factor, level, outcome).keys()):
            key = (factor, level, seed)
            reason = f"no {outcome}" if key in self.trials else self.absent.get(key, "not run")
            seeds_by_reason.setdefault(reason, []).append(seed)
        parts = [f"seed {some_ids(np.array(seeds))} ({reason})" for reason, seeds in seeds_by_reason.items()]
        return f"{level} lacks {', '.join(parts)}" if parts else ""


def _on_same_images(cells: Iterable[Cell], absent: Mapping[CellKey, str]) -> _Tested:
    """Keep the cells on the most common set of test images; the others become absent, with the reason."""
    by_key: dict[CellKey, Cell] = {}
    for cell in cells:
        if cell.key in by_key:
            raise ValueError(f"two trials of factor {cell.factor!r}, level {cell.level!r}, seed {cell.seed}")
        by_key[cell.key] = cell
    image_sets = {key: np.sort(cell.predictions.ids).tobytes() for key, cell in by_key.items()}
    if not by_key:
        return _Tested(trials={}, absent=absent, labels=np.zeros(0, dtype=np.int64), loss_falls={})
    (most_common, _), *_ = Counter(image_sets.values()).most_common(1)
    first = by_key[next(key for key, images in image_sets.items() if images == most_common)].predictions
    trials: dict[CellKey, Mapping[str, np.ndarray]] = {}
    reasons = dict(absent)
    for key, cell in by_key.items():
        found = cell.predictions
        try:
            order = image_positions(found.ids, first.ids, "this trial", "most")
        except ValueError as error:
            reasons[key] = str(error)
        else:
            trials[key] = {name: np.asarray(values, dtype=float)[order] for name, values in found.outcomes.items()}
    falls = {key: loss_fall(losses) for key in trials if (losses := by_key[key].predictions.train_loss) is not None}
    return _Tested(trials=trials, absent=reasons, labels=first.labels, loss_falls=falls)


def effect_unit(outcome: Metric) -> str:
    """The unit of a difference of two outcomes; percentages differ by points."""
    return "points" if outcome.unit == "%" else outcome.unit


def _row(tested: _Tested, contrast: Contrast, outcome: Metric, design: Design) -> tuple[dict[str, Any], np.ndarray | None]:
    """A row without its statistics, and its differences (S, N); None if no seed has every arm."""
    arms = {level: tested.arm(contrast.factor, level, outcome.name) for level in (contrast.baseline, *contrast.levels)}
    seeds = sorted(set.intersection(*(set(arm) for arm in arms.values())))
    wanted = set.union(*(set(arm) for arm in arms.values()))
    missing = [tested.missing(contrast.factor, level, outcome.name, wanted) for level in arms]
    falls = {level: tested.loss_fall(contrast.factor, level, seeds) for level in arms}
    unconverged = {level: fall for level, fall in falls.items() if fall > MAX_LOSS_FALL}
    is_own = outcome.name == contrast.outcome
    unit = effect_unit(outcome)
    row: dict[str, Any] = {
        "factor": contrast.factor,
        "contrast": contrast.text,
        "outcome": outcome.name,
        "unit": unit,
        "goal": outcome.goal,
        "n_seeds": len(seeds),
        "n_images": 0,
        "missing": "; ".join(part for part in missing if part),
        **dict.fromkeys(("mean", "baseline_mean", "effect", "low", "high", "low_90", "high_90"), math.nan),
        "alternative": design.alternative(contrast, outcome.name),
        **dict.fromkeys(("p", "smallest_p", "p_holm", "p_mcnemar"), math.nan),
        "is_exact": True,
        "family_size": design.family_size(contrast, outcome.name),
        "is_primary": contrast.is_primary and is_own,
        "is_converged": False if unconverged else None if math.isnan(sum(falls.values())) else True,
        "unconverged": ", ".join(f"{level} {_fall_text(fall)}" for level, fall in unconverged.items()),
        "rejected": False,
        "is_shown": False,
        "margin": design.margin_pct if unit == "points" else math.nan,
        "no_harm": False,
        "equivalent": False,
        **dict.fromkeys(("equivalent_p", "mde", "mde_seeds", "mde_images"), math.nan),
        "published": contrast.published if is_own and contrast.published is not None else math.nan,
        "source": contrast.source if is_own else "",
        "could_have_seen": None,
        "num_trials_before": None,
        "verdict": "",
        "majority_pct": math.nan,
    }
    if not seeds:
        return row, None
    baseline, *treated = (np.stack([arm[seed] for seed in seeds]) for arm in arms.values())
    mean = np.mean(treated, axis=0)
    row |= {"n_images": mean.shape[1], "majority_pct": _majority_pct(tested.labels)}
    row |= {"mean": float(mean.mean()), "baseline_mean": float(baseline.mean())}
    if len(seeds) == len(treated) == 1 and outcome.name == "top1_pct":
        row["p_mcnemar"] = mcnemar_test(mean[0] > 50, baseline[0] > 50)
    return row, mean - baseline


def _numbers(row: Mapping[str, Any], differences: np.ndarray, bootstrap: Bootstrap, design: Design, seed: int) -> dict[str, Any]:
    S, N = differences.shape
    per_seed, per_image = differences.mean(axis=1), differences.mean(axis=0)
    interval, narrow = bootstrap.interval(0.95), bootstrap.interval(0.90)
    test = sign_flip_test(per_seed, alternative=row["alternative"], seed=seed)
    alpha = design.alpha / row["family_size"]
    # A one-sided test has the power of a two-sided one at twice its level.
    level = alpha if row["alternative"] == "two-sided" else 2 * alpha
    spread = float(per_seed.std(ddof=1)) if S > 1 else math.nan
    mde_seeds = sign_flip_detectable_effect(spread, S, alpha=alpha, alternative=row["alternative"])
    mde_images = minimum_detectable_effect(float(per_image.std(ddof=1)), N, alpha=level) if N > 1 else math.inf
    mde = math.inf
    if S > 1 and N > 1:
        mde = shown_detectable_effect(spread_of(differences), S, N, alpha=alpha, alternative=row["alternative"])
    # A single seed says nothing about other trainings, and an arm that still learns nothing about longer ones: no bound is claimed.
    bounds_harm = S > 1 and row["is_converged"] is not False
    above, below = (bounds_harm and narrow.low > -row["margin"]), (bounds_harm and narrow.high < row["margin"])
    published = row["published"]
    return {
        "effect": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "low_90": narrow.low,
        "high_90": narrow.high,
        "p": test.p_value,
        "smallest_p": test.smallest_p,
        "is_exact": test.is_exact,
        "no_harm": above if row["goal"] == "maximize" else below,
        "equivalent": above and below,
        "equivalent_p": tost(per_seed, row["margin"]) if S > 1 and row["margin"] > 0 else math.nan,
        "mde": mde,
        "mde_seeds": mde_seeds,
        "mde_images": mde_images,
        "could_have_seen": None if math.isnan(published) else mde <= abs(published),
    }


def levels_table(cells: Iterable[Cell], design: Design, *, absent: Mapping[CellKey, str] | None = None) -> pd.DataFrame:
    """A row per level and outcome: factor, level, outcome, unit, n_seeds, mean and sd over seeds (ddof 1), missing, rank.

    The rank is that of the mean among the levels of the factor, from 1 on, and equals share it. A level that lacks a seed of its factor
    has none (nan): its mean is not paired with the others. loss_fall is how much the level's training loss still fell, in nats and nan if
    not known, is_converged what follows from it.
    """
    import pandas as pd

    tested = _on_same_images(cells, absent or {})
    levels = dict.fromkeys((one.factor, level) for one in design.contrasts for level in (one.baseline, *one.levels))
    rows = []
    for factor, level in levels:
        seeds = {seed for name, _, seed in (*tested.trials, *tested.absent) if name == factor}
        for outcome in design.outcomes:
            arm = tested.arm(factor, level, outcome.name)
            means, fall = [values.mean() for values in arm.values()], tested.loss_fall(factor, level, arm)
            rows.append(
                {
                    "factor": factor,
                    "level": level,
                    "outcome": outcome.name,
                    "unit": outcome.unit,
                    "n_seeds": len(means),
                    "mean": float(np.mean(means)) if means else math.nan,
                    "sd": float(np.std(means, ddof=1)) if len(means) > 1 else math.nan,
                    "loss_fall": fall,
                    "is_converged": None if math.isnan(fall) else fall <= MAX_LOSS_FALL,
                    "missing": tested.missing(factor, level, outcome.name, seeds),
                }
            )
    table = pd.DataFrame(rows)
    paired = table["mean"].where(table["missing"] == "")
    costs = paired.where(table["outcome"].isin([outcome.name for outcome in design.outcomes if outcome.goal == "minimize"]), -paired)
    return table.assign(rank=costs.groupby([table["factor"], table["outcome"]]).rank(method="min"))


def _majority_pct(labels: np.ndarray) -> float:
    return 100.0 * float(np.unique(labels, return_counts=True)[1].max()) / len(labels)


def _fall_text(fall: float) -> str:
    return f"{fall:.2f} nats" if math.isfinite(fall) else "in too few epochs to tell"
