"""What every test may rely on: no process left behind by the one before, its own empty cache, and no network.

A test marked ``real_data`` gets the user's own cache and network instead.
"""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Iterator

import psutil
import pytest
from hypothesis import settings

# Every process that a test starts inherits this, so that one which has lost its parent is still known to be ours,
# and those of another test run on the same machine are not.
SESSION_VARIABLE = "SHOAL_TEST_SESSION"
GRACE_S = 60.0

# No test times anything (a slow machine is no failure), and the same examples are tried every time.
settings.register_profile("shoal", deadline=None, derandomize=True)
settings.load_profile("shoal")

# Who was looked at and is not ours never will be: on a machine with many processes, looking takes longer than most tests.
_others: set[int] = set()
_settings_of_the_user = pytest.StashKey[dict[str, "str | None"]]()


@pytest.fixture(scope="session", autouse=True)
def _own_cache_and_offline(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Point shoal at an empty cache, without the network, for the whole session.

    The processes that tests start, some hundreds, compile shoal's modules once: each time is 0.2 s of each of them.
    """
    names = ("SHOAL_CACHE", "SHOAL_OFFLINE", SESSION_VARIABLE, "PYTHONDONTWRITEBYTECODE")
    before = {name: os.environ.get(name) for name in names}
    request.config.stash[_settings_of_the_user] = before
    os.environ["SHOAL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["SHOAL_OFFLINE"] = "1"
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ[SESSION_VARIABLE] = uuid.uuid4().hex
    yield
    for name, value in before.items():
        _set(name, value)


@pytest.fixture(scope="session", autouse=True)
def _interrupts_arrive() -> Iterator[None]:
    """A shell lets what it starts in the background ignore Ctrl-C, and all that this starts in turn: not here."""
    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _real_data(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, _own_cache_and_offline: None
) -> None:
    """Give a test marked ``real_data`` the cache and the network of whoever runs the tests."""
    if request.node.get_closest_marker("real_data") is None:
        return
    before = request.config.stash[_settings_of_the_user]
    for name in ("SHOAL_CACHE", "SHOAL_OFFLINE"):
        value = before[name]
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)


@pytest.fixture(autouse=True)
def _no_process_left_behind(_own_cache_and_offline: None) -> Iterator[None]:
    """Fail the test that leaves a process behind, then end that process, so that the next test starts clean.

    Processes of a fixture with a wider scope are older than the test and may stay, and so may what they start.
    """
    before = _our_processes()
    yield
    left = _started_since(before)
    deadline = time.monotonic() + GRACE_S
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = _started_since(before)
    if left:
        names = "; ".join(f"{process.pid}: {' '.join(_command(process)) or _status(process)}" for process in left)
        for process in left:
            _kill(process)
        pytest.fail(f"this test left processes behind: {names}", pytrace=False)


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _our_processes() -> set[psutil.Process]:
    """Return the descendants of this process, and orphans of this session."""
    ours, here, present = set(), os.getpid(), set(psutil.pids())
    _others.intersection_update(present)
    for pid in present - _others - {here}:
        try:
            process = psutil.Process(pid)
            if here in _ancestors(process) or _has_our_token(process):
                ours.add(process)
            else:
                _others.add(pid)
        except (psutil.Error, OSError):
            # Gone in the meantime.
            continue
    return ours


def _ancestors(process: psutil.Process) -> Iterator[int]:
    pid = process.ppid()
    while pid > 1:
        yield pid
        pid = psutil.Process(pid).ppid()


def _has_our_token(process: psutil.Process) -> bool:
    try:
        return process.environ().get(SESSION_VARIABLE) == os.environ[SESSION_VARIABLE]
    except (psutil.Error, OSError):
        # It has no environment that we may see, as a thread of the kernel.
        return False


def _started_since(before: set[psutil.Process]) -> list[psutil.Process]:
    left = []
    for process in _our_processes() - before:
        try:
            inherited = any(ancestor in before for ancestor in process.parents())
        except psutil.Error:
            continue
        # Python's resource tracker lives as long as the interpreter that first needed it, by design.
        if not inherited and not any("multiprocessing.resource_tracker" in word for word in _command(process)):
            left.append(process)
    return sorted(left, key=lambda process: process.pid)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _status(process: psutil.Process) -> str:
    try:
        return process.status()
    except psutil.Error:
        return "gone"


def _kill(process: psutil.Process) -> None:
    """End a process, and reap it where it is our own child: a zombie would be found again by the next test."""
    try:
        process.kill()
        process.wait(timeout=5)
    except (psutil.Error, OSError):
        pass
