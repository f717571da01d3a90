import io
import json
import pickle
import struct
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from workers.data import check_source, fingerprint, load_dataset, load_images, split_dataset
from workers.sources import natural_key

SIZE = 16


def picture(seed, file_format="PNG", size=(20, 24)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format)
    return buffer.getvalue()


def write_folder(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def in_classes(num_per_class, prefix="", labels=("cat", "dog"), seed=0):
    names = [f"{prefix}{label}/{index}.png" for label in labels for index in range(num_per_class)]
    return {name: picture(seed + number) for number, name in enumerate(names)}


def parts_of(dataset):
    return {"train": dataset.train, "val": dataset.val, "test": dataset.test}


def names_of(dataset, part):
    return {dataset.name(index) for index in parts_of(dataset)[part]}


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "images", in_classes(10))


def test_a_data_set_has_every_image_in_one_part():
    dataset = load_dataset("digits", img_size=SIZE)
    assert np.array_equal(np.sort(np.concatenate(list(parts_of(dataset).values()))), np.arange(1797))
    assert dataset.images.shape == (1797, 3, SIZE, SIZE)
    assert dataset.classes == tuple("0123456789")
    assert (dataset.skipped, dataset.warnings) == ((), ())


def test_digits_are_split_70_10_20_in_each_class():
    dataset = load_dataset("digits", img_size=SIZE)
    for part, share in zip(parts_of(dataset).values(), (0.7, 0.1, 0.2), strict=True):
        assert abs(len(part) - share * 1797) < 1.3
        assert np.abs(np.bincount(dataset.labels[part]) - share * np.bincount(dataset.labels)).max() < 1.3


def test_arrays_cannot_be_written_to(folder):
    dataset = load_dataset(f"folder:{folder}", img_size=SIZE)
    for array in (dataset.images, dataset.labels, dataset.train, dataset.val, dataset.test):
        assert not array.flags.writeable
    assert dataset.load(dataset.train).flags.writeable


@pytest.mark.parametrize("scheme", ["folder", "tar"])
def test_classes_and_labels_are_those_of_timms_reader(tmp_path, scheme):
    from timm.data.readers import create_reader

    labels = ("n10", "n9", "Zebra", "ant", "b/deep", "c")
    files = in_classes(3, labels=labels)
    path = write_folder(tmp_path / "images", files) if scheme == "folder" else write_tar(tmp_path / "images.tar", files)
    reader = create_reader("", root=str(path))
    timms_classes = reader.class_to_idx if scheme == "folder" else reader.class_name_to_idx
    dataset = load_dataset(f"{scheme}:{path}", img_size=SIZE)
    assert dataset.classes == tuple(sorted(timms_classes, key=timms_classes.get)) == ("ant", "c", "deep", "n9", "n10", "Zebra")
    filenames = [reader.filename(index) for index in range(len(reader))]
    targets = [target for _, target in reader.samples] if scheme == "folder" else reader.targets
    assert dict(zip(filenames, targets, strict=True)) == dict(zip(dataset.names, dataset.labels, strict=True))


@given(st.lists(st.text(max_size=8), max_size=6))
def test_the_natural_order_is_timms(names):
    from timm.utils.misc import natural_key as timms_key

    names = [name for name in names if all(letter.isdecimal() or not letter.isdigit() for letter in name)]  # timm fails at '²'
    assert sorted(names, key=natural_key) == sorted(names, key=timms_key)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_gives_the_same_data_set_as_its_folder(tmp_path, folder, mode):
    with tarfile.open(tmp_path / "same.tar", mode) as tar:
        for file in sorted(folder.rglob("*.png"), reverse=True):
            tar.add(file, arcname=str(file.relative_to(folder)))
    from_folder, from_tar = (load_dataset(f"{kind}", img_size=SIZE) for kind in (f"folder:{folder}", f"tar:{tmp_path / 'same.tar'}"))
    assert from_folder.names == from_tar.names
    for name in ("images", "labels", "train", "val", "test"):
        assert np.array_equal(getattr(from_folder, name), getattr(from_tar, name))


def test_a_path_moved_elsewhere_is_the_same_data_set(tmp_path, folder):
    before = load_dataset(f"folder:{folder}", img_size=SIZE)
    folder.rename(tmp_path / "moved")
    after = load_dataset(f"folder:{tmp_path / 'moved'}", img_size=SIZE)
    for name in ("images", "labels", "train", "val", "test"):
        assert np.array_equal(getattr(before, name), getattr(after, name))


