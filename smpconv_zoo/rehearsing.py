"""The authors' runs before they are paid for: their commands, time and cost, and all their stages on made-up data.

Times are computed from what was measured on one H100 and lies in a folder of results. What eight of them take is an
assumption, by a share of the eightfold speed that a user gives; nothing here measured it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import json
import math
import os
import re
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torchvision.datasets import CIFAR10

from smpconv_zoo.data.folders import open_pictures, unreadable_pictures
from smpconv_zoo.data.stand_in import write_stand_in
from smpconv_zoo.data.stand_in_arrays import (
    cifar10_sums,
    write_cifar10_stand_in,
    write_mnist_stand_in,
    write_speech_stand_in,
    write_trajectories_stand_in,
)
from smpconv_zoo.evaluation.paper_tables import PaperRow, paper_tables
from smpconv_zoo.pretrained.cards import checkpoint_card
from smpconv_zoo.reproducing import Options, ReproducedRow, reproduce, train_command
from smpconv_zoo.training.engine import Stopped
from smpconv_zoo.training.recipe import ImageRecipe, SequenceRecipe, load_recipe, parse_overrides
from smpconv_zoo.training.run_weights import network_of_run
from smpconv_zoo.training.running import Run, train
from smpconv_zoo.training.world import World

__all__ = [
    "PlannedRun",
    "RehearsalError",
    "Stage",
    "plan_runs",
    "rehearsal_overrides",
    "rehearse",
    "rehearsed_rows",
]

# Samples to learn from and to choose by, of the authors' data and split (sangnekim/SMPConv at de4e59a).
_SAMPLES = {
    "ImageNet-1k": (1_281_167, 50_000),
    "MNIST": (60_000, 10_000),
    "CIFAR-10": (50_000, 10_000),
    "CharacterTrajectories": (2_000, 429),
    "Speech Commands, 10 words": (24_482, 5_247),
}
# Parts in which one H100 of 80 GB takes a batch of 2,048 pictures: T 512 of them, 47 GiB by proportion from the 11.8
# that were measured at 128; B 128, whose memory was not measured.
_MICRO_BATCHES = {"smpconv_t": 4, "smpconv_b": 16}
_GPUS = 8
# Of the rehearsal: steps after which a run is stopped, to go on.
_STOP_AFTER = 2


class RehearsalError(ValueError):
    """A stage did not do what it should; the message says which, of which run, and what came instead."""


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """A run of the authors', as it would be done.

    Args:
        row: What its line in the tables is called.
        checkpoint: Whose recipe it is.
        dropped: Percent of the time steps that are left out.
        check: The command that checks data and recipe, and says what would run.
        train: The command on one GPU; DIR stands for the folder of the data.
        train_eight: The command on eight; for sequences that of one of eight seeds, of which each has a GPU.
        evaluate: The command that measures it.
        steps: Of the optimizer.
        speed: What of it was measured, and where that is written.
        hours: On one H100, validation after every epoch included.
        hours_eight: On eight: of pictures one run, of sequences eight seeds side by side.
        cost: Of ``hours``; None without a price.
        cost_eight: Of eight GPUs for ``hours_eight``.
        assumptions: What is not measured in it.
    """

    row: str
    checkpoint: str
    dropped: int
    check: str
    train: str
    train_eight: str
    evaluate: str
    steps: int
    speed: str
    hours: float
    hours_eight: float
    cost: float | None
    cost_eight: float | None
    assumptions: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of a rehearsal that went well: of which run, its name, the seconds that it took, and what came of it."""

    row: str
    dropped: int
    name: str
    seconds: float
    outcome: str


def rehearsed_rows(only: str = "*") -> list[PaperRow]:
    """The lines of the authors' tables whose checkpoint a wildcard names."""
    return [row for table in paper_tables() for row in table.rows if fnmatch.fnmatch(row.checkpoint, only)]


# -------------------------------------------------------------------------------------------------------- time and cost


