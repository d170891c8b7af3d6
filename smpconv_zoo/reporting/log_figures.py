"""Figures and tables read off cards and logs alone: accuracy, training, other resolutions, the study, speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from smpconv_zoo.evaluation.resolution import WAYS, ResolutionResult
from smpconv_zoo.pretrained.cards import CheckpointCard
from smpconv_zoo.reporting.drawing import Box, Drawing, Line, Mark, Text
from smpconv_zoo.reporting.figure import Figure, Source, Table, form_look
from smpconv_zoo.reporting.logs import (
    RESULTS,
    Record,
    Study,
    read_record,
    read_resolution,
    read_search,
    read_training,
    summarize,
)
from smpconv_zoo.reporting.panel import WIDTH, Axis, Panel, short_number, spread

__all__ = [
    "accuracy_figure",
    "checkpoint_table",
    "dropped_figure",
    "resolution_figure",
    "speed_figure",
    "speed_tables",
    "study_figures",
    "study_tables",
    "training_figure",
    "wilson_interval",
]

STUDY = f"{RESULTS}/study.jsonl"

# How each kind of kernel is drawn in every figure of the study; kinds unknown here follow.
KERNELS = {
    "points": ("points that move", "first", "circle"),
    "fixed": ("fixed grid", "second", "square"),
    "short": ("short fixed grid", "fourth", "diamond"),
    "mlp": ("made by an MLP", "third", "triangle"),
}
# Marks of a panel that have room for a figure each.
LABELS = 8
_FURTHER = (("plain", "circle"), ("wrong", "square"), ("ink", "triangle"))


def checkpoint_table(cards: Sequence[CheckpointCard]) -> Table:
    """Every checkpoint, published figures in a column of their own."""
    rows = tuple(
        (
            card.id,
            f"{card.data.name}, {card.data.input}",
            f"{card.parameters:,}",
            "" if card.paper is None else f"{card.paper.top1:.2f}",
            "" if card.measured is None else f"{card.measured.top1:.2f}",
            "in the package" if card.status == "embedded" else "the authors', import",
        )
        for card in cards
    )
    return Table(
        "checkpoints",
        "Checkpoints",
        "Top-1 accuracy in percent. The two columns of figures do not compare: the authors' are of the data named, as "
        "they publish them; ours are of small sets out of Python packages, and of MNIST-1D, which is drawn.",
        ("checkpoint", "data", "parameters", "paper", "measured", "weights"),
        rows,
        (Source("weights/README.md", "python -m smpconv_zoo.evaluation.tables --page"),),
        words=(0, 1, 5),
    )


def accuracy_figure(cards: Sequence[CheckpointCard], root: Path) -> Figure | None:
    """Measured accuracy against parameters and against the time of an epoch; published accuracy against parameters.

    None where there is nothing to show.
    """
    measured = [card for card in cards if card.measured is not None]
    published = [card for card in cards if card.paper is not None]
    trained = [(card, card.training) for card in measured if card.training is not None]
    logs = {card.id: log for card, training in trained if (log := read_training(root / training.log)) is not None}
    timed = [(card, logs[card.id].typical_seconds) for card in measured if card.id in logs]
    drawings = []
    if measured:
        sized = [(card, float(card.parameters)) for card in measured]
        drawings.append(_measured_panel("Measured, by size", "parameters", sized))
    if timed:
        drawings.append(_measured_panel("Measured, by time", "seconds of training an epoch", timed))
    if published:
        drawings.append(_published_panel(published))
    if not drawings:
        return None
    hardware = f" ({', '.join(dict.fromkeys(log.hardware for log in logs.values()))})" if logs else ""
    return Figure(
        "accuracy",
        "Accuracy, size and time",
        "Bars are 95 % intervals (Wilson): of a thousand test samples half a point is noise. The time is that of the "
        f"median epoch of the training{hardware}, augmentation included. Hollow: what the authors publish for other "
        "data, not measured here.",
        tuple(drawings),
        (
            *dict.fromkeys(Source(training.log, training.command) for _, training in trained),
            Source("weights/README.md", "python -m smpconv_zoo.evaluation.tables --page"),
        ),
        (*(_form_entry(card) for card in measured), *((("published", "muted", "ring"),) if published else ())),
    )


def _form_entry(card: CheckpointCard) -> tuple[str, str, str | None]:
    name, colour, shape = form_look(card.data.input)
    return f"{name}s", colour, shape


def _labels(places: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str, str]]:
    """Accuracies (x, y, colour) in figures: each of a few, of many the lowest and the highest of a colour."""
    kept = list(places)
    if len(places) > LABELS:
        own = [[place for place in places if place[2] == colour] for colour in dict.fromkeys(c for _, _, c in places)]
        ends = (end(group, key=lambda place: place[1]) for group in own for end in (min, max))
        kept = list(dict.fromkeys(ends))
    return [(x, y, f"{y:.2f}", colour) for x, y, colour in kept]


def _measured_panel(title: str, label: str, places: Sequence[tuple[CheckpointCard, float]]) -> Drawing:
    found = [(card, x, card.measured, form_look(card.data.input)) for card, x in places if card.measured is not None]
    ends = [wilson_interval(measured.correct, measured.total) for _, _, measured, _ in found]
    x_axis = Axis(label, *spread([x for _, x in places], log=True, room=0.3), log=True)
    panel = Panel(
        title, x_axis, Axis("top-1 on the test part, %", *spread([100 * end for pair in ends for end in pair]))
    )
    for (card, x, measured, (_, colour, shape)), (low, high) in zip(found, ends, strict=True):
        panel.whisker(x, 100 * low, 100 * high, colour)
        told = f"{card.id}: {measured.top1:.2f} % ({measured.correct} of {measured.total})"
        panel.dots([(x, measured.top1)], colour, 9, shape, title=told)
    panel.labels(_labels([(x, measured.top1, colour) for _, x, measured, (_, colour, _) in found]))
    said = "; ".join(f"{card.id} {measured.top1:.2f} % at {short_number(x)}" for card, x, measured, _ in found)
    return panel.drawn(f"Test accuracy against {label}: {said}.")


def _published_panel(cards: Sequence[CheckpointCard]) -> Drawing:
    found = [(float(card.parameters), card.paper.top1, card) for card in cards if card.paper is not None]
    x_axis = Axis("parameters", *spread([x for x, _, _ in found], log=True), log=True)
    panel = Panel("Published, by size", x_axis, Axis("top-1, %", *spread([top1 for _, top1, _ in found])))
    panel.dots([(x, top1) for x, top1, _ in found], "muted", 8, "ring")
    panel.labels((x, top1, f"{card.id.removeprefix('smpconv_')} {top1:.2f}", "muted") for x, top1, card in found)
    said = "; ".join(f"{card.id} {top1:.2f} %" for _, top1, card in found)
    return panel.drawn(f"Accuracies that the authors publish, against parameters: {said}.")


def wilson_interval(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Ends of the Wilson score interval of a share, for 95 % unless ``z`` says otherwise."""
    share = correct / total
    middle = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2)) / (1 + z**2 / total)
    return middle - half, min(1.0, middle + half)