@pytest.mark.parametrize("names", [("train", "val", "test"), ("training", "validation", "test"), ("Train", "valid", "TEST")])
def test_folders_named_for_splits_are_official(tmp_path, names):
    files = {}
    for number, name in enumerate(names):
        files |= in_classes(4, f"data/{name}/", seed=100 * number)
    dataset = load_dataset(f"folder:{write_folder(tmp_path, files)}", img_size=SIZE)
    assert dataset.classes == ("cat", "dog")
    for part, name in zip(("train", "val", "test"), names, strict=True):
        assert names_of(dataset, part) == {file.removeprefix("./") for file in files if f"/{name}/" in file}


def test_without_an_official_val_it_is_a_tenth_of_train(tmp_path):
    files = in_classes(20, "train/") | in_classes(4, "test/", seed=100)
    dataset = load_dataset(f"tar:{write_tar(tmp_path / 'x.tar', files)}", img_size=SIZE)
    assert [len(part) for part in parts_of(dataset).values()] == [36, 4, 8]
    assert np.bincount(dataset.labels[dataset.val]).tolist() == [2, 2]
    assert all(name.startswith("test/") for name in names_of(dataset, "test"))


def test_without_an_official_test_val_is_the_test(tmp_path):
    files = in_classes(20, "train/") | in_classes(4, "val/", seed=100)
    dataset = load_dataset(f"folder:{write_folder(tmp_path, files)}", img_size=SIZE)
    assert [len(part) for part in parts_of(dataset).values()] == [36, 4, 8]
    assert all(name.startswith("val/") for name in names_of(dataset, "test"))


def test_several_archives_are_one_source(tmp_path):
    train = write_tar(tmp_path / "a-train.tar", in_classes(10, "train/"))
    test = write_tar(tmp_path / "a-test.tar", in_classes(3, "test/", seed=100))
    dataset = load_dataset(f"tar:{train},{test}", img_size=SIZE)
    assert names_of(dataset, "test") == {f"a-test/test/{label}/{index}.png" for label in ("cat", "dog") for index in range(3)}
    assert len(dataset.labels) == 26


def test_several_folders_named_for_splits_are_official(tmp_path):
    write_folder(tmp_path, in_classes(10, "train/") | in_classes(3, "val/", seed=100))
    dataset = load_dataset(f"folder:{tmp_path / 'train'},{tmp_path / 'val'}", img_size=SIZE)
    assert len(dataset.test) == 6
    assert all(name.startswith("val/") for name in names_of(dataset, "test"))


def test_an_archive_for_each_class_names_it(tmp_path):
    names = ("a.1.tar.gz", "b.tgz", "c.tar")
    paths = [write_tar(tmp_path / name, {f"{i}.png": picture(i + 100 * ord(name[0])) for i in range(8)}, "w:gz") for name in names]
    assert load_dataset(f"tar:{paths[0]},{paths[1]},{paths[2]}", img_size=SIZE).classes == ("a.1", "b", "c")


def test_a_folder_of_a_split_beside_others_is_a_class_and_a_warning(tmp_path):
    dataset = load_dataset(f"folder:{write_folder(tmp_path, in_classes(8, labels=('train', 'bus')))}", img_size=SIZE)
    assert dataset.classes == ("bus", "train")
    assert "train are taken for none" in dataset.warnings[0]


def test_images_in_no_class_folder_are_left_out_and_named(folder):
    (folder / "preview.png").write_bytes(picture(999))
    dataset = load_dataset(f"folder:{folder}", img_size=SIZE)
    assert len(dataset.labels) == 20
    assert dataset.warnings == ("1 images without a class are left out: preview.png",)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (in_classes(8, labels=("cat",)), "has intact images of one class only, 'cat'"),
        (in_classes(8) | {f"dog/{index}.png": b"no picture" for index in range(8)}, "has intact images of one class only, 'cat'"),
        ({f"{index}.png": picture(index) for index in range(4)}, "has no labels: 0.png, 1.png, 2.png, ... lie in no class folder"),
        ({f"train/{index}.png": picture(index) for index in range(4)}, "has no labels"),
        (in_classes(1), "2 images in 2 classes are too few for a split: val is empty"),
        (in_classes(4, "test/"), "there is an official test but no train"),
        (in_classes(4, "test/") | in_classes(4, "val/"), "there is an official test and val but no train"),
        (dict.fromkeys(in_classes(4), b"no picture"), "none of its 8 images can be read"),
        ({"notes.txt": b"no picture"}, "holds no image file"),
    ],
    ids=[
        "one class",
        "one intact class",
        "no classes",
        "splits without classes",
        "empty split",
        "test only",
        "no train",
        "all damaged",
        "no image",
    ],
)
def test_unusable_sets_are_refused_with_the_reason(tmp_path, files, words):
    with pytest.raises(ValueError, match=words) as refusal:
        load_dataset(f"folder:{write_folder(tmp_path / 'images', files)}", img_size=SIZE)
    assert "\n" not in str(refusal.value)
    assert str(tmp_path / "images") in str(refusal.value)


