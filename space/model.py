"""A model of either kind, read, built and asked about. Importing it imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from space.component import AttentionTap, TokenShape
from space.layout import layout
from space.registry import SpecError, unknown_name
from space.spec import ArchSpec
from space.timm_spec import TimmSpec, build_timm

if TYPE_CHECKING:
    from torch import nn

Model = ArchSpec | TimmSpec
"""What a trial can measure: a network of our components, or one of timm."""


def model_from_json(data: Any) -> Model:
    """The model of a `to_json` object of either kind; raises SpecError saying what is wrong in it."""
    kinds: dict[str, type[Model]] = {"arch": ArchSpec, "timm": TimmSpec}
    kind = data.get("model") if isinstance(data, Mapping) else None
    if not isinstance(kind, str):
        raise SpecError('not the JSON of a model: an object with "model": "arch" or "timm" is expected')
    if kind not in kinds:
        raise unknown_name("kind of model", kind, kinds)
    return kinds[kind].from_json(data)


def build_model(model: Model, *, seed: int, drop_path: float = 0.0) -> nn.Module:
    """The initialised network on the CPU, in training mode: a pure function of its arguments, global generators untouched.

    In an `ArchSpec` every tensor has a stream of its own, named by the seed and the path of its module, so that networks which
    differ in one part share all other initial weights; a timm model is drawn from one stream. `drop_path` is the stochastic depth
    of the last block. Raises SpecError for what cannot be built.
    """
    if isinstance(model, TimmSpec):
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"drop_path is {drop_path!r}; allowed: from 0 to below 1")
        return build_timm(model, seed=seed, drop_path=drop_path)
    from space.vit import build_seeded

    return build_seeded(model, seed=seed, drop_path=drop_path)


def require_arch(model: Model, what: str) -> ArchSpec:
    """The model as a network of our components; raises SpecError saying that `what` takes no other."""
    if isinstance(model, TimmSpec):
        raise SpecError(f"{what} takes networks of our components; {model.name!r} is a model of timm")
    return model


def supports_class_row(model: Model) -> str | None:
    """Why the network cannot give the class token's attention on the grid of patches in its last block; None if it can."""
    if isinstance(model, TimmSpec):
        return "models of timm give no attention"
    parts = [part for part in layout(model) if part.path.startswith(f"stages.{len(model.stages) - 1}.blocks.")]
    mixer = next(part for part in reversed(parts) if part.kind == "mixer")
    assert isinstance(mixer.shape, TokenShape)
    if not mixer.shape.has_class_token:
        return "there is no class token; add the prefix 'class_token'"
    if mixer.shape.grid is None:
        return "an earlier token reduction breaks the grid of patches up"
    offered = mixer.module_class.declaration.offers_tap
    if offered < AttentionTap.CLASS_ROW:
        return f"the last mixer, {mixer.component.name!r}, offers no attention tap"
    if mixer.tap > AttentionTap.CLASS_ROW:
        return f"the token reduction of the last block reads an attention tap of level {mixer.tap.name}"
    return None


def decay_exempt(model: nn.Module) -> set[str]:
    """Names of the parameters that get no weight decay: norms, biases and whatever else has one dimension, exponents of pooling
    among them, and what a module, ours or timm's, names in `no_weight_decay`: position tables, class and register tokens.
    """
    ndims = {name: parameter.ndim for name, parameter in model.named_parameters()}
    return {name for name, ndim in ndims.items() if ndim <= 1} | (_named_by(model, "no_weight_decay") & ndims.keys())


def exponent_parameters(model: nn.Module) -> set[str]:
    """Names of the exponents of pooling, which learn at a rate of their own (`Recipe.exponent_lr_scale`)."""
    return _named_by(model, "exponent_parameters")


def _named_by(model: nn.Module, method: str) -> set[str]:
    """The names that modules give to parameters of theirs by `method()`, as names in the whole model."""
    names: set[str] = set()
    for path, module in model.named_modules():
        if hasattr(module, method):
            names |= {f"{path}.{name}" if path else name for name in getattr(module, method)()}
    return names
