"""A bundle: a finished model on disk. ``train`` and ``compress`` write it, ``serve`` reads it.

``weights.safetensors``, ``bundle.json`` (how to build it, what goes in and out), beside them a copy of the source file where
the model came from one, and ``program.pt2`` where torch could export it. Nothing in it is pickled.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal import tensorfile
from shoal.errors import TargetError
from shoal.job import Job

if TYPE_CHECKING:
    import torch
    from torch import nn

WEIGHTS, DESCRIPTION, PROGRAM = "weights.safetensors", "bundle.json", "program.pt2"
CHECKPOINT = "state.safetensors"


def write(
    directory: Path, state: Mapping[str, torch.Tensor], description: Mapping[str, Any], source: Path | None = None
) -> None:
    """Write a bundle; ``description`` holds what bundle.json says, beside what is added here (source, versions)."""
    directory.mkdir(parents=True, exist_ok=True)
    tensorfile.write(directory / WEIGHTS, state)
    describe(directory, description, source)


def describe(directory: Path, description: Mapping[str, Any], source: Path | None = None) -> None:
    """Write bundle.json, and the copy of the source file, without any weights: all that ``load_with`` needs of a bundle."""
    import torch

    described = dict(description)
    if source is not None:
        copied = directory / source.name
        shutil.copyfile(source, copied)
        described["source"] = {"file": source.name, "sha256": hashlib.sha256(copied.read_bytes()).hexdigest()}
    described["versions"] = {"torch": torch.__version__, "python": sys.version.split()[0], "shoal": shoal_version()}
    # In one move: a service that follows a run may look at any time.
    scratch = directory / f".{DESCRIPTION}.tmp"
    scratch.write_text(json.dumps(described, indent=1) + "\n")
    scratch.replace(directory / DESCRIPTION)


def read_description(directory: Path) -> dict[str, Any]:
    """What bundle.json says; TargetError where the directory is no bundle."""
    try:
        found: dict[str, Any] = json.loads((directory / DESCRIPTION).read_text())
    except (OSError, ValueError):
        raise TargetError(
            f"{directory} is not a bundle; give a directory with a {DESCRIPTION}, or a run's model/."
        ) from None
    return found


def read_weights(directory: Path) -> dict[str, torch.Tensor]:
    """The state_dict that a bundle holds."""
    from safetensors.torch import load_file

    try:
        return dict(load_file(directory / WEIGHTS))
    except FileNotFoundError:
        raise TargetError(f"{directory} has no {WEIGHTS}; give a bundle, or a run's model/.") from None


def read_checkpoint(directory: Path) -> dict[str, torch.Tensor]:
    """The weights and buffers in a run's checkpoint, under the model's own names; of the names of tied tensors only one."""
    from safetensors import safe_open

    found: dict[str, torch.Tensor] = {}
    try:
        with safe_open(directory / CHECKPOINT, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                kind, _, name = key.partition("/")
                if kind in ("weights", "buffers"):
                    found[name] = file.get_tensor(key)
    except (OSError, ValueError):
        raise TargetError(f"{directory} is not a checkpoint, or no longer there.") from None
    found.update(_rows(directory))
    return found


def _rows(directory: Path) -> dict[str, torch.Tensor]:
    """The tables in a checkpoint as a state_dict has them: ``keys``, ascending, and ``rows``."""
    import torch
    from safetensors import safe_open

    parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for path in sorted(directory.glob("rows-*.safetensors")):
        with safe_open(path, "pt") as file:
            meta = file.metadata()
            rows = file.get_tensor("values")[:, : int(meta["width"])]
            parts.setdefault(meta["prefix"], []).append((file.get_tensor("keys"), rows))
    found = {}
    for prefix, pieces in parts.items():
        keys = torch.cat([k for k, _ in pieces])
        order = keys.argsort()
        found[prefix + "keys"] = keys[order]
        found[prefix + "rows"] = torch.cat([r for _, r in pieces])[order]
    return found


def build(path: Path) -> nn.Module:
    """Return the model of a bundle as its code makes it. TargetError where that cannot be found."""
    model = _built(path, read_description(path))
    if model is None:
        raise TargetError(f"The code of the model in {path} cannot be found; make the module that defines it importable.")
    return model


def load_with(path: Path, checkpoint: Path) -> nn.Module:
    """Return the model of a bundle with the weights of a checkpoint of the same model, in evaluation mode.

    TargetError where they do not fit.
    """
    import torch

    model = build(path)
    state = read_checkpoint(checkpoint)
    own = model.state_dict(keep_vars=True)
    known = {id(own[name]) for name in state if name in own}
    lost = [name for name, tensor in own.items() if name not in state and id(tensor) not in known]
    strange = [name for name in state if name not in own and name not in dict(model.named_buffers())]
    # Of rows by key there are as many as there are.
    grows = {name for name in own if name.endswith(("keys", "rows")) and not isinstance(own[name], torch.nn.Parameter)}
    wrong = lost or strange or [
        name for name, t in state.items() if name in own and t.shape != own[name].shape and name not in grows
    ]
    if wrong:
        raise TargetError(f"The checkpoint {checkpoint} is of another model than {path}: {wrong[0]} does not fit.")
    model.load_state_dict({name: tensor for name, tensor in state.items() if name in own}, strict=False)
    return model.eval()


def load(path: str | Path) -> nn.Module:
    """Return the module in a bundle (or in a run directory's ``model/``), in evaluation mode.

    The model is built by its own code where that can be found and loaded with the weights; else the exported program is
    used. TargetError where neither works.
    """
    directory = Path(path)
    if not (directory / DESCRIPTION).exists() and (directory / "model" / DESCRIPTION).exists():
        directory = directory / "model"
    description = read_description(directory)
    model = _built(directory, description)
    if model is not None:
        model.load_state_dict(read_weights(directory))
        return model.eval()
    if (directory / PROGRAM).exists():
        import torch

        return torch.export.load(directory / PROGRAM).module()
    raise TargetError(
        f"The code of the model in {directory} cannot be found and there is no {PROGRAM}; "
        "make the module that defines it importable, or load the weights into a model of your own."
    )


def resolve(directory: Path, description: Mapping[str, Any]) -> Any:
    """Import what a bundle's ``factory`` names (a Job, a model, or a function that makes one), or None."""
    factory = description.get("factory")
    if not factory:
        return None
    place, _, name = factory.partition(":")
    try:
        source = description.get("source")
        found: Any = _from_source(directory, source) if source else importlib.import_module(place)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, OSError):
        return None
    return found


