"""Figures of the networks themselves: kernels and points before and after, receptive fields, confusions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from smpconv_zoo.evaluation.classification import EvaluationResult
from smpconv_zoo.layers import SMPConv1d, SMPConv2d
from smpconv_zoo.pretrained.cards import CheckpointCard
from smpconv_zoo.reporting.drawing import Box, Dots, Drawing, Mark, Picture, Segments, Text
from smpconv_zoo.reporting.figure import Figure, Source, form_look
from smpconv_zoo.reporting.panel import WIDTH, Axis, Panel, spread
from smpconv_zoo.reporting.receptive import receptive_field, share_of_newest
from smpconv_zoo.reporting.start import Start, point_layers

__all__ = ["Look", "Samples", "confusion_figure", "kernel_figure", "receptive_figure", "silent_points"]

COMMAND = "smpconv-zoo report"

# Pixels of the picture of a receptive field.
FIELD = 220.0


@dataclasses.dataclass(frozen=True)
class Samples:
    """Inputs (N, C, ...) of a validation part.

    ``order`` is that of the pixels of a permuted sequence, (L,): position j is pixel ``order[j]``. ``picture`` says
    that sequences are the rows of a square picture.
    """

    inputs: Tensor
    order: Tensor | None = None
    picture: bool = False


@dataclasses.dataclass(frozen=True)
class Look:
    """A checkpoint looked at: its network, the same before training, and samples that are not of the test part.

    ``start`` is None where that cannot be had, ``samples`` where there are none but test samples.
    """

    card: CheckpointCard
    model: nn.Module
    start: Start | None
    samples: Samples | None
    result: EvaluationResult


def kernel_figure(look: Look) -> Figure | None:
    """Kernels and points of a checkpoint before and after training; None for a network without points."""
    layers = point_layers(look.model)
    if not layers:
        return None
    with torch.no_grad():
        drawings = _sequence_kernels(look) if isinstance(layers[0][1], SMPConv1d) else _image_kernels(look)
        caption = _kernel_caption(look)
    if look.start is None:
        origin = (
            "How the network began could not be drawn again: no drawing of its seed lies near the learned points. "
            "So there is no before."
        )
    else:
        origin = (
            f"Before training means: drawn again from seed {_seed(look)}, {look.start.drawn}. That it "
            f"began so shows in the positions: first and learned ones correlate by {look.start.correlation:.2f}."
        )
    return Figure(
        f"kernels-{_anchor(look)}",
        look.card.id,
        f"{caption} {origin}",
        drawings,
        _sources(look),
        (("before training", "plain", None), ("after", form_look(look.card.data.input)[1], None)),
    )


def _anchor(look: Look) -> str:
    """The id of a checkpoint as addresses inside a page have it."""
    return look.card.id.replace(".", "-")


def _seed(look: Look) -> str:
    return "?" if look.card.training is None else str(look.card.training.seed)


def _kernel_caption(look: Look) -> str:
    pairs = _before_and_after(look)
    if isinstance(pairs[0][0], SMPConv2d):
        moves = [
            (after.coords - before.coords).flatten(0, 1).norm(dim=1) * (after.kernel_size[0] // 2)
            for after, before in pairs
            if before is not None
        ]
        words = f" Half of all points moved by less than {float(torch.cat(moves).median()):.2f} taps." if moves else ""
        return f"The strongest kernels (blue above zero, orange below), their points as dots.{words}"
    silent = torch.cat([silent_points(layer).flatten() for layer, _ in pairs])
    return (
        "Kernels over the samples that they see, the current one at the right, and below each its points, from where "
        "they began to where they went; in the picture of all, blue is above zero, orange below. After training "
        f"{100 * float(silent.float().mean()):.0f} % of the points are too narrow to touch a tap where they lie."
    )


def silent_points(layer: SMPConv1d | SMPConv2d) -> Tensor:
    """Which points of a sequence's layer touch no tap, (out, points): no tap is nearer than their radius."""
    lags, last = _lags(layer), layer.kernel_size[0] - 1
    distance = (lags - lags.round().clamp(0, last)).abs()
    return distance >= layer.radius.expand(lags.shape) * last / 2


def _sources(look: Look) -> tuple[Source, ...]:
    sources = [Source(f"weights/{file.name}", COMMAND) for file in look.card.files]
    if look.card.training is not None:
        sources.append(Source(look.card.training.log, look.card.training.command))
    return tuple(sources)


# ---------------------------------------------------------------------------------------------------------- sequences


