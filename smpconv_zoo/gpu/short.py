"""Dense causal convolutions of a few taps: forward, and gradients to input and weight.

Small matrix products on tensor cores. Every float32 is the sum of two TF32 numbers, and three products of those give its
accuracy back; the splitting is done here, since it is most of the work. The gradient to the weight is added up in two
steps of fixed order, without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["MAX_TAPS", "short_convolve", "short_convolve_input", "short_convolve_weight"]

MAX_TAPS = 5


@triton.jit
def _high(x):
    """The nearest number of 10 mantissa bits, which is all that TF32 holds."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _dot(a, b, total):
    """total + a b in float32 accuracy: what the products of the low parts would add is below its last bit."""
    a_high = _high(a)
    b_high = _high(b)
    total = tl.dot(a - a_high, b_high, total, input_precision="tf32")
    total = tl.dot(a_high, b - b_high, total, input_precision="tf32")
    return tl.dot(a_high, b_high, total, input_precision="tf32")


@triton.jit
def _apply_kernel(
    x, weight, y, other, I, O, L, w_o, w_i, w_k, first, step, TAPS,
    OTHER: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """y[n, o, t] = sum_k sum_i weight[o, i, k] x[n, i, t + first + step k] + other[n, o, t]"""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, BLOCK_I)
    o = tl.arange(0, BLOCK_O)
    total = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
    rows = x + n * I * L + i[:, None] * L
    at_weight = weight + o[:, None] * w_o + i[None, :] * w_i
    in_weight = (o < O)[:, None] & (i < I)[None, :]
    s = t + first
    for _ in range(TAPS):
        values = tl.load(rows + s[None, :], mask=(i < I)[:, None] & ((s >= 0) & (s < L))[None, :], other=0.0)
        total = _dot(tl.load(at_weight, mask=in_weight, other=0.0), values, total)
        at_weight += w_k
        s += step
    at = n * O * L + o[:, None] * L + t[None, :]
    keep = (o < O)[:, None] & (t < L)[None, :]
    if OTHER:
        total += tl.load(other + at, mask=keep, other=0.0)
    tl.store(y + at, total, mask=keep)


@triton.jit
def _weight_kernel(
    grad, x, partial, N, I, O, L,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """partial[split, 4 o + s, 8 i + r] = sum over a share of (n, q) of grad[n, o, 4 q + s] x[n, i, 4 q + r - 4]

    Four outputs side by side see eight inputs: the diagonals r - s of this product are the taps. It multiplies more than
    it must, but with every number it loads and splits it does so two hundred times.
    """
    split = tl.program_id(0)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, 8 * BLOCK_I)
    o = m // 4
    i = c // 8
    total = tl.zeros([BLOCK_M, 8 * BLOCK_I], tl.float32)
    blocks = tl.cdiv(L, 4 * BLOCK_Q)
    for item in range(split, N * blocks, SPLIT):
        n = (item // blocks).to(tl.int64)
        first = item % blocks * (4 * BLOCK_Q) + 4 * tl.arange(0, BLOCK_Q)
        t = first[None, :] + (m % 4)[:, None]
        g = tl.load(grad + n * O * L + o[:, None] * L + t, mask=(o < O)[:, None] & (t < L), other=0.0)
        t = first[:, None] - 4 + (c % 8)[None, :]
        values = tl.load(x + n * I * L + i[None, :] * L + t, mask=(i < I)[None, :] & (t >= 0) & (t < L), other=0.0)
        total = _dot(g, values, total)
    at = (split * 4 * BLOCK_O + m)[:, None] * (8 * BLOCK_I) + c[None, :]
    tl.store(partial + at, total)


@triton.jit
def _weight_sum_kernel(
    partial, grad_weight, I, TAPS,
    SPLIT: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0)
    k = tl.program_id(1)
    i = tl.arange(0, BLOCK_I)
    total = tl.zeros([BLOCK_S, BLOCK_I], tl.float32)
    for start in range(0, SPLIT, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        for s in tl.static_range(4):
            # The last tap meets the current sample: output 4 q + s, input 4 q + s.
            r = 4 + s + k - (TAPS - 1)
            at = (split[:, None] * (4 * BLOCK_O) + 4 * o + s) * (8 * BLOCK_I) + 8 * i[None, :] + r
            total += tl.load(partial + at, mask=(split < SPLIT)[:, None], other=0.0)
    tl.store(grad_weight + (o * I + i) * TAPS + k, tl.sum(total, axis=0), mask=i < I)


def short_convolve(x: Tensor, weight: Tensor) -> Tensor:
    """float32 ``(N, I, L)`` with ``weight`` ``(O, I, taps)`` -> ``(N, O, L)``; the last tap meets the current sample."""
    out_channels, _, taps = weight.shape
    return _apply(x, weight, (0, 1), out_channels, 1 - taps, 1, None)


def short_convolve_input(grad: Tensor, weight: Tensor, other: Tensor | None = None) -> Tensor:
    """Gradient to the input, ``(N, O, L)`` -> ``(N, I, L)``, plus ``other`` of that shape."""
    _, in_channels, taps = weight.shape
    return _apply(grad, weight, (1, 0), in_channels, taps - 1, -1, other)


def short_convolve_weight(grad: Tensor, x: Tensor, taps: int) -> Tensor:
    """Gradient to the weight, ``(O, I, taps)`` with at most :data:`MAX_TAPS`, from ``grad`` (N, O, L), ``x`` (N, I, L)."""
    n, in_channels, length = x.shape
    out_channels = grad.shape[1]
    block_i, block_o, block_q, block_m = _block(in_channels), _block(out_channels), 32, 64
    split = max(1, min(96, n * triton.cdiv(length, 4 * block_q)))
    partial = torch.empty(split, 4 * block_o, 8 * block_i, dtype=torch.float32, device=x.device)
    sizes = {"SPLIT": split, "BLOCK_I": block_i, "BLOCK_O": block_o}
    _weight_kernel[(split, 4 * block_o // block_m)](
        grad, x, partial, n, in_channels, out_channels, length,
        **sizes, BLOCK_M=block_m, BLOCK_Q=block_q, num_warps=4 if block_i <= 32 else 8,
    )  # fmt: skip
    grad_weight = torch.empty(out_channels, in_channels, taps, dtype=torch.float32, device=x.device)
    _weight_sum_kernel[(out_channels, taps)](
        partial, grad_weight, in_channels, taps, **sizes, BLOCK_S=32, num_warps=4
    )  # fmt: skip
    return grad_weight


def _apply(
    x: Tensor,
    weight: Tensor,
    axes: tuple[int, int],
    out_channels: int,
    first: int,
    step: int,
    other: Tensor | None,
) -> Tensor:
    n, in_channels, length = x.shape
    y = torch.empty(n, out_channels, length, dtype=torch.float32, device=x.device)
    block_t = 128 if length > 128 else 64
    _apply_kernel[(triton.cdiv(length, block_t), n)](
        x, weight, y, y if other is None else other, in_channels, out_channels, length,
        weight.stride(axes[0]), weight.stride(axes[1]), weight.stride(2), first, step, weight.shape[2],
        OTHER=other is not None, BLOCK_I=_block(in_channels), BLOCK_O=_block(out_channels), BLOCK_T=block_t,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return y


def _block(channels: int) -> int:
    return max(16, triton.next_power_of_2(channels))
