"""Rendered kernels against plain loops in double precision, the reference's values, and what must not change them."""

import itertools

import pytest
import torch
from golden_files import golden
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from smpconv_zoo.kernels import NORMALIZATIONS, render_kernel
from smpconv_zoo.layers import SMPConv1d, SMPConv2d, clip_radius_
from smpconv_zoo.points import tap_grid

# The same sum in another order, double precision.
FLOAT64 = {"rtol": 1e-12, "atol": 1e-12}
# Sums of at most ten products of numbers near 1, single precision; the values to compare with are single precision too.
GOLDEN = {"rtol": 1e-6, "atol": 1e-6}
# Permuted sums in single precision.
PERMUTED = {"rtol": 1e-6, "atol": 1e-6}

GOLDEN_CASES = ("d1_n25", "d1_n24", "d2_n9x9", "d2_n7x7")


def slow_kernel(coords: Tensor, radius: Tensor, weight: Tensor, grid: Tensor, normalization: str) -> Tensor:
    """The definition, one number at a time: kernel[o, i, tap] = sum_p weight[o, i, p] tent[o, p, tap] / count."""
    out_channels, in_channels, points = weight.shape
    kernel = torch.zeros(out_channels, in_channels, *grid.shape[1:], dtype=torch.float64)
    for o in range(out_channels):
        positions, radii = (coords[o], radius[o]) if coords.dim() == 3 else (coords, radius)
        for tap in itertools.product(*map(range, grid.shape[1:])):
            tent = []
            for p in range(points):
                distance = sum(abs(float(positions[p, d]) - float(grid[(d, *tap)])) for d in range(grid.size(0)))
                tent.append(max(0.0, 1.0 - distance / float(radii[p])))
            count = sum(t != 0 for t in tent)
            for i in range(in_channels):
                total = sum(float(weight[o, i, p]) * tent[p] for p in range(points))
                kernel[(o, i, *tap)] = total / (count + 1e-6) if normalization == "count" else total
    return kernel


