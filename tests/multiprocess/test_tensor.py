"""The tensor axis against the model as it is: weights after some steps, over real processes.

All checks run in one set of forked processes, started by this file as a script; the tests read what they found.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parents[2]
WORLD = 5
STEPS = 3


class Block(nn.Module):
    """As many people write it: one fused layer for query, key and value, and views by the number of heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.n_head = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.size()
        q, k, v = self.qkv(self.norm1(x)).split(c, dim=2)
        q, k, v = (y.view(b, t, self.n_head, c // self.n_head).transpose(1, 2) for y in (q, k, v))
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        mask = torch.tril(torch.ones(t, t, dtype=torch.bool))
        attention = F.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1)
        x = x + self.out((attention @ v).transpose(1, 2).contiguous().view(b, t, c))
        return x + self.mlp(self.norm2(x))


class Gpt(nn.Module):
    def __init__(
        self,
        vocabulary: int = 61,
        width: int = 32,
        heads: int = 4,
        depth: int = 2,
        functional: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(16, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.functional, self.recompute = functional, recompute
        if not functional:
            self.head = nn.Linear(width, vocabulary, bias=False)
            self.head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        x = self.norm(x)
        logits = x @ self.tokens.weight.T if self.functional else self.head(x)
        return logits.transpose(1, 2)


class Einsum(nn.Module):
    """Attention with einsum, grouped heads, normalised queries and a learned scale of each head."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 8
        self.q, self.kv, self.o = nn.Linear(24, 32), nn.Linear(24, 2 * 16), nn.Linear(32, 24)
        self.q_norm, self.scale = nn.LayerNorm(4), nn.Parameter(torch.linspace(0.5, 2.0, 8).view(8, 1, 1))
        self.up, self.down = nn.Linear(24, 2 * 30), nn.Linear(30, 24)
        self.end = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q_norm(self.q(x).unflatten(-1, (8, 4))).permute(0, 2, 1, 3)
        k, v = self.kv(x).chunk(2, dim=-1)
        k, v = (y.reshape(*y.shape[:2], 4, 4).transpose(1, 2).repeat_interleave(2, dim=1) for y in (k, v))
        weights = torch.einsum("bhid,bhjd->bhij", q, k) * self.scale
        mixed = torch.einsum("bhij,bhjd->bhid", weights.softmax(-1), v)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.end((x + self.down(F.silu(gate) * up)).mean(1))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(24, 4, 50, 0.0, batch_first=True, norm_first=True), 1
        )
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(24, 4, 50, 0.0), 1)
        self.end = nn.Linear(24, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[0, -2:] = True
        memory = self.encoder(x, src_key_padding_mask=padding).transpose(0, 1)
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        y = self.decoder(x.transpose(0, 1) * 0.5, memory, tgt_mask=causal, memory_key_padding_mask=padding)
        return self.end(y).permute(1, 2, 0)


class Odd(nn.Module):
    """What has no rule: an autograd function of its own, a slice across heads, a value that is changed in place."""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            return gradients[0] * 2

    def __init__(self, changing: bool = True) -> None:
        super().__init__()
        self.changing = changing
        self.a, self.b, self.c, self.d = nn.Linear(64, 256), nn.Linear(256, 64), nn.Linear(64, 256), nn.Linear(255, 64)
        self.e, self.f = nn.Linear(64, 256), nn.Linear(256, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.b(Odd.Double.apply(self.a(x)))
        x = self.d(self.c(x)[:, 1:].tanh())
        y = self.e(x)
        if self.changing:
            y[:, 0] = 0.0
        return self.f(y.sort(dim=1).values)


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 10, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(10, 7, 3, stride=2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(28, 30), nn.Tanh(), nn.Linear(30, 4),
    )  # fmt: skip


def odd_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(37, 101), nn.ReLU(), nn.Linear(101, 64), nn.Tanh(), nn.Dropout(0.0), nn.Linear(64, 10)
    )


def vision(heads: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm_models

        return timm_models.create(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_heads=heads, embed_dim=48, num_classes=10
        )

    return build


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(vocab_size=99, hidden_size=72, intermediate_size=160, num_hidden_layers=2, num_attention_heads=9,
                    num_key_value_heads=3, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1)
    )  # fmt: skip


def mixtral() -> nn.Module:
    """Four experts, of which two compute each word."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(vocab_size=99, hidden_size=32, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
                      num_key_value_heads=2, num_local_experts=4, bos_token_id=0, eos_token_id=1)
    )  # fmt: skip


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=99, n_embd=48, n_layer=2, n_head=4, n_positions=32, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
                   bos_token_id=0, eos_token_id=1)
    )  # fmt: skip


