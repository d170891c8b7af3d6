"""The test part of the data that a card names, sample by sample, as the network takes it.

MNIST-1D is always at hand, MNIST-5k and the series of the UCR archive are where the package is installed that they come
with; the others lie in a folder of the user's. Nothing is downloaded unasked.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
from timm.data import create_transform, resolve_data_config
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from smpconv_zoo.data import pictures
from smpconv_zoo.data.fetching import Progress as FetchProgress
from smpconv_zoo.data.fetching import fetch
from smpconv_zoo.data.mnist1d import mnist1d_sequences
from smpconv_zoo.data.mnist5k import mnist5k_images, mnist5k_sequences
from smpconv_zoo.data.protocol import character_trajectories, permute_pixels, pixel_permutation
from smpconv_zoo.data.speech_commands import WORDS, SpeechCommandsTest, clip_order, speech_commands_parts
from smpconv_zoo.data.ts_files import read_ts_parts
from smpconv_zoo.data.ucr import UCR_SETS, load_ucr
from smpconv_zoo.pretrained.cards import CheckpointCard
from smpconv_zoo.pretrained.locate import load_weights
from smpconv_zoo.pretrained.store import CheckpointError

__all__ = [
    "TEST_PARTS",
    "EvaluationData",
    "batches",
    "dropped_share",
    "eval_command",
    "find_data_set",
    "open_test_set",
]

AFTER_TRAINING = "reference-after-training"
# How a test part is made. Only that of Speech Commands and that of permuted MNIST can be made in several ways.
TEST_PARTS = {
    "sound": "the same samples everywhere: clips are split in the order of their names, pixels come in the order that "
    "the network learned",
    "reference": "as the authors evaluate a checkpoint: clips are split in the order in which their directory lists "
    "them, or in that of a file clip_order.txt",
    AFTER_TRAINING: "as the authors' code tests at the end of a training run: pixels come in another order than the "
    "network learned, so that the accuracy means nothing",
}


@dataclasses.dataclass(frozen=True)
class EvaluationData:
    """A test part: ``samples[i]`` is (x, y), x float32 as the network takes it, y the number of the class.

    ``from_files`` says whether every sample is read from the disk when it is asked for, so that worker processes help.
    ``notes`` are sentences without which a figure measured on these samples would be misread. ``protocol`` is one of
    :data:`TEST_PARTS`: how the part was made.
    """

    samples: Dataset[Any]
    from_files: bool = False
    notes: tuple[str, ...] = ()
    protocol: str = "sound"

    def __len__(self) -> int:
        return len(self.samples)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class _OnDisk:
    """A data set that the user has, or not: ``what`` it is, and ``how`` to get it and what PATH is then.

    ``find`` gives the folder of it in or below the user's, None if it is not there. ``source`` is its name in
    :data:`~smpconv_zoo.data.sources.SOURCES`, None where a login is needed. ``part`` names what is measured on,
    where that is not cut out of the whole; ``samples`` counts it, as the authors have it.
    """

    what: str
    how: str
    samples: int
    find: Callable[[Path], Path | None]
    source: str | None = None
    part: str = ""


def open_test_set(
    card: CheckpointCard,
    data_dir: Path | None = None,
    download: bool = False,
    protocol: str = "sound",
    progress: FetchProgress | None = None,
    on_note: Callable[[str], None] | None = None,
    dropped: int | None = None,
) -> EvaluationData:
    """The test part of a card's data. Files are looked for and their form is checked; no network is loaded.

    Args:
        card: Of any checkpoint of the package.
        data_dir: The user's folder with the data; without it only built-in data are found.
        download: Whether to fetch data that are not in ``data_dir``, where no login is needed.
        protocol: How the part is made, see :data:`TEST_PARTS`.
        progress: Of a download; see :func:`~smpconv_zoo.data.fetching.fetch`, and ``on_note``.
        dropped: Percent of the time steps of each sequence that are left out, with the mask of the others as one more
            channel; as the card says if None.

    Raises:
        FileNotFoundError: The data are not there; the message says which are needed and how to get them.
        ValueError: They are not what they should be, could not be fetched, are of a kind or protocol that is not known
            here, or of one from which nothing is dropped.
        CheckpointError: The card's weights, which hold the order of its pixels, are not at hand.
        ImportError: A package that takes part is not installed.
    """
    key = (card.data.name, card.data.input)
    if protocol not in TEST_PARTS:
        raise ValueError(f"protocol must be one of {', '.join(TEST_PARTS)}, got {protocol!r}")
    if protocol == AFTER_TRAINING and key != ("MNIST", "permuted sequence"):
        raise ValueError(f"{AFTER_TRAINING} is for permuted MNIST, not for {card.id}: its test part is made in one way")
    share = dropped_share(card) if dropped is None else dropped
    if share != dropped_share(card) and key[0] in UCR_SETS:
        return EvaluationData(TensorDataset(*load_ucr(key[0], share).test), protocol=protocol)
    if share != dropped_share(card) and key not in _DROPPED_FORMS:
        recorded = ", ".join(dict.fromkeys(name for name, _ in _DROPPED_FORMS))
        raise ValueError(f"time steps are dropped from what was recorded, {recorded} or series, not from {key[0]}")
    if key in _BUILT_IN:
        return EvaluationData(_BUILT_IN[key](card), protocol=protocol)
    if key not in _FORMS:
        known = ", ".join(f"{name} as {form}" for name, form in [*_BUILT_IN, *_FORMS])
        raise ValueError(f"{card.id} needs {key[0]} as {key[1]}, which cannot be evaluated here; there are: {known}")
    source = _ON_DISK[card.data.name]
    what = source.part + source.what
    need = f"{card.id} is measured on {what}"
    place = find_data_set(card.data.name, data_dir, download, need, eval_command(card), progress, on_note)
    data = _DROPPED_FORMS[key](place, protocol, share) if share else _FORMS[key](card, place, protocol)
    data = dataclasses.replace(data, protocol=protocol)
    if not len(data):
        raise ValueError(f"{place} holds {what} without a single sample")
    if len(data) != source.samples:
        short = f"{place} gives {len(data):,} test samples, the authors have {source.samples:,}: not the same data"
        data = dataclasses.replace(data, notes=(*data.notes, short))
    return data


def dropped_share(card: CheckpointCard) -> int:
    """Percent of the time steps that are left out of what a card is about."""
    return _DROPPED.get(card.data.input, 0)


def find_data_set(
    name: str,
    data_dir: Path | None,
    download: bool,
    need: str,
    command: str,
    progress: FetchProgress | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Path:
    """The folder of a data set in or below the user's.

    Args:
        name: As cards call it.
        data_dir: The user's folder.
        download: Whether to fetch what is not there, where no login is needed.
        need: Who needs what: the beginning of the message if it is not there.
        command: What the user should run then; PATH in it stands for their folder.
        progress: See :func:`~smpconv_zoo.data.fetching.fetch`, and ``on_note``.

    Raises:
        FileNotFoundError: It is not there; the message says how to get it.
        ValueError: It could not be fetched.
    """
    source = _ON_DISK[name]
    data_dir = None if data_dir is None else data_dir.expanduser()
    place = None if data_dir is None else source.find(data_dir)
    if place is None and data_dir is not None and download and source.source is not None:
        fetch(source.source, data_dir, progress=progress, on_note=on_note)
        place = source.find(data_dir)
    if place is None:
        where = "no folder was given (--data-dir or SMPCONV_DATA)" if data_dir is None else f"not found in {data_dir}"
        raise FileNotFoundError(f"{need}, {where}: {source.how.format(command=command)}")
    return place


def batches(
    data: Dataset[Any], batch_size: int, workers: int, pin_memory: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """The samples in order, in batches x (N, ...), y (N,) int64.

    Args:
        data: Samples (x, y).
        batch_size: Samples at a time.
        workers: Processes that read ahead, at most one for each CPU; with 0 it is this process that reads.
        pin_memory: Whether batches lie where a GPU fetches them from faster.

    Raises:
        ValueError: A size out of range, or a sample that cannot be read.
    """
    if batch_size < 1 or workers < 0:
        raise ValueError(f"batch_size must be at least 1 and workers 0 or more, got {batch_size} and {workers}")
    try:
        yield from DataLoader(data, batch_size, num_workers=min(workers, _cpus()), pin_memory=pin_memory)
    except ValueError as error:
        # From a worker an error comes with its whole traceback as its text; what it says is in the last line.
        last = str(error).strip().splitlines()[-1]
        raise ValueError(last.removeprefix("ValueError: ")) from error


def _cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def eval_command(card: CheckpointCard) -> str:
    """The command that measures a checkpoint; PATH in it stands for the user's folder of the data."""
    return f"smpconv-zoo eval {card.id}" + (" --data-dir PATH" if card.data.name in _ON_DISK else "")


