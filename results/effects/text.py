"""The effects of a study in words: for a terminal, and as Markdown."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING

from results.effects.convergence import MAX_LOSS_FALL
from results.effects.study import EFFECTS_FILE, Effects
from results.formats import count, format_effect, format_interval, format_loss_fall, format_mean

if TYPE_CHECKING:
    import pandas as pd

TEXT_WIDTH = 120
_NAME_WIDTH = 27
_NUMBER_WIDTHS = (15, 14, 8, 7, 14, 10, 6)
_MAX_LEVEL_OUTCOMES = 2


def effects_summary(effects: Effects) -> str:
    """The levels, and every contrast on the outcomes that some contrast was made for; a last line counts the other rows."""
    outcomes = {contrast.outcome for contrast in effects.design.contrasts}
    own = effects.table.loc[[outcome in outcomes for outcome in effects.table["outcome"]]]
    head = "\n".join(textwrap.wrap(f"{effects.study_name}/{effects.phase}, effects: {effects.registration}", TEXT_WIDTH))
    hint = f"python -m results.leaderboard {effects.study_name} --html FILE, or {EFFECTS_FILE} of the parent run"
    num_others = len(effects.table) - len(own)
    others = f"{count(num_others, 'row')} on other outcomes: {hint}\n" if num_others else ""
    return f"{head}\n\n{levels_text(effects.levels)}\n{effects_text(own)}{others}"


def effects_markdown(effects: Effects) -> str:
    """The levels on the first outcome and the primary contrasts as tables of Markdown."""
    outcome = effects.design.outcomes[0].name
    lines = [f"| level | {outcome}, mean ± sd | loss still fell | seeds | missing |", "|---|---:|---:|---:|---|"]
    for row in effects.levels.loc[effects.levels["outcome"] == outcome].to_dict("records"):
        mean = format_mean(row["mean"], row["sd"], row["unit"])
        lines.append(f"| {row['factor']}: {row['level']} | {mean} | {format_loss_fall(row)} | {row['n_seeds']} | {row['missing']} |")
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
        f"not converged: an arm's training loss fell by more than {MAX_LOSS_FALL:g} nats from the third quarter of its epochs to the last",
    ]
    if table["is_converged"].isna().loc[table["n_seeds"] > 0].any():
        notes.append("some training losses were not kept: whether those arms converged is not known")
    majority = table["majority_pct"].dropna()
    if len(majority):
        notes.append(f"always guessing the most frequent class of the test set: {majority.iloc[0]:.2f} % top-1")
    return notes


def levels_text(levels: pd.DataFrame) -> str:
    """A line per level: mean and standard deviation over seeds of the first outcomes, in percent for accuracies."""
    outcomes = list(dict.fromkeys(levels["outcome"]))[:_MAX_LEVEL_OUTCOMES]
    lines = [f"{'mean ± sd over seeds':<{_NAME_WIDTH}}" + "".join(f"{name:>20}" for name in outcomes)]
    lines[0] += f"{'loss still fell':>26}{'seeds':>8}"
    for _, rows in levels.groupby(["factor", "level"], sort=False):
        found = {row["outcome"]: row for row in rows.to_dict("records")}
        label = f"{rows['factor'].iloc[0]}: {rows['level'].iloc[0]}"
        cells = "".join(f"{format_mean(found[name]['mean'], found[name]['sd'], found[name]['unit']):>20}" for name in outcomes)
        lines.append(f"{label:<{_NAME_WIDTH}}{cells}{format_loss_fall(found[outcomes[0]]):>26}{found[outcomes[0]]['n_seeds']:>8}")
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
                format_effect(row["mde"], row["unit"]).lstrip("+"),
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
