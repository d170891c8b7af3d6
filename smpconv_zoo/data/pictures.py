"""MNIST and CIFAR-10, and the validation part of ImageNet-1k, from files on disk, read by torchvision.

Normalized as in the authors' code (sangnekim/SMPConv, commit de4e59a), which takes ImageNet's statistics for CIFAR-10.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo
from torch import Tensor
from torchvision.datasets import CIFAR10, MNIST, ImageFolder

from smpconv_zoo.data.mnist5k import MEAN, STD

__all__ = [
    "cifar10_test",
    "cifar10_train",
    "download_cifar10",
    "download_mnist",
    "has_cifar10",
    "has_imagenet_classes",
    "has_mnist",
    "imagenet_validation",
    "mnist_test",
    "mnist_train",
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


def download_mnist(root: Path) -> None:
    """Fetch MNIST into ``root/MNIST/raw``; torchvision checks the md5 of every archive.

    Raises:
        ValueError: It could not be fetched.
        OSError: The folder cannot be written.
    """
    _open(MNIST, root, download=True)


def download_cifar10(root: Path) -> None:
    """Fetch CIFAR-10 into ``root/cifar-10-batches-py``; torchvision checks the md5 of every file.

    Raises:
        ValueError: It could not be fetched.
        OSError: The folder cannot be written.
    """
    _open(CIFAR10, root, download=True)


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
    data = _open(MNIST, root, train)
    if data.data.shape[1:] != (28, 28) or len(data.data) != len(data.targets):
        raise ValueError(f"MNIST in {root}: {tuple(data.data.shape)} images and {len(data.targets)} labels do not fit")
    return (data.data[:, None].to(torch.float32) / 255 - MEAN) / STD, data.targets


def _cifar10(root: Path, train: bool) -> tuple[Tensor, Tensor]:
    data = _open(CIFAR10, root, train)
    mean, std = (torch.tensor(c)[:, None, None] for c in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    x = torch.from_numpy(data.data).permute(0, 3, 1, 2).to(torch.float32) / 255
    return (x - mean) / std, torch.tensor(data.targets)


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


def _open(kind: type[Any], root: Path, train: bool = False, download: bool = False) -> Any:
    """A part as torchvision reads it."""
    try:
        return kind(str(root), train=train, download=download)
    except PermissionError:
        raise
    except Exception as error:  # RuntimeErrors, assertions, pickle's errors and more: whatever the files bring about
        reason = "it could not be fetched" if download else "it is not as published, or it is damaged"
        raise ValueError(f"{kind.__name__} in {root}: {reason} ({' '.join(str(error).split())})") from error
