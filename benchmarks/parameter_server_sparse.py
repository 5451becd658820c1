"""Rows by key: lookups with updates a second, step time as tables grow, AUC beside plain PyTorch, and learning from the stream.

Parts: ``rows`` (b of the parameter server's figures: two workers on one table, against Ray actors, TensorFlow's
ParameterServerStrategy, and torch.nn.Embedding(sparse=True) with Adagrad in one process), ``growth`` (d: 10^5 to 10^8 rows,
the largest beyond the memory limit), ``auc`` (MovieLens-100K) and ``online`` (predict, then learn, against a model that stays
as it was).
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common  # noqa: E402
from benchmarks.common import Bar, Group, Peer  # noqa: E402
from benchmarks.venvs import peer_python  # noqa: E402

PEERS = Path(__file__).resolve().parent / "peers"
PARTS = ("rows", "growth", "auc", "online")
PLANS = ("dp=2", "ps=1,workers=2,sync", "ps=1,workers=2,staleness=2", "ps=1,workers=2,async")
SIZES = (10**5, 10**6, 10**7, 10**8)
SHOAL, TORCH, RAY, TENSORFLOW = "shoal, 2 workers", "torch sparse, 1 process", "Ray actors, 2 workers", "TensorFlow PS, 2 workers"
_LIMIT_S = 3600.0


def rows(options: argparse.Namespace) -> tuple[list[Group], list[Bar]]:
    """Lookups with updates a second that each worker makes."""
    script = str(PEERS / "rows.py")
    seconds = ["--seconds", "2" if options.quick else "8"]
    peers = [
        Peer(name=SHOAL, measure=[sys.executable, script, "shoal", *seconds]),
        Peer(name=TORCH, measure=[sys.executable, script, "torch", *seconds]),
    ]
    for name, kind, venv in ((RAY, "ray", "serving"), (TENSORFLOW, "tensorflow", "tensorflow")):
        if venv in options.without:
            continue
        try:
            peers.append(Peer(name=name, measure=[str(peer_python(venv)), script, kind, *seconds]))
        except RuntimeError as error:
            print(error, file=sys.stderr)
    found = common.alternate(peers, options.repeats, "lookups_per_s")
    group = Group(title="lookups with updates", results=found, references=[TORCH, RAY, TENSORFLOW], unit="lookups/s a worker",
                  note="64-wide, 10^6 rows, Zipf 1.2, batches of 4,096 × 26, Adagrad, admission after 2")  # fmt: skip
    ours = found[SHOAL].median
    bars = []
    for name, limit in ((TORCH, 0.8), (RAY, 1.5), (TENSORFLOW, 1.5)):
        theirs = found[name].median if name in found else None
        value = ours / theirs if ours and theirs else None
        bars.append(Bar(claim=f"each of 2 workers, × {name}", value=value, limit=limit, unit="×", at_least=True))
    return [group], bars


def growth(options: argparse.Namespace) -> tuple[list[Group], list[Bar]]:
    """Seconds of a step by the size of the table."""
    sizes = [size for size in SIZES if size <= options.most_rows]
    script = str(PEERS / "rows_growth.py")
    more = ["--memory-gb", str(options.memory_gb), *(["--directory", options.directory] if options.directory else [])]
    peers = [Peer(name=f"{s:,} rows", measure=[sys.executable, script, str(s), *more], limit_s=_LIMIT_S) for s in sizes]
    found = common.alternate(peers[:-1], 1 if options.quick else options.repeats, "best_s")
    # The largest takes minutes to fill.
    found |= common.alternate(peers[-1:], 1, "best_s")
    group = Group(title="step time", results=found, references=[peers[0].name], less_is_better=True, unit="s",
                  note=f"16-wide, row-wise Adagrad, 50,000 popular rows, memory limit {options.memory_gb:g} GB")  # fmt: skip
    bars = []
    first = found[peers[0].name].median
    for peer in peers[1:]:
        own = found[peer.name].median
        value = own / first if own and first else None
        bars.append(Bar(claim=f"{peer.name}, × {peers[0].name}", value=value, limit=1.5, unit="×"))
    return [group], bars


def auc(options: argparse.Namespace) -> tuple[list[Group], list[Bar]]:
    """AUC on the later fifth of MovieLens-100K, by seed; the plain process has torch.nn.Embedding and torch.optim.Adagrad."""
    name, plain = "deepfm", "plain PyTorch, 1 process"
    ways = {plain: lambda seed: _plain_auc(name, seed)}
    ways |= {plan: functools.partial(_run_auc, name, plan) for plan in options.plans}
    found = {way: common.Result(way) for way in ways}
    for seed in range(options.repeats):
        for way, measure in ways.items():
            found[way].values.append(measure(seed)["auc"])
    bars = []
    for plan in options.plans:
        own, theirs = found[plan].median, found[plain].median
        value = own - theirs if own and theirs else None
        # A thousandth is what rounding, or the order in which pushes come, makes of it.
        bars.append(Bar(claim=f"{name}, {plan}: AUC above plain PyTorch's", value=value, limit=-0.001, at_least=True))
    return [Group(title=f"{name} on MovieLens-100K", results=found, references=[plain], unit="AUC")], bars


def _run_auc(name: str, plan: str, seed: int) -> Mapping[str, Any]:
    import shoal
    from shoal.jobs.registry import find

    with tempfile.TemporaryDirectory(prefix="shoal-benchmark-") as folder:
        run = shoal.train(find(name).job.replace(seed=seed), plan=plan, run_dir=Path(folder) / "run")
        return {"auc": run.history[-1]["eval_auc"], "log_loss": run.history[-1]["eval_loss"]}


def _plain_auc(name: str, seed: int) -> Mapping[str, Any]:
    """The same model with tables by position, the same first weights and order, in a loop as anybody would write it."""
    import torch
    from torch import nn
    from torch.nn import functional as F
    from torchmetrics.functional.classification import binary_auroc

    from shoal import ps
    from shoal.data.order import epoch_order
    from shoal.jobs.recsys import movielens_keys
    from shoal.jobs.registry import find

    job = find(name).job
    keys, liked = movielens_keys.rows()
    known, position = keys.unique(return_inverse=True)
    torch.manual_seed(seed)
    model = job.model()

    class ByPosition(nn.Module):
        def __init__(self, own: ps.Embedding) -> None:
            super().__init__()
            zero = int((known == 0).nonzero())
            self.table = nn.Embedding(len(known), own.spec.width, padding_idx=zero, sparse=True)
            with torch.no_grad():
                # With a dimension more, a bag holds one key.
                self.table.weight.copy_(own(known.unsqueeze(1)).view(len(known), -1))
            self.sums = own.mode == "sum"

        def forward(self, at: torch.Tensor) -> torch.Tensor:
            found = self.table(at)
            return found.sum(-2) if self.sums else found

    for path, module in list(model.named_modules()):
        if isinstance(module, ps.Embedding):
            parent, _, last = path.rpartition(".")
            setattr(model.get_submodule(parent), last, ByPosition(module))
    tables = [m.table.weight for m in model.modules() if isinstance(m, ByPosition)]
    others = [p for p in model.parameters() if all(p is not t for t in tables)]
    optimizers = [torch.optim.Adagrad(tables, lr=0.05), torch.optim.Adam(others, lr=1e-3)]
    trained = movielens_keys.TRAINED
    for epoch in range(job.epochs):
        for batch in torch.from_numpy(epoch_order(trained, seed, epoch)).split(job.batch_size):
            for optimizer in optimizers:
                optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(model(position[batch]), liked[batch]).backward()
            for optimizer in optimizers:
                optimizer.step()
    with torch.no_grad():
        logits = model(position[trained:])
    return {
        "auc": float(binary_auroc(logits, liked[trained:].int())),
        "log_loss": float(F.binary_cross_entropy_with_logits(logits, liked[trained:])),
    }


def online(options: argparse.Namespace) -> tuple[list[Group], list[Bar]]:
    """AUC of predictions that were made before their answers were learned, and of a model that is frozen at the split."""
    from shoal.jobs.recsys.online import STREAMS, progressive

    groups, bars = [], []
    frozen = "frozen at the split"
    for stream in STREAMS:
        found = {name: common.Result(name) for name in ("online", frozen)}
        for seed in range(options.repeats):
            answer = progressive(stream, seed, quick=options.quick)
            found["online"].values.append(answer["online_auc"])
            found[frozen].values.append(answer["frozen_auc"])
        groups.append(Group(title=stream, results=found, references=[frozen], unit="AUC"))
        gain = (found["online"].median or 0.0) - (found[frozen].median or 0.0)
        bars.append(Bar(claim=f"{stream}: AUC of online above frozen", value=gain, limit=0.0, at_least=True))
    return groups, bars


def main() -> int:
    parser = common.arguments(__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--without", nargs="*", default=[], choices=["serving", "tensorflow"], help="peers not to run")
    parser.add_argument("--plans", nargs="+", default=list(PLANS), help="for the part auc")
    parser.add_argument("--most-rows", type=int, default=SIZES[-1])
    parser.add_argument("--memory-gb", type=float, default=4.0, help="of the growing table")
    parser.add_argument("--directory", help="for its cold rows: about 15 GB for 10^8")
    options = parser.parse_args()
    os.environ.setdefault("SHOAL_EXPORT", "0")
    machine = common.hardware()
    groups: list[Group] = []
    bars: list[Bar] = []
    for part in options.parts:
        more, reached = {"rows": rows, "growth": growth, "auc": auc, "online": online}[part](options)
        groups += more
        bars += reached
    settings = {"parts": options.parts, "repeats": options.repeats, "quick": options.quick}
    done = common.report("parameter_server_sparse", groups, "lookups/s", settings, machine, bars)
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
