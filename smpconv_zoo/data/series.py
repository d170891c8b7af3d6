"""The user's own sequences: ``.npy`` and ``.csv`` files, and folders of them with a class for every folder.

A file holds one sequence or more: ``(C, L)``, ``(N, C, L)`` or, for one channel, ``(L,)`` or ``(N, L)``. A csv has a
row for every channel (for every sequence, if there is one channel; or a single column), and may have a line of titles.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from timm.utils import natural_key
from torch import Tensor

from smpconv_zoo.data.protocol import append_observed_mask, drop_positions, hold_out, pad_series

__all__ = ["SEQUENCE_FILES", "SeriesParts", "load_series", "read_sequences"]

SEQUENCE_FILES = (".csv", ".npy")
VALIDATION_FOLDERS = ("val", "validation", "valid")

# Of files that cannot be taken, so many are named.
NAMED = 5

Progress = Callable[[int, int], None]


def read_sequences(path: Path, channels: int | None = None) -> np.ndarray:
    """The sequences of one file, ``(N, C, L)`` float32.

    Args:
        path: A ``.npy`` or ``.csv`` file.
        channels: C. None to take a table for one sequence with a row for every channel.

    Raises:
        ValueError: It cannot be read, or it holds something else than sequences of so many channels.
    """
    try:
        values = _read_npy(path) if path.suffix.lower() == ".npy" else _read_csv(path)
    except OSError as error:
        raise ValueError(f"it cannot be read: {error.strerror or error}") from error
    shape = values.shape
    if values.ndim == 1 and channels in (None, 1):
        values = values[None, None]
    elif values.ndim == 2:
        values = values[:, None] if channels == 1 else values[None]
    if values.ndim != 3 or 0 in values.shape or values.shape[1] != (channels or values.shape[1]):
        of = "" if channels is None else f" of {channels} channels"
        raise ValueError(f"shape {shape} is no sequence{of}, (C, L) or (N, C, L)")
    return values


@dataclasses.dataclass(frozen=True)
class SeriesParts:
    """Sequences to learn from and to choose by, normalised and of one length.

    ``train`` and ``validation`` are x (N, C, L) float32 and y (N,) int64; ``validation`` is None where nothing was set
    aside. Of every channel ``mean`` was subtracted, then it was divided by ``std``. ``lengths`` are the shortest and
    the longest before shorter ones were lengthened by repeating their last value. ``split`` says where ``validation``
    comes from, ``passed_over`` counts files of other kinds.
    """

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor] | None
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    lengths: tuple[int, int]
    split: str
    passed_over: int


def load_series(
    folder: Path,
    channels: int | None = None,
    held_out: float = 0.1,
    dropped: int = 0,
    progress: Progress | None = None,
) -> SeriesParts:
    """Read a folder of class folders, or one that holds ``train/`` and ``val/`` of such.

    Classes are numbered in the natural order of their names. Without ``val/`` a share of every class is set aside,
    always the same samples. Mean and deviation are those of the values of each channel in what is learned from. A
    folder ``test/`` beside ``train/`` is not looked at.

    Args:
        folder: The folder.
        channels: See :func:`read_sequences`; None for as many as the first file has rows.
        held_out: Share of every class to choose by, where there is no ``val/``; 0 for none.
        dropped: Percent of the samples of a sequence that are left out; the mask of the others is one more channel.
        progress: Called with the files read and in all.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It holds something else: what, and which files.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    train_folder, validation_folder = _parts(folder)
    classes = _classes(train_folder)
    files, passed_over = _files(train_folder, classes)
    if validation_folder is not None:
        foreign = sorted(set(_classes(validation_folder)) - set(classes))
        if foreign:
            raise ValueError(f"{validation_folder} has classes that {train_folder} has not: {', '.join(foreign)}")
        chosen_by, more = _files(validation_folder, classes, all_classes=False)
        files, passed_over = [*files, *chosen_by], passed_over + more
    read = _read_all(files, channels, progress)
    labels = torch.tensor([y for _, y, series in read for _ in series])
    in_train = torch.tensor([path.is_relative_to(train_folder) for path, _, series in read for _ in series])
    samples = [sample for _, _, series in read for sample in series]
    if validation_folder is not None:
        train, validation = in_train.nonzero()[:, 0], (~in_train).nonzero()[:, 0]
        split = f"chosen by {validation_folder.name}/"
    elif held_out > 0:
        train, validation = _set_aside(labels, held_out, classes, folder)
        split = f"chosen by {100 * held_out:g} % of every class, set aside"
    else:
        train, validation = torch.arange(len(labels)), labels.new_empty(0)
        split = "nothing is set aside to choose by"
    mean, std = _statistics([samples[i] for i in train.tolist()])
    x = _padded(samples)
    if dropped > 0:
        x = drop_positions(x, dropped)
    x = (x - torch.tensor(mean)[:, None]) / torch.tensor(std)[:, None]
    if dropped > 0:
        # The mask is taken as it is.
        x, mean, std = append_observed_mask(x), (*mean, 0.0), (*std, 1.0)
    lengths = [sample.shape[1] for sample in samples]
    return SeriesParts(
        train=(x[train], labels[train]),
        validation=(x[validation], labels[validation]) if len(validation) else None,
        classes=classes,
        mean=mean,
        std=std,
        lengths=(min(lengths), max(lengths)),
        split=split,
        passed_over=passed_over,
    )


