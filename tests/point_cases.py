"""Points to render, easy and hard ones, and how far two renderings of them may differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from hypothesis import strategies as st
from tolerances import RELATIVE_ERROR
from torch import Tensor

from smpconv_zoo.kernels import render_kernel_reference
from smpconv_zoo.points import tap_grid, tents

DTYPES = (torch.float32, torch.float64)
VALUES = {torch.float32: RELATIVE_ERROR["rendered"], torch.float64: 1e-12}
GRADIENTS = {torch.float32: RELATIVE_ERROR["rendered, gradient"], torch.float64: 1e-12}


@dataclasses.dataclass
class Points:
    """One case: points, the grid, and a gradient to the kernel."""

    coords: Tensor
    radius: Tensor
    weight: Tensor
    grid: Tensor
    upstream: Tensor

    def leaves(self) -> list[Tensor]:
        return [leaf.detach().clone().requires_grad_() for leaf in (self.coords, self.radius, self.weight)]


def random_points(
    size: Sequence[int],
    shared: bool = False,
    dtype: torch.dtype = torch.float32,
    n_points: int = 9,
    radius: tuple[float, float] = (0.02, 0.3),
    channels: tuple[int, int] = (3, 2),
    seed: int = 0,
) -> Points:
    """Points all over the kernel and a little outside."""
    generator = torch.Generator().manual_seed(seed)
    sets = () if shared else (channels[0],)
    coords = torch.empty(*sets, n_points, len(size), dtype=torch.float64).uniform_(-1.1, 1.1, generator=generator)
    radii = torch.empty(*sets, n_points, dtype=torch.float64).uniform_(*radius, generator=generator)
    weight = torch.randn(*channels, n_points, dtype=torch.float64, generator=generator)
    upstream = torch.randn(*channels, *size, dtype=torch.float64, generator=generator)
    return Points(coords.to(dtype), radii.to(dtype), weight.to(dtype), tap_grid(size, dtype=dtype), upstream.to(dtype))


def sizes_without_cancellation(points: Points, normalization: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What the kernel and its gradients would be if no two terms had opposite signs: rounding is measured by that."""
    coords, radius, weight = points.coords.double(), points.radius.double(), points.weight.double().abs()
    upstream, grid = points.upstream.double().abs().flatten(2), points.grid.double()
    tent = tents(coords, radius, grid).flatten(-grid.dim() + 1)
    # Double precision may see other edges; a tap more or less there has a tent of nearly zero.
    touched = (tent > 0).double()
    factor = 1 / (touched.sum(-2, keepdim=True) + 1e-6) if normalization == "count" else torch.ones_like(touched)
    kernel = torch.matmul(weight, tent * factor)
    to_tent = torch.matmul(weight.transpose(1, 2), upstream)
    if points.coords.dim() == 2:
        to_tent = to_tent.sum(0)
    to_coords = (to_tent * factor * touched).sum(-1) / radius
    to_weight = torch.matmul(upstream, (tent * factor).transpose(-1, -2))
    to_radius = (to_tent * factor * touched * (1 - tent)).sum(-1) / radius
    return kernel, (to_coords.unsqueeze(-1).expand_as(coords), to_radius, to_weight)


def assert_close(ours: Tensor, twin: Tensor, size: Tensor, tolerance: float, what: str) -> None:
    assert ours.shape == twin.shape and ours.dtype == twin.dtype, what
    assert torch.isfinite(ours).all(), what
    difference = float((ours.double() - twin.double()).norm())
    scale = max(float(size.norm()), float(twin.double().norm()))
    assert difference <= tolerance * scale, f"{what}: {difference:.2e} of {scale:.2e}, allowed {tolerance:.0e}"


@st.composite
def any_points(draw: st.DrawFn, axes: int, dtypes: Sequence[torch.dtype] = DTYPES) -> Points:
    """Points where it is hard: on taps, a radius away from taps, coincident, outside; radii at both bounds."""
    dtype = draw(st.sampled_from(dtypes))
    size = draw(st.tuples(*[st.integers(2, 65 if axes == 1 else 9)] * axes))
    grid = tap_grid(size, dtype=dtype)
    if draw(st.booleans()):
        grid = grid * (1 - 1e-4)
    newest = draw(st.integers(1, size[-1]))
    if draw(st.booleans()):
        # The newest taps only, as a layer renders them for a short sequence; down to a single one.
        grid = grid[..., size[-1] - newest :]
    lines = [grid[0].flatten()[: grid.shape[-1]], *([grid[1, :, 0]] if axes == 2 else [])]
    spacing = 2 / (max(size) - 1)
    sets, count = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    shared = draw(st.booleans())
    coords = torch.zeros(1 if shared else sets, count, axes, dtype=dtype)
    radius = torch.zeros(1 if shared else sets, count, dtype=dtype)
    for s in range(len(coords)):
        for p in range(count):
            if p and draw(st.integers(0, 4)) == 0:
                coords[s, p], radius[s, p] = coords[s, 0], radius[s, 0]
                continue
            radius[s, p] = draw(st.sampled_from([1e-4, 1.0, spacing, spacing / 2]) | st.floats(1e-3, 1.0))
            on_edge = draw(st.integers(-1, axes - 1))
            for axis, line in enumerate(lines):
                place = draw(st.one_of(st.integers(0, len(line) - 1), st.floats(-1.5, 1.5), st.sampled_from([-2, 2])))
                if isinstance(place, int) and abs(place) < len(line):
                    coords[s, p, axis] = line[place]
                    if axis == on_edge:
                        coords[s, p, axis] += radius[s, p] * draw(st.sampled_from([-1, 1]))
                else:
                    coords[s, p, axis] = place
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    weight = torch.randn(sets, 2, count, dtype=dtype, generator=generator)
    upstream = torch.randn(sets, 2, *grid.shape[1:], dtype=dtype, generator=generator)
    return Points(coords[0] if shared else coords, radius[0] if shared else radius, weight, grid, upstream)


Rendering = Callable[[Points, str], tuple[Tensor, tuple[Tensor, ...]]]


def render_by_twin(points: Points, normalization: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The kernel, and the gradients to coords, radius and weight."""
    leaves = points.leaves()
    kernel = render_kernel_reference(*leaves, points.grid, normalization)
    return kernel.detach(), torch.autograd.grad(kernel, leaves, points.upstream)


def assert_renders_as_the_twin(points: Points, normalization: str, render: Rendering) -> None:
    """Values and gradients to rounding, the support exactly."""
    dtype = points.weight.dtype
    kernel, gradients = render(points, normalization)
    twin, twins_gradients = render_by_twin(points, normalization)
    size, gradient_sizes = sizes_without_cancellation(points, normalization)
    assert_close(kernel, twin, size, VALUES[dtype], "kernel")
    names = ("coords", "radius", "weight")
    for ours, theirs, scale, name in zip(gradients, twins_gradients, gradient_sizes, names, strict=True):
        assert_close(ours, theirs, scale, GRADIENTS[dtype], f"gradient to {name}")
    # Values of one sign cannot cancel: what is not zero was touched.
    positive = dataclasses.replace(points, weight=points.weight.abs() + 0.1)
    support = render(positive, normalization)[0] != 0
    assert torch.equal(support, render_by_twin(positive, normalization)[0] != 0), "support"
