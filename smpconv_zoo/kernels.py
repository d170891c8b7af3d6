"""From points to kernels: the dense rendering that defines every answer, and the rendering by touched taps.

A kernel is read off its points tap by tap: the values of the points, weighted by their tents, are summed. The authors'
two code bases differ in one step, which is a named option here:

- ``"sum"``: the plain sum (their ImageNet networks);
- ``"count"``: the sum divided by the number of points that touch the tap (their sequence and CIFAR networks).

``render_kernel_reference`` evaluates every point at every tap. A point touches only the few taps within its radius,
so ``render_kernel`` visits those alone: on CPU with a list of touched taps (:func:`_touched_taps`), on NVIDIA GPUs with
:mod:`smpconv_zoo.gpu.render`. Both are one library operator with an explicit gradient; sums are taken in a fixed order.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from smpconv_zoo.gpu import why_no_triton
from smpconv_zoo.operators import gradient_operator, operator, transformed
from smpconv_zoo.points import tents, without_radius

__all__ = ["NORMALIZATIONS", "RENDERERS", "render_kernel", "render_kernel_reference"]

NORMALIZATIONS = ("sum", "count")
RENDERERS = ("scatter", "dense")

# Nanoseconds on CPU, forward and gradients: of the dense rendering per (point, tap) pair, and per pair and kernel; of
# the rendering by touched taps in any case, and per touched pair and kernel. Read off eval/results/synthesis_cpu.json.
_DENSE_NS = (3.5, 0.05)
_SCATTER_NS = (800_000, 4.4)


def render_kernel(
    coords: Tensor,
    radius: Tensor,
    weight: Tensor,
    grid: Tensor,
    normalization: str = "sum",
    renderer: str = "auto",
) -> Tensor:
    """Render kernels from points: ``kernel[o, i, tap] = sum_p weight[o, i, p] * tent[o, p, tap]``.

    Half-precision points are rendered in float32, and autocast does not apply: a tent is a difference of coordinates
    that half precision cannot hold.

    Args:
        coords: Positions, ``(points, d)`` shared by all channels, or ``(out, points, d)``.
        radius: Radii, ``(points,)`` or ``(out, points)``.
        weight: Values, ``(out, in, points)``.
        grid: Tap coordinates, ``(d, *taps)``; see :func:`smpconv_zoo.points.tap_grid`.
        normalization: ``"sum"``, or ``"count"`` to divide each tap by the number of points that touch it (+ 1e-6).
        renderer: ``"scatter"`` visits touched taps, ``"dense"`` all of them; ``"auto"`` takes what can run and is
            expected to be faster.

    Returns:
        ``(out, in, *taps)``, in the dtype of ``weight``.

    Raises:
        ValueError: An unknown ``normalization`` or ``renderer``, or a renderer that cannot take these tensors.
    """
    if torch.jit.is_scripting():
        return render_kernel_reference(coords, radius, weight, grid, normalization)
    else:
        return _render_outside_autocast(coords, radius, weight, grid, normalization, renderer)


def render_kernel_reference(
    coords: Tensor, radius: Tensor, weight: Tensor, grid: Tensor, normalization: str = "sum"
) -> Tensor:
    """The slow twin of :func:`render_kernel`: every point at every tap, ``(out, points, *taps)`` in memory."""
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


def _render_outside_autocast(
    coords: Tensor, radius: Tensor, weight: Tensor, grid: Tensor, normalization: str, renderer: str
) -> Tensor:
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization must be one of {NORMALIZATIONS}, got {normalization!r}")
    if renderer not in ("auto", *RENDERERS):
        raise ValueError(f"renderer must be 'auto' or one of {RENDERERS}, got {renderer!r}")
    device_type = weight.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            return _render(coords, radius, weight, grid, normalization, renderer)
    return _render(coords, radius, weight, grid, normalization, renderer)


def _render(coords: Tensor, radius: Tensor, weight: Tensor, grid: Tensor, normalization: str, renderer: str) -> Tensor:
    dtype = weight.dtype
    if dtype in (torch.float16, torch.bfloat16):
        coords, radius, weight, grid = coords.float(), radius.float(), weight.float(), grid.float()
    reason = _why_not_scatter(coords, radius, weight, grid) if renderer != "dense" else None
    if renderer == "scatter" and reason is not None:
        raise ValueError(f"renderer 'scatter' cannot run: {reason}")
    if renderer == "dense" or reason is not None:
        return render_kernel_reference(coords, radius, weight, grid, normalization).to(dtype)
    forced = renderer == "scatter"
    return _render_points(coords, radius, weight, grid, normalization == "count", forced).to(dtype)


def _why_not_scatter(coords: Tensor, radius: Tensor, weight: Tensor, grid: Tensor) -> str | None:
    device_type = weight.device.type
    if device_type not in ("cpu", "cuda", "meta"):
        return f"it runs on cpu and cuda, the points are on {device_type}"
    if not (coords.dtype == radius.dtype == weight.dtype == grid.dtype):
        return "positions, radii, values and grid must be of one dtype"
    if transformed():
        return "torch.func sees through PyTorch's own operators only"
    if device_type == "cuda":
        if weight.dtype != torch.float32:
            return f"its GPU kernel computes in float32, the points are {weight.dtype}"
        return why_no_triton()
    return None


@dataclasses.dataclass(frozen=True)
class _Touched:
    """The (point, tap) pairs within a radius, as lists of equal length, ordered by point and then by tap.

    ``point`` counts through all sets of points, ``place`` through (set, tap); ``distance`` is in radii, below 1.
    """

    point: Tensor
    place: Tensor
    distance: Tensor

    @property
    def tent(self) -> Tensor:
        """In (0, 1], rounded as the dense rendering rounds it."""
        return 1 - self.distance


def _touched_taps(coords: Tensor, radius: Tensor, grid: Tensor, limit: float) -> _Touched | None:
    """Which taps each point touches; None if they are more than ``limit``, or points or grid are not such as to tell.

    Args:
        coords: ``(sets, points, d)``.
        radius: ``(sets, points)``.
        grid: ``(d, *taps)``. Each axis must be monotone; its spacing may vary.
        limit: Pairs to visit at most.
    """
    axes = _axes(grid) if limit > 0 else None
    # What is not a number touches no taps that could be listed; what it gives the dense rendering says.
    if axes is None or bool(radius.isnan().any()) or bool(coords.isnan().any()):
        return None
    dims = len(axes)
    first, number = [], []
    for dim, axis in enumerate(axes):
        # Axis 0 of the coordinates runs along the last axis of the taps. One tap more at both ends: whether a tap at
        # the very edge is touched is decided by the tent itself, rounded as the dense rendering rounds it.
        ascending = axis[-1] >= axis[0]
        line = axis if ascending else axis.flip(0)
        low = torch.searchsorted(line, (coords[..., dim] - radius).contiguous()) - 1
        high = torch.searchsorted(line, (coords[..., dim] + radius).contiguous(), right=True) + 1
        low, high = low.clamp(0, len(line)), high.clamp(0, len(line))
        first.append((low if ascending else len(line) - high).flatten())
        number.append((high - low).flatten())
    pairs = number[0] if dims == 1 else number[0] * number[1]
    pairs = torch.where(without_radius(radius).flatten(), 0, pairs)
    total = int(pairs.sum())
    if total > limit:
        return None
    point = torch.repeat_interleave(pairs, output_size=total)
    rank = torch.arange(total, device=pairs.device) - (pairs.cumsum(0) - pairs)[point]
    column = first[0][point] + (rank if dims == 1 else rank % number[0][point])
    distance = (coords[..., 0].flatten()[point] - axes[0][column]).abs()
    tap = column
    if dims == 2:
        row = first[1][point] + rank // number[0][point]
        distance = distance + (coords[..., 1].flatten()[point] - axes[1][row]).abs()
        tap = row * len(axes[0]) + column
    distance = distance / radius.flatten()[point]
    keep = (1 - distance > 0).nonzero().squeeze(1)
    point = point[keep]
    place = point // coords.shape[1] * math.prod(grid.shape[1:]) + tap[keep]
    return _Touched(point, place, distance[keep])


def _axes(grid: Tensor) -> list[Tensor] | None:
    """Coordinates along the columns (and the rows) of a grid; None if it is not made of such, or not monotone."""
    if grid.dim() == 2:
        axes = [grid[0]]
    else:
        axes = [grid[0, 0], grid[1, :, 0]]
        if not (
            torch.equal(grid[0], axes[0].expand_as(grid[0])) and torch.equal(grid[1].T, axes[1].expand_as(grid[1].T))
        ):
            return None
    for axis in axes:
        step = axis.diff()
        if not (bool((step > 0).all()) or bool((step < 0).all())):
            return None
    return [axis.contiguous() for axis in axes]


def _sets(coords: Tensor, radius: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positions ``(sets, points, d)``, radii ``(sets, points)`` and values ``(sets, kernels, points)``."""
    if coords.dim() == 2:
        coords, radius = coords.unsqueeze(0), radius.unsqueeze(0)
    return coords, radius, weight.reshape(coords.shape[0], -1, weight.shape[2])


