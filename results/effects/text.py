"""The effects of a study in words: for a terminal, and as Markdown."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from results.columns import TEXT_WIDTH, Column, fitted
from results.effects.convergence import MAX_LOSS_FALL, MIN_EPOCHS
from results.effects.study import EFFECTS_FILE, Effects
from results.formats import count, format_effect, format_interval, format_loss_fall, format_mean

if TYPE_CHECKING:
    import pandas as pd

_NUMBER_WIDTHS = (15, 14, 8, 7, 14, 10, 6)


def effects_summary(effects: Effects, command: str = "", *, width: int = TEXT_WIDTH) -> str:
    """The levels, and every contrast on the outcomes that some contrast was made for; a last line counts the other rows.

    Outcomes of levels that do not fit `width` characters are left out and named. `command` shows the study's leaderboard.
    """
    command = command or f"python -m results.leaderboard {effects.study_name}"
    outcomes = {contrast.outcome for contrast in effects.design.contrasts}
    own = effects.table.loc[[outcome in outcomes for outcome in effects.table["outcome"]]]
    head = "\n".join(textwrap.wrap(f"{effects.study_name}/{effects.phase}, effects: {effects.registration}", TEXT_WIDTH))
    num_others = len(effects.table) - len(own)
    others = ""
    if num_others:
        others = f"{count(num_others, 'row')} on other outcomes in {EFFECTS_FILE} of the parent run and in this page:\n"
        others += f"{command} --html leaderboard.html\n"
    lines, left_out = levels_text(effects.levels, width)
    if left_out:
        note = f"left out for {width} columns: {', '.join(left_out)}"
        lines += "\n".join([*textwrap.wrap(note, min(width, TEXT_WIDTH)), f"all: {command} --phase {effects.phase} --wide\n"])
    return f"{head}\n\n{lines}\n{effects_text(own)}{others}"


def effects_markdown(effects: Effects) -> str:
    """The levels on the first outcome and the primary contrasts as tables of Markdown."""
    outcome = effects.design.outcomes[0].name
    lines = [f"| rank | level | {outcome}, mean ± sd | loss still fell | seeds | missing |", "|---:|---|---:|---:|---:|---|"]
    for row in _best_first(effects.levels).to_dict("records"):
        if row["outcome"] == outcome:
            cells = [_rank(row), f"{row['factor']}: {row['level']}", format_mean(row["mean"], row["sd"], row["unit"])]
            lines.append(f"| {' | '.join([*cells, format_loss_fall(row), str(row['n_seeds']), row['missing']])} |")
    lines += ["", "| primary contrast | outcome | effect | 95 % interval | p | seeds | verdict |", "|---|---|---:|---|---:|---:|---|"]
    for row in effects.table.loc[effects.table["is_primary"]].to_dict("records"):
        numbers = ["-", "-", "-"]
        if row["n_seeds"]:
            effect = f"{format_effect(row['effect'], row['unit'])} {row['unit']}".rstrip()
            side = "" if row["alternative"] == "two-sided" else " one-sided"
            numbers = [effect, format_interval(row["low"], row["high"], row["unit"]), f"{row['p']:.2g}{side}"]
        cells = [f"{row['factor']}: {row['contrast']}", row["outcome"], *numbers, str(row["n_seeds"]), row["verdict"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- {source}" for source in published_sources(effects.table))]).rstrip()


def published_sources(table: pd.DataFrame) -> list[str]:
    """A line for each contrast with a published source: the published effect, if the source states its size, and the source."""
    rows = table.loc[table["source"] != ""].to_dict("records")
    sizes = [f" {format_effect(row['published'], row['unit'])}" if math.isfinite(row["published"]) else "" for row in rows]
    return [f"published{size} for {row['factor']}: {row['contrast']}: {row['source']}" for row, size in zip(rows, sizes, strict=True)]


def reading_notes(table: pd.DataFrame) -> list[str]:
    """How to read this table of effects."""
    exact = set(table.loc[table["n_seeds"] > 0, "is_exact"])
    test = {frozenset({True}): "exact sign flips", frozenset({False}): "random sign flips"}.get(frozenset(exact), "sign flips")
    before = set(table.loc[table["is_primary"], "num_trials_before"])
    named = ", named before the first trial of its arms" if before == {0} else ""
    notes = [
        "effect: contrast paired by seed and test image, 95 % interval over both",
        f"p: {test} over seeds",
        f"primary: one contrast of each factor{named}; the others are Holm-corrected per factor and outcome",
        "no harm, no difference: 90 % interval within the margin, not corrected for their number",
        "MDE: smallest effect that is shown with 80 % power, by test at alpha / family size and interval together; -: none can be shown",
        f"not converged: an arm's training loss fell by more than {MAX_LOSS_FALL:g} nats from the third quarter of its epochs to the last, "
        f"or it has fewer than {MIN_EPOCHS} epochs",
    ]
    if table["is_converged"].isna().loc[table["n_seeds"] > 0].any():
        notes.append("some training losses were not kept: whether those arms converged is not known")
    majority = table["majority_pct"].dropna()
    if len(majority):
        notes.append(f"always guessing the most frequent class of the test set: {majority.iloc[0]:.2f} % top-1")
    return notes


def levels_text(levels: pd.DataFrame, width: int = TEXT_WIDTH) -> tuple[str, list[str]]:
    """A line per level, best first: mean and standard deviation over seeds of each outcome that fits, and the outcomes left out."""
    outcomes = list(dict.fromkeys(levels["outcome"]))
    first, *others = ([row for row in _best_first(levels).to_dict("records") if row["outcome"] == name] for name in outcomes)
    means = [[format_mean(row["mean"], row["sd"], row["unit"]) for row in rows] for rows in (first, *others)]
    columns = [
        Column("rank", [_rank(row) for row in first]),
        Column("level", [f"{row['factor']}: {row['level']}" for row in first], is_text=True),
        Column(outcomes[0], means[0]),
        Column("loss still fell", [format_loss_fall(row) for row in first]),
        Column("seeds", [str(row["n_seeds"]) for row in first]),
        *(Column(name, cells) for name, cells in zip(outcomes[1:], means[1:], strict=True)),
    ]
    lines, left_out = fitted(columns, width)
    rule = f"Means ± sd over seeds. A factor's levels are ranked by mean {outcomes[0]}; one that lacks a seed has no rank."
    return "\n".join([*textwrap.wrap(rule, min(width, TEXT_WIDTH)), "", *lines]) + "\n", left_out


def _best_first(levels: pd.DataFrame) -> pd.DataFrame:
    """The rows by factor, in each the levels by their rank on the first outcome, those without one last."""
    ranks = levels.loc[levels["outcome"] == levels["outcome"].iloc[0]].set_index(["factor", "level"])["rank"]
    factors = list(dict.fromkeys(levels["factor"]))
    of_level = [ranks[factor, level] for factor, level in zip(levels["factor"], levels["level"], strict=True)]
    return levels.assign(of_level=of_level, of_factor=levels["factor"].map(factors.index)).sort_values(
        by=["of_factor", "of_level"], kind="stable"
    )


def _rank(row: Mapping[Any, Any]) -> str:
    return "-" if math.isnan(row["rank"]) else str(int(row["rank"]))


def effects_text(table: pd.DataFrame) -> str:
    """The table for a terminal, `TEXT_WIDTH` columns: name, numbers and verdict of each row on lines of their own, primary (`P`) first."""
    lines = [line for note in reading_notes(table) for line in textwrap.wrap(note, TEXT_WIDTH)]
    lines += ["", "  contrast, outcome (P = primary)", _line("means", "effect", "p", "Holm", "MDE", "published", "seeds")]
    for row in table.loc[(table["n_seeds"] > 0) | table["is_primary"]].to_dict("records"):
        name = f"{'P' if row['is_primary'] else ' '} {row['factor']}: {row['contrast']}, {row['outcome']}"
        cells = ["-"] * 7
        if row["n_seeds"]:
            cells = [
                " | ".join(format_effect(row[key], row["unit"])[1:] for key in ("mean", "baseline_mean")),
                f"{format_effect(row['effect'], row['unit'])} {row['unit']}".rstrip(),
                _narrow(row["p"]),
                "" if row["is_primary"] else _narrow(row["p_holm"]),
                format_effect(row["mde"], row["unit"]).lstrip("+"),
                format_effect(row["published"], row["unit"]),
                str(row["n_seeds"]),
            ]
        lines += [*textwrap.wrap(name, TEXT_WIDTH, subsequent_indent="    "), _line(*cells)]
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


def _line(*numbers: str) -> str:
    aligned = "".join(f"{number:>{width}}" for number, width in zip(numbers, _NUMBER_WIDTHS, strict=True))
    return f"{'':{TEXT_WIDTH - sum(_NUMBER_WIDTHS)}}{aligned}"
