"""Golden logits: what weights give for an input that anyone can draw again."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from smpconv_zoo.models.build import sample_shape
from smpconv_zoo.pretrained.cards import Golden

__all__ = ["golden_error", "golden_logits"]


def golden_logits(model: nn.Module, seed: int = 0, samples: int = 2) -> Golden:
    """Run ``model``, in float32 and eval mode on the CPU, on the input drawn by ``seed``."""
    shape = (samples, *sample_shape(model))
    logits = _run(model, seed, shape)
    # Eight digits tell every float32 from its neighbours, of small logits too.
    return Golden(seed, shape, tuple(tuple(float(f"{float(value):.8g}") for value in row) for row in logits))


def golden_error(model: nn.Module, golden: Golden) -> float:
    """Largest difference between the logits of ``model`` and the golden ones, over the largest golden logit."""
    expected = torch.tensor(golden.logits, dtype=torch.float64)
    actual = _run(model, golden.seed, golden.shape).double()
    if actual.shape != expected.shape:
        return float("inf")
    return float((actual - expected).abs().max()) / (float(expected.abs().max()) or 1.0)


def _run(model: nn.Module, seed: int, shape: tuple[int, ...]) -> Tensor:
    x = torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))
    with torch.inference_mode():
        return model.eval()(x)
