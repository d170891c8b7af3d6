"""Many GPUs of one host, measured: speed, equal training, a killed process, exact accuracy.

python eval/scaling.py --device cuda --out eval/results/scaling_h200.json
python eval/scaling.py --device cpu --counts 1,2,4 --parts equal,kill,eval --out eval/results/scaling_cpu.json

Each part starts what a user starts: `smpconv-zoo train` and `eval/imagenet.py` under torchrun. On CPUs all of it runs
with gloo, on a tiny network: that shows that training is equal, and nothing of speed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from smpconv_zoo.benchmarks.scaling import Speed, SpeedCase, measure_speed
from smpconv_zoo.console import run_script
from smpconv_zoo.data.stand_in import write_stand_in
from smpconv_zoo.environment import hardware, versions
from smpconv_zoo.evaluation.tables import markdown_table
from smpconv_zoo.files import write_whole
from smpconv_zoo.training.run_folder import command_line
from smpconv_zoo.training.world import join_world

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("equal", "kill", "eval", "speed", "control")
USUAL = "equal,kill,eval,speed"
# Largest relative differences of two loss curves, by the dtype of the training: of each of the first three steps, and
# of the means over ten steps at a time. Processes sum in another order, and in bfloat16 each rounds its part of a
# gradient to 8 bits. Adam and batch norms amplify that, about tenfold a step at a rate of 5e-4, until curves differ by
# as much as those of one process that computes in another layout, which the part "control" shows: up to 4e-3 for the
# tiny network.
TOLERANCE_AT_FIRST = {"float32": 1e-5, "bfloat16": 2e-3}
TOLERANCE = {"float32": 1e-2, "bfloat16": 2e-2}
RATE = 1e-4
FIRST = 3
WINDOW = 10
# Epochs of equal training; the rate rises during the first one.
EPOCHS = 5
# What runs when the budget is spent is ended so many seconds later; what gives no sign for a while is ended, too, and
# on CPUs tried again: gloo's processes may miss each other, or wait for each other for ever, on a busy machine.
GRACE = 45
SILENCE = {"cuda": 150, "cpu": 60}
ATTEMPTS = {"cuda": 1, "cpu": 4}
RESTARTS = {"cuda": 2, "cpu": 20}
# A run to time that failed so often is left out, and the next one begun.
TRIES = {"cuda": 1, "cpu": 3}
EXAMPLE = "Example: `python eval/scaling.py --device cuda --counts 1,2,4,8 --out scaling.json`"
app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)


@dataclasses.dataclass(frozen=True)
class Size:
    """What is trained: networks and pictures, by where it runs."""

    networks: tuple[str, ...]
    arguments: dict[str, Any]
    image_size: int
    channels_last: bool
    classes: int
    per_class: int
    picture: tuple[int, int]
    batch: int  # of equal training, over all processes
    file_batch: int  # of training on files, over all processes
    warmup: int
    workers: int  # that read, for each process, at most


SIZES = {
    "cuda": Size(("smpconv_t", "smpconv_b"), {}, 224, True, 101, 20, (500, 375), 256, 256, 6, 16),
    "cpu": Size(
        ("smpconv_t",),
        {"kernel_sizes": [13, 11, 9, 7], "depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32], "num_classes": 10},
        64,
        False,
        11,
        16,
        (80, 72),
        32,
        16,
        2,
        1,
    ),
}


class StageError(RuntimeError):
    """Something that was started failed; the message is its last word."""


@app.command(epilog=EXAMPLE, context_settings={"help_option_names": ["-h", "--help"]})
def main(
    out: Annotated[Path, typer.Option(help="JSON file to write, and a text beside it, after every figure.")],
    device: Annotated[str, typer.Option(help="cuda, or cpu: gloo processes and a tiny network.")] = "cuda",
    counts: Annotated[str, typer.Option(help="Numbers of processes; of GPUs, those that are there.")] = "1,2,4,8",
    parts: Annotated[str, typer.Option(help=f"Which of {', '.join(PARTS)}, in what order.")] = USUAL,
    budget: Annotated[float, typer.Option(min=0, help="Seconds after which nothing new is started.")] = 540,
    batch: Annotated[int, typer.Option(min=2, help="Speed: pictures of a step on each process.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Speed: steps that are timed.")] = 12,
    equal_steps: Annotated[int, typer.Option(min=50, help="Steps of equal training.")] = 200,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; if not given bfloat16 on GPUs.")] = None,
    work: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Keep runs, logs and pictures there; it must be new.")
    ] = None,
    worker: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure training and evaluation on one GPU and on several of a host.

    With the largest number of processes first, then with the others as the budget allows. What was measured is in the
    file however the script ends. Exit status 1 if something failed or was not equal.
    """
    if worker is not None:
        _measure_speeds(worker)
        return
    chosen = _chosen(device, counts, parts, dtype)
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent} is no folder: make it first")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with _folder(work) as folder:
        study = Study(chosen, folder, Log(out, chosen), budget, batch, steps, equal_steps)
        study.run()
    typer.echo(study.log.text())
    if not study.log.well():
        raise typer.Exit(1)


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What the user asked for."""

    device: str
    counts: tuple[int, ...]
    parts: tuple[str, ...]
    dtype: str

    @property
    def size(self) -> Size:
        return SIZES[self.device]


def _chosen(device: str, counts: str, parts: str, dtype: str | None) -> Chosen:
    if device not in SIZES:
        raise typer.BadParameter(f"--device is one of {', '.join(SIZES)}, got {device!r}")
    named = tuple(re.split(r"[,\s]+", parts.strip()))
    if unknown := [part for part in named if part not in PARTS]:
        raise typer.BadParameter(f"--parts are of {', '.join(PARTS)}, got {unknown[0]!r}")
    numbers = re.split(r"[,\s]+", counts.strip())
    if not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise typer.BadParameter(f"--counts are numbers such as 1,2,4, got {counts!r}")
    there = torch.cuda.device_count() if device == "cuda" else sys.maxsize
    usable = tuple(sorted({int(number) for number in numbers if int(number) <= there}))
    if not usable:
        raise ValueError(f"this host has {there} GPUs, --counts {counts} asks for more: name a smaller number")
    dtype = dtype or ("bfloat16" if device == "cuda" else "float32")
    if dtype not in TOLERANCE:
        raise typer.BadParameter(f"--dtype is one of {', '.join(TOLERANCE)}, got {dtype!r}")
    return Chosen(device, usable, named, dtype)


@contextlib.contextmanager
def _folder(work: Path | None) -> Iterator[Path]:
    if work is not None:
        work.mkdir(parents=True)
        yield work
        return
    with tempfile.TemporaryDirectory(prefix="scaling.", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


class Log:
    """The figures so far, in a JSON file and a text beside it."""

    def __init__(self, path: Path, chosen: Chosen) -> None:
        self.path = path
        self.chosen = chosen
        self.start = time.monotonic()
        self.figures: list[dict[str, Any]] = []
        self.head = {
            "command": command_line(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "device": chosen.device,
            "hardware": hardware(chosen.device),
            "versions": versions(),
            "dtype": chosen.dtype,
            "networks": {name: chosen.size.arguments for name in chosen.size.networks},
            "image_size": chosen.size.image_size,
        }

    def add(self, figure: dict[str, Any], replaces: dict[str, Any] | None = None) -> dict[str, Any]:
        """Write a figure; ``replaces`` is an earlier form of it."""
        self.figures = [other for other in self.figures if other is not replaces] + [figure]
        entries = {**self.head, "seconds": round(time.monotonic() - self.start, 1), "figures": self.figures}
        write_whole(self.path, (json.dumps(entries, indent=1) + "\n").encode())
        write_whole(self.path.with_suffix(".txt"), self.text().encode())
        return figure

    def of(self, part: str) -> list[dict[str, Any]]:
        return [figure for figure in self.figures if figure["part"] == part and "failed" not in figure]

    def well(self) -> bool:
        """Whether nothing failed and all was equal."""
        return all(figure.get("holds", True) and "failed" not in figure for figure in self.figures)

    def text(self) -> str:
        processes = "GPUs" if self.chosen.device == "cuda" else "CPU processes (gloo, a tiny network)"
        made = ", ".join(f"{name} {version}" for name, version in self.head["versions"].items())
        lines = [f"$ {self.head['command']}", f"# {self.head['hardware']}, {made}; {self.head['started'][:10]}", ""]
        for figure in self.of("control"):
            lines.append(f"control, 1 process in the other layout: {_differences(figure, 'last_alone')}")
        for figure in self.of("equal"):
            lines.append(
                f"equal training, {figure['processes']} {processes} with {figure['batch_per_process']} pictures each "
                f"against 1 with {figure['batch_size']}, shared batch norms, {figure['steps']} steps in "
                f"{figure['dtype']}: {_differences(figure, 'last_alone')}{_verdict(figure)}"
            )
        for figure in self.of("kill"):
            lines.append(
                f"process {figure['killed']} of {figure['processes']} {processes} killed after step "
                f"{figure['killed_after']} of {figure['steps']}: started again by torchrun, went on after step "
                f"{figure['resumed_after']}; against the unbroken run {_differences(figure, 'last_unbroken')}"
                f"{_verdict(figure)}"
            )
        for figure in self.of("eval"):
            lines.append(
                f"eval/imagenet.py, {figure['processes']} {processes}: {figure['correct']} of {figure['total']} "
                f"pictures right, {figure['correct5']} among five{_verdict(figure)}"
            )
        speeds = self.of("speed")
        if speeds and self.chosen.device == "cuda":
            lines += ["", *self._table(speeds)]
        elif speeds:
            lines.append(f"{len(speeds)} timed runs went through; their times on {processes} say nothing of GPUs")
        for figure in self.figures:
            if "failed" in figure:
                lines.append(f"FAILED: {figure['part']}, {figure['processes']} {processes}: {figure['failed']}")
        for figure in self.of("left out"):
            lines.append(f"left out, the budget was spent: {', '.join(figure['jobs'])}")
        return "\n".join([*lines, "", f"in {time.monotonic() - self.start:.0f} s", ""])

    @staticmethod
    def _table(speeds: list[dict[str, Any]]) -> list[str]:
        alone = {
            (speed["network"], speed["pictures"]): speed["images_per_second"]
            for speed in speeds
            if speed["processes"] == 1
        }
        header = ("network", "pictures", "shared norms", "GPUs", "images/s", "efficiency", "exchange", "NCCL", "GiB")
        cells = []
        for speed in sorted(speeds, key=lambda s: (s["network"], s["pictures"], s["sync_batch_norm"], s["processes"])):
            one = alone.get((speed["network"], speed["pictures"]))
            rate, processes = speed["images_per_second"], speed["processes"]
            cells.append(
                (
                    speed["network"],
                    speed["pictures"],
                    "yes" if speed["sync_batch_norm"] else "no",
                    str(processes),
                    f"{rate:,.0f}",
                    "" if one is None else f"{100 * rate / one / processes:.1f} %",
                    _percent(speed["exchange_share"]),
                    _percent(speed["nccl_share"]),
                    "" if speed["peak_gib"] is None else f"{speed['peak_gib']:.1f}",
                )
            )
        first = speeds[0]
        return [
            markdown_table(header, cells, right=range(3, len(header))),
            f"{first['batch_per_process']} pictures on each GPU, {first['dtype']}, mean of {first['steps']} steps; "
            "efficiency against one GPU without shared norms; exchange: what a step is shorter by without the exchange "
            "of gradients (no_sync); NCCL: share of a traced step in which an NCCL kernel ran, hidden or not",
        ]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _differences(figure: dict[str, Any], other: str) -> str:
    return (
        f"losses of the first {FIRST} steps differ by at most {figure['deviation_at_first']:.1e} of them (allowed "
        f"{figure['tolerance_at_first']:.0e}), means of {WINDOW} steps by {figure['deviation']:.1e} (allowed "
        f"{figure['tolerance']:.0e}); at the end {figure['last']:.5f} and {figure[other]:.5f}"
    )


def _verdict(figure: dict[str, Any]) -> str:
    return "" if figure.get("holds", True) else "  <- NOT EQUAL"


class Study:
    """Does the parts, one job after another."""

    def __init__(
        self, chosen: Chosen, folder: Path, log: Log, budget: float, batch: int, steps: int, equal_steps: int
    ) -> None:
        self.chosen = chosen
        self.size = chosen.size
        self.folder = folder
        self.log = log
        self.until = time.monotonic() + budget
        self.batch = batch
        self.steps = steps
        # Whole epochs.
        self.equal_steps = equal_steps // EPOCHS * EPOCHS
        self.pictures: Path | None = None
        self.trained: Path | None = None

    def run(self) -> None:
        left_out = []
        for part, count in self.jobs():
            if time.monotonic() > self.until:
                left_out.append(f"{part} with {count}")
                continue
            typer.echo(f"{time.monotonic() - self.log.start:5.0f} s  {part}, {count} processes", err=True)
            try:
                getattr(self, part)(count)
            except (StageError, OSError, ValueError, KeyError) as error:
                self.log.add({"part": part, "processes": count, "failed": str(error) or type(error).__name__})
        self.log.add({"part": "left out", "jobs": left_out} if left_out else {"part": "all done"})

    def jobs(self) -> list[tuple[str, int]]:
        """Part and number of processes: with the most first, and what that is compared with."""
        counts, most = self.chosen.counts, self.chosen.counts[-1]
        ends = tuple(dict.fromkeys((counts[0], most)))
        jobs = []
        for part in self.chosen.parts:
            first = {"eval": ends, "speed": ends, "control": (1,)}.get(part, (most,))
            # Equal training is that of one process and of several.
            jobs += [(part, count) for count in first if count > 1 or part != "equal"]
        rest = [count for count in reversed(counts) if count not in ends]
        # The curve of speeds says more than more of the same answers.
        for part in sorted(self.chosen.parts, key=lambda part: part != "speed"):
            jobs += [(part, count) for count in rest if part not in ("kill", "control")]
        return jobs

    def equal(self, count: int) -> None:
        one, several = (self._losses(self._equal_run(processes)) for processes in (1, count))
        self.log.add(
            {
                "part": "equal",
                "processes": count,
                "batch_size": self.size.batch,
                "batch_per_process": self.size.batch // count,
                **self._compared(several, one, "last_alone"),
            }
        )

    def control(self, count: int) -> None:
        """What rounding alone does: one process that computes in the other layout."""
        one = self._losses(self._equal_run(1))
        other = self._train("control", count, None, "--set", f"channels_last={json.dumps(not self.size.channels_last)}")
        compared = self._compared(self._losses(other), one, "last_alone")
        del compared["holds"]  # a yardstick, not a test
        self.log.add({"part": "control", "processes": count, **compared})

    def kill(self, count: int) -> None:
        """A process is killed from outside, well after a checkpoint; torchrun starts all of them again."""
        unbroken = self._losses(self._equal_run(count))
        after, every = int(0.55 * self.equal_steps), max(1, self.equal_steps // 8)
        metrics = self.folder / f"killed-{count}" / "metrics.jsonl"
        killed: dict[int, int] = {}  # by attempt

        def look(torchrun: int) -> None:
            if torchrun not in killed and (update := _last_update(metrics)) >= after and update % every:
                for pid in _children(torchrun):
                    if _variable(pid, "RANK") == str(count - 1):
                        os.kill(pid, signal.SIGKILL)
                        killed[torchrun] = update

        folder = self._train(f"killed-{count}", count, look, "--save-every", every)
        resumed = re.findall(r"goes on after step (\d+)", (self.folder / f"killed-{count}.log").read_text())
        starts = json.loads((folder / "environment.json").read_text())
        if not killed or len(starts) < 2:
            raise StageError(f"the run was over before a process was killed: {len(starts)} start(s)")
        compared = self._compared(self._losses(folder), unbroken, "last_unbroken")
        *_, update = killed.values()
        went_on = bool(resumed) and 0 < int(resumed[-1]) <= update + 1
        self.log.add(
            {
                "part": "kill",
                "processes": count,
                "killed": count,
                "killed_after": update,
                "resumed_after": int(resumed[-1]) if resumed else None,
                "starts": len(starts),
                **compared,
                "holds": compared["holds"] and went_on,
            }
        )

    def _equal_run(self, count: int) -> Path:
        done = self.folder / f"equal-{count}"
        return done if (done / "last.safetensors").is_file() else self._train(f"equal-{count}", count)

    def _train(self, name: str, count: int, look: Callable[[int], None] | None = None, *options: object) -> Path:
        batch = self.size.batch
        if batch % count:
            raise ValueError(f"a batch of {batch} cannot be shared evenly by {count} processes")
        values = {
            "data": "synthetic",
            "num_samples": batch * self.equal_steps // EPOCHS,
            "batch_size": batch,
            "epochs": EPOCHS,
            "arguments": {"drop_path_rate": 0.0, **self.size.arguments},  # what is dropped is drawn by each process
            "sync_batch_norm": True,
            "dtype": self.chosen.dtype,
        }
        self._smpconv_zoo(name, count, values, look, "--log-every", 1, *options)
        return self.folder / name

    def _losses(self, folder: Path) -> list[float]:
        """Of every step; the log has the mean over those of the epoch so far."""
        losses: list[float] = []
        done, total = 0, 0.0
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            entry = json.loads(line)
            done += 1
            losses.append(done * entry["train_loss"] - total)
            total += losses[-1]
            if entry["kind"] == "epoch":
                done, total = 0, 0.0
            if entry["update"] != len(losses):
                raise StageError(f"{folder.name} logged step {entry['update']} as its line {len(losses)}")
        if len(losses) != self.equal_steps:
            raise StageError(f"{folder.name} took {len(losses)} steps, not {self.equal_steps}")
        return losses

    def _compared(self, ours: list[float], other: list[float], name: str) -> dict[str, Any]:
        a, b = (torch.tensor(losses).unfold(0, WINDOW, WINDOW).mean(1) for losses in (ours, other))
        dtype, deviation = self.chosen.dtype, float(((a - b).abs() / b).max())
        at_first = max(abs(x - y) / y for x, y in zip(ours[:FIRST], other, strict=False))
        return {
            "steps": len(ours),
            "dtype": dtype,
            "first": round(ours[0], 6),
            "last": round(float(a[-1]), 6),
            name: round(float(b[-1]), 6),
            "deviation_at_first": at_first,
            "tolerance_at_first": TOLERANCE_AT_FIRST[dtype],
            "deviation": deviation,
            "tolerance": TOLERANCE[dtype],
            "holds": at_first <= TOLERANCE_AT_FIRST[dtype] and deviation <= TOLERANCE[dtype],
            "losses": [round(float(loss), 5) for loss in a],
            "losses_compared_with": [round(float(loss), 5) for loss in b],
        }

    def eval(self, count: int) -> None:
        if self.trained is None:
            self._smpconv_zoo(
                "evaluated",
                self.chosen.counts[0],
                {
                    "data": "pictures",
                    "batch_size": self.size.file_batch,
                    # Soon, so that some pictures are right and others are not.
                    "epochs": 10,
                    "lr": 2e-3,
                    "auto_augment": None,
                    "color_jitter": 0.0,
                    "erasing": 0.0,
                    "scale": [0.6, 1.0],
                    "arguments": {**self.size.arguments, "num_classes": self.size.classes},
                    "dtype": self.chosen.dtype,
                },
                None,
                *("--data-dir", self._pictures(), "--workers", self._workers(self.chosen.counts[0])),
            )
            self.trained = self.folder / "evaluated"
        answer = self.folder / f"evaluated-by-{count}.json"
        script = [str(ROOT / "eval" / "imagenet.py"), str(self.trained), "--data-dir", str(self._pictures())]
        options = ["--data-set", "pictures", "--device", self.chosen.device, "--workers", str(self._workers(count))]
        self._launch(answer.stem, count, [*script, *options, "--batch-size", "32", "--out", str(answer)])
        (result,) = json.loads(answer.read_text())
        figure = {name: result[name] for name in ("processes", "total", "correct", "correct5", "top1", "top5")}
        alone = next((other for other in self.log.of("eval") if other["processes"] == self.chosen.counts[0]), figure)
        same = all(figure[name] == alone[name] for name in figure if name != "processes")
        holds = same and result["processes"] == count and figure["total"] == self._validation()
        self.log.add({"part": "eval", **figure, "holds": holds})

    def _validation(self) -> int:
        """Pictures to validate on: a number that no number of processes divides."""
        numbers = (self.size.classes * per_class for per_class in range(5, 100))
        shared = [count for count in self.chosen.counts if count > 1]
        for total in numbers:
            if all(total % count for count in shared):
                return total
        raise ValueError(f"{shared} processes share any pictures of {self.size.classes} classes evenly: other --counts")

    def _pictures(self) -> Path:
        if self.pictures is None:
            size, threads = self.size, min(32, len(os.sched_getaffinity(0)))
            per_class = self._validation() // size.classes
            place = self.folder / "pictures"
            write_stand_in(
                place, size.classes, size.per_class, size.picture, validation_per_class=per_class, workers=threads
            )
            self.pictures = place
        return self.pictures

    def speed(self, count: int) -> None:
        cases, files = self._cases(count), None
        try:
            files = self._many_pictures()
        except OSError as error:
            self.log.add({"part": "speed", "processes": count, "failed": f"no pictures in files: {error}"})
        answers = self.folder / f"speed-{count}"
        answers.mkdir()
        plan = {
            "device": self.chosen.device,
            "cases": [dataclasses.asdict(case) for case in cases],
            "files": None if files is None else str(files),
            "workers": self._workers(count),
            "until": time.time() + self.until - time.monotonic(),
            "answers": str(answers),
        }
        place = answers / "plan.json"
        write_whole(place, json.dumps(plan).encode())
        known: dict[int, dict[str, Any]] = {}

        def look(torchrun: int) -> None:
            for number, case in enumerate(cases):
                answer = answers / f"{number}.json"
                if not answer.is_file():
                    continue
                what = {k: v for k, v in dataclasses.asdict(case).items() if k != "arguments"}
                figure = {"part": "speed", **what, **json.loads(answer.read_text())}
                if figure != known.get(number):
                    known[number] = self.log.add(figure, known.get(number))

        script = [str(ROOT / "eval" / "scaling.py"), "--out", os.devnull, "--worker", str(place)]
        try:
            self._launch(answers.name, count, script, look)
        finally:
            look(0)
        for number, case in enumerate(cases):
            if number not in known and (answers / f"{number}.begun").is_file():
                what = f"{case.network}, {case.pictures}, sync_batch_norm={case.sync_batch_norm}"
                said = _last_word((self.folder / f"{answers.name}.log").read_text(errors="replace"))
                self.log.add({"part": "speed", "processes": count, "failed": f"{what}: {said}"})

    def _cases(self, count: int) -> list[SpeedCase]:
        """What is timed, the quick first; of files without shared norms alone."""
        size, cases = self.size, []
        readers = 2 * self._workers(count)  # each holds two batches
        for pictures in ("synthetic", "files"):
            for network in size.networks:
                for shared in (False, True) if count > 1 and pictures == "synthetic" else (False,):
                    case = SpeedCase(
                        network,
                        pictures,
                        shared,
                        self.batch,
                        self.chosen.dtype,
                        size.channels_last,
                        self.steps,
                        size.warmup if pictures == "synthetic" else max(size.warmup, readers),
                        size.image_size,
                        {**size.arguments, **({} if pictures == "synthetic" else {"num_classes": size.classes})},
                    )
                    cases.append(case)
        return cases

    def _many_pictures(self) -> Path:
        """The pictures under many names each, enough for the steps of the most processes."""
        place = self.folder / "many"
        if not place.is_dir():
            needed = max(
                count * self.batch * (case.warmup + 2 * case.steps + 8)
                for count in self.chosen.counts
                for case in self._cases(count)
            )
            train = self._pictures() / "train"
            copies = -(-needed // (self.size.classes * self.size.per_class))
            for source in sorted(train.rglob("*.JPEG")):
                folder = place / "train" / source.parent.name
                folder.mkdir(parents=True, exist_ok=True)
                for copy in range(copies):
                    os.link(source, folder / f"{source.stem}_{copy}.JPEG")
            # Without a validation part a tenth would be held out.
            (place / "val").symlink_to(self._pictures() / "val")
        return place

    def _workers(self, count: int) -> int:
        return max(1, min(self.size.workers, len(os.sched_getaffinity(0)) // count))

    def _smpconv_zoo(
        self, name: str, count: int, values: dict[str, Any], look: Callable[[int], None] | None, *options: object
    ) -> None:
        """`smpconv-zoo train` with values of the recipe; the run is the folder ``name``."""
        common = {
            "protocol": "sound",
            "micro_batches": 1,
            "warmup_epochs": 1,
            "lr": RATE,
            "ema_decay": None,
            "mixup": 0.0,
            "cutmix": 0.0,
            "image_size": self.size.image_size,
            "channels_last": self.size.channels_last,
        }
        # What is JSON is YAML.
        sets = [word for key, value in {**common, **values}.items() for word in ("--set", f"{key}={json.dumps(value)}")]
        program = ["-m", "smpconv_zoo", "train", "smpconv_t.in1k", "--device", self.chosen.device]
        self._launch(name, count, [*program, "--out", str(self.folder / name), *sets, *map(str, options)], look)

    def _launch(self, name: str, count: int, program: list[str], look: Callable[[int], None] | None = None) -> None:
        """Run a program by torchrun, its output in ``NAME.log``.

        Raises:
            StageError: It failed, or did not end in time.
        """
        for attempt in range(1, ATTEMPTS[self.chosen.device] + 1):
            try:
                return self._attempt(name, count, program, look)
            except StageError as error:
                if attempt == ATTEMPTS[self.chosen.device] or time.monotonic() > self.until:
                    raise
                typer.echo(f"         {name} failed ({error}): tried again", err=True)
                if (self.folder / name / "args.yaml").is_file():
                    shutil.rmtree(self.folder / name)

    def _attempt(self, name: str, count: int, program: list[str], look: Callable[[int], None] | None) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        # Those that wait for a dead one on a GPU hear no SIGTERM: they are not waited for as long as by default.
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": paths, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}
        if self.chosen.device == "cpu":
            environment["OMP_NUM_THREADS"] = "1"
        place = self.folder / f"{name}.log"
        restarts = f"--max-restarts={RESTARTS[self.chosen.device]}"
        with place.open("w") as output:
            process = subprocess.Popen(
                [*command, restarts, *program], env=environment, stdout=output, stderr=subprocess.STDOUT
            )
            started = time.time()
            try:
                while process.poll() is None:
                    if look is not None:
                        look(process.pid)
                    if time.monotonic() > self.until + GRACE:
                        raise StageError(f"not over {GRACE} s after the budget was spent")
                    if time.time() - max(started, self._last_sign(name)) > SILENCE[self.chosen.device]:
                        raise StageError(f"no sign of it for {SILENCE[self.chosen.device]} s")
                    time.sleep(0.02)
            finally:
                _end(process)
        if process.returncode:
            raise StageError(_last_word(place.read_text(errors="replace")) or f"exit status {process.returncode}")

    def _last_sign(self, name: str) -> float:
        """When something last wrote to the log or the folder of what runs."""
        times = [0.0]
        for path in (self.folder / f"{name}.log", *(self.folder / name).glob("*")):
            with contextlib.suppress(OSError):
                times.append(path.stat().st_mtime)
        return max(times)


def _measure_speeds(place: Path) -> None:
    """The cases of a plan, in this process of torchrun's; an answer to a file."""
    plan = json.loads(place.read_text())
    device = plan["device"]
    with join_world(device, timedelta(seconds=60) if device == "cpu" else None) as world:
        for number, entries in enumerate(plan["cases"]):
            case = SpeedCase(**entries)
            if case.pictures == "files" and plan["files"] is None:
                continue
            answer = Path(plan["answers"], f"{number}.json")
            begun = answer.with_suffix(".begun")
            tries = len(begun.read_text()) if world.leads and begun.is_file() else 0
            if world.shared(time.time() > plan["until"] or answer.is_file() or tries == TRIES[device]):
                continue
            if world.leads:
                begun.write_text("+" * (tries + 1))

            def tell(speed: Speed, answer: Path = answer) -> None:
                if world.leads:
                    write_whole(answer, json.dumps(dataclasses.asdict(speed)).encode())

            measure_speed(case, world, plan["files"], workers=plan["workers"], on_speed=tell)


