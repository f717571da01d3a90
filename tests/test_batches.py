import dataclasses
import io
import random
import tarfile
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from space.recipe import Recipe
from space.registry import SpecError
from workers.batches import TrainingBatches, evaluation_batches
from workers.data import DataSet, load_dataset

SIZE = 16
RECIPE = Recipe(epochs=2, batch_size=8, seed=5, random_erasing=0.3)
RECIPES = {
    "batched": RECIPE,
    "plain": Recipe(epochs=2, batch_size=8, crop="none", flip=False),
    "resized": dataclasses.replace(RECIPE, crop="resized"),
    "randaugment": dataclasses.replace(RECIPE, randaugment="rand-m9-mstd0.5-inc1"),
}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.tar"
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for label in "ab":
            for index in range(25):
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(buffer, "PNG")
                member = tarfile.TarInfo(f"{label}/{index}.png")
                member.size = len(buffer.getvalue())
                tar.addfile(member, io.BytesIO(buffer.getvalue()))
    return path


@pytest.fixture(scope="module", params=["in memory", "streamed"])
def dataset(archive, request):
    return load_dataset(f"tar:{archive}", img_size=SIZE, memory_mb=0 if request.param == "streamed" else 100)


def training(dataset, recipe, epoch=0, first_step=0, **options):
    return list(TrainingBatches(dataset, recipe, device="cpu", **options).epoch(epoch, first_step))


def assert_equal(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


def global_state():
    numbers = np.random.get_state()
    return random.getstate(), numbers[1].tobytes(), numbers[2:], torch.get_rng_state().numpy().tobytes()


def numbered(num_images, img_size=4, num_train=None):
    """A data set whose image i has the colour i, without anything to augment at this size but the flip."""
    images = np.broadcast_to(np.arange(num_images, dtype=np.uint8)[:, None, None, None], (num_images, 3, img_size, img_size))
    num_train = num_images - 2 if num_train is None else num_train
    images.flags.writeable = False
    return DataSet(
        source="numbered",
        digest="numbered",
        img_size=img_size,
        classes=("even", "odd"),
        labels=np.arange(num_images) % 2,
        train=np.arange(num_train),
        val=np.array([num_images - 2]),
        test=np.array([num_images - 1]),
        images=images,
    )


def colours(batch):
    return torch.round(batch.images[:, 0, 0, 0] * 0.229 * 255 + 0.485 * 255).long().tolist()


def test_an_epoch_has_each_training_image_once_and_no_other():
    batches = TrainingBatches(numbered(42), dataclasses.replace(RECIPE, random_erasing=0.0), device="cpu")
    seen = [colour for batch in batches.epoch(0) for colour in colours(batch)]
    assert (batches.num_steps, batches.images_per_step) == (5, 8)
    assert sorted(seen) == list(range(40))
    assert seen != sorted(seen)


def test_labels_are_those_of_the_images():
    for batch in training(numbered(42), dataclasses.replace(RECIPE, random_erasing=0.0)):
        assert batch.labels.tolist() == [colour % 2 for colour in colours(batch)]


def test_the_last_incomplete_batch_is_left_out():
    batches = TrainingBatches(numbered(42, num_train=39), RECIPE, device="cpu")
    assert batches.num_steps == 4
    assert [len(batch.images) for batch in batches.epoch(0)] == [8] * 4


@pytest.mark.parametrize(("num_train", "options", "expected"), [(7, {}, 6), (7, {"world_size": 2}, 4), (8, {}, 8)])
def test_a_set_smaller_than_a_batch_is_one_even_batch(num_train, options, expected):
    batches = TrainingBatches(numbered(42, num_train=num_train), dataclasses.replace(RECIPE, batch_size=16), device="cpu", **options)
    assert (batches.num_steps, batches.images_per_step) == (1, expected)


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="batch_size 8 is not a multiple of 6 \\(3 processes, num_accumulation 2\\)"):
        TrainingBatches(numbered(42), dataclasses.replace(RECIPE, num_accumulation=2), device="cpu", world_size=3)
    with pytest.raises(ValueError, match="train has 3 images, too few for 2 parts of a batch"):
        TrainingBatches(numbered(42, num_train=3), RECIPE, device="cpu", world_size=2)


