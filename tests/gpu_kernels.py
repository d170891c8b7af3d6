"""The Triton kernels against PyTorch in double precision.

`test_gpu_kernels.py` runs this file in a process of its own: compiled where there is a GPU, and anywhere in Triton's
interpreter, which must be asked for before Triton is imported. Sizes are tiny, and just around those at which a kernel
takes another turn.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from point_cases import (
    Points,
    any_points,
    assert_renders_as_the_twin,
    points_around_an_edge,
    random_points,
    render_by_twin,
)
from tolerances import RELATIVE_ERROR
from torch import Tensor, nn

from smpconv_zoo.gpu import fourier, norm, short
from smpconv_zoo.gpu import render as gpu_render
from smpconv_zoo.kernels import NORMALIZATIONS
from smpconv_zoo.ops import causal_conv1d_reference, conv2d_reference, convolve_pair, dispatch, fft, norm_sum
from smpconv_zoo.ops.fft import Folded, fft_convolve
from smpconv_zoo.ops.short import short_convolve

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True, scope="module")
def as_if_on_a_gpu() -> Iterator[None]:
    """Let the operations take the paths of the GPU with whatever tensors they are given."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            can_fold = staticmethod(lambda x, depthwise: x.dtype != torch.float64 and not depthwise)
            patch.setattr(Folded, "can_run", can_fold)
            patch.setattr(dispatch, "can_run_short", lambda x, weight: None)
        yield


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def exact(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def assert_near(ours: Tensor, expected: Tensor, what: str = "") -> None:
    """Relative error in the norm."""
    assert ours.shape == expected.shape, what
    error = float((exact(ours) - expected).norm() / max(float(expected.norm()), 1e-30))
    allowed = RELATIVE_ERROR["GPU kernel"]
    assert error <= allowed, f"{what}: relative error {error:.2e}, allowed {allowed:.0e}"


def derivatives(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], order: int = 1
) -> list[Tensor]:
    """Results, gradients of all inputs for drawn upstream gradients, and for order 2 the gradients of those."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    results = function(*leaves)
    results = (results,) if isinstance(results, Tensor) else results
    upstream = [draw(*y.shape, seed=90 + i).to(y).requires_grad_(order == 2) for i, y in enumerate(results)]
    loss = sum((y * factor).sum() for y, factor in zip(results, upstream, strict=True))
    gradients = torch.autograd.grad(loss, leaves, create_graph=order == 2)
    found = [*results, *gradients]
    if order == 2:
        directions = [draw(*gradient.shape, seed=70 + i).to(gradient) for i, gradient in enumerate(gradients)]
        found += torch.autograd.grad(gradients, [*leaves, *upstream], directions)
    return [tensor.detach() for tensor in found]


def assert_same(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    twin: Callable[..., Tensor | tuple[Tensor, ...]],
    *inputs: Tensor,
    order: int = 1,
) -> None:
    """``function`` equals ``twin`` in double precision, with all derivatives up to ``order``."""
    ours = derivatives(function, inputs, order)
    expected = derivatives(twin, [exact(tensor) for tensor in inputs], order)
    for i, (mine, theirs) in enumerate(zip(ours, expected, strict=True)):
        assert mine.dtype == inputs[0].dtype
        assert_near(mine, theirs, f"tensor {i}")


# --- folded transforms

# batch, channels in and out, size, taps: as long as the sequence, shorter, one tap, one sample, odd and even
SEQUENCES = [
    (2, 3, 4, (20,), (20,)),
    (2, 3, 4, (21,), (20,)),
    (1, 5, 1, (17,), (8,)),
    (3, 1, 6, (33,), (33,)),
    (2, 9, 5, (16,), (3,)),
    (2, 2, 2, (7,), (1,)),
    (1, 1, 1, (1,), (1,)),
]
# kernels reach no further than the map is large
MAPS = [
    (2, 3, 4, (9, 8), (5, 7)),
    (1, 2, 5, (6, 7), (11, 13)),
    (2, 1, 3, (1, 9), (1, 3)),
    (2, 4, 1, (5, 4), (3, 1)),
]


def future(taps: tuple[int, ...]) -> list[int]:
    return [0] if len(taps) == 1 else [t // 2 for t in taps]


def reference(taps: tuple[int, ...]) -> Callable[[Tensor, Tensor], Tensor]:
    return causal_conv1d_reference if len(taps) == 1 else conv2d_reference


@pytest.mark.parametrize("case", [*SEQUENCES, *MAPS])
def test_folded_convolution(case: tuple[int, int, int, tuple[int, ...], tuple[int, ...]]) -> None:
    n, channels_in, channels_out, size, taps = case
    x, weight = draw(n, channels_in, *size), draw(channels_out, channels_in, *taps, seed=1)
    folded = Folded(size, taps, future(taps))
    grad = draw(n, channels_out, *size, seed=2)
    spectrum = folded.spectrum(grad)
    y = folded.output(folded.spectrum(x), folded.spectrum(weight, flip=True), x)
    to_x = folded.input_gradient(spectrum, folded.spectrum(weight, flip=True), x)
    to_weight = folded.weight_gradient(spectrum, folded.spectrum(x), x)
    leaves = [exact(x).requires_grad_(), exact(weight).requires_grad_()]
    expected = reference(taps)(*leaves)
    gradients = torch.autograd.grad(expected, leaves, exact(grad))
    assert_near(y, expected.detach(), "output")
    assert_near(to_x, gradients[0], "gradient to the input")
    assert_near(to_weight, gradients[1], "gradient to the weight")


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("case", [SEQUENCES[1], MAPS[0]])
def test_folded_convolution_as_an_operation(
    case: tuple[int, int, int, tuple[int, ...], tuple[int, ...]], kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fft, "keeps_spectra", lambda x, weight, way: kept)
    n, channels_in, channels_out, size, taps = case
    x, weight = draw(n, channels_in, *size), draw(channels_out, channels_in, *taps, seed=1)
    assert_same(lambda x, weight: fft_convolve(x, weight, future(taps)), reference(taps), x, weight, order=2)


def test_folded_convolution_of_many_frequencies() -> None:
    # Other tiles and blocks; more channels than one tile holds.
    taps = (3300,)
    x, weight = draw(1, 2, 5000), draw(9, 2, *taps, seed=1)
    assert Folded((5000,), taps, [0]).points[1] > 4096
    with torch.no_grad():
        y = fft_convolve(x, weight, [0])
    assert_near(y, fft_convolve(exact(x), exact(weight), [0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_folded_convolution_of_half_precision(dtype: torch.dtype) -> None:
    x, weight = draw(2, 3, 20, dtype=dtype), draw(4, 3, 9, seed=1, dtype=dtype)
    with torch.no_grad():
        y = fft_convolve(x, weight, [0])
    assert y.dtype == dtype
    expected = causal_conv1d_reference(exact(x), exact(weight))
    # One rounding, at the end; the interpreter cuts bfloat16 off.
    units = 1.0 if INTERPRETED and dtype == torch.bfloat16 else 0.5
    torch.testing.assert_close(exact(y), expected, rtol=1.01 * units * torch.finfo(dtype).eps, atol=1e-6)


def test_folding_reads_any_layout() -> None:
    x = draw(3, 6, 2, 4)
    for view in (x.transpose(0, 1), x[1:, ::2], x[:, :, :, ::2], x[:1].expand(5, -1, -1, -1), x.permute(3, 2, 1, 0)):
        for flip in (False, True):
            z = fourier.fold(view, (8, 5), flip)
            assert torch.equal(z, fourier.fold(view.contiguous(), (8, 5), flip))


def test_unfolding_undoes_folding() -> None:
    x = draw(2, 3, 4, 10)
    z = fourier.fold(x, (6, 8))
    # Zeros behind the sequence; behind them comes the first place again, with the opposite sign.
    y = fourier.unfold(z * 48, (0, 0), (4, 16), torch.float32)
    assert_near(y, F.pad(exact(x), (0, 6)))
    y = fourier.unfold(z * 48, (-1, -10), (3, 10), torch.float32)
    assert_near(y, F.pad(-F.pad(exact(x), (0, 6))[..., 6:], (0, 0, 1, 0))[:, :, :3])


@pytest.mark.parametrize("sums", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("conjugates", [(False, False), (True, False), (False, True), (True, True)])
# Tiles of two shapes; test_folded_convolution_of_many_frequencies has the third.
@pytest.mark.parametrize("f", [(3, 11), (1, 300)])
def test_products_of_spectra(f: tuple[int, int], sums: tuple[int, int], conjugates: tuple[bool, bool]) -> None:
    r, s, k = 5, 6, 7
    shapes = [(k, n) if axis == 0 else (n, k) for n, axis in zip((r, s), sums, strict=True)]
    a, b = (torch.complex(draw(*shape, *f), draw(*shape, *f, seed=1)) for shape in shapes)
    c = fourier.contract(a, b, *sums, *conjugates)
    left, right = (
        (t.conj() if conjugate else t).cpu().to(torch.complex128)
        for t, conjugate in zip((a, b), conjugates, strict=True)
    )
    equation = f"{('kr', 'rk')[sums[0]]}xy,{('ks', 'sk')[sums[1]]}xy->rsxy"
    expected = torch.einsum(equation, left, right)
    assert c.shape == expected.shape
    assert float((c.cpu() - expected).norm() / expected.norm()) <= RELATIVE_ERROR["GPU kernel"]


# --- rendering


def render(points: Points, normalization: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    count = normalization == "count"
    inputs = [t.to(DEVICE).contiguous() for t in (points.coords, points.radius, points.weight, points.grid)]
    kernel = gpu_render.render(*inputs, count)
    gradients = gpu_render.render_backward(points.upstream.to(DEVICE).contiguous(), *inputs, count)
    return kernel.cpu(), tuple(gradient.cpu() for gradient in gradients)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("size", "n_points", "radius", "channels"),
    [
        ((70,), 9, (0.02, 0.3), (3, 2)),
        ((40,), 35, (0.1, 1.0), (2, 3)),  # more points than one block holds
        ((33,), 4, (0.1, 0.5), (2, 70)),  # more kernels than one block holds
        ((1100,), 3, (1e-3, 1e-2), (2, 1)),  # more taps than one look at the grid takes in
        ((9, 13), 6, (0.2, 0.6), (2, 2)),
        ((7, 5), 40, (1e-4, 1.0), (2, 3)),
    ],
)
def test_rendering(
    size: tuple[int, ...],
    n_points: int,
    radius: tuple[float, float],
    channels: tuple[int, int],
    shared: bool,
    normalization: str,
) -> None:
    points = random_points(size, shared, n_points=n_points, radius=radius, channels=channels)
    assert_renders_as_the_twin(points, normalization, render)


@settings(max_examples=10)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@given(points=any_points(1, [torch.float32]))
def test_rendering_any_points_in_1d(points: Points, normalization: str) -> None:
    assert_renders_as_the_twin(points, normalization, render)


@settings(max_examples=10)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@given(points=any_points(2, [torch.float32]))
def test_rendering_any_points_in_2d(points: Points, normalization: str) -> None:
    assert_renders_as_the_twin(points, normalization, render)


@pytest.mark.parametrize("axes", [1, 2])
def test_whether_a_tap_on_the_edge_is_touched(axes: int) -> None:
    points = points_around_an_edge(40, axes)
    assert_renders_as_the_twin(points, "sum", render)
    ours, twins = render(points, "sum")[1][0], render_by_twin(points, "sum")[1][0]
    torch.testing.assert_close(ours, twins, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_points", [9, 40])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("what", ["coords", "radius"])
def test_what_is_not_a_number_does_not_vanish_from_a_kernel(what: str, normalization: str, n_points: int) -> None:
    points = random_points((70,), n_points=n_points)
    getattr(points, what)[1, 2] = torch.nan
    arguments = [tensor.to(DEVICE) for tensor in (points.coords, points.radius, points.weight, points.grid)]
    kernel = gpu_render.render(*arguments, normalization == "count")
    assert kernel[1].isnan().all() and not kernel[0].isnan().any() and not kernel[2].isnan().any()


@pytest.mark.parametrize("n_points", [9, 40])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_points_without_radius_touch_nothing(normalization: str, n_points: int) -> None:
    points = random_points((70,), n_points=n_points)
    points.radius[0, :6] = torch.tensor([0.0, -0.0, -0.3, 1e-30, 1e-13, -1e30])
    points.coords[0, :6] = points.grid[0, 30]
    points.radius[1] = 0.0
    ours, twin = render(points, normalization), render_by_twin(points, normalization)
    for found, expected in zip((ours[0], *ours[1]), (twin[0], *twin[1]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        assert not found[1].any()
    assert not ours[1][1][0, :6].any() and not ours[1][0][0, :6].any()


def test_rendering_of_any_grid() -> None:
    # The kernels know of no rows and columns.
    points = random_points((5, 6), radius=(0.2, 0.9))
    points.grid = torch.einsum("ij,jhw->ihw", torch.tensor([[0.8, 0.6], [-0.6, 0.8]]), points.grid)
    assert_renders_as_the_twin(points, "count", render)


# --- few taps


@pytest.mark.parametrize("taps", [(1,), (2,), (3,), (5,), (7,), (1, 1), (3, 3), (1, 3), (3, 1), (1, 9)])
@pytest.mark.parametrize("channels", [(3, 4), (1, 1), (33, 17)])
def test_few_taps(taps: tuple[int, ...], channels: tuple[int, int]) -> None:
    size = (37,) if len(taps) == 1 else (5, 6)
    x, weight = draw(2, channels[0], *size), draw(*channels[::-1], *taps, seed=1)
    grad = draw(2, channels[1], *size, seed=2)
    leaves = [exact(x).requires_grad_(), exact(weight).requires_grad_()]
    expected = reference(taps)(*leaves)
    to_x, to_weight = torch.autograd.grad(expected, leaves, exact(grad))
    assert_near(short.short_convolve(x, weight), expected.detach(), "output")
    assert_near(short.short_convolve_input(grad, weight), to_x, "gradient to the input")
    assert_near(short.short_convolve_weight(grad, x, taps), to_weight, "gradient to the weight")


@pytest.mark.parametrize(
    ("size", "taps"), [((3,), (5,)), ((1,), (7,)), ((300,), (3,)), ((2, 1), (3, 3)), ((9, 17), (3, 3))]
)
def test_few_taps_of_many_or_hardly_any_places(size: tuple[int, ...], taps: tuple[int, ...]) -> None:
    x, weight = draw(2, 2, *size), draw(3, 2, *taps, seed=1)
    assert_same(short_convolve, reference(taps), x, weight, order=2)


def test_few_taps_of_tensors_in_any_layout() -> None:
    x, weight = draw(20, 3, 2).permute(2, 1, 0), draw(3, 4, 3, seed=1).transpose(0, 1)
    assert not x.is_contiguous() and not weight.is_contiguous()
    assert_same(short_convolve, causal_conv1d_reference, x, weight)


# --- pairs


def pair_twins() -> dict[int, Callable[..., tuple[Tensor, ...]]]:
    """What the docstring says a pair is equal to, for sequences and for maps."""
    (expression,) = re.findall(r"Equivalent to\s``(.+?)``", inspect.getdoc(convolve_pair) or "")
    return {
        rank: eval(f"lambda x, large, small, large_bias=None, small_bias=None: {expression}", {"causal_conv1d": twin})
        for rank, twin in ((3, causal_conv1d_reference), (4, conv2d_reference))
    }


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(
    ("size", "large", "small"),
    [((20,), (20,), (5,)), ((21,), (9,), (7,)), ((9, 8), (7, 5), (3, 3)), ((5, 6), (9, 11), (1, 3))],
)
def test_pair(
    size: tuple[int, ...], large: tuple[int, ...], small: tuple[int, ...], kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import smpconv_zoo.ops.pair as pair

    monkeypatch.setattr(pair, "keeps_spectra", lambda x, weight, way: kept)
    inputs = draw(2, 3, *size), draw(4, 3, *large, seed=1), draw(4, 3, *small, seed=2), draw(4), draw(4, seed=1)
    twin = pair_twins()[2 + len(size)]
    assert_same(convolve_pair, twin, *inputs)
    # A bias has no second derivative.
    assert_same(convolve_pair, twin, *inputs[:3], order=2 if kept else 1)


@pytest.mark.parametrize("wanted", range(3))
def test_the_gradient_of_a_pair_to_one_input_alone(wanted: int) -> None:
    inputs = [draw(2, 3, 20), draw(4, 3, 20, seed=1), draw(4, 3, 5, seed=2)]
    rest = {i: tensor for i, tensor in enumerate(inputs) if i != wanted}

    def alone(function: Callable[..., tuple[Tensor, ...]]) -> Callable[[Tensor], tuple[Tensor, ...]]:
        def call(tensor: Tensor) -> tuple[Tensor, ...]:
            others = {i: other.to(tensor) for i, other in rest.items()}
            return function(*({wanted: tensor, **others}[i] for i in range(3)))

        return call

    assert_same(alone(convolve_pair), alone(pair_twins()[3]), inputs[wanted])


# --- norms


def norms(channels: int, dims: int) -> tuple[nn.Module, nn.Module]:
    """Two batch norms unlike each other and unlike new ones."""
    kind = nn.BatchNorm1d if dims == 1 else nn.BatchNorm2d
    made = []
    for i, (eps, momentum) in enumerate(((1e-5, 0.1), (1e-3, 0.3))):
        layer = kind(channels, eps=eps, momentum=momentum)
        with torch.no_grad():
            layer.weight.copy_(1 + 0.3 * draw(channels, seed=10 + i))
            layer.bias.copy_(0.3 * draw(channels, seed=20 + i))
            layer.running_mean.copy_(0.3 * draw(channels, seed=30 + i))
            layer.running_var.copy_(1 + 0.3 * draw(channels, seed=40 + i).abs())
        made.append(layer.to(DEVICE))
    return made[0], made[1]


def tail(
    a: Tensor,
    b: Tensor,
    norm_a: nn.Module,
    norm_b: nn.Module,
    relu: bool,
    kept: Tensor | float,
    residual: Tensor | None,
) -> Tensor:
    """The tail of a pair, in PyTorch's own words; ``kept`` is what dropout multiplies by."""
    y = norm_a(a) + norm_b(b)
    y = (torch.relu(y) if relu else y) * kept
    return y if residual is None else torch.relu(y + residual)


