import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from space.families.as_vit import Network, spec
from space.vit import build
from workers.evaluator import Context, EvaluationError, evaluators
from workers.evaluators.as_vit import (
    AsVitSettings,
    as_vit,
    condition_number,
    draw_angles,
    draw_circle,
    draw_weights,
    features,
    ntk_gram,
    remove_norms,
    speeds,
)

SEED_TOPOLOGY = "8,2,3|4,1,2|4,1,4|4,1,6|32"
OTHER_TOPOLOGY = "5,4,2|3,2,3|2,1,2|3,1,2|16"
QUICK = AsVitSettings(num_repeats=2, ntk_batch_size=4, num_angles=3)
CONTEXT = Context(seed=0)


pytestmark = pytest.mark.usefixtures("one_thread")


def net_spec(topology=SEED_TOPOLOGY, *, width=8, img_size=32):
    return spec(Network.parse(f"{topology},{width}"), img_size=img_size, num_classes=10)


def network(model=None, seed=0, repeat=0, **choices):
    drawn = build(model or net_spec(**choices)).eval()
    draw_weights(drawn, seed, repeat)
    return drawn


def length_distortion(model, circle, angles):
    remove_norms(model)
    return speeds(model, circle, angles).sum().item()


def reference_length_distortion(model, circle, angles):
    """The published way: a backward pass to the angles for every output feature, the sum of row norms of the Jacobian."""
    remove_norms(model)
    angles = angles.float().requires_grad_()
    cos, sin = angles.cos()[:, None, None, None], angles.sin()[:, None, None, None]
    # The plain softmax(q k) v, as in the reference.
    with sdpa_kernel(SDPBackend.MATH):
        output = features(model, circle.u * cos + circle.v * sin)
        columns = [torch.autograd.grad(feature.sum(), angles, retain_graph=True)[0] for feature in output.unbind(1)]
    return torch.stack(columns, dim=1).norm(dim=1).sum().item()


def reference_ntk_condition(model, images):
    """The published way: one forward pass of the batch, a backward pass of it for every image, the kernel in float32."""
    names, parameters = zip(*[(name, p) for name, p in model.named_parameters() if "weight" in name], strict=True)
    output = features(model, images)
    rows = []
    for row in output:
        gradients = torch.autograd.grad(row, parameters, torch.ones_like(row), retain_graph=True, allow_unused=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients if gradient is not None]))
    kernel = torch.stack(rows) @ torch.stack(rows).T
    eigenvalues = torch.linalg.eigvalsh(kernel)
    without = {name for name, gradient in zip(names, gradients, strict=True) if gradient is None}
    assert without == {"norm.weight", "head.fc1.weight", "head.fc2.weight"}
    return (eigenvalues[-1] / eigenvalues[0]).item()


@pytest.mark.parametrize(("topology", "img_size"), [(SEED_TOPOLOGY, 32), (OTHER_TOPOLOGY, 64), ("6,2,4|3,1,4|3,1,4|3,1,4|64", 32)])
def test_forward_mode_gives_what_a_backward_pass_per_output_gives(topology, img_size):
    circle, angles = draw_circle(3, 0, img_size), draw_angles(AsVitSettings(mode="reference"))
    ours = length_distortion(network(topology=topology, img_size=img_size), circle, angles)
    theirs = reference_length_distortion(network(topology=topology, img_size=img_size), circle, angles)
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(("topology", "img_size"), [(SEED_TOPOLOGY, 32), (OTHER_TOPOLOGY, 64)])
def test_ntk_of_single_images_gives_what_a_full_batch_pass_per_image_gives(topology, img_size):
    images = torch.randn(16, 3, img_size, img_size, generator=torch.Generator().manual_seed(0))
    model = network(topology=topology, img_size=img_size)
    assert condition_number(ntk_gram(model, images)) == pytest.approx(reference_ntk_condition(model, images), rel=1e-3)


def test_reference_mode_is_the_published_procedure():
    settings = AsVitSettings(mode="reference", num_repeats=2, ntk_batch_size=8)
    model = net_spec()
    scores = as_vit(model, CONTEXT, settings)
    lengths, conditions = [], []
    for repeat in range(2):
        drawn = network(model, repeat=repeat)
        # The reference deep-copies one network and draws only its linear layers anew.
        drawn.patch_embed.load_state_dict(network(model, repeat=0).patch_embed.state_dict())
        images = reference_images(model, settings)
        conditions.append(reference_ntk_condition(drawn, images))
        angles = torch.linspace(0, 2 * math.pi, 10)
        lengths.append(reference_length_distortion(drawn, draw_circle(0, repeat, model.img_size), angles))
    assert scores["length_distortion"] == pytest.approx(sum(lengths) / 2, rel=1e-5)
    assert scores["ntk_condition"] == pytest.approx(sum(conditions) / 2, rel=1e-3)
    assert scores["length_distortion_stderr"] == pytest.approx(abs(lengths[0] - lengths[1]) / 2, rel=1e-3)