def training_figure(cards: Sequence[CheckpointCard], root: Path) -> Figure | None:
    """Losses of the final runs, and validation accuracies of the runs by which their recipes were chosen.

    None where no shipped checkpoint has a log of its epochs.
    """
    trained = [card for card in cards if card.status == "embedded" and card.training is not None]
    found = [
        (card, card.training, log)
        for card in trained
        if card.training is not None and (log := read_training(root / card.training.log)) is not None
    ]
    if not found:
        return None
    losses = [loss for _, _, log in found for loss in log.losses]
    longest = max(len(log.losses) for _, _, log in found)
    panel = Panel("Final runs", Axis("epoch", 0, longest), Axis("training loss", *spread(losses, log=True), log=True))
    for card, _, log in found:
        panel.line(enumerate(log.losses, 1), form_look(card.data.input)[1])
    said = "; ".join(f"{card.id} ends at {log.losses[-1]:.3f}" for card, _, log in found)
    drawings = [panel.drawn(f"Training loss of each epoch, logarithmic: {said}.")]
    sources = [Source(training.log, training.command) for _, training, _ in found]
    search = root / RESULTS / "search_mnist5k.jsonl"
    if search.is_file():
        commands, candidates = read_search(search)
        chosen = {card.id: log.recipe for card, _, log in found}
        for name in dict.fromkeys(recipe["id"] for recipe, _ in candidates):
            own = [(recipe, curve) for recipe, curve in candidates if recipe["id"] == name and curve]
            drawings.append(_search_panel(name, own, chosen.get(name, {})))
        sources += [Source(f"{RESULTS}/{search.name}", command) for command in commands]
    return Figure(
        "training-figure",
        "Training",
        "Recipes of the digits were chosen by 500 validation digits: thick the chosen one, thin the others, such as "
        "without augmentation. The final run then learns from those as well, and has nothing left to validate on.",
        tuple(drawings),
        tuple(sources),
        tuple((words, colour, None) for words, colour, _ in dict.fromkeys(_form_entry(card) for card, _, _ in found)),
    )