def plan_runs(results: Path, price: float | None = None, scaling: float = 0.9, only: str = "*") -> list[PlannedRun]:
    """Commands, time and cost of the authors' runs.

    Args:
        results: Folder with ``sequence_h100.json``, ``model*_h100.json`` and ``train_smpconv_t_h100.txt``.
        price: Of a GPU for an hour, in any currency; None for no cost.
        scaling: Share of the eightfold speed that eight GPUs are assumed to reach with pictures.
        only: A wildcard of checkpoints.

    Raises:
        FileNotFoundError: A measurement is not there.
        ValueError: A measurement of another form or batch, or a share out of (0, 1].
    """
    if not 0 < scaling <= 1:
        raise ValueError(f"scaling is a share of the full speed, in (0, 1], got {scaling}")
    if price is not None and price < 0:
        raise ValueError(f"the price of an hour is 0 or more, got {price}")
    planned = []
    for row in rehearsed_rows(only):
        recipe = load_recipe(row.checkpoint)
        make = _plan_pictures if isinstance(recipe, ImageRecipe) else _plan_sequences
        planned.append(make(row, recipe, results, price, scaling))
    return planned


def _plan_sequences(row: PaperRow, recipe: Any, results: Path, price: float | None, scaling: float) -> PlannedRun:
    found = {entry["network"]: entry for entry in _json(results / "sequence_h100.json")["results"]}
    entry = found.get(recipe.network)
    if entry is None or entry["shape"][0] != recipe.batch_size:
        raise ValueError(f"{results / 'sequence_h100.json'} has no step of {recipe.network} at {recipe.batch_size}")
    train_samples, test_samples = _SAMPLES[checkpoint_card(row.checkpoint).data.name]
    # Of the authors' protocol the last batch of an epoch may be smaller.
    steps = recipe.epochs * math.ceil(train_samples / recipe.batch_size)
    passes = recipe.epochs * math.ceil(test_samples / recipe.batch_size)
    hours = (steps * entry["train_graph_ms"] + passes * entry["inference_ms"]) / 3.6e6
    assumptions = ["a validation pass as launched kernel by kernel"]
    if row.dropped:
        assumptions.append("a step takes as long as one with complete samples, which have a channel less")
    if recipe.early_stop is not None:
        assumptions.append(f"not stopped early, which {recipe.early_stop} epochs without improvement would do")
    command = train_command(row).replace("runs/NAME", f"runs/{_name(row)}")
    seeded = command.replace(f"runs/{_name(row)}", f"runs/{_name(row)}_$k")
    return PlannedRun(
        row=row.row,
        checkpoint=row.checkpoint,
        dropped=row.dropped,
        check=f"{command} --dry-run",
        train=command,
        train_eight=f"for k in 0 1 2 3 4 5 6 7; do CUDA_VISIBLE_DEVICES=$k {seeded} --set seed=$k & done; wait",
        evaluate=f"python eval/sequence.py runs/{_name(row)} --data-dir DIR --device cuda",
        steps=steps,
        speed=f"{entry['train_graph_ms']:.2f} ms a step of {recipe.batch_size} ({recipe.dtype}), sequence_h100.json",
        hours=hours,
        hours_eight=hours,
        cost=None if price is None else hours * price,
        cost_eight=None if price is None else _GPUS * hours * price,
        assumptions=(*assumptions, "eight GPUs: eight seeds side by side, each as fast as one alone"),
    )