def reference_images(model, settings):
    from space.randomness import stream
    from workers.data import load_images

    return load_images("digits", img_size=model.img_size, num_images=settings.ntk_batch_size, seed=stream(0, 0, "images")).images


def test_length_distortion_does_not_depend_on_the_number_of_angles():
    few, many = (as_vit(net_spec(), CONTEXT, replace(QUICK, num_angles=number))["length_distortion"] for number in (5, 20))
    # What is left is the quadrature's error, far below the standard error over the repeats.
    assert few == pytest.approx(many, rel=1e-3)


def test_the_reference_counts_one_angle_twice_and_does_not_divide_by_the_length():
    model, circle = network(), draw_circle(0, 0, 32)
    remove_norms(model)
    both_ends, uniform = (speeds(model, circle, draw_angles(AsVitSettings(mode=mode))) for mode in ("reference", "default"))
    assert len(both_ends) == len(uniform) == 10
    assert both_ends[0].item() == pytest.approx(both_ends[-1].item(), rel=1e-5)
    assert both_ends.sum().item() == pytest.approx(10 * uniform.mean().item(), rel=0.05)


def test_angles_in_one_pass_or_many_give_the_same_speeds():
    model, circle, angles = network(), draw_circle(0, 0, 32), draw_angles(AsVitSettings())
    remove_norms(model)
    # Matrix products of other sizes sum in another order.
    torch.testing.assert_close(speeds(model, circle, angles, chunk=1), speeds(model, circle, angles, chunk=4), rtol=1e-5, atol=0)


def test_large_attention_maps_taken_head_by_head_give_the_same_speeds(monkeypatch):
    model, circle, angles = network(img_size=64), draw_circle(0, 0, 64), draw_angles(QUICK)
    remove_norms(model)
    whole = speeds(model, circle, angles)
    monkeypatch.setattr("workers.evaluators.as_vit.TILE_SCORES", 1)
    torch.testing.assert_close(speeds(model, circle, angles), whole, rtol=1e-5, atol=0)


def test_the_circle_has_radius_one_and_random_orthogonal_axes():
    u, v = draw_circle(0, 0, 32)
    torch.testing.assert_close(torch.stack([u.norm(), v.norm(), (u * v).sum() + 1]), torch.ones(3))
    assert not torch.equal(u, draw_circle(0, 1, 32).u)


def test_heads_have_no_effect_on_length_distortion():
    # Section 2.6 of the notes: std-0.02 weights and a radius-1 input leave the softmax uniform.
    few, many = (
        length_distortion(network(topology=SEED_TOPOLOGY[:-2] + heads, width=32), draw_circle(0, 0, 32), draw_angles(AsVitSettings()))
        for heads in ("16", "64")
    )
    assert few == pytest.approx(many, rel=1e-6)


@pytest.mark.parametrize(("changed", "factor"), [({"width": 32}, 4.0), ({"topology": SEED_TOPOLOGY.replace("|4,1,4|", "|2,1,4|")}, 0.5)])
def test_length_distortion_grows_with_the_square_of_the_width_and_with_the_merging_kernels(changed, factor):
    angles = draw_angles(AsVitSettings(num_angles=4))

    def mean_over_repeats(**choices):
        values = [length_distortion(network(repeat=r, img_size=64, **choices), draw_circle(0, r, 64), angles) for r in range(8)]
        return sum(values) / len(values)

    # The law is that of the linear regime; borders of the small grids and 8 draws leave some 15 %.
    assert mean_over_repeats(**{"width": 16} | changed) / mean_over_repeats(width=16) == pytest.approx(factor, rel=0.2)


def test_candidates_that_differ_in_one_stage_share_every_other_tensor():
    base, other = network(), network(topology=SEED_TOPOLOGY.replace("|4,1,4|", "|4,2,2|"))
    theirs = dict(other.named_parameters())
    differing = {name for name, mine in base.named_parameters() if not torch.equal(mine, theirs[name])}
    assert differing
    assert all(name.startswith("stages.2.blocks.0.feed_forward") for name in differing)


