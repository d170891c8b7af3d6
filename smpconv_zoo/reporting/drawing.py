"""Drawings: a few kinds of marks, placed in pixels, written as SVG for the page and as PNG for everywhere else.

Colours are named by what they mean; the page says what they look like by day and by night (:data:`COLOURS`). No mark is
told apart by its colour alone: shapes, dashes and words say the same.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from smpconv_zoo.evaluation.figures import require_matplotlib

__all__ = [
    "COLOURS",
    "SHAPES",
    "Area",
    "Box",
    "Dots",
    "Drawing",
    "Line",
    "Mark",
    "Picture",
    "Segments",
    "Text",
    "drawing_to_svg",
    "drawings_to_png",
    "legend_to_svg",
]

# By day on white, by night on near black; each has a contrast of at least 4.5 to its ground, the rule aside.
COLOURS = {
    "ink": ("#1c2330", "#e6e9ef"),
    "muted": ("#596273", "#a5aebc"),
    "rule": ("#dfe3e8", "#303846"),
    "ground": ("#ffffff", "#12161d"),
    "first": ("#2459a6", "#82b1ff"),
    "second": ("#b4530b", "#f2a765"),
    "third": ("#0b7565", "#55cfb4"),
    "fourth": ("#7a3fa8", "#c9a0f2"),
    "plain": ("#6b7484", "#98a2b1"),
    "wrong": ("#b3261e", "#ff8f85"),
}
SHAPES = ("circle", "square", "triangle", "diamond", "ring")

# Of pictures: values above zero and below, seen through by as much as they are small, so that either ground will do.
ABOVE, BELOW = (47, 111, 200), (214, 98, 28)


@dataclasses.dataclass(frozen=True)
class Line:
    """A line through ``points`` (x, y)."""

    points: tuple[tuple[float, float], ...]
    colour: str
    width: float = 1.6
    dashed: bool = False
    opacity: float = 1.0


@dataclasses.dataclass(frozen=True)
class Segments:
    """Many short straight lines (x, y, x, y) of one look."""

    ends: tuple[tuple[float, float, float, float], ...]
    colour: str
    width: float = 1.0
    opacity: float = 1.0


@dataclasses.dataclass(frozen=True)
class Area:
    """The inside of a line that ends where it began."""

    points: tuple[tuple[float, float], ...]
    colour: str
    opacity: float = 0.15


@dataclasses.dataclass(frozen=True)
class Dots:
    """Marks of one look at ``places`` (x, y), ``size`` across; ``title`` is what a pointer resting there is told."""

    places: tuple[tuple[float, float], ...]
    colour: str
    size: float = 7.0
    shape: str = "circle"
    opacity: float = 1.0
    title: str = ""


@dataclasses.dataclass(frozen=True)
class Box:
    """A filled rectangle."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    opacity: float = 1.0


@dataclasses.dataclass(frozen=True)
class Text:
    """Words; ``y`` is their base line, ``anchor`` one of start, middle, end. A ``halo`` keeps lines behind them off."""

    x: float
    y: float
    words: str
    colour: str = "muted"
    size: float = 11.5
    anchor: str = "start"
    bold: bool = False
    halo: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """Values (H, W) from -1 to 1 as a picture with the first row on top, its pixels left square."""

    x: float
    y: float
    width: float
    height: float
    values: Tensor


Mark = Line | Segments | Area | Dots | Box | Text | Picture


@dataclasses.dataclass(frozen=True)
class Drawing:
    """Marks on a sheet ``width`` by ``height`` pixels, and the words for those who cannot see it."""

    width: float
    height: float
    marks: tuple[Mark, ...]
    description: str


def drawing_to_svg(drawing: Drawing) -> str:
    """The drawing as an ``<svg>`` element that is as wide as its place, with colours of the page's style."""
    marks = "".join(_svg_mark(mark) for mark in drawing.marks)
    label = html.escape(drawing.description, quote=True)
    return f'<svg viewBox="0 0 {_n(drawing.width)} {_n(drawing.height)}" role="img" aria-label="{label}">{marks}</svg>'


def legend_to_svg(colour: str, shape: str | None) -> str:
    """The sign of an entry of a legend, 22 by 12 pixels: a line, or a mark if ``shape`` names one."""
    mark: Mark = Line(((1, 6), (21, 6)), colour, 2.4) if shape is None else Dots(((11, 6),), colour, 9, shape)
    return f'<svg class="key" viewBox="0 0 22 12" width="22" height="12" aria-hidden="true">{_svg_mark(mark)}</svg>'


