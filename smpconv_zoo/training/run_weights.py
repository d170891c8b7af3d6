"""The network that a run left in its folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from torch import nn

from smpconv_zoo.training import checkpointing
from smpconv_zoo.training.recipe import ImageRecipe, SequenceRecipe, make_recipe
from smpconv_zoo.training.running import start_network

__all__ = ["RunWeights", "is_run_folder", "network_of_run", "recipe_of_run"]


@dataclasses.dataclass(frozen=True)
class RunWeights:
    """What is measured of a run: the network, in float32 on the CPU, its recipe, and in words which weights it has."""

    model: nn.Module
    recipe: SequenceRecipe | ImageRecipe
    weights: str


def is_run_folder(path: str | Path) -> bool:
    """Whether a run of this package wrote there."""
    return (Path(path) / "args.yaml").is_file()


def recipe_of_run(folder: Path) -> SequenceRecipe | ImageRecipe:
    """The recipe of a run.

    Raises:
        FileNotFoundError: No run wrote there.
        ValueError: What is written there is no recipe of this version.
    """
    if not is_run_folder(folder):
        raise FileNotFoundError(f"{folder} is no folder of a run: it has no args.yaml")
    try:
        values: dict[str, Any] = yaml.safe_load((folder / "args.yaml").read_text(encoding="utf-8"))["recipe"]
        return make_recipe(values.pop("id"), values)
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / 'args.yaml'} holds no recipe: {' '.join(str(error).split())}") from error


def network_of_run(folder: Path, *, averaged: bool = True, best: bool = True) -> RunWeights:
    """The network of a run that ended, or as far as it came.

    Args:
        folder: Of the run.
        averaged: Whether to take the running average of the weights, where the run has one; otherwise the weights as
            trained, of the newest checkpoint.
        best: Whether to take the epoch that was best where the run chose by something, if it had one; otherwise the
            newest checkpoint.

    Raises:
        FileNotFoundError: No run wrote there, or it has saved nothing yet.
        ValueError: The recipe or every checkpoint is broken.
    """
    recipe = recipe_of_run(folder)
    model = start_network(recipe).float()
    chosen = folder / "best.safetensors"
    average = recipe.ema_decay is not None
    if best and chosen.is_file() and (averaged or not average):
        kind = "averaged weights" if average else "weights"
        model.load_state_dict(load_file(chosen))
        return RunWeights(model.eval(), recipe, f"{kind} of the best epoch, {chosen.name}")
    found = checkpointing.load_newest(folder / "checkpoints") if (folder / "checkpoints").is_dir() else None
    if found is None:
        raise FileNotFoundError(f"{folder} holds no checkpoint yet")
    take_average = averaged and found.state["average"] is not None
    model.load_state_dict(found.state["average" if take_average else "model"])
    kind = "averaged weights" if take_average else "weights as trained" if average else "weights"
    return RunWeights(model.eval(), recipe, f"{kind} after step {found.state['update']}, {found.path.name}")
