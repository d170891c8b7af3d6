"""The slow twins: convolutions as PyTorch states them. They define every answer and every tolerance.

Any dtype, any device, scriptable. Each is a cross-correlation of stride 1 whose output has the size of its input.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["causal_conv1d_reference", "conv2d_reference", "depthwise_conv2d_reference"]


def depthwise_conv2d_reference(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` (N, C, H, W), ``weight`` (C, 1, Kh, Kw) with odd sizes -> (N, C, H, W).

    Equivalent to ``F.conv2d(x, weight, padding=(Kh // 2, Kw // 2), groups=C)``.
    """
    return F.conv2d(x, weight, padding=(weight.size(2) // 2, weight.size(3) // 2), groups=weight.size(0))


def conv2d_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x`` (N, I, H, W), ``weight`` (O, I, Kh, Kw) with odd sizes, ``bias`` (O,) -> (N, O, H, W).

    Equivalent to ``F.conv2d(x, weight, bias, padding=(Kh // 2, Kw // 2))``.
    """
    return F.conv2d(x, weight, bias, padding=(weight.size(2) // 2, weight.size(3) // 2))


def causal_conv1d_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x`` (N, I, L), ``weight`` (O, I, K), ``bias`` (O,) -> (N, O, L); the last tap meets the current sample.

    Equivalent to ``F.conv1d(F.pad(x, (K - 1, 0)), weight, bias)``.
    """
    return F.conv1d(F.pad(x, (weight.size(2) - 1, 0)), weight, bias)
