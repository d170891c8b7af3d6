"""Pictures as batches to learn from: read by worker processes, augmented by timm, normalised and mixed on the device.

Every draw has its own seed. The order of an epoch hangs on (seed, epoch); crop, flips, colours and erased part of a
picture on (seed, epoch, picture); mixup and CutMix on (seed, epoch, place in the epoch). So a batch is the same however
many worker processes read and wherever in the epoch reading began; and the pictures of a step are the same however many
processes train. They are mixed in the same way, too, if the share of each is a multiple of 8, but for the protocol
``reference``, by which every process mixes all of its share at one strength. The generators that the training process
draws from are left as they are.

Every kind of data set of :mod:`smpconv_zoo.data.folders` is read picture by picture, shards too: an epoch that begins
in its middle reads nothing of what came before.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import random
import re
import signal
import threading
import traceback
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_transform, resolve_data_config
from timm.data.auto_augment import posterize
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from smpconv_zoo.data.folders import Pictures, PictureSet, check_labels, read_picture
from smpconv_zoo.data.protocol import hold_out
from smpconv_zoo.training.recipe import STREAM_FIELDS, ImageRecipe
from smpconv_zoo.training.world import World

__all__ = ["ImageData", "transformed", "worker_death"]

# What a seed is drawn for.
_ORDER, _PICTURE, _ERASING, _MIXING, _HOLDING_OUT = range(5)
# Pictures that are mixed with each other, and by the same share. Few enough to divide the share of any process, so that
# mixing does not depend on how many there are.
_MIXED_TOGETHER = 8


class ImageData:
    """Batches of pictures, this process's share of them; see :class:`~smpconv_zoo.training.batches.TrainingData`.

    Inputs are ``(N, C, H, W)`` float32, normalised as the network's ``pretrained_cfg`` says. Targets are labels
    ``(N,)``, or with mixup or CutMix ``(N, classes)``, smoothed. Pictures that fill no optimizer step are left out,
    others in every epoch.

    What is chosen by (:meth:`validation`) hangs on the protocol. ``reference`` learns from the whole training part and
    measures on the validation part, as the authors do. ``sound`` never looks at the validation part of ImageNet, on
    which results are published: a share ``held_out`` of the training pictures, of every class alike, is chosen by and
    not learned from. Of other pictures it takes the validation part, or holds out if there is none.

    One epoch at a time: to begin one ends the one under way.

    Args:
        recipe: The run.
        pictures: What to learn from.
        model: The network: input size, normalisation, classes.
        world: This process among those that train together.
        workers: Processes that read, at most one for each CPU; with 0 it is this process that reads.

    Raises:
        ValueError: Classes that do not fit the network, a batch that cannot be shared or that is larger than the data,
            or an augmentation that there is not.
    """

    def __init__(
        self, recipe: ImageRecipe, pictures: Pictures, model: nn.Module, world: World, *, workers: int = 4
    ) -> None:
        check_labels(pictures, getattr(model, "num_classes", None))
        if unused := [field for field in STREAM_FIELDS if getattr(recipe, field) is not None]:
            raise ValueError(f"{', '.join(unused)}: of a stream alone, and {pictures.where} is none")
        self._prepare(recipe, model, world, workers, len(pictures.classes))
        self.pictures = pictures
        self._train, (chosen_from, self._validation, self._chosen_by) = _parts(recipe, pictures, self._seed)
        if len(self._train) < recipe.batch_size:
            raise ValueError(
                f"{len(self._train):,} training pictures fill no step of {recipe.batch_size}: lower batch_size"
            )
        self.batches = len(self._train) // recipe.batch_size * recipe.micro_batches
        self._samples = _Samples(pictures.train, self._augment, *self._form, self._seed)
        self._validation_samples = _Samples(chosen_from, self._centre, *self._form, None)
        shape = (len(self._train) // recipe.batch_size, world.size, recipe.micro_batches, self.share)
        self._sampler = _EpochSampler(pictures.train, self._train, self._seed, shape, world.rank)

    def close(self) -> None:
        """End the processes that read; the next epoch starts others."""
        self._loaders.clear()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The micro-batches of an epoch, from number ``start`` on.

        Raises:
            ValueError: A picture that cannot be read, by name; nothing is left out silently.
            ChildProcessError: A process that reads died.
        """
        if not 0 <= start <= self.batches:
            raise ValueError(f"an epoch has batches 0 to {self.batches}, got {start}")
        self._sampler.enter(epoch, start)
        batches = zip(self._read("train"), self._sampler, strict=True)
        for number, ((x, y), keys) in enumerate(batches, start):
            yield x, self._finish(x, y, keys, epoch, number)

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The pictures to choose by, every ``size``-th from the rank on, at the centre of each.

        Raises:
            ValueError: A picture that cannot be read, by name.
            ChildProcessError: A process that reads died.
        """
        yield from self._read("validation")

    def describe(self) -> dict[str, Any]:
        """Where the pictures lie, how many there are, and which are learned from and chosen by."""
        counts = np.bincount(self.pictures.train.labels[self._train], minlength=len(self.pictures.classes))
        return {
            "where": self.pictures.where,
            "kind": self.pictures.kind,
            "classes": len(self.pictures.classes),
            "training": len(self._train),
            "smallest class": int(counts.min()),
            "largest class": int(counts.max()),
            "validation": len(self._validation),
            "chosen by": self._chosen_by,
            "input": list(self.input_size),
            "workers": self.workers,
        }

    def state_dict(self) -> dict[str, Any]:
        """What tells these pictures from others: sha256 of names, labels and choice."""
        digest = hashlib.sha256(self.pictures.train.names())
        for numbers in (self.pictures.train.labels, self._train):
            digest.update(numbers.tobytes())
        return {"pictures": digest.hexdigest()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that the pictures are those of :meth:`state_dict`.

        Raises:
            ValueError: They are others: another epoch than the one that was begun would come of them.
        """
        if state and state != self.state_dict():
            raise ValueError(
                f"{self.pictures.where} does not hold the training pictures that this run began with: go on with "
                "those, or start another run"
            )

    def _prepare(self, recipe: ImageRecipe, model: nn.Module, world: World, workers: int, classes: int) -> None:
        """All that does not hang on where the pictures lie."""
        if workers < 0:
            raise ValueError(f"workers must be 0 or more, got {workers}")
        shares = world.size * recipe.micro_batches
        if recipe.batch_size % shares:
            raise ValueError(
                f"a batch of {recipe.batch_size} cannot be shared evenly by {world.size} processes in "
                f"{recipe.micro_batches} micro_batches each: make batch_size a multiple of {shares}"
            )
        self.recipe = recipe
        self.world = world
        self.workers = min(workers, _cpus())
        self.share = recipe.batch_size // shares
        self._seed = recipe.seed % 2**63
        config = resolve_data_config({"img_size": recipe.image_size, "crop_pct": recipe.crop}, model=model)
        channels = int(getattr(model, "in_chans", config["input_size"][0]))
        if channels not in (1, 3):
            raise ValueError(f"a picture has 1 or 3 channels, the network takes {channels}")
        self.input_size = (channels, *config["input_size"][1:])
        mean, std = (_per_channel(config[name], channels) for name in ("mean", "std"))
        self._normalise = {"mean": mean, "std": std, "channels": channels, "device": world.device}
        # ImageNet is learned and measured as its files are stored: a few are tagged as turned.
        self._form = ("RGB" if channels == 3 else "L", recipe.data != "imagenet")
        self._augment = _augmentation(recipe, self.input_size, mean)
        self._centre = create_transform(
            self.input_size,
            interpolation=config["interpolation"],
            crop_pct=config["crop_pct"],
            crop_mode=config["crop_mode"],
            use_prefetcher=True,
        )
        self._erasing = RandomErasing(recipe.erasing, mode="pixel", device=world.device) if recipe.erasing else None
        self._mixup = _mixup(recipe, int(getattr(model, "num_classes", classes)), self.share)
        # The authors mix a whole part of a process at one strength.
        together = self.share if recipe.protocol == "reference" else _MIXED_TOGETHER
        self._mixed_together = math.gcd(self.share, together)
        self._loaders: dict[str, PrefetchLoader] = {}

    def _finish(self, x: Tensor, y: Tensor, keys: Iterable[tuple[int, ...]], epoch: int, number: int) -> Tensor:
        """Erase and mix pictures in place, by what hangs on their keys and on the place of the batch; gives labels."""
        with _traceless(self.world.device):
            self._erase(x, keys)
            return self._mix(x, y, epoch, number)

    def _erase(self, x: Tensor, keys: Iterable[tuple[int, ...]]) -> None:
        """Erase a rectangle of some pictures, in place."""
        if self._erasing is None:
            return
        for picture, key in zip(x, keys, strict=True):
            _reseed(self.world.device, self._seed, _ERASING, *key)
            self._erasing(picture)

    def _mix(self, x: Tensor, y: Tensor, epoch: int, number: int) -> Tensor:
        """Mix pictures in place; gives their mixed labels."""
        if self._mixup is None:
            return y
        place = _place(number, self.world.rank, self.world.size, self.recipe.micro_batches, self.share)
        step, first = divmod(place, self.recipe.batch_size)
        targets = []
        for start in range(0, len(x), self._mixed_together):
            together = slice(start, start + self._mixed_together)
            _reseed(None, self._seed, _MIXING, epoch, step, first + start)
            targets.append(self._mixup(x[together], y[together])[1])
        return torch.cat(targets)

    def _read(self, part: str) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of a part, on the device; the next one is on its way there while one is used."""
        if part not in self._loaders:
            self._loaders[part] = PrefetchLoader(self._loader(part), **self._normalise)
        batches = iter(self._loaders[part])
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (ValueError, RuntimeError, OSError, EOFError) as error:
                # Torch's frames keep the error that they raise, in a circle, and with it the processes that read.
                traceback.clear_frames(error.__traceback__)
                if isinstance(error, ValueError):
                    # From a process it comes with its whole traceback as its text; what it says is in the last line.
                    said = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
                    raise ValueError(said) from error
                # The other processes are of no use any more.
                del self._loaders[part]
                reason = worker_death(error)
                if reason is None:
                    raise
                raise ChildProcessError(reason) from error
            yield batch

    def _loader(self, part: str) -> DataLoader[Any]:
        workers, samples, batches = self.workers, self._samples, cast(Any, self._sampler)
        if part == "validation":
            mine = self._validation[self.world.rank :: self.world.size].tolist()
            batches = [[(0, i) for i in mine[first : first + self.share]] for first in range(0, len(mine), self.share)]
            workers, samples = min(self.workers, len(batches)), self._validation_samples
        # Those that read the validation part would be in the way for most of the time.
        return self._batched(
            samples, workers, batch_sampler=batches, persistent_workers=part == "train" and workers > 0
        )

    def _batched(self, samples: Dataset[Any], workers: int, seed: int = 0, **batching: Any) -> DataLoader[Any]:
        # The loader draws a number for its workers: not from the training process's generator.
        generator = torch.Generator()
        generator.manual_seed(seed)
        return DataLoader(
            samples,
            num_workers=workers,
            collate_fn=fast_collate,
            pin_memory=self.world.device.type == "cuda",
            worker_init_fn=_begin_worker,
            generator=generator,
            **batching,
        )


def worker_death(error: Exception) -> str | None:
    """What to tell the user of an error by which torch reports the death of a process that reads; None for others.

    torch may raise it wherever the training process is at that moment, not in the loader alone.
    """
    text = str(error)
    found = re.search(r"DataLoader worker \(pid\S* ([\d, ]+)\) (?:is )?([^.]+)", text)
    if found is not None:
        what = f"a process that reads pictures died (pid {found[1]}, {found[2].strip()})"
    elif "</torch_" in text or isinstance(error, (ConnectionError, EOFError)):
        what = f"a process that reads pictures could not hand over a batch ({text or type(error).__name__})"
    else:
        return None
    return (
        f"{what}: most often the machine is out of memory or of shared memory (/dev/shm); use fewer workers, and go on "
        "by --resume"
    )


class _Samples(Dataset[Any]):
    """Pictures by (epoch, number): uint8 ``(C, H, W)`` and label."""

    def __init__(self, pictures: PictureSet, transform: Any, mode: str, upright: bool, seed: int | None) -> None:
        self.pictures = pictures
        self.transform = transform
        self.mode = mode
        self.upright = upright
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        picture = read_picture(self.pictures, key[1], self.mode, self.upright)
        drawn = None if self.seed is None else (self.seed, *key)
        return transformed(picture, self.transform, drawn), int(self.pictures.labels[key[1]])


def transformed(picture: Image.Image, transform: Any, key: tuple[int, ...] | None) -> Tensor:
    """A picture as bytes ``(C, H, W)``: what is drawn for it hangs on ``key`` alone, and no generator is moved."""
    with _traceless():
        if key is not None:
            _reseed(None, key[0], _PICTURE, *key[1:])
        return transform(picture)


class _EpochSampler(Sampler[list[tuple[int, int]]]):
    """(epoch, number of the picture) of the samples of every micro-batch of this process, in the epoch entered last.

    By these keys workers that live on hear of a new epoch. Nothing here leads back to the loader: processes that end
    when garbage is collected, and not when their loader goes, take seconds for it.

    Args:
        pictures: The training part.
        indices: Those of it to learn from.
        seed: Of the order.
        shape: Steps of an epoch, processes, micro-batches of each, pictures of a micro-batch.
        rank: Of this process.
    """

    def __init__(
        self, pictures: PictureSet, indices: np.ndarray, seed: int, shape: tuple[int, int, int, int], rank: int
    ) -> None:
        self.pictures = pictures
        self.indices = indices
        self.seed = seed
        self.shape = shape
        self.rank = rank
        self.epoch = self.start = 0

    def enter(self, epoch: int, start: int) -> None:
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        steps, _, parts, _ = self.shape
        return steps * parts - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = self.pictures.order(self.indices, _draw(self.seed, _ORDER, self.epoch))
        for number in range(self.start, self.start + len(self)):
            first = _place(number, self.rank, *self.shape[1:])
            yield [(self.epoch, int(index)) for index in order[first : first + self.shape[-1]]]


def _place(number: int, rank: int, processes: int, parts: int, share: int) -> int:
    """Place in the order of the epoch at which a micro-batch of a process begins."""
    step, part = divmod(number, parts)
    return ((step * processes + rank) * parts + part) * share


def _begin_worker(number: int) -> None:
    """What the user stops is the run, which ends its readers itself, after it has saved.

    Ctrl-C goes to all processes of a terminal, and the end of a job on a cluster to all of the job.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()


