"""`eval/ship.py` and what it shipped: cards as the log says, networks that their cards size, the README's table."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import statistics
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from eval_scripts import call_script, load_script
from golden_files import ROOT
from safetensors.torch import load_file
from torch.utils.data import TensorDataset

from smpconv_zoo.catalogue import match_checkpoints
from smpconv_zoo.data.classes import class_names
from smpconv_zoo.data.ucr import UCR_SETS, load_ucr
from smpconv_zoo.description import load_described
from smpconv_zoo.evaluation.classification import evaluate_checkpoint
from smpconv_zoo.evaluation.test_sets import EvaluationData, dropped_share
from smpconv_zoo.pretrained.cards import CardError, CheckpointCard, checkpoint_card, load_card, weights_dir
from smpconv_zoo.pretrained.store import CheckpointError
from smpconv_zoo.publishing import _config
from smpconv_zoo.reporting.logs import read_study
from smpconv_zoo.training.finetuning import _length, find_start
from smpconv_zoo.training.recipe import SequenceRecipe, load_recipe

SERIES = match_checkpoints(["smpconv_tcn.*"])
LOG = ROOT / "eval" / "results" / "study.jsonl"
RECORDS: list[dict[str, Any]] = [json.loads(line) for line in LOG.read_text(encoding="utf-8").splitlines()]
needs_series = pytest.mark.skipif(find_spec("aeon") is None, reason="needs aeon, which carries the series")


def chosen(data: str, kernel: str = "points") -> str | None:
    """The option that held-out data chose among those with all their runs, by the study's own rule."""
    return load_script("study").choice_so_far(RECORDS, data, kernel)[0]


def runs(data: str, kernel: str = "points", option: str | None = None) -> list[dict[str, Any]]:
    option = chosen(data, kernel) if option is None else option
    finals = [record for record in RECORDS if record.get("stage") == "final" and "test" in record]
    found = [run for run in finals if (run["data"], run["kernel"], run["option"]) == (data, kernel, option)]
    return sorted(found, key=lambda run: run["seed"])


def studied(card: CheckpointCard) -> str:
    """What the study calls the data of a card."""
    dropped = dropped_share(card)
    return f"{card.data.name}-{dropped}" if dropped else card.data.name


@pytest.mark.parametrize("name", SERIES)
def test_a_card_says_what_the_log_says(name: str) -> None:
    card = checkpoint_card(name)
    first, *_ = of_all = runs(studied(card))
    assert card.measured is not None and card.training is not None and card.golden is not None
    assert (card.measured.correct, card.measured.total) == (first["test"]["correct"], first["test"]["total"])
    assert card.files[0].sha256 == first["weights"]["sha256"] and card.parameters == first["parameters"]
    assert (card.training.seed, card.training.command) == (0, first["command"])
    assert (card.training.hardware, card.training.versions) == (first["hardware"], first["versions"])
    tops = [run["test"]["top1"] for run in of_all]
    said = f"{statistics.fmean(tops):.2f} % in the mean, standard deviation {statistics.stdev(tops):.2f}"
    assert said in card.training.chosen_by and f"seeds 0 to {len(of_all) - 1}" in card.training.chosen_by
    assert card.training.chosen_by.startswith(f"options {first['option'] or 'reference'}, best of ")
    # Options that were added when test figures had been seen are called so.
    assert ("had been seen" in card.training.chosen_by) == ("short" in first["option"])
    recipe = load_recipe(name)
    assert dataclasses.asdict(recipe) == first["recipe"] and isinstance(recipe, SequenceRecipe)
    assert (recipe.dropped, recipe.data) == (dropped_share(card), card.data.name)
    where = ("MNIST-1D, which is procedural", "Apache-2.0", "seed 42")
    if card.data.name in UCR_SETS:
        where = (UCR_SETS[card.data.name].files, "timeseriesclassification.com", "aeon")
    assert all(words in card.origin for words in where)


def test_what_ships_stays_small() -> None:
    assert len(SERIES) == 11
    assert sum(path.stat().st_size for path in weights_dir().iterdir()) < 25e6


