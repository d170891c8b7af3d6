"""Depthwise convolution under the name that RepLKNet, SLaK, UniRepLKNet and OverLoCK import.

Their code does ``from depthwise_conv2d_implicit_gemm import DepthWiseConv2dImplicitGEMM``, a module that an extension
inside a fork of CUTLASS brings along (https://github.com/MegEngine/cutlass). With this one in its place it runs
unchanged; where there is no binary or no GPU, on the fast paths of plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence

from smpconv_cutlass.ops import depthwise_conv2d
from torch import Tensor, nn

__all__ = ["DepthWiseConv2dImplicitGEMM"]


class DepthWiseConv2dImplicitGEMM(nn.Conv2d):
    """A depthwise ``nn.Conv2d`` of stride 1 whose output is as large as its input; equal state dict.

    Args:
        channels: Of input and output.
        kernel: Height and width, odd; one number for both.
        bias: Whether a bias is added.

    Shape: ``(N, channels, H, W)`` -> the same, in the type of the input, under autocast in that of autocast.

    Raises:
        ValueError: An even kernel, for which no output is as large as the input.
    """

    def __init__(self, channels: int, kernel: int | Sequence[int], bias: bool = False) -> None:
        size = (kernel, kernel) if isinstance(kernel, int) else tuple(kernel)
        if len(size) != 2 or any(length < 1 or length % 2 == 0 for length in size):
            raise ValueError(f"kernel must be odd, one number or height and width, got {kernel}")
        padding = (size[0] // 2, size[1] // 2)
        super().__init__(channels, channels, size, padding=padding, groups=channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = depthwise_conv2d(x, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype).view(1, -1, 1, 1)
