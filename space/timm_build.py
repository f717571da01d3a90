"""The network of a `TimmSpec`, with weights of its own. Importing it imports no torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from space.randomness import stream
from space.registry import SpecError
from space.timm_spec import TimmSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from space.state_dicts import Fitted


def build_timm(spec: TimmSpec, *, seed: int, drop_path: float = 0.0) -> nn.Module:
    """The network on the CPU, in training mode, its weights drawn as timm draws them from a stream of `seed`.

    PyTorch's global generators are left as they were. Raises SpecError for a model that timm does not have or cannot build.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would reseed the GPUs too.
        torch.default_generator.manual_seed(stream(seed, "weights"))
        return create(spec, drop_path=drop_path)


def fit_to_timm(spec: TimmSpec, tensors: Mapping[str, Tensor]) -> Fitted:
    """The tensors of such a model for other images, patches or classes, fitted to it as timm fits pretrained ones.

    Raises SpecError naming what is missing, left over or of another shape.
    """
    import torch

    from space.state_dicts import Fitted, differences, replace_classifier, said_resampling

    with torch.device("meta"):
        own = create(spec).to("meta").state_dict()
    given = dict(tensors)
    classifiers = _classifiers(spec)
    changes = replace_classifier(given, own, classifiers)
    # timm loads strictly only if nothing is missing; what is drawn anew is taken out again below.
    fresh = {name: torch.zeros(own[name].shape) for name in own.keys() - given.keys() if name.startswith(classifiers)}
    try:
        with torch.random.fork_rng(devices=[]):
            fitted = create(spec, tensors=given | fresh).state_dict()
    except SpecError as error:
        raise SpecError(differences(given, own, fresh=classifiers) or str(error)) from error
    changes += [
        said_resampling(name, given[name], tensor) for name, tensor in fitted.items() if name in given and given[name].shape != tensor.shape
    ]
    return Fitted({name: tensor for name, tensor in fitted.items() if name not in fresh}, tuple(changes), has_classifier=not fresh)


def foldable_convolution(spec: TimmSpec) -> str | None:
    """The name of the first convolution, if it has a bias and pads nothing."""
    import torch

    name = pretrained_config(spec.name).first_conv
    if not isinstance(name, str):
        return None
    with torch.device("meta"):
        modules = dict(create(spec).named_modules())
    convolution = modules.get(name)
    # Its subclasses in timm pad as they run, or standardise their weights.
    is_plain = type(convolution) is torch.nn.Conv2d
    return name if is_plain and convolution.bias is not None and convolution.padding == (0, 0) else None


def _classifiers(spec: TimmSpec) -> tuple[str, ...]:
    """The beginnings of the names of the last layers."""
    names = pretrained_config(spec.name).classifier or ()
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names)) or ("head.",)


def create(spec: TimmSpec, *, drop_path: float = 0.0, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
    """The network on the device that is the default at the call, with weights from PyTorch's global generator.

    With `tensors` it has these instead, resampled as timm does it for its pretrained weights.
    """
    import timm

    keywords: dict[str, Any] = {"in_chans": spec.in_chans, "num_classes": spec.num_classes, **dict(spec.options)}
    if pretrained_config(spec.name).fixed_input_size:
        keywords["img_size"] = spec.img_size
    # Given also when it is 0: some models of timm drop paths by default.
    keywords["drop_path_rate"] = drop_path
    keywords["pretrained"] = tensors is not None
    if tensors is not None:
        keywords["pretrained_cfg_overlay"] = {"state_dict": dict(tensors), "num_classes": spec.num_classes, "custom_load": False}
    try:
        try:
            return timm.create_model(spec.name, **keywords)
        except TypeError as error:
            if drop_path or "'drop_path_rate'" not in str(error):
                raise
            del keywords["drop_path_rate"]
            return timm.create_model(spec.name, **keywords)
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
