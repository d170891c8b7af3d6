"""What the logs of the repository hold, read for the report. Paths are those of a clone: ``eval/results/...``."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smpconv_zoo.evaluation.resolution import ResolutionResult
from smpconv_zoo.pretrained.cards import weights_dir

__all__ = [
    "Curve",
    "Record",
    "Study",
    "StudyRun",
    "Summary",
    "TrainingLog",
    "find_clone",
    "read_record",
    "read_resolution",
    "read_search",
    "read_study",
    "read_training",
    "summarize",
]

RESULTS = "eval/results"

Curve = tuple[tuple[float, float], ...]


def find_clone(folder: Path | None = None) -> Path:
    """The clone of the repository whose logs are to be shown.

    Args:
        folder: Where it lies; where this package lies if None.

    Raises:
        FileNotFoundError: There are no logs; the message says what to do.
    """
    root = weights_dir().parent if folder is None else folder
    if not (root / RESULTS).is_dir():
        raise FileNotFoundError(
            f"{root} has no {RESULTS}: the logs are in the repository, not in the installed package; name a clone of "
            "it with --repository"
        )
    return root.resolve()


@dataclasses.dataclass(frozen=True)
class TrainingLog:
    """A finished run: its command and hardware, and of every epoch the loss and the seconds, from epoch 1 on."""

    command: str
    hardware: str
    recipe: dict[str, Any]
    losses: tuple[float, ...]
    seconds: tuple[float, ...]

    @property
    def typical_seconds(self) -> float:
        """Of an epoch, the median: the first one also compiles and captures."""
        return statistics.median(self.seconds)


def read_training(path: Path) -> TrainingLog | None:
    """The log of a run as ``smpconv-zoo train --final`` leaves it; None for a log of another form.

    Raises:
        OSError: It cannot be read.
        ValueError: A line of a ``.jsonl`` file is not a JSON object.
    """
    header, *lines = _json_lines(path) if path.suffix == ".jsonl" else [{}]
    epochs = [line for line in lines if {"epoch", "train_loss", "seconds"} <= line.keys()]
    if not epochs or not {"command", "hardware", "recipe"} <= header.keys():
        return None
    return TrainingLog(
        header["command"],
        header["hardware"],
        header["recipe"],
        tuple(float(line["train_loss"]) for line in epochs),
        tuple(float(line["seconds"]) for line in epochs),
    )


def read_search(path: Path) -> tuple[list[str], list[tuple[dict[str, Any], Curve]]]:
    """The log of ``eval/search_mnist5k.py``: its commands, and of every candidate the recipe and validation top-1."""
    commands: list[str] = []
    candidates: list[tuple[dict[str, Any], list[tuple[float, float]]]] = []
    for line in _json_lines(path):
        if "command" in line:
            commands.append(line["command"])
        elif "candidate" in line:
            candidates.append((line["recipe"], []))
        elif line.get("validation_top1") is not None:
            candidates[-1][1].append((line["epoch"], line["validation_top1"]))
    return commands, [(recipe, tuple(curve)) for recipe, curve in candidates]


def read_resolution(path: Path) -> tuple[str, list[ResolutionResult]]:
    """The log of ``eval/resolution.py``: its command and its results."""
    header, *lines = _json_lines(path)
    return header["command"], [ResolutionResult(**line) for line in lines]


@dataclasses.dataclass(frozen=True)
class Record:
    """What ``smpconv-zoo bench`` wrote: command, hardware, and the results as they stand there."""

    path: str
    command: str
    hardware: str
    results: tuple[dict[str, Any], ...]


def read_record(root: Path, name: str) -> Record | None:
    """A record of a benchmark in the clone at ``root``; None where it is not there."""
    path = root / RESULTS / name
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    return Record(
        f"{RESULTS}/{name}",
        content["command"],
        content["hardware"],
        tuple(content["results"]),
    )


@dataclasses.dataclass(frozen=True)
class StudyRun:
    """One training run of the study.

    ``data`` names what was learned, ``variant`` the kind of kernel (``points``, ``grid``, ``mlp``, ...). ``dropped`` is
    the percentage of samples left out of every sequence. ``validation`` and ``test`` are top-1 in percent, ``step_ms``
    the milliseconds of a training step, ``curve`` the validation top-1 of epochs (epoch, percent). What a run has not
    is None, or empty.
    """

    data: str
    variant: str
    seed: int = 0
    dropped: float = 0.0
    validation: float | None = None
    test: float | None = None
    parameters: int | None = None
    step_ms: float | None = None
    curve: Curve = ()


@dataclasses.dataclass(frozen=True)
class Study:
    """The runs of a study, in the order of the file, and the commands that made it."""

    commands: tuple[str, ...]
    runs: tuple[StudyRun, ...]


def read_study(path: Path) -> Study | None:
    """The study of kernels, ``eval/results/study.jsonl``; None where there is no such file.

    A line is a JSON object. One with ``data`` and ``variant`` is a run, see :class:`StudyRun`: its other keys are
    ``seed``, ``dropped``, ``validation``, ``test``, ``parameters``, ``step_ms`` and ``curve``, any of which may be
    missing or null. ``curve`` is a list of percentages, one an epoch, or of pairs (epoch, percentage). A ``command``
    in any line is kept. Other keys and lines are passed over.

    Raises:
        ValueError: A line is not a JSON object, or a value is not of its kind; the message names the line.
    """
    if not path.is_file():
        return None
    commands: list[str] = []
    runs: list[StudyRun] = []
    for number, line in enumerate(_json_lines(path), 1):
        try:
            if "command" in line and str(line["command"]) not in commands:
                commands.append(str(line["command"]))
            if "data" in line and "variant" in line:
                runs.append(_study_run(line))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path.name}, line {number}: {error}") from error
    return Study(tuple(commands), tuple(runs)) if runs else None


def _study_run(line: dict[str, Any]) -> StudyRun:
    points = [point if isinstance(point, list) else [i, point] for i, point in enumerate(line.get("curve") or [], 1)]
    parameters = _number(line, "parameters")
    return StudyRun(
        data=str(line["data"]),
        variant=str(line["variant"]),
        seed=int(_number(line, "seed") or 0),
        dropped=_number(line, "dropped") or 0.0,
        validation=_number(line, "validation"),
        test=_number(line, "test"),
        parameters=None if parameters is None else int(parameters),
        step_ms=_number(line, "step_ms"),
        curve=tuple((float(epoch), float(value)) for epoch, value in points if value is not None),
    )


def _number(line: dict[str, Any], key: str) -> float | None:
    value = line.get(key)
    if value is None:
        return None
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{key} is {value}")
    return number


@dataclasses.dataclass(frozen=True)
class Summary:
    """Mean of some values, their standard deviation (of the sample; 0 of one alone), and how many there are."""

    mean: float
    deviation: float
    count: int


def summarize(values: Sequence[float]) -> Summary:
    """Mean, standard deviation and number of at least one value."""
    return Summary(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))


def _json_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name}, line {number} is not JSON: {error}") from error
        if not isinstance(line, dict):
            raise ValueError(f"{path.name}, line {number} is not a JSON object")
        lines.append(line)
    return lines
