"""From what was typed (``cifar-cnn``, ``file.py:name``, ``package.module:name``) to a Job.

A shipped job is a file in ``vision/``, ``language/`` or ``recsys/`` with a constant ``NAME``, a docstring
whose first line says what it is, and a function ``job() -> Job``. The files are read, not imported, to
list them; so a listing costs no torch, and a new job is one new file.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import TargetError, did_you_mean
from shoal.job import Job
from shoal.jobs.modules import import_file, import_module, take

_KINDS = ("vision", "language", "recsys")


@dataclass(frozen=True)
class Target:
    """A job and where it came from.

    Attributes:
        job: the job itself.
        attribute: the name it has in its module or file.
        factory: ``"package.module:attribute"`` where another process can import it, else None.
        source: the file it came from where the target was a file, else None.
    """

    job: Job
    attribute: str
    factory: str | None = None
    source: Path | None = None


@dataclass(frozen=True)
class _Shipped:
    module: str
    line: str


def find(target: str) -> Target:
    """Return the job that ``target`` names.

    Args:
        target: a shipped name (``cifar-cnn``), ``file.py:name`` or ``package.module:name``. ``name`` is a Job
            or a function without arguments that returns one; without ``:name`` it is the only job there.

    Raises:
        TargetError: nothing has that name; the message lists what is near or what is there.
        UserCodeError: the file, the module or the function raised; carries their traceback.
        JobError: their ``shoal.Job(...)`` was called with something that no job can have.
    """
    place, colon, name = target.strip().partition(":")
    if colon and not name.isidentifier():
        raise TargetError(f'"{target}" has no name after the colon; write it as file.py:name or package.module:name.')
    if place.endswith(".py"):
        return _from_file(Path(place), name)
    shipped = _shipped()
    if place in shipped:
        return _from_module(shipped[place].module, name or "job")
    looks_like_module = all(part.isidentifier() for part in place.split("."))
    if looks_like_module and (colon or "." in place):
        return _from_module(place, name)
    raise TargetError(_unknown(target, place, shipped))


def list_jobs() -> list[tuple[str, str]]:
    """Return (name, one line that says what it is) of every shipped job, sorted by name."""
    return [(name, shipped.line) for name, shipped in sorted(_shipped().items())]


def _from_file(path: Path, name: str) -> Target:
    if not path.is_file():
        folder = path.parent
        near = did_you_mean(path.name, [p.name for p in folder.glob("*.py")]) if folder.is_dir() else ""
        raise TargetError(f"There is no file {path}.{near or ' Give the path of a Python file that holds a job.'}")
    module = import_file(path)
    attribute, job = take(module, name, str(path))
    return Target(job, attribute, source=path.resolve())


def _from_module(module_name: str, name: str) -> Target:
    module = import_module(module_name)
    attribute, job = take(module, name, module_name)
    return Target(job, attribute, factory=f"{module_name}:{attribute}")


def _unknown(target: str, place: str, shipped: dict[str, _Shipped]) -> str:
    if Path(place + ".py").is_file():
        return f'There is no job called "{target}"; for the file beside you, write {place}.py.'
    near = did_you_mean(place, shipped)
    return (
        f'There is no job called "{target}".{near} Shipped jobs: {", ".join(sorted(shipped))};'
        " your own: file.py:name or package.module:name."
    )


def _shipped() -> dict[str, _Shipped]:
    """Return name -> module and first line of every shipped job, read from the sources."""
    here = Path(__file__).parent
    found = {}
    for kind in _KINDS:
        for path in sorted((here / kind).glob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            name = _constant(tree, "NAME")
            if name is not None:
                line = (ast.get_docstring(tree) or name).splitlines()[0]
                found[name] = _Shipped(f"shoal.jobs.{kind}.{path.stem}", line)
    return found


def _constant(tree: ast.Module, name: str) -> str | None:
    """Return the string that a module assigns to ``name`` at its top level, or None."""
    for node in tree.body:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
            and any(isinstance(target, ast.Name) and target.id == name for target in node.targets)
        ):
            return node.value.value
    return None
