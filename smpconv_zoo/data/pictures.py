"""MNIST and CIFAR-10, and the validation part of ImageNet-1k, from files on disk, as torchvision keeps them.

Normalized as in the authors' code (sangnekim/SMPConv, commit de4e59a), which takes ImageNet's statistics for CIFAR-10.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo
from torch import Tensor
from torchvision.datasets import CIFAR10, MNIST, ImageFolder
from torchvision.datasets.utils import check_integrity

from smpconv_zoo.data.cifar_files import read_batch
from smpconv_zoo.data.mnist5k import MEAN, STD

__all__ = [
    "cifar10_test",
    "cifar10_train",
    "has_cifar10",
    "has_imagenet_classes",
    "has_mnist",
    "imagenet_validation",
    "mnist_test",
    "mnist_train",
    "read_cifar10_batch",
]


def has_mnist(root: Path) -> bool:
    """Whether all files of MNIST are where torchvision keeps them, unpacked: ``root/MNIST/raw``."""
    return all((root / "MNIST" / "raw" / name.removesuffix(".gz")).is_file() for name, _ in MNIST.resources)


def has_cifar10(root: Path) -> bool:
    """Whether all files of CIFAR-10 are where torchvision keeps them: ``root/cifar-10-batches-py``."""
    names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list] + [CIFAR10.meta["filename"]]
    return all((root / CIFAR10.base_folder / name).is_file() for name in names)


def has_imagenet_classes(folder: Path) -> bool:
    """Whether a folder has folders of ImageNet-1k's classes, named by their WordNet ids."""
    return any((folder / name).is_dir() for name in ImageNetInfo().label_names())


def mnist_test(root: Path) -> tuple[Tensor, Tensor]:
    """The test part of MNIST, 10,000 digits.

    Returns:
        x (N, 1, 28, 28) float32, (grey / 255 - 0.1307) / 0.3081; y (N,) int64.

    Raises:
        ValueError: The files are not there, or not of this format.
    """
    return _mnist(root, train=False)


def mnist_train(root: Path) -> tuple[Tensor, Tensor]:
    """The training part of MNIST, 60,000 digits, as :func:`mnist_test`; the files of the test part stay closed."""
    return _mnist(root, train=True)


def cifar10_test(root: Path) -> tuple[Tensor, Tensor]:
    """The test part of CIFAR-10, 10,000 images.

    Returns:
        x (N, 3, 32, 32) float32, RGB in [0, 1], less ImageNet's mean, by its standard deviation; y (N,) int64.

    Raises:
        ValueError: The files are not there, or their md5 is not that of the published ones.
    """
    return _cifar10(root, train=False)


def cifar10_train(root: Path) -> tuple[Tensor, Tensor]:
    """The training part of CIFAR-10, 50,000 images, as :func:`cifar10_test`."""
    return _cifar10(root, train=True)


def _mnist(root: Path, train: bool) -> tuple[Tensor, Tensor]:
    try:
        data = MNIST(str(root), train=train)
    except PermissionError:
        raise
    except Exception as error:  # RuntimeErrors, assertions and more: whatever the files bring about
        reason = " ".join(str(error).split())
        raise ValueError(f"MNIST in {root}: it is not as published, or it is damaged ({reason})") from error
    if data.data.shape[1:] != (28, 28) or len(data.data) != len(data.targets):
        raise ValueError(f"MNIST in {root}: {tuple(data.data.shape)} images and {len(data.targets)} labels do not fit")
    return (data.data[:, None].to(torch.float32) / 255 - MEAN) / STD, data.targets


def _cifar10(root: Path, train: bool) -> tuple[Tensor, Tensor]:
    batches = [
        read_cifar10_batch(root / CIFAR10.base_folder / name, md5)
        for name, md5 in (CIFAR10.train_list if train else CIFAR10.test_list)
    ]
    images, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    mean, std = (torch.tensor(c)[:, None, None] for c in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    x = torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32) / 255
    return (x - mean) / std, torch.from_numpy(labels)


def read_cifar10_batch(path: Path, md5: str) -> tuple[np.ndarray, np.ndarray]:
    """See :func:`~smpconv_zoo.data.cifar_files.read_batch`; a file of another md5 than the published one is refused.

    Raises:
        ValueError: The file is not there, or not the published one.
    """
    # An md5 keeps mistakes out, not forgers; the reader executes nothing.
    if not check_integrity(path, md5):
        reason = "it is not as published, or it is damaged" if path.is_file() else "it is missing"
        raise ValueError(f"CIFAR10 in {path.parents[1]}: {reason} ({path})")
    return read_batch(path)


def imagenet_validation(folder: Path, transform: Callable[[Image.Image], Tensor]) -> ImageFolder:
    """The validation images of ImageNet-1k, read one by one; the classes are numbered in the order of their ids.

    Args:
        folder: Holds a folder for each of the 1,000 classes, named by its WordNet id, and no other folder.
        transform: From an RGB image to what the network takes.

    Raises:
        ValueError: Other folders.
    """
    expected, found = set(ImageNetInfo().label_names()), {path.name for path in folder.iterdir() if path.is_dir()}
    if found != expected:
        missing, foreign = sorted(expected - found), sorted(found - expected)
        sides = ((missing, "missing"), (foreign, "too many"))
        which = [f"{len(names):,} {what} ({names[0]}, ...)" for names, what in sides if names]
        raise ValueError(
            f"{folder} needs the 1,000 folders of ImageNet-1k's classes (n01440764 to n15075141) and no other: "
            f"{' and '.join(which)}"
        )
    return ImageFolder(str(folder), transform, loader=_read_image, allow_empty=True)


def _read_image(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow has SyntaxErrors for some bad files
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
