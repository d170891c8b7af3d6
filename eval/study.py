"""Kernels of points against a fixed grid and an MLP, on real data inside PyPI packages, under one protocol.

Every run is a job `STAGE DATA KERNEL/OPTIONS SEED`. Jobs of the stage `choose` learn from a part of the training data
and are measured on the rest; by their means each kernel's options are chosen for each data set. Jobs of the stage
`final` learn from all training data with options that are fixed or were chosen so, and read the test data once, after
their last epoch. Nothing is chosen on test data. Jobs of the stage `time` take a few steps, with --jobs 1 alone.

    python eval/study.py --device cuda --jobs 1 --only 'time *' --log runs/study.jsonl
    python eval/study.py --device cuda --jobs 12 --log runs/study.jsonl --weights runs/weights
    python eval/study.py --list
    python eval/study.py --log runs/study.jsonl --summary
    python eval/study.py --log eval/results/study.jsonl --markdown

The log has a line for every run. The same command again goes on where it was stopped: what is logged is not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import multiprocessing
import os
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smpconv_zoo.checkpoints import write_safetensors
from smpconv_zoo.data.mnist1d import mnist1d_sequences
from smpconv_zoo.data.mnist5k import mnist5k_images
from smpconv_zoo.data.ucr import load_ucr
from smpconv_zoo.environment import hardware, versions
from smpconv_zoo.evaluation.classification import top1
from smpconv_zoo.evaluation.tables import markdown_table
from smpconv_zoo.training.arrays import ArrayData, load_parts, pixels_as_input
from smpconv_zoo.training.engine import EpochLog
from smpconv_zoo.training.recipe import SequenceRecipe, make_recipe
from smpconv_zoo.training.running import train
from smpconv_zoo.training.world import World

KERNELS = ("points", "fixed", "short", "mlp")
# A fixed kernel of so many taps has as many parameters as thirty points.
SHORT_TAPS = 32
# Validations in a run of the stage `choose`; the last epoch is always one.
VALIDATIONS = 10
# Places of a logged curve, beside those where accuracy was measured.
CURVE_POINTS = 30
TIMED_STEPS = 240
_OPTIONS = ("", "mean", "wide", "mean+wide", "mean+wide+spread", "mean+wide+augment")
# For series of many more steps than a short kernel has taps.
_LONG = (*_OPTIONS, "mean+short", "mean+short+augment")


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Data as a network of the study takes them.

    ``seeds`` of final runs, ``draws`` of the part to choose by, its share ``held_out``; ``options`` to choose between,
    of points and of other kernels; "short" was added after it had been seen that short fixed kernels are ahead on long
    series, and is chosen like the others. ``omega`` of the MLP: CKConv's own where it was tuned for the task
    (runs/README.md of dwromero/ckconv), on JapaneseVowels that of CharacterTrajectories at the same percentage of
    dropped samples.
    Digits are augmented throughout, as eval/results/search_mnist5k.jsonl chose for kernels of points.
    """

    recipe: dict[str, Any]
    shape: tuple[int, int]
    classes: int
    seeds: int = 5
    draws: int = 3
    held_out: float = 0.25
    options: tuple[str, ...] = _OPTIONS
    other_options: tuple[str, ...] = ("", "mean", "mean+augment")
    kernels: tuple[str, ...] = KERNELS
    omega: float = 30.0
    network: str = "smpconv_tcn"
    # In the stage ``choose``, where a batch of the recipe's size is more than what is left to learn from.
    choose_batch: int | None = None
    # Takes the options chosen on another data set.
    as_chosen_on: str | None = None


def _digits(**values: Any) -> dict[str, Any]:
    return {"data": "mnist5k", "epochs": 100, "batch_size": 64, **values}


def _series(data: str, **values: Any) -> dict[str, Any]:
    return {"data": data, "epochs": 300, "batch_size": 32, **values}


