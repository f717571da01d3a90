"""Models by name, and the reading of whatever a user may name a model by. Listing imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from space.family import NamedModel, NamedSupernet, families
from space.model import Model, kinds, model_from_json
from space.registry import SpecError, unknown_name
from space.search_space import SearchSpace
from space.supernet_space import SupernetSpace, read_space


def names() -> tuple[str, ...]:
    """The named models, family by family, smallest first within a family."""
    return tuple(_models())


def summary(name: str) -> str:
    """One line about a named model."""
    return _named(name).summary


def spaces() -> dict[str, Callable[..., SearchSpace]]:
    """The search spaces of all families by name; each is made with the keywords `img_size` and `num_classes`."""
    return {name: make for family in families.names() for name, make in families.get(family).spaces.items()}


def tables() -> dict[str, Callable[..., Model]]:
    """The readers of architectures in published tables, of all families by name (`Family.tables`)."""
    return {name: read for family in families.names() for name, read in families.get(family).tables.items()}


def supernets() -> dict[str, NamedSupernet]:
    """The supernets of all families by the name of their space."""
    return {name: make for family in families.names() for name, make in families.get(family).supernets.items()}


def supernet_space(text: str, *, img_size: int | None = None, num_classes: int | None = None) -> SupernetSpace:
    """The space of a supernet by its name or the path of its JSON file; None leaves the images or the classes as they are there.

    Raises SpecError with the nearest names, for a file that is no space, and for an image size that the networks do not take.
    """
    asked = {"img_size": img_size, "num_classes": num_classes}
    given = {name: value for name, value in asked.items() if value is not None}
    if text in (named := supernets()):
        return named[text].make(**given)
    path = Path(text)
    if path.suffix == ".json" or path.is_file():
        return read_space(path).resized(**given)
    raise SpecError(f"{unknown_name('supernet space', text, named)}; the path of a space's JSON is read too")


def resolve(text: str) -> Model:
    """The model that `text` names.

    A catalogue name; a family and a string in its notation (`as_vit:STRING`, at 224 pixels); a supernet and one of its subnets
    (`vit_resnas/tiny:STRING`, for the supernet's own images); a kind and what it reads (`timm:NAME`, with 1000 classes, at the image
    size of its pretrained weights); or the path of a JSON file that holds a spec, what
    `describe` writes, or a candidate, whose reported network is taken. Raises SpecError with the nearest names.
    """
    if text in (named := _models()):
        return named[text].make()
    prefix, colon, string = text.partition(":")
    if colon and prefix in (notations := _notations()):
        _, read = notations[prefix]
        return read(string)
    if colon and prefix in supernets():
        space = supernet_space(prefix)
        return space.subnet(space.read(string))
    path = Path(text)
    # Not `path.is_file`, which raises for a text that is too long for a path.
    if path.suffix == ".json" or os.path.isfile(path):
        return _read(path)
    return _named(text).make()


def explanation(text: str) -> tuple[str, ...]:
    """What each number of a method's string is, in lines; empty for a model that is named otherwise. Raises SpecError as `resolve` does."""
    prefix, colon, string = text.partition(":")
    if colon and prefix in supernets():
        space = supernet_space(prefix)
        return space.explain(space.read(string))
    explain = families.get(prefix).explain if colon and prefix in families.names() else None
    return tuple(explain(string)) if explain else ()


def _models() -> dict[str, NamedModel]:
    return {name: model for family in families.names() for name, model in families.get(family).models.items()}


def _notations() -> dict[str, tuple[str, Callable[[str], Model]]]:
    """By the word before the colon: how what follows is written, and what reads it."""
    of_families = {name: ("STRING", read) for name in families.names() if (read := families.get(name).read)}
    of_kinds = {name: (notation, kinds.get(name).read) for name in kinds.names() if (notation := kinds.get(name).notation)}
    return of_families | of_kinds


def _named(name: str) -> NamedModel:
    models = _models()
    if name not in models:
        notations = ", ".join(f"{prefix}:{notation}" for prefix, (notation, _) in _notations().items())
        raise SpecError(f"{unknown_name('model', name, models)}; {notations} and the path of a spec's JSON are read too")
    return models[name]


def _read(path: Path) -> Model:
    try:
        data = json.loads(path.read_text())
        for key in ("spec", "model"):
            if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
                data = data[key]
        return model_from_json(data)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, SpecError) as error:
        raise SpecError(f"{path}: {error}") from error
