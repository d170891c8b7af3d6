"""Time and memory of a piece of work, and the record that is kept of a benchmark."""

from __future__ import annotations

import json
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smpconv_zoo.environment import hardware, versions
from smpconv_zoo.files import write_whole

__all__ = ["graphed", "median_ms", "peak_bytes", "record", "write_record"]


def median_ms(work: Callable[[], Any], device: torch.device, repeats: int = 10, warm_up: int = 2) -> float:
    """Median wall time of ``work`` in milliseconds, the GPU's work included."""
    for _ in range(warm_up):
        work()
    times = []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def graphed(work: Callable[[], Any], times: int = 1) -> Callable[[], None]:
    """``work``, so many times in a row, as one CUDA graph to replay: what the GPU takes for it, without launching."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            work()
    return graph.replay


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Most bytes of tensors alive at once that ``work`` made, beyond those alive before it."""
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveTensors() as live:
        work()
    return live.peak


class _LiveTensors(TorchDispatchMode):
    """Adds up the storages that operators make, as long as they live: a CPU keeps no such books itself."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_identity(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (key := _identity(leaf)) not in self._known | given:
                storage = leaf.untyped_storage()
                size = storage.nbytes()
                self._known.add(key)
                self._bytes += size
                weakref.finalize(storage, self._free, key, size)
        self.peak = max(self.peak, self._bytes)
        return result

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._bytes -= size


def _identity(tensor: Tensor) -> int:
    """Of a tensor's storage."""
    return tensor.untyped_storage()._cdata


def record(device: torch.device, **measured: Any) -> dict[str, Any]:
    """A benchmark's record: the command, what computed, and ``measured``."""
    return {
        "command": _command(sys.argv[1:]),
        "hardware": hardware(device),
        "versions": versions(),
        **measured,
    }


def _command(arguments: list[str]) -> str:
    """What was typed; of the place of the record only its name, since folders are nobody else's business."""
    named = [
        Path(argument).name if before == "--out" else argument
        for before, argument in zip(["", *arguments], arguments, strict=False)
    ]
    return " ".join(["smpconv-zoo", *named])


def write_record(path: Path, entry: dict[str, Any]) -> None:
    """Write a record as JSON."""
    write_whole(path, (json.dumps(entry, indent=1) + "\n").encode())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
