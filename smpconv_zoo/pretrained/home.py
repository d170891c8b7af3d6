"""The local store: checkpoints that a user imported, each version in a folder of its own.

    $SMPCONV_HOME/checkpoints/<id>/<sha256 of the weights>/<id>.safetensors, card.json
    $SMPCONV_HOME/checkpoints/<id>/current      the sha256 in use
    $SMPCONV_HOME/downloads/                    what imports that broke off go on with
    $SMPCONV_HOME/quarantine/                   files whose bytes were not what their card declares

``SMPCONV_HOME`` is ``~/.cache/smpconv_zoo`` if it is not set (``$XDG_CACHE_HOME/smpconv_zoo`` where that is).
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from smpconv_zoo.files import write_whole
from smpconv_zoo.pretrained.cards import CardError, CheckpointCard, card_bytes, checkpoint_card, load_card

__all__ = [
    "add_to_store",
    "card_in_use",
    "imported_card",
    "imported_file",
    "list_imported",
    "quarantine",
    "quarantine_beside",
    "quarantined_beside",
    "store_home",
]

# Ends the name of a file that was put out of use where it lay.
QUARANTINED = ".quarantined"


def store_home() -> Path:
    """Folder of the local store; it need not exist."""
    home = os.environ.get("SMPCONV_HOME")
    if home:
        return Path(home).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "smpconv_zoo"


def list_imported() -> list[str]:
    """Ids of the checkpoints in the local store, sorted."""
    return sorted(path.parent.name for path in (store_home() / "checkpoints").glob("*/current"))


def imported_card(checkpoint_id: str) -> CheckpointCard | None:
    """Card of the version in use of an imported checkpoint; None if there is none.

    Raises:
        CardError: The stored card is malformed.
    """
    current = store_home() / "checkpoints" / checkpoint_id / "current"
    if not current.is_file():
        return None
    path = current.with_name(current.read_text(encoding="ascii").strip()) / "card.json"
    try:
        return load_card(path)
    except CardError as error:
        raise CardError(
            f"the stored card {path} cannot be used ({error}); "
            f"`smpconv-zoo import {checkpoint_id} --accept-new` replaces it"
        ) from error


def card_in_use(checkpoint_id: str) -> CheckpointCard:
    """The card of a checkpoint: the imported one where the package itself only says where the weights may be had.

    Args:
        checkpoint_id: ``network.tag``, one of :func:`smpconv_zoo.list_checkpoints`.

    Raises:
        CardError: No such checkpoint (near names are listed), or a malformed card.
    """
    card = checkpoint_card(checkpoint_id)
    if card.status != "importable":
        return card
    return imported_card(checkpoint_id) or card


def imported_file(card: CheckpointCard) -> Path:
    """Weight file of an imported card."""
    return store_home() / "checkpoints" / card.id / card.files[0].sha256 / card.files[0].name


def add_to_store(card: CheckpointCard, weights: bytes) -> Path:
    """Put a version of a checkpoint into the store and make it the one in use; other versions stay beside it.

    Weights and card are whole before ``current`` names them, so a run that ends at any moment leaves the version that
    was in use.

    Args:
        card: Its card, with status ``"imported"``.
        weights: The bytes of its one file.

    Raises:
        OSError: The store cannot be written.
    """
    path = imported_file(card)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, weights)
    write_whole(path.with_name("card.json"), card_bytes(card))
    write_whole(path.parent.with_name("current"), card.files[0].sha256.encode("ascii"))
    return path


def quarantine(path: Path) -> Path | None:
    """Move a file whose bytes are not trusted out of use; where to, or None if it could not be moved.

    It goes to the store's quarantine, or to another name beside where it was if that is out of reach (another file
    system, a store that cannot be written).
    """
    target = store_home() / "quarantine" / f"{path.name}.{secrets.token_hex(4)}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    except OSError:
        return quarantine_beside(path)
    return target


def quarantine_beside(path: Path) -> Path | None:
    """Give a file whose bytes are not trusted another name in its own folder; which, or None if that is not allowed.

    Nothing is overwritten, and of a link the link alone is renamed.
    """
    target = path.with_name(f"{path.name}.{secrets.token_hex(4)}{QUARANTINED}")
    try:
        os.replace(path, target)
    except OSError:
        return None
    return target


def quarantined_beside(path: Path) -> list[Path]:
    """What :func:`quarantine_beside` made of files of this name, in no order."""
    # Names with brackets and stars in them are no patterns.
    try:
        names = os.listdir(path.parent)
    except OSError:
        return []
    return [path.with_name(n) for n in names if n.startswith(f"{path.name}.") and n.endswith(QUARANTINED)]
