"""Every fast path against its slow twin: values, gradients of both orders, precision, tracing, choice of path."""

import inspect
import io
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_files import ROOT, golden
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from smpconv_zoo import ops
from smpconv_zoo.ops import (
    BACKENDS,
    causal_conv1d,
    causal_conv1d_reference,
    conv2d,
    conv2d_reference,
    depthwise_conv2d,
    depthwise_conv2d_reference,
    dispatch,
    fft,
    onednn,
    why_not,
)
from smpconv_zoo.ops.fft import good_fft_size
from smpconv_zoo.ops.kept import KernelCache
from smpconv_zoo.ops.onednn import can_run_onednn

# What a comparison may differ by: a share of each entry (rounding of the result in its own precision), and a share of
# the largest entry (rounding inside the sum; transforms spread it evenly over all outputs). Half precision is computed
# in float32 and rounded once: half a unit in the last place, and one more for inputs of the second gradient.
SHARE_OF_EACH = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SHARE_OF_LARGEST = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}

SCRIPT_IS_DEPRECATED = "ignore:.torch.jit.*deprecated:FutureWarning"
SCRIPT_IS_DEPRECATED_TOO = "ignore:.torch.jit.*deprecated:DeprecationWarning"

Convolution = Callable[..., Tensor]

# The backends that any device can run.
ANYWHERE = ("fft", "reference")


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Compare in double precision by the tables above; ``dtype`` is the precision of the less precise side."""
    dtype = actual.dtype if dtype is None else dtype
    largest = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=SHARE_OF_EACH[dtype], atol=SHARE_OF_LARGEST[dtype] * largest
    )


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers, rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def with_gradients(convolve: Convolution, *tensors: Tensor, upstream: Tensor | None = None) -> list[Tensor]:
    """The result, and the gradient of every tensor for an upstream gradient (drawn when none is given)."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y = convolve(*leaves)
    upstream = draw(*y.shape, seed=99) if upstream is None else upstream
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]


def assert_same(fast: Convolution, slow: Convolution, *tensors: Tensor, upstream: Tensor | None = None) -> None:
    """``fast`` on the tensors equals ``slow`` on the same numbers in double precision, gradients included."""
    dtype = tensors[0].dtype
    upstream = draw(*slow(*tensors).shape, seed=99, dtype=dtype) if upstream is None else upstream
    actual = with_gradients(fast, *tensors, upstream=upstream)
    exact = with_gradients(slow, *(tensor.double() for tensor in tensors), upstream=upstream.double())
    for mine, reference in zip(actual, exact, strict=True):
        assert mine.dtype == dtype and mine.shape == reference.shape
        assert_near(mine, reference)


def depthwise_fft(x: Tensor, weight: Tensor) -> Tensor:
    return depthwise_conv2d(x, weight, backend="fft")


def depthwise_onednn(x: Tensor, weight: Tensor) -> Tensor:
    return depthwise_conv2d(x, weight, backend="onednn")


