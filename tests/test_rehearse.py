"""``eval/rehearse.py``: time and cost from what was measured, commands that exist, every stage on stand-ins."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from eval_scripts import call_script
from golden_files import ROOT
from torchvision.datasets import CIFAR10

from smpconv_zoo import rehearsing
from smpconv_zoo.cli import app
from smpconv_zoo.pretrained.cards import checkpoint_card
from smpconv_zoo.rehearsing import RehearsalError, Stage, plan_runs, rehearse, rehearsed_rows
from smpconv_zoo.training.recipe import ImageRecipe, load_recipe, parse_overrides

Script = Callable[..., tuple[int, str, str]]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    return lambda *arguments: call_script("rehearse", *arguments, monkeypatch=monkeypatch, capsys=capsys)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Measurements of round figures: a step takes 9 ms, a validation pass 18; 1,000 pictures/s."""
    folder = tmp_path / "results"
    folder.mkdir()
    networks = {"smpconv_tcn_mnist": 64, "smpconv_tcn_chartraj": 64}
    entries = [
        {"network": name, "shape": [batch, 1, 9], "train_graph_ms": 9.0, "inference_ms": 18.0}
        for name, batch in networks.items()
    ]
    (folder / "sequence_h100.json").write_text(json.dumps({"results": entries}))
    rates = ["369", "1,000", "990", "1,010"]
    log = "".join(f"epoch {i + 1}  loss 1.0  lr 2.0e-04  {rate} samples/s\n" for i, rate in enumerate(rates))
    (folder / "train_smpconv_t_h100.txt").write_text(f"$ a command\n{log}")
    return folder


def test_time_and_cost(results: Path) -> None:
    (smnist, pmnist) = plan_runs(results, price=2.5, only="smpconv_tcn_mnist.*")
    # 200 epochs of 938 steps, the last of each a smaller one, and 157 passes.
    assert smnist.steps == 187_600
    assert smnist.hours == pytest.approx((187_600 * 9 + 200 * 157 * 18) / 3.6e6)
    assert smnist.cost == pytest.approx(2.5 * smnist.hours)
    assert (smnist.hours_eight, smnist.cost_eight) == (smnist.hours, pytest.approx(8 * 2.5 * smnist.hours))
    assert pmnist.steps == smnist.steps and pmnist.train != smnist.train
    (t, b) = plan_runs(results, price=2, scaling=0.5, only="*.in1k")
    assert t.steps == 300 * 625
    assert t.hours == pytest.approx(300 * (1_281_167 + 50_000) / 1000 / 3600)
    assert t.hours_eight == pytest.approx(t.hours / 4) and t.cost_eight == pytest.approx(8 * 2 * t.hours / 4)
    assert any("50% of eight times the speed" in sentence for sentence in t.assumptions)
    # B was not measured: by multiply-accumulates, and it says so; by the networks alone where they were.
    macs = [checkpoint_card(name).macs for name in ("smpconv_t.in1k", "smpconv_b.in1k")]
    assert b.hours == pytest.approx(t.hours * macs[1] / macs[0])
    assert "no step of it was measured" in b.speed
    both = [
        {
            "network": name,
            "work": "training",
            "layout": "channels last",
            "dtype": "bfloat16",
            "images_per_second": rate,
        }
        for name, rate in (("smpconv_t", 1500.0), ("smpconv_b", 600.0))
    ]
    (results / "model_h100.json").write_text(json.dumps({"results": both}))
    (b,) = plan_runs(results, only="smpconv_b.in1k")
    assert b.hours == pytest.approx(t.hours * 2.5) and b.cost is None
    assert "600 pictures/s to 1,500" in b.speed


