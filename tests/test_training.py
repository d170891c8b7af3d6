"""Recipes, augmentation and the trainer, on a tiny network and the real digits."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from smpconv_zoo.pretrained.cards import load_card
from smpconv_zoo.pretrained.store import read_safetensors
from smpconv_zoo.training import arrays, sequence
from smpconv_zoo.training.augment import augment_digits
from smpconv_zoo.training.recipe import SequenceRecipe, load_recipe, parse_overrides
from smpconv_zoo.training.running import train
from smpconv_zoo.training.step import TrainingStep

TINY = {"network": "test_smpconv_tcn", "epochs": 2, "warmup_epochs": 1, "lr": 3e-3}


def test_every_embedded_checkpoint_has_its_recipe_inside():
    from smpconv_zoo.pretrained.cards import weights_dir

    embedded = sorted(path.stem for path in weights_dir().glob("*.safetensors"))
    assert embedded == [
        "smpconv_resnet_mnist.mnist5k",
        "smpconv_tcn.acsf1",
        "smpconv_tcn.arrowhead",
        "smpconv_tcn.basic_motions",
        "smpconv_tcn.gunpoint",
        "smpconv_tcn.italy_power_demand",
        "smpconv_tcn.japanese_vowels",
        "smpconv_tcn.japanese_vowels_30",
        "smpconv_tcn.japanese_vowels_50",
        "smpconv_tcn.japanese_vowels_70",
        "smpconv_tcn.mnist1d",
        "smpconv_tcn.osuleaf",
        "smpconv_tcn_mnist.pmnist5k",
        "smpconv_tcn_mnist.smnist5k",
    ]
    for name in embedded:
        metadata = read_safetensors(weights_dir() / f"{name}.safetensors")[1]
        recipe = dataclasses.asdict(load_recipe(name))
        # What recipes hold since, the network was trained without.
        assert json.loads(metadata["recipe"]).items() <= recipe.items()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"learning_rate": 1.0}, "no field 'learning_rate'"),
        ({"epoch": 3}, "did you mean epochs"),
        ({"lr": -1.0}, "lr > 0"),
        ({"lr": "fast"}, "lr must be float, got 'fast'"),
        ({"augment": 1}, "augment must be bool"),
        ({"epochs": True}, "epochs must be int"),
        ({"warmup_epochs": 100}, "warmup_epochs < epochs"),
        ({"input": "picture"}, "input must be one of"),
        ({"permutation_seed": 0}, "a sequence has none"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_runs(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("smpconv_tcn_mnist.smnist5k", **overrides)


def test_an_unknown_recipe_lists_near_names():
    with pytest.raises(ValueError, match=r"did you mean smpconv_tcn_mnist\.smnist5k"):
        load_recipe("smpconv_tcn_mnist.smnist6k")


def test_overrides_are_yaml():
    pairs = ["lr=2e-3", "epochs=5", "augment=false", "arguments={block_drop_rate: 0.1}", "permutation_seed=null"]
    assert parse_overrides(pairs) == {
        "lr": 2e-3,
        "epochs": 5,
        "augment": False,
        "arguments": {"block_drop_rate": 0.1},
        "permutation_seed": None,
    }
    with pytest.raises(ValueError, match="expected KEY=VALUE"):
        parse_overrides(["lr"])
    with pytest.raises(ValueError, match="is not YAML"):
        parse_overrides(["lr={"])


def test_augmentation_keeps_what_it_should():
    images = torch.full((64, 1, 28, 28), -0.4)
    images[:, :, 10:18, 12:16] = 2.0
    generator = torch.Generator().manual_seed(0)
    out = augment_digits(images, generator)
    assert out.shape == images.shape
    # Half draw no rotation, half no shift, half no scaling, half no patch: about one in sixteen draws nothing.
    untouched = torch.isclose(out, images, atol=1e-5).flatten(1).all(1)
    assert 0 < untouched.sum() < 16
    # Bilinear resampling between background and digit makes no new extremes; the erased patch is exactly 0.
    assert out.min() >= -0.4 - 1e-5
    assert out.max() <= 2.0 + 1e-5
    erased = (out == 0).flatten(1).sum(1)
    assert set(erased.tolist()) <= {0, *range(100, 11 * 11 + 1)}
    assert 16 < (erased > 0).sum() < 48
    again = augment_digits(images, torch.Generator().manual_seed(0))
    assert torch.equal(out, again)


def test_a_shift_moves_the_digit_by_whole_pixels_at_most_two(monkeypatch):
    image = torch.zeros(256, 1, 28, 28)
    image[:, :, 14, 14] = 1.0
    out = augment_digits(image, torch.Generator().manual_seed(1))
    rows, columns = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    mass = out.sum((1, 2, 3))
    kept = mass > 0.5
    row = (out[:, 0] * rows).sum((1, 2))[kept] / mass[kept]
    column = (out[:, 0] * columns).sum((1, 2))[kept] / mass[kept]
    # Two pixels of shift, and a pixel beside the centre turned by 30 degrees moves by less than half of one more.
    assert (row - 14).abs().max() < 2.8
    assert (column - 14).abs().max() < 2.8
    assert (row - 14).abs().max() > 1


def test_training_learns_and_a_seed_decides_it():
    recipe = load_recipe("smpconv_tcn_mnist.smnist5k", **TINY, seed=3)
    epochs = []
    first = sequence.train_sequences(recipe, train_split="validation", validation_split=None, on_epoch=epochs.append)
    second = sequence.train_sequences(recipe, train_split="validation", validation_split=None)
    assert [e.epoch for e in epochs] == [1, 2]
    assert epochs[1].train_loss < epochs[0].train_loss
    for (name, a), b in zip(first.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for module in first.model.modules():
        if hasattr(module, "radius_bounds"):
            assert module.radius.min() >= module.radius_bounds[0]
            assert module.radius.max() <= module.radius_bounds[1]


def test_the_test_part_is_out_of_reach_while_training():
    recipe = load_recipe("smpconv_tcn_mnist.smnist5k", **TINY)
    with pytest.raises(ValueError, match="neither for training nor for choosing"):
        sequence.train_sequences(recipe, train_split="train+test")
    with pytest.raises(ValueError, match="neither for training nor for choosing"):
        sequence.train_sequences(recipe, validation_split="test")


def test_a_loss_that_is_not_finite_stops_the_search(monkeypatch):
    monkeypatch.setattr(sequence, "mnist5k_images", _few_images)
    with pytest.raises(FloatingPointError, match="lower the rate"):
        sequence.train_sequences(_tiny_recipe(lr=1e20))


def test_a_final_run_writes_log_weights_and_card_that_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "mnist5k_images", _few_images)
    monkeypatch.setattr(sequence, "mnist5k_images", _few_images)
    recipe = _tiny_recipe(input="permuted sequence", permutation_seed=0)
    run = train(recipe, tmp_path, final=True)
    card = sequence.finish(run, recipe, tmp_path, "cpu")
    last = run.outcome.last
    assert last.epoch == 2
    assert last.top1 is None
    assert {f"{recipe.id}.json", f"{recipe.id}.jsonl", f"{recipe.id}.safetensors", "metrics.csv"} <= {
        path.name for path in tmp_path.iterdir()
    }
    assert load_card(tmp_path / f"{recipe.id}.json") == card
    _, metadata = read_safetensors(tmp_path / f"{recipe.id}.safetensors", card.files[0].sha256)
    assert sorted(json.loads(metadata["permutation"])) == list(range(784))
    lines = [json.loads(line) for line in (tmp_path / f"{recipe.id}.jsonl").read_text().splitlines()]
    assert lines[0]["recipe"] == dataclasses.asdict(recipe)
    assert [line["epoch"] for line in lines[1:3]] == [1, 2]
    assert lines[3]["correct"] == card.measured.correct
    with pytest.raises(FileExistsError, match="log of a finished run, left as it was"):
        sequence.finish(run, recipe, tmp_path, "cpu")


def test_a_device_that_is_not_there_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ValueError, match="device 'cuda:99' cannot be used"):
        train(_tiny_recipe(), tmp_path / "run", device="cuda:99")
    assert list(tmp_path.iterdir()) == []


def _tiny_recipe(**changes: Any) -> SequenceRecipe:
    recipe = load_recipe("smpconv_tcn_mnist.smnist5k", **TINY)
    return dataclasses.replace(recipe, id="test_smpconv_tcn.tiny", **changes)


def _few_images(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    from smpconv_zoo.data.mnist5k import mnist5k_images

    images, labels = mnist5k_images(split)
    return images[:: len(images) // 150][:150], labels[:: len(labels) // 150][:150]


def test_a_captured_step_needs_a_gpu():
    with pytest.raises(ValueError, match="a CUDA graph needs a GPU, the model is on cpu"):
        TrainingStep(torch.nn.Linear(2, 2), [], torch.device("cpu"), graph=True)
