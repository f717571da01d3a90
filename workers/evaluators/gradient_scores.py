"""Four scores of one forward and backward pass of a labelled batch, and GraSP, which takes a second backward pass.

With L the mean cross-entropy of the batch of B images, l_n that of image n, and W_l the weights of layer l (`workers.proxies`):

    grad_norm   sum_l |dL / dW_l|                                           Abdelfattah et al. 2021
    snip        sum_w |w dL/dw|                                             Lee et al. 2019, without its normalisation
    fisher      sum_c 1 / 2B sum_n (sum_p a_ncp dl_n / da_ncp)^2            Theis et al. 2018, Turner et al. 2020
    jacob_cov   -sum_i log(s_i + k) + 1 / (s_i + k),   k = 1e-5             Mellor et al. 2020, first version
    grasp       -sum_w w (H g)_w = -w' H g,   g = dL/dw,  H the Hessian     Wang et al. 2020

a_ncp is what layer l puts out for image n in channel c at position p (a pixel or a token), and s_i are the eigenvalues of the
correlation matrix of the rows d(sum of logits) / dx_n. Papers: https://arxiv.org/abs/1810.02340 (SNIP), 1801.05787 and 1906.04113
(Fisher), 2006.04647v1 (Jacobian covariance; later versions replace it by NASWOT), 2002.07376 (GraSP), 2101.08134 (all of them as scores
of whole networks, larger is better).

They are undefined for networks that do not classify colour images and, as the loss needs labels, for data without labels.

Unsure: GraSP's paper ranks weights and not networks, and its code divides the logits by a temperature of 200; here, as in Abdelfattah's
code, it is 1. The sign of the sum over all weights is that of Abdelfattah's code, which found it by experiment. For Fisher that code counts
a channel once for each of its weights, and in a transformer it would take tokens for channels; here both are as in the papers it cites.
Where a batch norm lets images depend on each other, dl_n / da_n is the derivative of the whole loss, and a row of the Jacobian that of all
logits.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from results.records import Metric
from space.model import Model
from workers.evaluator import Context, evaluator
from workers.proxies import (
    BatchSettings,
    eigenvalues,
    gradients,
    in_chunks,
    labelled_batches,
    layer_weights,
    repeatable,
    scored_network,
    watching,
    weighted_layers,
)

SMALLEST_EIGENVALUE = 1e-5
"""k of jacob_cov, which keeps it finite for images with equal Jacobians."""


def one_pass_scores(network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """grad_norm, snip, fisher and jacob_cov of images `(B, 3, H, W)` and labels `(B,)`."""
    B = len(images)
    weights, layers = layer_weights(network), weighted_layers(network)
    total = [torch.zeros_like(weight) for weight in weights]
    rows: list[Tensor] = []
    fisher = 0.0
    for some_images, some_labels in in_chunks(network, images, labels):
        inputs = some_images.detach().requires_grad_()
        outputs: list[tuple[nn.Conv2d | nn.Linear, Tensor]] = []
        with watching(layers, lambda layer, _, output, outputs=outputs: outputs.append((layer, output))):
            logits = network(inputs)
        rows.append(torch.autograd.grad(logits.sum(), inputs, retain_graph=True)[0].flatten(1))
        activations = [output for _, output in outputs]
        found = gradients(F.cross_entropy(logits, some_labels, reduction="sum"), [*weights, *activations])
        for sum_so_far, gradient in zip(total, found, strict=False):
            sum_so_far += gradient
        for (layer, output), gradient in zip(outputs, found[len(weights) :], strict=True):
            fisher += _channel_products(layer, output.detach() * gradient, len(inputs)).double().square().sum().item() / (2 * B)
    mean = [gradient / B for gradient in total]
    return {
        "grad_norm": sum(gradient.double().norm().item() for gradient in mean),
        "snip": sum((weight * gradient).double().abs().sum().item() for weight, gradient in zip(weights, mean, strict=True)),
        "fisher": fisher,
        "jacob_cov": jacobian_score(torch.cat(rows)),
    }


def _channel_products(layer: nn.Module, product: Tensor, num_images: int) -> Tensor:
    """The sum of a layer's product over all positions of an image, `(B, C)`; windows of attention lie in the order of their images."""
    if isinstance(layer, nn.Conv2d):
        return product.flatten(2).sum(dim=2)
    return product.reshape(num_images, -1, product.shape[-1]).sum(dim=1)


