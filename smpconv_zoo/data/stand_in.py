"""A stand-in for ImageNet: made-up pictures in its folders, of its size on the disk, to rehearse a run with."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import ImageNetInfo

__all__ = ["write_stand_in"]

# Chosen so that a picture of 500 x 375 takes 110 KB, ImageNet's mean: noise of this deviation on smooth stripes.
_NOISE = 24.0
_QUALITY = 90


def write_stand_in(
    folder: Path,
    classes: int = 1000,
    per_class: int = 4,
    size: tuple[int, int] = (500, 375),
    seed: int = 0,
    *,
    validation_per_class: int = 1,
    workers: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write ``train/CLASS/CLASS_N.JPEG`` and ``val/CLASS/CLASS_N.JPEG`` into a new folder, whole or not at all.

    The classes have the first of ImageNet's WordNet ids. A class is the direction, width and colour of its stripes, so
    that there is something to learn, but nothing that was learned from it means anything.

    Args:
        folder: Must not exist yet.
        classes: Up to 1000.
        per_class: Pictures of each to learn from.
        size: Their width and height in pixels.
        seed: Of the pictures.
        validation_per_class: Pictures of each to validate on; with 0 there is no ``val``.
        workers: Threads.
        progress: Called with the pictures written and those in all.

    Returns:
        Number of pictures.

    Raises:
        ValueError: A number out of range.
        FileExistsError: The folder exists; it is as it was.
        OSError: It cannot be written.
    """
    names = ImageNetInfo().label_names()
    if not 1 <= classes <= len(names) or per_class < 1 or validation_per_class < 0 or min(size) < 1:
        raise ValueError(
            f"need 1 to {len(names)} classes, per_class >= 1, validation_per_class >= 0 and a size; got {classes}, "
            f"{per_class}, {validation_per_class}, {size}"
        )
    if folder.exists():
        raise FileExistsError(f"{folder} exists and was left as it was; choose another folder")
    counts = {"train": per_class, "val": validation_per_class}
    jobs = [(part, label, n) for part, count in counts.items() for label in range(classes) for n in range(count)]
    # A picture's noise is a stretch of this: to draw it anew would take longer than to write the picture.
    width, height = size
    noise = np.random.RandomState(seed).standard_normal((height + 256, width + 256, 3)).astype(np.float32) * _NOISE
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent) as aside:
        root = Path(aside, folder.name)
        for part, count in counts.items():
            for name in names[:classes] if count else ():
                (root / part / name).mkdir(parents=True)

        def write(job: tuple[str, int, int]) -> None:
            part, label, n = job
            draw = np.random.RandomState([seed, label, n, part == "val"])
            picture = Image.fromarray(_picture(label, draw, noise, size))
            picture.save(root / part / names[label] / f"{names[label]}_{n}.JPEG", quality=_QUALITY)

        with ThreadPoolExecutor(workers) as pool:
            for done, _ in enumerate(pool.map(write, jobs), start=1):
                if progress is not None:
                    progress(done, len(jobs))
        os.rename(root, folder)
    return len(jobs)


def _picture(label: int, draw: np.random.RandomState, noise: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """``(H, W, 3)`` bytes: stripes of the class at a random phase, and noise."""
    width, height = size
    angle, waves = label * 2.39996, 3 + label % 7  # in steps of the golden angle no two classes look the same way
    x, y = np.arange(width, dtype=np.float32) / width, np.arange(height, dtype=np.float32)[:, None] / width
    turns = waves * (math.cos(angle) * x + math.sin(angle) * y) + draw.uniform()
    stripes = np.sin(2 * np.pi * turns)
    colour = 128 + 60 * np.sin(label * np.array([1.0, 2.2, 3.4], np.float32))
    top, left = draw.randint(256), draw.randint(256)
    values = noise[top : top + height, left : left + width] + (colour + 50 * stripes[:, :, None])
    return values.clip(0, 255).astype(np.uint8)
