"""The training loop on tiny networks and data in memory: order of its parts, crashes, signals, processes."""

from __future__ import annotations

import contextlib
import copy
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from golden_files import ROOT, golden
from reference_state import stored_json
from safetensors.torch import load_file
from small_disk import mounted
from test_golden_image import tiny_network
from tolerances import assert_equal_to_reference, load
from torch import Tensor

from smpconv_zoo.data.stand_in import write_stand_in
from smpconv_zoo.layers import parameter_roles
from smpconv_zoo.models.build import sample_shape
from smpconv_zoo.training import checkpointing
from smpconv_zoo.training.engine import Engine, learning_rates
from smpconv_zoo.training.recipe import make_recipe
from smpconv_zoo.training.run_folder import RunFolder
from smpconv_zoo.training.running import train
from smpconv_zoo.training.sync_norm import convert_sync_batch_norm
from smpconv_zoo.training.world import World, join_world

CPU = torch.device("cpu")
RECIPE: dict[str, Any] = {
    "network": "test_smpconv_tcn",
    "data": "series",
    "epochs": 3,
    "batch_size": 8,
    "lr": 3e-3,
    "warmup_epochs": 1,
    "weight_decay": 1e-2,
    "optimizer": "adam",
}


class Tensors:
    """Samples in memory, in an order of their own every epoch."""

    def __init__(self, x: Tensor, y: Tensor, size: int, world: World | None = None, seed: int = 0) -> None:
        self.x, self.y, self.size, self.seed = x, y, size, seed
        self.world = world or World(CPU)

    @property
    def batches(self) -> int:
        return len(self.x) // (self.size * self.world.size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.from_numpy(np.random.RandomState([self.seed, epoch]).permutation(len(self.x)))
        for batch in range(start, self.batches):
            first = (batch * self.world.size + self.world.rank) * self.size
            index = order[first : first + self.size]
            yield self.x[index], self.y[index]

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(self.world.rank, len(self.x), 7 * self.world.size):
            index = range(first, min(first + 7 * self.world.size, len(self.x)), self.world.size)
            yield self.x[list(index)], self.y[list(index)]

    def describe(self) -> dict[str, Any]:
        return {"samples": len(self.x)}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state == {}


def sequences(count: int = 44) -> tuple[Tensor, Tensor]:
    model = timm.create_model("test_smpconv_tcn")
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(0, model.num_classes, (count,), generator=generator)
    return torch.randn((count, *sample_shape(model)), generator=generator) + y.view(-1, 1, 1) / 3, y


