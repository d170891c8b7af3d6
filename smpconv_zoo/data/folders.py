"""Pictures of a user, sorted into classes: found, opened one by one, and checked before anything is learned from them.

Four kinds, by timm's names, are told apart by what lies there, or by a prefix:

- ``DIR`` (``folder/``): a folder for every class, within ``train`` and ``val`` (or ``validation``) or, without a split,
  in ``DIR`` itself. As timm has it, the innermost folder's name is the class.
- ``DIR`` or ``FILE.tar`` (``tar/``): the same inside of tar files: one tar, a tar for every class, or a tar of tars;
  within ``train`` and ``val``, or as ``train.tar`` and ``val.tar``.
- ``DIR`` (``wds/``): WebDataset shards, ``KEY.jpg`` beside ``KEY.cls`` (or the field ``label`` of ``KEY.json``). The
  parts are those of timm's ``_info.json``, the folders ``train`` and ``val``, or told by the names of the shards.
- ``DIR`` (``hfds/``), or ``hfds/NAME`` of the Hub: a Hugging Face dataset, saved by ``save_to_disk`` or as parquet.

Tars and shards are indexed once, by their headers: after that every picture can be read by itself, wherever it lies.
The package ``webdataset`` is not needed for that. What can only be streamed, shards behind an address among it, is of
:mod:`smpconv_zoo.training.streams`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import Image, ImageOps
from timm.data import create_dataset
from timm.utils.misc import natural_key
from torchvision.datasets.folder import IMG_EXTENSIONS

__all__ = [
    "KINDS",
    "PicturePart",
    "PictureSet",
    "Pictures",
    "check_labels",
    "check_pictures",
    "class_number",
    "convert_picture",
    "decode_picture",
    "find_split",
    "open_part",
    "open_pictures",
    "picture_columns",
    "read_picture",
    "unreadable_pictures",
]

KINDS = ("folder", "tar", "wds", "hfds")
Progress = Callable[[int, int], None]
# Names of pictures, each with what is wrong about it.
Found = list[tuple[str, str]]

# timm's synonyms, in its order.
_TRAIN = ("train", "training")
_VALIDATION = ("val", "valid", "validation", "eval", "evaluation")
_HELP = {
    "folder": "DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg, or DIR/CLASS/*.jpg",
    "tar": "CLASS/*.jpg in DIR/train.tar, or DIR/train/CLASS.tar",
    "wds": "KEY.jpg and KEY.cls in DIR/*.tar",
    "hfds": "a column of pictures and one of labels",
}
# Names that a message lists before it counts the rest.
_NAMED = 10
# Pictures that a thread looks at before it reports.
_AT_A_TIME = 64
# Where the last marker of a picture is looked for: cameras and editors append things of their own behind it.
_TAIL = 2**16
_LAST_MARKER = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}


class PictureSet(Protocol):
    """Pictures by number, and their labels, ``(N,)`` int64."""

    labels: np.ndarray

    def name(self, index: int) -> str:
        """What a message calls a picture."""

    def open(self, index: int) -> BinaryIO:
        """The file of a picture."""

    def names(self) -> bytes:
        """What tells this set from another one, apart from where it lies and from its labels."""

    def order(self, indices: np.ndarray, draw: np.random.RandomState) -> np.ndarray:
        """``indices`` in the random order in which an epoch goes through them."""


@dataclasses.dataclass(frozen=True)
class Pictures:
    """What a user has to learn from.

    Args:
        where: As the user named it.
        kind: One of :data:`KINDS`.
        classes: Names, in the order of the labels; numbers where nobody names them.
        train: The training part.
        validation: The validation part; None if there is none.
    """

    where: str
    kind: str
    classes: tuple[str, ...]
    train: PictureSet
    validation: PictureSet | None


@dataclasses.dataclass(frozen=True)
class PicturePart:
    """Pictures to measure on; see :class:`Pictures`.

    Args:
        where: As the user named it.
        kind: One of :data:`KINDS`.
        classes: Names, in the order of the labels; numbers where nobody names them.
        pictures: The pictures, in an order that hangs on their names alone, or on that in a shard or table.
    """

    where: str
    kind: str
    classes: tuple[str, ...]
    pictures: PictureSet


def open_pictures(where: str | os.PathLike[str]) -> Pictures:
    """Find the parts of a data set, their pictures and classes. Names and headers are read, no picture is.

    Args:
        where: A folder or file, or PREFIX/PATH; see the top of this file.

    Raises:
        FileNotFoundError: There is nothing of this name.
        ValueError: No training pictures, one class alone, a class without pictures, or parts whose classes differ.
        ImportError: A Hugging Face dataset without the package that reads it.
    """
    where = os.fspath(where)
    kind, source = _named(where)
    if kind == "hfds":
        return _hugging_face(where, source)
    path = Path(source)
    kind = kind or _kind(path)
    if kind == "hfds":
        return _hugging_face(where, path)
    opened = {"folder": _folders, "tar": _tars, "wds": _shards}[kind](path)
    names, train, validation = opened
    return _checked(Pictures(where, kind, names, train, validation))


def open_part(where: str | os.PathLike[str]) -> PicturePart:
    """Find the pictures to measure on: the validation part, or all of them where there is no split.

    As :func:`open_pictures`, but for what has no training part, or one that nobody needs to look at.

    Args:
        where: A folder or file, or PREFIX/PATH; see the top of this file.

    Raises:
        FileNotFoundError: There is nothing of this name.
        ValueError: No pictures, pictures outside of the folders of classes, or without a label, or a split without a
            validation part.
        ImportError: A Hugging Face dataset without the package that reads it.
    """
    where = os.fspath(where)
    kind, source = _named(where)
    path = Path(source)
    if kind is None:
        kind = _kind(path)
        place = _child(path, _VALIDATION) if path.is_dir() else None
        if kind == "folder" and place is not None:
            kind = _kind(place)
    if kind == "hfds":
        return _hugging_face_part(where, source if isinstance(source, str) else path)
    if kind == "wds":
        pictures = _read_shards(_shards_to_measure(path))
        names = tuple(map(str, range(int(pictures.labels.max(initial=-1)) + 1)))
        return _checked_part(PicturePart(where, kind, names, pictures))
    place = path
    if path.is_dir():
        validation = _child(path, _VALIDATION)
        if validation is None and _child(path, _TRAIN) is not None:
            raise ValueError(f"{path} holds {_TRAIN[0]} but no {_VALIDATION[0]} to measure on")
        place = path if validation is None else validation
    found = _scan_folder(place) if kind == "folder" else _scan_tars(place)
    names, labels = _numbered(found.classes)
    files = _Files(found.where, found.pictures, labels) if kind == "folder" else None
    part = files or _Members(found.tars, found.pictures, labels, shards=False)
    return _checked_part(PicturePart(where, kind, names, part))


def check_pictures(
    pictures: Pictures,
    num_classes: int | None = None,
    *,
    full: bool = False,
    workers: int = 8,
    progress: Progress | None = None,
    share: tuple[int, int] = (0, 1),
    gather: Callable[[Found], list[Found]] = lambda found: [found],
) -> None:
    """Whether a network can learn from these pictures, before it does.

    Args:
        pictures: Of :func:`open_pictures`, which has looked at classes and parts already.
        num_classes: Outputs of the network; None if they are made to fit.
        full: Decode every picture, which takes as long as an epoch. Otherwise its header and its end are looked at,
            which finds what is no picture and what was cut off.
        workers: Threads.
        progress: Called with the pictures looked at and those in all.
        share: This process and how many there are, each of which looks at a part of the pictures.
        gather: Of what one of them found, what each did.

    Raises:
        ValueError: Labels that do not fit, or files that cannot be read, by name; the same on all processes.
    """
    check_labels(pictures, num_classes)
    found = unreadable_pictures(pictures, full=full, workers=workers, progress=progress, share=share)
    bad = sorted(chain.from_iterable(gather(found)), key=lambda one: natural_key(one[0]))
    if bad:
        total = sum(len(part.labels) for part in _parts(pictures))
        listed = _listed([f"{name} ({reason})" for name, reason in bad])
        raise ValueError(f"{len(bad):,} of {total:,} pictures cannot be read; mend or remove {listed}")


def check_labels(pictures: Pictures, num_classes: int | None) -> None:
    """Whether a network of ``num_classes`` outputs fits; see :func:`check_pictures`."""
    found = len(pictures.classes)
    # Of shards only those classes are known that occur.
    fits = num_classes is None or found == num_classes or (pictures.kind == "wds" and found < num_classes)
    if not fits:
        raise ValueError(
            f"{pictures.where} has {found:,} classes ({_listed(pictures.classes, 3)}), the network {num_classes:,}: "
            f"give it as many, arguments={{num_classes: {found}}}, or take the data that it was made for"
        )


def unreadable_pictures(
    pictures: Pictures,
    *,
    full: bool = False,
    workers: int = 8,
    progress: Progress | None = None,
    share: tuple[int, int] = (0, 1),
) -> Found:
    """Names of the pictures that cannot be read, each with the reason; see :func:`check_pictures`."""
    jobs = [
        (part, range(start, min(start + _AT_A_TIME, len(part.labels))))
        for part in _parts(pictures)
        for start in range(0, len(part.labels), _AT_A_TIME)
    ][share[0] :: share[1]]
    total, done, bad = sum(len(numbers) for _, numbers in jobs), 0, []

    def look(job: tuple[PictureSet, range]) -> Found:
        part, numbers = job
        reasons = ((index, _fault(part, index, full)) for index in numbers)
        return [(part.name(index), reason) for index, reason in reasons if reason is not None]

    with ThreadPoolExecutor(workers) as pool:
        for job, found in zip(jobs, pool.map(look, jobs), strict=True):
            bad += found
            done += len(job[1])
            if progress is not None:
                progress(done, total)
    return bad


def read_picture(pictures: PictureSet, index: int, mode: str = "RGB", upright: bool = True) -> Image.Image:
    """A picture as :func:`convert_picture` gives it.

    Args:
        pictures: Where it is.
        index: Its number.
        mode: ``"RGB"`` or ``"L"``.
        upright: Whether to turn it as its EXIF orientation says.

    Raises:
        ValueError: It cannot be read; the message names it.
    """
    return decode_picture(lambda: pictures.open(index), lambda: pictures.name(index), mode, upright)


def decode_picture(
    opened: Callable[[], BinaryIO], name: Callable[[], str], mode: str = "RGB", upright: bool = True
) -> Image.Image:
    """A picture as :func:`read_picture` gives it, from what ``opened`` opens; ``name`` is what a message calls it."""
    try:
        with opened() as file, Image.open(file) as image:
            return convert_picture(image, mode, upright)
    except Exception as error:  # OSErrors, SyntaxErrors, TypeErrors and more: whatever the bytes bring about
        raise ValueError(f"{name()} cannot be read as a picture: {_line(error)}") from error


def convert_picture(image: Image.Image, mode: str = "RGB", upright: bool = True) -> Image.Image:
    """An opened picture with 8-bit channels, whatever its file has.

    CMYK and palettes are converted, transparency is left out, 16-bit greys are scaled (not clipped).

    Args:
        image: As Pillow opened it.
        mode: ``"RGB"`` or ``"L"``.
        upright: Whether to turn it as its EXIF orientation says. ImageNet is learned and measured without.

    Raises:
        ValueError: Its pixels have no white: floating-point numbers, or greys beyond 16 bits.
        OSError: It is broken; Pillow has other errors for that, too.
    """
    if reason := _no_range(image.mode):
        raise ValueError(reason)
    if upright:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.mode == "P" and "transparency" in image.info:
        # Straight to RGB, Pillow warns of this.
        image = image.convert("RGBA")
    return image.convert(mode)


# ---------------------------------------------------------------------------------------------------------- one picture


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greys of 16 bits as greys of 8, white as white: Pillow's own conversion makes white of all above 255."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its greys go from {values.min()} to {values.max()}, beyond 16 bits")
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


def _no_range(mode: str) -> str | None:
    return "its pixels are floating-point numbers, of which none is white" if mode == "F" else None


def _fault(pictures: PictureSet, index: int, full: bool) -> str | None:
    """Why a picture cannot be read, by its header and its end or, if ``full``, by decoding it."""
    try:
        with pictures.open(index) as file, Image.open(file) as image:
            marker = _LAST_MARKER.get(image.format or "")
            if full or marker is None or not _ends(file, marker):
                convert_picture(image)
            return _no_range(image.mode)
    except Exception as error:  # see read_picture
        return _line(error)


def _ends(file: BinaryIO, marker: bytes) -> bool:
    place = file.tell()
    size = file.seek(0, os.SEEK_END)
    found = False
    for tail in (64, _TAIL):
        file.seek(max(0, size - tail))
        found = found or marker in file.read()
    file.seek(place)
    return found


# ----------------------------------------------------------------------------------------------------- sets of pictures


class _Files:
    """Files of a folder."""

    def __init__(self, root: Path, paths: Sequence[str], labels: Sequence[int]) -> None:
        self.root = root
        # One block of memory, which worker processes share: they would copy a list bit by bit as they count references.
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.labels = np.array(labels, dtype=np.int64)

    def name(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.paths[index]))

    def open(self, index: int) -> BinaryIO:
        return open(self.name(index), "rb")

    def names(self) -> bytes:
        return b"\n".join(self.paths.tolist())

    def order(self, indices: np.ndarray, draw: np.random.RandomState) -> np.ndarray:
        return draw.permutation(indices)


class _Members:
    """Files within uncompressed tar files, read by their place."""

    # As far apart in a shard pictures may have been that come one after the other: timm's buffer.
    WINDOW = 8192

    def __init__(self, tars: Sequence[Path], members: Sequence[_Member], labels: Sequence[int], shards: bool) -> None:
        self.tars = np.array([os.fsencode(path) for path in tars])
        self.tar = np.array([member.tar for member in members], dtype=np.int64)
        self.start = np.array([member.start for member in members], dtype=np.int64)
        self.size = np.array([member.size for member in members], dtype=np.int64)
        self.member = np.array([os.fsencode(member.name) for member in members])
        self.labels = np.array(labels, dtype=np.int64)
        self.shards = shards

    def name(self, index: int) -> str:
        return f"{os.fsdecode(self.tars[self.tar[index]])}:{os.fsdecode(self.member[index])}"

    def open(self, index: int) -> BinaryIO:
        path = os.fsdecode(self.tars[self.tar[index]])
        return io.BufferedReader(_Stretch(path, int(self.start[index]), int(self.size[index])))

    def names(self) -> bytes:
        return b"\n".join(self.member.tolist())

    def order(self, indices: np.ndarray, draw: np.random.RandomState) -> np.ndarray:
        """Shards are gone through one after the other, as they lie on the disk, mixed among neighbours."""
        if not self.shards:
            return draw.permutation(indices)
        place = draw.permutation(len(self.tars))[self.tar[indices]]
        ordered = indices[np.argsort(place, kind="stable")]
        # Windows begin somewhere else in every epoch.
        starts = np.arange(draw.randint(self.WINDOW), len(ordered), self.WINDOW)
        return np.concatenate([draw.permutation(window) for window in np.split(ordered, starts)])


class _Rows:
    """Rows of a Hugging Face dataset."""

    def __init__(self, where: str, rows: Any, key: str, labels: Sequence[int]) -> None:
        self.where = where
        self.rows = rows
        self.key = key
        self.labels = np.array(labels, dtype=np.int64)

    def name(self, index: int) -> str:
        path = (self.rows[index][self.key] or {}).get("path")
        return f"{self.where}, row {index}" + (f" ({path})" if path else "")

    def open(self, index: int) -> BinaryIO:
        picture = self.rows[index][self.key]
        if picture is None:
            raise ValueError("the row has no picture")
        return io.BytesIO(picture["bytes"]) if picture["bytes"] else open(picture["path"], "rb")

    def names(self) -> bytes:
        return str(len(self.rows)).encode()

    def order(self, indices: np.ndarray, draw: np.random.RandomState) -> np.ndarray:
        return draw.permutation(indices)


class _Stretch(io.RawIOBase):
    """A stretch of a file, as a file."""

    def __init__(self, path: str, start: int, size: int) -> None:
        super().__init__()
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - until this is closed
        self._start, self._size, self._place = start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence])
        return self._place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._size - self._place)]
        self._file.seek(self._start + self._place)
        count = self._file.readinto(view) if len(view) else 0
        self._place += count
        return count

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


# ------------------------------------------------------------------------------------------------------ what lies where


def _named(where: str) -> tuple[str | None, str | Path]:
    """The kind that a prefix names, and the path behind it, which exists; of a dataset on the Hub its name."""
    prefix, slash, rest = where.partition("/")
    kind = prefix.lower() if slash and prefix.lower() in KINDS else None
    if slash and kind is None and prefix.lower() in ("hfids", "tfds", "torch"):
        raise ValueError(
            f"{where}: data of the kind {prefix}/ are not taken; there are {', '.join(KINDS)}, and for training alone "
            "streams, hfids and tfds"
        )
    if "://" in where or where.startswith("wds/pipe:") or (kind == "wds" and "{" in rest):
        raise ValueError(
            f"{where}: what is streamed cannot be opened picture by picture; `smpconv-zoo train` takes it, named "
            "wds/ADDRESS"
        )
    path = Path(rest if kind else where).expanduser()
    if kind == "hfds" and not path.is_dir():
        # What is no folder here is a name on the Hub.
        return kind, rest
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder of pictures")
    return kind, path


def _kind(path: Path) -> str:
    if path.is_file():
        if path.suffix.lower() != ".tar":
            raise ValueError(
                f"{path} is no folder and no .tar file (compressed ones cannot be read picture by picture)"
            )
        return _kind_of_tar(path)
    if _is_saved(path) or any(list(path.glob(pattern)) for pattern in ("*.parquet", "data/*.parquet")):
        return "hfds"
    for folder in (path, _child(path, _TRAIN)):
        tars = [] if folder is None else [folder] if folder.is_file() else _tars_in(folder)
        if tars:
            return _kind_of_tar(tars[0])
    return "folder"


def _kind_of_tar(path: Path) -> str:
    for _, (member, _) in zip(range(8), _members(path, 0), strict=False):
        if member.name.endswith((".cls", ".json")):
            return "wds"
    return "tar"


def _is_saved(path: Path) -> bool:
    """Whether a folder was written by ``save_to_disk``."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _tars_in(folder: Path) -> list[Path]:
    found = (path for path in folder.glob("*.tar") if path.is_file() and not path.name.startswith("."))
    return sorted(found, key=lambda path: (natural_key(path.name), path.name))


