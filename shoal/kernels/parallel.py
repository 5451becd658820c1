"""Running calls into C at the same time: ctypes lets go of the interpreter while C computes."""

from __future__ import annotations

import concurrent.futures
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch


def cut(images: int) -> list[tuple[int, int]]:
    """The (start, stop) of as many pieces of a batch as torch may use threads."""
    count = max(1, min(torch.get_num_threads(), images))
    bounds = [images * k // count for k in range(count + 1)]
    return list(zip(bounds[:-1], bounds[1:], strict=True))


def run_all(calls: Sequence[Callable[[], Any]]) -> None:
    """Run all calls, each on a thread of its own, and wait for them."""
    if len(calls) == 1:
        calls[0]()
        return
    for done in [_threads(len(calls)).submit(call) for call in calls]:
        done.result()


@functools.lru_cache(maxsize=1)
def _threads(count: int) -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(count, thread_name_prefix="shoal-kernel")


# Its threads are not there in a forked process, which would wait for them for ever.
os.register_at_fork(after_in_child=_threads.cache_clear)