@given(
    num_images=st.integers(20, 80),
    num_classes=st.integers(2, 6),
    num_contents=st.integers(8, 80),
    has_official=st.booleans(),
    seed=st.integers(0, 999),
)
def test_copies_never_lie_in_two_parts_of_our_split(num_images, num_classes, num_contents, has_official, seed):
    rng = np.random.default_rng(seed)
    labels, copies = rng.integers(num_classes, size=num_images), rng.integers(num_contents, size=num_images)
    official = np.where(rng.random(num_images) < 0.3, "test", "train") if has_official else None
    if has_official:
        official[:2] = "test", "train"
    try:
        train, val, test = split_dataset(labels, copies, official)
    except ValueError as error:
        assert "too few for a split" in str(error)  # noqa: PT017
        return
    assert np.array_equal(np.sort(np.concatenate((train, val, test))), np.arange(num_images))
    assert not set(copies[train]) & set(copies[val])
    if not has_official:
        assert not set(copies[test]) & set(copies[np.concatenate((train, val))])


@given(st.lists(st.integers(1, 30), min_size=2, max_size=8))
def test_every_class_is_cut_in_proportion_and_trained_on(sizes):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    if sum(size for size in sizes if size > 1) < 8:
        with pytest.raises(ValueError, match="too few for a split: val is empty"):
            split_dataset(labels, np.arange(len(labels)), None)
        return
    train, val, test = split_dataset(labels, np.arange(len(labels)), None)
    assert set(labels[train]) == set(range(len(sizes)))
    for part, share in ((train, 0.7), (val, 0.1), (test, 0.2)):
        assert np.abs(np.bincount(labels[part], minlength=len(sizes)) - share * np.array(sizes)).max() < 1.3


def test_planted_copies_come_into_one_part(tmp_path):
    files = in_classes(12)
    for index in range(6):
        files[f"dog/copy of {index}.png"] = files[f"cat/{index}.png"]
    dataset = load_dataset(f"folder:{write_folder(tmp_path / 'images', files)}", img_size=SIZE)
    where = {dataset.name(index): part for part, indices in parts_of(dataset).items() for index in indices}
    assert all(where[f"cat/{index}.png"] == where[f"dog/copy of {index}.png"] for index in range(6))
    assert dataset.warnings == ()


def test_copies_across_official_splits_are_a_warning(tmp_path):
    files = in_classes(6, "train/") | in_classes(6, "val/", seed=100) | in_classes(6, "test/", seed=200)
    files["test/dog/again.png"] = files["train/cat/0.png"]
    dataset = load_dataset(f"folder:{write_folder(tmp_path / 'images', files)}", img_size=SIZE)
    assert dataset.warnings == ("1 images of val or test are also in an earlier part: test/dog/again.png",)


def test_a_class_without_training_images_is_a_warning(tmp_path):
    files = in_classes(20, "train/") | in_classes(3, "test/", labels=("cat", "fox"), seed=100)
    dataset = load_dataset(f"folder:{write_folder(tmp_path / 'images', files)}", img_size=SIZE)
    assert dataset.classes == ("cat", "dog", "fox")
    assert "1 classes have no image in train: fox" in dataset.warnings


