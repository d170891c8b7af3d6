"""What lies in a folder: which of the tasks' data, how many samples, what cannot be read, how it would be split."""

from __future__ import annotations

import dataclasses
import gzip
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10, MNIST

from smpconv_zoo.data.pictures import read_cifar10_batch
from smpconv_zoo.data.protocol import hold_out, split_70_15_15
from smpconv_zoo.data.speech_commands import SAMPLE_RATE, WORDS, clip_samples, list_clips, read_clip
from smpconv_zoo.data.ts_files import read_ts

__all__ = ["CheckedData", "check_data"]

Progress = Callable[[int, int], None]

# Share of the training part that the sound protocol chooses by; the recipes' own.
HELD_OUT = 0.1
# A header and 60,000 pictures; what is larger is no file of MNIST.
LARGEST_IDX = 47_040_016


@dataclasses.dataclass(frozen=True)
class CheckedData:
    """What was found.

    ``kind`` is ``"mnist"``, ``"cifar10"``, ``"ts"`` or ``"speech-commands"``; ``name`` is what cards call the data.
    ``files`` counts samples by the parts in which they come. ``protocols`` gives, for ``"reference"`` and ``"sound"``,
    how many samples would be learned from, chosen by and tested on, and a sentence about it; it is empty where the
    files do not allow a split. ``unreadable`` names every file that cannot be read, and why; ``notes`` are sentences
    about what is not a fault, and should be known.
    """

    kind: str
    name: str
    place: Path
    classes: int
    files: dict[str, int]
    protocols: dict[str, dict[str, int | str]]
    unreadable: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()

    @property
    def samples(self) -> int:
        """All that can be read."""
        return sum(self.files.values())


def check_data(place: Path, full: bool = False, progress: Progress | None = None) -> CheckedData | None:
    """Look at the files of MNIST, CIFAR-10, of a set in ``.ts`` files, or of Speech Commands.

    Args:
        place: The folder that holds them, or one above it; see the names in :data:`_KINDS`.
        full: Read every recording of Speech Commands; its header and size if not. The others are read in any case.
        progress: Called with the files looked at and in all.

    Returns:
        What was found, of several the first, with a note that names the others; None if it is none of these.

    Raises:
        OSError: The folder cannot be read.
        ImportError: scikit-learn, which draws the split of 70 / 15 / 15, is not installed.
    """
    there = []
    for below, looks_like, check in _KINDS:
        folders = (place / name for name in below)
        folder = next((path for path in folders if path.is_dir() and looks_like(path)), None)
        if folder is not None:
            there.append((folder, check))
    if not there:
        return None
    (folder, check), *others = there
    checked = check(folder, full, progress)
    notes = tuple(f"{other} holds other data: name it to have them looked at" for other, _ in others)
    return dataclasses.replace(checked, notes=(*checked.notes, *notes))


# ---------------------------------------------------------------------------------------------------------------- MNIST


def _idx_files() -> list[str]:
    return [name.removesuffix(".gz") for name, _ in MNIST.resources]


def _is_mnist(folder: Path) -> bool:
    return any((folder / name).is_file() or (folder / f"{name}.gz").is_file() for name in _idx_files())


def _mnist(folder: Path, full: bool, progress: Progress | None) -> CheckedData:
    arrays: dict[str, np.ndarray] = {}
    unreadable: list[tuple[str, str]] = []
    packed = []
    names = _idx_files()
    for done, name in enumerate(names, start=1):
        path = folder / name
        if not path.is_file():
            path = folder / f"{name}.gz"
            packed.append(path.name)
        try:
            arrays[name] = _read_idx(path, (28, 28) if "images" in name else ())
        except (OSError, ValueError) as error:
            unreadable.append((str(path), _reason(error)))
        if progress is not None:
            progress(done, len(names))
    counts, labels = {}, {}
    for part, prefix in (("train", "train"), ("test", "t10k")):
        x, y = arrays.get(f"{prefix}-images-idx3-ubyte"), arrays.get(f"{prefix}-labels-idx1-ubyte")
        if x is None or y is None:
            continue
        if len(x) != len(y) or (len(y) and y.max() > 9):
            unreadable.append((str(folder), f"{len(x):,} pictures and {len(y):,} labels of {part} do not fit"))
            continue
        counts[part], labels[part] = len(y), y
    notes = (f"{', '.join(packed)}: to be unpacked before they are used",) if packed and not unreadable else ()
    return _of_two_parts("mnist", "MNIST", folder, counts, labels, unreadable, notes)