def _search_panel(name: str, candidates: Sequence[tuple[dict[str, Any], Any]], chosen: dict[str, Any]) -> Drawing:
    longest = max(curve[-1][0] for _, curve in candidates)
    panel = Panel(
        f"Choosing: {name.partition('.')[2]}", Axis("epoch", 0, longest), Axis("validation top-1, %", 85, 100)
    )
    colour = form_look(candidates[0][0]["input"])[1]
    for recipe, curve in sorted(candidates, key=lambda candidate: candidate[0] == chosen):
        best = recipe == chosen
        seen = [(epoch, value) for epoch, value in curve if value >= 85]
        panel.line(seen, colour if best else "plain", 2.2 if best else 1.0)
    ends = ", ".join(f"{curve[-1][1]:.2f}" for _, curve in candidates)
    return panel.drawn(f"Validation accuracy of the candidates for {name}, epoch by epoch; they end at {ends} %.")


def resolution_figure(root: Path) -> Figure | None:
    """Accuracy at other resolutions than the training's; None where that was not measured."""
    path = root / RESULTS / "resolution.jsonl"
    if not path.is_file():
        return None
    command, results = read_resolution(path)
    looks = {"continuous": ("first", "circle"), "resized": ("second", "square"), "fixed": ("plain", "triangle")}
    drawings = []
    for name in dict.fromkeys(result.id for result in results):
        drawings.append(_resolution_panel(name, [result for result in results if result.id == name], looks))
    return Figure(
        "resolution",
        "Other resolutions",
        "The same test digits, sampled more or less densely, and networks that were trained at the dashed size alone: "
        "left as they are, with the input resized to what they know, or with their points read off at the new grid.",
        tuple(drawings),
        (Source(f"{RESULTS}/resolution.jsonl", f"python eval/{command}"), Source("docs/resolution.md", "")),
        (
            ("points read off at the new grid", "first", "circle"),
            ("input resized", "second", "square"),
            ("network as it is", "plain", "triangle"),
        ),
    )


def _resolution_panel(name: str, results: Sequence[ResolutionResult], looks: dict[str, tuple[str, str]]) -> Drawing:
    trained = results[0].trained
    sizes = sorted({result.size for result in results})
    x = Axis("samples, or pixels of a side", *spread(sizes, log=True), log=True, ticks=tuple(map(float, sizes)))
    panel = Panel(name.partition(".")[2], x, Axis("top-1, %", 0, 103, ticks=(0, 25, 50, 75, 100)))
    panel.reference(trained)
    for way in WAYS:
        colour, shape = looks[way]
        points = sorted((r.size, r.top1) for r in results if r.way == way or r.size == trained)
        panel.line(points, colour)
        panel.dots(points, colour, 11 if shape == "square" else 7, shape)
    said = "; ".join(f"{r.way} at {r.size} {r.top1:.1f} %" for r in results)
    return panel.drawn(f"Accuracy of {name} against the size of the input, trained at {trained}: {said}.")


