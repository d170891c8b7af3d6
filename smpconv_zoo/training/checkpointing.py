"""Checkpoints of a run: everything that the steps to come depend on, in one file that is whole or not there.

A checkpoint counts once the small file beside it names its sha256; it is written aside, synced and renamed before that.
So whatever moment a process dies at, the newest that counts is whole; the one before it is kept as well.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smpconv_zoo.files import sha256_of_file, whole_file, write_whole

__all__ = ["Found", "load_newest", "random_state", "restore_random_state", "save"]

FORMAT = 1
KEPT = 2
_WRITER = ("inline_container", "PytorchStreamWriter")


@dataclasses.dataclass(frozen=True)
class Found:
    """A checkpoint read back: its state, its file, and what newer ones were passed over, each with the reason."""

    state: dict[str, Any]
    path: Path
    passed_over: tuple[str, ...]


def save(folder: Path, update: int, state: dict[str, Any]) -> Path:
    """Write the checkpoint after ``update`` optimizer steps, and remove all but the newest two.

    Args:
        folder: Made if it is not there.
        update: Optimizer steps so far.
        state: Tensors, numbers, strings, and dicts, lists and tuples of them.

    Raises:
        OSError: It could not be written, say on a full disk; those before it are as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"update-{update:08d}.pt"
    with whole_file(path) as aside:
        try:
            torch.save({"format": FORMAT, **state}, aside)
        except RuntimeError as error:
            # PyTorch's writer reports a full disk in words of its own; others may speak up meanwhile.
            if not any(words in str(error) for words in _WRITER):
                raise
            raise OSError(errno.ENOSPC, f"could not be written ({str(error).splitlines()[0]})", str(path)) from error
        digest = sha256_of_file(aside)
    write_whole(_seal(path), json.dumps({"sha256": digest, "update": update}).encode())
    for old in _sealed(folder)[KEPT:]:
        # The seal goes first: a file without one does not count.
        _seal(old).unlink(missing_ok=True)
        old.unlink(missing_ok=True)
    return path


def load_newest(folder: Path) -> Found | None:
    """The newest checkpoint that is whole, on the CPU; None if there is none.

    Files that do not have the sha256 that was written down are passed over. No pickle is executed.

    Raises:
        ValueError: All that are there are broken, or the newest is of a later version of this package.
    """
    passed_over = []
    for path in _sealed(folder):
        try:
            wanted = json.loads(_seal(path).read_text(encoding="utf-8"))["sha256"]
            there = sha256_of_file(path)
            if there != wanted:
                raise ValueError(f"it has sha256 {there[:12]}, not {wanted[:12]}")
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
            passed_over.append(f"{path.name}: {error}")
            continue
        if state["format"] != FORMAT:
            raise ValueError(f"{path} has format {state['format']}, this version reads {FORMAT}: update smpconv-zoo")
        return Found(state, path, tuple(passed_over))
    if passed_over:
        raise ValueError(f"no checkpoint in {folder} can be read: {'; '.join(passed_over)}")
    return None


def random_state(device: torch.device) -> dict[str, Any]:
    """State of every generator that training draws from: Python's, numpy's, PyTorch's on the CPU and on ``device``."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    words_of_numpy = torch.from_numpy(np.asarray(keys).astype(np.int64))
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, words_of_numpy, int(position), int(has_gauss), float(cached)],
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Go on drawing where :func:`random_state` was taken."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def _seal(path: Path) -> Path:
    return path.with_suffix(".json")


def _sealed(folder: Path) -> list[Path]:
    """Checkpoints with a seal, newest first."""
    return sorted((path for path in folder.glob("update-*.pt") if _seal(path).is_file()), reverse=True)