def _sequence_kernels(look: Look) -> tuple[Drawing, ...]:
    pairs = _before_and_after(look)
    (first, first_before), (last, last_before) = pairs[0], pairs[-1]
    reach = _reach([layer for pair in (pairs[0], pairs[-1]) for layer in pair if layer is not None])
    colour = form_look(look.card.data.input)[1]
    drawings = []
    strongest = _strongest(first)
    for name, layer, before, (out, within) in (
        ("First layer", first, first_before, strongest[0]),
        ("First layer", first, first_before, strongest[1 % len(strongest)]),
        ("Last layer", last, last_before, _strongest(last)[0]),
    ):
        title = f"{name}, channel {out}" if layer.in_channels == 1 else f"{name}, channel {within} to {out}"
        drawings.append(_sequence_kernel(title, layer, before, out, within, reach, colour))
    if all(before is not None for _, before in pairs):
        drawings.append(_sequence_moves(pairs, colour))
    drawings.append(_radii(pairs, colour))
    drawings.append(_sequence_heat(first, reach))
    return tuple(drawings)


def _before_and_after(look: Look) -> list[tuple[SMPConv1d | SMPConv2d, SMPConv1d | SMPConv2d | None]]:
    after = [layer for _, layer in point_layers(look.model)]
    before = [None] * len(after) if look.start is None else [layer for _, layer in point_layers(look.start.model)]
    return list(zip(after, before, strict=True))


def _lags(layer: SMPConv1d | SMPConv2d) -> Tensor:
    """Samples before the current one at which the points lie, (out, points)."""
    lags = (1 - layer.coords[..., 0]) / 2 * (layer.kernel_size[0] - 1)
    return lags.expand(layer.out_channels, layer.n_points)


def _strongest(layer: SMPConv1d | SMPConv2d) -> list[tuple[int, int]]:
    """Kernels (out, in) of a layer, the largest first, one of each output channel."""
    energy = layer.kernel().flatten(2).square().sum(dim=2)
    values, within = energy.max(dim=1)
    return [(int(out), int(within[out])) for out in values.argsort(descending=True)]


def _reach(layers: Sequence[SMPConv1d | SMPConv2d]) -> int:
    lags = torch.cat([_lags(layer).flatten() for layer in layers])
    taps = layers[0].kernel_size[0]
    reach = float(lags.quantile(0.99)) + 1
    step = 10.0 ** max(0, math.floor(math.log10(reach)) - 1) * 2
    return max(1, min(taps - 1, math.ceil(reach / step) * int(step)))


def _sequence_kernel(
    title: str,
    layer: SMPConv1d | SMPConv2d,
    before: SMPConv1d | SMPConv2d | None,
    out: int,
    within: int,
    reach: int,
    colour: str,
) -> Drawing:
    after_kernel = layer.kernel()[out, within].flip(-1)[: reach + 1]
    before_kernel = None if before is None else before.kernel()[out, within].flip(-1)[: reach + 1]
    most = 1.1 * max(float(k.abs().max()) for k in (after_kernel, before_kernel) if k is not None) or 1.0
    panel = Panel(
        title, Axis("samples before the current one", reach, -reach / 40), Axis("weight", -most, most), foot=42
    )
    if before_kernel is not None:
        panel.line(enumerate(before_kernel.tolist()), "plain", 1.2)
    panel.line(enumerate(after_kernel.tolist()), colour, 1.5)
    # Two rows of points under the kernel, each point joined to itself.
    upper, lower = panel.floor + 14, panel.bottom - 6

    def across(lags: Tensor) -> list[float]:
        return [panel.at(lag, 0)[0] for lag in lags.tolist()]

    after_lags = _lags(layer)[out]
    seen = (after_lags <= reach) & (after_lags >= -reach / 40)
    if before is not None:
        before_lags = _lags(before)[out]
        seen &= (before_lags <= reach) & (before_lags >= -reach / 40)
        starts = across(before_lags[seen])
        ends = tuple((a, upper, b, lower) for a, b in zip(starts, across(after_lags[seen]), strict=True))
        panel.marks.append(Segments(ends, "plain", 0.8, 0.8))
        panel.marks.append(Dots(tuple((a, upper) for a in starts), "plain", 4))
    panel.marks.append(Dots(tuple((b, lower) for b in across(after_lags[seen])), colour, 4.5))
    return panel.drawn(
        f"{title}: the kernel before and after training over {reach} samples, largest weight "
        f"{float(after_kernel.abs().max()):.3f}, and its {layer.n_points} points below."
    )