def _read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The bytes of an idx file, (N, *shape) uint8: a header of big-endian sizes, then the values."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
        try:
            data = file.read(LARGEST_IDX + 1)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"it is no complete gzip file: {_reason(error)}") from error
    rank = 1 + len(shape)
    head = 4 + 4 * rank
    if data[:4] != bytes([0, 0, 8, rank]) or len(data) < head:
        raise ValueError("it does not begin like a file of MNIST")
    sizes = tuple(int(size) for size in np.frombuffer(data[4:head], ">u4"))
    expected = head + int(np.prod(sizes, dtype=np.int64))
    if sizes[1:] != shape or len(data) != expected:
        raise ValueError(
            f"it announces {' x '.join(map(str, sizes))} values, {expected:,} bytes, and has {len(data):,}"
        )
    return np.frombuffer(data[head:], np.uint8).reshape(sizes)


# ------------------------------------------------------------------------------------------------------------- CIFAR-10


def _is_cifar10(folder: Path) -> bool:
    return any((folder / name).is_file() for name, _ in CIFAR10.train_list + CIFAR10.test_list)


def _cifar10(folder: Path, full: bool, progress: Progress | None) -> CheckedData:
    counts: Counter[str] = Counter()
    labels: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    unreadable: list[tuple[str, str]] = []
    batches = [("train", *batch) for batch in CIFAR10.train_list] + [("test", *batch) for batch in CIFAR10.test_list]
    for done, (part, name, md5) in enumerate(batches, start=1):
        try:
            _, y = read_cifar10_batch(folder / name, md5)
            counts[part] += len(y)
            labels[part].append(y)
        except (OSError, ValueError) as error:
            unreadable.append((str(folder / name), _reason(error)))
        if progress is not None:
            progress(done, len(batches))
    if not (folder / CIFAR10.meta["filename"]).is_file():
        unreadable.append((str(folder / CIFAR10.meta["filename"]), "it is missing"))
    joined = {part: np.concatenate(arrays) for part, arrays in labels.items() if arrays}
    return _of_two_parts("cifar10", "CIFAR-10", folder, dict(counts), joined, unreadable, ())


def _of_two_parts(
    kind: str,
    name: str,
    folder: Path,
    counts: dict[str, int],
    labels: dict[str, np.ndarray],
    unreadable: Sequence[tuple[str, str]],
    notes: tuple[str, ...],
) -> CheckedData:
    """A set that is published in a training and a test part."""
    protocols: dict[str, dict[str, int | str]] = {}
    if not unreadable and counts.get("train") and counts.get("test"):
        train, test = counts["train"], counts["test"]
        protocols["reference"] = _protocol(train, test, test, "chosen by the test part, as the authors do")
        try:
            learned, chosen = hold_out(labels["train"], HELD_OUT)
        except ValueError as error:
            notes = (*notes, f"nothing can be set aside to choose by: {error}")
        else:
            share = f"chosen by {100 * HELD_OUT:g} % of every class of the training part, set aside"
            protocols["sound"] = _protocol(len(learned), len(chosen), test, share)
    return CheckedData(kind, name, folder, 10, counts, protocols, tuple(unreadable), notes)


# -------------------------------------------------------------------------------------------------- series in .ts files


def _ts_names(folder: Path) -> list[str]:
    names = sorted(path.name.removesuffix("_TRAIN.ts") for path in folder.glob("*_TRAIN.ts"))
    return names or sorted(path.name.removesuffix("_TEST.ts") for path in folder.glob("*_TEST.ts"))