def test_damaged_files_are_in_no_part(folder):
    for name, content in {"cat/3.png": b"", "dog/4.png": picture(1)[:200], "dog/5.png": b"nothing"}.items():
        (folder / name).write_bytes(content)
    dataset = load_dataset(f"folder:{folder}", img_size=SIZE)
    assert dataset.skipped == ("cat/3.png", "dog/4.png", "dog/5.png")
    assert len(dataset.labels) == len(dataset.images) == sum(map(len, parts_of(dataset).values())) == 17
    for index in range(17):
        with Image.open(folder / dataset.name(index)) as image:
            assert dataset.classes[dataset.labels[index]] == dataset.name(index).split("/")[0]
            expected = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(1.25, 3.25, 18.75, 20.75))
        assert np.array_equal(np.asarray(expected).transpose(2, 0, 1), dataset.images[index])


@pytest.mark.parametrize("is_between_files", [False, True])
def test_a_tar_that_was_cut_off_gives_what_is_left(tmp_path, is_between_files):
    path = write_tar(tmp_path / "x.tar", in_classes(12, labels=("a", "b", "c")))
    with tarfile.open(path) as tar:
        cut = next(member for member in tar if member.name == "c/5.png")
    path.write_bytes(path.read_bytes()[: cut.offset if is_between_files else cut.offset_data + 10])
    dataset = load_dataset(f"tar:{path}", img_size=SIZE)
    last = "c/4.png" if is_between_files else "c/5.png"
    assert dataset.skipped == (f"x.tar: cut off or damaged after '{last}'", *(() if is_between_files else (last,)))
    assert len(dataset.labels) == 29


def test_a_compressed_tar_that_was_cut_off_gives_what_is_left(tmp_path):
    path = write_tar(tmp_path / "x.tgz", in_classes(12, labels=("a", "b", "c")), "w:gz")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 5 // 6])
    dataset = load_dataset(f"tar:{path}", img_size=SIZE)
    assert dataset.skipped[0].startswith("x.tgz: cut off or damaged after 'c/")
    assert 24 < len(dataset.labels) < 36


def test_an_image_of_the_size_that_is_asked_for_keeps_its_pixels(tmp_path):
    files = {f"{label}/{index}.png": picture(index + 100 * ord(label), size=(SIZE, SIZE)) for label in "ab" for index in range(8)}
    dataset = load_dataset(f"folder:{write_folder(tmp_path, files)}", img_size=SIZE)
    for index, name in enumerate(dataset.names):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(files[name]))), dataset.images[index].transpose(1, 2, 0))


def test_the_data_set_is_loaded_once_and_again_when_the_archive_changes(tmp_path, never_settled):
    path = write_tar(tmp_path / "x.tar", in_classes(8))
    first = load_dataset(f"tar:{path}", img_size=SIZE)
    assert load_dataset(f"tar:{path}", img_size=SIZE) is first
    write_tar(path, in_classes(9))
    assert len(load_dataset(f"tar:{path}", img_size=SIZE).labels) == 18


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_streamed_set_has_the_split_and_pixels_of_the_same_one_in_memory(tmp_path, folder, kind):
    source = f"folder:{folder}" if kind == "folder" else f"tar:{write_tar(tmp_path / 'x.tar', in_classes(10))}"
    kept, streamed = (load_dataset(source, img_size=SIZE, memory_mb=mb) for mb in (100, 0))
    assert streamed.images is None
    for name in ("labels", "train", "val", "test"):
        assert np.array_equal(getattr(kept, name), getattr(streamed, name))
    indices = np.array([3, 11, 3, 0])
    assert np.array_equal(kept.load(indices), streamed.load(indices))
    assert np.array_equal(pickle.loads(pickle.dumps(streamed)).load(indices), kept.load(indices))
    assert (kept.open(5).size, streamed.open(5).size) == ((SIZE, SIZE), (20, 24))
    assert streamed.warnings == ("the set is streamed: identical images were not looked for, as that would take reading all of it",)


def test_damaged_files_of_val_and_test_are_left_out_when_a_streamed_set_is_opened(folder):
    """Nothing may stand in for an image that is judged: its row would be another image's, and that one counted twice."""
    whole = load_dataset(f"folder:{folder}", img_size=SIZE, memory_mb=0)
    damaged = [int(whole.val[0]), int(whole.test[-1])]
    for index in damaged:
        file = folder / whole.name(index)
        file.write_bytes(b"nothing".ljust(file.stat().st_size, b"-"))
    dataset = load_dataset(f"folder:{folder}", img_size=SIZE, memory_mb=0)
    assert sorted(dataset.skipped) == sorted(map(whole.name, damaged))
    assert dataset.val.tolist() == whole.val.tolist()[1:]
    assert dataset.test.tolist() == whole.test.tolist()[:-1]
    assert dataset.train.tolist() == whole.train.tolist()


