import os
import threading

import pytest

from shoal.process.gentle import gently


def test_work_has_the_lowest_priority_and_nobody_else() -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)

    def look() -> tuple[int, int]:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), threading.get_native_id()

    priority, thread = gently(look)
    assert priority == 19 and thread != threading.get_native_id()
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
    child = os.fork()
    if child == 0:
        os._exit(os.getpriority(os.PRIO_PROCESS, 0) - before)
    assert os.waitpid(child, 0)[1] == 0


def test_what_it_raises_comes_through() -> None:
    with pytest.raises(ZeroDivisionError):
        gently(lambda: 1 / 0)
