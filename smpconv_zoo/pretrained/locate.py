"""From a card, a repository or a folder to verified tensors.

A checkpoint is looked for in the package, then in the local store, then on the Hub at the revision that its card pins.
Every byte is hashed on every load, cached or not, and what is hashed is what is loaded. A file's name plays no role.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from smpconv_zoo.pretrained import hub
from smpconv_zoo.pretrained.cards import (
    CardError,
    CheckpointCard,
    checkpoint_card,
    list_checkpoints,
    load_card,
)
from smpconv_zoo.pretrained.home import (
    imported_card,
    imported_file,
    quarantine,
    quarantine_beside,
    quarantined_beside,
)
from smpconv_zoo.pretrained.signing import signature_beside, signature_required
from smpconv_zoo.pretrained.store import CheckpointError, WrongBytesError, embedded_file, how_to_get, read_safetensors

__all__ = ["LoadedWeights", "load_folder", "load_repository", "load_weights", "read_verified"]

DOWNLOAD_AGAIN = "load again to download it anew"

CacheDir = str | os.PathLike[str] | None


class LoadedWeights(NamedTuple):
    """Verified tensors, the file's string metadata, and where it was: embedded, imported, hub, or local-dir."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    where: str


def load_weights(card: CheckpointCard, cache_dir: CacheDir = None) -> LoadedWeights:
    """Weights of a checkpoint: embedded in the package, else imported into the local store, else from the Hub.

    Args:
        card: Its card, one of the package's.
        cache_dir: Cache of the Hub's client, if not the usual one.

    Raises:
        CheckpointError: They are nowhere to be had (the message says how to get them), or the bytes are not those that
            the card declares; then the file has been moved out of use and both hashes are named.
    """
    if card.status == "embedded":
        path = embedded_file(card)
        if path.is_file() or card.hub is None:
            then = "install the package again"
            return LoadedWeights(*read_verified(path, card.files[0].sha256, then), "embedded")
    imported = _imported(card)
    if imported is not None:
        path = imported_file(imported)
        return LoadedWeights(*read_verified(path, imported.files[0].sha256, "import it again"), "imported")
    if card.hub is None or not card.files:
        raise CheckpointError(how_to_get(card))
    remedy = (
        f"fetch {hub.WEIGHTS_NAME} of {card.hub.repo} at {card.hub.revision} on another machine and run "
        f"`smpconv-zoo import {card.id} --file FILE`"
    )
    path, _ = hub.fetch(card.hub.repo, card.hub.revision, hub.WEIGHTS_NAME, remedy, cache_dir)
    _fetch_signature_if_required(card.hub.repo, card.hub.revision, remedy, cache_dir)
    return LoadedWeights(*read_verified(path, card.files[0].sha256, DOWNLOAD_AGAIN, hub.drop_from_cache), "hub")


def load_repository(repo: str, revision: str | None, network: str, cache_dir: CacheDir = None) -> LoadedWeights:
    """Weights of any repository on the Hub.

    They are held against the card of a checkpoint that the package pins to this very commit, else against the
    repository's own card, else against the sha256 that the Hub declares for the file.

    Args:
        repo: ``organisation/name``.
        revision: Branch, tag or commit; ``main`` if None.
        network: Name of the network that the weights are for.
        cache_dir: Cache of the Hub's client, if not the usual one.

    Raises:
        CheckpointError: No ``model.safetensors`` (nothing else is read), another network's, out of reach, or bytes
            that are not those declared; then the file has been moved out of use.
    """
    commit = hub.commit_of(repo, revision or "main", cache_dir)
    remedy = f"fetch {repo} on another machine and load the folder as 'local-dir:PATH'"
    declared = _sha256_of_card(repo, commit, network, remedy, cache_dir)
    path, downloaded = hub.fetch(repo, commit, hub.WEIGHTS_NAME, remedy, cache_dir)
    if declared is None:
        etag = hub.etag_of(path)
        if downloaded or etag is None or not re.fullmatch("[0-9a-f]{64}", etag):
            declared = hub.declared_sha256(repo, commit, hub.WEIGHTS_NAME, remedy)
        else:
            declared = etag
    if declared is None:
        raise CheckpointError(
            f"neither {repo} at {commit} nor the Hub declares a sha256 for its {hub.WEIGHTS_NAME}; it was not loaded"
        )
    _fetch_signature_if_required(repo, commit, remedy, cache_dir)
    return LoadedWeights(*read_verified(path, declared, DOWNLOAD_AGAIN, hub.drop_from_cache), "hub")


