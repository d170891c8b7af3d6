"""What a network becomes for inference: plain convolutions, and the arithmetic that folds norms into them.

A batch norm in eval mode is a factor and a shift for each channel. Behind a convolution both go into its kernel and
bias; in front of one they do, too, unless it pads: the zeros around the map would have to become other numbers.
Parallel convolutions are summed kernel by kernel. All sums are taken in double precision and rounded once, to the dtype
of the weights.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch.nn.functional as F
from timm.layers import FrozenBatchNormAct2d
from timm.models import register_notrace_module
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

from smpconv_zoo.ops import causal_conv1d, conv2d, depthwise_conv2d

__all__ = [
    "ChannelAffine",
    "Merged",
    "MergedConv1d",
    "MergedConv2d",
    "MergingNet",
    "centred_sum",
    "fold_conv2d",
    "newest_sum",
    "norm_affine",
    "refuse_training",
    "through_norm",
    "wide",
]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Merged(nn.Module):
    """A module that has been merged for inference: made in eval mode, and it stays there."""

    def __init__(self) -> None:
        super().__init__()
        self.training = False

    def fuse(self: ModuleT) -> ModuleT:
        """Itself: merging again does nothing."""
        return self

    def train(self: ModuleT, mode: bool = True) -> ModuleT:
        """Refuse training mode; ``eval()`` changes nothing.

        Raises:
            RuntimeError: ``mode`` is True.
        """
        if mode:
            refuse_training(self, type(self).__name__)
        return super().train(mode)


def refuse_training(module: nn.Module, name: str) -> None:
    """Complain if any part of ``module`` has been merged: what it was made of is gone.

    Raises:
        RuntimeError: One is; the message names ``name``.
    """
    if any(isinstance(part, Merged) for part in module.modules()):
        raise RuntimeError(f"{name} has been merged for inference; create the network anew to train it")


class MergingNet(nn.Module):
    """What a network needs to be merged, by its own method or through timm."""

    def reparameterize(self: ModuleT) -> ModuleT:
        """Merge for inference, in place: points, small kernels and batch norms become plain convolutions with bias.

        Norms are folded with their running statistics, and the network is put into eval mode; what has been merged
        requires no gradient, and ``train()`` raises a RuntimeError from then on. Answers, features and the classifier
        stay what they were, up to rounding. A norm that is not exactly a part of a convolution stays; so does, as a
        factor and a shift for each channel, the one in front of the pooling: features and other classifiers need it.
        Merging again does nothing.

        ``timm.utils.reparameterize_model`` does the same, to a copy unless ``inplace=True``. It asks a network's parts
        only: ``training`` of the network itself stays as it was.

        Returns:
            The network itself.
        """
        reparameterize_model(self, inplace=True)
        return self.eval()

    def train(self: ModuleT, mode: bool = True) -> ModuleT:
        """As of any module, but training mode is refused after merging, before anything has changed.

        Raises:
            RuntimeError: ``mode`` is True and the network has been merged.
        """
        if mode:
            refuse_training(self, type(self).__name__)
        return super().train(mode)


@register_notrace_module
class MergedConv2d(Merged):
    """A convolution of stride 1 whose output is as large as its input.

    Args:
        weight: Kernels of odd size, ``(C, 1, Kh, Kw)`` if depthwise, else ``(out, in, Kh, Kw)``.
        bias: ``(out,)`` or None.
        depthwise: Whether each channel has a kernel of its own.

    Shape: ``(N, in, H, W)`` -> ``(N, out, H, W)``.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, depthwise: bool) -> None:
        super().__init__()
        self.depthwise = depthwise
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.depthwise:
            return conv2d(x, self.weight, self.bias)
        y = depthwise_conv2d(x, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype).view(-1, 1, 1)

    def extra_repr(self) -> str:
        in_channels = self.weight.size(0 if self.depthwise else 1)
        return (
            f"{in_channels}, {self.weight.size(0)}, kernel_size={tuple(self.weight.shape[2:])}, "
            f"depthwise={self.depthwise}, bias={self.bias is not None}"
        )


