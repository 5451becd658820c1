from __future__ import annotations

import pytest
import torch
from torch import nn

from shoal.axes.blocks import find_blocks


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(x)


class Stack(nn.Module):
    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, widths[0])
        self.layers = nn.ModuleList(Layer(width) for width in widths)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_the_elements_of_lists_and_sequentials_are_blocks() -> None:
    assert list(find_blocks(Stack(8, 8, 8))) == ["layers.0", "layers.1", "layers.2"]
    assert list(find_blocks(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))) == ["0", "2"]


def test_an_element_that_holds_most_is_opened_where_it_has_blocks() -> None:
    wrapped = nn.Sequential(nn.Linear(8, 8), Stack(8, 8), nn.Linear(8, 2))
    assert list(find_blocks(wrapped)) == ["0", "1.layers.0", "1.layers.1", "2"]
    one_large = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 2))
    assert list(find_blocks(one_large)) == ["0", "1"]


def test_small_blocks_can_be_left_out() -> None:
    assert list(find_blocks(Stack(8, 8, 64))) == ["layers.0", "layers.1", "layers.2.mlp.0", "layers.2.mlp.2"]
    assert list(find_blocks(Stack(8, 48, 48), smallest_share=0.1)) == ["layers.1", "layers.2"]


def test_blocks_that_share_weights_can_be_left_out() -> None:
    model = Stack(8, 8, 8)
    model.layers[1].mlp[0].weight = model.layers[2].mlp[0].weight
    assert list(find_blocks(model)) == ["layers.0", "layers.1", "layers.2"]
    assert list(find_blocks(model, shared=False)) == ["layers.0"]


@pytest.mark.parametrize("model", [nn.Linear(3, 4), Stack(4).embed, nn.ModuleDict({"a": nn.Linear(2, 2)})])
def test_a_model_without_repeated_parts_has_none(model: nn.Module) -> None:
    assert find_blocks(model) == {}


def test_a_list_inside_a_list_is_no_block_itself() -> None:
    model = nn.ModuleList([nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), nn.ModuleDict({"a": nn.Linear(2, 2)})])
    assert list(find_blocks(model)) == ["0.0", "0.1"]
