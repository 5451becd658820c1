from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from shoal.errors import RequestError
from shoal.observe.figure import learning_curve

HISTORY = [
    {
        "epoch": n, "loss": 2 / n, "accuracy": 0.1 * n, "eval_loss": 2.2 / n, "eval_accuracy": 0.09 * n,
        "samples_per_s": 7000.0, "train_s": 2.0, "eval_s": 1.0, "step": n * 10,
    }
    for n in range(1, 6)
]  # fmt: skip


def colours(path: Path) -> set[tuple[int, int, int]]:
    return {colour for _, colour in Image.open(path).convert("RGB").getcolors(1 << 24)}


def test_the_picture_holds_losses_and_metrics(tmp_path: Path) -> None:
    path = learning_curve(HISTORY, tmp_path / "curve.png", job="net", plan="dp=2," * 60)
    image = Image.open(path)
    assert image.format == "PNG" and image.width > 900 and image.height > 400
    assert (0x1F, 0x6F, 0x8B) in colours(path)
    assert [found.name for found in tmp_path.iterdir()] == ["curve.png"]
    losses_only = [{"epoch": entry["epoch"], "loss": entry["loss"]} for entry in HISTORY]
    assert Image.open(learning_curve(losses_only, tmp_path / "losses.png")).width < image.width


def test_values_that_are_missing_leave_gaps_and_do_not_fail(tmp_path: Path) -> None:
    history = [*HISTORY[:2], {"epoch": 3, "loss": None, "partial": True}]
    assert learning_curve(history, tmp_path / "curve.png").stat().st_size > 5000
    assert learning_curve([{"epoch": 1, "loss": None}], tmp_path / "none.png").exists()


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no epoch"):
        learning_curve([], tmp_path / "curve.png")
