"""How an ablation is stated: contrasts named before the run, per-image outcomes after it, and one table of effects.

A `Design` is written down (`to_json`, `digest`) before anything is trained. Each contrast is the mean of some levels of a
factor minus a baseline level, paired by seed and by test image. Every outcome of the design is reported for every contrast;
one contrast of a factor, on its own outcome, is primary and keeps its p-value. The others are corrected by Holm's method,
a factor's rows on one outcome being one family: each outcome is a question of its own, and asked in the design. The
statistics are in `results/statistics.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
import textwrap
import zipfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from results.records import Metric
from results.robustness_plot import Curve, area_pct
from results.statistics import (
    Alternative,
    Bootstrap,
    holm,
    minimum_detectable_effect,
    resample,
    sign_flip_detectable_effect,
    sign_flip_test,
    tost,
)

if TYPE_CHECKING:
    import pandas as pd

TEXT_WIDTH = 120
_NAME_WIDTH = 27
_NUMBER_WIDTHS = (15, 14, 8, 7, 14, 10, 6)
_MAX_LEVEL_OUTCOMES = 4

CellKey = tuple[str, str, int]
"""Factor, level, seed."""

TestKey = tuple[str, str, str]
"""Factor, contrast as text, outcome: a row of the table of effects."""


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """The mean of `levels` of a factor minus `baseline`.

    `outcome` is what it was made for: there `alternative` (of the effect's sign, not of its being better) and `published`
    apply; on other outcomes the test is two-sided. `published` is the effect in the outcome's unit, percentage points for
    accuracies, as `source` states it; of a range it is the lower end.
    """

    factor: str
    levels: tuple[str, ...]
    baseline: str
    outcome: str
    is_primary: bool = False
    published: float | None = None
    source: str = ""
    alternative: Alternative = "two-sided"

    @property
    def text(self) -> str:
        arm = self.levels[0] if len(self.levels) == 1 else f"mean({', '.join(self.levels)})"
        return f"{arm} - {self.baseline}"


@dataclass(frozen=True, kw_only=True)
class Design:
    """What is compared on which outcomes; raises ValueError when it contradicts itself.

    `margin_pct` is the harm in percentage points that would not matter (TOST); outcomes in other units have no margin.
    """

    name: str
    contrasts: tuple[Contrast, ...]
    outcomes: tuple[Metric, ...]
    margin_pct: float = 1.0
    alpha: float = 0.05

    def __post_init__(self) -> None:
        known = [outcome.name for outcome in self.outcomes]
        if not self.contrasts:
            raise ValueError(f"design {self.name!r} has no contrast")
        if not (0 < self.alpha <= 0.2 and self.margin_pct > 0):
            raise ValueError(f"design {self.name!r} needs 0 < alpha <= 0.2 and margin_pct > 0, got {self.alpha} and {self.margin_pct}")
        if len(set(known)) < len(known):
            raise ValueError(f"design {self.name!r} names an outcome twice: {', '.join(known)}")
        for contrast in self.contrasts:
            where = f"contrast {contrast.factor}: {contrast.text}" if contrast.levels else f"a contrast of {contrast.factor}"
            if not contrast.levels or contrast.baseline in contrast.levels or len(set(contrast.levels)) < len(contrast.levels):
                raise ValueError(f"{where} needs levels that differ from each other and from the baseline {contrast.baseline!r}")
            if contrast.outcome not in known:
                raise ValueError(f"{where} is on unknown outcome {contrast.outcome!r}; known: {', '.join(known)}")
            if contrast.alternative not in get_args(Alternative):
                raise ValueError(f"{where} has alternative {contrast.alternative!r}; known: {', '.join(get_args(Alternative))}")
        for factor in self.factors:
            own = [contrast for contrast in self.contrasts if contrast.factor == factor]
            if len({contrast.text for contrast in own}) < len(own):
                raise ValueError(f"factor {factor!r} has a contrast twice: {'; '.join(contrast.text for contrast in own)}")
            primary = [contrast.text for contrast in own if contrast.is_primary]
            if len(primary) != 1:
                raise ValueError(
                    f"factor {factor!r} needs exactly one primary contrast, has {len(primary)}: {'; '.join(primary) or '(none)'}"
                )

    @property
    def factors(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(contrast.factor for contrast in self.contrasts))

    def family_size(self, contrast: Contrast, outcome: str) -> int:
        """How many tests the row of a contrast on an outcome shares its alpha with, itself included; 1 for a primary row."""
        own = [other for other in self.contrasts if other.factor == contrast.factor]
        if contrast.is_primary and contrast.outcome == outcome:
            return 1
        return sum(not (other.is_primary and other.outcome == outcome) for other in own)

    @property
    def num_seeds_needed(self) -> int:
        """From how many seeds on the exact test can reject every row if its effect is large enough."""
        rows = [(contrast, outcome.name) for contrast in self.contrasts for outcome in self.outcomes]
        tests = [self.family_size(*row) * (2 if self.alternative(*row) == "two-sided" else 1) for row in rows]
        return math.ceil(math.log2(max(tests) / self.alpha))

    def alternative(self, contrast: Contrast, outcome: str) -> Alternative:
        """A contrast's direction is a claim about its own outcome only."""
        return contrast.alternative if outcome == contrast.outcome else "two-sided"

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Design:
        """The design of `to_json`'s object; raises ValueError for anything else."""
        try:
            contrasts = tuple(Contrast(**{**contrast, "levels": tuple(contrast["levels"])}) for contrast in data["contrasts"])
            outcomes = tuple(Metric(**outcome) for outcome in data["outcomes"])
            return cls(**{**data, "contrasts": contrasts, "outcomes": outcomes})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a design: {type(error).__name__}: {error}") from None

    @property
    def digest(self) -> str:
        """16 hex digits of the canonical JSON's SHA-256: what was registered before the run."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """One trial on the test images: `ids` and `labels` (N,) int64, each outcome (N,) float.

    `curves` are those of its robustness, averaged over the images: levels (L,) and accuracy (L,) in percent.
    """

    ids: np.ndarray
    labels: np.ndarray
    outcomes: Mapping[str, np.ndarray]
    curves: Mapping[str, Curve] = field(default_factory=dict)
    num_classes: int


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One trial of an ablation: which level of which factor, its seed, and what it predicted."""

    factor: str
    level: str
    seed: int
    predictions: Predictions

    @property
    def key(self) -> CellKey:
        return self.factor, self.level, self.seed


def read_predictions(path: Path) -> Predictions:
    """The outcomes of a trial from its `predictions.npz` and from `robustness.npz` beside it, if there is one.

    `top1_pct` is 0 or 100 per image and `nll` in nats; a robustness curve `name` gives `<name>_auc`, the accuracy in percent
    averaged over the range of its levels (trapezoids). Raises ValueError, naming the file, for one that is damaged, for logits
    that are not finite and for curves of other images.
    """
    stored = _arrays(path, ("ids", "labels", "logits"))
    ids, labels, logits = stored["ids"], stored["labels"], stored["logits"].astype(float)
    if not (ids.shape == labels.shape == logits.shape[:1] and logits.ndim == 2 and len(ids)):
        raise ValueError(f"{path.name}: ids {ids.shape}, labels {labels.shape} and logits {logits.shape} do not belong together")
    if not np.isfinite(logits).all():
        raise ValueError(f"{path.name}: logits of {(~np.isfinite(logits)).any(axis=1).sum()} images are not finite")
    if not ((labels >= 0) & (labels < logits.shape[1])).all():
        raise ValueError(f"{path.name}: labels from {labels.min()} to {labels.max()} of {logits.shape[1]} classes")
    logits -= logits.max(axis=1, keepdims=True)
    nll = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]
    outcomes = {"top1_pct": 100.0 * (logits.argmax(axis=1) == labels), "nll": nll}
    curves: dict[str, Curve] = {}
    beside = path.with_name("robustness.npz")
    if beside.exists():
        stored = _arrays(beside, ("ids",))
        order = _positions(stored["ids"], ids, beside.name, path.name)
        for name in sorted(name for name in stored if f"{name}_levels" in stored):
            levels, correct = stored[f"{name}_levels"].astype(float), 100.0 * stored[name]
            if correct.shape != (len(ids), len(levels)):
                raise ValueError(f"{beside.name}: {name} is {correct.shape} for {len(ids)} images at {len(levels)} levels")
            outcomes[f"{name}_auc"] = area_pct(levels, correct)[order]
            curves[name] = levels, correct.mean(axis=0)
    return Predictions(ids=ids, labels=labels, outcomes=outcomes, curves=curves, num_classes=logits.shape[1])


