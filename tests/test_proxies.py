"""Training-free scores: equality with slow computations on small networks, what the papers claim, and what is refused."""

import copy
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from space.families import autoformer
from space.families.as_vit import Network, spec
from space.model import build_model
from space.registry import SpecError
from space.timm_spec import TimmSpec
from workers import proxies
from workers.batches import Batch
from workers.data import load_dataset
from workers.evaluator import Context, EvaluationError, evaluators, scores
from workers.evaluators.activation_scores import Moments, head_confidence_score, meco_score, w_pca_score
from workers.evaluators.az_nas import az_scores, entropy, trainability
from workers.evaluators.gradient_scores import SMALLEST_EIGENVALUE, grasp_score, jacobian_score, one_pass_scores
from workers.evaluators.gradient_variance import SignPatterns, gradient_variance_scores
from workers.evaluators.synaptic import dss_score, image_of_ones, synflow_score
from workers.proxies import (
    BatchSettings,
    gaussian_batch,
    generator,
    in_chunks,
    labelled_batches,
    layer_weights,
    unlabelled_batch,
    weighted_layers,
)

WINDOWED = spec(Network.parse("4,2,2|2,2,2|2,1,2|2,1,2|16,8"), img_size=64, num_classes=10)
CONVNEXT = TimmSpec(name="test_convnext", img_size=32, num_classes=10)
SCORES = ("gradient_scores", "grasp", "gradient_variance", "synflow", "dss", "az_nas", "meco", "w_pca", "head_confidence")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", img_size=8)


def draw_batch(num_images, img_size=8, seed=0, dtype=torch.float64):
    images = torch.randn(num_images, 3, img_size, img_size, generator=generator(seed, "images"), dtype=dtype)
    return Batch(images, torch.randint(10, (num_images,), generator=generator(seed, "labels")))


def network_of(model, seed=0):
    """In float64, so that a slow computation agrees to nearly all digits."""
    return build_model(model, seed=seed).double().eval()


class Standardised(nn.Conv2d):
    """A convolution that is not linear in its weights."""

    def forward(self, x):
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / weight.norm(), self.bias)


def two_layers(seed=0, convolution=nn.Conv2d):
    """Images of 16 pixels, a convolution and a linear layer: 48 weights, few enough for a dense Hessian."""
    network = nn.Sequential(convolution(3, 2, 2, stride=2), nn.GELU(), nn.Flatten(), nn.Linear(8, 3)).double()
    for index, parameter in enumerate(network.parameters()):
        nn.init.normal_(parameter, std=0.5, generator=generator(seed, index))
    batch = draw_batch(6, img_size=4)
    return network, batch.images, batch.labels % 3


def loss_of_weights(network, images, labels):
    """The mean cross-entropy as a function of one vector of all weights, and that vector."""
    names = [name for name, p in network.named_parameters() if any(p is weight for weight in layer_weights(network))]
    shapes = [network.get_parameter(name).shape for name in names]
    start = torch.cat([network.get_parameter(name).detach().flatten() for name in names])

    def loss(vector):
        parts = vector.split([shape.numel() for shape in shapes])
        replaced = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(functional_call(network, replaced, (images,)), labels)

    return loss, start


def central_differences(function, start, step=1e-5):
    steps = step * torch.eye(len(start), dtype=torch.float64)
    return torch.stack([(function(start + one) - function(start - one)) / (2 * step) for one in steps])


# Gradient scores


def test_snip_and_gradient_norm_equal_finite_differences():
    network, images, labels = two_layers()
    loss, weights = loss_of_weights(network, images, labels)
    slopes = central_differences(loss, weights)
    scores = one_pass_scores(network, images, labels)
    assert scores["snip"] == pytest.approx((weights * slopes).abs().sum().item(), rel=1e-6)
    conv, linear = slopes.split([24, 24])
    assert scores["grad_norm"] == pytest.approx((conv.norm() + linear.norm()).item(), rel=1e-6)


