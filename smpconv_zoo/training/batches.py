"""What the engine asks of data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor

__all__ = ["TrainingData"]


class TrainingData(Protocol):
    """Batches to learn from and to choose by, of this process's share.

    A batch is decided by the seed, the epoch and its place in it, whatever came before and however many workers read
    it, so that a run that goes on after a crash sees what the unbroken one saw.
    """

    @property
    def batches(self) -> int:
        """Micro-batches in an epoch; those that do not fill an optimizer step are not among them."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Micro-batches of an epoch, from number ``start`` on, on the device of the process.

        Args:
            epoch: From 0.
            start: Micro-batches that were seen already.

        Yields:
            Inputs ``(N, ...)`` and targets, labels ``(N,)`` or mixed ``(N, classes)``. Every batch has the same N.
        """

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches to choose by, of this process's share; over all processes each sample is there once.

        Yields:
            Inputs ``(N, ...)`` and labels ``(N,)``; the last batch may be smaller. None at all where there is no part
            to choose by.
        """

    def describe(self) -> dict[str, Any]:
        """What the plan says: counts, classes, split, where the files lie."""

    def state_dict(self) -> dict[str, Any]:
        """Whatever beyond seed and epoch decides the epoch that is under way, as at its start; mostly empty."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to the start of the epoch of :meth:`state_dict`."""
