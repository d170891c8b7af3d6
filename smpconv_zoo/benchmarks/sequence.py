"""Sequence networks: a training step and an inference pass; on CPU beside dense synthesis and torch.fft."""

from __future__ import annotations

import copy
import dataclasses
import types
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn

from smpconv_zoo.benchmarks.measure import graphed, median_ms
from smpconv_zoo.kernels import render_kernel_reference
from smpconv_zoo.layers import SMPConv1d, SMPConv2d
from smpconv_zoo.models.build import sample_shape
from smpconv_zoo.ops.fft import good_fft_size
from smpconv_zoo.training.groups import sequence_parameter_groups
from smpconv_zoo.training.step import TrainingStep

__all__ = ["TASKS", "SequenceTime", "bench_sequence"]

# The authors' tasks, and the batch sizes they train with.
TASKS = {
    "smpconv_tcn_mnist": 64,
    "smpconv_tcn_cifar": 64,
    "smpconv_tcn_chartraj": 64,
    "smpconv_tcn_speech_mfcc": 32,
    "smpconv_tcn_speech_raw": 32,
    "smpconv_resnet_cifar": 64,
}


@dataclasses.dataclass(frozen=True)
class SequenceTime:
    """One network; times in milliseconds, None where it was not measured.

    ``train_graph_ms`` is a step (forward, backward, Adam, radii clipped) as one CUDA graph, ``train_ms`` the same
    launched kernel by kernel; ``inference_graph_ms`` and ``inference_ms`` likewise. ``peer_train_ms`` and
    ``peer_inference_ms`` are dense synthesis and torch.fft in the same process.
    """

    network: str
    shape: tuple[int, ...]
    train_graph_ms: float | None
    train_ms: float | None
    inference_graph_ms: float | None
    inference_ms: float | None
    peak_gib: float | None
    peer_train_ms: float | None
    peer_inference_ms: float | None


def bench_sequence(
    networks: dict[str, int],
    device: torch.device,
    repeats: int,
    peer: bool,
    progress: Callable[[int, int], None] | None = None,
) -> list[SequenceTime]:
    """Time networks with random inputs and weights as initialised.

    Args:
        networks: Name of each, and its batch size.
        device: Where.
        repeats: Of which the median counts.
        peer: Whether to time the peer as well.
        progress: Called after each network with those done and in all.
    """
    results = []
    for name, batch_size in networks.items():
        results.append(_measure(name, batch_size, device, repeats, peer))
        if progress is not None:
            progress(len(results), len(networks))
    return results


def _measure(name: str, batch_size: int, device: torch.device, repeats: int, peer: bool) -> SequenceTime:
    torch.manual_seed(0)
    model = timm.create_model(name).to(device)
    shape = (batch_size, *sample_shape(model))
    x = torch.randn(shape, device=device)
    y = torch.randint(model.num_classes, (batch_size,), device=device)
    on_gpu = device.type == "cuda"
    figures: dict[str, Any] = dict.fromkeys(
        ("train_graph_ms", "inference_graph_ms", "peak_gib", "peer_train_ms", "peer_inference_ms")
    )
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        figures["train_graph_ms"] = _train(copy.deepcopy(model), x, y, repeats, graph=True)
        figures["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        figures["inference_graph_ms"] = _graphed_inference(model, x, repeats)
    figures["train_ms"] = _train(copy.deepcopy(model), x, y, repeats, graph=False)
    figures["inference_ms"] = _inference(model, x, repeats)
    if peer:
        slow = _peer(model)
        figures["peer_train_ms"] = _train(slow, x, y, repeats, graph=False)
        figures["peer_inference_ms"] = _inference(slow, x, repeats)
    return SequenceTime(network=name, shape=shape, **figures)


def _train(model: nn.Module, x: Tensor, y: Tensor, repeats: int, graph: bool) -> float:
    groups = sequence_parameter_groups(model.train(), lr=1e-3, weight_decay=0.0)
    step = TrainingStep(model, groups, x.device, graph=graph)
    return median_ms(lambda: step(x, y), x.device, repeats)


@torch.inference_mode()
def _inference(model: nn.Module, x: Tensor, repeats: int) -> float:
    model.eval()
    return median_ms(lambda: model(x), x.device, repeats)


@torch.inference_mode()
def _graphed_inference(model: nn.Module, x: Tensor, repeats: int) -> float:
    model.eval()
    return median_ms(graphed(lambda: model(x)), x.device, repeats)


def _peer(model: nn.Module) -> nn.Module:
    """A copy whose continuous layers evaluate every point at every tap and multiply spectra by einsum."""
    slow = copy.deepcopy(model)
    for module in slow.modules():
        if isinstance(module, SMPConv1d | SMPConv2d):
            module.forward = types.MethodType(_dense_forward, module)  # type: ignore[method-assign]
            # A hook tells the pair around it to call the layer.
            module.register_forward_hook(lambda module, arguments, output: None)
    return slow


def _dense_forward(self: SMPConv1d | SMPConv2d, x: Tensor) -> Tensor:
    kernel = render_kernel_reference(self.coords, self.radius, self.weight, self.grid, self.normalization)
    size, taps = x.shape[2:], kernel.shape[2:]
    dims = list(range(2, x.dim()))
    points = [good_fft_size(s + t - 1) for s, t in zip(size, taps, strict=True)]
    spectrum = torch.fft.rfftn(x, s=points, dim=dims)
    factors = torch.fft.rfftn(kernel.flip(dims), s=points, dim=dims)
    y = torch.fft.irfftn(torch.einsum("ni...,oi...->no...", spectrum, factors), s=points, dim=dims)
    for dim, length, tap in zip(dims, size, taps, strict=True):
        y = y.narrow(dim, 0 if x.dim() == 3 else tap // 2, length)
    return y if self.bias is None else y + self.bias.view(-1, *[1] * (x.dim() - 2))
