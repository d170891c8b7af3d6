"""Reading weights: every byte checked before any of it is used, and no pickle is ever executed."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from smpconv_zoo.pretrained.cards import CheckpointCard, weights_dir, without_duplicates
from smpconv_zoo.pretrained.errors import CheckpointError, WrongBytesError
from smpconv_zoo.pretrained.signing import check_signature_if_required

__all__ = [
    "CheckpointError",
    "StoredWeights",
    "WrongBytesError",
    "embedded_file",
    "how_to_get",
    "read_checkpoint",
    "read_safetensors",
    "read_weights",
    "sha256_of",
]


AVERAGED = "state_dict_ema"


@dataclasses.dataclass(frozen=True)
class StoredWeights:
    """A state dict and how it lay in its file.

    ``format`` is ``"safetensors"`` or ``"pickle"``. ``entry`` is the key that the state dict was under, such as
    ``"state_dict_ema"``, or None where the file holds nothing else.
    """

    tensors: dict[str, Tensor]
    format: str
    entry: str | None

    @property
    def averaged(self) -> bool:
        """Whether these are the running average that training keeps beside the weights."""
        return self.entry == AVERAGED


def sha256_of(data: bytes) -> str:
    """Hex sha256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def embedded_file(card: CheckpointCard) -> Path:
    """The weight file that ships with the package for ``card``.

    Raises:
        CheckpointError: The checkpoint is not embedded.
    """
    if card.status != "embedded":
        raise CheckpointError(how_to_get(card))
    return weights_dir() / card.files[0].name


def how_to_get(card: CheckpointCard) -> str:
    """One sentence that says how to get weights that are not at hand."""
    return (
        f"{card.id} does not ship with this package: run `smpconv-zoo import {card.id}`, or download it from "
        f"{card.origin} and run `smpconv-zoo import {card.id} --file FILE`"
    )


def read_safetensors(path: Path, sha256: str | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and string metadata of a safetensors file.

    The file is read once; what is hashed is what is loaded.

    Args:
        path: The file.
        sha256: Expected hex digest of the whole file, or None if there is nothing to check against.

    Raises:
        WrongBytesError: Another sha256.
        CheckpointError: Absent or unreadable, not a safetensors file, NaN or Inf among the weights, or no valid
            signature where one is required.
    """
    data = _read_bytes(path)
    if sha256 is not None and sha256_of(data) != sha256:
        raise WrongBytesError(
            f"{path} is not the file its card declares: "
            f"sha256 is {sha256_of(data)}, expected {sha256}; it was not loaded"
        )
    if sha256 is not None:
        # Whoever reads weights for a card passes its sha256; only what has a card can be signed.
        check_signature_if_required(path, data)
    return _parse_safetensors(data, path)


def _parse_safetensors(data: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length], object_pairs_hook=without_duplicates)
    except KeyError as error:
        raise CheckpointError(f"{path} holds tensors of type {error}, which PyTorch cannot load") from error
    except (SafetensorError, ValueError, LookupError, AttributeError, RuntimeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a valid safetensors file: {error}") from error
    _refuse_non_finite(tensors, path)
    return tensors, header.get("__metadata__", {})


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The state dict inside a checkpoint file, under the names it was saved with; see :func:`read_weights`."""
    return read_weights(path).tensors


def read_weights(path: str | Path) -> StoredWeights:
    """The state dict inside a checkpoint file, under the names it was saved with, and where in the file it was.

    Takes safetensors files and the two kinds of pickles that the authors' code writes, which are parsed without
    executing them (``weights_only``, with just the globals that those files hold). Averaged weights
    (``state_dict_ema``) are preferred: they are the ones that were evaluated.

    Raises:
        CheckpointError: Absent, a directory, truncated, foreign, or with weights that are not finite.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return StoredWeights(read_safetensors(path)[0], "safetensors", None)
    _check_file(path)
    try:
        with torch.serialization.safe_globals(_reference_globals()), warnings.catch_warnings():
            # torch warns of pickles that it did not write; whether this one can be read is the answer.
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Whatever a damaged pickle makes torch raise, IndexError and AssertionError included, it could not be read.
        raise CheckpointError(f"{path} is not a checkpoint that can be read safely: {_refusal(error)}") from error
    entry, state_dict = _find_state_dict(content, path)
    _refuse_non_finite(state_dict, path)
    return StoredWeights(state_dict, "pickle", entry)


def _refusal(error: Exception) -> str:
    """Why torch would not read a pickle. Its own text runs over lines and recommends to read the file unsafely."""
    if asked := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"it asks for {asked[1]}, which no file of weights needs"
    if "zip archive" in str(error):
        return "it is truncated or damaged"
    return "it is not a file of weights that PyTorch wrote, or it is damaged"


def _reference_globals() -> list[Any]:
    """The globals in a checkpoint of the authors' image code: argparse's namespace and numpy float64 scalars."""
    scalar = np.float64(0).__reduce__()[0]
    return [
        argparse.Namespace,
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        type(np.dtype(np.float64)),
    ]


def _find_state_dict(content: Any, path: Path) -> tuple[str | None, dict[str, Tensor]]:
    entry = None
    if isinstance(content, dict):
        for key in (AVERAGED, "state_dict", "model"):
            if isinstance(content.get(key), dict) and content[key]:
                entry, content = key, content[key]
                break
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        found = ", ".join(sorted(map(str, content))[:8]) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(
            f"{path} holds no state dict: expected 'state_dict_ema', 'state_dict' or 'model', got {found}"
        )
    for name, tensor in content.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{path} holds a tensor under {type(name).__name__} instead of a name")
        if not _plain(tensor):
            raise CheckpointError(f"{path}: {name} is not a plain tensor with memory for each of its elements")
    return entry, dict(content)


def _plain(tensor: Tensor) -> bool:
    """Whether a tensor is dense, on the CPU, and no larger than its storage: a small file may declare terabytes."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _refuse_non_finite(tensors: dict[str, Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        # PyTorch cannot look for NaN in all of its 8-bit types.
        plain = tensor.float() if tensor.itemsize == 1 else tensor
        if not torch.isfinite(plain).all():
            raise CheckpointError(f"{path}: {name} holds NaN or Inf")


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise CheckpointError(f"{path} is a directory, not a checkpoint file")
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")


def _read_bytes(path: Path) -> bytes:
    _check_file(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
