"""A signal in pieces against the whole signal at once: any cut, any length, and what a stream keeps and refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_equal_to_reference
from torch import Tensor, nn

import smpconv_zoo
from smpconv_zoo import streaming
from smpconv_zoo.data.mnist5k import mnist5k_sequences
from smpconv_zoo.kernels import render_kernel_reference
from smpconv_zoo.layers import CausalConv1d, SMPConv1d
from smpconv_zoo.models import SMPConvTCN
from smpconv_zoo.ops import causal_conv1d_reference
from smpconv_zoo.streaming import CausalStream

# Every entrypoint, with kernels short enough for many sequences longer than they are.
SHORT = {
    "smpconv_tcn": {"kernel_size": 17},
    "smpconv_tcn_mnist": {"kernel_size": 16},
    "smpconv_tcn_cifar": {"kernel_size": 21, "dims": (8, 12)},
    "smpconv_tcn_chartraj": {"kernel_size": 9, "dims": (6, 6, 6)},
    "smpconv_tcn_speech_mfcc": {"kernel_size": 33, "dims": (10, 4), "drop_path_rate": 0.1},
    # As long as its points reach, and no direct convolution of all taps at once.
    "smpconv_tcn_speech_raw": {"kernel_size": 700, "dims": (4, 5)},
    "test_smpconv_tcn": {},
}
POOLS = ("last", "avg", "max", "")
# Double precision through other sums; relative to the largest value.
FLOAT64 = 1e-10


def build(name: str = "test_smpconv_tcn", dtype: torch.dtype = torch.float32, **kwargs: Any) -> SMPConvTCN:
    """A network in eval mode whose points lie anywhere, in and out of the kernel, and whose norms have seen data."""
    torch.manual_seed(0)
    arguments = {**SHORT[name], **kwargs}
    if arguments.get("global_pool") == "":
        arguments["num_classes"] = 0
    model = timm.create_model(name, dtype=torch.float64, **arguments)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, SMPConv1d):
                module.coords.uniform_(-1.2, 1.2)
                module.radius.uniform_(0.01, 0.3)
                # One point before the oldest tap, so that every kernel is as long as it can be.
                module.coords[:, 0], module.radius[:, 0] = -1.1, 0.3
                module.weight.normal_()
            elif isinstance(module, CausalConv1d):
                module.weight.normal_()
            elif isinstance(module, nn.BatchNorm1d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
                module.momentum = None
        if arguments.get("num_classes", 10):
            model.head.fc.weight.normal_()
        model.train()(signal(4, model.in_chans, 3 * arguments.get("kernel_size", 32), dtype=torch.float64, seed=9))
    return model.to(dtype).eval()


def signal(batch: int, channels: int, length: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(batch, channels, length, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cut(x: Tensor, sizes: list[int]) -> list[Tensor]:
    """Pieces of the given sizes, repeated until the signal ends."""
    pieces = []
    start = 0
    while start < x.size(2):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(x[:, :, start : start + size])
        start += size
    return pieces


def features_in_pieces(model: SMPConvTCN, x: Tensor, sizes: list[int]) -> Tensor:
    stream = CausalStream(model)
    return torch.cat([stream.features(piece) for piece in cut(x, sizes)], dim=2)


@torch.no_grad()
def check(model: SMPConvTCN, x: Tensor, sizes: list[int]) -> None:
    """Features of all samples, and the answer after the last piece, are those of the whole."""
    whole = model.forward_features(x)
    assert whole.std() > 0.05, "a network that says nothing proves nothing"
    assert_equal_to_reference(features_in_pieces(model, x, sizes), whole, "streamed", f"features, cut {sizes}")
    stream = CausalStream(model)
    for piece in cut(x, sizes):
        answer = stream(piece)
    if model.head.pool_type == "":
        answer, expected = answer[:, :, -1], model(x)[:, :, -1]
    else:
        expected = model(x)
    assert_equal_to_reference(answer, expected, "streamed", f"answer, cut {sizes}")
    assert stream.length == x.size(2)


# --- pieces are the whole


@pytest.fixture(params=["directly", "by causal_conv1d"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either way to convolve a piece, whatever its size."""
    monkeypatch.setattr(streaming, "_DIRECT_SAMPLES", 10**9 if request.param == "directly" else 0)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("sizes", [[1], [3], [7, 1, 13], [64, 65], [10_000]], ids=str)
