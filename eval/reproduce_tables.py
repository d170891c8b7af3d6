"""The authors' tables and our own checkpoints, measured again: paper | measured | how.

Runs whatever weights (embedded, imported, folders of runs) and data are at hand; says what is missing, and how to get
it.

    python eval/reproduce_tables.py --data-dir ~/data --imagenet ~/in1k --device cuda --markdown
    python eval/reproduce_tables.py --only 'smpconv_tcn_chartraj.*' --data-dir ~/data --run runs/ct30
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer

from smpconv_zoo.console import print_table, progress_bar, run_script
from smpconv_zoo.environment import hardware, versions
from smpconv_zoo.evaluation.tables import markdown_table
from smpconv_zoo.files import write_whole
from smpconv_zoo.reproducing import OWN, Options, ReproducedRow, ReproducedTable, differing, reproduce
from smpconv_zoo.training.recipe import PROTOCOLS
from smpconv_zoo.training.world import join_world

EXAMPLE = "Example: `python eval/reproduce_tables.py --data-dir ~/data --imagenet ~/in1k --device cuda --check`"
app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)


@app.command(epilog=EXAMPLE, context_settings={"help_option_names": ["-h", "--help"]})
def main(
    data_dir: Annotated[
        Path | None,
        typer.Option(metavar="PATH", envvar="SMPCONV_DATA", help="Folder with the data that no package holds."),
    ] = None,
    imagenet: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="ImageNet: folders, tars, shards, hfds/NAME; else in --data-dir."),
    ] = None,
    run: Annotated[
        list[Path] | None, typer.Option("--run", metavar="FOLDER", help="A run whose figure stands in its task's line.")
    ] = None,
    only: Annotated[str, typer.Option(metavar="PATTERN", help="Of these checkpoints alone; a wildcard.")] = "*",
    partial: Annotated[bool, typer.Option("--partial", help="Of ImageNet, something may be missing.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples at a time of a process.")] = 100,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read, of each process.")] = 4,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many samples of each set, spread evenly.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda; under torchrun each process takes its GPU.")] = "cpu",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
    out: Annotated[Path | None, typer.Option(help="File to write: .md or .json.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Status 1 where a figure differs from its card.")] = False,
) -> None:
    """Print the authors' tables and ours, with what was measured now beside what is published."""
    if out is not None and (out.suffix not in (".md", ".json") or not out.parent.is_dir()):
        raise typer.BadParameter(f"--out has to end in .md or .json, in a folder that is there, got {out}")
    options = Options(data_dir, imagenet, tuple(run or ()), only, partial, batch_size, workers, limit)
    with join_world(device) as world:

        def progress(title: str) -> AbstractContextManager[Any]:
            return progress_bar(title, shown=world.leads)

        tables = reproduce(options, world, progress)
        if not world.leads:
            return
    if not tables:
        raise ValueError(f"no table has a line about {only!r}")
    origin = {"hardware": hardware(device), "versions": versions()}
    if out is not None:
        write_whole(out, (_markdown(tables, origin) if out.suffix == ".md" else _json(tables, origin)).encode())
    if as_json or markdown:
        typer.echo(_json(tables, origin) if as_json else _markdown(tables, origin), nl=False)
    else:
        _show(tables)
    failed = [f"{row.checkpoint} ({row.error})" for table in tables for row in table.rows if row.error is not None]
    if failed:
        typer.echo(f"reproduce_tables.py: could not be measured: {'; '.join(failed)}", err=True)
    wrong = differing(tables)
    if wrong:
        typer.echo(f"reproduce_tables.py: not equal to the card's figure: {', '.join(wrong)}", err=True)
    if failed or (check and wrong):
        raise typer.Exit(1)


def _header(table: ReproducedTable) -> tuple[str, ...]:
    return (
        "",
        "data",
        "dropped",
        "parameters",
        "protocol",
        "card" if table.name == OWN[0] else "paper",
        "measured",
        "how",
    )


def _cells(row: ReproducedRow) -> tuple[str, ...]:
    measured = "-" if row.measured is None else f"{row.measured:.2f} ({row.correct:,} of {row.total:,})"
    verdict = {True: "equal: ", False: "NOT EQUAL: ", None: ""}[row.agrees]
    how = f"{verdict}{row.how}"
    if row.missing:
        how = f"missing, see below: {' and '.join(sentence.partition(':')[0] for sentence in row.missing)}"
    if row.error is not None:
        how = "failed, see below"
    return (
        row.row,
        row.data,
        f"{row.dropped} %" if row.dropped else "",
        row.parameters,
        row.protocol or "",
        "-" if row.paper is None else f"{row.paper:.2f}",
        measured,
        how,
    )


def _remarks(tables: Sequence[ReproducedTable]) -> list[str]:
    """What is missing, and how to get it; every sentence once, with the lines that it is about."""
    about: dict[str, list[str]] = {}
    for table in tables:
        for row in table.rows:
            name = row.row + (f", {row.dropped} % dropped" if row.dropped else "")
            error = () if row.error is None else (f"failed: {row.error}",)
            for sentence in (*row.missing, *error, *row.notes):
                about.setdefault(sentence, []).append(name)
    return [f"{'; '.join(dict.fromkeys(names))}: {sentence}" for sentence, names in about.items()]


def _show(tables: Sequence[ReproducedTable]) -> None:
    for table in tables:
        typer.echo(f"{table.title}\npaper: {table.source}" if table.name != OWN[0] else table.title)
        print_table(_header(table), [_cells(row) for row in table.rows], numbers=(2, 3, 5, 6))
    for protocol, meaning in PROTOCOLS.items():
        typer.echo(f"protocol {protocol}: {meaning}")
    for remark in _remarks(tables):
        typer.echo(remark)


def _markdown(tables: Sequence[ReproducedTable], origin: dict[str, Any]) -> str:
    lines = []
    for table in tables:
        source = "" if table.name == OWN[0] else f"\npaper: {table.source}\n"
        rows = [[cell.replace("|", "\\|") for cell in _cells(row)] for row in table.rows]
        lines.append(f"## {table.title}\n{source}\n{markdown_table(_header(table), rows, right=(2, 3, 5, 6))}")
    protocols = "".join(f"- protocol {protocol}: {meaning}\n" for protocol, meaning in PROTOCOLS.items())
    remarks = "".join(f"- {remark}\n" for remark in _remarks(tables))
    made = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    return "\n".join(lines) + f"\n{protocols}{remarks}\nMeasured in float32 on {origin['hardware']}, {made}.\n"


def _json(tables: Sequence[ReproducedTable], origin: dict[str, Any]) -> str:
    return json.dumps({**origin, "tables": [dataclasses.asdict(table) for table in tables]}, indent=2) + "\n"


if __name__ == "__main__":
    run_script("reproduce_tables.py", app)