def _sequence_moves(
    pairs: Sequence[tuple[SMPConv1d | SMPConv2d, SMPConv1d | SMPConv2d | None]], colour: str
) -> Drawing:
    """How far all points of the network have moved, against where they began."""
    start = torch.cat([_lags(before).flatten() for _, before in pairs if before is not None])
    end = torch.cat([_lags(after).flatten() for after, _ in pairs])
    moved = start - end
    most = 1.05 * max(1.0, float(moved.abs().quantile(0.995)))
    median = float(moved.abs().median())
    reach = max(1.0, float(start.quantile(0.995)))
    panel = Panel(
        f"Where {len(moved):,} points went",
        Axis("began so many samples before the current one", reach, 0),
        Axis(f"moved towards the current sample by, samples (median size {median:.1f})", -most, most),
    )
    # A sample of the points, evenly through all layers: more dots would only be more ink.
    index = torch.linspace(0, len(moved) - 1, min(1800, len(moved))).round().long()
    places = [(a, b) for a, b in zip(start[index].tolist(), moved[index].tolist(), strict=True) if abs(b) <= most]
    panel.dots([place for place in places if place[0] <= reach], colour, 2.4, opacity=0.4)
    return panel.drawn(f"Moves of the points of all layers: half of them moved by less than {median:.1f} samples.")


def _radii(pairs: Sequence[tuple[SMPConv1d | SMPConv2d, SMPConv1d | SMPConv2d | None]], colour: str) -> Drawing:
    """Learned radii of all layers as shares, and the first one, in taps."""
    half = [(layer.kernel_size[0] - 1) / 2 for layer, _ in pairs]
    radii = torch.cat([layer.radius.flatten() * h for (layer, _), h in zip(pairs, half, strict=True)])
    first = pairs[0][0].init_radius * half[0]
    edges = torch.linspace(*spread([first, float(radii.min()), float(radii.quantile(0.999))], room=0.05), 41)
    counts = torch.histc(radii, 40, float(edges[0]), float(edges[-1])) / len(radii) * 100
    panel = Panel(
        "Radii",
        Axis("taps", float(edges[0]), float(edges[-1])),
        Axis("share of the points, %", 0, 1.1 * float(counts.max())),
    )
    steps = [(float(edge), float(count)) for i, count in enumerate(counts) for edge in (edges[i], edges[i + 1])]
    panel.band([(x, 0.0, y) for x, y in steps], colour)
    panel.line(steps, colour, 1.4)
    panel.reference(first, "at the start")
    return panel.drawn(
        f"Radii of the points: {first:.2f} taps at the start, median {float(radii.median()):.2f} taps after training."
    )


def _sequence_heat(layer: SMPConv1d | SMPConv2d, reach: int) -> Drawing:
    """All kernels of the first layer seen by its strongest input channel."""
    kernel = layer.kernel()
    within = int(kernel.square().sum(dim=(0, 2)).argmax())
    values = kernel[:, within, -(reach + 1) :]
    values = values / float(values.abs().quantile(0.995) or 1.0)
    panel = Panel(
        "First layer, all channels",
        Axis("samples before the current one", reach + 0.5, -0.5),
        Axis("output channel", layer.out_channels - 0.5, -0.5, ticks=(0.0, float(layer.out_channels - 1))),
    )
    panel.marks.append(Picture(panel.left, panel.top, panel.right - panel.left, panel.bottom - panel.top, values))
    return panel.drawn(
        f"Kernels of the {layer.out_channels} channels of the first layer as a picture, over {reach} samples."
    )


# ------------------------------------------------------------------------------------------------------------- images


def _image_kernels(look: Look) -> tuple[Drawing, ...]:
    pairs = _before_and_after(look)
    drawings = []
    for name, (layer, before) in (("First layer", pairs[0]), ("Last layer", pairs[-1])):
        chosen = _strongest(layer)[:9]
        reach = _image_reach([layer] if before is None else [layer, before], chosen)
        if before is not None:
            drawings.append(_kernel_sheet(f"{name}, before", before, chosen, reach))
        drawings.append(_kernel_sheet(f"{name}, after", layer, chosen, reach))
        if before is not None and name == "First layer":
            drawings.append(_image_moves(layer, before, reach))
    drawings.append(_radii(pairs, form_look(look.card.data.input)[1]))
    return tuple(drawings)