def study_tables(study: Study) -> list[Table]:
    """Test accuracy of every kind of kernel on every data set: with chosen settings, the reference's, and which."""
    looks = _looks(study)

    def rows(cell: Callable[[str, float, str], str]) -> tuple[tuple[str, ...], ...]:
        found = [
            (data if not dropped else f"{data}, {dropped:g} % dropped", *(cell(data, dropped, k) for k in looks))
            for data, dropped in study.sets
        ]
        return tuple(row for row in found if any(row[1:]))

    def chosen(data: str, dropped: float, kernel: str) -> str:
        return _mean([run.test for run in study.chosen(data, dropped, kernel)])

    def reference(data: str, dropped: float, kernel: str) -> str:
        return _mean([run.test for run in study.final(data, dropped, kernel) if not run.option])

    def settings(data: str, dropped: float, kernel: str) -> str:
        runs = study.chosen(data, dropped, kernel)
        return (runs[0].option or "reference") if runs else ""

    header = ("data", *(name for name, _, _ in looks.values()))
    sources = _study_sources(study)
    nothing_chosen = "Nothing chosen: read-out at the last step, points about one tap wide."
    if all(run.stage != "choose" for run in study.runs):
        caption = (
            "Test top-1 in percent, mean ± standard deviation (seeds). The networks of a row differ in their large "
            f"kernels alone. {nothing_chosen}"
        )
        return [
            Table(
                "study-reference", "Accuracy with the reference's settings", caption, header, rows(reference), sources
            )
        ]
    tables = [
        Table(
            "study-chosen",
            "Accuracy",
            "Test top-1 in percent, mean ± standard deviation (seeds). The networks of a row differ in their large "
            "kernels alone, and in settings: each kind has those that did best on held-out training data (where "
            "nothing was chosen by for any kind, the reference's); an empty cell was not run with them. docs/study.md "
            "says what was found, and what others publish.",
            header,
            rows(chosen),
            sources,
        ),
        Table(
            "study-reference",
            "The same with the reference's settings",
            nothing_chosen,
            header,
            rows(reference),
            sources,
            folded=True,
        ),
        Table(
            "study-settings",
            "What was chosen",
            "Settings on top of the reference's: mean read-out, wider radii, wider spread of the first points, "
            "augmentation.",
            header,
            rows(settings),
            sources,
            words=tuple(range(len(header))),
            folded=True,
        ),
    ]
    return [table for table in tables if table.rows]


def study_figures(study: Study) -> list[Figure]:
    """Accuracy of every kind of kernel against parameters and against the time of a step, and the way there."""
    size, time, way = _size_panels(study), _time_panels(study), _way_panels(study)
    sources, legend = _study_sources(study), tuple(_looks(study).values())
    found = [
        Figure(
            "study-size",
            "Accuracy and size",
            "Small marks are seeds, large ones their mean; higher and further left is better.",
            tuple(size),
            sources,
            legend,
        ),
        Figure(
            "study-time",
            "Accuracy and time",
            "The same means, bars a standard deviation, against the time of a training step with the reference's "
            "settings, one run at a time.",
            tuple(time),
            sources,
            legend,
        ),
        Figure(
            "study-way",
            "On the way",
            "Validation accuracy of the runs that the chosen settings were chosen by: mean, and range behind it.",
            tuple(way),
            sources,
            tuple((words, colour, None) for words, colour, _ in legend),
            folded=True,
        ),
    ]
    return [figure for figure in found if figure.drawings]


def _size_panels(study: Study) -> Iterable[Drawing]:
    for data in (data for data, dropped in study.sets if not dropped):
        runs = {kernel: study.chosen(data, 0, kernel) for kernel in _looks(study)}
        places = {
            kernel: [(run.parameters, run.test) for run in own if run.parameters and run.test is not None]
            for kernel, own in runs.items()
        }
        every = [place for own in places.values() for place in own]
        if sum(map(bool, places.values())) < 2:
            # Nothing to compare.
            continue
        x_axis = Axis("parameters", *spread([float(x) for x, _ in every], log=True, room=0.25), log=True)
        panel = Panel(data, x_axis, Axis("test top-1, %", *spread([top1 for _, top1 in every])))
        said = []
        for kernel, (name, colour, shape) in _looks(study).items():
            if places[kernel]:
                middle = summarize([x for x, _ in places[kernel]]).mean
                told = f"{name} {_mean([top1 for _, top1 in places[kernel]])} at {short_number(middle)}"
                panel.dots(places[kernel], colour, 5, shape, opacity=0.45)
                panel.dots([(middle, summarize([y for _, y in places[kernel]]).mean)], colour, 10, shape, title=told)
                said.append(told)
        yield panel.drawn(f"Test accuracy on {data} against parameters: {'; '.join(said)}.")


