"""The page: figures and tables as one HTML file that needs no other, without scripts, for any width and any hour."""

from __future__ import annotations

import dataclasses
import html
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from smpconv_zoo.reporting.drawing import COLOURS, drawing_to_svg, legend_to_svg
from smpconv_zoo.reporting.figure import Figure, Source, Table
from smpconv_zoo.reporting.logs import RESULTS

__all__ = ["Links", "Section", "Tile", "render_page", "render_section"]


@dataclasses.dataclass(frozen=True)
class Tile:
    """A figure worth a large type: what it is, said below it, and the file that holds it."""

    figure: str
    words: str
    detail: str
    path: str


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page under a heading: a sentence or two, then figures and tables."""

    id: str
    title: str
    lead: str
    parts: tuple[Figure | Table, ...] = ()


@dataclasses.dataclass(frozen=True)
class Links:
    """How the page at ``page`` leads to files of the clone at ``root``."""

    root: Path
    page: Path

    def to(self, path: str) -> str:
        """The address of a file of the repository, seen from the page."""
        return quote(Path(os.path.relpath(self.root / path, self.page.resolve().parent)).as_posix())


def render_page(
    title: str, lead: str, tiles: Sequence[Tile], sections: Sequence[Section], made: str, links: Links
) -> str:
    """The whole page.

    Args:
        title: Its heading.
        lead: What it is about.
        tiles: Figures for its head.
        sections: Its parts.
        made: A sentence about what made it.
        links: How it leads to the repository.
    """
    shown = "".join(
        f'<a class="tile" href="{links.to(tile.path)}"><b>{html.escape(tile.figure)}</b>'
        f"<span>{html.escape(tile.words)}</span><small>{html.escape(tile.detail)}</small></a>\n"
        for tile in tiles
    )
    chapters = "".join(f'<a href="#{section.id}">{html.escape(section.title)}</a>\n' for section in sections)
    parts = "".join(render_section(section, links) for section in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{_style()}
</style>
</head>
<body>
<header>
<h1>{html.escape(title)}</h1>
<p class="lead">{html.escape(lead)}</p>
<nav aria-label="Sections">
{chapters}</nav>
<div class="tiles">
{shown}</div>
</header>
<main>
{parts}</main>
<footer>{html.escape(made)}</footer>
</body>
</html>
"""


def render_section(section: Section, links: Links) -> str:
    """One section of the page."""
    # A part that is called like its section needs no heading of its own.
    parts = "".join(_part(part, links, part.title != section.title) for part in section.parts)
    lead = f"<p>{html.escape(section.lead)}</p>\n" if section.lead else ""
    return f'<section id="{section.id}">\n<h2>{html.escape(section.title)}</h2>\n{lead}{parts}</section>\n'


def _part(part: Figure | Table, links: Links, headed: bool) -> str:
    inner = _figure(part, links) if isinstance(part, Figure) else _table(part, links)
    title = f"<h3>{html.escape(part.title)}</h3>\n" if headed else ""
    if part.folded:
        return f'<article id="{part.id}"><details><summary>{title}</summary>\n{inner}</details></article>\n'
    return f'<article id="{part.id}">\n{title}{inner}</article>\n'


def _figure(figure: Figure, links: Links) -> str:
    legend = "".join(
        f"<li>{legend_to_svg(colour, shape)}{html.escape(words)}</li>"
        for words, colour, shape in dict.fromkeys(figure.legend)
    )
    panels = "".join(f"<div>{drawing_to_svg(drawing)}</div>\n" for drawing in figure.drawings)
    return (
        f"<p>{html.escape(figure.caption)}</p>\n"
        + (f'<ul class="legend">{legend}</ul>\n' if legend else "")
        + f'<div class="panels">\n{panels}</div>\n'
        + _how(figure.sources, links)
    )


def _table(table: Table, links: Links) -> str:
    def cell(i: int, text: str) -> str:
        if i == 0:
            return f'<th scope="row">{html.escape(text)}</th>'
        kind = ' class="words"' if i in table.words else ""
        return f'<td{kind} data-label="{html.escape(table.header[i], quote=True)}">{html.escape(text)}</td>'

    head = "".join(
        f'<th scope="col"{" class=words" if i in table.words else ""}>{html.escape(name)}</th>'
        for i, name in enumerate(table.header)
    )
    rows = "".join(f"<tr>{''.join(cell(i, text) for i, text in enumerate(row))}</tr>\n" for row in table.rows)
    return (
        f"<p>{html.escape(table.caption)}</p>\n<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n"
        f"</table>\n{_how(table.sources, links)}"
    )


def _how(sources: Sequence[Source], links: Links) -> str:
    """Where a part comes from: its files, and, if asked for, the commands that make it."""
    paths = dict.fromkeys(source.path for source in sources)
    files = " ".join(
        f'<a href="{links.to(path)}">{html.escape(path.removeprefix(f"{RESULTS}/"))}</a>' for path in paths
    )
    commands = "\n".join(dict.fromkeys(source.command for source in sources if source.command))
    how = f"<details><summary>commands</summary><pre>{html.escape(commands)}</pre></details>" if commands else ""
    return f'<div class="how">{files}{how}</div>\n'