def _last_update(metrics: Path) -> int:
    """The last optimizer step of a log that is being written; 0 if there is none."""
    with contextlib.suppress(OSError, ValueError, IndexError, KeyError):
        return int(json.loads(metrics.read_text().splitlines()[-1])["update"])
    return 0


def _children(pid: int) -> list[int]:
    """Processes that a process started, on Linux."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name in brackets may hold anything.
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def _variable(pid: int, name: str) -> str | None:
    """A variable of the environment in which a process was started."""
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if entry.startswith(f"{name}=".encode()):
                return entry.partition(b"=")[2].decode()
    return None


def _end(torchrun: subprocess.Popen[bytes]) -> None:
    """End torchrun and what it started, if it runs still."""
    if torchrun.poll() is not None:
        return
    workers = _children(torchrun.pid)
    torchrun.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        torchrun.wait(15)
    for pid in (*workers, torchrun.pid) if torchrun.poll() is None else ():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    torchrun.wait()


def _last_word(output: str) -> str:
    """The line of an output that says what went wrong."""
    said = [line for line in output.splitlines() if re.search(r"(Error|Exception|smpconv-zoo|imagenet\.py): ", line)]
    said = [line for line in said if "ChildFailedError" not in line]
    return " ".join(said[-1].split())[:300] if said else ""


if __name__ == "__main__":
    run_script("scaling.py", app)