@pytest.mark.parametrize("shape", ["plain", "windowed"])
def test_fisher_equals_a_loop_over_images(shape, tiny_vit):
    model = tiny_vit if shape == "plain" else WINDOWED
    network, (images, labels) = network_of(model), draw_batch(3, img_size=model.img_size)
    expected = 0.0
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        outputs = []
        with proxies.watching(weighted_layers(network), lambda layer, _, output, outputs=outputs: outputs.append((layer, output))):
            loss = F.cross_entropy(network(image), label)
        for layer, output in outputs:
            (gradient,) = torch.autograd.grad(loss, output, retain_graph=True)
            channel = 1 if isinstance(layer, nn.Conv2d) else output.ndim - 1
            products = (output * gradient).sum(dim=[axis for axis in range(output.ndim) if axis != channel])
            expected += products.square().sum().item() / 2 / len(images)
    assert one_pass_scores(network, images, labels)["fisher"] == pytest.approx(expected, rel=1e-9)


def test_jacobian_covariance_equals_a_loop_over_images(tiny_vit):
    network, (images, labels) = network_of(tiny_vit), draw_batch(5)
    rows = [torch.autograd.functional.jacobian(lambda x: network(x).sum(), image).flatten() for image in images.split(1)]
    spectrum = np.linalg.eigvalsh(np.corrcoef(torch.stack(rows).numpy())) + SMALLEST_EIGENVALUE
    expected = -np.sum(np.log(spectrum) + 1 / spectrum)
    assert one_pass_scores(network, images, labels)["jacob_cov"] == pytest.approx(expected, rel=1e-6)


def test_uncorrelated_jacobians_score_best_and_equal_ones_stay_finite():
    uncorrelated = torch.tensor([[1.0, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]])
    best = -3 * (math.log1p(SMALLEST_EIGENVALUE) + 1 / (1 + SMALLEST_EIGENVALUE))
    assert jacobian_score(uncorrelated) == pytest.approx(best)
    assert -math.inf < jacobian_score(uncorrelated[:1].expand(3, -1)) < best


def test_the_order_of_images_changes_no_score_of_a_batch(tiny_vit):
    network, batches = network_of(tiny_vit), [draw_batch(6, seed=seed) for seed in range(2)]
    turned = [Batch(*(part[[5, 3, 0, 1, 4, 2]] for part in batch)) for batch in batches]

    def all_scores(of_batches):
        images, labels = of_batches[0]
        of_images = {"w_pca": w_pca_score(network, images, share=0.9), "head_confidence": head_confidence_score(network, images)}
        of_gradients = one_pass_scores(network, images, labels) | {"grasp": grasp_score(network, images, labels)}
        return of_images | of_gradients | gradient_variance_scores(network, of_batches)

    assert all_scores(turned) == pytest.approx(all_scores(batches), rel=1e-9)


@pytest.mark.parametrize("convolution", [nn.Conv2d, Standardised])
def test_grasp_equals_the_product_with_a_dense_hessian(convolution):
    network, images, labels = two_layers(convolution=convolution)
    loss, weights = loss_of_weights(network, images, labels)
    gradient = torch.autograd.functional.jacobian(loss, weights)
    hessian = torch.autograd.functional.hessian(loss, weights)
    assert grasp_score(network, images, labels) == pytest.approx(-(weights @ hessian @ gradient).item(), rel=1e-9)


def test_grasp_is_how_the_gradient_changes_as_the_weights_shrink(tiny_vit):
    """-w' H g = -1/2 d/da |gradient at a w|^2 at a = 1."""
    network, (images, labels) = network_of(tiny_vit), draw_batch(4)

    def squared_norm(scale):
        scaled = copy.deepcopy(network)
        with torch.no_grad():
            for weight in layer_weights(scaled):
                weight *= scale
        found = torch.autograd.grad(F.cross_entropy(scaled(images), labels), layer_weights(scaled))
        return sum(gradient.square().sum().item() for gradient in found)

    change = -(squared_norm(1 + 1e-5) - squared_norm(1 - 1e-5)) / 2e-5 / 2
    assert grasp_score(network, images, labels) == pytest.approx(change, rel=1e-5)


# Scores of the weights alone


