"""The array store: whole or not there, checked, built once, safe against kills and damage."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.data.store import ArraySpec, ArrayStore, Origin
from shoal.errors import DataError

ROOT = Path(__file__).resolve().parents[3]
VALUES = np.arange(1000, dtype="<i8")
SPECS = {
    "a": ArraySpec(shape=(1000,), dtype="<i8", sha256=hashlib.sha256(VALUES.tobytes()).hexdigest()),
    "b": ArraySpec(shape=(10, 2), dtype="|u1", sha256=hashlib.sha256(bytes(20)).hexdigest()),
}


def quiet(_: str) -> None:
    pass


def origin(label: str = "good", wrong: bool = False, error: Exception | None = None) -> tuple[Origin, list[Path]]:
    calls: list[Path] = []

    def fill(scratch: Path, arrays: Any, say: Any) -> None:
        calls.append(scratch)
        (scratch / "download").write_bytes(b"x")
        arrays["a"][:] = VALUES + wrong
        if error is not None:
            raise error

    return Origin(label, fill), calls


@pytest.fixture
def store(tmp_path: Path) -> ArrayStore:
    return ArrayStore(tmp_path / "cache", "numbers", SPECS)


def test_built_once_then_opened(store: ArrayStore) -> None:
    assert store.open() is None
    good, calls = origin()
    arrays = store.build([good], quiet)
    assert np.array_equal(arrays["a"], VALUES) and isinstance(arrays["a"], np.memmap)
    assert not arrays["a"].flags.writeable
    store.build([good], quiet)
    assert len(calls) == 1 and store.open() is not None and store.open(check=True) is not None
    assert sorted(path.name for path in store.path.parent.iterdir()) == ["numbers", "numbers.lock"]
    assert sorted(path.name for path in store.path.iterdir()) == ["a.npy", "b.npy", "stamp.json"]


def test_the_next_origin_follows_a_failing_or_lying_one(store: ArrayStore) -> None:
    said: list[str] = []
    failing, _ = origin("first", error=DataError("no connection"))
    lying, _ = origin("second", wrong=True)
    good, calls = origin()
    store.build([failing, lying, good], said.append)
    assert said == ["first: no connection", "second: its a are not the published ones (SHA-256 differs)"]
    assert len(calls) == 1
    other = ArrayStore(store.path.parent, "other", SPECS)
    with pytest.raises(DataError, match="first: no connection; second: its a are not"):
        other.build([failing, lying], quiet)
    assert not any("other-" in path.name for path in store.path.parent.iterdir()) and other.open() is None


def flip(path: Path) -> None:
    """Change one byte, and the time as a writer would."""
    contents = bytearray(path.read_bytes())
    contents[-1] ^= 1
    path.write_bytes(contents)
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "replace"])
def test_damage_is_noticed_and_repaired(store: ArrayStore, name: str, damage: str) -> None:
    good, calls = origin()
    old = store.build([good], quiet)
    file = store.path / f"{name}.npy"
    if damage == "flip":
        flip(file)
    elif damage == "truncate":
        # A new file, as a disk that was full leaves it: shortening a mapped one would end this process by SIGBUS.
        contents = file.read_bytes()
        file.unlink()
        file.write_bytes(contents[:-5])
    elif damage == "remove":
        file.unlink()
    else:
        file.unlink()
        np.save(file, np.zeros(3))
    assert store.open() is None
    arrays = store.build([good], quiet)
    assert len(calls) == 2 and np.array_equal(arrays["a"], VALUES) and store.open() is not None
    assert old["a"][1] == 1  # whoever had the old set mapped still reads it


def test_a_change_that_the_stamp_cannot_see_is_found_by_a_check(store: ArrayStore) -> None:
    good, _ = origin()
    store.build([good], quiet)
    file = store.path / "b.npy"
    status = file.stat()
    flip(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert store.open() is not None and store.open(check=True) is None


@pytest.mark.parametrize("stamp", [None, "", "[]", "{}"])
def test_a_lost_or_damaged_stamp_costs_one_check_only(store: ArrayStore, stamp: str | None) -> None:
    good, _ = origin()
    store.build([good], quiet)
    file = store.path / "stamp.json"
    contents = file.read_text()
    file.unlink()
    if stamp is not None:
        file.write_text(stamp)
    assert store.open() is not None and file.read_text() == contents


def test_leftovers_of_a_killed_build_are_removed(store: ArrayStore) -> None:
    leftover = store.path.parent / ".numbers-abc"
    leftover.mkdir(parents=True)
    (leftover / "half.npy").write_bytes(b"x")
    good, _ = origin()
    store.build([good], quiet)
    assert not leftover.exists()


def test_an_interrupted_build_leaves_nothing(store: ArrayStore) -> None:
    interrupted, _ = origin(error=KeyboardInterrupt())  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        store.build([interrupted], quiet)
    assert [path.name for path in store.path.parent.iterdir()] == ["numbers.lock"]


def test_waiting_for_another_process_has_an_end(tmp_path: Path) -> None:
    store = ArrayStore(tmp_path, "numbers", SPECS, wait_s=0.0)
    said: list[str] = []
    good, calls = origin()
    with (tmp_path / "numbers.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="Another process has been preparing"):
            store.build([good], said.append)
    assert calls == []
    store.build([good], said.append)
    assert len(calls) == 1


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    good, _ = origin()
    with pytest.raises(DataError, match="cannot be written"):
        ArrayStore(tmp_path / "file" / "cache", "numbers", SPECS).build([good], quiet)


BUILDER = """
import hashlib, sys, time
from pathlib import Path
import numpy as np
from shoal.data.store import ArraySpec, ArrayStore, Origin
values = np.arange(1000, dtype="<i8")
spec = ArraySpec(shape=(1000,), dtype="<i8", sha256=hashlib.sha256(values.tobytes()).hexdigest())
root = Path(sys.argv[1])
def fill(scratch, arrays, say):
    with (root / "calls").open("a") as file:
        file.write("x")
    time.sleep(0.3)  # long enough for the others to arrive while it is being built
    arrays["a"][:] = values
print(int(ArrayStore(root, "numbers", {"a": spec}).build([Origin("slow", fill)], lambda text: None)["a"].sum()))
"""


def test_several_processes_build_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BUILDER, str(tmp_path)]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [process.communicate(timeout=200)[0].strip() for process in processes]
    assert answers == [str(VALUES.sum())] * 3
    assert (tmp_path / "calls").read_text() == "x"
