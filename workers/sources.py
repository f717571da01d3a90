"""Sources of images: each is named by a string, lists its images in a fixed order and reads any of them.

    digits                       scikit-learn's 1,797 handwritten digits, which need no download
    folder:PATH                  image files in class folders
    tar:PATH                     image files in the class folders of a tar archive, compressed or not
    torchvision:NAME:ROOT        a data set of torchvision that lies below ROOT
    parquet:PATH                 a Hugging Face data set on disk: a parquet file, or a folder of them
    webdataset:PATH              shards (tar files with KEY.jpg and KEY.cls or KEY.json), or a folder of them

Several paths are separated by commas. Folders and archives follow timm's reader: an image belongs to the folder it lies
in, classes are in natural order. We list them ourselves because that reader cannot list an archive that was cut off, and because
its import takes seconds, which a mistyped path should not cost. We index shards ourselves because timm's reader of them is a stream:
a shuffle buffer decides its order, and it cannot be resumed at a position.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import stat
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from itertools import accumulate, chain, takewhile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from space.registry import unknown_name
from workers.file_hashes import File, FileState, hash_files, stamp_of

if TYPE_CHECKING:
    from PIL.Image import Image

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
FORMS = ("digits", "folder:PATH", "parquet:PATH", "tar:PATH", "torchvision:NAME:ROOT", "webdataset:PATH")
PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Names of official splits; timm's synonyms, and those of `test`."""
TORCHVISION = {
    **dict.fromkeys(("cifar10", "cifar100", "fashion_mnist", "kmnist", "mnist", "qmnist"), "test"),
    **dict.fromkeys(("imagenet", "inaturalist", "places365"), "val"),
}
"""timm's names of torchvision's data sets, and the official split that each has beside `train`."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source whose paths are absolute and exist; `name` is that of a torchvision data set."""

    scheme: str
    paths: tuple[Path, ...] = ()
    name: str = ""

    def __str__(self) -> str:
        return ":".join(filter(None, (self.scheme, self.name, ",".join(map(str, self.paths)))))

    @property
    def stamp(self) -> str:
        """16 hex digits that change when any file of the source does, so that a process that lives on reads it anew.

        It asks for the state of every file: 0.4 s for 50,000 in folders (`tests/benchmarks/bench_data.py`), almost nothing for archives. Of
        a torchvision set it looks at all files below ROOT, whichever set they belong to.
        """
        return stamp_of(_files_of(self))


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The images of a source in its order, with what is needed to read one."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    """Bytes of each image file; zeros where the images are not separate files."""
    classes: tuple[str | None, ...]
    """The class of each image, None for one without."""
    parts: tuple[str, ...] = ()
    """The official split of each image: `train`, `val` or `test`; empty when there is none."""
    read: Callable[[int], Image]
    """Position -> image; a damaged image may raise any exception."""
    class_names: tuple[str, ...] = ()
    """All classes in order, if the source names them; else empty."""
    storage_order: Sequence[int] | None = None
    """The positions in the order of storage, if reading in another order is slow."""
    crop: float = 0.875
    """The share of the shorter side that the central crop keeps."""
    damage: tuple[str, ...] = ()
    """What is wrong with the source as a whole."""
    has_random_access: bool = True
    """Whether an image can be read without reading those before it."""
    files: Sequence[File] = ()
    """The files whose bytes are the contents, images or archives of them; empty where `identity` says all."""
    identity: str = ""
    """Stands for contents that lie in no file, or were read from it already."""
    notes: tuple[str, ...] = ()
    """What a user should know of the listing."""

    def fingerprint(self, hashes: Path | None = None) -> str:
        """16 hex digits over names, sizes, `identity` and the bytes of all files; `hashes` is the store of `hash_files`."""
        digest = hashlib.sha256(self.identity.encode())
        for name, size in zip(self.names, self.sizes, strict=True):
            digest.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
        for file, content in zip(self.files, hash_files(self.files, hashes), strict=True):
            digest.update(f"{file.name}\0{content}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]


def parse_source(text: str) -> Source:
    """The source that a string names; raises ValueError, in one line, for another string or a path that does not exist."""
    scheme, _, rest = text.partition(":")
    if text == "digits":
        return Source(scheme="digits")
    if scheme not in {form.partition(":")[0] for form in FORMS[1:]}:
        if Path(text).exists():
            kind = "folder" if Path(text).is_dir() else "parquet" if text.endswith(".parquet") else "tar"
            raise ValueError(f"data {text!r} is a path without its kind; write '{kind}:{text}'")
        raise unknown_name("data source", scheme, FORMS)
    name = ""
    if scheme == "torchvision":
        name, _, rest = rest.partition(":")
        if name not in TORCHVISION:
            raise unknown_name("torchvision data set", name, TORCHVISION, f"data {text!r}")
    if not rest:
        raise ValueError(f"data {text!r} lacks its path; write '{next(form for form in FORMS if form.startswith(scheme))}'")
    # A path may hold a comma itself.
    single = Path(rest).expanduser().exists() or scheme == "torchvision"
    paths = tuple(Path(os.path.abspath(Path(part).expanduser())) for part in ([rest] if single else filter(None, rest.split(","))))
    for path in paths:
        if not path.exists():
            raise ValueError(f"data {text!r}: {path} does not exist")
        if scheme in ("folder", "torchvision") and not path.is_dir():
            hint = "; for an archive write 'tar:PATH'" if scheme == "folder" else ""
            raise ValueError(f"data {text!r}: {path} is not a folder{hint}")
        if scheme == "tar" and not path.is_file():
            raise ValueError(f"data {text!r}: {path} is not a file; for a folder write 'folder:PATH'")
    return Source(scheme=scheme, paths=paths, name=name)


@lru_cache(maxsize=4)
def list_images(source: Source, stamp: str) -> Listing:
    """The images of a source; raises ValueError if it cannot be listed. `stamp` is the source's: another one lists it anew."""
    if source.scheme == "digits":
        return _list_digits()
    if source.scheme == "folder":
        return _in_class_folders(source.paths, [_find_in_folder(path) for path in source.paths])
    if source.scheme == "tar":
        return _in_class_folders(source.paths, [_find_in_tar(path) for path in source.paths])
    if source.scheme == "webdataset":
        return _list_shards(source)
    return _list_torchvision(source) if source.scheme == "torchvision" else _list_parquet(source)


