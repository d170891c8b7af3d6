"""Triton kernels for NVIDIA GPUs. None of them is imported before a tensor on a GPU needs it.

:func:`why_no_triton` says whether they can be: all modules beside it but :mod:`.streams` import Triton at their top.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["cdiv", "next_power_of_2", "on_the_device_of_tensors", "why_no_triton"]

# TF32, of which the matrix products are made, came with the A100.
_OLDEST_CAPABILITY = (8, 0)

Function = TypeVar("Function", bound=Callable[..., Any])


@functools.cache
def why_no_triton() -> str | None:
    """None if Triton's kernels can run wherever there is an NVIDIA GPU, else the reason why they cannot."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; it comes with PyTorch's CUDA wheels for Linux: pip install triton"
    if torch.version.hip is not None:
        return "the kernels were made for NVIDIA GPUs, this PyTorch is for AMD's"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler when it launches a kernel for the first time: install gcc, or set CC"
    for device in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(device)
        if capability < _OLDEST_CAPABILITY:
            name = torch.cuda.get_device_name(device)
            return f"the kernels need compute capability 8.0, {name} has {capability[0]}.{capability[1]}"
    return None


def on_the_device_of_tensors(function: Function) -> Function:
    """Run a function with the GPU of its first tensor as the current one: Triton and streams know no other."""

    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        tensor = next((argument for argument in arguments if isinstance(argument, Tensor)), None)
        with torch.cuda.device_of(tensor):
            return function(*arguments, **options)

    return run  # type: ignore[return-value]


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own helper is callable from kernels too, and slow to call from Python for that."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``, for positive ``n``."""
    return 1 << (n - 1).bit_length()