def _child(root: Path, names: Iterable[str]) -> Path | None:
    """The part of one of these names: a tar, or a folder of more than pictures, which would make it a class."""
    for name in names:
        path = root / name
        if path.is_dir() and any(entry.is_dir() or entry.suffix == ".tar" for entry in path.iterdir()):
            return path
        if path.with_name(f"{name}.tar").is_file():
            return path.with_name(f"{name}.tar")
    return None


def _split(root: Path) -> tuple[Path, Path | None]:
    """Where the training and the validation part lie; all is for training where there is no split."""
    if root.is_file():
        return root, None
    train, validation = _child(root, _TRAIN), _child(root, _VALIDATION)
    if train is None and validation is not None:
        raise ValueError(f"{root} holds {validation.name} but no {_TRAIN[0]} to learn from")
    return (root, None) if train is None else (train, validation)


def _parts(pictures: Pictures) -> list[PictureSet]:
    return [part for part in (pictures.train, pictures.validation) if part is not None]


def _opened(
    root: Path, scan: Callable[[Path], _Scan], make: Callable[[_Scan, list[int]], PictureSet]
) -> tuple[tuple[str, ...], PictureSet, PictureSet | None]:
    """Both parts by the classes of the first: names, training part, validation part."""
    places = _split(root)
    scans = [scan(place) for place in places if place is not None]
    names, _ = _numbered(scans[0].classes)
    numbers = {name: number for number, name in enumerate(names)}
    if len(scans) == 2:
        unknown, missing = sorted(set(scans[1].classes) - set(names)), sorted(set(names) - set(scans[1].classes))
        for those, has, lacks in ((unknown, places[1], places[0]), (missing, places[0], places[1])):
            if those:
                raise ValueError(
                    f"training and validation have different classes: {_listed(those)} in {has}, but not in {lacks}"
                )
    parts = [make(found, [numbers[name] for name in found.classes]) for found in scans]
    return names, parts[0], parts[1] if len(parts) == 2 else None