def summands() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 23), nn.Sigmoid(), nn.Linear(23, 1))


def tokens(length: int = 9, vocabulary: int = 61) -> Callable[[torch.dtype], tuple[Any, Any]]:
    return lambda dtype: (torch.randint(vocabulary, (4, length)), torch.randint(vocabulary, (4, length)))


def vectors(*shape: int, classes: int = 10) -> Callable[[torch.dtype], tuple[Any, Any]]:
    return lambda dtype: (torch.randn(4, *shape, dtype=dtype), torch.randint(classes, (4,)))


def regression(dtype: torch.dtype) -> tuple[Any, Any]:
    x = torch.randn(2000, 6, dtype=dtype)
    return x, (x[:, :1] * x[:, 1:2]).sin() + x[:, 2:3]


def entropy(model: nn.Module, batch: tuple[Any, Any]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def smoothed(model: nn.Module, batch: tuple[Any, Any]) -> torch.Tensor:
    labels = batch[1].clone()
    labels[0, :3] = -100
    return F.cross_entropy(model(batch[0]), labels, label_smoothing=0.1)


def own_loss(model: nn.Module, batch: tuple[Any, Any]) -> torch.Tensor:
    return model(input_ids=batch[0], labels=batch[0]).loss  # type: ignore[no-any-return]


def own_logits(model: nn.Module, batch: tuple[Any, Any]) -> torch.Tensor:
    return F.cross_entropy(model(input_ids=batch[0]).logits.flatten(0, 1), batch[1].flatten())


def squares(model: nn.Module, batch: tuple[Any, Any]) -> torch.Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


@dataclass(frozen=True)
class Check:
    name: str
    ways: int
    build: Callable[[], nn.Module]
    batch: Callable[[torch.dtype], tuple[Any, Any]]
    loss: Callable[[nn.Module, Any], torch.Tensor] = entropy
    double: bool = True
    sequence: bool = False
    static: bool = False
    plan: Any = None
    least: int = 2  # how many modules are split at least

    @property
    def missing(self) -> str | None:
        """The package that it needs and that is not there."""
        needs = {"vit": "timm", "llama": "transformers", "gpt2": "transformers", "mixtral": "transformers"}.get(self.name)
        return needs if needs is not None and importlib.util.find_spec(needs) is None else None

    @property
    def label(self) -> str:
        extra = (
            ("-sequence" if self.sequence else "")
            + ("-static" if self.static else "")
            + ("" if self.double else "-float32")
        )
        return f"{self.name}-tp{self.ways}{extra}"


def decoder_batch(dtype: torch.dtype) -> tuple[Any, Any]:
    return torch.randn(4, 6, 24, dtype=dtype), torch.randint(7, (4, 6))


CHECKS = [
    Check("gpt", 2, Gpt, tokens(), least=9),
    Check("gpt", 4, Gpt, tokens(), smoothed, least=9),
    Check("gpt", 2, Gpt, tokens(), double=False, least=9),
    Check("gpt", 2, Gpt, tokens(), sequence=True, least=9),
    Check("gpt", 4, Gpt, tokens(), sequence=True, least=9),
    Check("gpt-functional-head", 2, lambda: Gpt(functional=True), tokens(), plan={"tokens": "embedding"}, least=9),
    Check("gpt", 2, Gpt, tokens(), static=True, least=4),
    Check("gpt-recompute", 2, lambda: Gpt(recompute=True), tokens(), sequence=True, least=9),
    Check("encoder-decoder", 2, Decoder, decoder_batch, least=7),
    Check("encoder-decoder", 4, Decoder, decoder_batch, sequence=True, least=7),
    Check("encoder-decoder", 2, Decoder, decoder_batch, static=True, least=7),
    Check("vit", 3, vision(3), vectors(3, 32, 32), least=9),
    Check("vit", 2, vision(4), vectors(3, 32, 32), double=False, least=9),
    Check("vit", 2, vision(4), vectors(3, 32, 32), static=True, least=8),
    Check("vit", 2, vision(4), vectors(3, 32, 32), sequence=True, least=9),
    # Its norms and its loss are computed in float32, whatever the model is.
    Check("llama", 3, llama, tokens(9, 99), own_loss, double=False, least=16),
    Check("llama", 3, llama, tokens(9, 99), own_loss, double=False, sequence=True, least=16),
    Check("llama", 3, llama, tokens(9, 99), own_loss, double=False, static=True, least=16),
    Check("mixtral", 2, mixtral, tokens(9, 99), own_loss, double=False, least=10),
    Check("gpt2", 2, gpt2, tokens(9, 99), own_logits, least=10),
    Check("odd-mlp", 2, odd_mlp, vectors(37)),
    Check("odd-mlp", 3, odd_mlp, vectors(37)),
    Check("odd-mlp", 4, odd_mlp, vectors(37), double=False),
    Check("odd-mlp", 5, odd_mlp, vectors(37), plan={"0": "replicate", "2": "rowwise", "5": "colwise"}),
    Check("convolutions", 2, convolutions, vectors(3, 12, 12, classes=4), least=5),
    Check("convolutions", 3, convolutions, vectors(3, 12, 12, classes=4), least=5),
    Check("einsum", 2, Einsum, vectors(5, 24, classes=5), least=5),
    Check("einsum", 4, Einsum, vectors(5, 24, classes=5), least=5),
    Check("no-rule", 2, Odd, vectors(64, classes=5), least=2),
    Check(
        "no-rule",
        2,
        lambda: Odd(changing=False),
        vectors(64, classes=5),
        static=True,
        plan={"a": "colwise", "c": "colwise"},
    ),
    Check("summands", 5, summands, regression, squares),
]


# -- in the processes --------------------------------------------------------------------------------------------


def train(model: nn.Module, check: Check, batch: Any) -> list[float]:
    make = (lambda p: torch.optim.Adam(p, 1e-3)) if check.double else (lambda p: torch.optim.SGD(p, 0.01, momentum=0.9))
    optimizer = make(model.parameters())
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = check.loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def difference(parts: dict[str, torch.Tensor], wholes: dict[str, torch.Tensor]) -> float:
    largest = max(float(w.abs().max()) for w in wholes.values())
    return max(
        float((p - wholes[n]).abs().max()) / max(float(wholes[n].abs().max()), 1e-3 * largest)
        for n, p in parts.items()
        if p.numel()
    )


def run_check(check: Check, group: Any, rank: int) -> dict[str, Any]:
    from shoal.axes import tensor

    torch.manual_seed(0)
    dtype = torch.float64 if check.double else torch.float32
    torch.set_default_dtype(dtype)
    plain_model = check.build().to(dtype)
    plain_model.train()
    batch = check.batch(dtype)
    # A bias that is zero would hide that it is added more than once.
    with torch.no_grad():
        for name, p in plain_model.named_parameters():
            if name.endswith("bias"):
                p.uniform_(-0.1, 0.1)
    model = copy.deepcopy(plain_model)
    before = {n: b.clone() for n, b in model.named_buffers()}
    example = None if check.static else lambda m: check.loss(m, tuple(v[:2] for v in batch))
    layout = tensor.find_layout(model, check.ways, check.plan, check.sequence, True, example, 2)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    whole = {n: p.detach().clone() for n, p in model.named_parameters()}
    names = list(whole)

    def part(name: str, of: dict[str, torch.Tensor]) -> torch.Tensor:
        region = layout.shards[name][rank] if name in layout.shards else None
        if region is None:
            return of[name]
        return torch.cat([of[name].narrow(region.dim, a, b - a) for a, b in region.ranges], region.dim)

    for module in model.modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[leaf] = META.setdefault(id(parameter), nn.Parameter(parameter.detach().to("meta")))
    tensor.apply(model, layout, group)
    tensor.materialise(model, lambda name: part(name, whole).clone())
    assert [n for n, _ in model.named_parameters()] == names
    losses = train(model, check, batch)
    expected = train(plain_model, check, batch)
    wholes = {n: p.detach() for n, p in plain_model.named_parameters()}
    parts = {n: p.detach() for n, p in model.named_parameters()}
    moved = difference(whole, wholes)
    with torch.no_grad():
        model.eval(), plain_model.eval()
        evaluated = abs(float(check.loss(model, batch)) - float(check.loss(plain_model, batch)))
    return {
        "difference": difference(parts, {n: part(n, wholes) for n in wholes}),
        "losses": max(abs(a - b) for a, b in zip(losses, expected, strict=True)),
        "buffers": max([0.0, *(float((a - b).abs().max()) for a, b in zip(model.buffers(), plain_model.buffers(), strict=True))]),
        "evaluated": evaluated, "split": len(layout.split), "moved": moved, "loss_parallel": layout.loss_parallel,
    }  # fmt: skip


META: dict[int, nn.Parameter] = {}


def work(rank: int, folder: Path, only: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    groups = {ways: dist.new_group(list(range(ways))) for ways in (2, 3, 4, 5)}
    found: dict[str, Any] = {}
    for check in CHECKS:
        if rank < check.ways and only in check.label and check.missing is None:
            META.clear()
            try:
                found[check.label] = run_check(check, groups[check.ways], rank)
            except Exception as error:
                import traceback

                found[check.label] = {"error": f"{error!r}\n{traceback.format_exc()}"}
                break
    (folder / f"{rank}.json").write_text(json.dumps(found))
    os._exit(0)


def main() -> None:
    import timm_models

    if importlib.util.find_spec("timm") is not None:
        timm_models.create("vit_tiny_patch16_224", depth=1)
    folder, only = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""
    children = []
    for rank in range(WORLD):
        pid = os.fork()
        if pid == 0:
            work(rank, folder, only)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("tensor")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'helpers'}",
    }  # fmt: skip
    subprocess.run([sys.executable, __file__, str(folder)], check=True, timeout=250, env=environment)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.label)
def test_split_as_whole(found: list[dict[str, Any]], check: Check) -> None:
    if check.missing is not None:
        pytest.skip(f"{check.missing} is not installed")
    for rank in range(check.ways):
        result = found[rank][check.label]
        assert "error" not in result, result["error"]
        assert result["difference"] <= (1e-9 if check.double else 1e-5)
        assert result["losses"] <= (1e-9 if check.double else 1e-5) and result["evaluated"] <= (
            1e-9 if check.double else 1e-5
        )
        assert result["buffers"] <= (1e-9 if check.double else 1e-4)
        assert result["moved"] > 1e-4 and result["split"] >= check.least


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        if len(sys.argv) < 2 or sys.argv[1] == "-":
            sys.argv[1:2] = [place]
        main()
        for rank in range(WORLD):
            path = Path(sys.argv[1]) / f"{rank}.json"
            for label, result in json.loads(path.read_text()).items() if path.exists() else ():
                print(rank, label, result.get("error") or result)