def _files_of(source: Source) -> Iterator[File]:
    """Every file that the images and labels of a source may lie in."""
    if source.scheme == "folder":
        for path in source.paths:
            yield from (File(name, f"{path}/{name}") for name in _names_below(path) if _is_image(name))
    elif source.scheme == "torchvision":
        yield from (File(name, f"{source.paths[0]}/{name}") for name in _names_below(source.paths[0]))
    else:
        paths = source.paths
        if source.scheme == "webdataset":
            paths = _shards(source)
        elif source.scheme == "parquet":
            paths = _parquet_files(source)
        yield from (File(path.name, str(path)) for path in paths)


def natural_key(name: str) -> list[int | str]:
    """timm's natural order: numbers inside a name count as numbers, capitals like small letters."""
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"(\d+)", name.lower()))]


def _list_digits() -> Listing:
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return Listing(
        names=tuple(f"digit {index}" for index in range(len(pixels))),
        sizes=(64,) * len(pixels),
        classes=tuple(map(str, digits.target)),
        read=lambda index: Image.fromarray(pixels[index]),
        crop=1.0,
    )


@dataclass(frozen=True)
class _Files:
    """Image files found in one place, sorted by name; `names` are relative to it, with forward slashes."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    read: Callable[[int], bytes]
    storage_order: Sequence[int]
    files: Sequence[File]
    damage: tuple[str, ...] = ()
    has_random_access: bool = True


def _find_in_folder(path: Path) -> _Files:
    found: list[tuple[str, int]] = []
    for name in _names_below(path):
        # A dangling link has no state; it is not there.
        with suppress(OSError):
            if _is_image(name) and stat.S_ISREG((status := os.stat(f"{path}/{name}")).st_mode):
                found.append((name, status.st_size))
    names, sizes = zip(*sorted(found), strict=True) if found else ((), ())
    files = tuple(File(name, f"{path}/{name}") for name in names)
    return _Files(names, sizes, lambda index: (path / names[index]).read_bytes(), range(len(names)), files)


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _names_below(path: Path) -> Iterator[str]:
    """The files below a folder, named from it with forward slashes."""
    root = str(path)
    for folder, _, names in os.walk(root, followlinks=True):
        below = folder[len(root) :].lstrip("/")
        yield from (f"{below}/{name}" if below else name for name in names)


def _find_in_tar(path: Path) -> _Files:
    found: dict[str, tarfile.TarInfo] = {}

    def visit(member: tarfile.TarInfo, archive: tarfile.TarFile) -> None:
        if _is_image(member.name):
            found[member.name] = member

    damage = _scan(path, visit)
    return _files_in_tar(path, [found[name] for name in sorted(found)], damage)


def _files_in_tar(path: Path, members: Sequence[tarfile.TarInfo], damage: tuple[str, ...]) -> _Files:
    is_plain = _is_plain(path)
    read = _plain_reader(path) if is_plain else _compressed_reader(path)
    return _Files(
        names=tuple(member.name for member in members),
        sizes=tuple(member.size for member in members),
        read=lambda index: read(members[index]),
        storage_order=sorted(range(len(members)), key=lambda index: members[index].offset_data),
        # The caller gives it a name if there are other archives: the name of a single one means nothing.
        files=[File("", str(path))],
        damage=damage,
        has_random_access=is_plain,
    )


def _scan(path: Path, visit: Callable[[tarfile.TarInfo, tarfile.TarFile], None]) -> tuple[str, ...]:
    """Visit every file of an archive. Returns one sentence if the archive ends early, else nothing."""
    last = None
    try:
        with tarfile.open(path) as archive:
            for last in archive:
                if last.isfile():
                    visit(last, archive)
            # An archive that was cut between two files lacks only the block of zeros at its end.
            archive.fileobj.seek(archive.offset)
            if not archive.fileobj.read(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("no end of archive")
    except (tarfile.TarError, EOFError, OSError) as error:
        if last is None:
            raise ValueError(f"data: {path} is not a tar archive") from error
        return (f"{path.name}: cut off or damaged after {last.name!r}",)
    return ()


def _is_plain(path: Path) -> bool:
    try:
        with tarfile.open(path, "r:"):
            return True
    except tarfile.ReadError:
        return False


def _plain_reader(path: Path) -> Callable[[tarfile.TarInfo], bytes]:
    def read(member: tarfile.TarInfo) -> bytes:
        # Opened for each member: a forked process would move the position of a file that it shares with this one.
        with path.open("rb") as file:
            file.seek(member.offset_data)
            return file.read(member.size)

    return read


def _compressed_reader(path: Path) -> Callable[[tarfile.TarInfo], bytes]:
    @lru_cache(maxsize=1)
    def archive() -> tarfile.TarFile:
        # Kept open, so that reading in storage order decompresses everything once.
        return tarfile.open(path)

    def read(member: tarfile.TarInfo) -> bytes:
        file = archive().extractfile(member)
        assert file is not None, "only regular files are listed"
        return file.read()

    return read


def _in_class_folders(paths: Sequence[Path], places: Sequence[_Files]) -> Listing:
    """Files by the folder they lie in. If there are several places, each is a folder too: `tar:cat.tar,dog.tar` has two classes."""
    prefixes = [re.sub(r"\.(tar(\.\w+)?|t[bgx]z2?)$", "", path.name) + "/" if len(paths) > 1 else "" for path in paths]
    names = [[prefix + name for name in place.names] for prefix, place in zip(prefixes, places, strict=True)]
    folders = [[PurePosixPath(name.lstrip("/")).parts[:-1] for name in place] for place in names]
    depths = _split_depths(folders)
    notes = ()
    if depths is None:
        depths, parts = [-1] * len(places), ()
        if beside := sorted({folder[0] for place in folders for folder in place if folder and folder[0].lower() in PARTS}):
            notes = (f"not every image lies in a folder of an official split, so {', '.join(beside)} are taken for none",)
    else:
        parts = tuple(
            PARTS[folder[depth].lower()] if folder else "" for place, depth in zip(folders, depths, strict=True) for folder in place
        )
    classes = tuple(
        folder[-1] if len(folder) > depth + 1 else None for place, depth in zip(folders, depths, strict=True) for folder in place
    )
    files = [File(prefix + file.name, file.path) for prefix, place in zip(prefixes, places, strict=True) for file in place.files]
    return _join(places, names=tuple(chain.from_iterable(names)), files=files, classes=classes, parts=parts, notes=notes)


def _split_depths(folders: Sequence[Sequence[tuple[str, ...]]]) -> list[int] | None:
    """How deep in each place the folders of official splits lie, below folders that all files share; None if there are none."""
    depths = []
    for place in folders:
        inside = [folder for folder in place if folder]
        # The first and the last in order agree as far as all do.
        outer = zip(min(inside, default=()), max(inside, default=()), strict=False)
        shared = [name for name, _ in takewhile(lambda names: names[0] == names[1], outer)]
        depth = next((depth for depth, name in enumerate(shared) if name.lower() in PARTS), len(shared))
        if any(len(folder) <= depth or folder[depth].lower() not in PARTS for folder in inside):
            return None
        depths.append(depth)
    return depths


def _join(places: Sequence[_Files], **columns: Any) -> Listing:
    """One place after the other, as one listing."""
    found = [(place, index) for place in places for index in range(len(place.names))]
    starts = accumulate((len(place.names) for place in places), initial=0)
    order = [start + index for start, place in zip(starts, places, strict=False) for index in place.storage_order]

    def read(position: int) -> Image:
        place, index = found[position]
        return _decode(place.read(index))

    return Listing(
        sizes=tuple(size for place in places for size in place.sizes),
        read=read,
        storage_order=order,
        damage=tuple(damage for place in places for damage in place.damage),
        has_random_access=all(place.has_random_access for place in places),
        **columns,
    )


def _decode(content: bytes) -> Image:
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB")


def _list_shards(source: Source) -> Listing:
    """The samples of webdataset shards: files of one name up to its first dot are one sample."""
    shards = _shards(source)
    if not shards:
        raise ValueError(f"data '{source}': no shard (*.tar) in {', '.join(map(str, source.paths))}")
    places, classes = zip(*map(_index_shard, shards), strict=True)
    parts = [_part_in_name(shard.name) for shard in shards]
    names = [[f"{shard.name}/{name}" for name in place.names] for shard, place in zip(shards, places, strict=True)]
    return _join(
        places,
        names=tuple(chain.from_iterable(names)),
        files=tuple(chain.from_iterable(place.files for place in places)),
        classes=tuple(chain.from_iterable(classes)),
        parts=tuple(part for part, place in zip(parts, places, strict=True) for _ in place.names) if all(parts) else (),
    )


def _shards(source: Source) -> list[Path]:
    return [file for path in source.paths for file in (sorted(path.glob("*.tar")) if path.is_dir() else [path])]


def _index_shard(path: Path) -> tuple[_Files, list[str | None]]:
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, str] = {}

    def visit(member: tarfile.TarInfo, archive: tarfile.TarFile) -> None:
        folder, _, file = member.name.rpartition("/")
        stem, _, ending = file.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if f".{ending.lower()}" in EXTENSIONS:
            images[key] = member
        elif ending in ("cls", "json"):
            content = archive.extractfile(member)
            assert content is not None, "only files are visited"
            label = _label_of(content.read(), ending)
            # A sample may have both; the .cls file is the label, the other one metadata.
            if label is not None and (ending == "cls" or key not in labels):
                labels[key] = _class_of(label, f"{path.name}/{key}")

    damage = _scan(path, visit)
    keys = sorted(images)
    return _files_in_tar(path, [images[key] for key in keys], damage), [labels.get(key) for key in keys]


def _label_of(content: bytes, ending: str) -> Any:
    """The label in a label file, None if it holds none."""
    try:
        text = content.decode()
        data = json.loads(text) if ending == "json" else text.strip()
    except ValueError:
        return None
    return data.get("label") if isinstance(data, dict) else data or None


def _class_of(label: Any, where: str) -> str:
    """The class name of a stored label; raises ValueError if the label is a negative number, or neither number nor name."""
    try:
        number = int(label)
    except (TypeError, ValueError):
        if isinstance(label, str):
            return label
        raise ValueError(f"{where}: label {label!r} is neither a whole number nor a name") from None
    if number < 0 or number != float(label):
        raise ValueError(f"{where}: label {label!r} is out of range; whole numbers from 0 are allowed")
    return str(number)


def _part_in_name(name: str) -> str:
    """The official split in a file's name, else an empty string: `train` of `cifar10-train-0003.tar`."""
    return next((PARTS[word] for word in re.findall("[a-z]+", name.lower()) if word in PARTS), "")