def load_job(directory: Path) -> Job | None:
    """The job that a bundle was trained from, where its factory is a job and can be imported."""
    found = resolve(directory, read_description(directory))
    if found is not None and not isinstance(found, (Job, type)) and callable(found):
        found = found()
    return found if isinstance(found, Job) else None


def _built(directory: Path, description: Mapping[str, Any]) -> nn.Module | None:
    """Build the model by the bundle's factory, or return None where its code cannot be found."""
    import torch

    found = resolve(directory, description)
    torch.manual_seed(0)
    # At the most a function that makes a job, the job, its function that makes the model, the model.
    for _ in range(4):
        if found is None or isinstance(found, torch.nn.Module):
            return found
        found = found.model if isinstance(found, Job) else found()
    return None


def _from_source(directory: Path, source: Mapping[str, str]) -> Any:
    """Import the copied source file, if it is still the one that was copied."""
    path = directory / source["file"]
    if hashlib.sha256(path.read_bytes()).hexdigest() != source["sha256"]:
        raise TargetError(f"{path} was changed after the bundle was written; put the original back.")
    spec = importlib.util.spec_from_file_location(f"shoal_bundle_{source['sha256'][:12]}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shoal_version() -> str:
    """The version of the shoal that runs, installed or not."""
    from shoal import __version__

    return __version__