def _arrays(path: Path, needed: Sequence[str]) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as file:
            stored = dict(file)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path.name}: {type(error).__name__}: {error}") from error
    if lacking := [name for name in needed if name not in stored]:
        raise ValueError(f"{path.name}: no {', '.join(lacking)} in it")
    return stored


def _positions(ids: np.ndarray, wanted: np.ndarray, where: str, other: str) -> np.ndarray:
    """Where in `ids` each of `wanted` stands; raises ValueError when they are not the same set of images."""
    if len(ids) == len(wanted) and (ids == wanted).all():
        return np.arange(len(ids))
    only, lacking = np.setdiff1d(ids, wanted), np.setdiff1d(wanted, ids)
    if len(only) or len(lacking) or len(ids) != len(wanted):
        raise ValueError(
            f"{where} and {other} are not of the same test images: only the first has {_some(only)}, only the second {_some(lacking)}"
        )
    order = np.argsort(ids, kind="stable")
    return order[np.searchsorted(ids[order], wanted)]


def _some(ids: np.ndarray) -> str:
    return (", ".join(map(str, ids[:5].tolist())) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")) or "none"


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
    the sign-flip test over seeds against `alternative`, is_exact, smallest_p it could have had, p_holm and family_size (nan
    and 1 for primary rows), is_primary, rejected at the design's alpha, is_shown (rejected, and the interval excludes 0).

    margin, and whether the 90 % interval says no_harm (its harmful end is inside) or equivalent (both ends are): the two
    one-sided tests by interval inclusion, for seeds and images together, not corrected for how many there are; equivalent_p,
    TOST's over seeds alone. mde_seeds and mde_images, what is found with 80 % power at the level a row is tested at (alpha
    over the family's size) against the spread over seeds, by sign flips of normal differences, and against that over images
    alone, by a t-test; published, source and could_have_seen (both are at most the published effect; None when none is
    published); num_trials_before, as given: trials of the arms that were there when the row was registered; verdict;
    majority_pct, the accuracy of always guessing the most frequent class of the test set.

    A seed counts where all arms have it on the same test images as most trials; `absent` tells why a cell has no
    predictions. A row that was not measured stays in its family with p = 1: families were fixed before the run. Raises
    ValueError for a trial given twice.
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
        row["is_shown"] = row["rejected"] and _excludes_zero(row)
        row["num_trials_before"] = (num_trials_before or {}).get((row["factor"], row["contrast"], row["outcome"]))
        row["verdict"] = _verdict(row, design)
    table = pd.DataFrame(rows).astype({"could_have_seen": object, "num_trials_before": object})
    return table.sort_values(by="is_primary", ascending=False, kind="stable", ignore_index=True)


@dataclass(frozen=True, kw_only=True)
class _Tested:
    """The trials on one set of test images: each outcome (N,) in the same order of images."""

    trials: Mapping[CellKey, Mapping[str, np.ndarray]]
    absent: Mapping[CellKey, str]
    labels: np.ndarray

    def arm(self, factor: str, level: str, outcome: str) -> dict[int, np.ndarray]:
        """The trials of a level that have the outcome, by seed."""
        found = {seed: has for (name, value, seed), has in self.trials.items() if (name, value) == (factor, level)}
        return {seed: has[outcome] for seed, has in sorted(found.items()) if outcome in has}

    def missing(self, factor: str, level: str, outcome: str, wanted: Collection[int]) -> str:
        """Which of the wanted seeds, and of those that failed, a level lacks and why; empty if none."""
        failed = {seed for name, value, seed in self.absent if (name, value) == (factor, level)}
        seeds_by_reason: dict[str, list[int]] = {}
        for seed in sorted({*wanted, *failed} - self.arm(factor, level, outcome).keys()):
            key = (factor, level, seed)
            reason = f"no {outcome}" if key in self.trials else self.absent.get(key, "not run")
            seeds_by_reason.setdefault(reason, []).append(seed)
        parts = [f"seed {_some(np.array(seeds))} ({reason})" for reason, seeds in seeds_by_reason.items()]
        return f"{level} lacks {', '.join(parts)}" if parts else ""


def _on_same_images(cells: Iterable[Cell], absent: Mapping[CellKey, str]) -> _Tested:
    """The cells on the test images that most of them have; the others are absent, and say so."""
    by_key: dict[CellKey, Cell] = {}
    for cell in cells:
        if cell.key in by_key:
            raise ValueError(f"two trials of factor {cell.factor!r}, level {cell.level!r}, seed {cell.seed}")
        by_key[cell.key] = cell
    image_sets = {key: np.sort(cell.predictions.ids).tobytes() for key, cell in by_key.items()}
    if not by_key:
        return _Tested(trials={}, absent=absent, labels=np.zeros(0, dtype=np.int64))
    (most_common, _), *_ = Counter(image_sets.values()).most_common(1)
    first = by_key[next(key for key, images in image_sets.items() if images == most_common)].predictions
    trials: dict[CellKey, Mapping[str, np.ndarray]] = {}
    reasons = dict(absent)
    for key, cell in by_key.items():
        found = cell.predictions
        try:
            order = _positions(found.ids, first.ids, "this trial", "most")
        except ValueError as error:
            reasons[key] = str(error)
        else:
            trials[key] = {name: np.asarray(values, dtype=float)[order] for name, values in found.outcomes.items()}
    return _Tested(trials=trials, absent=reasons, labels=first.labels)


def _row(tested: _Tested, contrast: Contrast, outcome: Metric, design: Design) -> tuple[dict[str, Any], np.ndarray | None]:
    """A row without what follows from its differences, and those (S, N), if any seed has every arm."""
    arms = {level: tested.arm(contrast.factor, level, outcome.name) for level in (contrast.baseline, *contrast.levels)}
    seeds = sorted(set.intersection(*(set(arm) for arm in arms.values())))
    wanted = set.union(*(set(arm) for arm in arms.values()))
    missing = [tested.missing(contrast.factor, level, outcome.name, wanted) for level in arms]
    is_own = outcome.name == contrast.outcome
    unit = _unit(outcome.name)
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
        **dict.fromkeys(("p", "smallest_p", "p_holm"), math.nan),
        "is_exact": True,
        "family_size": design.family_size(contrast, outcome.name),
        "is_primary": contrast.is_primary and is_own,
        "rejected": False,
        "is_shown": False,
        "margin": design.margin_pct if unit == "points" else math.nan,
        "no_harm": False,
        "equivalent": False,
        **dict.fromkeys(("equivalent_p", "mde_seeds", "mde_images"), math.nan),
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
    # A single seed knows nothing of other trainings, and nothing about harm is said from it.
    above, below = (S > 1 and narrow.low > -row["margin"]), (S > 1 and narrow.high < row["margin"])
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
        "mde_seeds": mde_seeds,
        "mde_images": mde_images,
        "could_have_seen": None if math.isnan(published) else max(mde_seeds, mde_images) <= abs(published),
    }