def _parts(folder: Path) -> tuple[Path, Path | None]:
    """The folder of classes to learn from, and that to choose by, if there is one."""
    validation = next((folder / name for name in VALIDATION_FOLDERS if (folder / name).is_dir()), None)
    if (folder / "train").is_dir():
        return folder / "train", validation
    if validation is not None:
        raise ValueError(f"{folder} holds {validation.name}/ but no train/")
    return folder, None


def _classes(folder: Path) -> tuple[str, ...]:
    names = (path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    classes = tuple(sorted(names, key=natural_key))
    if not classes:
        kinds = " and ".join(SEQUENCE_FILES)
        raise ValueError(f"{folder} needs a folder of {kinds} files for every class, it has none")
    return classes


def _files(folder: Path, classes: Sequence[str], all_classes: bool = True) -> tuple[list[tuple[Path, int]], int]:
    """Files and the numbers of their classes; and how many files are of other kinds."""
    found: list[tuple[Path, int]] = []
    passed_over, empty = 0, []
    for y, name in enumerate(classes):
        inside = [path for path in (folder / name).rglob("*") if path.is_file() and not path.name.startswith(".")]
        taken = sorted(path for path in inside if path.suffix.lower() in SEQUENCE_FILES)
        passed_over += len(inside) - len(taken)
        found += [(path, y) for path in taken]
        if not taken:
            empty.append(name)
    if not found or (empty and all_classes):
        which = "no class" if not found else f"not every class ({', '.join(empty)} has none)"
        raise ValueError(f"{folder} has files that end in {' or '.join(SEQUENCE_FILES)} for {which}")
    if all_classes and len(classes) == 1:
        raise ValueError(f"{folder} has the single class {classes[0]}: there is nothing to tell apart")
    return found, passed_over


def _read_all(
    files: Sequence[tuple[Path, int]], channels: int | None, progress: Progress | None
) -> list[tuple[Path, int, np.ndarray]]:
    read, refused = [], []
    for done, (path, y) in enumerate(files, start=1):
        try:
            series = read_sequences(path, channels)
            if not np.isfinite(series).all():
                raise ValueError("it holds NaN or Inf")
            # The first file that can be read says how many channels there are.
            channels = series.shape[1]
            read.append((path, y, series))
        except ValueError as error:
            refused.append(f"{path}: {error}")
        if progress is not None:
            progress(done, len(files))
    if refused:
        more = f"; and {len(refused) - NAMED} more" if len(refused) > NAMED else ""
        raise ValueError(
            f"{len(refused)} of {len(files)} files cannot be taken: {'; '.join(refused[:NAMED])}{more}; "
            "mend them or take them away"
        )
    return read


def _set_aside(labels: Tensor, share: float, classes: Sequence[str], folder: Path) -> tuple[Tensor, Tensor]:
    single = [name for name, count in zip(classes, labels.bincount().tolist(), strict=True) if count < 2]
    if single:
        raise ValueError(
            f"{folder}: {', '.join(single)} has a single sample, none can be set aside to choose by: add samples, put "
            "them into train/ and val/, or set held_out=0"
        )
    train, validation = hold_out(labels, share)
    return torch.from_numpy(train), torch.from_numpy(validation)


def _statistics(samples: Sequence[np.ndarray]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel over all values as they were read; a constant channel is only centred."""
    count = sum(sample.shape[1] for sample in samples)
    mean = sum(sample.sum(axis=1, dtype=np.float64) for sample in samples) / count
    squares = sum(np.square(sample - mean[:, None]).sum(axis=1) for sample in samples)
    std = np.sqrt(squares / count).astype(np.float32)
    return tuple(mean.tolist()), tuple(np.where(std > 0, std, 1.0).tolist())


def _padded(samples: Sequence[np.ndarray]) -> Tensor:
    length = max(sample.shape[1] for sample in samples)
    return torch.stack([torch.stack([pad_series(channel, length) for channel in sample]) for sample in samples])


def _read_npy(path: Path) -> np.ndarray:
    try:
        values = np.load(path, allow_pickle=False)
    except (EOFError, ValueError) as error:
        raise ValueError(f"it is no .npy file, or it is damaged: {_line(error)}") from error
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu":
        raise ValueError(f"it holds {getattr(values, 'dtype', type(values).__name__)}, not numbers")
    return values.astype(np.float32)


def _read_csv(path: Path) -> np.ndarray:
    """Rows of numbers, the first may be titles; a single column is one sequence, ``(L,)``."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"it is no .csv file: {_line(error)}") from error
    if rows and not any(map(_is_number, rows[0])):
        rows = rows[1:]
    if not rows:
        raise ValueError("it holds no numbers")
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"its rows have different lengths, from {min(map(len, rows))} to {max(map(len, rows))}")
    try:
        values = np.array(rows, dtype=np.float32)
    except ValueError as error:
        raise ValueError(f"it holds something else than numbers: {_line(error)}") from error
    return values[:, 0] if values.shape[1] == 1 else values


def _is_number(text: str) -> bool:
    with contextlib.suppress(ValueError):
        float(text)
        return True
    return False


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
