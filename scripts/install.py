"""Create a virtual environment and install shoal into it, with the pinned dependencies of constraints.txt.

    python3 scripts/install.py [--venv .venv] [--dev]

Standard library only, since nothing else is there yet. ``make demo`` and ``make test`` call it; it needs no Makefile.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CPU_INDEX_DEADLINE_S = 2.0
OLDEST, NEWEST = (3, 10), (3, 13)


@dataclass(frozen=True)
class Probes:
    """What is asked of the machine, in the order it is asked; each is called at most once.

    Attributes:
        installed: the version of torch in the environment, or None.
        has_gpu: whether an NVIDIA GPU is there.
        local_wheel: whether pip finds a wheel without the network.
        cpu_index: whether PyTorch's CPU index answers in time.
    """

    installed: Callable[[], str | None]
    has_gpu: Callable[[], bool]
    local_wheel: Callable[[], bool]
    cpu_index: Callable[[], bool]


@dataclass(frozen=True)
class TorchChoice:
    """Which torch to install: pip's extra arguments (None: nothing to do) and one sentence that says so."""

    pip_arguments: tuple[str, ...] | None
    sentence: str


def machine_problem(platform: str, python: tuple[int, int]) -> str | None:
    """Return one sentence where shoal does not run on this system or this Python, else None."""
    if platform == "win32":
        return "shoal does not run on Windows itself; install WSL2 (wsl --install) and run the same command inside it."
    if not OLDEST <= python <= NEWEST:
        return (
            f"shoal needs Python 3.10 to 3.13 and this is Python {python[0]}.{python[1]}; "
            "install Python 3.11 and run: make PYTHON=python3.11 followed by the target."
        )
    return None


def choose_torch(wanted: str, platform: str, probes: Probes) -> TorchChoice:
    """Decide which build of torch to install.

    Args:
        wanted: the pinned version, such as "2.13.0"; a build of it ("2.13.0+cpu") satisfies it too.
        platform: sys.platform; only Linux has a default build that brings CUDA.
        probes: the questions; the dear ones (the network) are only asked where the answer matters.
    """
    installed = probes.installed()
    if installed is not None and installed.split("+")[0] == wanted:
        return TorchChoice(None, f"torch {installed} is there already.")
    if probes.has_gpu():
        return TorchChoice((), f"An NVIDIA GPU is here: installing the default build of torch {wanted}, with CUDA.")
    if probes.local_wheel():
        return TorchChoice(("--no-index", "--no-deps"), f"Installing torch {wanted} from a local wheel.")
    if platform != "linux":
        return TorchChoice((), f"Installing torch {wanted}.")
    if probes.cpu_index():
        return TorchChoice(
            ("--index-url", CPU_INDEX, "--no-deps"),
            f"No NVIDIA GPU here: installing the CPU build of torch {wanted} from PyTorch's own index (about 200 MB).",
        )
    return TorchChoice(
        (),
        f"PyTorch's CPU index ({CPU_INDEX}) does not answer within {CPU_INDEX_DEADLINE_S:g} s, so the default build of "
        f"torch {wanted} comes, with CUDA: several GB to download, about twice that on disk. Ctrl-C stops it.",
    )


def pinned_torch(constraints: str) -> str:
    """Return the version that constraints.txt pins torch to."""
    match = re.search(r"^torch==([\w.]+)", constraints, flags=re.MULTILINE)
    if match is None:
        raise SystemExit("constraints.txt has no line torch==VERSION; put it back and run this again.")
    return match.group(1)


def torch_in(python: Path) -> str | None:
    """Return the version of torch that this interpreter would import, without importing it."""
    code = "import importlib.metadata as m; print(m.version('torch'))"
    answer = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else None


def has_nvidia_gpu() -> bool:
    """Return whether the NVIDIA driver is loaded or nvidia-smi finds a device."""
    if Path("/proc/driver/nvidia").exists():
        return True
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0 and "GPU" in answer.stdout


def local_wheel_for(python: Path, wanted: str) -> bool:
    """Return whether pip, as it is configured, finds torch without any index (its find-links may hold a wheel)."""
    command = [*pip(python), "install", "--dry-run", "--no-index", "--no-deps", "--ignore-installed"]
    return quiet([*command, f"torch=={wanted}"])