@pytest.mark.parametrize("name", SHORT)
def test_pieces_give_the_whole(name: str, sizes: list[int]) -> None:
    model = build(name)
    for length in (1, 5, 2 * model.blocks[0].conv1.large.conv.kernel_size[0] + 3):
        # One sample at a time is slow where the kernel is long.
        check(model, signal(2, model.in_chans, length), sizes if length < 500 or sizes[0] > 5 else [39, *sizes])


MODELS = {pool: build(global_pool=pool) for pool in POOLS}


@pytest.mark.parametrize("pool", POOLS)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 150),
    sizes=st.lists(st.one_of(st.integers(1, 5), st.integers(1, 100)), min_size=1, max_size=8),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25)
def test_any_cut_gives_the_whole(pool: str, batch: int, length: int, sizes: list[int], seed: int) -> None:
    check(MODELS[pool], signal(batch, 1, length, seed=seed), sizes)


@pytest.mark.parametrize("pool", POOLS)
@torch.no_grad()
def test_the_answer_after_every_piece_is_as_of_its_last_sample(pool: str) -> None:
    model = MODELS[pool]
    x = signal(2, 1, 60)
    stream = CausalStream(model)
    seen = 0
    for piece in cut(x, [1, 4, 2, 30]):
        seen += piece.size(2)
        answer, expected = stream(piece), model(x[:, :, :seen])
        if pool == "":
            assert answer.shape == piece.shape[:1] + (6,) + piece.shape[2:]
            expected = expected[:, :, -piece.size(2) :]
        assert_equal_to_reference(answer, expected, "streamed", f"after {seen} samples")
        assert stream.length == seen and not answer.requires_grad


@torch.no_grad()
def test_features_and_answers_go_on_with_the_same_signal() -> None:
    model, x = MODELS["avg"], signal(2, 1, 50)
    stream = CausalStream(model)
    stream.features(x[:, :, :20])
    stream(x[:, :, 20:21])
    features = stream.features(x[:, :, 21:40])
    assert_equal_to_reference(features, model.forward_features(x[:, :, :40])[:, :, 21:], "streamed")
    assert_equal_to_reference(stream(x[:, :, 40:]), model(x), "streamed")


def float64_error(model: SMPConvTCN, sizes: list[int]) -> float:
    with torch.no_grad():
        x = signal(2, 1, 130, dtype=torch.float64)
        whole = model.forward_features(x)
        return float((features_in_pieces(model, x, sizes) - whole).abs().max() / whole.abs().max())


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("sizes", [[1], [5], [3, 80], [130]], ids=str)
def test_double_precision(sizes: list[int]) -> None:
    assert float64_error(build(dtype=torch.float64), sizes) < FLOAT64
    assert float64_error(build(dtype=torch.float64, small_kernel_size=40), sizes) < FLOAT64
    assert float64_error(build(dtype=torch.float64, conv_bias=False, small_kernel_size=1), sizes) < FLOAT64


@torch.no_grad()
def test_half_precision() -> None:
    model = build()
    exact = copy.deepcopy(model).bfloat16().double()
    x = signal(2, 1, 100).bfloat16()
    whole = exact.forward_features(x.double())
    for sizes in ([7], [90]):
        pieces = features_in_pieces(copy.deepcopy(model).bfloat16(), x, sizes)
        assert pieces.dtype == torch.bfloat16
        # Four convolutions with sums of some 200 products, kernels and outputs rounded to 2^-9.
        assert (pieces.double() - whole).abs().max() < 0.03 * whole.abs().max()


