"""Hugging Face folders as they are: ``config.json`` and safetensors, with the pooling that sentence-transformers writes beside.

Nothing is fetched, no code from a folder is run, and weights are read from safetensors only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.errors import RequestError, TargetError

if TYPE_CHECKING:
    import torch
    from torch import nn

TOKENIZER = "tokenizer.json"
_USUAL_LONGEST = 512
_POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
_NORMALIZE = "Normalize"


def is_folder(path: Path) -> bool:
    """Whether a directory holds a Hugging Face model."""
    return (path / "config.json").is_file() and any(path.glob("model*.safetensors"))


def describe(path: Path) -> dict[str, Any]:
    """What bundle.json would say of it. TargetError for a kind of model that cannot be served."""
    config = _read(path / "config.json")
    architecture = next(iter(config.get("architectures") or ["a model"]))
    if not config.get("vocab_size"):
        raise TargetError(f"{path} holds {architecture}; shoal serves encoders of text from such folders so far.")
    if "CausalLM" in architecture or "ConditionalGeneration" in architecture or "LMHead" in architecture:
        raise TargetError(f"{path} holds {architecture}; shoal serves encoders and classifiers so far, not what writes text.")
    longest = _longest(path, config)
    pad = int(config.get("pad_token_id") or 0)
    inputs = [
        {"name": "input_ids", "dtype": "INT64", "shape": [-1, -1], "longest": longest, "padding": pad},
        {"name": "attention_mask", "dtype": "INT64", "shape": [-1, -1], "longest": longest, "padding": 0, "absent": 1},
    ]
    described: dict[str, Any] = {"name": path.resolve().name, "inputs": inputs, "mask": "attention_mask", "labels": None}
    width = config.get("hidden_size") or config.get("dim") or config.get("d_model")
    if architecture.endswith("ForSequenceClassification"):
        labels = config.get("id2label") or {}
        described["labels"] = [labels[key] for key in sorted(labels, key=int)] or None
        described["outputs"] = [{"name": "logits", "dtype": "FP32", "shape": [-1, len(labels) or 2]}]
    elif _pooling(path) is not None:
        described["outputs"] = [{"name": "embedding", "dtype": "FP32", "shape": [-1, width]}]
    else:
        described["outputs"] = [
            {"name": "last_hidden_state", "dtype": "FP32", "shape": [-1, -1, width], "longest": longest}
        ]
    if (path / TOKENIZER).is_file():
        described["tokenizer"] = str(path / TOKENIZER)
    return described


def load(path: Path) -> nn.Module:
    """The model, ready to answer: called with ``input_ids`` and ``attention_mask``, gives what ``describe`` says."""
    try:
        import transformers
    except ImportError:
        raise RequestError('Hugging Face models need transformers; install it with "pip install shoal[text]".') from None
    import torch

    pooling = _pooling(path)
    config = _read(path / "config.json")
    classifies = next(iter(config.get("architectures") or [""])).endswith("ForSequenceClassification")
    kind = transformers.AutoModelForSequenceClassification if classifies else transformers.AutoModel
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = kind.from_pretrained(
        path, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
    )
    return _wrapped(model.eval(), "logits" if classifies else "last_hidden_state", pooling)


def _wrapped(model: nn.Module, output: str, pooling: tuple[str, bool] | None) -> nn.Module:
    from torch import nn

    class Encoder(nn.Module):
        """A Hugging Face model that gives one tensor, pooled as its folder says."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = getattr(self.model(input_ids=input_ids, attention_mask=attention_mask), output)
            return found if pooling is None or output == "logits" else _pool(found, attention_mask, *pooling)

    return Encoder()


def _pool(hidden: torch.Tensor, mask: torch.Tensor, how: str, normalize: bool) -> torch.Tensor:
    """Rows of ``[rows, length, width]`` as one vector each: the mean over what the mask leaves, or the first place."""
    import torch

    if how == "cls":
        pooled = hidden[:, 0]
    else:
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
    return torch.nn.functional.normalize(pooled, dim=1) if normalize else pooled


def _pooling(path: Path) -> tuple[str, bool] | None:
    """(how, whether to normalize) from sentence-transformers' own files; None where the folder has none."""
    if not (path / "modules.json").is_file():
        return None
    modules = json.loads((path / "modules.json").read_text())
    kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
    if not set(kinds) <= {"Transformer", "Pooling", _NORMALIZE} or "Pooling" not in kinds:
        raise TargetError(f"{path} is made of {', '.join(kinds)}; shoal serves Transformer, Pooling and Normalize.")
    settings = _read(path / modules[kinds.index("Pooling")]["path"] / "config.json")
    chosen = [key for key, value in settings.items() if key.startswith("pooling_mode") and value is True]
    if len(chosen) != 1 or chosen[0] not in _POOLINGS:
        raise TargetError(f"{path} pools by {', '.join(chosen) or 'nothing'}; shoal knows the mean and the first token.")
    return _POOLINGS[chosen[0]], _NORMALIZE in kinds


def _longest(path: Path, config: Mapping[str, Any]) -> int:
    found = [int(config.get("max_position_embeddings") or _USUAL_LONGEST)]
    if config.get("model_type") in ("roberta", "xlm-roberta", "camembert"):
        # Their positions begin behind the padding's.
        found[0] -= 1 + int(config.get("pad_token_id") or 1)
    if (path / "sentence_bert_config.json").is_file():
        found.append(int(_read(path / "sentence_bert_config.json").get("max_seq_length") or found[0]))
    return min(found)


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        raise TargetError(f"{path} cannot be read as JSON; fetch the model again.") from None
    return found
