"""Depthwise convolution by compiled CUDA kernels, and both its gradients: bfloat16 and float16 on tensor cores.

The three maps are library operators, ``smpconv::depthwise_conv2d_forward``, ``_input`` and ``_weight``, whose
derivatives call each other: gradients of any order, and opaque to ``torch.compile`` and ``torch.export``. They are
registered here, with slow twins for the CPU; the kernels for CUDA come from a binary, built from ``cutlass/csrc`` when
the package is installed, which is looked for when a tensor first needs it. Without it everything else works.

Tensors in other layouts than NCHW are copied to it. The weight gradient is a sum in a fixed order: equal inputs on
one kind of GPU give equal bits.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smpconv_zoo.operators import recorded

__all__ = ["can_run_cuda", "cuda_convolve", "why_no_binary"]

#: Names a binary to load instead of the one beside the package.
LIBRARY_VARIABLE = "SMPCONV_CUDA_LIBRARY"

# Instructions and asynchronous copies that came with the A100.
_OLDEST_CAPABILITY = (8, 0)
_LARGEST_KERNEL = 63
# GPUs with 100 KB of shared memory per multiprocessor hold the tables and sums of smaller kernels only.
_SMALL_CAPABILITIES = ((8, 6), (8, 9), (12, 0), (12, 1))
_LARGEST_KERNEL_SMALL = 33
_DTYPES = (torch.bfloat16, torch.float16)
_FORWARD = "smpconv::depthwise_conv2d_forward"
_INPUT = "smpconv::depthwise_conv2d_input"
_WEIGHT = "smpconv::depthwise_conv2d_weight"


def can_run_cuda(x: Tensor, weight: Tensor) -> str | None:
    """None if the CUDA kernels can convolve these tensors, else the reason why not.

    Args:
        x: ``(N, C, H, W)``.
        weight: ``(C, 1, Kh, Kw)``.
    """
    if x.device.type != "cuda" or weight.device != x.device:
        return f"the CUDA kernels run on one NVIDIA GPU, x is on {x.device} and weight on {weight.device}"
    if x.dtype not in _DTYPES or x.dtype != weight.dtype:
        return f"the CUDA kernels are for bfloat16 or float16, got x {x.dtype} and weight {weight.dtype}"
    if x.dim() != 4 or weight.dim() != 4 or weight.size(1) != 1 or weight.size(0) != x.size(1):
        return f"the CUDA kernels are for depthwise kernels on maps, got {tuple(x.shape)} and {tuple(weight.shape)}"
    if weight.size(2) % 2 == 0 or weight.size(3) % 2 == 0 or max(weight.shape[2:]) > _LARGEST_KERNEL:
        return f"the CUDA kernels have odd sizes up to {_LARGEST_KERNEL}, got {tuple(weight.shape[2:])}"
    if x.numel() == 0:
        return f"the CUDA kernels need at least one element, x has shape {tuple(x.shape)}"
    if torch.version.hip is not None:
        return "the CUDA kernels are for NVIDIA GPUs, this PyTorch is for AMD's"
    device = x.device.index or 0
    if max(weight.shape[2:]) > _largest_kernel(device):
        return f"on this GPU the CUDA kernels have sizes up to {_LARGEST_KERNEL_SMALL}, got {tuple(weight.shape[2:])}"
    return _why_no_kernel(device) or why_no_binary()


# What the compiler takes for constant may be asked for by constants alone, which sizes of tensors need not be.
@torch.compiler.assume_constant_result
def _largest_kernel(device: int) -> int:
    return _LARGEST_KERNEL_SMALL if torch.cuda.get_device_capability(device) in _SMALL_CAPABILITIES else _LARGEST_KERNEL


@torch.compiler.assume_constant_result
def _why_no_kernel(device: int) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"the CUDA kernels need compute capability 8.0, {name} has {capability[0]}.{capability[1]}"
    return None


@torch.compiler.assume_constant_result
def why_no_binary() -> str | None:
    """None if the binary with the CUDA kernels is loaded, else the reason why not. Loads it at the first call."""
    return _load(os.environ.get(LIBRARY_VARIABLE))


@functools.cache
def _load(named: str | None) -> str | None:
    if named is None:
        found = sorted(Path(__file__).resolve().parents[1].glob("_cuda*.so"))
        if not found:
            return (
                "the package was installed without its CUDA kernels: install it again where there is a CUDA compiler "
                "(nvcc), with SMPCONV_BUILD_CUDA=1 in the environment to hear why if that fails"
            )
        path = found[0]
    else:
        path = Path(named)
        if not path.is_file():
            return f"{LIBRARY_VARIABLE} names {named}, which is no file"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        return f"{path.name}, the binary of the CUDA kernels, could not be loaded: {cause}"
    return None


def cuda_convolve(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise cross-correlation of stride 1, as large as the input, where :func:`can_run_cuda` has no objection.

    Args:
        x: ``(N, C, H, W)``.
        weight: ``(C, 1, Kh, Kw)``.
    """
    operators = torch.ops.smpconv
    # What a library operator costs to call with gradients is more than what most kernels take.
    if recorded((x, weight)) or not torch.is_grad_enabled():
        convolved: Tensor = operators.depthwise_conv2d_forward(x, weight)
        return convolved
    convolved = _Convolve.apply(x, weight)
    return convolved