def levels_table(cells: Iterable[Cell], design: Design, *, absent: Mapping[CellKey, str] | None = None) -> pd.DataFrame:
    """A row per level and outcome: factor, level, outcome, unit, n_seeds, mean and sd over seeds (ddof 1), missing."""
    import pandas as pd

    tested = _on_same_images(cells, absent or {})
    levels = dict.fromkeys((one.factor, level) for one in design.contrasts for level in (one.baseline, *one.levels))
    rows = []
    for factor, level in levels:
        seeds = {seed for name, _, seed in (*tested.trials, *tested.absent) if name == factor}
        for outcome in design.outcomes:
            means = [values.mean() for values in tested.arm(factor, level, outcome.name).values()]
            rows.append(
                {
                    "factor": factor,
                    "level": level,
                    "outcome": outcome.name,
                    "unit": _unit(outcome.name),
                    "n_seeds": len(means),
                    "mean": float(np.mean(means)) if means else math.nan,
                    "sd": float(np.std(means, ddof=1)) if len(means) > 1 else math.nan,
                    "missing": tested.missing(factor, level, outcome.name, seeds),
                }
            )
    return pd.DataFrame(rows)


def _unit(outcome: str) -> str:
    """Differences of percentages (accuracies and their averages over a curve) are points; an nll is in nats."""
    if outcome.endswith(("_pct", "_auc")):
        return "points"
    return "nats" if outcome.endswith("nll") else ""


