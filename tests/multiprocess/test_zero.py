"""zero=3 in plain torch processes over gloo: the same weights as an unsplit model, held in parts.

This file is also the script of each process: see ``main``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from shoal.axes import zero

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
        self.names = {id(p): name for name, p in model.named_parameters()}

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
            loss_of(self.model(inputs[own]), target[own]).backward()
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
        for name, tensor in self.memory.items():
            if name not in self.sharded.kept_whole:
                start, stop = self.rows(name)
                tensor[:start], tensor[stop:] = 0, 0
                dist.all_reduce(tensor)
            found[name] = tensor
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
            "whole_names": list(part.sharded.kept_whole), "touched": touched}  # fmt: skip


def check_with_tensor_axis(mesh: Any) -> dict[str, Any]:
    """Two workers by two: columns and rows of the odd MLP are cut first, then what is left of each is sharded."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {"2": ColwiseParallel(), "4": RowwiseParallel()}
    model = make_model("mlp")
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    cut = {"2.weight": 0, "2.bias": 0, "4.weight": 1}
    t, d = mesh["tp"].get_local_rank(), mesh["dp"].get_local_rank()
    own = {name: w.chunk(2, cut[name])[t].contiguous() if name in cut else w for name, w in first.items()}
    to_meta(model)
    parallelize_module(model, mesh["tp"], plan, src_data_rank=None)
    sharded = zero.apply(model, mesh["dp"])
    sharded.materialise(lambda name: own[name][slice(*zero.chunk_rows(own[name].shape[0], 2)[d])])
    share = BATCH // 2
    for inputs, target in batches("mlp"):
        sharded.begin()
        loss_of(model(inputs[d * share : (d + 1) * share]), target[d * share : (d + 1) * share]).backward()
        with torch.no_grad():
            for p in model.parameters():
                zero.local_of(p).sub_(zero.local_gradient(p), alpha=RATE)
    expected = make_model("mlp")
    for inputs, target in batches("mlp"):
        expected.zero_grad()
        loss_of(expected(inputs), target).backward()
        with torch.no_grad():
            for p in expected.parameters():
                p.sub_(p.grad, alpha=RATE)
    worst = 0.0
    for name, w in expected.named_parameters():
        mine = w.detach().chunk(2, cut[name])[t] if name in cut else w.detach()
        rows = slice(*zero.chunk_rows(mine.shape[0], 2)[d])
        worst = max(worst, float((own[name][rows] - mine[rows]).abs().max()))
    return {"worst": worst, "two_axes": dict(model.named_parameters())["2.weight"].device_mesh.ndim}


def check_bf16_recompute_and_giving_up(mesh: Any) -> dict[str, Any]:
    """Autocast, recomputed blocks, and a step that is given up in the middle change nothing of the next one."""
    from shoal.axes.recompute import apply as recompute

    def gradients(mode: str, fail: bool) -> dict[str, torch.Tensor]:
        model = make_model("transformer").float()
        own = {name: p.detach().clone() for name, p in model.named_parameters()}
        to_meta(model)
        recompute(model, mode)
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


def main() -> None:
    torch.set_num_threads(1)
    rank, ways = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", store=dist.FileStore(os.environ["STORE"], ways), rank=rank, world_size=ways)
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    found: dict[str, Any] = {kind: check_run(kind, mesh["dp"]) for kind in MODELS}
    if ways == 4:
        found["tensor"] = check_with_tensor_axis(init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")))
    found["bf16"] = check_bf16_recompute_and_giving_up(mesh["dp"])
    print(json.dumps(found))
    dist.destroy_process_group()


def start(ways: int, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Run this file as ``ways`` processes; return what each of them printed."""
    store = folder / f"store-{ways}"
    program = (
        f"import sys, importlib.util as u; s = u.spec_from_file_location('zero_part', {str(HERE)!r}); "
        "m = u.module_from_spec(s); sys.modules['zero_part'] = m; s.loader.exec_module(m); m.main()"
    )
    processes = []
    for rank in range(ways):
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(ways), "OMP_NUM_THREADS": "1",
               "STORE": str(store)}  # fmt: skip
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", program, *arguments],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        answers = [process.communicate(timeout=90) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, (_, errors) in zip(processes, answers, strict=True):
        assert process.returncode == 0, errors[-4000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in answers]


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


def test_sharding_goes_with_the_tensor_axis(four: list[dict[str, Any]]) -> None:
    assert max(answer["tensor"]["worst"] for answer in four) <= 1e-9
    assert four[0]["tensor"]["two_axes"] == 2


def test_bf16_recomputing_and_a_step_that_was_given_up(four: list[dict[str, Any]]) -> None:
    assert [answer["bf16"]["same"] for answer in four] == [[True, True, True]] * 4
    assert four[0]["bf16"]["dtypes"] == ["torch.float32"]