def test_a_file_of_the_test_part_damaged_since_is_an_error(folder):
    dataset = load_dataset(f"folder:{folder}", img_size=SIZE, memory_mb=0)
    (folder / dataset.name(int(dataset.test[0]))).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read any more"):
        dataset.load(dataset.test[:1])


@pytest.mark.parametrize("memory_mb", [100, 0], ids=["in memory", "streamed"])
def test_other_pixels_in_files_of_the_same_size_are_another_data_set(tmp_path, memory_mb):
    root = write_folder(tmp_path / "images", in_bitmaps(0))
    first = load_dataset(f"folder:{root}", img_size=SIZE, memory_mb=memory_mb)
    everything = np.arange(len(first.labels))
    before = first.load(everything)
    assert load_dataset(f"folder:{root}", img_size=SIZE, memory_mb=memory_mb).digest == first.digest
    write_folder(root, in_bitmaps(1))
    after = load_dataset(f"folder:{root}", img_size=SIZE, memory_mb=memory_mb)
    assert after.digest != first.digest
    assert after.names == first.names
    assert (after.load(everything) != before).any(axis=(1, 2, 3)).all()


def test_a_class_that_is_renamed_is_seen_by_the_same_process(folder):
    assert load_dataset(f"folder:{folder}", img_size=SIZE).classes == ("cat", "dog")
    (folder / "cat").rename(folder / "ant")
    assert load_dataset(f"folder:{folder}", img_size=SIZE).classes == ("ant", "dog")


def in_bitmaps(seed):
    """Files whose size does not tell their pixels."""
    return {f"{label}/{index}.bmp": picture(100 * seed + 10 * ord(label) + index, "BMP") for label in "ab" for index in range(10)}


def test_a_damaged_file_of_a_streamed_set_is_replaced_by_one_of_its_class_in_training(folder):
    dataset = load_dataset(f"folder:{folder}", img_size=SIZE, memory_mb=0)
    peers = [index for index in dataset.train if dataset.labels[index] == 1]
    (folder / dataset.name(peers[-1])).write_bytes(b"nothing")
    assert np.array_equal(dataset.load(np.array(peers[-1:])), dataset.load(np.array(peers[:1])))
    assert dataset.skipped == (dataset.name(peers[-1]),)
    dataset.load(np.array(peers))
    assert len(dataset.skipped) == 1
    for index in peers:
        (folder / dataset.name(index)).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="every image of class 'dog' in train"):
        dataset.load(np.array(peers[:1]))


def test_a_source_that_changed_is_noticed_when_it_is_read_again(folder):
    dataset = load_dataset(f"folder:{folder}", img_size=SIZE, memory_mb=0)
    (folder / "cat" / "0.png").unlink()
    with pytest.raises(ValueError, match="has other files than when the data set was made"):
        dataset.load(np.array([0]))


def test_a_compressed_archive_that_does_not_fit_is_refused(tmp_path):
    path = write_tar(tmp_path / "x.tar.gz", in_classes(8), "w:gz")
    with pytest.raises(ValueError, match="takes 1 MB in memory, 0 are allowed; it is compressed"):
        load_dataset(f"tar:{path}", img_size=SIZE, memory_mb=0)