def chain(*widths):
    """Linear layers and ReLUs without biases: the networks for which SynFlow is conserved."""
    layers = [part for shape in pairwise(widths) for part in (nn.Linear(*shape, bias=False), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


def test_synaptic_flow_is_conserved_from_layer_to_layer():
    """Tanaka et al. 2020, theorem 2: every layer holds R, the product of the absolute matrices between vectors of ones."""
    network, ones = chain(12, 7, 5, 3), torch.ones(1, 3, 2, 2)
    flow = torch.ones(12, dtype=torch.float64)
    for weight in layer_weights(network):
        flow = weight.detach().double().abs() @ flow
    assert synflow_score(network, ones) == pytest.approx(math.log(3 * flow.sum().item()), rel=1e-12)


def test_synflow_and_dss_do_not_see_signs(tiny_vit):
    network, ones = build_model(tiny_vit, seed=0), image_of_ones(tiny_vit, "cpu")
    turned = copy.deepcopy(network)
    with torch.no_grad():
        for index, parameter in enumerate(turned.parameters()):
            parameter *= torch.randint(2, parameter.shape, generator=generator(index)) * 2 - 1
    assert synflow_score(turned, ones) == synflow_score(network, ones)
    assert dss_score(turned, ones) == dss_score(network, ones)


def test_synflow_removes_norms(tiny_vit):
    network, ones = build_model(tiny_vit, seed=0), image_of_ones(tiny_vit, "cpu")
    score = synflow_score(network, ones)
    with torch.no_grad():
        network.get_parameter("norm.weight").mul_(3)
    assert synflow_score(network, ones) == score


def test_scores_on_other_weights_leave_the_network_as_it_was(tiny_vit):
    network, ones = build_model(tiny_vit, seed=0), image_of_ones(tiny_vit, "cpu")
    before = copy.deepcopy(network.state_dict())
    for score in (synflow_score, dss_score, meco_score):
        score(network, ones if score is not meco_score else draw_batch(1).images)
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


def test_synflow_holds_far_beyond_float32_and_says_where_float64_ends():
    network, ones = chain(12, 8, 8, 8, 8, 3), torch.ones(1, 3, 2, 2)
    before = synflow_score(network, ones)
    with torch.no_grad():
        for weight in layer_weights(network):
            weight *= 1e20
    assert synflow_score(network, ones) == pytest.approx(before + 5 * 20 * math.log(10), rel=1e-9)
    beyond = chain(12, *[3] * 9)
    for weight in layer_weights(beyond):
        nn.init.constant_(weight, 3e38)
    with pytest.raises(EvaluationError, match="logarithm") as failure:
        synflow_score(beyond, ones)
    assert failure.value.kind == "non_finite"


def test_dss_equals_its_formula_layer_by_layer(tiny_vit):
    network, ones = build_model(tiny_vit, seed=0), image_of_ones(tiny_vit, "cpu")
    positive = copy.deepcopy(network)
    for parameter in positive.parameters():
        parameter.data.abs_()
    positive(ones).sum().backward()
    expected = 0.0
    for name, parameter in positive.named_parameters():
        matrices = (parameter.detach().numpy(), parameter.grad.numpy())
        if name.endswith(("mixer.qkv.weight", "mixer.proj.weight")):
            expected += math.prod(np.linalg.svd(matrix, compute_uv=False).sum() for matrix in matrices)
        elif name.endswith(("fc1.weight", "fc2.weight")):
            expected += np.abs(matrices[0] * matrices[1]).sum()
    assert dss_score(network, ones) == pytest.approx(expected, rel=1e-4)


# Variance of gradients


def test_zico_and_l_swag_equal_their_formulas(tiny_vit):
    network, batches = network_of(tiny_vit), [draw_batch(4, seed=seed) for seed in range(3)]
    per_batch = [torch.autograd.grad(F.cross_entropy(network(images), labels), layer_weights(network)) for images, labels in batches]
    zico = trainability_of_all = 0.0
    for of_layer in zip(*per_batch, strict=True):
        absolute = np.abs(np.stack([gradient.flatten().numpy() for gradient in of_layer]))
        spread = absolute.std(axis=0)
        varies = spread > 0
        zico += math.log(np.sum(absolute.mean(axis=0)[varies] / spread[varies]))
        trainability_of_all += math.log(np.sum(1 / spread[varies]))
    num_strings = 0
    for block in network.stages[0].blocks:
        outputs = []
        with proxies.watching([block.feed_forward.mlp.act], lambda _, inputs, output, outputs=outputs: outputs.append(output)):
            network(batches[0].images)
        num_strings += len({tuple(neuron) for neuron in (outputs[0].flatten(1) > 0).T.tolist()})
    scores = gradient_variance_scores(network, batches)
    assert scores["zico"] == pytest.approx(zico, rel=1e-9)
    assert scores["l_swag"] == pytest.approx(trainability_of_all * num_strings, rel=1e-9)


def test_strings_of_signs_are_told_apart_beyond_one_word():
    signs = torch.randint(2, (70, 5), generator=generator(0)) * 2.0 - 1.0
    # Two outputs that differ at the last image alone, and two that never differ.
    outputs = torch.cat([signs, signs[:, :1] * torch.cat([torch.ones(69, 1), -torch.ones(1, 1)]), signs[:, 1:2]], dim=1)
    whole, parts = SignPatterns(), SignPatterns()
    whole.add([outputs])
    for part in outputs.split(9):
        parts.add([part])
    assert whole.num_distinct() == parts.num_distinct() == [6]


def test_l_swag_of_an_interval_of_layers_is_below_that_of_all(tiny_vit):
    network, batches = network_of(tiny_vit), [draw_batch(4, seed=seed) for seed in range(2)]
    halves = [gradient_variance_scores(network, batches, *shares) for shares in ((0.0, 0.5), (0.5, 1.0), (0.0, 1.0))]
    first, second, whole = (scores["l_swag"] for scores in halves)
    assert first + second < whole
    assert len({scores["zico"] for scores in halves}) == 1


def test_batches_without_any_difference_have_no_zico(tiny_vit):
    batch = draw_batch(4)
    with pytest.raises(EvaluationError, match="no gradient differs") as failure:
        gradient_variance_scores(network_of(tiny_vit), [batch, batch])
    assert failure.value.kind == "rank_deficient"


# AZ-NAS


def test_entropy_is_the_logarithm_of_the_channels_if_they_are_independent_and_0_for_one_direction():
    signs = torch.tensor([[a, b, c, a * b] for a in (1.0, -1.0) for b in (1.0, -1.0) for c in (1.0, -1.0)])
    assert entropy(signs[None]) == pytest.approx(math.log(4))
    assert entropy((signs[:, :1] * torch.tensor([[1.0, 2.0, 3.0]]))[None]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("factor", "score"), [(1.0, 0.0), (2.0, -0.5), (0.5, -0.5)])
def test_trainability_is_best_where_the_jacobian_keeps_lengths(factor, score):
    signs = torch.tensor([[a, b, a * b] for a in (1.0, -1.0) for b in (1.0, -1.0)])[None]
    assert trainability(factor * signs, signs) == pytest.approx(score)


def test_az_nas_equals_a_forward_pass_taken_apart(tiny_vit):
    network, images = network_of(tiny_vit), draw_batch(3).images
    x = network.position(network.prefix(network.patch_embed(images))).detach()
    entropies, trainabilities = [], []
    for block in network.stages[0].blocks:
        for branch in (lambda t, b=block: t + b.mixer(b.norm1(t)), lambda t, b=block: t + b.feed_forward(b.norm2(t))):
            x = x.detach().requires_grad_()
            y = branch(x)
            if entropies:
                signs = torch.randint(2, y.shape, generator=generator(7, "signs", len(entropies))).double() * 2 - 1
                (product,) = torch.autograd.grad(y, x, signs)
                outer = torch.stack([torch.outer(a, b) for a, b in zip(product.flatten(0, 1), signs.flatten(0, 1), strict=True)])
                s = np.linalg.svd(outer.mean(dim=0).numpy(), compute_uv=False)[0]
                trainabilities.append(-s - 1 / s + 2)
            p = np.linalg.eigvalsh(np.cov(y.detach().flatten(0, 1).T.numpy())).clip(1e-300)
            p = p / p.sum()
            entropies.append(-np.sum(p * np.log(p)))
            x = y
    scores = az_scores(network, images, seed=7)
    assert scores["az_expressivity"] == pytest.approx(sum(entropies), rel=1e-9)
    assert scores["az_progressivity"] == pytest.approx(min(np.diff(entropies)), rel=1e-6)
    assert scores["az_trainability"] == pytest.approx(np.mean(trainabilities), rel=1e-9)
    assert len(trainabilities) == 3


def test_az_nas_leaves_no_hook_and_no_frozen_weight(tiny_vit):
    network, images = network_of(tiny_vit), draw_batch(2).images
    assert az_scores(network, images, seed=0) == az_scores(network, images, seed=0)
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


# Scores of a forward pass


def test_meco_equals_its_formula_and_counts_dependent_channels_as_0():
    wider = nn.Conv2d(2, 5, 1, bias=False)
    network = nn.Sequential(nn.Conv2d(3, 2, 2), wider, nn.Flatten(), nn.Linear(45, 4)).double()
    image = draw_batch(1, img_size=4).images
    expected = np.linalg.eigvalsh(np.corrcoef(network[0](image)[0].flatten(1).detach().numpy()))[0]
    assert expected > 0.1
    assert meco_score(network, image) == pytest.approx(expected, rel=1e-9)


def test_meco_without_an_independent_layer_is_no_score():
    with pytest.raises(EvaluationError, match="depend on each other") as failure:
        meco_score(nn.Sequential(nn.Conv2d(3, 30, 2)), draw_batch(1, img_size=4).images)
    assert failure.value.kind == "rank_deficient"


def autoformer_of(width, img_size=224):
    """An AutoFormer of one block, on patches of 16 pixels."""
    return autoformer.spec({"hidden_dim": width, "depth": 1, "mlp_ratio": [2], "num_heads": [3]}, num_classes=5, img_size=img_size)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (autoformer_of(240), "most positions, 197, have 240 channels or more"),
        (autoformer_of(192, img_size=64), "most positions, 17, have 192 channels or more"),
        (TimmSpec(name="test_vit", img_size=64, num_classes=5), "no layer has fewer channels than positions"),
    ],
)
def test_meco_is_refused_before_any_work_where_every_correlation_is_singular(model, words):
    meco = evaluators.get("meco")
    with pytest.raises(SpecError, match=words):
        meco.check(model, None, meco.settings())
    with pytest.raises(EvaluationError, match="depend on each other"):
        meco.function(model, Context(seed=0), meco.settings())


