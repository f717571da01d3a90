"""The second opinion on every count: fvcore, with a handler for the attention operator that it lacks.

fvcore is blind to pow, exp, mean, softmax, GELU, unfolding and the like, and counts 5 per element of a LayerNorm.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def fvcore_macs(model: nn.Module, img_size: int, in_chans: int = 3) -> int:
    """What fvcore counts on one image `(1, in_chans, img_size, img_size)` in evaluation mode; the model's mode is restored."""
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    with _silence(), torch.no_grad():
        from fvcore.nn import FlopCountAnalysis

        try:
            analysis = FlopCountAnalysis(model.eval(), torch.zeros(1, in_chans, img_size, img_size, device=device))
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
            return int(analysis.set_op_handle(**fvcore_handlers()).total())
        finally:
            for module, training in modes.items():
                module.training = training


def fvcore_handlers() -> dict[str, Callable[[list[Any], list[Any]], Any]]:
    """Handlers by operator name, as `FlopCountAnalysis.set_op_handle` takes them."""
    return {"aten::scaled_dot_product_attention": _attention_macs}


def _attention_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Both products: queries `(..., N, D)` with keys `(..., M, D)`, and their weights with values `(..., M, E)`."""
    (*batch, N, D), (*_, M, _), (*_, E) = (value.type().sizes() for value in inputs[:3])
    return math.prod(batch) * N * M * (D + E)


@contextmanager
def _silence() -> Iterator[None]:
    logger = logging.getLogger("fvcore")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