def test_of_what_was_not_measured_nothing_is_planned(results: Path) -> None:
    with pytest.raises(ValueError, match="has no step of smpconv_tcn_cifar at 64"):
        plan_runs(results)
    with pytest.raises(ValueError, match=r"scaling is a share of the full speed, in \(0, 1\], got 0"):
        plan_runs(results, scaling=0)
    entries = json.loads((results / "sequence_h100.json").read_text())
    entries["results"][0]["shape"][0] = 32
    (results / "sequence_h100.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="has no step of smpconv_tcn_mnist at 64"):
        plan_runs(results, only="smpconv_tcn_mnist.smnist")
    (results / "train_smpconv_t_h100.txt").write_text("nothing")
    with pytest.raises(ValueError, match="has no epochs with their samples/s"):
        plan_runs(results, only="smpconv_t.in1k")
    (results / "train_smpconv_t_h100.txt").unlink()
    with pytest.raises(FileNotFoundError):
        plan_runs(results, only="smpconv_t.in1k")


def test_every_command_is_one() -> None:
    """Options and overrides of all planned commands are taken; those of pictures share a batch evenly."""
    commands = typer.main.get_command(app)
    planned = plan_runs(ROOT / "eval" / "results")
    assert len(planned) == len(rehearsed_rows()) == 18
    folders = set()
    for entry in planned:
        eight = entry.train_eight.replace("torchrun --nproc-per-node 8 -m smpconv_zoo", "smpconv-zoo")
        found = re.findall(r"smpconv-zoo [^&;]*?(?= &|;|, then|$)", f"{entry.check}; {entry.train}; {eight}")
        assert len(found) == (4 if entry.checkpoint.endswith("in1k") else 3)
        for command in found:
            name, *arguments = shlex.split(command.replace("$k", "7"))[1:]
            context = commands.commands[name].make_context(name, list(arguments))  # type: ignore[attr-defined]
            if name == "data":
                continue
            recipe = load_recipe(entry.checkpoint, **parse_overrides(context.params["overrides"] or []))
            assert context.params["checkpoint_id"] == entry.checkpoint
            assert getattr(recipe, "dropped", 0) == entry.dropped
            assert recipe.seed == (7 if "seed=$k" in command else load_recipe(entry.checkpoint).seed)
            processes = 8 if "torchrun" in entry.train_eight and command == eight else 1
            if isinstance(recipe, ImageRecipe):
                assert recipe.batch_size % (processes * recipe.micro_batches) == 0 and recipe.dtype == "bfloat16"
        folder = re.search(r"runs/\w+", entry.train)
        assert folder is not None and folder[0] in entry.evaluate
        folders.add(folder[0])
        script = ROOT / entry.evaluate.split()[1]
        assert script.is_file() and script.name == ("imagenet.py" if "in1k" in entry.checkpoint else "sequence.py")
    assert len(folders) == 18


TINY: dict[str, dict[str, Any]] = {
    "smpconv_t.in1k": {"network": "test_smpconv", "arguments": {"num_classes": 1000}, "batch_size": 260},
    "smpconv_tcn_mnist.pmnist": {"network": "test_smpconv_tcn", "arguments": {"num_classes": 10}},
    "smpconv_resnet_cifar.cifar10": {
        "network": "smpconv_resnet_cifar",
        "arguments": {"dims": [4, 4]},
    },
    "smpconv_tcn_chartraj.ct": {
        "network": "test_smpconv_tcn",
        "arguments": {"in_chans": 4, "num_classes": 20, "kernel_size": 182},
    },
    "smpconv_tcn_speech_mfcc.sc10": {
        "network": "test_smpconv_tcn",
        "arguments": {"in_chans": 21, "num_classes": 10, "kernel_size": 161},
    },
}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks in the place of the authors', for time's sake."""
    real = rehearsing.load_recipe

    def load(checkpoint_id: str, **overrides: Any) -> Any:
        return real(checkpoint_id, **{**overrides, **(TINY[checkpoint_id] if overrides else {})})

    monkeypatch.setattr(rehearsing, "load_recipe", load)


@pytest.mark.parametrize("name, dropped", [(name, 50 if "speech" in name or "ct" in name else 0) for name in TINY])
def test_all_stages_of_a_run(name: str, dropped: int, tiny: None, tmp_path: Path) -> None:
    sums = CIFAR10.train_list, CIFAR10.meta
    (row,) = [row for row in rehearsed_rows(name) if row.dropped == dropped]
    stages: list[Stage] = []
    (done,) = rehearse([row], tmp_path / "rehearsal", on_stage=stages.append)
    assert [stage.name for stage in stages] == ["data", "check", "train", "resume", "save", "eval and table"]
    outcomes = {stage.name: stage.outcome for stage in stages}
    assert "stopped by SIGTERM after step 2" in outcomes["train"] and "goes on after step 2" in outcomes["resume"]
    assert done.checkpoint == name and done.dropped == dropped and done.measured is not None
    assert done.missing == () and done.error is None
    assert (CIFAR10.train_list, CIFAR10.meta) == sums
    with pytest.raises(FileExistsError, match="holds files, left as they were"):
        rehearse([row], tmp_path / "rehearsal")


def test_a_stage_that_fails(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Script) -> None:
    row = rehearsed_rows("smpconv_tcn_mnist.pmnist")[0]
    real = rehearsing.reproduce

    def other(*arguments: Any) -> Any:
        tables = real(*arguments)
        line = rehearsing.dataclasses.replace(tables[0].rows[0], measured=12.3)
        return [rehearsing.dataclasses.replace(tables[0], rows=(line,))]

    monkeypatch.setattr(rehearsing, "reproduce", other)
    with pytest.raises(RehearsalError, match=r"eval: 12\.3 % measured, the run gave"):
        rehearse([row], tmp_path / "a")
    # A run that does not hear of the signal; and the log of what did not go well is not written.
    monkeypatch.setattr(rehearsing.os, "kill", lambda *_: None)
    with pytest.raises(RehearsalError, match="a run that was told to stop by SIGTERM went on to its end"):
        rehearse([row], tmp_path / "b")
    common = ("--only", row.checkpoint, "--run", tmp_path / "c", "--log", tmp_path / "log.txt")
    code, out, err = script(*common)
    assert code == 1 and "told to stop" in err and "ok  pMNIST" in out
    assert not (tmp_path / "log.txt").exists()


def test_the_script(script: Script, tmp_path: Path, tiny: None) -> None:
    code, out, err = script("--price", 3, "--only", "smpconv_tcn_speech*")
    assert (code, err) == (0, "")
    assert "SpeechCommands raw, 70 % dropped" in out and "8 H100, h (assumed)" in out
    assert '--set dropped=70 --set "arguments={block_drop_rate: 0.1, in_chans: 2}"' in out
    entries = json.loads(script("--json")[1])
    assert len(entries) == 18 and entries[0]["cost"] is None
    assert script("--markdown")[1].startswith("| run | dropped | steps |")
    assert "no run is called 'nothing'" in script("--only", "nothing")[2]
    code, out, err = script("--only", "*.pmnist", "--run", tmp_path / "run", "--log", tmp_path / "log.txt")
    assert (code, err) == (0, "")
    log = (tmp_path / "log.txt").read_text()
    assert "all stages of 1 runs went well" in log and "batch_size=16" in log and log.strip() == out.strip()
    code, out, _ = script("--help")
    assert code == 0 and "Example: python eval/rehearse.py --price 3" in " ".join(out.split())