@pytest.mark.parametrize(
    "model", [autoformer_of(192), autoformer_of(24, img_size=96), TimmSpec(name="test_vit", img_size=160, num_classes=5), CONVNEXT]
)
def test_meco_is_defined_where_tokens_or_pixels_outnumber_the_channels(model):
    meco = evaluators.get("meco")
    meco.check(model, None, meco.settings())
    assert meco.function(model, Context(seed=0), meco.settings())["meco"] > 0


def test_correlations_do_not_see_the_scale_of_channels():
    """So MeCo does not see that of a layer, nor jacob_cov that of the logits."""
    network = nn.Sequential(nn.Conv2d(3, 5, 3)).double()
    image = draw_batch(1).images
    score = meco_score(network, image)
    with torch.no_grad():
        network[0].weight.mul_(torch.tensor([0.5, 2.0, 3.0, -1.0, 7.0])[:, None, None, None])
        network[0].bias.add_(3)
    assert meco_score(network, image) == pytest.approx(score, rel=1e-9)
    rows = torch.randn(4, 12, generator=generator(0), dtype=torch.float64)
    assert jacobian_score(7 * rows) == pytest.approx(jacobian_score(rows), rel=1e-9)


@pytest.mark.parametrize(("share", "components"), [(0.4, 1), (0.5, 2), (0.74, 2), (0.75, 3), (0.99, 3)])
def test_principal_components_are_counted_until_they_hold_more_than_the_share(share, components):
    # Variances 2, 1, 1 and 0, along axes that are no channels.
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    corners = np.array([[a, b, c, 0] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)]) * np.sqrt([2, 1, 1, 0])
    moments = Moments(4, torch.device("cpu"))
    for rows in torch.from_numpy(corners @ axes + 5).split(3):
        moments.add(rows)
    assert moments.num_components(share + 1e-9 if share in (0.5, 0.75) else share) == components


