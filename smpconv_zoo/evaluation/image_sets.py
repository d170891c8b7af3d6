"""The test sets of ImageNet's classes: found, held against what they should be, and numbered as networks count.

The validation part of ImageNet-1k, with its labels or with those of ReaL; ImageNet-V2, -A, -R and -Sketch. Which
classes -A and -R have, and ReaL's labels, come with timm. ``pictures`` is any set of class folders, for networks of as
many classes, numbered as in training.
"""

from __future__ import annotations

import dataclasses
import pkgutil
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
from PIL import Image
from timm.data import ImageNetInfo, RealLabelsImagenet, create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import Dataset

from smpconv_zoo.data.folders import PicturePart, PictureSet, open_part, read_picture

__all__ = ["IMAGE_SETS", "ImageSet", "ImageTestSet", "open_image_set", "preprocessing", "real_accuracy", "samples_of"]

# Classes that a message names before it counts the rest.
NAMED = 3


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """A test set.

    Args:
        title: What it is called.
        pictures: How many it has; None if any number will do.
        per_class: How many of each class, where that is the same.
        subset: timm's file of its classes, where they are not all 1,000.
        source: Where it is published.
        paper: Where it is described.
        fetched: What `smpconv-zoo data fetch` calls it; None where a login is needed.
    """

    title: str
    pictures: int | None
    per_class: int | None
    subset: str | None
    source: str
    paper: str
    fetched: str | None = None


IMAGE_SETS = {
    "in1k": ImageSet(
        "ImageNet-1k, validation part",
        50_000,
        50,
        None,
        "https://image-net.org/download-images (ILSVRC 2012, registration needed)",
        "https://arxiv.org/abs/1409.0575",
    ),
    "real": ImageSet(
        "ImageNet-1k, validation part, ReaL labels",
        50_000,
        50,
        None,
        "https://github.com/google-research/reassessed-imagenet (labels: in timm; pictures: those of in1k)",
        "https://arxiv.org/abs/2006.07159",
    ),
    "v2": ImageSet(
        "ImageNet-V2, matched frequency",
        10_000,
        10,
        None,
        "https://huggingface.co/datasets/vaishaal/ImageNetV2 (imagenetv2-matched-frequency.tar.gz)",
        "https://arxiv.org/abs/1902.10811",
        "imagenet-v2",
    ),
    "a": ImageSet(
        "ImageNet-A",
        7_500,
        None,
        "imagenet_a_synsets.txt",
        "https://github.com/hendrycks/natural-adv-examples (imagenet-a.tar)",
        "https://arxiv.org/abs/1907.07174",
        "imagenet-a",
    ),
    "r": ImageSet(
        "ImageNet-R",
        30_000,
        None,
        "imagenet_r_synsets.txt",
        "https://github.com/hendrycks/imagenet-r (imagenet-r.tar)",
        "https://arxiv.org/abs/2006.16241",
        "imagenet-r",
    ),
    "sketch": ImageSet(
        "ImageNet-Sketch",
        50_889,
        None,
        None,
        "https://github.com/HaohanWang/ImageNet-Sketch",
        "https://arxiv.org/abs/1905.13549",
        "imagenet-sketch",
    ),
    "pictures": ImageSet("pictures in folders of classes", None, None, None, "yours", ""),
}


@dataclasses.dataclass(frozen=True)
class ImageTestSet:
    """A test set that was found.

    Args:
        name: One of :data:`IMAGE_SETS`.
        part: The pictures.
        labels: ``(N,)`` int64, the number of each picture's class among ``columns``.
        columns: The network's logits to choose among; None for all of them.
        num_classes: Logits that a network has to have.
        notes: Sentences without which the figures would be misread.
    """

    name: str
    part: PicturePart
    labels: np.ndarray
    columns: tuple[int, ...] | None
    num_classes: int
    notes: tuple[str, ...]