def _ts(folder: Path, full: bool, progress: Progress | None) -> CheckedData:
    name, *others = _ts_names(folder)
    counts, labels, channels, lengths = {}, [], set(), []
    unreadable = []
    for done, part in enumerate(("TRAIN", "TEST"), start=1):
        path = folder / f"{name}_{part}.ts"
        try:
            series, classes = read_ts(path)
        except (OSError, ValueError) as error:
            unreadable.append((str(path), _reason(error)))
            continue
        finally:
            if progress is not None:
                progress(done, 2)
        counts[part.lower()] = len(series)
        labels += classes
        channels |= {len(one) for one in series}
        lengths += [len(channel) for one in series for channel in one]
    notes = [f"{', '.join(others)} in the same folder not looked at"] if others else []
    if len(channels) > 1:
        unreadable.append((str(folder), f"series of {', '.join(map(str, sorted(channels)))} channels in one set"))
    elif lengths:
        steps = f"{min(lengths)} to {max(lengths)}" if min(lengths) < max(lengths) else f"{max(lengths)}"
        notes.append(f"{channels.pop()} channels, {steps} steps")
    protocols: dict[str, dict[str, int | str]] = {}
    if not unreadable and name == "CharacterTrajectories":
        protocols, more = _of_one_pool(labels, "both files together")
        notes += more
    elif not unreadable:
        notes.append("the files' own split: only CharacterTrajectories is split anew by the authors")
    return CheckedData("ts", name, folder, len(set(labels)), counts, protocols, tuple(unreadable), tuple(notes))


# ------------------------------------------------------------------------------------------------------ Speech Commands


def _is_speech(folder: Path) -> bool:
    return any(next((folder / word).glob("*.wav"), None) is not None for word in WORDS)


def _speech(folder: Path, full: bool, progress: Progress | None) -> CheckedData:
    clips = list_clips(folder)
    labels, shorter = [], 0
    unreadable = [(str(folder / word), "no recording of this word") for word in _missing(folder)]
    for done, (path, y) in enumerate(clips, start=1):
        try:
            samples = len(read_clip(path)) if full else clip_samples(path)
            if path.stat().st_size < 2 * samples:
                raise ValueError(f"{path} ends before its {samples} samples")
            if samples == SAMPLE_RATE:
                labels.append(y)
            else:
                shorter += 1
        except (OSError, ValueError) as error:
            unreadable.append((str(path), _reason(error)))
        if progress is not None:
            progress(done, len(clips))
    notes = [f"{shorter:,} recordings of other lengths than one second are left out"] if shorter else []
    protocols: dict[str, dict[str, int | str]] = {}
    if not unreadable:
        protocols, more = _of_one_pool(labels, "all clips of one second together")
        notes += more
    return CheckedData(
        "speech-commands",
        "Speech Commands, 10 words",
        folder,
        len(set(labels)),
        {"clips": len(labels)},
        protocols,
        tuple(unreadable),
        tuple(notes),
    )


def _missing(folder: Path) -> list[str]:
    return [word for word in WORDS if next((folder / word).glob("*.wav"), None) is None]


def _of_one_pool(labels: Sequence[object], what: str) -> tuple[dict[str, dict[str, int | str]], list[str]]:
    """A set that is split 70 / 15 / 15 here."""
    try:
        train, validation, test = map(len, split_70_15_15(np.unique(np.array(labels), return_inverse=True)[1]))
    except ValueError as error:
        return {}, [f"they cannot be split 70 / 15 / 15: {error}"]
    return {
        "reference": _protocol(train, test, test, f"{what}, 70 / 15 / 15, chosen by the test part, as the authors do"),
        "sound": _protocol(train, validation, test, f"{what}, 70 / 15 / 15, chosen by the validation part"),
    }, []


def _protocol(train: int, chosen_by: int, test: int, sentence: str) -> dict[str, int | str]:
    return {"train": train, "chosen_by": chosen_by, "test": test, "split": sentence}


def _reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


# Names below the folder that is given, "" for itself; whether it is this kind; and the look at it.
_KINDS: tuple[
    tuple[tuple[str, ...], Callable[[Path], bool], Callable[[Path, bool, Progress | None], CheckedData]], ...
] = (
    (("", "raw", "MNIST/raw"), _is_mnist, _mnist),
    (("", CIFAR10.base_folder), _is_cifar10, _cifar10),
    (
        ("", "CharacterTrajectories", "Multivariate_ts/CharacterTrajectories"),
        lambda folder: bool(_ts_names(folder)),
        _ts,
    ),
    (
        ("", "speech_commands_v0.02", "SpeechCommands", "SpeechCommands/speech_commands_v0.02"),
        _is_speech,
        _speech,
    ),
)
