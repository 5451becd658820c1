"""Matrix products of float32 are computed by oneDNN where it multiplies faster than the library that torch was built with.

torch multiplies by MKL, which takes its code for AVX2 on processors that are not Intel's, whatever they can do: on one core of an
AMD EPYC with AVX-512, 112 · 10⁹ operations a second against oneDNN's 250 (``kernels/onednn.py``).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from shoal.kernels.onednn import Products

NAME, ORDER, TRAINS, INFERS = "onednn_matmul", 60, True, True


def exchange(found: Callable[[], None]) -> Products:
    """What takes the products of this process over, and gives them back; ``found`` is called with each that is worth it."""
    return Products(found)


def gain() -> float:
    """How many times as fast this machine multiplies two matrices of 512 × 512 so, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    products, matrix = exchange(lambda: None), torch.ones(512, 512)
    least = [float("inf"), float("inf")]
    try:
        with torch.no_grad():
            for number in range(12):
                for way in (0, 1):
                    if way:
                        products.begin()
                    start = time.thread_time()
                    torch.mm(matrix, matrix)
                    took = time.thread_time() - start
                    products.end()
                    if number > 1:
                        least[way] = min(least[way], took)
    finally:
        torch.set_num_threads(threads)
    return least[0] / least[1]
