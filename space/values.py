"""Values and choices of an axis, and both as a user writes them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from space.component import Scalar
from space.registry import SpecError

WORDS = {int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class Interval:
    """The real numbers from `low` to `high`, drawn evenly, or evenly in their logarithm with `log`.

    Raises SpecError unless `low` is below `high` and, for a logarithm, above 0.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            raise SpecError(f"{self}: an interval goes from a number up to a larger one")
        if self.log and self.low <= 0:
            raise SpecError(f"{self}: a logarithm needs numbers above 0")

    def __contains__(self, value: object) -> bool:
        return isinstance(value, float | int) and not isinstance(value, bool) and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.low}..{self.high}{':log' if self.log else ''}"

    def at(self, share: float) -> float:
        """The number at `share` of the way, from 0 to 1."""
        if self.log:
            return min(self.high, self.low * (self.high / self.low) ** share)
        return min(self.high, self.low + (self.high - self.low) * share)


Choices = tuple[Scalar, ...] | range | Interval


def parse_value(text: str, hint: Any, where: str) -> Any:
    """The value in `text`, of type `hint`: bool, int, float, str or a Literal; raises SpecError saying `where` and what is allowed."""
    if get_origin(hint) is Literal:
        allowed = get_args(hint)
        if text not in allowed:
            raise SpecError(f"{where} is {text!r}; allowed: {', '.join(map(str, allowed))}")
        return text
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise SpecError(f"{where} is {text!r}; allowed: true, false")
        return text.lower() == "true"
    try:
        return hint(text)
    except ValueError as error:
        raise SpecError(f"{where} is {text!r}; {WORDS.get(hint, hint.__name__)} is expected") from error


def value_text(value: Scalar) -> str:
    """The value as `parse_value` reads it."""
    return str(value).lower() if isinstance(value, bool) else f"{value:.6g}" if isinstance(value, float) else str(value)


def parse_choices(text: str, hint: Any, where: str) -> Choices:
    """The choices in `text`: `A,B,C`; `A..B`, whole numbers or an interval of real ones; `A..B:log`, an interval in its logarithm.

    Raises SpecError saying `where` and what is allowed.
    """
    first, dots, rest = text.partition("..")
    if not dots:
        return distinct(tuple(parse_value(item.strip(), hint, where) for item in text.split(",")), where)
    last, colon, scale = rest.partition(":")
    if hint not in (int, float) or (colon and (hint is not float or scale != "log")):
        allowed = {int: "A..B or a list A,B,C", float: "A..B, A..B:log or a list A,B,C"}.get(hint, "a list A,B,C")
        raise SpecError(f"{where} is {text!r}; allowed: {allowed}")
    low, high = (parse_value(end.strip(), hint, where) for end in (first, last))
    try:
        if hint is float:
            return Interval(low, high, log=bool(colon))
    except SpecError as error:
        raise SpecError(f"{where} is {error}") from error
    if low >= high:
        raise SpecError(f"{where} is {text!r}; a range goes from a number up to a larger one")
    return range(low, high + 1)


def distinct(choices: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    """The choices; raises SpecError for one that stands there twice."""
    for index, choice in enumerate(choices):
        if choice in choices[:index]:
            raise SpecError(f"{where} has {choice} twice")
    return choices
