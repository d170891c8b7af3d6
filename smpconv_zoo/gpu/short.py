"""Dense convolutions of a few taps, causal on sequences and centred on maps: forward, and both gradients.

Small matrix products on tensor cores. Every float32 is the sum of two TF32 numbers, and three products of those give
its accuracy back; the splitting is done here, since it is most of the work. The gradient to the weight is added up in
two steps of fixed order, without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smpconv_zoo.gpu import cdiv, next_power_of_2, on_the_device_of_tensors

__all__ = ["short_convolve", "short_convolve_input", "short_convolve_weight"]

# Taps whose gradient is computed four outputs at a time.
MAX_SIDE_BY_SIDE = 5


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
def _shifted(x, i, h, w, I, H, W, in_range):
    """x[i, h, w] of one sample, (channels, places), zero off the map."""
    inside = in_range & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    return tl.load(x + i[:, None] * (H * W) + (h * W + w)[None, :], mask=(i < I)[:, None] & inside[None, :], other=0.0)


@triton.jit
def _apply_kernel(
    x, weight, y, I, O, H, W, w_o, w_i, first_h, first_w, STEP: tl.constexpr, TAPS: tl.constexpr, TAPS_W: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """y[n, o, h, w] = sum_k sum_i weight[o, i, k] x[n, i, h + first_h + STEP kh, w + first_w + STEP kw]"""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(1).to(tl.int64)
    o = tl.arange(0, BLOCK_O)
    in_range = t < H * W
    h = t // W + first_h
    w = t % W + first_w
    x += n * I * H * W
    total = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
    for k in range(TAPS):
        for c in range(0, I, BLOCK_I):
            i = c + tl.arange(0, BLOCK_I)
            values = _shifted(x, i, h + k // TAPS_W * STEP, w + k % TAPS_W * STEP, I, H, W, in_range)
            factors = tl.load(
                weight + o[:, None] * w_o + i[None, :] * w_i + k, mask=(o < O)[:, None] & (i < I)[None, :], other=0.0
            )
            total = _dot(factors, values, total)
    at = n * O * H * W + o[:, None] * (H * W) + t[None, :]
    tl.store(y + at, total, mask=(o < O)[:, None] & in_range[None, :])


@triton.jit
def _tap_weight_kernel(
    grad, x, partial, N, I, O, H, W, first_h, first_w, SPLIT: tl.constexpr, TAPS_W: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """partial[split, k, o, i] = sum over a share of (n, h, w) of grad[n, o, h, w] x[n, i, h + first_h + kh, ..]"""
    split = tl.program_id(0)
    k = tl.program_id(1)
    i = tl.arange(0, BLOCK_I)
    o = tl.arange(0, BLOCK_O)
    total = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    blocks = tl.cdiv(H * W, BLOCK_T)
    for item in range(split, N * blocks, SPLIT):
        n = (item // blocks).to(tl.int64)
        t = item % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
        h = t // W + first_h + k // TAPS_W
        w = t % W + first_w + k % TAPS_W
        g = tl.load(
            grad + n * O * H * W + o[:, None] * (H * W) + t[None, :],
            mask=(o < O)[:, None] & (t < H * W)[None, :],
            other=0.0,
        )
        values = _shifted(x + n * I * H * W, i, h, w, I, H, W, t < H * W)
        total = _dot(g, tl.trans(values), total)
    at = ((split * tl.num_programs(1) + k) * BLOCK_O + o)[:, None] * BLOCK_I + i[None, :]
    tl.store(partial + at, total)


@triton.jit
def _tap_weight_sum_kernel(
    partial, grad_weight, I, O,
    SPLIT: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0)
    k = tl.program_id(1)
    taps = tl.num_programs(1)
    i = tl.arange(0, BLOCK_I)
    split = tl.arange(0, BLOCK_S)
    at = ((split[:, None] * taps + k) * BLOCK_O + o) * BLOCK_I + i[None, :]
    total = tl.load(partial + at, mask=(split < SPLIT)[:, None], other=0.0)
    tl.store(grad_weight + (o * I + i) * taps + k, tl.sum(total, axis=0), mask=i < I)


@triton.jit
def _weight_kernel(
    grad, x, partial, N, I, O, L,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """partial[split, 4 o + s, r, i] = sum over a share of (n, q) of grad[n, o, 4 q + s] x[n, i, 4 q + r - 4]

    Four outputs side by side see eight inputs: the diagonals r - s of this product are the taps. It multiplies more
    than it must, but with every number it loads and splits it does so two hundred times.
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
    # Channels last, so that the sum over the shares reads whole lines.
    total = tl.reshape(tl.permute(tl.reshape(total, [BLOCK_M, BLOCK_I, 8]), [0, 2, 1]), [BLOCK_M, 8 * BLOCK_I])
    tl.store(partial + (split * 4 * BLOCK_O + m)[:, None] * (8 * BLOCK_I) + c[None, :], total)


