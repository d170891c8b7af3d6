"""Import of checkpoints that the authors publish: fetched or handed over, converted, kept in the local store.

Nobody publishes hashes of those files, so the first import trusts what arrives and writes down what it was; every later
one is held against that. Nothing in a file is ever executed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import filelock

from smpconv_zoo.checkpoints import Conversion, convert_file
from smpconv_zoo.files import sha256_of_file
from smpconv_zoo.pace import Pace, Watch, watched
from smpconv_zoo.pretrained.cards import CardError, CheckpointCard, Source, WeightFile, checkpoint_card
from smpconv_zoo.pretrained.home import add_to_store, imported_card, imported_file, store_home
from smpconv_zoo.pretrained.store import CheckpointError, sha256_of

__all__ = ["Imported", "import_checkpoint"]

DRIVE_FILE = re.compile(r"https://drive\.google\.com/file/d/([\w-]+)/")
# A float32 weight takes 4 bytes. The authors' files hold up to four copies of each (trained, averaged, two moments of
# the optimizer); half precision and twice as many copies are still taken.
BYTES_PER_PARAMETER = (2, 32)
OVERHEAD_BYTES = 64 * 2**20

# Seconds, for each address of a server.
CONNECT_TIMEOUT = 10.0
# Ends the name under which gdown lets a file grow.
PART = ".part"


@dataclasses.dataclass(frozen=True)
class Imported:
    """What :func:`import_checkpoint` did.

    ``path``, ``sha256`` and ``bytes`` are those of the converted file, ``source`` the file it was converted from.
    ``trusted`` says on what grounds that file was taken: ``"first use"`` (nothing was known of it), ``"known"`` (it is
    the recorded one), ``"accepted"`` (it is another than the recorded one, and that was allowed) or ``"declared"`` (it
    is the converted file that the package's card declares, brought by hand). ``changed`` is
    False where the very same file was imported before and nothing was done.
    """

    id: str
    path: str
    sha256: str
    bytes: int
    source: Source
    trusted: str
    changed: bool


def import_checkpoint(
    checkpoint_id: str,
    file: Path | None = None,
    download: Callable[[str, Path], Path] | None = None,
    accept_new: bool = False,
) -> Imported:
    """Bring a checkpoint that others publish into the local store, for ``create_model(..., pretrained=True)`` to use.

    Args:
        checkpoint_id: ``network.tag``, a checkpoint whose card is ``"importable"``; for any other, only ``file`` with
            the very bytes that its card declares is taken, as it is.
        file: The published file, if it is here already; it is downloaded otherwise.
        download: Fetches an address into a folder and returns the file; gdown if None. The folder is in the store and
            may hold what an earlier call left of the file.
        accept_new: Take a file other than the one that was imported before.

    Raises:
        CardError: No such checkpoint.
        CheckpointError: A checkpoint that is not to be imported, a file that is no checkpoint of this network, one that
            cannot be downloaded or comes too slowly (:class:`smpconv_zoo.pace.Pace`; what has come is gone on with next
            time), or another one than was imported before.
        ImportError: A download is needed and gdown is not installed.
        OSError: The file cannot be read, or the store cannot be written.
    """
    card = checkpoint_card(checkpoint_id)
    if card.status != "importable":
        if file is None:
            raise CheckpointError(
                f"{card.id} is {card.status}: its weights are used without an import; where the Hub is out of reach, "
                "--file takes its safetensors file"
            )
        return _import_declared(card, file)
    # In a folder that goes in any case: whatever ends this early, only whole files reach the store.
    with tempfile.TemporaryDirectory(prefix="smpconv-import-") as scratch:
        folder = Path(scratch)
        if file is not None:
            return _import_file(card, file, None, folder, accept_new)
        fetch = download or functools.partial(_download, _gdown(card.origin))
        with _download_folder(card, folder) as downloads:
            file = fetch(card.origin, downloads)
            try:
                return _import_file(card, file, card.origin, folder, accept_new)
            finally:
                # Whole, it is of no more use: what it becomes is in the store, or it is refused.
                shutil.rmtree(downloads)


def _import_file(card: CheckpointCard, file: Path, url: str | None, scratch: Path, accept_new: bool) -> Imported:
    size = _check_kind(card, file)
    sha256 = sha256_of_file(file)
    recorded = _recorded(card, accept_new)
    trusted = "first use"
    if recorded is not None and recorded.source is not None:
        if recorded.source.sha256 == sha256:
            stored = imported_file(recorded)
            if stored.is_file() and sha256_of_file(stored) == recorded.files[0].sha256:
                return _imported(recorded, recorded.source, "known", changed=False)
            trusted = "known"
        elif not accept_new:
            raise CheckpointError(
                f"{file.name} is not the file that {card.id} was imported from: its sha256 is {sha256}, on "
                f"{recorded.source.date} it was {recorded.source.sha256}; pass --accept-new if the new one is right"
            )
        else:
            trusted = "accepted"
    out = scratch / f"{card.id}.safetensors"
    done = convert_file(file, card.network, out, card.arguments)
    _check_counts(card, file, done)
    if sha256_of_file(file) != sha256:
        raise CheckpointError(f"{file} changed while it was read; nothing was imported")
    weights = out.read_bytes()
    if sha256_of(weights) != done.sha256:
        raise CheckpointError(f"the converted {out.name} does not read back as it was written; nothing was imported")
    source = Source(
        name=file.name,
        sha256=sha256,
        bytes=size,
        url=url,
        date=_today(),
        entry=done.entry,
        averaged=done.averaged,
    )
    stored_file = WeightFile(out.name, done.sha256, len(weights))
    card = dataclasses.replace(card, status="imported", files=(stored_file,), source=source)
    add_to_store(card, weights)
    return _imported(card, source, trusted, changed=True)


def _import_declared(card: CheckpointCard, file: Path) -> Imported:
    """Keep the weight file of a checkpoint that the package declares: for machines that cannot reach the Hub."""
    _check_kind(card, file)
    weights = file.read_bytes()
    sha256, declared = sha256_of(weights), card.files[0].sha256
    if sha256 != declared:
        raise CheckpointError(
            f"{file.name} is not the file that the card of {card.id} declares: its sha256 is {sha256}, expected "
            f"{declared}; nothing was imported"
        )
    source = Source(file.name, sha256, len(weights), None, _today(), None, False)
    stored_file = WeightFile(f"{card.id}.safetensors", sha256, len(weights))
    card = dataclasses.replace(card, status="imported", files=(stored_file,))
    stored = imported_file(card)
    changed = not (stored.is_file() and sha256_of_file(stored) == sha256 and _recorded(card, True) == card)
    if changed:
        add_to_store(card, weights)
    return _imported(card, source, "declared", changed)


def _today() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d")


def _imported(card: CheckpointCard, source: Source, trusted: str, changed: bool) -> Imported:
    file = card.files[0]
    return Imported(card.id, str(imported_file(card)), file.sha256, file.bytes, source, trusted, changed)


def _recorded(card: CheckpointCard, accept_new: bool) -> CheckpointCard | None:
    """The card of an earlier import; one that cannot be read stands in the way unless it may be replaced."""
    try:
        return imported_card(card.id)
    except CardError:
        if accept_new:
            return None
        raise


def _check_kind(card: CheckpointCard, file: Path) -> int:
    """Size of a file, if it can be this checkpoint's by its size and first bytes."""
    if not file.is_file():
        what = "is a directory, not a checkpoint file" if file.is_dir() else "does not exist"
        raise CheckpointError(f"{file} {what}")
    with open(file, "rb") as opened:
        start = opened.read(512).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(
            f"{file.name} is a web page, not weights (Google Drive shows one when too many have asked for a file): "
            f"download {card.origin} in a browser and pass it as --file"
        )
    size = file.stat().st_size
    least, most = (factor * card.parameters for factor in BYTES_PER_PARAMETER)
    if not least <= size <= most + OVERHEAD_BYTES:
        raise CheckpointError(
            f"{file.name} has {size:,} bytes, which cannot be the {card.parameters:,} parameters of {card.id}"
        )
    return size


def _check_counts(card: CheckpointCard, file: Path, done: Conversion) -> None:
    if (done.tensors, done.parameters) != (card.tensors, card.parameters):
        raise CheckpointError(
            f"{file.name} holds {done.tensors} tensors and {done.parameters:,} parameters, the card of {card.id} says "
            f"{card.tensors} and {card.parameters:,}"
        )


@contextlib.contextmanager
def _download_folder(card: CheckpointCard, scratch: Path) -> Iterator[Path]:
    """Where a download is left to be gone on with; in ``scratch`` while another process has that place."""
    kept = store_home() / "downloads" / card.id
    kept.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(kept.with_name(f"{card.id}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        own = scratch / "download"
        own.mkdir()
        yield own
        return
    try:
        kept.mkdir(exist_ok=True)
        yield kept
    finally:
        with contextlib.suppress(OSError):
            kept.rmdir()  # if nothing is left in it
        lock.release()


def _gdown(origin: str) -> Any:
    try:
        return importlib.import_module("gdown")
    except ImportError as error:
        raise ImportError(
            f'downloading needs gdown: pip install "smpconv-zoo[import]", or download {origin} and pass it as --file'
        ) from error


def _download(gdown: Any, origin: str, folder: Path) -> Path:
    """Fetch ``origin``, a file on Google Drive or any other address, and go on with what is in the folder.

    By gdown and not by :mod:`smpconv_zoo.downloading`: the pages that Google Drive puts before a large file change, and
    gdown follows them.
    """
    drive = DRIVE_FILE.match(origin)
    what = {"id": drive[1]} if drive else {"url": origin}
    try:
        return _fetched(gdown, what, folder)
    except Exception as error:  # what gdown raises differs between its versions
        reason = " ".join(str(error).split()) or type(error).__name__
        kept = f"what has come ({_here(folder):,} bytes) is gone on with next time, or " if _here(folder) else ""
        raise CheckpointError(
            f"{origin} could not be downloaded ({reason}); {kept}download it in a browser and pass it as --file"
        ) from error


def _fetched(gdown: Any, what: dict[str, str], folder: Path) -> Path:
    pace, cancel = Pace.of_environment(), threading.Event()
    for again in (False, True):
        before = _here(folder)
        try:
            with watched(pace, cancel.set) as watch:

                def told(here: int, total: int | None, before: int = before, watch: Watch = watch) -> None:
                    """gdown tells of every 512 KiB, and counts what was there before."""
                    watch.add(here - before - watch.came)

                gdown.download(
                    **what,
                    # The trailing slash asks for the name that the server gives.
                    output=f"{folder}/",
                    quiet=not sys.stderr.isatty(),
                    use_cookies=False,  # they would be kept in the user's home
                    resume=True,
                    timeout=(CONNECT_TIMEOUT, 2 * pace.seconds),
                    progress=told,
                    cancel=cancel,
                )
            break
        except Exception as error:
            if cancel.is_set():
                raise CheckpointError(str(pace)) from error
            # What is here is of another version, or all of it, or the server does not go on in the middle.
            if again or not before or "byte range" not in str(error):
                raise
            _empty(folder)
    found = [path for path in folder.iterdir() if path.is_file() and path.suffix != PART]
    if len(found) != 1:
        _empty(folder)
        raise CheckpointError("it did not give one file")
    return found[0]


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def _here(folder: Path) -> int:
    """Bytes of downloads that were begun."""
    return sum(path.stat().st_size for path in folder.glob(f"*{PART}"))
