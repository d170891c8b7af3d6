"""Points and the taps they touch: the mathematics under every SMPConv kernel.

A point has a position in ``[-1, 1]^d`` and a radius in the same unit. It spreads its value by a tent,
``relu(1 - |tap - position|_1 / radius)``: one at its own position, zero from one radius away (Kim & Park, CVPR 2023,
arXiv 2304.02330, section 3). Taps are the places where a kernel is read off; they form a regular grid over
``[-1, 1]^d``, so one tap spacing is ``2 / (kernel_size - 1)`` of the unit.

Orientation, as in the authors' code: in one dimension the last tap, at +1, is the current sample. In two dimensions
coordinate 0 runs along the columns to the right and coordinate 1 along the rows *upward*.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["resampled_grid", "tap_grid", "tap_spacing", "tents", "without_radius"]


def tap_grid(
    kernel_size: Sequence[int],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Coordinates of every tap of a kernel.

    Args:
        kernel_size: Taps along each axis, ``(length,)`` or ``(height, width)``; at least 2 each.
        device: Device of the result.
        dtype: Floating-point type of the result.

    Returns:
        ``(length,)`` gives ``(1, length)``, from -1 for the oldest sample to +1 for the current one.
        ``(height, width)`` gives ``(2, height, width)``: ``[0]`` is x, to the right, ``[1]`` is y, upward.

    Raises:
        ValueError: Not one or two axes, or an axis of fewer than two taps.
    """
    if len(kernel_size) not in (1, 2):
        raise ValueError(f"kernel_size must have one or two axes, got {tuple(kernel_size)}")
    if min(kernel_size) < 2:
        raise ValueError(f"a kernel needs at least 2 taps along each axis, got {tuple(kernel_size)}")
    axes = [torch.linspace(-1, 1, steps=size, device=device, dtype=dtype) for size in kernel_size]
    if len(axes) == 1:
        return axes[0].unsqueeze(0)
    rows, columns = axes
    y, x = torch.meshgrid(rows.flip(0), columns, indexing="ij")
    return torch.stack((x, y))


def tap_spacing(kernel_size: Sequence[int]) -> float:
    """Distance between neighbouring taps along the axis with the fewest taps, in the unit of the coordinates."""
    return 2.0 / (min(kernel_size) - 1)


def resampled_grid(grid: Tensor, kernel_size: Sequence[int], ratio: Sequence[float]) -> Tensor:
    """Coordinates of taps that lie more, or less, densely than those of ``grid``, at exactly that spacing.

    One axis keeps its last tap, the current sample, in place; two axes keep their centre. Coordinates between the taps
    of ``grid`` are interpolated, so that a grid that has drifted stays so; beyond its ends they go on at the spacing
    found there. Whatever the number of taps, neighbours are ``1 / ratio`` old spacings apart: the new grid ends where
    its taps do, not at -1 and +1. With all ratios 1 the taps of ``grid`` come back bit for bit.

    Args:
        grid: ``(d, *taps)``; see :func:`tap_grid`.
        kernel_size: Taps wanted along each axis.
        ratio: New taps for one old one, along each axis, in the order of ``kernel_size``.

    Returns:
        ``(d, *kernel_size)``, in the dtype of ``grid``.
    """
    causal = grid.dim() == 2
    fine = grid.double()
    for axis, (taps, dense) in enumerate(zip(kernel_size, ratio, strict=True), start=1):
        old = fine.size(axis)
        index = torch.arange(taps, device=grid.device, dtype=torch.float64)
        # Where the new taps lie, counted in old ones.
        place = (old - 1) + (index - (taps - 1)) / dense if causal else (old - 1) / 2 + (index - (taps - 1) / 2) / dense
        below = place.floor().clamp(0, old - 2).long()
        share = (place - below).view([-1] + [1] * (fine.dim() - 1 - axis))
        first = fine.index_select(axis, below)
        fine = first + share * (fine.index_select(axis, below + 1) - first)
    return fine.to(grid.dtype)


def tents(coords: Tensor, radius: Tensor, grid: Tensor) -> Tensor:
    """Weight of every point at every tap: ``relu(1 - |tap - position|_1 / radius)``.

    Args:
        coords: Positions, ``(..., points, d)``.
        radius: Radii in the unit of the coordinates, ``(..., points)``.
        grid: Tap coordinates, ``(d, *taps)``; see :func:`tap_grid`.

    Returns:
        ``(..., points, *taps)``, in ``[0, 1]``; zero throughout for points of :func:`without_radius`, and so are their
        gradients.
    """
    taps = grid.dim() - 1
    distance = (_expand(coords[..., 0], taps) - grid[0]).abs()
    for axis in range(1, grid.size(0)):
        distance = distance + (_expand(coords[..., axis], taps) - grid[axis]).abs()
    # A tent of height 0 instead of one of no width: neither it nor its slope is divided by zero.
    flat = without_radius(radius)
    height = torch.where(flat, torch.zeros_like(radius), torch.ones_like(radius))
    reach = torch.where(flat, torch.ones_like(radius), radius)
    return torch.relu(_expand(height, taps) - distance / _expand(reach, taps))


def without_radius(radius: Tensor) -> Tensor:
    """Which points touch nothing: their radius is zero, below, or so near to zero that the slope of a tent overflows.

    No clipped radius is among them. What is not a number is none of them either: it must not pass for silence.
    """
    return radius <= 1e-12


def _expand(values: Tensor, dims: int) -> Tensor:
    """Append ``dims`` axes of size one, to broadcast values of points over taps."""
    for _ in range(dims):
        values = values.unsqueeze(-1)
    return values
