"""Mixing augmentations, one file for each. They are listed without importing torch; the contract is `Mixer` in `workers/mixing.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from space.registry import Registry, unknown_name

if TYPE_CHECKING:
    from workers.mixing import Mixer

mixings: Registry[type[Mixer]] = Registry("mixing", package="workers.mixings")
M = TypeVar("M", bound="type[Mixer]")


def mixing(name: str) -> Callable[[M], M]:
    """Register a `Mixer` class as the mixing `name` of a recipe."""

    def register(cls: M) -> M:
        mixings.add((name,), cls)
        return cls

    return register


def mixing_class(name: str) -> type[Mixer]:
    """The registered class; raises SpecError with the nearest names, `none` among them."""
    if name not in mixings.names():
        raise unknown_name("mixing", name, ("none", *mixings.names()), "recipe")
    return mixings.get(name)