def engine(folder: Path | None = None, world: World | None = None, **changes: Any) -> Engine:
    options = {name: changes.pop(name) for name in ("save_every", "log_every", "on_step") if name in changes}
    recipe = make_recipe("test_smpconv_tcn.tiny", {**RECIPE, **changes})
    torch.manual_seed(recipe.seed)
    arguments = {"block_drop_rate": 0.1, **recipe.arguments}
    model = timm.create_model(recipe.network, **arguments)
    world = world or World(CPU)
    data = Tensors(*sequences(), recipe.batch_size // recipe.micro_batches // world.size, world)
    run = None if folder is None else RunFolder(folder)
    if run is not None and world.leads:
        run.check(recipe, resume=True)
        run.start(recipe, "cpu", 1, {})
    return Engine(recipe, model, data, world, run, **options)


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_the_reference_protocol_follows_the_references_trajectory():
    values, settings = load(golden("tiny_trajectory.safetensors")), stored_json("tiny_trajectory.json")
    steps, parts = settings["steps_per_epoch"], settings["update_freq"]
    recipe = make_recipe(
        "tiny.golden",
        {
            "network": "test_smpconv",
            "data": "imagenet",
            "protocol": "reference",
            "epochs": settings["epochs"],
            "batch_size": parts * len(values["micro_targets"][0]),
            "micro_batches": parts,
            "lr": max(settings["schedule"]),
            "final_lr": 1e-6,
            "warmup_epochs": 1,
            "weight_decay": 0.05,
            "ema_decay": settings["ema_decay"],
            "smoothing": 0.0,
        },
    )
    losses = []

    class Stored(Tensors):
        @property
        def batches(self) -> int:
            return len(settings["batch_order"])

        def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
            for batch in settings["batch_order"][start:]:
                yield values["micro_inputs"][batch], values["micro_targets"][batch]

        def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
            return iter(())

    data = Stored(values["micro_inputs"], values["micro_targets"], 1)
    trainer = Engine(recipe, tiny_network(), data, World(CPU))
    assert trainer.updates_per_epoch == steps
    take = trainer.step.take
    trainer.step.take = lambda *given: losses.append(take(*given).item()) or trainer.step.loss  # type: ignore[method-assign]
    trainer.fit()
    expected = np.reshape(settings["microbatch_loss"], (-1, parts)).mean(1)
    assert len(losses) == len(expected) == 6
    for i, (ours, reference) in enumerate(zip(losses, expected, strict=True)):
        assert_equal_to_reference(torch.tensor(ours), torch.tensor(reference), "trajectory", f"mean loss of step {i}")
    np.testing.assert_allclose(learning_rates(recipe, steps), settings["schedule"], rtol=1e-12)


@pytest.mark.parametrize("reference", [False, True])
def test_the_average_sees_the_weights_before_the_clip_only_in_the_authors_order(reference):
    trainer = engine(epochs=2, ema_decay=0.5, protocol="reference" if reference else "sound", lr=0.5)
    roles = parameter_roles(trainer.model)
    radii = {name: p for name, p in trainer.model.named_parameters() if roles.get(name) == "radius"}
    low = min(trainer.model.get_submodule(name.rpartition(".")[0]).radius_bounds[0] for name in radii)
    seen = []
    average = trainer.step.average
    trainer.step.average = lambda: (seen.append(min(p.min().item() for p in radii.values())), average())[0]
    trainer.fit()
    assert (min(seen) < 0.999 * low) == reference
    assert min(p.min().item() for p in radii.values()) >= 0.999 * low


def test_a_step_in_parts_is_the_step_on_the_whole():
    changes = {"arguments": {"block_drop_rate": 0.0}, "optimizer": "sgd", "epochs": 1, "warmup_epochs": 0, "lr": 0.1}
    whole, parts = engine(**changes), engine(**changes, micro_batches=4)
    for trainer in (whole, parts):
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.BatchNorm1d):
                # Statistics of a part are not those of the whole.
                module.train = lambda mode=True, module=module: module  # type: ignore[method-assign]
                module.training = False
        trainer.fit()
    for (name, a), b in zip(whole.model.state_dict().items(), parts.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [{}, {"ema_decay": 0.99}, {"clip_grad": 1.0, "micro_batches": 2}, {"dtype": "float16", "clip_grad": 1.0}],
    ids=str,
)
def test_a_run_that_was_cut_anywhere_goes_on_bit_for_bit(tmp_path, changes):
    unbroken = engine(tmp_path / "unbroken", **changes)
    unbroken.fit()
    for cut in (1, 5, 8):
        folder = tmp_path / f"cut{cut}"

        def die(done: int, _: int, cut: int = cut) -> None:
            if done == cut:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            engine(folder, save_every=2, on_step=die, **changes).fit()
        torch.manual_seed(99)
        again = engine(folder, save_every=2, **changes)
        again.resume()
        assert again.update <= cut
        again.fit()
        assert_same_weights(again.model, unbroken.model)
        assert_same_weights(again.measured, unbroken.measured)
        rows = [
            [line.split(",")[:7] for line in (path / "metrics.csv").read_text().splitlines()]
            for path in (tmp_path / "unbroken", folder)
        ]
        assert rows[0] == rows[1]
        assert len(rows[0]) == 1 + RECIPE["epochs"]
        ours, theirs = (load_file(path / "best.safetensors") for path in (folder, tmp_path / "unbroken"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_run_in_half_precision_learns_as_in_single(dtype):
    """Losses within 1 %: those of bfloat16 carry 8 bits, and the order of the samples is the same."""
    changes: dict[str, Any] = {"arguments": {"block_drop_rate": 0.0}}
    single, half = engine(**changes), engine(**changes, dtype=dtype)
    scales = []
    half.on_step = lambda done, total: scales.append(half.step.scaler.get_scale())
    expected, found = single.fit().last, half.fit().last
    assert found.train_loss == pytest.approx(expected.train_loss, rel=1e-2)
    assert found.validation_loss == pytest.approx(expected.validation_loss, rel=1e-2)
    assert found.train_loss != expected.train_loss
    assert all(p.dtype == torch.float32 for p in half.model.parameters())
    # Losses are scaled in float16 alone.
    assert (scales[0] > 1) == (dtype == "float16")


def test_a_step_that_overflows_in_float16_is_left_out_and_the_scale_lowered():
    trainer = engine(dtype="float16", epochs=1, warmup_epochs=0)
    trainer.step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = copy.deepcopy(trainer.model)
    weights = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.step(*next(iter(trainer.data.epoch(0))))
    assert all(torch.equal(a, b) for a, b in zip(weights, trainer.model.parameters(), strict=True))
    assert trainer.step.scaler.get_scale() == 2.0**39
    for _ in range(40):
        trainer.step(*next(iter(trainer.data.epoch(0))))
    pairs = zip(before.parameters(), trainer.model.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, and there is none here")
def test_a_compiled_run_learns_the_same_and_its_checkpoints_do_not_show_it(tmp_path):
    changes: dict[str, Any] = {"arguments": {"block_drop_rate": 0.0}, "epochs": 2}
    plain = engine(tmp_path / "plain", **changes)
    compiled = engine(tmp_path / "compiled", compile=True, **changes)
    expected, found = plain.fit().last, compiled.fit().last
    # Fused kernels round otherwise.
    assert found.train_loss == pytest.approx(expected.train_loss, rel=1e-4)
    assert found.validation_loss == pytest.approx(expected.validation_loss, rel=1e-3)
    again = engine(tmp_path / "compiled", **changes)
    again.resume()
    assert_same_weights(again.model, compiled.model)


def test_a_run_in_parts_logs_every_step_once(tmp_path):
    def die(done: int, _: int) -> None:
        if done == 9:  # steps 7 and 8 are logged, and the last checkpoint is from before them
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine(tmp_path, save_every=3, log_every=1, on_step=die).fit()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "upd')  # as a process leaves it that is killed while it writes
    again = engine(tmp_path, log_every=1)
    again.resume()
    again.fit()
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    updates = [(entry["kind"], entry["update"]) for entry in entries]
    assert updates == sorted(set(updates), key=lambda entry: (entry[1], entry[0] == "epoch"))
    assert [u for kind, u in updates if kind == "epoch"] == [5, 10, 15]
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert len(environment) == 2
    assert environment[0]["versions"]["torch"] == torch.__version__


def test_a_broken_checkpoint_is_passed_over_and_named(tmp_path):
    engine(tmp_path).fit()
    newest, older = sorted((tmp_path / "checkpoints").glob("*.pt"), reverse=True)
    raw = bytearray(newest.read_bytes())
    raw[len(raw) // 2] ^= 1
    newest.write_bytes(raw)
    again = engine(tmp_path)
    (named,) = again.resume()
    assert newest.name in named
    assert "it has sha256" in named
    assert again.update == 10
    older.write_bytes(older.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"no checkpoint .* can be read: update-00000015.*update-00000010"):
        engine(tmp_path).resume()


def test_a_checkpoint_without_its_seal_does_not_count(tmp_path):
    engine(tmp_path).fit()
    (tmp_path / "checkpoints" / "update-00000015.json").unlink()
    again = engine(tmp_path)
    assert again.resume() == ()
    assert again.update == 10


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    def spoil(done: int, _: int) -> None:
        if done == 6:
            with torch.no_grad():
                next(iter(trainer.model.parameters())).fill_(float("nan"))

    trainer = engine(tmp_path, on_step=spoil, save_every=1)
    with pytest.raises(
        FloatingPointError, match=r"not finite any more .*update-00000005\.pt is from before that: lower"
    ):
        trainer.fit()
    state = checkpointing.load_newest(tmp_path / "checkpoints").state
    assert state["update"] == 5
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def test_another_recipe_does_not_go_on_with_a_run(tmp_path):
    engine(tmp_path, epochs=1, warmup_epochs=0).fit()
    with pytest.raises(ValueError, match=r"a run of another recipe: lr was 0\.003, now 0\.1"):
        engine(tmp_path, epochs=1, warmup_epochs=0, lr=0.1)
    recipe = make_recipe("test_smpconv_tcn.tiny", {**RECIPE, "epochs": 1, "warmup_epochs": 0})
    with pytest.raises(FileExistsError, match="go on with it by --resume, or choose another folder"):
        RunFolder(tmp_path).check(recipe, resume=False)
    other = tmp_path / "notes"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds other files, left as they were"):
        RunFolder(other).check(recipe, resume=True)


def test_stopping_early_waits_as_long_as_the_recipe_says(tmp_path):
    trainer = engine(tmp_path, epochs=6, early_stop=2)
    accuracies = iter([50.0, 60.0, 60.0, 60.0, 60.0, 60.0])
    trainer._measure = lambda: {"loss": 1.0, "top1": next(accuracies), "top5": 99.0}  # type: ignore[method-assign]
    outcome = trainer.fit()
    assert outcome.stopped_early
    assert (outcome.last.epoch, outcome.best.epoch) == (4, 2)
    for name, tensor in load_file(tmp_path / "last.safetensors").items():
        assert torch.equal(tensor, trainer.model.state_dict()[name]), name


def test_data_that_fill_no_step_are_refused():
    recipe = make_recipe("test_smpconv_tcn.tiny", RECIPE)
    x, y = sequences(4)
    with pytest.raises(ValueError, match="fill no step of 8 samples"):
        Engine(recipe, timm.create_model("test_smpconv_tcn"), Tensors(x, y, 8), World(CPU))


def test_metrics_go_to_tensorboard_where_it_is_installed(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    engine(tmp_path, epochs=2).fit()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("epoch/train_loss")] == [5, 10]


TRACKED = """
    import sys
    from pathlib import Path
    from test_engine import RECIPE, engine
    from smpconv_zoo.training.run_folder import RunFolder

    def die(done, _):
        if done == 7 and sys.argv[3] == "first":
            raise KeyboardInterrupt

    trainer = engine(Path(sys.argv[1]), log_every=1, on_step=die)
    trainer.folder = RunFolder(Path(sys.argv[1]), sys.argv[2])
    trainer.resume()
    trainer.fit()
"""


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_metrics_go_to_a_tracker_and_a_run_that_goes_on_stays_one(tmp_path, name):
    pytest.importorskip(name, reason=f"{name} is not installed")
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(tmp_path / "trackio")}
    first = run_python(TRACKED, tmp_path / "run", name, "first", **offline)
    assert "KeyboardInterrupt" in first.communicate(timeout=120)[1]
    again = run_python(TRACKED, tmp_path / "run", name, "again", **offline)
    assert again.communicate(timeout=120)[1] is not None and again.returncode == 0
    if name == "wandb":
        names = {path.name.rpartition("-")[2] for path in (tmp_path / "run" / "wandb").glob("offline-run-*")}
        assert len(names) == 1 and not (Path.cwd() / "wandb").exists()
        return
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "smpconv_zoo.db")) as stored:
        rows = [(*row[:2], json.loads(row[2])) for row in stored.execute("select run_name, step, metrics from metrics")]
    assert {row[0] for row in rows} == {"run"}
    assert {step for _, step, metrics in rows if "step/train_loss" in metrics} >= {1, 6, 8, 14}
    assert {step for _, step, metrics in rows if "epoch/top1" in metrics} == {5, 10, 15}


def run_python(code: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


RUN = """
    import sys, time
    from pathlib import Path
    from test_engine import engine
    from smpconv_zoo.training.engine import Stopped

    trainer = engine(Path(sys.argv[1]), save_every=1, on_step=lambda *_: print("step", flush=True) or time.sleep(0.02))
    trainer.resume()
    try:
        trainer.fit()
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.signal_number)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_is_killed_at_any_moment_loses_nothing(tmp_path, number):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    unbroken = run_python(RUN, whole)
    random = np.random.RandomState(int(number))
    for _ in range(3):
        process = run_python(RUN, cut)
        assert process.stdout is not None
        for _ in range(random.randint(1, 5)):
            process.stdout.readline()
        time.sleep(0.05 * random.random_sample())
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        if number == signal.SIGTERM:
            assert process.returncode == 128 + signal.SIGTERM
            assert "stopped by SIGTERM after" in errors
        else:
            assert process.returncode == -signal.SIGKILL
    for process in (run_python(RUN, cut), unbroken):
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    ours, theirs = (load_file(folder / "last.safetensors") for folder in (cut, whole))
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    assert not [path for path in cut.rglob("*.tmp")]


WORKER = """
    import sys
    from datetime import timedelta
    from pathlib import Path
    import torch
    from test_engine import engine
    from smpconv_zoo.training.world import join_world

    with join_world("cpu", timedelta(seconds=15)) as world:
        changes = {"arguments": {"block_drop_rate": 0.0}, "sync_batch_norm": True, "ema_decay": 0.9}
        trainer = engine(Path(sys.argv[1]), world, **changes)
        outcome = trainer.fit()
        if world.leads:
            torch.save(trainer.model.state_dict(), Path(sys.argv[1]) / "weights.pt")
"""


def test_two_processes_learn_what_one_with_their_batch_learns(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER))
    alone = engine(tmp_path / "alone", arguments={"block_drop_rate": 0.0}, ema_decay=0.9)
    outcome = alone.fit()
    (tmp_path / "pair").mkdir()
    found = torchrun(script, tmp_path / "pair", processes=2)
    assert found.returncode == 0, found.stderr[-3000:]
    ours = [json.loads(line) for line in (tmp_path / "alone" / "metrics.jsonl").read_text().splitlines()]
    theirs = [json.loads(line) for line in (tmp_path / "pair" / "metrics.jsonl").read_text().splitlines()]
    for one, two in zip(ours, theirs, strict=True):
        # Sums of a batch in two parts round otherwise, and Adam turns that into steps.
        assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
        assert two["validation_loss"] == pytest.approx(one["validation_loss"], rel=1e-3)
        assert two["top1"] == one["top1"]
    assert outcome.last.epoch == 3


ELASTIC = """
    import os, sys
    from datetime import timedelta
    from pathlib import Path
    from test_engine import engine
    from smpconv_zoo.training.world import join_world

    folder, dies, died = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])

    def die(done, _):
        if done == dies and not died.exists():
            died.touch()
            os._exit(1)

    with join_world("cpu", timedelta(seconds=15)) as world:
        changes = {"arguments": {"block_drop_rate": 0.0}, "sync_batch_norm": True, "ema_decay": 0.9}
        trainer = engine(folder, world, save_every=2, on_step=die if world.rank == world.size - 1 else None, **changes)
        if trainer.resume() is not None and world.leads:
            print("goes on after", trainer.update)
        trainer.fit()
