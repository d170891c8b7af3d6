"""The data protocol of SMPConv's sequence tasks, as pure functions on arrays and tensors.

Paper: Kim & Park, "SMPConv: Self-moving Point Representations for Continuous Convolution", CVPR 2023,
https://arxiv.org/abs/2304.02330. The protocol follows the authors' public code (sangnekim/SMPConv, commit de4e59a),
including the choices the paper does not spell out: which seed draws what, and that statistics are taken per time step.
No line is taken from that code; its numbers are reproduced and tested. `hold_out` alone is ours.

A batch of series is `(N, C, L)`: N series, C channels, L time steps. A missing value is NaN until
`append_observed_mask`.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "append_observed_mask",
    "character_trajectories",
    "drop_positions",
    "dropped_positions",
    "hold_out",
    "labels_by_first_appearance",
    "normalize",
    "pad_series",
    "permute_pixels",
    "pixel_permutation",
    "split_70_15_15",
    "subsample",
]

DROP_SEED = 56789


def _check_series(x: Tensor, name: str = "x") -> None:
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor (N, C, L), got {x.dtype} of shape {tuple(x.shape)}.")


def split_70_15_15(labels: np.ndarray | Tensor | Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stratified split into training, validation and test part: 70 %, then the rest in two halves.

    The draws are scikit-learn's `train_test_split` with `random_state` 0 (training against rest) and 1 (validation
    against test); 2858 series give 2000 / 429 / 429.

    Args:
        labels: (N,) class of each sample, all samples of all files in file order.

    Returns:
        Three int64 index arrays into `labels`, in the order drawn (shuffled).

    Raises:
        ValueError: `labels` is not one-dimensional, or (from scikit-learn) a class is too small to be in every part.
        ImportError: scikit-learn is not installed.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise ValueError(f"labels must be one-dimensional, got shape {labels.shape}.")
    try:
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("The 70/15/15 split is drawn by scikit-learn: pip install scikit-learn.") from error

    samples = np.arange(len(labels))
    train, rest = train_test_split(samples, train_size=0.7, random_state=0, stratify=labels)
    validation, test = train_test_split(rest, train_size=0.5, random_state=1, stratify=labels[rest])
    return train, validation, test


def hold_out(
    labels: np.ndarray | Tensor | Sequence[int],
    share: float,
    generator: np.random.RandomState | None = None,
    keep_single: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Set a part of the training data aside to choose by, the same share of every class, always the same samples.

    A numpy legacy generator (its streams are frozen across versions) draws class by class; of each class the share is
    rounded, to 1 at least and so that 1 at least is left.

    Args:
        labels: (N,) class of each sample.
        share: of each class, in (0, 1).
        generator: draws; one of seed 0 if None.
        keep_single: whether a class of a single sample is learned from as it is, instead of being an error.

    Returns:
        Two int64 index arrays into `labels`, ascending: to learn from, and to choose by.

    Raises:
        ValueError: `labels` is not one-dimensional, `share` is out of range, or a class has a single sample.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not 0 < share < 1:
        raise ValueError(f"needs labels (N,) and a share in (0, 1), got shape {labels.shape} and {share}.")
    generator = generator or np.random.RandomState(0)
    aside = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        order = generator.permutation(np.flatnonzero(labels == label))
        if len(order) < 2 and not keep_single:
            raise ValueError(f"class {label} has a single sample: none can be set aside.")
        aside[order[: min(max(round(share * len(order)), 1), len(order) - 1)]] = True
    return np.flatnonzero(~aside), np.flatnonzero(aside)


def normalize(train: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Subtract the training mean of each time step and divide by its training standard deviation.

    One mean and one unbiased standard deviation (plus 1e-5) per TIME STEP, over training series and channels together;
    the usual choice would be one per channel. NaN is left out of the statistics and stays NaN. A time step with fewer
    than two observed training values has no standard deviation and becomes NaN in every tensor.

    Args:
        train: (N, C, L) floating point; gives the statistics.
        others: (M, C, L) tensors to be normalized with the same statistics.

    Returns:
        `train` and `others` normalized, in the order given, shapes and types unchanged.

    Raises:
        ValueError: a tensor is not (N, C, L) floating point, or channels or lengths differ.
    """
    for x in (train, *others):
        _check_series(x, "every tensor to be normalized")
        if x.shape[1:] != train.shape[1:]:
            raise ValueError(f"channels and length must agree: {tuple(train.shape)} against {tuple(x.shape)}.")
    # Over no value the mean is 0 / 0, over one the deviation is 0 / 0: NaN, as promised.
    observed = (~train.isnan()).sum(dim=(0, 1))
    mean = train.nansum(dim=(0, 1)) / observed
    std = ((train - mean).square().nansum(dim=(0, 1)) / (observed - 1)).sqrt()
    return tuple((x - mean) / (std + 1e-5) for x in (train, *others))