def _obey(run: int) -> None:
    """End by a SIGTERM, if it comes from the run."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != run:
        pass
    os._exit(0)


# ----------------------------------------------------------------------------------------------------------- randomness


def _draw(*key: int) -> np.random.RandomState:
    # Of all of numpy's generators this is the one whose streams are promised not to change.
    return np.random.RandomState(np.random.SeedSequence(key).generate_state(8))


def _reseed(device: torch.device | None, *key: int) -> None:
    """Seed Python's, numpy's and torch's generators of the CPU, and of ``device`` that of a GPU."""
    words = np.random.SeedSequence(key).generate_state(10)
    number = int(words[8]) << 32 | int(words[9])
    random.seed(number)
    np.random.seed(words[:8])
    # Not torch.manual_seed, which looks for GPUs, in worker processes too.
    torch.default_generator.manual_seed(number)
    if device is not None and device.type == "cuda":
        _gpu_generator(device).manual_seed(number)


@contextlib.contextmanager
def _traceless(device: torch.device | None = None) -> Iterator[None]:
    """Whatever is drawn or seeded within, all generators go on afterwards as if nothing had been."""
    gpu = _gpu_generator(device) if device is not None and device.type == "cuda" else None
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpu_state = None if gpu is None else gpu.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if gpu is not None and gpu_state is not None:
            gpu.set_state(gpu_state)


