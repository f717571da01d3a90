"""Any network of our components with a token reduction, in the blocks where its paper places it.

    reduced:evit,keep=0.7:deit_small
    reduced:diffrate,prune_to=197/196/...,merge_to=197/194/...:deit_small

First the reduction and its choices, then the network, as `describe` takes it; the numbers of a list are separated by `/`.
"""

from __future__ import annotations

from space import catalog
from space.component import Scalar
from space.family import Family, family
from space.model import require_arch
from space.reductions import placed
from space.registry import SpecError
from space.spec import ArchSpec


def read(text: str) -> ArchSpec:
    """The network that the notation names; raises SpecError saying what is wrong in it."""
    head, _, model = text.partition(":")
    reduction, *assignments = head.split(",")
    pairs = [assignment.partition("=") for assignment in assignments]
    if not model or not all(equals for _, equals, _ in pairs):
        raise SpecError(f"reduced:{text}; REDUCTION,CHOICE=VALUE,...:MODEL is expected, such as reduced:evit,keep=0.7:deit_small")
    choices = {name: [_value(item) for item in given.split("/")] if "/" in given else _value(given) for name, _, given in pairs}
    return placed(require_arch(catalog.resolve(model), f"token reduction {reduction!r}"), reduction, **choices)


def _value(text: str) -> Scalar:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@family("reduced")
def reduced() -> Family:
    """A network with a token reduction that needs no retraining."""
    return Family(read=read)
