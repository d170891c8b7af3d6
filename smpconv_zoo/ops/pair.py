"""A large and a small convolution of one input, in training on an NVIDIA GPU.

The same as one call each, but what does not wait for each other runs side by side, spectra are kept for the backward
pass where there is room, and the two gradients to the input are added on the way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smpconv_zoo.gpu import on_the_device_of_tensors
from smpconv_zoo.operators import recorded
from smpconv_zoo.ops.dispatch import add_bias, causal_conv1d, conv2d
from smpconv_zoo.ops.fft import Folded, can_fold, keeps_spectra
from smpconv_zoo.ops.short import can_run_short, short_convolve_now

__all__ = ["can_run_pair", "convolve_pair"]


def can_run_pair(x: Tensor, large: Tensor, small: Tensor) -> bool:
    """Whether :func:`convolve_pair` can take these and is worth it: float32 on a GPU, with gradients to come."""
    if not x.is_cuda or x.dtype != torch.float32 or recorded((x, large, small)):
        return False
    if not torch.is_grad_enabled() or torch.is_autocast_enabled("cuda") or x.numel() == 0:
        return False
    return large.dtype == x.dtype and can_fold(x, large) and can_run_short(x, small) is None


def convolve_pair(
    x: Tensor, large: Tensor, small: Tensor, large_bias: Tensor | None = None, small_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Convolve ``x`` with both kernels; causal for ``(N, I, L)``, 'same' for ``(N, I, H, W)``.

    Equivalent to ``(causal_conv1d(x, large, large_bias), causal_conv1d(x, small, small_bias))``, on maps to the same of
    ``conv2d``.

    Args:
        x: The input.
        large: ``(O, I, *taps)``, no further back than ``x`` is long.
        small: ``(O, I, *taps)``, few taps.
        large_bias: ``(O,)`` or None.
        small_bias: ``(O,)`` or None.
    """
    of_large, of_small = _ConvolvePair.apply(x, large, small)
    return add_bias(of_large, large_bias), add_bias(of_small, small_bias)


class _ConvolvePair(torch.autograd.Function):
    @staticmethod
    @on_the_device_of_tensors
    def forward(ctx: Any, x: Tensor, large: Tensor, small: Tensor) -> tuple[Tensor, Tensor]:
        from smpconv_zoo.gpu.streams import beside, join

        x = x.contiguous()
        ctx.future = [0] if x.dim() == 3 else [large.shape[2] // 2, large.shape[3] // 2]
        folded = ctx.folded = Folded(x.shape[2:], large.shape[2:], ctx.future)
        with beside(0):
            of_small = short_convolve_now(x, small)
        with beside(1):
            spectrum_large = folded.spectrum(large, flip=True)
        spectrum = folded.spectrum(x)
        join(1)
        of_large = folded.output(spectrum, spectrum_large, x)
        join(0)
        kept = (spectrum, spectrum_large) if keeps_spectra(x, large, ctx.folded) else (None, None)
        ctx.save_for_backward(x, large, small, *kept)
        return of_large, of_small

    @staticmethod
    @on_the_device_of_tensors
    def backward(ctx: Any, grad_large: Tensor, grad_small: Tensor) -> tuple[Tensor | None, ...]:
        from smpconv_zoo.gpu.short import short_convolve_input, short_convolve_weight
        from smpconv_zoo.gpu.streams import beside, join

        x, large, small, spectrum_x, spectrum_large = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable_gradients(ctx, x, large, small, grad_large, grad_small)
        folded = ctx.folded
        grad_small = grad_small.contiguous()
        to_x, to_large, to_small = ctx.needs_input_grad
        gradient_x = gradient_large = gradient_small = of_small = None
        with beside(0):
            if to_x:
                of_small = short_convolve_input(grad_small, small)
        with beside(2):
            if to_small:
                gradient_small = short_convolve_weight(grad_small, x, tuple(small.shape[2:]))
        spectrum = folded.spectrum(grad_large)
        with beside(1):
            if to_large:
                if spectrum_x is None:
                    spectrum_x = folded.spectrum(x)
                gradient_large = folded.weight_gradient(spectrum, spectrum_x, x)
        if to_x:
            if spectrum_large is None:
                spectrum_large = folded.spectrum(large, flip=True)

            def ready() -> Tensor | None:
                join(0)
                return of_small

            gradient_x = folded.input_gradient(spectrum, spectrum_large, x, ready)
        join(0, 1, 2)
        return gradient_x, gradient_large, gradient_small


def _differentiable_gradients(
    ctx: Any, x: Tensor, large: Tensor, small: Tensor, grad_large: Tensor, grad_small: Tensor
) -> tuple[Tensor | None, ...]:
    convolve = causal_conv1d if x.dim() == 3 else conv2d
    inputs = [x, large, small]
    y = (convolve(x, large, backend="fft"), convolve(x, small, backend="short"))
    wanted = [tensor for tensor, needed in zip(inputs, ctx.needs_input_grad, strict=True) if needed]
    found = iter(torch.autograd.grad(y, wanted, (grad_large, grad_small), create_graph=True))
    return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)
