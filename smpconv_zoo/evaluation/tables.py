"""Tables in Markdown, read off the cards."""

from __future__ import annotations

from collections.abc import Sequence

from smpconv_zoo.pretrained.cards import CheckpointCard, checkpoint_card, list_checkpoints

__all__ = ["checkpoint_table", "markdown_table"]


def checkpoint_table() -> str:
    """Every checkpoint, one a row: those that ship with the package first, published figures apart from measured."""
    cards = sorted(map(checkpoint_card, list_checkpoints()), key=lambda card: (card.status != "embedded", card.id))
    header = ("checkpoint", "data", "parameters", "weights", "top-1, paper", "top-1, measured")
    return markdown_table(header, [_row(card) for card in cards], right=(2, 4, 5))


def _row(card: CheckpointCard) -> tuple[str, ...]:
    weights = ["embedded"] if card.status == "embedded" else []
    if card.hub is not None:
        weights.append(f"[Hub](https://huggingface.co/{card.hub.repo}/tree/{card.hub.revision})")
    if card.status == "importable":
        weights.append(f"[the authors']({card.origin}), import")
    paper = "" if card.paper is None else f"{card.paper.top1:.2f}"
    measured = "" if card.measured is None else f"[{card.measured.top1:.2f}]({card.measured.log})"
    data, parameters = f"{card.data.name}, {card.data.input}", f"{card.parameters:,}"
    return f"`{card.id}`", data, parameters, ", ".join(weights), paper, measured


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A Markdown table; columns in ``right`` are aligned to the right."""
    rule = ["---:" if column in right else "---" for column in range(len(header))]
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, rule, *rows))
