"""Dense causal convolutions of a few taps: forward, and gradients to input and weight.

Each is a sum of small matrix products, one per tap, on tensor cores with three TF32 products in place of one, which
keeps the accuracy of float32. The gradient to the weight is added up in two steps of fixed order, without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["MAX_CHANNELS", "MAX_TAPS", "short_convolve", "short_convolve_input", "short_convolve_weight"]

MAX_CHANNELS = 64
MAX_TAPS = 8


@triton.jit
def _apply_kernel(
    x, weight, y, bias, other, I, O, L, w_o, w_i, w_k, first, step,
    TAPS: tl.constexpr, BIAS: tl.constexpr, OTHER: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """y[n, o, t] = sum_k sum_i weight[o, i, k] x[n, i, t + first + step k] + bias[o] + other[n, o, t]"""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, BLOCK_I)
    o = tl.arange(0, BLOCK_O)
    total = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
    for k in tl.static_range(TAPS):
        s = t + first + step * k
        inside = (i < I)[:, None] & ((s >= 0) & (s < L))[None, :]
        values = tl.load(x + (n * I + i)[:, None] * L + s[None, :], mask=inside, other=0.0)
        w = tl.load(
            weight + o[:, None] * w_o + i[None, :] * w_i + k * w_k,
            mask=(o < O)[:, None] & (i < I)[None, :],
            other=0.0,
        )
        total = tl.dot(w, values, total, input_precision="tf32x3")
    at = (n * O + o)[:, None] * L + t[None, :]
    keep = (o < O)[:, None] & (t < L)[None, :]
    if BIAS:
        total += tl.load(bias + o, mask=o < O, other=0.0)[:, None]
    if OTHER:
        total += tl.load(other + at, mask=keep, other=0.0)
    tl.store(y + at, total, mask=keep)


@triton.jit
def _weight_kernel(
    grad, x, partial, N, I, O, L, SPLIT: tl.constexpr,
    TAPS: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """partial[split, k, o, i] = sum over a share of (n, t) of grad[n, o, t] x[n, i, t - TAPS + 1 + k]"""
    split = tl.program_id(0)
    k = tl.program_id(1)
    i = tl.arange(0, BLOCK_I)
    o = tl.arange(0, BLOCK_O)
    total = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    blocks = tl.cdiv(L, BLOCK_T)
    for item in range(split, N * blocks, SPLIT):
        n = (item // blocks).to(tl.int64)
        t = item % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
        s = t - TAPS + 1 + k
        g = tl.load(
            grad + (n * O + o)[:, None] * L + t[None, :], mask=(o < O)[:, None] & (t < L)[None, :], other=0.0
        )
        values = tl.load(
            x + (n * I + i)[None, :] * L + s[:, None],
            mask=(i < I)[None, :] & ((s >= 0) & (s < L))[:, None],
            other=0.0,
        )
        total = tl.dot(g, values, total, input_precision="tf32x3")
    at = ((split * TAPS + k) * BLOCK_O + o)[:, None] * BLOCK_I + i[None, :]
    tl.store(partial + at, total)


@triton.jit
def _weight_sum_kernel(
    partial, grad_weight, I, O, SPLIT: tl.constexpr,
    TAPS: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0)
    k = tl.program_id(1)
    i = tl.arange(0, BLOCK_I)
    total = tl.zeros([BLOCK_S, BLOCK_I], tl.float32)
    for start in range(0, SPLIT, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        at = ((s[:, None] * TAPS + k) * BLOCK_O + o) * BLOCK_I + i[None, :]
        total += tl.load(partial + at, mask=(s < SPLIT)[:, None], other=0.0)
    tl.store(grad_weight + (o * I + i) * TAPS + k, tl.sum(total, axis=0), mask=i < I)


def short_convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """float32 ``(N, I, L)`` with ``weight`` ``(O, I, taps)`` -> ``(N, O, L)``; the last tap meets the current sample."""
    out_channels, _, taps = weight.shape
    return _apply(x, weight, (0, 1), out_channels, 1 - taps, 1, bias, None)


def short_convolve_input(grad: Tensor, weight: Tensor, other: Tensor | None = None) -> Tensor:
    """Gradient to the input, ``(N, O, L)`` -> ``(N, I, L)``, plus ``other`` of that shape."""
    _, in_channels, taps = weight.shape
    return _apply(grad, weight, (1, 0), in_channels, taps - 1, -1, None, other)


def short_convolve_weight(grad: Tensor, x: Tensor, taps: int) -> Tensor:
    """Gradient to the weight, ``(O, I, taps)``, from ``grad`` ``(N, O, L)`` and ``x`` ``(N, I, L)``."""
    n, in_channels, length = x.shape
    out_channels = grad.shape[1]
    block_i, block_o, block_t = _block(in_channels), _block(out_channels), 64
    split = max(1, min(128, n * triton.cdiv(length, block_t)))
    partial = torch.empty(split, taps, block_o, block_i, dtype=torch.float32, device=x.device)
    sizes = {"SPLIT": split, "TAPS": taps, "BLOCK_I": block_i, "BLOCK_O": block_o}
    _weight_kernel[(split, taps)](
        grad, x, partial, n, in_channels, out_channels, length, **sizes, BLOCK_T=block_t, num_warps=4
    )
    grad_weight = torch.empty(out_channels, in_channels, taps, dtype=torch.float32, device=x.device)
    _weight_sum_kernel[(out_channels, taps)](
        partial, grad_weight, in_channels, out_channels, **sizes, BLOCK_S=16, num_warps=1
    )
    return grad_weight


def _apply(
    x: Tensor,
    weight: Tensor,
    axes: tuple[int, int],
    out_channels: int,
    first: int,
    step: int,
    bias: Tensor | None,
    other: Tensor | None,
) -> Tensor:
    n, in_channels, length = x.shape
    y = torch.empty(n, out_channels, length, dtype=torch.float32, device=x.device)
    block_t = 128
    _apply_kernel[(triton.cdiv(length, block_t), n)](
        x, weight, y, y if bias is None else bias, y if other is None else other, in_channels, out_channels, length,
        weight.stride(axes[0]), weight.stride(axes[1]), weight.stride(2), first, step,
        TAPS=weight.shape[2], BIAS=bias is not None, OTHER=other is not None,
        BLOCK_I=_block(in_channels), BLOCK_O=_block(out_channels), BLOCK_T=block_t, num_warps=4,
    )  # fmt: skip
    return y


def _block(channels: int) -> int:
    return max(16, triton.next_power_of_2(channels))
