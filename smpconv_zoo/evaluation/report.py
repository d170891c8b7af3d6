"""A report of evaluations: pictures, a Markdown page and one HTML page that carries its pictures inside."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Sequence
from pathlib import Path

from smpconv_zoo.evaluation.classification import EvaluationResult, load_pretrained
from smpconv_zoo.evaluation.figures import confusion_figure, kernel_figure, resolution_figure
from smpconv_zoo.evaluation.resolution import WAYS, ResolutionResult
from smpconv_zoo.files import write_whole
from smpconv_zoo.pretrained.cards import MeasuredResult, checkpoint_card

__all__ = ["HEADER", "RESOLUTION_HEADER", "resolution_rows", "table_row", "write_report"]

HEADER = ("checkpoint", "data", "protocol", "parameters", "top-1, paper", "top-1, card", "top-1, measured", "seconds")

NOTE = (
    "Top-1 accuracy in percent on the test part of the data named: what the authors publish (paper), what the "
    "checkpoint's card declares (card), and what this run measured. The column of the paper is empty where the authors "
    "publish no figure for that very data: results on 5,000 digits do not compare with published ones on 60,000. "
    "Protocol sound: the weights were chosen on a validation part; reference: on the test part itself, as the authors "
    "do, which makes the figure too good."
)

RESOLUTION_HEADER = ("checkpoint", "size", "trained at", *(f"{way}, top-1" for way in WAYS))
RESOLUTION_TITLE = "Other resolutions"
RESOLUTION_PICTURE = "resolution.png"
RESOLUTION_NOTE = (
    "The same digits sampled more or less densely, without any training: the network left as it is (fixed), the input "
    "resized to the size of the training (resized), or the points read off at the new grid (continuous)."
)

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
table { border-collapse: collapse; } th, td { padding: .4rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:nth-child(-n+3), td:nth-child(-n+3) { text-align: left; } th { border-bottom: 2px solid #222; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; } .note { color: #555; font-size: .9rem; }
"""


def write_report(
    results: Sequence[EvaluationResult],
    folder: str | os.PathLike[str],
    resolution: Sequence[ResolutionResult] = (),
) -> Path:
    """Write ``report.md``, its pictures and the self-contained ``index.html`` into ``folder``.

    The folder is made if need be; files of an earlier report in it are replaced, each whole.

    Args:
        results: What was measured; every checkpoint's weights are read again for the pictures of its kernels.
        folder: Where to write.
        resolution: Accuracies at other resolutions, for a table and a plot of their own; the ways in
            :data:`~smpconv_zoo.evaluation.resolution.WAYS` are shown.

    Returns:
        The path of ``index.html``.

    Raises:
        ImportError: matplotlib is not installed; the message says how to get it.
        OSError: The folder cannot be made or written.
    """
    folder = Path(folder)
    pictures = {name: png for result in results for name, png in _pictures(result).items()}
    if resolution:
        pictures[RESOLUTION_PICTURE] = resolution_figure(_curves(resolution))
    folder.mkdir(parents=True, exist_ok=True)
    for name, png in pictures.items():
        write_whole(folder / name, png)
    write_whole(folder / "report.md", _markdown(results, pictures, resolution).encode())
    write_whole(folder / "index.html", _html(results, pictures, resolution).encode())
    return folder / "index.html"


def table_row(result: EvaluationResult) -> tuple[str, ...]:
    """One line of the table under :data:`HEADER`: cells ready to be shown."""
    card = checkpoint_card(result.id)
    return (
        result.id,
        f"{card.data.name}, {card.data.input}",
        _protocol(result),
        f"{card.parameters:,}",
        "-" if result.paper is None else f"{result.paper.top1:.2f}",
        "-" if result.measured is None else _figure(result.measured),
        _figure(result),
        f"{result.seconds:.1f}",
    )


def resolution_rows(results: Sequence[ResolutionResult], ways: Sequence[str] = WAYS) -> list[tuple[str, ...]]:
    """Lines of the table under :data:`RESOLUTION_HEADER`: one for each checkpoint and size, in their order.

    Args:
        results: What was measured.
        ways: The columns behind the first three.
    """
    lines: dict[tuple[str, int, int], dict[str, str]] = {}
    for result in results:
        cells = lines.setdefault((result.id, result.size, result.trained), {})
        cells[result.way] = f"{result.top1:.2f}"
    rows = []
    for (name, size, trained), cells in lines.items():
        # At the size of the training all ways are one.
        values = [cells.get(way, cells.get("fixed", "") if size == trained else "") for way in ways]
        rows.append((name, str(size), str(trained), *values))
    return rows


