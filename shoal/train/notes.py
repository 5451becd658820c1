"""What a checkpoint holds beside tensors, to bytes and back: numbers, strings, lists, dictionaries, NumPy's values, tensors.

Reading a checkpoint runs none of its code (``torch.load(weights_only=True)``), so that a run directory from somebody else does
no harm. What could therefore not be read again is refused when it is written.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoal.errors import JobError, RequestError


def to_bytes(notes: Any) -> memoryview:
    """The notes as bytes; JobError where something in them could not be read again."""
    data = io.BytesIO()
    try:
        torch.save(notes, data)
        data.seek(0)
        _load(data)
    except (pickle.PickleError, AttributeError, TypeError) as error:
        data.seek(0)
        raise JobError(
            f"The scheduler, the optimizer or a metric keeps {_culprit(data, error)}, which a checkpoint cannot hold; "
            "let it keep numbers, strings, lists, dictionaries, arrays and tensors."
        ) from None
    return data.getbuffer()


def read(path: Path) -> Any:
    """What ``to_bytes`` made of it, from a file; RequestError where that is not what it holds."""
    try:
        with open(path, "rb") as file:
            return _load(file)
    except (pickle.PickleError, RuntimeError, EOFError) as error:
        raise RequestError(f"{path} cannot be read ({str(error).splitlines()[0]}); begin another run.") from None


def from_bytes(data: bytes | memoryview) -> Any:
    """What ``to_bytes`` made of it; RequestError where that is not what it holds."""
    try:
        return _load(io.BytesIO(data))
    except (pickle.PickleError, RuntimeError, EOFError) as error:
        raise RequestError(f"Notes cannot be read ({str(error).splitlines()[0]}).") from None


def _load(file: Any) -> Any:
    with torch.serialization.safe_globals(_numpy()):
        return torch.load(file, weights_only=True)


def _numpy() -> list[Any]:
    """What NumPy's numbers and arrays are made of, by the names of its first and of its second version."""
    scalar: Any = np.float64(0).__reduce__()[0]
    array: Any = np.zeros(1).__reduce__()[0]
    cores = ("core", "_core")
    made = [(part, f"numpy.{core}.multiarray.{part.__name__}") for part in (scalar, array) for core in cores]
    kinds = {type(np.dtype(code)) for code in "?bhilqBHILQefdgFDGSU"}
    return [*made, *kinds, np.dtype, np.ndarray]


def _culprit(data: io.BytesIO, error: Exception) -> str:
    try:
        with torch.serialization.safe_globals(_numpy()):
            found = torch.serialization.get_unsafe_globals_in_checkpoint(data)
    except (RuntimeError, pickle.PickleError, EOFError):
        found = []
    return f"a {found[0]}" if found else f"something that cannot be pickled ({str(error).splitlines()[0]})"
