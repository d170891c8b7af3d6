"""The ten words of Speech Commands (Warden, https://arxiv.org/abs/1804.03209), as waveforms or as MFCCs.

The protocol is that of the authors' code (sangnekim/SMPConv, commit de4e59a): clips of one second alone, a stratified
70 / 15 / 15 split, and for each time step the mean and standard deviation of the training part. The authors split the
clips of a word in the order in which their file system listed them, which is not known. ``sound`` takes the order of
the names, the same everywhere; ``reference`` does as they did, with the directory that is at hand, or takes the order
of a file, :data:`ORDER_FILE`, by which a split goes from one machine to another.
"""

import contextlib
import hashlib
import os
import wave
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from smpconv_zoo.data.mfcc import mfcc
from smpconv_zoo.data.protocol import append_observed_mask, dropped_positions, split_70_15_15

__all__ = [
    "ORDER_FILE",
    "WORDS",
    "SpeechCommandsTest",
    "clip_order",
    "clip_samples",
    "list_clips",
    "read_clip",
    "speech_commands_parts",
]

# Their order is the number of their class.
WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")

SAMPLE_RATE = 16000
# Training clips held at a time while their statistics are taken.
CHUNK = 256

# Of clips that cannot be read, so many are named.
NAMED = 5

PARTS = ("train", "validation", "test")

# Beside the folders of the words: a line for every clip, WORD/NAME.wav.
ORDER_FILE = "clip_order.txt"


