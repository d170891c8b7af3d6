"""Augmentation of digits and of small pictures, a batch at a time on any device.

The authors train sMNIST and pMNIST with random rotation, translation, scaling and erasing, each with probability 0.5
(their ``augment=standard``, after Byerly et al., arXiv 2001.09136). Here each image gets the same kinds of draws,
composed into one bilinear resampling instead of three by nearest neighbour. The erased patch is a seventh of the
image's area, as their code has it (its comment speaks of 4 pixels).

CIFAR-10 they train with flips and shifted crops (their ``augment=resnet``): the very same draws are made here.

Series they do not augment. The four changes here are the common ones: jitter and scaling as in Um et al., arXiv
1706.00527, shifts in time, and a masked stretch of time as in Park et al., "SpecAugment", arXiv 1904.08779.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["augment_digits", "augment_pictures", "augment_series"]

ERASED_AREA = 4 / 28


def augment_digits(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate by up to 30 degrees, shift by up to 2 pixels, shrink to 0.75, erase a square patch: each or not.

    Args:
        images: ``(N, 1, H, W)``, normalised; the corner pixel of each image is taken as background.
        generator: Source of every draw, on the device of ``images``.

    Returns:
        ``(N, 1, H, W)``; images that drew no transform come back as they were.
    """
    count, _, height, width = images.shape
    device = images.device

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, device=device, generator=generator)

    def coin() -> Tensor:
        return torch.rand(count, device=device, generator=generator) < 0.5

    zero = torch.zeros(count, device=device)
    angle = torch.where(coin(), uniform(-math.pi / 6, math.pi / 6), zero)
    shifted = coin()
    shift_x = torch.where(shifted, uniform(-4 / width, 4 / width), zero)
    shift_y = torch.where(shifted, uniform(-4 / height, 4 / height), zero)
    # affine_grid maps output to input coordinates: a digit at 0.75 of its size is read off at 1 / 0.75 of the distance.
    zoom = torch.where(coin(), 1 / uniform(0.75, 1.0), zero + 1)
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    theta = torch.stack((torch.stack((cos, -sin, shift_x), 1), torch.stack((sin, cos, shift_y), 1)), 1)
    background = images[:, :, :1, :1]
    grid = F.affine_grid(theta, [count, 1, height, width], align_corners=False)
    moved = F.grid_sample(images - background, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    erased = coin()
    side = round(math.sqrt(height * width * ERASED_AREA))
    top = torch.randint(0, height - side + 1, (count,), device=device, generator=generator)
    left = torch.randint(0, width - side + 1, (count,), device=device, generator=generator)
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    in_rows = (rows >= top[:, None]) & (rows < top[:, None] + side)
    in_columns = (columns >= left[:, None]) & (columns < left[:, None] + side)
    patch = erased[:, None, None] & in_rows[:, :, None] & in_columns[:, None, :]
    # The authors erase after normalising, with the value 0: the mean grey, not the background.
    return torch.where(patch.unsqueeze(1), torch.zeros_like(moved), moved + background)


def augment_pictures(images: Tensor, black: Tensor, generator: torch.Generator) -> Tensor:
    """Flip half of the pictures and shift each by up to an eighth of its side; what comes in is black.

    Args:
        images: ``(N, C, H, W)``, normalised.
        black: ``(C,)``, what 0 became when it was normalised.
        generator: Source of every draw, on the device of ``images``.

    Returns:
        ``(N, C, H, W)``.
    """
    count, channels, height, width = images.shape
    device = images.device

    def places(side: int) -> Tensor:
        """Where each row or column of a crop comes from, ``(N, side)``."""
        most = side // 8
        shift = torch.randint(-most, most + 1, (count,), device=device, generator=generator)
        return torch.arange(side, device=device) + shift[:, None]

    flipped = torch.rand(count, device=device, generator=generator) < 0.5
    rows, columns = places(height), places(width)
    columns = torch.where(flipped[:, None], width - 1 - columns, columns)
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    source = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    moved = images.flatten(2).gather(2, source.flatten(1)[:, None].expand(-1, channels, -1)).view_as(images)
    return torch.where(inside[:, None], moved, black.to(images)[:, None, None])


def augment_series(
    series: Tensor,
    generator: torch.Generator,
    *,
    jitter: float = 0.0,
    scaling: float = 0.0,
    time_shift: float = 0.0,
    time_mask: float = 0.0,
    masked: bool = False,
) -> Tensor:
    """Move each series in time, scale its channels, add noise, blank out a stretch: whatever is not 0.

    Args:
        series: ``(N, C, L)``, normalised to mean 0 and deviation 1.
        generator: Source of every draw, on the device of ``series``.
        jitter: Deviation of the noise, drawn for every value.
        scaling: Deviation of the factor around 1, drawn for every channel of every series.
        time_shift: Largest share of L by which a series is moved, to either side; its first or last value fills up.
        time_mask: Largest share of L that becomes 0.
        masked: Whether the last channel says what was observed: it moves along, is neither scaled nor blurred, and what
            was not observed stays 0. A blanked stretch counts as not observed.

    Returns:
        ``(N, C, L)``.
    """
    count, channels, length = series.shape
    device = series.device
    steps = torch.arange(length, device=device)
    if time_shift > 0:
        most = round(time_shift * length)
        shift = torch.randint(-most, most + 1, (count, 1), device=device, generator=generator)
        source = (steps - shift).clamp(0, length - 1)
        series = series.gather(2, source[:, None].expand(-1, channels, -1))
    values, observed = (series[:, :-1], series[:, -1:]) if masked else (series, None)
    if scaling > 0:
        values = values * (1 + scaling * torch.randn(*values.shape[:2], 1, device=device, generator=generator))
    if jitter > 0:
        values = values + jitter * torch.randn(values.shape, device=device, generator=generator)
    if time_mask > 0:
        width = torch.rand(count, 1, device=device, generator=generator) * time_mask * length
        start = torch.rand(count, 1, device=device, generator=generator) * (length - width)
        seen = ((steps < start) | (steps >= start + width))[:, None].to(series.dtype)
        values = values * seen
        observed = None if observed is None else observed * seen
    return values if observed is None else torch.cat([values * observed, observed], dim=1)
