"""Classes of the user's own images and sequences, by checkpoints and by exported files.

What files are taken, one sample or more each:

- for networks of images: pictures (whatever Pillow reads), resized, cropped and normalised as at evaluation;
- for networks of sequences: ``.npy`` and ``.csv``, as ``(C, L)``, ``(N, C, L)`` or, for one channel, ``(L,)`` or
  ``(N, L)``; a csv has a row for every channel (for every sequence, if there is one channel; or a single column), and
  may have a line of titles. Values are in the unit of the data, from which mean and deviation are then taken; pixels
  count from 0 to 1;
- for networks that take the pixels of a picture as a sequence: pictures as well.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from smpconv_zoo.data.folders import convert_picture
from smpconv_zoo.data.series import SEQUENCE_FILES, read_sequences
from smpconv_zoo.description import Description, Preprocessing, load_described
from smpconv_zoo.environment import usable_device
from smpconv_zoo.exported import FORMATS, Network, open_exported
from smpconv_zoo.files import write_whole

__all__ = [
    "Prediction",
    "Predictions",
    "Reader",
    "Unreadable",
    "check_output",
    "find_inputs",
    "open_network",
    "predict_files",
    "write_predictions",
]

# Below so many files a process, starting it takes longer than reading them.
FILES_PER_WORKER = 32

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A class of one sample: the ``rank``-th most probable, from 1 on.

    ``index`` counts the samples of the file from 0, ``label`` is the number of the class, ``name`` its name, None where
    nobody names it.
    """

    file: str
    index: int
    rank: int
    label: int
    name: str | None
    probability: float


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """A file that could not be taken, and why."""

    file: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Predictions in the order of the files, and the files without any."""

    network: str
    predictions: tuple[Prediction, ...]
    unreadable: tuple[Unreadable, ...]


def predict_files(
    name: str,
    inputs: Sequence[str | os.PathLike[str]],
    *,
    batch_size: int = 32,
    top_k: int = 1,
    device: str = "cpu",
    workers: int = 0,
    any_length: bool = False,
    leave_out: Path | None = None,
    progress: Progress | None = None,
) -> Predictions:
    """Classes of files, by a checkpoint or an exported file. A file that cannot be read is named; the others go on.

    Args:
        name: A checkpoint as ``network.tag``, ``hf-hub:ORG/NAME``, ``local-dir:PATH``, or an exported file's path.
        inputs: Files, and folders that are searched for files of the kinds that the network takes.
        batch_size: Samples at a time.
        top_k: Classes a sample, most probable first.
        device: Where to compute.
        workers: Processes that read files ahead, if there are many files.
        any_length: Take sequences of other lengths than the network was made for, too.
        leave_out: A file to pass over in folders: the one that the answers will be written to.
        progress: Called with the files done and in all.

    Raises:
        ValueError: No such network, a number out of range, a device that is not there, or no file that can be read.
        FileNotFoundError: An input does not exist, or a folder holds no file of the kinds that the network takes.
        CheckpointError: The weights are not at hand, or not those declared.
        ImportError: onnxruntime is needed and not installed.
    """
    if batch_size < 1 or top_k < 1 or workers < 0:
        raise ValueError(
            f"batch_size and top_k must be at least 1 and workers 0 or more, got {batch_size}, {top_k} and {workers}"
        )
    missing = [str(path) for path in inputs if not Path(path).exists()]
    if missing:
        raise FileNotFoundError(f"{', '.join(missing)}: no such file or folder")
    network, description = open_network(name, device)
    if description.num_classes < 1:
        raise ValueError(f"{name} has no classifier")
    reader = Reader(description.preprocessing, any_length)
    files = find_inputs(inputs, reader.suffixes, leave_out)
    rows: list[Prediction] = []
    unreadable: list[Unreadable] = []
    for keys, x in _batches(reader, files, batch_size, workers, unreadable, progress):
        probabilities = network(x).float().softmax(dim=1)
        best = probabilities.topk(min(top_k, description.num_classes), dim=1)
        for (file, index), values, labels in zip(keys, best.values.tolist(), best.indices.tolist(), strict=True):
            for rank, (probability, label) in enumerate(zip(values, labels, strict=True), start=1):
                title = None if description.classes is None else description.classes[label]
                rows.append(Prediction(file, index, rank, label, title, probability))
    if not rows:
        first = unreadable[0]
        raise ValueError(f"none of {len(files)} files can be taken, the first is {first.file}: {first.reason}")
    return Predictions(description.checkpoint or description.network, tuple(rows), tuple(unreadable))


def open_network(name: str, device: str = "cpu") -> tuple[Network, Description]:
    """A checkpoint or an exported file, ready to run, and its description; see :func:`predict_files`.

    Returns:
        A function from a batch of inputs on the CPU to logits on the CPU; and the description.
    """
    if Path(name).suffix in FORMATS.values():
        path = Path(name)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        return open_exported(path, device)
    target = usable_device(device)
    model, description = load_described(name)
    model.to(target)

    @torch.inference_mode()
    def run(x: Tensor) -> Tensor:
        return model(x.to(target)).cpu()

    return run, description


def find_inputs(
    inputs: Sequence[str | os.PathLike[str]], suffixes: Sequence[str], leave_out: Path | None = None
) -> list[Path]:
    """Files as they are given, and below folders, sorted by name, those that end in one of ``suffixes``.

    Raises:
        FileNotFoundError: A folder without any.
    """
    found: list[Path] = []
    for path in map(Path, inputs):
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
        if leave_out is not None:
            inside = [file for file in inside if file.absolute() != leave_out.absolute()]
        if not inside:
            raise FileNotFoundError(f"{path} holds no file that ends in {', '.join(suffixes)}")
        found += inside
    return list(dict.fromkeys(found))


class Reader:
    """Reads files as the samples that a network takes.

    Args:
        preprocessing: The network's.
        any_length: Take sequences of other lengths, too.
    """

    def __init__(self, preprocessing: Preprocessing, any_length: bool = False) -> None:
        self.preprocessing = preprocessing
        self.any_length = any_length
        self.takes_pictures = preprocessing.kind == "image" or preprocessing.pixels is not None
        sequences = () if preprocessing.kind == "image" else SEQUENCE_FILES
        self.suffixes = (*sequences, *(IMG_EXTENSIONS if self.takes_pictures else ()))
        self.transform: Any = None
        if preprocessing.kind == "image":
            self.transform = create_transform(
                preprocessing.input_size,
                is_training=False,
                interpolation=preprocessing.interpolation,
                mean=preprocessing.mean,
                std=preprocessing.std,
                crop_pct=preprocessing.crop_pct,
                crop_mode=preprocessing.crop_mode,
            )

    def read(self, path: Path) -> Tensor:
        """The samples of one file, ``(N, C, H, W)`` or ``(N, C, L)`` float32.

        Raises:
            ValueError: It cannot be read, or it holds something else.
        """
        suffix = path.suffix.lower()
        if suffix in SEQUENCE_FILES and self.preprocessing.kind == "sequence":
            return self._sequences(path)
        if suffix in SEQUENCE_FILES or not self.takes_pictures:
            raise ValueError(f"this network takes files that end in {', '.join(self.suffixes)}")
        return self._picture(path)

    def _picture(self, path: Path) -> Tensor:
        preprocessing = self.preprocessing
        channels = preprocessing.input_size[0]
        if channels not in (1, 3):
            raise ValueError(f"a picture has 1 or 3 channels, the network takes {channels}")
        try:
            with Image.open(path) as opened:
                image = convert_picture(opened, "L" if channels == 1 else "RGB")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow has SyntaxErrors for bad files
            raise ValueError(f"it cannot be read as an image: {_line(error)}") from error
        if self.transform is not None:
            return self.transform(image)[None]
        height, width = preprocessing.pixels or (0, 0)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255)
        return self._normalised(pixels.reshape(height * width, channels).T[None])

    def _sequences(self, path: Path) -> Tensor:
        channels, length = self.preprocessing.input_size
        values = read_sequences(path, channels)
        if values.shape[2] != length and not self.any_length:
            raise ValueError(
                f"sequences of {values.shape[2]} steps (shape {values.shape}), the network was made for {length}; "
                "--any-length (any_length=True) takes them anyway"
            )
        if not np.isfinite(values).all():
            raise ValueError("it holds NaN or Inf")
        return self._normalised(torch.from_numpy(values))

    def _normalised(self, x: Tensor) -> Tensor:
        """``(N, C, L)`` less the mean of each channel, by its deviation, in the network's order."""
        mean, std = (torch.tensor(c)[:, None] for c in (self.preprocessing.mean, self.preprocessing.std))
        x = (x - mean) / std
        order = self.preprocessing.order
        if order is None:
            return x.contiguous()
        if x.size(2) != len(order):
            raise ValueError(f"{x.size(2)} steps cannot be put in the order of {len(order)} that the network knows")
        return x[:, :, list(order)]


