"""Convolution through the fast Fourier transform: depthwise or dense, one or two axes, 'same' or causal.

All of it is one bilinear map and its two adjoints. With ``past`` and ``future`` the taps behind and ahead of the
current sample along an axis (``past + future + 1`` taps; a 'same' convolution has equally many, a causal one no
future),

    y[n, o, t] = sum_i sum_k weight[o, i, k] x[n, i, t + k - past],

a circular convolution of size ``n >= size + max(past, future)`` gives all ``size`` outputs without wrap-around: shorter
than the linear ``size + taps - 1``, since outputs off the map are not asked for. Kernels are flipped before the
transform so that the wanted outputs are the slice ``[future, future + size)``.

Dense convolutions on NVIDIA GPUs are folded along the last axis to complex transforms of half the length, and multiply
spectra where they lie (:mod:`smpconv_zoo.gpu.fourier`).

The three maps are registered as library operators whose derivatives call each other: gradients of any order, opaque to
``torch.compile`` and ``torch.export``, and nothing but inputs is kept for the backward pass. Half precision is computed
in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from smpconv_zoo.gpu import why_no_triton
from smpconv_zoo.operators import operator, recorded
from smpconv_zoo.ops.kept import KernelCache

__all__ = [
    "Folded",
    "can_fold",
    "convolve_weight",
    "empty_like_map",
    "fft_convolve",
    "good_fft_size",
    "is_channels_last",
    "keeps_spectra",
]

# Spectra of more bytes than this are computed again in the backward pass rather than kept for it, layer by layer.
_KEPT_BYTES_CUDA = 64 * 2**20
_KEPT_BYTES = 512 * 2**20
# Transforms on a CPU are taken so many bytes at a time.
_SHARE_BYTES = 8 * 2**20
_SHARE_BYTES_DEPTHWISE = 4 * 2**20


def good_fft_size(size: int, primes: Sequence[int] = (2, 3, 5, 7)) -> int:
    """Smallest even number >= ``size`` made of ``primes`` alone: the sizes that FFT libraries have fast kernels for."""
    candidate = size + size % 2
    while True:
        rest = candidate
        for prime in primes:
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return candidate
        candidate += 2


def _folded_sizes(size: Sequence[int], taps: Sequence[int], future: Sequence[int]) -> tuple[int, int]:
    """Points of the transform along (outer, inner) axis of a folded convolution: the inner one holds twice as many."""
    linear = [s + max(f, t - 1 - f) for s, t, f in zip(size, taps, future, strict=True)]
    outer = good_fft_size(linear[0], (2, 3, 5)) if len(linear) == 2 else 1
    return outer, good_fft_size((linear[-1] + 1) // 2, (2, 3, 5))


def can_fold(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`fft_convolve` folds: dense kernels on an NVIDIA GPU, not in double precision."""
    return Folded.can_run(x, _is_depthwise(x.shape[1], weight.shape))


def fft_convolve(x: Tensor, weight: Tensor, future: Sequence[int], cache: KernelCache | None = None) -> Tensor:
    """Convolve through the FFT.

    Args:
        x: Input, ``(N, I, *size)`` with one or two spatial axes.
        weight: Kernel, ``(O, I, *taps)``, or ``(I, 1, *taps)`` for a depthwise convolution.
        future: For each axis, taps ahead of the current sample: ``taps // 2`` for 'same', 0 for causal. No axis may
            have more than ``size - 1`` taps behind or ahead of the current sample.
        cache: Keeps the spectrum of the kernel, where no gradient is wanted.

    Returns:
        ``(N, O, *size)``, in the dtype of ``x``; of a depthwise convolution in the layout of ``x``.
    """
    places = list(future)
    training = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if cache is not None and not training and not recorded((x, weight)):
        way = spectral(x, weight, places)
        key = (type(way), tuple(way.points), tuple(places))
        return way.convolve(x, cache.get(weight, key, lambda: way.spectrum(weight, flip=True)))
    y: Tensor
    if (
        training
        and not _is_depthwise(x.shape[1], weight.shape)
        and not recorded((x, weight))
        and keeps_spectra(x, weight, _dense(x)(x.shape[2:], weight.shape[2:], places))
    ):
        y = _ConvolveKeepingSpectra.apply(x, weight, places)
    else:
        y = _convolve(x, weight, places)
    return y


