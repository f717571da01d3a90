import dataclasses
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from space.randomness import stream
from space.recipe import Recipe
from space.registry import SpecError
from workers.augmentation import Draws, augment, draw, make_image_transform, normalise, seeded
from workers.data import IMAGENET_MEAN, IMAGENET_STD


def global_state():
    numbers = np.random.get_state()
    return random.getstate(), numbers[1].tobytes(), numbers[2:], torch.get_rng_state().numpy().tobytes()


def pictures(num_images, img_size=16):
    return torch.randint(0, 256, (num_images, 3, img_size, img_size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def columns(draws):
    return {name: column for name, column in vars(draws).items() if column is not None}


def draws_of(num_images, **given):
    return Draws(**{"shift": None, "flip": None, "box": None, **given})


RECIPE = Recipe(epochs=1, seed=3, random_erasing=0.5)


def test_normalisation_is_imagenets():
    images = pictures(2)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(normalise(images), (images / 255 - mean) / std, atol=1e-5, rtol=1e-5)  # fp32 rounding


def test_nothing_to_do_is_normalisation():
    assert torch.equal(augment(pictures(2), draws_of(2)), normalise(pictures(2)))


@given(st.integers(-4, 4), st.integers(-4, 4), st.booleans())
def test_an_image_is_cropped_from_its_reflection_and_mirrored(down, right, is_flipped):
    image = pictures(1, 32)
    padded = torch.nn.functional.pad(image.float(), (4, 4, 4, 4), mode="reflect").to(torch.uint8)
    expected = padded[:, :, 4 - down : 36 - down, 4 - right : 36 - right]
    expected = expected.flip(3) if is_flipped else expected
    draws = draws_of(1, shift=torch.tensor([[down, right]]), flip=torch.tensor([is_flipped]))
    assert torch.equal(augment(image, draws), normalise(expected))


def test_each_image_of_a_batch_is_changed_as_it_would_be_alone():
    images, draws = pictures(8), draw(RECIPE, 0, num_images=8, img_size=16)
    together = augment(images, draws)
    for index in range(8):
        rows = slice(index, index + 1)
        assert torch.equal(together[rows], augment(images[rows], draws.map(lambda column, rows=rows: column[rows])))


def test_the_given_images_are_not_changed():
    images = pictures(8)
    augment(images, draw(RECIPE, 0, num_images=8, img_size=16))
    assert torch.equal(images, pictures(8))


@given(seed=st.integers(0, 99), epoch=st.integers(0, 99))
@settings(max_examples=20)
def test_draws_are_of_seed_epoch_and_image(seed, epoch):
    recipe = dataclasses.replace(RECIPE, seed=seed)
    draws, again, longer = (columns(draw(recipe, epoch, num_images=number, img_size=32)) for number in (40, 40, 60))
    other = columns(draw(recipe, epoch + 1, num_images=40, img_size=32))
    for name, column in draws.items():
        assert torch.equal(column, again[name])
        assert torch.equal(column, longer[name][:40])
        assert not torch.equal(column, other[name])


def test_erasing_changes_no_shift_and_no_flip():
    without = dataclasses.replace(RECIPE, random_erasing=0.0)
    first, second = (columns(draw(recipe, 0, num_images=40, img_size=32)) for recipe in (RECIPE, without))
    assert first.keys() - second.keys() == {"box"}
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_shifts_are_uniform_over_an_eighth_and_half_are_flipped():
    draws = draw(RECIPE, 0, num_images=20_000, img_size=32)
    counts = torch.bincount((draws.shift + 4).flatten(), minlength=9)
    assert len(counts) == 9
    assert (counts / counts.sum() - 1 / 9).abs().max() < 0.0063  # 4 sigma of 40,000 draws
    assert abs(draws.flip.float().mean() - 0.5) < 0.0142  # 4 sigma


@pytest.mark.parametrize("change", [{"crop": "none"}, {"flip": False}, {"random_erasing": 0.0}])
def test_what_a_recipe_leaves_out_is_not_drawn(change):
    missing = {"crop": "shift", "flip": "flip", "random_erasing": "box"}[next(iter(change))]
    assert missing not in columns(draw(dataclasses.replace(RECIPE, **change), 0, num_images=4, img_size=32))


def test_erased_areas_are_those_of_timm():
    from timm.data.random_erasing import RandomErasing

    timms, image = RandomErasing(probability=0.5, device="cpu"), torch.ones(1, 32, 32)
    with seeded("timm"):
        erased = torch.stack([timms(image.clone()) for _ in range(6000)])[:, 0] == 0
    boxes = draw(RECIPE, 0, num_images=6000, img_size=32).box
    ours = augment(torch.full((6000, 3, 32, 32), 255, dtype=torch.uint8), draws_of(6000, box=boxes))[:, 0] == 0
    for measure in (
        lambda mask: mask.any((1, 2)).float(),
        lambda mask: mask.float().mean((1, 2)),
        lambda mask: mask.float().mean((1, 2)) ** 2,
        lambda mask: mask.any(1).sum(1) - mask.any(2).sum(1),
        lambda mask: mask[:, :8, :8].float().mean((1, 2)),
    ):
        first, second = measure(ours).double(), measure(erased).double()
        error = (first.var() / 6000 + second.var() / 6000).sqrt()
        assert abs(first.mean() - second.mean()) < 4 * error


def test_erased_pixels_are_the_mean_and_all_others_unchanged():
    images, draws = pictures(64), draw(RECIPE, 0, num_images=64, img_size=16)
    plain, erased = augment(images, dataclasses.replace(draws, box=None)), augment(images, draws)
    for before, after, (top, left, bottom, right) in zip(plain, erased, draws.box.tolist(), strict=True):
        inside = torch.zeros(16, 16, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        assert (after[:, inside] == 0).all()
        assert torch.equal(after[:, ~inside], before[:, ~inside])


def test_the_seeded_generators_are_put_back_even_after_an_error():
    before = global_state()

    def fail():
        with seeded(0, "x"):
            random.random(), np.random.random(), torch.rand(1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert global_state() == before


def test_the_same_name_gives_the_same_numbers():
    def numbers(*name):
        with seeded(*name):
            return random.random(), np.random.random(), torch.rand(1).item()

    assert numbers(1, 2) == numbers(1, 2)
    assert not set(numbers(1, 2)) & set(numbers(1, 3))


@pytest.mark.parametrize("change", [{"crop": "resized"}, {"randaugment": "rand-m9-mstd0.5-inc1"}, {"randaugment": "rand-m10-n3"}])
def test_transforms_of_single_images_keep_the_size_and_repeat_themselves(change):
    transform = make_image_transform(dataclasses.replace(RECIPE, **change), 16)
    image = Image.fromarray(pictures(1, 16)[0].permute(1, 2, 0).numpy())

    def transformed(index):
        with seeded(0, index):
            return np.asarray(transform(image))

    results = [transformed(index) for index in range(60)]
    assert {result.shape for result in results} == {(16, 16, 3)}
    assert len({result.tobytes() for result in results}) > 20
    assert all(np.array_equal(result, transformed(index)) for index, result in enumerate(results))


@pytest.mark.parametrize(
    "config", ["rand-m0-n14-p1.0-inc1", "rand-m10-n14-p1.0-inc1", "rand-m10-n14-p1.0", "rand-m9-mstd101-p1.0-tweights"]
)
def test_randaugment_works_at_every_magnitude(config):
    """timm asks Pillow to keep 0 bits at full magnitude, which Pillow 13 refuses."""
    transform = make_image_transform(dataclasses.replace(RECIPE, randaugment=config), 16)
    image = Image.fromarray(pictures(1, 16)[0].permute(1, 2, 0).numpy())
    for index in range(100):
        with seeded(stream("magnitude", index)):
            assert transform(image).size == (16, 16)


def test_a_recipe_without_such_transforms_has_none():
    assert make_image_transform(RECIPE, 16) is None


@pytest.mark.parametrize("config", ["augmix-m3", "rand-x9", "m9"])
def test_an_unknown_randaugment_is_refused(config):
    with pytest.raises(SpecError, match=f"randaugment is '{config}'; timm expects a string such as"):
        make_image_transform(dataclasses.replace(RECIPE, randaugment=config), 16)
