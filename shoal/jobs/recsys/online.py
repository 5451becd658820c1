"""Learning from a stream in the order of time: predict, then learn, as a recommender in production does (progressive validation).

``python -m shoal.jobs.recsys.online [movielens|clicks]`` trains DeepFM once through the first four fifths of a stream, then goes
through the rest twice: with a copy that stays as it was at the split, and with one that, after it has predicted a batch, learns
from it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from shoal import ps
from shoal.jobs.recsys import criteo, movielens_keys
from shoal.jobs.recsys.deepfm import DeepFM

STREAMS = {
    "movielens": "MovieLens-100K, 100,000 ratings",
    "clicks": "generated clicks in Criteo's format, 200,000 rows whose effects turn once",
}
BATCH, SPLIT = 100, 0.8
_CLICKS = 200_000

Batch = tuple[tuple[torch.Tensor, ...], torch.Tensor]


def batches(stream: str, seed: int, quick: bool = False) -> list[Batch]:
    """(what the model is called with, target) of a stream, in the order of time."""
    if stream == "movielens":
        keys, liked = movielens_keys.rows()
        count = 20_000 if quick else len(keys)
        return [((k,), t) for k, t in zip(keys[:count].split(BATCH), liked[:count].split(BATCH), strict=True)]
    count = 20_000 if quick else _CLICKS
    made = criteo.generate(count, seed, drift=1e6 / count)
    columns = (torch.from_numpy(a).split(BATCH) for a in (made.keys, made.numbers, made.clicked))
    return [((k, n), t) for k, n, t in zip(*columns, strict=True)]


def progressive(stream: str, seed: int = 0, quick: bool = False) -> dict[str, float]:
    """AUC and log-loss over the last fifth, ``online_…`` and ``frozen_…``; ``stream``: one of ``STREAMS``."""
    given = batches(stream, seed, quick)
    torch.manual_seed(seed)
    model = DeepFM() if stream == "movielens" else DeepFM(single=criteo.CATEGORICAL - 1, numeric=criteo.NUMERIC)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    split = int(SPLIT * len(given))
    for _ in _learn(model, optimizer, given[:split]):
        pass
    frozen = copy.deepcopy(model).eval()
    with torch.no_grad():
        stale = [frozen(*inputs) for inputs, _ in given[split:]]
    fresh = list(_learn(model, optimizer, given[split:]))
    target = torch.cat([t for _, t in given[split:]])
    return {**_measures("online", torch.cat(fresh), target), **_measures("frozen", torch.cat(stale), target)}


def _learn(model: nn.Module, optimizer: torch.optim.Optimizer, given: list[Batch]) -> Iterator[torch.Tensor]:
    """Learn batch after batch; gives what was predicted of each before that."""
    for inputs, target in given:
        optimizer.zero_grad()
        logits = model(*inputs)
        F.binary_cross_entropy_with_logits(logits, target).backward()
        optimizer.step()
        ps.step(model)
        yield logits.detach()


def _measures(name: str, logits: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    from torchmetrics.functional.classification import binary_auroc

    return {
        f"{name}_auc": float(binary_auroc(logits.sigmoid(), target.int())),
        f"{name}_log_loss": float(F.binary_cross_entropy_with_logits(logits, target)),
    }


def main() -> int:
    for stream in sys.argv[1:] or list(STREAMS):
        found = progressive(stream)
        print(STREAMS[stream])
        for name in ("online", "frozen"):
            print(f"  {name:7} AUC {found[f'{name}_auc']:.4f}  log-loss {found[f'{name}_log_loss']:.4f}")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