def _fetch_signature_if_required(repo: str, commit: str, remedy: str, cache_dir: CacheDir) -> None:
    """Put card and signature beside the weights in the cache, where the check that follows looks for them."""
    if not signature_required():
        return
    for name in (hub.CARD_NAME, signature_beside(Path(hub.WEIGHTS_NAME)).name):
        # What is missing is left to the check: it says that a signature is required and which part is not there.
        with contextlib.suppress(hub.HubFileMissingError):
            hub.fetch(repo, commit, name, remedy, cache_dir)


def load_folder(folder: str | os.PathLike[str], network: str) -> LoadedWeights:
    """Weights in a folder with ``model.safetensors``, held against its ``card.json`` where it has one.

    A file with another sha256 than the card's stays in the folder under another name, and nothing is deleted: a folder
    is its owner's, who may have changed the weights and can rename it back.

    Raises:
        CheckpointError: No such file (nothing else is read), another network's, or not what the card declares.
    """
    path = Path(folder) / hub.WEIGHTS_NAME
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {hub.WEIGHTS_NAME}, {_instead_of(path)}")
    card = path.with_name(hub.CARD_NAME)
    if not card.is_file():
        return LoadedWeights(*read_safetensors(path), "local-dir")
    declared = _declared_by(card, network, str(folder))
    stuck = f"replace it, or remove {hub.CARD_NAME} if you changed the weights yourself"
    return LoadedWeights(*read_verified(path, declared, _in_own_folder(path), quarantine_beside, stuck), "local-dir")


def _in_own_folder(path: Path) -> str:
    return (
        f"put the declared file there, or, if you changed the weights yourself, name it {path.name} again and remove "
        f"{hub.CARD_NAME}"
    )


def _instead_of(path: Path) -> str:
    """What to say of a folder without its weights."""
    put_aside = max(quarantined_beside(path), key=lambda aside: aside.lstat().st_mtime_ns, default=None)
    if put_aside is None:
        return "and nothing else is loaded from a folder"
    return f"for {put_aside.name} is not the file its {hub.CARD_NAME} declares: {_in_own_folder(path)}"


def read_verified(
    path: Path,
    sha256: str,
    then: str,
    remove: Callable[[Path], Path | None] = quarantine,
    stuck: str | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file with this sha256 and no other.

    Args:
        path: The file.
        sha256: Hex digest of the whole file.
        then: What the reader of a refusal can do.
        remove: Takes a file with another digest out of use and says where it went, or None if it could not.
        stuck: What the reader can do if it could not; to remove the file and then do as ``then`` says, if None.

    Raises:
        CheckpointError: Absent, another sha256, not a safetensors file, or NaN or Inf among the weights.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: {then}")
    try:
        return read_safetensors(path, sha256)
    except WrongBytesError as error:
        moved = remove(path)
        if moved is None:
            raise CheckpointError(
                f"{error} and could not be moved out of use, so every load refuses it: "
                f"{stuck or f'remove it, then {then}'}"
            ) from error
        raise CheckpointError(f"{error} and was moved to {moved}: {then}") from error


def _imported(card: CheckpointCard) -> CheckpointCard | None:
    """Card of the imported version in use; None where there is none or its weights are gone, to quarantine or else."""
    try:
        imported = imported_card(card.id)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the imported {card.id} cannot be used ({error}): import it again, {how_to_get(card)}"
        ) from error
    if imported is None or not imported_file(imported).is_file():
        return None
    if imported.id != card.id:
        raise CheckpointError(f"the local store holds {imported.id} under the name of {card.id}: {how_to_get(card)}")
    return imported


def _sha256_of_card(repo: str, commit: str, network: str, remedy: str, cache_dir: CacheDir) -> str | None:
    """What a card says of the weights in a repository: one of the package's, or the repository's own."""
    for card in map(checkpoint_card, list_checkpoints()):
        pinned = card.hub is not None and (card.hub.repo, card.hub.revision) == (repo, commit)
        if pinned and card.network == network and card.files:
            return card.files[0].sha256
    unknown = hub.is_offline() and hub.cached(repo, commit, hub.CARD_NAME, cache_dir) is None
    if unknown or hub.known_missing(repo, commit, hub.CARD_NAME, cache_dir):
        return None
    try:
        path, _ = hub.fetch(repo, commit, hub.CARD_NAME, remedy, cache_dir)
    except hub.HubFileMissingError:
        return None
    return _declared_by(path, network, repo)


def _declared_by(path: Path, network: str, source: str) -> str:
    try:
        card = load_card(path)
    except (CardError, OSError) as error:
        raise CheckpointError(f"{source}: {error}") from error
    if card.network != network or not card.files:
        raise CheckpointError(f"the card in {source} is of {card.id}, not of weights for {network}")
    return card.files[0].sha256
