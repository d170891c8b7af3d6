"""What goes wrong with a checkpoint, apart so that every module here can say it."""

from __future__ import annotations

__all__ = ["CheckpointError", "SignatureError", "WrongBytesError"]


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message says which file and why."""


class WrongBytesError(CheckpointError):
    """A file has another sha256 than was declared."""


class SignatureError(CheckpointError):
    """Something cannot be signed, or a signature does not hold; the message says why."""
