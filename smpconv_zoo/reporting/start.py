"""A network as it was before training: drawn again from its recipe's seed, and held against the trained one.

Which numbers a seed gives depends on the version of PyTorch. Up to 2.11 at least, a truncated normal distribution was
drawn through the inverse of its cumulative one; 2.14 draws a normal and rejects. Both are tried, and a start counts as
found only where the trained points still lie near it: points drawn from another seed have nothing to do with them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from smpconv_zoo.layers import SMPConv1d, SMPConv2d
from smpconv_zoo.training.recipe import ImageRecipe, SequenceRecipe
from smpconv_zoo.training.running import start_network

__all__ = ["Start", "point_layers", "recreate_start"]

# Correlation of first and learned positions over a network. Unrelated draws of the thousands of points of the shipped
# networks stay below 0.03; the right ones are above 0.9.
RELATED = 0.5


@dataclasses.dataclass(frozen=True)
class Start:
    """The network before training, how it was drawn, and the correlation of its positions with the learned ones."""

    model: nn.Module
    drawn: str
    correlation: float


def recreate_start(recipe: SequenceRecipe | ImageRecipe, trained: nn.Module) -> Start | None:
    """Draw the network of ``recipe`` again, as its training did; None where that cannot be shown to have succeeded.

    PyTorch's generator is left as it was.
    """
    for drawn, drawing in (
        (f"as PyTorch {torch.__version__.partition('+')[0]} draws", contextlib.nullcontext),
        ("with truncated normals drawn through the inverse cumulative distribution, as PyTorch 2.11 does", _inverse),
    ):
        with torch.random.fork_rng(devices=[]), drawing():
            torch.manual_seed(recipe.seed)
            model = start_network(recipe).eval()
        correlation = _correlation(model, trained)
        if correlation > RELATED:
            return Start(model, drawn, correlation)
    return None


def point_layers(model: nn.Module) -> list[tuple[str, SMPConv1d | SMPConv2d]]:
    """Continuous convolutions of a network with their places in it, in order."""
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, SMPConv1d | SMPConv2d)]


def _correlation(model: nn.Module, trained: nn.Module) -> float:
    pairs = list(zip(point_layers(model), point_layers(trained), strict=True))
    if not pairs or any(ours.coords.shape != theirs.coords.shape for (_, ours), (_, theirs) in pairs):
        return 0.0
    first = torch.cat([layer.coords.detach().flatten() for (_, layer), _ in pairs])
    last = torch.cat([layer.coords.detach().flatten() for _, (_, layer) in pairs])
    return float(torch.corrcoef(torch.stack([first, last]).double())[0, 1])


@contextlib.contextmanager
def _inverse() -> Iterator[None]:
    """Within: truncated normals by the inverse of the cumulative distribution.

    There is no other way to hand a drawing to layers that ask :mod:`torch.nn.init` for it. Of this process, so that
    no other thread may build networks meanwhile.
    """
    present: Callable[..., Any] = nn.init.trunc_normal_
    nn.init.trunc_normal_ = _inverse_truncated_normal
    try:
        yield
    finally:
        nn.init.trunc_normal_ = present


@torch.no_grad()
def _inverse_truncated_normal(
    tensor: Tensor,
    mean: float = 0.0,
    std: float = 1.0,
    a: float = -2.0,
    b: float = 2.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill ``tensor`` with a normal cut to [a, b]: uniform shares of the probability between, taken back to values."""
    low, high = (math.erf((end - mean) / (std * math.sqrt(2))) for end in (a, b))
    tensor.uniform_(low, high, generator=generator)
    return tensor.erfinv_().mul_(std * math.sqrt(2)).add_(mean).clamp_(min=a, max=b)