# ------------------------------------------------------------------------------------ where data lie in a user's folder


def _first(candidates: list[Path], there: Callable[[Path], bool]) -> Path | None:
    return next((path for path in candidates if there(path)), None)


def _find_imagenet(folder: Path) -> Path | None:
    return _first([folder / "val", folder / "validation", folder], pictures.has_imagenet_classes)


def _find_trajectories(folder: Path) -> Path | None:
    name = "CharacterTrajectories"
    below = [folder, folder / name, folder / "Multivariate_ts" / name]
    return _first(below, lambda path: all((path / f"{name}_{part}.ts").is_file() for part in ("TRAIN", "TEST")))


def _find_speech(folder: Path) -> Path | None:
    names = ("speech_commands_v0.02", "SpeechCommands", "SpeechCommands/speech_commands_v0.02")
    return _first([folder, *(folder / n for n in names)], lambda path: all((path / word).is_dir() for word in WORDS))


_ON_DISK = {
    "ImageNet-1k": _OnDisk(
        part="the validation images of ",
        what="ImageNet-1k",
        how="get them from https://image-net.org/download-images (ILSVRC 2012, registration needed), sort them into "
        "one folder a class, named by its WordNet id (n01440764, ...), and run `{command}`, PATH being the folder that "
        "holds these 1,000, or the one above it if it is called val or validation; the commands are named by "
        "`smpconv-zoo data fetch imagenet-1k`",
        samples=50_000,
        find=_find_imagenet,
    ),
    "MNIST": _OnDisk(
        part="the test part of ",
        what="MNIST",
        how="run `{command} --download`, which fetches it into PATH (or `smpconv-zoo data fetch mnist`), or without "
        "--download if PATH holds MNIST/raw with the four files unpacked",
        samples=10_000,
        find=lambda folder: folder if pictures.has_mnist(folder) else None,
        source="mnist",
    ),
    "CIFAR-10": _OnDisk(
        part="the test part of ",
        what="CIFAR-10",
        how="run `{command} --download`, which fetches it into PATH (or `smpconv-zoo data fetch cifar10`), or without "
        "--download if PATH holds the unpacked cifar-10-batches-py of https://www.cs.toronto.edu/~kriz/cifar.html",
        samples=10_000,
        find=lambda folder: folder if pictures.has_cifar10(folder) else None,
        source="cifar10",
    ),
    "CharacterTrajectories": _OnDisk(
        what="CharacterTrajectories, of which both files are merged and split anew",
        how="run `{command} --download`, which fetches it into PATH (or `smpconv-zoo data fetch "
        "character-trajectories`), or unpack "
        "https://www.timeseriesclassification.com/aeon-toolkit/Archives/Multivariate2018_ts.zip and run it without "
        "--download, PATH being the folder with CharacterTrajectories_TRAIN.ts and CharacterTrajectories_TEST.ts, or "
        "the one above it or above Multivariate_ts",
        samples=429,
        source="character-trajectories",
        find=_find_trajectories,
    ),
    "Speech Commands, 10 words": _OnDisk(
        what="ten words of Speech Commands v0.02",
        how="run `{command} --download`, which fetches it into PATH (or `smpconv-zoo data fetch speech-commands`), or "
        "unpack https://storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.02.tar.gz into a folder "
        "and run it without --download, PATH being that folder",
        samples=5_247,
        source="speech-commands",
        find=_find_speech,
    ),
}


