"""The data protocol against the reference's tensors, and at its edges."""

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_files import golden
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from smpconv_zoo.data import protocol

# A few float32 roundings of values of size 5: the pooled sums are added in another order than in the reference.
NORMALIZED = {"rtol": 0.0, "atol": 4e-6}

PARTS = (("train", "train"), ("validation", "val"), ("test", "test"))


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return load_file(golden("data_protocol.safetensors"))


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return json.loads(golden("data_protocol.json").read_text())


@pytest.mark.parametrize(("name", "labels"), [("split", "y"), ("split_n101", "split_n101/labels")])
def test_split_draws_the_references_indices(tensors: dict[str, Tensor], name: str, labels: str) -> None:
    for part, index in zip(("train", "val", "test"), protocol.split_70_15_15(tensors[labels]), strict=True):
        np.testing.assert_array_equal(index, tensors[f"{name}/{part}_idx"].numpy())


def test_split_sizes_of_the_real_data_sets(facts: dict[str, Any]) -> None:
    assert {"2858", "34975"} <= set(facts["split_sizes"])
    for n, sizes in facts["split_sizes"].items():
        labels = np.arange(int(n)) % 10
        parts = protocol.split_70_15_15(labels)
        assert [len(part) for part in parts] == sizes
        np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(int(n)))


def test_split_refuses_what_it_cannot_stratify() -> None:
    with pytest.raises(ValueError, match="one-dimensional"):
        protocol.split_70_15_15(np.zeros((4, 2), dtype=int))
    with pytest.raises(ValueError, match="least populated class"):
        protocol.split_70_15_15([0] * 20 + [1])
    with pytest.raises(ValueError, match="n_samples=0"):
        protocol.split_70_15_15([])


