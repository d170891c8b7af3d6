"""What the command line and the scripts in ``eval/`` print: tables, progress, and a sentence where something fails."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from smpconv_zoo.environment import keep_freed_memory
from smpconv_zoo.pretrained.store import CheckpointError

__all__ = ["EXPECTED_ERRORS", "print_table", "progress_bar", "run_script", "sentence"]

# What the package says in one sentence; anything else is a fault of ours and keeps its traceback.
EXPECTED_ERRORS = (ValueError, CheckpointError, OSError, ImportError, FloatingPointError)


@contextlib.contextmanager
def progress_bar(title: str, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr while there is someone to see it; it leaves nothing behind."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int]) -> None:
    """A table on stdout; columns ``numbers`` are aligned to the right."""
    if not rows:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, title in enumerate(header):
        table.add_column(title, justify="right" if i in numbers else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # Ids and numbers are never cut or wrapped: a narrow terminal wraps whole lines itself, a pipe takes any width.
    console = Console(width=400, markup=False, highlight=False)
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        typer.echo(line.rstrip())
    typer.echo()


def sentence(error: BaseException) -> str:
    """What went wrong, on one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def run_script(name: str, app: typer.Typer) -> None:
    """Run a script's command; failures that the package expects become one sentence on stderr and exit status 1."""
    keep_freed_memory()
    try:
        app(prog_name=name)
    except EXPECTED_ERRORS as error:
        typer.echo(f"{name}: {sentence(error)}", err=True)
        sys.exit(1)
