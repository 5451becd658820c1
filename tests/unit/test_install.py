"""The way in: which torch is chosen, what the pins cover, and what a machine that cannot run shoal is told."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("shoal_install_script", ROOT / "scripts" / "install.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up while they are being made.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


install = load_script()


def probes(asked: list[str], **answers: Any) -> Any:
    """Probes that give the answers and write down what was asked."""

    def probe(name: str, default: object) -> Callable[[], Any]:
        def ask() -> Any:
            asked.append(name)
            return answers.get(name, default)

        return ask

    return install.Probes(
        installed=probe("installed", None),
        has_gpu=probe("has_gpu", False),
        local_wheel=probe("local_wheel", False),
        cpu_index=probe("cpu_index", False),
    )


def pins_for(python: str) -> dict[str, list[str]]:
    """Return name -> pinned versions that hold under this Python on Linux."""
    pins: dict[str, list[str]] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        environment = {"python_version": python, "python_full_version": f"{python}.1", "extra": ""}
        if pin.marker is None or pin.marker.evaluate(environment):
            pins.setdefault(canonicalize_name(pin.name), []).append(str(pin.specifier))
    return pins


@pytest.mark.parametrize("version", ["2.13.0", "2.13.0+cpu", "2.13.0+cu130"])
def test_a_torch_that_is_there_is_kept_and_nothing_else_is_asked(version: str) -> None:
    asked: list[str] = []
    choice = install.choose_torch("2.13.0", "linux", probes(asked, installed=version, has_gpu=True))
    assert choice.pip_arguments is None and version in choice.sentence and asked == ["installed"]


def test_another_version_is_replaced() -> None:
    choice = install.choose_torch("2.13.0", "linux", probes([], installed="2.12.1+cpu", local_wheel=True))
    assert choice.pip_arguments == ("--no-index", "--no-deps")


def test_a_gpu_gets_the_default_build_before_any_cpu_wheel() -> None:
    asked: list[str] = []
    choice = install.choose_torch("2.13.0", "linux", probes(asked, has_gpu=True, local_wheel=True, cpu_index=True))
    assert choice.pip_arguments == () and "GPU" in choice.sentence and asked == ["installed", "has_gpu"]


def test_a_local_wheel_comes_before_the_network() -> None:
    asked: list[str] = []
    choice = install.choose_torch("2.13.0", "linux", probes(asked, local_wheel=True, cpu_index=True))
    assert choice.pip_arguments == ("--no-index", "--no-deps") and "cpu_index" not in asked


def test_without_a_gpu_pytorchs_cpu_index_is_used_where_it_answers() -> None:
    choice = install.choose_torch("2.13.0", "linux", probes([], cpu_index=True))
    assert choice.pip_arguments == ("--index-url", install.CPU_INDEX, "--no-deps")


def test_the_default_build_announces_its_size() -> None:
    choice = install.choose_torch("2.13.0", "linux", probes([]))
    assert choice.pip_arguments == () and "several GB" in choice.sentence and "CUDA" in choice.sentence


def test_macos_has_one_build_without_cuda() -> None:
    asked: list[str] = []
    choice = install.choose_torch("2.13.0", "darwin", probes(asked))
    assert choice.pip_arguments == () and "CUDA" not in choice.sentence and "cpu_index" not in asked


@pytest.mark.parametrize(
    ("platform", "python", "words"),
    [
        ("win32", (3, 11), "WSL2"),
        ("linux", (3, 9), "Python 3.9"),
        ("linux", (3, 14), "Python 3.14"),
        ("linux", (3, 10), None),
        ("darwin", (3, 13), None),
    ],
)
def test_a_machine_that_cannot_run_shoal_is_told_in_one_sentence(
    platform: str, python: tuple[int, int], words: str | None
) -> None:
    problem = install.machine_problem(platform, python)
    if words is None:
        assert problem is None
    else:
        assert words in problem and "\n" not in problem


def test_an_index_that_accepts_and_never_answers_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert install.index_answers(f"http://127.0.0.1:{port}/", 0.2) is False
    assert install.index_answers(f"http://127.0.0.1:{port}/", 5.0) is False  # closed: refused


def test_an_index_that_answers_is_used() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            assert install.index_answers(f"http://127.0.0.1:{server.getsockname()[1]}/", 30.0) is True
        finally:
            thread.join(30)


def test_the_pinned_torch_is_read_without_its_local_part() -> None:
    assert install.pinned_torch((ROOT / "constraints.txt").read_text(encoding="utf-8")) == "2.13.0"
    with pytest.raises(SystemExit, match="torch==VERSION"):
        install.pinned_torch("numpy==2.4.6\n")


def test_torch_in_this_environment_is_found_without_importing_it() -> None:
    import torch

    assert install.torch_in(Path(sys.executable)) == torch.__version__


def test_a_directory_that_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("two years")
    with pytest.raises(SystemExit, match="no virtual environment"):
        install.create(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "two years"


def test_a_working_environment_is_used_as_it_is() -> None:
    assert install.create(Path(sys.prefix)) == Path(sys.prefix) / "bin" / "python"


@pytest.mark.parametrize("python", PYTHONS)
def test_every_direct_dependency_has_exactly_one_pin_under_each_python(python: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = pins_for(python)
    assert {name: versions for name, versions in pins.items() if len(versions) != 1} == {}
    for line in project["dependencies"] + project["optional-dependencies"]["dev"]:
        need = Requirement(line)
        if need.marker is None or need.marker.evaluate({"python_version": python}):
            (pin,) = pins[canonicalize_name(need.name)]
            assert need.specifier.contains(pin.removeprefix("==")), line


def make(target: str, folder: Path, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    # An outer make's flags must not reach this one.
    flags = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    environment = {name: value for name, value in os.environ.items() if name not in flags}
    if path is not None:
        environment["PATH"] = path
    command = [shutil.which("make") or "make", target, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the Makefile and the files its stamps depend on, and no environment yet."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "scripts/install.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
class TestMakefile:
    def test_the_first_time_installs_and_the_second_does_not(self, checkout: Path) -> None:
        assert "install.py" in make("test", checkout, "-n").stdout
        (checkout / ".venv").mkdir()
        (checkout / ".venv" / ".installed-dev").touch()
        second = make("test", checkout, "-n").stdout
        assert "install.py" not in second and "pytest" in second

    def test_a_changed_pin_installs_again(self, checkout: Path) -> None:
        (checkout / ".venv").mkdir()
        stamp = checkout / ".venv" / ".installed"
        stamp.touch()
        newer = stamp.stat().st_mtime + 10
        os.utime(checkout / "constraints.txt", (newer, newer))
        assert "install.py" in make("demo", checkout, "-n").stdout

    def test_a_python_that_is_found_but_does_not_run_is_passed_over(self, checkout: Path) -> None:
        shims = checkout / "shims"
        shims.mkdir()
        (shims / "python3.11").write_text("#!/bin/sh\nexit 127\n")
        (shims / "python3.11").chmod(0o755)
        (shims / "python3").symlink_to(sys.executable)
        said = make("demo", checkout, "-n", path=str(shims))
        assert f"{shims}/python3 scripts/install.py" in said.stdout

    def test_no_python_in_range_is_one_sentence(self, checkout: Path) -> None:
        shims = checkout / "shims"
        shims.mkdir()
        for name in ("python3", "python3.11"):
            (shims / name).write_text("#!/bin/sh\nexit 1\n")
            (shims / name).chmod(0o755)
        said = make("demo", checkout, path=str(shims))
        assert said.returncode != 0
        assert said.stderr.splitlines()[0].startswith("shoal needs Python 3.10 to 3.13")
