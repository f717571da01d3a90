"""The models that a user lists: names, patterns over names, and the reason why one of them cannot run.

deit_tiny,timm:vit_*_patch16_224,as_vit:8,2,3|4,1,2|4,1,4|4,1,6|32,6fd1ab,spec.json
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from search.study import RunSettings
from space import catalog
from space.cost import cost
from space.model import Model, resized
from space.registry import SpecError

TIMM = "timm:"
WILDCARDS = frozenset("*?[")


@dataclass(frozen=True)
class ListedModel:
    """A model by the name that it was listed by."""

    name: str
    model: Model


@dataclass(frozen=True)
class ModelList:
    """The models in the order of the list, each once, and `(name, reason)` of every one that cannot run."""

    models: tuple[ListedModel, ...]
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """A line for the user about every model that was left out."""
        return tuple(f"left out: {name} ({reason})" for name, reason in self.left_out)


def listed_models(text: str, run: RunSettings, *, img_size: int | None = None, num_classes: int | None = None) -> ModelList:
    """The models that `text` lists, for images of `img_size` pixels and `num_classes` classes; None leaves a model its own.

    Names are separated by commas: all that a `MODEL` of the command line may be, and shell-style patterns, `timm:PATTERN` over the
    names of timm and `PATTERN` over those of the catalogue. A comma inside a method's string separates nothing. Two names of one network
    count once, under the first. What cannot be built at that size is left out with its reason. Raises SpecError for an empty list, an
    unknown name, a pattern that matches nothing, and a list of which nothing can run.
    """
    models: dict[str, ListedModel] = {}
    left_out: dict[str, str] = {}
    for name, model in _named(text, run):
        try:
            fitted = resized(model, img_size=img_size, num_classes=num_classes)
            cost(fitted)
        except SpecError as error:
            left_out.setdefault(name, str(error).split("\n")[0])
        else:
            models.setdefault(fitted.digest, ListedModel(name, fitted))
    if not models:
        name, reason = next(iter(left_out.items()))
        raise SpecError(f"--models {text!r}: none of {len(left_out)} can run, {name} because: {reason}")
    return ModelList(tuple(models.values()), tuple(left_out.items()))


def _named(text: str, run: RunSettings) -> Iterator[tuple[str, Model]]:
    pieces = [piece.strip() for piece in text.split(",")]
    if "" in pieces:
        raise SpecError(f"--models {text!r}: names are expected, separated by commas")
    while pieces:
        if WILDCARDS & set(pieces[0]):
            for name in _matching(pieces.pop(0)):
                yield name, run.model(name)
        else:
            name, model = _first(pieces, run)
            del pieces[: name.count(",") + 1]
            yield name, model


def _first(pieces: list[str], run: RunSettings) -> tuple[str, Model]:
    """The first model, with its name; a method's string goes on after a comma as far as it can be read."""
    is_string = ":" in pieces[0] and not pieces[0].startswith(TIMM)
    for length in range(len(pieces), 1, -1) if is_string else ():
        name = ",".join(pieces[:length])
        try:
            return name, catalog.resolve(name)
        except SpecError:
            continue
    # What is refused is shown up to the next piece that looks like a name.
    rest = itertools.takewhile(lambda piece: is_string and not piece[0].isalpha(), pieces[1:])
    name = ",".join([pieces[0], *rest])
    return name, run.model(name)


def _matching(pattern: str) -> list[str]:
    """The names that a pattern matches; raises SpecError if there are none."""
    if pattern.startswith(TIMM):
        import timm

        known, where = [f"{TIMM}{name}" for name in timm.list_models()], "timm.list_models()"
    else:
        known, where = list(catalog.names()), "the catalogue (timm:PATTERN looks in timm)"
    names = [name for name in known if fnmatch.fnmatchcase(name, pattern)]
    if not names:
        raise SpecError(f"--models: pattern {pattern!r} matches no name of {where}")
    return names
