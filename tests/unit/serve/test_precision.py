"""Cheaper ways of computing: chosen by measurement, refused by the tolerance, the same answer in any company."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from shoal.serve import computing, precision
from shoal.serve.tolerance import Distance, Tolerance

_WIDTH = 64


def _run(model: nn.Module, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    with torch.inference_mode():
        return [model(*map(torch.from_numpy, inputs)).float().numpy()]


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(_WIDTH, 4 * _WIDTH), nn.GELU(), nn.Linear(4 * _WIDTH, 8, bias=False)).eval()


def _rows(count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, _WIDTH)).astype(np.float32)


def _choose(tolerance: Tolerance, only: str | None = None) -> tuple[nn.Module, computing.Precision]:
    rows = _rows(16)
    return precision.choose(_model(), _run, tolerance, [(row[None],) for row in rows], "16 rows", (rows[:8],), only)


def test_every_way_is_compared_and_shown() -> None:
    _, found = _choose(Tolerance(cosine=0.99))
    assert {"bf16", "bf16 autocast"} <= {one.name for one in found.tried}
    for one in found.tried:
        assert one.refused is None and one.cosine is not None and 0.99 <= one.cosine < 1, one
    assert found.describe()["tried"][0]["name"] == "bf16" and "cosine" in str(found)


def test_what_is_outside_is_refused() -> None:
    model, found = _choose(Tolerance(max_error=1e-7))
    assert found.name == computing.FP32
    assert {one.refused for one in found.tried} == {"outside the tolerance"}
    assert np.array_equal(_run(model, [_rows(4)])[0], _run(_model(), [_rows(4)])[0])


def test_a_newer_version_is_computed_like_the_older() -> None:
    model, found = _choose(Tolerance(cosine=0.9), only="bf16")
    assert found.name == "bf16" and isinstance(model, precision.InBf16)
    model, found = _choose(Tolerance(max_error=1e-7), only="bf16")
    assert found.name == computing.FP32


def test_a_model_that_reads_its_weights_itself_is_left_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(_WIDTH, _WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) @ self.layer.weight.float()

    rows = _rows(4)
    _, found = precision.choose(Tied().eval(), _run, Tolerance(cosine=0.9), [(rows,)], "4 rows", (rows,))
    by_name = {one.name: one for one in found.tried}
    if "int8" in by_name:
        assert by_name["int8"].refused == "raises AttributeError"
    assert found.name != "int8"


def test_in_int8_a_row_does_not_see_the_others() -> None:
    model = precision.with_int8(_model())
    rows = _rows(9)
    # One that would spoil the scale of a whole batch.
    rows[3] *= 1e4
    together = _run(model, [rows])[0]
    alone = np.concatenate([_run(model, [row[None]])[0] for row in rows])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)
    assert Distance.between([_run(_model(), [rows])[0]], [together]).cosine > 0.99
