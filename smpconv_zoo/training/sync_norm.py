"""Batch norms whose statistics are those of all processes together, as an option of training.

On GPUs these are PyTorch's own, through timm, whose norms hold an activation. There are none for processes on CPUs,
where the one here stands in: slower, and with the same answers. State dicts are those of ordinary batch norms either
way.
"""

from __future__ import annotations

from typing import Any

import timm.layers
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["convert_sync_batch_norm"]


def convert_sync_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Make the batch norms of a network share their statistics over the processes of the default group, in place.

    Returns:
        The network; another object only if it is a batch norm itself.
    """
    if device.type == "cuda":
        return timm.layers.convert_sync_batchnorm(model)
    if isinstance(model, _BatchNorm) and not isinstance(model, _CpuSyncBatchNorm):
        shared = _CpuSyncBatchNorm(
            model.num_features, model.eps, model.momentum, model.affine, model.track_running_stats
        )
        shared.load_state_dict(model.state_dict())
        # timm's norms of convolutions end with dropout and an activation.
        shared.tail = nn.Sequential(*model.children())
        return shared.to(next(iter(model.state_dict().values()), torch.zeros(())).dtype).train(model.training)
    for name, child in model.named_children():
        setattr(model, name, convert_sync_batch_norm(child, device))
    return model


class _Sum(torch.autograd.Function):
    """The sum over processes; so is its gradient's."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


class _CpuSyncBatchNorm(_BatchNorm):
    tail: nn.Sequential

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"expected at least two dimensions, got {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.tail(super().forward(x))
        others = [dim for dim in range(x.dim()) if dim != 1]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        sums = torch.cat([x.sum(others), x.new_tensor([x.numel() / x.shape[1]])])
        sums = _Sum.apply(sums)
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = x - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(others)) / count
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
            momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum  # type: ignore[arg-type]
            with torch.no_grad():
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(variance * (count / (count - 1)), momentum)
        y = centred * (variance + self.eps).rsqrt().view(shape)
        return self.tail(y * self.weight.view(shape) + self.bias.view(shape) if self.affine else y)