def test_repeats_are_independent_except_for_the_reference_convolution():
    def tensors(repeat, **sharing):
        model = build(net_spec())
        draw_weights(model, 0, repeat, **sharing)
        return {name: parameter for name, parameter in model.named_parameters() if parameter.std() > 0}

    first, second, shared = tensors(0), tensors(1), tensors(1, share_convolutions=True)
    assert not any(torch.equal(first[name], second[name]) for name in first)
    assert {name for name in first if torch.equal(first[name], shared[name])} == {"patch_embed.proj.weight", "patch_embed.proj.bias"}


def test_equal_calls_give_equal_bits_in_another_process_and_after_other_work():
    script = (
        "import json, torch; torch.set_num_threads(1);"
        "from space.families.as_vit import Network, spec; from workers.evaluator import Context;"
        "from workers.evaluators.as_vit import AsVitSettings, as_vit;"
        f"model = spec(Network.parse('{SEED_TOPOLOGY},8'), img_size=32, num_classes=10);"
        "scores = as_vit(model, Context(seed=0), AsVitSettings(num_repeats=2, ntk_batch_size=4, num_angles=3));"
        "print(json.dumps({name: value.hex() for name, value in scores.items()}))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    elsewhere = {name: float.fromhex(text) for name, text in json.loads(run.stdout.splitlines()[-1]).items()}
    torch.manual_seed(99)
    as_vit(net_spec(OTHER_TOPOLOGY), Context(seed=5), QUICK)
    assert as_vit(net_spec(), CONTEXT, QUICK) == elsewhere
    assert as_vit(net_spec(), CONTEXT, QUICK) == elsewhere


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    as_vit(net_spec(), CONTEXT, QUICK)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_gives_other_scores():
    assert as_vit(net_spec(), CONTEXT, QUICK) != as_vit(net_spec(), Context(seed=1), QUICK)


def test_every_repeat_is_reported():
    points = {}
    scores = as_vit(net_spec(), Context(seed=0, report=lambda name, value, step: points.update({(name, step): value})), QUICK)
    assert len(points) == 4
    for score in ("length_distortion", "ntk_condition"):
        values = [points[score, repeat] for repeat in range(2)]
        assert scores[score] == pytest.approx(sum(values) / 2)
        assert scores[f"{score}_stderr"] == pytest.approx(abs(values[0] - values[1]) / 2)


def test_damaged_images_are_named_in_a_warning(tmp_path):
    import numpy as np
    from PIL import Image

    for index in range(8):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    (tmp_path / "3.png").write_bytes(b"")
    warnings = []
    as_vit(net_spec(), Context(seed=0, data=f"folder:{tmp_path}", warn=warnings.append), replace(QUICK, ntk_batch_size=7))
    assert warnings == [f"data 'folder:{tmp_path}': skipped as damaged (1): 3.png"]


def test_a_repeated_image_makes_the_kernel_rank_deficient():
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with pytest.raises(EvaluationError, match="singular") as failure:
        condition_number(ntk_gram(network(), image.expand(4, -1, -1, -1)))
    assert failure.value.kind == "rank_deficient"


def test_overflowing_gradients_are_non_finite():
    model = network()
    nn.init.constant_(model.stages[0].blocks[0].feed_forward.mlp.fc2.weight, 1e30)
    nn.init.constant_(model.stages[0].blocks[0].feed_forward.mlp.fc1.weight, 1e30)
    with pytest.raises(EvaluationError, match="finite") as failure:
        condition_number(ntk_gram(model, torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))))
    assert failure.value.kind == "non_finite"


def test_removing_norms_leaves_none_and_nothing_else_changes():
    model = network()
    before = {name for name, _ in model.named_parameters()}
    remove_norms(model)
    assert before - {name for name, _ in model.named_parameters()} == {name for name in before if "norm" in name}


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ({"mode": "published"}, "allowed: default, reference"),
        ({"num_repeats": "1"}, "whole numbers from 2"),
        ({"ntk_batch_size": "many"}, "a whole number is expected"),
        ({"num_angles": "0"}, "whole numbers from 2"),
        ({"num_angle": "4"}, "did you mean 'num_angles'"),
    ],
)
def test_settings_out_of_range_are_refused_with_what_is_allowed(assignment, words):
    with pytest.raises(ValueError, match=words):
        evaluators.get("as_vit").parse_settings(assignment)