# ---------------------------------------------------------------------------------- from a card and a folder to samples


def _mnist5k(card: CheckpointCard) -> Dataset[Any]:
    return TensorDataset(*mnist5k_sequences("test"))


def _mnist5k_images(card: CheckpointCard) -> Dataset[Any]:
    return TensorDataset(*mnist5k_images("test"))


def _mnist5k_permuted(card: CheckpointCard) -> Dataset[Any]:
    """In the order that travels with the weights: without it they mean nothing."""
    metadata = load_weights(card).metadata
    try:
        order: Any = json.loads(metadata["permutation"])
    except (KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{card.files[0].name} carries no list of pixels under 'permutation'") from error
    return TensorDataset(*mnist5k_sequences("test", order))


def _mnist1d(card: CheckpointCard) -> Dataset[Any]:
    return TensorDataset(*mnist1d_sequences("test"))


def _ucr(card: CheckpointCard) -> Dataset[Any]:
    return TensorDataset(*load_ucr(card.data.name, dropped_share(card)).test)


def _imagenet(card: CheckpointCard, place: Path, protocol: str) -> EvaluationData:
    cfg: Any = timm.get_pretrained_cfg(card.id)
    transform = create_transform(**resolve_data_config(pretrained_cfg=cfg.to_dict()), is_training=False)
    return EvaluationData(pictures.imagenet_validation(place, transform), from_files=True)


def _mnist(card: CheckpointCard, place: Path, protocol: str) -> EvaluationData:
    x, y = pictures.mnist_test(place)
    return EvaluationData(TensorDataset(x.flatten(2), y))


def _mnist_permuted(card: CheckpointCard, place: Path, protocol: str) -> EvaluationData:
    x, y = pictures.mnist_test(place)
    notes = ["the authors publish no order of the pixels: it is drawn as by their code from seed 0"]
    if protocol == AFTER_TRAINING:
        notes.append("it is the second draw, by which their code tests after training: the network learned the first")
    order = pixel_permutation(draw=int(protocol == AFTER_TRAINING))
    return EvaluationData(TensorDataset(permute_pixels(x, order), y), notes=tuple(notes))


def _cifar10(card: CheckpointCard, place: Path, protocol: str) -> EvaluationData:
    return EvaluationData(TensorDataset(*pictures.cifar10_test(place)))


def _cifar10_sequence(card: CheckpointCard, place: Path, protocol: str) -> EvaluationData:
    x, y = pictures.cifar10_test(place)
    return EvaluationData(TensorDataset(x.flatten(2), y))


def _trajectories(card: CheckpointCard, place: Path, protocol: str) -> EvaluationData:
    return _dropped_trajectories(place, protocol, 0)


def _dropped_trajectories(place: Path, protocol: str, dropped: int) -> EvaluationData:
    series, labels = read_ts_parts(place, "CharacterTrajectories")
    try:
        x, y = character_trajectories(series, labels, dropped)["test"]
    except ValueError as error:
        raise ValueError(f"the series in {place} are not those of CharacterTrajectories: {error}") from error
    note = (
        "the authors took the archive of 2018; CharacterTrajectories.zip, handed out alone since November 2023, holds "
        "other series"
    )
    return EvaluationData(TensorDataset(x, y), notes=(note,))


def _speech_mfcc(card: CheckpointCard, place: Path, protocol: str) -> EvaluationData:
    return _speech(place, True, protocol)


def _speech_raw(card: CheckpointCard, place: Path, protocol: str) -> EvaluationData:
    return _speech(place, False, protocol)


def _speech(place: Path, as_mfcc: bool, protocol: str) -> EvaluationData:
    clips = SpeechCommandsTest(place, as_mfcc, protocol)
    return EvaluationData(clips, from_files=True, notes=(_speech_note(place, protocol),))


def _dropped_mfcc(place: Path, protocol: str, dropped: int) -> EvaluationData:
    return _dropped_speech(place, True, protocol, dropped)


def _dropped_raw(place: Path, protocol: str, dropped: int) -> EvaluationData:
    return _dropped_speech(place, False, protocol, dropped)


def _dropped_speech(place: Path, as_mfcc: bool, protocol: str, dropped: int) -> EvaluationData:
    parts = speech_commands_parts(place, as_mfcc, ("test",), dropped, protocol=protocol)
    return EvaluationData(TensorDataset(*parts["test"]), notes=(_speech_note(place, protocol),))


def _speech_note(place: Path, protocol: str) -> str:
    return (
        f"{clip_order(place, protocol)}: some of these clips were among those they trained on, so this figure is too "
        "high and cannot equal theirs"
    )


# Form of the input of a card -> percent of its time steps that were taken away.
_DROPPED = {"sequence": 0, **{f"sequence, {rate} % dropped": rate for rate in (30, 50, 70)}}
# (data set, form of the input) of a card -> its test part.
_BUILT_IN: dict[tuple[str, str], Callable[[CheckpointCard], Dataset[Any]]] = {
    ("mnist5k", "sequence"): _mnist5k,
    ("mnist5k", "permuted sequence"): _mnist5k_permuted,
    ("mnist5k", "image 28 x 28"): _mnist5k_images,
    ("mnist1d", "sequence"): _mnist1d,
    **{(name, form): _ucr for name in UCR_SETS for form in _DROPPED},
}
_FORMS: dict[tuple[str, str], Callable[[CheckpointCard, Path, str], EvaluationData]] = {
    ("ImageNet-1k", "image 224 x 224"): _imagenet,
    ("MNIST", "sequence"): _mnist,
    ("MNIST", "permuted sequence"): _mnist_permuted,
    ("CIFAR-10", "image 32 x 32"): _cifar10,
    ("CIFAR-10", "sequence"): _cifar10_sequence,
    ("CharacterTrajectories", "sequence of 182 steps"): _trajectories,
    ("Speech Commands, 10 words", "161 frames of 20 MFCCs"): _speech_mfcc,
    ("Speech Commands, 10 words", "waveform of 16,000 samples"): _speech_raw,
}
_DROPPED_FORMS: dict[tuple[str, str], Callable[[Path, str, int], EvaluationData]] = {
    ("CharacterTrajectories", "sequence of 182 steps"): _dropped_trajectories,
    ("Speech Commands, 10 words", "161 frames of 20 MFCCs"): _dropped_mfcc,
    ("Speech Commands, 10 words", "waveform of 16,000 samples"): _dropped_raw,
}
