"""Recipes: everything that decides a training run, in one YAML file per checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

__all__ = ["Recipe", "list_recipes", "load_recipe", "parse_overrides"]

INPUTS = ("sequence", "permuted sequence", "image 28 x 28")

# Types of the fields whose values a user writes by hand; checked before anything is computed from them.
_KINDS: dict[str, tuple[type, ...]] = {
    "arguments": (dict,),
    "permutation_seed": (int, type(None)),
    "epochs": (int,),
    "batch_size": (int,),
    "lr": (float, int),
    "weight_decay": (float, int),
    "warmup_epochs": (int,),
    "input_drop_rate": (float, int),
    "augment": (bool,),
    "seed": (int,),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A run on the digits of MNIST-5k.

    Args:
        id: Checkpoint that the run makes, ``network.tag``.
        network: Entrypoint.
        arguments: Arguments of the entrypoint.
        input: ``"sequence"``, ``"permuted sequence"`` or ``"image 28 x 28"``.
        permutation_seed: Seed of the pixel permutation; None for none.
        epochs: Passes over the training part.
        batch_size: Samples of a step; what does not fill a batch is left out of that epoch.
        lr: Highest rate; radii get a tenth.
        weight_decay: L2 (Adam) on everything but norms, biases, positions and radii.
        warmup_epochs: Epochs in which the rate grows linearly; a cosine to zero follows.
        input_drop_rate: Dropout on the input while training (the authors' ``dropout_in``).
        augment: Whether to apply :func:`smpconv_zoo.training.augment.augment_digits`.
        seed: Of initialisation, order, augmentation and dropout.
    """

    id: str
    network: str
    arguments: dict[str, Any]
    input: str
    permutation_seed: int | None
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    warmup_epochs: int
    input_drop_rate: float
    augment: bool
    seed: int

    def __post_init__(self) -> None:
        for field, kinds in _KINDS.items():
            value = getattr(self, field)
            if not isinstance(value, kinds) or (isinstance(value, bool) and kinds != (bool,)):
                raise ValueError(f"{field} must be {' or '.join(kind.__name__ for kind in kinds)}, got {value!r}")
        if self.input not in INPUTS:
            raise ValueError(f"input must be one of {INPUTS}, got {self.input!r}")
        if (self.input == "permuted sequence") != (self.permutation_seed is not None):
            raise ValueError("a permuted sequence needs a permutation_seed, an image or a sequence has none")
        if self.epochs < 1 or self.batch_size < 2 or not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"need epochs >= 1, batch_size >= 2 and 0 <= warmup_epochs < epochs; got {self.epochs}, "
                f"{self.batch_size}, {self.warmup_epochs}"
            )
        if not self.lr > 0 or self.weight_decay < 0 or not 0 <= self.input_drop_rate < 1:
            raise ValueError(
                f"need lr > 0, weight_decay >= 0 and input_drop_rate in [0, 1); got {self.lr}, {self.weight_decay}, "
                f"{self.input_drop_rate}"
            )


def list_recipes() -> list[str]:
    """Ids of the checkpoints that have a recipe, sorted."""
    return sorted(path.name.removesuffix(".yaml") for path in _folder().glob("*.yaml"))


def load_recipe(checkpoint_id: str, **overrides: Any) -> Recipe:
    """The recipe of a checkpoint, with single values replaced.

    Raises:
        ValueError: No such recipe, or an override that is not a field; near names are listed.
    """
    recipes = list_recipes()
    if checkpoint_id not in recipes:
        raise ValueError(f"there is no recipe for {checkpoint_id!r}; {_near(checkpoint_id, recipes)}")
    values = yaml.safe_load((_folder() / f"{checkpoint_id}.yaml").read_text(encoding="utf-8"))
    fields = {field.name for field in dataclasses.fields(Recipe)} - {"id"}
    for name in (*values, *overrides):
        if name not in fields:
            raise ValueError(f"a recipe has no field {name!r}; {_near(name, sorted(fields))}")
    return Recipe(id=checkpoint_id, **{**values, **overrides})


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """``["lr=2e-3", "arguments={block_drop_rate: 0.1}"]`` as a dict; values are YAML.

    Raises:
        ValueError: A pair without "=", or a value that is not YAML.
    """
    overrides = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"expected KEY=VALUE, got {pair!r}")
        try:
            overrides[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"the value of {name!r} is not YAML: {value!r}") from error
        if isinstance(overrides[name], str):
            # YAML takes 2e-3 for a string, since it wants a dot in a number.
            with contextlib.suppress(ValueError):
                overrides[name] = float(value)
    return overrides


def _folder() -> Path:
    return Path(__file__).resolve().parent / "recipes"


def _near(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(names)}"