def pad_series(series: np.ndarray | Tensor | Sequence[float], length: int) -> Tensor:
    """Lengthen one channel of one series by repeating its last value.

    Args:
        series: (L,) real numbers, 1 <= L <= `length`.
        length: number of time steps wanted.

    Returns:
        (length,) float32, also where the series is float64.

    Raises:
        ValueError: the series is empty, not one-dimensional or longer than `length`.
    """
    values = torch.as_tensor(series)
    if values.ndim != 1 or not 1 <= len(values) <= length:
        raise ValueError(f"a series to be padded must be (L,) with 1 <= L <= {length}, got {tuple(values.shape)}.")
    return torch.cat([values, values[-1:].expand(length - len(values))]).to(torch.float32)


def subsample(x: Tensor, step: int) -> Tensor:
    """Keep every `step`-th value of the last axis, starting with the first.

    Args:
        x: (..., L).
        step: at least 1.

    Returns:
        (..., ceil(L / step)), a view.

    Raises:
        ValueError: `step` is smaller than 1 or `x` has no axis.
    """
    if step < 1 or x.ndim == 0:
        raise ValueError(f"subsample needs a step of at least 1 and a last axis, got step {step}, {tuple(x.shape)}.")
    return x[..., ::step]


def dropped_positions(n: int, length: int, rate: float, seed: int = DROP_SEED) -> Tensor:
    """Time steps removed from each of `n` series: int(length * rate / 100) of them, without replacement.

    One generator serves all series in order, so the positions of a series depend on its place in the data set.

    Args:
        n: number of series.
        length: time steps L of every series.
        rate: percent of the time steps to remove, 0 <= rate <= 100.
        seed: of the torch generator; the reference's is 56789.

    Returns:
        (n, int(length * rate / 100)) int64, ascending in each row.

    Raises:
        ValueError: `rate` is outside [0, 100], or `n` or `length` is negative.
    """
    if not 0 <= rate <= 100 or n < 0 or length < 0:
        raise ValueError(f"rate must be a percentage and sizes not negative, got rate {rate}, n {n}, length {length}.")
    generator = torch.Generator().manual_seed(seed)
    count = int(length * rate / 100)
    rows = [torch.randperm(length, generator=generator)[:count].sort().values for _ in range(n)]
    return torch.stack(rows) if rows else torch.empty(0, count, dtype=torch.int64)


def drop_positions(x: Tensor, rate: float, seed: int = DROP_SEED) -> Tensor:
    """Set the time steps of `dropped_positions` to NaN in all channels.

    Args:
        x: (N, C, L) floating point: the WHOLE data set in file order, before it is split.
        rate: percent of the time steps to remove, 0 <= rate <= 100.
        seed: of the torch generator.

    Returns:
        (N, C, L), a copy.

    Raises:
        ValueError: `x` is not (N, C, L) floating point, or `rate` is outside [0, 100].
    """
    _check_series(x)
    positions = dropped_positions(len(x), x.shape[-1], rate, seed).to(x.device)
    return x.scatter(2, positions[:, None].expand(-1, x.shape[1], -1), torch.nan)


def append_observed_mask(x: Tensor) -> Tensor:
    """Replace NaN by 0 and append a channel that is 1 where all channels were observed and 0 elsewhere.

    Applied after `normalize`, so that 0 is the training mean and the mask itself is not normalized.

    Args:
        x: (N, C, L) floating point with NaN for missing values.

    Returns:
        (N, C + 1, L) without NaN.

    Raises:
        ValueError: `x` is not (N, C, L) floating point.
    """
    _check_series(x)
    missing = x.isnan()
    observed = ~missing.any(dim=1, keepdim=True)
    return torch.cat([x.masked_fill(missing, 0), observed.to(x.dtype)], dim=1)


