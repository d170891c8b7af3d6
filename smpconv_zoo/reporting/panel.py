"""Panels: a drawing with a title, two axes, and methods that place values on them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from smpconv_zoo.reporting.drawing import Area, Box, Dots, Drawing, Line, Mark, Segments, Text

__all__ = ["Axis", "Panel", "log_ticks", "round_ticks", "short_number", "spread"]

WIDTH, HEIGHT = 340.0, 256.0

# Between the base lines of words.
LINE = 12.5


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis: what it counts, from where to where (``low`` may be the larger), and where it is marked.

    ``names`` replace the numbers at ``ticks``. A logarithmic axis needs positive ends.
    """

    label: str
    low: float
    high: float
    log: bool = False
    ticks: tuple[float, ...] | None = None
    names: tuple[str, ...] | None = None

    def share(self, value: float) -> float:
        """Where a value lies: 0 at ``low``, 1 at ``high``."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def marked(self) -> list[tuple[float, str]]:
        """Ticks with their words."""
        low, high = sorted((self.low, self.high))
        ticks = self.ticks or (log_ticks(low, high) if self.log else round_ticks(low, high))
        names = self.names or tuple(short_number(tick) for tick in ticks)
        return [(tick, name) for tick, name in zip(ticks, names, strict=True) if low <= tick <= high]


class Panel:
    """A panel that is filled mark by mark and then drawn.

    Args:
        title: Its heading, short.
        x: The horizontal axis.
        y: The vertical axis, its label above it.
        height: In pixels; the width is the same for all panels.
        foot: Pixels above the horizontal axis that values do not reach.
    """

    def __init__(self, title: str, x: Axis, y: Axis, height: float = HEIGHT, foot: float = 0.0) -> None:
        self.title, self.x, self.y, self.height = title, x, y, height
        self.left, self.right, self.top, self.bottom = 44.0, WIDTH - 14.0, 50.0, height - 40.0
        self.floor = self.bottom - foot
        self.marks: list[Mark] = []

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a place in the units of the axes."""
        across = self.left + (self.right - self.left) * self.x.share(x)
        return across, self.floor - (self.floor - self.top) * self.y.share(y)

    def line(
        self, points: Iterable[tuple[float, float]], colour: str, width: float = 1.8, dashed: bool = False
    ) -> None:
        """A line through places, left out where they are less than two."""
        placed = tuple(self.at(*point) for point in points)
        if len(placed) > 1:
            self.marks.append(Line(placed, colour, width, dashed))

    def band(self, points: Sequence[tuple[float, float, float]], colour: str) -> None:
        """What lies between two lines: (x, lower, upper)."""
        if len(points) > 1:
            upper = [self.at(x, high) for x, _, high in points]
            lower = [self.at(x, low) for x, low, _ in reversed(points)]
            self.marks.append(Area((*upper, *lower), colour))

    def dots(
        self,
        places: Iterable[tuple[float, float]],
        colour: str,
        size: float = 7.0,
        shape: str = "circle",
        opacity: float = 1.0,
        title: str = "",
    ) -> None:
        """Marks at places."""
        placed = tuple(self.at(*place) for place in places)
        self.marks.append(Dots(placed, colour, size, shape, opacity, title))

    def whisker(self, x: float, low: float, high: float, colour: str) -> None:
        """A vertical line from ``low`` to ``high``."""
        across, down = self.at(x, low)
        self.marks.append(Segments(((across, down, across, self.at(x, high)[1]),), colour, 1.4))

    def labels(self, places: Iterable[tuple[float, float, str, str]]) -> None:
        """Words (x, y, words, colour) beside their places, pushed apart where places are close.

        They stand on the right where there is room, else on the left.
        """
        # Base lines that are taken, of either side, from the bottom up.
        taken: dict[bool, list[tuple[float, float, float]]] = {True: [], False: []}
        for x, y, words, colour in sorted(places, key=lambda place: place[1]):
            across, down = self.at(x, y)
            width = 6.2 * len(words)
            fits = across + 9 + width < WIDTH
            start = across + 9 if fits else across - 9 - width
            base = down + 4
            for left, right, line in taken[fits]:
                if start < right and left < start + width and base > line - LINE:
                    base = line - LINE
            taken[fits].append((start, start + width, base))
            anchor, place = ("start", across + 9) if fits else ("end", across - 9)
            self.marks.append(Text(place, base, words, colour, anchor=anchor, halo=True))

    def reference(self, x: float, words: str = "") -> None:
        """A dashed vertical line, with words at its upper end."""
        across, _ = self.at(x, self.y.low)
        self.marks.append(Line(((across, self.top), (across, self.bottom)), "muted", 1.0, True))
        if words:
            left = across > (self.left + self.right) / 2
            anchor = "end" if left else "start"
            self.marks.append(Text(across + (-5 if left else 5), self.top + 9, words, anchor=anchor, halo=True))

    def drawn(self, description: str) -> Drawing:
        """The panel as it is now."""
        frame: list[Mark] = [Text(2, 14, self.title, "ink", 13, bold=True)]
        frame.append(Text(2, 32, self.y.label))
        for tick, name in self.y.marked():
            _, down = self.at(self.x.low, tick)
            frame.append(Line(((self.left, down), (self.right, down)), "rule", 1.0))
            frame.append(Text(self.left - 7, down + 4, name, anchor="end"))
        frame.append(Line(((self.left, self.bottom), (self.right, self.bottom)), "plain", 1.0))
        for tick, name in self.x.marked():
            across, _ = self.at(tick, self.y.low)
            frame.append(Box(across - 0.5, self.bottom, 1, 4, "plain"))
            frame.append(Text(across, self.bottom + 17, name, anchor="middle"))
        frame.append(Text(self.right, self.height - 6, self.x.label, anchor="end"))
        return Drawing(WIDTH, self.height, (*frame, *self.marks), description)


def round_ticks(low: float, high: float, most: int = 5) -> tuple[float, ...]:
    """At most ``most`` or one more round values from ``low`` to ``high``."""
    if not high > low:
        return (low,)
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return tuple(step * i for i in range(first, math.floor(high / step + 1e-9) + 1))


def log_ticks(low: float, high: float) -> tuple[float, ...]:
    """Powers of ten from ``low`` to ``high``, with some multiples where those are fewer than three."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = tuple(factor * 10.0**e for e in exponents for factor in factors if low <= factor * 10.0**e <= high)
        if len(ticks) >= 3:
            return ticks
    return round_ticks(low, high)


def spread(values: Sequence[float], log: bool = False, room: float = 0.12) -> tuple[float, float]:
    """Ends of an axis that holds the values with some room on both sides."""
    low, high = min(values), max(values)
    if log:
        extent = max(math.log(high / low), math.log(1.5))
        return low * math.exp(-room * extent), high * math.exp(room * extent)
    extent = max(high - low, 1e-9, 0.02 * abs(high))
    return low - room * extent, high + room * extent


def short_number(value: float) -> str:
    """A number for an axis: 20, 0.05, 300k, 26.7M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size and (size > 1e3 or abs(value) >= 1e4):
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"
