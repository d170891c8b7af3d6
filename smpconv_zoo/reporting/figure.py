"""A figure of the report: drawings under one title, what to see in them, and where they come from."""

from __future__ import annotations

import dataclasses

from smpconv_zoo.reporting.drawing import Drawing

__all__ = ["FORMS", "Figure", "Source", "Table", "form_look"]

# Forms of the digits, and how every figure draws them: colour, shape.
FORMS = {
    "sequence": ("first", "circle"),
    "permuted sequence": ("fourth", "diamond"),
    "image": ("third", "square"),
}


@dataclasses.dataclass(frozen=True)
class Source:
    """A file of the repository, by its path there, and the command that makes it."""

    path: str
    command: str


@dataclasses.dataclass(frozen=True)
class Figure:
    """Drawings, with a caption that says what to see.

    ``legend`` has entries (words, colour, shape); a shape of None stands for a line. A ``folded`` figure is shown when
    it is asked for.
    """

    id: str
    title: str
    caption: str
    drawings: tuple[Drawing, ...]
    sources: tuple[Source, ...]
    legend: tuple[tuple[str, str, str | None], ...] = ()
    folded: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under a header; the first column names a row, and columns in ``words`` hold no numbers.

    A ``folded`` table is shown when it is asked for.
    """

    id: str
    title: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    sources: tuple[Source, ...]
    words: tuple[int, ...] = (0,)
    folded: bool = False


def form_look(form: str) -> tuple[str, str, str]:
    """Of a card's form of input: its short name, colour and shape."""
    name = next((known for known in ("permuted sequence", "image", "sequence") if form.startswith(known)), "sequence")
    return (name, *FORMS[name])
