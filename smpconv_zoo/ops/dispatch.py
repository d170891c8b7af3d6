"""Which backend computes a convolution, and why.

Every backend has a predicate that returns ``None`` or the reason it cannot run. ``backend="auto"`` takes the first one
that can run and is expected to be faster; naming a backend that cannot run raises its reason. The choice changes speed,
never a result beyond rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from smpconv_zoo.operators import transformed
from smpconv_zoo.ops.cuda import can_run_cuda, cuda_convolve
from smpconv_zoo.ops.fft import can_fold, fft_convolve, good_fft_size, is_channels_last
from smpconv_zoo.ops.kept import KernelCache
from smpconv_zoo.ops.onednn import can_run_onednn, onednn_depthwise
from smpconv_zoo.ops.reference import causal_conv1d_reference, conv2d_reference, depthwise_conv2d_reference
from smpconv_zoo.ops.short import can_run_short, short_convolve

__all__ = [
    "BACKENDS",
    "add_bias",
    "can_run_fft",
    "causal_conv1d",
    "causal_conv1d_with",
    "conv2d",
    "conv2d_with",
    "depthwise_conv2d",
    "depthwise_conv2d_with",
    "reachable_same",
    "why_not",
]

BACKENDS = ("cuda", "fft", "short", "onednn", "reference")

# Thresholds of `auto`, read off eval/results/convolution_*.txt (eval/bench_convolution.py). On CPU, oneDNN has fast
# depthwise kernels up to 14 taps wide and falls 20-fold beyond; their gradients are slow from about 13. Where it has
# its channels-last kernels (:mod:`.onednn`), the logarithm of a transform times its points costs as much as so many
# multiply-accumulates, of those rows of taps that meet the map; channels-last maps they take from 8 taps on. On CUDA
# and for dense kernels the cost is smooth: one transformed point, times the logarithm of the transform, costs as much
# as so many multiply-accumulates of the direct convolution. Those of cuDNN's dense ones are cheap: tensor cores.
_CPU_DEPTHWISE_TAPS = 15
_CPU_DEPTHWISE_TAPS_TRAINING = 13
_CPU_DEPTHWISE_TAPS_CHANNELS_LAST = 8
# From 5 x 5 taps on the gradient to the kernel is worth our own way to it, if nothing else is.
_CPU_OWN_GRADIENT_TAPS = 25
_POINT_COST_ONEDNN = 28
_POINT_COST_DEPTHWISE = {"cuda": 8}
# Taps from which the compiled CUDA kernels are taken: those of the networks have 13 and more, and PyTorch's own kernels
# for 3 and 5 were not timed against them.
_CUDA_DEPTHWISE_TAPS = 7
_POINT_COST_DENSE = {"cpu": 25, "cuda": 100}
# Taps of a dense kernel from which an NVIDIA GPU folds (:mod:`smpconv_zoo.gpu.fourier`). The networks' kernels, of 161
# taps and more, are far above, those of `short` below; where between them cuDNN is overtaken was not timed.
_FOLDED_TAPS = 16
# From so many taps on `auto` stays away from the direct gradient of a dense 2-D kernel on CPU, whatever the cost: with
# oneDNN for AVX-512 (PyTorch 2.14.1) the float32 gradient of 31 x 3 taps on a 16 x 16 map, 19 x 5 on 10 x 10, and
# others whose height is 2 H - 1 and width much less, writes outside its memory. `reachable_same` cuts taller kernels
# to just that height.
_CPU_DENSE_TAPS_TRAINING = 19


def depthwise_conv2d(x: Tensor, weight: Tensor, backend: str = "auto") -> Tensor:
    """Depthwise cross-correlation, stride 1, output as large as the input.

    Equivalent to ``F.conv2d(x, weight, padding=(Kh // 2, Kw // 2), groups=C)``.

    Args:
        x: Input, ``(N, C, H, W)``.
        weight: Kernels of odd size, ``(C, 1, Kh, Kw)``; may be larger than the map.
        backend: ``"auto"``, or one of :data:`BACKENDS`.

    Returns:
        ``(N, C, H, W)``.

    Raises:
        ValueError: Wrong rank or channel count, an even kernel, or a named backend that cannot run.
    """
    if torch.jit.is_scripting():
        # A scripted network has to run where this package is not installed.
        return depthwise_conv2d_reference(x, weight)
    else:
        return depthwise_conv2d_with(None, x, weight, backend)


def depthwise_conv2d_with(cache: KernelCache | None, x: Tensor, weight: Tensor, backend: str = "auto") -> Tensor:
    """:func:`depthwise_conv2d` that keeps what it computes from ``weight`` alone, for the next call with it."""
    _check_conv2d(x, weight)
    if weight.size(1) != 1 or weight.size(0) != x.size(1):
        raise ValueError(
            f"a depthwise kernel for {x.size(1)} channels has shape ({x.size(1)}, 1, Kh, Kw), got {tuple(weight.shape)}"
        )
    x, weight, _ = _autocast(x, weight, None)
    weight = reachable_same(weight, x.shape[2:])
    chosen = _choose(x, weight, backend, depthwise=True)
    if chosen == "cuda":
        return cuda_convolve(x, weight)
    if chosen == "onednn":
        return onednn_depthwise(x, weight)
    if chosen == "fft":
        return fft_convolve(x, weight, _centre(weight), cache)
    return depthwise_conv2d_reference(x, weight)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Dense cross-correlation, stride 1, output as large as the input.

    Equivalent to ``F.conv2d(x, weight, bias, padding=(Kh // 2, Kw // 2))``.

    Args:
        x: Input, ``(N, I, H, W)``.
        weight: Kernels of odd size, ``(O, I, Kh, Kw)``; may be larger than the map.
        bias: ``(O,)`` or None.
        backend: ``"auto"``, or one of :data:`BACKENDS`.

    Returns:
        ``(N, O, H, W)``.

    Raises:
        ValueError: Wrong rank or channel count, an even kernel, or a named backend that cannot run.
    """
    if torch.jit.is_scripting():
        return conv2d_reference(x, weight, bias)
    else:
        return conv2d_with(None, x, weight, bias, backend)


def conv2d_with(
    cache: KernelCache | None, x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """:func:`conv2d` that keeps what it computes from ``weight`` alone, for the next call with it."""
    _check_conv2d(x, weight)
    if weight.size(1) != x.size(1):
        raise ValueError(f"weight is for {weight.size(1)} input channels, x has {x.size(1)}")
    x, weight, bias = _autocast(x, weight, bias)
    weight = reachable_same(weight, x.shape[2:])
    chosen = _choose(x, weight, backend, depthwise=False)
    if chosen == "short":
        return add_bias(short_convolve(x, weight), bias)
    if chosen == "fft":
        return add_bias(fft_convolve(x, weight, _centre(weight), cache), bias)
    return conv2d_reference(x, weight, bias)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Dense causal cross-correlation: the last tap meets the current sample, the first the oldest.

    Equivalent to ``F.conv1d(F.pad(x, (K - 1, 0)), weight, bias)``. Kernels longer than the sequence are allowed; their
    oldest taps find no sample.

    Args:
        x: Input, ``(N, I, L)``.
        weight: Kernels of any length, ``(O, I, K)``.
        bias: ``(O,)`` or None.
        backend: ``"auto"``, or one of :data:`BACKENDS`.

    Returns:
        ``(N, O, L)``.

    Raises:
        ValueError: Wrong rank or channel count, or a named backend that cannot run.
    """
    if torch.jit.is_scripting():
        return causal_conv1d_reference(x, weight, bias)
    else:
        return causal_conv1d_with(None, x, weight, bias, backend)


def causal_conv1d_with(
    cache: KernelCache | None, x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """:func:`causal_conv1d` that keeps what it computes from ``weight`` alone, for the next call with it."""
    if x.dim() != 3 or weight.dim() != 3:
        raise ValueError(f"expected x (N, I, L) and weight (O, I, K), got {tuple(x.shape)} and {tuple(weight.shape)}")
    if weight.size(1) != x.size(1):
        raise ValueError(f"weight is for {weight.size(1)} input channels, x has {x.size(1)}")
    x, weight, bias = _autocast(x, weight, bias)
    if weight.size(2) > x.size(2):
        weight = weight[:, :, weight.size(2) - x.size(2) :]
    chosen = _choose(x, weight, backend, depthwise=False)
    if chosen == "short":
        return add_bias(short_convolve(x, weight), bias)
    if chosen == "fft":
        return add_bias(fft_convolve(x, weight, [0], cache), bias)
    return causal_conv1d_reference(x, weight, bias)


def why_not(x: Tensor, weight: Tensor) -> dict[str, str | None]:
    """For every backend, the reason it cannot convolve ``x`` with ``weight``, or None where it can.

    Args:
        x: ``(N, C, H, W)`` or ``(N, I, L)``.
        weight: ``(C, 1, Kh, Kw)``, ``(O, I, Kh, Kw)`` or ``(O, I, K)``.
    """
    return {name: can_run(x, weight) for name, can_run in _can_run().items()}


def _can_run() -> dict[str, Callable[[Tensor, Tensor], str | None]]:
    return {
        "cuda": can_run_cuda,
        "fft": can_run_fft,
        "short": can_run_short,
        "onednn": can_run_onednn,
        "reference": lambda x, weight: None,
    }


def can_run_fft(x: Tensor, weight: Tensor) -> str | None:
    """None if the FFT backend can convolve these tensors, else the reason why not."""
    if x.device.type not in ("cpu", "cuda", "meta"):
        return f"the FFT backend runs on cpu and cuda, x is on {x.device.type}"
    if not x.is_floating_point() or x.dtype != weight.dtype:
        return f"the FFT backend needs one floating-point dtype, got x {x.dtype} and weight {weight.dtype}"
    if x.numel() == 0:
        return f"the FFT backend needs at least one element, x has shape {tuple(x.shape)}"
    return None


def _choose(x: Tensor, weight: Tensor, backend: str, depthwise: bool) -> str:
    if backend == "auto":
        if not depthwise and can_run_short(x, weight) is None:
            return "short"
        if depthwise and max(weight.shape[2:]) >= _CUDA_DEPTHWISE_TAPS and can_run_cuda(x, weight) is None:
            return "cuda"
        if depthwise and can_run_onednn(x, weight) is None:
            return _choose_on_avx512(x, weight)
        return "fft" if can_run_fft(x, weight) is None and _fft_pays(x, weight, depthwise) else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose 'auto' or one of {BACKENDS}")
    if depthwise and backend == "short":
        raise ValueError("backend 'short' cannot run: the kernel for few taps is for dense convolutions")
    if not depthwise and backend == "onednn":
        raise ValueError("backend 'onednn' cannot run: the channels-last kernel is for depthwise convolutions")
    if not depthwise and backend == "cuda":
        raise ValueError("backend 'cuda' cannot run: its kernels are for depthwise convolutions")
    reason = _can_run()[backend](x, weight)
    if reason is not None:
        raise ValueError(f"backend {backend!r} cannot run: {reason}")
    return backend


def _choose_on_avx512(x: Tensor, weight: Tensor) -> str:
    height, width = weight.shape[2:]
    if max(height, width) < _CPU_DEPTHWISE_TAPS_TRAINING and not (
        is_channels_last(x) and width >= _CPU_DEPTHWISE_TAPS_CHANNELS_LAST
    ):
        own = height * width >= _CPU_OWN_GRADIENT_TAPS and x.dtype == torch.float32 and _trains(x, weight)
        # Transforms of torch.func see through PyTorch's own convolution only.
        return "onednn" if own and not transformed() else "reference"
    if max(height, width) < _CPU_DEPTHWISE_TAPS and not is_channels_last(x) and not _trains(x, weight):
        return "reference"
    size = x.shape[2:]
    points = math.prod([good_fft_size(s + t // 2) for s, t in zip(size, (height, width), strict=True)])
    reach = height // 2
    rows_met = sum(min(reach, row) + 1 + min(reach, size[0] - 1 - row) for row in range(size[0]))
    butterflies, direct = points * math.log2(points), rows_met * size[1] * width
    return "fft" if butterflies * _POINT_COST_ONEDNN < direct else "onednn"


def _trains(x: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


def _fft_pays(x: Tensor, weight: Tensor, depthwise: bool) -> bool:
    """Whether the FFT is expected to be faster than the direct convolution, whatever the batch size, or is safer."""
    device_type = x.device.type
    taps = weight.shape[2:]
    training = _trains(x, weight)
    if device_type == "cpu" and not depthwise and len(taps) == 2 and training and max(taps) >= _CPU_DENSE_TAPS_TRAINING:
        return True
    if device_type == "cpu" and depthwise:
        return max(taps) >= (_CPU_DEPTHWISE_TAPS_TRAINING if training else _CPU_DEPTHWISE_TAPS)
    if not depthwise and can_fold(x, weight):
        return math.prod(taps) >= _FOLDED_TAPS
    cost = (_POINT_COST_DEPTHWISE if depthwise else _POINT_COST_DENSE).get(device_type)
    if cost is None:
        return False
    size = x.shape[2:]
    reach = [t // 2 if len(taps) == 2 else t - 1 for t in taps]
    points = math.prod([good_fft_size(s + r) for s, r in zip(size, reach, strict=True)])
    if depthwise:
        butterflies, direct = points * math.log2(points), math.prod(size) * math.prod(taps)
    else:
        out_channels, in_channels = weight.shape[:2]
        butterflies = points * (math.log2(points) * (in_channels + out_channels) + in_channels * out_channels)
        direct = in_channels * out_channels * math.prod(size) * math.prod(taps)
    return butterflies * cost < direct


def _check_conv2d(x: Tensor, weight: Tensor) -> None:
    if x.dim() != 4 or weight.dim() != 4:
        raise ValueError(
            f"expected x (N, C, H, W) and a weight of rank 4, got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if weight.size(2) % 2 == 0 or weight.size(3) % 2 == 0:
        raise ValueError(f"kernel sizes must be odd to be centred, got {tuple(weight.shape[2:])}")


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as PyTorch's own convolutions do under autocast."""
    device_type = x.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device_type)
    return _autocast_one(x, dtype), _autocast_one(weight, dtype), None if bias is None else _autocast_one(bias, dtype)


def _autocast_one(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Autocast leaves double precision and integers alone.
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def reachable_same(weight: Tensor, size: Sequence[int]) -> Tensor:
    """Cut off the taps of a centred kernel that lie further out than the map is large: they only ever see padding."""
    for dim in (2, 3):
        excess = weight.size(dim) // 2 - (size[dim - 2] - 1)
        if excess > 0:
            weight = weight.narrow(dim, excess, weight.size(dim) - 2 * excess)
    return weight


def _centre(weight: Tensor) -> list[int]:
    return [weight.size(2) // 2, weight.size(3) // 2]


def add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """``y`` (N, O, *size) plus ``bias`` (O,), if there is one."""
    return y if bias is None else y + bias.view(-1, *[1] * (y.dim() - 2))