@register_notrace_module
class MergedConv1d(Merged):
    """A causal convolution: the last tap meets the current sample.

    Args:
        weight: ``(out, in, taps)``. Old taps that no point touched are left out, so that networks of one kind differ in
            the number of taps; loading a state dict takes its number.
        bias: ``(out,)`` or None.

    Shape: ``(N, in, L)`` -> ``(N, out, L)``.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return causal_conv1d(x, self.weight, self.bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        weight, own = state_dict.get(f"{prefix}weight"), self.weight
        if isinstance(weight, Tensor) and weight.dim() == 3 and 0 < weight.size(2) != own.size(2):
            self.weight = nn.Parameter(own.new_empty(*own.shape[:2], weight.size(2)), requires_grad=False)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        out_channels, in_channels, taps = self.weight.shape
        return f"{in_channels}, {out_channels}, kernel_size={taps}, bias={self.bias is not None}"


@register_notrace_module
class ChannelAffine(Merged):
    """What a batch norm is in eval mode: a factor ``weight`` and a shift ``bias`` for each channel, ``(C,)`` each.

    Shape: ``(N, C, *)`` -> ``(N, C, *)``.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        shape = [-1] + [1] * (x.dim() - 2)
        return x * self.weight.to(x.dtype).view(shape) + self.bias.to(x.dtype).view(shape)

    def extra_repr(self) -> str:
        return str(self.weight.numel())


def wide(tensor: Tensor) -> Tensor:
    """``tensor`` in double precision, out of reach of autograd; on the CPU if its device knows no double precision."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def norm_affine(norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Factor and shift of every channel, ``(C,)`` each in double precision, that a norm is in eval mode.

    Returns:
        None of a norm that depends on its input: another kind, or a batch norm without running statistics.
    """
    if not isinstance(norm, _BatchNorm | FrozenBatchNorm2d | FrozenBatchNormAct2d):
        return None
    mean, variance = norm.running_mean, norm.running_var
    if not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
        return None
    scale = (wide(variance) + norm.eps).rsqrt()
    if isinstance(norm.weight, Tensor):
        scale = scale * wide(norm.weight)
    shift = -wide(mean) * scale
    if isinstance(norm.bias, Tensor):
        shift = shift + wide(norm.bias)
    return scale, shift


def through_norm(weight: Tensor, bias: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Kernel ``(out, ...)`` and bias ``(out,)`` of a convolution with ``norm`` behind it, in double precision.

    Returns:
        None if the norm cannot be folded; see :func:`norm_affine`.
    """
    affine = norm_affine(norm)
    if affine is None:
        return None
    scale, shift = affine
    folded = wide(weight) * scale.view(-1, *[1] * (weight.dim() - 1))
    return folded, shift if bias is None else shift + wide(bias) * scale


def centred_sum(kernels: list[Tensor]) -> Tensor:
    """Kernels ``(..., Kh, Kw)`` of odd sizes, laid over each other by their centres and added."""
    height = max(kernel.size(-2) for kernel in kernels)
    width = max(kernel.size(-1) for kernel in kernels)
    total = kernels[0].new_zeros(())
    for kernel in kernels:
        rows, columns = (height - kernel.size(-2)) // 2, (width - kernel.size(-1)) // 2
        total = total + F.pad(kernel, (columns, columns, rows, rows))
    return total


def newest_sum(kernels: list[Tensor]) -> Tensor:
    """Causal kernels ``(..., taps)`` laid over each other by their last taps and added, as long as the longest."""
    taps = max(kernel.size(-1) for kernel in kernels)
    total = kernels[0].new_zeros(())
    for kernel in kernels:
        total = total + F.pad(kernel, (taps - kernel.size(-1), 0))
    return total


def fold_conv2d(conv: nn.Module, before: nn.Module | None, after: nn.Module | None) -> nn.Conv2d | None:
    """One convolution with bias in place of a norm, ``conv``, and another norm; its parameters require no gradient.

    Args:
        conv: A convolution of any stride and number of groups.
        before: The norm in front of it, if any.
        after: The norm behind it, if any.

    Returns:
        None if they cannot be folded: no plain convolution, no batch norm, or a norm in front of one that pads.
    """
    if type(conv) is not nn.Conv2d:
        return None
    weight, bias = wide(conv.weight), None if conv.bias is None else wide(conv.bias)
    if before is not None:
        affine = norm_affine(before)
        if affine is None or conv.padding not in ((0, 0), "valid"):
            return None
        # Of every output channel, the input channels of its group: (out, in per group, 1, 1).
        scale, shift = (
            each.view(conv.groups, 1, -1)
            .expand(-1, conv.out_channels // conv.groups, -1)
            .flatten(0, 1)[..., None, None]
            for each in affine
        )
        shifted = (weight * shift).sum(dim=(1, 2, 3))
        bias = shifted if bias is None else bias + shifted
        weight = weight * scale
    if after is not None:
        folded = through_norm(weight, bias, after)
        if folded is None:
            return None
        weight, bias = folded
    if bias is None:
        bias = weight.new_zeros(conv.out_channels)
    # Made on the meta device: no numbers are drawn for weights that are replaced at once.
    merged = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        conv.groups,
        padding_mode=conv.padding_mode,
        device="meta",
    )
    merged.weight = nn.Parameter(weight.to(conv.weight), requires_grad=False)
    merged.bias = nn.Parameter(bias.to(conv.weight), requires_grad=False)
    return merged.eval()
