"""The authors' tables: what they publish for their networks, each with its source."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from smpconv_zoo.pretrained.cards import parse

__all__ = ["PaperRow", "PaperTable", "paper_tables"]


@dataclasses.dataclass(frozen=True)
class PaperRow:
    """A line of a table.

    Args:
        row: What it is called.
        checkpoint: Id of the checkpoint that it is the figure of.
        dropped: Percent of the time steps that are left out.
        top1: In percent; None where the authors publish nothing.
        parameters: As published, rounded; None for the same as above.
        macs: Multiply-accumulates, as published.
        note: What else there is to say.
    """

    row: str
    checkpoint: str
    dropped: int
    top1: float | None
    parameters: str | None
    macs: str | None
    note: str


@dataclasses.dataclass(frozen=True)
class PaperTable:
    """A table: its short name, its title, where it is published, and its lines."""

    name: str
    title: str
    source: str
    rows: tuple[PaperRow, ...]


def paper_tables() -> tuple[PaperTable, ...]:
    """All tables, of paper_tables.json beside this file."""
    text = (Path(__file__).parent / "paper_tables.json").read_text(encoding="utf-8")
    tables: tuple[Any, ...] = tuple(parse(PaperTable, entry, "paper_tables.json") for entry in json.loads(text))
    return tables
