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
    """The log of a run as ``smpconv-zoo train --final`` leaves it; None for a log of another form, or none at all.

    Raises:
        OSError: It cannot be read.
        ValueError: A line of a ``.jsonl`` file is not a JSON object.
    """
    header, *lines = _json_lines(path) if path.suffix == ".jsonl" and path.is_file() else [{}]
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
    """One run of the study.

    ``stage`` is ``choose`` (measured on a part of the training data), ``final`` (on the test part, once) or ``time``.
    ``data`` names what was learned, without the percentage ``dropped`` of samples left out; ``kernel`` is the kind of
    kernel, ``option`` its settings, empty for the reference's. ``validation`` and ``test`` are top-1 in percent,
    ``loss`` is that of the validation, ``step_ms`` the milliseconds of a training step, with nothing else running if
    ``alone``; ``curve`` is the validation top-1 of epochs. What a run has not is None, or empty.
    """

    stage: str
    data: str
    kernel: str
    option: str = ""
    seed: int = 0
    dropped: float = 0.0
    validation: float | None = None
    loss: float | None = None
    test: float | None = None
    parameters: int | None = None
    step_ms: float | None = None
    alone: bool = True
    curve: Curve = ()


@dataclasses.dataclass(frozen=True)
class Study:
    """The runs of a study, in the order of the file, and the commands that made it."""

    commands: tuple[str, ...]
    runs: tuple[StudyRun, ...]

    def chosen(self, data: str, dropped: float, kernel: str) -> tuple[StudyRun, ...]:
        """Final runs with the settings that are best on held-out training data; the test part has no say.

        Of equal settings that of lower loss; data with dropped samples take those of the complete data unless they
        have runs of their own to choose by. Nothing, where the best settings have no final run yet, or where they were
        chosen for other kernels on these data and not for this one. Where nothing was chosen for any, it is the
        reference's settings, or the only ones there are.
        """
        final = self.final(data, dropped, kernel)
        for share in (dropped, 0.0):
            tried = [r for r in self.runs if (r.stage, r.data, r.dropped) == ("choose", data, share)]
            if tried:
                scores = _scores([run for run in tried if run.kernel == kernel])
                best = max(scores, key=lambda option: scores[option]) if scores else None
                return tuple(run for run in final if run.option == best)
        options = list(dict.fromkeys(run.option for run in final))
        best = options[0] if len(options) == 1 else ""
        return tuple(run for run in final if run.option == best)

    def final(self, data: str, dropped: float, kernel: str) -> tuple[StudyRun, ...]:
        """Runs with a figure of the test part."""
        return tuple(
            run
            for run in self.runs
            if (run.stage, run.data, run.dropped, run.kernel) == ("final", data, dropped, kernel)
            and run.test is not None
        )

    @property
    def kernels(self) -> tuple[str, ...]:
        """Kinds of kernels with final runs."""
        return tuple(dict.fromkeys(run.kernel for run in self.runs if run.stage == "final"))

    @property
    def sets(self) -> tuple[tuple[str, float], ...]:
        """Data with final runs, with the percentage of samples left out."""
        return tuple(dict.fromkeys((run.data, run.dropped) for run in self.runs if run.stage == "final"))


def _scores(tried: Sequence[StudyRun]) -> dict[str, tuple[float, float]]:
    """Of every option its mean validation accuracy, and below that its mean loss with the sign turned."""
    scores = {}
    for option in dict.fromkeys(run.option for run in tried):
        own = [run for run in tried if run.option == option and run.validation is not None]
        if own:
            loss = statistics.fmean(run.loss or 0.0 for run in own)
            scores[option] = (statistics.fmean(run.validation or 0.0 for run in own), -loss)
    return scores


def read_study(path: Path) -> Study | None:
    """The study of kernels, as ``eval/study.py`` logs it; None where there is no such file, or no final run in it.

    A line is a JSON object. One with ``stage``, ``data`` and ``kernel`` is a run; its other keys, any of which may be
    missing or null, are ``option``, ``seed``, ``parameters``, ``step_ms``, ``alone``, ``validation_top1`` (percent),
    ``validation_loss``, ``test`` (an object with ``top1``, in percent), ``curve`` (a list of [epoch, training loss,
    validation top-1 or null]) and ``recipe`` (an object; ``dropped`` is the percentage of samples left out). The name
    of data may end in ``-`` and that percentage. A ``command`` in any line is kept. Other keys and lines, those with an
    ``error``, and those cut off when a process died are passed over.

    Raises:
        ValueError: A value is not of its kind; the message names the line.
    """
    if not path.is_file():
        return None
    commands: list[str] = []
    runs: list[StudyRun] = []
    for number, line in enumerate(_json_lines(path, cut_off=True), 1):
        try:
            if "command" in line and str(line["command"]) not in commands:
                commands.append(str(line["command"]))
            if {"stage", "data", "kernel"} <= line.keys() and "error" not in line:
                runs.append(_study_run(line))
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path.name}, line {number}: {error}") from error
    study = Study(tuple(commands), tuple(runs))
    return study if study.sets else None


def _study_run(line: dict[str, Any]) -> StudyRun:
    parameters = _number(line, "parameters")
    dropped = _number(line.get("recipe") or {}, "dropped") or 0.0
    return StudyRun(
        stage=str(line["stage"]),
        data=str(line["data"]).removesuffix(f"-{dropped:g}"),
        kernel=str(line["kernel"]),
        option=str(line.get("option") or ""),
        seed=int(_number(line, "seed") or 0),
        dropped=dropped,
        validation=_number(line, "validation_top1"),
        loss=_number(line, "validation_loss"),
        test=_number(line.get("test") or {}, "top1"),
        parameters=None if parameters is None else int(parameters),
        step_ms=_number(line, "step_ms"),
        alone=bool(line.get("alone", True)),
        curve=tuple((float(epoch), float(top1)) for epoch, _, top1 in line.get("curve") or () if top1 is not None),
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


def _json_lines(path: Path, cut_off: bool = False) -> list[dict[str, Any]]:
    """The lines of a log; what is no JSON becomes an empty one if lines may be cut off."""
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text or "{}")
        except json.JSONDecodeError as error:
            if cut_off:
                lines.append({})
                continue
            raise ValueError(f"{path.name}, line {number} is not JSON: {error}") from error
        if not isinstance(line, dict):
            raise ValueError(f"{path.name}, line {number} is not a JSON object")
        lines.append(line)
    return lines
