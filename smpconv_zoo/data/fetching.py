"""Data sets fetched into the user's folder: resumed, checked, unpacked aside, and there whole or not at all.

Beside the data a folder ``.smpconv-data`` holds, for each set, ``NAME.json``: what was fetched from where, when, and
its sha256. Where nobody publishes a digest, that of the first file is the one that every later file is held against.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import filelock
from torchvision.datasets.folder import IMG_EXTENSIONS

from smpconv_zoo.data.checking import check_data
from smpconv_zoo.data.sources import DataSource, RemoteFile, data_source
from smpconv_zoo.downloading import DownloadError, Patience, check_space, download, part_of
from smpconv_zoo.files import sha256_of_file, write_whole
from smpconv_zoo.unpacking import ArchiveError, sync_tree, unpack

__all__ = ["BOOKS", "Fetched", "FetchedFile", "fetch"]

BOOKS = ".smpconv-data"

# Called with what is done ("fetching", "unpacking"), of which file, and how far it is.
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class FetchedFile:
    """An archive: its name, where it came from, its sha256 and bytes.

    ``trusted`` says on what grounds it was taken: ``"published"`` (its sha256 is the published one), ``"first use"``
    (nobody publishes one), ``"known"`` (it is the one recorded here before) or ``"accepted"`` (it is another than the
    recorded one, and that was allowed).
    """

    name: str
    url: str
    sha256: str
    bytes: int
    trusted: str


@dataclasses.dataclass(frozen=True)
class Fetched:
    """What :func:`fetch` did.

    ``place`` is the folder of the data, with ``files`` files of ``bytes`` bytes. ``changed`` is False where they were
    there and nothing was done; without ``sources`` they are not from here, and were only looked at.
    """

    name: str
    place: str
    files: int
    bytes: int
    changed: bool
    sources: tuple[FetchedFile, ...]
    date: str | None


def fetch(
    name: str,
    folder: Path,
    *,
    url: str | None = None,
    accept_new: bool = False,
    force: bool = False,
    keep: bool = False,
    patience: Patience | None = None,
    progress: Progress | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Fetched:
    """Have a data set in the user's folder, where evaluation and training look for it.

    If it is there, nothing is done. Otherwise archives are downloaded (see :mod:`smpconv_zoo.downloading`), unpacked
    into a folder aside (:mod:`smpconv_zoo.unpacking`), looked at, written out to the disk, and only then take their
    names. Whatever ends this early, the next call goes on with what was downloaded. Two calls at a time take turns.

    Args:
        name: Of :data:`smpconv_zoo.data.sources.SOURCES`.
        folder: The user's folder; it is made if need be.
        url: Another address of the file, or of the folder of the files if there are several; or the path of a file or
            folder here. A published sha256 has to be that of this file as well.
        accept_new: Take an archive other than the recorded one, where nobody publishes a digest.
        force: Replace what lies in the place of the data and is not them.
        keep: Leave the archives in ``.smpconv-data``.
        patience: How long servers are waited for.
        progress: Called with ``"fetching NAME"`` or ``"unpacking NAME"`` and the bytes done and in all (0: not known).
        on_note: Called with sentences that the user should see.

    Raises:
        ValueError: No such set, or something else lies in its place.
        DownloadError: It is behind a login, could not be fetched, or is not the recorded file.
        ArchiveError: What was fetched cannot be unpacked, or does not hold the data.
        OSError: The disk is full, or the folder cannot be written.
    """
    source = data_source(name)
    root = folder.expanduser()
    books = root / BOOKS
    books.mkdir(parents=True, exist_ok=True)
    with _alone(books / f"{name}.lock", on_note):
        return _fetch(source, root, books, url, accept_new, force, keep, patience, progress, on_note)


@contextlib.contextmanager
def _alone(path: Path, on_note: Callable[[str], None] | None) -> Iterator[None]:
    """No other process fetches this set meanwhile. The system lets go of the lock of one that is killed."""
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        if on_note is not None:
            on_note(f"another process fetches these data (it holds {path}); waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch(
    source: DataSource,
    root: Path,
    books: Path,
    url: str | None,
    accept_new: bool,
    force: bool,
    keep: bool,
    patience: Patience | None,
    progress: Progress | None,
    on_note: Callable[[str], None] | None,
) -> Fetched:
    place, stage, record = root / source.folder, books / f"{source.name}.unpacking", _read_record(books, source.name)
    # What a process that was killed left behind.
    shutil.rmtree(stage, ignore_errors=True)
    files, size = _measure(place)
    if record and (files, size) == (record["files"], record["bytes"]):
        sources = tuple(FetchedFile(**file) for file in record["sources"])
        return Fetched(source.name, str(place), files, size, False, sources, record["date"])
    if files and not force:
        if fault := _fault(source, place):
            raise ValueError(
                f"{place} is there and is not what {source.title} should be ({fault}); move it away, or have it "
                "replaced with --force"
            )
        return Fetched(source.name, str(place), files, size, False, (), None)
    known = {file["name"]: file["sha256"] for file in record["sources"]} if record else {}
    if source.bytes is not None and url is None:
        # All of it, before the first byte: archives, less what is here of them, and what is made of them.
        here = sum(_here(books / file.name) for file in source.files)
        check_space(root, source.bytes - here + source.unpacked, source.title)
    archives, fetched = [], []
    for file in source.files:
        archive, one = _archive(source, file, books, url, known, accept_new, patience, progress)
        archives.append(archive)
        fetched.append(one)
        if one.trusted == "first use" and on_note is not None:
            on_note(
                f"{one.name} is trusted on first use: nobody publishes a digest of it; sha256 {one.sha256} is recorded"
            )
    stage.mkdir()
    try:
        for archive in archives:
            _unpack(source, archive, stage, progress)
        if fault := _fault(source, stage):
            raise ArchiveError(f"what was fetched is not {source.title}: {fault}")
        sync_tree(stage)
        files, size = _measure(stage)
        date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
        done = Fetched(source.name, str(place), files, size, True, tuple(fetched), date)
        # First the record, then the data: what is there without a record would be taken for the user's own.
        write_whole(books / f"{source.name}.json", json.dumps(_record(done), indent=1).encode())
        _take_place(stage, place, books)
    except ArchiveError:
        # Else the next call would find them here.
        for archive in _ours(archives, books):
            archive.unlink()
        raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    if not keep:
        for archive in _ours(archives, books):
            archive.unlink()
    return done


def _archive(
    source: DataSource,
    file: RemoteFile,
    books: Path,
    url: str | None,
    known: dict[str, str],
    accept_new: bool,
    patience: Patience | None,
    progress: Progress | None,
) -> tuple[Path, FetchedFile]:
    """One archive, here and held against its digest."""
    urls = file.urls
    if url is not None:
        several = len(source.files) > 1
        urls = (f"{url.rstrip('/')}/{file.name}" if several else url,)
        if "://" not in url:
            return _handed_over(file, Path(urls[0]).expanduser(), known, accept_new)

    def show(done: int, total: int) -> None:
        if progress is not None:
            progress(f"fetching {file.name}", done, total)

    found = download(
        urls,
        books / file.name,
        sha256=file.sha256,
        size=file.bytes,
        most=file.most,
        reserve=source.unpacked,
        patience=patience,
        progress=show,
    )
    try:
        trusted = _trust(file, found.sha256, known, accept_new)
    except DownloadError:
        # Else the next call would find it here.
        found.path.unlink()
        raise
    return found.path, FetchedFile(file.name, found.url or urls[0], found.sha256, found.bytes, trusted)


def _handed_over(file: RemoteFile, path: Path, known: dict[str, str], accept_new: bool) -> tuple[Path, FetchedFile]:
    """An archive that the user has: it stays where it is."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file, and it is no address")
    digest = sha256_of_file(path)
    if file.sha256 not in (None, digest):
        raise DownloadError(f"{path} has sha256 {digest}, the published {file.name} has {file.sha256}")
    trusted = _trust(file, digest, known, accept_new)
    return path, FetchedFile(file.name, str(path), digest, path.stat().st_size, trusted)


