"""The shape of the house: which room may import which, how long a file may be, and what a cheap import may cost."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "shoal"

# A room imports only what stands before it here. `plan_grammar` is the half of `plan` that reads strings.
ROOMS = (
    "errors", "job", "plan_grammar", "plan", "tensorfile", "bundle",
    "cluster", "data", "observe", "kernels", "comm", "process", "ps", "axes",
    "rewrites", "planner", "train", "compress", "serve", "jobs", "cli",
)  # fmt: skip
# They meet at the bundle: not even the later one may import the earlier one.
STRANGERS = {("train", "serve"), ("serve", "train")}
# Rooms that may use shoal as a reader of the README does, by `import shoal`.
USERS = {"jobs", "cli"}
# Files that belong to no room: the front door, and `python -m shoal`.
DOORS = {"__init__", "__main__"}

LONGEST_FILE, LONGEST_FUNCTION, MOST_PARAMETERS = 600, 80, 8

SOURCES = sorted(PACKAGE.rglob("*.py"))


def is_type_checking(test: ast.expr) -> bool:
    """Whether an `if` is one that only a type checker enters."""
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk a syntax tree, leaving out the bodies of `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and is_type_checking(child.test):
            for statement in child.orelse:
                yield statement
                yield from nodes(statement)
            continue
        yield child
        yield from nodes(child)


def imported_modules(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) for each import of a part of shoal, wherever in the source it stands.

    Args:
        source: the text of a module.
        package: the package it lies in, such as "shoal.comm", against which relative imports are read.
    """
    for node in nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*anchor, *([node.module] if node.module else [])])
            for alias in node.names:
                if base != "shoal":
                    yield node.lineno, base
                else:
                    # `from shoal import train` names a room; `from shoal import __version__` names no part of it.
                    yield node.lineno, "shoal.__init__" if alias.name.startswith("__") else f"shoal.{alias.name}"
        elif isinstance(node, ast.Call) and node.args:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            first = node.args[0]
            if name in ("import_module", "__import__") and isinstance(first, ast.Constant):
                yield node.lineno, str(first.value)


def complaints(room: str, source: str, package: str = "shoal") -> list[str]:
    """Return one sentence for each import in `source`, a module of `room`, that the order forbids."""
    found = []
    for line, name in imported_modules(source, package):
        first, _, rest = name.partition(".")
        if first != "shoal":
            continue
        other = rest.split(".")[0]
        if other in DOORS or other == room:
            continue
        if not other:
            if room not in USERS:
                found.append(f"line {line}: {room} imports shoal itself; import the module that is meant")
        elif other not in ROOMS:
            found.append(f"line {line}: {room} imports shoal.{other}, which is no room of ROOMS")
        elif (room, other) in STRANGERS:
            found.append(f"line {line}: {room} and {other} never import each other; they meet at the bundle")
        elif ROOMS.index(other) > ROOMS.index(room):
            found.append(f"line {line}: {room} imports {other}, which stands below it")
    return found


def room_of(path: Path) -> str:
    """Return the room that a source file lies in."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def too_long(source: str) -> list[str]:
    """Return one sentence for each function over 80 lines and each constructor with more than 8 parameters."""
    found = []
    for function in functions(ast.parse(source)):
        lines = (function.end_lineno or function.lineno) - function.lineno + 1
        if lines > LONGEST_FUNCTION:
            found.append(f"line {function.lineno}: {function.name} has {lines} lines")
        if function.name in ("__init__", "__new__"):
            # Generated constructors (dataclasses) are not in the source, so they are exempt without being named.
            a = function.args
            count = len(a.posonlyargs) + len(a.args) + len(a.kwonlyargs) - 1 + bool(a.vararg) + bool(a.kwarg)
            if count > MOST_PARAMETERS:
                found.append(f"line {function.lineno}: {function.name} has {count} parameters")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_rooms_above_it(path: Path) -> None:
    room = room_of(path)
    if room in DOORS:
        return
    assert room in ROOMS, f"{room} is a new room; give it its place in ROOMS and in docs/architecture.md"
    package = ".".join(path.relative_to(ROOT).parent.parts)
    assert complaints(room, path.read_text(encoding="utf-8"), package) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_and_constructors_are_small(path: Path) -> None:
    assert too_long(path.read_text(encoding="utf-8")) == []


def test_files_are_small() -> None:
    sources = [path for suffix in ("py", "c", "cpp", "h") for path in PACKAGE.rglob(f"*.{suffix}")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in sources}
    assert lengths and {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE} == {}


@pytest.mark.parametrize(
    "module", ["shoal", "shoal.cli.main", "shoal.serve.service", "shoal.serve.gateway", "shoal.serve.predict"]
)
def test_cheap_imports_do_not_bring_torch(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{'torch', 'numpy', 'matplotlib'}} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert answer.returncode == 0, answer.stderr
    assert "torch" not in answer.stdout.split()


@pytest.mark.parametrize(
    ("room", "source", "words"),
    [
        ("comm", "import shoal.train.loop", "stands below"),
        ("comm", "from shoal import train", "stands below"),
        ("comm", "def f():\n    from shoal.train import loop", "line 2"),
        ("comm", "from ..train import loop", "stands below"),
        ("comm", "import importlib\nimportlib.import_module('shoal.train')", "stands below"),
        ("comm", "import shoal", "shoal itself"),
        ("errors", "from shoal.job import Job", "stands below"),
        ("train", "from shoal.serve import gateway", "never import each other"),
        ("serve", "from shoal.train import loop", "never import each other"),
        ("train", "from shoal import nowhere", "no room"),
        ("comm", "if TYPE_CHECKING:\n    pass\nelse:\n    import shoal.train", "stands below"),
    ],
)
def test_a_forbidden_import_is_found(room: str, source: str, words: str) -> None:
    found = complaints(room, source, f"shoal.{room}")
    assert len(found) == 1 and words in found[0]


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("train", "from shoal.comm.arena import Arena\nimport shoal.errors\nfrom . import feed\nfrom .loop import run"),
        ("comm", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from shoal.train import loop"),
        ("comm", "import typing\nif typing.TYPE_CHECKING:\n    from shoal.train import loop"),
        ("comm", "import shoaling.train\nfrom shoal import __version__"),
        ("jobs", "import shoal\nfrom shoal import data"),
    ],
)
def test_an_allowed_import_is_not(room: str, source: str) -> None:
    assert complaints(room, source, f"shoal.{room}") == []


def test_a_long_function_and_a_wide_constructor_are_found() -> None:
    long = "def f():\n" + "    x = 1\n" * LONGEST_FUNCTION
    wide = "class A:\n    def __init__(self, a, b, c, d, e, f, *, g, h, i): ...\n"
    assert "81 lines" in too_long(long)[0] and "9 parameters" in too_long(wide)[0]
    assert too_long("def f():\n" + "    x = 1\n" * (LONGEST_FUNCTION - 1)) == []
    assert too_long("class A:\n    def __init__(self, a, b, c, d, e, f, *, g, h): ...\n") == []


def test_shoal_train_and_shoal_plan_stay_functions_when_the_modules_of_that_name_are_imported() -> None:
    code = (
        "import shoal; shoal.Plan, shoal.Run, shoal.open\n"
        "import shoal.train.run, shoal.plan\n"
        "from types import FunctionType, ModuleType\n"
        "assert type(shoal.train) is type(shoal.plan) is FunctionType, (shoal.train, shoal.plan)\n"
        "assert isinstance(shoal.data, ModuleType)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200)
