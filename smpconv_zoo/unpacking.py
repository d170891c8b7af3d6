"""Archives from elsewhere, unpacked into an empty folder: plain files, inside of it, not more than was agreed on."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO

__all__ = ["ArchiveError", "Limits", "Unpacked", "sync_tree", "unpack"]

Progress = Callable[[int, int], None]

BLOCK = 2**20
# Headers of a tar (long names, sparse maps) are read in one piece; none of an honest archive is as large.
LARGEST_HEADER = 2**21
# With more files than these the whole file system is written out at once.
SYNCED_ONE_BY_ONE = 1000


class ArchiveError(ValueError):
    """An archive that is damaged, or holds what must not be unpacked."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What an archive may hold: so many members, and so many bytes once they are decompressed."""

    files: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Unpacked:
    """How many files were written, and their bytes."""

    files: int
    bytes: int


def unpack(
    archive: Path,
    folder: Path,
    limits: Limits,
    rename: Callable[[str], str | None] = lambda name: name,
    progress: Progress | None = None,
) -> Unpacked:
    """Unpack a tar (plain or compressed), zip or gzip archive into ``folder``.

    Nothing but plain files and folders is taken: with a link, a device, an absolute name, one that leads out of the
    folder or one that comes twice the whole archive is refused, which is stricter than tarfile's filter for data.
    Owners, permissions and times of the archive are not taken over. Decompressed bytes are counted as they come, not as
    they are announced.

    Args:
        archive: The file. A tar and a zip are told by what they hold, of gzip a single file is taken, under the
            archive's name without ``.gz``.
        folder: Where to; it exists and is empty.
        limits: Of all members together, those included that are left out.
        rename: From the name of a member, with ``/``, to its place in the folder; None leaves it out.
        progress: Called with the bytes of the archive that were gone through and in all.

    Raises:
        ArchiveError: See above. What was written so far is left in the folder.
        OSError: The archive cannot be read, or the folder cannot be written.
    """
    total = archive.stat().st_size
    try:
        if zipfile.is_zipfile(archive):
            members = _zip_members(archive, limits)
        elif _is_tar(archive):
            members = _tar_members(archive, limits)
        else:
            members = _gzip_member(archive, limits)
        files = written = 0
        places: set[str] = set()
        for seen, (name, content, done) in enumerate(members, start=1):
            if seen > limits.files:
                raise ArchiveError(f"{archive.name} holds more than {limits.files:,} members")
            place = rename(_checked(name, archive))
            if content is not None and place is not None:
                place = str(PurePosixPath(_checked(place, archive)))
                # Some file systems take two names for one that differ in case alone.
                if place.casefold() in places:
                    raise ArchiveError(f"{archive.name} holds {name} twice")
                places.add(place.casefold())
                written += _write(content, folder / place, limits.bytes - written, archive)
                files += 1
            if progress is not None:
                progress(done(), total)
    except ArchiveError:
        raise
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ArchiveError(f"{archive.name} is damaged, or no archive: {_line(error)}") from error
    except OSError as error:
        # gzip's own errors have no number; those of the system have.
        if error.errno is not None:
            raise
        raise ArchiveError(f"{archive.name} is damaged, or no archive: {_line(error)}") from error
    if not files:
        raise ArchiveError(f"{archive.name} holds none of the files that are looked for")
    return Unpacked(files, written)


def sync_tree(folder: Path) -> None:
    """Have all files below a folder, and their names, reach the disk."""
    folders = [Path(root) for root, _, _ in os.walk(folder)]
    files = [Path(root, name) for root, _, names in os.walk(folder) for name in names]
    if len(files) > SYNCED_ONE_BY_ONE and hasattr(os, "sync"):
        os.sync()
        return
    for path in [*files, *folders]:
        # A folder cannot be opened everywhere; where it cannot, its names need no such care.
        with contextlib.suppress(PermissionError, IsADirectoryError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


# A member: its name, its content (None for a folder), and how far the archive was gone through.
_Member = tuple[str, Any, Callable[[], int]]


def _checked(name: str, archive: Path) -> str:
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0] or "\0" in name:
        raise ArchiveError(f"{archive.name} holds {name!r}, which leads out of the folder")
    return "/".join(part for part in parts if part not in ("", "."))


