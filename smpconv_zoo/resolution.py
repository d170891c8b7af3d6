"""The same points read off at another grid: networks at another image size or sampling rate.

A kernel made of points is a function of place. A network that was trained at one spacing of taps computes sums that
stand for integrals of that function against the signal; on a grid ``ratio`` times as dense there are ``ratio`` terms
per axis for each old one, so that the values of the points have to shrink by about ``ratio`` per axis for the sums to
stay what they were. About: points are hardly wider than the spacing, and a sum over the few taps that one touches is a
rough stand-in for its integral. Each point therefore keeps its own sum over the taps, exactly; a point too narrow for
the new grid is widened to one spacing, so that none falls between the taps. docs/resolution.md derives it and shows
what was measured.

The ordinary kernels beside the continuous ones have no points. They are taken for what they are between their taps if
one draws straight lines, and resampled so that each tap keeps its share of the sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smpconv_zoo.layers import ActivatedPair, LargeSmallConv, SMPConv1d, SMPConv2d
from smpconv_zoo.points import resampled_grid, tents

__all__ = ["image_size", "resample_", "resample_kernel", "resample_points", "resample_state_dict", "resampled_taps"]

# Averaging over a training run has moved stored grids by up to 1e-4: that is the same spacing, and no resampling.
_SAME_SPACING = 1e-3


def image_size(img_size: Any) -> tuple[int, int]:
    """(height, width) from one number for both, or a pair.

    Raises:
        ValueError: Anything else, or a size below 1.
    """
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size) if _is_pair(img_size) else ()
    if len(size) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in size):
        raise ValueError(f"img_size must be a positive integer, or a pair (height, width) of them, got {img_size!r}")
    return size


def _is_pair(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def resampled_taps(taps: int, ratio: float, causal: bool) -> int:
    """Taps of a continuous kernel that covers the same stretch on a grid ``ratio`` times as dense.

    A tap stands for a cell as wide as the spacing. Two-dimensional kernels (``causal`` false) stay odd, at least 3: the
    odd number next to ``ratio * taps``, the lower of two. Causal ones take the nearest number, at least 2.
    """
    wanted = taps * ratio
    if causal:
        return max(2, math.floor(wanted + 0.5))
    return max(3, 2 * math.ceil((wanted - 1) / 2 - 0.5) + 1)


def resample_kernel(
    weight: Tensor, ratio: Sequence[float], causal: bool, kernel_size: Sequence[int] | None = None
) -> Tensor:
    """An ordinary kernel for a grid ``ratio`` times as dense.

    On a denser grid the kernel is interpolated between its taps, on a coarser one each tap is shared by the two new
    ones around it. Either way every tap keeps its sum: a constant signal gives the same answer.

    Args:
        weight: ``(out, in, *taps)``.
        ratio: New taps for one old one, along each axis of the taps.
        causal: Whether the last tap stays in place, or the centre.
        kernel_size: Taps wanted; as many as are not zero if None.
    """
    for axis, dense in enumerate(ratio):
        if dense == 1 and kernel_size is None:
            continue
        taps = weight.size(2 + axis)
        # Old taps before the centre, or before the current sample; then the same of the new kernel.
        before = (taps - 1) if causal else (taps - 1) / 2
        reach = max(0, math.ceil((before + 1) * dense - 1e-9) - 1 if dense >= 1 else math.ceil(before * dense - 1e-9))
        full = reach + 1 if causal else 2 * reach + 1
        new = torch.arange(full, device=weight.device, dtype=torch.float64) - reach
        old = torch.arange(taps, device=weight.device, dtype=torch.float64) - before
        distance = (new[:, None] - dense * old).abs()
        share = torch.relu(1 - distance / max(dense, 1.0))
        share = share / share.sum(0)
        if kernel_size is not None:
            share = _cut(share, kernel_size[axis], causal)
        moved = torch.tensordot(weight.double(), share, dims=([2 + axis], [1]))
        weight = moved.movedim(-1, 2 + axis).to(weight.dtype)
    return weight.contiguous()


def _cut(share: Tensor, taps: int, causal: bool) -> Tensor:
    """Rows taken away, or empty ones added, at the old end or at both."""
    more = taps - share.size(0)
    first = more if causal else more // 2
    return nn.functional.pad(share, (0, 0, first, more - first))


def resample_points(
    coords: Tensor, radius: Tensor, weight: Tensor, grid: Tensor, new_grid: Tensor, normalization: str
) -> tuple[Tensor, Tensor]:
    """Radii and values of points for another grid, such that each point keeps its sum over the taps.

    Args:
        coords: Positions, ``(points, d)`` or ``(out, points, d)``; they stay as they are.
        radius: Radii, ``(points,)`` or ``(out, points)``.
        weight: Values, ``(out, in, points)``.
        grid: Tap coordinates, ``(d, *taps)``.
        new_grid: The same of the other grid.
        normalization: ``"sum"`` or ``"count"``; see :mod:`smpconv_zoo.kernels`.

    Returns:
        Radii, widened to the new spacing where they are below it, and values. A point that touches no tap of ``grid``
        was never heard, and gets the value zero.
    """
    before = _sums(coords, radius, grid, normalization)
    heard = before > 0
    widened = torch.where(heard, radius.clamp(min=max(_spacings(new_grid))), radius)
    after = _sums(coords, widened, new_grid, normalization)
    factor = torch.where(heard & (after > 0), before / after, 0).to(weight.dtype)
    return widened, weight * (factor if factor.dim() == 1 else factor.unsqueeze(1))


def _sums(coords: Tensor, radius: Tensor, grid: Tensor, normalization: str) -> Tensor:
    """Sum of each point's share in the kernel over all taps, shaped like ``radius``."""
    if coords.dim() == 3:
        # One output channel at a time: of a long kernel, the tents of all would take gigabytes.
        return torch.stack([_sums(c, r, grid, normalization) for c, r in zip(coords, radius, strict=True)])
    tent = tents(coords.float(), radius.float(), grid.float()).flatten(1)
    if normalization == "count":
        tent = tent / ((tent > 0).sum(dim=0, keepdim=True) + 1e-6)
    return tent.sum(dim=1, dtype=torch.float64)


