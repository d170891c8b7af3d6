"""The compiled CUDA operator: its registration, what it says where it cannot run, and its build, on any machine."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from golden_files import ROOT
from torch import Tensor

from smpconv_zoo import ops
from smpconv_zoo.ops import cuda

OPERATORS = torch.ops.smpconv


def build_cuda() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_cuda", ROOT / "cutlass" / "build_cuda.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 6, dtype=dtype, requires_grad=True)
    weight = torch.randn(3, 1, 3, 7, dtype=dtype, requires_grad=True)
    grad = torch.randn(2, 3, 5, 6, dtype=dtype, requires_grad=True)
    return x, weight, grad


def test_the_operators_are_the_convolution_and_its_gradients() -> None:
    x, weight, grad = inputs()
    exact = ops.depthwise_conv2d_reference(x, weight)
    to_x, to_weight = torch.autograd.grad(exact, (x, weight), grad)
    torch.testing.assert_close(OPERATORS.depthwise_conv2d_forward(x, weight), exact)
    torch.testing.assert_close(OPERATORS.depthwise_conv2d_input(grad, weight), to_x)
    torch.testing.assert_close(OPERATORS.depthwise_conv2d_weight(grad, x, 3, 7), to_weight)


def test_derivatives_of_every_order() -> None:
    x, weight, grad = inputs()
    for function, arguments in (
        (OPERATORS.depthwise_conv2d_forward, (x, weight)),
        (OPERATORS.depthwise_conv2d_input, (grad, weight)),
        (lambda grad, x: OPERATORS.depthwise_conv2d_weight(grad, x, 3, 7), (grad, x)),
        (cuda.cuda_convolve, (x, weight)),
    ):
        assert torch.autograd.gradcheck(function, arguments)
        assert torch.autograd.gradgradcheck(function, arguments)


def test_the_operators_keep_the_rules_of_the_library() -> None:
    x, weight, grad = inputs(torch.float32)
    for operator, arguments in (
        (OPERATORS.depthwise_conv2d_forward, (x, weight)),
        (OPERATORS.depthwise_conv2d_input, (grad, weight)),
        (OPERATORS.depthwise_conv2d_weight, (grad, x, 3, 7)),
    ):
        with warnings.catch_warnings():
            # From inside the check.
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor")
            torch.library.opcheck(operator.default, arguments)


def test_shapes_are_known_without_numbers() -> None:
    x, weight, grad = (tensor.to("meta") for tensor in inputs(torch.bfloat16))
    assert OPERATORS.depthwise_conv2d_forward(x.transpose(2, 3), weight).shape == (2, 3, 6, 5)
    assert OPERATORS.depthwise_conv2d_input(grad, weight).shape == grad.shape
    out = OPERATORS.depthwise_conv2d_weight(grad, x, 3, 7)
    assert out.shape == weight.shape and out.dtype == torch.bfloat16


def test_where_the_kernels_cannot_run_they_say_why() -> None:
    x, weight, _ = inputs(torch.bfloat16)
    assert "x is on cpu" in str(cuda.can_run_cuda(x, weight))
    assert ops.why_not(x, weight)["cuda"] == cuda.can_run_cuda(x, weight)
    with pytest.raises(ValueError, match=r"backend 'cuda' cannot run: .* x is on cpu"):
        ops.depthwise_conv2d(x, weight, backend="cuda")
    with pytest.raises(ValueError, match="its kernels are for depthwise convolutions"):
        ops.conv2d(x, torch.zeros(4, 3, 3, 3, dtype=torch.bfloat16), backend="cuda")


class OnGpu:
    """The part of a tensor on a GPU that is looked at before the GPU is."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.tensor = torch.empty(*shape, dtype=dtype, device="meta")
        self.device = torch.device("cuda", 0)

    def __getattr__(self, name: str) -> object:
        return getattr(self.tensor, name)


@pytest.mark.parametrize(
    ("x", "weight", "reason"),
    [
        (OnGpu(2, 3, 5, 5, dtype=torch.float32), OnGpu(3, 1, 3, 3, dtype=torch.float32), "bfloat16 or float16"),
        (OnGpu(2, 3, 5, 5), OnGpu(3, 1, 3, 3, dtype=torch.float16), "bfloat16 or float16"),
        (OnGpu(2, 3, 5, 5), OnGpu(4, 3, 3, 3), "depthwise kernels"),
        (OnGpu(2, 3, 5), OnGpu(3, 3, 3), "depthwise kernels"),
        (OnGpu(2, 3, 99, 99), OnGpu(3, 1, 65, 3), "up to 63"),
        (OnGpu(2, 3, 9, 9), OnGpu(3, 1, 3, 4), "odd sizes"),
        (OnGpu(0, 3, 5, 5), OnGpu(3, 1, 3, 3), "at least one element"),
    ],
)
def test_reasons(x: Tensor, weight: Tensor, reason: str) -> None:
    assert reason in str(cuda.can_run_cuda(x, weight))


def test_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old one")
    assert cuda.can_run_cuda(OnGpu(2, 3, 5, 5), OnGpu(3, 1, 3, 3)) == (
        "the CUDA kernels need compute capability 8.0, an old one has 7.5"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert "sizes up to 33, got (35, 3)" in str(cuda.can_run_cuda(OnGpu(2, 3, 40, 40), OnGpu(3, 1, 35, 3)))


def test_a_binary_that_is_not_there_or_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cuda.LIBRARY_VARIABLE, str(tmp_path / "absent.so"))
    assert "absent.so, which is no file" in str(cuda.why_no_binary())
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setenv(cuda.LIBRARY_VARIABLE, str(broken))
    assert str(cuda.why_no_binary()).startswith("broken.so, the binary of the CUDA kernels, could not be loaded: ")


def test_importing_loads_no_binary(tmp_path: Path) -> None:
    script = "import smpconv_zoo.ops.cuda as cuda; assert cuda._load.cache_info().currsize == 0"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_the_environment_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    build = build_cuda()
    for value, wanted in (("", "auto"), ("auto", "auto"), ("0", "0"), ("1", "1")):
        monkeypatch.setenv("SMPCONV_BUILD_CUDA", value)
        assert build.is_wanted() == wanted
    monkeypatch.setenv("SMPCONV_BUILD_CUDA", "yes")
    with pytest.raises(ValueError, match="it can be 'auto', '0' or '1'"):
        build.is_wanted()


def test_without_a_compiler_a_build_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = build_cuda()
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    with pytest.raises(RuntimeError, match="no CUDA compiler"):
        build.build(tmp_path / "x.so")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_binary_builds_without_a_warning_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every GPU that is built for, warnings being errors; no GPU is needed."""
    build = build_cuda()
    reason = build.why_not()
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.delenv("SMPCONV_CUDA_ARCHITECTURES", raising=False)
    assert build.architectures(build.find_nvcc()) == list(build.ARCHITECTURES)
    binary = tmp_path / "_cuda.so"
    build.build(binary)
    script = "from smpconv_zoo.ops import cuda; print(cuda.why_no_binary())"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, cuda.LIBRARY_VARIABLE: str(binary)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "None\n", "")
