"""AZ-NAS: expressivity, progressivity and trainability of an untrained network, from Gaussian images.

Lee and Ham, "AZ-NAS: Assembling Zero-Cost Proxies for Network Architecture Search", CVPR 2024, https://arxiv.org/abs/2403.19232.
f_1, ..., f_2L are the tokens after each residual sum: after the mixer and after the feed-forward of each of the L blocks, as in the
authors' code for AutoFormer. With p the eigenvalues, scaled to the sum 1, of the covariance of the channels of f_l over all tokens of
all images; with g_l a draw of random signs, g'_l its product with the Jacobian of f_l by f_{l-1}, and s_l the largest singular value of
the mean over all tokens of the outer product of g'_l and g_l,

    e_l                  -sum_i p_i ln p_i
    az_expressivity      sum_l e_l
    az_progressivity     min_l e_l - e_{l-1}
    az_trainability      mean_l -s_l - 1 / s_l + 2              at most 0, where s_l is 1

The fourth, complexity, is the number of multiply-adds: metric gmacs of evaluator cost. `results.rank_aggregation` combines the four.

They are undefined for networks that name no blocks, whose blocks do not map tokens `(B, N, C)` to as many tokens, or that have a single
block.

Departures: where a downsampling lies between two blocks, f_{l-1} is the input of the second block (the paper folds pixels into channels).
The inner sum of a block is what enters its `norm2`, which holds for pre-norm blocks; of blocks without one f_l are the outputs alone.
The authors leave progressivity out for AutoFormer, whose width is constant; it is measured here all the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from results.records import Metric
from space.model import Model
from space.registry import SpecError
from workers.evaluator import Context, EvaluationError, evaluator
from workers.proxies import BatchSettings, blocks, eigenvalues, gaussian_batch, generator, repeatable, scored_network


def az_scores(network: nn.Module, images: Tensor, seed: int) -> dict[str, float]:
    """The three scores of images `(B, in_chans, H, W)`; the signs are drawn from streams of `seed`."""
    within = blocks(network, "az_nas")
    if len(within) < 2:
        raise SpecError("az_progressivity compares blocks; this network has one")
    watch = _Watch(seed=seed)
    handles = [handle for block in within for handle in watch.over(block)]
    network.requires_grad_(False)
    try:
        network(images)
    finally:
        network.requires_grad_(True)
        for handle in handles:
            handle.remove()
    entropies = torch.tensor(watch.entropies, dtype=torch.float64)
    return {
        "az_expressivity": entropies.sum().item(),
        "az_progressivity": entropies.diff().min().item(),
        "az_trainability": sum(watch.trainabilities) / len(watch.trainabilities),
    }


@dataclass
class _Watch:
    """Hooks that measure each block while it runs. Every block starts a graph of its own, so that one of them is held at a time."""

    seed: int
    entropies: list[float] = field(default_factory=list)
    trainabilities: list[float] = field(default_factory=list)
    _sums: list[Tensor] = field(default_factory=list)

    def over(self, block: nn.Module) -> Iterator[RemovableHandle]:
        yield block.register_forward_pre_hook(self._begin)
        if (norm := getattr(block, "norm2", None)) is not None:
            yield norm.register_forward_pre_hook(lambda _, inputs: self._sums.append(inputs[0]))
        yield block.register_forward_hook(self._end)

    def _begin(self, block: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        tokens = inputs[0].detach().requires_grad_()
        self._sums = [tokens]
        return (tokens, *inputs[1:])

    def _end(self, block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        self._sums.append(output)
        if not isinstance(output, Tensor) or any(tokens.ndim != 3 or tokens.shape != output.shape for tokens in self._sums):
            shapes = ", ".join(str(tuple(tokens.shape)) for tokens in self._sums)
            raise SpecError(f"az_nas takes blocks, ours or timm's, that map tokens (B, N, C) to as many; one of this network has {shapes}")
        for before, after in pairwise(self._sums):
            # The paper measures from one sum to the next, and before the first there is none.
            if self.entropies:
                self.trainabilities.append(self._trainability(before, after))
            self.entropies.append(entropy(after.detach()))
        return output.detach()

    def _trainability(self, before: Tensor, after: Tensor) -> float:
        draw = torch.randint(2, after.shape, generator=generator(self.seed, "signs", len(self.entropies)))
        signs = (2.0 * draw - 1.0).to(after)
        (product,) = torch.autograd.grad(after, before, signs, retain_graph=True)
        return trainability(product, signs)


def entropy(tokens: Tensor) -> float:
    """e_l of tokens `(B, N, C)`, nats."""
    rows = tokens.flatten(0, 1)
    rows = rows - rows.mean(dim=0)
    spectrum = eigenvalues(rows.T @ rows / len(rows), "the covariance of a block's tokens")
    if not spectrum.sum() > 0:
        raise EvaluationError("rank_deficient", "all tokens of a block are equal: their covariance is 0")
    return torch.special.entr(spectrum / spectrum.sum()).sum().item()


def trainability(product: Tensor, signs: Tensor) -> float:
    """-s - 1 / s + 2 of the signs and their product with the Jacobian, `(B, N, C)` both."""
    rows = signs.flatten(0, 1)
    matrix = product.flatten(0, 1).T @ rows / len(rows)
    if not matrix.isfinite().all():
        raise EvaluationError("non_finite", "the Jacobian of a block is not finite")
    s = torch.linalg.matrix_norm(matrix, ord=2).item()
    if s == 0.0:
        raise EvaluationError("rank_deficient", "the Jacobian of a block is 0")
    return -s - 1 / s + 2


@evaluator(
    "az_nas",
    metrics=(
        Metric("az_expressivity", "maximize", "AZ-NAS: entropy of the channels' spectrum, summed over residual sums"),
        Metric("az_progressivity", "maximize", "AZ-NAS: least growth of that entropy from one sum to the next"),
        Metric("az_trainability", "maximize", "AZ-NAS: how near the Jacobians' spectral norms are to 1"),
    ),
    settings=BatchSettings,
    subject="proxy",
    memory_mb=2000,
)
def az_nas(model: Model, context: Context, settings: BatchSettings) -> Mapping[str, float]:
    """AZ-NAS's expressivity, progressivity and trainability, from Gaussian images; its complexity is gmacs."""
    images = gaussian_batch(model, context, batch_size=settings.batch_size)
    with repeatable(context.device):
        return az_scores(scored_network(model, context), images, context.seed)
