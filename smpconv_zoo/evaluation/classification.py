"""Top-1 accuracy of a checkpoint on the test part of its own data, beside the figures of its authors and its card."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from smpconv_zoo.checkpoints import create_model
from smpconv_zoo.environment import usable_device, versions
from smpconv_zoo.evaluation.test_sets import EvaluationData, batches, open_test_set
from smpconv_zoo.models.build import sample_shape
from smpconv_zoo.pretrained.cards import CheckpointCard, MeasuredResult, PaperResult
from smpconv_zoo.pretrained.home import card_in_use

__all__ = ["EvaluationResult", "chosen_by_protocol", "evaluate_checkpoint", "load_pretrained", "predict", "top1"]

Progress = Callable[[int, int], None]

# With more classes than these a table of confusions tells nobody anything.
MOST_CONFUSED_CLASSES = 100


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """One evaluation. ``top1`` is in percent; ``seconds`` is the time of the forward passes alone.

    ``paper`` is what the authors publish, ``measured`` what the card declares that we measured; either may be None.
    ``agrees`` says whether ``correct`` and ``total`` are exactly the integers of ``measured``, None where it declares
    nothing. ``confusion[t][p]`` counts the samples of class ``t`` that were taken for class ``p``, None if there are
    more than a hundred classes. ``notes`` are sentences without which the figures would be misread.

    ``protocol`` is how the weights were chosen: ``"reference"``, on the test part, as the authors do, which makes the
    figure too good; ``"sound"``, on a validation part; None where the card does not say. ``test_part`` is how the part
    that was measured on was made, one of :data:`~smpconv_zoo.evaluation.test_sets.TEST_PARTS`.
    """

    id: str
    correct: int
    total: int
    top1: float
    seconds: float
    paper: PaperResult | None
    measured: MeasuredResult | None
    agrees: bool | None
    confusion: tuple[tuple[int, ...], ...] | None
    protocol: str | None
    test_part: str
    notes: tuple[str, ...]
    device: str
    versions: dict[str, str]


def evaluate_checkpoint(
    checkpoint_id: str,
    *,
    data_dir: Path | None = None,
    data: EvaluationData | None = None,
    test_part: str = "sound",
    batch_size: int = 100,
    workers: int = 0,
    device: str = "cpu",
    limit: int | None = None,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Measure a checkpoint, in float32, on the test part of the data that its card names.

    Args:
        checkpoint_id: ``network.tag``.
        data_dir: Folder with the data, for those that do not come with a package.
        data: The test part, if it has been opened already, see
            :func:`~smpconv_zoo.evaluation.test_sets.open_test_set`.
        test_part: How it is made if it is opened here, one of
            :data:`~smpconv_zoo.evaluation.test_sets.TEST_PARTS`.
        batch_size: Samples at a time.
        workers: Processes that read samples ahead from the disk.
        device: Where to compute.
        limit: Only so many samples, spread evenly over the test part; the result is then not the card's figure.
        progress: Called after every batch with the samples done and in all.

    Raises:
        CardError: No such checkpoint.
        FileNotFoundError: The data are not at hand; the message says how to get them.
        CheckpointError: The weights are not at hand, or not those of the card.
        ValueError: A device that is not there, a size out of range, or data that are not what they should be.
        ImportError: A package that takes part is not installed.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    target = usable_device(device)
    card = card_in_use(checkpoint_id)
    if data is None:
        data = open_test_set(card, data_dir, protocol=test_part)
    model = load_pretrained(card).to(target)
    samples, notes = data.samples, data.notes
    if limit is not None and limit < len(data):
        # Test parts are sorted by class more often than not: the first samples would be all of one.
        samples = Subset(samples, torch.linspace(0, len(data) - 1, limit).round().long().tolist())
        notes = (*notes, f"only {limit:,} of {len(data):,} samples were taken")
    total = min(len(data), limit or len(data))
    # This first look also takes the statistics that a data set may need, once, before workers copy it.
    found, expected = tuple(samples[0][0].shape), sample_shape(model)
    if found != expected:
        raise ValueError(f"{card.id} takes samples of shape {expected}, these are of shape {found}: other data")
    stream = batches(samples, batch_size, workers if data.from_files else 0)
    y, predicted, seconds = _classify_stream(model, stream, total, target, progress)
    correct = int((predicted == y).sum())
    measured = card.measured
    if card.paper is not None:
        notes = (f"the published figure is of this split: {card.data.split}", *notes)
    return EvaluationResult(
        id=card.id,
        correct=correct,
        total=len(y),
        top1=100 * correct / len(y),
        seconds=seconds,
        paper=card.paper,
        measured=measured,
        agrees=None if measured is None else (correct, len(y)) == (measured.correct, measured.total),
        confusion=_confusion(y, predicted),
        protocol=chosen_by_protocol(card),
        test_part=data.protocol,
        notes=notes,
        device=str(target),
        versions=versions(),
    )


def chosen_by_protocol(card: CheckpointCard) -> str | None:
    """How the weights of a card were chosen, ``"reference"``, ``"sound"``, None if unknown; see EvaluationResult.

    The authors' were chosen on the test part, or, of ImageNet, on the validation part on which they are measured.
    """
    if card.training is None:
        return None if card.paper is None else "reference"
    return "reference" if "test part" in card.training.chosen_by else "sound"


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
        predicted.append(_classify(model, x[start : start + batch_size], device))
        if progress is not None:
            progress(min(start + batch_size, len(x)), len(x))
    return torch.cat(predicted) if predicted else torch.empty(0, dtype=torch.int64)


@torch.inference_mode()
def _classify(model: nn.Module, x: Tensor, device: str | torch.device) -> Tensor:
    return model(x.to(device)).argmax(dim=1).cpu()


def _classify_stream(
    model: nn.Module,
    stream: Iterable[tuple[Tensor, Tensor]],
    total: int,
    device: torch.device,
    progress: Progress | None,
) -> tuple[Tensor, Tensor, float]:
    """True and most probable class of each sample, (N,) int64 each, and the seconds that the network took."""
    labels, predictions, seconds, done = [], [], 0.0, 0
    for x, y in stream:
        start = time.perf_counter()
        predictions.append(_classify(model, x, device))
        seconds += time.perf_counter() - start
        labels.append(y)
        done += len(y)
        if progress is not None:
            progress(done, total)
    return torch.cat(labels), torch.cat(predictions), seconds


def _confusion(y: Tensor, predicted: Tensor) -> tuple[tuple[int, ...], ...] | None:
    classes = int(torch.cat([y, predicted]).max()) + 1
    if classes > MOST_CONFUSED_CLASSES:
        return None
    counts = torch.bincount(y * classes + predicted, minlength=classes**2).view(classes, classes)
    return tuple(tuple(row) for row in counts.tolist())
