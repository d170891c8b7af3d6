"""The header of a safetensors file, read more strictly than loading needs: nothing in the file is left unexplained."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from smpconv_zoo.pretrained.errors import CheckpointError

__all__ = ["StoredTensor", "check_structure"]

# Bits in one element, of every type that the format knows and PyTorch holds.
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

# The format's own limit, in bytes.
MAX_HEADER = 100_000_000


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header declares it; ``begin`` and ``end`` are bytes, counted from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def check_structure(data: bytes) -> list[StoredTensor]:
    """The tensors that a safetensors file declares, in the order of their bytes.

    Every name occurs once, every length follows from type and shape, and the tensors cover the file from the header to
    its end without gap or overlap.

    Raises:
        CheckpointError: One of these does not hold; the message says which, without the file's name.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, MAX_HEADER):
        raise CheckpointError(f"the header claims {length:,} bytes in a file of {len(data):,}")
    if data[8:9] != b"{":
        raise CheckpointError("the header does not start with a brace")
    try:
        header = json.loads(data[8 : 8 + length].decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the header is not JSON: {error}") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError("the metadata are not strings")
    tensors = sorted((_tensor(name, entry) for name, entry in header.items()), key=lambda t: (t.begin, t.end))
    end = 0
    for tensor in tensors:
        if tensor.begin != end:
            kind = "overlaps the tensor before it" if tensor.begin < end else "leaves a gap before it"
            raise CheckpointError(f"{tensor.name!r} {kind}: it begins at byte {tensor.begin:,}, expected {end:,}")
        end = tensor.end
    if end != len(data) - 8 - length:
        raise CheckpointError(f"the tensors cover {end:,} bytes, the file holds {len(data) - 8 - length:,}")
    return tensors


def _tensor(name: str, entry: Any) -> StoredTensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{name!r} is not declared by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(f"{name!r} has the type {dtype!r}, which is not known")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{name!r} has a shape or offsets that are no sizes")
    begin, end = offsets
    if (end - begin) * 8 != math.prod(shape) * BITS[dtype]:
        raise CheckpointError(f"{name!r} has {end - begin:,} bytes, which is not {dtype} of shape {tuple(shape)}")
    return StoredTensor(name, dtype, tuple(shape), begin, end)


def _sizes(value: Any) -> bool:
    # No size is near 2 ** 63; larger numbers only serve to overflow someone's arithmetic.
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 63 for size in value)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is declared twice")
    return entries
