"""docs/training.md is true: its Python runs, its commands parse, its tables are the defaults."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import typer.main
from golden_files import ROOT
from PIL import Image
from torch import nn

from smpconv_zoo.checkpoints import convert_checkpoint
from smpconv_zoo.layers import SMPConv2d
from smpconv_zoo.training.finetuning import image_values, sequence_values

PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
STAND_IN = ROOT / "tests" / "timm_script.py"


def commands(program: str) -> list[list[str]]:
    """The commands of the page's shell blocks that begin with a program."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", PAGE, flags=re.S)).replace("\\\n", " ")
    return [words for line in blocks.splitlines() if (words := shlex.split(line, comments=True))[:1] == [program]]


def test_its_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/training.md", "exec"), names)
    assert capsys.readouterr().out.strip() in ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
    assert in_bounds(names["net"])


def test_its_commands_are_those_of_the_command_line() -> None:
    from smpconv_zoo.cli import app

    program: Any = typer.main.get_command(app)
    named = [words[1:] for words in commands("smpconv-zoo")]
    named += [words[words.index("smpconv_zoo") + 1 :] for words in commands("torchrun")]
    assert len(named) >= 8
    for name, *arguments in named:
        # Parsed as on the command line, and not run.
        with program.make_context("smpconv-zoo", [name, *arguments], resilient_parsing=False) as context:
            command = program.get_command(context, name)
            command.make_context(name, list(arguments), parent=context)


def test_its_table_says_the_defaults() -> None:
    with_weights, without = image_values(True, 10**6), image_values(False, 10**6)
    of_sequences, anew = sequence_values(True, 10**6), sequence_values(False, 10**6)
    rows = dict(re.findall(r"^\| (\w[\w ,]*?) \| (.*) \|$", PAGE, flags=re.M))
    assert rows["optimizer"].startswith(
        f"AdamW, weight decay {with_weights['weight_decay']} (sequences {of_sequences['weight_decay']})"
    )
    assert rows["rate"] == "5e-4 (sequences 1e-3), cosine, two epochs of warm-up | 1e-3 (2e-3)"
    rates = (with_weights["lr"], of_sequences["lr"], without["lr"], anew["lr"])
    assert rates == (5e-4, 1e-3, 1e-3, 2e-3)
    assert rows["layer decay"].startswith(f"{with_weights['layer_decay']}:") and without["layer_decay"] is None
    assert rows["epochs, at most"] == (
        f"{with_weights['epochs']} ({of_sequences['epochs']}), stops after {with_weights['early_stop']} "
        f"({of_sequences['early_stop']}) without improvement | {without['epochs']}, stops after {without['early_stop']}"
    )
    assert (anew["epochs"], anew["early_stop"]) == (without["epochs"], without["early_stop"])
    assert f"{with_weights['batch_size']} at most" in rows["batch"]
    low, high = with_weights["scale"]
    assert f"crops of {low:.0%} to {high:.0%}".replace("% to", " to").replace("100%", "100 %") in rows["pictures"]


def test_its_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", PAGE)
    assert links and [link for link in links if not (ROOT / "docs" / link).exists()] == []


# --- timm's script


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        for i in range(8):
            pixels = draw.integers(0, 256, (40, 40, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / "train" / name / f"{i}.png")
    return tmp_path / "data"


def in_bounds(model: nn.Module) -> bool:
    layers = [module for module in model.modules() if isinstance(module, SMPConv2d)]
    assert layers
    return all(
        bool((layer.radius >= layer.radius_bounds[0]).all() and (layer.radius <= layer.radius_bounds[1]).all())
        for layer in layers
    )


def launch(command: list[str], options: list[str]) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command, str(STAND_IN), *options],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def as_documented(pictures: Path, output: Path, **replaced: str) -> list[str]:
    """Options of the page's command, with a tiny network, few pictures and a rate that drives radii out of bounds."""
    (words,) = [words for words in commands("python") if words[1] == "-c"]
    options = words[words.index("train.py") + 1 :]
    # Of mixed precision the stand-in knows nothing.
    cut = options.index("--amp")
    options = options[:cut]
    for name, value in {
        "--model": "test_smpconv",
        "--data-dir": str(pictures),
        "--num-classes": "3",
        "--img-size": "32",
        "--epochs": "2",
        "--lr": "0.5",
        **replaced,
    }.items():
        options[options.index(name) + 1] = value
    return [*options, "--output", str(output)]


def saved(output: Path) -> nn.Module:
    weights = convert_checkpoint(output / "model_best.pth.tar", "test_smpconv", num_classes=3)
    model = timm.create_model("test_smpconv", num_classes=3)
    model.load_state_dict(weights)
    return model


@pytest.mark.slow
def test_timms_script_trains_and_what_it_saves_loads(
    pictures: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    (words,) = [words for words in commands("python") if words[1] == "-c"]
    output = tmp_path / "plain"
    assert "(3, 32, 32)" in launch(words[1:3], as_documented(pictures, output))
    model = saved(output)
    # Nothing clips there, at a rate that is far too high; all the same, everything is a number.
    assert not in_bounds(model)
    assert torch.isfinite(model.eval()(torch.randn(2, 3, 32, 32))).all()
    (convert,) = [words for words in commands("smpconv-zoo") if words[1] == "convert"]
    replaced = {
        "smpconv_t": "test_smpconv",
        '{"num_classes": 7}': '{"num_classes": 3}',
        "output/train/EXPERIMENT/model_best.pth.tar": str(output / "model_best.pth.tar"),
        "birds.safetensors": str(tmp_path / "birds.safetensors"),
    }
    assert call(*(replaced.get(word, word) for word in convert[1:]))[0] == 0
    overlay = {"file": str(tmp_path / "birds.safetensors")}
    loaded = timm.create_model("test_smpconv", pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay)
    assert all(torch.equal(ours, loaded.state_dict()[name]) for name, ours in model.state_dict().items())


@pytest.mark.slow
def test_the_example_clips_radii_in_timms_script(pictures: Path, tmp_path: Path) -> None:
    (words,) = [words for words in commands("python") if words[1].endswith("timm_train.py")]
    launch([str(ROOT / words[1])], as_documented(pictures, tmp_path / "clipped"))
    assert in_bounds(saved(tmp_path / "clipped"))


def test_the_example_says_how_it_is_called() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "timm_train.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=100,
    )
    assert done.returncode == 1 and done.stderr.startswith("usage: python examples/timm_train.py PATH/TO/train.py")
