"""Any model of timm as a value: `TimmSpec`. Importing it imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from space.component import Scalar
from space.registry import SpecError, unknown_name
from space.spec import digest_of

_FIELDS = {"img_size", "in_chans", "num_classes", "drop_path_rate"}
_LOADING = {"model_name", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
_OTHER_OUTPUT = {"features_only", "scriptable", "exportable", "no_jit"}
_OWN_KEYWORDS = _FIELDS | _LOADING | _OTHER_OUTPUT
"""Keywords of `timm.create_model` that are fields of the spec, or load weights or change the output."""


@dataclass(frozen=True, kw_only=True)
class TimmSpec:
    """A model of timm by its name there, without a pretraining tag: images `(B, in_chans, img_size, img_size)` to logits.

    `options` are further keywords of `timm.create_model`, kept sorted: `(("patch_size", 2),)`. That the name and the options exist
    is checked when the network is built or counted.
    """

    kind: ClassVar[str] = "timm"

    name: str
    img_size: int
    in_chans: int = 3
    num_classes: int
    options: tuple[tuple[str, Scalar], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise SpecError(f"name is {self.name!r}; the name of a timm model is expected")
        for field in ("img_size", "in_chans", "num_classes"):
            value = getattr(self, field)
            if type(value) is not int or value < 1:
                raise SpecError(f"{field} is {value!r}; a whole number above 0 is needed")
        for option in self.options:
            match option:
                case (str(name), bool() | int() | float() | str()):
                    if name in _OWN_KEYWORDS:
                        raise SpecError(f"options: {name!r} cannot be an option; sizes are fields, weights are always fresh")
                case _:
                    raise SpecError(f"options: {option!r} is not a pair of a name and a number, truth value or string")
        names = [name for name, _ in self.options]
        if len(set(names)) < len(names):
            raise SpecError(f"options: {', '.join(sorted({name for name in names if names.count(name) > 1}))} is given twice")
        object.__setattr__(self, "options", tuple(sorted(tuple(option) for option in self.options)))

    @property
    def digest(self) -> str:
        """16 hex digits of the canonical JSON's SHA-256."""
        return digest_of(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """The canonical JSON object: `"model": "timm"` and the fields that differ from their default."""
        data: dict[str, Any] = {"model": self.kind, "name": self.name, "img_size": self.img_size, "num_classes": self.num_classes}
        if self.in_chans != 3:
            data["in_chans"] = self.in_chans
        return {**data, "options": dict(self.options)} if self.options else data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TimmSpec:
        """The spec of `to_json`'s object; raises SpecError saying which field is wrong."""
        if not isinstance(data, Mapping) or data.get("model") != "timm":
            raise SpecError('not the JSON of a timm model: an object with "model": "timm" is expected')
        values = {name: value for name, value in data.items() if name != "model"}
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name in values:
            if name not in fields:
                raise unknown_name("field", name, fields, "spec")
        missing = [name for name, field in fields.items() if name not in values and field.default is dataclasses.MISSING]
        if missing:
            raise SpecError(f"spec lacks {', '.join(missing)}")
        options = values.pop("options", {})
        if not isinstance(options, Mapping):
            raise SpecError(f"spec.options is {options!r}; an object is expected")
        try:
            return cls(**values, options=tuple(options.items()))
        except SpecError as error:
            raise SpecError(f"spec: {error}") from error
