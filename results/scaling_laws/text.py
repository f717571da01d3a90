"""A law in words and tables, for a terminal of 80 columns: the answer first."""

from __future__ import annotations

import textwrap

from results.columns import TEXT_WIDTH, Column, fitted
from results.formats import count, format_value
from results.scaling_laws.fitting import Laws
from results.scaling_laws.law import Form, Interval, Law, Parameter, Prediction
from results.scaling_laws.one_variable import LOG_LINEAR
from results.scaling_laws.two_variables import CHINCHILLA

DIGITS = 3
CONVENTIONAL_P = 0.05


def laws_text(laws: Laws) -> str:
    """The answer, the table of parameters, predictions, the comparison of forms, and what the numbers rest on."""
    law = laws.law
    blocks = [_wrapped(" ".join(_answer(law))), _parameter_table(law)]
    if laws.predictions:
        blocks.append("\n".join(_wrapped(prediction_words(law, one)) for one in laws.predictions))
    if len(laws.forms) > 1:
        blocks.append(_form_table(laws))
    return "\n\n".join([*blocks, "\n".join(_wrapped(line) for line in _notes(laws))])


def _answer(law: Law) -> list[str]:
    y, names, found = law.points.y_name, law.points.x_names, law.parameters
    if law.noise_sd is None:
        fitted_to = f"{count(len(law.points.distinct().counts), 'distinct point')} for {len(found)} parameters"
        return [f"Nothing is identified: {fitted_to} leave nothing to estimate the noise from. Replicates would, or a known noise (--sd)."]
    if law.form is LOG_LINEAR:
        return [f"{y} changes by {_value_words(found['d'])} where {names[0]} is e times as large."]
    powers = [_power_words(x, found[exponent], law.form) for exponent, x in zip(law.form.exponents, names, strict=True)]
    identified = [words for words in powers if words.startswith("as ")]
    is_falling = law.form is CHINCHILLA or law.best_fit["alpha"] < 0
    sentences = [f"{y} {'falls' if is_falling else 'grows'} {' and '.join(identified)}."] if identified else []
    sentences += [words for words in powers if words not in identified]
    floor = found.get("b") or found.get("E")
    if floor is not None:
        words = f"is {_value_words(floor)}" if floor.identified else f"is not identified: {range_words(floor.profile)} fits"
        sentences.append(f"The floor {words}.")
    return sentences


def _power_words(x: str, exponent: Parameter, form: Form) -> str:
    """`as patch^1.3 [1.2, 1.4]`, or the sentence that says that the exponent is not identified."""
    if exponent.value is None:
        return f"The exponent of {x} is not identified: {range_words(exponent.profile)} fits."
    if form is not CHINCHILLA:
        return f"as {x}^{_value_words(exponent)}"
    # The formula divides by the power.
    low, high = exponent.profile.low, exponent.profile.high
    turned = Interval(low=None if high is None else -high, high=None if low is None else -low)
    return f"as {x}^{_number(-exponent.value)} {interval_words(turned)}"


def _value_words(parameter: Parameter) -> str:
    return f"{_number(parameter.value)} {interval_words(parameter.profile)}"


def interval_words(interval: Interval) -> str:
    return "-" if interval.low is None and interval.high is None else f"[{_number(interval.low)}, {_number(interval.high)}]"


def range_words(interval: Interval) -> str:
    """`any value from 0 to 0.31`."""
    if interval.low is None and interval.high is None:
        return "any value"
    if interval.high is None:
        return f"any value from {_number(interval.low)} up"
    if interval.low is None:
        return f"any value up to {_number(interval.high)}"
    return f"any value from {_number(interval.low)} to {_number(interval.high)}"


def prediction_words(law: Law, prediction: Prediction) -> str:
    at = ", ".join(f"{name} = {value:g}" for name, value in zip(law.points.x_names, prediction.x, strict=True))
    if prediction.refused:
        return f"At {at}: refused, {prediction.refused}."
    inside = all(measured.min() <= value <= measured.max() for measured, value in zip(law.points.x.T, prediction.x, strict=True))
    interval = interval_words(Interval(low=prediction.low, high=prediction.high))
    return f"At {at} the curve is at {_number(prediction.value)} {interval}{'' if inside else ', an extrapolation if the form holds'}."


def _parameter_table(law: Law) -> str:
    names = list(law.parameters)
    found = list(law.parameters.values())
    columns = [
        Column(law.form.formula, names, is_text=True),
        Column("value", [_number(one.value) if one.identified else "not identified" for one in found]),
        Column("95 % profile", [interval_words(one.profile) for one in found], is_text=True),
        Column("95 % bootstrap", [interval_words(one.bootstrap) for one in found], is_text=True),
    ]
    return "\n".join(fitted(columns, TEXT_WIDTH)[0])


def _form_table(laws: Laws) -> str:
    forms = laws.forms
    columns = [
        Column("form", [law.form.formula for law in forms], is_text=True),
        Column("AICc", [f"{law.aicc.value:.1f}" if law.aicc.value is not None else "-" for law in forms]),
        Column("leave-one-out error", [_number(law.loo.value) for law in forms]),
    ]
    best = {title: one for title, name in (("AICc", "aicc"), ("Leave-one-out", "loo")) if (one := laws.best(name))}
    lines = fitted(columns, TEXT_WIDTH)[0]
    if len({one.form.name for one in best.values()}) == 1 and len(best) == 2:
        lines.append(_wrapped(f"Both prefer {best['AICc'].form.formula}."))
    elif best:
        lines.append(_wrapped("; ".join(f"{title} prefers {one.form.formula}" for title, one in best.items()) + "."))
    reasons = dict.fromkeys(
        f"No {title} of {law.form.formula}: {reason}."
        for law in forms
        for title, reason in (("AICc", law.aicc.reason), ("leave-one-out error", law.loo.reason))
        if reason
    )
    return "\n".join([*lines, *(_wrapped(reason) for reason in reasons)])


def _notes(laws: Laws) -> list[str]:
    law = laws.law
    m, y = len(law.points.distinct().counts), law.points.y_name
    of_what = f"log {y}" if len(law.points.x_names) == 2 else y
    lines = [f"{count(law.points.n, 'row')}, {m} distinct {' and '.join(law.points.x_names)}."]
    if law.noise_sd is not None:
        how = "as given" if law.is_noise_known else "estimated"
        lines[0] += f" Standard deviation of one training around the curve: {_number(law.noise_sd)} of {of_what}, {how}."
    if len(laws.forms) == 1:
        lines += [f"AICc {law.aicc.value:.1f}." if law.aicc.value is not None else f"AICc is not defined: {law.aicc.reason}."]
        loo = f"{_number(law.loo.value)} of {of_what}" if law.loo.value is not None else f"not defined: {law.loo.reason}"
        lines[-1] += f" Leave-one-out error: {loo}."
    if law.lack_of_fit_p is not None and law.lack_of_fit_p < CONVENTIONAL_P:
        lines.append(
            f"The points miss the curve by more than this noise explains (p = {law.lack_of_fit_p:.2g}): "
            "the intervals hold for the form, and the form may be wrong."
        )
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else format_value(value, digits=DIGITS)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, TEXT_WIDTH, break_long_words=False, break_on_hyphens=False)