def _time_panels(study: Study) -> Iterable[Drawing]:
    for data in (data for data, dropped in study.sets if not dropped):
        found = []
        for kernel, look in _looks(study).items():
            timed = [
                run.step_ms
                for run in study.runs
                if (run.stage, run.data, run.dropped, run.kernel) == ("time", data, 0, kernel) and run.alone
            ]
            times = [time for time in timed if time]
            tests = [run.test for run in study.chosen(data, 0, kernel) if run.test is not None]
            if times and tests:
                found.append((look, summarize(times).mean, summarize(tests)))
        if not found:
            continue
        ends = [summary.mean + sign * summary.deviation for _, _, summary in found for sign in (-1, 1)]
        x_axis = Axis("ms of a training step", *spread([time for _, time, _ in found], log=True, room=0.3), log=True)
        panel = Panel(data, x_axis, Axis("test top-1, %", *spread(ends)))
        said = []
        for (name, colour, shape), time, summary in found:
            told = f"{name} {summary.mean:.2f} % at {time:.2f} ms"
            panel.whisker(time, summary.mean - summary.deviation, summary.mean + summary.deviation, colour)
            panel.dots([(time, summary.mean)], colour, 10, shape, title=told)
            said.append(told)
        yield panel.drawn(f"Test accuracy on {data} against the time of a step: {'; '.join(said)}.")


def _way_panels(study: Study) -> Iterable[Drawing]:
    for data in (data for data, dropped in study.sets if not dropped):
        found = []
        for kernel, look in _looks(study).items():
            option = next((run.option for run in study.chosen(data, 0, kernel)), None)
            at: dict[float, list[float]] = {}
            for run in study.runs:
                if (run.stage, run.data, run.dropped, run.kernel, run.option) == ("choose", data, 0, kernel, option):
                    for epoch, value in run.curve:
                        at.setdefault(epoch, []).append(value)
            if at:
                found.append((look, sorted(at.items())))
        if not found:
            continue
        every = [value for _, points in found for _, values in points for value in values]
        longest = max(points[-1][0] for _, points in found)
        panel = Panel(data, Axis("epoch", 0, longest), Axis("validation top-1, %", *spread(every, room=0.04)))
        ends = []
        for (name, colour, _), points in found:
            panel.band([(epoch, min(values), max(values)) for epoch, values in points], colour)
            panel.line([(epoch, summarize(values).mean) for epoch, values in points], colour)
            ends.append(f"{name} {summarize(points[-1][1]).mean:.1f} %")
        yield panel.drawn(f"Validation accuracy on {data}, epoch by epoch; at the end {', '.join(ends)}.")


def dropped_figure(study: Study) -> Figure | None:
    """Accuracy against the share of samples left out; None where the study has no such runs."""
    drawings = []
    for data in dict.fromkeys(data for data, dropped in study.sets if dropped):
        shares = sorted(dropped for name, dropped in study.sets if name == data)
        found = {
            kernel: [
                (share, summarize(tests))
                for share in shares
                if (tests := [run.test for run in study.chosen(data, share, kernel) if run.test is not None])
            ]
            for kernel in _looks(study)
        }
        ends = [s.mean + sign * s.deviation for own in found.values() for _, s in own for sign in (-1, 1)]
        x_axis = Axis("samples left out, %", *spread(shares, room=0.06), ticks=tuple(shares))
        panel = Panel(data, x_axis, Axis("test top-1, %", *spread(ends)))
        said = []
        for kernel, (name, colour, shape) in _looks(study).items():
            panel.line([(share, summary.mean) for share, summary in found[kernel]], colour)
            for share, summary in found[kernel]:
                panel.whisker(share, summary.mean - summary.deviation, summary.mean + summary.deviation, colour)
            panel.dots([(share, summary.mean) for share, summary in found[kernel]], colour, 8, shape)
            said += [f"{name} at {share:g} % {summary.mean:.1f} %" for share, summary in found[kernel]]
        drawings.append(panel.drawn(f"Test accuracy on {data} against the samples left out: {'; '.join(said)}."))
    if not drawings:
        return None
    return Figure(
        "study-dropped",
        "Dropped samples",
        "So many samples of every sequence are left out, and one more channel says which. Marks are means over seeds, "
        "bars a standard deviation.",
        tuple(drawings),
        _study_sources(study),
        tuple(_looks(study).values()),
    )