def index_answers(url: str, deadline_s: float) -> bool:
    """Return whether `url` answers within the deadline, name lookup included."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            with urllib.request.urlopen(request, timeout=deadline_s) as answer:
                answers.append(answer.status == 200)
        except (OSError, ValueError):
            answers.append(False)

    # A thread, because urlopen's timeout does not cover a name server that does not answer.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(deadline_s)
    return answers == [True]


def pip(python: Path) -> list[str]:
    """Return the beginning of a pip command line for this interpreter."""
    return [str(python), "-m", "pip", "--disable-pip-version-check"]


def create(venv: Path) -> Path:
    """Create the environment unless a working one is there; return its interpreter."""
    python = venv / "bin" / "python"
    version = version_of(python)
    if version is not None:
        if machine_problem(sys.platform, version) is not None:
            found = ".".join(map(str, version))
            raise SystemExit(f"{venv} holds Python {found} and shoal needs 3.10 to 3.13; remove {venv} (make clean).")
        if not quiet([*pip(python), "--version"]):
            # An environment made by another tool may have no pip.
            quiet([str(python), "-m", "ensurepip"])
        return python
    if venv.exists() and any(venv.iterdir()) and not (venv / "pyvenv.cfg").exists():
        raise SystemExit(f"{venv} is a directory that is no virtual environment; name another one with --venv.")
    print(f"Creating {venv} with Python {sys.version.split()[0]}.", flush=True)
    command = [sys.executable, "-m", "venv", "--clear", str(venv)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode != 0:
        detail = (made.stdout + made.stderr).strip().splitlines() or ["python -m venv failed"]
        raise SystemExit(
            f"{venv} could not be created ({detail[0]}); on Debian and Ubuntu this needs: sudo apt install python3-venv"
        )
    return python


def version_of(python: Path) -> tuple[int, int] | None:
    """Return (major, minor) of an interpreter, or None where it does not run."""
    code = "import sys; print(*sys.version_info[:2])"
    try:
        answer = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    except OSError:
        return None
    numbers = answer.stdout.split()
    return (int(numbers[0]), int(numbers[1])) if answer.returncode == 0 and len(numbers) == 2 else None


def quiet(command: Sequence[str]) -> bool:
    """Run a command without showing what it says; return whether it succeeded."""
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def install(command: Sequence[str]) -> bool:
    """Run pip with its own progress on the terminal; return whether it succeeded."""
    return subprocess.run(command, check=False).returncode == 0


def install_torch(python: Path, wanted: str, constraints: Path) -> None:
    """Install the right build of torch, so that the next pip finds its requirement satisfied."""
    probes = Probes(
        installed=lambda: torch_in(python),
        has_gpu=has_nvidia_gpu,
        local_wheel=lambda: local_wheel_for(python, wanted),
        cpu_index=lambda: index_answers(f"{CPU_INDEX}/torch/", CPU_INDEX_DEADLINE_S),
    )
    choice = choose_torch(wanted, sys.platform, probes)
    print(choice.sentence, flush=True)
    if choice.pip_arguments is None:
        return
    command = [*pip(python), "install", *choice.pip_arguments, "--constraint", str(constraints), f"torch=={wanted}"]
    if not install(command):
        raise SystemExit(f"torch {wanted} could not be installed; pip says why above; the same command tries again.")


def main() -> None:
    """Install shoal as the command line says; exit 2 with one sentence where this machine cannot run it."""
    problem = machine_problem(sys.platform, sys.version_info[:2])
    if problem is not None:
        print(problem, file=sys.stderr)
        raise SystemExit(2)
    parser = argparse.ArgumentParser(description="Install shoal into a virtual environment, with pinned dependencies.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="the environment (default: .venv)")
    parser.add_argument("--dev", action="store_true", help="the tools for tests, lint and types too")
    options = parser.parse_args()
    constraints = ROOT / "constraints.txt"
    stamps = [options.venv / ".installed"] + ([options.venv / ".installed-dev"] if options.dev else [])

    python = create(options.venv)
    install_torch(python, pinned_torch(constraints.read_text(encoding="utf-8")), constraints)
    target = f"{ROOT}[dev]" if options.dev else str(ROOT)
    print("Installing shoal and its pinned dependencies.", flush=True)
    if not install([*pip(python), "install", "--constraint", str(constraints), "--editable", target]):
        raise SystemExit("shoal could not be installed; pip says why above; the same command tries again.")
    if options.dev and sys.version_info >= (3, 11):
        # Alone: of torchvision, which timm asks for and whose models do without, there is no build for every torch.
        if not install([*pip(python), "install", "--constraint", str(constraints), "--no-deps", "timm"]):
            raise SystemExit("timm could not be installed; pip says why above; the same command tries again.")
    for stamp in stamps:
        stamp.touch()
    print(f"Installed; the command is {os.path.relpath(options.venv)}/bin/shoal", flush=True)


if __name__ == "__main__":
    main()