def jacobian_score(rows: Tensor) -> float:
    """jacob_cov of the Jacobians `(B, 3 H W)` of the images."""
    spectrum = eigenvalues(torch.corrcoef(rows.double()), "the correlation matrix of the Jacobians") + SMALLEST_EIGENVALUE
    return -(spectrum.log() + 1 / spectrum).sum().item()


def grasp_score(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """-w' H g of images `(B, 3, H, W)` and labels `(B,)`, by the equal -(H w)' g: both are sums over images, taken in one pass.

    H w + g is the gradient of w' g. A layer that puts out y = W x + b adds <dL/dy, y - b> to w' g, which spares two of nine matrix products
    of the size of a forward pass, since no gradient of a weight is differentiated.
    """
    weights, layers = layer_weights(network), weighted_layers(network)
    plain = [layer for layer in layers if type(layer).forward in (nn.Linear.forward, nn.Conv2d.forward)]
    # Any other layer, such as one that standardises its weights, need not be linear in them.
    others = {id(layer.weight) for layer in layers} - {id(layer.weight) for layer in plain}
    slope = [torch.zeros_like(weight) for weight in weights]
    change = [torch.zeros_like(weight) for weight in weights]
    # The fused attention kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        for some_images, some_labels in in_chunks(network, images, labels, num_graphs=4):
            outputs: list[tuple[nn.Conv2d | nn.Linear, Tensor]] = []
            with watching(plain, lambda layer, _, output, outputs=outputs: outputs.append((layer, output))):
                loss = F.cross_entropy(network(some_images), some_labels, reduction="sum") / len(images)
            found = gradients(loss, [*weights, *(output for _, output in outputs)], create_graph=True)
            first, of_outputs = found[: len(weights)], found[len(weights) :]
            terms = [(gradient * _without_bias(*seen)).sum() for gradient, seen in zip(of_outputs, outputs, strict=True)]
            terms += [(gradient * weight).sum() for gradient, weight in zip(first, weights, strict=True) if id(weight) in others]
            for sums, parts in ((slope, first), (change, gradients(torch.stack(terms).sum(), weights))):
                for sum_so_far, part in zip(sums, parts, strict=True):
                    sum_so_far += part.detach()
    return -sum((g.double() * (d - g)).sum().item() for g, d in zip(slope, change, strict=True))


def _without_bias(layer: nn.Conv2d | nn.Linear, output: Tensor) -> Tensor:
    if layer.bias is None:
        return output
    return output - (layer.bias[:, None, None] if isinstance(layer, nn.Conv2d) else layer.bias)


@evaluator(
    "gradient_scores",
    metrics=(
        Metric("grad_norm", "maximize", "norm of the loss gradient, summed over layers"),
        Metric("snip", "maximize", "SNIP: |weight x gradient|, summed over weights"),
        Metric("fisher", "maximize", "Fisher: squared activation x gradient, summed over channels"),
        Metric("jacob_cov", "maximize", "spread of the images' Jacobians, from the spectrum of their correlations"),
    ),
    settings=BatchSettings,
    subject="proxy",
    uses_data=True,
    needs_dataset=True,
    memory_mb=1700,
)
def gradient_scores(model: Model, context: Context, settings: BatchSettings) -> Mapping[str, float]:
    """Gradient norm, SNIP, Fisher and Jacobian covariance of one labelled batch, before training."""
    (batch,) = labelled_batches(model, context, batch_size=settings.batch_size)
    with repeatable(context.device):
        return one_pass_scores(scored_network(model, context), *batch)


@evaluator(
    "grasp",
    metrics=(Metric("grasp", "maximize", "GraSP: -weight x Hessian x gradient, summed over weights"),),
    settings=BatchSettings,
    subject="proxy",
    uses_data=True,
    needs_dataset=True,
    memory_mb=1300,
)
def grasp(model: Model, context: Context, settings: BatchSettings) -> Mapping[str, float]:
    """GraSP of one labelled batch, before training: how the gradient would change if the weights shrank."""
    (batch,) = labelled_batches(model, context, batch_size=settings.batch_size)
    with repeatable(context.device):
        return {"grasp": grasp_score(scored_network(model, context), *batch)}
