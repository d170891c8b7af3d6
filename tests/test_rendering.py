"""Rendering by touched taps against its dense twin: values, exact support, gradients, memory, and who may record it.

The GPU's rendering is held to the same in `test_gpu_kernels.py`; the dense twin to plain loops in `test_kernels.py`.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from point_cases import (
    DTYPES,
    Points,
    any_points,
    assert_renders_as_the_twin,
    points_around_an_edge,
    random_points,
    render_by_twin,
)
from torch import Tensor, nn

from smpconv_zoo import kernels
from smpconv_zoo.benchmarks import measure
from smpconv_zoo.kernels import NORMALIZATIONS, render_kernel, render_kernel_reference
from smpconv_zoo.layers import SMPConv1d, SMPConv2d
from smpconv_zoo.points import tap_grid

# "auto" takes the dense rendering for small kernels, with gradients that are written out inside the operator.
RENDERERS = ("scatter", "auto")


@pytest.fixture
def scatter_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let "auto" choose as for large kernels: by the number of touched pairs alone."""
    monkeypatch.setattr(kernels, "_SCATTER_NS", (0.0, 4.4))


def render(points: Points, normalization: str, renderer: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The kernel, and the gradients to coords, radius and weight."""
    leaves = points.leaves()
    kernel = render_kernel(*leaves, points.grid, normalization, renderer=renderer)
    return kernel.detach(), torch.autograd.grad(kernel, leaves, points.upstream)


def assert_equals_the_twin(points: Points, normalization: str, renderer: str) -> None:
    assert_renders_as_the_twin(points, normalization, lambda p, n: render(p, n, renderer))


# --- any points


@pytest.mark.parametrize("renderer", RENDERERS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@given(points=any_points(1))
def test_any_points_in_1d(points: Points, normalization: str, renderer: str) -> None:
    assert_equals_the_twin(points, normalization, renderer)


@pytest.mark.parametrize("renderer", RENDERERS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@given(points=any_points(2))
def test_any_points_in_2d(points: Points, normalization: str, renderer: str) -> None:
    assert_equals_the_twin(points, normalization, renderer)


@pytest.mark.parametrize("renderer", RENDERERS)
@pytest.mark.parametrize("axes", [1, 2])
def test_whether_a_tap_on_the_edge_is_touched(axes: int, renderer: str) -> None:
    # One tap too few, and its gradient to the position would be missing: not small, as that to the value is.
    points = points_around_an_edge(5000, axes)
    assert_equals_the_twin(points, "sum", renderer)
    ours, twins = render(points, "sum", renderer)[1][0], render_by_twin(points, "sum")[1][0]
    torch.testing.assert_close(ours, twins, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize(
    ("size", "n_points", "radius"),
    [
        ((784,), 30, (0.002, 0.01)),
        ((2001,), 30, (1e-4, 1.0)),
        ((161,), 40, (0.5, 1.0)),
        ((33, 33), 16, (0.1, 0.2)),
        ((13, 41), 60, (1e-4, 1.0)),
    ],
)
def test_kernels_of_networks(
    size: tuple[int, ...],
    n_points: int,
    radius: tuple[float, float],
    normalization: str,
    shared: bool,
    dtype: torch.dtype,
    scatter_is_free: None,
) -> None:
    points = random_points(size, shared, dtype, n_points, radius, channels=(6, 5))
    for renderer in RENDERERS:
        assert_equals_the_twin(points, normalization, renderer)


@pytest.mark.parametrize("size", [(9,), (4, 5)])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_one_point_of_value_one_is_its_tent(size: tuple[int, ...], normalization: str) -> None:
    for seed in range(20):
        points = random_points(size, n_points=1, radius=(0.1, 1.0), channels=(4, 1), seed=seed)
        weight = torch.ones(4, 1, 1)
        arguments = (points.coords, points.radius, weight, points.grid, normalization)
        assert torch.equal(render_kernel(*arguments, renderer="scatter"), render_kernel_reference(*arguments))


@pytest.mark.parametrize("renderer", RENDERERS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("far", [1.5, 1e6, float("inf")])
def test_points_that_touch_nothing(far: float, normalization: str, renderer: str) -> None:
    points = random_points((20,), radius=(1e-4, 1e-3))
    points.coords = points.coords.sign() * far
    kernel, gradients = render(points, normalization, renderer)
    assert not kernel.any() and kernel.shape == (3, 2, 20)
    assert not any(gradient.any() for gradient in gradients)


def test_the_gradient_to_the_radius_of_a_point_close_to_a_tap() -> None:
    # The gradient to the radius is distance / radius^2; one minus the tent would be a rounded distance.
    coords = torch.tensor([[3e-6]])
    radius, weight = torch.tensor([1.0]), torch.ones(1, 1, 1)
    grid = tap_grid((3,))
    for renderer in ("scatter", "auto"):
        points = Points(coords, radius, weight, grid, torch.tensor([[[0.0, 1.0, 0.0]]]))
        gradient = render(points, "sum", renderer)[1][1]
        assert gradient.item() == pytest.approx(3e-6, rel=1e-5)


def test_the_gradient_of_a_sum() -> None:
    # Strides of zero, and inputs whose memory is not in order.
    points = random_points((6, 8), radius=(0.2, 0.6))
    points.upstream = torch.ones(()).expand(points.upstream.shape)
    points.coords = points.coords.flip(1).transpose(0, 1).contiguous().transpose(0, 1)
    points.weight = points.weight.transpose(0, 2).contiguous().transpose(0, 2)
    for renderer in RENDERERS:
        assert_equals_the_twin(points, "count", renderer)


# --- grids


def grids() -> dict[str, Tensor]:
    """Grids that no tap_grid gives."""
    generator = torch.Generator().manual_seed(5)
    line, square = tap_grid((12,)), tap_grid((5, 6))
    angle = torch.tensor([[0.8, 0.6], [-0.6, 0.8]])
    return {
        "stretched": line.sign() * line.abs().sqrt(),
        "backwards": line.flip(1),
        "upside down": square.flip(1),
        "shuffled": line[:, torch.randperm(12, generator=generator)],
        "with a tap twice": torch.cat((line, line[:, -1:]), 1),
        "of one place": torch.zeros(1, 4),
        "rotated": torch.einsum("ij,jhw->ihw", angle, square),
        "with one tap moved": square + torch.zeros_like(square).index_put_((torch.tensor(0),) * 3, torch.tensor(0.01)),
        "with shuffled rows": square[:, torch.randperm(5, generator=generator)],
    }


@pytest.mark.parametrize("renderer", RENDERERS)
@pytest.mark.parametrize("name", grids())
def test_any_grid(name: str, renderer: str) -> None:
    grid = grids()[name]
    for normalization in NORMALIZATIONS:
        points = random_points((5,) * (grid.dim() - 1), radius=(0.2, 0.9))
        points.grid = grid
        points.upstream = torch.randn(3, 2, *grid.shape[1:], generator=torch.Generator().manual_seed(1))
        assert_equals_the_twin(points, normalization, renderer)


@pytest.mark.parametrize("name", grids())
def test_which_grids_have_rows_and_columns(name: str) -> None:
    regular = name in ("stretched", "backwards", "upside down")
    assert (kernels._axes(grids()[name]) is not None) == regular


# --- derivatives


@pytest.mark.parametrize("renderer", RENDERERS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("size", [(12,), (4, 3)])
def test_first_and_second_derivatives(size: tuple[int, ...], normalization: str, shared: bool, renderer: str) -> None:
    points = random_points(size, shared, torch.float64, 4, (0.2, 0.9), channels=(2, 2), seed=1)
    offsets = (points.coords.unsqueeze(-1) - points.grid.flatten(1)).abs()
    edges = (1 - offsets.sum(-2) / points.radius.unsqueeze(-1)).abs()
    # Finite differences step by 1e-6: no kink, and no jump of the count, within reach.
    assert min(float(offsets.min()), float(edges.min())) > 1e-5

    def function(coords: Tensor, radius: Tensor, weight: Tensor) -> Tensor:
        return render_kernel(coords, radius, weight, points.grid, normalization, renderer)

    assert torch.autograd.gradcheck(function, points.leaves())
    assert torch.autograd.gradgradcheck(function, points.leaves())


@pytest.mark.parametrize("wanted", range(3))
def test_the_gradient_to_one_input_alone(wanted: int) -> None:
    points = random_points((20,), dtype=torch.float64)
    expected = render_by_twin(points, "count")[1][wanted]
    leaves = [leaf.requires_grad_(i == wanted) for i, leaf in enumerate(points.leaves())]
    kernel = render_kernel(*leaves, points.grid, "count", "scatter")
    for create_graph in (False, True):
        (gradient,) = torch.autograd.grad(
            kernel, leaves[wanted], points.upstream, retain_graph=True, create_graph=create_graph
        )
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("size", [(500,), (17, 19)])
def test_repeated_runs_are_equal_to_the_last_bit(size: tuple[int, ...], normalization: str) -> None:
    points = random_points(size, n_points=40, radius=(0.05, 0.9), channels=(8, 8))
    first, gradients = render(points, normalization, "scatter")
    for _ in range(3):
        kernel, others = render(points, normalization, "scatter")
        assert torch.equal(kernel, first)
        assert all(map(torch.equal, gradients, others))


# --- which rendering


@pytest.fixture
def dense_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which dense renderings run."""
    calls: list[str] = []

    def noting(name: str) -> Callable[..., object]:
        function = getattr(kernels, name)

        def call(*arguments: object) -> object:
            calls.append(name)
            return function(*arguments)

        return call

    for name in ("render_kernel_reference", "_dense_gradients"):
        monkeypatch.setattr(kernels, name, noting(name))
    return calls


def test_auto_takes_the_dense_rendering_where_most_taps_are_touched(
    dense_calls: list[str], scatter_is_free: None
) -> None:
    both = ["render_kernel_reference", "_dense_gradients"]
    for radius, expected in (((0.001, 0.01), []), ((1.0, 1.0), both)):
        points = random_points((400,), n_points=20, radius=radius, channels=(5, 4))
        dense_calls.clear()
        render(points, "count", "auto")
        assert dense_calls == expected
        dense_calls.clear()
        render(points, "count", "scatter")
        assert dense_calls == []
        assert_equals_the_twin(points, "count", "auto")


def test_auto_is_right_on_both_sides_of_the_crossover(dense_calls: list[str]) -> None:
    chosen = set()
    for radius in (0.0002, 0.003, 0.05, 0.3, 1.0):
        points = random_points((4000,), n_points=20, radius=(radius, radius), channels=(8, 3))
        dense_calls.clear()
        render(points, "count", "auto")
        chosen.add(bool(dense_calls))
        assert_equals_the_twin(points, "count", "auto")
    assert chosen == {True, False}


def test_a_renderer_that_cannot_run_says_why() -> None:
    points = random_points((9,))
    arguments = (points.coords.double(), points.radius, points.weight, points.grid)
    with pytest.raises(ValueError, match="renderer 'scatter' cannot run: positions, radii, values and grid must be of"):
        render_kernel(*arguments, renderer="scatter")
    with pytest.raises(ValueError, match=r"renderer must be 'auto' or one of \('scatter', 'dense'\), got 'fast'"):
        render_kernel(*arguments, renderer="fast")


@pytest.mark.parametrize("renderer", [*RENDERERS, "dense"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rendered_in_float32(dtype: torch.dtype, renderer: str) -> None:
    points = random_points((40,), dtype=dtype, radius=(0.1, 0.3))
    kernel, gradients = render(points, "count", renderer)
    single = random_points((40,), dtype=dtype, radius=(0.1, 0.3))
    for field in dataclasses.fields(Points):
        setattr(single, field.name, getattr(single, field.name).float())
    exact, exact_gradients = render(single, "count", renderer)
    # One rounding, at the end: bit for bit.
    assert torch.equal(kernel, exact.to(dtype))
    for ours, theirs in zip(gradients, exact_gradients, strict=True):
        assert torch.equal(ours, theirs.to(dtype))


@pytest.mark.parametrize("renderer", [*RENDERERS, "dense"])
def test_autocast_does_not_apply(renderer: str) -> None:
    points = random_points((40,), radius=(0.1, 0.3))
    plain, gradients = render(points, "count", renderer)
    leaves = points.leaves()
    with torch.autocast("cpu", torch.bfloat16):
        kernel = render_kernel(*leaves, points.grid, "count", renderer)
        # Nor to gradients that are asked for inside; those of PyTorch's own operators it would change.
        inside = gradients if renderer == "dense" else torch.autograd.grad(kernel, leaves, points.upstream)
    assert kernel.dtype == torch.float32 and torch.equal(kernel, plain)
    assert all(map(torch.equal, inside, gradients))


# --- who records it


@pytest.mark.parametrize("renderer", RENDERERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meta_tensors_give_shapes(dtype: torch.dtype, renderer: str) -> None:
    points = random_points((5, 7), dtype=dtype)
    for field in dataclasses.fields(Points):
        setattr(points, field.name, getattr(points, field.name).to("meta"))
    kernel, gradients = render(points, "count", renderer)
    assert kernel.is_meta and kernel.shape == (3, 2, 5, 7) and kernel.dtype == dtype
    for gradient, leaf in zip(gradients, points.leaves(), strict=True):
        assert gradient.is_meta and gradient.shape == leaf.shape and gradient.dtype == dtype


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.parametrize("forced", [True, False])
@pytest.mark.parametrize("count", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("size", [(20,), (4, 5)])
def test_operators_are_registered_as_they_should_be(
    size: tuple[int, ...], shared: bool, count: bool, forced: bool
) -> None:
    points = random_points(size, shared, radius=(0.2, 0.5), n_points=3)
    forward, backward = torch.ops.smpconv_zoo.render_points, torch.ops.smpconv_zoo.render_points_backward
    torch.library.opcheck(forward.default, (*points.leaves(), points.grid, count, forced))
    inputs = (points.upstream, points.coords, points.radius, points.weight, points.grid, count, forced)
    torch.library.opcheck(backward.default, inputs)


def layer_and_input(dims: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if dims == 1:
        return SMPConv1d(2, 3, 40, n_points=5, init_radius=0.1), torch.randn(2, 2, 30)
    return SMPConv2d(4, 4, 9, groups=4), torch.randn(2, 4, 10, 12)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("dims", [1, 2])
def test_compile(dims: int, fresh_compiler: None) -> None:
    layer, x = layer_and_input(dims)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    parameters = list(layer.parameters())
    y, traced = layer(x), compiled(x)
    torch.testing.assert_close(traced, y, rtol=1e-5, atol=1e-6)
    upstream = torch.randn_like(y)
    eager = torch.autograd.grad(y, parameters, upstream)
    for ours, theirs in zip(torch.autograd.grad(traced, parameters, upstream), eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("dims", [1, 2])
def test_export(dims: int) -> None:
    layer, x = layer_and_input(dims)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        program = torch.export.export(layer, (x,))
    assert "smpconv_zoo.render_points" in str(program.graph)
    torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-5, atol=1e-6)


def test_transforms_of_torch_func_see_through_it() -> None:
    points = random_points((40,), radius=(0.1, 0.3))
    coords, radius, weight = points.coords, points.radius, points.weight

    def loss(coords: Tensor, radius: Tensor, weight: Tensor) -> Tensor:
        return (render_kernel(coords, radius, weight, points.grid, "count") * points.upstream).sum()

    expected = render_by_twin(points, "count")[1]
    for ours, theirs in zip(torch.func.grad(loss, (0, 1, 2))(coords, radius, weight), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    both = torch.func.vmap(lambda w: render_kernel(coords, radius, w, points.grid))(torch.stack((weight, 2 * weight)))
    torch.testing.assert_close(both[1], render_kernel(coords, radius, 2 * weight, points.grid))
    layer, x = layer_and_input(1)
    state = dict(layer.named_parameters())
    y = torch.func.vmap(lambda w: torch.func.functional_call(layer, {**state, "weight": w}, x))(
        torch.stack((state["weight"], 2 * state["weight"]))
    )
    torch.testing.assert_close(y, torch.stack((layer(x), 2 * layer(x))))


# --- what is no tent


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("radius", [0.2, 0.0, -0.3, math.nan])
@pytest.mark.parametrize("position", [0.0, math.nan])
@pytest.mark.parametrize("size", [(9,), (5, 7)])
def test_what_is_no_tent_gives_what_the_twin_gives(
    size: tuple[int, ...], position: float, radius: float, normalization: str
) -> None:
    points = random_points(size)
    points.coords[1, 2], points.radius[1, 2] = position, radius
    arguments = (points.coords, points.radius, points.weight, points.grid, normalization)
    ours, twin = render_kernel(*arguments, "scatter"), render_kernel_reference(*arguments)
    torch.testing.assert_close(ours, twin, equal_nan=True)
    if math.isnan(position) or math.isnan(radius):
        assert ours[1].isnan().all() and not ours[0].isnan().any()


@pytest.mark.parametrize(("coord", "radius"), [(0.9, math.nan), (math.nan, 0.1), (-math.inf, 0.1), (0.0, math.inf)])
def test_a_layer_reaches_all_the_way_for_what_is_no_number(coord: float, radius: float) -> None:
    layer = SMPConv1d(1, 1, 50, n_points=3)
    with torch.no_grad():
        layer.coords[0, 1], layer.radius[0, 1] = coord, radius
    assert layer.reach() == 50


@pytest.mark.parametrize("radius", [0.0, -0.1, 1e-20])
def test_a_point_without_radius_is_not_reached_for(radius: float) -> None:
    layer = SMPConv1d(1, 1, 50, n_points=3)
    with torch.no_grad():
        layer.coords.fill_(0.9)
        reach = layer.reach()
        layer.coords[0, 1], layer.radius[0, 1] = -0.9, radius
        assert layer.reach() == reach < 50
        layer.radius.fill_(radius)
        assert layer.reach() == 1


# --- memory


def peak_bytes(points: Points, renderer: str) -> int:
    """Most bytes alive at once between the leaves and the gradients, the kernel's own not counted."""
    leaves = points.leaves()

    def render_and_differentiate() -> None:
        kernel = render_kernel(*leaves, points.grid, "count", renderer)
        torch.autograd.grad(kernel, leaves, points.upstream)

    return measure.peak_bytes(render_and_differentiate, torch.device("cpu")) - points.upstream.nbytes


def test_memory_grows_with_touched_taps() -> None:
    spacing = 2 / (16_000 - 1)
    points = random_points((16_000,), n_points=30, radius=(spacing, 2 * spacing), channels=(30, 30))
    scatter, dense = peak_bytes(points, "scatter"), peak_bytes(points, "dense")
    # The dense one holds (30, 30, 16000) several times.
    assert dense > 2 * points.upstream.numel() * 4
    assert scatter < dense / 10, f"{scatter / 2**20:.1f} MiB against {dense / 2**20:.1f} MiB"
    assert peak_bytes(points, "auto") == scatter
