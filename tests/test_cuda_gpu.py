"""The compiled CUDA operator against double precision. Run with `pytest -m gpu` where its binary was built."""

from __future__ import annotations

import pytest
import torch
from tolerances import CUDA_OPERATOR
from torch import Tensor

from smpconv_zoo import ops
from smpconv_zoo.ops import cuda


def _why_not() -> str:
    if not torch.cuda.is_available():
        return "needs a CUDA device, there is none"
    return cuda.why_no_binary() or ""


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(_why_not()), reason=_why_not() or "-")]

OPERATORS = torch.ops.smpconv
DTYPES = (torch.bfloat16, torch.float16)
# Batch, channels, height and width of the map, height and width of the kernel.
SHAPES = [
    # The stages of SMPConvNet, full batches of 16 images and others.
    (16, 2, 56, 56, 31, 31),
    (32, 3, 28, 28, 29, 29),
    (33, 3, 14, 14, 27, 27),
    (37, 5, 7, 7, 13, 13),
    (1, 3, 56, 56, 31, 31),
    (2, 3, 28, 28, 29, 29),
    (3, 2, 14, 14, 27, 27),
    (5, 3, 7, 7, 13, 13),
    # Maps that are cut into tiles.
    (3, 2, 96, 96, 31, 31),
    (2, 2, 200, 304, 31, 31),
    (9, 1, 300, 20, 31, 31),
    (19, 2, 70, 66, 63, 63),
    # Odd sizes, rectangles, kernels larger than the map.
    (3, 2, 13, 11, 5, 5),
    (2, 2, 9, 31, 7, 3),
    (1, 1, 1, 1, 3, 3),
    (2, 2, 1, 17, 1, 9),
    (2, 2, 17, 1, 9, 1),
    (4, 2, 12, 4, 13, 13),
    (5, 2, 33, 35, 51, 5),
    (5, 2, 33, 35, 5, 51),
    (6, 5, 15, 16, 1, 1),
    (1, 2, 130, 61, 63, 63),
    (7, 3, 57, 57, 31, 31),
]


