"""Real time series that need no download: sets of the UCR and UEA archives that ship inside the aeon package.

aeon (Middlehurst et al., JMLR 2024, BSD licence) carries a few sets of the archives of Dau et al., "The UCR Time Series
Archive", arXiv 1810.07758, and Bagnall et al., "The UEA multivariate time series classification archive, 2018", arXiv
1811.00075. The files are found without importing aeon, and their content is verified before it is read. Training and
test part are those of the archives, in which published figures are given.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from smpconv_zoo.data.protocol import append_observed_mask, drop_positions, pad_series
from smpconv_zoo.data.ts_files import read_ts

__all__ = ["UCR_SETS", "UCRParts", "load_ucr"]


@dataclasses.dataclass(frozen=True)
class _Set:
    """A set of the archives: the name of its files, its longest series, its classes, and what its files must hold."""

    files: str
    length: int
    classes: tuple[str, ...]
    train_sha256: str
    test_sha256: str


def _numbers(first: int, last: int) -> tuple[str, ...]:
    return tuple(str(i) for i in range(first, last + 1))


# Names as recipes and cards have them. Classes in the order of the files' @classLabel, the hashes of aeon 1.6.0.
UCR_SETS = {
    "acsf1": _Set(
        "ACSF1",
        1460,
        _numbers(0, 9),
        "0646b90dc4843e02baed6b2ba345c5601a4991b6796565489cef1b2d92a7537b",
        "93e8aaeb44a10af181d24a156e60da7021193cd990ca28f263fccf3b905bfebf",
    ),
    "arrowhead": _Set(
        "ArrowHead",
        251,
        _numbers(0, 2),
        "a83c470aaf611a5f5284377cce27a5fc9f6292bc3d110257b0fd4905ced5ee72",
        "5417dab42626d41df5e435bb22458c2df40dfad4bcd3b59559bbe72e20e84904",
    ),
    "basic-motions": _Set(
        "BasicMotions",
        100,
        ("standing", "running", "walking", "badminton"),
        "8dc43cc6306cb679c888c01e26f91772ac4441a916da43bac8b79734a538b9d6",
        "79213102bc6fca1a398ad98ce1185dff0208fa3d1465e687f48288946b0ff8dc",
    ),
    "gunpoint": _Set(
        "GunPoint",
        150,
        _numbers(1, 2),
        "f842401779fd9800d247d8b33121a1a4643710a19b24917dbdd9a060ca8630d5",
        "79332750788a6227b325b96bd0d70130c8eb707b9731f8d7dec62b7a7d36017e",
    ),
    "italy-power-demand": _Set(
        "ItalyPowerDemand",
        24,
        _numbers(1, 2),
        "341269cb7e6cef96846b30e774580beec79addb93848ba360145219115a74b7c",
        "26122451f87dd0387ef90b18bc8a86c041371b8a1c068004922b939971247144",
    ),
    "japanese-vowels": _Set(
        "JapaneseVowels",
        29,
        _numbers(1, 9),
        "68a430eabd919cc77f40b1f5f3bc0dcafacc1486bca9260785aeb7d262cc78cd",
        "b3d41d6a0ca3bcad3afb9ca7d4365382aa51341e2e58bae2a574babdda5b9462",
    ),
    "osuleaf": _Set(
        "OSULeaf",
        427,
        _numbers(1, 6),
        "86b9d6e860414ffd26cebc62fff84ffb37fa588ef3e5bf79e4094a437c36ddfc",
        "6c549dd354f9e42d5985fa5fab75321ca9acefc7873457e71467fc8a31f107ce",
    ),
}


@dataclasses.dataclass(frozen=True)
class UCRParts:
    """A set as the archives split it: x (N, C, L) float32, y (N,) int64, and what the training part was scaled by.

    ``mean`` and ``std`` have an entry for every channel, a mask included.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_ucr(name: str, dropped: int = 0) -> UCRParts:
    """Both parts of a set, normalised by the training part.

    Shorter series are lengthened to the longest of the set by repeating their last value. Then ``dropped`` percent of
    the time steps of every series are taken away, as :func:`~smpconv_zoo.data.protocol.drop_positions` draws them for
    the training series and behind them the test series. Each channel is shifted and scaled by mean and deviation of
    the training values that are left, padding not counted. What was taken away becomes 0, the training mean, and a
    last channel is 1 where a step was observed, 0 elsewhere; without ``dropped`` there is no such channel.

    Args:
        name: A key of :data:`UCR_SETS`.
        dropped: Percent of the time steps to take away, 0 <= dropped < 100.

    Raises:
        FileNotFoundError: aeon is not installed, or lacks the file.
        ValueError: Another name or percentage, or a file with other content than the archives'.
    """
    if name not in UCR_SETS:
        raise ValueError(f"there is no set {name!r} inside aeon; there are {', '.join(sorted(UCR_SETS))}")
    if not 0 <= dropped < 100:
        raise ValueError(f"dropped is a percentage in [0, 100), got {dropped}")
    chosen = UCR_SETS[name]
    train, train_labels = _read(chosen, "TRAIN", chosen.train_sha256)
    test, test_labels = _read(chosen, "TEST", chosen.test_sha256)
    x = torch.stack([_padded(one, chosen.length) for one in [*train, *test]])
    if dropped > 0:
        x = drop_positions(x, dropped)
    real = torch.tensor([len(one[0]) for one in train])[:, None] > torch.arange(chosen.length)
    mean, std = _statistics(x[: len(train)], real)
    x = (x - mean[:, None]) / std[:, None]
    shift, scale = tuple(mean.tolist()), tuple(std.tolist())
    if dropped > 0:
        x, shift, scale = append_observed_mask(x), (*shift, 0.0), (*scale, 1.0)
    y = torch.tensor([chosen.classes.index(label) for label in [*train_labels, *test_labels]])
    n = len(train)
    return UCRParts((x[:n], y[:n]), (x[n:], y[n:]), chosen.classes, shift, scale)


def _read(chosen: _Set, part: str, sha256: str) -> tuple[list[list[np.ndarray]], list[str]]:
    path = _folder() / chosen.files / f"{chosen.files}_{part}.ts"
    if not path.is_file():
        raise FileNotFoundError(
            f'The installed aeon lacks {path}: pip install --no-deps --force-reinstall "aeon>=1.6".'
        )
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(f"{path} has unexpected content: sha256 {found}, expected {sha256}.")
    return read_ts(path)


def _folder() -> Path:
    spec = find_spec("aeon")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "The series of the UCR and UEA archives come with aeon, of which only files are read: "
            'pip install --no-deps "aeon>=1.6".'
        )
    return Path(spec.submodule_search_locations[0], "datasets", "data")


def _padded(channels: Sequence[np.ndarray], length: int) -> Tensor:
    return torch.stack([pad_series(channel, length) for channel in channels])


def _statistics(x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel, (C,) each, over the values of ``x`` (N, C, L) that are there.

    ``real`` (N, L) leaves out what pads; NaN is left out as well. A constant channel is only centred.
    """
    values = x.double().masked_fill(~real[:, None], torch.nan)
    mean = values.nanmean(dim=(0, 2))
    std = (values - mean[:, None]).square().nanmean(dim=(0, 2)).sqrt()
    return mean.float(), torch.where(std > 0, std, 1.0).float()
