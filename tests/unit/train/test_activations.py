from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional

from shoal.axes import recompute
from shoal.train.activations import LiveBytes, fake_copy, measure_activations, model_memory
from shoal.train.describe import describe

WIDTH, WORDS, LENGTH, COUNT = 8, 11, 6, 4


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 4 * WIDTH)
        self.second = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


class Text(nn.Module):
    """With ``looks`` it asks what the tokens are, which nobody can answer without values."""

    def __init__(self, looks: bool = False, broken: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.norm = nn.BatchNorm1d(LENGTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight
        self.looks, self.broken = looks, broken

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.broken or (self.looks and int(tokens.max()) >= WORDS):
            raise ValueError("no such word")
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return functional.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["target"].flatten())


def batch(count: int = COUNT) -> dict[str, torch.Tensor]:
    tokens = torch.arange(count * LENGTH).view(count, LENGTH) % WORDS
    return {"tokens": tokens, "target": tokens.roll(1, 1)}


@pytest.mark.parametrize("looks", [False, True])
def test_saved_bytes_are_those_that_one_can_count(looks: bool) -> None:
    torch.manual_seed(0)
    model = Text(looks)
    found = measure_activations(model, batch(), COUNT, loss)
    assert found.block_names == ("layers.0", "layers.1", "layers.2")
    first, *blocks, last = found.units
    row = LENGTH * WIDTH * 4
    # The embedding's output; of a layer the tanh's output, which is all that tanh and the second linear need, and its own.
    assert first.saved == row
    assert [block.saved for block in blocks] == [5 * row] * 3 and [block.entry for block in blocks] == [row] * 3
    assert [block.kept("full") for block in blocks] == [row] * 3
    # Selective keeps what the first linear made besides its own output.
    assert [block.kept("selective") for block in blocks] == [5 * row] * 3
    assert all(block.block for block in blocks) and not first.block and not last.block
    # In the backward pass of a layer the gradients of what is between its linears come on top, and of its output.
    assert all(4 * row <= block.peak <= 10 * row for block in blocks)
    assert found.guessed is looks and bool(found.why) is looks
    assert last.saved > LENGTH * WORDS * 4


def test_parameters_are_filed_under_the_units_that_use_them() -> None:
    homes = measure_activations(Text(), batch(), COUNT, loss, modes=()).homes
    assert homes["embed.weight"] == (0, 4)
    assert homes["layers.1.second.bias"] == (2,) and homes["norm.weight"] == (4,)
    assert homes.keys() == dict(Text().named_parameters()).keys()


@pytest.mark.parametrize("looks", [False, True])
def test_the_model_and_the_random_state_stay_as_they_were(looks: bool) -> None:
    model = Text(looks)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    measure_activations(model, batch(), COUNT, loss)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert type(model.layers[0]) is Layer


def test_a_model_that_cannot_be_run_is_guessed_from_its_weights() -> None:
    model = Text(broken=True)
    found = measure_activations(model, batch(), COUNT, loss)
    assert found.guessed and "twice the weights" in found.why
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert [unit.saved for unit in found.units] == [2 * weights / COUNT]


def test_bf16_saves_rounded_weights_once_and_halves_the_rest() -> None:
    plain = measure_activations(Text(), batch(), COUNT, loss, modes=()).units[2]
    half = measure_activations(Text(), batch(), COUNT, loss, precision="bf16", modes=()).units[2]
    assert half.saved < plain.saved and plain.fixed == 0
    # Both of its linears' weights in two bytes each, however many samples there are, with what rounding biases takes.
    assert 2 * 2 * 4 * WIDTH * WIDTH <= half.fixed <= 2 * (2 * 4 * WIDTH * WIDTH + 5 * WIDTH)


def test_what_is_counted_is_what_lives() -> None:
    with LiveBytes() as live:
        a = torch.ones(100)
        view = a[10:20]
        assert live.now == 400
        b = a + 1
        assert (live.now, live.peak) == (800, 800)
        del a, b
        assert live.now == 400 and view.shape == (10,)
        del view
    assert (live.now, live.peak) == (0, 800)


def test_selective_keeps_products_and_drops_the_rest() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.exp(torch.sin(self.a(x))) * torch.tanh(self.b(x))

    model = nn.Sequential(Gated(), Gated(), nn.Linear(WIDTH, 1))
    found = measure_activations(model, torch.ones(COUNT, WIDTH), COUNT, lambda m, b: m(b).sum())
    row = WIDTH * 4
    block = found.units[1]
    # sin's input, exp's output, tanh's output, and the block's own; the two products and the block's own; only that.
    assert [block.kept(mode) for mode in recompute.MODES] == [4 * row, 3 * row, row]


def test_a_fake_copy_takes_no_memory_and_keeps_ties() -> None:
    class Huge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.device("meta"):
                self.first = nn.Linear(10**6, 10**6)
            self.second = nn.BatchNorm1d(3)
            self.third = self.second

    twin = fake_copy(Huge(), FakeTensorMode())
    assert all(isinstance(t, FakeTensor) for t in [*twin.parameters(), *twin.buffers()])
    assert twin.third is twin.second and twin.first.weight.shape == (10**6, 10**6)
    assert {t.device.type for t in twin.parameters()} == {"cpu"}


def test_the_table_of_a_model_becomes_numbers_for_the_planner() -> None:
    model = Text()
    table = describe(model, torch.optim.Adam(model.parameters()))
    found = measure_activations(model, batch(), COUNT, loss, modes=())
    memory = model_memory(table, found, 32, 10**8, lambda name: "first" in name)
    weights = {w.name: w for w in memory.weights}
    assert memory.state_tensors == 2 and memory.batch == 32 and memory.process_bytes == 10**8
    assert weights["layers.0.first.weight"].split and not weights["layers.0.second.weight"].split
    tied = weights["embed.weight"]
    assert (tied.unit, tied.also, tied.nbytes, tied.trained) == (0, (4,), 4 * WORDS * WIDTH, True)
