"""The steps of an FFT convolution that are not the FFT itself: folding, products of spectra, unfolding.

A real linear convolution of ``2 n`` places is computed with complex transforms of ``n`` points and no redundancy, by
reading real sequences as polynomials modulo ``u^(2n) + 1`` at the ``n`` roots with ``u^n = -i``:

    X(u_m) = sum_{t < 2n} x[t] u_m^t = FFT_n{ (x[t] - i x[t + n]) e^(-i pi t / (2n)) }[m],
    u_m = e^(-i pi (4m + 1) / (2n)).

Folding makes the braces, unfolding undoes them. Places that wrap around come back with the opposite sign. Against a
real-to-complex transform of ``2 n`` points the bytes are the same, but no pass is spent on packing or padding (CUDA
libraries need two more), and the transform is half as long. A second, outer axis is transformed plainly.

Spectra lie as the FFT leaves them, ``(row, outer, inner)`` with frequencies contiguous; products are taken in that
layout, so nothing is ever transposed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smpconv_zoo.gpu import cdiv, on_the_device_of_tensors

__all__ = ["contract", "fold", "unfold"]


@triton.jit
def _fold_kernel(
    x, z, stride_row, stride_h, stride_w, H, W, NH, NW, FLIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    inside = index < NH * NW
    t = index % NW
    h = index // NW
    far = t + NW
    in_row = inside & (h < H)
    hh = H - 1 - h if FLIP else h
    near_w = W - 1 - t if FLIP else t
    far_w = W - 1 - far if FLIP else far
    base = x + row * stride_row + hh * stride_h
    a = tl.load(base + near_w * stride_w, mask=in_row & (t < W), other=0.0).to(tl.float32)
    b = tl.load(base + far_w * stride_w, mask=in_row & (far < W), other=0.0).to(tl.float32)
    angle = t.to(tl.float32) * (1.5707963267948966 / NW)
    c = tl.cos(angle)
    s = tl.sin(angle)
    # (a - i b) (c - i s)
    real = a * c - b * s
    imag = -(a * s + b * c)
    place = tl.arange(0, 2)
    both = tl.where((place == 0)[None, :], real[:, None], imag[:, None])
    tl.store(z + 2 * (row * NH * NW + index[:, None]) + place[None, :], both, mask=inside[:, None])


@triton.jit
def _unfold_kernel(
    z, y, other, start_h, start_w, scale, H, W, NH, NW, OTHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    inside = index < H * W
    w = index % W + start_w
    h = index // W + start_h
    h = tl.where(h < 0, h + NH, h)
    # Before the first place lies the last one, with the opposite sign.
    sign = tl.where(w < 0, -scale, scale)
    w = tl.where(w < 0, w + 2 * NW, w)
    far = w >= NW
    t = tl.where(far, w - NW, w)
    at = z + 2 * (row * NH * NW + h * NW + t)
    real = tl.load(at, mask=inside, other=0.0)
    imag = tl.load(at + 1, mask=inside, other=0.0)
    angle = t.to(tl.float32) * (1.5707963267948966 / NW)
    c = tl.cos(angle)
    s = tl.sin(angle)
    # v = (real + i imag) (c + i s) = y[t] - i y[t + n]
    value = tl.where(far, -(real * s + imag * c), real * c - imag * s) * sign
    if OTHER:
        value += tl.load(other + row * H * W + index, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * H * W + index, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _split(pair):
    """Real and imaginary part of a complex64 that was loaded as one 64-bit word."""
    real = pair.to(tl.int32).to(tl.float32, bitcast=True)
    imag = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return real, imag


@triton.jit
def _contract_kernel(
    a, b, c, n_a, n_b, n_c, n_f, a_row, a_sum, b_row, b_sum, c_a, c_b,
    CONJUGATE_A: tl.constexpr, CONJUGATE_B: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    # Programs next to each other share frequencies: what they read stays in the second-level cache.
    blocks_b = tl.cdiv(n_b, BLOCK_B)
    index_a = tl.program_id(0) // blocks_b * BLOCK_A + tl.arange(0, BLOCK_A)
    index_b = tl.program_id(0) % blocks_b * BLOCK_B + tl.arange(0, BLOCK_B)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    in_f = f < n_f
    # Rows past the end read the last row again; their results are not stored.
    at_a = a + tl.minimum(index_a, n_a - 1).to(tl.int64)[:, None, None] * a_row + f[None, None, :]
    at_b = b + tl.minimum(index_b, n_b - 1).to(tl.int64)[None, :, None] * b_row + f[None, None, :]
    real = tl.zeros([BLOCK_A, BLOCK_B, BLOCK_F], tl.float32)
    imag = tl.zeros([BLOCK_A, BLOCK_B, BLOCK_F], tl.float32)
    for k in range(0, n_c, UNROLL):
        # The loads of a few steps are under way at once: there are too few threads to hide their latency otherwise.
        for u in tl.static_range(UNROLL):
            more = in_f & (k + u < n_c)
            a_real, a_imag = _split(tl.load(at_a + u * a_sum, mask=more[None, None, :], other=0))
            b_real, b_imag = _split(tl.load(at_b + u * b_sum, mask=more[None, None, :], other=0))
            if CONJUGATE_A:
                a_imag = -a_imag
            if CONJUGATE_B:
                b_imag = -b_imag
            real += a_real * b_real
            real -= a_imag * b_imag
            imag += a_real * b_imag
            imag += a_imag * b_real
        at_a += UNROLL * a_sum
        at_b += UNROLL * b_sum
    low = real.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    pair = (imag.to(tl.int32, bitcast=True).to(tl.int64) << 32) | low
    at_c = c + index_a.to(tl.int64)[:, None, None] * c_a + index_b.to(tl.int64)[None, :, None] * c_b + f[None, None, :]
    keep = (index_a < n_a)[:, None, None] & (index_b < n_b)[None, :, None] & in_f[None, None, :]
    tl.store(at_c, pair, mask=keep)


@on_the_device_of_tensors
def fold(x: Tensor, sizes: tuple[int, int], flip: bool = False) -> Tensor:
    """Real ``(rows, columns, H, W)`` -> complex64 ``(rows, columns, NH, NW)``, ready for the FFT of the last two.

    Args:
        x: Any floating-point type; ``2 NW >= W`` and ``NH >= H``, the rest is zeros.
        sizes: ``(NH, NW)``.
        flip: Read ``x`` backwards along both axes.
    """
    rows, columns, height, width = x.shape
    if x.stride(0) != columns * x.stride(1):
        x = x.contiguous()
    nh, nw = sizes
    z = torch.empty(rows, columns, nh, nw, dtype=torch.complex64, device=x.device)
    block = 256 if nh * nw <= 2048 else 1024
    _fold_kernel[(rows * columns, cdiv(nh * nw, block))](
        x, torch.view_as_real(z), x.stride(1), x.stride(2), x.stride(3), height, width, nh, nw,
        FLIP=flip, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return z


@on_the_device_of_tensors
def unfold(
    z: Tensor, start: tuple[int, int], size: tuple[int, int], dtype: torch.dtype, other: Tensor | None = None
) -> Tensor:
    """Inverse of :func:`fold` after an unscaled inverse FFT: complex64 ``(rows, columns, NH, NW)`` -> real.

    Args:
        z: Contiguous.
        start: First place wanted along both axes; negative ones are those before the first.
        size: ``(H, W)`` places wanted.
        dtype: Type of the result.
        other: To be added, contiguous, of as many elements as the result.

    Returns:
        ``(rows, columns, H, W)``.
    """
    rows, columns, nh, nw = z.shape
    y = torch.empty(rows, columns, *size, dtype=dtype, device=z.device)
    block = 256 if size[0] * size[1] <= 2048 else 1024
    _unfold_kernel[(rows * columns, cdiv(size[0] * size[1], block))](
        torch.view_as_real(z), y, y if other is None else other, *start, 1.0 / (nh * nw), *size, nh, nw,
        OTHER=other is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return y


@on_the_device_of_tensors
def contract(
    a: Tensor,
    b: Tensor,
    sum_a: int,
    sum_b: int,
    conjugate_a: bool = False,
    conjugate_b: bool = False,
) -> Tensor:
    """``c[r, s, f] = sum_k a[r, k, f] b[s, k, f]`` at every frequency f, for contiguous complex64 tensors of rank 3 up.

    Args:
        a: ``(r, k, *frequencies)``, or ``(k, r, ...)`` where ``sum_a`` is 0.
        b: ``(s, k, *frequencies)``, or ``(k, s, ...)`` where ``sum_b`` is 0.
        sum_a: Axis of ``a`` that is summed, 0 or 1.
        sum_b: Axis of ``b`` that is summed, 0 or 1.
        conjugate_a: Use the complex conjugate of ``a``.
        conjugate_b: Use the complex conjugate of ``b``.

    Returns:
        ``(r, s, *frequencies)``.
    """
    frequencies = a.shape[2:]
    n_f = frequencies.numel()
    n_a, n_b, n_c = a.shape[1 - sum_a], b.shape[1 - sum_b], a.shape[sum_a]
    c = torch.empty(n_a, n_b, *frequencies, dtype=torch.complex64, device=a.device)
    strides_a = (a.shape[1] * n_f, n_f)
    strides_b = (b.shape[1] * n_f, n_f)
    # Few frequencies make few threads: smaller tiles, and more loads under way in each.
    block_a, block_b, block_f, warps, unroll = 4, 4, 32, 1, 5
    if n_f > 4096:
        block_a, block_b, block_f, warps, unroll = 8, 8, 32, 1, 2
    elif n_f > 256 and n_c <= 32:
        block_a, block_b, block_f, warps, unroll = 8, 16, 32, 4, 3
    grid = (cdiv(n_a, block_a) * cdiv(n_b, block_b), cdiv(n_f, block_f))
    _contract_kernel[grid](
        a.view(torch.int64), b.view(torch.int64), c.view(torch.int64), n_a, n_b, n_c, n_f,
        strides_a[1 - sum_a], strides_a[sum_a], strides_b[1 - sum_b], strides_b[sum_b], n_b * n_f, n_f,
        CONJUGATE_A=conjugate_a, CONJUGATE_B=conjugate_b,
        BLOCK_A=block_a, BLOCK_B=block_b, BLOCK_F=block_f, UNROLL=unroll, num_warps=warps,
    )  # fmt: skip
    return c
