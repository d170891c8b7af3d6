"""Depthwise convolution on a CPU with AVX-512, through oneDNN's kernels for channels-last maps.

A direct convolution, but of the kind that large kernels need: sixteen channels at a time, one broadcast tap for all of
them. On channels-first maps the same library has such kernels up to 14 taps wide, and beyond that none that is fast.
Its own gradients are slow. That to the input is a forward convolution with the taps reversed; that to the kernel is
taken through the FFT.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smpconv_zoo.operators import operator
from smpconv_zoo.ops.fft import convolve_weight, empty_like_map, is_channels_last

__all__ = ["can_run_onednn", "onednn_depthwise", "prefers_channels_last"]

# oneDNN has the fast kernel from 14 taps in a row on; fewer, down to so many, are filled up with zeros.
_WIDE = 15
_NARROW = 8


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
    height, width = weight.shape[2:]
    if _NARROW <= width < _WIDE:
        weight = F.pad(weight, ((_WIDE - width) // 2,) * 2)
        width = _WIDE
    y = F.conv2d(
        x.contiguous(memory_format=torch.channels_last), weight, padding=(height // 2, width // 2), groups=x.shape[1]
    )
    return y if is_channels_last(x) else y.contiguous()


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
        _to_weight(grad, x, list(weight.shape[2:])) if to_weight else None,
    )


def _input_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    grad, weight = ctx.saved_tensors
    to_grad, to_weight = ctx.needs_input_grad
    return (
        _convolve(cotangent, weight) if to_grad else None,
        _to_weight(grad, cotangent, list(weight.shape[2:])) if to_weight else None,
    )


def _to_weight(grad: Tensor, x: Tensor, taps: Sequence[int]) -> Tensor:
    return convolve_weight(grad, x, taps, [t // 2 for t in taps], True)


_convolve = operator("onednn_depthwise", _convolve_now, _fake, _save, _backward)
_convolve_input = operator("onednn_depthwise_input", _convolve_input_now, _fake, _save, _input_backward)
