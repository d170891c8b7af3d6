"""Depthwise convolution on a CPU with AVX-512, through oneDNN's kernels for channels-last maps.

A direct convolution, but of the kind that large kernels need: sixteen channels at a time, one broadcast tap for all of
them. On channels-first maps the same library has such kernels up to 14 taps wide, and beyond that none that is fast.
Its own gradients are slow. That to the input is a forward convolution with the taps reversed. That to the kernel is one
as well, of every image with its gradient for a kernel: as many outputs as the kernel has taps. Where both the map and
the kernel are large the FFT takes less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smpconv_zoo.operators import operator
from smpconv_zoo.ops.fft import Depthwise, empty_like_map, good_fft_size, is_channels_last

__all__ = ["can_run_onednn", "onednn_depthwise", "prefers_channels_last"]

# oneDNN has the fast kernel from 14 taps in a row on; fewer, down to so many, are filled up with zeros.
_WIDE = 15
_NARROW = 8
# The gradient to a kernel of so many taps in a row is taken for all images at once where maps lie channels first, or
# are so narrow that the channels-last kernel does not fit: outputs so few, oneDNN is fast at.
_FEW_OUTPUTS = 13
_NARROW_MAP = 14
# Multiply-accumulates for which a transformed point, times the logarithm of the transform, takes as long there, on maps
# of up to so many places in a row and on larger ones. 14 x 14 maps with 27 x 27 taps come to 19 (a third of the time of
# the FFT), 28 x 28 with 29 x 29 to 35 (nine tenths), but 56 x 56 with 13 x 13 to 11 (as long) and with 17 x 17 to 18
# (near to twice as long): eval/results/convolution_cpu.txt.
_SMALL_MAP = 32
_POINT_COST_TO_WEIGHT = 36
_POINT_COST_TO_WEIGHT_LARGE_MAP = 11


def can_run_onednn(x: Tensor, weight: Tensor) -> str | None:
    """None if oneDNN's channels-last kernel can convolve ``x`` (N, C, H, W), else the reason why not."""
    if x.device.type != "cpu":
        return f"oneDNN's channels-last kernel runs on cpu, x is on {x.device.type}"
    if x.dim() != 4 or weight.dim() != 4 or weight.shape[1] != 1 or weight.shape[0] != x.shape[1]:
        return (
            f"oneDNN's channels-last kernel is for depthwise convolutions of maps, got a kernel {tuple(weight.shape)}"
        )
    if x.dtype not in (torch.float32, torch.bfloat16) or x.dtype != weight.dtype:
        return f"oneDNN's channels-last kernel takes float32 or bfloat16, got x {x.dtype} and weight {weight.dtype}"
    if x.numel() == 0:
        return f"oneDNN's channels-last kernel needs at least one element, x has shape {tuple(x.shape)}"
    return _why_no_kernel()


@torch.compiler.assume_constant_result
def _why_no_kernel() -> str | None:
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return "this PyTorch has no oneDNN, or it is switched off (torch.backends.mkldnn.enabled)"
    capability = torch.backends.cpu.get_cpu_capability()
    if capability != "AVX512":
        return f"oneDNN's channels-last kernel needs AVX-512, PyTorch takes this CPU for {capability}"
    return None


def prefers_channels_last(x: Tensor) -> bool:
    """Whether convolutions of ``x`` (N, C, H, W) are fastest here with the channels innermost."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and _why_no_kernel() is None


def onednn_depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` (N, C, H, W), ``weight`` (C, 1, Kh, Kw) -> (N, C, H, W), in the layout of ``x``."""
    y: Tensor = _convolve(x, weight)
    return y