def test_an_unknown_randaugment_is_refused_before_training(dataset):
    with pytest.raises(SpecError, match="randaugment is 'rond'"):
        TrainingBatches(dataset, dataclasses.replace(RECIPE, randaugment="rond"), device="cpu")


@pytest.mark.parametrize("name", RECIPES)
def test_batches_are_of_seed_and_epoch(dataset, name):
    recipe = RECIPES[name]
    batches = TrainingBatches(dataset, recipe, device="cpu")
    first, other, again = (list(batches.epoch(epoch)) for epoch in (0, 1, 0))
    assert_equal(first, again)
    assert not torch.equal(first[0].images, other[0].images)
    assert not torch.equal(first[0].images, training(dataset, dataclasses.replace(recipe, seed=6))[0].images)


@pytest.mark.parametrize("name", RECIPES)
def test_resuming_at_a_step_gives_the_batches_that_were_left(dataset, name):
    whole = training(dataset, RECIPES[name], epoch=1)
    for first_step in (0, 2, len(whole)):
        assert_equal(training(dataset, RECIPES[name], epoch=1, first_step=first_step), whole[first_step:])


@pytest.mark.parametrize("name", RECIPES)
def test_the_ranks_together_see_the_batch_of_one_process(dataset, name):
    alone = training(dataset, RECIPES[name])
    ranks = [training(dataset, RECIPES[name], rank=rank, world_size=2) for rank in range(2)]
    for step, batch in enumerate(alone):
        for rank in range(2):
            assert torch.equal(ranks[rank][step].images, batch.images[rank::2])
            assert torch.equal(ranks[rank][step].labels, batch.labels[rank::2])


@pytest.mark.parametrize("name", RECIPES)
def test_an_image_is_augmented_alike_in_batches_of_any_size(dataset, name):
    def images_of(batch_size):
        batches = training(dataset, dataclasses.replace(RECIPES[name], batch_size=batch_size))
        return torch.cat([batch.images for batch in batches])

    small, large = images_of(4), images_of(16)
    number = min(len(small), len(large))
    assert number >= 32
    assert torch.equal(small[:number], large[:number])


@pytest.mark.parametrize("name", ["batched", "resized", "randaugment"])
def test_loader_workers_change_nothing(archive, name):
    dataset = load_dataset(f"tar:{archive}", img_size=SIZE, memory_mb=0)
    alone, helped = (TrainingBatches(dataset, RECIPES[name], device="cpu", num_workers=number) for number in (0, 2))
    for epoch, first_step in ((0, 0), (1, 1)):
        assert_equal(list(alone.epoch(epoch, first_step)), list(helped.epoch(epoch, first_step)))


def test_an_epoch_may_be_left_before_its_end(archive):
    dataset = load_dataset(f"tar:{archive}", img_size=SIZE, memory_mb=0)
    batches = TrainingBatches(dataset, RECIPE, device="cpu", num_workers=2)
    next(batches.epoch(0))
    assert_equal(list(batches.epoch(1)), training(dataset, RECIPE, epoch=1))


def test_a_streamed_set_gives_the_batches_of_the_same_one_in_memory(archive):
    kept, streamed = (load_dataset(f"tar:{archive}", img_size=SIZE, memory_mb=mb) for mb in (100, 0))
    for name in ("batched", "randaugment"):
        assert_equal(training(kept, RECIPES[name]), training(streamed, RECIPES[name]))


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("name", RECIPES)
def test_global_generators_are_left_as_they_are(dataset, name, num_workers):
    before = global_state()
    training(dataset, RECIPES[name], num_workers=num_workers)
    list(evaluation_batches(dataset, dataset.test, device="cpu", batch_size=4, num_workers=num_workers))
    assert global_state() == before


