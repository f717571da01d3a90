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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from results.records import Metric
from results.statistics import Alternative, holm, minimum_detectable_effect, paired_bootstrap, sign_flip_test, tost

if TYPE_CHECKING:
    import pandas as pd

TEXT_WIDTH = 120
_NAME_WIDTH = 30
_NUMBER_WIDTHS = (15, 9, 8, 8, 15, 10, 6)


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """The mean of `levels` of a factor minus `baseline`.

    `outcome` is what it was made for: there `alternative` (of the effect's sign, not of its being better) and `published`
    apply; on other outcomes the test is two-sided. `published` is the effect in the outcome's unit, percentage points for
    accuracies, as `source` states it.
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
    """One trial on the test images: `ids` and `labels` (N,) int64, each outcome (N,) float."""

    ids: np.ndarray
    labels: np.ndarray
    outcomes: Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One trial of an ablation: which level of which factor, its seed, and what it predicted."""

    factor: str
    level: str
    seed: int
    predictions: Predictions


def read_predictions(path: Path) -> Predictions:
    """The outcomes of a trial from its `predictions.npz` and from `robustness.npz` beside it, if there is one.

    `top1_pct` is 0 or 100 per image and `nll` in nats; a robustness curve `name` gives `<name>_auc`, the accuracy in percent
    averaged over the range of its levels (trapezoids). Raises ValueError for logits that are not finite and for curves of
    other images.
    """
    with np.load(path) as file:
        ids, labels, logits = file["ids"], file["labels"], file["logits"].astype(float)
    if not np.isfinite(logits).all():
        raise ValueError(f"{path}: logits of {(~np.isfinite(logits)).any(axis=1).sum()} images are not finite")
    logits -= logits.max(axis=1, keepdims=True)
    nll = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]
    outcomes = {"top1_pct": 100.0 * (logits.argmax(axis=1) == labels), "nll": nll}
    curves = path.with_name("robustness.npz")
    if curves.exists():
        with np.load(curves) as file:
            order = _positions(file["ids"], ids, str(curves), str(path))
            for name in sorted(set(file.files) - {"ids"}):
                if f"{name}_levels" in file.files:
                    levels = file[f"{name}_levels"].astype(float)
                    area = np.trapezoid(file[name].astype(float), levels, axis=1)
                    outcomes[f"{name}_auc"] = (100.0 * area / (levels[-1] - levels[0]))[order]
    return Predictions(ids=ids, labels=labels, outcomes=outcomes)


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


def effects_table(cells: Iterable[Cell], design: Design, *, seed: int = 0, num_resamples: int = 10_000) -> pd.DataFrame:
    """A row per contrast and outcome, primary ones first.

    factor, contrast, outcome, unit, goal; n_seeds, n_images, missing (which arms lack which seeds); mean and baseline_mean of
    the arms; effect, low, high (`calibrated` 95 % interval over seeds and images); p of the exact sign-flip test over
    seeds, smallest_p it could have had, p_holm and family_size (nan and 1 for primary rows), is_primary, rejected at the
    design's alpha; margin and equivalent_p (TOST); mde_seeds and mde_images, the effects found with 80 % power at the level
    a row is tested at (alpha over the family's size) against the spread over seeds and over images alone; published, source
    and could_have_seen (both MDEs are at most the published effect, and so many seeds can reject; None when none is published);
    verdict; majority_pct, the accuracy of always guessing the most frequent class of the test set.

    A seed counts where all arms have it. A row that was not measured stays in its family with p = 1: families were fixed
    before the run. Raises ValueError for a trial given twice and for arms tested on different images.
    """
    import pandas as pd

    trials: dict[tuple[str, str, int], Predictions] = {}
    for cell in cells:
        key = (cell.factor, cell.level, cell.seed)
        if key in trials:
            raise ValueError(f"two trials of factor {cell.factor!r}, level {cell.level!r}, seed {cell.seed}")
        trials[key] = cell.predictions
    rows = [_row(trials, contrast, outcome, design, seed, num_resamples) for contrast in design.contrasts for outcome in design.outcomes]
    for factor, outcome in dict.fromkeys((row["factor"], row["outcome"]) for row in rows):
        family = [row for row in rows if (row["factor"], row["outcome"]) == (factor, outcome) and not row["is_primary"]]
        adjusted = holm([1.0 if math.isnan(row["p"]) else row["p"] for row in family])
        for row, p in zip(family, adjusted, strict=True):
            row["p_holm"] = math.nan if math.isnan(row["p"]) else float(p)
    for row in rows:
        row["rejected"] = (row["p"] if row["is_primary"] else row["p_holm"]) <= design.alpha
        row["verdict"] = _verdict(row, design)
    table = pd.DataFrame(rows).astype({"could_have_seen": object})
    return table.sort_values(by="is_primary", ascending=False, kind="stable", ignore_index=True)