def _convolve_now(x: Tensor, weight: Tensor) -> Tensor:
    if weight.shape[3] < (_NARROW if is_channels_last(x) else _WIDE):
        # oneDNN is fast at these where they lie.
        return F.conv2d(x, weight, padding=(weight.shape[2] // 2, weight.shape[3] // 2), groups=x.shape[1])
    weight = _widened(weight)
    y = F.conv2d(
        x.contiguous(memory_format=torch.channels_last),
        weight,
        padding=(weight.shape[2] // 2, weight.shape[3] // 2),
        groups=x.shape[1],
    )
    return y if is_channels_last(x) else y.contiguous()


def _widened(weight: Tensor) -> Tensor:
    """Rows of taps filled up with zeros on both sides to where oneDNN is fast, if they are short of it by few."""
    missing = _WIDE - weight.shape[3] if _NARROW <= weight.shape[3] < _WIDE else 0
    return F.pad(weight, (missing - missing // 2, missing // 2)) if missing else weight


def _convolve_input_now(grad: Tensor, weight: Tensor) -> Tensor:
    return _convolve_now(grad, weight.flip(2, 3))


def _fake(x: Tensor, weight: Tensor) -> Tensor:
    return empty_like_map(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    to_x, to_weight = ctx.needs_input_grad
    return (
        _convolve_input(grad, weight) if to_x else None,
        _convolve_weight(grad, x, list(weight.shape[2:])) if to_weight else None,
    )


def _input_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    grad, weight = ctx.saved_tensors
    to_grad, to_weight = ctx.needs_input_grad
    return (
        _convolve(cotangent, weight) if to_grad else None,
        _convolve_weight(grad, cotangent, list(weight.shape[2:])) if to_weight else None,
    )


def _convolve_weight_now(grad: Tensor, x: Tensor, taps: Sequence[int]) -> Tensor:
    if _direct_pays(x, taps):
        return _weight_directly(grad, x, taps)
    return Depthwise(x.shape[2:], taps, [t // 2 for t in taps]).weight_gradient(grad, x)


def _direct_pays(x: Tensor, taps: Sequence[int]) -> bool:
    # bfloat16 would be rounded for every image, before the sum.
    if x.dtype != torch.float32:
        return False
    size = x.shape[2:]
    cost = _POINT_COST_TO_WEIGHT if max(size) <= _SMALL_MAP else _POINT_COST_TO_WEIGHT_LARGE_MAP
    points = math.prod([good_fft_size(s + t // 2) for s, t in zip(size, taps, strict=True)])
    return math.prod(size) * math.prod(taps) <= cost * points * math.log2(points)


def _weight_directly(grad: Tensor, x: Tensor, taps: Sequence[int]) -> Tensor:
    images, channels, height, width = x.shape
    rows, columns = (t // 2 for t in taps)
    if taps[1] <= _FEW_OUTPUTS and (not is_channels_last(x) or width < _NARROW_MAP):
        planes = x.reshape(1, images * channels, height, width)
        kernels = grad.reshape(images * channels, 1, height, width)
        of_images = F.conv2d(planes, kernels, padding=(rows, columns), groups=images * channels)
        return of_images.reshape(images, channels, *taps).sum(0).unsqueeze(1).contiguous()
    x = x.contiguous(memory_format=torch.channels_last)
    total: Tensor | None = None
    for image, gradient in zip(x.split(1), grad.unsqueeze(2), strict=True):
        kernel = _widened(gradient)
        before = (kernel.shape[3] - width + 1) // 2
        share = F.conv2d(image, kernel, padding=(rows, columns + before), groups=channels)
        total = share if total is None else total.add_(share)
    assert total is not None
    # There is one output more at the end where an odd number of zeros was filled in.
    return total[..., : taps[1]].transpose(0, 1).contiguous()


def _fake_weight(grad: Tensor, x: Tensor, taps: Sequence[int]) -> Tensor:
    return grad.new_empty([grad.shape[1], 1, *taps])


def _save_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, x, _ = inputs
    ctx.save_for_backward(grad, x)


def _weight_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    grad, x = ctx.saved_tensors
    to_grad, to_x = ctx.needs_input_grad[:2]
    return (
        _convolve(x, cotangent) if to_grad else None,
        _convolve_input(grad, cotangent) if to_x else None,
        None,
    )


_convolve = operator("onednn_depthwise", _convolve_now, _fake, _save, _backward)
_convolve_input = operator("onednn_depthwise_input", _convolve_input_now, _fake, _save, _input_backward)
_convolve_weight = operator(
    "onednn_depthwise_weight", _convolve_weight_now, _fake_weight, _save_weight, _weight_backward
)