def open_image_set(name: str, where: str | Path, partial: bool = False) -> ImageTestSet:
    """Find a test set and hold its classes and counts against what they should be. No picture is read.

    Args:
        name: One of :data:`IMAGE_SETS`.
        where: Whatever :func:`~smpconv_zoo.data.folders.open_part` takes; of a split the validation part.
        partial: Whether classes and pictures may be missing; the notes then say so.

    Raises:
        FileNotFoundError: There is nothing there; the message says where to get the set.
        ValueError: Folders that are no classes of the set, or another number of pictures.
        ImportError: A Hugging Face dataset without the package that reads it.
    """
    if name not in IMAGE_SETS:
        raise ValueError(f"{name!r} is no test set; there are {', '.join(IMAGE_SETS)}")
    about = IMAGE_SETS[name]
    try:
        part = open_part(where)
    except FileNotFoundError as error:
        fetch = f"`smpconv-zoo data fetch {about.fetched} --data-dir DIR` fetches it, " if about.fetched else ""
        raise FileNotFoundError(f"{error}; {fetch}{about.title} is at {about.source}") from error
    if name == "pictures":
        return ImageTestSet(name, part, part.pictures.labels, None, len(part.classes), ())
    imagenet = ImageNetInfo().label_names()
    classes = _classes(about)
    labels = _numbers(part, classes, about, imagenet)
    faults = _faults(part, labels, classes, about)
    if faults and not partial:
        raise ValueError(
            f"{part.where} is not the whole of {about.title}: {'; '.join(faults)}. Mend it, or measure on what is "
            "there by --partial"
        )
    notes = tuple(f"only a part of {about.title}: {fault}" for fault in faults)
    if part.kind in ("wds", "hfds") and not _are_synsets(part.classes):
        notes = (*notes, f"the {part.kind} data name no synsets: their labels are taken for the numbers of the classes")
    columns = None if about.subset is None else tuple(imagenet.index(synset) for synset in classes)
    if name == "real":
        for index in range(len(labels)):
            _real_name(part.pictures, index)
    return ImageTestSet(name, part, labels, columns, len(imagenet), notes)


def preprocessing(model: nn.Module, **changes: Any) -> dict[str, Any]:
    """How a network wants its pictures, by its ``pretrained_cfg``.

    Args:
        model: Any network of timm's or ours.
        **changes: timm's ``img_size`` and ``crop_pct``, where they differ; None for none.

    Returns:
        ``input_size``, ``interpolation``, ``mean``, ``std``, ``crop_pct`` and ``crop_mode``.
    """
    config: dict[str, Any] = resolve_data_config(changes, model=model)
    channels = int(getattr(model, "in_chans", config["input_size"][0]))
    config["input_size"] = (channels, *config["input_size"][1:])
    for name in ("mean", "std"):
        if len(config[name]) != channels:
            config[name] = (sum(config[name]) / len(config[name]),) * channels
    return config


def samples_of(pictures: ImageTestSet, config: dict[str, Any]) -> Dataset[tuple[Tensor, int]]:
    """The samples (x, y) of a test set: x ``(C, H, W)`` float32, y the number of the class.

    ImageNet's pictures are taken as they are stored, others are turned as their EXIF orientation says: as in training.
    """
    mode = "RGB" if config["input_size"][0] == 3 else "L"
    return _Samples(pictures, create_transform(**config, is_training=False), mode)


def real_accuracy(pictures: ImageTestSet, predictions: Tensor, indices: Sequence[int]) -> tuple[int, int, int]:
    """By the labels of ReaL, of which a picture may have several or none; those that have none do not count.

    Args:
        pictures: Of :func:`open_image_set`, ``"real"``.
        predictions: ``(N, 5)`` classes, most probable first, of the pictures numbered ``indices``.

    Returns:
        Right at first, right among five, and how many count.
    """
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 50_001)]
    real = RealLabelsImagenet(names)
    real.filenames = [_real_name(pictures.part.pictures, index) for index in indices]
    # It takes logits, of which it asks for the five highest.
    ranks = predictions.new_tensor(range(predictions.shape[1], 0, -1)).expand_as(predictions)
    real.add_result(predictions.new_zeros(len(predictions), 1000).scatter_(1, predictions, ranks).float())
    right = [int(np.sum(real.is_correct[k])) for k in (1, 5)]
    return right[0], right[1], len(real.is_correct[1])


