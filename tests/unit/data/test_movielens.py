"""MovieLens-100K out of a file of either form, small enough to be written here."""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest

from shoal.data import movielens
from shoal.data.movielens import GENRES, MOVIELENS
from shoal.data.store import ArraySpec
from shoal.errors import DataError

RATINGS = ["2\t1\t3\t20", "1\t2\t5\t10", "1\t1\t4\t20"]


def official(path: Path) -> None:
    flags = ["|".join("1" if genre in own else "0" for genre in GENRES) for own in (("War",), ("Drama", "Sci-Fi"))]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ml-100k/u.data", "\n".join(RATINGS))
        archive.writestr("ml-100k/u.user", "1|24|M|writer|85711\n2|53|F|other|94043")
        archive.writestr("ml-100k/u.item", "\n".join(f"{k}|A film|01-Jan-1995||http://x|{f}" for k, f in enumerate(flags, 1)))


def wheel(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        inside = "recbole/dataset_example/ml-100k/ml-100k"
        archive.writestr(f"{inside}.inter", "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + "\n".join(RATINGS))
        archive.writestr(f"{inside}.user", "h\n1\t24\tM\twriter\t85711\n2\t53\tF\tother\t94043")
        archive.writestr(f"{inside}.item", "h\n1\tA film\t1995\tWar\n2\tA film\t1995\tDrama Sci-Fi")


def spec() -> movielens.MovieLensSpec:
    films = np.zeros((2, 19), np.uint8)
    films[0, 17] = films[1, 8] = films[1, 15] = 1
    arrays = {
        "ratings": np.array([[1, 2, 5, 10], [1, 1, 4, 20], [2, 1, 3, 20]], "<i8"),
        "people": np.array([[24, 0, 20], [53, 1, 13]], "<i8"),
        "films": films,
    }
    specs = {
        name: ArraySpec(shape=a.shape, dtype=a.dtype.str, sha256=hashlib.sha256(a.tobytes()).hexdigest())
        for name, a in arrays.items()
    }
    return dataclasses.replace(MOVIELENS, arrays=specs)


@pytest.mark.parametrize(("make", "name"), [(official, "ml-100k.zip"), (wheel, "recbole-1.2.1-py3-none-any.whl")])
def test_both_archives_give_the_same_arrays(make: object, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    monkeypatch.setenv("SHOAL_OFFLINE", "1")
    make(tmp_path / name)  # type: ignore[operator]
    data = movielens.load(spec=spec())
    assert data.ratings[:, 3].tolist() == [10, 20, 20] and data.people[1].tolist() == [53, 1, 13]


def test_what_is_not_there_is_said_with_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    monkeypatch.setenv("SHOAL_OFFLINE", "1")
    with pytest.raises(DataError, match="pip download --no-deps recbole==1.2.1"):
        movielens.load()
    (tmp_path / "ml-100k.zip").write_text("no archive")
    with pytest.raises(DataError, match=r"ml-100k.zip cannot be read as MovieLens-100K"):
        movielens.load()
