"""Tap grids and tents against plain loops in double precision, at their kinks, edges and bounds."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from smpconv_zoo.points import tap_grid, tap_spacing, tents

# The same few operations in double precision: a handful of roundings of numbers near 1, or of 1 / radius.
FLOAT64 = {"rtol": 1e-12, "atol": 1e-12}
# torch.linspace in float32 is within one or two roundings of the exact position.
FLOAT32 = {"rtol": 0.0, "atol": 2e-7}

# The bounds of the radius of both families of networks, and one radius inside.
RADII = (1e-4, 1e-3, 0.3, 1.0)


def slow_tent(position: list[float], radius: float, tap: list[float]) -> float:
    """The definition, one number at a time."""
    return max(0.0, 1.0 - sum(abs(t - p) for t, p in zip(tap, position, strict=True)) / radius)


def slow_tents(coords: Tensor, radius: Tensor, grid: Tensor) -> Tensor:
    """``tents`` for any leading axes, by loops over points and taps."""
    out = torch.empty(*radius.shape, *grid.shape[1:], dtype=torch.float64)
    for point in itertools.product(*map(range, radius.shape)):
        for tap in itertools.product(*map(range, grid.shape[1:])):
            place = [float(grid[(axis, *tap)]) for axis in range(grid.size(0))]
            out[point + tap] = slow_tent(coords[point].tolist(), float(radius[point]), place)
    return out


def kink_gaps(coords: Tensor, radius: Tensor, grid: Tensor) -> Tensor:
    """How far every (point, tap) is from the nearest place without a derivative: |x| at 0 and the edge of the tent."""
    taps = grid.flatten(1)
    offsets = (coords.unsqueeze(-1) - taps).abs()
    edge = (1 - offsets.sum(-2) / radius.unsqueeze(-1)).abs()
    return torch.cat((offsets.amin(-2).flatten(), edge.flatten()))


# --- grids


@pytest.mark.parametrize("length", [2, 3, 24, 25])
def test_grid_in_one_dimension_runs_from_the_oldest_sample_to_the_current_one(length: int) -> None:
    grid = tap_grid((length,), dtype=torch.float64)
    assert grid.shape == (1, length)
    expected = torch.tensor([[-1 + 2 * i / (length - 1) for i in range(length)]], dtype=torch.float64)
    torch.testing.assert_close(grid, expected, **FLOAT64)
    assert grid[0, 0] == -1 and grid[0, -1] == 1


@pytest.mark.parametrize("size", [(3, 3), (7, 5), (2, 4), (13, 31)])
def test_grid_in_two_dimensions_has_x_to_the_right_and_y_upward(size: tuple[int, int]) -> None:
    height, width = size
    grid = tap_grid(size, dtype=torch.float64)
    assert grid.shape == (2, height, width)
    for row, column in itertools.product(range(height), range(width)):
        place = torch.tensor([-1 + 2 * column / (width - 1), 1 - 2 * row / (height - 1)], dtype=torch.float64)
        torch.testing.assert_close(grid[:, row, column], place, **FLOAT64)
    # Exact ends: the top left tap is (-1, +1), the bottom right one (+1, -1).
    assert grid[:, 0, 0].tolist() == [-1, 1]
    assert grid[:, -1, -1].tolist() == [1, -1]


@pytest.mark.parametrize("size", [31, 29, 27, 13])
def test_grid_in_float32_is_the_transposed_and_flipped_meshgrid_of_the_reference(size: int) -> None:
    axis = torch.linspace(-1, 1, size)
    reference = torch.stack(torch.meshgrid(axis, axis, indexing="ij"))
    assert torch.equal(tap_grid((size, size)), reference.transpose(1, 2).flip(1))
    exact = tap_grid((size, size), dtype=torch.float64)
    torch.testing.assert_close(tap_grid((size, size)).double(), exact, **FLOAT32)


def test_grid_takes_device_and_dtype() -> None:
    grid = tap_grid((5, 3), device="meta", dtype=torch.float16)
    assert grid.device.type == "meta" and grid.dtype == torch.float16
    assert tap_grid((5,)).dtype == torch.get_default_dtype()


@pytest.mark.parametrize("size", [(), (3, 3, 3)])
def test_grid_refuses_other_than_one_or_two_axes(size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="kernel_size must have one or two axes, got"):
        tap_grid(size)


@pytest.mark.parametrize("size", [(1,), (0,), (1, 5), (5, 1)])
def test_grid_refuses_fewer_than_two_taps(size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a kernel needs at least 2 taps along each axis, got"):
        tap_grid(size)


def test_spacing_is_the_distance_of_neighbouring_taps() -> None:
    grid = tap_grid((25,), dtype=torch.float64)[0]
    torch.testing.assert_close(torch.full((24,), tap_spacing((25,)), dtype=torch.float64), grid.diff(), **FLOAT64)
    # The axis with the fewest taps has the widest spacing.
    assert tap_spacing((5, 51)) == tap_spacing((51, 5)) == 0.5


# --- tents


@pytest.mark.parametrize("sets", [(), (4,), (2, 3)])
@pytest.mark.parametrize("size", [(24,), (25,), (7, 7), (5, 9)])
def test_tents_equal_the_loop(size: tuple[int, ...], sets: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(7)
    coords = torch.empty(*sets, 6, len(size), dtype=torch.float64).uniform_(-1.3, 1.3, generator=generator)
    radius = torch.empty(*sets, 6, dtype=torch.float64).uniform_(0.05, 1.0, generator=generator)
    grid = tap_grid(size, dtype=torch.float64)
    tent = tents(coords, radius, grid)
    assert tent.shape == (*sets, 6, *size)
    assert 0 < (tent > 0).sum() < tent.numel()
    torch.testing.assert_close(tent, slow_tents(coords, radius, grid), **FLOAT64)


@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("size", [(9,), (5, 9)])
def test_tent_is_one_at_its_position(size: tuple[int, ...], radius: float) -> None:
    grid = tap_grid(size, dtype=torch.float64)
    points = grid.flatten(1).T
    radii = torch.full((len(points),), radius, dtype=torch.float64)
    tent = tents(points, radii, grid).flatten(1)
    assert torch.equal(tent.diagonal(), torch.ones(len(points), dtype=torch.float64))
    assert tent.min() >= 0 and tent.max() == 1
    torch.testing.assert_close(tent, slow_tents(points, radii, grid).flatten(1), **FLOAT64)


@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("dims", [1, 2])
def test_tent_falls_linearly_in_the_l1_distance_to_zero_at_one_radius(dims: int, radius: float) -> None:
    # One tap at the origin; the point stands at a chosen distance, split over the axes.
    grid = torch.zeros(dims, *[1] * dims, dtype=torch.float64)
    for share in (0.25, 0.5, 0.999, 1.0, 1.001, 1.5):
        split = torch.tensor([1.0] if dims == 1 else [0.3, -0.7], dtype=torch.float64)
        tent = tents((split * share * radius).unsqueeze(0), torch.tensor([radius], dtype=torch.float64), grid)
        assert tent.item() == pytest.approx(max(0.0, 1 - share), abs=1e-12)  # a few roundings of numbers near 1


def test_tent_is_exactly_zero_on_the_edge_and_beyond() -> None:
    # Powers of two: every number here is exact, so the edge is hit and not approached.
    grid = torch.tensor([[-1.0, -0.5, 0.0, 0.5, 1.0]])
    tent = tents(torch.tensor([[0.0], [0.25]]), torch.tensor([0.5, 0.25]), grid)
    assert tent.tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]


def test_points_outside_the_kernel_reach_only_the_taps_within_their_radius() -> None:
    grid = tap_grid((5,), dtype=torch.float64)
    tent = tents(torch.tensor([[1.25], [-1.75], [3.0]]), torch.tensor([1.0, 1.0, 1.0]), grid)
    assert tent.tolist() == [[0, 0, 0, 0.25, 0.75], [0.25, 0, 0, 0, 0], [0, 0, 0, 0, 0]]


def test_radius_bounds_touch_one_tap_or_half_the_kernel() -> None:
    grid = tap_grid((31,), dtype=torch.float64)
    centre = grid[:, 15:16]
    for radius in (1e-4, 1e-3):
        tent = tents(centre, torch.tensor([radius], dtype=torch.float64), grid)
        assert tent.count_nonzero() == 1 and tent[0, 15] == 1
    tent = tents(centre, torch.ones(1, dtype=torch.float64), grid)
    # The two end taps lie exactly on the edge.
    assert tent.count_nonzero() == 29 and tent[0, 0] == tent[0, -1] == 0


# --- gradients


@pytest.mark.parametrize(("size", "seed"), [((11,), 0), ((5, 4), 2)])
def test_gradients_of_tents_equal_finite_differences(size: tuple[int, ...], seed: int) -> None:
    grid = tap_grid(size, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    coords = torch.empty(5, len(size), dtype=torch.float64).uniform_(-1.2, 1.2, generator=generator)
    radius = torch.empty(5, dtype=torch.float64).uniform_(0.2, 1.0, generator=generator)
    # Finite differences step by 1e-6: no kink is within reach.
    assert kink_gaps(coords, radius, grid).min() > 1e-3
    tent = tents(coords, radius, grid)
    assert 0 < (tent > 0).sum() < tent.numel()
    coords.requires_grad_()
    radius.requires_grad_()
    assert torch.autograd.gradcheck(lambda c, r: tents(c, r, grid), (coords, radius))
    assert torch.autograd.gradgradcheck(lambda c, r: tents(c, r, grid), (coords, radius))


def test_gradients_have_the_right_sign_and_size() -> None:
    # A tap to the right of the point: moving right raises the tent by 1 / r, widening it by distance / r^2.
    grid = torch.tensor([[0.5]], dtype=torch.float64)
    coords = torch.tensor([[0.25]], dtype=torch.float64, requires_grad=True)
    radius = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    tents(coords, radius, grid).sum().backward()
    assert coords.grad is not None and radius.grad is not None
    assert coords.grad.item() == 2.0 and radius.grad.item() == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("position", "radius", "kink"),
    [
        ((0.0, 0.0), 0.5, "on a tap, its four neighbours on the edge"),
        ((0.25, 0.25), 0.5, "four taps on the edge"),
        ((0.5, -0.5), 0.25, "on a tap, alone"),
        ((1.0, 1.0), 1.0, "on the corner, widest"),
        ((1.0, 1.5), 0.5, "outside, one tap on the edge"),
        ((5.0, 5.0), 1.0, "out of reach"),
    ],
)
def test_no_nan_at_kinks(position: tuple[float, float], radius: float, kink: str, dtype: torch.dtype) -> None:
    grid = tap_grid((5, 5), dtype=dtype)
    coords = torch.tensor([position], dtype=dtype, requires_grad=True)
    radii = torch.tensor([radius], dtype=dtype, requires_grad=True)
    if kink != "out of reach":
        # Exact numbers: the kink is hit.
        assert kink_gaps(coords.detach(), radii.detach(), grid).min() == 0
    tent = tents(coords, radii, grid)
    tent.sum().backward()
    assert coords.grad is not None and radii.grad is not None
    assert torch.isfinite(tent).all() and torch.isfinite(coords.grad).all() and torch.isfinite(radii.grad).all()
    # Any subgradient is bounded by the slope, 1 / r per tap that is touched or on the edge; x and y symmetric.
    assert coords.grad.abs().max() <= 25 / radius


@pytest.mark.parametrize("radius", [1e-4, 1e-3, 1.0])
def test_no_nan_at_the_radius_bounds(radius: float) -> None:
    grid = tap_grid((31, 31))
    coords = torch.tensor([[0.0, 0.0], [1e-5, -1e-5], [0.99999, 1.0], [1.2, -1.2]], requires_grad=True)
    radii = torch.full((4,), radius, requires_grad=True)
    tents(coords, radii, grid).square().sum().backward()
    assert coords.grad is not None and radii.grad is not None
    assert torch.isfinite(coords.grad).all() and torch.isfinite(radii.grad).all()


def test_points_that_touch_nothing_have_zero_gradient() -> None:
    grid = tap_grid((9,), dtype=torch.float64)
    coords = torch.tensor([[0.1], [4.0]], dtype=torch.float64, requires_grad=True)
    radius = torch.tensor([1e-3, 1.0], dtype=torch.float64, requires_grad=True)
    tents(coords, radius, grid).sum().backward()
    assert coords.grad is not None and radius.grad is not None
    assert not coords.grad.any() and not radius.grad.any()


def test_tents_have_unit_mass_in_the_limit() -> None:
    # The integral of a tent over the line is its radius: a sum over fine taps, wrong by at most one spacing.
    grid = tap_grid((2001,), dtype=torch.float64)
    radius = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    mass = tents(torch.zeros(3, 1, dtype=torch.float64), radius, grid).sum(1) * tap_spacing((2001,))
    assert all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(mass.tolist(), radius.tolist(), strict=True))