def _curves(results: Sequence[ResolutionResult]) -> list[tuple[str, int, dict[str, list[tuple[int, float]]]]]:
    curves = []
    for name in dict.fromkeys(result.id for result in results):
        own = [result for result in results if result.id == name]
        native = [(result.size, result.top1) for result in own if result.size == result.trained]
        ways = {
            way: [(result.size, result.top1) for result in own if result.way == way and result.size != result.trained]
            for way in WAYS
        }
        curves.append((name, own[0].trained, {way: points + native for way, points in ways.items() if points}))
    return curves


def _protocol(result: EvaluationResult) -> str:
    """How the weights were chosen; and how the test part was made, where that is not the usual way."""
    chosen = result.protocol or "-"
    return chosen if result.test_part in ("sound", chosen) else f"{chosen}, {result.test_part}"


def _figure(result: EvaluationResult | MeasuredResult) -> str:
    return f"{result.top1:.2f} ({result.correct} of {result.total})"


def _pictures(result: EvaluationResult) -> dict[str, bytes]:
    kernels = kernel_figure(load_pretrained(checkpoint_card(result.id)), result.id)
    pictures = {} if kernels is None else {f"{result.id}.kernels.png": kernels}
    if result.confusion is not None:
        pictures[f"{result.id}.confusion.png"] = confusion_figure(result.confusion, result.id)
    return pictures


def _verdict(result: EvaluationResult) -> str:
    if result.agrees is None:
        return "The card declares no figure to compare with."
    return "Equal to the card's figure." if result.agrees else "NOT equal to the card's figure."


def _origin(results: Sequence[EvaluationResult]) -> str:
    """The machine side of the numbers: device and versions, once, as all results of a run share them."""
    if not results:
        return "Nothing was evaluated."
    versions = ", ".join(f"{name} {version}" for name, version in results[0].versions.items())
    return f"Measured in float32 on {results[0].device} with {versions}."


def _markdown(
    results: Sequence[EvaluationResult], pictures: dict[str, bytes], resolution: Sequence[ResolutionResult]
) -> str:
    lines = ["# SMPConv checkpoints, evaluated", "", _markdown_row(HEADER)]
    lines += [
        "|---|---|---" + "|---:" * (len(HEADER) - 3) + "|",
        *(_markdown_row(table_row(result)) for result in results),
    ]
    lines += ["", NOTE, "", _origin(results), ""]
    for result in results:
        lines += [f"## {result.id}", "", _verdict(result), ""]
        lines += [f"![{name}]({name})\n" for name in pictures if name.startswith(f"{result.id}.")]
    if resolution:
        lines += [f"## {RESOLUTION_TITLE}", "", RESOLUTION_NOTE, "", _markdown_row(RESOLUTION_HEADER)]
        lines += ["|---" + "|---:" * (len(RESOLUTION_HEADER) - 1) + "|"]
        lines += [_markdown_row(row) for row in resolution_rows(resolution)]
        lines += ["", f"![{RESOLUTION_TITLE}]({RESOLUTION_PICTURE})", ""]
    return "\n".join(lines)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _html(
    results: Sequence[EvaluationResult], pictures: dict[str, bytes], resolution: Sequence[ResolutionResult]
) -> str:
    rows = [_html_row("th", HEADER), *(_html_row("td", table_row(result)) for result in results)]
    sections = []
    for result in results:
        sections.append(f"<h2>{html.escape(result.id)}</h2>\n<p>{html.escape(_verdict(result))}</p>")
        for name, png in pictures.items():
            if name.startswith(f"{result.id}."):
                sections.append(_html_picture(name, png))
    if resolution:
        table = [_html_row("th", RESOLUTION_HEADER), *(_html_row("td", row) for row in resolution_rows(resolution))]
        sections.append(f"<h2>{RESOLUTION_TITLE}</h2>\n<p>{html.escape(RESOLUTION_NOTE)}</p>\n<table>")
        sections += [*table, "</table>", _html_picture(RESOLUTION_PICTURE, pictures[RESOLUTION_PICTURE])]
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>SMPConv checkpoints, evaluated</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            "<h1>SMPConv checkpoints, evaluated</h1>\n<table>",
            *rows,
            f'</table>\n<p class="note">{html.escape(NOTE)}</p>\n<p class="note">{html.escape(_origin(results))}</p>',
            *sections,
            "</body>\n</html>\n",
        ]
    )


def _html_picture(name: str, png: bytes) -> str:
    data = base64.b64encode(png).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(name)}">'


def _html_row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