def _list_torchvision(source: Source) -> Listing:
    import numpy as np
    from timm.data.dataset_factory import create_dataset

    second = TORCHVISION[source.name]
    root = str(source.paths[0])
    try:
        sets: list[Any] = [
            create_dataset(f"torch/{source.name}", root=root, split=split, download=False)
            for split in ("train", "validation" if second == "val" else second)
        ]
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0].partition(" You can use download=True")[0]
        raise ValueError(f"data '{source}': torchvision finds no {source.name} below {root}: {reason}") from error
    starts = [0, len(sets[0])]
    class_names = tuple(name if isinstance(name, str) else name[0] for name in getattr(sets[0], "classes", ()))
    labels, files, digest = [], [], hashlib.sha256()
    for part in sets:
        samples = getattr(part, "imgs", None)
        targets = getattr(part, "targets", None)
        labels.append(np.asarray([label for _, label in samples or ()] if targets is None else targets).reshape(len(part), -1)[:, 0])
        if samples is None:
            digest.update(np.ascontiguousarray(part.data).data)
        else:
            files += [File(os.path.relpath(file, root), file) for file, _ in samples]
            digest.update(repr(class_names).encode())
        digest.update(labels[-1].astype("<i8").data)
    flat = np.concatenate(labels)
    if class_names and not 0 <= flat.min() <= flat.max() < len(class_names):
        extremes = f"{flat.min()} to {flat.max()}"
        raise ValueError(f"data '{source}': label out of range; {len(class_names)} classes are named, labels are {extremes}")

    def read(position: int) -> Image:
        number = int(position >= starts[1])
        return sets[number][position - starts[number]][0].convert("RGB")

    return Listing(
        names=tuple(f"{part} {index}" for part, images in zip(("train", second), sets, strict=True) for index in range(len(images))),
        sizes=(0,) * len(flat),
        classes=tuple(class_names[label] if class_names else str(label) for label in flat),
        parts=("train",) * len(sets[0]) + (second,) * len(sets[1]),
        read=read,
        class_names=class_names,
        files=files,
        identity=digest.hexdigest(),
    )


