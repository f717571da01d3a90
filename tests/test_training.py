"""Training: a pure function of model, recipe and data, whatever interrupts it."""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from forked import Forked

from space import catalog
from space.model import build_model
from space.recipe import Recipe
from space.registry import SpecError
from space.spec import Component
from space.timm_spec import TimmSpec
from workers import training as training_module
from workers.data import load_dataset
from workers.evaluator import Context, EvaluationError, evaluators
from workers.evaluators.train import TrainSettings, train_network
from workers.inference import predict, top1_pct
from workers.learner import make_optimizer, make_schedule
from workers.objectives import Classification
from workers.training import train

QUICK = Recipe(epochs=2, batch_size=256, lr=2e-3, warmup_epochs=1, flip=False)
THOROUGH = Recipe(epochs=12, batch_size=64, lr=1e-2, warmup_epochs=1, flip=False, crop="none", label_smoothing=0.0)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits(tiny_vit):
    return load_dataset("digits", img_size=tiny_vit.img_size)


SAVE = training_module.save_checkpoint


def save_and_stop(*args):
    """A checkpoint, and the end of the process that wrote it."""
    SAVE(*args)
    raise KeyboardInterrupt


def bits(network) -> bytes:
    return b"".join(tensor.detach().numpy().tobytes() for tensor in network.state_dict().values())


def bits_of(model, recipe, dataset, workdir, **how) -> bytes:
    return bits(train(model, recipe, dataset, workdir=workdir, **how).network)


def test_a_network_learns_the_digits(tiny_vit, digits, tmp_path):
    trained = train(tiny_vit, THOROUGH, digits, workdir=tmp_path)
    logits = predict(trained.network, digits, digits.test, device="cpu")
    assert top1_pct(logits, digits.labels[digits.test]) > 60