@torch.no_grad()
def test_a_network_written_out_by_hand() -> None:
    """One block from the slow twins, so that nothing of the package's fast paths is in the expected answer."""
    model = build(dims=(3,), dtype=torch.float64)
    x = signal(2, 1, 75, dtype=torch.float64)
    y = x
    for pair in (model.blocks[0].conv1, model.blocks[0].conv2):
        layer = pair.large.conv
        kernel = render_kernel_reference(layer.coords, layer.radius, layer.weight, layer.grid, "count")
        large = pair.large.norm(causal_conv1d_reference(y, kernel, layer.bias))
        y = torch.relu(large + pair.small.norm(causal_conv1d_reference(y, pair.small.conv.weight)))
    expected = torch.relu(y + model.blocks[0].shortcut(x))
    torch.testing.assert_close(features_in_pieces(model, x, [2, 9]), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@torch.no_grad()
def test_the_shipped_checkpoint_reads_digits_pixel_by_pixel() -> None:
    model = timm.create_model("smpconv_tcn_mnist.smnist5k", pretrained=True).eval()
    digits, labels = mnist5k_sequences("test")
    digits, labels = digits[::250], labels[::250]
    assert digits.shape == (4, 1, 784)
    whole = model(digits)
    for sizes in ([97], [28], [500]):
        stream = CausalStream(model)
        for piece in cut(digits, sizes):
            answer = stream(piece)
        assert_equal_to_reference(answer, whole, "streamed", f"cut {sizes}")
    assert torch.equal(answer.argmax(1), labels)
    # One digit, one pixel at a time, and on beyond the kernel: two digits in a row.
    two = torch.cat((digits[:1], digits[1:2]), dim=2)
    stream = CausalStream(model)
    for pixel in cut(two[:, :, :784], [1]):
        answer = stream(pixel)
    assert_equal_to_reference(answer, whole[:1], "streamed", "one pixel at a time")
    for piece in cut(two[:, :, 784:], [100]):
        answer = stream(piece)
    assert_equal_to_reference(answer, model(two), "streamed", "beyond the kernel")


@torch.no_grad()
def test_an_average_over_a_long_signal_still_feels_single_samples() -> None:
    model = build(global_pool="avg", dims=(2,), num_classes=0)
    stream = CausalStream(model)
    x = signal(1, 1, 4000)
    for _ in range(50):
        stream(x)
    expected = model.double()(x.double().repeat(1, 1, 50))
    assert_equal_to_reference(stream(x[:, :, :1]) * 200_001, expected * 200_000, "streamed")


# --- what is kept


def documented_bytes(model: SMPConvTCN, batch: int, pool: str = "last") -> int:
    bytes_of = model.head.fc.weight.element_size() if isinstance(model.head.fc, nn.Linear) else 4
    total = 0
    for block in model.blocks:
        for pair in (block.conv1, block.conv2):
            taps = max(pair.large.conv.reach(), pair.small.conv.kernel_size[0])
            total += batch * pair.large.conv.in_channels * (taps - 1) * bytes_of
    return total + batch * model.num_features * {"avg": 8, "max": bytes_of}.get(pool, 0)


@pytest.mark.parametrize("pool", POOLS)
def test_memory_does_not_grow(pool: str) -> None:
    model = MODELS[pool]
    stream = CausalStream(model)
    assert stream.state_bytes == 0
    for piece in cut(signal(3, 1, 3000), [1, 17, 200]):
        stream(piece)
        assert stream.state_bytes == documented_bytes(model, 3, pool)
    stream.reset()
    assert (stream.state_bytes, stream.length) == (0, 0)


def test_memory_is_as_points_reach_not_as_long_as_the_kernel() -> None:
    torch.manual_seed(0)
    # As the authors draw the points: they crowd at the current sample, and at 16,000 taps reach back over a fraction.
    model = timm.create_model("smpconv_tcn_speech_raw", dims=(3, 3)).eval()
    stream = CausalStream(model)
    stream(signal(1, 1, 2))
    kernels = sum(pair.kernel.size(1) * (pair.kernel.size(2) - 1) for pair in stream._pairs)
    assert stream.state_bytes == 4 * kernels == documented_bytes(model, 1)
    assert 0 < stream.state_bytes < 0.6 * 4 * (1 + 3 + 3 + 3) * 15_999


@torch.no_grad()
def test_points_that_touch_nothing_leave_the_small_kernel() -> None:
    model = build(small_kernel_size=1)
    for module in model.modules():
        if isinstance(module, SMPConv1d):
            module.coords.fill_(3.0)
            module.radius.fill_(1e-4)
    stream = CausalStream(model)
    check(model, signal(1, 1, 9), [2])
    stream(signal(1, 1, 4))
    assert stream.state_bytes == documented_bytes(model, 1)


@torch.no_grad()
def test_reset_starts_another_signal_of_any_batch() -> None:
    model = MODELS["max"]
    stream = CausalStream(model)
    x = signal(2, 1, 40)
    stream(100 * x)
    stream.reset()
    assert torch.equal(stream(x), CausalStream(model)(x))
    stream.reset()
    assert stream(signal(5, 1, 3)).shape == (5, 10)


@torch.no_grad()
def test_two_streams_of_one_network_do_not_meet() -> None:
    model = MODELS["avg"]
    a, b = signal(2, 1, 60, seed=1), signal(3, 1, 60, seed=2)
    first, second = CausalStream(model), CausalStream(model)
    for piece_a, piece_b in zip(cut(a, [7]), cut(b, [7]), strict=True):
        answer_a, answer_b = first(piece_a), second(piece_b)
    assert_equal_to_reference(answer_a, model(a), "streamed")
    assert_equal_to_reference(answer_b, model(b), "streamed")


@torch.no_grad()
def test_the_network_and_its_stream_do_not_meet() -> None:
    model, x = build(), signal(1, 1, 40)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stream = CausalStream(model)
    expected = CausalStream(model)(x)
    stream(x[:, :, :20])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    for parameter in model.parameters():
        parameter.zero_()
    model.train()(signal(4, 1, 40))
    assert_equal_to_reference(stream(x[:, :, 20:]), expected, "streamed")


@pytest.mark.parametrize("pool", POOLS)
@torch.no_grad()
def test_what_is_handed_out_and_in_may_be_overwritten(pool: str) -> None:
    model, x = MODELS[pool], signal(1, 1, 40)
    stream, expected = CausalStream(model), CausalStream(model)
    for piece in cut(x, [40, 5, 1]):
        mine = piece.clone()
        stream(mine).fill_(float("nan"))
        mine.fill_(float("nan"))
        expected(piece)
    for piece in cut(x, [11]):
        mine = piece.clone()
        stream.features(mine).fill_(float("nan"))
        mine.fill_(float("nan"))
        expected.features(piece)
    assert torch.equal(stream(x), expected(x))


def test_nothing_is_recorded_and_autocast_has_no_effect() -> None:
    model, x = MODELS["last"], signal(1, 1, 40)
    expected = CausalStream(model)(x)
    with torch.autocast("cpu"):
        stream = CausalStream(model)
        answer = stream(x.requires_grad_())
    assert torch.equal(answer, expected) and not answer.requires_grad


# --- what is refused


@pytest.mark.parametrize(
    ("piece", "sentence"),
    [
        (torch.zeros(2, 3, 5), r"expected a piece \(N, C, l\) with C = 1 channels, got shape \(2, 3, 5\)"),
        (torch.zeros(2, 5), r"expected a piece \(N, C, l\) with C = 1 channels, got shape \(2, 5\)"),
        (torch.zeros(2, 1, 0), r"a piece needs at least one sample, got shape \(2, 1, 0\)"),
        (torch.zeros(3, 1, 4), r"began with a batch of 2 signals, this piece has 3; call reset\(\) before another"),
        (torch.zeros(2, 1, 4).double(), r"piece is torch.float64 on cpu, the weights of .* are torch.float32 on cpu"),
        (torch.zeros(2, 1, 4, dtype=torch.int64), r"the piece is torch.int64 on cpu"),
        (torch.zeros(2, 1, 4, device="meta"), r"the piece is torch.float32 on meta"),
    ],
    ids=["channels", "rank", "empty", "batch", "double", "integers", "device"],
)
@torch.no_grad()
def test_a_piece_that_does_not_fit_changes_nothing(piece: Tensor, sentence: str) -> None:
    model, x = MODELS["max"], signal(2, 1, 30)
    stream = CausalStream(model)
    stream(x[:, :, :10])
    for feed in (stream, stream.features):
        with pytest.raises(ValueError, match=sentence):
            feed(piece)
    assert stream.length == 10
    assert_equal_to_reference(stream(x[:, :, 10:]), model(x), "streamed")


def without_statistics(model: SMPConvTCN) -> None:
    model.blocks[1].conv2.large.norm = nn.BatchNorm1d(6, track_running_stats=False).eval()


def another_norm(model: SMPConvTCN) -> None:
    model.blocks[0].conv1.small.norm = nn.GroupNorm(1, 6).eval()


def another_convolution(model: SMPConvTCN) -> None:
    model.blocks[0].conv1.small.conv = nn.Conv1d(1, 6, 5, padding=2).eval()


def another_pair(model: SMPConvTCN) -> None:
    model.blocks[0].conv2 = nn.Identity().eval()


@pytest.mark.parametrize(
    ("spoil", "error", "sentence"),
    [
        (lambda model: model.train(), ValueError, r"the network is in training mode; call model.eval\(\)"),
        (lambda model: model.blocks[1].conv2.large.norm.train(), ValueError, r"^blocks.1.conv2.large.norm is in train"),
        (without_statistics, ValueError, r"^blocks.1.conv2.large.norm has no running statistics"),
        (another_norm, TypeError, r"needs a batch norm in place blocks.0.conv1.small.norm, got GroupNorm"),
        (another_convolution, TypeError, r"SMPConv1d and CausalConv1d in blocks.0.conv1, got SMPConv1d and Conv1d"),
        (another_pair, TypeError, r"an ActivatedPair with a ReLU in place blocks.0.conv2, got Identity"),
    ],
    ids=["training", "norm in training", "no statistics", "norm", "convolution", "pair"],
)
def test_a_network_that_cannot_be_streamed(spoil: Any, error: type[Exception], sentence: str) -> None:
    model = build()
    spoil(model)
    with pytest.raises(error, match=sentence):
        CausalStream(model)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), timm.create_model("smpconv_resnet", kernel_size=3), None])
def test_another_network(model: Any) -> None:
    with pytest.raises(TypeError, match=f"a stream needs an SMPConvTCN, got {type(model).__name__}"):
        CausalStream(model)


# --- other ways to a network


@torch.no_grad()
def test_a_pruned_network_and_another_classifier() -> None:
    model = build(dims=(6, 4, 5))
    model.prune_intermediate_layers([1])
    check(model, signal(2, 1, 70), [9])
    model.reset_classifier(3, "avg")
    answer = CausalStream(model.eval())(signal(2, 1, 70))
    assert answer.shape == (2, 3)
    assert_equal_to_reference(answer, model(signal(2, 1, 70)), "streamed")


def test_it_is_on_the_front_page() -> None:
    assert smpconv_zoo.CausalStream is CausalStream


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sizes", [[1], [7, 90], [10_000]], ids=str)
def test_on_a_gpu(sizes: list[int]) -> None:
    model = build("smpconv_tcn_mnist").cuda()
    check(model, signal(2, 1, 300).cuda(), sizes)
    check(build("smpconv_tcn_speech_raw").cuda(), signal(2, 1, 900).cuda(), [1000] if sizes == [1] else sizes)