def _row(
    trials: Mapping[tuple[str, str, int], Predictions], contrast: Contrast, outcome: Metric, design: Design, seed: int, num_resamples: int
) -> dict[str, Any]:
    arms = {
        level: {trial: found for (factor, name, trial), found in trials.items() if (factor, name) == (contrast.factor, level)}
        for level in (contrast.baseline, *contrast.levels)
    }
    measured = {level: {trial for trial, found in arm.items() if outcome.name in found.outcomes} for level, arm in arms.items()}
    seeds = sorted(set.intersection(*measured.values()))
    lacking = {level: sorted(set.union(*measured.values()) - has) for level, has in measured.items()}
    is_own = outcome.name == contrast.outcome
    is_primary = contrast.is_primary and is_own
    unit = _unit(outcome.name)
    published = contrast.published if is_own else None
    row: dict[str, Any] = {
        "factor": contrast.factor,
        "contrast": contrast.text,
        "outcome": outcome.name,
        "unit": unit,
        "goal": outcome.goal,
        "n_seeds": len(seeds),
        "n_images": 0,
        "missing": "; ".join(f"{level} lacks seed {_some(np.array(absent))}" for level, absent in lacking.items() if absent),
        **dict.fromkeys(("mean", "baseline_mean", "effect", "low", "high", "p", "smallest_p", "p_holm"), math.nan),
        "family_size": design.family_size(contrast, outcome.name),
        "is_primary": is_primary,
        "rejected": False,
        "margin": design.margin_pct if unit == "points" else math.nan,
        **dict.fromkeys(("equivalent_p", "mde_seeds", "mde_images"), math.nan),
        "published": math.nan if published is None else published,
        "source": contrast.source if is_own else "",
        "could_have_seen": None,
        "verdict": "",
        "majority_pct": math.nan,
    }
    if not seeds:
        return row
    first = arms[contrast.baseline][seeds[0]]
    baseline, *treated = (_values(arm, outcome.name, seeds, first.ids, contrast, level) for level, arm in arms.items())
    mean = np.mean(treated, axis=0)
    row |= {"n_images": len(first.ids), "majority_pct": _majority_pct(first.labels)}
    row |= {"mean": float(mean.mean()), "baseline_mean": float(baseline.mean())}
    row |= _numbers(mean - baseline, design.alternative(contrast, outcome.name), design.alpha / row["family_size"], seed, num_resamples)
    if unit == "points" and len(seeds) > 1:
        row["equivalent_p"] = tost((mean - baseline).mean(axis=1), design.margin_pct)
    if published is not None:
        can_reject = row["smallest_p"] * row["family_size"] <= design.alpha
        row["could_have_seen"] = can_reject and max(row["mde_seeds"], row["mde_images"]) <= abs(published)
    return row


def _numbers(differences: np.ndarray, alternative: Alternative, alpha: float, seed: int, num_resamples: int) -> dict[str, float]:
    per_seed, per_image = differences.mean(axis=1), differences.mean(axis=0)
    interval = paired_bootstrap(differences, seed=seed, num_resamples=num_resamples)
    test = sign_flip_test(per_seed, alternative=alternative, seed=seed)
    # A one-sided test has the power of a two-sided one at twice its level.
    level = alpha if alternative == "two-sided" else 2 * alpha
    mde_seeds, mde_images = (
        minimum_detectable_effect(float(values.std(ddof=1)), len(values), alpha=level) if len(values) > 1 else math.inf
        for values in (per_seed, per_image)
    )
    return {
        "effect": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "p": test.p_value,
        "smallest_p": test.smallest_p,
        "mde_seeds": mde_seeds,
        "mde_images": mde_images,
    }


def _values(
    arm: Mapping[int, Predictions], outcome: str, seeds: Sequence[int], ids: np.ndarray, contrast: Contrast, level: str
) -> np.ndarray:
    """(S, N): an arm's outcome with its images in the order of `ids`."""
    other = f"{contrast.factor} = {contrast.baseline}, seed {seeds[0]}"
    return np.stack(
        [
            np.asarray(arm[seed].outcomes[outcome], dtype=float)[
                _positions(arm[seed].ids, ids, f"{contrast.factor} = {level}, seed {seed}", other)
            ]
            for seed in seeds
        ]
    )


def _unit(outcome: str) -> str:
    """Differences of percentages (accuracies and their averages over a curve) are points; an nll is in nats."""
    if outcome.endswith(("_pct", "_auc")):
        return "points"
    return "nats" if outcome.endswith("nll") else ""


def _majority_pct(labels: np.ndarray) -> float:
    return 100.0 * float(np.unique(labels, return_counts=True)[1].max()) / len(labels)


