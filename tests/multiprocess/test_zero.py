"""zero=3 in plain torch processes over gloo: the same weights as an unsplit model, held in parts.

This file is also the script of the processes: see ``main``.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional

from shoal.axes import recompute, tensor, zero

HERE = Path(__file__).resolve()
STEPS, BATCH, RATE, MOMENTUM = 4, 12, 0.05, 0.9


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(x)


class TiedTransformer(nn.Module):
    """GPT-style: the head is the embedding. One scalar, one parameter for a few batches only, one for none."""

    def __init__(self, width: int = 10, words: int = 13) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.rare = nn.Parameter(torch.ones(3))
        self.unused = nn.Parameter(torch.ones(5))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        x = self.head(self.norm(x)) * self.scale
        first = (tokens[:, 0] == 0)[:, None, None]
        if bool(first.any()):
            x = torch.where(first, x * self.rare.mean(), x)
        return x


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Conv2d(a, b, 3), nn.BatchNorm2d(b), nn.ReLU()) for a, b in ((3, 7), (7, 6), (6, 5))]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).mean((2, 3)))


def make_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(37, 101), nn.Tanh(), nn.Linear(101, 64), nn.Tanh(), nn.Linear(64, 3))


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": make_mlp, "transformer": TiedTransformer, "conv": Conv}


def make_model(kind: str) -> nn.Module:
    torch.manual_seed(4)
    return MODELS[kind]().double()


def batches(kind: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(9)
    for step in range(STEPS):
        if kind == "transformer":
            tokens = torch.randint(1, 13, (BATCH, 6), generator=generator)
            if step % 2:
                # Only the first worker's samples reach the rare parameter.
                tokens[0, 0] = 0
            yield tokens, tokens.roll(-1, 1)
        elif kind == "conv":
            images = torch.randn(BATCH, 3, 9, 9, generator=generator, dtype=torch.float64)
            yield images, torch.randint(4, (BATCH,), generator=generator)
        else:
            yield (
                torch.randn(BATCH, 37, generator=generator, dtype=torch.float64),
                torch.randint(3, (BATCH,), generator=generator),
            )


def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Summed over samples, over the size of the global batch."""
    return functional.cross_entropy(output.flatten(0, -2), target.flatten(), reduction="sum") / BATCH


def sgd(weight: torch.Tensor, gradient: torch.Tensor, momentum: torch.Tensor) -> None:
    momentum.mul_(MOMENTUM).add_(gradient)
    weight.add_(momentum, alpha=-RATE)


def train_whole(kind: str) -> dict[str, torch.Tensor]:
    model = prepared(kind)
    momentum = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for inputs, target in batches(kind):
        loss_of(model(inputs), target).backward()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    sgd(parameter, parameter.grad, momentum[name])
                    parameter.grad = None
    return dict(model.state_dict())


def prepared(kind: str) -> nn.Module:
    """Statistics over a worker's share are another thing to compute, so BatchNorm is held still here."""
    model = make_model(kind)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
            module.eval()
    if kind == "conv":
        model.features[0][0].weight.requires_grad_(False)  # type: ignore[index, union-attr]
    return model


def to_meta(model: nn.Module) -> None:
    """Move parameters, not buffers, to the meta device; ties stay ties."""
    memo: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, p in module._parameters.items():
            if p is not None:
                new = nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
                module._parameters[key] = memo.setdefault(id(p), new)


