"""Work side by side on one GPU, where launching is free."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch

__all__ = ["beside", "join"]


def _capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


@functools.cache
def _side_stream(device: int, lane: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def beside(lane: int) -> Iterator[None]:
    """Launch onto another stream what does not wait for what comes next on this one; :func:`join` before it is used.

    Only while a CUDA graph is captured: the kernels of a sequence network leave most of the GPU idle, so two of them at
    once take hardly longer than one. Launched one by one they do not overlap anyway. What is allocated inside must live
    until the join.
    """
    if not _capturing():
        yield
        return
    side = _side_stream(torch.cuda.current_device(), lane)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield


def join(*lanes: int) -> None:
    """Let the current stream wait for what was launched :func:`beside` it."""
    if _capturing():
        for lane in lanes:
            torch.cuda.current_stream().wait_stream(_side_stream(torch.cuda.current_device(), lane))
