"""Sequences of any length against the slow twins: every tap rendered from every point, convolved as PyTorch does it.

Shorter than the kernel, longer, odd, a single one, a single sample; radii at both bounds, points outside the kernel,
where a layer renders only the newest taps.
"""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tolerances import relative_error
from torch import Tensor, nn

from smpconv_zoo.kernels import NORMALIZATIONS, render_kernel_reference
from smpconv_zoo.layers import CausalConv1d, SMPConv1d
from smpconv_zoo.models import SMPConvTCN
from smpconv_zoo.ops import causal_conv1d_reference
from smpconv_zoo.points import tap_grid

# Relative to the largest value: other sums, and a transform.
FORWARD = {torch.float64: 1e-12, torch.float32: 2e-6}
GRADIENT = {torch.float64: 1e-11, torch.float32: 1e-5}
LOWEST, HIGHEST = 1e-4, 1.0

LENGTHS = (1, 2, 5, 8, 15, 16, 17, 39, 100)
KINDS = ("lowest", "highest", "both", "outside", "far")


def seeded(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def place_points_(layer: SMPConv1d, kind: str, seed: int = 0) -> None:
    """Points of one kind, in place; those with the lowest radius stand so near a tap that they touch it."""
    generator = torch.Generator().manual_seed(seed)
    coords, radius = layer.coords, layer.radius
    anywhere = torch.empty(coords.shape, dtype=torch.float64).uniform_(-1.5, 1.5, generator=generator)
    taps = layer.grid[0].double()
    near = taps[torch.randint(len(taps), coords.shape, generator=generator)]
    near = near + torch.empty(coords.shape, dtype=torch.float64).uniform_(-0.8e-4, 0.8e-4, generator=generator)
    outside = torch.where(anywhere > 0, anywhere.abs() / 3 + 1, -anywhere.abs() / 3 - 1)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64))
        if layer.bias is not None:
            layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator, dtype=torch.float64))
        if kind == "lowest":
            coords.copy_(near)
            radius.fill_(LOWEST)
        elif kind == "highest":
            coords.copy_(anywhere)
            radius.fill_(HIGHEST)
        elif kind == "both":
            wide = torch.rand(radius.shape, generator=generator) < 0.5
            coords.copy_(torch.where(wide.unsqueeze(-1), anywhere, near))
            radius.copy_(torch.where(wide, HIGHEST, LOWEST))
        elif kind == "outside":
            coords.copy_(outside)
            radius.uniform_(0.3, HIGHEST, generator=generator)
        else:
            # Nothing is touched: an empty kernel, and the bias alone.
            coords.fill_(3.0)
            radius.fill_(HIGHEST)


def dense_kernel(layer: SMPConv1d) -> Tensor:
    return render_kernel_reference(layer.coords, layer.radius, layer.weight, layer.grid, layer.normalization)


def dense(layer: SMPConv1d, x: Tensor) -> Tensor:
    return causal_conv1d_reference(x, dense_kernel(layer), layer.bias)


def dense_network(model: SMPConvTCN, x: Tensor) -> Tensor:
    """A network of one width and one pooling, "last", from the slow twins and PyTorch's own modules."""
    for block in model.blocks:
        y = x
        for pair in (block.conv1, block.conv2):
            small = pair.small.conv
            y = torch.relu(
                pair.large.norm(dense(pair.large.conv, y))
                + pair.small.norm(causal_conv1d_reference(y, small.weight, small.bias))
            )
        x = torch.relu(y + block.shortcut(x))
    logits: Tensor = model.head.fc(x[:, :, -1])
    return logits


def compare_gradients(ours: Tensor, reference: Tensor, layer: nn.Module, x: Tensor, allowed: float) -> None:
    leaves = {"x": x, **dict(layer.named_parameters())}
    upstream = seeded(*ours.shape, dtype=ours.dtype, seed=7)
    found = torch.autograd.grad(ours, list(leaves.values()), upstream)
    expected = torch.autograd.grad(reference, list(leaves.values()), upstream)
    for name, gradient, exact in zip(leaves, found, expected, strict=True):
        assert relative_error(gradient, exact) <= allowed, name


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_layer_on_any_length(dtype: torch.dtype, kind: str, length: int, batch: int) -> None:
    for taps in (16, 17):
        layer = SMPConv1d(2, 3, taps, n_points=6, bias=True, dtype=dtype)
        place_points_(layer, kind)
        x = seeded(batch, 2, length, dtype=dtype).requires_grad_()
        ours = layer(x)
        assert ours.shape == (batch, 3, length) and ours.dtype == dtype
        reference = dense(layer, x)
        assert relative_error(ours, reference) <= FORWARD[dtype]
        compare_gradients(ours, reference, layer, x, GRADIENT[dtype])


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("length", [1, 11, 300, 701])
def test_a_layer_through_the_transform(length: int, shared: bool, normalization: str) -> None:
    for kind in KINDS:
        layer = SMPConv1d(4, 5, 500, shared_points=shared, normalization=normalization, dtype=torch.float64)
        place_points_(layer, kind)
        x = seeded(1, 4, length).requires_grad_()
        ours, reference = layer(x), dense(layer, x)
        assert relative_error(ours, reference) <= FORWARD[torch.float64], kind
        compare_gradients(ours, reference, layer, x, GRADIENT[torch.float64])


