"""Images for evaluators: a sample, or a data set with its splits. Both depend on the contents of the source alone.

Sources are strings, see `workers/sources.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from space.randomness import stream
from workers.sources import EXTENSIONS, Listing, Source, list_images, natural_key, parse_source

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

BY_CONTENT = "-bytes-"
"""Stands between scheme and digits of a fingerprint that covers the bytes of the files."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
TENTHS = np.array([0, 0, 0, 0, 2, 0, 0, 1, 0, 2])
"""The part of each of ten images in turn: 0 train, 1 val, 2 test. No neighbours are both outside train: a class of two has one there."""
TENTH_FOR_VAL = np.array([0, 0, 0, 0, 0, 0, 0, 1, 0, 0])


@dataclass(frozen=True, kw_only=True)
class ImageSample:
    """Images `(N, 3, H, W)`, float32 and ImageNet-normalised; shared between callers, so never written to."""

    images: Tensor
    skipped: tuple[str, ...]
    """Names of the damaged files that were drawn; the next file drawn took the place of each."""
    num_available: int
    """Image files in the source, damaged ones included."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DataSet:
    """Labelled images, split into train, val and test.

    An image is known by its position in `0..M-1`, the order of the source without its unusable images. Arrays are read-only.
    """

    source: str
    img_size: int
    classes: tuple[str, ...]
    labels: np.ndarray
    """`(M,)` int64, positions in `classes`."""
    train: np.ndarray
    """`(n,)` int64, the images of the part in rising order; the three parts are disjoint."""
    val: np.ndarray
    test: np.ndarray
    images: np.ndarray | None
    """`(M, 3, H, W)` uint8, H = W = `img_size`; None if the set is streamed from its source."""
    digest: str
    """16 hex digits over pixels, labels and parts; for a streamed set over the names and bytes of its files instead of the pixels."""
    skipped: tuple[str, ...] = ()
    """Names of damaged files. In train of a streamed set these are the files found so far, by this process and its loader workers."""
    warnings: tuple[str, ...] = ()
    """What a user should know: images without a class, copies across official splits, what was not looked for."""
    names: tuple[str, ...] = ()
    """`M` names, for messages."""
    positions: np.ndarray | None = None
    """`(M,)` int64, where the images of a streamed set lie in the listing of its source."""

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def summary(self) -> str:
        """One line for a user: source, images, classes, parts, size and damaged files, of a streamed set those found so far."""
        parts = {"train": len(self.train), "val": len(self.val), "test": len(self.test)}
        skipped = f"{len(self.skipped)} skipped as damaged ({_some(self.skipped)})" if self.skipped else "none skipped"
        return _summary(self.source, len(self.labels), self.num_classes, parts, (self.img_size,), skipped)

    def name(self, index: int) -> str:
        return self.names[index]

    def load(self, indices: np.ndarray) -> np.ndarray:
        """Images `(B, 3, H, W)` uint8, newly made: the central square at `img_size`."""
        if self.images is not None:
            return self.images[indices]
        return np.stack([to_pixels(self.square(int(index))) for index in indices])

    def square(self, index: int) -> Image:
        """The central square of an image at `img_size`."""
        image = self.open(index)
        return image if self.images is not None else _square(image, self.img_size, self._listing.crop)

    def open(self, index: int) -> Image:
        """The RGB image: of a streamed set as its source has it, else at `img_size`.

        A damaged file of train is recorded in `skipped` and replaced by the next image of its class. Damaged files of val and test
        were left out when the set was opened; raises ValueError if one of the others can no longer be read.
        """
        if self.images is not None:
            from PIL import Image

            return Image.fromarray(np.ascontiguousarray(self.images[index].transpose(1, 2, 0)))
        listing = self._listing
        assert self.positions is not None, "a streamed set knows its positions"
        for candidate in self._peers(index):
            try:
                return listing.read(int(self.positions[candidate]))
            except MemoryError:
                raise
            except Exception as error:  # a decoder given a damaged file raises nearly anything
                if not self._is_trained_on(index):
                    raise ValueError(f"data {self.source!r}: {self.name(index)} cannot be read any more") from error
                self.record_damage((self.name(candidate),))
        label = self.classes[self.labels[index]]
        raise ValueError(f"data {self.source!r}: every image of class {label!r} in train is damaged")

    def record_damage(self, names: tuple[str, ...]) -> None:
        """Add damaged files to `skipped`, each once."""
        new = tuple(name for name in names if name not in self.skipped)
        # The only field that changes: a streamed set finds damaged files while it is read.
        object.__setattr__(self, "skipped", self.skipped + new)

    def _peers(self, index: int):
        """The image, then those of its class in train that follow it, around the end."""
        yield index
        peers = self.train[self.labels[self.train] == self.labels[index]]
        start = int(np.searchsorted(peers, index))
        yield from (int(peer) for peer in np.roll(peers, -start)[1:])

    def _is_trained_on(self, index: int) -> bool:
        return bool(self.train[min(np.searchsorted(self.train, index), len(self.train) - 1)] == index)

    def open_source(self) -> None:
        """List the source of a streamed set now, so that loader workers, forked later, share the list."""
        if self.images is None:
            _ = self._listing

    @cached_property
    def _listing(self) -> Listing:
        source = parse_source(self.source)
        listing = list_images(source, source.stamp)
        assert self.positions is not None, "a streamed set knows its positions"
        if len(listing.names) <= self.positions[-1] or any(
            listing.names[position] != name for position, name in zip(self.positions, self.names, strict=True)
        ):
            raise ValueError(f"data {self.source!r} has other files than when the data set was made of it")
        return listing

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_listing"}


def check_source(source: str, *, num_images: int = 1) -> str:
    """The source with absolute paths; raises ValueError, in one line, if it cannot be listed or holds too few images."""
    place = parse_source(source)
    num_available = len(list_images(place, place.stamp).names)
    if num_available < num_images:
        holds = f"holds {num_available} image files, {num_images} are needed" if num_available else "holds no image file"
        raise ValueError(f"data {source!r}: {', '.join(map(str, place.paths)) or source} {holds} ({', '.join(EXTENSIONS)})")
    return str(place)


def count_classes(source: str) -> int:
    """The classes that a data set of the source would have, 0 without labels; opens no image. Raises ValueError as `check_source`."""
    place = parse_source(source)
    return len(_classes_of(list_images(place, place.stamp)))


def _classes_of(listing: Listing) -> tuple[str, ...]:
    found = {name for name in listing.classes if name is not None}
    return listing.class_names or tuple(sorted(found, key=lambda name: (natural_key(name), name)))


def summarize(source: str, img_sizes: Collection[int], *, with_parts: bool) -> str:
    """As `DataSet.summary`, from the names and labels of the source alone: opens no image, so it knows of no damaged one.

    `with_parts` counts train, val and test. Damaged images, and where the split is ours copies of an image, change these counts by
    as many when the set is read.
    """
    place = parse_source(source)
    listing = list_images(place, place.stamp)
    labelled = [name for name in listing.classes if name is not None]
    parts: dict[str, int] = {}
    if with_parts:
        labels = np.unique(labelled, return_inverse=True)[1]
        official = [part for part, name in zip(listing.parts, listing.classes, strict=True) if name is not None] if listing.parts else None
        try:
            split = split_dataset(labels, np.arange(len(labels)), None if official is None else np.array(official))
        except ValueError as error:
            raise ValueError(f"data '{place}': {error}") from None
        parts = dict(zip(("train", "val", "test"), map(len, split), strict=True))
    skipped = "damaged files are found and skipped when images are read" if listing.files else "none skipped"
    num_images = len(labelled) if with_parts else len(listing.names)
    return _summary(str(place), num_images, len(_classes_of(listing)), parts, img_sizes, skipped)


def _summary(source: str, num_images: int, num_classes: int, parts: dict[str, int], img_sizes: Collection[int], skipped: str) -> str:
    split = [", ".join(f"{name} {size:,}" for name, size in parts.items())] if parts else []
    sizes = ", ".join(map(str, sorted(set(img_sizes))))
    return "; ".join([f"data {source}: {num_images:,} images, {num_classes:,} classes", *split, f"brought to {sizes} px", skipped])


def fingerprint(source: str, *, cache: Path | None = None) -> str:
    """The identity of the data: `digits`, or the scheme, `-bytes-`, and 16 hex digits over the names and the bytes of its files.

    Equal contents have equal identities, wherever they lie. The bytes of a file are read once for each of its states
    (`workers/file_hashes.py`); `cache` is a folder in which later processes find the hashes, None keeps them in memory alone. The work
    for 50,000 files of 1 kB takes 2.5 s, with the hashes from the cache 2.2 s (`tests/benchmarks/bench_data.py`); large files are hashed
    at 1.7 GB/s, if the disk is as fast.
    """
    place = parse_source(source)
    if place.scheme == "digits":
        return source
    return f"{place.scheme}{BY_CONTENT}{list_images(place, place.stamp).fingerprint(_hashes_of(place, cache))}"


def _hashes_of(place: Source, cache: Path | None) -> Path | None:
    """The file of the cache folder that holds the hashes of a source."""
    return cache and cache / f"{hashlib.sha256(str(place).encode(errors='surrogateescape')).hexdigest()[:16]}.json"


def load_images(source: str, *, img_size: int, num_images: int, seed: int) -> ImageSample:
    """A sample without replacement, the same for the same contents and seed; a shorter one is a prefix of a longer one.

    A damaged file is skipped, named, and replaced by the next one drawn. Raises ValueError if too few are left.
    """
    place = parse_source(source)
    return _load_images(place, place.stamp, img_size, num_images, seed)


@lru_cache(maxsize=8)
def _load_images(source: Source, stamp: str, img_size: int, num_images: int, seed: int) -> ImageSample:
    import torch

    listing = list_images(source, stamp)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    images, skipped = [], list(listing.damage)
    for index in np.random.default_rng(seed).permutation(len(listing.names)):
        if len(images) == num_images:
            break
        try:
            image = _central_square(listing.read(int(index)), img_size, listing.crop)
        except MemoryError:
            raise
        except Exception:  # a decoder given a damaged file raises nearly anything
            skipped.append(listing.names[index])
            continue
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255
        images.append((pixels - mean) / std)
    if len(images) < num_images:
        damaged = f" beside {len(skipped)} damaged ({_some(skipped)})" if skipped else ""
        raise ValueError(f"data '{source}' holds {len(images)} readable images{damaged}; {num_images} are needed")
    return ImageSample(images=torch.stack(images), skipped=tuple(skipped), num_available=len(listing.names))


def load_dataset(source: str, *, img_size: int, memory_mb: int = 2000, cache: Path | None = None) -> DataSet:
    """The data set of a source: official splits where it has them, else 70 % train, 10 % val, 20 % test of each class.

    It depends on the contents of the source alone. A process decodes a set of at most `memory_mb` at `img_size` once, and again when
    a file has changed. A larger set is streamed: a process takes the hashes of its files from `cache`, as `fingerprint` does, or reads
    them all once; it decodes the val and test images once to leave out the damaged. Without an official val, val is a tenth of train;
    without an official test, the official val is the test. Where the split is ours, identical images of a set in memory come into one
    part. Raises ValueError, saying why, if the set cannot be used: no images or labels, labels out of range, fewer than two classes,
    an empty part.
    """
    place = parse_source(source)
    return _load_dataset(place, place.stamp, img_size, memory_mb, _hashes_of(place, cache))


@lru_cache(maxsize=2)
def _load_dataset(source: Source, stamp: str, img_size: int, memory_mb: int, hashes: Path | None) -> DataSet:
    listing = list_images(source, stamp)
    where = f"data '{source}'"
    positions = np.flatnonzero([name is not None for name in listing.classes])
    warnings = list(listing.notes)
    if not len(listing.names):
        raise ValueError(f"{where} holds no image file ({', '.join(EXTENSIONS)})")
    if len(positions) < len(listing.names):
        unlabelled = [name for name, label in zip(listing.names, listing.classes, strict=True) if label is None]
        if not len(positions):
            raise ValueError(f"{where} has no labels: {_some(unlabelled)} lie in no class folder and have no label of their own")
        warnings.append(f"{len(unlabelled)} images without a class are left out: {_some(unlabelled)}")
    classes = _classes_of(listing)

    images: np.ndarray | None = None
    skipped = listing.damage
    contents = positions
    if len(positions) * 3 * img_size**2 <= memory_mb * 10**6:
        images, contents, intact = _decode(listing, positions, img_size)
        skipped += tuple(listing.names[position] for position in positions[~intact])
        if not intact.any():
            raise ValueError(f"{where}: none of its {len(positions)} images can be read ({_some(skipped)})")
        images, contents, positions = images[: intact.sum()], contents[intact], positions[intact]
    elif not listing.has_random_access:
        needed_mb = -(-len(positions) * 3 * img_size**2 // 10**6)
        raise ValueError(f"{where} takes {needed_mb} MB in memory, {memory_mb} are allowed; it is compressed: unpack it and it is streamed")
    else:
        warnings.append("the set is streamed: identical images were not looked for, as that would take reading all of it")

    number = {name: index for index, name in enumerate(classes)}
    labels = np.array([number[str(listing.classes[position])] for position in positions], dtype=np.int64)
    if len(np.unique(labels)) < 2:
        raise ValueError(f"{where} has intact images of one class only, {classes[labels[0]]!r}; two are needed")
    official = np.array([listing.parts[position] for position in positions]) if listing.parts else None
    _, copies = np.unique(contents, return_inverse=True)
    try:
        parts = split_dataset(labels, copies, official)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if unseen := set(range(len(classes))) - set(labels[parts[0]].tolist()):
        warnings.append(f"{len(unseen)} classes have no image in train: {_some([classes[index] for index in sorted(unseen)])}")
    names = tuple(listing.names[position] for position in positions)
    if images is None:
        parts, damaged = _without_damaged(listing, positions, parts)
        skipped += damaged
        if not all(map(len, parts)):
            raise ValueError(f"{where}: every image of val or of test is damaged ({_some(damaged)})")
    if leaked := _shared_copies(copies, parts):
        warnings.append(f"{len(leaked)} images of val or test are also in an earlier part: {_some([names[index] for index in leaked])}")
    arrays = [labels, *parts, positions, *([] if images is None else [images])]
    for array in arrays:
        array.flags.writeable = False
    train, val, test = parts
    return DataSet(
        source=str(source),
        img_size=img_size,
        classes=classes,
        labels=labels,
        train=train,
        val=val,
        test=test,
        images=images,
        digest=_digest(contents if images is not None else listing.fingerprint(hashes), labels, parts),
        skipped=skipped,
        warnings=tuple(warnings),
        names=names,
        positions=positions if images is None else None,
    )


def split_dataset(labels: np.ndarray, copies: np.ndarray, official: np.ndarray | None) -> tuple[np.ndarray, ...]:
    """The positions of train, val and test, from labels, numbers of identical images and official parts, all `(M,)`.

    Raises ValueError if a part is empty.
    """
    has = set() if official is None else set(official.tolist())
    if official is not None and has != {"train"}:
        if "train" not in has:
            raise ValueError(f"there is an official {' and '.join(sorted(has))} but no train")
        train = np.flatnonzero(official == "train")
        test = np.flatnonzero(official == ("test" if "test" in has else "val"))
        if has == {"train", "val", "test"}:
            parts = (train, np.flatnonzero(official == "val"), test)
        else:
            is_val = _stratify(labels[train], copies[train], TENTH_FOR_VAL) == 1
            parts = (train[~is_val], train[is_val], test)
    else:
        number = _stratify(labels, copies, TENTHS)
        parts = tuple(np.flatnonzero(number == part) for part in range(3))
    for name, part in zip(("train", "val", "test"), parts, strict=True):
        if not len(part):
            raise ValueError(f"{len(labels)} images in {len(np.unique(labels))} classes are too few for a split: {name} is empty")
    return parts


def _stratify(labels: np.ndarray, copies: np.ndarray, tenths: np.ndarray) -> np.ndarray:
    """The part `(M,)` of each image: every class in the same proportions, identical images in one part.

    Images are shuffled within their class and, one class after the other, dealt to parts in turns of ten. Copies follow the first
    of them. The only image of a class goes to train.
    """
    _, leaders, group = np.unique(copies, return_index=True, return_inverse=True)
    keys = np.random.default_rng(stream("split", 0)).random(len(labels))[leaders]
    order = np.lexsort((keys, labels[leaders]))
    dealt = order[np.bincount(labels[leaders])[labels[leaders[order]]] > 1]
    part = np.zeros(len(leaders), dtype=np.int64)
    part[dealt] = tenths[np.arange(len(dealt)) % 10]
    return part[group]


def _shared_copies(copies: np.ndarray, parts: tuple[np.ndarray, ...]) -> list[int]:
    """The images of val and test that have a copy in a part before theirs."""
    leaked: list[int] = []
    earlier = copies[parts[0]]
    for part in parts[1:]:
        leaked += part[np.isin(copies[part], earlier)].tolist()
        earlier = np.concatenate((earlier, copies[part]))
    return leaked


def _decode(listing: Listing, positions: np.ndarray, img_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images `(M, 3, H, W)` uint8 (intact first), digests of the original pixels `(M,)` and the intact mask `(M,)`."""
    images = np.empty((len(positions), 3, img_size, img_size), dtype=np.uint8)
    contents = np.zeros(len(positions), dtype="S16")
    intact = np.zeros(len(positions), dtype=bool)
    rank = np.full(len(listing.names), -1)
    rank[positions] = np.arange(len(positions))
    for position in listing.storage_order if listing.storage_order is not None else range(len(listing.names)):
        index = rank[position]
        if index < 0:
            continue
        try:
            image = listing.read(position).convert("RGB")
            images[index] = to_pixels(_square(image, img_size, listing.crop))
        except MemoryError:
            raise
        except Exception:  # a decoder given a damaged file raises nearly anything
            continue
        contents[index] = hashlib.blake2b(repr(image.size).encode() + image.tobytes(), digest_size=16).digest()
        intact[index] = True
    if not intact.all():
        images[: intact.sum()] = images[intact]
    return images, contents, intact


