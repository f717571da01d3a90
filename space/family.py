"""Families of named networks: what a file in `space/families/` registers.

    @family("deit")
    def deit() -> Family:
        ...

The function is called once, when the registry imports its file. A family's file imports no torch, so that listing stays fast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from space.model import Model
from space.registry import Registry
from space.search_space import SearchSpace
from space.supernet_space import SupernetSpace


@dataclass(frozen=True, kw_only=True)
class NamedModel:
    """A model of the catalogue: one line about it, and the function that makes its spec."""

    summary: str
    make: Callable[[], Model]


@dataclass(frozen=True, kw_only=True)
class NamedSupernet:
    """A supernet of the catalogue: one line about it, and the function that makes the space of its subnets.

    The function takes the keywords `img_size` and `num_classes`, each with a default of its own.
    """

    summary: str
    make: Callable[..., SupernetSpace]


@dataclass(frozen=True, kw_only=True)
class Family:
    """Networks that belong together: those with a name, those with a notation, and the spaces they are searched in.

    `read` makes the model of what a user types after `FAMILY:`; it raises SpecError saying what is allowed. `explain` says in
    lines of at most 80 characters what each number of such a string is. `spaces` are functions by the name of the space they make; they
    take the keywords `img_size` and `num_classes`. `tables` are readers of architectures as
    published tables write them: a JSON object and those keywords to a model; they raise SpecError saying what is wrong.
    `supernets` stand under the name of their space.
    """

    models: Mapping[str, NamedModel] = field(default_factory=dict)
    """By name, smallest first."""
    read: Callable[[str], Model] | None = None
    explain: Callable[[str], Sequence[str]] | None = None
    spaces: Mapping[str, Callable[..., SearchSpace]] = field(default_factory=dict)
    tables: Mapping[str, Callable[..., Model]] = field(default_factory=dict)
    supernets: Mapping[str, NamedSupernet] = field(default_factory=dict)


families: Registry[Family] = Registry("family", package="space.families")


def family(name: str) -> Callable[[Callable[[], Family]], Callable[[], Family]]:
    """Register the `Family` that the function makes; `name` is the word before the colon of its notation."""

    def register(make: Callable[[], Family]) -> Callable[[], Family]:
        families.add((name,), make())
        return make

    return register
