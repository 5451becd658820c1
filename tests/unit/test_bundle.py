from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import shoal
from shoal import bundle
from shoal.errors import TargetError
from shoal.jobs.vision import cifar_cnn

SOURCE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 2)
        self.twin = nn.Linear(3, 2)
        self.twin.weight = self.inner.weight

    def forward(self, x):
        return self.inner(x) + self.twin(x)

import shoal
job = shoal.Job(model=Net, train_data=(torch.zeros(1, 3),))

def make_job():
    return job
"""
X = torch.linspace(-1, 1, 6).view(2, 3)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "nets.py"
    path.write_text(SOURCE)
    return path


def linear() -> nn.Module:
    torch.manual_seed(3)
    return nn.Linear(3, 2)


@pytest.mark.parametrize("name", ["Net", "job", "make_job"])
def test_a_model_is_built_by_the_copy_of_its_source(name: str, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    model = _net(source)
    bundle.write(target, model.state_dict(), {"name": "n", "factory": f"nets:{name}"}, source)
    source.unlink()
    loaded = shoal.load(target)
    assert not loaded.training
    assert torch.equal(loaded(X), model(X))
    assert loaded.inner.weight is loaded.twin.weight
    assert set(bundle.read_weights(target)) == {"inner.weight", "inner.bias", "twin.weight", "twin.bias"}


def _net(source: Path) -> nn.Module:
    space: dict[str, type[nn.Module]] = {}
    exec(source.read_text(), space)
    torch.manual_seed(8)
    return space["Net"]()


def test_a_source_that_was_changed_is_not_run(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    bundle.write(target, _net(source).state_dict(), {"factory": "nets:Net"}, source)
    (target / "nets.py").write_text("raise SystemExit('must not run')")
    with pytest.raises(TargetError, match="was changed"):
        shoal.load(target)


def test_a_model_is_built_by_an_import_path(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = cifar_cnn.model().eval()
    bundle.write(tmp_path / "run" / "model", model.state_dict(), {"factory": "shoal.jobs.vision.cifar_cnn:job"})
    # A run directory will do as well.
    loaded = shoal.load(tmp_path / "run")
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))


def test_without_its_code_the_exported_program_is_used(tmp_path: Path) -> None:
    model = linear().eval()
    bundle.write(tmp_path, model.state_dict(), {"factory": None})
    with pytest.raises(TargetError, match="cannot be found"):
        shoal.load(tmp_path)
    batch = torch.export.Dim.AUTO
    torch.export.save(torch.export.export(model, (X,), dynamic_shapes=({0: batch},)), tmp_path / bundle.PROGRAM)
    x = torch.rand(5, 3)
    assert torch.equal(shoal.load(tmp_path)(x), model(x))


def test_what_is_no_bundle_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="is not a bundle"):
        shoal.load(tmp_path)
    (tmp_path / bundle.DESCRIPTION).write_text('{"factory": "builtins:dict"')
    with pytest.raises(TargetError, match="is not a bundle"):
        shoal.load(tmp_path)


def test_nothing_in_a_bundle_is_pickled(source: Path, tmp_path: Path) -> None:
    bundle.write(tmp_path / "b", _net(source).state_dict(), {"factory": "nets:Net"}, source)
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"weights.safetensors", "bundle.json", "nets.py"}