class Part:
    """One worker's part of a run, its weights in one flat "shared" buffer a parameter."""

    def __init__(self, kind: str, mesh: Any) -> None:
        self.kind, self.rank, self.ways = kind, mesh.get_local_rank(), mesh.size()
        model = prepared(kind)
        self.memory = {name: p.detach().clone() for name, p in model.named_parameters()}
        to_meta(model)
        self.sharded = zero.apply(model, mesh)
        self.sharded.materialise(self.view)
        self.model = model
        self.arrived = {name: 0 for name in self.memory}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self.arrival(name))

    def arrival(self, name: str) -> Callable[[torch.Tensor], None]:
        """Count the gradients that a hook on the parameter gets to see, as a worker has that takes them away."""

        def count(_: torch.Tensor) -> None:
            self.arrived[name] += 1

        return count

    def rows(self, name: str) -> tuple[int, int]:
        return zero.chunk_rows(self.memory[name].shape[0], self.ways)[self.rank]

    def view(self, name: str) -> torch.Tensor:
        if name in self.sharded.kept_whole:
            return self.memory[name]
        start, stop = self.rows(name)
        return self.memory[name][start:stop]

    def train(self) -> None:
        momentum = {name: torch.zeros_like(self.view(name)) for name in self.memory}
        share = BATCH // self.ways
        for inputs, target in batches(self.kind):
            self.sharded.begin()
            own = slice(self.rank * share, (self.rank + 1) * share)
            with torch.no_grad():
                # As an evaluation between two steps does.
                self.model(inputs[own])
            # In two pieces, whose gradients add up.
            for inputs_piece, target_piece in zip(inputs[own].split(2), target[own].split(2), strict=True):
                loss_of(self.model(inputs_piece), target_piece).backward()
            self.update(momentum)

    def update(self, momentum: dict[str, torch.Tensor]) -> None:
        touched = self.sharded.touched()
        reached = torch.tensor([touched.get(name, True) for name in self.memory], dtype=torch.int64)
        dist.all_reduce(reached)
        for name, anybody in zip(self.memory, reached.tolist(), strict=True):
            gradient = zero.local_gradient(dict(self.model.named_parameters())[name])
            if name in self.sharded.kept_whole:
                assert gradient is not None
                dist.all_reduce(gradient)
            if anybody and gradient is not None:
                sgd(self.view(name), gradient, momentum[name])

    def whole(self) -> dict[str, torch.Tensor]:
        """Everybody's rows together, under the names of the state_dict."""
        found = {}
        for name, whole in self.memory.items():
            if name not in self.sharded.kept_whole:
                start, stop = self.rows(name)
                whole[:start], whole[stop:] = 0, 0
                dist.all_reduce(whole)
            found[name] = whole
        return found


