"""The value that names an architecture: `ArchSpec` and its parts.

Specs are frozen, hashable and canonical from construction: components are checked against the registry, choices equal
to their default are dropped, and a part without effect is replaced by its simpler equal. Equal networks therefore
compare equal and share a `digest`, the id under which Optuna, MLflow and CSV files store them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from space.component import REQUIRED, Scalar, components, declaration
from space.registry import SpecError, unknown_name


@dataclass(frozen=True, init=False, repr=False)
class Component:
    """A registered part by name with chosen values: `Component("gem", p=3.0)`."""

    name: str
    items: tuple[tuple[str, Scalar], ...]

    def __init__(self, name: str, /, **choices: Scalar):
        items = tuple(sorted(choices.items()))
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "items", items)
        # Every count of a network looks its components up, so they are hashed once.
        object.__setattr__(self, "_hash", hash((name, items)))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]

    @property
    def choices(self) -> dict[str, Scalar]:
        return dict(self.items)

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in self.items)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _component_from_items, (self.name, self.items)


def _component_from_items(name: str, items: tuple[tuple[str, Scalar], ...]) -> Component:
    return Component(name, **dict(items))


@lru_cache(maxsize=65536)
def _canonical(kind: str, part: Component, types: tuple[type, ...]) -> Component | None:
    """`part` checked and simplified; `types` keys the cache, since True == 1 == 1.0 hash alike."""
    where = f"{kind} {part.name!r}"
    declared = declaration(kind, part.name)
    given = part.choices
    for name in given:
        if name not in declared.choices:
            raise unknown_name("choice", name, declared.choices, where)
    checked: dict[str, Scalar] = {}
    for name, choice in declared.choices.items():
        value = given.get(name, choice.default)
        if value is REQUIRED:
            raise SpecError(f"{where} needs a value for {name!r}")
        checked[name] = choice.check(value, f"{where}: {name}")
    simplify = getattr(components.get(kind, part.name), "canonical", None)
    if simplify is not None:
        simpler = simplify(**checked)
        if simpler is None:
            return None
        if simpler.name != part.name:
            return canonical(kind, simpler)
        checked = {**checked, **simpler.choices}
    return Component(part.name, **{name: value for name, value in checked.items() if value != declared.choices[name].default})


def canonical(kind: str, part: Component) -> Component | None:
    """The component as a spec stores it, None if it has no effect; raises SpecError for an unknown name or a value that is not allowed."""
    return _canonical(kind, part, tuple(type(value) for _, value in part.items))


def full_choices(kind: str, part: Component) -> dict[str, Scalar]:
    """Every choice of a canonical component, defaults filled in: the keywords its class is built with."""
    defaults = {name: choice.default for name, choice in declaration(kind, part.name).choices.items()}
    return defaults | part.choices


def _store_canonical(spec: Any, kinds: Mapping[str, str]) -> None:
    for attribute, kind in kinds.items():
        part = getattr(spec, attribute)
        stored = None if part is None else canonical(kind, part)
        object.__setattr__(spec, attribute, stored)
        if stored is None and attribute in _REQUIRED_PARTS:
            raise SpecError(f"{attribute} is missing; registered: {', '.join(components.names(kind))}")


_REQUIRED_PARTS = frozenset({"mixer", "feed_forward", "patch_embed", "norm", "pooling", "head"})


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """A pre-norm residual block: mixer, optional token reduction, feed-forward; `layer_scale` scales what both residuals add."""

    mixer: Component
    feed_forward: Component
    token_reduction: Component | None = None
    layer_scale: Component | None = None

    def __post_init__(self) -> None:
        _store_canonical(self, {kind: kind for kind in ("mixer", "feed_forward", "token_reduction", "layer_scale")})


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """Blocks of one width; `downsampling` leads to the next stage's width, and the last stage has none."""

    embed_dim: int
    blocks: tuple[BlockSpec, ...]
    downsampling: Component | None = None

    def __post_init__(self) -> None:
        _require_positive(self, "embed_dim")
        if not self.blocks:
            raise SpecError("a stage needs at least one block")
        _store_canonical(self, {"downsampling": "downsampling"})


