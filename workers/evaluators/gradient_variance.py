"""ZiCo and L-SWAG: how much the gradients of untrained weights vary from batch to batch.

ZiCo: Li et al., "ZiCo: Zero-shot NAS via Inverse Coefficient of Variation on Gradients", ICLR 2023, https://arxiv.org/abs/2301.11300.
With g_w the gradient of a batch's mean cross-entropy, E and Var over the batches, and l over the layers of `workers.proxies`,

    zico = sum_l ln sum_{w in l} E|g_w| / sqrt(Var|g_w|)

L-SWAG: Casarin et al., "L-SWAG: Layer-Sample Wise Activation with Gradients information for Zero-Shot NAS on Vision Transformers",
CVPR 2025, https://arxiv.org/abs/2505.07300. With S_m the signs that the outputs of activation m have over the images of one batch, a
string of B bits for each output,

    l_swag = (sum_l ln sum_{w in l} 1 / sqrt(Var|g_w|)) (sum_m number of different strings in S_m)

A weight whose gradient does not vary is left out, as in ZiCo's code, and so is a layer of nothing else.

Both are undefined for fewer than two batches and for networks without modules of ReLU, GELU or SiLU, which L-SWAG reads.

Unsure of ZiCo: its code takes the variance of g_w instead of |g_w| and does not reset gradients between batches; this follows the
equation. With two batches the deviation is ||a| - |b|| / 2, so a few weights with nearly equal gradients dominate their layer.

Unsure of L-SWAG: it has no public code, and we know the paper from summaries. They do not say whether batches or images are the samples
of Var, nor how strings of different activations are added up. The paper sums over an interval of layers, which it finds for each search
space from 1,000 random networks. `first_share` and `last_share` set an interval as shares of the depth; the default is all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from results.records import Metric
from space.model import Model
from space.registry import SpecError
from workers.batches import Batch
from workers.evaluator import Context, EvaluationError, evaluator
from workers.proxies import BatchSettings, gradients, in_chunks, labelled_batches, layer_weights, repeatable, scored_network, watching

ACTIVATIONS = ("ReLU", "ReLU6", "GELU", "GELUTanh", "SiLU")
"""Classes of PyTorch and timm, which has some of its own under the same names, whose output has the sign of its input."""

WORD = 64
"""Bits of a string that one integer holds."""


@dataclass(frozen=True, kw_only=True)
class GradientVarianceSettings(BatchSettings):
    """How many batches of how many images; l_swag looks at the layers between two shares of the depth."""

    num_batches: int = 2
    first_share: float = 0.0
    last_share: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.num_batches) is not int or self.num_batches < 2:
            raise ValueError(f"num_batches is {self.num_batches!r}; allowed: whole numbers from 2")
        if not 0.0 <= self.first_share < self.last_share <= 1.0:
            raise ValueError(
                f"first_share is {self.first_share!r} and last_share {self.last_share!r}; allowed: 0 <= first_share < last_share <= 1"
            )


def gradient_variance_scores(
    network: nn.Module, batches: Sequence[Batch], first_share: float = 0.0, last_share: float = 1.0
) -> dict[str, float]:
    """zico and l_swag of two or more batches; raises SpecError for a network without activations that l_swag knows."""
    activations = [module for module in network.modules() if type(module).__name__ in ACTIVATIONS]
    if not activations:
        raise SpecError(f"l_swag reads the signs of {', '.join(ACTIVATIONS)}; this network, ours or timm's, has no such module")
    patterns = SignPatterns()
    per_batch = [_absolute_gradients(network, batches[0], activations, patterns.add)]
    per_batch += [_absolute_gradients(network, batch) for batch in batches[1:]]
    zico, inverse = [], []
    for of_layer in zip(*per_batch, strict=True):
        # Not torch.std_mean, which takes thirty times as long over so few values.
        mean = _mean(of_layer)
        spread = _mean([(value - mean).square() for value in of_layer]).sqrt()
        one_over_spread = torch.where(spread > 0, 1 / spread, 0)
        zico.append((mean * one_over_spread).sum(dtype=torch.float64))
        inverse.append(one_over_spread.sum(dtype=torch.float64))
    trainability = _sum_of_logs(_between(inverse, first_share, last_share))
    expressivity = sum(_between(patterns.num_distinct(), first_share, last_share))
    return {"zico": _sum_of_logs(zico), "l_swag": trainability * expressivity}


class SignPatterns:
    """The strings of signs that the outputs of each activation have over images, one bit for each image."""

    def __init__(self) -> None:
        self._num_images = 0
        self._words: list[list[Tensor]] = []
        """For each activation in the order of the forward pass, integers `(outputs,)` of `WORD` bits."""

    def add(self, outputs: Sequence[Tensor]) -> None:
        """The outputs `(b, ...)` of all activations for the next images."""
        self._words = self._words or [[] for _ in outputs]
        for words, output in zip(self._words, outputs, strict=True):
            for number, positive in enumerate((output.flatten(1) > 0).unbind(0), start=self._num_images):
                if number % WORD == 0:
                    words.append(torch.zeros_like(positive, dtype=torch.int64))
                words[-1] |= positive.long() << number % WORD
        self._num_images += len(outputs[0])

    def num_distinct(self) -> list[int]:
        """The number of different strings of each activation."""
        return [_num_distinct(words) for words in self._words]


def _num_distinct(words: list[Tensor]) -> int:
    # Sorting integers takes a thirtieth of the time of sorting columns.
    return len(words[0].unique()) if len(words) == 1 else torch.stack(words).unique(dim=1).shape[1]


def _absolute_gradients(
    network: nn.Module, batch: Batch, activations: Sequence[nn.Module] = (), see: Callable[[list[Tensor]], None] = lambda outputs: None
) -> list[Tensor]:
    """|g_w| of each weight; `see` is given what the activations put out for each part of the batch."""
    weights = layer_weights(network)
    total = [torch.zeros_like(weight) for weight in weights]
    for images, labels in in_chunks(network, *batch):
        outputs: list[Tensor] = []
        with watching(activations, lambda module, inputs, output, outputs=outputs: outputs.append(output.detach())):
            logits = network(images)
        if outputs:
            see(outputs)
        loss = F.cross_entropy(logits, labels, reduction="sum") / len(batch.images)
        for sum_so_far, gradient in zip(total, gradients(loss, weights), strict=True):
            sum_so_far += gradient
    return [gradient.abs_() for gradient in total]


def _mean(values: Sequence[Tensor]) -> Tensor:
    return sum(values[1:], start=values[0]) / len(values)


def _between(values: Sequence[Any], first_share: float, last_share: float) -> Sequence[Any]:
    first, last = round(first_share * len(values)), round(last_share * len(values))
    return values[first : max(last, first + 1)]


def _sum_of_logs(sums: Sequence[Tensor]) -> float:
    varying = [value.log() for value in sums if value > 0]
    if not varying:
        raise EvaluationError("rank_deficient", "no gradient differs from batch to batch")
    return torch.stack(varying).sum().item()


@evaluator(
    "gradient_variance",
    metrics=(
        Metric("zico", "maximize", "ZiCo: mean over spread of the gradients of batches, logarithms summed over layers"),
        Metric("l_swag", "maximize", "L-SWAG: inverse spread of gradients times different activation patterns"),
    ),
    settings=GradientVarianceSettings,
    subject="proxy",
    uses_data=True,
    needs_dataset=True,
    memory_mb=1300,
)
def gradient_variance(model: Model, context: Context, settings: GradientVarianceSettings) -> Mapping[str, float]:
    """ZiCo and L-SWAG: how much gradients vary between labelled batches, before training."""
    batches = labelled_batches(model, context, batch_size=settings.batch_size, num_batches=settings.num_batches)
    with repeatable(context.device):
        return gradient_variance_scores(scored_network(model, context), batches, settings.first_share, settings.last_share)