def check_run(kind: str, mesh: Any) -> dict[str, Any]:
    part = Part(kind, mesh)
    keys = list(part.model.state_dict())
    sizes = {
        "local": sum(zero.local_of(p).numel() * 8 for p in part.model.parameters()),
        "whole": sum(t.numel() * 8 for t in part.memory.values()),
        "chunks": sum(-(-t.shape[0] // part.ways) * t[0].numel() * 8 if t.dim() else 8 for t in part.memory.values()),
    }
    part.train()
    in_place = all(
        zero.local_of(p).untyped_storage().data_ptr() == part.memory[name].untyped_storage().data_ptr()
        for name, p in part.model.named_parameters()
        if zero.local_of(p).numel()
    )
    touched = part.sharded.touched()
    found = part.whole()
    expected = train_whole(kind)
    worst = max(float((found[name] - expected[name]).abs().max() / expected[name].abs().max()) for name in found)
    return {**sizes, "worst": worst, "in_place": in_place, "same_keys": keys == list(make_model(kind).state_dict()),
            "whole_names": list(part.sharded.kept_whole), "touched": touched, "arrived": part.arrived}  # fmt: skip


def pieces_of(whole: torch.Tensor, regions: Sequence[Any]) -> torch.Tensor:
    """The part of a tensor that its regions name."""
    for region in regions:
        whole = torch.cat([whole.narrow(region.dim, a, b - a) for a, b in region.ranges], region.dim)
    return whole.contiguous()


def check_with_tensor_axis(mesh: Any, kind: str, how: str, mode: str = "none") -> float:
    """Two workers by two: the tensor axis cuts weights first, then what each worker has left of them is sharded.

    Args:
        how: "dtensor" (torch's own), "plain" (this package's) or "sequence" (with activations split along the sequence).
        mode: of recomputing, on top.
    """
    t, d = mesh["tp"].get_local_rank(), mesh["dp"].get_local_rank()
    model = prepared(kind)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    if how == "dtensor":
        cuts: dict[str, Any] = {"2.weight": 0, "2.bias": 0, "4.weight": 1}
        own = {name: w.chunk(2, cuts[name])[t].contiguous() if name in cuts else w for name, w in first.items()}
        to_meta(model)
        parallelize_module(model, mesh["tp"], {"2": ColwiseParallel(), "4": RowwiseParallel()}, src_data_rank=None)
    else:
        layout = tensor.find_layout(model, 2, sequence_parallel=how == "sequence")
        cuts = dict(layout.shards)
        own = {name: pieces_of(w, (cuts[name][t],) if name in cuts else ()) for name, w in first.items()}
        to_meta(model)
        tensor.apply(model, layout, mesh["tp"])
    assert len({name for name in cuts if name in own}) > 1
    recompute.apply(model, mode)
    sharded = zero.apply(model, mesh["dp"])
    rows = {
        name: slice(None) if name in sharded.kept_whole else slice(*zero.chunk_rows(len(own[name]), 2)[d])
        for name in own
    }
    sharded.materialise(lambda name: own[name][rows[name]] if own[name].dim() else own[name])
    share = slice(d * BATCH // 2, (d + 1) * BATCH // 2)
    for inputs, target in batches(kind):
        sharded.begin()
        loss_of(model(inputs[share]), target[share]).backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                gradient = zero.local_gradient(p)
                if gradient is not None and name in sharded.kept_whole:
                    dist.all_reduce(gradient, group=mesh["dp"].get_group())
                if gradient is not None:
                    zero.local_of(p).sub_(gradient, alpha=RATE)
    expected = prepared(kind)
    for inputs, target in batches(kind):
        expected.zero_grad()
        loss_of(expected(inputs), target).backward()
        with torch.no_grad():
            for p in expected.parameters():
                if p.grad is not None:
                    p.sub_(p.grad, alpha=RATE)
    worst = 0.0
    for name, w in expected.named_parameters():
        if name not in cuts:
            mine = w.detach()
        elif how == "dtensor":
            mine = w.detach().chunk(2, cuts[name])[t]
        else:
            mine = pieces_of(w.detach(), (cuts[name][t],))
        if mine.dim():
            mine, held = mine[rows[name]], own[name][rows[name]]
        else:
            held = own[name]
        if mine.numel():
            worst = max(worst, float((held - mine).abs().max()))
    return worst


def check_bf16_recompute_and_giving_up(mesh: Any) -> dict[str, Any]:
    """Autocast, recomputed blocks, and a step that is given up in the middle change nothing of the next one."""

    def gradients(mode: str, fail: bool) -> dict[str, torch.Tensor]:
        model = make_model("transformer").float()
        own = {name: p.detach().clone() for name, p in model.named_parameters()}
        to_meta(model)
        recompute.apply(model, mode)
        sharded = zero.apply(model, mesh)
        rank, ways = mesh.get_local_rank(), mesh.size()
        sharded.materialise(
            lambda n: own[n] if n in sharded.kept_whole else own[n][slice(*zero.chunk_rows(len(own[n]), ways)[rank])]
        )
        inputs, target = next(batches("transformer"))
        share = slice(rank * BATCH // ways, (rank + 1) * BATCH // ways)
        if fail:
            handle = model.blocks[0].mlp[0].register_full_backward_hook(lambda *_: 1 / 0)
            try:
                loss_of(model(inputs[share]), target[share]).backward()
            except ZeroDivisionError:
                sharded.abandon()
            handle.remove()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model(inputs[share]), target[share])
        loss.backward()
        found = {name: zero.local_gradient(p) for name, p in model.named_parameters()}
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    plain = gradients("none", False)
    others = [gradients("full", False), gradients("selective", False), gradients("none", True)]
    same = [o.keys() == plain.keys() and all(torch.equal(o[n], plain[n]) for n in plain) for o in others]
    return {"same": same, "dtypes": sorted({str(g.dtype) for g in plain.values()})}


def work(rank: int, ways: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), ways)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ways)
    mesh = init_device_mesh("cpu", (ways,), mesh_dim_names=("dp",))
    found: dict[str, Any] = {kind: check_run(kind, mesh["dp"]) for kind in MODELS}
    both = init_device_mesh("cpu", (2, ways // 2), mesh_dim_names=("dp", "tp"))
    cases = (
        ("mlp", "dtensor", "none"), ("mlp", "plain", "none"), ("conv", "plain", "full"),
        ("transformer", "plain", "selective"), ("transformer", "sequence", "full"),
    )  # fmt: skip
    found["tensor"] = {" ".join(case): check_with_tensor_axis(both, *case) for case in cases}
    found["bf16"] = check_bf16_recompute_and_giving_up(mesh["dp"])
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main(ways: int, folder: Path) -> int:
    """Fork the workers from one process that has imported all there is, and wait for them; the first failure ends all."""
    torch.set_num_threads(1)
    importlib.import_module("torch.distributed.fsdp")
    workers = []
    for rank in range(ways):
        pid = os.fork()
        if pid == 0:
            try:
                work(rank, ways, folder)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        workers.append(pid)
    while workers:
        pid, status = os.wait()
        workers.remove(pid)
        if status:
            for other in workers:
                os.kill(other, signal.SIGKILL)
            return 1
    return 0


def start(ways: int, folder: Path) -> list[dict[str, Any]]:
    """Run this file as ``ways`` processes; return what each of them found."""
    program = (
        f"import sys, importlib.util as u; s = u.spec_from_file_location('zero_part', {str(HERE)!r}); from pathlib import Path; "
        f"m = u.module_from_spec(s); sys.modules['zero_part'] = m; s.loader.exec_module(m); "
        f"sys.exit(m.main({ways}, Path({str(folder)!r})))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=250)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, errors[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ways)]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return start(4, tmp_path_factory.mktemp("zero"))


@pytest.mark.parametrize("kind", MODELS)
def test_weights_are_those_of_the_unsplit_model(four: list[dict[str, Any]], kind: str) -> None:
    assert max(answer[kind]["worst"] for answer in four) <= 1e-9
    assert all(answer[kind]["same_keys"] for answer in four)


@pytest.mark.parametrize("kind", MODELS)
def test_each_worker_holds_its_share_and_no_copy(four: list[dict[str, Any]], kind: str) -> None:
    held = [answer[kind]["local"] for answer in four]
    scalars = 8 * len(four[0][kind]["whole_names"])
    assert sum(held) == four[0][kind]["whole"] + 3 * scalars
    # The first one's chunks are rounded up to whole rows, the last one's are what is left.
    assert held[0] == four[0][kind]["chunks"] == max(held)
    assert all(answer[kind]["in_place"] for answer in four)


def test_a_scalar_stays_whole_and_what_nobody_reached_is_known(four: list[dict[str, Any]]) -> None:
    assert [answer["transformer"]["whole_names"] for answer in four] == [["scale"]] * 4
    touched = [answer["transformer"]["touched"] for answer in four]
    assert [t["rare"] for t in touched] == [True, False, False, False]
    assert not any(t["unused"] for t in touched) and all(
        t["embed.weight"] and t["blocks.2.mlp.2.bias"] for t in touched
    )


def test_hooks_on_parameters_see_every_gradient_that_arrives(four: list[dict[str, Any]]) -> None:
    pieces = STEPS * -(-(BATCH // 4) // 2)
    assert [set(answer["mlp"]["arrived"].values()) for answer in four] == [{pieces}] * 4
    frozen = {name for name, count in four[0]["conv"]["arrived"].items() if not count}
    assert frozen == {"features.0.0.weight"}


def test_sharding_goes_with_the_tensor_axis(four: list[dict[str, Any]]) -> None:
    assert len(four[0]["tensor"]) == 5
    for answer in four:
        assert {case: worst for case, worst in answer["tensor"].items() if not worst <= 1e-9} == {}


def test_bf16_recomputing_and_a_step_that_was_given_up(four: list[dict[str, Any]]) -> None:
    assert [answer["bf16"]["same"] for answer in four] == [[True, True, True]] * 4
    assert four[0]["bf16"]["dtypes"] == ["torch.float32"]