def _list_parquet(source: Source) -> Listing:
    if find_spec("datasets") is None:
        raise ValueError(f"data '{source}' needs the package datasets: pip install 'vitscale[parquet]'")
    files = _parquet_files(source)
    if not files:
        raise ValueError(f"data '{source}': no *.parquet below {', '.join(map(str, source.paths))}")
    names = [os.path.relpath(file, os.path.commonpath(source.paths)) if len(files) > 1 else file.name for file in files]
    said = [_part_in_name(name) for name in names]
    is_official = all(said)
    try:
        readers, class_names, labels = _read_parquet(files, said if is_official else ["train"] * len(files))
    except Exception as error:  # pyarrow and datasets have errors of their own for every kind of file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"data '{source}' cannot be read as a Hugging Face image data set: {reason}") from error
    places = [(part, index) for part, reader in readers.items() for index in range(len(reader))]
    classes = tuple(
        _named_class(label, class_names, f"data '{source}': {part} {index}") for (part, index), label in zip(places, labels, strict=True)
    )

    def read(position: int) -> Image:
        part, index = places[position]
        return _decode(readers[part][index][0].read())

    return Listing(
        names=tuple(f"{part} {index}" for part, index in places),
        sizes=(0,) * len(places),
        classes=classes,
        parts=tuple(part for part, _ in places) if is_official else (),
        read=read,
        class_names=class_names,
        files=[File(name, str(file)) for name, file in zip(names, files, strict=True)],
    )


