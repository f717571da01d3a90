"""The contract of every study's own flags: what each declares, and that a number outside its bound is refused by name."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

import pytest

from search.study import Options, flag_of, studies
from space.registry import SpecError

OPTIONS = [(name, each) for name in studies.names() for each in dataclasses.fields(studies.get(name).options)]
NUMBERS = [(name, each) for name, each in OPTIONS if type(each.default) in (int, float)]


def named(cases: list) -> list[str]:
    return [f"{study}{flag_of(each.name)}" for study, each in cases]


@dataclass(frozen=True, kw_only=True)
class Example(Options):
    rounds: int = field(default=2, metadata={"help": "rounds of training", "at_least": 1})
    lr: float = field(default=0.1, metadata={"help": "learning rate", "above": 0})
    note: str = field(default="", metadata={"help": "for the reader"})


@pytest.mark.parametrize(("study", "option"), OPTIONS, ids=named(OPTIONS))
def test_an_option_explains_itself_and_declares_nothing_that_is_not_read(study: str, option: dataclasses.Field):
    assert option.metadata["help"]
    assert option.metadata.keys() <= {"help", "metavar", "at_least", "above"}


@pytest.mark.parametrize(("study", "option"), NUMBERS, ids=named(NUMBERS))
def test_a_number_below_its_bound_is_refused_by_its_flag(study: str, option: dataclasses.Field):
    bound = option.metadata["above"] if "above" in option.metadata else option.metadata["at_least"] - 1
    with pytest.raises(SpecError, match=f"^{flag_of(option.name)} is {bound:g}; .*expected$"):
        studies.get(study).options(**{option.name: bound})


@pytest.mark.parametrize("lowest", [{"rounds": 1}, {"lr": 1e-12}])
def test_a_bound_allows_its_own_side(lowest: dict):
    assert dataclasses.asdict(Example(**lowest)).items() >= lowest.items()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rounds": 0}, "--rounds is 0; at least 1 is expected"),
        ({"lr": 0.0}, "--lr is 0; a number above 0 is expected"),
        ({"lr": math.nan}, "--lr is nan; a number above 0 is expected"),
        ({"lr": math.inf}, "--lr is inf; a number above 0 is expected"),
    ],
)
def test_the_message_says_flag_value_and_what_is_allowed(given: dict, message: str):
    with pytest.raises(SpecError) as refused:
        Example(**given)
    assert str(refused.value) == message