@pytest.mark.parametrize("name", SERIES)
def test_the_card_sizes_the_network(name: str) -> None:
    card = checkpoint_card(name)
    channels, classes, taps = (card.arguments[key] for key in ("in_chans", "num_classes", "kernel_size"))
    assert card.golden is not None
    # Kernels may be shorter than the series.
    length = card.golden.shape[-1]
    assert length == (UCR_SETS[card.data.name].length if card.data.name in UCR_SETS else 40)
    assert taps == (32 if "short" in runs(studied(card))[0]["option"] else length)
    model: Any = timm.create_model(name, pretrained=True).eval()
    stored = load_file(weights_dir() / card.files[0].name)
    assert all(torch.equal(tensor, stored[key]) for key, tensor in model.state_dict().items())
    cfg = model.pretrained_cfg
    assert cfg["input_size"] == (channels, 1, length) and cfg["num_classes"] == classes == model.num_classes
    assert card.scaling is not None and cfg["mean"] == card.scaling.mean and cfg["std"] == card.scaling.std
    assert model(torch.zeros(2, channels, length)).shape == (2, classes)
    # What is asked for stands before what the card says.
    other: Any = timm.create_model(name, pretrained=True, num_classes=classes + 3, kernel_size=2 * taps)
    assert other.num_classes == classes + 3 and other.blocks[0].conv1.large.conv.kernel_size == (2 * taps,)
    assert other.pretrained_cfg["input_size"][-1] == 2 * length
    twice: Any = timm.create_model(name, pretrained=True, sample_rate=2.0)
    assert twice.pretrained_cfg["input_size"][-1] == 2 * length
    assert twice.blocks[0].conv1.large.conv.kernel_size == (2 * taps,)
    _, description = load_described(name)
    assert description.classes == class_names(card.data.name)
    assert description.preprocessing.input_size == (channels, length)
    assert description.preprocessing.mean == card.scaling.mean


def test_the_bare_name_is_for_data_of_ones_own() -> None:
    model: Any = timm.create_model("smpconv_tcn")
    assert model.num_classes == 10 and model.pretrained_cfg["input_size"] == (1, 1, 256)
    assert find_start("smpconv_tcn").pretrained is False
    assert find_start("smpconv_tcn.italy_power_demand").arguments["kernel_size"] == 24
    assert set(SERIES) <= set(timm.list_pretrained()) and "smpconv_tcn" not in timm.list_pretrained()
    with pytest.raises(RuntimeError, match=r"smpconv_tcn has no checkpoint tag 'coffee'; its tags are: acsf1, "):
        timm.create_model("smpconv_tcn.coffee", pretrained=True)
    with pytest.raises(CheckpointError, match=r"train it, or name one of smpconv_tcn\.acsf1, "):
        timm.create_model("smpconv_tcn", pretrained=True)


@pytest.mark.parametrize("scaling", [{"mean": [0.0], "std": [1.0, 1.0]}, {"mean": [0.0], "std": [0.0]}])
def test_a_scaling_that_is_none_is_refused(scaling: dict[str, list[float]], tmp_path: Path) -> None:
    card = json.loads((weights_dir() / f"{SERIES[0]}.json").read_text(encoding="utf-8"))
    path = tmp_path / f"{SERIES[0]}.json"
    path.write_text(json.dumps({**card, "scaling": scaling}), encoding="utf-8")
    with pytest.raises(CardError, match="scaling is a mean and a positive deviation for every channel"):
        load_card(path)


