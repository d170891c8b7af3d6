"""Rendering of kernels: by touched taps against the dense twin, in time and in memory, forward and gradients."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from smpconv_zoo.benchmarks.measure import graphed, median_ms, peak_bytes
from smpconv_zoo.kernels import render_kernel
from smpconv_zoo.layers import SMPConv1d, SMPConv2d

__all__ = ["SynthesisTime", "bench_synthesis"]

# Of the sequence networks: their lengths, and a radius of about a tap as they start with.
_LENGTHS = ((161, 0.012), (784, 0.002), (1024, 0.002), (16000, 0.0002))
# Of the image networks: (channels, size), points and radius by their defaults; 63 is larger than any of them has.
_MAPS = ((768, 13), (384, 27), (192, 29), (96, 31), (96, 63))
# Radii, in units of the kernel, on the way to where every point touches every tap.
_RADII = (0.002, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)


# Enough work for one CUDA graph that what it costs to start it does not count.
_IN_A_ROW = 10


@dataclasses.dataclass(frozen=True)
class SynthesisTime:
    """One kernel: milliseconds forward and backward, and bytes made beyond the kernel and its gradient.

    On a GPU as parts of a CUDA graph, as in a captured training step; backward is both together without forward.

    ``touched`` is the share of all (point, tap) pairs that are within a radius.
    """

    kernel: str
    touched: float
    dense_forward_ms: float
    dense_backward_ms: float
    dense_bytes: int
    scatter_forward_ms: float
    scatter_backward_ms: float
    scatter_bytes: int


def bench_synthesis(
    device: torch.device, repeats: int, progress: Callable[[int, int], None] | None = None
) -> list[SynthesisTime]:
    """Time every kernel size, then one size over radii up to 1.

    Args:
        device: Where.
        repeats: Of which the median counts.
        progress: Called after each kernel with those done and in all.
    """
    cases = list(_cases(device))
    results = []
    for name, layer in cases:
        results.append(_measure(name, layer, device, repeats))
        if progress is not None:
            progress(len(results), len(cases))
    return results


def _cases(device: torch.device) -> Iterator[tuple[str, SMPConv1d | SMPConv2d]]:
    torch.manual_seed(0)
    for length, radius in _LENGTHS:
        yield f"30 x 30 x {length}", SMPConv1d(30, 30, length, init_radius=radius, device=device)
    for channels, size in _MAPS:
        layer = SMPConv2d(channels, channels, size, groups=channels, device=device)
        yield f"{channels} x 1 x {size} x {size}", layer
    yield (
        "48 x 48 x 33 x 33",
        SMPConv2d(48, 48, 33, n_points=16, normalization="count", init_radius=0.12, device=device),
    )
    for radius in _RADII:
        yield f"30 x 30 x 784, radius {radius}", SMPConv1d(30, 30, 784, init_radius=radius, device=device)


def _measure(name: str, layer: SMPConv1d | SMPConv2d, device: torch.device, repeats: int) -> SynthesisTime:
    def render(renderer: str) -> Tensor:
        return render_kernel(
            layer.coords, layer.radius, layer.weight, layer.grid, layer.normalization, renderer=renderer
        )

    parameters = (layer.coords, layer.radius, layer.weight)
    grad = torch.randn_like(render("dense"))
    figures: dict[str, Any] = {}
    for renderer in ("dense", "scatter"):

        def both(renderer: str = renderer) -> Any:
            return torch.autograd.grad(render(renderer), parameters, grad)

        forward_ms = _time(functools.partial(render, renderer), device, repeats)
        figures[f"{renderer}_forward_ms"] = forward_ms
        figures[f"{renderer}_backward_ms"] = max(_time(both, device, repeats) - forward_ms, 0.0)
        figures[f"{renderer}_bytes"] = max(peak_bytes(both, device) - grad.nbytes, 0)
    return SynthesisTime(kernel=name, touched=_touched(layer), **figures)


def _time(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Milliseconds of ``work``; on a GPU without launching it."""
    if device.type == "cuda":
        return median_ms(graphed(work, _IN_A_ROW), device, repeats) / _IN_A_ROW
    return median_ms(work, device, repeats)


@torch.no_grad()
def _touched(layer: SMPConv1d | SMPConv2d) -> float:
    values = torch.ones_like(layer.weight[:, :1])
    sets = layer.coords.shape[0] if layer.coords.dim() == 3 else 1
    pairs = 0
    for point in range(layer.n_points):
        here = slice(point, point + 1)
        coords, radius = layer.coords[..., here, :], layer.radius[..., here]
        pairs += int((render_kernel(coords, radius, values[:sets, :, here], layer.grid) != 0).sum())
    return pairs / (sets * layer.n_points * layer.grid[0].numel())
