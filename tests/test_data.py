import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from PIL import Image

from workers.data import IMAGENET_MEAN, IMAGENET_STD, check_source, fingerprint, load_dataset, load_images
from workers.file_hashes import File, hash_files


def picture(seed, file_format="JPEG", size=(40, 30)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Twelve images in class folders, one beside them, and a file that is none."""
    root = tmp_path / "images"
    for label in ("cat", "dog"):
        (root / label).mkdir(parents=True)
        for index in range(6):
            (root / label / f"{index}.jpg").write_bytes(picture(index + 10 * (label == "dog")))
    (root / "loose.PNG").write_bytes(picture(99, "PNG"))
    (root / "notes.txt").write_text("no image")
    return root


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "images.tar"
    with tarfile.open(path, "w") as tar:
        for index in range(8):
            content = picture(index)
            member = tarfile.TarInfo(f"class/{index}.jpg")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_digits_are_normalised_colour_images():
    sample = load_images("digits", img_size=32, num_images=16, seed=0)
    assert sample.images.shape == (16, 3, 32, 32)
    assert sample.images.dtype == torch.float32
    assert (sample.num_available, sample.skipped) == (1797, ())
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = sample.images * std + mean
    assert -1e-6 <= pixels.min() < pixels.max() <= 1 + 1e-6
    torch.testing.assert_close(pixels[:, 0], pixels[:, 2])


@pytest.mark.parametrize("scheme", ["digits", "folder", "tar"])
def test_a_shorter_sample_is_a_prefix_of_a_longer_one(scheme, folder, archive):
    source = {"digits": "digits", "folder": f"folder:{folder}", "tar": f"tar:{archive}"}[scheme]
    short, long = (load_images(source, img_size=16, num_images=number, seed=3).images for number in (3, 6))
    assert torch.equal(short, long[:3])
    assert len({image.numpy().tobytes() for image in long}) == 6


def test_another_seed_draws_other_images():
    first, second = (load_images("digits", img_size=16, num_images=8, seed=seed).images for seed in (0, 1))
    assert not torch.equal(first, second)


def test_every_image_below_a_folder_is_found(folder):
    assert load_images(f"folder:{folder}", img_size=16, num_images=13, seed=0).num_available == 13


def test_a_tar_holds_the_same_images_as_its_folder(tmp_path, folder):
    with tarfile.open(tmp_path / "same.tar.gz", "w:gz") as tar:
        tar.add(folder, arcname=".")
    from_folder = load_images(f"folder:{folder}", img_size=16, num_images=13, seed=0).images
    from_tar = load_images(f"tar:{tmp_path / 'same.tar.gz'}", img_size=16, num_images=13, seed=0).images
    assert {image.numpy().tobytes() for image in from_tar} == {image.numpy().tobytes() for image in from_folder}


def test_damaged_files_are_skipped_and_named(folder):
    whole = (folder / "cat" / "1.jpg").read_bytes()
    (folder / "cat" / "1.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "loose.PNG").write_bytes(b"")
    (folder / "dog" / "3.jpg").write_bytes(b"not a picture at all")
    sample = load_images(f"folder:{folder}", img_size=16, num_images=10, seed=0)
    assert len(sample.images) == 10
    assert torch.isfinite(sample.images).all()
    assert set(sample.skipped) <= {"cat/1.jpg", "loose.PNG", "dog/3.jpg"}
    with pytest.raises(ValueError, match=r"10 readable images beside 3 damaged \(.*\); 11 are needed"):
        load_images(f"folder:{folder}", img_size=16, num_images=11, seed=0)


def test_the_image_after_a_damaged_one_takes_its_place(folder):
    source = f"folder:{folder}"
    before = load_images(source, img_size=16, num_images=13, seed=1).images
    damaged = folder / "cat" / "2.jpg"
    damaged.write_bytes(damaged.read_bytes()[:100])
    sample = load_images(source, img_size=16, num_images=12, seed=1)
    assert sample.skipped == ("cat/2.jpg",)
    assert {image.numpy().tobytes() for image in sample.images} < {image.numpy().tobytes() for image in before}


def test_a_tar_that_was_cut_off_gives_what_is_left(archive):
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 3])
    listed = load_images(f"tar:{archive}", img_size=16, num_images=1, seed=0)
    sample = load_images(f"tar:{archive}", img_size=16, num_images=listed.num_available - 1, seed=0)
    assert 1 < listed.num_available < 8
    assert "images.tar: cut off or damaged after" in sample.skipped[0]
    assert torch.isfinite(sample.images).all()


def test_the_sample_is_read_once(folder, never_settled):
    first = load_images(f"folder:{folder}", img_size=16, num_images=4, seed=5)
    assert load_images(f"folder:{folder}", img_size=16, num_images=4, seed=5) is first


def bitmaps(seed):
    return {f"{label}/{index}.bmp": picture(100 * seed + 10 * ord(label) + index, "BMP") for label in "ab" for index in range(6)}


@pytest.fixture
def bitmap_folder(tmp_path):
    """Image files whose size does not tell their pixels."""
    return write_bitmaps(tmp_path / "bitmaps", 0)


def write_bitmaps(root, seed):
    for name, content in bitmaps(seed).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_archive(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


FRESH_PROCESS = """
import sys
from pathlib import Path
from workers import file_hashes
from workers.data import fingerprint
root, cache = sys.argv[1:]
file_hashes.SETTLED_S = 0  # The files of this test are young.
opened = []
sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" and str(args[0]).endswith(".bmp") else None)
print(fingerprint(f"folder:{root}", cache=Path(cache)), len(opened))
"""


def in_a_fresh_process(folder, cache):
    """The fingerprint, and how many image files were opened for it."""
    command = [sys.executable, "-c", FRESH_PROCESS, str(folder), str(cache)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    name, num_opened = done.stdout.split()
    return name, int(num_opened)


def test_the_fingerprint_is_of_names_and_contents(bitmap_folder, tmp_path):
    assert fingerprint("digits") == "digits"
    before = fingerprint(f"folder:{bitmap_folder}")
    assert re.fullmatch("folder-bytes-[0-9a-f]{16}", before)
    write_bitmaps(bitmap_folder, 1)
    after = fingerprint(f"folder:{bitmap_folder}")
    assert after != before
    bitmap_folder.rename(tmp_path / "moved")
    assert fingerprint(f"folder:{tmp_path / 'moved'}") == after
    (tmp_path / "moved" / "a" / "0.bmp").rename(tmp_path / "moved" / "a" / "9.bmp")
    assert fingerprint(f"folder:{tmp_path / 'moved'}") not in (before, after)
    write_bitmaps(tmp_path / "again", 0)
    assert fingerprint(f"folder:{tmp_path / 'again'}") == before


def test_the_fingerprint_of_an_archive_is_of_its_contents(tmp_path):
    path = write_archive(tmp_path / "x.tar", bitmaps(0))
    before, size = fingerprint(f"tar:{path}"), path.stat().st_size
    write_archive(path, bitmaps(1))
    assert path.stat().st_size == size
    assert fingerprint(f"tar:{path}") != before
    assert fingerprint(f"tar:{write_archive(tmp_path / 'other name.tar', bitmaps(0))}") == before


def test_setting_back_the_time_hides_no_change(bitmap_folder):
    file = bitmap_folder / "a" / "0.bmp"
    before, status = fingerprint(f"folder:{bitmap_folder}"), file.stat()
    file.write_bytes(bitmaps(1)["a/0.bmp"])
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fingerprint(f"folder:{bitmap_folder}") != before


def test_a_later_process_reads_only_files_that_changed(bitmap_folder, tmp_path):
    cache = tmp_path / "runs" / "data-hashes"
    before, num_opened = in_a_fresh_process(bitmap_folder, cache)
    assert (before, num_opened) == (fingerprint(f"folder:{bitmap_folder}"), 12)
    assert in_a_fresh_process(bitmap_folder, cache) == (before, 0)
    (bitmap_folder / "a" / "0.bmp").write_bytes(bitmaps(1)["a/0.bmp"])
    after, num_opened = in_a_fresh_process(bitmap_folder, cache)
    assert after != before
    assert num_opened == 1
    assert sorted(file.name for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".bmp") == [next(cache.iterdir()).name]


def test_a_cache_that_cannot_be_read_is_as_good_as_none(bitmap_folder, tmp_path):
    before = in_a_fresh_process(bitmap_folder, tmp_path / "cache")
    (store,) = (tmp_path / "cache").iterdir()
    for content in (store.read_text()[:-20], "[]", '{"x": 1}'):
        store.write_text(content)
        assert in_a_fresh_process(bitmap_folder, tmp_path / "cache") == before


def test_processes_that_share_a_cache_do_not_disturb_each_other(bitmap_folder, tmp_path):
    command = [sys.executable, "-c", FRESH_PROCESS, str(bitmap_folder), str(tmp_path / "cache")]
    started = [subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    prints = {process.communicate()[0].split()[0] for process in started}
    assert prints == {fingerprint(f"folder:{bitmap_folder}")}
    assert in_a_fresh_process(bitmap_folder, tmp_path / "cache") == (*prints, 0)


def test_a_process_that_lives_on_loads_the_new_pixels(bitmap_folder):
    before = load_images(f"folder:{bitmap_folder}", img_size=16, num_images=12, seed=0).images
    write_bitmaps(bitmap_folder, 1)
    after = load_images(f"folder:{bitmap_folder}", img_size=16, num_images=12, seed=0).images
    assert all(not torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_file_that_changes_while_it_is_hashed_has_its_last_contents_in_the_end(tmp_path):
    file, is_over = tmp_path / "x.bmp", threading.Event()
    contents = [bytes([number]) * 100_000 for number in (0, 1)]
    file.write_bytes(contents[0])

    def write():
        while not is_over.is_set():
            for content in contents:
                file.write_bytes(content)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(30):
            hash_files([File("x.bmp", str(file))])
    finally:
        is_over.set()
        writer.join()
    assert hash_files([File("x.bmp", str(file))]) == [hashlib.sha256(contents[1]).hexdigest()[:32]]


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="no file here that even its owner cannot read")
def test_an_unreadable_file_is_named_and_skipped_like_a_damaged_one(bitmap_folder):
    whole = fingerprint(f"folder:{bitmap_folder}")
    (bitmap_folder / "a" / "6.bmp").symlink_to("/proc/self/mem")
    source = f"folder:{bitmap_folder}"
    assert fingerprint(source) != whole
    assert fingerprint(source) == fingerprint(source)
    assert load_dataset(source, img_size=16).skipped == ("a/6.bmp",)
    assert load_images(source, img_size=16, num_images=12, seed=0).skipped in ((), ("a/6.bmp",))
    (bitmap_folder / "a" / "7.bmp").symlink_to("/nowhere")
    assert load_images(source, img_size=16, num_images=12, seed=0).num_available == 13


def test_a_good_source_comes_back_with_absolute_paths(folder, archive, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert check_source("digits") == "digits"
    assert check_source("folder:images") == f"folder:{folder}"
    assert check_source("tar:images.tar,./images.tar") == f"tar:{archive},{archive}"


def test_a_comma_may_be_part_of_a_path(folder):
    renamed = folder.rename(folder.parent / "cats, dogs")
    assert check_source(f"folder:{renamed}") == f"folder:{renamed}"


def test_a_mistyped_path_is_refused_without_heavy_imports(tmp_path):
    code = f"""
import sys
from workers.data import check_source
for source in ("torchvision:mnist:{tmp_path}/no", "parquet:{tmp_path}/no", "webdataset:{tmp_path}/no", "tar:{tmp_path}/no"):
    try:
        check_source(source)
    except ValueError as error:
        assert "no does not exist" in str(error)
    else:
        raise AssertionError(source)
assert not sys.modules.keys() & {{"torch", "timm", "torchvision", "datasets"}}
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_bad_sources_are_refused_in_one_line(folder, archive, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tar").write_text("plain text, " * 100)
    (tmp_path / "void.tar").write_bytes(b"")
    with tarfile.open(tmp_path / "imageless.tar", "w") as tar:
        tar.add(folder / "notes.txt")
    expected = {
        "digit": "did you mean 'digits'",
        "folders:x": "did you mean 'folder:PATH'",
        "imagenet": "known: digits, folder:PATH, parquet:PATH, tar:PATH, torchvision:NAME:ROOT, webdataset:PATH",
        "folder:": "write 'folder:PATH'",
        "torchvision:": "in data 'torchvision:'; known: cifar10, cifar100",
        "torchvision:cifar": "did you mean 'cifar10'",
        "torchvision:mnist": "write 'torchvision:NAME:ROOT'",
        f"torchvision:mnist:{archive}": "not a folder",
        f"torchvision:mnist:{folder}": "torchvision finds no mnist below",
        f"webdataset:{folder}": "no shard (*.tar)",
        f"webdataset:{tmp_path / 'text.tar'}": "not a tar archive",
        f"parquet:{folder}": "no *.parquet below",
        f"folder:{folder},{tmp_path / 'missing'}": "missing does not exist",
        str(folder): f"write 'folder:{folder}'",
        str(archive): f"write 'tar:{archive}'",
        f"folder:{tmp_path / 'missing'}": "missing does not exist",
        f"folder:{archive}": "not a folder",
        f"tar:{folder}": "not a file",
        f"folder:{tmp_path / 'empty'}": "holds no image file",
        f"tar:{tmp_path / 'imageless.tar'}": "holds no image file",
        f"tar:{tmp_path / 'text.tar'}": "not a tar archive",
        f"tar:{tmp_path / 'void.tar'}": "not a tar archive",
    }
    for source, words in expected.items():
        with pytest.raises(ValueError, match=re.escape(words)) as refusal:
            check_source(source)
        assert "\n" not in str(refusal.value)


def test_too_few_images_are_noticed_before_any_work(folder):
    with pytest.raises(ValueError, match="holds 13 image files, 16 are needed"):
        check_source(f"folder:{folder}", num_images=16)


STREAMED_IN_A_FRESH_PROCESS = (
    "\n".join(FRESH_PROCESS.splitlines()[:-1])
    + """
from workers.data import load_dataset
dataset = load_dataset(f"folder:{root}", img_size=16, memory_mb=0, cache=Path(cache))
train = {dataset.names[index] for index in dataset.train}
print(sum(str(path).endswith(tuple(train)) for path in opened), len(train))
"""
)


def test_a_streamed_set_takes_its_hashes_from_the_cache(bitmap_folder, tmp_path):
    cache = tmp_path / "data-hashes"
    command = [sys.executable, "-c", STREAMED_IN_A_FRESH_PROCESS, str(bitmap_folder), str(cache)]
    (opened, num_train), (opened_again, _) = (
        subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split() for _ in range(2)
    )
    assert opened == num_train != "0"
    assert opened_again == "0"
