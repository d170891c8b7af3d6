"""Top-1 and top-5 of an image network on a test set of ImageNet's classes, with all that decides them beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import timm.utils
from torch.utils.data import Subset

from smpconv_zoo.environment import hardware, versions
from smpconv_zoo.evaluation.accuracy import Processes, measure, spread
from smpconv_zoo.evaluation.candidates import Candidate
from smpconv_zoo.evaluation.image_sets import IMAGE_SETS, ImageTestSet, preprocessing, real_accuracy, samples_of

__all__ = ["HEADER", "ImageResult", "evaluate_pictures", "image_row"]

HEADER = ("model", "set", "top-1", "paper", "top-5", "right", "size", "crop", "resize", "images/s")


@dataclasses.dataclass(frozen=True)
class ImageResult:
    """One network on one set; accuracies in percent, names as in timm's result tables where it has one.

    ``images_per_second`` counts all processes together, reading included. ``paper`` is the top-1 that the authors
    publish for the whole validation part of ImageNet-1k. ``batch_size`` is that of a process, as far as memory went.
    """

    model: str
    weights: str
    data_set: str
    where: str
    kind: str
    top1: float
    top1_err: float
    top5: float
    top5_err: float
    correct: int
    correct5: int
    total: int
    paper: float | None
    param_count: int
    img_size: int
    crop_pct: float
    interpolation: str
    crop_mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: str
    channels_last: bool
    reparameterized: bool
    batch_size: int
    processes: int
    images_per_second: float
    seconds: float
    hardware: str
    versions: dict[str, str]
    notes: tuple[str, ...]


def evaluate_pictures(
    candidate: Candidate,
    pictures: ImageTestSet,
    processes: Processes,
    *,
    img_size: int | None = None,
    crop_pct: float | None = None,
    batch_size: int = 100,
    workers: int = 4,
    dtype: str = "float32",
    channels_last: bool = False,
    reparam: bool = False,
    retry: bool = False,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ImageResult:
    """Measure a network on every picture of a set, once, by its own preprocessing.

    Args:
        candidate: The network.
        pictures: The set.
        processes: This process among those that measure together.
        img_size: Pixels of a side; kernels of our networks are read off at that size.
        crop_pct: Share of the resized picture's side that is taken.
        batch_size: Pictures at a time of a process.
        workers: Processes that read pictures, of each process.
        dtype: float32, or bfloat16 or float16 under autocast.
        channels_last: Whether pictures are laid out with channels last.
        reparam: Whether to merge the network for inference first, by :func:`timm.utils.reparameterize_model`.
        retry: Whether to halve the batch when memory runs out.
        limit: Only so many pictures, spread evenly.
        progress: Called with the pictures that this process has done, and all of its own.

    Returns:
        The same on every process, but for its hardware.

    Raises:
        ValueError: A network of other classes, a picture that cannot be read, or memory that does not suffice.
    """
    model: Any = candidate.build()
    classes = getattr(model, "num_classes", None)
    if classes != pictures.num_classes:
        raise ValueError(
            f"{candidate.name} tells {classes} classes apart, {IMAGE_SETS[pictures.name].title} is for networks of "
            f"{pictures.num_classes:,}"
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    changes = {**candidate.changes}
    if img_size is not None:
        changes["img_size"] = img_size
        if hasattr(model, "set_input_size"):
            model.set_input_size(img_size)
    if crop_pct is not None:
        changes["crop_pct"] = crop_pct
    config = preprocessing(model, **changes)
    samples, notes = samples_of(pictures, config), pictures.notes
    indices = list(range(len(pictures.labels)))
    if limit is not None and limit < len(indices):
        notes = (*notes, f"only {limit:,} of {len(indices):,} pictures were taken")
        indices = spread(len(indices), limit)
        samples = Subset(samples, indices)
    if reparam:
        model = timm.utils.reparameterize_model(model)
    found = measure(
        model.to(processes.device),
        samples,
        processes,
        batch_size=batch_size,
        workers=workers,
        dtype=dtype,
        channels_last=channels_last,
        retry=retry,
        columns=pictures.columns,
        progress=progress,
    )
    correct, correct5, total = found.correct(1), found.correct(5), len(found.labels)
    if pictures.name == "real":
        correct, correct5, total = real_accuracy(pictures, found.predictions, indices)
        notes = (*notes, f"{len(found.labels) - total:,} pictures have no ReaL label and do not count")
    if total == 0:
        raise ValueError(f"none of the pictures in {pictures.part.where} has a ReaL label")
    top1, top5 = 100 * correct / total, 100 * correct5 / total
    card = candidate.card
    on_paper = card is not None and card.paper is not None and pictures.name == "in1k"
    return ImageResult(
        model=candidate.name,
        weights=candidate.weights,
        data_set=pictures.name,
        where=pictures.part.where,
        kind=pictures.part.kind,
        top1=top1,
        top1_err=100 - top1,
        top5=top5,
        top5_err=100 - top5,
        correct=correct,
        correct5=correct5,
        total=total,
        paper=card.paper.top1 if on_paper and card is not None and card.paper is not None else None,
        param_count=parameters,
        img_size=config["input_size"][-1],
        crop_pct=config["crop_pct"],
        interpolation=config["interpolation"],
        crop_mode=config["crop_mode"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        dtype=dtype,
        channels_last=channels_last,
        reparameterized=reparam,
        batch_size=found.batch_size,
        processes=processes.size,
        images_per_second=found.per_second,
        seconds=found.seconds,
        hardware=hardware(processes.device),
        versions=versions(),
        notes=notes,
    )


def image_row(result: ImageResult) -> tuple[str, ...]:
    """One line of the table under :data:`HEADER`: cells ready to be shown."""
    return (
        result.model,
        result.data_set,
        f"{result.top1:.3f}",
        "-" if result.paper is None else f"{result.paper:.2f}",
        f"{result.top5:.3f}",
        f"{result.correct:,} of {result.total:,}",
        str(result.img_size),
        f"{result.crop_pct:g}",
        result.interpolation,
        f"{result.images_per_second:,.0f}",
    )