class _Samples(Dataset[tuple[Tensor, int]]):
    def __init__(self, pictures: ImageTestSet, transform: Callable[[Image.Image], Any], mode: str) -> None:
        self.pictures = pictures.part.pictures
        self.labels = pictures.labels
        self.upright = pictures.name == "pictures"
        self.transform = transform
        self.mode = mode

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture = read_picture(self.pictures, index, self.mode, self.upright)
        return self.transform(picture), int(self.labels[index])


def _classes(about: ImageSet) -> list[str]:
    """Synsets of a set, in the order of ImageNet's."""
    if about.subset is None:
        names: list[str] = ImageNetInfo().label_names()
        return names
    data = pkgutil.get_data(timm.data.__name__, f"_info/{about.subset}")
    if data is None:
        raise FileNotFoundError(f"timm {timm.__version__} has no file {about.subset}, which names the classes")
    return data.decode().split()


def _numbers(part: PicturePart, classes: list[str], about: ImageSet, imagenet: list[str]) -> np.ndarray:
    """The number of each picture's class among those of the set."""
    names, labels = part.classes, part.pictures.labels
    place = {synset: number for number, synset in enumerate(classes)}
    if _are_synsets(names):
        if foreign := sorted(set(names) - set(place)):
            few = f": {part.where} looks like another set" if set(foreign) <= set(imagenet) else ""
            raise ValueError(
                f"{part.where} has {len(foreign):,} of its {len(names):,} folders for classes that {about.title} has "
                f"not ({_listed(foreign)}){few}"
            )
        return np.array([place[name] for name in names])[labels]
    if part.kind == "wds" or (all(name.isdecimal() for name in names) and len(classes) == len(imagenet)):
        # Of V2 a folder's name is a number; shards name theirs in .cls.
        numbers = np.array([int(name) for name in names])[labels]
    elif part.kind == "hfds":
        numbers = labels
    else:
        wrong = [name for name in names if name not in place]
        raise ValueError(
            f"{part.where} needs one folder for each class of {about.title}, named by its WordNet id (n01440764, ...), "
            f"it has {len(names):,}, such as {_listed(wrong)}"
        )
    if len(classes) < len(imagenet) and numbers.max() >= len(classes):
        # Numbered among all 1,000.
        of_all = {imagenet.index(synset): number for number, synset in enumerate(classes)}
        if others := [str(number) for number in sorted(set(numbers.tolist()) - set(of_all))]:
            raise ValueError(f"{part.where} has labels that are no classes of {about.title}: {_listed(others)}")
        return np.array([of_all[number] for number in numbers.tolist()])
    if numbers.max() >= len(classes):
        raise ValueError(f"{part.where} has a label {numbers.max()}, {about.title} has {len(classes):,} classes")
    return numbers


def _are_synsets(names: Sequence[str]) -> bool:
    return all(re.fullmatch(r"n\d{8}", name) for name in names)


def _faults(part: PicturePart, labels: np.ndarray, classes: list[str], about: ImageSet) -> list[str]:
    """In what the pictures are not those of the whole set."""
    faults = []
    counts = np.bincount(labels, minlength=len(classes))
    if missing := [classes[number] for number in np.flatnonzero(counts == 0)]:
        faults.append(f"{len(missing):,} of {len(classes):,} classes are missing ({_listed(missing)})")
    if len(labels) != about.pictures:
        faults.append(f"it has {len(labels):,} pictures, not {about.pictures:,}")
    if about.per_class is not None:
        off = [number for number in np.flatnonzero(counts) if counts[number] != about.per_class]
        if off:
            common = Counter(int(counts[number]) for number in off).most_common(1)[0][0]
            where = _listed([classes[number] for number in off])
            faults.append(f"{len(off):,} classes have not {about.per_class} pictures, most of them {common} ({where})")
    return faults


def _real_name(pictures: PictureSet, index: int) -> str:
    """The name under which ReaL knows a picture."""
    found = re.search(r"ILSVRC2012_val_\d{8}", pictures.name(index))
    if found is None:
        raise ValueError(
            f"ReaL knows pictures by their names, ILSVRC2012_val_00000001 and so on; {pictures.name(index)} has another"
        )
    return f"{found[0]}.JPEG"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