class SpeechCommandsTest(Dataset[tuple[Tensor, int]]):
    """The test part, read clip by clip.

    Args:
        folder: Holds a folder of ``.wav`` files for each of :data:`WORDS`.
        as_mfcc: Whether a sample is (20, 161) MFCCs or the waveform, (1, 16000); float32 and normalized.
        protocol: ``"sound"`` or ``"reference"``, for the order of the clips; see :func:`list_clips`.

    Raises:
        ValueError: A file that is not a 16-bit mono recording at 16 kHz, or too few clips to split.
        ImportError: scikit-learn, which draws the split, is not installed.
    """

    def __init__(self, folder: Path, as_mfcc: bool, protocol: str = "sound") -> None:
        self.as_mfcc = as_mfcc
        clips, parts = _split_clips(folder, protocol)
        self.train = [clips[i][0] for i in parts["train"]]
        self.test = [clips[i] for i in parts["test"]]

    def __len__(self) -> int:
        return len(self.test)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, y = self.test[index]
        mean, std = self.statistics
        return (_features([path], self.as_mfcc)[0] - mean) / (std + 1e-5), y

    @cached_property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and unbiased standard deviation of each time step over training clips and channels, (L,) float32 each.

        Equivalent to what :func:`smpconv_zoo.data.protocol.normalize` takes, with a few clips in memory at a time. The
        first use reads the whole training part.
        """
        chunks = (self.train[start : start + CHUNK] for start in range(0, len(self.train), CHUNK))
        return _statistics(_features(paths, self.as_mfcc) for paths in chunks)


def speech_commands_parts(
    folder: Path,
    as_mfcc: bool,
    wanted: Sequence[str] = ("train", "validation"),
    dropped: int = 0,
    progress: Callable[[int, int], None] | None = None,
    protocol: str = "sound",
) -> dict[str, tuple[Tensor, Tensor]]:
    """Whole parts in memory: of 35,000 waveforms or MFCCs 2.2 or 0.5 GB.

    Args:
        folder: See :class:`SpeechCommandsTest`.
        as_mfcc: Whether a sample is (20, 161) MFCCs or the waveform, (1, 16000).
        wanted: Parts to read, of ``"train"``, ``"validation"`` and ``"test"``; the clips of others stay closed, but for
            their headers. The training part is read in any case, for the statistics.
        dropped: Percent of the time steps that are left out, with the mask of the others as one more channel.
        progress: Called with the clips read and in all.
        protocol: ``"sound"`` or ``"reference"``, for the order of the clips; see :func:`list_clips`.

    Returns:
        For every part wanted x (N, C, L) float32, normalized, and y (N,) int64.

    Raises:
        ValueError: Clips that cannot be read, by name, or too few to split.
        ImportError: scikit-learn, which draws the split, is not installed.
    """
    clips, parts = _split_clips(folder, protocol)
    names = [name for name in PARTS if name == "train" or name in wanted]
    total, refused = sum(len(parts[name]) for name in names), []
    length = SAMPLE_RATE // 100 + 1 if as_mfcc else SAMPLE_RATE
    # The draws go through all clips in order, whatever is read of them.
    positions = dropped_positions(len(clips), length, dropped) if dropped > 0 else None
    found, done = {}, 0
    for name in names:
        chunks = []
        for start in range(0, len(parts[name]), CHUNK):
            index = parts[name][start : start + CHUNK]
            waveforms = []
            for i in index:
                try:
                    waveforms.append(read_clip(clips[i][0]))
                except ValueError as error:
                    refused.append(str(error))
            done += len(index)
            if not refused:
                x = _as_features(torch.stack(waveforms), as_mfcc)
                if positions is not None:
                    at = positions[torch.from_numpy(index)]
                    x = x.scatter(2, at[:, None].expand(-1, x.shape[1], -1), torch.nan)
                chunks.append(x)
            if progress is not None:
                progress(done, total)
        found[name] = chunks
    if refused:
        more = f"; and {len(refused) - NAMED} more" if len(refused) > NAMED else ""
        raise ValueError(f"{len(refused)} clips cannot be read: {'; '.join(refused[:NAMED])}{more}")
    mean, std = _statistics(found["train"])
    out = {}
    for name in names:
        chunks = [x.sub_(mean).div_(std + 1e-5) for x in found.pop(name)]
        if name in wanted:
            x = torch.cat([append_observed_mask(x) for x in chunks] if dropped > 0 else chunks)
            out[name] = (x, torch.tensor([clips[i][1] for i in parts[name]]))
    return out


def list_clips(folder: Path, protocol: str = "sound") -> list[tuple[Path, int]]:
    """The clips of the ten words and the numbers of their classes, of any length, word by word.

    Args:
        folder: See :class:`SpeechCommandsTest`.
        protocol: Within a word, ``"sound"`` takes the order of the names. ``"reference"`` takes that of
            :data:`ORDER_FILE` if there is one, or else that in which the directory lists its files.

    Raises:
        ValueError: Another protocol, or an order file that names other clips than there are.
    """
    if protocol not in ("sound", "reference"):
        raise ValueError(f"protocol must be sound or reference, got {protocol!r}")
    ordered: dict[str, list[str]] = {}
    if protocol == "reference" and (folder / ORDER_FILE).is_file():
        ordered = _read_order(folder)
    clips = []
    for y, word in enumerate(WORDS):
        names: list[str] = []
        if (folder / word).is_dir():
            names = [name for name in os.listdir(folder / word) if name.endswith(".wav")]
        if protocol == "sound":
            names.sort()
        elif ordered:
            if sorted(names) != sorted(ordered[word]):
                differing = sorted(set(names) ^ set(ordered[word])) or ["one twice"]
                raise ValueError(
                    f"{folder / ORDER_FILE} does not name the clips of {word} that are there, each once: "
                    f"{len(differing):,} differ, {differing[0]} first"
                )
            names = ordered[word]
        clips += [(folder / word / name, y) for name in names]
    return clips


def _read_order(folder: Path) -> dict[str, list[str]]:
    ordered: dict[str, list[str]] = {word: [] for word in WORDS}
    path = folder / ORDER_FILE
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        word, slash, name = line.strip().removeprefix("./").partition("/")
        if not slash or word not in ordered:
            raise ValueError(f"{path}, line {number}: expected WORD/NAME.wav, with one of the words {', '.join(WORDS)}")
        ordered[word].append(name)
    return ordered


def clip_order(folder: Path, protocol: str) -> str:
    """A sentence on the order by which the clips are split."""
    if protocol == "sound":
        return (
            "the split follows the sorted names of the files, the authors' followed the order in which their directory "
            "listed them, which is not known"
        )
    names = "\n".join(path.relative_to(folder).as_posix() for path, _ in list_clips(folder, protocol))
    digest = hashlib.sha256(names.encode()).hexdigest()[:16]
    given = (folder / ORDER_FILE).is_file()
    source = ORDER_FILE if given else "this directory's listing, as the authors' followed that of theirs"
    return (
        f"the split follows the order of {source} (sha256 {digest}...): another copy of the data may have another one, "
        "and the authors' is not known"
    )


def _split_clips(folder: Path, protocol: str = "sound") -> tuple[list[tuple[Path, int]], dict[str, np.ndarray]]:
    """Clips of one second and their classes in the order of a protocol; and which of them are in which part."""
    clips = list_clips(folder, protocol)
    clips = [(path, y) for path, y in clips if clip_samples(path) == SAMPLE_RATE]
    try:
        parts = split_70_15_15([y for _, y in clips])
    except ValueError as error:
        raise ValueError(f"the {len(clips)} clips of one second in {folder} cannot be split: {error}") from error
    return clips, dict(zip(PARTS, parts, strict=True))


def _features(paths: Sequence[Path], as_mfcc: bool) -> Tensor:
    """(N, 20, 161) or (N, 1, 16000), not normalized."""
    return _as_features(torch.stack([read_clip(path) for path in paths]), as_mfcc)


def _as_features(waveforms: Tensor, as_mfcc: bool) -> Tensor:
    return mfcc(waveforms) if as_mfcc else waveforms[:, None]


def _statistics(chunks: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased deviation of each time step over clips and channels; NaN is left out."""
    count, total, squares = torch.zeros(()), torch.zeros(()), torch.zeros(())
    for chunk in chunks:
        x = chunk.double()
        count = count + (~x.isnan()).sum(dim=(0, 1))
        total = total + x.nansum(dim=(0, 1))
        squares = squares + x.square().nansum(dim=(0, 1))
    mean = total / count
    variance = (squares - count * mean.square()).clamp(min=0) / (count - 1)
    return mean.float(), variance.sqrt().float()


def clip_samples(path: Path) -> int:
    """Number of samples that the header of a recording declares.

    Raises:
        ValueError: Not a 16-bit mono recording at 16 kHz.
    """
    with _opened(path) as recording:
        return recording.getnframes()


def read_clip(path: Path) -> Tensor:
    """A recording as (samples,) float32 in [-1, 1).

    Raises:
        ValueError: Not a 16-bit mono recording at 16 kHz, or one that ends early.
    """
    with _opened(path) as recording:
        declared = recording.getnframes()
        samples = np.frombuffer(recording.readframes(declared), dtype="<i2")
    if len(samples) != declared:
        raise ValueError(f"{path} ends after {len(samples)} of its {declared} samples")
    return torch.from_numpy(samples.astype(np.float32) / 32768)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[wave.Wave_read]:
    try:
        with wave.open(str(path), "rb") as recording:
            channels, width, rate = recording.getnchannels(), recording.getsampwidth(), recording.getframerate()
            if (channels, width, rate) != (1, 2, SAMPLE_RATE):
                raise ValueError(
                    f"{path} has {channels} channels of {8 * width} bits at {rate} Hz, not 1 of 16 at 16000"
                )
            yield recording
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{path} is not a WAV recording: {str(error) or 'it ends too early'}") from error