@dataclass(frozen=True, kw_only=True)
class ArchSpec:
    """One Vision Transformer, from pixels to logits."""

    kind: ClassVar[str] = "arch"

    stages: tuple[StageSpec, ...]
    img_size: int
    in_chans: int = 3
    num_classes: int
    patch_embed: Component
    prefix: Component | None = None
    position: Component | None = None
    norm: Component = field(default_factory=lambda: Component("layer_norm"))
    pooling: Component
    head: Component = field(default_factory=lambda: Component("linear"))

    def __post_init__(self) -> None:
        _require_positive(self, "img_size", "in_chans", "num_classes")
        if not self.stages:
            raise SpecError("an architecture needs at least one stage")
        for index, stage in enumerate(self.stages):
            is_last = index == len(self.stages) - 1
            if is_last != (stage.downsampling is None):
                raise SpecError(f"stages[{index}]: every stage but the last needs a downsampling, and the last has none")
        _store_canonical(self, {kind: kind for kind in ("patch_embed", "prefix", "position", "norm", "pooling", "head")})

    @property
    def depth(self) -> int:
        """Number of blocks over all stages."""
        return sum(len(stage.blocks) for stage in self.stages)

    @property
    def digest(self) -> str:
        """16 hex digits of the canonical JSON's SHA-256."""
        return digest_of(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """The canonical JSON object: defaults left out, components as `[name, {choice: value}]`."""
        return {"model": self.kind, **_to_json(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ArchSpec:
        """The spec of `to_json`'s object; raises SpecError saying which field is wrong."""
        if not isinstance(data, Mapping) or data.get("model") != "arch":
            raise SpecError('not the JSON of an architecture: an object with "model": "arch" is expected')
        return _from_json(cls, {key: value for key, value in data.items() if key != "model"}, "spec")


def digest_of(data: Any) -> str:
    """16 hex digits of the SHA-256 of `data` as canonical JSON (sorted keys, no white space)."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def read_spec(path: Path) -> ArchSpec:
    """The spec in a JSON file; raises SpecError naming the file and what is wrong in it."""
    try:
        return ArchSpec.from_json(json.loads(path.read_text()))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, SpecError) as error:
        raise SpecError(f"{path}: {error}") from error


def with_img_size(spec: ArchSpec, img_size: int) -> ArchSpec:
    """The same architecture at another image size in pixels."""
    return dataclasses.replace(spec, img_size=img_size)


def _require_positive(spec: Any, *names: str) -> None:
    for name in names:
        value = getattr(spec, name)
        if type(value) is not int or value < 1:
            raise SpecError(f"{name} is {value!r}; a whole number above 0 is needed")


def _to_json(value: Any) -> Any:
    if isinstance(value, Component):
        return [value.name, value.choices] if value.items else [value.name]
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    if dataclasses.is_dataclass(value):
        return {f.name: _to_json(getattr(value, f.name)) for f in dataclasses.fields(value) if getattr(value, f.name) != _default(f)}
    return value


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


_NESTED: dict[str, type] = {"stages": StageSpec, "blocks": BlockSpec}
_NUMBERS = {"img_size", "in_chans", "num_classes", "embed_dim"}


def _from_json(cls: type, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise SpecError(f"{where} is {data!r}; an object is expected")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in data:
        if name not in fields:
            raise unknown_name("field", name, fields, where)
    missing = [n for n, f in fields.items() if n not in data and _default(f) is dataclasses.MISSING]
    if missing:
        raise SpecError(f"{where} lacks {', '.join(missing)}")
    values: dict[str, Any] = {}
    for name, value in data.items():
        place = f"{where}.{name}"
        if name in _NESTED:
            if not isinstance(value, list):
                raise SpecError(f"{place} is {value!r}; a list is expected")
            values[name] = tuple(_from_json(_NESTED[name], item, f"{place}[{i}]") for i, item in enumerate(value))
        elif name in _NUMBERS or value is None:
            values[name] = value
        else:
            values[name] = _component_from_json(value, place)
    try:
        return cls(**values)
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from error


def _component_from_json(value: Any, where: str) -> Component:
    match value:
        case [str(name)]:
            return Component(name)
        case [str(name), dict(choices)] if all(isinstance(choice, bool | int | float | str) for choice in choices.values()):
            return Component(name, **choices)
    raise SpecError(f'{where} is {value!r}; a component is written ["name", {{"choice": value}}]')