def _style() -> str:
    day, night = ("".join(f"--{name}:{pair[i]};" for name, pair in COLOURS.items()) for i in (0, 1))
    drawn = "".join(f".s-{name}{{stroke:var(--{name});fill:none}}.f-{name}{{fill:var(--{name})}}" for name in COLOURS)
    by_night = f"@media (prefers-color-scheme:dark){{:root{{{night}}}}}"
    return f":root{{color-scheme:light dark;{day}}}\n{by_night}\n{drawn}{_STYLE}"


_STYLE = """
polyline,path{stroke-linejoin:round} .dot,.open{stroke-linecap:round} image{image-rendering:pixelated}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0 auto;max-width:1160px;padding:0 24px 64px;background:var(--ground);color:var(--ink);
font:16px/1.6 Inter,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
font-variant-numeric:tabular-nums}
h1,h2{font-weight:650;line-height:1.2;letter-spacing:-.022em}
h1{font-size:clamp(2rem,5vw,2.9rem);margin:56px 0 12px}
h2{font-size:1.6rem;margin:0 0 8px}
h3{font-size:1.02rem;font-weight:600;margin:0 0 6px;overflow-wrap:anywhere}
p{max-width:74ch;margin:0 0 14px;text-wrap:pretty} .lead{font-size:1.15rem;color:var(--muted);max-width:66ch}
section{margin-top:56px;padding-top:40px;border-top:1px solid var(--rule);scroll-margin-top:8px}
article{margin-top:32px} h2+article{margin-top:14px} article p{color:var(--muted)}
a{color:var(--first);text-decoration-thickness:1px;text-underline-offset:3px}
a:focus-visible,summary:focus-visible{outline:2px solid var(--first);outline-offset:3px;border-radius:3px}
nav{display:flex;flex-wrap:wrap;gap:6px 20px;margin:22px 0 30px} nav a{text-decoration:none}
nav a:hover,.how a:hover{text-decoration:underline}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,220px),1fr));gap:16px}
.tile{display:block;padding:18px 20px 16px;border:1px solid var(--rule);border-radius:10px;color:var(--ink);
text-decoration:none} .tile:hover{border-color:var(--first)}
.tile b{display:block;font-size:2rem;line-height:1.15;font-weight:600;letter-spacing:-.02em}
.tile span{display:block;margin-top:4px} .tile small{color:var(--muted)}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,316px),1fr));gap:28px 32px;
margin:18px 0 10px}
.panels>div{max-width:440px;min-width:0} .panels svg{display:block;width:100%;height:auto;overflow:visible}
.panels text{font-family:inherit} .halo{paint-order:stroke;stroke:var(--ground);stroke-width:3px}
.legend{display:flex;flex-wrap:wrap;gap:4px 22px;list-style:none;margin:0;padding:0;font-size:.88rem}
.legend li{display:flex;align-items:center} .key{margin-right:7px;flex:none}
.how{display:flex;flex-wrap:wrap;gap:2px 16px;align-items:baseline;font-size:.82rem;color:var(--muted)}
.how a{color:var(--muted);text-decoration:none;border-bottom:1px solid var(--rule);overflow-wrap:anywhere}
.how details{max-width:100%} .how details[open]{flex-basis:100%} summary{cursor:pointer} summary h3{display:inline}
pre{margin:6px 0 0;padding:12px 14px;border:1px solid var(--rule);border-radius:8px;white-space:pre-wrap;
overflow-wrap:anywhere;font:12.5px/1.6 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace}
table{border-collapse:collapse;width:100%;font-size:.9rem;margin:16px 0 10px}
th,td{padding:7px 0 7px 18px;text-align:right;border-bottom:1px solid var(--rule);vertical-align:baseline}
td{font-weight:400}
thead th{color:var(--muted);font-size:.8rem;border-bottom-color:var(--muted)}
th:first-child,.words{text-align:left} th:first-child{padding-left:0} tbody th{font-weight:500}
footer{margin-top:64px;padding-top:20px;border-top:1px solid var(--rule);color:var(--muted);font-size:.85rem}
@media (max-width:700px){
body{padding:0 18px 48px} h1{margin-top:36px} section{margin-top:40px;padding-top:28px}
thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
table,tbody,tr,tbody th,td{display:block} tr{padding:10px 0;border-bottom:1px solid var(--rule)}
tbody th{padding:0 0 4px;border:0;font-weight:600;overflow-wrap:anywhere}
td,td.words{display:flex;justify-content:space-between;gap:16px;padding:2px 0;border:0;text-align:right}
td:before{content:attr(data-label);color:var(--muted);flex:none} td:empty{display:none}
}
@media print{section,article{break-inside:avoid} .how details,nav{display:none}}
""".strip("\n")
