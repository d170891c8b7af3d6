"""Many processes measured: synthetic pictures, timed engines, and eval/scaling.py from end to end on a tiny network."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import typer.main
from eval_scripts import call_script, load_script
from golden_files import ROOT

from smpconv_zoo.benchmarks.scaling import Speed, SpeedCase, measure_speed, shares_of_communication
from smpconv_zoo.data.stand_in import write_stand_in
from smpconv_zoo.training.recipe import ImageRecipe, make_recipe
from smpconv_zoo.training.running import train
from smpconv_zoo.training.synthetic import SyntheticData
from smpconv_zoo.training.world import World

CPU = torch.device("cpu")
TINY = {"kernel_sizes": [5, 5, 5, 5], "depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8], "num_classes": 2}
CASE = SpeedCase("smpconv_t", "synthetic", False, 4, "float32", False, steps=3, warmup=2, image_size=32, arguments=TINY)


def recipe(**changes: Any) -> ImageRecipe:
    values = {"network": "test_smpconv", "data": "synthetic", "epochs": 2, "batch_size": 8, "lr": 1e-3}
    made = make_recipe("test_smpconv.made_up", {**values, "image_size": 32, "num_samples": 24, **changes})
    assert isinstance(made, ImageRecipe)
    return made


def data(rank: int = 0, size: int = 1, **changes: Any) -> SyntheticData:
    return SyntheticData(recipe(**changes), timm.create_model("test_smpconv"), World(CPU, rank, size))


def test_the_synthetic_pictures_of_a_step_are_the_same_however_they_are_shared():
    whole = list(data().epoch(0))
    assert [x.shape for x, _ in whole] == [(8, 3, 32, 32)] * 3
    for size, parts in ((2, 1), (4, 1), (2, 2), (1, 4)):
        shares = [data(rank, size, micro_batches=parts) for rank in range(size)]
        batches = [list(share.epoch(1)) for share in shares]
        for step, (x, y) in enumerate(whole):
            mine = [batches[rank][step * parts + part] for rank in range(size) for part in range(parts)]
            assert torch.equal(torch.cat([a for a, _ in mine]), x)
            assert torch.equal(torch.cat([b for _, b in mine]), y)
    # No picture twice, another seed others, and an epoch that is entered late goes on.
    assert len({picture.sum().item() for x, _ in whole for picture in x}) == 24
    assert not torch.equal(next(iter(data(seed=1).epoch(0)))[0], whole[0][0])
    assert torch.equal(next(iter(data().epoch(0, 2)))[0], whole[2][0])


def test_only_eight_steps_of_synthetic_pictures_are_held_and_come_again():
    long = data(num_samples=8 * 11)
    batches = [x for x, _ in long.epoch(0)]
    assert len(batches) == 11
    assert len({x.data_ptr() for x in batches}) == 8
    assert long.describe()["different"] == 64
    assert data(channels_last=True)._held[0][0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("size", "changes", "sentence"),
    [
        (3, {}, "a batch of 8 cannot be shared evenly by 3 processes"),
        (1, {"num_samples": 7}, "7 training pictures fill no step of 8"),
        (1, {"val_split": "val"}, "val_split: of a stream alone"),
    ],
)
def test_synthetic_pictures_that_do_not_fit_are_refused(size, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        data(0, size, **changes)


def test_a_network_learns_synthetic_pictures_and_nothing_is_chosen(tmp_path):
    done = train(recipe(epochs=12, lr=3e-3, arguments={"num_classes": 2}), tmp_path / "run")
    epochs = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert epochs[-1]["train_loss"] < 0.8 * epochs[0]["train_loss"]
    assert done is not None and done.outcome.best is None


def test_the_steps_that_are_named_are_timed_and_memory_is_let_go(monkeypatch):
    told: list[Speed] = []
    clock = iter(range(100))
    # A second goes by between any two looks at the clock; the engine looks after every step as well.
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    speed = measure_speed(CASE, World(CPU), on_speed=told.append)
    assert told == [speed]
    assert speed.step_ms == pytest.approx(1e3 * 4 / CASE.steps)
    assert speed.processes == 1 and speed.exchange_share is None and speed.peak_gib is None
    assert speed.images_per_second == pytest.approx(1e3 * 4 / speed.step_ms)


def test_too_few_pictures_for_the_steps_are_said_before_the_first(tmp_path):
    write_stand_in(tmp_path / "pictures", 2, 8, (40, 30), validation_per_class=2)
    case = dataclasses.replace(CASE, pictures="files", steps=9)
    with pytest.raises(ValueError, match="11 steps of 4 pictures are to be taken, an epoch has 4"):
        measure_speed(case, World(CPU), tmp_path / "pictures", workers=0)


def test_what_is_timed_is_the_authors_recipe():
    made = dataclasses.replace(CASE, network="smpconv_b", sync_batch_norm=True, arguments={}).recipe(8)
    assert (made.batch_size, made.micro_batches, made.sync_batch_norm) == (32, 1, True)
    assert made.network == "smpconv_b" and made.protocol == "reference" and made.ema_decay == 0.9999


def test_shares_of_communication():
    kernels = [
        ("gemm", 0.0, 4.0),
        ("ncclDevKernel_AllReduce_Sum_f32", 3.0, 6.0),  # one hidden, two alone
        ("ncclDevKernel_AllReduce_Sum_f32", 5.0, 6.0),  # beside the first
        ("elementwise", 5.5, 6.0),
        ("gemm", 7.0, 8.0),
    ]
    nccl, alone = shares_of_communication(kernels, 10.0)
    assert nccl == pytest.approx(0.3)
    assert alone == pytest.approx(0.15)
    assert shares_of_communication([("gemm", 0.0, 1.0)], 2.0) == (0.0, 0.0)


def study(tmp_path: Path, counts: str = "1,2,4,8", parts: str = "equal,kill,eval,speed", **options: Any) -> Any:
    script = load_script("scaling")
    chosen = script._chosen("cpu", counts, parts, None)
    settings = {"budget": 100.0, "batch": 4, "steps": 3, "equal_steps": 50, **options}
    return script.Study(chosen, tmp_path, script.Log(tmp_path / "log.json", chosen), **settings)


def test_the_most_processes_come_first_and_then_what_the_budget_allows(tmp_path):
    made = study(tmp_path)
    first = [("equal", 8), ("kill", 8), ("eval", 1), ("eval", 8), ("speed", 1), ("speed", 8)]
    assert made.jobs() == [*first, *((part, n) for part in ("speed", "equal", "eval") for n in (4, 2))]
    assert study(tmp_path, "1").jobs() == [("kill", 1), ("eval", 1), ("speed", 1)]
    over = study(tmp_path, budget=-1.0)
    over.run()
    assert over.log.figures == [{"part": "left out", "jobs": [f"{part} with {n}" for part, n in over.jobs()]}]
    assert "left out, the budget was spent: equal with 8" in (tmp_path / "log.txt").read_text()


def test_a_timed_run_that_fails_again_and_again_is_left_out_and_the_next_begun(tmp_path):
    script = load_script("scaling")
    cases = [dataclasses.replace(CASE, batch_per_process=2 + 2 * number) for number in range(3)]
    plan = {"device": "cpu", "cases": [dataclasses.asdict(case) for case in cases], "files": None, "workers": 0}
    place = tmp_path / "plan.json"
    place.write_text(json.dumps({**plan, "until": time.time() + 60, "answers": str(tmp_path)}))
    (tmp_path / "0.begun").write_text("+" * script.TRIES["cpu"])
    (tmp_path / "1.json").write_text("measured before")
    script._measure_speeds(place)
    assert sorted(path.name for path in tmp_path.glob("?.json")) == ["1.json", "2.json"]
    assert (tmp_path / "1.json").read_text() == "measured before"
    assert json.loads((tmp_path / "2.json").read_text())["processes"] == 1
    # Nor is anything begun when the time is over.
    (tmp_path / "2.json").unlink()
    place.write_text(json.dumps({**plan, "until": time.time() - 1, "answers": str(tmp_path)}))
    script._measure_speeds(place)
    assert not (tmp_path / "2.json").exists()


def test_curves_that_are_not_equal_are_said_to_be_so(tmp_path):
    made = study(tmp_path)
    curve = [2.3 - 0.005 * i for i in range(50)]
    assert made._compared(curve, curve, "other")["holds"]
    # A little at first, where rounding has not grown yet; or too much later.
    assert not made._compared([curve[0] * (1 + 1e-4), *curve[1:]], curve, "other")["holds"]
    assert not made._compared([*curve[:40], *(loss * 1.02 for loss in curve[40:])], curve, "other")["holds"]
    assert made._compared([*curve[:40], *(loss * 1.005 for loss in curve[40:])], curve, "other")["holds"]


def test_losses_of_steps_come_out_of_the_means_that_are_logged(tmp_path):
    made = study(tmp_path)
    losses = [3.0 - 0.02 * i + 0.1 * (i % 3) for i in range(50)]
    lines = []
    for i in range(50):
        first, kind = i - i % 10, "epoch" if i % 10 == 9 else "step"
        mean = sum(losses[first : i + 1]) / (i + 1 - first)
        lines.append(json.dumps({"kind": kind, "update": i + 1, "train_loss": mean}))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert made._losses(tmp_path) == pytest.approx(losses)
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines[:20] + lines[21:]))
    with pytest.raises(RuntimeError, match="logged step 22 as its line 21"):
        made._losses(tmp_path)


def test_no_number_of_processes_divides_the_validation_part(tmp_path):
    assert study(tmp_path)._validation() == 55
    assert study(tmp_path, "2,3,5")._validation() == 77
    with pytest.raises(ValueError, match=r"\[11\] processes share any pictures of 11 classes evenly"):
        study(tmp_path, "1,11")._validation()


def test_its_table_has_the_efficiency_against_one_gpu(tmp_path):
    script = load_script("scaling")
    speed = {
        "network": "smpconv_t",
        "pictures": "synthetic",
        "sync_batch_norm": False,
        "batch_per_process": 128,
        "dtype": "bfloat16",
        "steps": 12,
        "exchange_share": None,
        "nccl_share": None,
        "peak_gib": 11.8,
    }
    several = {"processes": 8, "images_per_second": 7600.0, "exchange_share": 0.031, "nccl_share": 0.2}
    lines = script.Log._table(
        [{**speed, "processes": 1, "images_per_second": 1000.0}, {**speed, **several, "sync_batch_norm": True}]
    )
    assert "| smpconv_t | synthetic | yes | 8 | 7,600 | 95.0 % | 3.1 % | 20.0 % | 11.8 |" in lines[0]
    # On a CPU no speed is told.
    made = study(tmp_path)
    made.log.add({"part": "speed", **speed, **several})
    assert "say nothing of GPUs" in made.log.text() and "7,600" not in made.log.text()


def test_arguments_that_make_no_sense_are_refused(tmp_path, monkeypatch, capsys):
    def call(*arguments: str) -> tuple[int, str, str]:
        return call_script(
            "scaling", "--out", tmp_path / "log.json", *arguments, monkeypatch=monkeypatch, capsys=capsys
        )

    assert "equal, kill, eval, speed, control, got 'all'" in " ".join(
        call("--device", "cpu", "--parts", "all")[2].split()
    )
    assert call("--device", "cpu", "--counts", "two")[0] == 2
    if not torch.cuda.is_available():
        status, _, errors = call("--device", "cuda")
        assert status == 1 and "this host has 0 GPUs, --counts 1,2,4,8 asks for more" in errors
    assert not (tmp_path / "log.json").exists()


def test_the_page_about_it_is_true():
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    script = load_script("scaling")
    command: Any = typer.main.get_command(script.app)
    named = re.findall(r"^python eval/scaling\.py (.*)$", page, flags=re.M)
    assert len(named) == 3
    for arguments in named:
        command.make_context("scaling.py", shlex.split(arguments))
    assert [part for part in re.findall(r"^\| `(\w+)` \|", page, flags=re.M) if part in script.PARTS] == list(
        script.PARTS
    )
    tolerances = (script.TOLERANCE_AT_FIRST["float32"], script.TOLERANCE_AT_FIRST["bfloat16"])
    assert tolerances == (1e-5, 2e-3) and "at most 1e-5 of them in float32 (2e-3 in bfloat16)" in page
    assert tuple(script.TOLERANCE.values()) == (1e-2, 2e-2) and "over ten steps by 1e-2 (2e-2)" in page


def test_a_killed_process_is_made_good_and_figures_are_written_as_they_come(tmp_path):
    """The real commands, in one process: those of several, by gloo, would take minutes on a busy machine."""
    out = tmp_path / "log.json"
    command = [sys.executable, str(ROOT / "eval" / "scaling.py"), "--device", "cpu", "--counts", "1"]
    parts = ["--parts", "kill,speed", "--equal-steps", "50", "--batch", "2", "--steps", "2"]
    done = subprocess.run(
        [*command, *parts, "--budget", "400", "--out", str(out)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    log = json.loads(out.read_text())
    assert done.returncode == 0, (done.stdout, done.stderr[-2000:], log["figures"])
    kill, *speeds, end = log["figures"]
    assert end == {"part": "all done"} and log["device"] == "cpu"
    assert kill["killed_after"] + 1 >= kill["resumed_after"] >= 18 and kill["starts"] == 2
    assert kill["last"] == kill["last_unbroken"] and kill["deviation"] == 0
    assert [(speed["pictures"], speed["processes"]) for speed in speeds] == [("synthetic", 1), ("files", 1)]
    assert "say nothing of GPUs" in (tmp_path / "log.txt").read_text()


def test_a_run_that_is_told_to_stop_leaves_no_process_and_its_figures(tmp_path):
    command = [sys.executable, str(ROOT / "eval" / "scaling.py"), "--device", "cpu", "--counts", "1"]
    process = subprocess.Popen(
        [*command, "--parts", "kill", "--out", str(tmp_path / "log.json"), "--work", str(tmp_path / "work")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 60
    script = load_script("scaling")
    while not (torchruns := script._children(process.pid)) and time.monotonic() < until:
        time.sleep(0.1)
    while not (workers := script._children(torchruns[0])) and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    time.sleep(0.2)
    assert not [pid for pid in (*torchruns, *workers) if script._variable(pid, "PATH") is not None]
