"""A long signal in pieces: the answers of a causal network on all that has been fed so far, in bounded memory.

Every convolution of :class:`~smpconv_zoo.models.SMPConvTCN` sees the past alone, and of it no more than its kernel
reaches. To go on after a piece, a network therefore needs the last few inputs of each of its convolutions and nothing
else. Before the signal there are zeros at the input of *every* convolution, as there are when a whole sequence is
padded.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from smpconv_zoo.baselines import SineConv1d
from smpconv_zoo.kernels import render_kernel
from smpconv_zoo.layers import ActivatedPair, CausalConv1d, MergedConv1d, MergedPair, SMPConv1d
from smpconv_zoo.models import SMPConvTCN
from smpconv_zoo.ops import causal_conv1d

__all__ = ["CausalStream"]

# On CPU, pieces of so many samples (those of a batch together) are convolved directly, larger ones as `causal_conv1d`
# chooses: timed with 30 channels, the FFT catches up between 500 and 1,000 samples, whether the kernel has 182 taps or
# 3,000, since it transforms the kernel at every piece.
_DIRECT_SAMPLES = 512
# Taps that are summed at once: PyTorch adds up a long direct convolution term by term, and loses a digit.
_DIRECT_TAPS = 256


class CausalStream:
    """A :class:`~smpconv_zoo.models.SMPConvTCN` that is fed a signal piece by piece.

    However the signal is cut, the answer after a piece is that of the network on all samples since the start, up to
    rounding::

        stream = CausalStream(model.eval())
        for piece in pieces:  # (N, in_chans, l), any l >= 1
            logits = stream(piece)  # = model(torch.cat(pieces so far, dim=2))

    For inference: nothing is recorded for gradients, dropout and stochastic depth are off, and norms use their running
    statistics, as all of the network's modules must in eval mode. Autocast has no effect. Weights and statistics are
    read when the stream is made: the stream does not notice what becomes of the network, and the network does not
    notice the stream. A merged network can be streamed as well. One signal (or batch of signals, in step) to a stream;
    a network may have many.

    Memory: with the stream, the kernel of every large + small pair, rendered once as far as points reach,
    ``taps = max(large.reach(), small_kernel_size)`` of ``(out, in)`` each, whatever the kernel size. For the signal,
    ``state_bytes``, whatever its length: the last ``taps - 1`` inputs of every pair, ``(N, in, taps - 1)``, in the
    dtype of the weights; for the pooling "avg" a sum in double precision and for "max" a maximum, ``(N,
    num_features)``. What a piece takes in time and passing memory depends on its own size and on ``taps``, not on
    what went before.

    Args:
        model: The network, in eval mode.

    Raises:
        TypeError: Another network, or one whose parts were exchanged for others.
        ValueError: A network in training mode, or norms without running statistics.
    """

    @torch.no_grad()
    def __init__(self, model: SMPConvTCN) -> None:
        if not isinstance(model, SMPConvTCN):
            raise TypeError(f"a stream needs an SMPConvTCN, got {type(model).__name__}")
        for name, module in model.named_modules():
            # What a container says of itself does not matter: pruning a network makes one, in training mode.
            if module.training and (module is model or not any(True for _ in module.children())):
                what = name or "the network"
                raise ValueError(f"{what} is in training mode; call model.eval() before making a stream of it")
        self._in_chans = model.in_chans
        self._pool = str(model.head.pool_type)
        self._pairs: list[_Pair] = []
        self._shortcuts: list[nn.Module] = []
        for i, block in enumerate(model.blocks):
            self._pairs += [
                _read_pair(pair, f"blocks.{i}.conv{j}") for j, pair in enumerate((block.conv1, block.conv2), 1)
            ]
            self._shortcuts.append(_own(block.shortcut))
        self._classifier = _own(model.head.fc)
        self.reset()

    def reset(self) -> None:
        """Forget the signal: the next piece is the start of another, of any batch size."""
        self._length = 0
        self._histories: list[Tensor] = []
        self._pooled: Tensor | None = None

    @property
    def length(self) -> int:
        """Samples since the start."""
        return self._length

    @property
    def state_bytes(self) -> int:
        """Bytes kept between pieces; 0 before the first. They depend on the batch size, never on the length."""
        kept = [*self._histories] if self._pooled is None else [*self._histories, self._pooled]
        return sum(tensor.untyped_storage().nbytes() for tensor in kept)

    def __call__(self, piece: Tensor) -> Tensor:
        """Go on by a piece; what the network says of all samples since the start.

        Args:
            piece: ``(N, in_chans, l)`` with ``l >= 1``, of the dtype and on the device of the weights.

        Returns:
            ``(N, num_classes)`` as of the last sample of the piece, pooled over the whole signal as the network pools;
            ``(N, num_features)`` of a network without classifier, and ``(N, num_features, l)`` without pooling.

        Raises:
            ValueError: A piece that does not fit the network or the pieces before it. The stream is as it was.
        """
        features = self.features(piece)
        with torch.no_grad(), torch.autocast(piece.device.type, enabled=False):
            return self._classifier(self._pool_of(features))

    @torch.no_grad()
    def features(self, piece: Tensor) -> Tensor:
        """Go on by a piece; the features of its samples, before pooling.

        Args:
            piece: As for a call. Either method goes on; a piece is fed to one of them, once.

        Returns:
            ``(N, num_features, l)``: the last ``l`` steps of ``model.forward_features`` on all samples since the start.

        Raises:
            ValueError: As for a call.
        """
        self._check(piece)
        with torch.autocast(piece.device.type, enabled=False):
            histories = self._histories or [pair.silence(piece.size(0)) for pair in self._pairs]
            continued: list[Tensor] = []
            x = piece
            for i, shortcut in enumerate(self._shortcuts):
                y = x
                for pair, history in zip(self._pairs[2 * i : 2 * i + 2], histories[2 * i : 2 * i + 2], strict=True):
                    window = torch.cat((history, y), dim=2)
                    y = pair(window, y.size(2))
                    # A copy, lest the whole window stay in memory.
                    continued.append(window[:, :, y.size(2) :].clone(memory_format=torch.contiguous_format))
                x = torch.relu(y + shortcut(x))
            pooled = self._pool_also(x)
        # Only now, so that a piece that fails leaves the stream as it was.
        self._histories, self._pooled = continued, pooled
        self._length += piece.size(2)
        return x

    def _check(self, piece: Tensor) -> None:
        if piece.dim() != 3 or piece.size(1) != self._in_chans:
            raise ValueError(
                f"expected a piece (N, C, l) with C = {self._in_chans} channels, got shape {tuple(piece.shape)}"
            )
        if piece.size(2) == 0:
            raise ValueError(f"a piece needs at least one sample, got shape {tuple(piece.shape)}")
        kernel = self._pairs[0].kernel
        if piece.dtype != kernel.dtype or piece.device != kernel.device:
            raise ValueError(
                f"the piece is {piece.dtype} on {piece.device}, the weights of the stream are {kernel.dtype} on "
                f"{kernel.device}"
            )
        if self._histories and piece.size(0) != self._histories[0].size(0):
            raise ValueError(
                f"the stream began with a batch of {self._histories[0].size(0)} signals, this piece has "
                f"{piece.size(0)}; call reset() before another batch"
            )

    def _pool_also(self, features: Tensor) -> Tensor | None:
        """The sum or the maximum of all features so far, these included."""
        if self._pool == "avg":
            # In double precision: over a long signal, a sum of single precision would no longer feel a sample.
            total = features.sum(dim=2, dtype=torch.float64)
            return total if self._pooled is None else self._pooled + total
        if self._pool == "max":
            highest = features.amax(dim=2)
            return highest if self._pooled is None else torch.maximum(self._pooled, highest)
        return None

    def _pool_of(self, features: Tensor) -> Tensor:
        if self._pool == "last":
            return features[:, :, -1]
        if self._pooled is None:
            return features
        return (self._pooled / self._length).to(features.dtype) if self._pool == "avg" else self._pooled.clone()


@dataclasses.dataclass(frozen=True)
class _Pair:
    """A large + small pair with its norms, as one convolution: ``kernel`` ``(out, in, taps)``, ``bias`` ``(out,)``."""

    kernel: Tensor
    bias: Tensor

    def silence(self, batch: int) -> Tensor:
        """What the pair has seen before a signal begins: zeros, ``(N, in, taps - 1)``."""
        return self.kernel.new_zeros(batch, self.kernel.size(1), self.kernel.size(2) - 1)

    def __call__(self, window: Tensor, samples: int) -> Tensor:
        """The last ``samples`` outputs of a window ``(N, in, taps - 1 + samples)``."""
        if (
            samples <= _DIRECT_SAMPLES
            and window.device.type == "cpu"
            and window.dtype in (torch.float32, torch.float64)
        ):
            y = _convolve_directly(window, self.kernel, samples)
        else:
            y = causal_conv1d(window, self.kernel)[:, :, -samples:]
        return torch.relu(y + self.bias.view(-1, 1))


def _convolve_directly(window: Tensor, kernel: Tensor, samples: int) -> Tensor:
    y = window.new_zeros(())
    for first in range(0, kernel.size(2), _DIRECT_TAPS):
        taps = kernel[:, :, first : first + _DIRECT_TAPS]
        y = y + F.conv1d(window[:, :, first : first + taps.size(2) + samples - 1], taps)
    return y


def _read_pair(pair: object, name: str) -> _Pair:
    if (
        isinstance(pair, MergedPair)
        and isinstance(pair.conv, MergedConv1d)
        and pair.relu
        and pair.conv.bias is not None
    ):
        return _Pair(pair.conv.weight.detach().clone(), pair.conv.bias.detach().clone())
    if not isinstance(pair, ActivatedPair) or not pair.relu:
        raise TypeError(f"a stream needs an ActivatedPair with a ReLU in place {name}, got {type(pair).__name__}")
    large, small = pair.large.conv, pair.small.conv
    if not isinstance(large, SMPConv1d | SineConv1d | CausalConv1d) or not isinstance(small, CausalConv1d):
        raise TypeError(
            f"a stream needs SMPConv1d and CausalConv1d in {name}, got {type(large).__name__} and "
            f"{type(small).__name__}"
        )
    parts = (
        _through_norm(_newest_taps(large), large.bias, pair.large.norm, f"{name}.large.norm"),
        _through_norm(small.weight, small.bias, pair.small.norm, f"{name}.small.norm"),
    )
    taps = max(kernel.size(2) for kernel, _ in parts)
    kernel = sum(F.pad(kernel, (taps - kernel.size(2), 0)) for kernel, _ in parts)
    bias = sum(bias for _, bias in parts)
    assert isinstance(kernel, Tensor) and isinstance(bias, Tensor)
    dtype = small.weight.dtype
    return _Pair(kernel.to(dtype).contiguous(), bias.to(dtype))


def _newest_taps(layer: SMPConv1d | SineConv1d | CausalConv1d) -> Tensor:
    """The kernel, of points without the old taps that none touches."""
    if isinstance(layer, CausalConv1d):
        return layer.weight
    if isinstance(layer, SineConv1d):
        return layer.kernel()
    grid = layer.grid[:, layer.kernel_size[0] - layer.reach() :]
    return render_kernel(layer.coords, layer.radius, layer.weight, grid, layer.normalization)


def _through_norm(kernel: Tensor, bias: Tensor | None, norm: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """Kernel and bias of a convolution with the norm behind it, at least in float32."""
    if not isinstance(norm, _BatchNorm):
        raise TypeError(f"a stream needs a batch norm in place {name}, got {type(norm).__name__}")
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError(f"{name} has no running statistics, so that the future would change the past")
    wide = torch.promote_types(kernel.dtype, torch.float32)
    scale = (norm.running_var.to(wide) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.to(wide)
    mean = norm.running_mean.to(wide)
    shift = -mean * scale if bias is None else (bias.to(wide) - mean) * scale
    if norm.bias is not None:
        shift = shift + norm.bias.to(wide)
    return kernel.to(wide) * scale.view(-1, 1, 1), shift


def _own(module: Any) -> nn.Module:
    """A copy that training the network does not change."""
    own: nn.Module = copy.deepcopy(module)
    return own.requires_grad_(False)
