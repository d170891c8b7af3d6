"""Effective receptive fields: how strongly the input, place by place, moves what a network makes of one place.

After Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks" (NeurIPS 2016):
the gradient of the features at one place, summed over channels, with respect to the input; here its size, averaged
over real samples.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["receptive_field", "share_of_newest"]


def receptive_field(model: nn.Module, x: Tensor, batch_size: int = 64) -> Tensor:
    """Mean size of the gradient of the features at one place with respect to the input.

    Args:
        model: A network with ``forward_features``, in eval mode; its parameters get no gradients.
        x: Samples, sequences (N, C, L) or images (N, C, H, W).
        batch_size: Samples at a time.

    Returns:
        (L,) for the last step of sequences, (H, W) for the centre of images; float64, the sum over all places is 1.

    Raises:
        ValueError: No sample, or features that do not depend on the input.
    """
    total = torch.zeros(x.shape[2:], dtype=torch.float64)
    for part in x.split(batch_size):
        inputs = part.detach().clone().requires_grad_()
        features = model.forward_features(inputs)  # type: ignore[operator]
        sequence = features.dim() == 3
        seen = features[..., -1] if sequence else features[..., features.size(2) // 2, features.size(3) // 2]
        (gradient,) = torch.autograd.grad(seen.sum(), inputs)
        total += gradient.abs().double().sum(dim=(0, 1))
    if not float(total.sum()) > 0:
        raise ValueError("the features do not depend on the input: no samples, or a dead network")
    return total / total.sum()


def share_of_newest(field: Tensor) -> Tensor:
    """Of a field (L,): the share that lies within the newest 1, 2, ..., L samples, (L,)."""
    return field.flip(0).cumsum(0)