def _pairs(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, ActivatedPair | LargeSmallConv) and isinstance(module.large.conv, SMPConv1d | SMPConv2d):
            yield name, module


def resample_(model: nn.Module, ratio: Sequence[float], kernel_sizes: Mapping[str, int] | None = None) -> None:
    """Read off every SMPConv layer of ``model`` at another grid, in place; the small kernels beside them follow.

    Positions stay; values, grids, small kernels and radii below one spacing change. Small kernels are new parameters:
    make an optimizer afterwards. With ratio 1 nothing is touched.

    Args:
        model: A network, or any module with SMPConv layers.
        ratio: New samples for one old one: along time, or along height and width.
        kernel_sizes: Taps of single layers, by name; those of :func:`resampled_taps` if not given.

    Raises:
        ValueError: A ratio that is no positive number, or no SMPConv layer of as many axes.
    """
    if not all(math.isfinite(dense) and dense > 0 for dense in ratio):
        raise ValueError(f"the ratio of two grids must be a positive number, got {tuple(ratio)}")
    kind = SMPConv1d if len(ratio) == 1 else SMPConv2d
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, kind)}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no {kind.__name__} layers to read off at another grid; if it was "
            "reparameterized, change its size before"
        )
    causal = len(ratio) == 1
    small = {f"{name}.large.conv" if name else "large.conv": pair.small.conv for name, pair in _pairs(model)}
    for name, layer in layers.items():
        taps = tuple(resampled_taps(taps, dense, causal) for taps, dense in zip(layer.kernel_size, ratio, strict=True))
        if kernel_sizes is not None and name in kernel_sizes:
            taps = (kernel_sizes[name],) * len(ratio)
        if all(dense == 1 for dense in ratio) and taps == layer.kernel_size:
            continue
        grid = resampled_grid(layer.grid, taps, ratio)
        with torch.no_grad():
            if any(dense != 1 for dense in ratio) and not grid.is_meta:
                radius, weight = resample_points(
                    layer.coords, layer.radius, layer.weight, layer.grid, grid, layer.normalization
                )
                layer.radius.copy_(radius)
                layer.weight.copy_(weight)
        layer.grid = grid
        layer.kernel_size = taps
        layer.density = tuple(had * dense for had, dense in zip(layer.density, ratio, strict=True))
        if name in small:
            _resample_small_(small[name], ratio)


