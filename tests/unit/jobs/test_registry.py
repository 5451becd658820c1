"""What can be typed as a target, what it finds, and what is said when it finds nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cloudpickle
import pytest

from shoal.errors import JobError, TargetError, UserCodeError
from shoal.jobs import find, list_jobs

ROOT = Path(__file__).resolve().parents[3]

TWO_JOBS = """
import torch
from shoal.job import Job

SIZE = 3

def build():
    return torch.nn.Linear(SIZE, 1)

first = Job(name="first", model=build, train_data=(torch.zeros(4, 3), torch.zeros(4, 1)))

def second() -> Job:
    return first.replace(name="second")

def third():
    return first.replace(name="third")

def wants_more(width) -> Job:
    return first

number = 3
"""


@pytest.fixture(autouse=True)
def _own_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in an empty directory, and forget afterwards what was imported from there."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    yield
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def write(name: str, text: str) -> Path:
    path = Path.cwd() / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(text)
    return path


def test_shipped_job() -> None:
    target = find("cifar-cnn")
    assert target.job.name == "cifar-cnn"
    assert target.factory == "shoal.jobs.vision.cifar_cnn:job"
    assert target.source is None


def test_every_listed_job_is_found_under_its_name() -> None:
    listed = list_jobs()
    assert [name for name, _ in listed] == [
        "cifar-cnn", "cifar-resnet", "clicks-wide-deep", "criteo-deepfm", "deepfm", "text-transformer", "wide-deep",
    ]  # fmt: skip
    for name, line in listed:
        assert find(name).job.name == name
        assert line and "\n" not in line


def test_shipped_job_files_have_what_the_registry_reads() -> None:
    for name, _ in list_jobs():
        module, _, attribute = (find(name).factory or "").partition(":")
        tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
        assert attribute in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


def test_listing_imports_no_torch() -> None:
    code = "import sys, shoal.jobs; assert shoal.jobs.list_jobs(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("name", ["first", "second", "third"])
def test_job_in_a_file(name: str) -> None:
    path = write("mine.py", TWO_JOBS)
    target = find(f"mine.py:{name}")
    assert (target.job.name, target.attribute, target.factory, target.source) == (name, name, None, path)


def test_file_in_another_folder_can_import_its_neighbours() -> None:
    write("there/helper_of_mine.py", "SIZE = 7\n")
    lines = ["import helper_of_mine", "from shoal.job import Job"]
    lines.append("job = Job(model=len, train_data=(), batch_size=helper_of_mine.SIZE)")
    write("there/mine.py", "\n".join(lines))
    assert find("there/mine.py").job.batch_size == 7


def test_job_in_a_module() -> None:
    write("pack/__init__.py", "")
    write("pack/mine.py", TWO_JOBS)
    target = find("pack.mine:second")
    assert target.job.name == "second"
    assert target.factory == "pack.mine:second"


def test_only_job_needs_no_name() -> None:
    write(
        "one.py",
        "import shoal.job\njob = also = shoal.job.Job(model=len, train_data=(), name='only')\n_old = job.replace()\n",
    )
    target = find("one.py")
    assert (target.job.name, target.attribute) == ("only", "job")


def test_dashes_in_a_file_name() -> None:
    write("my-net.v2.py", "from shoal.job import Job\njob = Job(model=len, train_data=())\n")
    assert find("my-net.v2.py:job").attribute == "job"


def test_file_called_like_a_loaded_module_does_not_replace_it() -> None:
    write("pathlib.py", "from shoal.job import Job\njob = Job(model=len, train_data=(), name='mine')\n")
    assert find("pathlib.py").job.name == "mine"
    assert sys.modules["pathlib"].Path is Path


def test_changed_file_is_read_again() -> None:
    for batch_size in (50, 60):  # as many characters, within the same second: a cached bytecode would not notice
        write("mine.py", f"from shoal.job import Job\njob = Job(model=len, train_data=(), batch_size={batch_size})\n")
        assert find("mine.py").job.batch_size == batch_size


def test_job_of_a_file_travels_to_a_process_that_cannot_import_it(tmp_path: Path) -> None:
    path = write("mine.py", TWO_JOBS)
    packed = tmp_path / "packed"
    packed.write_bytes(cloudpickle.dumps(find("mine.py:second").job))
    path.unlink()
    code = (
        f"import cloudpickle; j = cloudpickle.load(open({str(packed)!r}, 'rb')); print(j.name, j.model().in_features)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["second", "3"]


def refused(target: str) -> str:
    with pytest.raises(TargetError) as caught:
        find(target)
    return str(caught.value)


def test_unknown_name_tells_the_nearest() -> None:
    said = refused("cifar-cn")
    assert '"cifar-cnn"' in said
    assert "file.py:name" in said


def test_unknown_name_beside_a_file() -> None:
    write("mine.py", TWO_JOBS)
    assert "write mine.py" in refused("mine")


def test_missing_file_tells_the_nearest() -> None:
    write("train_net.py", TWO_JOBS)
    said = refused("train_nett.py:job")
    assert "There is no file train_nett.py" in said
    assert '"train_net.py"' in said


def test_file_without_such_a_job_lists_those_there() -> None:
    write("mine.py", TWO_JOBS)
    said = refused("mine.py:secnd")
    assert 'Did you mean "second"?' in said
    assert "mine.py:first, mine.py:second" in said
    assert "wants_more" not in said


@pytest.mark.parametrize("name", ["number", "wants_more", "SIZE"])
def test_name_that_is_no_job(name: str) -> None:
    write("mine.py", TWO_JOBS)
    assert f'"{name}" in mine.py is no job' in refused(f"mine.py:{name}")


def test_several_jobs_and_no_name() -> None:
    write("mine.py", TWO_JOBS)
    assert "choose one: mine.py:first, mine.py:second" in refused("mine.py")


def test_file_without_jobs() -> None:
    write("empty.py", "x = 1\n")
    assert "empty.py holds no job" in refused("empty.py")


def test_missing_module() -> None:
    write("pack/__init__.py", "")
    assert 'no module "nowhere_at_all"' in refused("nowhere_at_all.mine:job")
    assert 'no module "pack.mine"' in refused("pack.mine:job")


@pytest.mark.parametrize("target", ["mine.py:", "a.b:", "mine.py:a b", ""])
def test_malformed_targets(target: str) -> None:
    assert refused(target)


def test_error_in_the_file_is_theirs() -> None:
    before = sys.modules.get("mine")
    write("mine.py", "def divide():\n    return 1 / 0\n\ndivide()\n")
    with pytest.raises(UserCodeError) as caught:
        find("mine.py:job")
    text = caught.value.traceback_text
    assert str(caught.value) == "Importing mine.py raised ZeroDivisionError: division by zero."
    assert text.startswith("Traceback (most recent call last):")
    assert "return 1 / 0" in text and "in divide" in text
    assert "shoal" not in text and "importlib" not in text
    assert sys.modules.get("mine") is before


def test_error_in_a_module_and_in_a_factory_is_theirs() -> None:
    write("broken_one.py", "import not_installed_anywhere\n")
    write("mine.py", "def job():\n    raise ValueError('no such width')\n")
    with pytest.raises(UserCodeError, match="not_installed_anywhere"):
        find("broken_one:job")
    with pytest.raises(UserCodeError, match=r"job\(\) in mine.py raised ValueError: no such width") as caught:
        find("mine.py:job")
    assert "shoal" not in caught.value.traceback_text


def test_syntax_error_shows_the_line() -> None:
    write("mine.py", "job = (\n")
    with pytest.raises(UserCodeError, match="SyntaxError") as caught:
        find("mine.py:job")
    assert "job = (" in caught.value.traceback_text


def test_script_that_exits_while_imported() -> None:
    write("mine.py", "import sys\nsys.exit(0)\n")
    with pytest.raises(UserCodeError, match="SystemExit"):
        find("mine.py:job")


def test_wrong_job_keeps_its_own_sentence() -> None:
    write("mine.py", "from shoal.job import Job\njob = Job(model=len, train_data=(), batch_size=0)\n")
    with pytest.raises(JobError, match="batch_size is 0"):
        find("mine.py:job")
