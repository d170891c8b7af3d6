"""Files that are whole or not there at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["sha256_of_file", "whole_file", "write_new", "write_whole"]


def sha256_of_file(path: Path) -> str:
    """Hex sha256 of a file, read a block at a time.

    Raises:
        OSError: It cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Write ``data`` under ``path``, whole or not at all.

    The bytes go to a file beside it, reach the disk, and take the final name last; on any failure, an interrupt
    included, the file beside it is removed and ``path`` is as it was.

    Raises:
        OSError: The folder does not exist or cannot be written, or ``path`` is a folder.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(aside, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        if isinstance(error, OSError):
            # The reader asked for `path` and should not hear of the file beside it.
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A place for a file that is written by others: what lies there when the block ends takes the name ``path``.

    The place is in a folder of its own beside ``path``, under the same file name. If the block ends with an error, an
    interrupt included, the folder is removed and ``path`` is as it was.

    Raises:
        OSError: The folder does not exist or cannot be written, or ``path`` is a folder.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    with folder:
        aside = Path(folder.name, path.name)
        yield aside
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        try:
            os.replace(aside, path)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error


def write_new(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write ``data`` under a name that must be free, whole or not at all, with ``mode`` from the first byte on.

    Raises:
        FileExistsError: ``path`` exists; it is as it was.
        OSError: The folder does not exist or cannot be written.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(aside, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # A link, unlike a rename, fails where the name is taken.
        os.link(aside, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()
