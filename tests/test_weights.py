"""Weights to start from: files of every kind, what is fitted to the network, what is refused, how they are part of a trial."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import run_here
from safetensors.torch import save_file
from torch import Tensor, nn

import search
from search.arguments import parse_study
from search.run import main
from search.study import SettingsError, studies
from space.model import build_model, resized
from space.recipe import Recipe
from space.registry import SpecError
from space.search_space import Candidate
from space.slicing import subnet_tensors
from space.spec import ArchSpec, Component
from space.subnet_spec import SubnetSpec
from space.timm_spec import TimmSpec
from space.weights import Weights
from workers.checkpoints import save_model
from workers.data import IMAGENET_MEAN, IMAGENET_STD, load_dataset
from workers.evaluate import Job
from workers.evaluator import Call, Context, evaluators
from workers.inference import predict, top1_pct
from workers.layers import layer_numbers, rate_scales
from workers.training import train
from workers.weights import load_weights, weights_from

pytestmark = pytest.mark.usefixtures("one_thread")

TINY_OPTIONS = (("depth", 2), ("embed_dim", 16), ("num_heads", 2), ("mlp_ratio", 2), ("patch_size", 2))
TIMM_TINY = TimmSpec(name="vit_tiny_patch16_224", img_size=8, num_classes=10, options=TINY_OPTIONS)
"""The same network as `tiny_vit`, of timm; its images have mean and standard deviation 0.5."""


@pytest.fixture(scope="module")
def network(tiny_vit: ArchSpec) -> nn.Module:
    return build_model(tiny_vit, seed=7)


def loaded(model, weights: Weights) -> nn.Module:
    built = build_model(model, seed=1).eval()
    load_weights(built, model, weights)
    return built


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return path


CONTAINERS: dict[str, Callable] = {
    "a.safetensors": lambda tensors: tensors,
    "a.pth": lambda tensors: tensors,
    "a.bin": lambda tensors: {"state_dict": tensors, "epoch": 3},
    "b.pth": lambda tensors: {"model": {f"module.{name}": tensor for name, tensor in tensors.items()}},
    "a.pt": lambda tensors: {"state_dict": {}, "state_dict_ema": tensors},
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_kind_of_file_is_read(name: str, network: nn.Module, tiny_vit: ArchSpec, tmp_path: Path):
    file = write(tmp_path / name, CONTAINERS[name](network.state_dict()))
    weights = weights_from(file, tiny_vit)
    assert weights.summary.endswith("our layout): taken as they are")
    assert_equal(loaded(tiny_vit, weights), network)


def test_what_a_training_left_is_read(network: nn.Module, tiny_vit: ArchSpec, tmp_path: Path):
    save_model(tmp_path / "model.pt", network, tiny_vit)
    assert_equal(loaded(tiny_vit, weights_from(tmp_path / "model.pt", tiny_vit)), network)


def test_half_precision_becomes_single(network: nn.Module, tiny_vit: ArchSpec, tmp_path: Path):
    file = write(tmp_path / "half.safetensors", {name: tensor.half() for name, tensor in network.state_dict().items()})
    started = loaded(tiny_vit, weights_from(file, tiny_vit)).state_dict()
    for name, tensor in network.state_dict().items():
        assert torch.equal(started[name], tensor.half().float())


def test_classifier_positions_and_patches_are_fitted_and_said(network: nn.Module, tiny_vit: ArchSpec, tmp_path: Path):
    from timm.layers.patch_embed import resample_patch_embed
    from timm.layers.pos_embed import resample_abs_pos_embed

    file = write(tmp_path / "a.pth", network.state_dict())
    model = replace(tiny_vit, img_size=24, num_classes=3, patch_embed=Component("conv", kernel=4, stride=4))
    weights = weights_from(file, model)
    assert weights.changes == (
        "classifier replaced (10 classes to 3)",
        "positions resampled (17 tokens to 37)",
        "patch embedding resampled (2x2 px to 4x4)",
    )
    assert not weights.has_classifier
    started, fresh, given = loaded(model, weights).state_dict(), build_model(model, seed=1).state_dict(), network.state_dict()
    assert torch.equal(started["head.weight"], fresh["head.weight"])
    assert torch.equal(started["position.pos_embed"], resample_abs_pos_embed(given["position.pos_embed"], [6, 6]))
    assert torch.equal(started["patch_embed.proj.weight"], resample_patch_embed(given["patch_embed.proj.weight"], [4, 4]))
    assert torch.equal(started["norm.weight"], given["norm.weight"])


def test_another_pooling_starts_anew(network: nn.Module, tiny_vit: ArchSpec, tmp_path: Path):
    file = write(tmp_path / "a.pth", network.state_dict())
    model = replace(tiny_vit, pooling=Component("gem"))
    weights = weights_from(file, model)
    assert weights.changes == ("the pooling is another one and starts anew",)
    assert torch.equal(loaded(model, weights).get_parameter("pooling.p"), torch.tensor([3.0]))


def test_choices_that_no_shape_tells_are_compared_where_the_file_has_a_spec(network: nn.Module, tiny_vit: ArchSpec, tmp_path: Path):
    save_model(tmp_path / "model.pt", network, tiny_vit)
    (stage,) = tiny_vit.stages
    block = replace(stage.blocks[0], mixer=Component("attention", num_heads=4, head_dim=4))
    with pytest.raises(SpecError, match=r"another architecture: stages.0.blocks.0.mixer is attention\(.*num_heads=2\) there and .*=4"):
        weights_from(tmp_path / "model.pt", replace(tiny_vit, stages=(replace(stage, blocks=(block,) * 2),)))


def renormalised(images: Tensor, mean: float, std: float) -> Tensor:
    ours = [torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD)]
    return (images * ours[1] + ours[0] - mean) / std


@pytest.mark.parametrize("is_ours", [True, False], ids=["into our network", "into timm's"])
def test_the_normalisation_of_the_images_is_taken_over(is_ours: bool, tiny_vit: ArchSpec, tmp_path: Path):
    theirs = build_model(TIMM_TINY, seed=2).eval()
    file = write(tmp_path / "model.safetensors", theirs.state_dict())
    model = tiny_vit if is_ours else TIMM_TINY
    if is_ours:
        (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}))
    weights = weights_from(file, model)
    assert weights.changes == ("input normalisation (mean 0.5, std 0.5) taken over",)
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(loaded(model, weights)(images), theirs(renormalised(images, 0.5, 0.5)), rtol=1e-5, atol=1e-5)


def test_where_the_normalisation_comes_from(tiny_vit: ArchSpec, tmp_path: Path):
    tensors = build_model(TIMM_TINY, seed=2).state_dict()
    unknown = weights_from(write(tmp_path / "a.pth", tensors), tiny_vit)
    assert unknown.changes == ("its input normalisation is not known and taken for ImageNet's",)
    # timm's MAE weights of this network saw ImageNet's normalisation, its AugReg ones did not.
    assert weights_from(write(tmp_path / "vit_base_patch16_224.mae.pth", tensors), tiny_vit).changes == ()
    assert weights_from(write(tmp_path / "vit_base_patch16_224.augreg_in1k.pth", tensors), tiny_vit).mean == (0.5, 0.5, 0.5)
    (tmp_path / "config.json").write_text("{}")
    assert weights_from(tmp_path / "a.pth", tiny_vit) == unknown
    with pytest.raises(ValueError, match=r"config.json, beside the weights, says no mean and std of their images: KeyError: 'mean'"):
        weights_from(write(tmp_path / "model.pth", tensors), tiny_vit)


def test_a_normalisation_that_cannot_be_taken_over_is_said(tmp_path: Path):
    model = TimmSpec(name="test_convnext", img_size=32, num_classes=5)
    file = write(tmp_path / "model.pth", build_model(replace(model, num_classes=7), seed=2).state_dict())
    (tmp_path / "config.json").write_text(json.dumps({"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}))
    padded = replace(model, name="test_efficientnet")
    file_of_padded = write(tmp_path / "pytorch_model.bin", build_model(padded, seed=2).state_dict())
    assert "input normalisation (mean 0.1 0.2 0.3, std 1) taken over" in weights_from(file, model).changes
    weights = weights_from(file_of_padded, padded)
    assert weights.changes == ("its input normalisation (mean 0.1 0.2 0.3, std 1) cannot be taken over and images keep ImageNet's",)
    assert weights.mean is None


def test_a_model_of_timm_is_fitted_as_timm_does(tmp_path: Path):
    given = build_model(TIMM_TINY, seed=2)
    file = write(tmp_path / "a.pth", given.state_dict())
    larger = resized(TIMM_TINY, img_size=12, num_classes=4)
    weights = weights_from(file, larger)
    assert weights.changes[:2] == ("classifier replaced (10 classes to 4)", "positions resampled (17 tokens to 37)")
    started, fresh = loaded(larger, weights), build_model(larger, seed=1)
    assert torch.equal(started.get_parameter("head.weight"), fresh.get_parameter("head.weight"))
    assert torch.equal(started.get_parameter("norm.weight"), given.get_parameter("norm.weight"))
    other = replace(TIMM_TINY, options=tuple((name, 3 if name == "depth" else value) for name, value in TINY_OPTIONS))
    with pytest.raises(SpecError, match=r"a.pth are of another architecture: no blocks.2.*and \d+ more$"):
        weights_from(file, other)


def test_a_subnet_starts_from_slices_of_its_supernet(tiny_vit: ArchSpec, network: nn.Module, tmp_path: Path):
    (stage,) = tiny_vit.stages
    block = replace(stage.blocks[0], mixer=Component("attention", num_heads=1, head_dim=8))
    arch = replace(tiny_vit, stages=(replace(stage, embed_dim=12, blocks=(block,)),))
    subnet = SubnetSpec(supernet=tiny_vit, arch=arch, kept=((1,),))
    save_model(tmp_path / "model.pt", network, tiny_vit)
    weights = weights_from(tmp_path / "model.pt", subnet)
    assert weights.changes == ("slices of the supernet's",)
    started = loaded(subnet, weights).state_dict()
    expected = subnet_tensors(subnet, network.state_dict())
    assert started.keys() == expected.keys()
    assert all(torch.equal(started[name], expected[name]) for name in started)


class RunsCode:
    def __reduce__(self):
        return os.system, ("exit 3",)


def damaged(folder: Path, network: nn.Module) -> dict[str, tuple[Path, str]]:
    """Files that are no weights of the network, by what is wrong, and what is said."""
    safe, zipped = write(folder / "s.safetensors", network.state_dict()), write(folder / "z.pth", network.state_dict())
    halves = [folder / f"half{file.suffix}" for file in (safe, zipped)]
    for file, half in zip((safe, zipped), halves, strict=True):
        half.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    (folder / "empty.pth").touch()
    (folder / "text.bin").write_text("these are no weights")
    (folder / "a.npz").touch()
    torch.save({"a": torch.ones(2), "b": RunsCode()}, folder / "code.pth")
    (folder / "plain.bin").write_bytes(pickle.dumps({"b": RunsCode()}, protocol=2))
    nan = network.state_dict() | {"norm.bias": torch.full((16,), float("nan"))}
    return {
        "missing": (folder / "no.pth", r"no.pth do not exist; a file \(.safetensors, .pth, .pt, .bin\) or a folder"),
        "of no kind": (folder / "a.npz", r"a.npz are of no kind that is read; allowed: .safetensors"),
        "cut safetensors": (halves[0], r"half.safetensors are broken: SafetensorError"),
        "cut pickle": (halves[1], r"half.pth are broken"),
        "empty": (folder / "empty.pth", r"empty.pth are broken: EOFError$"),
        "text": (folder / "text.bin", r"text.bin are broken"),
        "code": (folder / "code.pth", r"code.pth hold pickled objects \((posix|nt).system\), which may run code and are not read"),
        "code in a plain pickle": (folder / "plain.bin", r"plain.bin hold pickled objects \((posix|nt).system\)"),
        "no tensors": (write(folder / "numbers.pth", {"epoch": 3}), r"numbers.pth hold no state dict"),
        "not finite": (write(folder / "nan.pth", nan), r"nan.pth hold numbers that are not finite: norm.bias"),
        "another network": (write(folder / "other.pth", {"conv1.weight": torch.ones(2)}), r"other.pth are of another architecture: no "),
    }


def test_a_file_that_cannot_be_used_is_named_in_one_line_before_any_work(network: nn.Module, tiny_vit: ArchSpec, tmp_path: Path):
    for what, (file, message) in damaged(tmp_path, network).items():
        with pytest.raises(ValueError, match=message) as raised:
            weights_from(file, tiny_vit)
        assert "\n" not in str(raised.value), what
        assert len(str(raised.value)) < 400 + len(str(tmp_path)), what


def test_a_folder_holds_a_file_for_each_model(network: nn.Module, tiny_vit: ArchSpec, tmp_path: Path):
    file = write(tmp_path / "mine.pth", network.state_dict())
    for name in ("mine", "timm:mine", "somewhere/mine.json"):
        assert weights_from(tmp_path, tiny_vit, name).path == file
    with pytest.raises(ValueError, match=r"one file is expected for model 'yours', and there is no yours with .safetensors, .pth"):
        weights_from(tmp_path, tiny_vit, "yours")
    write(tmp_path / "mine.safetensors", network.state_dict())
    with pytest.raises(ValueError, match=r"and there is several: mine.safetensors, mine.pth"):
        weights_from(tmp_path, tiny_vit, "mine")


def test_a_file_is_known_by_its_bytes(network: nn.Module, tiny_vit: ArchSpec, tmp_path: Path, never_settled: None):
    file = write(tmp_path / "a.pth", network.state_dict())
    weights = weights_from(file, tiny_vit)
    moved = weights_from(file.rename(tmp_path / "b.pth"), tiny_vit)
    assert moved == weights
    assert moved.identity == weights.identity
    with pytest.raises(ValueError, match=r"a.pth are gone"):
        load_weights(build_model(tiny_vit, seed=0), tiny_vit, weights)
    write(tmp_path / "b.pth", build_model(tiny_vit, seed=8).state_dict())
    assert weights_from(tmp_path / "b.pth", tiny_vit) != weights
    with pytest.raises(ValueError, match=r"b.pth have changed: their sha256 is \w{16} and was \w{16}"):
        load_weights(build_model(tiny_vit, seed=0), tiny_vit, moved)


def test_weights_are_part_of_the_key_of_a_measurement_and_of_no_digest(network: nn.Module, tiny_vit: ArchSpec, tmp_path: Path):
    recipe = Recipe(epochs=1)
    weights = weights_from(write(tmp_path / "a.pth", network.state_dict()), tiny_vit)
    moved = replace(weights, path=tmp_path / "elsewhere.pth")
    other = replace(weights, checksum="0" * 32)
    keys = [job(Candidate(model=tiny_vit, recipe=recipe, weights=each), tmp_path).key for each in (None, weights, moved, other)]
    assert keys[0] == "728bca1d2434ed91"  # as it was before candidates had weights
    assert keys[1] == keys[2]
    assert len(set(keys)) == 3
    assert Candidate(model=tiny_vit, weights=weights).to_json()["weights"] == {"sha256": weights.checksum, "file": "a.pth"}


def job(candidate: Candidate, folder: Path) -> Job:
    return Job(trial=0, candidate=candidate, calls=(Call("cost"),), seed=0, data="digits", data_fingerprint="digits", workdir=folder)


RECIPE = Recipe(epochs=1, batch_size=256, lr=1e-2, warmup_epochs=0, flip=False)


def test_a_training_starts_from_the_weights_and_keeps_what_is_frozen(network: nn.Module, tiny_vit: ArchSpec, tmp_path: Path):
    weights = weights_from(write(tmp_path / "a.pth", network.state_dict()), tiny_vit)
    dataset = load_dataset("digits", img_size=8)
    recipe = replace(RECIPE, freeze=1, drop_path=0.5)
    trained = train(tiny_vit, recipe, dataset, workdir=tmp_path / "one", weights=weights).network.state_dict()
    moved = {name for name, tensor in network.state_dict().items() if not torch.equal(trained[name], tensor)}
    still = ("patch_embed.", "prefix.", "position.", "stages.0.blocks.0.")
    assert moved == {name for name in trained if not name.startswith(still)}
    fresh = train(tiny_vit, recipe, dataset, workdir=tmp_path / "one").network.state_dict()
    assert not torch.equal(fresh["stages.0.blocks.0.mixer.qkv.weight"], trained["stages.0.blocks.0.mixer.qkv.weight"])


def test_accuracy_is_that_of_the_network_that_was_stored(network: nn.Module, tiny_vit: ArchSpec, tmp_path: Path):
    save_model(tmp_path / "model.pt", network, tiny_vit)
    dataset = load_dataset("digits", img_size=8)
    context = Context(seed=3, dataset=dataset, weights=weights_from(tmp_path / "model.pt", tiny_vit), workdir=tmp_path)
    accuracy = evaluators.get("accuracy")
    measured = accuracy.function(tiny_vit, context, accuracy.settings())
    for part in ("val", "test"):
        indices = getattr(dataset, part)
        assert measured[f"{part}_top1_pct"] == top1_pct(predict(network, dataset, indices, device="cpu"), dataset.labels[indices])


@pytest.mark.parametrize("study", ["tune", "ablations"])
def test_studies_that_train_have_flags_for_fine_tuning(study: str):
    settings, _ = parse_study(study, ["--layer-decay", "0.5", "--freeze", "1"])
    recipe = studies.get(study)(settings).phases[0].example.recipe
    assert recipe is not None
    assert (recipe.layer_decay, recipe.freeze) == (0.5, 1)


def test_a_frozen_block_computes_as_in_evaluation(tiny_vit: ArchSpec):
    from workers.layers import freeze

    built = build_model(replace(tiny_vit), seed=0, drop_path=0.5)
    freeze(built, 2)
    blocks = built.get_submodule("stages.0.blocks")
    assert not any(module.training for module in blocks.modules() if module is not blocks)
    assert built.get_submodule("head").training
    assert not built.get_submodule("patch_embed").training
    with pytest.raises(SpecError, match="freeze is 3; the network has 2 blocks"):
        freeze(built, 3)


def test_layers_are_numbered_as_timm_numbers_them(tiny_vit: ArchSpec):
    from space.state_dicts import from_timm

    theirs = {from_timm(name): number for name, number in layer_numbers(build_model(TIMM_TINY, seed=0)).items()}
    assert layer_numbers(build_model(tiny_vit, seed=0)) == theirs


def test_rates_decay_by_layer_as_in_timm(tiny_vit: ArchSpec):
    from timm.optim import param_groups_layer_decay

    built = build_model(tiny_vit, seed=0)
    groups = param_groups_layer_decay(built, layer_decay=0.7)
    theirs = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    ours = rate_scales(built, 0.7)
    assert {name: theirs[id(parameter)] for name, parameter in built.named_parameters()} == pytest.approx(ours)
    assert set(rate_scales(built, 1.0).values()) == {1.0}


def test_recipes_without_the_new_fields_keep_their_digest():
    assert Recipe(epochs=20).digest == "93165ac3f37e9e4b"
    assert Recipe(epochs=20, layer_decay=0.8).digest != Recipe(epochs=20, freeze=1).digest
    with pytest.raises(SpecError, match=r"layer_decay is 1.5; allowed: above 0 to 1"):
        Recipe(epochs=20, layer_decay=1.5)


@pytest.fixture
def folder_with_weights(tmp_path: Path) -> Path:
    """`w/vit_digits.pth` in a folder to run commands in."""
    from space.catalog import resolve

    (tmp_path / "w").mkdir()
    write(tmp_path / "w" / "vit_digits.pth", build_model(resolve("vit_digits"), seed=5).state_dict())
    return tmp_path


def test_evaluate_starts_from_a_file_and_says_so_in_one_line(folder_with_weights: Path):
    flags = ["evaluate", "vit_digits", "--evaluators", "accuracy", "--weights", "w"]
    shown = run_here(main, *flags, cwd=folder_with_weights)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("weights vit_digits.pth (sha256 ")
    assert "test_top1_pct" in shown.stdout
    told = json.loads(run_here(main, *flags, "--json", cwd=folder_with_weights).stdout)
    assert told["weights"]["file"] == "vit_digits.pth"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("evaluate vit_digits --evaluators cost --weights w", "none of --evaluators cost starts from weights; accuracy, "),
        ("evaluate vit_digits --evaluators accuracy", "accuracy needs --weights: a network with fresh weights knows nothing"),
        ("evaluate vit_digits --img-size 8 --evaluators accuracy --weights w/none.pth", "w/none.pth do not exist"),
        ("evaluate vit_cifar --evaluators train --recipe epochs=1 --weights w/vit_digits.pth", "are of another architecture: no "),
        ("evaluate vit_digits --evaluators train --recipe epochs=1,freeze=5", "freeze is 5; the network has 4 blocks"),
        ("smoke --weights w", "means nothing here: study 'smoke' trains no network of yours"),
        ("tune --model vit_cifar --weights w --data digits", "there is no vit_cifar with .safetensors"),
    ],
)
def test_a_mistake_with_weights_is_one_line_and_no_work(command: str, message: str, folder_with_weights: Path):
    shown = run_here(main, *command.split(), cwd=folder_with_weights)
    assert shown.returncode == 2
    assert message in shown.stderr
    assert shown.stderr.count("\n") == 1
    assert {path.name for path in folder_with_weights.iterdir()} <= {"w", "runs"}


@pytest.mark.parametrize("phase", ["tune/recipes", "ablations/train"])
def test_a_study_resumes_with_a_moved_file_and_not_with_a_changed_one(phase: str, folder_with_weights: Path, never_settled: None):
    file = folder_with_weights / "w" / "vit_digits.pth"
    settings = {"runs": folder_with_weights / "runs"}
    created = search.open_study(phase, **settings, weights=file)
    assert created.user_attrs["settings"]["weights"].keys() == {"sha256"}
    moved = shutil.move(file, folder_with_weights / "moved.pth")
    assert search.open_study(phase, **settings, weights=moved).user_attrs == created.user_attrs
    tensors = torch.load(moved, weights_only=True)
    write(moved, tensors | {"norm.bias": tensors["norm.bias"] + 1})
    with pytest.raises(SettingsError, match=r"weights.sha256 was '\w+', now '\w+'"):
        search.open_study(phase, **settings, weights=moved)
    with pytest.raises(SettingsError, match=r"weights was .*, now None"):
        search.open_study(phase, **settings)