def test_w_pca_equals_a_singular_value_decomposition(tiny_vit):
    network, images = network_of(tiny_vit), draw_batch(6).images
    total = 0
    for block in network.stages[0].blocks:
        hidden = []
        with proxies.watching([block.feed_forward.mlp.fc1], lambda _, inputs, output, hidden=hidden: hidden.append(output.flatten(0, 1))):
            network(images)
        rows = hidden[0].detach().numpy()
        held = np.cumsum(np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False) ** 2)
        total += int(np.argmax(held > 0.9 * held[-1])) + 1
    num_params = sum(parameter.numel() for parameter in network.parameters())
    assert w_pca_score(network, images, share=0.9) == num_params * total


def test_head_confidence_is_the_mean_largest_weight_and_least_for_uniform_attention(tiny_vit):
    network, images = network_of(tiny_vit), draw_batch(3).images
    expected = 0.0
    for block in network.stages[0].blocks:
        inputs = []
        with proxies.watching([block.mixer.qkv], lambda _, seen, output, inputs=inputs: inputs.append(output)):
            network(images)
        q, k, _ = inputs[0].reshape(3, 17, 3, 2, 8).permute(2, 0, 3, 1, 4)
        largest = [max(row) for maps in (q @ k.mT / math.sqrt(8)).softmax(-1).tolist() for head in maps for row in head]
        expected += np.mean(largest)
    assert head_confidence_score(network, images) == pytest.approx(expected, rel=1e-9)
    for block in network.stages[0].blocks:
        nn.init.zeros_(block.mixer.qkv.weight)
    assert head_confidence_score(network, images) == pytest.approx(2 / 17)


