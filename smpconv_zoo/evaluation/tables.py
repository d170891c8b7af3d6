"""Tables in Markdown: the README's and the page of the folder `weights/`, read off the cards; where data come from.

`python -m smpconv_zoo.evaluation.tables` prints the first, with `--page` the second, with `--data` the third.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from smpconv_zoo.data.sources import SOURCES
from smpconv_zoo.pretrained.cards import CheckpointCard, checkpoint_card, list_checkpoints

__all__ = ["checkpoint_table", "data_tables", "markdown_table", "weights_page"]


def checkpoint_table(root: str = "") -> str:
    """Every checkpoint, one a row: those that ship with the package first, published figures apart from measured.

    Args:
        root: Where the repository lies, seen from the page that holds the table: "" or "../".
    """
    cards = sorted(map(checkpoint_card, list_checkpoints()), key=lambda card: (card.status != "embedded", card.id))
    header = ("checkpoint", "data", "parameters", "weights", "top-1, paper", "top-1, measured")
    return markdown_table(header, [_row(card, root) for card in cards], right=(2, 4, 5))


def weights_page() -> str:
    """The README of `weights/`: the table, then what each card says in a sentence or two."""
    cards = map(checkpoint_card, list_checkpoints())
    sections = "".join(f"\n## {card.id}\n\n{_section(card)}" for card in cards)
    return (
        "# Checkpoints\n\nMade from the cards in this folder by `python -m smpconv_zoo.evaluation.tables --page`.\n\n"
        f"{checkpoint_table('../')}{sections}"
    )


def data_tables() -> str:
    """What `smpconv-zoo data fetch` knows: the sets, and below them their archives with the published digests."""
    sets, archives = [], []
    for source in SOURCES.values():
        size = "" if source.bytes is None else f"{source.bytes:,}"
        title = f"[{source.title}]({source.homepage})"
        samples = f"{source.samples:,} {source.counted}"
        sets.append((f"`{source.name}`", title, size, samples, source.licence, source.checksums, source.notes))
        for file in source.files:
            hosts = " or ".join(dict.fromkeys(url.split("/")[2] for url in file.urls))
            size = "" if file.bytes is None else f"{file.bytes:,}"
            archives.append((file.name, size, hosts, "not published" if file.sha256 is None else f"`{file.sha256}`"))
    header = ("name", "data", "bytes to fetch", "holds", "licence", "digest published by", "notes")
    below = markdown_table(("archive", "bytes", "from", "sha256"), archives, right=(1,))
    return f"{markdown_table(header, sets, right=(2,))}\n{below}"


def _row(card: CheckpointCard, root: str) -> tuple[str, ...]:
    weights = ["embedded"] if card.status == "embedded" else []
    if card.hub is not None:
        weights.append(f"[Hub](https://huggingface.co/{card.hub.repo}/tree/{card.hub.revision})")
    if card.status == "importable":
        weights.append(f"[the authors']({card.origin}), import")
    paper = "" if card.paper is None else f"{card.paper.top1:.2f}"
    measured = "" if card.measured is None else f"[{card.measured.top1:.2f}]({root}{card.measured.log})"
    data, parameters = f"{card.data.name}, {card.data.input}", f"{card.parameters:,}"
    return f"`{card.id}`", data, parameters, ", ".join(weights), paper, measured


def _section(card: CheckpointCard) -> str:
    lines = [
        f"- network: `{card.network}`, {card.parameters:,} parameters, {card.macs / 1e9:.3f} G multiply-accumulates",
        f"- data: {card.data.name}, {card.data.input}; {card.data.split}",
        f"- licence {card.license}; origin: {card.origin}",
    ]
    if card.paper is not None:
        lines.append(f"- paper: top-1 {card.paper.top1:.2f} % ({card.paper.source})")
    if card.measured is not None:
        lines.append(
            f"- measured: top-1 {card.measured.top1:.2f} % ({card.measured.correct} of {card.measured.total}) by "
            f"`{card.measured.command}`"
        )
    if card.training is not None:
        lines.append(f"- trained by `{card.training.command}`, seed {card.training.seed}, {card.training.hardware}")
        lines.append(f"- chosen by: {card.training.chosen_by}")
    lines += [f"- file: `{file.name}`, {file.bytes:,} bytes, sha256 `{file.sha256}`" for file in card.files]
    return "\n".join(lines) + "\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A Markdown table; columns in ``right`` are aligned to the right."""
    rule = ["---:" if column in right else "---" for column in range(len(header))]
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, rule, *rows))


if __name__ == "__main__":
    page = weights_page if "--page" in sys.argv else data_tables if "--data" in sys.argv else checkpoint_table
    sys.stdout.write(page())