def draw(n: int, c: int, h: int, w: int, kh: int, kw: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(n, c, h, w, device="cuda", dtype=dtype)
    weight = torch.randn(c, 1, kh, kw, device="cuda", dtype=dtype)
    return x, weight, torch.randn_like(x)


def exactly(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    exact_x, exact_weight = (tensor.detach().double().requires_grad_() for tensor in (x, weight))
    y = ops.depthwise_conv2d_reference(exact_x, exact_weight)
    return (y.detach(), *torch.autograd.grad(y, (exact_x, exact_weight), grad.double()))


def poison(like: Tensor) -> None:
    """Leave NaN in the memory that the next tensor of this size gets."""
    torch.full_like(like, float("nan"))


def assert_close(ours: Tensor, exact: Tensor, what: str) -> None:
    error = ((ours.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()
    assert error <= CUDA_OPERATOR[ours.dtype], f"{what}: relative error {error:.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, grad = draw(*shape, dtype)
    exact, to_x, to_weight = exactly(x, weight, grad)
    poison(x)
    assert_close(OPERATORS.depthwise_conv2d_forward(x, weight), exact, "forward")
    poison(x)
    assert_close(OPERATORS.depthwise_conv2d_input(grad, weight), to_x, "gradient to input")
    poison(weight)
    ours = OPERATORS.depthwise_conv2d_weight(grad, x, *shape[4:])
    assert_close(ours, to_weight, "gradient to weight")
    assert torch.equal(ours, OPERATORS.depthwise_conv2d_weight(grad, x, *shape[4:])), "another sum the second time"


def test_the_door_takes_it_by_itself() -> None:
    x, weight, grad = draw(4, 6, 28, 28, 29, 29, torch.bfloat16)
    assert ops.why_not(x, weight)["cuda"] is None
    x.requires_grad_()
    weight.requires_grad_()
    y = ops.depthwise_conv2d(x, weight)
    assert "_Convolve" in type(y.grad_fn).__name__
    exact, *expected = exactly(x, weight, grad)
    assert_close(y, exact, "forward")
    for ours, reference in zip(torch.autograd.grad(y, (x, weight), grad), expected, strict=True):
        assert_close(ours, reference, "gradient")
    # float32 goes another way, with a reason.
    assert "bfloat16 or float16" in str(ops.why_not(x.float(), weight.float())["cuda"])


def test_autocast_takes_the_kernels() -> None:
    x, weight, grad = draw(4, 6, 14, 14, 27, 27, torch.float32)
    exact = exactly(x.bfloat16(), weight.bfloat16(), grad)[0]
    with torch.autocast("cuda", torch.bfloat16):
        y = ops.depthwise_conv2d(x, weight)
    assert y.dtype == torch.bfloat16
    assert_close(y, exact, "forward")


def test_other_layouts_and_places_in_memory() -> None:
    x, weight, grad = draw(4, 6, 28, 28, 29, 29, torch.float16)
    exact, to_x, to_weight = exactly(x, weight, grad)
    shifted = torch.empty(x.numel() + 1, device="cuda", dtype=x.dtype)[1:].view_as(x).copy_(x)
    strided = torch.empty(4, 6, 28, 56, device="cuda", dtype=x.dtype)[..., ::2].copy_(grad)
    for given in (shifted, x.contiguous(memory_format=torch.channels_last)):
        assert_close(OPERATORS.depthwise_conv2d_forward(given, weight), exact, "forward")
        assert_close(OPERATORS.depthwise_conv2d_weight(strided, given, 29, 29), to_weight, "gradient to weight")
    assert_close(OPERATORS.depthwise_conv2d_input(strided, weight), to_x, "gradient to input")


def test_a_side_stream_and_a_graph() -> None:
    x, weight, grad = draw(16, 6, 28, 28, 29, 29, torch.bfloat16)
    exact, _, to_weight = exactly(x, weight, grad)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # The result is wrong if the kernel does not wait for this stream, which is busy for a while.
        torch.cuda._sleep(20_000_000)
        late = torch.empty_like(x).copy_(x)
        y = OPERATORS.depthwise_conv2d_forward(late, weight)
    torch.cuda.current_stream().wait_stream(stream)
    assert_close(y, exact, "on a side stream")

    given = torch.zeros_like(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = OPERATORS.depthwise_conv2d_forward(given, weight)
        gradient = OPERATORS.depthwise_conv2d_weight(grad, given, 29, 29)
    given.copy_(x)
    graph.replay()
    assert_close(y, exact, "in a graph")
    assert_close(gradient, to_weight, "gradient in a graph")


def test_a_second_derivative() -> None:
    x, weight, grad = draw(3, 4, 14, 14, 13, 13, torch.float16)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, grad)]
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    results = []
    for (a, b, g), convolve in ((leaves, ops.depthwise_conv2d), (exact, ops.depthwise_conv2d_reference)):
        first = torch.autograd.grad(convolve(a, b), (a, b), g, create_graph=True)
        results.append(torch.autograd.grad(sum(f.float().square().mean() for f in first), (a, b, g)))
    for ours, reference in zip(*results, strict=True):
        assert_close(ours, reference, "second derivative")


# Of PyTorch 2.11's own compiler.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled_in_one_graph() -> None:
    x, weight, grad = draw(4, 6, 28, 28, 29, 29, torch.bfloat16)
    x.requires_grad_()
    weight.requires_grad_()
    compiled = torch.compile(lambda x, weight: 2 * ops.depthwise_conv2d(x + 1, weight), fullgraph=True)
    exact, to_x, to_weight = exactly(x + 1, weight, grad)
    y = compiled(x, weight)
    assert_close(y, 2 * exact, "forward")
    for ours, reference in zip(torch.autograd.grad(y, (x, weight), grad), (to_x, to_weight), strict=True):
        assert_close(ours, 2 * reference, "gradient")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one() -> None:
    x, weight, grad = (tensor.to("cuda:1") for tensor in draw(4, 6, 28, 28, 29, 29, torch.bfloat16))
    assert torch.cuda.current_device() == 0
    assert_close(OPERATORS.depthwise_conv2d_forward(x, weight), exactly(x, weight, grad)[0], "forward")
    assert torch.cuda.current_device() == 0


def test_wrong_arguments_are_errors_and_nothing_breaks() -> None:
    x, weight, _ = draw(2, 3, 9, 9, 5, 5, torch.bfloat16)
    for bad in (weight[:2], weight.half(), weight.float(), weight.cpu(), weight[..., :4], weight[0]):
        with pytest.raises(RuntimeError):
            OPERATORS.depthwise_conv2d_forward(x, bad)
    with pytest.raises(RuntimeError, match="expected bfloat16 or float16"):
        OPERATORS.depthwise_conv2d_forward(x.float(), weight.float())
    assert OPERATORS.depthwise_conv2d_forward(x[:0], weight).shape == (0, 3, 9, 9)
    assert OPERATORS.depthwise_conv2d_weight(x[:0], x[:0], 5, 5).eq(0).all()
    assert OPERATORS.depthwise_conv2d_forward(x, weight).isfinite().all()