def _svg_mark(mark: Mark) -> str:
    if isinstance(mark, Line):
        dash = ' stroke-dasharray="5 4"' if mark.dashed else ""
        points = " ".join(f"{_n(x)},{_n(y)}" for x, y in mark.points)
        return (
            f'<polyline class="s-{mark.colour}" points="{points}" stroke-width="{_n(mark.width)}"{dash}'
            f"{_opacity(mark.opacity)}/>"
        )
    if isinstance(mark, Segments):
        path = "".join(f"M{_n(a)} {_n(b)}L{_n(c)} {_n(d)}" for a, b, c, d in mark.ends)
        width, opacity = _n(mark.width), _opacity(mark.opacity)
        return f'<path class="s-{mark.colour}" d="{path}" stroke-width="{width}"{opacity}/>'
    if isinstance(mark, Area):
        points = " ".join(f"{_n(x)},{_n(y)}" for x, y in mark.points)
        return f'<polygon class="f-{mark.colour}" points="{points}"{_opacity(mark.opacity)}/>'
    if isinstance(mark, Dots):
        return _svg_dots(mark)
    if isinstance(mark, Box):
        return (
            f'<rect class="f-{mark.colour}" x="{_n(mark.x)}" y="{_n(mark.y)}" width="{_n(mark.width)}" '
            f'height="{_n(mark.height)}"{_opacity(mark.opacity)}/>'
        )
    if isinstance(mark, Text):
        anchor = "" if mark.anchor == "start" else f' text-anchor="{mark.anchor}"'
        weight = ' font-weight="600"' if mark.bold else ""
        halo = " halo" if mark.halo else ""
        return (
            f'<text class="f-{mark.colour}{halo}" x="{_n(mark.x)}" y="{_n(mark.y)}" font-size="{_n(mark.size)}"{anchor}'
            f"{weight}>{html.escape(mark.words)}</text>"
        )
    data = base64.b64encode(_png_of_values(mark.values)).decode()
    return (
        f'<image x="{_n(mark.x)}" y="{_n(mark.y)}" width="{_n(mark.width)}" height="{_n(mark.height)}" '
        f'preserveAspectRatio="none" href="data:image/png;base64,{data}"/>'
    )


def _svg_dots(mark: Dots) -> str:
    title = f"<title>{html.escape(mark.title)}</title>" if mark.title else ""
    opacity = _opacity(mark.opacity)
    if mark.shape == "circle":
        # A round end of a line of no length is a dot, and a tenth of the text of a circle.
        path = "".join(f"M{_n(x)} {_n(y)}h0" for x, y in mark.places)
        return f'<path class="s-{mark.colour} dot" d="{path}" stroke-width="{_n(mark.size)}"{opacity}>{title}</path>'
    look = f's-{mark.colour} open" stroke-width="1.6' if mark.shape == "ring" else f"f-{mark.colour}"
    path = "".join(_outline(mark.shape, x, y, mark.size / 2) for x, y in mark.places)
    return f'<path class="{look}" d="{path}"{opacity}>{title}</path>'


def _outline(shape: str, x: float, y: float, r: float) -> str:
    if shape == "ring":
        return f"M{_n(x - r)} {_n(y)}a{_n(r)} {_n(r)} 0 1 0 {_n(2 * r)} 0a{_n(r)} {_n(r)} 0 1 0 {_n(-2 * r)} 0z"
    corners = [(x + r * dx, y + r * dy) for dx, dy in _CORNERS[shape]]
    return "M" + "L".join(f"{_n(a)} {_n(b)}" for a, b in corners) + "z"


# Of equal weight to the eye beside a circle of radius 1.
_CORNERS = {
    "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "triangle": ((0.0, -1.2), (1.1, 0.8), (-1.1, 0.8)),
    "diamond": ((0.0, -1.25), (1.25, 0.0), (0.0, 1.25), (-1.25, 0.0)),
}


def _n(value: float) -> str:
    """A number with a decimal at most."""
    if not math.isfinite(value):
        raise ValueError(f"a mark cannot be drawn at {value}")
    text = f"{value:.1f}"
    return "0" if text in ("-0.0", "0.0") else text.removesuffix(".0")


def _opacity(value: float) -> str:
    return "" if value == 1 else f' opacity="{value:.2f}"'


def _rgba(values: Tensor) -> Tensor:
    """(H, W) from -1 to 1 -> (H, W, 4) uint8: the hue says the sign, the opacity the size."""
    values = values.detach().float().cpu().clamp(-1, 1)
    hue = torch.where((values < 0)[..., None], torch.tensor(BELOW), torch.tensor(ABOVE))
    return torch.cat([hue, (255 * values.abs()).round()[..., None]], dim=-1).to(torch.uint8)