def _is_depthwise(channels: int, weight_shape: Sequence[int]) -> bool:
    return weight_shape[1] == 1 and weight_shape[0] == channels


def _sizes(size: Sequence[int], taps: Sequence[int], future: Sequence[int]) -> list[int]:
    return [good_fft_size(s + max(f, t - 1 - f)) for s, t, f in zip(size, taps, future, strict=True)]


def _forward_transform(x: Tensor, sizes: Sequence[int]) -> Tensor:
    dims = list(range(2, x.dim()))
    return torch.fft.rfftn(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x, s=list(sizes), dim=dims)


def _inverse_transform(spectrum: Tensor, sizes: Sequence[int], start: Sequence[int], size: Sequence[int]) -> Tensor:
    dims = list(range(2, spectrum.dim()))
    out = torch.fft.irfftn(spectrum, s=list(sizes), dim=dims)
    for dim, (first, length) in enumerate(zip(start, size, strict=True), start=2):
        out = out.narrow(dim, first, length)
    return out


def is_channels_last(x: Tensor) -> bool:
    """Whether ``x`` (N, C, H, W) lies in memory with its channels innermost, and not also the plain way."""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def empty_like_map(x: Tensor) -> Tensor:
    """Room for a result of the shape and the layout of ``x``: channels last or plain."""
    return torch.empty_like(
        x, memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format, requires_grad=False
    )


def _flip(weight: Tensor) -> Tensor:
    return weight.flip(list(range(2, weight.dim())))


class Folded:
    """A dense convolution on an NVIDIA GPU by folded transforms: its spectra, and its map and both adjoints of them."""

    def __init__(self, size: Sequence[int], taps: Sequence[int], future: Sequence[int]) -> None:
        self.size = _two(size, 1)
        self.taps = _two(taps, 1)
        self.future = _two(future, 0)
        self.past = (self.taps[0] - 1 - self.future[0], self.taps[1] - 1 - self.future[1])
        self.points = _folded_sizes(size, taps, future)

    @staticmethod
    def can_run(x: Tensor, depthwise: bool) -> bool:
        return x.is_cuda and x.dtype != torch.float64 and not depthwise and why_no_triton() is None

    def spectrum(self, x: Tensor, flip: bool = False) -> Tensor:
        from smpconv_zoo.gpu.fourier import fold

        folded = fold(x.unsqueeze(2) if x.dim() == 3 else x, self.points, flip)
        return torch.fft.fft(folded) if self.points[0] == 1 else torch.fft.fft2(folded)

    def read(
        self,
        spectrum: Tensor,
        start: tuple[int, int],
        size: tuple[int, int],
        like: Tensor,
        other: Callable[[], Tensor | None] | None = None,
    ) -> Tensor:
        from smpconv_zoo.gpu.fourier import unfold

        inverse = torch.fft.ifft if self.points[0] == 1 else torch.fft.ifft2
        lines = inverse(spectrum, norm="forward")
        y = unfold(lines, start, size, like.dtype, None if other is None else other())
        return y.squeeze(2) if like.dim() == 3 else y

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """``x`` with the kernel whose spectrum is given."""
        return self.output(self.spectrum(x), weight, x)

    def output(self, x: Tensor, weight: Tensor, like: Tensor) -> Tensor:
        from smpconv_zoo.gpu.fourier import contract

        return self.read(contract(x, weight, 1, 1), self.future, self.size, like)

    def input_gradient(
        self, grad: Tensor, weight: Tensor, like: Tensor, other: Callable[[], Tensor | None] | None = None
    ) -> Tensor:
        """The gradient, plus what ``other`` gives when it is asked at the end."""
        from smpconv_zoo.gpu.fourier import contract

        # The adjoint of "place t + future": what comes before the first place lies at the end.
        start = (-self.future[0], -self.future[1])
        return self.read(contract(grad, weight, 1, 0, conjugate_b=True), start, self.size, like, other)

    def weight_gradient(self, grad: Tensor, x: Tensor, like: Tensor) -> Tensor:
        from smpconv_zoo.gpu.fourier import contract

        # Tap k meets the sample k - past places later than the output.
        start = (-self.past[0], -self.past[1])
        return self.read(contract(grad, x, 0, 0, conjugate_a=True), start, self.taps, like)