def _mean(values: Sequence[float | None]) -> str:
    there = [value for value in values if value is not None]
    if not there:
        return ""
    summary = summarize(there)
    deviation = f" ± {summary.deviation:.2f}" if summary.count > 1 else ""
    return f"{summary.mean:.2f}{deviation} ({summary.count})"


def _looks(study: Study) -> dict[str, tuple[str, str, str]]:
    """Of every kind of kernel in the study its name, colour and shape: known kinds first, in their order."""
    further = [kernel for kernel in study.kernels if kernel not in KERNELS]
    found = {kernel: look for kernel, look in KERNELS.items() if kernel in study.kernels}
    return found | {kernel: (kernel, *_FURTHER[i % len(_FURTHER)]) for i, kernel in enumerate(further)}


def _study_sources(study: Study) -> tuple[Source, ...]:
    return tuple(Source(STUDY, command) for command in study.commands or ("",))


def speed_tables(root: Path) -> list[Table]:
    """What the benchmarks recorded: sequence networks, image networks, the convolution."""
    makers: tuple[tuple[Callable[[list[Record]], Table], tuple[str, ...]], ...] = (
        (_sequence_table, ("sequence_h100.json", "sequence_cpu.json", "sequence_cpu_raw32.json")),
        (_cpu_table, ("cpu.json", "cpu_bfloat16.json")),
        (_model_table, ("model_h100.json",)),
        (_operator_table, ("operator_h100.json",)),
    )
    tables = []
    for make, names in makers:
        records = [record for name in names if (record := read_record(root, name)) is not None]
        if records:
            tables.append(make(records))
    return tables


def speed_figure(root: Path) -> Figure | None:
    """How many times as fast as a peer, where both were timed in one run; None without any record."""
    drawings: list[Drawing] = []
    records: list[Record] = []
    for name, make in (
        ("operator_h100.json", _operator_bars),
        ("cpu.json", _cpu_bars),
        ("sequence_cpu.json", _sequence_bars),
    ):
        record = read_record(root, name)
        if record is not None:
            drawings.append(make(record))
            records.append(record)
    if not records:
        return None
    return Figure(
        "speed-figure",
        "Times as fast",
        "How many times as fast as a peer that was timed in the same run; at the stroke both are equal. On the "
        "GPU the forward pass of the CUDA operator at batch 128 in bfloat16; on the CPU inference of merged networks, "
        "and a training step against kernels rendered densely and torch.fft.",
        tuple(drawings),
        _sources(records),
    )


def _operator_bars(record: Record) -> Drawing:
    largest = max(result["batch"] for result in record.results)
    own = [r for r in record.results if r["batch"] == largest and r["dtype"] == "bfloat16" and r["forward_ms"]]
    bars = []
    for ours in (result for result in own if result["backend"] == "cuda"):
        size = (ours["channels"], ours["height"], ours["width"], ours["kernel"])
        peers = [
            result["forward_ms"]
            for result in own
            if result["backend"].startswith("native")
            and (result["channels"], result["height"], result["width"], result["kernel"]) == size
        ]
        if peers:
            bars.append(
                (f"{size[0]} channels, {size[1]} x {size[2]}, kernel {size[3]}", min(peers) / ours["forward_ms"])
            )
    return _bars("One H100, against F.conv2d", bars)


def _cpu_bars(record: Record) -> Drawing:
    bars = [
        (f"{result['network']}, batch {result['batch_size']}", 1 / result["ratio"])
        for result in record.results
        if result["work"] == "inference, merged"
    ]
    return _bars("Two CPU cores, against ConvNeXt", bars)


def _sequence_bars(record: Record) -> Drawing:
    bars = [
        (result["network"], result["peer_train_ms"] / result["train_ms"])
        for result in record.results
        if result["peer_train_ms"]
    ]
    return _bars("Two CPU cores, against dense kernels", bars)


