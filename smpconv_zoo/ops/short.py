"""Dense convolutions of a few taps on NVIDIA GPUs, as library operators; :mod:`smpconv_zoo.gpu.short` computes.

A convolution of two arguments and its two adjoints, whose derivatives call each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smpconv_zoo.gpu import why_no_triton
from smpconv_zoo.operators import operator

__all__ = ["can_run_short", "short_convolve", "short_convolve_now"]

_MAX_CHANNELS = 64
_MAX_TAPS = 9


def can_run_short(x: Tensor, weight: Tensor) -> str | None:
    """None if the kernel for few taps can convolve ``x`` with ``weight``, else the reason why not."""
    if x.device.type != "cuda":
        return f"the kernel for few taps runs on cuda, x is on {x.device.type}"
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        return f"the kernel for few taps computes in float32, got x {x.dtype} and weight {weight.dtype}"
    if weight.shape[2:].numel() > _MAX_TAPS:
        return f"the kernel for few taps takes at most {_MAX_TAPS}, got {tuple(weight.shape[2:])}"
    if weight.shape[1] != x.shape[1]:
        return "the kernel for few taps is for dense convolutions"
    if max(weight.shape[:2]) > _MAX_CHANNELS:
        return f"the kernel for few taps takes at most {_MAX_CHANNELS} channels, got {tuple(weight.shape[:2])}"
    if x.numel() == 0:
        return f"the kernel for few taps needs at least one element, x has shape {tuple(x.shape)}"
    return why_no_triton()


def short_convolve(x: Tensor, weight: Tensor) -> Tensor:
    """float32 ``x`` (N, I, L), ``weight`` (O, I, K) -> (N, O, L), causal; or (N, I, H, W), (O, I, Kh, Kw), 'same'."""
    y: Tensor = _convolve(x, weight)
    return y


def short_convolve_now(x: Tensor, weight: Tensor) -> Tensor:
    """:func:`short_convolve` without a derivative: the computation alone."""
    from smpconv_zoo.gpu.short import short_convolve

    if x.dim() == 4:
        # On maps cuDNN is faster forward, and slower for the gradients: eval/results/sequence_h100.txt.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            return F.conv2d(x, weight, padding=(weight.shape[2] // 2, weight.shape[3] // 2))
    return short_convolve(x.contiguous(), weight)


def _convolve_input_now(grad: Tensor, weight: Tensor) -> Tensor:
    from smpconv_zoo.gpu.short import short_convolve_input

    return short_convolve_input(grad.contiguous(), weight)


def _convolve_weight_now(grad: Tensor, x: Tensor, taps: Sequence[int]) -> Tensor:
    from smpconv_zoo.gpu.short import short_convolve_weight

    return short_convolve_weight(grad.contiguous(), x.contiguous(), tuple(taps))


def _fake_convolve(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty([x.shape[0], weight.shape[0], *x.shape[2:]])


def _fake_convolve_input(grad: Tensor, weight: Tensor) -> Tensor:
    return grad.new_empty([grad.shape[0], weight.shape[1], *grad.shape[2:]])


def _fake_convolve_weight(grad: Tensor, x: Tensor, taps: Sequence[int]) -> Tensor:
    return grad.new_empty([grad.shape[1], x.shape[1], *taps])


def _save_pair(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _convolve_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    return (
        _convolve_input(grad, weight) if ctx.needs_input_grad[0] else None,
        _convolve_weight(grad, x, list(weight.shape[2:])) if ctx.needs_input_grad[1] else None,
    )


def _convolve_input_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    grad, weight = ctx.saved_tensors
    return (
        _convolve(cotangent, weight) if ctx.needs_input_grad[0] else None,
        _convolve_weight(grad, cotangent, list(weight.shape[2:])) if ctx.needs_input_grad[1] else None,
    )


def _convolve_weight_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    grad, x = ctx.saved_tensors
    return (
        _convolve(x, cotangent) if ctx.needs_input_grad[0] else None,
        _convolve_input(grad, cotangent) if ctx.needs_input_grad[1] else None,
        None,
    )


_convolve = operator("short_convolve", short_convolve_now, _fake_convolve, _save_pair, _convolve_backward)
_convolve_input = operator(
    "short_convolve_input", _convolve_input_now, _fake_convolve_input, _save_pair, _convolve_input_backward
)
_convolve_weight = operator(
    "short_convolve_weight", _convolve_weight_now, _fake_convolve_weight, _save_pair, _convolve_weight_backward
)
