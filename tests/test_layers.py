"""The layers: their arguments, shapes, orientation and causality, and everything PyTorch does with a module."""

import copy
import io
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smpconv_zoo.kernels import render_kernel
from smpconv_zoo.layers import (
    CausalConv1d,
    ConvNorm,
    LargeSmallConv,
    SMPConv1d,
    SMPConv2d,
    clip_radius_,
    parameter_roles,
)
from smpconv_zoo.points import tap_grid

# The same sums in another order or through a transform, single precision, values near 1.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
FLOAT64 = {"rtol": 1e-10, "atol": 1e-10}

SCRIPT_IS_DEPRECATED = "ignore:.torch.jit.*deprecated:FutureWarning"
SCRIPT_IS_DEPRECATED_TOO = "ignore:.torch.jit.*deprecated:DeprecationWarning"


def seeded(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def randomized(layer: nn.Module) -> nn.Module:
    """The layer with larger weights and a bias other than zero, so that a lost term shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name in ("weight", "bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def layers() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """A layer of every kind, and the shape of an input."""
    torch.manual_seed(0)
    return {
        "depthwise": (randomized(SMPConv2d(4, 4, 7, groups=4)), (2, 4, 9, 8)),
        "depthwise, bias": (randomized(SMPConv2d(4, 4, (5, 17), groups=4, bias=True)), (2, 4, 9, 8)),
        "dense, bias": (randomized(SMPConv2d(3, 5, 7, bias=True, normalization="count")), (2, 3, 9, 8)),
        "causal": (randomized(SMPConv1d(3, 5, 12)), (2, 3, 20)),
        "causal, bias": (randomized(SMPConv1d(3, 5, 25, bias=True, shared_points=True)), (2, 3, 20)),
        "small": (randomized(CausalConv1d(3, 5, 4)), (2, 3, 20)),
    }


KINDS = list(layers())
POINT_KINDS = [kind for kind in KINDS if kind != "small"]


# --- arguments


def test_depthwise_defaults() -> None:
    layer = SMPConv2d(6, 6, 13, groups=6)
    assert (layer.in_channels, layer.out_channels, layer.groups, layer.depthwise) == (6, 6, 6, True)
    assert layer.kernel_size == (13, 13) and layer.n_points == 13 * 13 // 4 and layer.normalization == "sum"
    assert layer.shared_points and layer.bias is None and layer.radius_bounds == (1e-3, 1.0)
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "coords": (42, 2),
        "radius": (42,),
        "weight": (6, 1, 42),
        "grid": (2, 13, 13),
    }
    assert torch.equal(layer.grid, tap_grid((13, 13)))
    assert layer.radius.unique().item() == pytest.approx(4 / 13, rel=1e-6)  # float32
    assert layer.kernel().shape == (6, 1, 13, 13)


def test_dense_defaults() -> None:
    layer = SMPConv2d(3, 6, (5, 7))
    assert not layer.depthwise and not layer.shared_points and layer.groups == 1
    assert layer.n_points == 8 and layer.coords.shape == (6, 8, 2) and layer.weight.shape == (6, 3, 8)
    assert layer.radius.shape == (6, 8)
    assert layer.radius.unique().item() == pytest.approx(4 / 5, rel=1e-6)  # float32
    assert layer.kernel().shape == (6, 3, 5, 7)


def test_causal_defaults() -> None:
    layer = SMPConv1d(3, 6, 101)
    assert layer.kernel_size == (101,) and layer.n_points == 30 and layer.normalization == "count"
    assert not layer.shared_points and layer.bias is None and layer.radius_bounds == (1e-4, 1.0)
    assert layer.coords.shape == (6, 30, 1) and layer.radius.shape == (6, 30) and layer.weight.shape == (6, 3, 30)
    assert layer.radius.unique().item() == pytest.approx(2 / 100, rel=1e-6)  # float32
    # One tap spacing of a kernel of two taps is 2: the widest radius is 1.
    assert SMPConv1d(1, 1, 2).radius.unique().item() == 1
    assert layer.kernel().shape == (6, 3, 101)


def test_arguments_take_effect() -> None:
    layer = SMPConv2d(4, 4, 9, groups=4, points_divisor=8)
    assert layer.n_points == 81 // 8
    layer = SMPConv2d(4, 4, 3, groups=4, points_divisor=100)
    assert layer.n_points == 1
    layer = SMPConv2d(
        4,
        4,
        9,
        groups=4,
        bias=True,
        n_points=5,
        shared_points=False,
        normalization="count",
        init_radius=0.3,
        coord_std=0.01,
        radius_bounds=(0.1, 0.2),
        dtype=torch.float64,
    )
    assert layer.coords.shape == (4, 5, 2) and layer.radius.shape == (4, 5) and layer.coords.dtype == torch.float64
    assert layer.bias is not None and layer.bias.shape == (4,) and not layer.bias.any()
    assert layer.radius.unique().item() == 0.3 and layer.coords.abs().max() < 0.06
    expected = render_kernel(layer.coords, layer.radius, layer.weight, layer.grid, "count")
    assert torch.equal(layer.kernel(), expected)
    shared = SMPConv1d(3, 4, 9, n_points=7, shared_points=True, normalization="sum", init_radius=0.4, bias=True)
    assert shared.coords.shape == (7, 1) and shared.radius.shape == (7,) and shared.weight.shape == (4, 3, 7)
    expected = render_kernel(shared.coords, shared.radius, shared.weight, shared.grid, "sum")
    assert torch.equal(shared.kernel(), expected)
    meta = SMPConv2d(4, 4, 9, groups=4, device="meta")
    assert {value.device.type for value in meta.state_dict().values()} == {"meta"}
    narrow = SMPConv1d(3, 4, 9, coord_std=1e-3, n_points=50)
    assert narrow.coords.min() > 0.98
    for text in ("4, 4", "kernel_size=(9, 9)", "n_points=5", "shared_points=False", "normalization='count'"):
        assert text in repr(layer)


@pytest.mark.parametrize("size", [2, 8, (3, 4), (4, 3), 1, (1, 5), (3,), (3, 3, 3), -3])
def test_2d_kernels_must_be_odd(size: object) -> None:
    with pytest.raises(ValueError, match="kernel_size must be odd and at least 3 along both axes, got"):
        SMPConv2d(4, 4, size)  # type: ignore[arg-type]


@pytest.mark.parametrize(("channels", "groups"), [((4, 4), 2), ((4, 8), 4), ((8, 4), 4), ((4, 4), 0), ((4, 4), -1)])
def test_groups_are_one_or_all(channels: tuple[int, int], groups: int) -> None:
    with pytest.raises(ValueError, match="groups must be 1, or in_channels = out_channels for a depthwise"):
        SMPConv2d(*channels, 7, groups=groups)


def test_sizes_must_be_positive() -> None:
    with pytest.raises(ValueError, match="in_channels must be at least 1, got 0"):
        SMPConv2d(0, 4, 7)
    with pytest.raises(ValueError, match="out_channels must be at least 1, got 0"):
        SMPConv2d(4, 0, 7)
    with pytest.raises(ValueError, match="points_divisor must be at least 1, got 0"):
        SMPConv2d(4, 4, 7, points_divisor=0)
    with pytest.raises(ValueError, match="n_points must be at least 1, got 0"):
        SMPConv2d(4, 4, 7, n_points=0)
    with pytest.raises(ValueError, match="in_channels must be at least 1, got 0"):
        SMPConv1d(0, 4, 7)
    with pytest.raises(ValueError, match="out_channels must be at least 1, got -1"):
        SMPConv1d(4, -1, 7)
    with pytest.raises(ValueError, match="n_points must be at least 1, got 0"):
        SMPConv1d(4, 4, 7, n_points=0)
    for taps in (1, 0):
        with pytest.raises(ValueError, match=f"kernel_size must be at least 2, got {taps}"):
            SMPConv1d(4, 4, taps)


@pytest.mark.parametrize("wrong", [{"init_radius": -0.1}, {"init_radius": 0.0}, {"coord_std": 0.0}, {"coord_std": -1}])
def test_spreads_must_be_positive(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="init_radius and coord_std must be positive, got"):
        SMPConv2d(4, 4, 7, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="init_radius and coord_std must be positive, got"):
        SMPConv1d(4, 4, 7, **wrong)  # type: ignore[arg-type]


def test_unknown_normalization_is_refused() -> None:
    for build in (lambda: SMPConv2d(4, 4, 7, normalization="mean"), lambda: SMPConv1d(4, 4, 7, normalization="mean")):
        with pytest.raises(ValueError, match=r"normalization must be one of \('sum', 'count'\), got 'mean'"):
            build()


# --- what they compute


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (5, 2), (9, 9), (16, 11)])
@pytest.mark.parametrize("taps", [(5, 5), (9, 3), (13, 13)])
def test_2d_of_any_size_equals_a_convolution_with_the_kernel(
    taps: tuple[int, int], size: tuple[int, int], batch: int
) -> None:
    torch.manual_seed(0)
    padding = (taps[0] // 2, taps[1] // 2)
    x = seeded(batch, 4, *size, dtype=torch.float64)
    layer = randomized(SMPConv2d(4, 4, taps, groups=4, bias=True, dtype=torch.float64))
    expected = F.conv2d(x, layer.kernel(), layer.bias, padding=padding, groups=4)
    torch.testing.assert_close(layer(x), expected, **FLOAT64)
    layer = randomized(SMPConv2d(4, 3, taps, bias=True, dtype=torch.float64))
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.kernel(), layer.bias, padding=padding), **FLOAT64)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 11, 12, 13, 40])
def test_1d_of_any_length_equals_a_padded_convolution(length: int, batch: int) -> None:
    torch.manual_seed(0)
    x = seeded(batch, 3, length, dtype=torch.float64)
    layer = randomized(SMPConv1d(3, 5, 12, bias=True, dtype=torch.float64))
    expected = F.conv1d(F.pad(x, (11, 0)), layer.kernel(), layer.bias)
    assert expected.shape == (batch, 5, length)
    torch.testing.assert_close(layer(x), expected, **FLOAT64)
    small = randomized(CausalConv1d(3, 5, 12, dtype=torch.float64))
    expected = F.conv1d(F.pad(x, (11, 0)), small.weight, small.bias)
    torch.testing.assert_close(small(x), expected, **FLOAT64)


def test_causal_conv_without_bias() -> None:
    small = CausalConv1d(3, 5, 4, bias=False, dtype=torch.float64)
    x = seeded(2, 3, 9, dtype=torch.float64)
    assert small.bias is None and list(small.state_dict()) == ["weight"]
    torch.testing.assert_close(small(x), F.conv1d(F.pad(x, (3, 0)), small.weight), **FLOAT64)


@pytest.mark.parametrize("kind", ["causal", "causal, bias", "small"])
def test_the_future_changes_nothing_and_the_present_does(kind: str) -> None:
    layer, shape = layers()[kind]
    layer = layer.double()
    if isinstance(layer, SMPConv1d):
        # A point at the current sample, so that the last tap is certainly not empty.
        with torch.no_grad():
            layer.coords[..., 0, :] = 1.0
    x = seeded(*shape, dtype=torch.float64)
    for now in (0, 7, shape[-1] - 1):
        changed = x.clone()
        changed[:, :, now] += 1
        change = (layer(changed) - layer(x)).abs().amax((0, 1))
        assert change[:now].max().item() <= 1e-10 if now else True  # rounding of a transform, if one is used
        assert change[now] > 1e-3


def test_last_tap_is_the_current_sample() -> None:
    layer = SMPConv1d(1, 1, 5, n_points=1, normalization="sum", init_radius=0.25)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        for place, delay in ((1.0, 0), (0.5, 1), (-1.0, 4)):
            layer.coords.fill_(place)
            y = layer(torch.tensor([[[1.0, 0, 0, 0, 0, 0]]]))
            # An impulse comes back after the delay of the tap where the point stands: exact in the direct convolution.
            torch.testing.assert_close(y[0, 0], F.one_hot(torch.tensor(delay), 6).float(), **FLOAT32)


def test_a_point_right_and_above_puts_its_mass_there() -> None:
    layer = SMPConv2d(1, 1, 5, groups=1, n_points=1, init_radius=0.25)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.coords.copy_(torch.tensor([[0.5, 0.5]]))
    expected = torch.zeros(5, 5)
    # Rows count downward: above the centre (2, 2) and to its right is row 1, column 3.
    expected[1, 3] = 1.0
    assert torch.equal(layer.kernel()[0, 0], expected)
    # A cross-correlation: the output looks up and to the right, so an impulse appears down and to the left.
    x = torch.zeros(1, 1, 9, 9)
    x[0, 0, 4, 4] = 1
    y = layer(x)[0, 0]
    torch.testing.assert_close(y, F.one_hot(torch.tensor(5 * 9 + 3), 81).view(9, 9).float(), **FLOAT32)


def test_coordinates_follow_the_axes_of_rectangular_kernels() -> None:
    layer = SMPConv2d(1, 1, (3, 9), n_points=1, init_radius=0.25)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.coords.copy_(torch.tensor([[[-0.75, 1.0]]]) if layer.coords.dim() == 3 else torch.tensor([[-0.75, 1.0]]))
    kernel = layer.kernel()[0, 0]
    assert kernel.argmax().item() == 1  # top row, second column
    assert kernel[0, 1] == 1


@pytest.mark.parametrize("kind", POINT_KINDS)
def test_gradients_reach_every_parameter(kind: str) -> None:
    layer, shape = layers()[kind]
    x = seeded(*shape).requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad is not None and x.grad.any()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.count_nonzero() > parameter.numel() / 3, name


def test_the_large_and_the_small_branch_are_summed() -> None:
    torch.manual_seed(0)
    large, small = SMPConv1d(3, 3, 9), CausalConv1d(3, 3, 5)
    pair = LargeSmallConv(ConvNorm(large, nn.BatchNorm1d(3)), ConvNorm(small, nn.BatchNorm1d(3))).eval()
    with torch.no_grad():
        pair.large.norm.weight.fill_(2.0)
        pair.small.norm.bias.fill_(0.5)
    x = seeded(2, 3, 12)
    scale = (1 + 1e-5) ** -0.5
    torch.testing.assert_close(pair(x), 2 * scale * large(x) + scale * small(x) + 0.5, **FLOAT32)


def test_the_small_branch_in_training_is_the_ordinary_one_and_is_heard() -> None:
    torch.manual_seed(0)
    convs = SMPConv2d(6, 6, 9, groups=6), nn.Conv2d(6, 6, 5, padding=2, groups=6, bias=False)
    pair = LargeSmallConv(*(ConvNorm(conv, nn.BatchNorm2d(6)) for conv in convs))
    x = seeded(3, 6, 8, 7).requires_grad_()

    def step() -> tuple[Tensor, ...]:
        y = pair(x)
        return y.detach(), *torch.autograd.grad(y.square().sum(), [x, *pair.parameters()])

    ours = step()
    heard = []
    pair.small.conv.register_forward_hook(lambda module, arguments, y: heard.append(y.shape))
    for mine, plain in zip(ours, step(), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))
    assert heard == [(3, 6, 8, 7)]


# --- points


def test_radii_are_clamped_in_place() -> None:
    layer = SMPConv2d(2, 2, 5, groups=2, n_points=5)
    parameter, address = layer.radius, layer.radius.data_ptr()
    with torch.no_grad():
        layer.radius.copy_(torch.tensor([-1.0, 0.0, 5e-4, 0.5, 3.0]))
    layer.clip_radius_()
    assert layer.radius is parameter and layer.radius.data_ptr() == address and layer.radius.requires_grad
    assert torch.equal(layer.radius.detach(), torch.tensor([1e-3, 1e-3, 1e-3, 0.5, 1.0]))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.clip_radius_()
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_clipping_a_model_uses_the_bounds_of_every_layer() -> None:
    model = nn.Sequential(
        SMPConv1d(2, 2, 5), nn.ModuleList([SMPConv2d(2, 2, 5, groups=2, radius_bounds=(0.2, 0.3))]), nn.Conv1d(2, 2, 3)
    )
    convolution = model[2].weight.clone()
    with torch.no_grad():
        model[0].radius.fill_(-1.0)
        model[1][0].radius.fill_(2.0)
    identities = [id(parameter) for parameter in model.parameters()]
    clip_radius_(model)
    assert model[0].radius.unique().item() == pytest.approx(1e-4, rel=1e-6)  # float32
    assert model[1][0].radius.unique().item() == pytest.approx(0.3, rel=1e-6)  # float32
    assert torch.equal(model[2].weight, convolution)
    assert identities == [id(parameter) for parameter in model.parameters()]


def test_parameter_roles_name_coordinates_and_radii() -> None:
    model = nn.ModuleDict(
        {"a": SMPConv1d(2, 2, 5, bias=True), "b": nn.Sequential(SMPConv2d(2, 2, 5)), "c": nn.Linear(2, 2)}
    )
    roles = parameter_roles(model)
    assert roles == {"a.coords": "coords", "a.radius": "radius", "b.0.coords": "coords", "b.0.radius": "radius"}
    assert set(roles) < set(dict(model.named_parameters()))
    assert parameter_roles(model["a"]) == {"coords": "coords", "radius": "radius"}
    assert parameter_roles(model["c"]) == {}


def test_first_points_in_two_dimensions() -> None:
    torch.manual_seed(0)
    layer = SMPConv2d(64, 64, 31, groups=64, n_points=4000, coord_std=0.2)
    coords, weight = layer.coords.detach(), layer.weight.detach()
    # 4000 draws, 256000 draws: the spreads are known to about 1% and 0.2%.
    assert coords.abs().max() <= 1
    assert coords.mean(0).abs().max() < 0.02
    assert coords.std().item() == pytest.approx(0.2, rel=0.05)
    assert weight.std().item() == pytest.approx(0.02, rel=0.02) and abs(weight.mean().item()) < 1e-3
    wide = SMPConv2d(1, 1, 31, n_points=4000, coord_std=3.0).coords
    assert wide.abs().max() <= 1 and wide.std() > 0.5


def test_first_points_in_one_dimension_crowd_at_the_current_sample() -> None:
    torch.manual_seed(0)
    layer = SMPConv1d(32, 64, 100, n_points=200, coord_std=0.1)
    coords = layer.coords.detach()
    assert coords.min() >= -1 and coords.max() <= 1
    # 12800 draws of 1 - 2 |normal(0, 0.1)|: mean 1 - 0.2 sqrt(2 / pi) = 0.8404, known to 0.001.
    assert coords.mean().item() == pytest.approx(0.8404, abs=0.005)
    assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert layer.radius.unique().item() == pytest.approx(2 / 99, rel=1e-6)  # float32


def test_reset_draws_anew_in_place() -> None:
    layer = SMPConv2d(2, 2, 5, groups=2, init_radius=0.4)
    parameters = list(layer.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        layer.radius.zero_()
    layer.reset_parameters()
    assert [id(parameter) for parameter in layer.parameters()] == [id(parameter) for parameter in parameters]
    assert not torch.equal(layer.coords, before[0]) and not torch.equal(layer.weight, before[2])
    assert torch.equal(layer.radius, before[1])


# --- what PyTorch does with modules


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip(kind: str) -> None:
    layer, shape = layers()[kind]
    x = seeded(*shape)
    if kind != "small":
        # A grid that has drifted while averaging is part of the state.
        layer.grid += 1e-4 * torch.randn(layer.grid.shape, generator=torch.Generator().manual_seed(2))
        assert "grid" in layer.state_dict() and "grid" not in dict(layer.named_parameters())
    other = layers()[kind][0]
    if kind != "small":
        other.reset_parameters()
        assert not torch.equal(other(x), layer(x))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("kind", KINDS)
def test_deepcopy_and_pickle(kind: str) -> None:
    layer, shape = layers()[kind]
    x = seeded(*shape)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        assert all(a is not b for a, b in zip(twin.parameters(), layer.parameters(), strict=True))
        with torch.no_grad():
            twin.weight.add_(1)
        assert not torch.equal(twin(x), layer(x))
        clip_radius_(twin)


@pytest.mark.filterwarnings(SCRIPT_IS_DEPRECATED, SCRIPT_IS_DEPRECATED_TOO)
@pytest.mark.parametrize("kind", KINDS)
def test_script(kind: str) -> None:
    layer, shape = layers()[kind]
    scripted = torch.jit.script(layer)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    x = seeded(*shape)
    torch.testing.assert_close(loaded(x), layer(x), **FLOAT32)
    torch.testing.assert_close(loaded(x[:1]), layer(x[:1]), **FLOAT32)


@pytest.mark.parametrize("kind", KINDS)
def test_compile_traces_one_graph(kind: str) -> None:
    torch.compiler.reset()
    layer, shape = layers()[kind]
    x = seeded(*shape)
    y = layer(x)
    gradients = torch.autograd.grad(y.sum(), list(layer.parameters()))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, y, **FLOAT32)
    for traced, eager in zip(torch.autograd.grad(compiled.sum(), list(layer.parameters())), gradients, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-5 * float(eager.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(kind: str) -> None:
    layer, shape = layers()[kind]
    x = seeded(*shape)
    y = layer(x)
    double = copy.deepcopy(layer).double()
    assert double(x.double()).dtype == torch.float64
    torch.testing.assert_close(double(x.double()), y.double(), **FLOAT32)
    half = copy.deepcopy(layer).bfloat16()
    result = half(x.bfloat16())
    assert result.dtype == torch.bfloat16
    # bfloat16 rounds coordinates and the grid too: by the definition, on the rounded numbers, in double precision.
    twin = copy.deepcopy(half).double()
    if isinstance(half, (SMPConv1d, SMPConv2d)):
        kernel = half.kernel()
        assert kernel.dtype == torch.bfloat16
        # Rendered in float32 and rounded once; a count may differ where a rounded point stands on an edge: not here.
        torch.testing.assert_close(kernel.double(), twin.kernel(), rtol=2**-8, atol=1e-5)
    exact = twin(x.bfloat16().double())
    # Kernel, output and bias are rounded apart, each by 2^-9 of numbers as large as the largest.
    atol = 2**-6 * float(exact.detach().abs().max())
    torch.testing.assert_close(result.double(), exact, rtol=0, atol=atol)


def test_every_depthwise_convolution_of_a_timm_network_can_be_replaced() -> None:
    torch.manual_seed(0)
    model = timm.create_model("convnext_atto", num_classes=5)
    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d) and child.kernel_size == (7, 7) and child.groups == child.in_channels:
                layer = SMPConv2d(child.in_channels, child.out_channels, 7, groups=child.groups, bias=True)
                setattr(parent, name, layer)
                replaced += 1
    assert replaced == 12
    y = model(seeded(2, 3, 64, 64))
    assert y.shape == (2, 5)
    y.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    roles = parameter_roles(model)
    assert len(roles) == 24
    assert all(model.get_parameter(name).grad.any() for name in roles)
    clip_radius_(model)
