"""The layers of a network in the order of the forward pass, as timm numbers them: for rates that differ by layer, and for freezing."""

from __future__ import annotations

import re

from torch import nn

from space.registry import SpecError

BLOCK = re.compile(r"(^|\.)blocks(\.\d+)+\.")


def layer_numbers(network: nn.Module) -> dict[str, int]:
    """The number of the layer of each parameter, by its name: 0 for what comes before the blocks, the highest for the head.

    A norm or downsampling that follows a block counts to it. Raises SpecError for a network that does not say its layers (timm's
    `group_matcher`).
    """
    matcher = getattr(network, "group_matcher", None)
    if matcher is None:
        raise SpecError(f"recipe: layer_decay and freeze need a network that says its layers; {type(network).__name__} does not")
    from timm.models import group_parameters

    numbers = group_parameters(network, matcher(coarse=False), reverse=True)
    assert isinstance(numbers, dict)
    return numbers


def rate_scales(network: nn.Module, layer_decay: float) -> dict[str, float]:
    """What multiplies the learning rate of each parameter: 1 for the last layer, `layer_decay` times less for each layer before.

    Layer-wise decay of BEiT, https://arxiv.org/abs/2106.08254, appendix; `timm.optim.param_groups_layer_decay` scales in the same way.
    """
    if layer_decay == 1.0:
        return dict.fromkeys((name for name, _ in network.named_parameters()), 1.0)
    numbers = layer_numbers(network)
    last = max(numbers.values())
    return {name: layer_decay ** (last - number) for name, number in numbers.items()}


def freeze(network: nn.Module, num_blocks: int) -> None:
    """Keep the first `num_blocks` blocks and all before them as they are: no gradient, and evaluation mode for their norms and drop paths.

    Raises SpecError if there are not so many blocks.
    """
    if not num_blocks:
        return
    numbers = layer_numbers(network)
    blocks = sorted({number for name, number in numbers.items() if BLOCK.search(name)})
    if num_blocks > len(blocks):
        raise SpecError(f"recipe: freeze is {num_blocks}; the network has {len(blocks)} blocks")
    frozen = {name for name, number in numbers.items() if number <= blocks[num_blocks - 1]}
    for name, parameter in network.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    for path, module in network.named_modules():
        own = {f"{path}.{name}" if path else name for name, _ in module.named_parameters()}
        if own and own <= frozen:
            module.eval()
