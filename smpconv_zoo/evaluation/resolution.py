"""Zero-shot accuracy at other resolutions than that of the training: the same digits, sampled more or less densely.

Three ways to meet them are compared. The network may be left as it is (``"fixed"``), so that its kernels cover another
share of the input; the input may be resized to what the network was trained on (``"resized"``); or the kernels may be
read off at the new grid (``"continuous"``), see :mod:`smpconv_zoo.resolution`. Lesser forms of the third way show what
each of its parts does: values of the points not scaled, all scaled by the ratio of the spacings alone, or small kernels
not resampled.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smpconv_zoo.data.mnist5k import mnist5k_images, mnist5k_sequences
from smpconv_zoo.environment import usable_device
from smpconv_zoo.evaluation.classification import load_pretrained, predict
from smpconv_zoo.layers import ActivatedPair, LargeSmallConv, SMPConv1d, SMPConv2d
from smpconv_zoo.models.build import sample_shape
from smpconv_zoo.pretrained.cards import CheckpointCard, checkpoint_card
from smpconv_zoo.pretrained.locate import load_weights
from smpconv_zoo.resolution import resample_

__all__ = ["LESSER", "SIZES", "WAYS", "ResolutionResult", "evaluate_resolution", "resample_input"]

WAYS = ("fixed", "resized", "continuous")
LESSER = ("values not scaled", "values scaled by spacing", "small kernels kept")

# Sizes measured for each form of the input, that of the training among them.
SIZES = {"sequence": (392, 784, 1568), "permuted sequence": (392, 784, 1568), "image 28 x 28": (14, 20, 28, 40, 56)}


@dataclasses.dataclass(frozen=True)
class ResolutionResult:
    """One checkpoint on inputs of one size, met in one way.

    ``size`` is the length of the sequences or the width of the images, ``trained`` that of the training. ``top1`` is in
    percent; ``agreement`` is the share, in percent, of samples put into the same class as at the size of the training.
    """

    id: str
    way: str
    size: int
    trained: int
    split: str
    correct: int
    total: int
    top1: float
    agreement: float
    seconds: float


def resample_input(x: Tensor, size: int) -> Tensor:
    """Sequences ``(N, C, L)``, or square images ``(N, C, H, H)``, at another size: linear, with anti-aliasing."""
    if x.size(-1) == size:
        return x
    images = x.unsqueeze(2) if x.dim() == 3 else x
    shape = (1, size) if x.dim() == 3 else (size, size)
    out = F.interpolate(images, shape, mode="bilinear", align_corners=False, antialias=True)
    return out.squeeze(2) if x.dim() == 3 else out


def evaluate_resolution(
    checkpoint_id: str,
    *,
    sizes: Sequence[int] | None = None,
    ways: Sequence[str] = WAYS,
    split: str = "test",
    every: int = 1,
    batch_size: int = 100,
    device: str = "cpu",
    on_result: Callable[[ResolutionResult], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[ResolutionResult]:
    """Measure a checkpoint of the MNIST-5k digits at several sizes of its input.

    Args:
        checkpoint_id: ``network.tag``.
        sizes: Sizes of the input; those of :data:`SIZES` if None.
        ways: Any of :data:`WAYS` and :data:`LESSER`.
        split: Part of the digits: ``"test"`` to report, others to choose by.
        every: Take every so many-th digit only.
        batch_size: Samples at a time.
        device: Where to compute.
        on_result: Called with each result.
        progress: Called after each result with the results done and in all.

    Returns:
        One result for each size and way; at the size of the training all ways are the same, and there is but
        ``"fixed"``.

    Raises:
        ValueError: A checkpoint of other data, or a way that is none.
    """
    card = checkpoint_card(checkpoint_id)
    if card.data.name != "mnist5k":
        raise ValueError(f"{card.id} is of {card.data.name}; resolutions are measured on the digits of mnist5k")
    if unknown := sorted(set(ways) - {*WAYS, *LESSER}):
        raise ValueError(f"ways must be some of {(*WAYS, *LESSER)}, got {unknown}")
    target = usable_device(device)
    model = load_pretrained(card).to(target)
    x, y = _digits(card, split)
    x, y = x[::every], y[::every]
    trained = sample_shape(model)[-1]
    native = predict(model, x, batch_size, target)
    results: list[ResolutionResult] = []
    sizes = SIZES[card.data.input] if sizes is None else sizes
    total = sum(len(ways) if size != trained else 1 for size in sizes)
    for size in sizes:
        seen = resample_input(x, size)
        for way in ways if size != trained else ("fixed",):
            start = time.perf_counter()
            if way == "resized":
                predicted = predict(model, resample_input(seen, trained), batch_size, target)
            else:
                network = model if way == "fixed" else _read_off(model, size / trained, way)
                predicted = predict(network, seen, batch_size, target)
            correct = int((predicted == y).sum())
            result = ResolutionResult(
                id=card.id,
                way=way,
                size=size,
                trained=trained,
                split=split,
                correct=correct,
                total=len(y),
                top1=100 * correct / len(y),
                agreement=100 * float((predicted == native).double().mean()),
                seconds=time.perf_counter() - start,
            )
            results.append(result)
            if on_result is not None:
                on_result(result)
            if progress is not None:
                progress(len(results), total)
    return results


def _digits(card: CheckpointCard, split: str) -> tuple[Tensor, Tensor]:
    if card.data.input == "image 28 x 28":
        return mnist5k_images(split)
    order = json.loads(load_weights(card).metadata["permutation"]) if card.data.input == "permuted sequence" else None
    return mnist5k_sequences(split, order)


def _read_off(model: nn.Module, ratio: float, way: str) -> nn.Module:
    """A copy of ``model`` with its kernels at a grid ``ratio`` times as dense, wholly or in a lesser form."""
    network = copy.deepcopy(model)
    layers = [layer for layer in network.modules() if isinstance(layer, SMPConv1d | SMPConv2d)]
    axes = len(layers[0].kernel_size)
    pairs: list[Any] = [pair for pair in network.modules() if isinstance(pair, ActivatedPair | LargeSmallConv)]
    small = [copy.deepcopy(pair.small.conv) for pair in pairs]
    points = [(layer.radius.detach().clone(), layer.weight.detach().clone()) for layer in layers]
    resample_(network, (ratio,) * axes)
    if way in ("values not scaled", "values scaled by spacing"):
        scale = 1.0 if way == "values not scaled" else math.pow(ratio, -axes)
        with torch.no_grad():
            for layer, (radius, weight) in zip(layers, points, strict=True):
                layer.radius.copy_(radius)
                layer.weight.copy_(scale * weight)
    if way == "small kernels kept":
        for pair, conv in zip(pairs, small, strict=True):
            pair.small.conv = conv
    return network