"""


def torchrun(script: Path, *arguments: object, processes: int, restarts: int = 5) -> subprocess.CompletedProcess[str]:
    """Run a script in processes. On a busy machine gloo's may fail to find each other: they may try again."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run(
        [*command, f"--max-restarts={restarts}", str(script), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def epochs_of(folder: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry["kind"] == "epoch"]


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 and WORLD_SIZE=2 do not fit: processes are numbered from 0 to 1"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE='two' is no number of a process: start by torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT say where processes meet, and one is missing"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "port .* is in use on 127.0.0.1"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "process 2 of 2 did not find the others at 127"),
    ],
    ids=["rank", "number", "nowhere", "port", "alone"],
)
def test_processes_that_do_not_find_each_other_are_told_why(monkeypatch, variables, sentence):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with socket.socket() as taken:
        # The first process listens at this port, which is taken; the second finds nobody who answers there.
        taken.bind(("127.0.0.1", 0))
        if variables["RANK"] == "0":
            taken.listen()
        if "MASTER_ADDR" in variables:
            monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        error = ConnectionError if "MASTER_ADDR" in variables or sentence.startswith("MASTER") else ValueError
        with pytest.raises(error, match=sentence), join_world("cpu", timedelta(seconds=3)):
            pass


def test_a_dead_process_is_started_again_and_a_run_goes_on_with_more_processes(tmp_path):
    script = tmp_path / "elastic.py"
    script.write_text(textwrap.dedent(ELASTIC))
    whole = engine(tmp_path / "whole", arguments={"block_drop_rate": 0.0}, ema_decay=0.9, sync_batch_norm=True)
    whole.fit()
    restarted, grown = tmp_path / "restarted", tmp_path / "grown"
    found = torchrun(script, restarted, 7, tmp_path / "died", processes=2)
    assert found.returncode == 0, found.stderr[-3000:]
    assert "goes on after 6" in found.stdout
    # One process dies for good; two take up what it left.
    assert torchrun(script, grown, 7, tmp_path / "died for good", processes=1, restarts=0).returncode != 0
    found = torchrun(script, grown, 0, tmp_path / "nobody", processes=2)
    assert found.returncode == 0, found.stderr[-3000:]
    for folder in (restarted, grown):
        for ours, theirs in zip(epochs_of(folder), epochs_of(tmp_path / "whole"), strict=True):
            # Sums of a batch in two parts round otherwise, and Adam turns that into steps.
            assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
            assert ours["validation_loss"] == pytest.approx(theirs["validation_loss"], rel=1e-3)


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount on this machine")
def test_a_full_disk_ends_the_run_in_one_sentence_and_keeps_the_last_checkpoint(tmp_path):
    disk = tmp_path / "disk"
    with mounted(disk, "-t", "tmpfs", "-o", "size=4m", "tmpfs"):

        def fill(done: int, _: int) -> None:
            if done == 7:
                with contextlib.suppress(OSError), (disk / "ballast").open("wb") as file:
                    while True:
                        file.write(bytes(4096))

        with pytest.raises(OSError, match=r"No space left|could not be written"):
            engine(disk / "run", save_every=1, on_step=fill).fit()
        (disk / "ballast").unlink()
        again = engine(disk / "run")
        assert again.resume() == ()
        assert again.update == 6
        again.fit()
        unbroken = engine()
        unbroken.fit()
        assert_same_weights(again.model, unbroken.model)