class FrequencyMajor:
    """A dense convolution anywhere else: spectra with the frequency first, one matrix for each, and their products."""

    def __init__(self, size: Sequence[int], taps: Sequence[int], future: Sequence[int]) -> None:
        self.size, self.taps, self.future = list(size), list(taps), list(future)
        self.past = [t - 1 - f for t, f in zip(taps, future, strict=True)]
        self.points = _sizes(size, taps, future)

    def spectrum(self, x: Tensor, flip: bool = False) -> Tensor:
        spectrum: Tensor | None = None
        for rows in self._shares(x.shape[0], x.shape[1]):
            part = _forward_transform(_flip(x[rows]) if flip else x[rows], self.points).flatten(2).permute(2, 0, 1)
            if spectrum is None:
                spectrum = part.new_empty(part.shape[0], x.shape[0], x.shape[1])
            spectrum[:, rows] = part
        assert spectrum is not None
        return spectrum

    def _shares(self, rows: int, columns: int) -> Iterator[slice]:
        """Rows at a time whose transforms stay in a cache, and in memory that the allocator hands out again."""
        at_once = max(1, _SHARE_BYTES // (8 * columns * math.prod(self.points)))
        for first in range(0, rows, at_once):
            yield slice(first, min(first + at_once, rows))

    def _read(self, spectrum: Tensor, start: Sequence[int], y: Tensor) -> None:
        """Fill ``y`` (n, o, *size) with the places from ``start`` on of the sequences whose spectrum is (F, n, o)."""
        frequencies = [*self.points[:-1], self.points[-1] // 2 + 1]
        dims = list(range(2, y.dim()))
        lines = torch.fft.irfftn(spectrum.permute(1, 2, 0).unflatten(2, frequencies), s=self.points, dim=dims)
        for dim, first in zip(dims, start, strict=True):
            length = y.shape[dim]
            if first >= 0:
                lines = lines.narrow(dim, first, length)
            else:
                # Places before the first lie at the end.
                before = min(-first, length)
                ends = lines.narrow(dim, lines.shape[dim] + first, before), lines.narrow(dim, 0, length - before)
                lines = torch.cat(ends, dim)
        y.copy_(lines)

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """``x`` with the kernel whose spectrum is given."""
        return self.output(self.spectrum(x), weight, x)

    def output(self, x: Tensor, weight: Tensor, like: Tensor) -> Tensor:
        y = like.new_empty(like.shape[0], weight.shape[1], *self.size)
        for rows in self._shares(y.shape[0], y.shape[1]):
            self._read(torch.bmm(x[:, rows], weight.transpose(1, 2)), self.future, y[rows])
        return y

    def input_gradient(self, grad: Tensor, weight: Tensor, like: Tensor) -> Tensor:
        y = like.new_empty(like.shape[0], weight.shape[2], *self.size)
        for rows in self._shares(y.shape[0], y.shape[1]):
            # conj(conj(grad) weight), so that no product meets a conjugate it would have to copy.
            product = torch.bmm(grad[:, rows].conj_physical(), weight).conj_physical_()
            self._read(product, [-f for f in self.future], y[rows])
        return y

    def weight_gradient(self, grad: Tensor, x: Tensor, like: Tensor) -> Tensor:
        y = like.new_empty(grad.shape[2], x.shape[2], *self.taps)
        for rows in self._shares(y.shape[0], y.shape[1]):
            product = torch.bmm(grad[:, :, rows].conj_physical().transpose(1, 2), x)
            self._read(product, [-p for p in self.past], y[rows])
        return y


class Depthwise:
    """A depthwise convolution anywhere: channels side by side, each transformed, multiplied and transformed back."""

    def __init__(self, size: Sequence[int], taps: Sequence[int], future: Sequence[int]) -> None:
        self.size, self.taps, self.future = list(size), list(taps), list(future)
        self.past = [t - 1 - f for t, f in zip(taps, future, strict=True)]
        self.points = _sizes(size, taps, future)

    def spectrum(self, weight: Tensor, flip: bool = False) -> Tensor:
        """Of kernels ``(C, 1, *taps)``: ``(C, *frequencies)``."""
        return _forward_transform(_flip(weight) if flip else weight, self.points).squeeze(1)

    def _shares(self, x: Tensor) -> Iterator[tuple[slice, slice]]:
        """Images and channels at a time whose transforms stay in a cache; on a GPU all of them."""
        images, channels = x.shape[:2]
        planes = _SHARE_BYTES_DEPTHWISE // (8 * math.prod(self.points)) if x.device.type == "cpu" else images * channels
        channels_at_once = min(channels, max(1, planes))
        images_at_once = max(1, planes // channels_at_once)
        for c in range(0, channels, channels_at_once):
            for n in range(0, images, images_at_once):
                yield slice(n, n + images_at_once), slice(c, c + channels_at_once)

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """``x`` with the kernels whose spectrum is given, in the layout of ``x``."""
        y = empty_like_map(x)
        for images, channels in self._shares(x):
            product = _forward_transform(x[images, channels], self.points).mul_(weight[channels])
            y[images, channels] = _inverse_transform(product, self.points, self.future, self.size)
        return y

    def weight_gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        """``grad`` and ``x`` (N, C, *size) -> (C, 1, *taps)."""
        to_weight = grad.new_empty(grad.shape[1], 1, *self.taps)
        total: Tensor | None = None
        for images, channels in self._shares(x):
            # Conjugated in memory: code compiled by AOTAutograd can call this with lazy conjugation switched off.
            spectrum = _forward_transform(grad[images, channels], self.points).conj_physical_()
            share = spectrum.mul_(_forward_transform(x[images, channels], self.points)).sum(0)
            total = share if total is None else total.add_(share)
            if images.stop >= x.shape[0]:
                to_weight[channels, 0] = self._taps(total)
                total = None
        return to_weight

    def _taps(self, spectrum: Tensor) -> Tensor:
        """Correlating x with grad puts lag 0 at index 0, the past at the end: rolling by it puts tap 0 first."""
        dims = list(range(1, spectrum.dim()))
        lags = torch.fft.irfftn(spectrum, s=self.points, dim=dims).roll(self.past, dims)
        for dim, length in zip(dims, self.taps, strict=True):
            lags = lags.narrow(dim, 0, length)
        return lags


Spectral = Folded | FrequencyMajor | Depthwise


def spectral(x: Tensor, weight: Tensor, future: Sequence[int]) -> Spectral:
    """How the convolution of ``x`` with ``weight`` goes through the FFT here."""
    if _is_depthwise(x.shape[1], weight.shape):
        return Depthwise(x.shape[2:], weight.shape[2:], future)
    return _dense(x)(x.shape[2:], weight.shape[2:], future)


def _dense(x: Tensor) -> type[Folded] | type[FrequencyMajor]:
    return Folded if Folded.can_run(x, depthwise=False) else FrequencyMajor


def _two(values: Sequence[int], outer: int) -> tuple[int, int]:
    return (outer, values[0]) if len(values) == 1 else (values[0], values[1])


def _convolve_now(x: Tensor, weight: Tensor, future: Sequence[int]) -> Tensor:
    way = spectral(x, weight, future)
    return way.convolve(x, way.spectrum(weight, flip=True))


def _convolve_input_now(grad: Tensor, weight: Tensor, future: Sequence[int], depthwise: bool) -> Tensor:
    """Adjoint of the convolution in x: ``grad`` (N, O, *size) -> (N, I, *size).

    ``depthwise`` is told, not seen: a dense kernel for one input channel has the shape of a depthwise one here.
    """
    size, taps = grad.shape[2:], weight.shape[2:]
    if depthwise:
        # A convolution with the taps reversed.
        reversed_way = Depthwise(size, taps, [t - 1 - f for t, f in zip(taps, future, strict=True)])
        return reversed_way.convolve(grad, reversed_way.spectrum(weight))
    way = _dense(grad)(size, taps, future)
    return way.input_gradient(way.spectrum(grad), way.spectrum(weight, flip=True), grad)


def _convolve_weight_now(
    grad: Tensor, x: Tensor, taps: Sequence[int], future: Sequence[int], depthwise: bool
) -> Tensor:
    """Adjoint of the convolution in the kernel: ``grad`` (N, O, *size), ``x`` (N, I, *size) -> (O, I or 1, *taps)."""
    size = x.shape[2:]
    if depthwise:
        return Depthwise(size, taps, future).weight_gradient(grad, x)
    way = _dense(x)(size, taps, future)
    return way.weight_gradient(way.spectrum(grad), way.spectrum(x), x)


def _convolve_both_now(
    grad: Tensor, x: Tensor, weight: Tensor, future: Sequence[int], depthwise: bool
) -> tuple[Tensor, Tensor]:
    """Both adjoints at once: those of a dense convolution share the spectrum of ``grad``."""
    if depthwise:
        return (
            _convolve_input_now(grad, weight, future, depthwise),
            _convolve_weight_now(grad, x, weight.shape[2:], future, depthwise),
        )
    way = _dense(x)(x.shape[2:], weight.shape[2:], future)
    spectrum = way.spectrum(grad)
    return (
        way.input_gradient(spectrum, way.spectrum(weight, flip=True), grad),
        way.weight_gradient(spectrum, way.spectrum(x), x),
    )


def _fake_convolve(x: Tensor, weight: Tensor, future: Sequence[int]) -> Tensor:
    if _is_depthwise(x.shape[1], weight.shape):
        return empty_like_map(x)
    return x.new_empty([x.shape[0], weight.shape[0], *x.shape[2:]])


def _fake_convolve_input(grad: Tensor, weight: Tensor, future: Sequence[int], depthwise: bool) -> Tensor:
    if depthwise:
        return empty_like_map(grad)
    return grad.new_empty([grad.shape[0], weight.shape[0 if depthwise else 1], *grad.shape[2:]])


def _fake_convolve_weight(
    grad: Tensor, x: Tensor, taps: Sequence[int], future: Sequence[int], depthwise: bool
) -> Tensor:
    return grad.new_empty([grad.shape[1], 1 if depthwise else x.shape[1], *taps])


def _fake_convolve_both(
    grad: Tensor, x: Tensor, weight: Tensor, future: Sequence[int], depthwise: bool
) -> tuple[Tensor, Tensor]:
    to_weight = _fake_convolve_weight(grad, x, weight.shape[2:], future, depthwise)
    return _fake_convolve_input(grad, weight, future, depthwise), to_weight


def _save_convolve(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.future = inputs
    ctx.save_for_backward(x, weight)


def _convolve_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    depthwise = _is_depthwise(x.shape[1], weight.shape)
    if ctx.needs_input_grad[0] and ctx.needs_input_grad[1]:
        return (*_convolve_both(grad, x, weight, ctx.future, depthwise), None)
    return (
        _convolve_input(grad, weight, ctx.future, depthwise) if ctx.needs_input_grad[0] else None,
        convolve_weight(grad, x, list(weight.shape[2:]), ctx.future, depthwise) if ctx.needs_input_grad[1] else None,
        None,
    )


def _save_convolve_both(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad, x, weight, ctx.future, ctx.depthwise = inputs
    ctx.save_for_backward(grad, x, weight)


def _convolve_both_backward(ctx: Any, to_x: Tensor, to_weight: Tensor) -> tuple[Tensor | None, ...]:
    grad, x, weight = ctx.saved_tensors
    return (
        _convolve(to_x, weight, ctx.future) + _convolve(x, to_weight, ctx.future),
        _convolve_input(grad, to_weight, ctx.future, ctx.depthwise),
        convolve_weight(grad, to_x, list(weight.shape[2:]), ctx.future, ctx.depthwise),
        None,
        None,
    )


def _save_convolve_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, weight, ctx.future, ctx.depthwise = inputs
    ctx.save_for_backward(grad, weight)


def _convolve_input_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    grad, weight = ctx.saved_tensors
    return (
        _convolve(cotangent, weight, ctx.future) if ctx.needs_input_grad[0] else None,
        convolve_weight(grad, cotangent, list(weight.shape[2:]), ctx.future, ctx.depthwise)
        if ctx.needs_input_grad[1]
        else None,
        None,
        None,
    )


def _save_convolve_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, x, _, ctx.future, ctx.depthwise = inputs
    ctx.save_for_backward(grad, x)


def _convolve_weight_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    grad, x = ctx.saved_tensors
    return (
        _convolve(x, cotangent, ctx.future) if ctx.needs_input_grad[0] else None,
        _convolve_input(grad, cotangent, ctx.future, ctx.depthwise) if ctx.needs_input_grad[1] else None,
        None,
        None,
        None,
    )


_convolve_both = operator(
    "fft_convolve_both", _convolve_both_now, _fake_convolve_both, _save_convolve_both, _convolve_both_backward
)
_convolve = operator("fft_convolve", _convolve_now, _fake_convolve, _save_convolve, _convolve_backward)
_convolve_input = operator(
    "fft_convolve_input", _convolve_input_now, _fake_convolve_input, _save_convolve_input, _convolve_input_backward
)
convolve_weight = operator(
    "fft_convolve_weight", _convolve_weight_now, _fake_convolve_weight, _save_convolve_weight, _convolve_weight_backward
)


class _ConvolveKeepingSpectra(torch.autograd.Function):
    """A dense convolution in training: what was transformed forward is not transformed again backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, future: list[int]) -> Tensor:
        way = _dense(x)(x.shape[2:], weight.shape[2:], future)
        spectrum_x, spectrum_weight = way.spectrum(x), way.spectrum(weight, flip=True)
        ctx.future, ctx.way = future, way
        ctx.save_for_backward(x, weight, spectrum_x, spectrum_weight)
        return way.output(spectrum_x, spectrum_weight, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, spectrum_x, spectrum_weight = ctx.saved_tensors
        to_x, to_weight = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            return (
                _convolve_input(grad, weight, ctx.future, False) if to_x else None,
                convolve_weight(grad, x, list(weight.shape[2:]), ctx.future, False) if to_weight else None,
                None,
            )
        spectrum = ctx.way.spectrum(grad)
        return (
            ctx.way.input_gradient(spectrum, spectrum_weight, grad) if to_x else None,
            ctx.way.weight_gradient(spectrum, spectrum_x, grad) if to_weight else None,
            None,
        )


def keeps_spectra(x: Tensor, weight: Tensor, way: Folded | FrequencyMajor) -> bool:
    """Whether the spectra of a training step are few enough bytes to be kept for its backward pass."""
    rows = x.shape[0] * x.shape[1] + weight.shape[0] * weight.shape[1]
    return 8 * math.prod(way.points) * rows <= (_KEPT_BYTES_CUDA if x.is_cuda else _KEPT_BYTES)
