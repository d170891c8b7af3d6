"""Top-1 accuracy of a checkpoint on the test part of its own data, beside the figure that its card declares."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from smpconv_zoo.checkpoints import create_model
from smpconv_zoo.data.mnist5k import mnist5k_sequences
from smpconv_zoo.environment import usable_device, versions
from smpconv_zoo.pretrained.cards import CheckpointCard, MeasuredResult
from smpconv_zoo.pretrained.home import card_in_use
from smpconv_zoo.pretrained.locate import load_weights
from smpconv_zoo.pretrained.store import CheckpointError

__all__ = ["TEST_SETS", "EvaluationResult", "evaluate_checkpoint", "load_pretrained", "predict", "top1"]

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """One evaluation. ``top1`` is in percent; ``seconds`` is the time of the forward passes alone.

    ``confusion[t][p]`` counts the samples of class ``t`` that were taken for class ``p``. ``measured`` is what the card
    declares, and ``agrees`` whether ``correct`` and ``total`` are exactly its integers; both None where it declares
    nothing.
    """

    id: str
    correct: int
    total: int
    top1: float
    seconds: float
    measured: MeasuredResult | None
    agrees: bool | None
    confusion: tuple[tuple[int, ...], ...]
    device: str
    versions: dict[str, str]


def evaluate_checkpoint(
    checkpoint_id: str,
    *,
    batch_size: int = 100,
    device: str = "cpu",
    limit: int | None = None,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Measure a checkpoint, in float32, on the test part of the data that its card names.

    Args:
        checkpoint_id: ``network.tag``.
        batch_size: Samples at a time.
        device: Where to compute.
        limit: Only so many samples, spread evenly over the test part; the result is then not the card's figure.
        progress: Called after every batch with the samples done and in all.

    Raises:
        CardError: No such checkpoint.
        CheckpointError: Its weights are not at hand, or not those of the card.
        ValueError: A device that is not there, a non-positive size, or data of a kind that has no entry in TEST_SETS.
        FileNotFoundError: The data are not installed; the message says how to get them.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    target = usable_device(device)
    card = card_in_use(checkpoint_id)
    model = load_pretrained(card).to(target)
    x, y = _test_set(card)
    if limit is not None and limit < len(x):
        # The test part is sorted by class: its first samples would be all of one.
        chosen = torch.linspace(0, len(x) - 1, limit).round().long()
        x, y = x[chosen], y[chosen]
    start = time.perf_counter()
    predicted = predict(model, x, batch_size, target, progress)
    seconds = time.perf_counter() - start
    correct = int((predicted == y).sum())
    measured = card.measured
    return EvaluationResult(
        id=card.id,
        correct=correct,
        total=len(y),
        top1=100 * correct / len(y),
        seconds=seconds,
        measured=measured,
        agrees=None if measured is None else (correct, len(y)) == (measured.correct, measured.total),
        confusion=_confusion(y, predicted),
        device=str(target),
        versions=versions(),
    )


def load_pretrained(card: CheckpointCard) -> nn.Module:
    """The network of a card with its verified weights, in float32 and eval mode."""
    return create_model(card.id, pretrained=True, **card.arguments).float().eval()


def top1(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    batch_size: int = 100,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> int:
    """How many of the samples ``x`` (N, ...) the model, on ``device``, puts into their classes ``y`` (N,)."""
    return int((predict(model, x, batch_size, device, progress) == y).sum())


@torch.inference_mode()
def predict(
    model: nn.Module, x: Tensor, batch_size: int, device: str | torch.device, progress: Progress | None = None
) -> Tensor:
    """Most probable class of each sample of ``x`` (N, ...), as (N,) int64 on the CPU; the model is put into eval mode.

    Raises:
        ValueError: ``batch_size`` is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    model.eval()
    predicted = []
    for start in range(0, len(x), batch_size):
        predicted.append(model(x[start : start + batch_size].to(device)).argmax(dim=1).cpu())
        if progress is not None:
            progress(min(start + batch_size, len(x)), len(x))
    return torch.cat(predicted) if predicted else torch.empty(0, dtype=torch.int64)


def _mnist5k_sequences(card: CheckpointCard) -> tuple[Tensor, Tensor]:
    return mnist5k_sequences("test")


def _mnist5k_permuted(card: CheckpointCard) -> tuple[Tensor, Tensor]:
    return mnist5k_sequences("test", _permutation(card))


# (data set, form of the input) of a card -> its test part: x (N, ...) float32 as the network takes it, y (N,) int64.
TEST_SETS: dict[tuple[str, str], Callable[[CheckpointCard], tuple[Tensor, Tensor]]] = {
    ("mnist5k", "sequence"): _mnist5k_sequences,
    ("mnist5k", "permuted sequence"): _mnist5k_permuted,
}


def _test_set(card: CheckpointCard) -> tuple[Tensor, Tensor]:
    key = (card.data.name, card.data.input)
    if key not in TEST_SETS:
        known = ", ".join(f"{name} as {form}" for name, form in TEST_SETS)
        raise ValueError(f"{card.id} needs {key[0]} as {key[1]}, which cannot be evaluated here; there are: {known}")
    return TEST_SETS[key](card)


def _permutation(card: CheckpointCard) -> list[int]:
    """The pixel order that travels with the weights: without it they mean nothing."""
    metadata = load_weights(card).metadata
    try:
        order: Any = json.loads(metadata["permutation"])
    except (KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{card.files[0].name} carries no list of pixels under 'permutation'") from error
    return order


def _confusion(y: Tensor, predicted: Tensor) -> tuple[tuple[int, ...], ...]:
    classes = int(torch.cat([y, predicted]).max()) + 1
    counts = torch.bincount(y * classes + predicted, minlength=classes**2).view(classes, classes)
    return tuple(tuple(row) for row in counts.tolist())