def _write(content: IO[bytes], path: Path, left: int, archive: Path) -> int:
    size = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = open(path, "xb")  # noqa: SIM115
    except (FileExistsError, NotADirectoryError) as error:
        raise ArchiveError(f"{archive.name} holds a file and a folder of one name, {path.name}") from error
    with opened as file:
        while block := content.read(BLOCK):
            size += len(block)
            if size > left:
                raise ArchiveError(f"{archive.name} grows beyond the bytes that it may hold, at {path.name}")
            file.write(block)
    return size


def _is_tar(path: Path) -> bool:
    try:
        with _decompressed(path, 2 * LARGEST_HEADER) as file, tarfile.open(fileobj=file, mode="r:"):  # type: ignore[call-overload]
            return True
    except (tarfile.TarError, EOFError, zlib.error, OSError):
        return False


@contextlib.contextmanager
def _decompressed(path: Path, most: int) -> Iterator[_Bounded]:
    """The bytes of a file, decompressed if it is a gzip file, of which so many can be read."""
    with open(path, "rb") as raw:
        compressed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        if not compressed:
            yield _Bounded(raw, raw, most, path)
            return
        with gzip.GzipFile(fileobj=raw, mode="rb") as file:
            yield _Bounded(file, raw, most, path)


class _Bounded:
    """A file of which no more than ``most`` bytes can be gone through: what tarfile skips is decompressed, too."""

    def __init__(self, file: Any, raw: BinaryIO, most: int, path: Path) -> None:
        self.file, self.raw, self.most, self.path = file, raw, most, path

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= LARGEST_HEADER:
            raise ArchiveError(f"{self.path.name} has a header of {size:,} bytes")
        self._check(self.file.tell() + size)
        return self.file.read(size)

    def seek(self, place: int, whence: int = 0) -> int:
        self._check(place)
        return self.file.seek(place, whence)

    def tell(self) -> int:
        return self.file.tell()

    def _check(self, place: int) -> None:
        if place > self.most:
            raise ArchiveError(f"{self.path.name} grows beyond the bytes that it may hold")


def _tar_members(path: Path, limits: Limits) -> Iterator[_Member]:
    # Beside its content a member has a header, often a second one, and is filled up to whole blocks.
    most = limits.bytes + 4096 * limits.files + 2 * LARGEST_HEADER
    with _decompressed(path, most) as file, tarfile.open(fileobj=file, mode="r:") as tar:  # type: ignore[call-overload]
        while (info := tar.next()) is not None:
            # Otherwise it keeps the headers of all, a kilobyte each.
            tar.members.clear()
            if not (info.isreg() or info.isdir()) or info.issparse():
                raise ArchiveError(f"{path.name} holds {info.name!r}, which is neither a plain file nor a folder")
            content = tar.extractfile(info) if info.isreg() else None
            yield info.name, content, file.raw.tell


def _zip_members(path: Path, limits: Limits) -> Iterator[_Member]:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if len(entries) > limits.files:
            raise ArchiveError(f"{path.name} holds {len(entries):,} members, {limits.files:,} at most are taken")
        if sum(entry.file_size for entry in entries) > limits.bytes:
            raise ArchiveError(f"{path.name} grows beyond the bytes that it may hold")
        done = 0

        def so_far() -> int:
            return done

        for entry in entries:
            kind = stat.S_IFMT(entry.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise ArchiveError(f"{path.name} holds {entry.filename!r}, which is neither a plain file nor a folder")
            done += entry.compress_size
            if entry.is_dir():
                yield entry.filename, None, so_far
                continue
            with archive.open(entry) as content:
                yield entry.filename, content, so_far


def _gzip_member(path: Path, limits: Limits) -> Iterator[_Member]:
    with open(path, "rb") as raw, gzip.GzipFile(fileobj=raw, mode="rb") as content:
        if not raw.peek(1):
            raise ArchiveError(f"{path.name} is damaged, or no archive: it is empty")
        yield path.name.removesuffix(".gz"), content, raw.tell


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