def random_points(
    size: tuple[int, ...], shared: bool, dtype: torch.dtype = torch.float64, seed: int = 3
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Coordinates (some outside), radii, weights for 3 output and 2 input channels, grid."""
    generator = torch.Generator().manual_seed(seed)
    sets = () if shared else (3,)
    coords = torch.empty(*sets, 8, len(size), dtype=torch.float64).uniform_(-1.2, 1.2, generator=generator)
    radius = torch.empty(*sets, 8, dtype=torch.float64).uniform_(0.1, 1.0, generator=generator)
    weight = torch.randn(3, 2, 8, dtype=torch.float64, generator=generator)
    return coords.to(dtype), radius.to(dtype), weight.to(dtype), tap_grid(size, dtype=dtype)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("size", [(11,), (12,), (7, 7), (5, 9)])
def test_kernel_equals_the_loop(size: tuple[int, ...], shared: bool, normalization: str) -> None:
    coords, radius, weight, grid = random_points(size, shared)
    kernel = render_kernel(coords, radius, weight, grid, normalization)
    assert kernel.shape == (3, 2, *size) and kernel.dtype == torch.float64
    expected = slow_kernel(coords, radius, weight, grid, normalization)
    assert expected.count_nonzero() > expected.numel() / 3
    torch.testing.assert_close(kernel, expected, **FLOAT64)


@pytest.mark.parametrize("shared", [True, False])
def test_sum_is_the_default_and_count_divides_by_the_touching_points(shared: bool) -> None:
    points = random_points((7, 7), shared)
    assert torch.equal(render_kernel(*points), render_kernel(*points, normalization="sum"))
    # Two coincident points of weights 1 and 3 on one tap: their sum, and their mean.
    coords, radius = torch.zeros(2, 1), torch.full((2,), 0.25)
    weight, grid = torch.tensor([[[1.0, 3.0]]]), tap_grid((5,))
    assert render_kernel(coords, radius, weight, grid, "sum").tolist() == [[[0, 0, 4, 0, 0]]]
    # 2 + 1e-6 in the denominator
    assert render_kernel(coords, radius, weight, grid, "count")[0, 0, 2].item() == pytest.approx(2.0, abs=2e-6)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_shared_points_are_the_same_set_for_every_channel(normalization: str) -> None:
    coords, radius, weight, grid = random_points((5, 7), shared=True)
    each = render_kernel(coords.expand(3, -1, -1), radius.expand(3, -1), weight, grid, normalization)
    torch.testing.assert_close(render_kernel(coords, radius, weight, grid, normalization), each, **FLOAT64)


# --- the reference's values


def golden_points(values: dict[str, Tensor], case: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Our coords, radius, weight and grid from the stored layout.

    The reference renders on an 'ij' meshgrid and turns the kernel afterwards; we turn the grid.
    """
    prefix = f"smpkernel_{case}/"
    grid = values[prefix + "grid"].squeeze(0)
    if grid.dim() == 3:
        grid = grid.transpose(1, 2).flip(1)
    return values[prefix + "weight_coord"], values[prefix + "radius"].flatten(1), values[prefix + "weights"], grid


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_kernels_equal_the_reference(case: str) -> None:
    values = load_file(golden("smpkernel.safetensors"))
    coords, radius, weight, grid = golden_points(values, case)
    assert torch.equal(grid, tap_grid(grid.shape[1:]))
    kernel = render_kernel(coords, radius, weight, grid, "count")
    torch.testing.assert_close(kernel, values[f"smpkernel_{case}/kernel"], **GOLDEN)


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_kernel_gradients_equal_the_reference(case: str) -> None:
    values = load_file(golden("smpkernel.safetensors"))
    coords, radius, weight, grid = golden_points(values, case)
    leaves = [leaf.clone().requires_grad_() for leaf in (coords, radius, weight)]
    kernel = render_kernel(*leaves, grid, "count")
    gradients = torch.autograd.grad(kernel, leaves, values[f"smpkernel_{case}/cotangent"])
    for gradient, name in zip(gradients, ("weight_coord", "radius", "weights"), strict=True):
        expected = values[f"smpkernel_{case}/grad_{name}"].reshape(gradient.shape)
        assert expected.any()
        # 1e-5 of the largest entry: sums over all taps, with cancellation
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_layers_reproduce_the_reference_kernel_and_its_clipped_radii(case: str) -> None:
    values = load_file(golden("smpkernel.safetensors"))
    coords, radius, weight, grid = golden_points(values, case)
    size, (out_channels, in_channels, points) = grid.shape[1:], weight.shape
    layer: SMPConv1d | SMPConv2d
    if len(size) == 1:
        layer = SMPConv1d(in_channels, out_channels, size[0], n_points=points)
    else:
        layer = SMPConv2d(
            in_channels, out_channels, tuple(size), n_points=points, normalization="count", radius_bounds=(1e-4, 1.0)
        )
    layer.load_state_dict({"coords": coords, "radius": radius, "weight": weight, "grid": grid})
    torch.testing.assert_close(layer.kernel(), values[f"smpkernel_{case}/kernel"], **GOLDEN)
    clipped = values[f"smpkernel_{case}/radius_after_clip"].flatten(1)
    assert not torch.equal(clipped, radius), "the stored radii were chosen outside the bounds"
    clip_radius_(layer)
    assert torch.equal(layer.radius.detach(), clipped)


# --- what must not matter, and what must

# Multiples of an eighth hit taps, edges of tents and coincide; the drawn floats are everything else, outside too.
coordinate = st.one_of(
    st.integers(-12, 12).map(lambda n: n / 8), st.floats(-1.5, 1.5, width=32), st.sampled_from([-1.0, 0.0, 1.0])
)
radius_value = st.one_of(st.sampled_from([1e-4, 1e-3, 0.125, 0.25, 0.5, 1.0]), st.floats(1e-3, 1.0))


@st.composite
def point_sets(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Coordinates, radii, weights, grid, and a permutation of the points."""
    size = draw(st.sampled_from([(9,), (8,), (5, 5), (5, 3)]))
    count = draw(st.integers(1, 8))
    rows = draw(st.lists(st.tuples(*[coordinate] * len(size)), min_size=count, max_size=count))
    if draw(st.booleans()):
        rows[-1] = rows[0]
    radii = draw(st.lists(radius_value, min_size=count, max_size=count))
    weight = draw(st.lists(st.floats(-2, 2, width=32, allow_subnormal=False), min_size=2 * count, max_size=2 * count))
    order = draw(st.permutations(range(count)))
    return (
        torch.tensor(rows, dtype=torch.float32),
        torch.tensor(radii, dtype=torch.float32),
        torch.tensor(weight, dtype=torch.float32).view(2, 1, count),
        tap_grid(size),
        torch.tensor(order),
    )


@given(points=point_sets(), normalization=st.sampled_from(NORMALIZATIONS))
def test_order_of_the_points_does_not_matter(
    points: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], normalization: str
) -> None:
    coords, radius, weight, grid, order = points
    kernel = render_kernel(coords, radius, weight, grid, normalization)
    permuted = render_kernel(coords[order], radius[order], weight[:, :, order], grid, normalization)
    assert torch.isfinite(kernel).all()
    torch.testing.assert_close(permuted, kernel, **PERMUTED)
    # A point split in two of half the weight, at the same place, is the same point.
    if normalization == "sum":
        doubled = render_kernel(
            torch.cat((coords, coords)), torch.cat((radius, radius)), torch.cat((weight, weight), -1) / 2, grid
        )
        torch.testing.assert_close(doubled, kernel, **PERMUTED)


@given(points=point_sets(), normalization=st.sampled_from(NORMALIZATIONS))
def test_any_points_equal_the_loop(points: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], normalization: str) -> None:
    # In double precision, on the rounded values: whether a point on the edge counts must not depend on rounding.
    coords, radius, weight, grid = (part.double() for part in points[:4])
    kernel = render_kernel(coords, radius, weight, grid, normalization)
    torch.testing.assert_close(kernel, slow_kernel(coords, radius, weight, grid, normalization), **FLOAT64)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_given_grid_is_used(normalization: str) -> None:
    # Averaged weights hold a grid that has drifted by up to 1e-4 (in both directions).
    coords, radius, weight, grid = random_points((7, 7), shared=True)
    drift = 1e-4 * torch.linspace(-1, 1, grid.numel(), dtype=torch.float64).view_as(grid)
    exact = render_kernel(coords, radius, weight, grid, normalization)
    drifted = render_kernel(coords, radius, weight, grid + drift, normalization)
    assert (drifted - exact).abs().max() > 1e-5
    torch.testing.assert_close(drifted, slow_kernel(coords, radius, weight, grid + drift, normalization), **FLOAT64)

    layer = SMPConv2d(3, 3, 7, groups=3, dtype=torch.float64, normalization=normalization)
    before = layer.kernel()
    layer.grid += drift
    assert (layer.kernel() - before).abs().max() > 1e-7


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_taps_that_no_point_touches_are_exactly_zero(normalization: str, dtype: torch.dtype) -> None:
    coords = torch.tensor([[0.0], [5.0]], dtype=dtype, requires_grad=True)
    radius = torch.tensor([0.25, 1.0], dtype=dtype, requires_grad=True)
    weight = torch.tensor([[[2.0, 7.0]]], dtype=dtype, requires_grad=True)
    kernel = render_kernel(coords, radius, weight, tap_grid((5,), dtype=dtype), normalization)
    assert kernel[0, 0, [0, 1, 3, 4]].tolist() == [0, 0, 0, 0]
    assert kernel[0, 0, 2].item() == pytest.approx(2.0, abs=3e-6)  # 1e-6 in the denominator of "count"
    kernel.sum().backward()
    for leaf in (coords, radius, weight):
        assert leaf.grad is not None and torch.isfinite(leaf.grad).all()
    # The point far outside has neither a value nor a gradient.
    assert weight.grad is not None and weight.grad[0, 0, 1] == 0


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("size", [(12,), (4, 3)])
def test_gradients_equal_finite_differences(size: tuple[int, ...], normalization: str) -> None:
    coords, radius, weight, grid = random_points(size, shared=False)
    offsets = (coords.unsqueeze(-1) - grid.flatten(1)).abs()
    edge = (1 - offsets.sum(-2) / radius.unsqueeze(-1)).abs()
    # Finite differences step by 1e-6: no kink, and no jump of the count, within reach.
    assert min(float(offsets.min()), float(edge.min())) > 1e-5
    leaves = tuple(leaf.requires_grad_() for leaf in (coords, radius, weight))
    assert torch.autograd.gradcheck(lambda c, r, w: render_kernel(c, r, w, grid, normalization), leaves)


# --- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_half_precision_is_rendered_in_float32(normalization: str, dtype: torch.dtype) -> None:
    points = random_points((13, 13), shared=True, dtype=dtype)
    kernel = render_kernel(*points, normalization)
    assert kernel.dtype == dtype
    single = render_kernel(*(part.float() for part in points), normalization)
    # One rounding, at the end: bit for bit.
    assert torch.equal(kernel, single.to(dtype))


def test_half_precision_weights_alone_decide() -> None:
    coords, radius, weight, grid = random_points((13,), shared=False, dtype=torch.float32)
    kernel = render_kernel(coords, radius, weight.bfloat16(), grid, "count")
    assert kernel.dtype == torch.bfloat16
    single = render_kernel(coords, radius, weight.bfloat16().float(), grid, "count")
    assert torch.equal(kernel, single.bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_autocast_does_not_lower_the_precision(normalization: str, dtype: torch.dtype) -> None:
    points = random_points((13, 13), shared=True, dtype=torch.float32)
    plain = render_kernel(*points, normalization)
    with torch.autocast("cpu", dtype=dtype):
        # What autocast would have done:
        assert (points[2] @ torch.ones(8, 8)).dtype == dtype
        kernel = render_kernel(*points, normalization)
    assert kernel.dtype == torch.float32
    assert torch.equal(kernel, plain)


def test_float64_count_is_not_rounded_to_float32() -> None:
    # Three points that touch: 1 / (3 + 1e-6) in float32 is wrong by 1e-8.
    coords, radius = torch.zeros(3, 1, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    kernel = render_kernel(
        coords, radius, torch.ones(1, 1, 3, dtype=torch.float64), tap_grid((3,), dtype=torch.float64), "count"
    )
    assert kernel[0, 0, 1].item() == pytest.approx(3 / (3 + 1e-6), abs=1e-15)  # double rounding


# --- errors and scripting


def test_unknown_normalization_is_refused() -> None:
    with pytest.raises(ValueError, match=r"normalization must be one of \('sum', 'count'\), got 'mean'"):
        render_kernel(*random_points((5,), shared=True), "mean")


def test_meta_tensors_give_a_shape() -> None:
    points = [part.to("meta") for part in random_points((5, 7), shared=False)]
    kernel = render_kernel(*points, "count")
    assert kernel.device.type == "meta" and kernel.shape == (3, 2, 5, 7)