def _trust(file: RemoteFile, digest: str, known: dict[str, str], accept_new: bool) -> str:
    if file.sha256 is not None:
        return "published"
    recorded = known.get(file.name)
    if recorded is None:
        return "first use"
    if recorded == digest:
        return "known"
    if not accept_new:
        raise DownloadError(
            f"{file.name} is not the file that was fetched before: its sha256 is {digest}, recorded is {recorded}; "
            "pass --accept-new if the new one is right"
        )
    return "accepted"


def _unpack(source: DataSource, archive: Path, stage: Path, progress: Progress | None) -> None:
    if source.limits is None:
        shutil.copyfile(archive, stage / archive.name)
        return

    def show(done: int, total: int) -> None:
        if progress is not None:
            progress(f"unpacking {archive.name}", done, total)

    unpack(archive, stage, source.limits, source.rename, show)


def _fault(source: DataSource, place: Path) -> str | None:
    """Why a folder is not what a source should give; None if it is."""
    if source.counted == "pictures" and source.name != "cifar10":
        found = sum(name.lower().endswith(IMG_EXTENSIONS) for _, _, names in os.walk(place) for name in names)
    elif source.limits is None:
        try:
            found = len(json.loads((place / source.files[0].name).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            return f"{source.files[0].name} cannot be read: {error}"
    else:
        checked = check_data(place)
        if checked is None:
            return "it holds no files of that kind"
        if checked.unreadable:
            path, reason = checked.unreadable[0]
            more = f", and {len(checked.unreadable) - 1:,} more" if len(checked.unreadable) > 1 else ""
            return f"{Path(path).name}: {reason}{more}"
        found = checked.samples
    if found != source.samples:
        return f"it holds {found:,} {source.counted}, not {source.samples:,}"
    return None


def _take_place(stage: Path, place: Path, books: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    old = books / f"{stage.stem}.old"
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        os.replace(place, old)
    os.replace(stage, place)
    with contextlib.suppress(PermissionError, IsADirectoryError):
        descriptor = os.open(place.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    shutil.rmtree(old, ignore_errors=True)


def _measure(place: Path) -> tuple[int, int]:
    """Files below a folder, and their bytes."""
    paths = [Path(root, name) for root, _, names in os.walk(place) for name in names]
    return len(paths), sum(path.stat().st_size for path in paths)


def _here(target: Path) -> int:
    """Bytes of an archive that are on the disk."""
    return max((path.stat().st_size for path in (target, part_of(target)) if path.is_file()), default=0)


def _ours(archives: list[Path], books: Path) -> list[Path]:
    """Without those that were handed over."""
    return [archive for archive in archives if archive.parent == books]


def _record(done: Fetched) -> dict[str, Any]:
    record = dataclasses.asdict(done)
    return {key: record[key] for key in ("name", "date", "files", "bytes", "sources")}


def _read_record(books: Path, name: str) -> dict[str, Any] | None:
    path = books / f"{name}.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        sources = [FetchedFile(**file) for file in record["sources"]]
        whole = all(isinstance(record[key], int) for key in ("files", "bytes")) and isinstance(record["date"], str)
        if not whole or not sources:
            raise ValueError("it says too little")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        # A digest that is not read is a digest that is not held against.
        raise ValueError(
            f"{path} is damaged ({error}): it says which archives were fetched; remove it to trust on first use again"
        ) from error
    return record