def labels_by_first_appearance(labels: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Number the classes 0, 1, ... in the order in which they first appear.

    Args:
        labels: N class names, training file first, then test file.

    Returns:
        (N,) int64 class numbers, and the names in the order of their numbers.
    """
    names = list(dict.fromkeys(labels))
    number = {name: i for i, name in enumerate(names)}
    return np.array([number[label] for label in labels], dtype=np.int64), names


def character_trajectories(
    series: Sequence[Sequence[np.ndarray | Tensor | Sequence[float]]], labels: Sequence[str], drop_rate: float = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """The whole protocol of CharacterTrajectories: pad, drop, split, normalize, mask.

    Args:
        series: N series of C channels of (L,) values; lengths may differ. The training file's series come first, then
            the test file's: both files are pooled and split anew.
        labels: N class names in the same order.
        drop_rate: percent of the time steps to remove from every series; with 0 there is no mask channel.

    Returns:
        `train`, `validation` and `test`, each (x, y): x (N, C, L) float32, L the longest length, with one more channel
        if `drop_rate` is positive; y (N,) int64.

    Raises:
        ValueError: no series, numbers of channels or of labels differ, or a bad rate; see the functions used.
        ImportError: scikit-learn is not installed.
    """
    channels = {len(one) for one in series}
    if len(series) != len(labels) or len(channels) != 1 or channels == {0}:
        raise ValueError(
            f"needs one label a series and the same number of channels everywhere, "
            f"got {len(series)} series, {len(labels)} labels, channels {sorted(channels)}."
        )
    length = max(len(channel) for one in series for channel in one)
    x = torch.stack([torch.stack([pad_series(channel, length) for channel in one]) for one in series])
    y, _ = labels_by_first_appearance(labels)
    x = drop_positions(x, drop_rate)
    parts = split_70_15_15(y)
    normalized = normalize(*(x[torch.from_numpy(index)] for index in parts))
    if drop_rate > 0:
        normalized = tuple(append_observed_mask(part) for part in normalized)
    targets = [torch.from_numpy(y[index]) for index in parts]
    return dict(zip(("train", "validation", "test"), zip(normalized, targets, strict=True), strict=True))


def pixel_permutation(seed: int = 0, draw: int = 0, n: int = 784) -> np.ndarray:
    """The pixel order of permuted MNIST, from numpy's legacy generator (its streams are frozen across versions).

    The reference draws a permutation at the start of training and another at the start of a test. Training, the
    validation during training and the evaluation of a saved checkpoint all see the FIRST (`draw` 0); only a test that
    follows a training run in the same process sees the second, and its accuracy means nothing.

    Args:
        seed: of the legacy generator; the published runs use 0.
        draw: which permutation of the stream, 0 for the first.
        n: number of pixels.

    Returns:
        (n,) int64; position j of the sequence is pixel `permutation[j]` of the row-major image.

    Raises:
        ValueError: `draw` or `n` is negative, or numpy refuses the seed.
    """
    if draw < 0 or n < 0:
        raise ValueError(f"draw and n must not be negative, got {draw} and {n}.")
    generator = np.random.RandomState(seed)
    for _ in range(draw):
        generator.permutation(n)
    return generator.permutation(n).astype(np.int64)


def permute_pixels(images: Tensor, permutation: np.ndarray | Tensor | Sequence[int]) -> Tensor:
    """Read images as sequences of pixels in a given order.

    Args:
        images: (N, C, H, W) images, flattened row by row, or (N, C, L) sequences.
        permutation: (L,) with L = H * W: each of 0 ... L - 1 once.

    Returns:
        (N, C, L): value j is pixel `permutation[j]`.

    Raises:
        ValueError: `images` has another rank, or `permutation` is not a permutation of its L pixels.
    """
    if images.ndim not in (3, 4):
        raise ValueError(f"images must be (N, C, H, W) or (N, C, L), got shape {tuple(images.shape)}.")
    sequences = images.flatten(2)
    order = np.asarray(permutation)
    length = sequences.shape[-1]
    if order.shape != (length,) or not np.array_equal(np.sort(order), np.arange(length)):
        raise ValueError(f"permutation must contain each of 0 ... {length - 1} exactly once, got shape {order.shape}.")
    return sequences[..., torch.from_numpy(order.astype(np.int64)).to(images.device)]