class _Convolve(torch.autograd.Function):
    """The forward operator for eager training; a second derivative goes through the operators themselves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        y: Tensor = torch.ops.smpconv.depthwise_conv2d_forward(x, weight)
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _forward_backward(ctx, grad)


def _forward_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    to_x, to_weight = ctx.needs_input_grad[:2]
    operators = torch.ops.smpconv
    return (
        operators.depthwise_conv2d_input(grad, weight) if to_x else None,
        operators.depthwise_conv2d_weight(grad, x, *weight.shape[2:]) if to_weight else None,
    )


def _input_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    grad, weight = ctx.saved_tensors
    to_grad, to_weight = ctx.needs_input_grad[:2]
    operators = torch.ops.smpconv
    return (
        operators.depthwise_conv2d_forward(cotangent, weight) if to_grad else None,
        operators.depthwise_conv2d_weight(grad, cotangent, *weight.shape[2:]) if to_weight else None,
    )


def _weight_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    grad, x = ctx.saved_tensors
    to_grad, to_x = ctx.needs_input_grad[:2]
    operators = torch.ops.smpconv
    return (
        operators.depthwise_conv2d_forward(x, cotangent) if to_grad else None,
        operators.depthwise_conv2d_input(grad, cotangent) if to_x else None,
        None,
        None,
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _twin(grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]) -> Tensor:
    """PyTorch's own gradient of the depthwise convolution of ``x`` with ``weight``: the one of the two wanted."""
    taps = weight.shape[2:]
    gradients = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        None,
        [1, 1],
        [taps[0] // 2, taps[1] // 2],
        [1, 1],
        False,
        [0, 0],
        weight.size(0),
        [*wanted, False],
    )
    result: Tensor = gradients[0 if wanted[0] else 1]
    return result.contiguous()


def _forward_twin(x: Tensor, weight: Tensor) -> Tensor:
    padding = (weight.size(2) // 2, weight.size(3) // 2)
    return torch.nn.functional.conv2d(x, weight, padding=padding, groups=weight.size(0)).contiguous()


def _input_twin(grad: Tensor, weight: Tensor) -> Tensor:
    return _twin(grad, torch.empty_like(grad), weight, (True, False))


def _weight_twin(grad: Tensor, x: Tensor, kernel_height: int, kernel_width: int) -> Tensor:
    weight = x.new_empty(x.size(1), 1, kernel_height, kernel_width)
    return _twin(grad, x, weight, (False, True))


def _fake_like_first(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape)


def _fake_weight(grad: Tensor, x: Tensor, kernel_height: int, kernel_width: int) -> Tensor:
    return x.new_empty(x.size(1), 1, kernel_height, kernel_width)


def _register() -> None:
    tags = (torch.Tag.pt2_compliant_tag,)
    for name, schema, twin, fake, backward in (
        (_FORWARD, "(Tensor x, Tensor weight) -> Tensor", _forward_twin, _fake_like_first, _forward_backward),
        (_INPUT, "(Tensor grad, Tensor weight) -> Tensor", _input_twin, _fake_like_first, _input_backward),
        (
            _WEIGHT,
            "(Tensor grad, Tensor x, int kernel_height, int kernel_width) -> Tensor",
            _weight_twin,
            _fake_weight,
            _weight_backward,
        ),
    ):
        torch.library.define(name, schema, tags=tags)
        torch.library.impl(name, "cpu", twin)
        torch.library.register_fake(name, fake)
        torch.library.register_autograd(name, backward, setup_context=_save)


_register()
