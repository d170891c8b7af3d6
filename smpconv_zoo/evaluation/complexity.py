"""Multiply-accumulates of a network, by the convention of the paper's 5.7 G and 16.6 G.

A multiply-add counts as one. Counted are all convolutions, continuous ones as if their rendered kernel were an ordinary
one convolved directly, and linear layers. Padding counts as input; biases, activations, pooling and additions do not
count. Rendering kernels from points is reported beside the total and is not part of it (it does not grow with the batch
or the image), and so are batch norms, which inference can fold away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from smpconv_zoo.baselines import SineConv1d
from smpconv_zoo.layers import SMPConv1d, SMPConv2d

__all__ = ["PARTS", "count_macs"]

PARTS = ("conv", "pointwise", "depthwise", "smpconv", "linear")

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def count_macs(model: nn.Module, input_shape: Sequence[int]) -> dict[str, int]:
    """Count the multiply-accumulates of one inference; nothing is computed, only shapes run through the network.

    Args:
        model: A network on any device, the meta device included; it is left as it was.
        input_shape: Shape of the input with its batch, such as ``(1, 3, 224, 224)``.

    Returns:
        ``total``, which is the sum of ``conv`` (ordinary convolutions other than the next two), ``pointwise`` (one
        tap), ``depthwise``, ``smpconv`` (continuous convolutions) and ``linear``; and, not part of it, ``rendering``
        (points x taps x kernels) and ``norm`` (two per value normalised: scale and shift).
    """
    macs = dict.fromkeys((*PARTS, "rendering", "norm"), 0)

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if isinstance(module, SMPConv1d | SMPConv2d):
            out_channels, in_per_group, points = module.weight.shape
            taps = math.prod(module.kernel_size)
            macs["smpconv"] += output.numel() * in_per_group * taps
            macs["rendering"] += out_channels * in_per_group * points * taps
        elif isinstance(module, SineConv1d):
            taps = module.kernel_size[0]
            macs["conv"] += output.numel() * module.in_channels * taps
            layers = (module.first, module.second, module.last)
            macs["rendering"] += taps * sum(layer.in_features * layer.out_features for layer in layers)
        elif isinstance(module, _CONVS):
            in_per_group, taps = module.weight.size(1), math.prod(module.kernel_size)
            depthwise = module.groups == module.in_channels > 1
            kind = "pointwise" if taps == 1 else "depthwise" if depthwise else "conv"
            macs[kind] += output.numel() * in_per_group * taps
        elif isinstance(module, nn.Linear):
            macs["linear"] += output.numel() * module.in_features
        elif isinstance(module, _NORMS):
            macs["norm"] += 2 * output.numel()

    # functional_call puts meta tensors in the place of the weights: nothing is copied, nothing of the model changes.
    tensors = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }
    modes = {module: module.training for module in model.modules()}
    hooks = [module.register_forward_hook(count) for module in model.modules()]
    try:
        with torch.no_grad():
            functional_call(model.eval(), tensors, (torch.empty(tuple(input_shape), device="meta"),))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    return {"total": sum(macs[part] for part in PARTS), **macs}