def _without_damaged(
    listing: Listing, positions: np.ndarray, parts: tuple[np.ndarray, ...]
) -> tuple[tuple[np.ndarray, ...], tuple[str, ...]]:
    """The parts of a streamed set without the damaged images of val and test, and the names of these images."""
    damaged: list[int] = []
    for index in np.concatenate(parts[1:]):
        try:
            listing.read(int(positions[index]))
        except MemoryError:
            raise
        except Exception:  # a decoder given a damaged file raises nearly anything
            damaged.append(int(index))
    kept = tuple(part[~np.isin(part, damaged)] for part in parts)
    return kept, tuple(listing.names[positions[index]] for index in damaged)


def _digest(contents: np.ndarray | str, labels: np.ndarray, parts: tuple[np.ndarray, ...]) -> str:
    digest = hashlib.sha256(contents.encode() if isinstance(contents, str) else contents.tobytes())
    for array in (labels, *parts):
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def to_pixels(image: Image) -> np.ndarray:
    """`(3, H, W)` uint8 of an RGB image."""
    return np.asarray(image).transpose(2, 0, 1)


def _square(image: Image, img_size: int, crop: float) -> Image:
    """The central square. The crop keeps at least `img_size` pixels per side if the image has them, so that nothing is enlarged."""
    return _central_square(image, img_size, max(crop, min(1.0, img_size / min(image.size))))


def _central_square(image: Image, img_size: int, crop: float) -> Image:
    """The central square of an image, resized by bicubic interpolation; RGB, img_size x img_size pixels."""
    from PIL import Image

    side = min(image.size) * crop
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return image.convert("RGB").resize((img_size, img_size), Image.Resampling.BICUBIC, box=box)


def _some(names) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
