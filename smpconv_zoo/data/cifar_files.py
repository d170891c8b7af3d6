"""Reader of CIFAR-10's files, which are pickles of Python 2: numbers and names are taken out, nothing is executed."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["read_batch"]

# A batch of the published ones has 31 MB.
LARGEST = 2**26
SIDE = 32

# The names under which the pickles of old and new versions of numpy keep an array.
_ARRAY_PARTS = {
    ("numpy.core.multiarray", "_reconstruct"): "reconstruct",
    ("numpy._core.multiarray", "_reconstruct"): "reconstruct",
    ("numpy", "ndarray"): "array",
    ("numpy", "dtype"): "dtype",
}


def read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The pictures and labels of one file.

    Args:
        path: ``data_batch_1`` to ``data_batch_5`` or ``test_batch``.

    Returns:
        images (N, 32, 32, 3) uint8, RGB; labels (N,) int64, 0 to 9.

    Raises:
        ValueError: It is no such file; the message says what is wrong.
        OSError: It cannot be read.
    """
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} has more than {LARGEST:,} bytes: it is no batch of CIFAR-10")
    with open(path, "rb") as file:
        try:
            content = _Numbers(file, encoding="latin1").load()
        except Exception as error:  # whatever the bytes bring about: pickle's own errors, IndexErrors and more
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{path} is no batch of CIFAR-10: {reason}") from error
    images = content.get("data") if isinstance(content, dict) else None
    labels = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(images, _Array) or not isinstance(labels, list):
        raise ValueError(f"{path} is no batch of CIFAR-10: it has no data and labels")
    if not all(type(label) is int and 0 <= label <= 9 for label in labels):
        raise ValueError(f"{path} is no batch of CIFAR-10: its labels are not numbers from 0 to 9")
    planes = images.numbers(path, (len(labels), 3 * SIDE**2))
    pictures = planes.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(pictures), np.array(labels, dtype=np.int64)


class _Part:
    """Stands in the place of numpy's own: it takes what the pickle says of an array, and does nothing."""

    __slots__ = ("kind", "state")

    def __init__(self, *said: Any) -> None:
        self.kind = said[0] if said else None
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Dtype(_Part):
    __slots__ = ()


class _Array(_Part):
    __slots__ = ()

    def numbers(self, path: Path, shape: tuple[int, int]) -> np.ndarray:
        """The array, if it is of bytes and of that shape."""
        try:
            _, found, dtype, columns_first, data = self.state
            good = isinstance(dtype, _Dtype) and dtype.kind == "u1" and not columns_first
            # A string of Python 2 comes as text of as many characters.
            data = data.encode("latin1") if isinstance(data, str) else data
            if good and tuple(found) == shape and isinstance(data, bytes) and len(data) == shape[0] * shape[1]:
                return np.frombuffer(data, dtype=np.uint8).reshape(shape)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is no batch of CIFAR-10: its pictures are no array") from error
        raise ValueError(f"{path} is no batch of CIFAR-10: its pictures are not {shape[0]:,} x {shape[1]:,} bytes")


class _Reconstruct:
    __slots__ = ()

    def __call__(self, *said: Any) -> _Array:
        return _Array()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes what it is made of")


class _Numbers(pickle.Unpickler):
    """Knows an array's three names, as placeholders, and no other."""

    def find_class(self, module: str, name: str) -> Any:
        part = _ARRAY_PARTS.get((module, name))
        if part is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which data do not need")
        return {"reconstruct": _Reconstruct(), "array": _Array, "dtype": _Dtype}[part]