def _limit(values: Tensor, grid: Tensor, forced: bool) -> float:
    """How many touched pairs are still cheaper than all pairs; below zero if none are."""
    if forced:
        return math.inf
    sets, kernels, points = values.shape
    pairs = sets * points * math.prod(grid.shape[1:])
    dense = pairs * (_DENSE_NS[0] + _DENSE_NS[1] * kernels)
    return (dense - _SCATTER_NS[0]) / (_SCATTER_NS[1] * kernels)


def _factor(touched: _Touched, places: int, count: bool) -> Tensor:
    """What each pair contributes per unit of its point's value."""
    if not count:
        return touched.tent
    return touched.tent * _share(touched, places)


def _share(touched: _Touched, places: int) -> Tensor:
    """One over the number of points that touch the tap of each pair."""
    counts = torch.bincount(touched.place, minlength=places)[touched.place]
    return 1 / (counts.to(touched.distance.dtype) + 1e-6)


def _render_points_now(
    coords: Tensor, radius: Tensor, weight: Tensor, grid: Tensor, count: bool, forced: bool
) -> Tensor:
    if weight.is_cuda:
        from smpconv_zoo.gpu.render import render

        return render(coords.contiguous(), radius.contiguous(), weight.contiguous(), grid.contiguous(), count)
    points, radii, values = _sets(coords, radius, weight)
    touched = _touched_taps(points, radii, grid, _limit(values, grid, forced))
    if touched is None:
        return render_kernel_reference(coords, radius, weight, grid, "count" if count else "sum")
    taps = math.prod(grid.shape[1:])
    sets, kernels, n_points = values.shape
    kernel = weight.new_zeros(sets * kernels * taps)
    added = values.transpose(1, 2).reshape(sets * n_points, kernels)[touched.point]
    added = added * _factor(touched, sets * taps, count).unsqueeze(1)
    # place = set * taps + tap, and a kernel's taps lie together: (set, kernel, tap).
    at = touched.place // taps * (kernels * taps) + touched.place % taps
    at = at.unsqueeze(1) + torch.arange(kernels, device=at.device) * taps
    kernel.index_add_(0, at.flatten(), added.flatten())
    return kernel.view(*weight.shape[:2], *grid.shape[1:])


