"""Made-up pictures in the memory of the device, ``data: synthetic``: what a network takes for itself, without reading.

A picture is noise on a coarse pattern of its class, so that there is something to learn, but nothing that was learned
from it means anything. Which picture comes when hangs on the seed alone: the pictures of a step are the same however
many processes train, and in however many parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import resolve_data_config
from torch import Tensor, nn

from smpconv_zoo.training.recipe import ImageRecipe
from smpconv_zoo.training.world import World

__all__ = ["SyntheticData"]

# Steps whose pictures are kept; those that follow see them again.
_HELD = 8
# What a seed is drawn for.
_PICTURE, _CLASS = range(2)
# Side of a class's pattern, in squares.
_SQUARES = 4


class SyntheticData:
    """Batches out of memory, this process's share; see :class:`~smpconv_zoo.training.batches.TrainingData`.

    Inputs are ``(N, C, H, W)`` float32 of deviation about 1, laid out as the recipe has it, labels ``(N,)``. Nothing is
    augmented or mixed, and there is nothing to choose by. Eight steps' pictures are held on the device, and come again.

    Args:
        recipe: The run; ``num_samples`` is the length of an epoch, eight steps if it is None.
        model: The network: input size and classes.
        world: This process among those that train together.

    Raises:
        ValueError: A batch that cannot be shared or that is larger than an epoch, or values of a stream.
    """

    def __init__(self, recipe: ImageRecipe, model: nn.Module, world: World) -> None:
        shares = world.size * recipe.micro_batches
        if recipe.batch_size % shares:
            raise ValueError(
                f"a batch of {recipe.batch_size} cannot be shared evenly by {world.size} processes in "
                f"{recipe.micro_batches} micro_batches each: make batch_size a multiple of {shares}"
            )
        fields = ("train_split", "val_split", "input_key", "target_key", "shuffle_size")
        if unused := [field for field in fields if getattr(recipe, field) is not None]:
            raise ValueError(f"{', '.join(unused)}: of a stream alone, and synthetic pictures are none")
        self.samples = _HELD * recipe.batch_size if recipe.num_samples is None else recipe.num_samples
        steps = self.samples // recipe.batch_size
        if steps < 1:
            raise ValueError(
                f"{self.samples:,} training pictures fill no step of {recipe.batch_size}: lower batch_size"
            )
        config = resolve_data_config({"img_size": recipe.image_size}, model=model)
        channels = int(getattr(model, "in_chans", config["input_size"][0]))
        self.input_size = (channels, *config["input_size"][1:])
        self.classes = int(getattr(model, "num_classes", 0))
        self.batches = steps * recipe.micro_batches
        self._batch_size = recipe.batch_size
        self._seed = recipe.seed % 2**63
        self._patterns: dict[int, Tensor] = {}
        share = recipe.batch_size // shares
        layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self._held: list[tuple[Tensor, Tensor]] = []
        for number in range(min(steps, _HELD) * recipe.micro_batches):
            step, part = divmod(number, recipe.micro_batches)
            first = ((step * world.size + world.rank) * recipe.micro_batches + part) * share
            drawn = [self._draw(index) for index in range(first, first + share)]
            x = torch.stack([picture for picture, _ in drawn]).to(world.device).contiguous(memory_format=layout)
            self._held.append((x, torch.tensor([label for _, label in drawn], device=world.device)))
        self._patterns.clear()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The micro-batches of an epoch from number ``start`` on; every epoch has the same."""
        for number in range(start, self.batches):
            yield self._held[number % len(self._held)]

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Nothing: there is no part to choose by."""
        return iter(())

    def describe(self) -> dict[str, Any]:
        """That the pictures are made up, their number and size."""
        return {
            "where": "made up, in the memory of the device; nothing is augmented",
            "classes": self.classes,
            "training": self.samples,
            "different": min(self.samples, _HELD * self._batch_size),
            "chosen by": "nothing",
            "input": list(self.input_size),
        }

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the recipe decides all."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to go back to."""

    def _draw(self, index: int) -> tuple[Tensor, int]:
        """A picture ``(C, H, W)`` and its label."""
        generator = _generator(self._seed, _PICTURE, index)
        label = int(torch.randint(self.classes, (), generator=generator))
        if label not in self._patterns:
            of_class = _generator(self._seed, _CLASS, label)
            coarse = torch.randn((1, self.input_size[0], _SQUARES, _SQUARES), generator=of_class)
            self._patterns[label] = F.interpolate(coarse, self.input_size[1:])[0]
        return torch.randn(self.input_size, generator=generator) + self._patterns[label] / 2, label


def _generator(*key: int) -> torch.Generator:
    words = np.random.SeedSequence(key).generate_state(1, np.uint64)
    generator = torch.Generator()
    generator.manual_seed(int(words[0]) % 2**63)
    return generator
