"""The depthwise convolution and both its gradients: every backend of this package, and PyTorch's own, at real sizes."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smpconv_zoo.benchmarks.measure import median_ms
from smpconv_zoo.ops import depthwise_conv2d, why_not

__all__ = ["DTYPES", "OperatorTime", "bench_operator", "floor_ms"]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# (channels, height, width, kernel): the stages of SMPConvNet-T at 224 and at 384 pixels, and a map of a detector.
_STAGES = ((96, 56, 56, 31), (192, 28, 28, 29), (384, 14, 14, 27), (768, 7, 7, 13))
_LARGER = ((96, 96, 96, 31), (192, 48, 48, 29), (384, 24, 24, 27), (768, 12, 12, 13))
_DETECTION = (96, 200, 304, 31)
# Bytes of rotating inputs: several times what any GPU's cache holds.
_ROTATING_BYTES = 256 * 2**20
_MOST_SETS = 8
_CALLS_PER_GRAPH = 8
# What takes longer is timed one call at a time, three times.
_SLOW_MS = 2.0


@dataclasses.dataclass(frozen=True)
class OperatorTime:
    """One backend at one size; times in milliseconds, None where it cannot run or was not asked for.

    ``floor`` is what reading and writing a map once takes at the speed that was measured for copies.
    """

    backend: str
    dtype: str
    batch: int
    channels: int
    height: int
    width: int
    kernel: int
    forward_ms: float | None
    input_ms: float | None
    weight_ms: float | None
    floor_ms: float | None
    note: str = ""


def bench_operator(
    device: torch.device,
    dtypes: list[str],
    batches: list[int],
    repeats: int,
    native: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[OperatorTime]:
    """Time all sizes. On a GPU: medians of graph replays over rotating inputs, so that no cache holds them.

    Args:
        device: Where.
        dtypes: Names out of :data:`DTYPES`.
        batches: Batch sizes for the four stages at 224 pixels; the largest at 384 pixels is 64, that of a detector 2.
        repeats: Of which the median counts.
        native: Whether PyTorch's own kernels are timed, too; they are slow.
        progress: Called after each backend at each size with those done and in all.
    """
    sizes = [(batch, *stage) for batch in batches for stage in _STAGES]
    largest = max(batches)
    if largest > 1:
        sizes += [(min(64, largest), *stage) for stage in _LARGER] + [(min(2, largest), *_DETECTION)]
    backends = ["cuda", "fft", *(["native", "native, channels last"] if native else [])]
    rate = _copy_rate(device) if device.type == "cuda" else None
    cases = list(itertools.product(sizes, dtypes, backends))
    results = []
    for done, (size, dtype, backend) in enumerate(cases, start=1):
        results.append(_measure(device, size, dtype, backend, repeats, rate))
        if progress is not None:
            progress(done, len(cases))
    return results


def floor_ms(batch: int, channels: int, height: int, width: int, dtype: torch.dtype, bytes_per_second: float) -> float:
    """Milliseconds to read a map and write one of the same size."""
    return 1e3 * 2 * batch * channels * height * width * dtype.itemsize / bytes_per_second


def _measure(
    device: torch.device,
    size: tuple[int, int, int, int, int],
    dtype_name: str,
    backend: str,
    repeats: int,
    rate: float | None,
) -> OperatorTime:
    batch, channels, height, width, kernel = size
    dtype = DTYPES[dtype_name]
    floor = None if rate is None else floor_ms(batch, channels, height, width, dtype, rate)
    torch.manual_seed(0)
    map_bytes = batch * channels * height * width * dtype.itemsize
    sets = max(2, min(_MOST_SETS, math.ceil(_ROTATING_BYTES / map_bytes))) if device.type == "cuda" else 1
    layout = torch.channels_last if backend.endswith("channels last") else torch.contiguous_format
    xs = [_random(batch, channels, height, width, device, dtype, layout) for _ in range(sets)]
    grads = [_random(batch, channels, height, width, device, dtype, layout) for _ in range(sets)]
    weight = torch.randn(channels, 1, kernel, kernel, device=device, dtype=dtype) / kernel
    times: list[float | None] = [None, None, None]
    note = ""
    if not backend.startswith("native"):
        reason = why_not(xs[0], weight)[backend]
        if reason is not None:
            return OperatorTime(backend, dtype_name, *size, None, None, None, floor, reason)
    try:
        # A backward pass runs on the stream of its forward pass: all of it on the one that is captured.
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            works = _work(backend, xs, grads, weight)
        times = [_time(work, sets, device, stream, repeats) for work in works]
    except torch.OutOfMemoryError:
        note = "out of memory"
    return OperatorTime(backend, dtype_name, *size, times[0], times[1], times[2], floor, note)


def _work(backend: str, xs: list[Tensor], grads: list[Tensor], weight: Tensor) -> list[Callable[[int], Any]]:
    """Forward, and the gradients to input and weight: of the i-th set of inputs."""
    padding = weight.size(2) // 2

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        if backend.startswith("native"):
            return F.conv2d(x, weight, padding=padding, groups=weight.size(0))
        return depthwise_conv2d(x, weight, backend=backend)

    # A gradient alone, without the forward pass: of the graph that a forward pass left.
    x_leaves = [x.detach().requires_grad_() for x in xs]
    weight_leaf = weight.detach().requires_grad_()
    with torch.enable_grad():
        to_x = [convolve(x, weight) for x in x_leaves]
        to_weight = [convolve(x, weight_leaf) for x in xs]

    def forward(i: int) -> Tensor:
        with torch.no_grad():
            return convolve(xs[i], weight)

    def input_gradient(i: int) -> Any:
        return torch.autograd.grad(to_x[i], x_leaves[i], grads[i], retain_graph=True)

    def weight_gradient(i: int) -> Any:
        return torch.autograd.grad(to_weight[i], weight_leaf, grads[i], retain_graph=True)

    return [forward, input_gradient, weight_gradient]


def _time(
    work: Callable[[int], Any], sets: int, device: torch.device, stream: torch.cuda.Stream | None, repeats: int
) -> float:
    if stream is None:
        return median_ms(lambda: work(0), device, repeats, warm_up=1)
    with torch.cuda.stream(stream):
        work(0)
        once = _elapsed_ms(lambda: work(min(1, sets - 1)))
    torch.cuda.current_stream(device).wait_stream(stream)
    calls = max(sets, _CALLS_PER_GRAPH)
    if once > _SLOW_MS:
        calls, repeats = 1, min(repeats, 3)
    graph = torch.cuda.CUDAGraph()
    # Outputs stay, so that each call writes to memory of its own.
    kept = []
    with torch.cuda.graph(graph, stream=stream):
        for i in range(calls):
            kept.append(work(i % sets))
    return statistics.median([_elapsed_ms(graph.replay) / calls for _ in range(repeats + 2)][2:])


def _elapsed_ms(work: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _copy_rate(device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy on the GPU."""
    source = torch.empty(2**29, device=device, dtype=torch.float32)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-3 * _time(lambda i: target.copy_(source), 1, device, torch.cuda.Stream(device), 5))


def _random(
    n: int, c: int, h: int, w: int, device: torch.device, dtype: torch.dtype, layout: torch.memory_format
) -> Tensor:
    return torch.randn(n, c, h, w, device=device, dtype=dtype).contiguous(memory_format=layout)