def test_a_reader_that_dies_ends_the_run_in_one_sentence(tmp_path):
    write_stand_in(tmp_path / "pictures", 2, 8, (40, 30), validation_per_class=2)
    values = {"network": "test_smpconv", "data": "pictures", "epochs": 50, "batch_size": 2, "lr": 1e-3}
    recipe = make_recipe("test_smpconv.own", {**values, "arguments": {"num_classes": 2}, "image_size": 32})

    def kill(done: int, _: int) -> None:
        if done == 20:
            for reader in multiprocessing.active_children():
                os.kill(reader.pid, signal.SIGKILL)

    with pytest.raises(ChildProcessError, match=r"a process that reads pictures .* go on by --resume"):
        train(recipe, tmp_path / "run", data_dir=tmp_path / "pictures", workers=1, save_every=1, on_step=kill)
    assert checkpointing.load_newest(tmp_path / "run" / "checkpoints").state["update"] >= 19


@pytest.mark.parametrize("name", ["test_smpconv", "test_smpconv_tcn"])
def test_shared_batch_norms_are_batch_norms_with_whatever_follows_them(name, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(name).train()
    x = torch.randn(4, *sample_shape(model))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        shared = convert_sync_batch_norm(copy.deepcopy(model), CPU)
        ours, theirs = shared(x), model(x)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        ours.square().sum().backward()
        theirs.square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert {type(m) for m in shared.modules()} & {torch.nn.BatchNorm2d, torch.nn.BatchNorm1d} == set()
    assert list(shared.state_dict()) == list(model.state_dict())
    for (key, a), b in zip(shared.named_buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=key, rtol=1e-4, atol=1e-5)
    largest = max(p.grad.abs().max().item() for p in model.parameters() if p.grad is not None)
    for (key, a), b in zip(shared.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=key, rtol=1e-3, atol=1e-4 * largest)
    torch.testing.assert_close(shared.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    # PyTorch's own runs on GPUs alone; what it is made of can be seen here.
    on_gpu = convert_sync_batch_norm(copy.deepcopy(model), torch.device("cuda"))
    acts = [sum(isinstance(m, torch.nn.ReLU | torch.nn.GELU) for m in net.modules()) for net in (on_gpu, model)]
    assert acts[0] == acts[1]


def test_an_epoch_is_better_by_accuracy_then_by_loss():
    trainer = engine(epochs=3)
    figures = iter([(60.0, 1.0), (60.0, 0.9), (60.0, 0.95)])

    def measure() -> dict[str, float]:
        top1, loss = next(figures)
        return {"top1": top1, "loss": loss, "top5": 90.0}

    trainer._measure = measure  # type: ignore[method-assign]
    assert trainer.fit().best.epoch == 2