def _numbered(classes: Sequence[str]) -> tuple[tuple[str, ...], list[int]]:
    """Names of the classes in their order, and the number of the class of each picture."""
    # With the name itself for what is equal to timm's key, such as 1 and 01: the order must not be one of chance.
    names = tuple(sorted(set(classes), key=lambda name: (natural_key(name), name)))
    numbers = {name: number for number, name in enumerate(names)}
    return names, [numbers[name] for name in classes]


@dataclasses.dataclass(frozen=True)
class _Scan:
    """What was found in a part: where, the pictures, and the name of the class of each."""

    where: Path
    tars: list[Path]
    pictures: list[Any]
    classes: list[str]


def _checked_part(part: PicturePart) -> PicturePart:
    """Refuse what nothing can be measured on."""
    labels = part.pictures.labels
    if not len(labels):
        raise ValueError(f"{part.where} has no pictures; expected {_HELP[part.kind]}")
    if labels.min() < 0:
        raise ValueError(f"{part.where} has {(labels < 0).sum():,} pictures without a label")
    if labels.max() >= len(part.classes):
        raise ValueError(f"{part.where} has a label {labels.max()}, but {len(part.classes)} classes")
    return part


def _checked(pictures: Pictures) -> Pictures:
    """Refuse what nothing can be learned from."""
    for part, name in ((pictures.train, "training"), (pictures.validation, "validation")):
        if part is None:
            continue
        if not len(part.labels):
            raise ValueError(f"{pictures.where} has no {name} pictures; expected {_HELP[pictures.kind]}")
        if part.labels.min() < 0:
            raise ValueError(f"{pictures.where} has {(part.labels < 0).sum():,} {name} pictures without a label")
        if part.labels.max() >= len(pictures.classes):
            raise ValueError(
                f"{pictures.where} has a {name} label {part.labels.max()}, but {len(pictures.classes)} classes to learn"
            )
    counts = np.bincount(pictures.train.labels, minlength=len(pictures.classes))
    empty = [pictures.classes[label] for label in np.flatnonzero(counts == 0)]
    if empty:
        raise ValueError(f"{pictures.where} has classes without a training picture: {_listed(empty)}")
    if len(pictures.classes) < 2:
        raise ValueError(
            f"{pictures.where} has one class alone ({pictures.classes[0]}), from which there is nothing to tell; "
            f"expected {_HELP[pictures.kind]}"
        )
    return pictures