@needs_series
@pytest.mark.parametrize("name", SERIES)
def test_the_figure_of_a_card_is_measured_again(name: str) -> None:
    card = checkpoint_card(name)
    assert card.scaling is not None
    mean, std = (0.0,), (1.0,)
    if card.data.name in UCR_SETS:
        parts = load_ucr(card.data.name, dropped_share(card))
        mean, std = parts.mean, parts.std
    np.testing.assert_allclose(card.scaling.mean, mean, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(card.scaling.std, std, rtol=1e-5)
    assert evaluate_checkpoint(name).agrees is True


@needs_series
def test_shipping_again_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ship(*arguments: object) -> tuple[int, str, str]:
        options = ("--weights", weights_dir(), "--log", LOG.relative_to(ROOT), "--out", tmp_path)
        return call_script("ship", *arguments, *options, monkeypatch=monkeypatch, capsys=capsys)

    monkeypatch.chdir(ROOT)
    place = load_script("ship").RECIPES
    recipes = tmp_path / place
    recipes.mkdir(parents=True)
    (tmp_path / "weights").mkdir()
    code, out, err = ship("gunpoint", "japanese-vowels-70", "mnist1d")
    assert (code, err) == (0, "") and "smpconv_tcn.gunpoint: 150 of 150" in out and out.count("\n") == 3
    for name in ("smpconv_tcn.gunpoint", "smpconv_tcn.japanese_vowels_70", "smpconv_tcn.mnist1d"):
        again, card = load_card(tmp_path / "weights" / f"{name}.json"), checkpoint_card(name)
        assert again.training == card.training and (again.data, again.origin) == (card.data, card.origin)
        assert again.files == card.files and again.arguments == card.arguments and again.macs == card.macs
        assert again.golden is not None and card.golden is not None and again.golden.shape == card.golden.shape
        assert (recipes / f"{name}.yaml").read_bytes() == (ROOT / place / f"{name}.yaml").read_bytes()
    shutil.rmtree(tmp_path / "weights")
    # Nothing is written of several where one cannot be: these weights are those of other options.
    for options, message in (
        (("osuleaf", "--option", "mean"), "no final run of osuleaf"),
        (("gunpoint", "--option", "mean"), "smpconv_tcn.gunpoint.safetensors"),
        (("smnist5k",), "'smnist5k' is none of"),
        (("gunpoint", "coffee"), "no final run of coffee"),
    ):
        code, out, err = ship(*options)
        assert code == 1 and out == "" and message in err and not (tmp_path / "weights").exists()
    wrong = [{**run, "test": {**run["test"], "correct": 149}} for run in runs("gunpoint")]
    with pytest.raises(ValueError, match="classifies 150 of 150 test samples, the log says 149 of 150: not shipped"):
        load_script("ship").ship(wrong, "", weights_dir(), "log")


def test_the_table_of_the_readme_is_that_of_the_log() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    titles = {f"{known.files} (": name for name, known in UCR_SETS.items()} | {"MNIST-1D (": "mnist1d"}
    titles |= {f"- {dropped} % dropped ": f"japanese-vowels-{dropped}" for dropped in (30, 50, 70)}
    published = load_script("study").PUBLISHED
    for title, data in titles.items():
        line = re.search(rf"^\| {re.escape(title)}.*\n", text, flags=re.M)
        assert line is not None
        name, *cells = [cell.strip() for cell in line[0].strip().strip("|").split("|")]
        total = int(name.partition("(")[2].split()[0].rstrip(")").replace(",", "")) if "(" in name else 370
        for kernel, cell in zip(("points", "fixed", "short", "mlp"), cells, strict=False):
            there = kernel in load_script("study").DATA[data].kernels
            tops = [run["test"]["top1"] for run in runs(data, kernel)] if there else []
            assert cell == (f"{statistics.fmean(tops):.2f} ± {statistics.stdev(tops):.2f}" if tops else "")
            assert all(run["test"]["total"] == total for run in runs(data, kernel) if tops)
        known = published.get(data, {})
        assert cells[4:] == [known.get("ROCKET", ""), known.get("InceptionTime", "")]


def test_the_report_shows_the_options_that_the_study_chose() -> None:
    study = read_study(LOG)
    assert study is not None
    for data, kernel in {(run["data"], run["kernel"]) for run in RECORDS if run["stage"] == "final"}:
        name, _, dropped = data.rpartition("-") if data.endswith(("-30", "-50", "-70")) else (data, "", "0")
        if data == "mnist5k-images":
            continue
        shown = study.chosen(name, float(dropped), kernel)
        assert sorted(run.seed for run in shown) == [run["seed"] for run in runs(data, kernel)]
        assert {run.option for run in shown} <= {chosen(data, kernel)}


def test_the_log_names_no_places() -> None:
    assert len(RECORDS) >= 559
    assert not re.search(r"/(tmp|home|root|work|mnt|data)/", LOG.read_text(encoding="utf-8"))


def test_a_wildcard_leaves_out_what_has_no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from smpconv_zoo import cli

    def opened(card: CheckpointCard, *_: Any) -> EvaluationData:
        if card.id.endswith("gunpoint"):
            raise FileNotFoundError("the series come with aeon")
        x = torch.zeros(4, card.arguments["in_chans"], card.arguments["kernel_size"])
        return EvaluationData(TensorDataset(x, torch.zeros(4, dtype=torch.int64)))

    monkeypatch.setattr(cli, "open_test_set", opened)
    runner = CliRunner()
    done = runner.invoke(cli.app, ["eval", "smpconv_tcn.[bg]*", "--json"])
    assert "smpconv_tcn.gunpoint is left out: the series come with aeon" in done.stderr
    assert [result["id"] for result in json.loads(done.stdout)] == ["smpconv_tcn.basic_motions"]
    # What is named has to be there.
    for names in (["smpconv_tcn.gunpoint", "smpconv_tcn.basic_motions"], ["smpconv_tcn.g*"]):
        done = runner.invoke(cli.app, ["eval", *names])
        assert isinstance(done.exception, FileNotFoundError) and "checkpoint  " not in done.stdout


def test_kernels_stay_shorter_than_their_series(tmp_path: Path) -> None:
    short, plain = find_start("smpconv_tcn.gunpoint"), find_start("smpconv_tcn.italy_power_demand")
    assert (_length(short, 150), _length(short, 300)) == ({}, {"kernel_size": 64})
    assert (_length(plain, 24), _length(plain, 48)) == ({}, {"length": 48})
    # As a repository holds them: timm's configuration, and the weights.
    card = checkpoint_card("smpconv_tcn.gunpoint")
    (tmp_path / "config.json").write_bytes(_config(card))
    shutil.copy(weights_dir() / card.files[0].name, tmp_path / "model.safetensors")
    x = torch.randn(2, 1, 150)
    own: Any = timm.create_model("smpconv_tcn.gunpoint", pretrained=True).eval()
    again: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert again.pretrained_cfg["input_size"][-1] == own.pretrained_cfg["input_size"][-1] == 150
    torch.testing.assert_close(again(x), own(x))