# One place each, several blocks of places, channels that are no power of two, and maps.
SHAPES = [(3, 5, 37), (5, 3, 1), (2, 3, 1100), (2, 17, 3), (2, 4, 5, 7)]


# All combinations at one shape, the plainest and the fullest at the others.
@pytest.mark.parametrize(
    ("shape", "relu", "drop_rate", "residual"),
    [
        *((SHAPES[0], *turns) for turns in itertools.product((True, False), (0.0, 0.4), (True, False))),
        *((shape, full, 0.4 if full else 0.0, full) for shape in SHAPES[1:] for full in (True, False)),
    ],
)
def test_norms_in_training(shape: tuple[int, ...], relu: bool, drop_rate: float, residual: bool) -> None:
    norm_a, norm_b = norms(shape[1], len(shape) - 2)
    twin_a, twin_b = (copy.deepcopy(layer).cpu().double() for layer in (norm_a, norm_b))
    # A mean far from zero would cancel in sums of squares.
    inputs = [100 + draw(*shape), 2 * draw(*shape, seed=1) - 30] + ([draw(*shape, seed=2)] if residual else [])
    torch.manual_seed(3)
    mask = torch.empty(shape, dtype=torch.bool, device=DEVICE).bernoulli_(1 - drop_rate)
    kept = exact(mask) / (1 - drop_rate)
    torch.manual_seed(3)

    def run(
        function: Callable[..., Tensor], a: nn.Module, b: nn.Module, cast: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        leaves = [cast(tensor).requires_grad_() for tensor in inputs]
        y = function(*leaves[:2], a, b, leaves[2] if residual else None)
        wanted = [*leaves, a.weight, a.bias, b.weight, b.bias]
        return y.detach(), torch.autograd.grad(y, wanted, cast(draw(*shape, seed=4)))

    y, gradients = run(
        lambda a, b, n_a, n_b, r: norm_sum(a, b, n_a, n_b, relu, drop_rate, r), norm_a, norm_b, torch.clone
    )
    expected, theirs = run(lambda a, b, n_a, n_b, r: tail(a, b, n_a, n_b, relu, kept, r), twin_a, twin_b, exact)
    # Inputs of 100 with a deviation of 1: their own rounding is a hundred times that of the results.
    assert_close_to(y, expected, "result")
    for i, (mine, other) in enumerate(zip(gradients, theirs, strict=True)):
        assert_close_to(mine, other, f"gradient {i}")
    for ours, twin in ((norm_a, twin_a), (norm_b, twin_b)):
        assert_near(ours.running_mean, twin.running_mean, "running mean")
        assert_near(ours.running_var, twin.running_var, "running variance")
        assert int(ours.num_batches_tracked) == int(twin.num_batches_tracked) == 1


def assert_close_to(ours: Tensor, expected: Tensor, what: str) -> None:
    error = float((exact(ours) - expected).norm() / max(float(expected.norm()), 1e-30))
    assert error <= RELATIVE_ERROR["GPU kernel, normalised"], f"{what}: relative error {error:.2e}"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_norms_in_evaluation(shape: tuple[int, ...], relu: bool, residual: bool) -> None:
    norm_a, norm_b = (layer.eval() for layer in norms(shape[1], len(shape) - 2))
    twin_a, twin_b = (copy.deepcopy(layer).cpu().double() for layer in (norm_a, norm_b))
    a, b, r = draw(*shape), draw(*shape, seed=1), draw(*shape, seed=2) if residual else None
    with torch.no_grad():
        # Dropout is for training.
        y = norm_sum(a, b, norm_a, norm_b, relu, 0.5, r)
        expected = tail(exact(a), exact(b), twin_a, twin_b, relu, 1.0, None if r is None else exact(r))
    assert_near(y, expected)
    for ours, twin in ((norm_a, twin_a), (norm_b, twin_b)):
        before = twin.state_dict()
        assert all(torch.equal(exact(value), before[name].double()) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_what_is_not_a_number_goes_through_the_norms(training: bool, residual: bool) -> None:
    a, b = draw(3, 4, 20), draw(3, 4, 20, seed=1)
    a[1, 2, 3] = torch.nan
    norms = [nn.BatchNorm1d(4).to(DEVICE).train(training) for _ in range(2)]
    with torch.no_grad():
        out = norm_sum(a, b, *norms, relu=True, residual=draw(3, 4, 20, seed=2) if residual else None)
    # In training the statistics of the channel are none, in evaluation the place alone.
    assert out[:, 2].isnan().all() if training else out[1, 2, 3].isnan() and out.isnan().sum() == 1
    assert not out[:, [0, 1, 3]].isnan().any()


def test_dropping_everything() -> None:
    norm_a, norm_b = norms(3, 1)
    a = draw(2, 3, 9).requires_grad_()
    y = norm_sum(a, draw(2, 3, 9, seed=1), norm_a, norm_b, True, 1.0)
    y.sum().backward()
    assert not y.any() and a.grad is not None and not a.grad.any()


def test_second_derivatives_of_norms() -> None:
    norm_a, norm_b = norms(4, 1)
    twin_a, twin_b = (copy.deepcopy(layer).cpu().double() for layer in (norm_a, norm_b))
    inputs = draw(3, 4, 11), draw(3, 4, 11, seed=1), draw(3, 4, 11, seed=2)
    assert_same(
        lambda a, b, r: norm_sum(a, b, norm_a, norm_b, True, 0.0, r),
        lambda a, b, r: tail(a, b, twin_a, twin_b, True, 1.0, r),
        *inputs,
        order=2,
    )


def test_the_programs_of_norms_share_all_places() -> None:
    for n, channels, size in ((1, 1, 2), (64, 30, 784), (3, 4096, 1), (2, 3, 1100)):
        split, parts, block = norm._schedule(n, channels, size)
        assert split & (split - 1) == 0 and block & (block - 1) == 0
        assert 1 <= split <= parts <= n * -(-size // block)