def _verdict(row: Mapping[str, Any], design: Design) -> str:
    if not row["n_seeds"]:
        return f"not measured: no seed has every arm ({row['missing'] or 'no trial yet'})"
    unit = f" {row['unit']}" if row["unit"] else ""
    interval = f"interval [{format_effect(row['low'], row['unit'])}, {format_effect(row['high'], row['unit'])}]"
    if row["n_seeds"] == 1:
        interval += " over images only"
    test = f"p {row['p']:.2g}" if row["is_primary"] else f"Holm p {row['p_holm']:.2g}"
    if row["rejected"]:
        is_better = (row["effect"] > 0) == (row["goal"] == "maximize")
        size = format_effect(abs(row["effect"]), row["unit"])[1:]
        parts = [f"{'better' if is_better else 'worse'} by {size}{unit}: {interval}, {test}"]
    elif row["low"] <= 0 <= row["high"]:
        parts = [f"no difference shown: {interval}, {test}"]
    else:
        parts = [f"undecided: {interval} excludes 0, {test} does not reject"]
    smallest = row["smallest_p"] * row["family_size"]
    if smallest > design.alpha and not row["rejected"]:
        seeds = "1 seed" if row["n_seeds"] == 1 else f"{row['n_seeds']} seeds"
        needed = row["n_seeds"] + math.ceil(math.log2(smallest / design.alpha))
        held = f"smallest {'p' if row['is_primary'] else 'Holm p'} {min(smallest, 1):.2g}"
        parts.append(f"{seeds} cannot reject at {design.alpha:g} ({held}), {needed} could")
    if row["equivalent_p"] <= design.alpha:
        parts.append(f"within +-{row['margin']:g}{unit} (TOST p {row['equivalent_p']:.2g})")
    if row["could_have_seen"] is False:
        parts.append(f"could not have seen the published {format_effect(row['published'], row['unit'])}")
    return "; ".join(parts)


def format_effect(value: float, unit: str) -> str:
    """A signed difference: two decimals of a point, three of anything else, `-` for a missing one."""
    return "-" if math.isnan(value) else f"{value:+.{2 if unit == 'points' else 3}f}"


def effects_text(table: pd.DataFrame) -> str:
    """The table for a terminal, `TEXT_WIDTH` columns: a line of numbers and the verdict for each row, primary (`*`) first."""
    lines = [
        "effect = contrast paired by seed and test image, 95 % interval over both; p = exact sign flips over seeds; * = primary,",
        "named before the run, others Holm-corrected per factor and outcome; MDE = seen with 80 % power, over seeds | images",
    ]
    majority = table["majority_pct"].dropna()
    if len(majority):
        lines.append(f"always guessing the most frequent class of the test set: {majority.iloc[0]:.2f} % top-1")
    lines += ["", _line("  contrast", "outcome", "means", "effect", "p", "Holm", "MDE", "published", "seeds")]
    for row in table.loc[(table["n_seeds"] > 0) | table["is_primary"]].to_dict("records"):
        name = f"{'*' if row['is_primary'] else ' '} {row['factor']}: {row['contrast']}"
        cells = ["-"] * 7
        if row["n_seeds"]:
            cells = [
                " | ".join(format_effect(row[key], row["unit"])[1:] for key in ("mean", "baseline_mean")),
                format_effect(row["effect"], row["unit"]),
                f"{row['p']:.2g}",
                "" if row["is_primary"] else f"{row['p_holm']:.2g}",
                " | ".join(format_effect(row[key], row["unit"])[1:] for key in ("mde_seeds", "mde_images")),
                format_effect(row["published"], row["unit"]),
                str(row["n_seeds"]),
            ]
        if len(name) > _NAME_WIDTH:
            lines += textwrap.wrap(name, TEXT_WIDTH, subsequent_indent="    ")
            name = ""
        lines.append(_line(name, row["outcome"], *cells))
        verdict = row["verdict"] + (f" [{row['missing']}]" if row["missing"] and row["n_seeds"] else "")
        lines += textwrap.wrap(verdict, TEXT_WIDTH, initial_indent="      ", subsequent_indent="      ")
    absent = table.loc[(table["n_seeds"] == 0) & ~table["is_primary"]]
    for (factor, outcome), rows in absent.groupby(["factor", "outcome"], sort=False):
        lines += textwrap.wrap(f"  not measured: {factor}, {outcome}: {'; '.join(rows['contrast'])}", TEXT_WIDTH, subsequent_indent="    ")
    return "\n".join(lines) + "\n"


def _line(name: str, outcome: str, *numbers: str) -> str:
    aligned = "".join(f"{number:>{width}}" for number, width in zip(numbers, _NUMBER_WIDTHS, strict=True))
    return f"{name:<{_NAME_WIDTH}} {outcome:<{TEXT_WIDTH - _NAME_WIDTH - 1 - sum(_NUMBER_WIDTHS)}}{aligned}"
