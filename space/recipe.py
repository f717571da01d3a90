"""How a network is trained, as a value: `Recipe`, frozen, with a JSON form and a digest."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args, get_type_hints

from space.registry import SpecError, unknown_name
from space.spec import digest_of
from space.values import parse_value

Optimizer = Literal["adamw", "lion", "lamb", "sgd"]
Crop = Literal["none", "pad", "resized"]
Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Optimizer, schedule, regularisation and augmentation of one training; the data set is the trial's.

    `batch_size` counts images per optimizer step, over all devices and accumulated parts. `lr` and `weight_decay` are AdamW's:
    Lion divides `lr` and multiplies `weight_decay` by `lion_scale`, so their product stays (https://arxiv.org/abs/2302.06675,
    section 5), and exponents of pooling learn `exponent_lr_scale` times as fast. `warmup_epochs` of linear warm-up lead to a
    cosine that ends at `min_lr`. Zero turns off `clip_grad_norm`, `ema_decay`, `label_smoothing`, `random_erasing`.

    `crop` pads by an eighth and crops back (`pad`) or takes a random part of random shape (`resized`); it crops the stored square, or
    the full image when streaming. `randaugment` is a timm configuration string such as `rand-m9-mstd0.5-inc1`. `mixing` is `none` or the
    name of a registered mixing, which the training looks up. `mixing_grids` are the cells per side that a grid mixing draws from, empty for
    the method's own; `mixing_reference` follows the released code where it differs from the paper's idea. `precision` is that of the
    forward pass; `auto` is bf16 on a GPU that has it, else fp32.

    For a network that starts from trained weights: a layer learns `layer_decay` times as fast as the one after it, and the first `freeze`
    blocks stay as they are, with all that comes before them.
    """

    epochs: int
    seed: int = 0
    batch_size: int = 128
    num_accumulation: int = 1
    optimizer: Optimizer = "adamw"
    lr: float = 1e-3
    min_lr: float = 1e-5
    weight_decay: float = 0.05
    lion_scale: float = 10.0
    exponent_lr_scale: float = 10.0
    warmup_epochs: float = 2.0
    label_smoothing: float = 0.1
    drop_path: float = 0.0
    clip_grad_norm: float = 1.0
    ema_decay: float = 0.0
    crop: Crop = "pad"
    flip: bool = True
    randaugment: str = ""
    random_erasing: float = 0.0
    mixing: str = "none"
    mixing_prob: float = 1.0
    mixing_grids: tuple[int, ...] = ()
    mixing_reference: bool = False
    precision: Precision = "auto"
    compile: bool = False
    layer_decay: float = 1.0
    freeze: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.mixing_grids, tuple | list):
            raise SpecError(f"recipe: mixing_grids is {self.mixing_grids!r}; a list of whole numbers from 2 is expected")
        object.__setattr__(self, "mixing_grids", tuple(self.mixing_grids))
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, allowed = getattr(self, field.name), get_args(hints[field.name])
            if isinstance(value, int) and hints[field.name] is float and not isinstance(value, bool):
                object.__setattr__(self, field.name, float(value))
            elif allowed and field.name != "mixing_grids":
                if value not in allowed:
                    raise unknown_name(field.name, str(value), allowed, "recipe")
            elif field.name != "mixing_grids" and type(value) is not hints[field.name]:
                raise SpecError(f"recipe: {field.name} is {value!r}; {hints[field.name].__name__} is expected")
        for names, is_legal, meaning in _RANGES:
            for name in names.split():
                if not is_legal(getattr(self, name)):
                    raise SpecError(f"recipe: {name} is {getattr(self, name)!r}; allowed: {meaning}")
        if any(type(grid) is not int or grid < 2 for grid in self.mixing_grids):
            raise SpecError(f"recipe: mixing_grids is {self.mixing_grids!r}; allowed: whole numbers from 2")
        if self.batch_size % self.num_accumulation:
            raise SpecError(f"recipe: num_accumulation {self.num_accumulation} does not divide batch_size {self.batch_size}")
        if self.min_lr > self.lr:
            raise SpecError(f"recipe: min_lr {self.min_lr:g} is above lr {self.lr:g}")

    @property
    def optimizer_lr(self) -> float:
        """The learning rate that the optimizer is given."""
        return self.lr / self.lion_scale if self.optimizer == "lion" else self.lr

    @property
    def optimizer_weight_decay(self) -> float:
        """The weight decay that the optimizer is given."""
        return self.weight_decay * self.lion_scale if self.optimizer == "lion" else self.weight_decay

    def to_json(self) -> dict[str, Any]:
        """The fields that differ from their default, and `epochs`."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if getattr(self, field.name) != field.default}
        return {**fields, **({"mixing_grids": list(self.mixing_grids)} if self.mixing_grids else {})}

    @property
    def doubts(self) -> tuple[str, ...]:
        """What is legal and trains badly all the same, one sentence each, to be told before the training."""
        if self.warmup_epochs > self.epochs / 2:
            return (
                f"recipe: {min(self.warmup_epochs, self.epochs):g} of {self.epochs} epochs are warm-up, in which the learning rate only "
                f"rises to lr {self.lr:g}; more epochs or a shorter warm-up (warmup_epochs={self.epochs / 10:g}) train better",
            )
        return ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Recipe:
        """The recipe of `to_json`'s object; raises SpecError saying which field is wrong."""
        fields = {field.name for field in dataclasses.fields(cls)}
        for name in data:
            if name not in fields:
                raise unknown_name("field", name, fields, "recipe")
        if "epochs" not in data:
            raise SpecError("recipe lacks epochs")
        return cls(**data)

    @cached_property
    def digest(self) -> str:
        """16 hex digits of the canonical JSON's SHA-256; the seed is part of it."""
        return digest_of(self.to_json())


def parse_recipe_fields(text: str, where: str) -> dict[str, Any]:
    """The fields in `FIELD=VALUE,...`, grids separated by `/`; raises SpecError saying `where` and what is allowed."""
    fields: dict[str, Any] = {}
    for assignment in text.split(",") if text else ():
        name, equals, value = (word.strip() for word in assignment.partition("="))
        if not equals:
            raise SpecError(f"{where} {text!r}: FIELD=VALUE,... is expected")
        place, hint = f"{where}: {name}", recipe_field_type(name, where)
        is_grids = name == "mixing_grids"
        fields[name] = tuple(parse_value(grid, int, place) for grid in value.split("/")) if is_grids else parse_value(value, hint, place)
    return fields


def recipe_field_type(name: str, where: str) -> Any:
    """The declared type of a recipe's field; raises SpecError with the nearest names for one that it does not have."""
    hints = get_type_hints(Recipe)
    if name not in hints:
        raise unknown_name("field", name, hints, where)
    return hints[name]


_RANGES = (
    ("epochs batch_size num_accumulation", lambda value: value > 0, "whole numbers above 0"),
    ("seed freeze", lambda value: value >= 0, "whole numbers from 0"),
    ("layer_decay", lambda value: 0 < value <= 1, "above 0 to 1"),
    ("lr lion_scale exponent_lr_scale", lambda value: 0 < value < math.inf, "numbers above 0"),
    ("min_lr weight_decay warmup_epochs clip_grad_norm", lambda value: 0 <= value < math.inf, "numbers from 0"),
    ("label_smoothing drop_path ema_decay", lambda value: 0 <= value < 1, "from 0 to below 1"),
    ("random_erasing mixing_prob", lambda value: 0 <= value <= 1, "from 0 to 1"),
)