def write_mnist(root, num_train=40, num_test=10):
    """The files of MNIST's format (http://yann.lecun.com/exdb/mnist), filled with noise."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, number in (("train", num_train), ("t10k", num_test)):
        images = rng.integers(0, 256, (number, 28, 28), dtype=np.uint8)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, number, 28, 28) + images.tobytes())
        labels = bytes(index % 10 for index in range(number))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, number) + labels)
    return images


def test_a_torchvision_set_has_its_official_splits(tmp_path):
    test_images = write_mnist(tmp_path)
    source = f"torchvision:mnist:{tmp_path}"
    dataset = load_dataset(source, img_size=28)
    assert [len(part) for part in parts_of(dataset).values()] == [36, 4, 10]
    assert dataset.classes[3] == "3 - three"
    assert dataset.labels[dataset.test].tolist() == list(range(10))
    assert np.array_equal(dataset.load(dataset.test)[:, 0], test_images)
    assert check_source(source) == source
    assert load_images(source, img_size=16, num_images=50, seed=0).num_available == 50


def test_the_fingerprint_of_a_torchvision_set_is_of_its_pixels(tmp_path):
    write_mnist(tmp_path)
    before = fingerprint(f"torchvision:mnist:{tmp_path}")
    file = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert fingerprint(f"torchvision:mnist:{tmp_path}") != before


def test_a_torchvision_set_with_labels_out_of_range_is_refused(tmp_path):
    write_mnist(tmp_path)
    file = tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    file.write_bytes(file.read_bytes()[:-1] + b"\x0b")
    with pytest.raises(ValueError, match="label out of range; 10 classes are named, labels are 0 to 11"):
        load_dataset(f"torchvision:mnist:{tmp_path}", img_size=28)


def test_a_torchvision_set_of_files_has_its_val_as_test(tmp_path):
    write_folder(tmp_path, in_classes(10, "train/", ("n01", "n02")) | in_classes(2, "val/", ("n01", "n02"), seed=100))
    torch.save(({"n01": ("tench", "Tinca tinca"), "n02": ("goldfish",)}, []), tmp_path / "meta.bin")
    source = f"torchvision:imagenet:{tmp_path}"
    dataset = load_dataset(source, img_size=SIZE)
    assert dataset.classes == ("tench", "goldfish")
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (18, 2, 4)
    prints = [fingerprint(source)]
    image = tmp_path / "val" / "n01" / "0.png"
    content = bytearray(image.read_bytes())
    content[-1] ^= 1
    image.write_bytes(content)
    prints.append(fingerprint(source))
    torch.save(({"n01": ("trout", "Tinca tinca"), "n02": ("goldfish",)}, []), tmp_path / "meta.bin")
    prints.append(fingerprint(source))
    assert len(set(prints)) == 3


def shard(labels, ending="cls", first=0):
    files = {}
    for index, label in enumerate(labels, first):
        files[f"{index:06d}.png"] = picture(index)
        files[f"{index:06d}.{ending}"] = str(label).encode() if ending == "cls" else json.dumps({"label": label}).encode()
    return files


def test_shards_are_one_set_in_their_order(tmp_path):
    for number in range(2):
        write_tar(tmp_path / f"x-{number}.tar", shard([0, 1, 10] * 4, first=100 * number))
    from_folder = load_dataset(f"webdataset:{tmp_path}", img_size=SIZE)
    from_files = load_dataset(f"webdataset:{tmp_path}/x-0.tar,{tmp_path}/x-1.tar", img_size=SIZE)
    assert from_folder.classes == ("0", "1", "10")
    assert from_folder.labels.tolist() == [0, 1, 2] * 8
    assert from_folder.name(12) == "x-1.tar/000100.png"
    assert np.array_equal(from_folder.images, from_files.images)
    assert fingerprint(f"webdataset:{tmp_path}").startswith("webdataset-")


def test_the_fingerprint_of_shards_covers_their_labels(tmp_path):
    prints = set()
    for label in (0, 1):
        write_tar(tmp_path / "x.tar", shard([label, 0, 1]))
        prints.add(fingerprint(f"webdataset:{tmp_path}"))
    assert len(prints) == 2


def test_shards_named_for_splits_are_official(tmp_path):
    for number, part in enumerate(("train-0000", "train-0001", "validation-0000")):
        write_tar(tmp_path / f"imagenet1k-{part}.tar", shard([0, 1] * 10, first=100 * number))
    dataset = load_dataset(f"webdataset:{tmp_path}", img_size=SIZE)
    assert [len(part) for part in parts_of(dataset).values()] == [36, 4, 20]
    assert dataset.test.min() == 40


def test_a_cls_file_is_the_label_and_json_says_it_without(tmp_path):
    files = shard([1, 0] * 8, "json") | {"000000.cls": b"0", "000001.json": b"{broken", "000002.json": b"{}"}
    dataset = load_dataset(f"webdataset:{write_tar(tmp_path / 'x.tar', files)}", img_size=SIZE)
    assert dataset.labels.tolist() == [0, 0, *[1, 0] * 6]
    assert dataset.warnings == ("2 images without a class are left out: x.tar/000001.png, x.tar/000002.png",)


@pytest.mark.parametrize(("label", "words"), [(-1, "label '?-1'? is out of range"), ([1], "neither a whole number nor a name")])
def test_labels_out_of_range_are_refused(tmp_path, label, words):
    path = write_tar(tmp_path / "x.tar", shard([0, 1, label], "json"))
    with pytest.raises(ValueError, match=f"x.tar/000002: .*{words}|{words}"):
        load_dataset(f"webdataset:{path}", img_size=SIZE)


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    """Writes parquet files as Hugging Face does, with or without its own description of the columns."""
    pytest.importorskip("datasets", reason="vitscale[parquet] is not installed")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()

    def write(path, labels, names=None, first=0):
        import datasets

        path.parent.mkdir(parents=True, exist_ok=True)
        label = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
        image = datasets.Image() if names else {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
        rows = {"img": [{"bytes": picture(first + i), "path": None} for i in range(len(labels))], "label": labels}
        features = datasets.Features({"img": image, "label": label})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
        return path

    return write


def test_a_parquet_folder_has_its_official_splits_and_class_names(tmp_path, parquet):
    names = ["dog", "cat"]
    parquet(tmp_path / "hub" / "data" / "train-00000-of-00002.parquet", [0, 1] * 5, names)
    parquet(tmp_path / "hub" / "data" / "train-00001-of-00002.parquet", [0, 1] * 5, names, first=100)
    parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet", [1, 0, -1], names, first=200)
    source = f"parquet:{tmp_path / 'hub'}"
    dataset = load_dataset(source, img_size=SIZE)
    assert dataset.classes == ("dog", "cat")
    assert [len(part) for part in parts_of(dataset).values()] == [18, 2, 2]
    assert dataset.labels[dataset.test].tolist() == [1, 0]
    assert dataset.warnings == ("1 images without a class are left out: test 2",)
    expected = np.asarray(Image.open(io.BytesIO(picture(200))))
    streamed = load_dataset(source, img_size=SIZE, memory_mb=0)
    assert np.array_equal(np.asarray(streamed.open(dataset.test[0])), expected)
    before = fingerprint(source)
    assert load_images(source, img_size=SIZE, num_images=23, seed=0).num_available == 23
    (tmp_path / "hub").rename(tmp_path / "moved")
    assert fingerprint(f"parquet:{tmp_path / 'moved'}") == before
    parquet(tmp_path / "moved" / "data" / "train-00001-of-00002.parquet", [1, 0] * 5, names, first=100)
    assert fingerprint(f"parquet:{tmp_path / 'moved'}") != before


def test_one_parquet_file_without_a_description_is_split_by_us(tmp_path, parquet):
    path = parquet(tmp_path / "odd [1], name" / "x.parquet", [0, 5, 10] * 10)
    dataset = load_dataset(f"parquet:{path}", img_size=SIZE)
    assert dataset.classes == ("0", "5", "10")
    assert [len(part) for part in parts_of(dataset).values()] == [21, 3, 6]


@pytest.mark.parametrize(
    ("labels", "names", "words"),
    [([0, 1, -1], None, "train 2: label -1 is out of range"), ([0] * 8, ["dog"], "images of one class only, 'dog'")],
)
def test_unusable_parquet_files_are_refused(tmp_path, parquet, labels, names, words):
    path = parquet(tmp_path / "x.parquet", labels, names)
    with pytest.raises(ValueError, match=words):
        load_dataset(f"parquet:{path}", img_size=SIZE)


def test_a_file_that_is_no_parquet_is_refused_in_one_line(tmp_path, parquet):
    (tmp_path / "x.parquet").write_bytes(b"not at all")
    with pytest.raises(ValueError, match="cannot be read as a Hugging Face image data set") as refusal:
        check_source(f"parquet:{tmp_path / 'x.parquet'}")
    assert "\n" not in str(refusal.value)


def test_parquet_needs_neither_a_network_nor_the_home(tmp_path, parquet):
    parquet(tmp_path / "train.parquet", [0, 1] * 10)
    (tmp_path / "home").mkdir()
    code = f"""
import os, socket
def refuse(*args, **kwargs):
    raise AssertionError(f"network: {{args}}")
socket.getaddrinfo = socket.socket.connect = refuse
from workers.data import load_dataset
assert len(load_dataset("parquet:{tmp_path / "train.parquet"}", img_size=16).labels) == 20
"""
    env = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "scratch"), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "home").rglob("*.arrow"))
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file()]


def test_parquet_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"")
    monkeypatch.setattr("workers.sources.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package datasets: pip install 'vitscale\[parquet\]'"):
        check_source(f"parquet:{tmp_path / 'x.parquet'}")
