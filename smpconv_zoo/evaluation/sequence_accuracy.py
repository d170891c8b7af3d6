"""Accuracy of a sequence network on the test part of its task, with the protocol and the share of dropped samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import timm.utils
from torch import Tensor
from torch.utils.data import Dataset, Subset

from smpconv_zoo.environment import hardware, versions
from smpconv_zoo.evaluation.accuracy import Processes, measure, spread
from smpconv_zoo.evaluation.candidates import Candidate
from smpconv_zoo.evaluation.test_sets import EvaluationData, dropped_share
from smpconv_zoo.models.build import sample_shape
from smpconv_zoo.pretrained.cards import CheckpointCard

__all__ = ["HEADER", "SequenceResult", "evaluate_sequences", "sequence_row"]

HEADER = ("model", "data", "dropped", "protocol", "top-1", "paper", "card", "right", "samples/s")


@dataclasses.dataclass(frozen=True)
class SequenceResult:
    """One network on one test part; accuracies in percent.

    ``protocol`` is how the weights were chosen: ``"reference"``, on the test part, as the authors do, or ``"sound"``;
    None where that is not known. ``split`` says which samples are the test part. ``paper`` is what the authors publish
    for the task without dropped samples, ``card`` what the checkpoint's card declares; ``agrees`` says whether
    ``correct`` and ``total`` are exactly the card's integers, None where there is nothing to compare. ``dropped`` is in
    percent of the time steps. ``samples_per_second`` counts all processes together, reading included.
    """

    model: str
    weights: str
    data: str
    input: str
    split: str
    protocol: str | None
    dropped: int
    top1: float
    top1_err: float
    correct: int
    total: int
    paper: float | None
    card: float | None
    agrees: bool | None
    param_count: int
    dtype: str
    reparameterized: bool
    batch_size: int
    processes: int
    samples_per_second: float
    seconds: float
    hardware: str
    versions: dict[str, str]
    notes: tuple[str, ...]


def evaluate_sequences(
    candidate: Candidate,
    card: CheckpointCard,
    data: EvaluationData,
    processes: Processes,
    *,
    dropped: int = 0,
    batch_size: int = 100,
    workers: int = 4,
    dtype: str = "float32",
    reparam: bool = False,
    retry: bool = False,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SequenceResult:
    """Measure a network on every sample of a test part, once.

    Args:
        candidate: The network.
        card: What the task is; of a checkpoint its own card.
        data: The test part, of :func:`~smpconv_zoo.evaluation.test_sets.open_test_set`.
        processes: This process among those that measure together.
        dropped: Percent of the time steps that were left out of ``data``. A network without a channel for the mask of
            the others takes the samples without it: what was dropped is zero to it.
        batch_size: Samples at a time of a process.
        workers: Processes that read recordings, of each process.
        dtype: float32, or bfloat16 or float16 under autocast.
        reparam: Whether to merge the network for inference first.
        retry: Whether to halve the batch when memory runs out.
        limit: Only so many samples, spread evenly.
        progress: Called with the samples that this process has done, and all of its own.

    Returns:
        The same on every process, but for its hardware.

    Raises:
        ValueError: Samples that the network does not take, or memory that does not suffice.
    """
    model: Any = candidate.build()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    samples, notes = data.samples, data.notes
    whole = limit is None or limit >= len(data)
    if not whole and limit is not None:
        samples = Subset(samples, spread(len(data), limit))
        notes = (*notes, f"only {limit:,} of {len(data):,} samples were taken")
    expected, found = sample_shape(model), tuple(samples[0][0].shape)
    if candidate.card is None and len(found) == len(expected) == 2:
        # A run may have taken sequences of any length that its kernels fit into.
        expected = (expected[0], found[1])
    if dropped and found == (expected[0] + 1, *expected[1:]):
        samples = _WithoutMask(samples)
        notes = (*notes, "the network has no channel for the mask of what was dropped, which is zero to it")
    elif found != expected:
        raise ValueError(f"{candidate.name} takes samples of shape {expected}, these are of shape {found}: other data")
    if reparam:
        model = timm.utils.reparameterize_model(model)
    measured = measure(
        model.to(processes.device),
        samples,
        processes,
        batch_size=batch_size,
        workers=workers if data.from_files else 0,
        dtype=dtype,
        retry=retry,
        progress=progress,
    )
    correct, total = measured.correct(), len(measured.labels)
    own = dropped == dropped_share(card)
    declared = candidate.card.measured if candidate.card is not None and own else None
    comparable = declared is not None and whole and dtype == "float32"
    return SequenceResult(
        model=candidate.name,
        weights=candidate.weights,
        data=card.data.name,
        input=card.data.input,
        split=card.data.split,
        protocol=candidate.protocol,
        dropped=dropped,
        top1=100 * correct / total,
        top1_err=100 - 100 * correct / total,
        correct=correct,
        total=total,
        paper=card.paper.top1 if card.paper is not None and own else None,
        card=None if declared is None else declared.top1,
        agrees=(correct, total) == (declared.correct, declared.total) if comparable and declared is not None else None,
        param_count=parameters,
        dtype=dtype,
        reparameterized=reparam,
        batch_size=measured.batch_size,
        processes=processes.size,
        samples_per_second=measured.per_second,
        seconds=measured.seconds,
        hardware=hardware(processes.device),
        versions=versions(),
        notes=notes,
    )


def sequence_row(result: SequenceResult) -> tuple[str, ...]:
    """One line of the table under :data:`HEADER`: cells ready to be shown."""
    return (
        result.model,
        f"{result.data}, {result.input}",
        f"{result.dropped} %",
        result.protocol or "-",
        f"{result.top1:.2f}",
        "-" if result.paper is None else f"{result.paper:.2f}",
        "-" if result.card is None else f"{result.card:.2f}",
        f"{result.correct:,} of {result.total:,}",
        f"{result.samples_per_second:,.0f}",
    )


class _WithoutMask(Dataset[tuple[Tensor, Any]]):
    """Samples without their last channel."""

    def __init__(self, samples: Dataset[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        x, y = self.samples[index]
        return x[:-1], y
