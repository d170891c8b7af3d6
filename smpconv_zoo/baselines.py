"""What SMPConv kernels are compared with: a causal kernel that an MLP gives as a function of the position.

Romero et al., "CKConv: Continuous Kernel Convolution For Sequential Data", arXiv 2102.02611: an MLP of two hidden
layers of 32 sines takes the relative position of a tap and gives the values of all channels there. Initialisation is
that of Sitzmann et al., "Implicit Neural Representations with Periodic Activation Functions", arXiv 2006.09661. Unlike
the authors' it has no norms in the MLP, since a batch norm follows the convolution.

The other baseline, a value for every tap, is :class:`smpconv_zoo.layers.CausalConv1d` with a long kernel.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from smpconv_zoo.merged import MergedConv1d
from smpconv_zoo.ops import causal_conv1d
from smpconv_zoo.points import tap_grid

__all__ = ["SineConv1d"]


@register_notrace_module
class SineConv1d(nn.Module):
    """Causal convolution whose kernel an MLP of sines gives.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Taps; position +1 is the current sample, -1 the oldest.
        bias: Whether to add a learned bias.
        hidden: Width of both hidden layers.
        omega: Factor inside the sines: how fast a kernel varies at first.

    Shape: ``(N, in_channels, L)`` -> ``(N, out_channels, L)``.

    Raises:
        ValueError: A size or factor that is not positive.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        bias: bool = True,
        hidden: int = 32,
        omega: float = 30.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(in_channels, out_channels, kernel_size, hidden) < 1 or not omega > 0:
            raise ValueError(
                f"sizes must be at least 1 and omega positive, got {in_channels}, {out_channels}, {kernel_size}, "
                f"{hidden}, {omega}"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = (kernel_size,)
        self.omega = omega
        self.first = nn.Linear(1, hidden, device=device, dtype=dtype)
        self.second = nn.Linear(hidden, hidden, device=device, dtype=dtype)
        self.last = nn.Linear(hidden, out_channels * in_channels, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.zeros(out_channels, device=device, dtype=dtype)) if bias else None
        self.positions: Tensor
        self.register_buffer("positions", tap_grid((kernel_size,), device=device, dtype=dtype).reshape(-1, 1))
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draw the MLP anew: the sines see values of deviation about 1 at every layer."""
        with torch.no_grad():
            self.first.weight.uniform_(-1, 1)
            self.first.bias.uniform_(-1, 1)
            for layer in (self.second, self.last):
                bound = math.sqrt(6 / layer.in_features) / self.omega
                layer.weight.uniform_(-bound, bound)
                layer.bias.zero_()

    def kernel(self) -> Tensor:
        """The kernel, ``(out, in, kernel_size)``."""
        return self._newest(self.kernel_size[0])

    @torch.jit.ignore
    def kernel_for(self, x: Tensor) -> Tensor:
        """The newest taps of the kernel: as many as ``x`` (N, in, L) can feel."""
        return self._newest(min(x.size(-1), self.kernel_size[0]))

    def _newest(self, taps: int) -> Tensor:
        positions = self.positions[self.kernel_size[0] - taps :]
        # Not by calling the layers: what counts operations counts those of a network on its input.
        y = torch.sin(self.omega * F.linear(positions, self.first.weight, self.first.bias))
        y = torch.sin(self.omega * F.linear(y, self.second.weight, self.second.bias))
        y = F.linear(y, self.last.weight, self.last.bias)
        return y.t().reshape(self.out_channels, self.in_channels, taps)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return causal_conv1d(x, self.kernel(), self.bias)
        else:
            return causal_conv1d(x, self.kernel_for(x), self.bias)

    def fuse(self) -> MergedConv1d:
        """The same as an ordinary convolution, for inference; :func:`timm.utils.reparameterize_model` calls this."""
        bias = None if self.bias is None else self.bias.detach().clone()
        return MergedConv1d(self.kernel().detach().contiguous(), bias)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, omega={self.omega}"