def _majority_pct(labels: np.ndarray) -> float:
    return 100.0 * float(np.unique(labels, return_counts=True)[1].max()) / len(labels)


def _excludes_zero(row: Mapping[str, Any]) -> bool:
    return row["low"] > 0 or row["high"] < 0


def _is_opposite(row: Mapping[str, Any]) -> bool:
    """Whether the effect goes against the direction that was tested."""
    return row["effect"] * {"two-sided": 0, "greater": 1, "less": -1}[row["alternative"]] < 0


def _verdict(row: Mapping[str, Any], design: Design) -> str:
    if not row["n_seeds"]:
        parts = [f"not measured: no seed has every arm ({row['missing'] or 'no trial yet'})"]
    else:
        parts = [*_finding(row), *_limits(row, design)]
    if row["num_trials_before"]:
        parts.append(f"registered after {_count(row['num_trials_before'], 'trial')} of its arms")
    return "; ".join(parts)


def _finding(row: Mapping[str, Any]) -> list[str]:
    """What the test and the intervals show, the main thing first."""
    unit = f" {row['unit']}" if row["unit"] else ""
    interval = f"interval {format_interval(row['low'], row['high'], row['unit'])}"
    if row["n_seeds"] == 1:
        interval += " over images only"
    test = format_p(row)
    better = "better" if (row["effect"] > 0) == (row["goal"] == "maximize") else "worse"
    size = format_effect(abs(row["effect"]), row["unit"])[1:] + unit
    narrow = f"90 % interval {format_interval(row['low_90'], row['high_90'], row['unit'])}"
    margin = f"{row['margin']:g} point{'' if row['margin'] == 1 else 's'}"
    equivalent = f"no difference of more than {margin}: {narrow}"
    if row["is_shown"]:
        parts = [f"{better} by {size}: {interval}, {test}"]
    elif row["rejected"]:
        parts = [f"{better} by {size} on these test images, {test}; the interval over other images includes 0: {interval}"]
    elif row["equivalent"]:
        parts = [f"{equivalent}, {test}"]
    elif _is_opposite(row) and _excludes_zero(row):
        parts = [f"the opposite of what was tested: {interval} excludes 0, {test}"]
    elif _excludes_zero(row):
        parts = [f"inconclusive: {interval} excludes 0, {test} does not reject"]
    else:
        parts = [f"inconclusive: {interval}, {test}"]
        if _is_opposite(row):
            parts.append("the effect is the opposite of what was tested")
    if row["equivalent"] and row["rejected"]:
        parts.append(equivalent)
    elif row["no_harm"] and not row["equivalent"] and not (row["is_shown"] and better == "better"):
        parts.append(f"no harm of more than {margin}: {narrow}")
    return parts