def network(kernel_size: int, kind: str, dtype: torch.dtype) -> SMPConvTCN:
    torch.manual_seed(0)
    model = SMPConvTCN(2, 4, kernel_size=kernel_size, dims=(3, 3, 4), n_points=6, dtype=dtype)
    seed = 0
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, SMPConv1d):
                seed += 1
                place_points_(module, kind, seed)
            elif isinstance(module, CausalConv1d):
                module.weight.normal_()
            elif isinstance(module, nn.BatchNorm1d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
                module.running_mean.normal_()
                module.running_var.uniform_(5, 20)
        model.head.fc.weight.normal_()
    return model


# Batch norms cannot learn from a single value.
@pytest.mark.parametrize(
    ("training", "batch", "length"),
    [(False, batch, length) for batch in (1, 3) for length in (1, 4, 15, 33, 64)]
    + [(True, batch, length) for batch, length in ((1, 4), (1, 33), (3, 2), (3, 15), (3, 64))],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_network_on_any_length(kind: str, training: bool, batch: int, length: int) -> None:
    model = network(16, kind, torch.float64).train(training)
    twin = copy.deepcopy(model)
    x = seeded(batch, 2, length).requires_grad_()
    ours, reference = model(x), dense_network(twin, x)
    assert ours.shape == (batch, 4) and reference.std() > 0
    assert relative_error(ours, reference) <= 1e-10
    names = [name for name, _ in model.named_parameters()]
    upstream = seeded(batch, 4, seed=7)
    found = torch.autograd.grad(ours, [x, *model.parameters()], upstream, retain_graph=True)
    expected = torch.autograd.grad(reference, [x, *twin.parameters()], upstream)
    # In train mode what is exactly zero, such as the gradient of a bias before a norm, is rounding on either side.
    scale = max(float(gradient.abs().max()) for gradient in expected)
    for name, gradient, exact in zip(["x", *names], found, expected, strict=True):
        error = float((gradient - exact).abs().max())
        assert error <= 1e-9 * float(exact.abs().max()) + 1e-12 * scale, name


@pytest.mark.parametrize("length", [1, 33])
def test_a_network_in_single_precision(length: int) -> None:
    for kind in ("highest", "outside", "far"):
        model = network(16, kind, torch.float32).eval()
        x = seeded(1, 2, length, dtype=torch.float32)
        exact = dense_network(copy.deepcopy(model).double(), x.double())
        assert relative_error(model(x), exact) <= 1e-5, kind


# --- how far a kernel reaches

# Multiples of an eighth stand on taps and put edges of tents on taps; the floats are everything else.
coordinates = st.one_of(st.integers(-12, 12).map(lambda n: n / 8), st.floats(-1.5, 1.5, width=32))
radii = st.one_of(
    st.sampled_from([LOWEST, 0.125, 0.25, 0.5, HIGHEST]), st.floats(LOWEST, HIGHEST).map(lambda r: max(LOWEST, r))
)


def layer_of(points: list[tuple[float, float]], taps: int, normalization: str, dtype: torch.dtype) -> SMPConv1d:
    layer = SMPConv1d(1, 1, taps, n_points=len(points), normalization=normalization)
    with torch.no_grad():
        layer.coords.copy_(torch.tensor([[[coordinate] for coordinate, _ in points]]))
        layer.radius.copy_(torch.tensor([[radius for _, radius in points]]))
        layer.weight.fill_(1.0)
    return layer.to(dtype)


@given(
    points=st.lists(st.tuples(coordinates, radii), min_size=1, max_size=6),
    taps=st.integers(2, 200),
    normalization=st.sampled_from(NORMALIZATIONS),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
@example(points=[(1.0, 0.5)], taps=9, normalization="count", dtype=torch.float32)
@example(points=[(1.5, LOWEST)], taps=200, normalization="count", dtype=torch.float32)
@example(points=[(-1.5, HIGHEST)], taps=2, normalization="sum", dtype=torch.float32)
def test_older_taps_than_a_layer_reaches_are_exactly_zero(
    points: list[tuple[float, float]], taps: int, normalization: str, dtype: torch.dtype
) -> None:
    layer = layer_of(points, taps, normalization, dtype)
    reach = layer.reach()
    kernel = dense_kernel(layer)
    assert 1 <= reach <= taps
    assert not kernel[:, :, : taps - reach].any()
    # Nor is it much too large: all weights are 1, so the oldest tap that is not zero is the oldest touched.
    if dtype != torch.bfloat16 and kernel.any():
        oldest = int(kernel[0, 0].nonzero()[0])
        assert reach <= taps - oldest + 2


@given(
    points=st.lists(st.tuples(coordinates, radii), min_size=1, max_size=6),
    taps=st.integers(2, 200),
    length=st.integers(1, 250),
    drift=st.floats(0, 1e-4),
)
def test_the_kernel_for_a_length_is_the_end_of_the_whole(
    points: list[tuple[float, float]], taps: int, length: int, drift: float
) -> None:
    layer = layer_of(points, taps, "count", torch.float64)
    # The grid of averaged weights has drifted, each tap by its own amount.
    layer.grid.copy_(tap_grid((taps,), dtype=torch.float64) * (1 - drift))
    kernel, whole = layer.kernel_for(seeded(1, 1, length)), dense_kernel(layer)
    assert 1 <= kernel.size(2) <= min(taps, length)
    torch.testing.assert_close(kernel, whole[:, :, taps - kernel.size(2) :], rtol=1e-12, atol=1e-12)
    assert not whole[:, :, taps - min(taps, length) : taps - kernel.size(2)].any()