@triton.jit
def _weight_sum_kernel(
    partial, grad_weight, I, TAPS,
    SPLIT: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0)
    k = tl.program_id(1)
    i = tl.arange(0, BLOCK_I)
    split = tl.arange(0, BLOCK_S)
    total = tl.zeros([BLOCK_S, BLOCK_I], tl.float32)
    for s in tl.static_range(4):
        # The last tap meets the current sample: output 4 q + s, input 4 q + s.
        r = 4 + s + k - (TAPS - 1)
        at = (split[:, None] * (4 * BLOCK_O) + 4 * o + s) * (8 * BLOCK_I) + r * BLOCK_I + i[None, :]
        total += tl.load(partial + at, mask=(split < SPLIT)[:, None], other=0.0)
    tl.store(grad_weight + (o * I + i) * TAPS + k, tl.sum(total, axis=0), mask=i < I)


@on_the_device_of_tensors
def short_convolve(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve with few taps, stride 1, output as large as the input.

    Args:
        x: float32 ``(N, I, L)`` or ``(N, I, H, W)``, contiguous.
        weight: ``(O, I, taps)``, whose last tap meets the current sample, or ``(O, I, Kh, Kw)``, odd and centred.

    Returns:
        ``(N, O, L)`` or ``(N, O, H, W)``.
    """
    first_h, first_w = _first(weight)
    return _apply(x, weight.contiguous(), weight.shape[0], (0, 1), first_h, first_w, 1)


@on_the_device_of_tensors
def short_convolve_input(grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient to the input, of the shape of ``x``, from ``grad`` of the shape of the output."""
    first_h, first_w = _first(weight)
    return _apply(grad, weight.contiguous(), weight.shape[1], (1, 0), -first_h, -first_w, -1)


@on_the_device_of_tensors
def short_convolve_weight(grad: Tensor, x: Tensor, taps: tuple[int, ...]) -> Tensor:
    """Gradient to the weight, ``(O, I, *taps)``, from ``grad`` and ``x``."""
    n, in_channels = x.shape[:2]
    out_channels = grad.shape[1]
    height, width = _map(x)
    grad_weight = torch.empty(out_channels, in_channels, *taps, dtype=torch.float32, device=x.device)
    block_i, block_o = _block(in_channels), _block(out_channels)
    if len(taps) == 1 and taps[0] <= MAX_SIDE_BY_SIDE:
        block_q, block_m = 16, 32
        split = max(1, min(96, n * cdiv(width, 4 * block_q)))
        sizes = {"SPLIT": split, "BLOCK_I": block_i, "BLOCK_O": block_o}
        partial = torch.empty(split, 4 * block_o, 8 * block_i, dtype=torch.float32, device=x.device)
        _weight_kernel[(split, 4 * block_o // block_m)](
            grad, x, partial, n, in_channels, out_channels, width,
            **sizes, BLOCK_M=block_m, BLOCK_Q=block_q, num_warps=4 if block_i <= 32 else 8, num_stages=1,
        )  # fmt: skip
        _weight_sum_kernel[(out_channels, taps[0])](
            partial, grad_weight, in_channels, taps[0], **sizes, BLOCK_S=next_power_of_2(split), num_warps=4
        )
        return grad_weight
    number = taps[0] * taps[-1] if len(taps) == 2 else taps[0]
    block_t = 64
    split = max(1, min(64, n * cdiv(height * width, block_t)))
    sizes = {"SPLIT": split, "BLOCK_I": block_i, "BLOCK_O": block_o}
    partial = torch.empty(split, number, block_o, block_i, dtype=torch.float32, device=x.device)
    first_h, first_w = _first(grad_weight)
    _tap_weight_kernel[(split, number)](
        grad, x, partial, n, in_channels, out_channels, height, width, first_h, first_w,
        **sizes, TAPS_W=taps[-1], BLOCK_T=block_t, num_warps=4, num_stages=1,
    )  # fmt: skip
    _tap_weight_sum_kernel[(out_channels, number)](
        partial, grad_weight, in_channels, out_channels, **sizes, BLOCK_S=next_power_of_2(split), num_warps=4
    )
    return grad_weight


def _apply(
    x: Tensor, weight: Tensor, out_channels: int, axes: tuple[int, int], first_h: int, first_w: int, step: int
) -> Tensor:
    n, in_channels = x.shape[:2]
    height, width = _map(x)
    y = torch.empty(n, out_channels, *x.shape[2:], dtype=torch.float32, device=x.device)
    block_t = 128
    _apply_kernel[(cdiv(height * width, block_t), n)](
        x, weight, y, in_channels, out_channels, height, width, weight.stride(axes[0]), weight.stride(axes[1]),
        first_h, first_w, STEP=step, TAPS=weight.shape[2:].numel(), TAPS_W=weight.shape[-1],
        BLOCK_I=_block(in_channels) if in_channels <= 32 else 16, BLOCK_O=_block(out_channels), BLOCK_T=block_t,
        num_warps=4, num_stages=1,
    )  # fmt: skip
    return y


def _map(x: Tensor) -> tuple[int, int]:
    return (1, x.shape[2]) if x.dim() == 3 else (x.shape[2], x.shape[3])


def _first(weight: Tensor) -> tuple[int, int]:
    """Where the first tap lies, seen from the output."""
    return (0, 1 - weight.shape[2]) if weight.dim() == 3 else (-(weight.shape[2] // 2), -(weight.shape[3] // 2))


def _block(channels: int) -> int:
    return max(16, next_power_of_2(channels))
