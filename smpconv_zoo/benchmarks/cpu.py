"""Image networks on a CPU, beside timm's ConvNeXt of the same size in the same process; training beside F.conv2d."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
import types
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from smpconv_zoo.layers import LargeSmallConv, SMPConv2d
from smpconv_zoo.models.build import sample_shape
from smpconv_zoo.ops import depthwise_conv2d_reference

__all__ = ["PEERS", "CpuTime", "bench_cpu"]

# timm's networks of about the same size: 26.7 and 28.6 M, 79.5 and 88.6 M parameters.
PEERS = {"smpconv_t": "convnext_tiny", "smpconv_b": "convnext_base"}
_TRAIN_BATCH = 8
_LAYOUTS = {"training": torch.contiguous_format, "training, channels last": torch.channels_last}


@dataclasses.dataclass(frozen=True)
class CpuTime:
    """Ours and the peer in turns: medians in milliseconds, and their ratio.

    ``work`` is "inference", "inference, merged" (reparameterised), "training" (forward and backward) or "training,
    channels last". The peer of the first two is ``peer``, that of training is the same network, as it was created, with
    ``F.conv2d`` for its kernels.
    """

    network: str
    work: str
    batch_size: int
    dtype: str
    peer: str
    ours_ms: float
    peer_ms: float
    ratio: float


def bench_cpu(
    networks: Sequence[str],
    batch_sizes: Sequence[int],
    dtype: torch.dtype,
    train: bool,
    repeats: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[CpuTime]:
    """Time networks with random inputs and weights as initialised.

    Args:
        networks: Of :data:`PEERS`.
        batch_sizes: Images at a time, for inference.
        dtype: Of weights and images, for inference; training is in float32.
        train: Whether to time a training step as well.
        repeats: Of which the median counts.
        progress: Called after each measurement with those done and in all.
    """
    done, total = 0, len(networks) * 2 * (len(batch_sizes) + train)
    results = []
    for name in networks:
        torch.manual_seed(0)
        model, peer = timm.create_model(name).eval(), timm.create_model(PEERS[name]).eval()
        shape = sample_shape(model)
        kind = str(dtype).removeprefix("torch.")
        merged = copy.deepcopy(model).reparameterize()
        for work, network in (("inference", model), ("inference, merged", merged)):
            for batch_size in batch_sizes:
                x = torch.randn(batch_size, *shape, dtype=dtype)
                pair = _infer(network.to(dtype), x), _infer(peer.to(dtype), x)
                results.append(_compare((name, work, batch_size, kind, PEERS[name]), *pair, repeats))
                done += 1
                if progress is not None:
                    progress(done, total)
        if train:
            x = torch.randn(_TRAIN_BATCH, *shape)
            model = model.float().train()
            slow = _train(_directly(model), x)
            for work, layout in _LAYOUTS.items():
                ours = _train(model.to(memory_format=layout), x.contiguous(memory_format=layout))
                case = (name, work, _TRAIN_BATCH, "float32", "F.conv2d")
                results.append(_compare(case, ours, slow, min(repeats, 3)))
                done += 1
                if progress is not None:
                    progress(done, total)
    return results


def _compare(
    case: tuple[str, str, int, str, str], ours: Callable[[], Any], peer: Callable[[], Any], repeats: int
) -> CpuTime:
    """In turns, so that whatever else the machine does falls on both."""
    ours(), peer()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for work, measured in zip((ours, peer), times, strict=True):
            start = time.perf_counter()
            work()
            measured.append(1e3 * (time.perf_counter() - start))
    ours_ms, peer_ms = map(statistics.median, times)
    return CpuTime(*case, ours_ms=ours_ms, peer_ms=peer_ms, ratio=ours_ms / peer_ms)


def _infer(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    @torch.inference_mode()
    def work() -> None:
        model(x)

    return work


def _train(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    def work() -> None:
        model.zero_grad()
        model(x).square().mean().backward()

    return work


def _directly(model: nn.Module) -> nn.Module:
    """A copy whose kernels, large and small, are convolved by ``F.conv2d``."""
    slow = copy.deepcopy(model)
    for module in slow.modules():
        if isinstance(module, SMPConv2d):
            module.forward = types.MethodType(_direct_forward, module)  # type: ignore[method-assign]
        elif isinstance(module, LargeSmallConv):
            module.forward = types.MethodType(_plain_sum, module)  # type: ignore[method-assign]
    return slow


def _plain_sum(self: LargeSmallConv, x: Tensor) -> Tensor:
    sum_: Tensor = self.large(x) + self.small(x)
    return sum_


def _direct_forward(self: SMPConv2d, x: Tensor) -> Tensor:
    return depthwise_conv2d_reference(x, self.kernel())