_VOWELS = ("points", "fixed", "mlp")
DATA = {
    "gunpoint": DataSet(_series("gunpoint"), (1, 150), 2, options=_LONG),
    "arrowhead": DataSet(_series("arrowhead"), (1, 251), 3, options=_LONG, choose_batch=16),
    # 24 steps: a short kernel would be a longer one.
    "italy-power-demand": DataSet(_series("italy-power-demand"), (1, 24), 2, kernels=_VOWELS),
    "basic-motions": DataSet(_series("basic-motions"), (6, 100), 4, options=_LONG),
    "japanese-vowels": DataSet(_series("japanese-vowels"), (12, 29), 9, draws=2, kernels=_VOWELS, omega=21.45),
    **{
        f"japanese-vowels-{dropped}": DataSet(
            _series("japanese-vowels", dropped=dropped),
            (13, 29),
            9,
            seeds=3,
            kernels=_VOWELS,
            omega=omega,
            as_chosen_on="japanese-vowels",
        )
        for dropped, omega in ((30, 17.24), (50, 12.0), (70, 4.24))
    },
    "acsf1": DataSet(_series("acsf1"), (1, 1460), 10, seeds=3, draws=2, options=_LONG),
    "osuleaf": DataSet(_series("osuleaf"), (1, 427), 6, seeds=3, draws=1, options=_LONG),
    "mnist1d": DataSet(
        {"data": "mnist1d", "epochs": 100, "batch_size": 64}, (1, 40), 10, seeds=3, draws=1, held_out=0.2
    ),
    "smnist5k": DataSet(
        _digits(input="sequence"),
        (1, 784),
        10,
        seeds=3,
        draws=1,
        options=("augment", "mean+augment"),
        other_options=("augment", "mean+augment"),
        omega=31.09,
        network="smpconv_tcn_mnist",
    ),
    "pmnist5k": DataSet(
        _digits(input="permuted sequence", permutation_seed=0),
        (1, 784),
        10,
        seeds=3,
        draws=1,
        options=("augment", "mean+augment"),
        other_options=("augment", "mean+augment"),
        omega=43.46,
        network="smpconv_tcn_mnist",
    ),
    "mnist5k-images": DataSet(
        _digits(input="image 28 x 28"),
        (1, 784),
        10,
        seeds=3,
        draws=1,
        options=("augment",),
        kernels=("points",),
        network="smpconv_resnet_mnist",
    ),
}
TIMED = ("smnist5k", "japanese-vowels", "acsf1", "mnist1d")
THEIRS = ("ROCKET", "InceptionTime", "HC2")
# What others publish for the same split, top-1 in percent; where from, docs/study.md says.
PUBLISHED = {
    "gunpoint": {"ROCKET": "100.00", "InceptionTime": "100.00", "HC2": "100.00"},
    "arrowhead": {"ROCKET": "81.43 ± 0.94", "InceptionTime": "84.57", "HC2": "86.86"},
    "italy-power-demand": {"ROCKET": "96.96 ± 0.10", "InceptionTime": "96.50", "HC2": "96.99"},
    "basic-motions": {"InceptionTime": "100.00"},
    "japanese-vowels": {"InceptionTime": "99.19"},
    "acsf1": {"ROCKET": "88.60 ± 1.07", "InceptionTime": "92.00", "HC2": "91.00"},
    "osuleaf": {"ROCKET": "94.09 ± 0.34", "InceptionTime": "94.21", "HC2": "96.69"},
    "mnist1d": {"MLP": "68", "CNN": "94", "GRU": "91"},
}
# Final runs in the order of their worth: these first, with the jobs that they wait for.
ORDER = tuple(DATA)


@dataclasses.dataclass(frozen=True)
class Job:
    """One run. ``option`` is "" for the reference's settings, names joined by "+", or "chosen" until it is known."""

    stage: str
    data: str
    kernel: str
    option: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.stage} {self.data} {self.kernel}/{self.option or 'reference'} {self.seed}"


def jobs() -> list[Job]:
    """All of them, the most valuable first."""
    listed = [Job("time", data, kernel, "", 0) for data in TIMED for kernel in DATA[data].kernels]
    digits = [name for name, data in DATA.items() if data.recipe["data"] == "mnist5k"]
    small = [name for name in ORDER if name not in digits and name not in ("acsf1", "osuleaf", "mnist1d")]
    for group, first in ((small, 5), (["mnist1d", "acsf1"], 3), (digits, 1), (["osuleaf"], 3), (digits, 3)):
        listed += [job for data in group for job in _final(data, "", first)]
        listed += [job for data in group for job in _choose(data)]
        listed += [job for data in group for job in _final(data, "chosen", first)]
    return list(dict.fromkeys(listed))