def _parquet_files(source: Source) -> list[Path]:
    return [file for path in source.paths for file in (sorted(path.rglob("*.parquet")) if path.is_dir() else [path])]


def _named_class(label: Any, class_names: Sequence[str], where: str) -> str | None:
    """The class of a label of a parquet file. In a column that names its classes, -1 means that the image has none."""
    if label is None or (class_names and label == -1):
        return None
    name = _class_of(label, where)
    if not class_names:
        return name
    if int(label) >= len(class_names):
        raise ValueError(f"{where}: label {label} is out of range; {len(class_names)} classes are named")
    return class_names[int(label)]


def _read_parquet(files: Sequence[Path], parts: Sequence[str]) -> tuple[dict[str, Any], tuple[str, ...], list[Any]]:
    """timm's reader of each part, the names of the classes if they are stored, and the labels of all images.

    Hugging Face's library copies the data into Arrow files, which all processes of the machine share. They lie in the folder
    for temporary files, not in the user's home, and are found by the files' paths and states.
    """
    import datasets
    from timm.data.readers.reader_hfds import ReaderHfds

    facts = [(str(file), *FileState.of(file.stat())) for file in files]
    room = Path(tempfile.gettempdir(), f"vitscale-{os.getuid()}", hashlib.sha256(repr(facts).encode()).hexdigest()[:16])
    # Only a local folder is read without asking the network. Links in one of ours also serve single files and odd names.
    for number, (file, part) in enumerate(zip(files, parts, strict=True)):
        link = room / "files" / part / f"{number:05d}.parquet"
        link.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with suppress(FileExistsError):
            link.symlink_to(file)
    datasets.disable_progress_bars()
    stored = {str(name): part for name, part in datasets.load_dataset(str(room / "files"), cache_dir=str(room)).items()}
    features = next(iter(stored.values())).features
    image_key = next((name for name, feature in features.items() if _holds_images(feature)), None)
    label_key = next((name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)), None)
    label_key = label_key or next((name for name in ("label", "labels", "target", "class", "cls") if name in features), None)
    if image_key is None or label_key is None:
        missing = "image" if image_key is None else "label"
        raise ValueError(f"no column holds {missing}s; there are {', '.join(features)}")
    readers = {
        PARTS[name]: ReaderHfds(str(room / "files"), root=str(room), split=name, input_key=image_key, target_key=label_key)
        for name in sorted(stored, key=lambda name: ("train", "val", "test").index(PARTS[name]))
    }
    labels = [label for reader in readers.values() for label in reader.dataset.select_columns(label_key)[:][label_key]]
    return readers, tuple(getattr(features[label_key], "names", ())), labels


def _holds_images(feature: Any) -> bool:
    """Whether a column of a Hugging Face data set holds images, marked as such or as encoded bytes."""
    import datasets

    if isinstance(feature, datasets.Image):
        return True
    return "bytes" in feature if isinstance(feature, dict) else getattr(feature, "dtype", "") in ("binary", "large_binary")