def test_head_confidence_reads_masks_as_attention_does():
    class Masked(nn.Module):
        def __init__(self, mask):
            super().__init__()
            self.mask = mask

        def forward(self, x):
            tokens = x.flatten(2).mT
            return F.scaled_dot_product_attention(tokens, tokens, tokens, attn_mask=self.mask)

    images, hidden = draw_batch(2, img_size=2).images, torch.eye(4, dtype=torch.bool)
    # Each query sees itself alone.
    assert head_confidence_score(Masked(hidden), images) == pytest.approx(1)
    assert head_confidence_score(Masked(torch.where(hidden, 0.0, -1e9).double()), images) == pytest.approx(1)


# What all share


@pytest.mark.parametrize("name", SCORES)
def test_a_batch_in_parts_gives_the_scores_of_the_whole(name, tiny_vit, digits, monkeypatch):
    each, context = evaluators.get(name), Context(seed=0, dataset=digits)
    settings = replace(each.settings(), batch_size=6) if hasattr(each.settings(), "batch_size") else each.settings()
    whole = each.function(tiny_vit, context, settings)
    monkeypatch.setattr(proxies, "CHUNK_PIXELS", 2 * 8 * 8)
    # ZiCo divides by what is left of two gradients, which float32 rounds.
    assert each.function(tiny_vit, context, settings) == pytest.approx(whole, rel=1e-3)


def test_a_batch_stays_whole_where_images_share_a_norm(monkeypatch):
    monkeypatch.setattr(proxies, "CHUNK_PIXELS", 1)
    images, labels = draw_batch(4)
    assert [len(part) for part, _ in in_chunks(nn.Sequential(nn.LayerNorm(8)), images, labels)] == [1, 1, 1, 1]
    assert [len(part) for part, _ in in_chunks(nn.Sequential(nn.BatchNorm2d(3)), images, labels)] == [4]