def _final(data: str, option: str, seeds: int) -> Iterator[Job]:
    kernels = DATA[data].kernels
    if option == "" and DATA[data].as_chosen_on is not None:
        # What the options are worth is seen on the data that they were chosen on.
        kernels = ("points",)
    for seed in range(min(seeds, DATA[data].seeds)):
        for kernel in kernels:
            yield Job("final", data, kernel, option, seed)


def _choose(data: str) -> Iterator[Job]:
    chosen = DATA[data]
    for draw in range(chosen.draws if chosen.as_chosen_on is None else 0):
        for kernel in chosen.kernels:
            for option in _options(data, kernel) if len(_options(data, kernel)) > 1 else ():
                yield Job("choose", data, kernel, option, draw)


def _options(data: str, kernel: str) -> tuple[str, ...]:
    return DATA[data].options if kernel == "points" else DATA[data].other_options


def recipe_of(job: Job, epochs: int | None = None) -> SequenceRecipe:
    """The run of a job whose option is known; with other ``epochs`` than its own to try things out."""
    data = DATA[job.data]
    channels, length = data.shape
    taps = SHORT_TAPS if "short" in job.option.split("+") else length
    tap = 2 / (taps - 1)
    arguments: dict[str, Any] = {}
    if data.network == "smpconv_tcn":
        # As in the authors' recipes, where a radius is 0.8 taps.
        arguments = {"in_chans": channels, "num_classes": data.classes, "kernel_size": taps}
        if job.kernel == "points":
            arguments["init_radius"] = round(min(0.8 * tap, 1.0), 6)
    if job.kernel in ("fixed", "short"):
        arguments |= {"kernel": "fixed", "kernel_size": SHORT_TAPS if job.kernel == "short" else length}
    if job.kernel == "mlp":
        arguments |= {"kernel": "mlp", "omega": data.omega}
    values = {
        "network": data.network,
        "optimizer": "adam",
        "lr": 1e-3,
        "weight_decay": 1e-5,
        "seed": job.seed,
        "held_out": data.held_out,
        "held_out_draw": job.seed if job.stage == "choose" else 0,
        **data.recipe,
    }
    if job.stage == "choose" and data.choose_batch is not None:
        values["batch_size"] = data.choose_batch
    for option in filter(None, job.option.split("+")):
        if option == "short":
            # Above: the points' kernel is read off at so many taps.
            continue
        if option == "mean":
            arguments["global_pool"] = "avg"
        elif option == "wide":
            arguments["init_radius"] = round(min(3 * tap, 1.0), 6)
        elif option == "spread":
            arguments["coord_std"] = 0.5
        elif option == "augment" and data.recipe["data"] == "mnist5k":
            values |= {"augment": True, "input_drop_rate": 0.1}
        elif option == "augment":
            values |= {"jitter": 0.05, "scaling": 0.1, "time_shift": 0.05, "time_mask": 0.1}
        else:
            raise ValueError(f"there is no option {option!r}")
    recipe = make_recipe(f"{data.network}.{tag(job.data)}", {**values, "arguments": arguments})
    assert isinstance(recipe, SequenceRecipe)
    if epochs is None and job.stage == "time":
        epochs = -(-TIMED_STEPS // (len(load_parts(recipe).train[1]) // recipe.batch_size))
    epochs = epochs or recipe.epochs
    # A twentieth of the run, as in the authors' recipes.
    return dataclasses.replace(recipe, epochs=epochs, warmup_epochs=epochs // 20)


def tag(data: str) -> str:
    """Of the checkpoint of a data set; timm takes no dash for part of it."""
    return "mnist5k" if data == "mnist5k-images" else data.replace("-", "_")


class _Sparse(ArrayData):
    """Data that are chosen by a few times in a run alone: a pass over them takes as long as several steps."""

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        done, epochs = self._epoch + 1, self.recipe.epochs
        return super().validation() if done % max(1, epochs // VALIDATIONS) == 0 or done == epochs else iter(())


def run(
    job: Job, device: str, weights: str | None, command: str, alone: bool, limit: int | None = None
) -> dict[str, Any]:
    """Take a job from its recipe to its line of the log."""
    torch.set_num_threads(1)
    recipe = recipe_of(job, limit)
    epochs: list[EpochLog] = []

    def opened(recipe: Any, model: Any, world: World, *_: Any, **__: Any) -> ArrayData:
        data = _Sparse(recipe, load_parts(recipe, final=job.stage == "final"), world)
        data.check(model)
        return data

    start = time.perf_counter()
    done = train(recipe, None, device=device, open_=opened, on_epoch=epochs.append)
    assert done is not None and isinstance(done.data, ArrayData)
    seconds = time.perf_counter() - start
    # The first epochs hold the capture of the step.
    timed = [epoch.seconds for epoch in epochs[len(epochs) // 2 :]]
    record: dict[str, Any] = {
        **dataclasses.asdict(job),
        "job": job.name,
        "validation_top1": epochs[-1].top1,
        "validation_loss": epochs[-1].validation_loss,
        "epochs": len(epochs),
        "steps": epochs[-1].update,
        "step_ms": round(1000 * statistics.median(timed) / done.data.batches, 4),
        "alone": alone,
        "seconds": round(seconds, 2),
        "parameters": sum(p.numel() for p in done.model.parameters()),
        "recipe": dataclasses.asdict(recipe),
        "split": done.data.parts.split,
        "train": done.data.samples,
        "command": command,
        "versions": versions(),
        "hardware": hardware(device),
        "curve": [
            [epoch.epoch, float(f"{epoch.train_loss:.4g}"), epoch.top1]
            for epoch in epochs
            if epoch.top1 is not None or epoch.epoch % max(1, len(epochs) // CURVE_POINTS) == 0
        ],
    }
    if job.stage == "final":
        x, y = test_part(recipe, done.data)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            correct = top1(done.model, x, y, device=device)
        record["test"] = {"correct": correct, "total": len(y), "top1": round(100 * correct / len(y), 4)}
        if weights is not None and job.kernel == "points" and job.seed == 0:
            metadata = {"id": recipe.id, "recipe": json.dumps(dataclasses.asdict(recipe))}
            if done.data.permutation is not None:
                metadata["permutation"] = json.dumps(done.data.permutation.tolist())
            path = Path(weights) / f"{recipe.id}.safetensors"
            state = {name: tensor.cpu() for name, tensor in done.model.state_dict().items()}
            record["weights"] = {"file": path.name, "sha256": write_safetensors(path, state, metadata)}
    return record


def test_part(recipe: SequenceRecipe, data: ArrayData) -> tuple[Tensor, Tensor]:
    """The test samples as the network takes them."""
    if recipe.data == "mnist1d":
        return mnist1d_sequences("test")
    if recipe.data != "mnist5k":
        return load_ucr(recipe.data, recipe.dropped).test
    images, labels = mnist5k_images("test")
    order = None if data.permutation is None else torch.from_numpy(data.permutation)
    return pixels_as_input(images, recipe.input, order), labels


def choice(records: Sequence[dict[str, Any]], data: str, kernel: str) -> str | None:
    """The option of highest mean accuracy on held-out training data, of equal ones that of lower loss; None if unknown.

    The options of other data are taken where those say so. A single option needs no runs.
    """
    options = _options(DATA[data].as_chosen_on or data, kernel)
    if len(options) == 1:
        return options[0]
    best, left = choice_so_far(records, data, kernel)
    return None if left else best


def choice_so_far(records: Sequence[dict[str, Any]], data: str, kernel: str) -> tuple[str | None, tuple[str, ...]]:
    """The best of the options that have all their runs, None without any, and the options that have not."""
    data = DATA[data].as_chosen_on or data
    figures = {}
    for option in _options(data, kernel):
        found = [
            r for r in records if (r["stage"], r["data"], r["kernel"], r["option"]) == ("choose", data, kernel, option)
        ]
        if len(found) >= DATA[data].draws:
            figures[option] = (
                statistics.fmean(r["validation_top1"] for r in found),
                -statistics.fmean(r["validation_loss"] for r in found),
            )
    left = tuple(option for option in _options(data, kernel) if option not in figures)
    return (max(figures, key=lambda option: figures[option]) if figures else None), left


def read_log(path: Path) -> list[dict[str, Any]]:
    """The runs of a log; half a line at its end is passed over."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [record for record in records if "error" not in record]


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a line, on the disk when this returns; one that was cut off before is ended first."""
    with path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def work(args: argparse.Namespace) -> int:
    """Run what is not logged yet; returns how many jobs failed."""
    start = time.monotonic()
    command = f"python {shlex.join(['eval/study.py', *sys.argv[1:]])}"
    args.log.parent.mkdir(parents=True, exist_ok=True)
    if args.weights is not None:
        args.weights.mkdir(parents=True, exist_ok=True)
    records = read_log(args.log)
    done = {record["job"] for record in records}
    todo = [job for job in jobs() if _wanted(job, args.only) and job.name not in done]
    if args.jobs > 1:
        todo = [job for job in todo if job.stage != "time"]
    running: dict[Future[dict[str, Any]], Job] = {}
    failed = 0
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        while todo or running:
            in_time = args.budget is None or time.monotonic() - start < args.budget
            while in_time and len(running) < args.jobs:
                job = _next(todo, running, records, done)
                if job is None:
                    break
                weights = None if args.weights is None else str(args.weights)
                future = pool.submit(run, job, args.device, weights, command, args.jobs == 1, args.epochs)
                running[future] = job
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                error = future.exception()
                if error is not None:
                    failed += 1
                    append(args.log, {"job": job.name, "error": f"{type(error).__name__}: {error}", "command": command})
                    sys.stdout.write(f"{time.monotonic() - start:6.0f} s  {job.name:60} {error}\n")
                    continue
                record = future.result()
                append(args.log, record)
                records.append(record)
                done.add(record["job"])
                test = record.get("test")
                figure = record["validation_top1"] if test is None else test["top1"]
                kind = "" if figure is None else f"{'validation' if test is None else 'test'} {figure:.2f}"
                sys.stdout.write(
                    f"{time.monotonic() - start:6.0f} s  {job.name:60} {kind:18} {record['step_ms']:.2f} ms a step, "
                    f"{record['seconds']:.1f} s\n"
                )
            sys.stdout.flush()
    left = len(todo)
    sys.stdout.write(f"{len(records)} runs logged, {failed} failed, {left} left\n")
    return failed


def _wanted(job: Job, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(job.name, pattern) for pattern in patterns)


def _next(
    todo: list[Job], running: dict[Future[dict[str, Any]], Job], records: list[dict[str, Any]], done: set[str]
) -> Job | None:
    """Take the first job that can run out of ``todo``: one with a chosen option waits until it is chosen."""
    for job in list(todo):
        if job.option != "chosen":
            todo.remove(job)
            return job
        option = choice(records, job.data, job.kernel)
        if option is None:
            continue
        resolved = dataclasses.replace(job, option=option)
        first = dataclasses.replace(job, option="", seed=0)
        if first in todo or first in running.values():
            # Whose weights are kept are those of the chosen option, written last.
            continue
        todo.remove(job)
        if resolved.name in done or resolved in todo or resolved in running.values():
            continue
        return resolved
    return None


def summary(records: Sequence[dict[str, Any]]) -> str:
    """Mean and deviation over seeds of the final runs, a line for every data set, kernel and option."""
    lines = [f"{'data':20} {'kernel':7} {'options':22} {'chosen':7} {'parameters':>11} {'test top-1':>18} {'seeds':>6}"]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for record in records:
        if record["stage"] == "final":
            groups.setdefault((record["data"], record["kernel"], record["option"]), []).append(record)
    order = {name: i for i, name in enumerate(DATA)}
    for (data, kernel, option), runs in sorted(groups.items(), key=lambda item: (order[item[0][0]], item[0][1:])):
        figures = [record["test"]["top1"] for record in runs]
        spread = f" +- {statistics.stdev(figures):.2f}" if len(figures) > 1 else ""
        chosen = "chosen" if choice(records, data, kernel) == option else ""
        lines.append(
            f"{data:20} {kernel:7} {option or 'reference':22} {chosen:7} {runs[0]['parameters']:11,} "
            f"{statistics.fmean(figures):8.2f}{spread:>10} {len(figures):6}"
        )
    for record in records:
        if record["stage"] == "time":
            lines.append(
                f"{record['data']:20} {record['kernel']:7} {record['step_ms']:.3f} ms a step, alone: {record['alone']}"
            )
    return "\n".join(lines)


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """The tables of docs/study.md: all kernels, with the reference's options and with chosen ones; others' figures.

    What is not run leaves its cell empty, and is listed below.
    """
    finals: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for record in records:
        if record["stage"] == "final":
            finals.setdefault((record["data"], record["kernel"], record["option"]), []).append(record)
    times = {(r["data"], r["kernel"]): r["step_ms"] for r in records if r["stage"] == "time" and r["alone"]}
    rows, beside, told = [], [], set()
    missing: dict[tuple[str, str], list[str]] = {}
    for data, chosen in DATA.items():
        for kernel in chosen.kernels:
            best, left = choice_so_far(records, data, kernel)
            if best is None and len(left) == 1:
                best, left = left[0], ()
            reference, runs = finals.get((data, kernel, ""), []), finals.get((data, kernel, best or ""), [])
            runs = runs if best is not None else []
            told |= {(data, kernel, ""), (data, kernel, best)}
            some = reference or runs
            rows.append(
                (
                    data,
                    kernel,
                    f"{some[0]['parameters']:,}" if some else "",
                    _cell(reference),
                    "" if best is None else best or "reference",
                    _cell(runs),
                    f"{times[data, kernel]:.2f}" if (data, kernel) in times else "",
                )
            )
            if kernel == "points" and data in PUBLISHED:
                others = dict(PUBLISHED[data])
                short = finals.get((data, "short", choice_so_far(records, data, "short")[0] or ""), [])
                columns = [others.pop(name, "") for name in THEIRS]
                rest = ", ".join(f"{name} {figure}" for name, figure in others.items())
                beside.append((data, _cell(runs), _cell(short), *columns, rest))
            lacks = []
            if left:
                lacks.append(f"runs to choose by {', '.join(left)}")
            if best is not None and len(runs) < chosen.seeds:
                lacks.append(f"{chosen.seeds - len(runs)} of {chosen.seeds} seeds with the chosen options")
            if (data, kernel, "") in finals and len(reference) < chosen.seeds and best != "":
                lacks.append(f"{chosen.seeds - len(reference)} of {chosen.seeds} seeds with the reference's options")
            for lack in lacks:
                missing.setdefault((data, lack), []).append(kernel)
    timed = sum(len(DATA[data].kernels) for data in TIMED)
    lines = [f"{data}, {', '.join(kernels)}: {lack}" for (data, lack), kernels in missing.items()]
    if len(times) < timed:
        lines.append(f"the time of a step with the GPU alone: {timed - len(times)} of {timed} jobs")
    earlier = [
        f"{data} {kernel} {option}: {_cell(runs)}"
        for (data, kernel, option), runs in finals.items()
        if (data, kernel, option) not in told
    ]
    header = ("data", "kernel", "parameters", "reference's options", "chosen options", "with them", "ms a step, alone")
    published = (
        "data",
        "points, measured",
        "short fixed, measured",
        *(f"{name}, published" for name in (*THEIRS, "others")),
    )
    lists = [
        ("Not run:", lines),
        ("Run on test data with options that were chosen before others were added:", earlier),
    ]
    return "\n".join(
        [
            markdown_table(header, rows, right=(2, 3, 5, 6)),
            markdown_table(published, beside, right=(1, 2, 3, 4, 5)),
            *("\n".join([title, "", *(f"- {entry}" for entry in entries), ""]) for title, entries in lists if entries),
        ]
    )


def _cell(runs: Sequence[dict[str, Any]]) -> str:
    """Mean and deviation of the test accuracy, and of how many seeds."""
    if not runs:
        return ""
    figures = [run["test"]["top1"] for run in runs]
    spread = f" ± {statistics.stdev(figures):.2f}" if len(figures) > 1 else ""
    return f"{statistics.fmean(figures):.2f}{spread} ({len(figures)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="GLOB", help="jobs that match, as 'final gunpoint *'"
    )
    parser.add_argument("--log", type=Path, default=Path("runs/study.jsonl"))
    parser.add_argument(
        "--weights", type=Path, help="folder for the weights of seed 0, kernels of points, chosen options"
    )
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start no job after so long")
    parser.add_argument("--epochs", type=int, help="instead of each job's own, to try things out")
    parser.add_argument("--list", action="store_true", help="print the jobs and stop")
    parser.add_argument("--summary", action="store_true", help="print the figures of the log and stop")
    parser.add_argument("--markdown", action="store_true", help="print the tables of docs/study.md and stop")
    args = parser.parse_args()
    if args.list:
        sys.stdout.write("".join(f"{job.name}\n" for job in jobs() if _wanted(job, args.only)))
    elif args.summary:
        sys.stdout.write(summary(read_log(args.log)) + "\n")
    elif args.markdown:
        sys.stdout.write(markdown(read_log(args.log)))
    else:
        sys.exit(1 if work(args) else 0)


if __name__ == "__main__":
    main()
