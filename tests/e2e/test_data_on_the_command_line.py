"""``--data PATH``: pictures in a CSV file or in folders, from the file on disk to the trained model."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import shoal
from shoal.cli.main import main
from shoal.observe.compare import max_rel_diff

JOB = """
import torch
import shoal


def net():
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(16, 3)
    )


def accuracy(output, target):
    return (output.argmax(1) == target).float().mean()


def placeholder():
    raise RuntimeError("--data takes the place of this")


cnn = shoal.Job(
    name="cnn", model=net, train_data=placeholder, loss=torch.nn.functional.cross_entropy, batch_size=10, epochs=4,
    optimizer=lambda params: torch.optim.SGD(params, lr=0.5), metrics={"accuracy": accuracy},
)
"""
CLASSES = ("blue", "green", "red")
COUNT = 36


def _pictures() -> list[tuple[np.ndarray, str]]:
    """Noisy pictures, mostly of one colour, the class; in class order, so that files by name come in the same order."""
    random = np.random.default_rng(0)
    found = []
    for number in range(COUNT):
        name = CLASSES[number * 3 // COUNT]
        pixels = random.integers(0, 100, (8, 8, 3), dtype=np.uint8)
        pixels[..., {"red": 0, "green": 1, "blue": 2}[name]] += 150
        found.append((pixels, name))
    return found


def _encoded(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the job, ``data/train_data.csv`` (paths and base64 in turn), and the same as folders."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHOAL_EXPORT", "0")
    (tmp_path / "pictures.py").write_text(JOB)
    rows = []
    for number, (pixels, name) in enumerate(_pictures()):
        file = tmp_path / "data" / "folders" / name / f"{number:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(_encoded(pixels))
        text = f"folders/{name}/{file.name}" if number % 2 else base64.b64encode(_encoded(pixels)).decode()
        rows.append(f"{text},{name}")
    (tmp_path / "data" / "train_data.csv").write_text("image,label\n" + "\n".join(rows) + "\n")
    return tmp_path


def _answer(capfd: pytest.CaptureFixture[str], *words: str) -> Any:
    code = main([*words, "--json"])
    out, err = capfd.readouterr()
    assert code == 0, err
    return json.loads(out)


def test_a_csv_file_and_folders_of_pictures_train_a_model(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train = ["train", "pictures.py:cnn", "--plan", "dp=2,threads=1,layout=contiguous"]
    by_csv = _answer(capfd, *train, "--data", "data/train_data.csv", "--run", "by-csv")
    assert by_csv["steps"] == 16 and by_csv["world_size"] == 2
    losses = [entry["loss"] for entry in by_csv["epochs"]]
    assert losses[-1] < losses[0]
    assert by_csv["final"]["accuracy"] > 0.5, "three classes of one colour each are easy"

    # The same pictures in the same order, decoded from files: the same bits.
    by_folder = _answer(capfd, *train, "--data", "data/folders", "--run", "by-folder")
    assert by_folder["weights_sha256"] == by_csv["weights_sha256"]

    # What a plain loop over the same pictures makes of it, in the order that shoal documents.
    expected = _plain_loop()
    assert max_rel_diff(shoal.open(here / "by-csv").weights(), expected) < 1e-5

    bundle = json.loads((here / "by-csv" / "model" / "bundle.json").read_text())
    assert bundle["labels"] == list(CLASSES)
    assert bundle["inputs"] == [{"name": "input", "dtype": "FP32", "shape": [-1, 3, 8, 8]}]

    metrics = _answer(capfd, "eval", "by-csv", "--data", "data/train_data.csv")
    assert set(metrics) == {"eval_loss", "eval_accuracy"}
    x, y = _tensors()
    with torch.no_grad():
        expected_loss = float(torch.nn.functional.cross_entropy(shoal.open(here / "by-csv").model()(x), y))
    assert metrics["eval_loss"] == pytest.approx(expected_loss, rel=1e-5)
    # The job has no evaluation data of its own.
    assert main(["eval", "by-csv"]) == 2
    assert "give some" in capfd.readouterr().err


def _tensors() -> tuple[torch.Tensor, torch.Tensor]:
    pictures = _pictures()
    x = torch.from_numpy(np.stack([pixels for pixels, _ in pictures])).permute(0, 3, 1, 2).float() / 255
    return x, torch.tensor([CLASSES.index(name) for _, name in pictures])


def _plain_loop() -> dict[str, torch.Tensor]:
    from shoal.data.order import epoch_order

    job: dict[str, Any] = {}
    exec(JOB, job)
    x, y = _tensors()
    # As documented: the model is built after seeding with the job's seed.
    torch.manual_seed(0)
    model = job["net"]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for epoch in range(4):
        order = torch.from_numpy(epoch_order(COUNT, 0, epoch))
        for batch in order.split(10):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return dict(model.state_dict())