def test_equal_trainings_have_equal_bits_and_other_seeds_have_others(tiny_vit, digits, tmp_path):
    first, again, other = (
        bits_of(tiny_vit, replace(QUICK, seed=seed), digits, tmp_path / name) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again
    assert first != other


VARIANTS = {
    "plain": {},
    "lion": {"optimizer": "lion"},
    "lamb": {"optimizer": "lamb"},
    "sgd": {"optimizer": "sgd"},
    "average": {"ema_decay": 0.9},
    "bf16": {"precision": "bf16"},
    "drop_path": {"drop_path": 0.2},
    "accumulation": {"num_accumulation": 2},
    "mixpro": {"mixing": "mixpro"},
    "mixup_cutmix": {"mixing": "mixup_cutmix"},
    "randaugment": {"randaugment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.25, "crop": "resized"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_stopped_after_any_step_and_resumed_it_ends_with_the_same_bits(tiny_vit, digits, tmp_path, monkeypatch, variant):
    """Whatever the recipe holds, a checkpoint holds all that the rest of the training depends on."""
    recipe = replace(QUICK, **VARIANTS[variant])
    uninterrupted = bits_of(tiny_vit, recipe, digits, tmp_path / "uninterrupted")
    workdir = tmp_path / "interrupted"
    num_stops = 0
    with monkeypatch.context() as patch:
        patch.setattr(training_module, "save_checkpoint", save_and_stop)
        while True:
            try:
                # Time goes into checkpoints here: every step is written, and ends the process that took it.
                resumed = bits_of(tiny_vit, recipe, digits, workdir, checkpoint_every_s=0)
            except KeyboardInterrupt:
                num_stops += 1
            else:
                break
    assert num_stops == 2 * (len(digits.train) // 256) - 1
    assert resumed == uninterrupted


def train_to_the_end(workdir):
    torch.set_num_threads(1)
    model = catalog.resolve("vit_digits")
    recipe = Recipe(epochs=3, batch_size=128, mixing="mixpro", drop_path=0.1, ema_decay=0.9, flip=False)
    trained = train(model, recipe, load_dataset("digits", img_size=model.img_size), workdir=workdir, checkpoint_every_s=0)
    torch.save(trained.network.state_dict(), workdir / "end.pt")


def newest_step(workdir) -> int:
    return max((int(path.name.split("-")[1]) for path in workdir.glob("checkpoints-*/step-*.pt")), default=0)


@pytest.mark.slow
def test_killed_with_kill_9_and_resumed_it_ends_with_the_same_bits(tmp_path):
    for name in ("uninterrupted", "killed"):
        (tmp_path / name).mkdir()
    whole = Forked(train_to_the_end, tmp_path / "uninterrupted", folder=tmp_path / "uninterrupted")
    generator = random.Random(0)
    for kill_after in (1, 12, 20):
        process = Forked(train_to_the_end, tmp_path / "killed", folder=tmp_path / "killed")
        while process.is_running and newest_step(tmp_path / "killed") < kill_after:
            time.sleep(0.005)
        assert process.is_running, "it ended before it could be killed"
        # Anywhere in a step, in the middle of a write or between two.
        time.sleep(generator.random() * 0.05)
        process.send(signal.SIGKILL)
        process.wait()
    resumed = Forked(train_to_the_end, tmp_path / "killed", folder=tmp_path / "killed")
    for ended in (resumed.wait(), whole.wait()):
        assert ended.returncode == 0, ended.stderr
    ends = [torch.load(tmp_path / name / "end.pt", weights_only=True) for name in ("uninterrupted", "killed")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_a_damaged_checkpoint_costs_a_step_and_no_bit(tiny_vit, digits, tmp_path, monkeypatch):
    uninterrupted = bits_of(tiny_vit, QUICK, digits, tmp_path / "whole")
    save, workdir = training_module.save_checkpoint, tmp_path / "damaged"

    def save_and_stop_at_3(folder, step, state):
        path = save(folder, step, state)
        if step == 3:
            path.write_bytes(path.read_bytes()[:-1])
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training_module, "save_checkpoint", save_and_stop_at_3)
        with pytest.raises(KeyboardInterrupt):
            bits_of(tiny_vit, QUICK, digits, workdir, checkpoint_every_s=0)
    warnings: list[str] = []
    assert bits_of(tiny_vit, QUICK, digits, workdir, warn=warnings.append) == uninterrupted
    assert len(warnings) == 1
    assert "damaged" in warnings[0]


def test_a_checkpoint_of_another_recipe_is_neither_used_nor_removed(tiny_vit, digits, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(training_module, "save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            bits_of(tiny_vit, QUICK, digits, tmp_path / "a", checkpoint_every_s=0)
    other = replace(QUICK, seed=1)
    assert bits_of(tiny_vit, other, digits, tmp_path / "a") == bits_of(tiny_vit, other, digits, tmp_path / "b")
    assert len(list((tmp_path / "a").glob("checkpoints-*/step-*"))) == 1, "it is kept for the training that wrote it"


def test_training_leaves_the_global_generators_alone(tiny_vit, digits, tmp_path):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    train(tiny_vit, replace(QUICK, epochs=1, mixing="mixup_cutmix", drop_path=0.1), digits, workdir=tmp_path)
    assert states() == before


def test_a_loss_that_is_not_finite_ends_it_and_names_the_step(tiny_vit, digits, tmp_path, monkeypatch):
    cross_entropy = torch.nn.functional.cross_entropy
    calls = []

    def broken(*args, **kwargs):
        calls.append(None)
        return cross_entropy(*args, **kwargs) * (float("nan") if len(calls) > 6 else 1.0)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", broken)
    words = r"gradient is not finite at step 6 \(epoch 2 of 2\); the last good checkpoint is .*step-00000006"
    with pytest.raises(EvaluationError, match=words) as error:
        train(tiny_vit, QUICK, digits, workdir=tmp_path, checkpoint_every_s=0)
    assert error.value.kind == "non_finite"


class BrokenGradient(Classification):
    """The loss of step 3 is finite, but its gradient is infinite."""

    def loss(self, forward, batch, position):
        loss = super().loss(forward, batch, position)
        if position.step == 3:
            loss.register_hook(lambda gradient: gradient / 0.0)
        return loss


def test_a_gradient_that_is_not_finite_is_noticed_before_it_is_saved(tiny_vit, digits, tmp_path):
    with pytest.raises(EvaluationError, match=r"not finite at step 3 .*the last good checkpoint is .*step-00000003"):
        train(tiny_vit, QUICK, digits, objective=BrokenGradient(), workdir=tmp_path, checkpoint_every_s=0)


def test_lamb_clips_only_as_the_recipe_says(tiny_vit):
    recipe = Recipe(epochs=1, optimizer="lamb", clip_grad_norm=0.0)
    network = build_model(tiny_vit, seed=0)
    optimizer = make_optimizer(network, recipe)
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    optimizer.step()
    moment = optimizer.state[next(network.parameters())]["exp_avg"]
    assert moment.flatten()[0].item() == pytest.approx(10.0), "a tenth of the gradient"


def test_batch_norms_and_their_average_are_resumed_too(digits, tmp_path, monkeypatch):
    model = TimmSpec(name="test_resnet", img_size=8, num_classes=10)
    recipe = replace(QUICK, epochs=1, ema_decay=0.9)
    uninterrupted = bits_of(model, recipe, digits, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(training_module, "save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            bits_of(model, recipe, digits, tmp_path / "stopped", checkpoint_every_s=0)
    assert bits_of(model, recipe, digits, tmp_path / "stopped") == uninterrupted


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_learns_the_same(tiny_vit, digits, tmp_path):
    plain, compiled = (
        train(tiny_vit, replace(QUICK, compile=is_compiled), digits, workdir=tmp_path / str(is_compiled)).network.state_dict()
        for is_compiled in (False, True)
    )
    assert plain.keys() == compiled.keys()
    # Fused kernels sum in another order, and AdamW's first steps amplify the last bits of small gradients.
    assert all(torch.allclose(plain[name], compiled[name], atol=2e-3) for name in plain)


def test_cells_of_a_mask_are_whole_patches_of_a_timm_vit():
    recipe = Recipe(epochs=1, mixing="mask_mix")
    model = TimmSpec(name="vit_tiny_patch16_224", img_size=224, num_classes=10)
    mixer = training_module.make_mixer(recipe, img_size=224, patch_size=training_module.token_size(model))
    assert mixer.mix(torch.zeros(4, 3, 224, 224), 0).cell_size % 16 == 0


def test_accumulated_parts_give_the_gradient_of_the_whole_batch(tiny_vit, digits, tmp_path):
    """Up to the order in which floats are summed: the same step in one part and in four."""
    recipe = replace(QUICK, epochs=1, batch_size=len(digits.train) // 4 * 4, optimizer="sgd", lr=0.1)
    whole, parts = (
        train(tiny_vit, replace(recipe, num_accumulation=number), digits, workdir=tmp_path / str(number)).network.state_dict()
        for number in (1, 4)
    )
    assert all(torch.allclose(whole[name], parts[name], atol=1e-5) for name in whole)


def test_weight_decay_spares_norms_biases_positions_tokens_and_exponents(tiny_vit):
    model = replace(tiny_vit, pooling=Component("ggem", groups=2))
    network = build_model(model, seed=0)
    recipe = Recipe(epochs=1, weight_decay=0.3, exponent_lr_scale=7.0)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = make_optimizer(network, recipe).param_groups
    decayed = {names[id(parameter)] for group in groups if group["weight_decay"] for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(names)
    assert decayed == {name for name in names.values() if name.endswith("weight") and "norm" not in name}
    assert {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]} == {
        name: 7.0 if name == "pooling.p" else 1.0 for name in names.values()
    }


def test_lion_divides_the_rate_and_multiplies_the_decay():
    adamw = Recipe(epochs=1, lr=1e-3, weight_decay=0.05)
    lion = replace(adamw, optimizer="lion", lion_scale=5.0)
    assert (lion.optimizer_lr, lion.optimizer_weight_decay) == pytest.approx((2e-4, 0.25))
    assert lion.optimizer_lr * lion.optimizer_weight_decay == pytest.approx(adamw.optimizer_lr * adamw.optimizer_weight_decay)


def test_the_rate_warms_up_to_its_peak_and_falls_to_its_end():
    parameter = torch.nn.Parameter(torch.zeros(1))
    recipe = Recipe(epochs=10, lr=1.0, min_lr=0.01, warmup_epochs=2)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = make_schedule(optimizer, recipe, steps_per_epoch=10)
    rates = []
    for step in range(100):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.01)
    assert rates[20] == max(rates) == pytest.approx(1.0)
    assert (rates[59] + rates[60]) / 2 == pytest.approx((1.0 + 0.01) / 2)
    assert rates[:21] == sorted(rates[:21])
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[-1] == pytest.approx(0.01)


def test_curves_and_progress_are_reported_once_per_epoch(tiny_vit, digits, tmp_path):
    points: list[tuple[str, float, int]] = []
    train(tiny_vit, QUICK, digits, workdir=tmp_path, report=lambda *point: points.append(point))
    for name in ("train_loss", "val_top1_pct", "val_nll", "lr", "lr_x_weight_decay", "images_per_s", "data_wait_pct"):
        assert [step for shown, _, step in points if shown == name] == [1, 2]
    assert [value for name, value, _ in points if name == "progress"][-1] == 1.0


def test_what_the_optimizer_is_given_is_reported_and_lion_shrinks_weights_as_adamw_does(tiny_vit, digits, tmp_path):
    def reported(name: str, optimizer: str) -> list[float]:
        points: list[tuple[str, float, int]] = []
        recipe = replace(QUICK, optimizer=optimizer, weight_decay=0.05)
        train(tiny_vit, recipe, digits, workdir=tmp_path / name / optimizer, report=lambda *point: points.append(point))
        return [value for shown, value, _ in points if shown == name]

    adamw, lion = (reported("lr_x_weight_decay", optimizer) for optimizer in ("adamw", "lion"))
    assert adamw == pytest.approx(lion)
    rates = reported("lr", "adamw")
    assert adamw == pytest.approx([rate * 0.05 for rate in rates])
    assert reported("lr", "lion") == pytest.approx([rate / 10 for rate in rates])


@pytest.mark.parametrize(
    ("change", "recipe", "words"),
    [
        ({"num_classes": 7}, QUICK, "7 classes, data 'digits' has 10"),
        ({"in_chans": 1}, QUICK, "in_chans 1"),
        ({"prefix": None, "pooling": Component("mean")}, replace(QUICK, mixing="transmix"), "class token"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_training(tiny_vit, digits, tmp_path, change, recipe, words):
    with pytest.raises(SpecError, match=words):
        train(replace(tiny_vit, **change), recipe, digits, workdir=tmp_path)


def test_evaluator_train_judges_the_network_it_stores_and_is_not_repeated(tiny_vit, digits, tmp_path):
    from workers.checkpoints import load_model

    context = Context(seed=0, dataset=digits, recipe=QUICK, workdir=tmp_path)
    values = train_network(tiny_vit, context, TrainSettings())
    network, _ = load_model(tmp_path / "model.pt")
    stored = np.load(tmp_path / "artifacts" / "predictions.npz")
    assert stored["ids"].tolist() == digits.test.tolist()
    assert np.array_equal(stored["logits"], predict(network, digits, digits.test, device="cpu"))
    assert values["test_top1_pct"] == top1_pct(stored["logits"], stored["labels"])
    assert len(stored["train_loss"]) == QUICK.epochs
    assert values["train_loss"] == stored["train_loss"][-1] < stored["train_loss"][0]
    assert not list(tmp_path.glob("checkpoints-*"))
    (tmp_path / "artifacts" / "predictions.npz").unlink()
    assert train_network(tiny_vit, context, TrainSettings()) == values
    assert not (tmp_path / "artifacts" / "predictions.npz").exists(), "it was trained again"


def test_evaluator_train_without_a_recipe_says_what_is_missing(tiny_vit, digits, tmp_path):
    with pytest.raises(SpecError, match="--recipe"):
        train_network(tiny_vit, Context(seed=0, dataset=digits, workdir=tmp_path), evaluators.get("train").parse_settings({}))


STOPPED = replace(QUICK, epochs=4, ema_decay=0.9, mixing="mixpro", drop_path=0.1)


def values_of(model, dataset, workdir, stop_after, continues=None, *, recipe=STOPPED, warn=pytest.fail):
    context = Context(seed=0, dataset=dataset, recipe=recipe, workdir=workdir, continues=continues, warn=warn)
    return train_network(model, context, TrainSettings(stop_after=stop_after))


def files_of(folder) -> dict[str, tuple[bytes, int]]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.rglob("*")) if path.is_file()}


def weights_of(workdir) -> bytes:
    from workers.checkpoints import load_model

    return bits(load_model(workdir / "model.pt")[0])


def losses_of(workdir) -> list[float]:
    with np.load(workdir / "artifacts" / "predictions.npz") as stored:
        return stored["train_loss"].tolist()


def test_the_losses_of_epochs_before_an_old_checkpoint_are_not_known(tiny_vit, digits, tmp_path, monkeypatch):
    """Until November 2026 a checkpoint held the loss of the last epoch alone."""

    def save_as_then(folder, step, state):
        losses = state.pop("losses")
        return SAVE(folder, step, state | {"train_loss": losses[-1]})

    recipe = replace(QUICK, epochs=3)
    whole = train(tiny_vit, recipe, digits, workdir=tmp_path / "whole").losses
    with monkeypatch.context() as patch:
        patch.setattr(training_module, "save_checkpoint", save_as_then)
        train(tiny_vit, recipe, digits, workdir=tmp_path / "old", stop_after=2)
    resumed = train(tiny_vit, recipe, digits, workdir=tmp_path / "old").losses
    assert math.isnan(resumed[0])
    assert resumed[1:] == whole[1:]


def damage(path):
    """Not in place: the file may be another trial's too."""
    contents = path.read_bytes()
    path.unlink()
    path.write_bytes(contents[:-1])


def test_trials_that_continue_one_another_end_with_the_bits_of_one_that_never_stopped(tiny_vit, digits, tmp_path):
    whole = values_of(tiny_vit, digits, tmp_path / "whole", 0)
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    values_of(tiny_vit, digits, first, 1)
    before = files_of(first)
    values_of(tiny_vit, digits, second, 2, first)
    assert files_of(first) == before
    assert values_of(tiny_vit, digits, third, 4, second) == whole
    assert weights_of(third) == weights_of(tmp_path / "whole")
    assert losses_of(third) == losses_of(tmp_path / "whole")
    assert losses_of(third)[:2] == losses_of(second)
    assert list(second.glob("checkpoints-*/step-*")), "a stopped training can be continued"
    assert not list(third.glob("checkpoints-*")), "a finished one can not"


def epochs_trained(model, dataset, workdir, stop_after, continues, **how):
    """The epochs that were not taken over, by what is reported."""
    points = []
    train(
        model,
        STOPPED,
        dataset,
        workdir=workdir,
        stop_after=stop_after,
        continue_from=continues,
        report=lambda name, value, step: points.append((name, value, step)),
        **how,
    )
    assert [value for name, value, _ in points if name == "progress"][-1] == 1.0
    return [step for name, _, step in points if name == "train_loss"]


def test_only_the_epochs_after_the_earlier_stop_are_trained_and_own_newer_checkpoints_win(tiny_vit, digits, tmp_path):
    assert epochs_trained(tiny_vit, digits, tmp_path / "first", 1, None) == [1]
    assert epochs_trained(tiny_vit, digits, tmp_path / "second", 2, tmp_path / "first", warn=pytest.fail) == [2]
    assert epochs_trained(tiny_vit, digits, tmp_path / "second", 3, tmp_path / "first", warn=pytest.fail) == [3]
    assert epochs_trained(tiny_vit, digits, tmp_path / "second", 1, tmp_path / "first", warn=pytest.fail) == [], "the first one's state"


@pytest.mark.parametrize("harm", [damage, os.unlink])
def test_without_the_earlier_checkpoint_it_is_trained_from_the_beginning(tiny_vit, digits, tmp_path, harm):
    whole = values_of(tiny_vit, digits, tmp_path / "whole", 0)
    values_of(tiny_vit, digits, tmp_path / "first", 2)
    for path in (tmp_path / "first").glob("checkpoints-*/step-*"):
        harm(path)
    before, warnings = files_of(tmp_path / "first"), []
    assert values_of(tiny_vit, digits, tmp_path / "second", 0, tmp_path / "first", warn=warnings.append) == whole
    assert weights_of(tmp_path / "second") == weights_of(tmp_path / "whole")
    assert "there is no intact checkpoint of this training" in warnings[-1]
    assert files_of(tmp_path / "first") == before


def test_a_training_stopped_elsewhere_is_not_taken_for_finished(tiny_vit, digits, tmp_path):
    first = values_of(tiny_vit, digits, tmp_path, 1)
    assert values_of(tiny_vit, digits, tmp_path, 1) == first
    assert values_of(tiny_vit, digits, tmp_path, 2) != first


@pytest.mark.parametrize("stop_after", [-1, 5])
def test_a_stop_outside_the_training_is_refused(tiny_vit, digits, tmp_path, stop_after):
    short = evaluators.get("train")
    with pytest.raises(SpecError, match=f"stop_after is {stop_after}; the recipe has 4 epochs, so allowed are 1 to 4"):
        short.check(tiny_vit, STOPPED, TrainSettings(stop_after=stop_after))


def test_the_average_of_a_short_training_is_of_its_end(tiny_vit, digits, tmp_path):
    """Without a warm-up it would be nearly the initial network: some 200 steps at .9999 take over 2 % of what is learned."""
    recipe = replace(THOROUGH, ema_decay=0.9999)
    trained = train(tiny_vit, recipe, digits, workdir=tmp_path)
    logits = predict(trained.network, digits, digits.test, device="cpu")
    assert top1_pct(logits, digits.labels[digits.test]) > 60


@pytest.mark.gpu
def test_a_network_learns_the_digits_on_the_gpu(tiny_vit, digits, tmp_path):
    from workers.distributed import Process

    trained = train(tiny_vit, THOROUGH, digits, workdir=tmp_path, process=Process(device="cuda"))
    logits = predict(trained.network, digits, digits.test, device="cuda")
    assert top1_pct(logits, digits.labels[digits.test]) > 60
