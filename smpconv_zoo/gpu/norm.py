"""Two batch norms, their sum, and what follows it, in two passes forward and two backward.

    out = relu(drop(relu(norm_a(a) + norm_b(b))) + residual)

where each of the relus, the dropout and the residual may be absent. Statistics are sums of differences to a sample of
the channel, which does not cancel as sums of squares do; every sum is taken in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smpconv_zoo.gpu import cdiv, next_power_of_2, on_the_device_of_tensors

__all__ = ["norm_sum", "norm_sum_backward", "track"]


@triton.jit
def _clamp(x):
    """ReLU, which leaves what is not a number as it is: a diverged training must not look sound."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _sums_kernel(
    a, b, sums, N, C, S, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per channel and split: sums of (a - pivot), (a - pivot)^2 and the same of b."""
    c = tl.program_id(0)
    split = tl.program_id(1)
    pivot_a = tl.load(a + c * S)
    pivot_b = tl.load(b + c * S)
    a1 = tl.zeros([BLOCK], tl.float32)
    a2 = tl.zeros([BLOCK], tl.float32)
    b1 = tl.zeros([BLOCK], tl.float32)
    b2 = tl.zeros([BLOCK], tl.float32)
    blocks = tl.cdiv(S, BLOCK)
    for item in range(split, N * blocks, SPLIT):
        s = item % blocks * BLOCK + tl.arange(0, BLOCK)
        at = ((item // blocks).to(tl.int64) * C + c) * S + s
        inside = s < S
        d = tl.where(inside, tl.load(a + at, mask=inside, other=0.0) - pivot_a, 0.0)
        a1 += d
        a2 += d * d
        d = tl.where(inside, tl.load(b + at, mask=inside, other=0.0) - pivot_b, 0.0)
        b1 += d
        b2 += d * d
    out = sums + c * SPLIT + split
    tl.store(out, tl.sum(a1, axis=0))
    tl.store(out + C * SPLIT, tl.sum(a2, axis=0))
    tl.store(out + 2 * C * SPLIT, tl.sum(b1, axis=0))
    tl.store(out + 3 * C * SPLIT, tl.sum(b2, axis=0))


@triton.jit
def _statistics(sums, y, c, C, S, count, SPLIT: tl.constexpr):
    """Mean and biased variance of channel ``c`` of ``y`` from its partial sums."""
    at = sums + c * SPLIT + tl.arange(0, SPLIT)
    first = tl.sum(tl.load(at), axis=0) / count
    second = tl.sum(tl.load(at + C * SPLIT), axis=0) / count
    return tl.load(y + c * S) + first, _clamp(second - first * first)


@triton.jit
def _track_kernel(
    saved, mean_a, var_a, tracked_a, mean_b, var_b, tracked_b, C, unbiased, momentum_a, momentum_b, BLOCK: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, BLOCK)
    inside = c < C
    old = tl.load(mean_a + c, mask=inside)
    tl.store(mean_a + c, old * (1 - momentum_a) + momentum_a * tl.load(saved + c, mask=inside), mask=inside)
    old = tl.load(var_a + c, mask=inside)
    new = tl.load(saved + C + c, mask=inside) * unbiased
    tl.store(var_a + c, old * (1 - momentum_a) + momentum_a * new, mask=inside)
    old = tl.load(mean_b + c, mask=inside)
    tl.store(mean_b + c, old * (1 - momentum_b) + momentum_b * tl.load(saved + 2 * C + c, mask=inside), mask=inside)
    old = tl.load(var_b + c, mask=inside)
    new = tl.load(saved + 3 * C + c, mask=inside) * unbiased
    tl.store(var_b + c, old * (1 - momentum_b) + momentum_b * new, mask=inside)
    tl.store(tracked_a, tl.load(tracked_a) + 1)
    tl.store(tracked_b, tl.load(tracked_b) + 1)


@triton.jit
def _apply_kernel(
    a, b, residual, mask, out, sums, gamma_a, beta_a, gamma_b, beta_b,
    running_mean_a, running_var_a, running_mean_b, running_var_b, saved, N, C, S, count, eps_a, eps_b, drop_scale,
    TRAINING: tl.constexpr, RELU: tl.constexpr, DROP: tl.constexpr, RESIDUAL: tl.constexpr,
    SPLIT: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0)
    part = tl.program_id(1)
    if TRAINING:
        mean_a, variance_a = _statistics(sums, a, c, C, S, count, SPLIT)
        mean_b, variance_b = _statistics(sums + 2 * C * SPLIT, b, c, C, S, count, SPLIT)
        if part == 0:
            tl.store(saved + c, mean_a)
            tl.store(saved + C + c, variance_a)
            tl.store(saved + 2 * C + c, mean_b)
            tl.store(saved + 3 * C + c, variance_b)
    else:
        mean_a, variance_a = tl.load(running_mean_a + c), tl.load(running_var_a + c)
        mean_b, variance_b = tl.load(running_mean_b + c), tl.load(running_var_b + c)
    inverse_a = 1 / tl.sqrt_rn(variance_a + eps_a)
    inverse_b = 1 / tl.sqrt_rn(variance_b + eps_b)
    scale_a = inverse_a * tl.load(gamma_a + c)
    scale_b = inverse_b * tl.load(gamma_b + c)
    shift = tl.load(beta_a + c) + tl.load(beta_b + c)
    blocks = tl.cdiv(S, BLOCK)
    for item in range(part, N * blocks, PARTS):
        s = item % blocks * BLOCK + tl.arange(0, BLOCK)
        at = ((item // blocks).to(tl.int64) * C + c) * S + s
        inside = s < S
        y = (tl.load(a + at, mask=inside) - mean_a) * scale_a + (tl.load(b + at, mask=inside) - mean_b) * scale_b
        y += shift
        if RELU:
            y = _clamp(y)
        if DROP:
            y *= tl.load(mask + at, mask=inside, other=0).to(tl.float32) * drop_scale
        if RESIDUAL:
            y = _clamp(y + tl.load(residual + at, mask=inside))
        tl.store(out + at, y, mask=inside)


@triton.jit
def _gradient(
    a, b, grad, out, mask, at, inside, mean_a, inverse_a, mean_b, inverse_b, scale_a, scale_b, shift, drop_scale,
    RELU: tl.constexpr, DROP: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Gradient to the residual and to the sum of the norms, and the normalised inputs, at some places."""
    g = tl.load(grad + at, mask=inside, other=0.0)
    if RESIDUAL:
        g = tl.where(tl.load(out + at, mask=inside, other=0.0) > 0, g, 0.0)
    g_residual = g
    d_a = tl.load(a + at, mask=inside, other=0.0) - mean_a
    d_b = tl.load(b + at, mask=inside, other=0.0) - mean_b
    if DROP:
        g *= tl.load(mask + at, mask=inside, other=0).to(tl.float32) * drop_scale
    if RELU:
        g = tl.where(d_a * scale_a + d_b * scale_b + shift > 0, g, 0.0)
    return g_residual, g, d_a * inverse_a, d_b * inverse_b


