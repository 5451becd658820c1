"""Matrix products of float32 are computed by oneDNN where it multiplies faster than the library that torch was built with.

torch multiplies by MKL, which takes its code for AVX2 on processors that are not Intel's, whatever they can do: on one core of an
AMD EPYC with AVX-512, 112 · 10⁹ operations a second against oneDNN's 250 (``kernels/onednn.py``).
"""

from __future__ import annotations

from collections.abc import Callable

from shoal.kernels.onednn import Products

NAME, ORDER, TRAINS, INFERS = "onednn_matmul", 60, True, True


def exchange(found: Callable[[], None]) -> Products:
    """What takes the products of this process over, and gives them back; ``found`` is called when one is worth it."""
    return Products(found)
