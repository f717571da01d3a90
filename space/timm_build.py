"""The network of a `TimmSpec`, with weights of its own. Importing it imports no torch."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Any

from space.randomness import stream
from space.registry import SpecError
from space.timm_spec import TimmSpec

if TYPE_CHECKING:
    from torch import nn


def build_timm(spec: TimmSpec, *, seed: int, drop_path: float = 0.0) -> nn.Module:
    """The network on the CPU, in training mode, its weights drawn as timm draws them from a stream of `seed`.

    PyTorch's global generators are left as they were. Raises SpecError for a model that timm does not have or cannot build.
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