@triton.jit
def _scales(saved, gamma_a, beta_a, gamma_b, beta_b, c, C, eps_a, eps_b):
    """Means, inverse deviations and what the forward pass multiplied and added, of channel ``c``."""
    mean_a, inverse_a = tl.load(saved + c), 1 / tl.sqrt_rn(tl.load(saved + C + c) + eps_a)
    mean_b, inverse_b = tl.load(saved + 2 * C + c), 1 / tl.sqrt_rn(tl.load(saved + 3 * C + c) + eps_b)
    scale_a = inverse_a * tl.load(gamma_a + c)
    scale_b = inverse_b * tl.load(gamma_b + c)
    shift = tl.load(beta_a + c) + tl.load(beta_b + c)
    return mean_a, inverse_a, mean_b, inverse_b, scale_a, scale_b, shift


@triton.jit
def _backward_sums_kernel(
    a, b, grad, out, mask, sums, gamma_a, beta_a, gamma_b, beta_b, saved, N, C, S, eps_a, eps_b, drop_scale,
    RELU: tl.constexpr, DROP: tl.constexpr, RESIDUAL: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0)
    split = tl.program_id(1)
    mean_a, inverse_a, mean_b, inverse_b, scale_a, scale_b, shift = _scales(
        saved, gamma_a, beta_a, gamma_b, beta_b, c, C, eps_a, eps_b
    )
    g0 = tl.zeros([BLOCK], tl.float32)
    ga = tl.zeros([BLOCK], tl.float32)
    gb = tl.zeros([BLOCK], tl.float32)
    blocks = tl.cdiv(S, BLOCK)
    for item in range(split, N * blocks, SPLIT):
        s = item % blocks * BLOCK + tl.arange(0, BLOCK)
        at = ((item // blocks).to(tl.int64) * C + c) * S + s
        _, g, x_a, x_b = _gradient(
            a, b, grad, out, mask, at, s < S, mean_a, inverse_a, mean_b, inverse_b, scale_a, scale_b, shift,
            drop_scale, RELU, DROP, RESIDUAL,
        )  # fmt: skip
        g0 += g
        ga += g * x_a
        gb += g * x_b
    at_sums = sums + c * SPLIT + split
    tl.store(at_sums, tl.sum(g0, axis=0))
    tl.store(at_sums + C * SPLIT, tl.sum(ga, axis=0))
    tl.store(at_sums + 2 * C * SPLIT, tl.sum(gb, axis=0))


@triton.jit
def _backward_apply_kernel(
    a, b, grad, out, mask, sums, gamma_a, beta_a, gamma_b, beta_b, saved,
    grad_a, grad_b, grad_residual, grad_parameters, N, C, S, count, eps_a, eps_b, drop_scale,
    RELU: tl.constexpr, DROP: tl.constexpr, RESIDUAL: tl.constexpr,
    SPLIT: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0)
    part = tl.program_id(1)
    mean_a, inverse_a, mean_b, inverse_b, scale_a, scale_b, shift = _scales(
        saved, gamma_a, beta_a, gamma_b, beta_b, c, C, eps_a, eps_b
    )
    at_sums = sums + c * SPLIT + tl.arange(0, SPLIT)
    sum_g = tl.sum(tl.load(at_sums), axis=0)
    sum_a = tl.sum(tl.load(at_sums + C * SPLIT), axis=0)
    sum_b = tl.sum(tl.load(at_sums + 2 * C * SPLIT), axis=0)
    if part == 0:
        tl.store(grad_parameters + c, sum_a)
        tl.store(grad_parameters + C + c, sum_b)
        tl.store(grad_parameters + 2 * C + c, sum_g)
        tl.store(grad_parameters + 3 * C + c, sum_g)
    mean_g = sum_g / count
    mean_ga = sum_a / count
    mean_gb = sum_b / count
    blocks = tl.cdiv(S, BLOCK)
    for item in range(part, N * blocks, PARTS):
        s = item % blocks * BLOCK + tl.arange(0, BLOCK)
        at = ((item // blocks).to(tl.int64) * C + c) * S + s
        inside = s < S
        g_residual, g, x_a, x_b = _gradient(
            a, b, grad, out, mask, at, inside, mean_a, inverse_a, mean_b, inverse_b, scale_a, scale_b, shift,
            drop_scale, RELU, DROP, RESIDUAL,
        )  # fmt: skip
        if RESIDUAL:
            tl.store(grad_residual + at, g_residual, mask=inside)
        tl.store(grad_a + at, scale_a * (g - mean_g - x_a * mean_ga), mask=inside)
        tl.store(grad_b + at, scale_b * (g - mean_g - x_b * mean_gb), mask=inside)


@on_the_device_of_tensors
def norm_sum(
    a: Tensor,
    b: Tensor,
    affine: tuple[Tensor, Tensor, Tensor, Tensor],
    running: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    eps: tuple[float, float],
    *,
    relu: bool,
    mask: Tensor | None,
    drop_scale: float,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Sum of two batch norms and what follows.

    Args:
        a: ``(N, C, *)``, float32, contiguous; so are ``b`` and ``residual``, of the same shape.
        b: See ``a``.
        affine: Gamma and beta of ``a``, gamma and beta of ``b``, each ``(C,)``.
        running: Mean and variance to normalise by, of ``a`` and of ``b``; None for those of the batch.
        eps: Added to the variances of ``a`` and of ``b``.
        relu: Whether the sum goes through a ReLU.
        mask: Boolean, what dropout keeps of it.
        drop_scale: Factor of what is kept.
        residual: Added after that, and the result goes through another ReLU.

    Returns:
        The result, and ``(4, C)``: mean and biased variance of the batch, of ``a`` and of ``b`` (of no meaning if
        ``running`` is given).
    """
    n, channels, size = _shape(a)
    out = torch.empty_like(a)
    saved = torch.empty(4, channels, dtype=torch.float32, device=a.device)
    split, parts, block = _schedule(n, channels, size)
    sums = saved
    if running is None:
        sums = torch.empty(4, channels, split, dtype=torch.float32, device=a.device)
        _sums_kernel[(channels, split)](a, b, sums, n, channels, size, SPLIT=split, BLOCK=block, num_warps=4)
    _apply_kernel[(channels, parts)](
        a, b, a if residual is None else residual, a if mask is None else mask, out, sums, *affine,
        *((saved, saved, saved, saved) if running is None else running), saved,
        n, channels, size, float(n * size), *eps, drop_scale,
        TRAINING=running is None, RELU=relu, DROP=mask is not None, RESIDUAL=residual is not None,
        SPLIT=split, PARTS=parts, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out, saved


@on_the_device_of_tensors
def track(saved: Tensor, running: tuple[Tensor, ...], count: int, momentum: tuple[float, float]) -> None:
    """Update the running statistics of two norms in place.

    Args:
        saved: Second result of :func:`norm_sum`.
        running: Mean, variance and number of batches of the norm of ``a``, then of ``b``.
        count: Values per channel in the batch.
        momentum: Of the norm of ``a`` and of ``b``.
    """
    channels = saved.shape[1]
    unbiased = count / max(count - 1, 1)
    _track_kernel[(1,)](saved, *running, channels, unbiased, *momentum, BLOCK=next_power_of_2(channels), num_warps=1)


@on_the_device_of_tensors
def norm_sum_backward(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    out: Tensor | None,
    saved: Tensor,
    affine: tuple[Tensor, Tensor, Tensor, Tensor],
    eps: tuple[float, float],
    *,
    relu: bool,
    mask: Tensor | None,
    drop_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`norm_sum` by the statistics of the batch.

    Args:
        grad: Gradient to the result.
        a: As forward; so are ``b``, ``affine``, ``eps``, ``relu``, ``mask`` and ``drop_scale``.
        b: See ``a``.
        out: The result if there was a residual, else None.
        saved: The second result of the forward pass.
        affine: See ``a``.
        eps: See ``a``.
        relu: See ``a``.
        mask: See ``a``.
        drop_scale: See ``a``.

    Returns:
        Gradients to ``a``, ``b`` and the residual (empty without one), and ``(4, C)``: to gamma of a, gamma of b, beta
        of a, beta of b.
    """
    n, channels, size = _shape(a)
    split, parts, block = _schedule(n, channels, size)
    sums = torch.empty(3, channels, split, dtype=torch.float32, device=a.device)
    grad_a, grad_b = torch.empty_like(a), torch.empty_like(b)
    residual = out is not None
    grad_residual = torch.empty_like(a) if residual else a.new_empty(0)
    grad_parameters = torch.empty(4, channels, dtype=torch.float32, device=a.device)
    flags = {"RELU": relu, "DROP": mask is not None, "RESIDUAL": residual, "SPLIT": split, "BLOCK": block}
    inputs = (a, b, grad, a if out is None else out, a if mask is None else mask, sums, *affine, saved)
    _backward_sums_kernel[(channels, split)](*inputs, n, channels, size, *eps, drop_scale, **flags, num_warps=4)
    _backward_apply_kernel[(channels, parts)](
        *inputs, grad_a, grad_b, grad_residual, grad_parameters,
        n, channels, size, float(n * size), *eps, drop_scale, PARTS=parts, **flags, num_warps=4,
    )  # fmt: skip
    return grad_a, grad_b, grad_residual, grad_parameters


def _shape(a: Tensor) -> tuple[int, int, int]:
    return a.shape[0], a.shape[1], a.shape[2:].numel()


def _schedule(n: int, channels: int, size: int) -> tuple[int, int, int]:
    """Programs that share the sums of a channel, programs that share its places, and places at a time."""
    block = min(1024, max(128, next_power_of_2(size)))
    items = n * cdiv(size, block)
    # Some 2,000 programs fill a large GPU; the sums stay few enough for every program to add them up again.
    wanted = max(1, min(items, 2048 // channels))
    split = next_power_of_2(wanted + 1) // 2
    return split, min(items, 4 * split), block
