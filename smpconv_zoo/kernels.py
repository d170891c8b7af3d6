"""From points to kernels: the dense rendering that defines every answer.

A kernel is read off its points tap by tap: the values of the points, weighted by their tents, are summed. The authors'
two code bases differ in one step, which is a named option here:

- ``"sum"``: the plain sum (their ImageNet networks);
- ``"count"``: the sum divided by the number of points that touch the tap (their sequence and CIFAR networks).
"""

from __future__ import annotations

import torch
from torch import Tensor

from smpconv_zoo.points import tents

__all__ = ["NORMALIZATIONS", "render_kernel"]

NORMALIZATIONS = ("sum", "count")


def render_kernel(coords: Tensor, radius: Tensor, weight: Tensor, grid: Tensor, normalization: str = "sum") -> Tensor:
    """Render kernels from points: ``kernel[o, i, tap] = sum_p weight[o, i, p] * tent[o, p, tap]``.

    Half-precision points are rendered in float32, and autocast does not apply: a tent is a difference of coordinates
    that half precision cannot hold.

    Args:
        coords: Positions, ``(points, d)`` shared by all channels, or ``(out, points, d)``.
        radius: Radii, ``(points,)`` or ``(out, points)``.
        weight: Values, ``(out, in, points)``.
        grid: Tap coordinates, ``(d, *taps)``; see :func:`smpconv_zoo.points.tap_grid`.
        normalization: ``"sum"``, or ``"count"`` to divide each tap by the number of points that touch it (+ 1e-6).

    Returns:
        ``(out, in, *taps)``, in the dtype of ``weight``.

    Raises:
        ValueError: ``normalization`` is neither of the two.
    """
    if torch.jit.is_scripting():
        return _render(coords, radius, weight, grid, normalization)
    else:
        return _render_outside_autocast(coords, radius, weight, grid, normalization)


def _render_outside_autocast(
    coords: Tensor, radius: Tensor, weight: Tensor, grid: Tensor, normalization: str
) -> Tensor:
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization must be one of {NORMALIZATIONS}, got {normalization!r}")
    device_type = weight.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            return _render(coords, radius, weight, grid, normalization)
    return _render(coords, radius, weight, grid, normalization)


def _render(coords: Tensor, radius: Tensor, weight: Tensor, grid: Tensor, normalization: str) -> Tensor:
    dtype = weight.dtype
    if dtype == torch.float16 or dtype == torch.bfloat16:
        coords, radius, weight, grid = coords.float(), radius.float(), weight.float(), grid.float()
    tent = tents(coords, radius, grid).flatten(1 - grid.dim())
    if normalization == "count":
        # The reciprocal first: the reference rounds in this order, and the count itself carries no gradient.
        tent = (1 / ((tent != 0).sum(dim=-2, keepdim=True, dtype=tent.dtype) + 1e-6)) * tent
    kernel = torch.matmul(weight, tent)
    shape = list(weight.shape[:2]) + list(grid.shape[1:])
    return kernel.view(shape).to(dtype)