@pytest.mark.parametrize("name", SCORES)
def test_a_score_leaves_the_global_random_state_alone_and_follows_the_seed(name, tiny_vit, digits):
    each = evaluators.get(name)
    settings = replace(each.settings(), batch_size=4) if hasattr(each.settings(), "batch_size") else each.settings()
    before = torch.get_rng_state()
    first, again, other = (each.function(tiny_vit, Context(seed=seed, dataset=digits), settings) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert first == again
    assert all(first[metric] != other[metric] for metric in first)
    assert set(first) == {metric.name for metric in each.metrics}


def test_batches_are_disjoint_training_images_and_the_longer_draw_begins_with_the_shorter(tiny_vit, digits):
    context = Context(seed=0, dataset=digits)
    (short,) = labelled_batches(tiny_vit, context, batch_size=5)
    first, second = labelled_batches(tiny_vit, context, batch_size=5, num_batches=2)
    assert torch.equal(first.images, short.images)
    of_train = {image.tobytes(): label for image, label in zip(digits.images[digits.train], digits.labels[digits.train], strict=True)}
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    seen = []
    for image, label in zip(torch.cat([first.images, second.images]), torch.cat([first.labels, second.labels]), strict=True):
        pixels = ((image * std + mean) * 255).round().to(torch.uint8).numpy().tobytes()
        assert of_train[pixels] == label
        seen.append(pixels)
    assert len(set(seen)) == 10


def test_a_network_is_scored_at_its_own_size_with_the_images_of_another(digits):
    (batch,) = labelled_batches(WINDOWED, Context(seed=0, dataset=digits), batch_size=3)
    assert batch.images.shape == (3, 3, 64, 64)


def test_data_is_refused_in_one_sentence(tiny_vit, digits):
    small = replace(digits, train=digits.train[:7])
    for model, dataset, words in (
        (tiny_vit, None, "needs labelled data"),
        (tiny_vit, small, "train has 7 images; the score takes 8"),
        (replace(tiny_vit, num_classes=9), digits, "10 classes; the network puts out 9"),
        (replace(tiny_vit, in_chans=1), digits, "in_chans is 1"),
    ):
        with pytest.raises(SpecError, match=words):
            labelled_batches(model, Context(seed=0, dataset=dataset), batch_size=8)
    with pytest.raises(SpecError, match="in_chans is 1"):
        unlabelled_batch(replace(tiny_vit, in_chans=1), Context(seed=0), batch_size=2)
    assert gaussian_batch(replace(tiny_vit, in_chans=1), Context(seed=0), batch_size=2).shape == (2, 1, 8, 8)


OUR_OWN = dict.fromkeys(("as_vit", "as_vit_closed_form", "nsc", "shape"), "takes networks of our components")
WITHOUT_TOKENS = {"dss": "have none", "az_nas": r"map tokens \(B, N, C\)", "head_confidence": "has no attention"}
WITHOUT_BLOCKS = {**dict.fromkeys(("dss", "az_nas", "w_pca"), "names none"), "head_confidence": "has no attention"}
OF_TIMM = {"test_vit": (160, OUR_OWN), "test_convnext": (32, OUR_OWN | WITHOUT_TOKENS), "test_resnet": (32, OUR_OWN | WITHOUT_BLOCKS)}


@pytest.mark.parametrize("name", sorted(set(scores().values())))
@pytest.mark.parametrize("architecture", OF_TIMM)
def test_a_model_of_timm_has_the_scores_that_are_defined_for_it_and_the_others_say_why(architecture, name, digits):
    img_size, refused = OF_TIMM[architecture]
    model, each = TimmSpec(name=architecture, img_size=img_size, num_classes=10), evaluators.get(name)
    settings = replace(each.settings(), batch_size=2) if hasattr(each.settings(), "batch_size") else each.settings()

    def measure():
        each.check(model, None, settings)
        return each.function(model, Context(seed=0, dataset=digits), settings)

    if name in refused:
        with pytest.raises(SpecError, match=refused[name]):
            measure()
    else:
        measured = measure()
        assert set(measured) == {metric.name for metric in each.metrics}
        assert all(map(math.isfinite, measured.values()))


def test_networks_without_blocks_or_activations_are_refused():
    network, images, labels = two_layers()
    with pytest.raises(SpecError, match="names none"):
        w_pca_score(network, images, share=0.9)
    with pytest.raises(SpecError, match="has no such module"):
        gradient_variance_scores(nn.Sequential(nn.Flatten(), nn.Linear(48, 3).double()), [Batch(images, labels)] * 2)


def test_one_block_has_no_progress(tiny_vit):
    stage = tiny_vit.stages[0]
    single = replace(tiny_vit, stages=(replace(stage, blocks=stage.blocks[:1]),))
    with pytest.raises(SpecError, match="compares blocks"):
        az_scores(network_of(single), draw_batch(2).images, seed=0)


@pytest.mark.parametrize(
    ("name", "assignment", "words"),
    [
        ("grasp", {"batch_size": "1"}, "whole numbers from 2"),
        ("gradient_variance", {"num_batches": "1"}, "num_batches is 1"),
        ("gradient_variance", {"first_share": "0.8", "last_share": "0.5"}, "first_share < last_share"),
        ("w_pca", {"share": "1"}, "above 0 and below 1"),
    ],
)
def test_settings_out_of_range_are_refused_with_what_is_allowed(name, assignment, words):
    with pytest.raises(ValueError, match=words):
        evaluators.get(name).parse_settings(assignment)


def test_the_batch_of_the_literature_is_the_default():
    assert BatchSettings().batch_size == 64