def _bars(title: str, bars: Sequence[tuple[str, float]]) -> Drawing:
    """Horizontal bars of (words, times as fast), with a stroke where the times are equal."""
    top, step, right = 30.0, 36.0, WIDTH - 46.0
    longest = max((value for _, value in bars), default=1.0)
    marks: list[Mark] = [Text(2, 14, title, "ink", 13, bold=True)]
    for i, (words, value) in enumerate(bars):
        y = top + i * step
        marks.append(Text(2, y + 11, words))
        marks.append(Box(2, y + 17, max(1.0, right * value / longest), 9, "first" if value >= 1 else "second"))
        marks.append(
            Text(8 + right * value / longest, y + 26, f"{value:.2g}" if value < 100 else f"{value:.0f}", "ink")
        )
        marks.append(Line(((2 + right / longest, y + 14), (2 + right / longest, y + 29)), "ink", 1.2))
    height = top + len(bars) * step
    said = "; ".join(f"{words} {value:.1f} times" for words, value in bars)
    return Drawing(WIDTH, height + 4, tuple(marks), f"{title}, times as fast: {said}.")


def _sources(records: Sequence[Record]) -> tuple[Source, ...]:
    return tuple(Source(record.path, record.command) for record in records)


def _ms(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if value < 1 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _times(peer: float | None, ours: float | None) -> str:
    return "" if peer is None or not ours else f"{peer / ours:.1f} times"


def _sequence_table(records: Sequence[Record]) -> Table:
    rows = tuple(
        (
            result["network"],
            record.hardware,
            " x ".join(map(str, result["shape"])),
            _ms(result["train_graph_ms"] or result["train_ms"]),
            _ms(result["inference_graph_ms"] or result["inference_ms"]),
            _times(result["peer_train_ms"], result["train_ms"]),
        )
        for record in records
        for result in record.results
    )
    return Table(
        "speed-sequence",
        "Sequence networks",
        "Milliseconds of a training step and of a forward pass in float32; on the GPU each is one CUDA graph. The last "
        "column says how many times as long a step takes with dense kernels and torch.fft, where that was timed.",
        ("network", "hardware", "input", "step, ms", "pass, ms", "dense takes"),
        rows,
        _sources(records),
        words=(0, 1, 2),
        folded=True,
    )


def _cpu_table(records: Sequence[Record]) -> Table:
    rows = tuple(
        (
            result["network"],
            f"{result['work']}, {result['dtype']}",
            str(result["batch_size"]),
            _ms(result["ours_ms"]),
            _ms(result["peer_ms"]),
            result["peer"],
            f"{result['ratio']:.2f}",
        )
        for record in records
        for result in record.results
    )
    return Table(
        "speed-cpu",
        "Image networks on two CPU cores",
        "Milliseconds, in turns with a peer in the same process. Below 1 in the last column ours is faster; in "
        "bfloat16 ConvNeXt is.",
        ("network", "work", "batch", "ours, ms", "peer, ms", "peer", "ours / peer"),
        rows,
        _sources(records),
        words=(0, 1, 5),
        folded=True,
    )


def _model_table(records: Sequence[Record]) -> Table:
    rows = tuple(
        (
            result["network"],
            f"{result['work']}, {result['dtype']}",
            result["layout"],
            str(result["batch_size"]),
            f"{result['images_per_second']:,.0f}",
            "" if result["peak_gib"] is None else f"{result['peak_gib']:.1f}",
        )
        for record in records
        for result in record.results
    )
    return Table(
        "speed-model",
        "Image networks on one H100",
        "Random images of 224 x 224 that lie on the GPU already.",
        ("network", "work", "layout", "batch", "images / s", "peak, GiB"),
        rows,
        _sources(records),
        words=(0, 1, 2),
        folded=True,
    )


def _operator_table(records: Sequence[Record]) -> Table:
    """The largest batch of the depthwise convolution, by backend."""
    rows = []
    for record in records:
        largest = max(result["batch"] for result in record.results)
        for result in record.results:
            if result["batch"] == largest and result["forward_ms"] is not None:
                shape = f"{result['channels']} x {result['height']} x {result['width']}, {result['kernel']}"
                times = (_ms(result[key]) for key in ("forward_ms", "input_ms", "weight_ms", "floor_ms"))
                rows.append((result["backend"], shape, result["dtype"], *times))
    return Table(
        "speed-operator",
        "The depthwise convolution on one H100",
        "Milliseconds at batch 128: forward, gradient to the input, gradient to the weight. The floor is the time to "
        "read and write the maps once.",
        ("backend", "map and kernel", "dtype", "forward", "to input", "to weight", "floor"),
        tuple(rows),
        _sources(records),
        words=(0, 1, 2),
        folded=True,
    )
