"""Triton kernels for NVIDIA GPUs. None of them is imported before a tensor on a GPU needs it.

:func:`why_no_triton` says whether they can be: all modules beside it but :mod:`.streams` import Triton at their top.
"""

from __future__ import annotations

import functools
import importlib.util

__all__ = ["cdiv", "next_power_of_2", "why_no_triton"]


@functools.cache
def why_no_triton() -> str | None:
    """None if Triton is installed, else the reason why its kernels cannot run."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; it comes with PyTorch's CUDA wheels for Linux: pip install triton"
    return None


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own helper is callable from kernels too, and slow to call from Python for that."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``, for positive ``n``."""
    return 1 << (n - 1).bit_length()