def write_predictions(path: Path, found: Predictions) -> None:
    """Write predictions as ``.csv``, a class a row, or as ``.json`` with the unreadable files; whole or not at all.

    Raises:
        ValueError: Another suffix.
        OSError: It cannot be written.
    """
    check_output(path)
    if path.suffix == ".json":
        write_whole(path, (json.dumps(dataclasses.asdict(found), indent=1) + "\n").encode())
        return
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(field.name for field in dataclasses.fields(Prediction))
    writer.writerows(dataclasses.astuple(row) for row in found.predictions)
    write_whole(path, text.getvalue().encode("utf-8", "surrogateescape"))


def check_output(path: Path) -> None:
    """Refuse, before anything is computed, a place where predictions cannot be written.

    Raises:
        ValueError: Another suffix than .csv and .json.
        FileNotFoundError: The folder does not exist.
    """
    if path.suffix not in (".csv", ".json"):
        raise ValueError(f"predictions are written as .csv or .json, got {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no folder: make it first")


class _Files(Dataset[Any]):
    """Files one by one: samples, or the reason why there are none."""

    def __init__(self, reader: Reader, files: Sequence[Path]) -> None:
        self.reader = reader
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            return index, self.reader.read(self.files[index])
        except ValueError as error:
            return index, _line(error)


def _batches(
    reader: Reader,
    files: Sequence[Path],
    batch_size: int,
    workers: int,
    unreadable: list[Unreadable],
    progress: Progress | None,
) -> Iterator[tuple[list[tuple[str, int]], Tensor]]:
    """(file, index within it) of samples of one shape, and the samples; files without any go to ``unreadable``."""
    workers = min(workers, len(files) // FILES_PER_WORKER, os.cpu_count() or 1)
    keys: list[tuple[str, int]] = []
    samples: list[Tensor] = []
    for position, read in DataLoader(_Files(reader, files), batch_size=None, num_workers=workers):
        if isinstance(read, str):
            unreadable.append(Unreadable(str(files[position]), read))
            read = ()
        for index, sample in enumerate(read):
            if samples and (len(samples) == batch_size or samples[0].shape != sample.shape):
                yield keys, torch.stack(samples)
                keys, samples = [], []
            keys.append((str(files[position]), index))
            samples.append(sample)
        if progress is not None:
            progress(position + 1, len(files))
    if samples:
        yield keys, torch.stack(samples)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
