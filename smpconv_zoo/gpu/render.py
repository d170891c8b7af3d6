"""Rendering kernels from points, and its gradients, without a tensor of points x taps.

Forward: a program renders one block of taps of one set of kernels. It evaluates the tents of all points there in
registers, skips points that do not reach the block, and multiplies by the values.

Backward: a program belongs to one point. It walks over the blocks of taps that the point touches and adds up, in a
fixed order, the gradients to its position, its radius and its values. Nothing is accumulated by atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smpconv_zoo.gpu import cdiv, next_power_of_2, on_the_device_of_tensors

__all__ = ["render", "render_backward"]

# As smpconv_zoo.points.without_radius has it.
NO_RADIUS = tl.constexpr(1e-12)


@triton.jit
def _distance(coords, grid, taps, T, in_taps, points, in_points, D: tl.constexpr):
    """|tap - position|_1, (points, taps); far away where a point or a tap does not exist."""
    c = tl.load(coords + points * D, mask=in_points, other=0.0)
    g = tl.load(grid + taps, mask=in_taps, other=0.0)
    distance = tl.abs(c[:, None] - g[None, :])
    if D == 2:
        c = tl.load(coords + points * D + 1, mask=in_points, other=0.0)
        g = tl.load(grid + T + taps, mask=in_taps, other=0.0)
        distance += tl.abs(c[:, None] - g[None, :])
    return tl.where(in_points[:, None] & in_taps[None, :], distance, float("inf"))


@triton.jit
def _tents(coords, radius, grid, taps, T, in_taps, points, in_points, D: tl.constexpr):
    distance = _distance(coords, grid, taps, T, in_taps, points, in_points, D)
    r = tl.load(radius + points, mask=in_points, other=1.0)
    flat = r <= NO_RADIUS
    r = tl.where(flat, 1.0, r)
    # Rounded division: the support must be that of the dense rendering, tap for tap.
    # A position that is not a number must not pass for a point without taps, or a diverged training looks sound.
    tent = tl.where(flat, 0.0, 1.0)[:, None] - tl.div_rn(distance, tl.broadcast_to(r[:, None], distance.shape))
    return tl.maximum(tent, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _counts(coords, radius, grid, taps, T, in_taps, P, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr):
    """How many points touch each tap, (taps,)."""
    count = tl.zeros([BLOCK_T], tl.float32)
    for p in range(0, P, BLOCK_P):
        points = p + tl.arange(0, BLOCK_P)
        tent = _tents(coords, radius, grid, taps, T, in_taps, points, points < P, D)
        count += tl.sum((tent != 0).to(tl.float32), axis=0)
    return count


@triton.jit
def _render_kernel(
    coords, radius, weight, grid, kernel, R, P, T,
    D: tl.constexpr, COUNT: tl.constexpr, SINGLE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    row_blocks = tl.cdiv(R, BLOCK_R)
    s = tl.program_id(1) // row_blocks
    rows = tl.program_id(1) % row_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    taps = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_rows, in_taps = rows < R, taps < T
    coords += s * P * D
    radius += s * P
    at = (s.to(tl.int64) * R + rows)[:, None]
    total = tl.zeros([BLOCK_R, BLOCK_T], tl.float32)
    points = tl.arange(0, BLOCK_P)
    if SINGLE:
        in_points = points < P
        tent = _tents(coords, radius, grid, taps, T, in_taps, points, in_points, D)
        count = tl.sum((tent != 0).to(tl.float32), axis=0)
        if tl.max(count, axis=0) > 0:
            if COUNT:
                tent *= tl.div_rn(tl.full([BLOCK_T], 1.0, tl.float32), count + 1e-6)[None, :]
            values = tl.load(weight + at * P + points[None, :], mask=in_rows[:, None] & in_points[None, :], other=0.0)
            total = tl.dot(values, tent, total, input_precision="ieee")
    else:
        factor = tl.full([BLOCK_T], 1.0, tl.float32)
        if COUNT:
            count = _counts(coords, radius, grid, taps, T, in_taps, P, D, BLOCK_P, BLOCK_T)
            factor = tl.div_rn(factor, count + 1e-6)
        for p in range(0, P, BLOCK_P):
            here = p + points
            in_points = here < P
            tent = _tents(coords, radius, grid, taps, T, in_taps, here, in_points, D)
            if tl.max(tl.max((tent != 0).to(tl.int32), axis=1), axis=0) > 0:
                values = tl.load(weight + at * P + here[None, :], mask=in_rows[:, None] & in_points[None, :], other=0.0)
                total = tl.dot(values, tent * factor[None, :], total, input_precision="ieee")
    tl.store(kernel + at * T + taps[None, :], total, mask=in_rows[:, None] & in_taps[None, :])


@triton.jit
def _render_backward_kernel(
    grad, coords, radius, weight, grid, grad_coords, grad_radius, grad_weight, R, P, T,
    D: tl.constexpr, COUNT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0)
    s = tl.program_id(1).to(tl.int64)
    coords += s * P * D
    radius += s * P
    grad += s * R * T
    weight += s * R * P
    grad_weight += s * R * P
    cx = tl.load(coords + p * D)
    cy = cx
    if D == 2:
        cy = tl.load(coords + p * D + 1)
    r = tl.load(radius + p)
    flat = r <= NO_RADIUS
    r = tl.where(flat, 1.0, r)
    to_x = tl.zeros([BLOCK_T], tl.float32)
    to_y = tl.zeros([BLOCK_T], tl.float32)
    to_r = tl.zeros([BLOCK_T], tl.float32)
    # With more rows than one block holds, the gradients to the values are added up in memory, by this program alone.
    first = tl.zeros([BLOCK_R], tl.float32)
    # Where the touched taps begin and end.
    lowest = tl.full([SCAN], 2147483647, tl.int32)
    highest = tl.full([SCAN], -1, tl.int32)
    for t in range(0, T, SCAN):
        taps = t + tl.arange(0, SCAN)
        in_taps = taps < T
        distance = tl.abs(tl.load(grid + taps, mask=in_taps, other=float("inf")) - cx)
        if D == 2:
            distance += tl.abs(tl.load(grid + T + taps, mask=in_taps, other=0.0) - cy)
        # One rounding more or less does not matter here: the tent decides below.
        near = distance <= tl.where(flat, -1.0, r * 1.001)
        lowest = tl.minimum(lowest, tl.where(near, taps, 2147483647))
        highest = tl.maximum(highest, tl.where(near, taps, -1))
    begin = tl.min(lowest, axis=0)
    end = tl.max(highest, axis=0) + 1
    for t in range(begin, end, BLOCK_T):
        taps = t + tl.arange(0, BLOCK_T)
        in_taps = taps < T
        dx = tl.load(grid + taps, mask=in_taps, other=0.0) - cx
        dy = tl.zeros([BLOCK_T], tl.float32)
        if D == 2:
            dy = tl.load(grid + T + taps, mask=in_taps, other=0.0) - cy
        distance = tl.where(in_taps, tl.abs(dx) + tl.abs(dy), float("inf"))
        tent = tl.maximum(1 - tl.div_rn(distance, tl.broadcast_to(r, distance.shape)), 0.0)
        if tl.max(tent, axis=0) > 0:
            touched = tent > 0
            factor = tl.full([BLOCK_T], 1.0, tl.float32)
            if COUNT:
                count = _counts(coords, radius, grid, taps, T, in_taps, P, D, BLOCK_P, BLOCK_T)
                factor = tl.div_rn(factor, count + 1e-6)
            to_tent = tl.zeros([BLOCK_T], tl.float32)
            for row in range(0, R, BLOCK_R):
                rows = row + tl.arange(0, BLOCK_R)
                in_rows = rows < R
                g = tl.load(
                    grad + rows[:, None] * T + taps[None, :], mask=in_rows[:, None] & touched[None, :], other=0.0
                )
                values = tl.load(weight + rows * P + p, mask=in_rows, other=0.0)
                to_tent += tl.sum(g * values[:, None], axis=0)
                to_values = tl.sum(g * (tent * factor)[None, :], axis=1)
                if R <= BLOCK_R:
                    first += to_values
                else:
                    at = grad_weight + rows * P + p
                    tl.store(at, tl.load(at, mask=in_rows, other=0.0) + to_values, mask=in_rows)
            to_tent = tl.where(touched, to_tent * factor, 0.0)
            to_x += to_tent * tl.where(dx > 0, 1.0, tl.where(dx < 0, -1.0, 0.0))
            to_y += to_tent * tl.where(dy > 0, 1.0, tl.where(dy < 0, -1.0, 0.0))
            to_r += to_tent * tl.where(touched, distance, 0.0)
    if R <= BLOCK_R:
        rows = tl.arange(0, BLOCK_R)
        tl.store(grad_weight + rows * P + p, first, mask=rows < R)
    tl.store(grad_coords + (s * P + p) * D, tl.sum(to_x, axis=0) / r)
    if D == 2:
        tl.store(grad_coords + (s * P + p) * D + 1, tl.sum(to_y, axis=0) / r)
    tl.store(grad_radius + s * P + p, tl.sum(to_r, axis=0) / (r * r))


@on_the_device_of_tensors
def render(coords: Tensor, radius: Tensor, weight: Tensor, grid: Tensor, count: bool) -> Tensor:
    """float32 points -> kernels; shapes as in :func:`smpconv_zoo.kernels.render_kernel`, all contiguous."""
    sets, rows, points, taps, dims = _sizes(coords, weight, grid)
    kernel = torch.empty(*weight.shape[:2], *grid.shape[1:], dtype=torch.float32, device=weight.device)
    block_r = min(64, max(16, next_power_of_2(rows)))
    block_t = 64
    _render_kernel[(cdiv(taps, block_t), sets * cdiv(rows, block_r))](
        coords, radius, weight, grid, kernel, rows, points, taps,
        D=dims, COUNT=count, SINGLE=points <= 32, BLOCK_R=block_r, BLOCK_P=32, BLOCK_T=block_t, num_warps=4,
    )  # fmt: skip
    return kernel


@on_the_device_of_tensors
def render_backward(
    grad: Tensor, coords: Tensor, radius: Tensor, weight: Tensor, grid: Tensor, count: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to ``coords``, ``radius`` and ``weight`` from ``grad`` of the kernel's shape, contiguous."""
    sets, rows, points, taps, dims = _sizes(coords, weight, grid)
    grad_coords, grad_radius, grad_weight = torch.empty_like(coords), torch.empty_like(radius), torch.zeros_like(weight)
    block_r = min(64, max(16, next_power_of_2(rows)))
    _render_backward_kernel[(points, sets)](
        grad, coords, radius, weight, grid, grad_coords, grad_radius, grad_weight, rows, points, taps,
        D=dims, COUNT=count, BLOCK_R=block_r, BLOCK_P=32, BLOCK_T=16, SCAN=1024, num_warps=2,
    )  # fmt: skip
    return grad_coords, grad_radius, grad_weight


def _sizes(coords: Tensor, weight: Tensor, grid: Tensor) -> tuple[int, int, int, int, int]:
    sets = 1 if coords.dim() == 2 else coords.shape[0]
    rows = weight.shape[0] * weight.shape[1] // sets
    return sets, rows, weight.shape[2], grid[0].numel(), grid.shape[0]
