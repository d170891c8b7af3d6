"""The authors' runs before they are paid for: commands, time and cost; with --run, every stage on made-up data.

python eval/rehearse.py --price 3
python eval/rehearse.py --run rehearsal --only 'smpconv_tcn*' --log eval/results/rehearsal.txt
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated

import typer

from smpconv_zoo.console import print_table, run_script
from smpconv_zoo.environment import hardware, versions
from smpconv_zoo.evaluation.paper_tables import PaperRow
from smpconv_zoo.evaluation.tables import markdown_table
from smpconv_zoo.files import write_whole
from smpconv_zoo.rehearsing import PlannedRun, Stage, plan_runs, rehearsal_overrides, rehearse, rehearsed_rows
from smpconv_zoo.training.run_folder import command_line

RESULTS = Path(__file__).resolve().parent / "results"
EXAMPLE = "Example: `python eval/rehearse.py --price 3`, or `python eval/rehearse.py --run rehearsal --log log.txt`"
app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)


@app.command(epilog=EXAMPLE, context_settings={"help_option_names": ["-h", "--help"]})
def main(
    only: Annotated[str, typer.Option(metavar="PATTERN", help="Runs of these checkpoints alone; a wildcard.")] = "*",
    price: Annotated[float | None, typer.Option(min=0, help="Of a GPU for an hour, in your currency.")] = None,
    scaling: Annotated[
        float, typer.Option(help="Share of the eightfold speed that eight GPUs are assumed to reach with pictures.")
    ] = 0.9,
    results: Annotated[Path, typer.Option(help="Folder of the measurements on an H100.")] = RESULTS,
    run: Annotated[
        Path | None, typer.Option("--run", metavar="FOLDER", help="Go through every stage on made-up data, in FOLDER.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where the rehearsal computes.")] = "cpu",
    log: Annotated[Path | None, typer.Option(help="Of the rehearsal, a file to write when it went well.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the plan as Markdown.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON for programs.")] = False,
) -> None:
    """Print what the authors' runs take on one H100 and on eight, or rehearse them.

    Times on one GPU follow from steps that were measured; what eight take is an assumption.
    """
    rows = rehearsed_rows(only)
    if not rows:
        raise ValueError(f"no run is called {only!r}")
    if run is not None:
        if log is not None and not log.parent.is_dir():
            raise FileNotFoundError(f"{log.parent} is no folder: make it first")
        _rehearse(rows, run, device, log)
        return
    planned = plan_runs(results, price, scaling, only)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(entry) for entry in planned], indent=2))
    elif markdown:
        header, cells = _table(planned)
        typer.echo(markdown_table(header, cells, right=range(1, len(header) - 1)))
        typer.echo(_commands(planned))
    else:
        header, cells = _table(planned)
        print_table(header, cells, numbers=range(1, len(header) - 1))
        typer.echo(_commands(planned))


def _table(planned: list[PlannedRun]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    priced = any(entry.cost is not None for entry in planned)
    header = ("run", "dropped", "steps", "1 H100, h", "cost", "8 H100, h (assumed)", "cost", "from")
    cells = [
        (
            entry.row,
            f"{entry.dropped} %" if entry.dropped else "",
            f"{entry.steps:,}",
            f"{entry.hours:.2f}",
            f"{entry.cost or 0:,.2f}",
            f"{entry.hours_eight:.2f}",
            f"{entry.cost_eight or 0:,.2f}",
            entry.speed,
        )
        for entry in planned
    ]
    if priced:
        return header, cells
    return _without_cost(header), [_without_cost(row) for row in cells]


def _without_cost(row: tuple[str, ...]) -> tuple[str, ...]:
    return (*row[:4], row[5], row[7])


def _commands(planned: list[PlannedRun]) -> str:
    lines = []
    for entry in planned:
        name = entry.row + (f", {entry.dropped} % dropped" if entry.dropped else "")
        lines += [
            name,
            f"  check:    {entry.check}",
            f"  one GPU:  {entry.train}",
            f"  eight:    {entry.train_eight}",
            f"  measure:  {entry.evaluate}",
            f"  assumed:  {'; '.join(entry.assumptions)}",
        ]
    return "\n".join(lines)


def _rehearse(rows: list[PaperRow], folder: Path, device: str, log: Path | None) -> None:
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [
        f"$ {command_line()}",
        f"# {hardware(device)}, {made}; {time.strftime('%Y-%m-%d', time.gmtime())}.",
        "# Whole networks on made-up data of the true formats. The figures mean nothing; what counts is that the "
        "figure",
        "# of a run is measured again from its files and stands in the table. Smaller than in the recipe:",
    ]
    for row in {row.checkpoint: row for row in rows}.values():
        changes = ", ".join(f"{name}={value}" for name, value in rehearsal_overrides(row).items())
        lines.append(f"#   {row.checkpoint}: {changes}")
    for line in lines:
        typer.echo(line)

    def told(stage: Stage) -> None:
        name = stage.row + (f", {stage.dropped} % dropped" if stage.dropped else "")
        lines.append(f"ok  {name:36} {stage.name:15} {stage.seconds:6.1f} s  {stage.outcome}")
        typer.echo(lines[-1])

    start = time.perf_counter()
    done = rehearse(rows, folder, device=device, on_stage=told)
    lines.append(f"all stages of {len(done)} runs went well, in {time.perf_counter() - start:.0f} s")
    typer.echo(lines[-1])
    if log is not None:
        write_whole(log, ("\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    run_script("rehearse.py", app)
