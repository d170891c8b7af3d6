"""Training data that fit in memory: digits, small pictures, sequences. They stay on the device.

How data are split depends on the protocol of the recipe. With ``sound`` a run learns from one part, chooses by another,
and the test part stays closed. With ``reference`` it chooses by the test part, as the authors do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from smpconv_zoo.data.classes import class_names
from smpconv_zoo.data.mnist1d import mnist1d_sequences
from smpconv_zoo.data.mnist5k import mnist5k_images
from smpconv_zoo.data.pictures import cifar10_test, cifar10_train, mnist_test, mnist_train
from smpconv_zoo.data.protocol import character_trajectories, hold_out, labels_by_first_appearance, pixel_permutation
from smpconv_zoo.data.series import load_series
from smpconv_zoo.data.speech_commands import WORDS, clip_order, speech_commands_parts
from smpconv_zoo.data.ts_files import read_ts_parts
from smpconv_zoo.data.ucr import UCR_SETS, load_ucr
from smpconv_zoo.evaluation.test_sets import find_data_set
from smpconv_zoo.layers import SMPConv1d
from smpconv_zoo.models.build import sample_shape
from smpconv_zoo.training.augment import augment_digits, augment_pictures, augment_series
from smpconv_zoo.training.recipe import SequenceRecipe
from smpconv_zoo.training.world import World

__all__ = ["ArrayData", "Parts", "load_parts", "open_arrays", "pixels_as_input"]

Progress = Callable[[int, int], None]

# What cards call the data that lie in a folder of the user's.
NAMES = {
    "mnist": "MNIST",
    "cifar10": "CIFAR-10",
    "character-trajectories": "CharacterTrajectories",
    "speech-commands": "Speech Commands, 10 words",
}
INPUTS = {
    "mnist5k": ("sequence", "permuted sequence", "image 28 x 28"),
    "mnist": ("sequence", "permuted sequence", "image 28 x 28"),
    "cifar10": ("sequence", "permuted sequence", "image 32 x 32"),
}


# Fields of a recipe that change series.
_SERIES_CHANGES = ("jitter", "scaling", "time_shift", "time_mask")


@dataclasses.dataclass(frozen=True)
class Parts:
    """Samples to learn from and to choose by, on the CPU, float32: pictures (N, C, H, W) or sequences (N, C, L).

    ``validation`` is None where there is nothing to choose by. ``split`` is a sentence about where it comes from.
    ``mean`` and ``std`` of every channel are given where the data are the user's own: networks know those of the
    published sets. ``place`` is the folder that was read, None for data out of a package.
    """

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor] | None
    classes: tuple[str, ...]
    split: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    place: Path | None = None
    notes: tuple[str, ...] = ()


class ArrayData:
    """Batches of arrays, this process's share of them; see :class:`~smpconv_zoo.training.batches.TrainingData`.

    One generator on the device, of the recipe's seed, draws the order of an epoch and then the augmentation of all its
    samples, epoch after epoch. Every process draws the same and takes its share of every step. Samples that fill no
    step are left out of that epoch.

    Args:
        recipe: The run.
        parts: What it learns from and chooses by.
        world: This process among those that train together.

    Raises:
        ValueError: A batch that cannot be shared or is larger than the data, a class without samples, one class alone,
            or what the recipe asks for and these data have not.
    """

    def __init__(self, recipe: SequenceRecipe, parts: Parts, world: World) -> None:
        _check_recipe(recipe)
        self.recipe = recipe
        self.parts = parts
        self.world = world
        shares = world.size * recipe.micro_batches
        if recipe.batch_size % shares:
            raise ValueError(
                f"a batch of {recipe.batch_size} cannot be shared evenly by {world.size} processes in "
                f"{recipe.micro_batches} micro_batches each: make batch_size a multiple of {shares}"
            )
        _check_parts(recipe, parts)
        device = world.device
        self._images, self._labels = (tensor.to(device) for tensor in parts.train)
        self._validation = None
        if parts.validation is not None:
            # Sample r, r + size, ... for process r: over all processes each is there once.
            self._validation = tuple(tensor[world.rank :: world.size].to(device) for tensor in parts.validation)
        self.permutation: np.ndarray | None = None
        if recipe.permutation_seed is not None:
            self.permutation = pixel_permutation(recipe.permutation_seed, n=self._images[0, 0].numel())
        self._order_of_pixels = None if self.permutation is None else torch.from_numpy(self.permutation).to(device)
        self._generator = torch.Generator(device)
        self._epoch = 0
        # States of the generator before the draws of this epoch and behind them, None while they are to come.
        self._before = self._generator.get_state()
        self._behind: Tensor | None = None
        self._go_to_the_start()

    @property
    def samples(self) -> int:
        """Samples to learn from, those included that an epoch leaves out."""
        return len(self._labels)

    @property
    def batches(self) -> int:
        """Micro-batches in an epoch of this process; of the authors' protocol the last one may be smaller."""
        steps, left = divmod(self.samples, self.recipe.batch_size)
        if left and self.recipe.protocol == "reference" and self.world.size == self.recipe.micro_batches == 1:
            return steps + 1
        return steps * self.recipe.micro_batches

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        return self.parts.classes

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input, ``(C, L)`` or ``(C, H, W)``."""
        return tuple(self._as_input(self._images[:1]).shape[1:])

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Micro-batches of an epoch, from number ``start`` on: inputs ``(N, ...)`` and labels ``(N,)``.

        Part p of the M that process r of S takes of a step are the samples from ``(r * M + p) * N`` on.
        """
        order, images = self._draw(epoch)
        recipe, world = self.recipe, self.world
        size = recipe.batch_size // (world.size * recipe.micro_batches)

        def take() -> Iterator[tuple[Tensor, Tensor]]:
            for number in range(start, self.batches):
                step, part = divmod(number, recipe.micro_batches)
                first = step * recipe.batch_size + (world.rank * recipe.micro_batches + part) * size
                index = order[first : first + size]
                yield self._as_input(images[index]), self._labels[index]

        return take()

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The samples to choose by, every ``size``-th from the rank on, in batches of at most the recipe's size."""
        if self._validation is None:
            return
        images, labels = self._validation
        for start in range(0, len(labels), self.recipe.batch_size):
            at = slice(start, start + self.recipe.batch_size)
            yield self._as_input(images[at]), labels[at]

    def describe(self) -> dict[str, Any]:
        """What the plan says: counts, classes, split, where the files lie."""
        parts = self.parts
        counts = parts.train[1].bincount(minlength=len(parts.classes)).tolist()
        return {
            "data": self.recipe.data,
            "place": None if parts.place is None else str(parts.place),
            "protocol": self.recipe.protocol,
            "split": parts.split,
            "train": self.samples,
            "validation": 0 if parts.validation is None else len(parts.validation[1]),
            "classes": len(parts.classes),
            "train_per_class": [min(counts), max(counts)],
            "shape": list(self.shape),
            "notes": list(parts.notes),
        }

    def cfg_entries(self) -> dict[str, Any]:
        """Entries of a network's ``pretrained_cfg`` by which predictions read files as this run did.

        Input size and names of classes; of the user's own data also the mean and the deviation of every channel.
        """
        channels, *extent = self.shape
        entries: dict[str, Any] = {
            "input_size": (channels, *extent) if len(extent) == 2 else (channels, 1, *extent),
            "num_classes": len(self.classes),
            "label_names": list(self.classes),
        }
        if self.parts.mean is not None and self.parts.std is not None:
            entries |= {"mean": self.parts.mean, "std": self.parts.std}
        return entries

    def check(self, model: nn.Module) -> tuple[str, ...]:
        """Hold a network made by its entrypoint against the data, before the first step.

        Returns:
            Sentences about what does not forbid the run, and should be known.

        Raises:
            ValueError: Other channels or classes, images of another size, or sequences shorter than the network's.
        """
        net: Any = model
        channels, *extent = self.shape
        if net.in_chans != channels:
            raise ValueError(
                f"{self.recipe.data} has {channels} channels, {self.recipe.network} takes {net.in_chans}: set "
                f"arguments={{in_chans: {channels}}}"
            )
        if net.num_classes != len(self.classes):
            raise ValueError(
                f"{self.recipe.data} has {len(self.classes)} classes, {self.recipe.network} tells {net.num_classes} "
                f"apart: set arguments={{num_classes: {len(self.classes)}}}"
            )
        if len(extent) == 2:
            own = list(sample_shape(model)[1:])
            if own != extent:
                size = " x ".join(map(str, extent))
                raise ValueError(
                    f"the images of {self.recipe.data} have {size} pixels, {self.recipe.network} is made for "
                    f"{' x '.join(map(str, own))}: set arguments={{img_size: {extent[0]}}}"
                )
            return ()
        reach = max((kernel[0] for kernel in _kernel_sizes(model)), default=extent[0])
        if reach > extent[0]:
            raise ValueError(
                f"the sequences of {self.recipe.data} have {extent[0]} steps, the kernels of {self.recipe.network} "
                f"{reach}: set arguments={{kernel_size: {extent[0]}}} for new kernels, or {{length: {extent[0]}}} to "
                "read the same ones off at fewer"
            )
        if reach < extent[0]:
            return (f"sequences of {extent[0]} steps are seen through kernels of {reach}",)
        return ()

    def state_dict(self) -> dict[str, Any]:
        """The epoch under way, and the generator before its draws and behind them."""
        return {
            "epoch": self._epoch,
            "device": self.world.device.type,
            "before": self._before.clone(),
            "behind": None if self._behind is None else self._behind.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to the start of the epoch of :meth:`state_dict`."""
        if state["device"] != self.world.device.type:
            # Generators of other kinds of devices draw otherwise, and have states of other forms.
            self._go_to_the_start()
            return
        self._epoch, self._before, self._behind = state["epoch"], state["before"].cpu(), state["behind"]
        if self._behind is not None:
            self._behind = self._behind.cpu()

    def _go_to_the_start(self) -> None:
        self._epoch = 0
        self._before = self._generator.manual_seed(self.recipe.seed).get_state()
        self._behind = None

    def _draw(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Order and samples of an epoch; those before it are drawn as well, unless they were just now."""
        if epoch < self._epoch:
            self._go_to_the_start()
        if epoch > self._epoch and self._behind is not None:
            self._epoch, self._before, self._behind = self._epoch + 1, self._behind, None
        while True:
            self._generator.set_state(self._before)
            order = torch.randperm(self.samples, device=self.world.device, generator=self._generator)
            images = self._augmented()
            self._behind = self._generator.get_state()
            if self._epoch == epoch:
                return order, images
            self._epoch, self._before, self._behind = self._epoch + 1, self._behind, None

    def _augmented(self) -> Tensor:
        recipe = self.recipe
        changes = {name: getattr(recipe, name) for name in _SERIES_CHANGES}
        if any(changes.values()):
            return augment_series(self._images, self._generator, masked=recipe.dropped > 0, **changes)
        if not recipe.augment:
            return self._images
        if recipe.data == "cifar10":
            black = -torch.tensor(IMAGENET_DEFAULT_MEAN) / torch.tensor(IMAGENET_DEFAULT_STD)
            return augment_pictures(self._images, black, self._generator)
        return augment_digits(self._images, self._generator)

    def _as_input(self, x: Tensor) -> Tensor:
        return pixels_as_input(x, self.recipe.input, self._order_of_pixels)


def pixels_as_input(x: Tensor, form: str, permutation: Tensor | None) -> Tensor:
    """Samples ``(N, C, ...)`` as a recipe's ``input`` has them: as they are, or row by row in a permutation's order."""
    if form.startswith("image"):
        return x
    sequences = x.flatten(2)
    return sequences if permutation is None else sequences[:, :, permutation]


def open_arrays(
    recipe: SequenceRecipe,
    world: World,
    data_dir: Path | None = None,
    download: bool = False,
    final: bool = False,
    progress: Progress | None = None,
    on_note: Callable[[str], None] | None = None,
) -> ArrayData:
    """The data of a recipe, read, checked and on the device of this process.

    Args:
        recipe: The run.
        world: This process among those that train together; one of them downloads.
        data_dir: The user's folder with the data; digits out of a package need none.
        download: Whether to fetch data that are not in ``data_dir``, where no login is needed.
        final: Whether everything is chosen: learn from what was chosen by as well, and choose by nothing.
        progress: Called with the files read and in all, where there are many.
        on_note: Called with what a user should know of data that are fetched.

    Raises:
        FileNotFoundError: The data are not there; the message says how to get them.
        ValueError: They are not what they should be, or see :class:`ArrayData`.
        ImportError: A package that takes part is not installed.
    """
    if download and world.size > 1:
        if world.leads:
            _find(recipe, data_dir, download, on_note)
        world.wait()
    parts = load_parts(recipe, data_dir, download and world.size == 1, final, progress, on_note)
    return ArrayData(recipe, parts, world)


def load_parts(
    recipe: SequenceRecipe,
    data_dir: Path | None = None,
    download: bool = False,
    final: bool = False,
    progress: Progress | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Parts:
    """The samples of a recipe, in memory; see :func:`open_arrays`."""
    _check_recipe(recipe)
    if final and recipe.protocol == "reference":
        raise ValueError(
            "protocol reference chooses by the test part, there is no final run to come: leave final out, or set "
            "protocol=sound"
        )
    return _LOADERS[recipe.data](_Request(recipe, _find(recipe, data_dir, download, on_note), final, progress))


@dataclasses.dataclass(frozen=True)
class _Request:
    """What a loader is asked for; ``place`` is the folder of the data, empty for those out of a package."""

    recipe: SequenceRecipe
    place: Path
    final: bool
    progress: Progress | None

    @property
    def reference(self) -> bool:
        return self.recipe.protocol == "reference"


_TEST_CHOOSES = "chosen by the test part, as the authors do: its accuracy is no estimate"
_FINAL = "final: learns from what was chosen by as well, chooses by nothing; the test part stays closed"


def _find(recipe: SequenceRecipe, data_dir: Path | None, download: bool, on_note: Callable[[str], None] | None) -> Path:
    if recipe.data in _BUILT_IN:
        return Path()
    command = f"smpconv-zoo train {recipe.id} --data-dir PATH"
    if recipe.data == "series":
        if data_dir is None:
            raise FileNotFoundError(
                f"{recipe.id} learns from sequences of your own, no folder was given: run `{command}`, PATH being a "
                "folder with a folder of .csv and .npy files for every class, or with train/ and val/ of such"
            )
        return data_dir.expanduser()
    name = NAMES[recipe.data]
    need = f"{recipe.id} learns from {name}"
    return find_data_set(name, data_dir, download, need, command, on_note=on_note)


def _mnist5k(request: _Request) -> Parts:
    classes = class_names("mnist5k") or ()
    if request.final:
        return Parts(mnist5k_images("train+validation"), None, classes, _FINAL)
    if request.reference:
        return Parts(mnist5k_images("train+validation"), mnist5k_images("test"), classes, _TEST_CHOOSES)
    split = "chosen by the 500 digits of the validation part; the test part stays closed"
    return Parts(mnist5k_images("train"), mnist5k_images("validation"), classes, split)


def _mnist1d(request: _Request) -> Parts:
    parts = _published(request, lambda _: mnist1d_sequences("train"), lambda _: mnist1d_sequences("test"))
    return dataclasses.replace(parts, place=None, notes=("procedural data, drawn from a seed: no recordings",))


def _ucr(request: _Request) -> Parts:
    found = load_ucr(request.recipe.data, request.recipe.dropped)
    parts = _published(request, lambda _: found.train, lambda _: found.test)
    return dataclasses.replace(parts, place=None, mean=found.mean, std=found.std)


def _mnist(request: _Request) -> Parts:
    return _published(request, mnist_train, mnist_test)


def _cifar10(request: _Request) -> Parts:
    return _published(request, cifar10_train, cifar10_test)


def _published(
    request: _Request,
    train: Callable[[Path], tuple[Tensor, Tensor]],
    test: Callable[[Path], tuple[Tensor, Tensor]],
) -> Parts:
    """A set that comes in a training and a test part."""
    recipe, place = request.recipe, request.place
    classes = class_names(NAMES.get(recipe.data, recipe.data)) or ()
    x, y = train(place)
    if request.reference:
        return Parts((x, y), test(place), classes, _TEST_CHOOSES, place=place)
    if request.final:
        return Parts((x, y), None, classes, _FINAL, place=place)
    if recipe.held_out == 0:
        return Parts((x, y), None, classes, "nothing is set aside to choose by: the last epoch counts", place=place)
    try:
        drawn = hold_out(y, recipe.held_out, np.random.RandomState(recipe.held_out_draw))
    except ValueError as error:
        raise ValueError(f"{recipe.data if place == Path() else place}: {error}") from error
    learned, chosen = map(torch.from_numpy, drawn)
    split = (
        f"chosen by {100 * recipe.held_out:g} % of every class of the training part, set aside; the test part stays "
        "closed"
    )
    return Parts((x[learned], y[learned]), (x[chosen], y[chosen]), classes, split, place=place)


def _trajectories(request: _Request) -> Parts:
    series, labels = read_ts_parts(request.place, "CharacterTrajectories")
    try:
        parts = character_trajectories(series, labels, request.recipe.dropped)
    except ValueError as error:
        raise ValueError(f"the series in {request.place} are not those of CharacterTrajectories: {error}") from error
    return _pooled(request, parts, tuple(labels_by_first_appearance(labels)[1]), ())


def _speech(request: _Request) -> Parts:
    recipe = request.recipe
    wanted = ("train", "test" if request.reference else "validation")
    parts = speech_commands_parts(
        request.place,
        recipe.features == "mfcc",
        wanted,
        recipe.dropped,
        progress=request.progress,
        protocol=recipe.protocol,
    )
    return _pooled(request, parts, WORDS, (clip_order(request.place, recipe.protocol),))


def _pooled(
    request: _Request, parts: dict[str, tuple[Tensor, Tensor]], classes: tuple[str, ...], notes: tuple[str, ...]
) -> Parts:
    """A set that is split 70 / 15 / 15 here."""
    place = request.place
    if request.reference:
        return Parts(parts["train"], parts["test"], classes, _TEST_CHOOSES, place=place, notes=notes)
    train, validation = parts["train"], parts["validation"]
    if request.final:
        both = (torch.cat([train[0], validation[0]]), torch.cat([train[1], validation[1]]))
        return Parts(both, None, classes, _FINAL, place=place, notes=notes)
    split = "chosen by the validation part of 70 / 15 / 15; the test part stays closed"
    return Parts(train, validation, classes, split, place=place, notes=notes)


def _series(request: _Request) -> Parts:
    recipe = request.recipe
    channels = recipe.arguments.get("in_chans")
    if channels is not None and recipe.dropped > 0:
        # One of them is the mask.
        channels -= 1
    found = load_series(request.place, channels, recipe.held_out, recipe.dropped, request.progress)
    notes = []
    shortest, longest = found.lengths
    if shortest < longest:
        notes.append(
            f"sequences of {shortest} to {longest} steps: shorter ones are lengthened by repeating their last value; "
            "do the same before you predict"
        )
    if found.passed_over:
        notes.append(f"{found.passed_over} files of other kinds than .csv and .npy are passed over")
    train, validation, split = found.train, found.validation, found.split
    if request.final and validation is not None:
        train, validation = (torch.cat([train[0], validation[0]]), torch.cat([train[1], validation[1]])), None
        split = _FINAL
    return Parts(train, validation, found.classes, split, found.mean, found.std, request.place, tuple(notes))


# Data that come with a package, or with none at all.
_BUILT_IN: dict[str, Callable[[_Request], Parts]] = {
    "mnist5k": _mnist5k,
    "mnist1d": _mnist1d,
    **dict.fromkeys(UCR_SETS, _ucr),
}
_LOADERS: dict[str, Callable[[_Request], Parts]] = {
    **_BUILT_IN,
    "mnist": _mnist,
    "cifar10": _cifar10,
    "character-trajectories": _trajectories,
    "speech-commands": _speech,
    "series": _series,
}


def _check_recipe(recipe: SequenceRecipe) -> None:
    """What a recipe asks for has to be something that its data have."""
    inputs = INPUTS.get(recipe.data, ("sequence",))
    pictures = recipe.data in INPUTS
    if recipe.input not in inputs:
        raise ValueError(f"{recipe.data} is taken as {', '.join(inputs)}, not as {recipe.input}")
    if recipe.augment and not pictures:
        raise ValueError(f"augment changes pictures, and {recipe.data} holds none: set augment=false")
    changes = [name for name in _SERIES_CHANGES if getattr(recipe, name) > 0]
    if changes and pictures:
        raise ValueError(f"{', '.join(changes)} change series, and {recipe.data} holds pictures: set them to 0")
    if recipe.dropped and (pictures or recipe.data == "mnist1d"):
        raise ValueError(f"samples are dropped from sequences that were recorded, not from {recipe.data}")
    if (recipe.data == "speech-commands") != (recipe.features is not None):
        raise ValueError("speech-commands needs features, mfcc or raw; other data have none")


def _check_parts(recipe: SequenceRecipe, parts: Parts) -> None:
    (x, y), classes = parts.train, parts.classes
    if len(x) < recipe.batch_size:
        raise ValueError(
            f"a batch of {recipe.batch_size} is larger than the {len(x)} samples to learn from: lower batch_size"
        )
    counts = y.bincount(minlength=len(classes))
    if len(counts) > len(classes):
        raise ValueError(f"{recipe.data} has labels up to {len(counts) - 1} for {len(classes)} classes")
    missing = [classes[i] for i in (counts == 0).nonzero()[:, 0].tolist()]
    if len(missing) >= len(classes) - 1:
        raise ValueError(
            f"{recipe.data}: all {len(y)} samples to learn from are of one class, there is nothing to tell"
        )
    if missing:
        raise ValueError(f"{recipe.data}: there is nothing to learn from of class {', '.join(missing)}")
    if not x.isfinite().all():
        raise ValueError(f"{recipe.data} holds NaN or Inf once normalised: a step without two observed values?")


def _kernel_sizes(model: nn.Module) -> list[tuple[int, ...]]:
    """Of the continuous kernels."""
    return [module.kernel_size for module in model.modules() if isinstance(module, SMPConv1d)]