def _render_points_backward_now(
    grad: Tensor, coords: Tensor, radius: Tensor, weight: Tensor, grid: Tensor, count: bool, forced: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if weight.is_cuda:
        from smpconv_zoo.gpu.render import render_backward

        return render_backward(
            grad.contiguous(), coords.contiguous(), radius.contiguous(), weight.contiguous(), grid.contiguous(), count
        )
    points, radii, values = _sets(coords, radius, weight)
    touched = _touched_taps(points, radii, grid, _limit(values, grid, forced))
    if touched is None:
        # Autocast may be on where a backward pass is called, and would have its way with the products.
        with torch.autocast("cpu", enabled=False):
            return _dense_gradients(grad, coords, radius, weight, grid, count)
    taps = math.prod(grid.shape[1:])
    sets, kernels, n_points = values.shape
    by_kernel = grad.reshape(sets, kernels, taps)
    here = by_kernel[touched.place // taps, :, touched.place % taps]
    factor = _factor(touched, sets * taps, count)
    grad_values = weight.new_zeros(sets * n_points, kernels)
    grad_values.index_add_(0, touched.point, here * factor.unsqueeze(1))
    of_point = values.transpose(1, 2).reshape(sets * n_points, kernels)[touched.point]
    grad_tent = (here * of_point).sum(1)
    if count:
        grad_tent = grad_tent * _share(touched, sets * taps)
    reach = radii.flatten()[touched.point]
    grad_radius = radius.new_zeros(sets * n_points)
    grad_radius.index_add_(0, touched.point, grad_tent * touched.distance / reach)
    grad_coords = coords.new_zeros(sets * n_points, coords.shape[-1])
    for dim, axis in enumerate(_axes(grid) or []):
        tap = touched.place % taps
        at = axis[tap if grid.dim() == 2 else (tap % grid.shape[2] if dim == 0 else tap // grid.shape[2])]
        toward = torch.sign(at - points[..., dim].flatten()[touched.point])
        grad_coords[:, dim].index_add_(0, touched.point, grad_tent * toward / reach)
    grad_weight = grad_values.view(sets, n_points, kernels).transpose(1, 2).reshape(weight.shape)
    return grad_coords.view(coords.shape), grad_radius.view(radius.shape), grad_weight.contiguous()


def _dense_gradients(
    grad: Tensor, coords: Tensor, radius: Tensor, weight: Tensor, grid: Tensor, count: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the dense rendering, written out: inside an operator autograd does not record."""
    points, radii, values = _sets(coords, radius, weight)
    places = grid.flatten(1)
    distance = (points[..., :1] - places[0]).abs()
    for dim in range(1, grid.shape[0]):
        distance = distance + (points[..., dim : dim + 1] - places[dim]).abs()
    flat = without_radius(radii).unsqueeze(2)
    reach = torch.where(flat, 1, radii.unsqueeze(2))
    distance = distance / reach
    tent = torch.relu(torch.where(flat, 0, torch.ones_like(reach)) - distance)
    touched = tent > 0
    factor = 1 / (touched.sum(dim=1, keepdim=True, dtype=tent.dtype) + 1e-6) if count else tent.new_ones(1)
    by_kernel = grad.reshape(*values.shape[:2], -1)
    grad_values = torch.matmul(by_kernel, (tent * factor).transpose(1, 2))
    grad_tent = torch.matmul(values.transpose(1, 2), by_kernel) * factor * touched / reach
    # Infinitely far is not touched, and zero times infinity no number.
    grad_radius = (grad_tent * distance.clamp(max=1)).sum(2)
    toward = [torch.sign(places[dim] - points[..., dim : dim + 1]) for dim in range(grid.shape[0])]
    grad_coords = torch.stack([(grad_tent * sign).sum(2) for sign in toward], dim=-1)
    return grad_coords.view(coords.shape), grad_radius.view(radius.shape), grad_values.view(weight.shape)


def _fake_render(coords: Tensor, radius: Tensor, weight: Tensor, grid: Tensor, count: bool, forced: bool) -> Tensor:
    return weight.new_empty([*weight.shape[:2], *grid.shape[1:]])


def _fake_render_backward(
    grad: Tensor, coords: Tensor, radius: Tensor, weight: Tensor, grid: Tensor, count: bool, forced: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(coords), torch.empty_like(radius), torch.empty_like(weight)


def _save_render(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    coords, radius, weight, grid, ctx.count, ctx.forced = inputs
    ctx.save_for_backward(coords, radius, weight, grid)


def _render_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    coords, radius, weight, grid = ctx.saved_tensors
    if torch.is_grad_enabled():
        # Somebody differentiates the gradient: the dense rendering has derivatives of every order.
        with torch.enable_grad():
            kernel = render_kernel_reference(coords, radius, weight, grid, "count" if ctx.count else "sum")
        wanted = [t for t, needed in zip((coords, radius, weight), ctx.needs_input_grad, strict=False) if needed]
        found = iter(torch.autograd.grad(kernel, wanted, grad, create_graph=True))
        gradients = [next(found) if needed else None for needed in ctx.needs_input_grad[:3]]
    else:
        gradients = list(_render_points_backward(grad, coords, radius, weight, grid, ctx.count, ctx.forced))
    return (*gradients, None, None, None)


_render_points_backward = gradient_operator(
    "render_points_backward", _render_points_backward_now, _fake_render_backward
)
_render_points = operator("render_points", _render_points_now, _fake_render, _save_render, _render_gradients)
