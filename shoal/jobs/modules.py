"""Imports the user's file or module, and takes a job out of it.

What goes wrong in there is theirs: it comes back as UserCodeError with their traceback, without the frames
of shoal and of Python's import machinery, which say nothing to them.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle

from shoal.errors import ShoalError, TargetError, UserCodeError, did_you_mean
from shoal.job import Job

_SHOAL = str(Path(__file__).resolve().parent.parent)


def import_file(path: Path) -> ModuleType:
    """Run a Python file as a module and return it; its folder comes first on ``sys.path``, as in a script.

    The module is registered with cloudpickle by value, so that its functions and classes travel to processes
    that cannot import it.

    Raises:
        UserCodeError: the file raised, or is no Python; TargetError: it cannot be read.
    """
    path = path.resolve()
    _put_first(str(path.parent))
    name = _module_name(path)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise TargetError(f"{path} cannot be read as a Python file; give the path of one that holds a job.")
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(name)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up while the file still runs
    try:
        _run_theirs(lambda: _execute(path, module), f"Importing {path.name}")
    except BaseException:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
        raise
    cloudpickle.register_pickle_by_value(module)
    return module


def _execute(path: Path, module: ModuleType) -> None:
    # Not by the spec's loader: its cached bytecode can be that of an edit made within the same second.
    code = compile(path.read_bytes(), str(path), "exec", dont_inherit=True)
    exec(code, vars(module))


def import_module(name: str) -> ModuleType:
    """Import ``package.module``, also from the working directory, and return it.

    Raises:
        TargetError: there is no such module; UserCodeError: it is there and raised.
    """
    _put_first(str(Path.cwd()))
    importlib.invalidate_caches()
    try:
        return _run_theirs(lambda: importlib.import_module(name), f"Importing {name}")
    except UserCodeError as error:
        missing = error.__cause__.name if isinstance(error.__cause__, ModuleNotFoundError) else None
        if missing is not None and (name + ".").startswith(missing + "."):
            raise TargetError(
                f'There is no module "{missing}" here; go to the directory it is in, or give file.py:name.'
            ) from None
        raise


def jobs_in(module: ModuleType) -> dict[str, Job | Callable[[], Job]]:
    """Return what in a module is a job: Job objects, and its own functions without arguments marked ``-> Job``."""
    found: dict[str, Job | Callable[[], Job]] = {}
    for name, value in vars(module).items():
        if isinstance(value, Job):
            wanted = not any(value is other for other in found.values())  # one job may have two names
        else:
            wanted = inspect.isfunction(value) and value.__module__ == module.__name__ and _promises_a_job(value)
        if wanted and not name.startswith("_"):
            found[name] = value
    return found


def take(module: ModuleType, name: str, where: str) -> tuple[str, Job]:
    """Return (name, job) of the job called ``name`` in a module, or of the only one where ``name`` is empty.

    Args:
        where: how the user calls the module, for messages.

    Raises:
        TargetError: no such job, or several to choose from; UserCodeError: their function raised.
    """
    present = jobs_in(module)
    if not name:
        if len(present) == 1:
            name = next(iter(present))
        elif present:
            raise TargetError(f"{where} holds {len(present)} jobs; choose one: {_listed(where, present)}.")
        else:
            raise TargetError(f"{where} holds no job; write job = shoal.Job(...) in it, or a function -> Job.")
    value = getattr(module, name, None)
    if callable(value) and not isinstance(value, Job) and _needs_no_arguments(value):
        value = _run_theirs(value, f"{name}() in {where}")
    if isinstance(value, Job):
        return name, value
    there = f" Jobs there: {_listed(where, present)}." if present else " No other job is there either."
    if not hasattr(module, name):
        raise TargetError(f'{where} has nothing called "{name}".{did_you_mean(name, present)}{there}')
    raise TargetError(f'"{name}" in {where} is no job and no function without arguments that returns one.{there}')


def _run_theirs(call: Callable[[], Any], what: str) -> Any:
    """Call the user's code; what it raises comes back as UserCodeError with their traceback."""
    try:
        return call()
    except ShoalError:
        raise  # a sentence of ours already, such as a Job with a wrong field
    except (Exception, SystemExit) as error:
        reason = str(error).strip().splitlines()
        detail = f": {reason[0].rstrip('.')}" if reason else ""
        raise UserCodeError(f"{what} raised {type(error).__name__}{detail}.", _their_traceback(error)) from error


def _their_traceback(error: BaseException) -> str:
    """Return the traceback as Python prints it, without shoal's frames and those of the import machinery."""
    shown = traceback.TracebackException.from_exception(error)
    chain: list[traceback.TracebackException | None] = [shown]
    seen: set[int] = set()
    while chain:
        link = chain.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        link.stack = traceback.StackSummary.from_list([f for f in link.stack if not _is_ours(f.filename)])
        chain += [link.__cause__, link.__context__]
    return "".join(shown.format())


def _is_ours(filename: str) -> bool:
    return filename.startswith((_SHOAL + "/", "<frozen importlib")) or filename == importlib.__file__


def _module_name(path: Path) -> str:
    """Return the file's own name as a module's, or a longer one where another module has that name already."""
    name = re.sub(r"\W", "_", path.stem)
    other = sys.modules.get(name)
    same = other is not None and getattr(other, "__file__", None) == str(path)
    if same or (other is None and name not in sys.builtin_module_names):
        return name
    return f"{name}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def _put_first(folder: str) -> None:
    if sys.path[:1] != [folder]:
        sys.path.insert(0, folder)


def _promises_a_job(function: Callable[..., Any]) -> bool:
    mark = function.__annotations__.get("return")
    is_job = mark is Job or (isinstance(mark, str) and mark.rpartition(".")[2] == "Job")
    return is_job and _needs_no_arguments(function)


def _needs_no_arguments(value: Callable[..., Any]) -> bool:
    try:
        inspect.signature(value).bind()
    except (TypeError, ValueError):
        return False
    return True


def _listed(where: str, present: dict[str, Any]) -> str:
    return ", ".join(f"{where}:{name}" for name in present)