def _plan_pictures(row: PaperRow, recipe: Any, results: Path, price: float | None, scaling: float) -> PlannedRun:
    log = results / "train_smpconv_t_h100.txt"
    rates = [float(rate.replace(",", "")) for rate in re.findall(r"^epoch .* ([\d,]+) samples/s$", _text(log), re.M)]
    if len(rates) < 3:
        raise ValueError(f"{log} has no epochs with their samples/s")
    # The first epoch holds what is done once.
    measured = statistics.median(rates[1:])
    rate, speed = measured, f"{measured:,.0f} pictures/s in bfloat16, reading included, 16 CPU cores: {log.name}"
    assumptions = [f"a mean picture as long to read as those in {log.name}"]
    if recipe.network != "smpconv_t":
        alone = {name: _training_rate(results, name) for name in ("smpconv_t", recipe.network)}
        ours, theirs = alone[recipe.network], alone["smpconv_t"]
        if ours is not None and theirs is not None:
            share, why = (
                ours / theirs,
                f"by the network alone, {ours:,.0f} pictures/s to {theirs:,.0f}, model*_h100.json",
            )
        else:
            macs = [checkpoint_card(f"{name}.in1k").macs for name in ("smpconv_t", recipe.network)]
            share, why = macs[0] / macs[1], "by its multiply-accumulates; no step of it was measured"
        rate = measured * share
        speed = f"{rate:,.0f} pictures/s, from {measured:,.0f} of smpconv_t {why}"
        assumptions.append(f"the speed of {recipe.network} follows from that of smpconv_t {why}")
    train_samples, validation = _SAMPLES["ImageNet-1k"]
    hours = recipe.epochs * (train_samples + validation) / rate / 3600
    eight = hours / (_GPUS * scaling)
    options = "--data-dir DIR --device cuda --workers 16"
    half = "--set dtype=bfloat16 --set channels_last=true"
    parts, own = _MICRO_BATCHES[recipe.network], recipe.batch_size // _MICRO_BATCHES[recipe.network]
    command = f"train {row.checkpoint} {options} --out runs/{_name(row)} {half}"
    evaluate = f"eval/imagenet.py runs/{_name(row)} --data-dir DIR --device cuda --workers 16"
    return PlannedRun(
        row=row.row,
        checkpoint=row.checkpoint,
        dropped=0,
        check=f"smpconv-zoo data check DIR --full, then smpconv-zoo {command} --dry-run",
        train=f"smpconv-zoo {command} --set micro_batches={parts}",
        train_eight=f"torchrun --nproc-per-node 8 -m smpconv_zoo {command}",
        evaluate=f"python {evaluate}",
        steps=recipe.epochs * (train_samples // recipe.batch_size),
        speed=speed,
        hours=hours,
        hours_eight=eight,
        cost=None if price is None else hours * price,
        cost_eight=None if price is None else _GPUS * eight * price,
        assumptions=(
            *assumptions,
            "a validation picture takes as long as one to learn from, which is too much",
            "bfloat16 in place of the recipe's float32, whose accuracy nobody has compared here",
            f"one GPU: {parts} parts of {own} pictures a step, of which each has its own norm statistics; the authors' "
            f"parts have {recipe.batch_size // recipe.micro_batches:,}, as on eight GPUs",
            f"eight GPUs: {scaling:.0%} of eight times the speed, and 16 CPU cores for each",
        ),
    )


def _training_rate(results: Path, network: str) -> float | None:
    """Pictures a second of the network alone in training, channels last in bfloat16; None if nobody measured it."""
    for path in sorted(results.glob("model*_h100.json")):
        for entry in _json(path)["results"]:
            kind = (entry["network"], entry["work"], entry["layout"], entry["dtype"])
            if kind == (network, "training", "channels last", "bfloat16"):
                return float(entry["images_per_second"])
    return None


def _name(row: PaperRow) -> str:
    """Of a run's folder."""
    network, _, tag = row.checkpoint.partition(".")
    return f"{network}_{tag}" + (f"_{row.dropped}" if row.dropped else "")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    return found


# ------------------------------------------------------------------------------------------------------- the rehearsal


def rehearse(
    rows: Sequence[PaperRow],
    folder: Path,
    *,
    device: str = "cpu",
    on_stage: Callable[[Stage], None] | None = None,
) -> list[ReproducedRow]:
    """Go through every stage of each run on stand-ins: data, check, train, stop, go on, save, measure, table.

    The networks are the authors', whole. Smaller are: the data, the number of epochs, the batch, and of ImageNet the
    pictures (64 x 64, at which kernels are read off accordingly).

    Args:
        rows: Lines of the authors' tables.
        folder: For data and runs; must be empty or new.
        device: Where to compute.
        on_stage: Called with every stage that went well.

    Returns:
        The lines as the table has them. Their figures mean nothing.

    Raises:
        RehearsalError: A stage did not do what it should.
        FileExistsError: The folder holds something.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds files, left as they were; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    told = on_stage or (lambda stage: None)
    return [_rehearse(row, folder, device, told) for row in rows]


def rehearsal_overrides(row: PaperRow) -> dict[str, Any]:
    """What the rehearsal of a line changes in its recipe, besides what the line itself does."""
    recipe = load_recipe(row.checkpoint)
    if isinstance(recipe, ImageRecipe):
        # 1,000 classes, of one picture each: nine steps.
        return {"epochs": 1, "warmup_epochs": 0, "batch_size": 104, "image_size": _SIZE}
    if recipe.features == "raw":
        # Of 16,000 samples each, on a CPU too.
        return {"epochs": 1, "warmup_epochs": 0, "batch_size": 16}
    return {"epochs": 2, "warmup_epochs": 1, "batch_size": 16}


_SIZE = 64


def _rehearse(row: PaperRow, folder: Path, device: str, told: Callable[[Stage], None]) -> ReproducedRow:
    def stage(name: str, work: Callable[[], tuple[Any, str]]) -> Any:
        start = time.perf_counter()
        result, outcome = work()
        told(Stage(row.row, row.dropped, name, time.perf_counter() - start, outcome))
        return result

    pairs = [pair.strip('"') for pair in train_command(row).split(" --set ")[1:]]
    recipe = load_recipe(row.checkpoint, **parse_overrides(pairs), **rehearsal_overrides(row))
    name = checkpoint_card(row.checkpoint).data.name
    place = stage("data", lambda: _stand_in(name, folder))
    out = folder / _name(row)
    with _published_sums(place if name == "CIFAR-10" else None):
        stage("check", lambda: _check(recipe, out, place, device))
        stage("train", lambda: _train_and_stop(recipe, out, place, device))
        run = stage("resume", lambda: _go_on(recipe, out, place, device))
        stage("save", lambda: _saved(run, out))
        done = stage("eval and table", lambda: _table(row, run, recipe, out, place, device))
    reproduced: ReproducedRow = done
    return reproduced


def _stand_in(name: str, folder: Path) -> tuple[Path, str]:
    place = folder / f"data_{re.sub(r'[^a-z0-9]+', '_', name.lower())}"
    if place.exists():
        return place, f"{name} as for the line before"
    if name == "ImageNet-1k":
        written = write_stand_in(place, classes=1000, per_class=1, size=(96, 72))
        return place, f"{written:,} JPEG pictures of 96 x 72 in 1,000 classes, train and val"
    writers: dict[str, Callable[[Path], Path]] = {
        "MNIST": write_mnist_stand_in,
        "CIFAR-10": write_cifar10_stand_in,
        "CharacterTrajectories": write_trajectories_stand_in,
        "Speech Commands, 10 words": write_speech_stand_in,
    }
    writers[name](place)
    files = [path for path in place.rglob("*") if path.is_file()]
    return place, f"{len(files):,} files, {sum(path.stat().st_size for path in files):,} bytes"


@contextlib.contextmanager
def _published_sums(cifar10: Path | None) -> Iterator[None]:
    """Let torchvision take a stand-in for CIFAR-10: its md5 sums in the place of those of the published files."""
    if cifar10 is None:
        yield
        return
    sums = cifar10_sums(cifar10)
    own: dict[str, Any] = {
        "train_list": [[name, sums[name]] for name, _ in CIFAR10.train_list],
        "test_list": [[name, sums[name]] for name, _ in CIFAR10.test_list],
        "meta": {**CIFAR10.meta, "md5": sums[CIFAR10.meta["filename"]]},
    }
    with mock.patch.multiple(CIFAR10, **own):
        yield


def _check(recipe: SequenceRecipe | ImageRecipe, out: Path, place: Path, device: str) -> tuple[None, str]:
    plans: list[dict[str, Any]] = []
    if isinstance(recipe, ImageRecipe):
        pictures = open_pictures(place)
        if bad := unreadable_pictures(pictures, full=True):
            raise RehearsalError(f"check: pictures that cannot be read: {bad[:3]}")
    train(
        recipe,
        out,
        data_dir=place,
        device=device,
        workers=0,
        dry_run=True,
        on_plan=lambda plan, model: plans.append(plan),
    )
    if out.exists():
        raise RehearsalError(f"check: a dry run wrote {out}")
    plan = plans[0]
    learned = plan.get("train", plan.get("training"))
    return None, f"{learned:,} samples to learn from, {plan['validation']:,} to choose by, {plan['steps']:,} steps"


def _train_and_stop(recipe: SequenceRecipe | ImageRecipe, out: Path, place: Path, device: str) -> tuple[None, str]:
    def stop(done: int, total: int) -> None:
        if done == _STOP_AFTER:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        train(recipe, out, data_dir=place, device=device, workers=0, save_every=1, log_every=1, on_step=stop)
    except Stopped as stopped:
        saved = sorted(path.name for path in (out / "checkpoints").glob("*.pt"))
        if not saved:
            raise RehearsalError("train: stopped by SIGTERM, and no checkpoint is there") from stopped
        return None, f"stopped by SIGTERM after step {stopped.update}, {saved[-1]} is there"
    raise RehearsalError("train: a run that was told to stop by SIGTERM went on to its end")


def _go_on(recipe: SequenceRecipe | ImageRecipe, out: Path, place: Path, device: str) -> tuple[Run, str]:
    notes: list[str] = []
    run = train(recipe, out, data_dir=place, device=device, workers=0, resume=True, on_note=notes.append)
    if run is None or not any(note.startswith("goes on after step") for note in notes):
        raise RehearsalError(f"resume: the run did not go on from its checkpoint, it said {notes}")
    last = run.outcome.last
    return run, f"{notes[-1]}, to step {last.update}: loss {last.train_loss:.3f}"


def _saved(run: Run, out: Path) -> tuple[None, str]:
    found = network_of_run(out, best=False)
    for name, tensor in run.model.state_dict().items():
        if not torch.equal(found.model.state_dict()[name], tensor.cpu()):
            raise RehearsalError(f"save: {name} was read back as something else")
    wanted = ("args.yaml", "environment.json", "metrics.csv", "metrics.jsonl", "best.safetensors", "last.safetensors")
    if missing := [name for name in wanted if not (out / name).is_file()]:
        raise RehearsalError(f"save: the run left no {', '.join(missing)}")
    return None, f"{found.weights}, read back equal; {', '.join(wanted)}"


def _table(
    row: PaperRow, run: Run, recipe: SequenceRecipe | ImageRecipe, out: Path, place: Path, device: str
) -> tuple[ReproducedRow, str]:
    """The line of the table has the figure that the run gave of its best epoch: both are of the test part."""
    options = Options(data_dir=place, runs=(out,), only=row.checkpoint, partial=True, workers=0)
    tables = reproduce(options, World(torch.device(device)))
    (done,) = [line for table in tables for line in table.rows if line.dropped == row.dropped and line.row == row.row]
    best = run.outcome.best
    if done.measured is None or best is None or best.top1 is None:
        raise RehearsalError(f"eval: the line has no figure: {done.error or '; '.join(done.missing)}")
    if recipe.protocol != "reference" or abs(done.measured - best.top1) > 1e-9:
        raise RehearsalError(f"eval: {done.measured} % measured, the run gave {best.top1} % of its best epoch")
    return done, f"{done.correct} of {done.total} of the stand-in, as the run says of its best epoch, {best.epoch}"
