"""What the identity of a data set costs: 50,000 image files in folders, beside the two limits, reading them and asking for their state.

    python tests/benchmarks/bench_data.py [--archive cifar10-train.tar]

The archive is unpacked into a temporary folder; without one the files are noise of the size of CIFAR-10's JPEGs. Seconds are of
processor time: the files are in the page cache, so what is counted is the work, and not the disk.
"""

from __future__ import annotations

import argparse
import os
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from machine import machine

from workers.data import fingerprint
from workers.file_hashes import SETTLED_S
from workers.sources import EXTENSIONS, list_images, parse_source

NUM_FILES = 50_000
FILE_SIZE = 950
RUNS = 5


def write_noise(root: Path) -> None:
    for number in range(NUM_FILES):
        file = root / str(number % 10) / f"{number}.jpg"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(os.urandom(FILE_SIZE))


def read_all(files: list[Path]) -> None:
    for file in files:
        with open(file, "rb", buffering=0) as opened:
            opened.read()


def seconds(work: Callable[[], object]) -> float:
    # A new process has listed nothing yet.
    list_images.cache_clear()
    begun = time.process_time()
    work()
    return time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=Path, help="a tar of images in class folders")
    args = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        root, caches = Path(folder, "images"), Path(folder, "caches")
        root.mkdir()
        if args.archive:
            with tarfile.open(args.archive) as archive:
                archive.extractall(root, filter="data")
        else:
            write_noise(root)
        source = f"folder:{root}"
        files = [file for file in root.rglob("*") if file.suffix in EXTENSIONS]
        # What was written last counts as still changing.
        time.sleep(SETTLED_S)
        print(f"{len(files):,} files, {sum(file.stat().st_size for file in files) / 1e6:.0f} MB; processor seconds, best of {RUNS} runs")
        rows: dict[str, Callable[[int], object]] = {
            "every file opened and read": lambda run: read_all(files),
            "every file's state": lambda run: [os.stat(file) for file in files],
            "fingerprint, nothing known": lambda run: fingerprint(source, cache=caches / str(run)),
            "fingerprint, hashes from the cache": lambda run: fingerprint(source, cache=caches / "0"),
            "check that loaded images are still those": lambda run: parse_source(source).stamp,
        }
        for name, work in rows.items():
            print(f"{name:42} {min(seconds(lambda work=work, run=run: work(run)) for run in range(RUNS)):6.2f}")


if __name__ == "__main__":
    main()
