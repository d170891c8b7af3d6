"""The network that a run left in its folder, and the test part of its task."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset, default_collate

from smpconv_zoo.data.protocol import permute_pixels, pixel_permutation
from smpconv_zoo.evaluation.test_sets import EvaluationData, open_test_set
from smpconv_zoo.pretrained.cards import CheckpointCard, Data, checkpoint_card
from smpconv_zoo.training import checkpointing
from smpconv_zoo.training.arrays import NAMES
from smpconv_zoo.training.recipe import ImageRecipe, SequenceRecipe, make_recipe
from smpconv_zoo.training.running import start_network

__all__ = ["RunWeights", "is_run_folder", "network_of_run", "open_test_set_of_run", "recipe_of_run", "task_of_run"]

# What cards call the inputs of data that come in one form alone, by the recipe's data and features.
_FORMS = {
    ("character-trajectories", None): "sequence of 182 steps",
    ("speech-commands", "mfcc"): "161 frames of 20 MFCCs",
    ("speech-commands", "raw"): "waveform of 16,000 samples",
}


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


def task_of_run(recipe: SequenceRecipe) -> CheckpointCard:
    """The card of the recipe's checkpoint, with the data that the recipe names; it says nothing of any weights.

    Raises:
        CardError: No checkpoint has the recipe's id.
        ValueError: The user's own sequences, of which nobody knows a test part.
    """
    if recipe.data == "series":
        raise ValueError(f"{recipe.id} learned from sequences of your own: there is no test part to measure it on")
    card = checkpoint_card(recipe.id)
    form = _FORMS.get((recipe.data, recipe.features), recipe.input)
    name = NAMES.get(recipe.data, recipe.data)
    same = (name, form) == (card.data.name, card.data.input)
    split = card.data.split if same else f"the test part of {name}"
    paper = card.paper if same else None
    return dataclasses.replace(card, data=Data(name, form, split), paper=paper, measured=None)


def open_test_set_of_run(
    recipe: SequenceRecipe, data_dir: Path | None = None, download: bool = False, dropped: int | None = None
) -> EvaluationData:
    """The test part of a recipe's data, as :func:`~smpconv_zoo.evaluation.test_sets.open_test_set`.

    Args:
        recipe: The run.
        data_dir: The user's folder with the data.
        download: Whether to fetch data that are not there.
        dropped: Percent of the time steps that are left out; as in training if None.
    """
    card = task_of_run(recipe)
    # Of clips that were learned from in the order of a directory, those that were not are told by the same order.
    part: Any = {"protocol": recipe.protocol, "dropped": recipe.dropped if dropped is None else dropped}
    if recipe.permutation_seed is None:
        return open_test_set(card, data_dir, download, **part)
    # In the order of its seed: that of a checkpoint travels with the weights, and may be another.
    plain = dataclasses.replace(card, data=dataclasses.replace(card.data, input="sequence"))
    data = open_test_set(plain, data_dir, download, **part)
    x, y = default_collate([data.samples[i] for i in range(len(data))])
    order = pixel_permutation(recipe.permutation_seed, n=x.shape[2])
    return EvaluationData(TensorDataset(permute_pixels(x, order), y), notes=data.notes)
