"""Recipes of the published checkpoints: every value of the authors' commands, and what their code makes of them."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
from golden_files import golden

import smpconv_zoo
from smpconv_zoo.models.build import sample_shape
from smpconv_zoo.pretrained.cards import checkpoint_card
from smpconv_zoo.training.groups import RADIUS_RATE, image_parameter_groups, sequence_parameter_groups
from smpconv_zoo.training.recipe import ImageRecipe, SequenceRecipe, list_recipes, load_recipe
from smpconv_zoo.training.schedules import cosine_schedule, sequence_schedule

# Checkpoint -> the run of the reference values that is its.
RUNS = {
    "smpconv_tcn_mnist.smnist": "smnist",
    "smpconv_tcn_mnist.pmnist": "pmnist",
    "smpconv_tcn_cifar.scifar10": "scifar10",
    "smpconv_resnet_cifar.cifar10": "cifar10",
    "smpconv_tcn_chartraj.ct": "chartrajectories",
    "smpconv_tcn_speech_mfcc.sc10": "speechcommands_mfcc",
    "smpconv_tcn_speech_raw.sc10": "speechcommands_raw",
}
DATA = {
    "sMNIST": "mnist",
    "sCIFAR10": "cifar10",
    "CIFAR10": "cifar10",
    "CharTrajectories": "character-trajectories",
    "SpeechCommands": "speech-commands",
}
# What their configuration file has for what a command does not name; see smp/cfg/config.yaml at de4e59a.
DEFAULTS = {"train.augment": "None", "train.scheduler_params.warmup_epochs": "5", "train.grad_clip": "0.0"}
# smp/trainer.py, smp/optim.py.
PATIENCE, ETA_MIN = 100, 1e-6


def on_meta(recipe: SequenceRecipe | ImageRecipe) -> Any:
    return timm.create_model(recipe.network, device=torch.device("meta"), **recipe.arguments)


def test_every_checkpoint_has_a_recipe() -> None:
    assert set(list_recipes()) == set(smpconv_zoo.list_checkpoints())
    for name in list_recipes():
        recipe = load_recipe(name)
        assert recipe.network == name.partition(".")[0] == checkpoint_card(name).network
        assert recipe.protocol == ("reference" if checkpoint_card(name).status == "importable" else "sound")


@pytest.mark.parametrize("name", [*RUNS, "smpconv_t.in1k", "smpconv_b.in1k"])
def test_the_network_is_the_published_one(name: str) -> None:
    recipe, card = load_recipe(name), checkpoint_card(name)
    network = on_meta(recipe)
    published = {
        "smpconv_t.in1k": 26_705_248,
        "smpconv_b.in1k": 79_546_520,
        "smpconv_tcn_mnist.smnist": 370_960,
        "smpconv_tcn_mnist.pmnist": 370_960,
        "smpconv_tcn_cifar.scifar10": 373_480,
        "smpconv_resnet_cifar.cifar10": 489_646,
        "smpconv_tcn_chartraj.ct": 373_790,
        "smpconv_tcn_speech_mfcc.sc10": 391_840,
        "smpconv_tcn_speech_raw.sc10": 370_960,
    }[name]
    assert sum(p.numel() for p in network.parameters()) == published == card.parameters
    assert network.num_classes == {"imagenet": 1000, "character-trajectories": 20}.get(recipe.data, 10)


@pytest.mark.parametrize("name", RUNS)
def test_sequence_recipes_are_the_commands(name: str) -> None:
    stored = json.loads(golden(f"seq_{RUNS[name]}.json").read_text())
    command = {**DEFAULTS, **stored["overrides"]}
    recipe = load_recipe(name)
    assert isinstance(recipe, SequenceRecipe)
    assert recipe.data == DATA[command["dataset"]]
    assert recipe.epochs == int(command["train.epochs"])
    assert recipe.batch_size == int(command["train.batch_size"]) and recipe.micro_batches == 1
    assert recipe.optimizer == command["train.optimizer"].lower()
    assert recipe.lr == float(command["train.lr"])
    assert float(command["train.radius_lr_factor"]) == RADIUS_RATE
    assert recipe.weight_decay == float(command["train.weight_decay"])
    assert command["train.scheduler"] == "cosine" and recipe.final_lr == ETA_MIN
    assert recipe.warmup_epochs == int(command["train.scheduler_params.warmup_epochs"])
    assert recipe.clip_grad is None and float(command["train.grad_clip"]) == 0
    assert recipe.input_drop_rate == float(command["net.dropout_in"])
    assert recipe.augment == (command["train.augment"] != "None")
    assert recipe.early_stop == PATIENCE
    assert recipe.seed == int(command["seed"])
    assert recipe.permutation_seed == (recipe.seed if command.get("dataset_params.permuted") == "True" else None)
    assert (recipe.dropped, recipe.ema_decay, recipe.layer_decay, recipe.dtype) == (0, None, None, "float32")
    if recipe.data == "speech-commands":
        assert recipe.features == ("mfcc" if command["dataset_params.mfcc"] == "True" else "raw")
    else:
        assert recipe.features is None
    dropout = float(command["net.dropout"])
    assert recipe.arguments == ({"block_drop_rate": dropout} if dropout else {})
    # The first number is their batch.
    network = on_meta(recipe)
    assert [recipe.batch_size, *sample_shape(network)] == json.loads(command["summary"])
    assert recipe.input.startswith("image") == (stored["constructor_summary"]["type"] == "Img_ResNet")
    groups = sequence_parameter_groups(network, recipe.lr, recipe.weight_decay)
    expected = [(g["name"], g["weight_decay"], g["lr"], len(g["parameters"])) for g in stored["optimizer_groups"]]
    found = [(g["name"], g["weight_decay"], pytest.approx(g["lr"]), len(g["params"])) for g in groups]
    assert found == expected


@pytest.mark.parametrize("name", RUNS)
def test_rates_of_every_stored_step(name: str) -> None:
    stored = json.loads(golden("seq_lr_schedules.json").read_text())["runs"][RUNS[name]]
    recipe = load_recipe(name)
    # An epoch of theirs ends with what fills no batch.
    steps = math.ceil(stored["dataset_size_constant"] / recipe.batch_size)
    total, warmup = recipe.epochs * steps, recipe.warmup_epochs * steps
    assert (steps, total, warmup) == (stored["steps_per_epoch"], stored["total_steps"], stored["warmup_steps"])
    table = np.array(stored["lr_used_at_step"])
    at = table[:, 0].astype(int)
    for column, scale in enumerate((1.0, 1.0, RADIUS_RATE), start=1):
        rates = sequence_schedule(recipe.lr * scale, total, warmup, final=recipe.final_lr)
        np.testing.assert_allclose(rates[at], table[:, column], rtol=1e-9)


@pytest.mark.parametrize(("name", "drop_path", "parts"), [("smpconv_t.in1k", 0.1, 2), ("smpconv_b.in1k", 0.5, 4)])
def test_image_recipes(name: str, drop_path: float, parts: int) -> None:
    """Against smp_imagenet/README.md and the defaults of smp_imagenet/main.py at de4e59a, by hand."""
    recipe = load_recipe(name)
    assert isinstance(recipe, ImageRecipe)
    assert recipe.arguments == {"drop_path_rate": drop_path}
    assert recipe.batch_size == 4 * {2: 256, 4: 128}[parts] * parts and recipe.micro_batches == parts
    assert (recipe.epochs, recipe.warmup_epochs, recipe.seed) == (300, 10, 42)
    assert (recipe.optimizer, recipe.lr, recipe.final_lr, recipe.weight_decay) == ("adamw", 4e-3, 1e-6, 0.05)
    assert (recipe.clip_grad, recipe.layer_decay, recipe.early_stop) == (None, None, None)
    assert (recipe.ema_decay, recipe.dtype, recipe.sync_batch_norm) == (0.9999, "float32", True)
    assert (recipe.auto_augment, recipe.interpolation) == ("rand-m9-mstd0.5-inc1", "random")
    assert (recipe.hflip, recipe.vflip, recipe.erasing, recipe.smoothing) == (0.0, 0.0, 0.25, 0.1)
    assert (recipe.mixup, recipe.cutmix, recipe.mixup_probability, recipe.mixup_switch_probability) == (0.8, 1, 1, 0.5)
    assert (recipe.scale, recipe.ratio) == ([0.08, 1.0], [3 / 4, pytest.approx(4 / 3)])
    assert (recipe.image_size, recipe.crop) == (224, 0.875)


def test_the_groups_of_the_image_recipe() -> None:
    stored = json.loads(golden("param_groups_T.json").read_text())
    recipe = load_recipe("smpconv_t.in1k")
    assert recipe.weight_decay == stored["base_weight_decay"]
    groups = image_parameter_groups(on_meta(recipe), recipe.weight_decay)
    found = [(g["weight_decay"], g["lr_scale"], len(g["params"])) for g in groups]
    assert found == [(g["weight_decay"], g["lr_scale"], len(g["parameters"])) for g in stored["groups"]]


def test_the_schedule_of_the_image_recipe_is_one_of_the_stored_cases_stretched() -> None:
    stored = json.loads(golden("cosine_scheduler.json").read_text())["cases"][0]["settings"]
    recipe = load_recipe("smpconv_t.in1k")
    assert (recipe.lr, recipe.final_lr) == (stored["base_value"], stored["final_value"])
    # 1,281,167 images, of which those that fill no batch are left out.
    steps = 1_281_167 // recipe.batch_size
    rates = cosine_schedule(recipe.lr, recipe.final_lr, recipe.epochs, steps, recipe.warmup_epochs)
    assert len(rates) == 187_500 and rates[0] == 0
    assert rates[10 * steps - 1] == rates[10 * steps] == recipe.lr == rates.max()
    assert recipe.final_lr < rates[-1] < recipe.final_lr * 1.001