def _gpu_generator(device: torch.device) -> torch.Generator:
    number = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[number]


# ---------------------------------------------------------------------------------------------------- parts, transforms


def _parts(recipe: ImageRecipe, pictures: Pictures, seed: int) -> tuple[np.ndarray, tuple[PictureSet, np.ndarray, str]]:
    """Pictures to learn from; and of which set, which and called what, those to choose by."""
    everything = np.arange(len(pictures.train.labels))
    published = recipe.data == "imagenet" and recipe.protocol == "sound"
    if pictures.validation is not None and not published:
        whole = np.arange(len(pictures.validation.labels))
        return everything, (pictures.validation, whole, "the validation part")
    if recipe.protocol == "reference" or recipe.held_out == 0:
        return everything, (pictures.train, everything[:0], "nothing")
    draw = _draw(seed, _HOLDING_OUT)
    rest, chosen = hold_out(pictures.train.labels, recipe.held_out, draw, keep_single=True)
    return rest, (pictures.train, chosen, f"{recipe.held_out:.0%} of the training part, held out by class")


def _augmentation(recipe: ImageRecipe, input_size: tuple[int, ...], mean: tuple[float, ...]) -> Any:
    if recipe.auto_augment is not None and input_size[0] != 3:
        raise ValueError("auto_augment needs colours, and the network takes one channel: set auto_augment=null")
    try:
        transform = create_transform(
            input_size,
            is_training=True,
            scale=tuple(recipe.scale),
            ratio=tuple(recipe.ratio),
            hflip=recipe.hflip,
            vflip=recipe.vflip,
            color_jitter=recipe.color_jitter or None,
            auto_augment=recipe.auto_augment,
            interpolation=recipe.interpolation,
            mean=mean,
            # Pictures leave the workers as bytes; what comes after is done on the device.
            use_prefetcher=True,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(f"auto_augment {recipe.auto_augment!r} is no policy of timm's") from error
    for step in transform.transforms:
        for operation in getattr(step, "ops", chain.from_iterable(getattr(step, "policy", []))):
            if getattr(operation, "aug_fn", None) is posterize:
                operation.aug_fn = _posterize
    return transform


def _posterize(picture: Image.Image, bits: int, **arguments: Any) -> Image.Image:
    """timm's operation, which asks for 0 bits at its highest strength: black, until Pillow 13 refused it."""
    return posterize(picture, bits, **arguments) if bits > 0 else Image.new(picture.mode, picture.size)


def _mixup(recipe: ImageRecipe, classes: int, share: int) -> Mixup | None:
    if recipe.mixup == 0 and recipe.cutmix == 0:
        return None
    if share % 2:
        raise ValueError(f"mixup pairs the pictures of a batch: the {share} of a process are odd")
    return Mixup(
        mixup_alpha=recipe.mixup,
        cutmix_alpha=recipe.cutmix,
        prob=recipe.mixup_probability,
        switch_prob=recipe.mixup_switch_probability,
        label_smoothing=recipe.smoothing,
        num_classes=classes,
    )


def _cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels
