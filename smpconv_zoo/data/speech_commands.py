"""The ten words of Speech Commands (Warden, https://arxiv.org/abs/1804.03209), as waveforms or as MFCCs.

The protocol is that of the authors' code (sangnekim/SMPConv, commit de4e59a): clips of one second alone, a stratified
70 / 15 / 15 split, and for each time step the mean and standard deviation of the training part. One thing cannot be
followed: the authors split the clips in the order in which their file system listed them, here it is that of the names.
"""

import contextlib
import wave
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from smpconv_zoo.data.mfcc import mfcc
from smpconv_zoo.data.protocol import split_70_15_15

__all__ = ["WORDS", "SpeechCommandsTest", "clip_samples", "read_clip"]

# Their order is the number of their class.
WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")

SAMPLE_RATE = 16000
# Training clips held at a time while their statistics are taken.
CHUNK = 256


class SpeechCommandsTest(Dataset[tuple[Tensor, int]]):
    """The test part, read clip by clip.

    Args:
        folder: Holds a folder of ``.wav`` files for each of :data:`WORDS`.
        as_mfcc: Whether a sample is (20, 161) MFCCs or the waveform, (1, 16000); float32 and normalized.

    Raises:
        ValueError: A file that is not a 16-bit mono recording at 16 kHz, or too few clips to split.
        ImportError: scikit-learn, which draws the split, is not installed.
    """

    def __init__(self, folder: Path, as_mfcc: bool) -> None:
        self.as_mfcc = as_mfcc
        clips = [(path, y) for y, word in enumerate(WORDS) for path in sorted((folder / word).glob("*.wav"))]
        clips = [(path, y) for path, y in clips if clip_samples(path) == SAMPLE_RATE]
        try:
            train, _, test = split_70_15_15([y for _, y in clips])
        except ValueError as error:
            raise ValueError(f"the {len(clips)} clips of one second in {folder} cannot be split: {error}") from error
        self.train = [clips[i][0] for i in train]
        self.test = [clips[i] for i in test]

    def __len__(self) -> int:
        return len(self.test)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, y = self.test[index]
        mean, std = self.statistics
        return (self._features([path])[0] - mean) / (std + 1e-5), y

    @cached_property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and unbiased standard deviation of each time step over training clips and channels, (L,) float32 each.

        Equivalent to what :func:`smpconv_zoo.data.protocol.normalize` takes, with a few clips in memory at a time. The
        first use reads the whole training part.
        """
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for start in range(0, len(self.train), CHUNK):
            x = self._features(self.train[start : start + CHUNK]).double()
            count += x.shape[0] * x.shape[1]
            total = total + x.sum(dim=(0, 1))
            squares = squares + x.square().sum(dim=(0, 1))
        mean = total / count
        variance = (squares - count * mean.square()).clamp(min=0) / (count - 1)
        return mean.float(), variance.sqrt().float()

    def _features(self, paths: Sequence[Path]) -> Tensor:
        """(N, 20, 161) or (N, 1, 16000), not normalized."""
        waveforms = torch.stack([read_clip(path) for path in paths])
        return mfcc(waveforms) if self.as_mfcc else waveforms[:, None]


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
