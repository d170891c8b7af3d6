"""MNIST-1D: procedural digits of one dimension, drawn here from a seed; no file, no download.

Greydanus & Kobak, "Scaling Down Deep Learning with MNIST-1D", arXiv 2011.14439: ten templates of 12 values, one for
each digit, are lengthened, stretched, scaled, moved, covered with noise, sheared and read off at 40 steps. The draws
are those of ``mnist1d.data.make_dataset()`` of the authors' package (Apache-2.0) from its default seed, in the same
order, and the result is verified before it is handed out.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

__all__ = ["mnist1d_sequences"]

SAMPLES, TRAIN = 5000, 4000
SEED = 42
# Of the training samples and behind them the test samples in steps of 1/4096, int16, then of their classes, int64:
# coarse enough that the last bit of a double decides nothing.
SHA256 = "7d921558c8e8478153c02a68f14fe3ee9e4ef99e4fc2e49f3935c6f557fa87a3"

# Heights of the ten digits, of the authors' package.
TEMPLATES = np.array(
    [
        [5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5],
        [5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5],
        [5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5],
        [5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5],
        [5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5],
        [5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5],
        [5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5],
        [5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5],
        [5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5],
        [5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5],
    ]
)
PADDING = (36, 60)
STRETCHED = TEMPLATES.shape[1] + PADDING[1]
LENGTH = 40


def mnist1d_sequences(split: str) -> tuple[Tensor, Tensor]:
    """The samples of one part, centred and scaled over both parts together, as the authors hand them out.

    Args:
        split: "train" (4,000) or "test" (1,000).

    Returns:
        x (N, 1, 40) float32, y (N,) int64.

    Raises:
        ValueError: Another part, or draws that differ from the authors'.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be train or test, got {split!r}")
    x, y = _draw(np.random.RandomState(SEED))
    found = hashlib.sha256(np.rint(x * 4096).astype("<i2").tobytes() + y.astype("<i8").tobytes()).hexdigest()
    if found != SHA256:
        raise ValueError(f"MNIST-1D was drawn otherwise than by its authors: sha256 {found}, expected {SHA256}")
    part = slice(None, TRAIN) if split == "train" else slice(TRAIN, None)
    return torch.from_numpy(x[part, None].astype(np.float32)), torch.from_numpy(y[part])


def _draw(generator: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
    """All samples, (5000, 40) float64 and (5000,) int64, shuffled."""
    templates = TEMPLATES - TEMPLATES.mean(1, keepdims=True)
    templates /= templates.std(1, keepdims=True)
    # A signal starts and ends at 0.
    templates = (templates - templates[:, :1]) / 6
    each = SAMPLES // len(templates)
    x = np.stack([_sample(template, generator) for template in templates for _ in range(each)])
    order = generator.permutation(SAMPLES)
    x, y = x[order], np.repeat(np.arange(len(templates)), each)[order]
    return (x - x.mean()) / x.std(), y


def _sample(template: np.ndarray, generator: np.random.RandomState) -> np.ndarray:
    low, high = PADDING
    behind = low + int(generator.rand() * (high - low + 1))
    # A little above 0, by which the template is told from the padding.
    x = _read_off(np.concatenate([template + 1e-8, np.zeros(behind)]), STRETCHED)
    x = x * (1 + 0.4 * (generator.rand() - 0.5))
    x = np.roll(x, generator.choice(48))
    noise = _smoothed(0.25 * generator.randn(STRETCHED))
    x = np.where(x != 0, x, noise)
    x = x + 2e-2 * generator.randn(STRETCHED)
    slope = 0.75 * (generator.rand() - 0.5)
    return _read_off(x - slope * np.linspace(-0.5, 0.5, STRETCHED), LENGTH)


def _read_off(x: np.ndarray, steps: int) -> np.ndarray:
    """``x`` at ``steps`` places from its first to its last value, linearly."""
    return np.interp(np.linspace(0, 1, steps), np.linspace(0, 1, len(x)), x)


def _smoothed(x: np.ndarray) -> np.ndarray:
    """Filtered by a Gaussian of deviation 2, cut off at four deviations, with the signal mirrored at its ends."""
    offsets = np.arange(-8, 9)
    weights = np.exp(-0.5 * (offsets / 2) ** 2)
    return np.convolve(np.pad(x, 8, mode="symmetric"), weights / weights.sum(), mode="valid")