def _resample_small_(conv: Any, ratio: Sequence[float]) -> None:
    weight = conv.weight
    with torch.no_grad():
        conv.weight = nn.Parameter(resample_kernel(weight, ratio, len(ratio) == 1), weight.requires_grad)
    conv.kernel_size = tuple(conv.weight.shape[2:])
    if isinstance(conv, nn.Conv2d):
        conv.padding = tuple(taps // 2 for taps in conv.kernel_size)


def resample_state_dict(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights of the same points at another grid, made to fit the grids of ``model``; others are left as they are.

    How much denser the grids of ``model`` are is read off both: points keep their unit whatever the grid. Where the
    spacing agrees, the stored grid and all that belongs to it stay as they are, bit for bit; where the stored spacing
    is that with which the layer was built, the ratio is exact and the drift of a stored grid goes over into the new.
    """
    out = dict(state_dict)
    small = {f"{name}.large.conv" if name else "large.conv": name for name, _ in _pairs(model)}
    for name, layer in model.named_modules():
        if not isinstance(layer, SMPConv1d | SMPConv2d) or layer.grid.is_meta:
            continue
        prefix = f"{name}." if name else ""
        stored, weight = state_dict.get(f"{prefix}grid"), state_dict.get(f"{prefix}weight")
        if stored is None or weight is None or stored.dim() != layer.grid.dim() or min(stored.shape[1:]) < 2:
            continue
        ratio = [old / new for old, new in zip(_spacings(stored), _spacings(layer.grid), strict=True)]
        if not all(math.isfinite(dense) and dense > 0 for dense in ratio):
            continue
        if all(abs(dense / built - 1) < _SAME_SPACING for dense, built in zip(ratio, layer.density, strict=True)):
            ratio = list(layer.density)
        same = all(abs(dense - 1) < _SAME_SPACING for dense in ratio)
        if same and stored.shape == layer.grid.shape:
            continue
        grid = resampled_grid(stored, layer.kernel_size, [1.0] * len(ratio) if same else ratio)
        out[f"{prefix}grid"] = grid
        if same:
            continue
        coords, radius = state_dict.get(f"{prefix}coords"), state_dict.get(f"{prefix}radius")
        if coords is None or radius is None or coords.shape != layer.coords.shape or radius.shape != layer.radius.shape:
            continue
        out[f"{prefix}radius"], out[f"{prefix}weight"] = resample_points(
            coords, radius, weight, stored, grid, layer.normalization
        )
        if name in small:
            key = f"{small[name]}.small.conv.weight" if small[name] else "small.conv.weight"
            beside: Any = model.get_submodule(key.removesuffix(".weight"))
            if key in out and out[key].dim() == beside.weight.dim():
                out[key] = resample_kernel(out[key], ratio, len(ratio) == 1, beside.kernel_size)
    return out


def _spacings(grid: Tensor) -> list[float]:
    """Mean distance of neighbouring taps along each axis of the taps: of rows, then of columns."""
    lines = [grid[0]] if grid.dim() == 2 else [grid[1, :, 0], grid[0, 0]]
    return [abs(float(line[-1]) - float(line[0])) / (len(line) - 1) for line in lines]
