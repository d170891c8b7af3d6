"""Dense causal convolutions of a few taps on NVIDIA GPUs, as library operators; :mod:`smpconv_zoo.gpu.short` computes.

A convolution of two arguments and its two adjoints, whose derivatives call each other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smpconv_zoo.gpu import why_no_triton

__all__ = ["can_run_short", "short_convolve"]

_MAX_CHANNELS = 64
_MAX_TAPS = 8


def can_run_short(x: Tensor, weight: Tensor) -> str | None:
    """None if the kernel for few taps can convolve ``x`` (N, I, L) with ``weight`` (O, I, K), else the reason why not."""
    if x.device.type != "cuda":
        return f"the kernel for few taps runs on cuda, x is on {x.device.type}"
    if x.dim() != 3:
        return "the kernel for few taps knows one axis only"
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        return f"the kernel for few taps computes in float32, got x {x.dtype} and weight {weight.dtype}"
    if weight.shape[2] > _MAX_TAPS:
        return f"the kernel for few taps takes at most {_MAX_TAPS}, got {weight.shape[2]}"
    if max(weight.shape[:2]) > _MAX_CHANNELS:
        return f"the kernel for few taps takes at most {_MAX_CHANNELS} channels, got {tuple(weight.shape[:2])}"
    if x.numel() == 0:
        return f"the kernel for few taps needs at least one element, x has shape {tuple(x.shape)}"
    return why_no_triton()


def short_convolve(x: Tensor, weight: Tensor) -> Tensor:
    """float32 ``x`` (N, I, L), ``weight`` (O, I, K) -> (N, O, L); the last tap meets the current sample."""
    return _convolve(x, weight)


@torch.library.custom_op("smpconv_zoo::short_convolve", mutates_args=())
def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    from smpconv_zoo.gpu.short import short_convolve

    return short_convolve(x.contiguous(), weight)


@torch.library.custom_op("smpconv_zoo::short_convolve_input", mutates_args=())
def _convolve_input(grad: Tensor, weight: Tensor) -> Tensor:
    from smpconv_zoo.gpu.short import short_convolve_input

    return short_convolve_input(grad.contiguous(), weight)


@torch.library.custom_op("smpconv_zoo::short_convolve_weight", mutates_args=())
def _convolve_weight(grad: Tensor, x: Tensor, taps: int) -> Tensor:
    from smpconv_zoo.gpu.short import short_convolve_weight

    return short_convolve_weight(grad.contiguous(), x.contiguous(), taps)


@_convolve.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty([x.shape[0], weight.shape[0], x.shape[2]])


@_convolve_input.register_fake
def _(grad: Tensor, weight: Tensor) -> Tensor:
    return grad.new_empty([grad.shape[0], weight.shape[1], grad.shape[2]])


@_convolve_weight.register_fake
def _(grad: Tensor, x: Tensor, taps: int) -> Tensor:
    return grad.new_empty([grad.shape[1], x.shape[1], taps])


def _save_pair(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _convolve_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    return (
        _convolve_input(grad, weight) if ctx.needs_input_grad[0] else None,
        _convolve_weight(grad, x, weight.shape[2]) if ctx.needs_input_grad[1] else None,
    )


def _convolve_input_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    grad, weight = ctx.saved_tensors
    return (
        _convolve(cotangent, weight) if ctx.needs_input_grad[0] else None,
        _convolve_weight(grad, cotangent, weight.shape[2]) if ctx.needs_input_grad[1] else None,
    )


def _convolve_weight_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    grad, x = ctx.saved_tensors
    return (
        _convolve(x, cotangent) if ctx.needs_input_grad[0] else None,
        _convolve_input(grad, cotangent) if ctx.needs_input_grad[1] else None,
        None,
    )


_convolve.register_autograd(_convolve_backward, setup_context=_save_pair)
_convolve_input.register_autograd(_convolve_input_backward, setup_context=_save_pair)
_convolve_weight.register_autograd(_convolve_weight_backward, setup_context=_save_pair)
