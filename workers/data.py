"""Images for the evaluators that need some: a source named by a string, a sample determined by its contents and a seed.

    digits          scikit-learn's 1,797 handwritten digits, which need no download
    folder:PATH     every image file below a folder, in class folders or not
    tar:PATH        every image file in one tar archive, compressed or not

Files are listed here rather than by timm's readers: those cannot list an archive that was cut off, and their import
takes seconds that a mistyped path should not cost.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from space.registry import unknown_name

if TYPE_CHECKING:
    from torch import Tensor

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class ImageSample:
    """Images `(N, 3, H, W)`, float32 and ImageNet-normalised; shared between callers, so never written to."""

    images: Tensor
    skipped: tuple[str, ...]
    """The damaged files that were drawn and replaced by the next one, by name."""
    num_available: int
    """Image files in the source, damaged ones included."""


@dataclass(frozen=True)
class _Listing:
    """The image files of a source, by name, with what is needed to read one."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    read: Callable[[int], Any]
    """Index of a name -> PIL image; raises whatever the damage makes it raise."""
    crop: float = 0.875
    """The share of the shorter side that the central crop keeps."""
    damage: tuple[str, ...] = ()
    """What is wrong with the source as a whole."""


def check_source(source: str, *, num_images: int = 1) -> str:
    """The source with its path made absolute; raises ValueError in one line if it is not one or holds too few images."""
    scheme, path = _split(source)
    if scheme == "digits":
        return source
    num_available = len(_list_images(scheme, path, _stamp(path)).names)
    if num_available < num_images:
        holds = f"holds {num_available} image files, {num_images} are needed" if num_available else "holds no image file"
        raise ValueError(f"data {source!r}: {path} {holds} ({', '.join(EXTENSIONS)})")
    return f"{scheme}:{path}"


def fingerprint(source: str) -> str:
    """The identity of the data: `digits`, or the scheme and 16 hex digits over the names and sizes of the image files."""
    scheme, path = _split(source)
    if scheme == "digits":
        return source
    # Read anew: a stamp does not see a change in a subfolder, and this is what tells measurements on changed data apart.
    listing = _list_images.__wrapped__(scheme, path, _stamp(path))
    digest = hashlib.sha256()
    for name, size in zip(listing.names, listing.sizes, strict=True):
        digest.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
    return f"{scheme}-{digest.hexdigest()[:16]}"


def load_images(source: str, *, img_size: int, num_images: int, seed: int) -> ImageSample:
    """A sample without replacement, the same for the same contents and seed; a shorter one is a prefix of a longer one.

    A damaged file is skipped, named, and replaced by the next one drawn. Raises ValueError if too few are left.
    """
    scheme, path = _split(source)
    return _load(scheme, path, _stamp(path), img_size, num_images, seed)


@lru_cache(maxsize=8)
def _load(scheme: str, path: Path | None, stamp: tuple[int, int], img_size: int, num_images: int, seed: int) -> ImageSample:
    import numpy as np
    import torch

    listing = _list_images(scheme, path, stamp)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    images, skipped = [], list(listing.damage)
    for index in np.random.default_rng(seed).permutation(len(listing.names)):
        if len(images) == num_images:
            break
        try:
            image = _resize(listing.read(int(index)), img_size, listing.crop)
        except MemoryError:
            raise
        except Exception:  # a decoder given a damaged file raises nearly anything
            skipped.append(listing.names[index])
            continue
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255
        images.append((pixels - mean) / std)
    if len(images) < num_images:
        damaged = f" beside {len(skipped)} damaged ({', '.join(skipped[:3])}{', ...' if len(skipped) > 3 else ''})" if skipped else ""
        where = scheme if path is None else f"{scheme}:{path}"
        raise ValueError(f"data {where!r} holds {len(images)} readable images{damaged}; {num_images} are needed")
    return ImageSample(images=torch.stack(images), skipped=tuple(skipped), num_available=len(listing.names))


def _split(source: str) -> tuple[str, Path | None]:
    scheme, _, text = source.partition(":")
    if source == "digits":
        return scheme, None
    if scheme not in ("folder", "tar"):
        if Path(source).exists():
            kind = "folder" if Path(source).is_dir() else "tar"
            raise ValueError(f"data {source!r} is a path without its kind; write '{kind}:{source}'")
        raise unknown_name("data source", scheme, ("digits", "folder:PATH", "tar:PATH"))
    if not text:
        raise ValueError(f"data {source!r} lacks its path; write '{scheme}:PATH'")
    path = Path(os.path.abspath(Path(text).expanduser()))
    if not path.exists():
        raise ValueError(f"data {source!r}: {path} does not exist")
    if scheme == "folder" and not path.is_dir():
        raise ValueError(f"data {source!r}: {path} is not a folder; for an archive write 'tar:PATH'")
    if scheme == "tar" and not path.is_file():
        raise ValueError(f"data {source!r}: {path} is not a file; for a folder write 'folder:PATH'")
    return scheme, path


def _stamp(path: Path | None) -> tuple[int, int]:
    """Changes when an archive is rewritten or a folder's own entries change, so that a reused worker reads it anew."""
    if path is None:
        return 0, 0
    status = path.stat()
    return status.st_mtime_ns, status.st_size


@lru_cache(maxsize=4)
def _list_images(scheme: str, path: Path | None, stamp: tuple[int, int]) -> _Listing:
    if path is None:
        return _list_digits()
    return _list_folder(path) if scheme == "folder" else _list_tar(path)


def _list_digits() -> _Listing:
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    names = tuple(f"digit {index}" for index in range(len(pixels)))
    return _Listing(names, (64,) * len(names), lambda index: Image.fromarray(pixels[index]), crop=1.0)


def _list_folder(path: Path) -> _Listing:
    found = sorted((file.relative_to(path).as_posix(), file.stat().st_size) for file in _image_files(path))

    def read(index: int) -> Any:
        from PIL import Image

        with Image.open(path / names[index]) as image:
            return image.convert("RGB")

    names, sizes = (tuple(column) for column in zip(*found, strict=True)) if found else ((), ())
    return _Listing(names, sizes, read)


def _image_files(path: Path) -> Iterator[Path]:
    for root, _, files in os.walk(path, followlinks=True):
        for name in files:
            file = Path(root, name)
            # A dangling link has no size; it is not there.
            if file.suffix.lower() in EXTENSIONS and file.is_file():
                yield file


def _list_tar(path: Path) -> _Listing:
    members: dict[str, tarfile.TarInfo] = {}
    last, damage = None, ()
    try:
        with tarfile.open(path) as archive:
            for last in archive:
                if last.isfile() and Path(last.name).suffix.lower() in EXTENSIONS:
                    members[last.name] = last
    except (tarfile.TarError, EOFError, OSError) as error:
        if last is None:
            raise ValueError(f"data 'tar:{path}': {path} is not a tar archive") from error
        damage = (f"{path.name}: cut off or damaged after {last.name!r}",)
    names = tuple(sorted(members))

    def read(index: int) -> Any:
        from PIL import Image

        with tarfile.open(path) as archive:
            file = archive.extractfile(members[names[index]])
            assert file is not None, "only regular files are listed"
            return Image.open(file).convert("RGB")

    return _Listing(names, tuple(members[name].size for name in names), read, damage=damage)


def _resize(image: Any, img_size: int, crop: float) -> Any:
    """The central square of an image, resized by bicubic interpolation; RGB, img_size x img_size pixels."""
    from PIL import Image

    side = min(image.size) * crop
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return image.convert("RGB").resize((img_size, img_size), Image.Resampling.BICUBIC, box=box)