def test_what_happens_globally_changes_no_batch(dataset):
    recipe = RECIPES["randaugment"]
    expected = training(dataset, recipe)
    random.seed(1)
    np.random.seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        assert_equal(training(dataset, recipe), expected)


@pytest.mark.parametrize("name", RECIPES)
def test_read_only_arrays_are_taken_without_a_warning(dataset, name):
    assert not dataset.labels.flags.writeable
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training(dataset, RECIPES[name])
        list(evaluation_batches(dataset, dataset.test, device="cpu", batch_size=4))


def test_evaluation_shows_the_images_as_they_are_in_the_given_order():
    indices = np.array([7, 3, 3, 41, 0])
    batches = list(evaluation_batches(numbered(42), indices, device="cpu", batch_size=2))
    assert [len(batch.images) for batch in batches] == [2, 2, 1]
    assert [colour for batch in batches for colour in colours(batch)] == indices.tolist()
    assert [label for batch in batches for label in batch.labels.tolist()] == [1, 1, 1, 1, 0]


def test_evaluation_is_the_same_streamed_with_or_without_workers(archive):
    kept, streamed = (load_dataset(f"tar:{archive}", img_size=SIZE, memory_mb=mb) for mb in (100, 0))
    expected = list(evaluation_batches(kept, kept.test, device="cpu", batch_size=4))
    for num_workers in (0, 2):
        found = evaluation_batches(streamed, kept.test, device="cpu", batch_size=4, num_workers=num_workers)
        assert_equal(list(found), expected)


def test_no_images_are_no_batches(dataset):
    assert list(evaluation_batches(dataset, dataset.test[:0], device="cpu", batch_size=4)) == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damage_met_while_streaming_is_replaced_and_recorded(tmp_path, num_workers):
    rng = np.random.default_rng(0)
    for label in "ab":
        (tmp_path / label).mkdir()
        for index in range(10):
            Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(tmp_path / label / f"{index}.png")
    dataset = load_dataset(f"folder:{tmp_path}", img_size=SIZE, memory_mb=0)
    expected = training(dataset, RECIPES["plain"])
    damaged = dataset.name(dataset.train[0])
    (tmp_path / damaged).write_bytes(b"nothing")
    batches = TrainingBatches(dataset, RECIPES["plain"], device="cpu", num_workers=num_workers)
    found = [batch for epoch in range(2) for batch in batches.epoch(epoch)]
    assert dataset.skipped == (damaged,)
    assert all(torch.equal(one.labels, other.labels) for one, other in zip(found, expected, strict=False))


def test_waiting_is_counted_and_the_step_is_not():
    batches = TrainingBatches(numbered(42), RECIPE, device="cpu")
    assert batches.wait_s == 0
    epoch = batches.epoch(0)
    next(epoch)
    before = batches.wait_s
    assert before > 0
    torch.cat([torch.rand(200, 200) @ torch.rand(200, 200) for _ in range(5)])
    assert batches.wait_s == before


@pytest.mark.gpu
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_gpu_gets_the_batches_of_the_cpu(dataset, name, num_workers):
    on_gpu = list(TrainingBatches(dataset, RECIPES[name], device="cuda", num_workers=num_workers).epoch(1, 1))
    for found, expected in zip(on_gpu, training(dataset, RECIPES[name], 1, 1), strict=True):
        assert found.images.device.type == found.labels.device.type == "cuda"
        torch.testing.assert_close(found.images.cpu(), expected.images, atol=1e-6, rtol=1e-6)  # division on another device
        assert torch.equal(found.labels.cpu(), expected.labels)


@pytest.mark.gpu
def test_the_generators_of_a_gpu_are_left_as_they_are(dataset):
    before = torch.cuda.get_rng_state()
    list(TrainingBatches(dataset, RECIPES["randaugment"], device="cuda").epoch(0))
    assert torch.equal(torch.cuda.get_rng_state(), before)
