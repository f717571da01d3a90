"""Any model of timm as a value: `TimmSpec`, and the network that it names with weights of its own. Importing it imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from space.component import Scalar
from space.randomness import stream
from space.registry import SpecError, unknown_name
from space.spec import digest_of

if TYPE_CHECKING:
    from torch import nn

_FIELDS = {"img_size", "in_chans", "num_classes", "drop_path_rate"}
_LOADING = {"model_name", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
_OTHER_OUTPUT = {"features_only", "scriptable", "exportable", "no_jit"}
_OWN_KEYWORDS = _FIELDS | _LOADING | _OTHER_OUTPUT
"""Keywords of `timm.create_model` that are fields of the spec, or would make something else than a fresh classifier of it."""


@dataclass(frozen=True, kw_only=True)
class TimmSpec:
    """A model of timm by its name there, without a pretraining tag: images `(B, in_chans, img_size, img_size)` to logits.

    `options` are further keywords of `timm.create_model`, kept sorted: `(("patch_size", 2),)`. That the name and the options exist
    is checked by what builds the network, `cost` among them.
    """

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
                        raise SpecError(f"options: {name!r} is not for them to set; a field of the spec does, or nothing")
                case _:
                    raise SpecError(f"options: {option!r} is not a pair of a name and a number, truth value or string")
        names = [name for name, _ in self.options]
        if len(set(names)) < len(names):
            raise SpecError(f"options: {', '.join(sorted({name for name in names if names.count(name) > 1}))} is given twice")
        object.__setattr__(self, "options", tuple(sorted(tuple(option) for option in self.options)))

    @property
    def depth(self) -> int:
        """Number of blocks, which timm's transformers and ConvNeXts name `blocks.0` and so on; 0 for models that name none."""
        from space.timm_cost import counted

        return counted(self).depth

    @property
    def digest(self) -> str:
        """16 hex digits of the canonical JSON's SHA-256."""
        return digest_of(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """The canonical JSON object: `"model": "timm"` and the fields that differ from their default."""
        data: dict[str, Any] = {"model": "timm", "name": self.name, "img_size": self.img_size, "num_classes": self.num_classes}
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


def build_timm(spec: TimmSpec, *, seed: int, drop_path: float = 0.0) -> nn.Module:
    """The network on the CPU, in training mode, its weights drawn as timm draws them from a stream of `seed`.

    PyTorch's global generators are left as they were. Raises SpecError for what timm has not or cannot build.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would reseed the GPUs too.
        torch.default_generator.manual_seed(stream(seed, "weights"))
        return create(spec, drop_path=drop_path)


def create(spec: TimmSpec, *, drop_path: float = 0.0) -> nn.Module:
    """The network with weights from PyTorch's global generator, on the device that is the default at the call."""
    import timm

    keywords: dict[str, Any] = {"in_chans": spec.in_chans, "num_classes": spec.num_classes, **dict(spec.options)}
    if pretrained_config(spec.name).fixed_input_size:
        keywords["img_size"] = spec.img_size
    # Given also when it is 0: some models of timm drop paths by default.
    keywords["drop_path_rate"] = drop_path
    try:
        try:
            return timm.create_model(spec.name, pretrained=False, **keywords)
        except TypeError as error:
            if drop_path or "'drop_path_rate'" not in str(error):
                raise
            del keywords["drop_path_rate"]
            return timm.create_model(spec.name, pretrained=False, **keywords)
    except Exception as error:  # The value of an option can break a constructor in any way.
        unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        match unexpected and unexpected[1]:
            case "drop_path_rate":
                reason = "it has no drop path; allowed: drop_path 0"
            case str(name) if name in dict(spec.options):
                reason = f"it has no option {name!r}"
            case _:
                reason = f"{type(error).__name__}: {error}" + (f"; options: {dict(spec.options)}" if spec.options else "")
        raise SpecError(f"timm model {spec.name!r} cannot be built: {reason}") from error


def pretrained_config(name: str) -> Any:
    """timm's `PretrainedCfg` of a model, which says its usual input size; raises SpecError with the nearest names."""
    import timm

    known = timm.list_models()
    if name not in known:
        near = difflib.get_close_matches(name.partition(".")[0], known, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ";"
        raise SpecError(f"unknown timm model {name!r}{hint} timm.list_models() names all {len(known)}")
    return timm.get_pretrained_cfg(name)
