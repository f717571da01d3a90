"""SynFlow and DSS: two scores of the weights alone, by one image of ones through the network of their absolute values.

SynFlow: Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow", NeurIPS 2020,
https://arxiv.org/abs/2006.05467; as a score of networks Abdelfattah et al. 2021, https://arxiv.org/abs/2101.08134. With R the sum of the
logits of an image of ones, all parameters replaced by their absolute values and all norms by the identity,

    synflow = ln sum_w |w dR/dw|                w over the weights of the layers of `workers.proxies`

Without norms the sum leaves the range of float32, so it is taken in float64 and its logarithm is reported, which ranks alike.

DSS: Zhou et al., "Training-free Transformer Architecture Search", CVPR 2022, https://arxiv.org/abs/2203.12217. With R as above, but norms
in place and in float32, over the blocks of the network,

    dss = sum over linear layers of attention  |dR/dW|_* |W|_*   +   sum over linear layers of feed-forwards  sum_w |w dR/dw|

where |.|_* is the nuclear norm, the sum of singular values.

SynFlow is undefined where its sum overflows float64, DSS for networks without blocks that hold attention. The conservation that both
start from is proved for networks that are linear in each layer; softmax and GELU are not.

Unsure of DSS: queries, keys and values are one matrix here, as in the authors' code, while the paper speaks of the linear layers of
attention. That code also counts the classifier, twice, which the paper does not mention and this does not do.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from results.records import Metric
from space.model import Model
from space.registry import SpecError
from workers.evaluator import Context, EvaluationError, NoSettings, evaluator
from workers.evaluators.as_vit import remove_norms
from workers.proxies import attention_linears, blocks, feed_forward_linears, gradients, layer_weights, repeatable, scored_network


def image_of_ones(model: Model, device: str) -> Tensor:
    """`(1, in_chans, H, W)`"""
    return torch.ones(1, model.in_chans, model.img_size, model.img_size, device=device)


def synflow_score(network: nn.Module, ones: Tensor) -> float:
    """ln sum_w |w dR/dw| for an image of ones `(1, in_chans, H, W)`; raises EvaluationError if it is not finite."""
    positive = _absolute(network).double()
    remove_norms(positive)
    weights = layer_weights(positive)
    # Fused kernels compute attention again in the backward pass, as exp(logit - log sum): at logits of 1e60 no digit of it is right.
    with sdpa_kernel(SDPBackend.MATH):
        found = gradients(positive(ones.double()).sum(), weights)
    total = sum((weight * gradient).abs().sum().item() for weight, gradient in zip(weights, found, strict=True))
    if not 0 < total < math.inf:
        raise EvaluationError("non_finite", f"SynFlow's sum is {total}; its logarithm is no score")
    return math.log(total)


def dss_score(network: nn.Module, ones: Tensor) -> float:
    """Synaptic diversity of attention plus saliency of feed-forwards; raises SpecError for a network without attention."""
    positive = _absolute(network)
    within = blocks(positive, "dss")
    attention = [layer.weight for block in within for layer in attention_linears(block)]
    feed_forward = [layer.weight for block in within for layer in feed_forward_linears(block)]
    if not attention:
        raise SpecError("dss is defined for networks with attention; the blocks of this network, ours or timm's, have none")
    found = gradients(positive(ones).sum(), [*attention, *feed_forward])
    if not all(gradient.isfinite().all() for gradient in found):
        raise EvaluationError("non_finite", "dss has gradients that are not finite")
    diversity = sum(_nuclear(gradient) * _nuclear(weight) for weight, gradient in zip(attention, found, strict=False))
    saliency = sum((w * g).double().abs().sum().item() for w, g in zip(feed_forward, found[len(attention) :], strict=True))
    return diversity + saliency


def _absolute(network: nn.Module) -> nn.Module:
    """A copy of the network with the absolute value of every parameter."""
    positive = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in positive.parameters():
            parameter.abs_()
    return positive


def _nuclear(matrix: Tensor) -> float:
    return torch.linalg.svdvals(matrix.detach()).double().sum().item()


@evaluator(
    "synflow",
    metrics=(Metric("synflow", "maximize", "SynFlow: logarithm of the weights' synaptic saliency"),),
    subject="proxy",
    memory_mb=1000,
)
def synflow(model: Model, context: Context, settings: NoSettings) -> Mapping[str, float]:
    """SynFlow: the logarithm of what an image of ones moves through the absolute weights, norms removed."""
    with repeatable(context.device):
        return {"synflow": synflow_score(scored_network(model, context), image_of_ones(model, context.device))}


@evaluator(
    "dss",
    metrics=(Metric("dss", "maximize", "DSS of TF-TAS: diversity of attention and saliency of feed-forwards"),),
    subject="proxy",
    memory_mb=1000,
)
def dss(model: Model, context: Context, settings: NoSettings) -> Mapping[str, float]:
    """DSS of TF-TAS: synaptic diversity of attention plus synaptic saliency of the feed-forward layers."""
    with repeatable(context.device):
        return {"dss": dss_score(scored_network(model, context), image_of_ones(model, context.device))}