# --------------------------------------------------------------------------------------------------- folders of classes


def _folders(root: Path) -> tuple[tuple[str, ...], PictureSet, PictureSet | None]:
    return _opened(root, _scan_folder, lambda found, labels: _Files(found.where, found.pictures, labels))


def _scan_folder(root: Path) -> _Scan:
    if not root.is_dir():
        raise ValueError(f"{root} is no folder of pictures")
    try:
        reader = create_dataset("", root=str(root), search_split=False, input_key=";".join(IMG_EXTENSIONS)).reader
    except RuntimeError as error:
        raise ValueError(
            f"{root} holds no picture ({', '.join(IMG_EXTENSIONS)}); expected {_HELP['folder']}"
        ) from error
    names = {number: name for name, number in reader.class_to_idx.items()}
    found = sorted((os.path.relpath(path, root), names[label]) for path, label in reader.samples)
    # Left behind by file managers and notebooks: ._1.jpg, .ipynb_checkpoints.
    found = [(path, name) for path, name in found if not any(part.startswith(".") for part in Path(path).parts)]
    loose = [path for path, name in found if not name]
    if loose:
        raise ValueError(f"{root} holds pictures outside of the folders of classes: {_listed(loose)}")
    filled = {Path(path).parts[0] for path, _ in found}
    folders = {entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    if {name for _, name in found} <= {*_TRAIN, *_VALIDATION, "test"}:
        raise ValueError(f"{root} has pictures in {_listed(sorted(filled))} itself; expected {_HELP['folder']}")
    if empty := sorted(folders - filled):
        raise ValueError(f"{root} has classes without a picture: {_listed(empty)}; fill or remove them")
    return _Scan(root, [], [path for path, _ in found], [name for _, name in found])


# ------------------------------------------------------------------------------------------------------ tars and shards


@dataclasses.dataclass(frozen=True)
class _Member:
    """A file within the ``tar``-th tar: ``size`` bytes from ``start`` on. Names of inner tars precede its ``name``."""

    tar: int
    name: str
    start: int
    size: int


def _members(path: Path, number: int) -> Iterator[tuple[_Member, BinaryIO]]:
    """The files in a tar, those of tars in it included, and each as an open file. Headers are read, no contents."""

    def walk(tar: tarfile.TarFile, base: int, above: str) -> Iterator[tuple[_Member, BinaryIO]]:
        while (info := tar.next()) is not None:
            # Otherwise it keeps the headers of all, a kilobyte each.
            tar.members.clear()  # type: ignore[attr-defined]
            hidden = any(part.startswith(".") and part != "." for part in info.name.split("/"))
            if not info.isfile() or hidden:
                continue
            file: Any = tar.extractfile(info)
            name, start = os.path.normpath(os.path.join(above, info.name)), base + info.offset_data
            if name.lower().endswith(".tar"):
                with tarfile.open(fileobj=file, mode="r:") as inner:
                    yield from walk(inner, start, os.path.splitext(name)[0])
            else:
                yield _Member(number, name, start, info.size), file

    try:
        with tarfile.open(path, "r:") as tar:
            yield from walk(tar, 0, "")
    except tarfile.TarError as error:
        raise ValueError(f"{path} cannot be read as an uncompressed tar: {_line(error)}") from error


def _tars(root: Path) -> tuple[tuple[str, ...], PictureSet, PictureSet | None]:
    return _opened(root, _scan_tars, lambda found, labels: _Members(found.tars, found.pictures, labels, shards=False))


def _scan_tars(place: Path) -> _Scan:
    tars = [place] if place.is_file() else _tars_in(place)
    found = []
    for number, tar in enumerate(tars):
        # A tar beside others is the class of what lies in it, as with timm.
        above = "" if place.is_file() else tar.stem
        for member, _ in _members(tar, number):
            if member.name.lower().endswith(IMG_EXTENSIONS):
                found.append((os.path.dirname(os.path.join(above, member.name)), member))
    found.sort(key=lambda pair: (pair[0], pair[1].name))
    loose = [member.name for folder, member in found if not folder]
    if loose:
        raise ValueError(f"{place} holds pictures outside of the folders of classes: {_listed(loose)}")
    if not found:
        raise ValueError(f"{place} holds no picture ({', '.join(IMG_EXTENSIONS)}); expected {_HELP['tar']}")
    return _Scan(place, tars, [member for _, member in found], [os.path.basename(folder) for folder, _ in found])


def _shards(root: Path) -> tuple[tuple[str, ...], PictureSet, PictureSet | None]:
    train, validation = (None if part is None else _read_shards(part) for part in _split_shards(root))
    assert train is not None
    count = int(train.labels.max()) + 1 if len(train.labels) else 0
    return tuple(map(str, range(count))), train, validation


def _split_shards(root: Path) -> tuple[list[Path], list[Path] | None]:
    if root.is_file():
        return [root], None
    if (declared := _declared_shards(root)) is not None:
        train, validation = (_first(names, declared) for names in (_TRAIN, _VALIDATION))
        if train is None:
            raise ValueError(f"{root} has no split {_TRAIN[0]} to learn from, only {', '.join(declared)}")
        return _there(root, declared[train]), None if validation is None else _there(root, declared[validation])
    train_place, validation_place = _split(root)
    if train_place != root:
        return _shards_at(train_place), None if validation_place is None else _shards_at(validation_place)
    tars, to_learn, to_measure = _shards_by_name(root)
    if to_measure and not to_learn:
        raise ValueError(f"{root} holds shards to validate on, {to_measure[0].name}, but none to learn from")
    return (to_learn, to_measure or None) if to_learn else (tars, None)


def _shards_to_measure(root: Path) -> list[Path]:
    """Those of the validation part, or all where there is no split."""
    if root.is_file():
        return [root]
    if (declared := _declared_shards(root)) is not None:
        split = _first(_VALIDATION, declared) or (next(iter(declared)) if len(declared) == 1 else None)
        if split is None:
            raise ValueError(f"{root} has no split {_VALIDATION[0]} to measure on, only {', '.join(declared)}")
        return _there(root, declared[split])
    validation = _child(root, _VALIDATION)
    if validation is not None:
        return _shards_at(validation)
    tars, to_learn, to_measure = _shards_by_name(root)
    if (to_learn or _child(root, _TRAIN) is not None) and not to_measure:
        raise ValueError(f"{root} holds shards to learn from, but none to measure on")
    return to_measure or tars


def _declared_shards(root: Path) -> dict[str, list[Path]] | None:
    """The splits that timm's ``_info.json`` names; None without such a file."""
    for name in ("_info.json", "info.json"):
        if not (root / name).is_file():
            continue
        try:
            splits = json.loads((root / name).read_text(encoding="utf-8"))["splits"]
            return {split: [root / file for file in of["filenames"]] for split, of in splits.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{root / name} does not say what shards there are: {_line(error)}") from error
    return None


def _there(root: Path, shards: list[Path]) -> list[Path]:
    if missing := [str(path) for path in shards if not path.is_file()]:
        raise ValueError(f"{root} names shards in its _info.json that are not there: {_listed(missing)}")
    return shards


def _shards_at(place: Path) -> list[Path]:
    return [place] if place.is_file() else _tars_in(place)


def _shards_by_name(root: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """All shards of a folder; those whose names say that they are to learn from, and to validate on."""
    tars = _tars_in(root)
    words = {path: set(re.split(r"[^a-z]+", path.stem.lower())) for path in tars}
    to_learn, to_measure = ([path for path in tars if words[path] & set(names)] for names in (_TRAIN, _VALIDATION))
    return tars, to_learn, to_measure


def _read_shards(tars: list[Path]) -> _Members:
    pictures: list[_Member] = []
    labels: list[int] = []
    for number, tar in enumerate(tars):
        waiting: dict[str, _Member] = {}
        known: dict[str, int] = {}
        described: dict[str, bytes] = {}
        for member, file in _members(tar, number):
            folder, base = os.path.split(member.name)
            stem, _, suffix = base.partition(".")
            key, suffix = os.path.join(folder, stem), suffix.lower()
            if f".{suffix}" in IMG_EXTENSIONS:
                waiting[key] = member
            elif suffix == "cls":
                known[key] = class_number(file.read(), f"{tar}:{member.name}")
            elif suffix == "json":
                described[key] = file.read()
        for key in set(waiting) & set(described) - set(known):
            known[key] = class_number(described[key], f"{tar}:{key}.json", "label")
        if bare := sorted(set(waiting) - set(known)):
            raise ValueError(f"{tar} holds pictures without a label, KEY.cls beside KEY.jpg: {_listed(bare)}")
        pictures += waiting.values()
        labels += [known[key] for key in waiting]
    return _Members(tars, pictures, labels, shards=True)


def class_number(data: bytes, name: str, field: str | None = None) -> int:
    """The number of a class that a file holds, alone or as a field of JSON."""
    try:
        return int(data if field is None else json.loads(data)[field])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name} holds no number of a class: {_line(error)}") from error


# ------------------------------------------------------------------------------------------------ Hugging Face datasets


def _hugging_face(where: str, source: str | Path) -> Pictures:
    splits = _hugging_face_splits(where, source)
    train = find_split(splits, training=True)
    if train is None:
        raise ValueError(f"{where} has no split {_TRAIN[0]} to learn from, only {', '.join(splits)}")
    names, picture, label = _hugging_face_classes(where, splits[train])
    validation = find_split(splits, training=False)
    rows = [
        None if split is None else _hugging_face_rows(where, splits, split, picture, label, names)
        for split in (train, validation)
    ]
    assert rows[0] is not None
    return _checked(Pictures(where, "hfds", names, rows[0], rows[1]))


def _hugging_face_part(where: str, source: str | Path) -> PicturePart:
    splits = _hugging_face_splits(where, source)
    split = _first(_VALIDATION, splits) or (next(iter(splits)) if len(splits) == 1 else None)
    if split is None:
        raise ValueError(f"{where} has no split {_VALIDATION[0]} to measure on, only {', '.join(splits)}")
    # Classes that are named by strings in the rows alone are numbered as in training, where there is a training part.
    names, picture, label = _hugging_face_classes(where, splits[_first(_TRAIN, splits) or split])
    return _checked_part(
        PicturePart(where, "hfds", names, _hugging_face_rows(where, splits, split, picture, label, names))
    )


def _hugging_face_splits(where: str, source: str | Path) -> dict[str, Any]:
    if importlib.util.find_spec("datasets") is None:
        raise ImportError(
            f'{where} is a Hugging Face dataset, for which a package is needed: pip install "smpconv-zoo[hf]"'
        )
    import datasets

    try:
        if isinstance(source, Path) and _is_saved(source):
            found = datasets.load_from_disk(str(source))
        else:
            found = datasets.load_dataset(str(source))
    except Exception as error:  # of the Hub, of file formats, of arrow: whatever the data bring about
        raise ValueError(f"{where} cannot be opened as a Hugging Face dataset: {_line(error)}") from error
    return dict(found) if isinstance(found, dict) else {_TRAIN[0]: found}


def _hugging_face_classes(where: str, rows: Any) -> tuple[tuple[str, ...], str, str]:
    """Names of the classes, and of the columns of pictures and labels."""
    features = rows.features
    picture, label = picture_columns(where, features)
    names = getattr(features[label], "names", None)
    if names is None:
        values = [value for value in rows[label][:] if value is not None]
        strings = any(isinstance(value, str) for value in values)
        names = sorted(set(values), key=lambda name: (natural_key(name), name)) if strings else None
        names = names or [str(number) for number in range(max(values, default=-1) + 1)]
    return tuple(names), picture, label


def _hugging_face_rows(
    where: str, splits: dict[str, Any], split: str, picture: str, label: str, names: Sequence[str]
) -> _Rows:
    import datasets

    numbers = {name: number for number, name in enumerate(names)}
    rows = splits[split].select_columns([picture]).cast_column(picture, datasets.Image(decode=False))
    values = splits[split][label][:]
    if unknown := sorted({value for value in values if isinstance(value, str)} - set(numbers)):
        raise ValueError(f"{where} has classes in {split} that are not in {_TRAIN[0]}: {_listed(unknown)}")
    labels = [-1 if value is None else numbers.get(value, value) for value in values]
    return _Rows(f"{where}, {split}", rows, picture, labels)


def find_split(names: Iterable[str], *, training: bool) -> str | None:
    """The split to learn from, or to validate on, by timm's synonyms; None if there is none."""
    return _first(_TRAIN if training else _VALIDATION, names)


def picture_columns(where: str, features: Any) -> tuple[str, str]:
    """Names of the columns of pictures and of labels among the features of a Hugging Face dataset.

    Raises:
        ValueError: There is no such column.
    """
    import datasets

    return (
        _column(where, features, ("image", "img", "picture"), datasets.Image),
        _column(where, features, ("label", "labels", "class", "fine_label"), datasets.ClassLabel),
    )


def _column(where: str, features: Any, usual: tuple[str, ...], kind: type) -> str:
    """The column of a kind; if there are several of that kind, or none, the one of a usual name."""
    of_kind = [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(of_kind) == 1:
        return of_kind[0]
    name = _first(usual, of_kind or list(features))
    if name is None:
        raise ValueError(f"{where} has no column {' or '.join(usual[:2])}, only {', '.join(features)}")
    return name


def _first(names: Iterable[str], there: Iterable[str]) -> str | None:
    there = set(there)
    return next((name for name in names if name in there), None)


def _listed(names: Sequence[str], most: int = _NAMED) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