def test_split_names_scikit_learn_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = builtins.__import__

    def without_sklearn(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("sklearn"):
            raise ModuleNotFoundError(name)
        return genuine(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        protocol.split_70_15_15([0, 1] * 10)


@pytest.mark.parametrize(("name", "raw"), [("normalised", "X"), ("normalised_with_nan", "X_with_nan")])
def test_normalize_uses_training_statistics_of_each_time_step(tensors: dict[str, Tensor], name: str, raw: str) -> None:
    x, expected = tensors[raw], tensors[name]
    train, everything = protocol.normalize(x[tensors["split/train_idx"]], x)
    torch.testing.assert_close(everything, expected, equal_nan=True, **NORMALIZED)
    torch.testing.assert_close(train, expected[tensors["split/train_idx"]], equal_nan=True, **NORMALIZED)


def test_normalize_by_hand() -> None:
    train = torch.tensor([[[1.0, 7.0]], [[3.0, torch.nan]], [[torch.nan, 7.0]]], dtype=torch.float64)
    other = torch.tensor([[[4.0, 8.0]]], dtype=torch.float64)
    normalized, elsewhere = protocol.normalize(train, other)
    unit = 1 / (2**0.5 + 1e-5)  # the unbiased standard deviation of 1 and 3 is the root of 2
    assert normalized[:2, 0, 0].tolist() == pytest.approx([-unit, unit], rel=1e-12)
    assert normalized[2, 0, 0].isnan() and normalized[1, 0, 1].isnan()
    # A constant time step has deviation 0: the 1e-5 alone divides.
    assert elsewhere.flatten().tolist() == pytest.approx([2 * unit, 1e5], rel=1e-12)


def test_normalize_makes_a_time_step_without_statistics_nan() -> None:
    train = torch.randn(4, 2, 3)
    train[:, :, 0] = torch.nan  # never observed
    train[1:, :, 1] = torch.nan
    train[0, 1, 1] = torch.nan  # observed once
    other = torch.randn(5, 2, 3)
    for x in protocol.normalize(train, other):
        assert x[:, :, :2].isnan().all()
        assert x[:, :, 2].isfinite().all()


def test_normalize_refuses_other_shapes_and_types() -> None:
    x = torch.randn(4, 2, 3)
    with pytest.raises(ValueError, match="must agree"):
        protocol.normalize(x, torch.randn(4, 2, 5))
    with pytest.raises(ValueError, match=r"\(N, C, L\)"):
        protocol.normalize(x[0])
    with pytest.raises(ValueError, match=r"torch\.int64"):
        protocol.normalize(x.long())


def test_pad_repeats_the_last_value(tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    assert facts["pad"]
    for case in facts["pad"]:
        padded = protocol.pad_series(tensors[f"pad/{case['index']}_in"], case["maxlen"])
        assert padded.dtype == torch.float32
        assert torch.equal(padded, tensors[f"pad/{case['index']}_out"])  # exact: rounding to float32 only


@pytest.mark.parametrize("series", [np.zeros(0), np.zeros(6), np.zeros((2, 2))])
def test_pad_refuses_empty_long_and_nested_series(series: np.ndarray) -> None:
    with pytest.raises(ValueError, match="1 <= L <= 5"):
        protocol.pad_series(series, 5)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=9), st.integers(0, 9))
def test_pad_keeps_the_series_and_adds_constants(values: list[float], extra: int) -> None:
    padded = protocol.pad_series(values, len(values) + extra)
    assert padded.tolist() == values + [values[-1]] * extra


def test_subsample(tensors: dict[str, Tensor]) -> None:
    assert torch.equal(protocol.subsample(tensors["X"], 2), tensors["subsample_2"])
    assert protocol.subsample(torch.arange(7), 3).tolist() == [0, 3, 6]
    with pytest.raises(ValueError, match="step of at least 1"):
        protocol.subsample(tensors["X"], 0)


@pytest.mark.parametrize("rate", [30, 50])
def test_dropped_positions_are_the_references(tensors: dict[str, Tensor], rate: int) -> None:
    assert torch.equal(protocol.dropped_positions(6, 50, rate), tensors[f"dropped_positions_rate{rate}_L50"])


def test_drop_positions_clears_all_channels_of_a_copy() -> None:
    x = torch.randn(6, 3, 50)
    before = x.clone()
    missing = protocol.drop_positions(x, 30).isnan()
    assert torch.equal(x, before)
    for row, positions in zip(missing, protocol.dropped_positions(6, 50, 30), strict=True):
        assert torch.equal(row, row[:1].expand(3, -1))
        assert torch.equal(row[0].nonzero().flatten(), positions)
    assert torch.equal(protocol.drop_positions(x, 30).nan_to_num(), x.masked_fill(missing, 0))


@given(st.integers(0, 5), st.integers(0, 23), st.integers(0, 100), st.integers(0, 2**32))
def test_drop_positions_removes_the_stated_number(n: int, length: int, rate: int, seed: int) -> None:
    missing = protocol.drop_positions(torch.ones(n, 2, length), rate, seed).isnan()
    assert missing.sum(-1).flatten().tolist() == [length * rate // 100] * (2 * n)


@pytest.mark.parametrize("rate", [-1, 100.5, float("nan")])
def test_drop_positions_refuses_a_rate_that_is_no_percentage(rate: float) -> None:
    with pytest.raises(ValueError, match="percentage"):
        protocol.drop_positions(torch.ones(1, 1, 4), rate)


def test_observed_mask_is_one_channel_of_zeros_and_ones() -> None:
    x = torch.tensor([[[1.0, torch.nan, 3.0], [4.0, 5.0, 6.0]]])
    expected = torch.tensor([[[1.0, 0.0, 3.0], [4.0, 5.0, 6.0], [1.0, 0.0, 1.0]]])
    assert torch.equal(protocol.append_observed_mask(x), expected)


def test_labels_are_numbered_by_first_appearance() -> None:
    numbers, names = protocol.labels_by_first_appearance(["b", "a", "b", "c"])
    assert numbers.dtype == np.int64 and numbers.tolist() == [0, 1, 0, 2] and names == ["b", "a", "c"]
    numbers, names = protocol.labels_by_first_appearance([])
    assert numbers.shape == (0,) and names == []


def character_series(tensors: dict[str, Tensor]) -> list[list[Tensor]]:
    lengths = tensors["char/series_lengths"]
    flat = iter(tensors["char/series_concatenated"].split(lengths.flatten().tolist()))
    return [[next(flat) for _ in row] for row in lengths]


@pytest.mark.parametrize("rate", [0, 30])
def test_character_trajectories_from_files_to_tensors(
    tensors: dict[str, Tensor], facts: dict[str, Any], rate: int
) -> None:
    result = protocol.character_trajectories(character_series(tensors), facts["char"]["labels"], rate)
    for part, short in PARTS:
        x, y = result[part]
        expected = tensors[f"char/drop{rate}/{short}_X"]
        assert torch.equal(y, tensors[f"char/drop{rate}/{short}_y"])
        torch.testing.assert_close(x, expected, **NORMALIZED)
        if rate:
            assert torch.equal(x[:, -1], expected[:, -1])  # the observed mask, exactly


def test_character_trajectories_refuses_inconsistent_input() -> None:
    with pytest.raises(ValueError, match="2 series, 1 labels"):
        protocol.character_trajectories([[[1.0]], [[1.0]]], ["a"])
    with pytest.raises(ValueError, match=r"channels \[1, 2\]"):
        protocol.character_trajectories([[[1.0]], [[1.0], [2.0]]], ["a", "a"])
    with pytest.raises(ValueError, match="0 series"):
        protocol.character_trajectories([], [])


@pytest.mark.parametrize("seed", [0, 1])
def test_pixel_permutation_repeats_both_draws(seed: int) -> None:
    stored = json.loads(golden(f"pmnist_permutation_seed{seed}.json").read_text())
    assert protocol.pixel_permutation(seed).tolist() == stored["first_draw"]
    assert protocol.pixel_permutation(seed, draw=1).tolist() == stored["second_draw"]
    with pytest.raises(ValueError, match="must not be negative"):
        protocol.pixel_permutation(seed, draw=-1)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
def test_permute_pixels_follows_the_row_major_image(height: int, width: int, seed: int) -> None:
    images = torch.arange(2 * 3 * height * width).reshape(2, 3, height, width)
    order = protocol.pixel_permutation(seed, n=height * width)
    sequences = protocol.permute_pixels(images, order)
    assert sequences.shape == (2, 3, height * width)
    for j, pixel in enumerate(order):
        assert torch.equal(sequences[..., j], images[..., pixel // width, pixel % width])
    assert torch.equal(protocol.permute_pixels(images.flatten(2), torch.from_numpy(order)), sequences)


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 1, 2, 2], [1, 2, 3, 4], [[0, 1, 2, 3]]])
def test_permute_pixels_refuses_what_is_no_permutation(order: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"each of 0 \.\.\. 3 exactly once"):
        protocol.permute_pixels(torch.zeros(1, 1, 2, 2), order)
    with pytest.raises(ValueError, match="images must be"):
        protocol.permute_pixels(torch.zeros(2, 2), [0, 1])


def test_a_missing_golden_file_skips_and_says_which() -> None:
    with pytest.raises(pytest.skip.Exception, match=r"^needs golden/no_such\.json, which is not in this clone$"):
        golden("no_such.json")


def test_golden_files_of_another_folder_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data_protocol.json").write_text("{}")
    monkeypatch.setenv("SMPCONV_GOLDEN", str(tmp_path))
    assert golden("data_protocol.json") == tmp_path / "data_protocol.json"
    assert golden("mfcc.safetensors").parent != tmp_path