def _image_reach(layers: Sequence[SMPConv1d | SMPConv2d], chosen: Sequence[tuple[int, int]]) -> int:
    """Taps from the centre to the outermost one that any of the kernels holds."""
    centre = layers[0].kernel_size[0] // 2
    outermost = 1
    for layer in layers:
        held = torch.stack([layer.kernel()[out, within] for out, within in chosen]).ne(0).any(dim=0).nonzero() - centre
        outermost = max(outermost, int(held.abs().max()) if len(held) else 1)
    return min(centre, outermost)


def _kernel_sheet(title: str, layer: SMPConv1d | SMPConv2d, chosen: Sequence[tuple[int, int]], reach: int) -> Drawing:
    """Nine kernels around their centre, with their points."""
    size, gap, top = 92.0, 10.0, 30.0
    centre = layer.kernel_size[0] // 2
    kept = slice(centre - reach, centre + reach + 1)
    kernels = [layer.kernel()[out, within][kept, kept] for out, within in chosen]
    most = max(float(kernel.abs().max()) for kernel in kernels) or 1.0
    coords = layer.coords.expand(layer.out_channels, layer.n_points, 2)
    marks: list[Mark] = [Text(2, 14, title, "ink", 13, bold=True)]
    taps = 2 * reach + 1
    for i, ((out, within), kernel) in enumerate(zip(chosen, kernels, strict=True)):
        left, up = 2 + (i % 3) * (size + gap), top + (i // 3) * (size + gap + 12)
        marks.append(Box(left, up, size, size, "rule", 0.35))
        marks.append(Picture(left, up, size, size, kernel / most))
        # x grows to the right, y upwards; taps are counted from the middle of the kernel.
        places = [(0.5 + x * centre / taps, 0.5 - y * centre / taps) for x, y in coords[out].tolist()]
        inside = tuple((left + a * size, up + b * size) for a, b in places if 0 <= a <= 1 and 0 <= b <= 1)
        marks.append(Dots(inside, "ink", 2.6, opacity=0.75))
        name = f"channel {out}" if layer.in_channels == 1 else f"{within} to {out}"
        marks.append(Text(left, up + size + 12, name, size=10.5))
    height = top + 3 * (size + gap + 12)
    return Drawing(
        WIDTH, height, tuple(marks), f"{title}: {len(chosen)} kernels of {taps} by {taps} taps, the strongest first."
    )


def _image_moves(layer: SMPConv1d | SMPConv2d, before: SMPConv1d | SMPConv2d, reach: int) -> Drawing:
    """Every point of a layer from where it began to where it went, in taps."""
    half = layer.kernel_size[0] // 2
    start, end = (
        item.coords.expand(item.out_channels, item.n_points, 2).flatten(0, 1) * half for item in (before, layer)
    )
    edge = float(torch.cat([start, end]).abs().quantile(0.995))
    panel = Panel(
        "First layer, all points",
        Axis("taps to the right", -edge, edge),
        Axis("taps upwards", -edge, edge),
        height=344,
    )
    seen = ((start.abs() <= edge) & (end.abs() <= edge)).all(dim=1)
    begins = [panel.at(x, y) for x, y in start[seen].tolist()]
    ends = [panel.at(x, y) for x, y in end[seen].tolist()]
    joined = tuple((*a, *b) for a, b in zip(begins, ends, strict=True))
    panel.marks.append(Segments(joined, "plain", 1.0, 0.9))
    panel.marks.append(Dots(tuple(begins), "plain", 2.4))
    panel.marks.append(Dots(tuple(ends), "third", 4.2))
    median = float((end - start).norm(dim=1).median())
    return panel.drawn(f"All points of the first layer, from start to end: half moved by less than {median:.2f} taps.")


# --------------------------------------------------------------------------------------------------- receptive fields


def receptive_figure(look: Look) -> Figure | None:
    """The effective receptive field of a checkpoint, before and after training; None without samples."""
    if look.samples is None:
        return None
    inputs, order = look.samples.inputs, look.samples.order
    after = receptive_field(look.model, inputs)
    before = None if look.start is None else receptive_field(look.start.model.requires_grad_(False), inputs)
    fields = [(name, field) for name, field in (("Before", before), ("After", after)) if field is not None]
    drawings = []
    words = f"Over {len(inputs)} validation samples. "
    if after.dim() == 1:
        halves = {name: int((share_of_newest(field) < 0.5).sum()) + 1 for name, field in fields}
        drawings.append(_cumulative(look, fields, halves["After"]))
        words += f"Half of the gradient lies within the newest {halves['After']} of {len(after)} samples"
        words += f", before training within {halves['Before']}. " if before is not None else ". "
        if look.samples.picture:
            side = math.isqrt(len(after))
            words += "In the pictures every sample is back at its pixel. "
            if order is not None:
                words += "Pixels come in a random order, so that what is newest is scattered all over. "
            pixel = torch.arange(len(after)) if order is None else order
            fields = [(name, torch.zeros_like(f).scatter(0, pixel, f).view(side, side)) for name, f in fields]
    if fields[0][1].dim() == 2:
        drawings += [_field_picture(name, field) for name, field in fields]
        words += (
            "The stronger the colour of a pixel, the more it counts: each picture by itself, and by the square root."
        )
    return Figure(
        f"receptive-{_anchor(look)}",
        look.card.id,
        words,
        tuple(drawings),
        _sources(look),
        (("before training", "plain", None), ("after", form_look(look.card.data.input)[1], None))
        if after.dim() == 1 and before is not None
        else (),
    )


def _cumulative(look: Look, fields: Sequence[tuple[str, Tensor]], half: int) -> Drawing:
    _, colour, _ = form_look(look.card.data.input)
    length = len(fields[0][1])
    panel = Panel(
        "From the last step backwards",
        Axis("samples before the current one", length - 1, 0),
        Axis("share of the gradient, %", 0, 100),
        height=FIELD + 54,
    )
    for name, field in fields:
        panel.line(enumerate((100 * share_of_newest(field)).tolist()), colour if name == "After" else "plain")
    panel.reference(half - 1)
    return panel.drawn(f"Share of the gradient within the newest samples; half of it lies within {half} of {length}.")


def _field_picture(name: str, field: Tensor) -> Drawing:
    top = 30.0
    marks: list[Mark] = [
        Text(2, 14, name, "ink", 13, bold=True),
        Box(2, top, FIELD, FIELD, "rule", 0.35),
        Picture(2, top, FIELD, FIELD, (field / field.max()).sqrt()),
    ]
    return Drawing(WIDTH, top + FIELD + 24, tuple(marks), f"{name} training: the receptive field as a picture.")


# ---------------------------------------------------------------------------------------------------------- confusion


def confusion_figure(looks: Sequence[Look]) -> Figure | None:
    """Confusion matrices of all checkpoints on their test parts, as counted when the report was made."""
    drawings = [_confusion(look.card.id, look.result.confusion) for look in looks if look.result.confusion is not None]
    if not drawings:
        return None
    counted = "; ".join(
        f"{look.card.id} {look.result.correct} of {look.result.total}, {_AGREES[look.result.agrees]}" for look in looks
    )
    return Figure(
        "confusion",
        "Confusions",
        f"The test part: true classes down, predicted ones across, mistakes red. Counted again here: {counted}.",
        tuple(drawings),
        tuple(
            Source(look.card.measured.log, look.card.measured.command)
            for look in looks
            if look.card.measured is not None
        ),
    )


_AGREES = {True: "as its card says", False: "NOT what its card says", None: "of which its card says nothing"}


def _confusion(title: str, confusion: Sequence[Sequence[int]]) -> Drawing:
    size = len(confusion)
    left, top = 30.0, 46.0
    cell = (WIDTH - left - 4) / size
    mistakes = max(1, *(count for t, row in enumerate(confusion) for p, count in enumerate(row) if t != p))
    marks: list[Mark] = [Text(2, 14, title, "ink", 13, bold=True)]
    small = min(12.0, 0.42 * cell)
    for t, row in enumerate(confusion):
        marks.append(Text(left - 8, top + (t + 0.66) * cell, str(t), anchor="end", size=small))
        marks.append(Text(left + (t + 0.5) * cell, top - 7, str(t), anchor="middle", size=small))
        for p, count in enumerate(row):
            x, y = left + p * cell, top + t * cell
            if t != p and count:
                marks.append(Box(x + 1, y + 1, cell - 2, cell - 2, "wrong", 0.12 + 0.4 * count / mistakes))
            elif t != p:
                marks.append(Box(x + 1, y + 1, cell - 2, cell - 2, "rule", 0.3))
            if count:
                colour = "muted" if t == p else "ink"
                marks.append(Text(x + cell / 2, y + 0.64 * cell, str(count), colour, small, "middle", bold=t != p))
    worst = max(((count, t, p) for t, row in enumerate(confusion) for p, count in enumerate(row) if t != p))
    return Drawing(
        WIDTH,
        top + size * cell + 6,
        tuple(marks),
        f"Confusion matrix of {title}, {size} classes; the most frequent mistake is {worst[1]} taken for {worst[2]}, "
        f"{worst[0]} times.",
    )