def _png_of_values(values: Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(_rgba(values).numpy(), "RGBA").save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def drawings_to_png(
    drawings: Sequence[Drawing], title: str, legend: Sequence[tuple[str, str, str | None]] = (), columns: int = 3
) -> bytes:
    """Drawings side by side under a title and a legend, by day, as a PNG file of two pixels for one.

    Args:
        drawings: At least one.
        title: Heading.
        legend: Entries (words, colour, shape), see :func:`legend_to_svg`.
        columns: Drawings in a row.

    Raises:
        ImportError: matplotlib is not installed; the message says how to get it.
    """
    gap, head = 24.0, 64.0 if legend else 40.0
    columns = min(columns, len(drawings))
    rows = [drawings[i : i + columns] for i in range(0, len(drawings), columns)]
    width = max(sum(drawing.width for drawing in row) + gap * (len(row) + 1) for row in rows)
    height = head + sum(max(drawing.height for drawing in row) + gap for row in rows)
    figure = require_matplotlib("figure").Figure(figsize=(width / 100, height / 100), facecolor=COLOURS["ground"][0])
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    _draw(axes, Text(gap, 26, title, "ink", 16, bold=True), 0, 0)
    at = gap
    for words, colour, shape in legend:
        sign: Mark = Line(((0, 0), (20, 0)), colour, 2.4) if shape is None else Dots(((10, 0),), colour, 9, shape)
        _draw(axes, sign, at, 46)
        _draw(axes, Text(28, 4, words, "muted", 12), at, 46)
        at += 50 + 7.2 * len(words)
    top = head
    for row in rows:
        left = gap
        for drawing in row:
            for mark in drawing.marks:
                _draw(axes, mark, left, top)
            left += drawing.width + gap
        top += max(drawing.height for drawing in row) + gap
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200)
    return buffer.getvalue()


def _draw(target: Any, mark: Mark, left: float, top: float) -> None:
    """A mark by matplotlib, on axes whose unit is the pixel and whose y grows downwards."""
    # matplotlib counts widths and sizes in points, of which there are 72 where there are 100 pixels.
    point = 0.72
    if isinstance(mark, Picture):
        extent = (left + mark.x, left + mark.x + mark.width, top + mark.y + mark.height, top + mark.y)
        target.imshow(_rgba(mark.values).numpy(), extent=extent, aspect="auto", interpolation="nearest", zorder=2)
        return
    colour = COLOURS[mark.colour][0]
    if isinstance(mark, Text):
        target.text(
            left + mark.x,
            top + mark.y,
            # A lone dollar would begin a formula.
            mark.words.replace("$", r"\$"),
            color=colour,
            fontsize=mark.size * point,
            ha={"start": "left", "middle": "center", "end": "right"}[mark.anchor],
            va="baseline",
            fontweight="bold" if mark.bold else "normal",
            zorder=5,
        )
        return
    look: dict[str, Any] = {"alpha": mark.opacity, "zorder": 3}
    if isinstance(mark, Line):
        x, y = zip(*mark.points, strict=True)
        style = (0, (5, 4)) if mark.dashed else "-"
        target.plot(
            [left + value for value in x],
            [top + value for value in y],
            color=colour,
            linewidth=mark.width * point,
            linestyle=style,
            solid_joinstyle="round",
            **look,
        )
    elif isinstance(mark, Segments):
        lines = [[(left + a, top + b), (left + c, top + d)] for a, b, c, d in mark.ends]
        collection = require_matplotlib("collections").LineCollection(
            lines, colors=colour, linewidths=mark.width * point, **look
        )
        target.add_collection(collection, autolim=False)
    elif isinstance(mark, Area):
        patch = require_matplotlib("patches").Polygon([(left + x, top + y) for x, y in mark.points], closed=True)
        patch.set(facecolor=colour, linewidth=0, **look)
        target.add_patch(patch)
    elif isinstance(mark, Box):
        patch = require_matplotlib("patches").Rectangle((left + mark.x, top + mark.y), mark.width, mark.height)
        patch.set(facecolor=colour, linewidth=0, **look)
        target.add_patch(patch)
    elif mark.places:
        x, y = zip(*mark.places, strict=True)
        sign = {"circle": "o", "square": "s", "triangle": "^", "diamond": "D", "ring": "o"}[mark.shape]
        ring = mark.shape == "ring"
        target.scatter(
            [left + value for value in x],
            [top + value for value in y],
            s=(mark.size * point) ** 2,
            marker=sign,
            facecolors="none" if ring else colour,
            edgecolors=colour if ring else "none",
            linewidths=1.2,
            **look,
        )