def _limits(row: Mapping[str, Any], design: Design) -> list[str]:
    """What this design could not have found, and what it lacks."""
    parts = []
    smallest = row["smallest_p"] * row["family_size"]
    if smallest > design.alpha:
        needed = row["n_seeds"] + math.ceil(math.log2(smallest / design.alpha))
        held = f"smallest {'p' if row['is_primary'] else 'Holm p'} {min(smallest, 1):.2g}"
        parts.append(f"{_count(row['n_seeds'], 'seed')} cannot reject at {design.alpha:g} ({held}), {needed} could")
    if row["could_have_seen"] is False:
        parts.append(f"could not have seen the published {format_effect(row['published'], row['unit'])}")
    if row["missing"]:
        parts.append(f"missing: {row['missing']}")
    return parts


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def format_effect(value: float, unit: str) -> str:
    """A signed difference: two decimals of a point, three of anything else, `-` for one that is missing or infinite."""
    return f"{value:+.{2 if unit == 'points' else 3}f}" if math.isfinite(value) else "-"


def format_interval(low: float, high: float, unit: str) -> str:
    return f"[{format_effect(low, unit)}, {format_effect(high, unit)}]"


def format_p(row: Mapping[str, Any]) -> str:
    """The p-value that decides a row, with its kind."""
    side = "" if row["alternative"] == "two-sided" else " one-sided"
    return f"p{side} {row['p']:.2g}" if row["is_primary"] else f"Holm p{side} {row['p_holm']:.2g}"


def format_mean(mean: float, sd: float, unit: str) -> str:
    """A mean over seeds with its standard deviation, if there is one."""
    digits = 2 if unit == "points" else 3
    return "-" if math.isnan(mean) else f"{mean:.{digits}f}" + ("" if math.isnan(sd) else f" ± {sd:.{digits}f}")


def published_sources(table: pd.DataFrame) -> list[str]:
    """A line for each contrast that something is published about: the effect, if it has a size, and where it stands."""
    rows = table.loc[table["source"] != ""].to_dict("records")
    sizes = [f" {format_effect(row['published'], row['unit'])}" if math.isfinite(row["published"]) else "" for row in rows]
    return [f"published{size} for {row['factor']}: {row['contrast']}: {row['source']}" for row, size in zip(rows, sizes, strict=True)]