def dense_fft(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return conv2d(x, weight, bias, backend="fft")


def causal_fft(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return causal_conv1d(x, weight, bias, backend="fft")


# batch, channels, height, width, kernel height, kernel width
MAPS = [
    (2, 3, 12, 12, 5, 5),
    (2, 3, 11, 13, 7, 3),
    (1, 4, 8, 15, 9, 9),
    (2, 1, 9, 9, 3, 3),
    (1, 1, 1, 1, 7, 7),
    (1, 2, 1, 9, 3, 3),
    (2, 3, 12, 4, 13, 13),  # larger than the map
    (2, 2, 3, 3, 31, 31),
    (1, 2, 16, 10, 51, 5),
    (1, 2, 7, 20, 5, 51),
    (1, 2, 10, 10, 1, 1),
]
# batch, channels in, channels out, length, taps
SEQUENCES = [
    *((2, 3, 4, length, taps) for length, taps in itertools.product((15, 16), (4, 5, 15, 16, 17, 18))),
    (1, 1, 1, 1, 9),
    (1, 2, 3, 7, 1),
    (2, 1, 5, 20, 20),
    (2, 5, 1, 20, 7),
    (3, 2, 2, 17, 33),
]
PRECISIONS = list(SHARE_OF_EACH)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("sizes", MAPS)
def test_depthwise_equals_its_slow_twin(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, channels, height, width, *taps = sizes
    x, weight = draw(batch, channels, height, width, dtype=dtype), draw(channels, 1, *taps, seed=1, dtype=dtype)
    assert_same(depthwise_fft, depthwise_conv2d_reference, x, weight)
    assert_same(depthwise_conv2d, depthwise_conv2d_reference, x.float(), weight.float())


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("channels", [(3, 4), (1, 3), (3, 1), (1, 1), (3, 3)])
@pytest.mark.parametrize("sizes", MAPS[::2])
def test_dense_2d_equals_its_slow_twin(sizes: tuple[int, ...], channels: tuple[int, int], dtype: torch.dtype) -> None:
    batch, _, height, width, *taps = sizes
    x, weight = draw(batch, channels[0], height, width, dtype=dtype), draw(*channels[::-1], *taps, seed=1, dtype=dtype)
    assert_same(dense_fft, conv2d_reference, x, weight)
    # Double precision: the float32 weight gradient of F.conv2d itself writes out of bounds for 31 x 5 taps on 16 x 10
    # (oneDNN 3.12 in torch 2.14).
    assert_same(conv2d, conv2d_reference, x.double(), weight.double())


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("sizes", SEQUENCES)
def test_causal_equals_its_slow_twin(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, channels_in, channels_out, length, taps = sizes
    x = draw(batch, channels_in, length, dtype=dtype)
    weight = draw(channels_out, channels_in, taps, seed=1, dtype=dtype)
    assert_same(causal_fft, causal_conv1d_reference, x, weight)
    assert_same(causal_conv1d, causal_conv1d_reference, x.float(), weight.float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_bias_is_added_and_has_its_gradient(dtype: torch.dtype) -> None:
    bias = draw(4, seed=2, dtype=dtype)
    x, weight = draw(2, 3, 20, dtype=dtype), draw(4, 3, 9, seed=1, dtype=dtype)
    assert_same(causal_fft, causal_conv1d_reference, x, weight, bias)
    x, weight = draw(2, 3, 9, 8, dtype=dtype), draw(4, 3, 5, 7, seed=1, dtype=dtype)
    assert_same(dense_fft, conv2d_reference, x, weight, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bias_in_half_precision(dtype: torch.dtype) -> None:
    # The sum and the bias are rounded apart: two roundings of the larger of both.
    bias = draw(4, seed=2, dtype=dtype)
    x, weight = draw(2, 3, 20, dtype=dtype), draw(4, 3, 9, seed=1, dtype=dtype)
    y = causal_fft(x, weight, bias)
    exact = causal_conv1d_reference(x.double(), weight.double(), bias.double())
    assert y.dtype == dtype
    atol = SHARE_OF_EACH[dtype] * float(exact.abs().max())
    torch.testing.assert_close(y.double(), exact, rtol=SHARE_OF_EACH[dtype], atol=atol)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_empty_batches_go_through_the_reference(backend: str) -> None:
    x = torch.empty(0, 3, 8, 9, requires_grad=True)
    weight = draw(3, 1, 31, 31, dtype=torch.float32).requires_grad_()
    y = depthwise_conv2d(x, weight, backend)
    assert y.shape == (0, 3, 8, 9)
    y.sum().backward()
    assert weight.grad is not None and not weight.grad.any()
    assert conv2d(x, draw(4, 3, 31, 31, dtype=torch.float32), None, backend).shape == (0, 4, 8, 9)
    sequence, kernel = torch.empty(0, 3, 900), draw(4, 3, 900, dtype=torch.float32)
    assert causal_conv1d(sequence, kernel, None, backend).shape == (0, 4, 900)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "strided": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "a window of something larger": lambda t: F.pad(t, (3, 2, 1, 4), value=7.0)[..., 1:-4, 3:-2],
    "batch expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_does_not_matter_in_2d(layout: str) -> None:
    arrange = LAYOUTS[layout]
    x, weight = arrange(draw(2, 3, 10, 7)), draw(3, 1, 5, 9, seed=1)
    assert not x.is_contiguous()
    upstream = arrange(draw(2, 3, 10, 7, seed=5))
    assert_same(depthwise_fft, depthwise_conv2d_reference, x, weight, upstream=upstream)
    # As promised to the compiler: plain, unless the channels lie innermost.
    promised = torch.channels_last if layout == "channels last" else torch.contiguous_format
    assert depthwise_fft(x, weight).is_contiguous(memory_format=promised)
    dense = draw(3, 3, 5, 9, seed=1)
    dense = dense if layout == "batch expanded" else arrange(dense)
    assert_same(dense_fft, conv2d_reference, x, dense, upstream=upstream)


@pytest.mark.parametrize("layout", ["transposed", "strided", "batch expanded"])
def test_memory_layout_does_not_matter_in_1d(layout: str) -> None:
    arrange = LAYOUTS[layout]
    x, weight = arrange(draw(2, 3, 17)), draw(3, 3, 8, seed=1)
    assert not x.is_contiguous()
    assert_same(causal_fft, causal_conv1d_reference, x, weight, upstream=arrange(draw(2, 3, 17, seed=5)))


def test_expanded_upstream_gradients() -> None:
    # What the gradient of a sum, and of a spatial mean, look like: strides of zero.
    x, weight = draw(2, 3, 9, 8), draw(3, 1, 5, 5, seed=1)
    for upstream in (torch.ones((), dtype=torch.float64).expand(2, 3, 9, 8), draw(2, 3, 1, 1).expand(2, 3, 9, 8)):
        assert 0 in upstream.stride()
        assert_same(depthwise_fft, depthwise_conv2d_reference, x, weight, upstream=upstream)
        assert_same(dense_fft, conv2d_reference, x, draw(3, 3, 5, 5, seed=1), upstream=upstream)
    upstream = draw(2, 4, 1).expand(2, 4, 30)
    assert_same(causal_fft, causal_conv1d_reference, draw(2, 3, 30), draw(4, 3, 12, seed=1), upstream=upstream)


# What only a GPU can run; tests/test_gpu_kernels.py holds its docstring to what it says.
ON_A_GPU = {"convolve_pair"}


def promises() -> list[tuple[str, str]]:
    """(function, the expression its docstring says it is equivalent to)."""
    found = []
    for name, function in inspect.getmembers(ops, inspect.isfunction):
        expressions = re.findall(r"Equivalent to ``(.+?)``", inspect.getdoc(function) or "")
        found += [(name, expression) for expression in expressions]
    return found


def test_every_convolution_states_what_it_equals() -> None:
    convolutions = {name for name in ops.__all__ if "conv" in name and not name.endswith("_with")}
    assert {name for name, _ in promises()} == convolutions and len(convolutions) == 7


@pytest.mark.parametrize(("name", "expression"), [promise for promise in promises() if promise[0] not in ON_A_GPU])
def test_the_docstrings_say_the_truth(name: str, expression: str) -> None:
    weight: Tensor
    for size, taps in (((10, 7), (5, 3)), ((6, 9), (11, 13))):
        if "conv1d" in name:
            x, weight, bias = draw(2, 3, size[0]), draw(4, 3, taps[0]), draw(4)
        elif "depthwise" in name:
            x, weight, bias = draw(2, 3, *size), draw(3, 1, *taps), None
        else:
            x, weight, bias = draw(2, 3, *size), draw(4, 3, *taps), draw(4)
        names = {"F": F, "x": x, "weight": weight, "bias": bias, "C": x.size(1)}
        names |= {"K": taps[0], "Kh": taps[0], "Kw": taps[1]}
        expected = eval(expression, names)
        arguments = (x, weight) if bias is None else (x, weight, bias)
        assert_near(getattr(ops, name)(*arguments), expected)
        if not name.endswith("_reference"):
            assert_near(getattr(ops, name)(*arguments, backend="fft"), expected)


# --- the reference's values


def golden_cases() -> list[str]:
    """Names of the stored cases."""
    causal = ["L32_K32", "L32_K31", "L31_K31", "L31_K32", "L33_K33", "L40_K7", "L40_K8", "L17_K33", "L20_K5"]
    maps = ["H16_W16_K9", "H15_W17_K7", "H12_W12_K5", "H16_W16_K33"]
    return [*(f"causal_{case}" for case in causal), *(f"conv2d_{case}" for case in maps)]


@pytest.mark.parametrize("backend", ANYWHERE)
@pytest.mark.parametrize("case", golden_cases())
def test_reference_values(case: str, backend: str) -> None:
    values = load_file(golden("conv_paths.safetensors"))
    facts = {entry["case"]: entry for entry in json.loads(golden("conv_paths.json").read_text())}
    # The other entries say that even 2-D kernels are errors.
    assert set(golden_cases()) == {name for name in facts if "even kernel" not in name}
    x, kernel, bias = (values[f"{case}/{part}"] for part in ("x", "kernel", "bias"))
    y = (causal_conv1d if case.startswith("causal") else conv2d)(x, kernel, bias, backend)
    assert_near(y, values[f"{case}/direct"])
    if facts[case].get("fft_usable", True):
        assert_near(y, values[f"{case}/fft"])
    else:
        # An input of odd length: the stored transform is wrong, and ours must not share the mistake.
        assert (y - values[f"{case}/fft"]).abs().max() > 1


# --- gradients of both orders, and the operators themselves

SMALL = [
    pytest.param(depthwise_fft, (2, 2, 3, 2), (2, 1, 3, 3), id="depthwise"),
    pytest.param(dense_fft, (1, 2, 3, 2), (3, 2, 3, 3), id="dense"),
    pytest.param(dense_fft, (1, 1, 2, 3), (2, 1, 3, 5), id="one channel in"),
    pytest.param(causal_fft, (2, 2, 5), (3, 2, 4), id="causal"),
    pytest.param(causal_fft, (2, 1, 5), (3, 1, 7), id="causal, one channel in, longer than the sequence"),
]


@pytest.mark.parametrize(("convolve", "x_shape", "weight_shape"), SMALL)
def test_first_and_second_gradients_equal_finite_differences(
    convolve: Convolution, x_shape: tuple[int, ...], weight_shape: tuple[int, ...]
) -> None:
    leaves = (draw(*x_shape).requires_grad_(), draw(*weight_shape, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(convolve, leaves)
    assert torch.autograd.gradgradcheck(convolve, leaves)


@pytest.mark.parametrize(("convolve", "x_shape", "weight_shape"), SMALL)
def test_only_wanted_gradients_are_computed(
    convolve: Convolution, x_shape: tuple[int, ...], weight_shape: tuple[int, ...]
) -> None:
    for wanted in (0, 1):
        leaves = [draw(*x_shape), draw(*weight_shape, seed=1)]
        expected = with_gradients(convolve, *leaves)[1 + wanted]
        leaves[wanted].requires_grad_()
        y = convolve(*leaves)
        (gradient,) = torch.autograd.grad(y, leaves[wanted], draw(*y.shape, seed=99))
        assert torch.equal(gradient, expected)
        assert leaves[1 - wanted].grad is None


def test_nothing_but_inputs_is_kept_for_the_backward_pass() -> None:
    kept: list[Tensor] = []

    def remember(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x, weight = draw(2, 3, 9, 9).requires_grad_(), draw(3, 1, 5, 5).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        depthwise_fft(x, weight)
    assert {tensor.data_ptr() for tensor in kept} == {x.data_ptr(), weight.data_ptr()}


needs_avx512 = pytest.mark.skipif(onednn._why_no_kernel() is not None, reason=onednn._why_no_kernel() or "has AVX-512")


@needs_avx512
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 5, 30, 30, 31, 31),
        (1, 16, 28, 28, 29, 29),
        (3, 17, 14, 13, 27, 27),
        (2, 8, 7, 7, 13, 13),
        (2, 4, 9, 40, 51, 5),
        (2, 4, 40, 9, 5, 51),
        (1, 20, 9, 10, 9, 9),
        (1, 3, 1, 1, 31, 31),
        (2, 3, 6, 5, 3, 1),
    ],
)
def test_onednn_equals_the_slow_twin(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    batch, channels, height, width, *taps = shape
    x = draw(batch, channels, height, width, dtype=torch.float32).contiguous(memory_format=layout)
    weight = draw(channels, 1, *taps, seed=1, dtype=torch.float32)
    assert_same(depthwise_onednn, depthwise_conv2d_reference, x, weight)
    assert depthwise_onednn(x, weight).is_contiguous(memory_format=layout)
    half = depthwise_onednn(x.bfloat16(), weight.bfloat16())
    assert half.dtype == torch.bfloat16
    assert_near(half, depthwise_conv2d_reference(x.bfloat16().double(), weight.bfloat16().double()), torch.bfloat16)


@needs_avx512
def test_second_gradients_of_onednn_equal_those_of_the_slow_twin() -> None:
    def second(convolve: Convolution, *tensors: Tensor) -> tuple[Tensor, ...]:
        x, weight, upstream = (tensor.detach().requires_grad_() for tensor in tensors)
        first = torch.autograd.grad(convolve(x, weight), (x, weight), upstream, create_graph=True)
        total = sum(gradient.pow(3).sum() for gradient in first)
        return torch.autograd.grad(total, (x, weight, upstream))

    tensors = draw(2, 3, 9, 11), draw(3, 1, 17, 15, seed=1), draw(2, 3, 9, 11, seed=2)
    ours = second(depthwise_onednn, *(tensor.float() for tensor in tensors))
    for mine, exact in zip(ours, second(depthwise_conv2d_reference, *tensors), strict=True):
        assert_near(mine, exact)


@needs_avx512
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
def test_onednn_operators_are_registered_soundly() -> None:
    x, weight = draw(2, 3, 6, 5, dtype=torch.float32), draw(3, 1, 3, 5, seed=1, dtype=torch.float32)
    for arranged in (x, x.contiguous(memory_format=torch.channels_last)):
        for name, *others in (
            ("onednn_depthwise", weight),
            ("onednn_depthwise_input", weight),
            ("onednn_depthwise_weight", arranged.flip(0), [3, 5]),
        ):
            arguments = [t.detach().requires_grad_() if isinstance(t, Tensor) else t for t in (arranged, *others)]
            operator = getattr(torch.ops.smpconv_zoo, name)
            results = torch.library.opcheck(operator, tuple(arguments), rtol=1e-5, atol=1e-5)
            assert set(results.values()) == {"SUCCESS"}


@needs_avx512
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(14, 14), (7, 7), (8, 12), (13, 17), (10, 9), (28, 16), (1, 20), (20, 1), (3, 5)])
@pytest.mark.parametrize("taps", [(27, 27), (13, 13), (5, 5), (3, 3), (1, 15), (15, 1), (29, 9), (9, 29)])
def test_every_way_to_the_gradient_of_a_kernel_is_that_of_the_slow_twin(
    size: tuple[int, int], taps: tuple[int, int], layout: torch.memory_format
) -> None:
    taps = tuple(min(t, 2 * s - 1) for t, s in zip(taps, size, strict=True))  # type: ignore[assignment]
    x, grad = (draw(3, 5, *size, seed=seed).contiguous(memory_format=layout) for seed in (0, 1))
    weight = torch.zeros(5, 1, *taps, dtype=torch.float64, requires_grad=True)
    (exact,) = torch.autograd.grad(depthwise_conv2d_reference(x, weight), weight, grad)
    directly = onednn._weight_directly(grad.float(), x.float(), taps)
    assert directly.is_contiguous() and directly.shape == exact.shape
    assert_near(directly, exact)
    assert_near(onednn._convolve_weight_now(grad.float(), x.float(), taps), exact)


@needs_avx512
def test_which_way_the_gradient_of_a_kernel_is_taken() -> None:
    def pays(size: int, taps: int, dtype: torch.dtype = torch.float32) -> bool:
        return onednn._direct_pays(torch.empty(8, 96, size, size, dtype=dtype, device="meta"), [taps, taps])

    # Far from where they meet: eval/results/convolution_cpu.txt.
    assert pays(14, 27) and pays(7, 13) and pays(12, 23) and pays(56, 5) and pays(200, 5)
    assert not pays(48, 31) and not pays(56, 31) and not pays(200, 31) and not pays(56, 17)
    assert not pays(14, 27, torch.bfloat16)


@needs_avx512
def test_small_depthwise_kernels_get_their_own_gradient_in_training_alone() -> None:
    x, weight = torch.zeros(1, 8, 9, 9), torch.zeros(8, 1, 5, 5)
    assert dispatch._choose(x, weight, "auto", depthwise=True) == "reference"
    weight.requires_grad_()
    assert dispatch._choose(x, weight, "auto", depthwise=True) == "onednn"
    with torch.no_grad():
        assert dispatch._choose(x, weight, "auto", depthwise=True) == "reference"
    assert dispatch._choose(x, weight[..., 1:4, 1:4], "auto", depthwise=True) == "reference"
    assert dispatch._choose(x.bfloat16(), weight.bfloat16(), "auto", depthwise=True) == "reference"


def test_transforms_of_torch_func_see_through_small_depthwise_kernels() -> None:
    x, weight = draw(3, 4, 9, 8, dtype=torch.float32), draw(4, 1, 5, 5, seed=1, dtype=torch.float32)

    def loss(weight: Tensor, image: Tensor) -> Tensor:
        return depthwise_conv2d(image[None], weight).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, x)
    leaf = weight.requires_grad_()
    for image, gradient in zip(x, each, strict=True):
        assert_near(gradient, torch.autograd.grad(loss(leaf, image), leaf)[0])


def test_onednn_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = draw(1, 4, 6, 6, dtype=torch.float32), draw(4, 1, 3, 3, dtype=torch.float32)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert can_run_onednn(x, weight) == "oneDNN's channels-last kernel needs AVX-512, PyTorch takes this CPU for AVX2"
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert "no oneDNN" in str(can_run_onednn(x, weight))
    assert "depthwise" in str(can_run_onednn(x, weight.expand(4, 4, 3, 3)))
    assert "at least one element" in str(can_run_onednn(x[:0], weight))
    assert "runs on cpu, x is on meta" in str(can_run_onednn(x.to("meta"), weight))
    with pytest.raises(ValueError, match=r"'onednn' cannot run: .* depthwise"):
        conv2d(x, draw(4, 4, 3, 3, dtype=torch.float32), backend="onednn")


@pytest.mark.parametrize("shares", [1, 3000, 10**9])
def test_depthwise_transforms_in_shares_give_the_same(shares: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # One plane at a time; a few channels; everything at once.
    monkeypatch.setattr(fft, "_SHARE_BYTES_DEPTHWISE", shares)
    assert_same(depthwise_fft, depthwise_conv2d_reference, draw(3, 5, 7, 8), draw(5, 1, 5, 3, seed=1))


def operator_arguments() -> dict[str, tuple[Any, ...]]:
    """Arguments of the three operators: depthwise, dense, with one input channel, causal."""

    def leaf(*shape: int, seed: int = 0) -> Tensor:
        return draw(*shape, seed=seed).requires_grad_()

    last = leaf(2, 3, 6, 5).detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    return {
        "fft_convolve, depthwise": (leaf(2, 3, 6, 5), leaf(3, 1, 3, 5, seed=1), [1, 2]),
        "fft_convolve, channels last": (last, leaf(3, 1, 3, 5, seed=1), [1, 2]),
        "fft_convolve, dense": (leaf(2, 3, 6, 5), leaf(4, 3, 3, 5, seed=1), [1, 2]),
        "fft_convolve, causal": (leaf(2, 1, 9), leaf(4, 1, 5, seed=1), [0]),
        "fft_convolve_input, depthwise": (leaf(2, 3, 6, 5), leaf(3, 1, 3, 5, seed=1), [1, 2], True),
        "fft_convolve_input, dense": (leaf(2, 4, 6, 5), leaf(4, 3, 3, 5, seed=1), [1, 2], False),
        "fft_convolve_input, one channel in": (leaf(2, 4, 9), leaf(4, 1, 5, seed=1), [0], False),
        "fft_convolve_weight, depthwise": (leaf(2, 3, 6, 5), leaf(2, 3, 6, 5, seed=1), [3, 5], [1, 2], True),
        "fft_convolve_weight, dense": (leaf(2, 4, 6, 5), leaf(2, 3, 6, 5, seed=1), [3, 5], [1, 2], False),
        "fft_convolve_weight, one channel in": (leaf(2, 4, 9), leaf(2, 1, 9, seed=1), [5], [0], False),
    }


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.parametrize("case", operator_arguments())
def test_operators_are_registered_soundly(case: str) -> None:
    operator = getattr(torch.ops.smpconv_zoo, case.partition(",")[0]).default
    results = torch.library.opcheck(operator, operator_arguments()[case])
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("case", operator_arguments())
def test_operators_give_the_same_numbers_without_lazy_conjugation(case: str) -> None:
    # Compiled code can call operators below the layer of PyTorch that resolves `conj()`, which is then lost in silence.
    operator = getattr(torch.ops.smpconv_zoo, case.partition(",")[0]).default
    arguments = [part.detach() if isinstance(part, Tensor) else part for part in operator_arguments()[case]]
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    torch.compiler.reset()
    assert_near(compiled(*arguments), operator(*arguments))


@pytest.mark.parametrize("depthwise", [True, False])
@pytest.mark.parametrize("channels", [(3, 3), (1, 4), (3, 1), (1, 1)])
def test_operators_are_adjoint(channels: tuple[int, int], depthwise: bool) -> None:
    # <g, w * x> = <input(g, w), x> = <weight(g, x), w>: one number, three ways.
    if depthwise and channels[0] != channels[1]:
        channels = (4, 4)
    channels_in, channels_out = channels
    x, grad = draw(2, channels_in, 6, 5), draw(2, channels_out, 6, 5, seed=2)
    weight = draw(channels_out, 1 if depthwise else channels_in, 3, 5, seed=1)
    operators = torch.ops.smpconv_zoo
    y = operators.fft_convolve(x, weight, [1, 2])
    to_x = operators.fft_convolve_input(grad, weight, [1, 2], depthwise)
    to_weight = operators.fft_convolve_weight(grad, x, [3, 5], [1, 2], depthwise)
    assert (y.shape, to_x.shape, to_weight.shape) == (grad.shape, x.shape, weight.shape)
    value = float((grad * y).sum())
    # Double precision sums of a few hundred products.
    assert float((to_x * x).sum()) == pytest.approx(value, rel=1e-10, abs=1e-10)
    assert float((to_weight * weight).sum()) == pytest.approx(value, rel=1e-10, abs=1e-10)


@settings(max_examples=30)
@given(
    batch=st.integers(1, 2),
    channels=st.integers(1, 3),
    size=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    taps=st.tuples(st.integers(0, 9), st.integers(0, 9)).map(lambda t: (2 * t[0] + 1, 2 * t[1] + 1)),
)
def test_depthwise_of_any_shape(batch: int, channels: int, size: tuple[int, int], taps: tuple[int, int]) -> None:
    x, weight = draw(batch, channels, *size), draw(channels, 1, *taps, seed=1)
    assert_same(depthwise_fft, depthwise_conv2d_reference, x, weight)


@settings(max_examples=30)
@given(channels=st.tuples(st.integers(1, 3), st.integers(1, 3)), length=st.integers(1, 40), taps=st.integers(1, 50))
def test_causal_of_any_shape(channels: tuple[int, int], length: int, taps: int) -> None:
    x, weight = draw(2, channels[0], length), draw(channels[1], channels[0], taps, seed=1)
    assert_same(causal_fft, causal_conv1d_reference, x, weight)


# --- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ANYWHERE)
def test_autocast_gives_what_the_convolutions_of_pytorch_give(backend: str, dtype: torch.dtype) -> None:
    x, weight, bias = draw(2, 3, 9, 8, dtype=torch.float32), draw(4, 3, 5, 5, dtype=torch.float32), torch.ones(4)
    x.requires_grad_()
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        expected = F.conv2d(x, weight, bias, padding=2)
        y = conv2d(x, weight, bias, backend)
        depthwise = depthwise_conv2d(x, weight[:3, :1], backend)
        causal = causal_conv1d(x[:, :, 0], weight[:, :, 0], bias, backend)
    assert y.dtype == depthwise.dtype == causal.dtype == expected.dtype == dtype
    # Two roundings of numbers up to the largest: sum and bias.
    atol = 2 * SHARE_OF_EACH[dtype] * float(expected.detach().abs().max())
    torch.testing.assert_close(y.double(), expected.double(), rtol=SHARE_OF_EACH[dtype], atol=atol)
    # Bit for bit what the caller gets by casting first.
    assert torch.equal(y, conv2d(x.to(dtype), weight.to(dtype), bias.to(dtype), backend))
    assert torch.equal(depthwise, depthwise_conv2d(x.to(dtype), weight[:3, :1].to(dtype), backend))
    (y.sum() + depthwise.sum() + causal.sum()).backward()
    assert x.grad is not None and weight.grad is not None
    assert x.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", ANYWHERE)
def test_autocast_leaves_double_precision_alone(backend: str) -> None:
    x, weight = draw(2, 3, 9, 8), draw(4, 3, 5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = F.conv2d(x, weight, padding=2)
        y = conv2d(x, weight, None, backend)
    assert y.dtype == expected.dtype == torch.float64
    assert_near(y, expected)


# --- tracing


class Depthwise(nn.Module):
    """A depthwise convolution with a large kernel: `auto` takes the FFT on CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(draw(3, 1, 17, 17, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv2d(x, self.weight)


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(draw(4, 3, 600, dtype=torch.float32))
        self.bias = nn.Parameter(draw(4, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return causal_conv1d(x, self.weight, self.bias)


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(draw(4, 3, 31, 31, dtype=torch.float32))
        self.bias = nn.Parameter(draw(4, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.weight, self.bias)


TRACED = [
    pytest.param(Depthwise, (2, 3, 20, 18), (3, 3, 11, 25), id="depthwise"),
    pytest.param(Causal, (2, 3, 600), (3, 3, 801), id="causal"),
    pytest.param(Dense, (2, 3, 32, 32), (3, 3, 40, 36), id="dense"),
]


@pytest.mark.parametrize("dynamic", [None, False, True])
@pytest.mark.parametrize(("network", "first", "second"), TRACED)
def test_compile_traces_one_graph(
    network: type[nn.Module], first: tuple[int, ...], second: tuple[int, ...], dynamic: bool | None
) -> None:
    torch.compiler.reset()
    model = network()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in (first, second):
        x = draw(*shape, dtype=torch.float32).requires_grad_()
        results = []
        for forward in (model, compiled):
            y = forward(x)
            gradients = torch.autograd.grad(y, [x, *model.parameters()], draw(*y.shape, seed=9, dtype=torch.float32))
            results.append([y, *gradients])
        for traced, eager in zip(results[1], results[0], strict=True):
            assert_near(traced, eager)


def test_compile_with_the_default_compiler() -> None:
    torch.compiler.reset()
    model = Depthwise()
    x = draw(2, 3, 20, 18, dtype=torch.float32).requires_grad_()
    y = torch.compile(model, fullgraph=True)(x)
    assert_near(y, model(x))
    y.sum().backward()
    assert x.grad is not None and model.weight.grad is not None
    expected = torch.autograd.grad(model(x).sum(), [x, model.weight])
    assert_near(x.grad, expected[0])
    assert_near(model.weight.grad, expected[1])


@pytest.mark.parametrize(("network", "first", "second"), TRACED)
def test_export(network: type[nn.Module], first: tuple[int, ...], second: tuple[int, ...]) -> None:
    model = network().eval()
    x = draw(*first, dtype=torch.float32)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    assert any("smpconv_zoo.fft_convolve" in str(node.target) for node in program.graph.nodes)
    exported = program.module()
    assert_near(exported(x), model(x))
    # The batch was declared free.
    x = draw(7, *first[1:], dtype=torch.float32)
    assert_near(exported(x), model(x))


def test_export_with_a_free_map_size() -> None:
    model = Depthwise().eval()
    auto = torch.export.Dim.AUTO
    program = torch.export.export(
        model, (draw(2, 3, 20, 18, dtype=torch.float32),), dynamic_shapes={"x": {2: auto, 3: auto}}
    )
    x = draw(2, 3, 31, 22, dtype=torch.float32)
    assert_near(program.module()(x), model(x))


@pytest.mark.filterwarnings(SCRIPT_IS_DEPRECATED, SCRIPT_IS_DEPRECATED_TOO)
@pytest.mark.parametrize(("network", "first", "second"), TRACED)
def test_scripts_use_the_reference(network: type[nn.Module], first: tuple[int, ...], second: tuple[int, ...]) -> None:
    model = network()
    scripted = torch.jit.script(model)
    graph = str(scripted.inlined_graph)
    assert "aten::conv" in graph and "fft" not in graph
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for shape in (first, second):
        x = draw(*shape, dtype=torch.float32)
        assert_near(loaded(x), model(x))


# --- which path, and why


def counted(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes that went through the FFT from here on."""
    calls: list[torch.Size] = []
    real = dispatch.fft_convolve

    def spy(x: Tensor, weight: Tensor, future: list[int], cache: KernelCache | None) -> Tensor:
        calls.append(x.shape)
        return real(x, weight, future, cache)

    monkeypatch.setattr(dispatch, "fft_convolve", spy)
    return calls


def test_the_named_backend_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    x, weight = draw(1, 2, 6, 6), draw(2, 1, 3, 3)
    dense, kernel = draw(3, 2, 3, 3), draw(3, 2, 3)
    for backend, count in (("reference", 0), ("fft", 3)):
        depthwise_conv2d(x, weight, backend)
        conv2d(x, dense, None, backend)
        causal_conv1d(x[..., 0], kernel, None, backend)
        assert len(calls) == count


@pytest.mark.parametrize("avx512", [True, False])
@pytest.mark.parametrize(
    ("channels", "size", "taps", "layout", "expected", "without"),
    [
        (96, 56, 31, torch.contiguous_format, "fft", "fft"),
        (192, 28, 29, torch.contiguous_format, "onednn", "fft"),
        (384, 14, 27, torch.channels_last, "onednn", "fft"),
        (768, 7, 13, torch.contiguous_format, "reference", "reference"),
        (768, 7, 13, torch.channels_last, "onednn", "reference"),
        (96, 56, 5, torch.channels_last, "reference", "reference"),
    ],
)
def test_auto_on_the_layers_of_the_image_networks(
    channels: int,
    size: int,
    taps: int,
    layout: torch.memory_format,
    expected: str,
    without: str,
    avx512: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.zeros(1, channels, size, size).contiguous(memory_format=layout)
    monkeypatch.setattr(onednn, "_why_no_kernel", lambda: None if avx512 else "no AVX-512")
    expected = expected if avx512 else without
    weight = torch.zeros(channels, 1, taps, taps)
    assert dispatch._choose(x, weight, "auto", depthwise=True) == expected
    calls = counted(monkeypatch)
    depthwise_conv2d(x, weight)
    assert len(calls) == (expected == "fft")


def test_auto_on_dense_kernels() -> None:
    # Far from the threshold on both sides: as long as the sequence, and three taps.
    x = torch.zeros(1, 30, 1024)
    assert dispatch._choose(x, torch.zeros(30, 30, 1024), "auto", depthwise=False) == "fft"
    assert dispatch._choose(x, torch.zeros(30, 30, 3), "auto", depthwise=False) == "reference"
    x = torch.zeros(1, 64, 56, 56)
    assert dispatch._choose(x, torch.zeros(64, 64, 51, 51), "auto", depthwise=False) == "fft"
    assert dispatch._choose(x, torch.zeros(64, 64, 3, 3), "auto", depthwise=False) == "reference"


def test_auto_avoids_the_direct_gradient_of_tall_dense_kernels_on_cpu() -> None:
    # In a process of its own: the direct gradient of these shapes damages memory in oneDNN, which ends the process at
    # once or later. Bands of taps are cheap, so without the rule `auto` would compute them directly.
    script = """
import torch
from smpconv_zoo.ops import conv2d

for channels, taps, size in ((16, (31, 3), 16), (24, (19, 5), 10), (3, (63, 5), 20), (2, (3, 31), 16)):
    for _ in range(5):
        x, weight = torch.randn(2, channels, size, size), torch.randn(channels, channels, *taps, requires_grad=True)
        conv2d(x, weight).square().sum().backward()
    exact = weight.detach().double().requires_grad_()
    conv2d(x.double(), exact, backend="reference").square().sum().backward()
    torch.testing.assert_close(weight.grad.double(), exact.grad, rtol=1e-4, atol=1e-5 * float(exact.grad.abs().max()))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    x, weight = torch.zeros(2, 16, 16, 16), torch.zeros(16, 16, 31, 3, requires_grad=True)
    assert dispatch._choose(x, weight, "auto", depthwise=False) == "fft"
    with torch.no_grad():
        assert dispatch._choose(x, weight, "auto", depthwise=False) == "reference"


@pytest.mark.parametrize("depthwise", [True, False])
def test_auto_takes_the_reference_where_the_fft_cannot_run(depthwise: bool) -> None:
    x, weight = torch.zeros(0, 96, 56, 56), torch.zeros(96, 1 if depthwise else 96, 31, 31)
    assert dispatch._choose(x, weight, "auto", depthwise=depthwise) == "reference"
    meta = torch.zeros(1, 96, 56, 56, device="meta")
    assert dispatch._choose(meta, weight.to("meta"), "auto", depthwise=depthwise) == "reference"


def test_why_not_gives_a_reason_for_every_backend() -> None:
    x, weight = draw(1, 2, 6, 6), draw(2, 1, 3, 3)
    double = "torch.float64"
    assert why_not(x, weight) == {
        "cuda": "the CUDA kernels run on one NVIDIA GPU, x is on cpu and weight on cpu",
        "fft": None,
        "short": "the kernel for few taps runs on cuda, x is on cpu",
        "onednn": f"oneDNN's channels-last kernel takes float32 or bfloat16, got x {double} and weight {double}",
        "reference": None,
    }
    assert tuple(why_not(x, weight)) == BACKENDS
    assert why_not(x.long(), weight.long())["fft"] == (
        "the FFT backend needs one floating-point dtype, got x torch.int64 and weight torch.int64"
    )
    assert why_not(x, weight.float())["fft"] == (
        "the FFT backend needs one floating-point dtype, got x torch.float64 and weight torch.float32"
    )
    assert why_not(x[:0], weight)["fft"] == ("the FFT backend needs at least one element, x has shape (0, 2, 6, 6)")
    elsewhere: Any = SimpleNamespace(device=SimpleNamespace(type="mps"))
    assert dispatch.can_run_fft(elsewhere, weight) == "the FFT backend runs on cpu and cuda, x is on mps"


def test_a_named_backend_that_cannot_run_raises_its_reason() -> None:
    x, weight = draw(1, 2, 6, 6), draw(2, 1, 3, 3)
    with pytest.raises(ValueError, match="backend 'fft' cannot run: the FFT backend needs one floating-point dtype"):
        depthwise_conv2d(x.long(), weight.long(), "fft")
    with pytest.raises(ValueError, match="backend 'fft' cannot run: the FFT backend needs at least one element"):
        conv2d(x[:0], draw(3, 2, 3, 3), None, "fft")
    with pytest.raises(ValueError, match=r"got x torch\.float64 and weight torch\.float32"):
        causal_conv1d(x[..., 0], draw(3, 2, 3, dtype=torch.float32), None, "fft")


def test_unknown_backends_are_refused() -> None:
    sentence = r"unknown backend 'winograd'; choose 'auto' or one of \('cuda', 'fft', 'short', 'onednn', 'reference'\)"
    with pytest.raises(ValueError, match=sentence):
        depthwise_conv2d(draw(1, 2, 6, 6), draw(2, 1, 3, 3), "winograd")
    with pytest.raises(ValueError, match=sentence):
        conv2d(draw(1, 2, 6, 6), draw(2, 2, 3, 3), None, "winograd")
    with pytest.raises(ValueError, match=sentence):
        causal_conv1d(draw(1, 2, 6), draw(2, 2, 3), None, "winograd")


def test_integers_go_through_the_reference() -> None:
    x, weight = torch.arange(36).view(1, 1, 6, 6), torch.ones(1, 1, 3, 3, dtype=torch.int64)
    y = depthwise_conv2d(x, weight)
    assert y.dtype == torch.int64 and y[0, 0, 1, 1] == x[0, 0, :3, :3].sum()


@pytest.mark.parametrize("backend", ["auto", *ANYWHERE])
def test_meta_tensors_give_a_shape(backend: str) -> None:
    x = torch.empty(2, 3, 12, 4, device="meta", dtype=torch.float16)
    y = depthwise_conv2d(x, torch.empty(3, 1, 13, 13, device="meta", dtype=torch.float16), backend)
    assert (y.device.type, y.dtype, y.shape) == ("meta", torch.float16, x.shape)
    y = conv2d(x, torch.empty(5, 3, 13, 13, device="meta", dtype=torch.float16), None, backend)
    assert y.shape == (2, 5, 12, 4)
    y = causal_conv1d(x[..., 0], torch.empty(5, 3, 40, device="meta", dtype=torch.float16), None, backend)
    assert y.shape == (2, 5, 12)


@pytest.mark.parametrize("backend", ["auto", *ANYWHERE])
def test_wrong_shapes_are_refused(backend: str) -> None:
    x, weight, dense = draw(1, 2, 6, 6), draw(2, 1, 3, 3), draw(3, 2, 3, 3)
    rank = r"expected x \(N, C, H, W\) and a weight of rank 4, got"
    for wrong in ((x[0], weight), (x, weight[0])):
        with pytest.raises(ValueError, match=rank):
            depthwise_conv2d(*wrong, backend)
        with pytest.raises(ValueError, match=rank):
            conv2d(*wrong, None, backend)
    for wrong in ((x, dense[..., 0]), (x[..., 0], dense)):
        with pytest.raises(ValueError, match=r"expected x \(N, I, L\) and weight \(O, I, K\), got"):
            causal_conv1d(*wrong, None, backend)
    for even in ((2, 3), (3, 4)):
        with pytest.raises(ValueError, match="kernel sizes must be odd to be centred, got"):
            depthwise_conv2d(x, draw(2, 1, *even), backend)
        with pytest.raises(ValueError, match="kernel sizes must be odd to be centred, got"):
            conv2d(x, draw(3, 2, *even), None, backend)
    for shape in ((3, 1, 3, 3), (2, 2, 3, 3), (1, 1, 3, 3)):
        with pytest.raises(ValueError, match=r"a depthwise kernel for 2 channels has shape \(2, 1, Kh, Kw\), got"):
            depthwise_conv2d(x, draw(*shape), backend)
    with pytest.raises(ValueError, match="weight is for 1 input channels, x has 2"):
        conv2d(x, weight, None, backend)
    with pytest.raises(ValueError, match="weight is for 3 input channels, x has 2"):
        causal_conv1d(x[..., 0], draw(4, 3, 5), None, backend)


# --- sizes of transforms


@given(size=st.integers(1, 20_000))
def test_good_fft_sizes_are_the_smallest_even_smooth_ones(size: int) -> None:
    def smooth(number: int) -> bool:
        for prime in (2, 3, 5, 7):
            while number % prime == 0:
                number //= prime
        return number == 1

    good = good_fft_size(size)
    assert good >= size and good % 2 == 0 and smooth(good)
    assert not any(smooth(number) for number in range(size + size % 2, good, 2))
    assert good_fft_size(good) == good


def test_good_fft_sizes_by_hand() -> None:
    assert [good_fft_size(size) for size in (1, 2, 3, 11, 13, 22, 71, 97, 1023)] == [2, 2, 4, 12, 14, 24, 72, 98, 1024]
