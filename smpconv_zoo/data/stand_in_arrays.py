"""Stand-ins for the data of the sequence tasks: made-up samples in the files of the real sets, to rehearse a run with.

There is something to learn in each, but nothing that was learned from it means anything.
"""

from __future__ import annotations

import hashlib
import io
import math
import pickle
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from smpconv_zoo.data.speech_commands import SAMPLE_RATE, WORDS

__all__ = [
    "Python2Pickler",
    "cifar10_sums",
    "write_cifar10_stand_in",
    "write_mnist_stand_in",
    "write_speech_stand_in",
    "write_trajectories_stand_in",
]

_CIFAR10 = "cifar-10-batches-py"


def write_mnist_stand_in(folder: Path, train: int = 40, test: int = 20, seed: int = 0) -> Path:
    """MNIST's four files, unpacked, in ``folder/MNIST/raw``; gives ``folder``.

    Args:
        folder: Where to write.
        train: Digits to learn from, 10 at least.
        test: Digits to measure on.
        seed: Of the digits.

    Raises:
        FileExistsError: There are such files.
        OSError: They cannot be written.
    """
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    draw = np.random.RandomState(seed)
    for part, count in (("train", train), ("t10k", test)):
        labels = np.arange(count) % 10
        images = _patterns(labels, 28, draw)[..., 0]
        for kind, array in (("images-idx3", images), ("labels-idx1", labels.astype(np.uint8))):
            # Type 8 (unsigned byte), rank, sizes, the last of them big-endian.
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (raw / f"{part}-{kind}-ubyte").write_bytes(head + array.tobytes())
    return folder


def write_cifar10_stand_in(folder: Path, train: int = 40, test: int = 20, seed: int = 0) -> Path:
    """CIFAR-10's pickled batches, in ``folder/cifar-10-batches-py``; gives ``folder``.

    torchvision holds them against the md5 sums of the published ones: see :func:`cifar10_sums`.

    Args:
        folder: Where to write.
        train: Pictures to learn from, in five files.
        test: Pictures to measure on.
        seed: Of the pictures.

    Raises:
        FileExistsError: There are such files.
        OSError: They cannot be written.
    """
    root = folder / _CIFAR10
    root.mkdir(parents=True)
    draw = np.random.RandomState(seed)
    parts = {**{f"data_batch_{i + 1}": len(range(i, train, 5)) for i in range(5)}, "test_batch": test}
    first = 0
    for name, count in parts.items():
        labels = (first + np.arange(count)) % 10
        planes = _patterns(labels, 32, draw).transpose(0, 3, 1, 2).reshape(count, -1)
        content = {"batch_label": name, "labels": labels.tolist(), "data": planes, "filenames": [""] * count}
        (root / name).write_bytes(_pickled(content))
        first += count
    meta = {"num_cases_per_batch": train // 5, "label_names": [str(label) for label in range(10)], "num_vis": 3072}
    (root / "batches.meta").write_bytes(_pickled(meta))
    return folder


def cifar10_sums(folder: Path) -> dict[str, str]:
    """The md5 of each file that :func:`write_cifar10_stand_in` wrote, by its name."""
    return {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in sorted((folder / _CIFAR10).iterdir())}


def write_trajectories_stand_in(folder: Path, per_class: int = 7, length: int = 182, seed: int = 0) -> Path:
    """``CharacterTrajectories_TRAIN.ts`` and ``_TEST.ts``: 20 classes of curves of three channels; gives ``folder``.

    Args:
        folder: Where to write.
        per_class: Curves of each class; 7 at least, for a split that has every class in every part.
        length: Steps of the longest one.
        seed: Of the curves.

    Raises:
        FileExistsError: There are such files.
        OSError: They cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.RandomState(seed)
    head = (
        "@problemName CharacterTrajectories\n@timeStamps false\n@missing false\n@univariate false\n@dimensions 3\n"
        f"@equalLength false\n@classLabel true {' '.join(str(label + 1) for label in range(20))}\n@data\n"
    )
    lines = []
    for number in range(20 * per_class):
        label = number % 20
        steps = length if number == 0 else draw.randint(length // 2, length + 1)
        time = np.linspace(0, 1, steps)
        waves = [np.sin(2 * math.pi * (1 + (label * (3 + axis)) % 7) * time + label) for axis in range(3)]
        channels = [wave_ + 0.1 * draw.standard_normal(steps) for wave_ in waves]
        lines.append(
            ":".join([",".join(f"{value:.6f}" for value in channel) for channel in channels] + [str(label + 1)])
        )
    half = len(lines) // 2
    for part, own in (("TRAIN", lines[:half]), ("TEST", lines[half:])):
        with open(folder / f"CharacterTrajectories_{part}.ts", "x", encoding="utf-8") as file:
            file.write(head + "\n".join(own) + "\n")
    return folder


def write_speech_stand_in(folder: Path, per_word: int = 7, seed: int = 0) -> Path:
    """``folder/speech_commands_v0.02/WORD/*.wav``: a second of a tone in noise for each of ten words; gives ``folder``.

    Args:
        folder: Where to write.
        per_word: Clips of each word; 7 at least, for a split that has every word in every part.
        seed: Of the clips.

    Raises:
        FileExistsError: There is such a folder.
        OSError: It cannot be written.
    """
    root = folder / "speech_commands_v0.02"
    root.mkdir(parents=True)
    draw = np.random.RandomState(seed)
    time = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    for label, word in enumerate(WORDS):
        (root / word).mkdir()
        for number in range(per_word):
            tone = 0.3 * np.sin(2 * math.pi * (200 + 150 * label) * time + draw.uniform(0, 6))
            samples = np.round(32767 * (tone + 0.05 * draw.standard_normal(SAMPLE_RATE)).clip(-1, 1)).astype("<i2")
            with wave.open(str(root / word / f"{number:08x}_nohash_0.wav"), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(SAMPLE_RATE)
                file.writeframes(samples.tobytes())
    return folder


class Python2Pickler(pickle._Pickler):
    """Writes strings of either kind as Python 2, which made CIFAR-10's files, wrote its own."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)
    # Set on every instance by the class above.
    write: Callable[[bytes], Any]

    def save_string(self, text: str | bytes) -> None:
        """As the opcodes of Python 2's strings, which hold bytes."""
        data = text.encode("latin1") if isinstance(text, str) else text
        short = len(data) < 256
        head = pickle.SHORT_BINSTRING if short else pickle.BINSTRING
        self.write(head + len(data).to_bytes(1 if short else 4, "little") + data)

    dispatch[str] = dispatch[bytes] = save_string


def _pickled(content: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue()


def _patterns(labels: np.ndarray, size: int, draw: np.random.RandomState) -> np.ndarray:
    """``(N, size, size, 3)`` bytes: stripes whose direction and width are the class, and noise."""
    x, y = np.arange(size)[None, :] / size, np.arange(size)[:, None] / size
    pictures = []
    for label in labels:
        angle = label * math.pi / 10
        stripes = np.sin(2 * math.pi * (2 + label % 3) * (math.cos(angle) * x + math.sin(angle) * y))
        values = 128 + 90 * stripes[:, :, None] + 20 * draw.standard_normal((size, size, 3))
        pictures.append(values.clip(0, 255).astype(np.uint8))
    return np.stack(pictures) if pictures else np.empty((0, size, size, 3), np.uint8)