def reading_notes(table: pd.DataFrame) -> list[str]:
    """How the table of effects is to be read, in sentences that are true of it."""
    exact = set(table.loc[table["n_seeds"] > 0, "is_exact"])
    test = {frozenset({True}): "exact sign flips", frozenset({False}): "random sign flips"}.get(frozenset(exact), "sign flips")
    before = set(table.loc[table["is_primary"], "num_trials_before"])
    named = ", named before the first trial of its arms" if before == {0} else ""
    notes = [
        "effect: contrast paired by seed and test image, 95 % interval over both",
        f"p: {test} over seeds",
        f"primary: one contrast of each factor{named}; the others are Holm-corrected per factor and outcome",
        "no harm, no difference: 90 % interval within the margin, not corrected for their number",
        "MDE: found with 80 % power, over seeds by sign flips of normal differences | over images by a t-test; -: none is",
    ]
    majority = table["majority_pct"].dropna()
    if len(majority):
        notes.append(f"always guessing the most frequent class of the test set: {majority.iloc[0]:.2f} % top-1")
    return notes


def levels_text(levels: pd.DataFrame) -> str:
    """A line per level: mean and standard deviation over seeds of the first outcomes, in percent for accuracies."""
    outcomes = list(dict.fromkeys(levels["outcome"]))[:_MAX_LEVEL_OUTCOMES]
    lines = [f"{'mean ± sd over seeds':<{_NAME_WIDTH}}" + "".join(f"{name:>20}" for name in outcomes) + f"{'seeds':>8}"]
    for _, rows in levels.groupby(["factor", "level"], sort=False):
        found = {row["outcome"]: row for row in rows.to_dict("records")}
        label = f"{rows['factor'].iloc[0]}: {rows['level'].iloc[0]}"
        cells = "".join(f"{format_mean(found[name]['mean'], found[name]['sd'], found[name]['unit']):>20}" for name in outcomes)
        lines.append(f"{label:<{_NAME_WIDTH}}{cells}{found[outcomes[0]]['n_seeds']:>8}")
    return "\n".join(lines) + "\n"


def effects_text(table: pd.DataFrame) -> str:
    """The table for a terminal, `TEXT_WIDTH` columns: a line of numbers and the verdict for each row, primary (`P`) first."""
    lines = [line for note in reading_notes(table) for line in textwrap.wrap(note, TEXT_WIDTH)]
    lines += ["", _line("  contrast (P = primary)", "outcome", "means", "effect", "p", "Holm", "MDE", "published", "seeds")]
    for row in table.loc[(table["n_seeds"] > 0) | table["is_primary"]].to_dict("records"):
        name = f"{'P' if row['is_primary'] else ' '} {row['factor']}: {row['contrast']}"
        cells = ["-"] * 7
        if row["n_seeds"]:
            cells = [
                " | ".join(format_effect(row[key], row["unit"])[1:] for key in ("mean", "baseline_mean")),
                f"{format_effect(row['effect'], row['unit'])} {row['unit']}".rstrip(),
                _narrow(row["p"]),
                "" if row["is_primary"] else _narrow(row["p_holm"]),
                " | ".join(format_effect(row[key], row["unit"]).lstrip("+") for key in ("mde_seeds", "mde_images")),
                format_effect(row["published"], row["unit"]),
                str(row["n_seeds"]),
            ]
        if len(name) > _NAME_WIDTH:
            lines += textwrap.wrap(name, TEXT_WIDTH, subsequent_indent="    ")
            name = ""
        lines.append(_line(name, row["outcome"], *cells))
        lines += textwrap.wrap(row["verdict"], TEXT_WIDTH, initial_indent="      ", subsequent_indent="      ")
    absent = table.loc[(table["n_seeds"] == 0) & ~table["is_primary"]]
    for (factor, outcome), rows in absent.groupby(["factor", "outcome"], sort=False):
        listed = "; ".join(f"{row['contrast']}{' (' + row['missing'] + ')' if row['missing'] else ''}" for row in rows.to_dict("records"))
        lines += textwrap.wrap(f"  not measured: {factor}, {outcome}: {listed}", TEXT_WIDTH, subsequent_indent="    ")
    for line in published_sources(table):
        lines += textwrap.wrap(f"  {line}", TEXT_WIDTH, subsequent_indent="    ")
    return "\n".join(lines) + "\n"


def _narrow(p: float) -> str:
    return f"{p:.2g}" if p >= 1e-4 else f"{p:.0e}"


def _line(name: str, outcome: str, *numbers: str) -> str:
    aligned = "".join(f"{number:>{width}}" for number, width in zip(numbers, _NUMBER_WIDTHS, strict=True))
    return f"{name:<{_NAME_WIDTH}} {outcome:<{TEXT_WIDTH - _NAME_WIDTH - 1 - sum(_NUMBER_WIDTHS)}}{aligned}"
