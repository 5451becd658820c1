"""What a service is asked to serve, and what that says of itself. No torch here: the supervisor of a service does without it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal import bundle
from shoal.errors import TargetError
from shoal.serve import hugging_face
from shoal.serve.signature import ModelSignature
from shoal.serve.tolerance import Tolerance


@dataclass(frozen=True)
class ModelSource:
    """What the template loads: a bundle's directory, the name to serve it under (None: the job's), the version to call it.

    ``checkpoint``: a checkpoint of the same model, whose weights are taken instead of the bundle's. ``tolerance``: how far
    answers may be off; None for what the bundle says. ``live``: the directory of a run whose updates the weights follow.
    """

    path: Path
    name: str | None = None
    version: str = "1"
    checkpoint: Path | None = None
    tolerance: Tolerance | None = None
    live: Path | None = None


def describe(path: Path) -> dict[str, Any]:
    """What a bundle, or a Hugging Face folder, says of itself. TargetError where it is neither."""
    return hugging_face.describe(path) if hugging_face.is_folder(path) else bundle.read_description(path)


def can_be_served(signature: ModelSignature) -> None:
    """TargetError where a model's rows do not fit into slots."""
    if not signature.inputs or not signature.outputs:
        raise TargetError(
            f"The bundle {signature.name} does not say what goes in and comes out; train it again to serve it."
        )
    for tensor in (*signature.inputs, *signature.outputs):
        if tensor.row_bytes is None or tensor.shape[0] != -1:
            raise TargetError(
                f"{tensor.name} of {signature.name} has the shape {list(tensor.shape)}; shoal serves tensors whose first dim is "
                'the batch, and whose second may be free where "longest" says how long it may be.'
            )
