"""The tail of a large + small pair: two batch norms, their sum, and what follows, in as few passes as can be.

On an NVIDIA GPU, batch norm and element-wise passes take longer than the convolutions of a sequence network; there the
tail is one library operator (:mod:`smpconv_zoo.gpu.norm`). Elsewhere, and for a second derivative, it is PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smpconv_zoo.gpu import why_no_triton
from smpconv_zoo.operators import gradient_operator, operator

__all__ = ["norm_sum", "unheard", "why_not_fused"]


def unheard(module: nn.Module) -> bool:
    """Whether nobody listens to a module by hooks, so that its work may be done elsewhere."""
    return not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def why_not_fused(a: Tensor, b: Tensor, norm_a: nn.Module, norm_b: nn.Module) -> str | None:
    """None if :func:`norm_sum` can take these, else the reason why not."""
    if not (a.is_cuda and b.is_cuda):
        return "the fused norms run on cuda"
    if not (a.dtype == b.dtype == torch.float32):
        return f"the fused norms compute in float32, got {a.dtype} and {b.dtype}"
    if a.numel() == 0 or a.shape != b.shape:
        return f"the fused norms need two tensors of one shape with elements, got {tuple(a.shape)} and {tuple(b.shape)}"
    for norm in (norm_a, norm_b):
        if type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d):
            return f"the fused norms are batch norms, got {type(norm).__name__}"
        if not (norm.affine and norm.track_running_stats) or norm.momentum is None:
            return "the fused norms need affine parameters, running statistics and a momentum"
        if not unheard(norm):
            return "a norm has hooks"
        if norm.weight.dtype != torch.float32:
            return f"the fused norms have float32 parameters, got {norm.weight.dtype}"
    if norm_a.training != norm_b.training:
        return "one norm trains and the other does not"
    if norm_a.training and a.numel() // a.shape[1] < 2:
        return "statistics need more than one value per channel"
    if not norm_a.training and torch.is_grad_enabled():
        return "the fused norms have a gradient in training only"
    return why_no_triton()


def norm_sum(
    a: Tensor,
    b: Tensor,
    norm_a: Any,
    norm_b: Any,
    relu: bool,
    drop_rate: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """``drop(relu(norm_a(a) + norm_b(b)))``, and with a residual ``relu(... + residual)``.

    Args:
        a: ``(N, C, *)``; see :func:`why_not_fused` for what it takes.
        b: The same shape.
        norm_a: Batch norm of ``a``; its running statistics are updated while it trains.
        norm_b: Batch norm of ``b``.
        relu: Whether the sum goes through a ReLU.
        drop_rate: Dropout after that, while training.
        residual: The same shape as ``a``.
    """
    mask = None
    scale = 1.0
    if drop_rate > 0 and norm_a.training:
        mask = torch.empty_like(a, dtype=torch.bool).bernoulli_(1 - drop_rate)
        scale = 1 / (1 - drop_rate) if drop_rate < 1 else 0.0
    running: tuple[Tensor | None, ...] = (None,) * 4
    if not norm_a.training:
        running = (norm_a.running_mean, norm_a.running_var, norm_b.running_mean, norm_b.running_var)
    out, saved = _norm_sum(
        a.contiguous(),
        b.contiguous(),
        norm_a.weight,
        norm_a.bias,
        norm_b.weight,
        norm_b.bias,
        *running,
        [norm_a.eps, norm_b.eps],
        relu,
        mask,
        scale,
        None if residual is None else residual.contiguous(),
    )
    if norm_a.training:
        (_track if torch.compiler.is_compiling() else _track_now)(
            saved,
            norm_a.running_mean,
            norm_a.running_var,
            norm_a.num_batches_tracked,
            norm_b.running_mean,
            norm_b.running_var,
            norm_b.num_batches_tracked,
            a.numel() // a.shape[1],
            [norm_a.momentum, norm_b.momentum],
        )
    result: Tensor = out
    return result


def _norm_sum_now(
    a: Tensor,
    b: Tensor,
    gamma_a: Tensor,
    beta_a: Tensor,
    gamma_b: Tensor,
    beta_b: Tensor,
    mean_a: Tensor | None,
    var_a: Tensor | None,
    mean_b: Tensor | None,
    var_b: Tensor | None,
    eps: Sequence[float],
    relu: bool,
    mask: Tensor | None,
    drop_scale: float,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from smpconv_zoo.gpu.norm import norm_sum

    return norm_sum(
        a,
        b,
        (gamma_a, beta_a, gamma_b, beta_b),
        None if mean_a is None or var_a is None or mean_b is None or var_b is None else (mean_a, var_a, mean_b, var_b),
        (eps[0], eps[1]),
        relu=relu,
        mask=mask,
        drop_scale=drop_scale,
        residual=residual,
    )


def _track_now(
    saved: Tensor,
    mean_a: Tensor,
    var_a: Tensor,
    tracked_a: Tensor,
    mean_b: Tensor,
    var_b: Tensor,
    tracked_b: Tensor,
    count: int,
    momentum: Sequence[float],
) -> None:
    from smpconv_zoo.gpu.norm import track

    track(saved, (mean_a, var_a, tracked_a, mean_b, var_b, tracked_b), count, (momentum[0], momentum[1]))


def _norm_sum_backward_now(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    out: Tensor | None,
    saved: Tensor,
    gamma_a: Tensor,
    beta_a: Tensor,
    gamma_b: Tensor,
    beta_b: Tensor,
    eps: Sequence[float],
    relu: bool,
    mask: Tensor | None,
    drop_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from smpconv_zoo.gpu.norm import norm_sum_backward

    return norm_sum_backward(
        grad.contiguous(),
        a,
        b,
        out,
        saved,
        (gamma_a, beta_a, gamma_b, beta_b),
        (eps[0], eps[1]),
        relu=relu,
        mask=mask,
        drop_scale=drop_scale,
    )


_track = torch.library.custom_op(
    "smpconv_zoo::track", _track_now, mutates_args=("mean_a", "var_a", "tracked_a", "mean_b", "var_b", "tracked_b")
)


def _fake_norm_sum(a: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a), a.new_empty(4, a.shape[1])


def _fake_norm_sum_backward(
    grad: Tensor, a: Tensor, b: Tensor, out: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    residual = a.new_empty(0) if out is None else torch.empty_like(a)
    return torch.empty_like(a), torch.empty_like(b), residual, a.new_empty(4, a.shape[1])


def _save_norm_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, b, gamma_a, beta_a, gamma_b, beta_b, *_, ctx.eps, ctx.relu, mask, ctx.drop_scale, residual = inputs
    out, saved = output
    kept = None if residual is None else out
    ctx.save_for_backward(a, b, gamma_a, beta_a, gamma_b, beta_b, mask, residual, kept, saved)


def _norm_sum_gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    a, b, gamma_a, beta_a, gamma_b, beta_b, mask, residual, out, saved = ctx.saved_tensors
    if torch.is_grad_enabled():
        # Somebody differentiates the gradient: PyTorch's own norms have derivatives of every order.
        inputs = [a, b, gamma_a, beta_a, gamma_b, beta_b] + ([] if residual is None else [residual])
        y = F.batch_norm(a, None, None, gamma_a, beta_a, True, eps=ctx.eps[0])
        y = y + F.batch_norm(b, None, None, gamma_b, beta_b, True, eps=ctx.eps[1])
        y = torch.relu(y) if ctx.relu else y
        y = y if mask is None else y * mask * ctx.drop_scale
        y = y if residual is None else torch.relu(y + residual)
        found = iter(torch.autograd.grad(y, [t for t in inputs if t.requires_grad], grad, create_graph=True))
        gradients = [next(found) if tensor.requires_grad else None for tensor in inputs]
        to_residual = None if residual is None else gradients[6]
        return (*gradients[:6], *[None] * 8, to_residual)
    to_a, to_b, to_residual, parameters = _norm_sum_backward(
        grad, a, b, out, saved, gamma_a, beta_a, gamma_b, beta_b, ctx.eps, ctx.relu, mask, ctx.drop_scale
    )
    to_gamma_a, to_gamma_b, to_beta_a, to_beta_b = parameters.unbind(0)
    to_residual = None if residual is None else to_residual
    return to_a, to_b, to_gamma_a, to_beta_a, to_gamma_b, to_beta_b, *[None] * 8, to_residual


_norm_sum_backward = gradient_operator("norm_sum_backward", _norm_sum_backward_now, _fake_norm_sum_backward)
_norm_sum = operator("norm_sum", _norm_sum_now, _fake_norm_sum, _save_norm_sum, _norm_sum_gradients)
