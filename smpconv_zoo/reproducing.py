"""The authors' tables and our own cards, measured again with whatever weights and data are at hand.

Nothing is downloaded. What cannot be measured is named, with the command that gets it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from smpconv_zoo.evaluation.accuracy import Processes
from smpconv_zoo.evaluation.candidates import Candidate, is_sequence
from smpconv_zoo.evaluation.classification import load_pretrained
from smpconv_zoo.evaluation.image_accuracy import evaluate_pictures
from smpconv_zoo.evaluation.image_sets import open_image_set
from smpconv_zoo.evaluation.paper_tables import PaperRow, PaperTable, paper_tables
from smpconv_zoo.evaluation.sequence_accuracy import evaluate_sequences
from smpconv_zoo.evaluation.test_sets import dropped_share, find_data_set, open_test_set
from smpconv_zoo.pretrained.cards import CheckpointCard, checkpoint_card, list_checkpoints
from smpconv_zoo.pretrained.home import card_in_use
from smpconv_zoo.pretrained.store import how_to_get
from smpconv_zoo.training.recipe import ImageRecipe, SequenceRecipe, list_recipes, load_recipe
from smpconv_zoo.training.run_weights import network_of_run, open_test_set_of_run, recipe_of_run

__all__ = ["OWN", "Options", "ReproducedRow", "ReproducedTable", "differing", "reproduce", "train_command"]

# Name and title of the table of what this repository trained.
OWN = ("own", "Checkpoints of this repository: the card's figure, and the same measured again")

Progress = Callable[[str], contextlib.AbstractContextManager[Callable[[int, int], None]]]


@dataclasses.dataclass(frozen=True)
class Options:
    """How to measure, and where things lie.

    Args:
        data_dir: The user's folder with the data.
        imagenet: Where ImageNet lies, in any form that :func:`~smpconv_zoo.data.folders.open_part` takes; in
            ``data_dir`` if None.
        runs: Folders of runs, whose figures stand in the lines of their tasks.
        only: A wildcard of checkpoints; others are left out.
        partial: Whether of ImageNet classes and pictures may be missing.
        batch_size: Samples at a time of a process.
        workers: Processes that read, of each process.
        limit: Only so many samples of each set, spread evenly.
    """

    data_dir: Path | None = None
    imagenet: str | None = None
    runs: tuple[Path, ...] = ()
    only: str = "*"
    partial: bool = False
    batch_size: int = 100
    workers: int = 4
    limit: int | None = None


@dataclasses.dataclass(frozen=True)
class ReproducedRow:
    """A line: what is published or declared, what was measured, and how; accuracies in percent.

    ``paper`` is the authors' figure, in the table of our own the card's; None if there is none. ``how`` is the command
    that measures this line, ``missing`` says what there is not, and the command that gets it; a line that was measured
    has none. ``error`` says why weights and data that are there could not be measured. ``agrees`` says whether the
    integers are exactly the card's, None where there is nothing to compare. ``protocol`` is how the weights were
    chosen, ``"reference"``, on the test part, or ``"sound"``.
    """

    row: str
    checkpoint: str
    data: str
    dropped: int
    parameters: str
    protocol: str | None
    paper: float | None
    measured: float | None
    correct: int | None
    total: int | None
    agrees: bool | None
    how: str
    missing: tuple[str, ...]
    error: str | None
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ReproducedTable:
    """A table: short name, title, where the figures in its column ``paper`` are from, and its lines."""

    name: str
    title: str
    source: str
    rows: tuple[ReproducedRow, ...]


def reproduce(options: Options, processes: Processes, progress: Progress | None = None) -> list[ReproducedTable]:
    """Measure every line of the authors' tables and of our own for which weights and data are at hand.

    Args:
        options: Where things lie.
        processes: This process among those that measure together.
        progress: Given a title, what is told of the samples done and in all.

    Raises:
        FileNotFoundError: A run that is not there.
        ValueError: A run that no line is about.
    """
    told = progress or _silent
    published = paper_tables()
    runs = _runs(options.runs, published)
    tables = []
    for table in published:
        rows = [row for row in table.rows if fnmatch.fnmatch(row.checkpoint, options.only)]
        done = tuple(_row(row, runs, options, processes, told) for row in rows)
        if done:
            tables.append(ReproducedTable(table.name, table.title, table.source, done))
    own = tuple(_own_row(card, options, processes, told) for card in _own_cards(options.only))
    if own:
        tables.append(ReproducedTable(*OWN, "the cards in weights/", own))
    return tables


def differing(tables: Sequence[ReproducedTable]) -> list[str]:
    """Checkpoints whose figure, measured again, is not the one of their card."""
    return [row.checkpoint for table in tables for row in table.rows if row.agrees is False]


def _runs(folders: Sequence[Path], tables: Sequence[PaperTable]) -> dict[tuple[str, int], Path]:
    """The runs, by the line that they are about."""
    lines = {(row.checkpoint, row.dropped) for table in tables for row in table.rows}
    found: dict[tuple[str, int], Path] = {}
    for folder in folders:
        recipe = recipe_of_run(folder)
        line = (recipe.id, recipe.dropped if isinstance(recipe, SequenceRecipe) else 0)
        if line not in lines:
            raise ValueError(f"{folder} is a run of {recipe.id}, {line[1]} % dropped, of which no table has a line")
        if line in found:
            raise ValueError(f"{found[line]} and {folder} are runs of the same line, {recipe.id}: give one of them")
        found[line] = folder
    return found


def _own_cards(only: str) -> list[CheckpointCard]:
    """Those that declare a figure."""
    cards = [card_in_use(name) for name in list_checkpoints() if fnmatch.fnmatch(name, only)]
    return [card for card in cards if card.measured is not None and card.files]


def _row(
    row: PaperRow, runs: dict[tuple[str, int], Path], options: Options, processes: Processes, told: Progress
) -> ReproducedRow:
    card = card_in_use(row.checkpoint)
    run = runs.get((row.checkpoint, row.dropped))
    notes = (row.note,) if row.note else ()
    protocol = load_recipe(card.id).protocol if card.id in list_recipes() else None
    if run is not None:
        protocol = recipe_of_run(run).protocol
        notes = (*notes, f"of the run {run.name}, not of the authors' weights")
    blank = ReproducedRow(
        row=row.row,
        checkpoint=row.checkpoint,
        data=f"{card.data.name}, {card.data.input}",
        dropped=row.dropped,
        parameters=row.parameters or "",
        protocol=protocol,
        paper=row.top1,
        measured=None,
        correct=None,
        total=None,
        agrees=None,
        how=_command(row, run),
        missing=(),
        error=None,
        notes=notes,
    )
    missing = []
    if run is None and row.dropped:
        missing.append(
            f"weights: nobody publishes any for dropped samples; `{train_command(row)}`, then --run runs/NAME"
        )
    elif run is None and card.status == "importable":
        missing.append(f"weights: {how_to_get(card)}")
    return _measured(blank, card, run, missing, options, processes, told)


def _own_row(card: CheckpointCard, options: Options, processes: Processes, told: Progress) -> ReproducedRow:
    assert card.measured is not None
    blank = ReproducedRow(
        row=card.id,
        checkpoint=card.id,
        data=f"{card.data.name}, {card.data.input}",
        dropped=dropped_share(card),
        parameters=f"{card.parameters:,}",
        protocol=load_recipe(card.id).protocol if card.id in list_recipes() else None,
        paper=card.measured.top1,
        measured=None,
        correct=None,
        total=None,
        agrees=None,
        how=f"`{card.measured.command}`",
        missing=(),
        error=None,
        notes=(),
    )
    done = _measured(blank, card, None, [], options, processes, told)
    if done.correct is None or options.limit is not None:
        return done
    return dataclasses.replace(done, agrees=(done.correct, done.total) == (card.measured.correct, card.measured.total))


def _measured(
    blank: ReproducedRow,
    card: CheckpointCard,
    run: Path | None,
    missing: list[str],
    options: Options,
    processes: Processes,
    told: Progress,
) -> ReproducedRow:
    """The line with its figure, or with what is missing for it, or with what went wrong."""
    try:
        measure = (_sequences if is_sequence(card) else _pictures)(card, run, blank.dropped, options, processes)
    except (FileNotFoundError, ImportError) as error:
        # What the message says first, who needs what, is said by the line itself.
        missing.append(f"data: {' '.join(str(error).split())}")
        return dataclasses.replace(blank, missing=tuple(missing))
    except (ValueError, OSError) as error:
        return dataclasses.replace(blank, missing=tuple(missing), error=" ".join(str(error).split()))
    if missing:
        return dataclasses.replace(blank, missing=tuple(missing))
    try:
        with told(card.id) as progress:
            correct, total, notes = measure(progress)
    except (ValueError, OSError) as error:
        return dataclasses.replace(blank, error=" ".join(str(error).split()))
    return dataclasses.replace(
        blank, measured=100 * correct / total, correct=correct, total=total, notes=(*blank.notes, *notes)
    )


Measure = Callable[[Callable[[int, int], None]], tuple[int, int, tuple[str, ...]]]


def _sequences(card: CheckpointCard, run: Path | None, dropped: int, options: Options, processes: Processes) -> Measure:
    """Opens the data, and gives what measures on them."""
    recipe = None if run is None else recipe_of_run(run)
    if isinstance(recipe, SequenceRecipe):
        data = open_test_set_of_run(recipe, options.data_dir)
    else:
        data = open_test_set(card, options.data_dir, dropped=dropped)

    def measure(progress: Callable[[int, int], None]) -> tuple[int, int, tuple[str, ...]]:
        result = evaluate_sequences(
            _candidate(card, run),
            card,
            data,
            processes,
            dropped=dropped,
            batch_size=options.batch_size,
            workers=options.workers,
            limit=options.limit,
            progress=progress,
        )
        return result.correct, result.total, result.notes

    return measure


def _pictures(card: CheckpointCard, run: Path | None, dropped: int, options: Options, processes: Processes) -> Measure:
    where = options.imagenet or find_data_set(
        card.data.name,
        options.data_dir,
        False,
        f"{card.id} is measured on the validation images of ImageNet-1k",
        f"smpconv-zoo eval {card.id} --data-dir PATH",
    )
    pictures = open_image_set("in1k", where, options.partial)

    def measure(progress: Callable[[int, int], None]) -> tuple[int, int, tuple[str, ...]]:
        result = evaluate_pictures(
            _candidate(card, run),
            pictures,
            processes,
            batch_size=options.batch_size,
            workers=options.workers,
            limit=options.limit,
            progress=progress,
        )
        return result.correct, result.total, result.notes

    return measure


def _candidate(card: CheckpointCard, run: Path | None) -> Candidate:
    if run is None:
        return Candidate(card.id, card.status, lambda: load_pretrained(card), card)
    found = network_of_run(run)
    changes = {}
    if isinstance(found.recipe, ImageRecipe):
        changes = {"img_size": found.recipe.image_size, "crop_pct": found.recipe.crop}
    return Candidate(card.id, found.weights, lambda: found.model, changes=changes)


def train_command(row: PaperRow) -> str:
    """The command that trains a line; DIR stands for the folder of the data, NAME for one of the user's choice."""
    command = f"smpconv-zoo train {row.checkpoint} --data-dir DIR --device cuda --out runs/NAME"
    if not row.dropped:
        return command
    recipe = load_recipe(row.checkpoint)
    channels = checkpoint_card(row.checkpoint).data.input
    arguments = {**recipe.arguments, "in_chans": _CHANNELS[channels] + 1}
    listed = ", ".join(f"{name}: {value}" for name, value in arguments.items())
    return f'{command} --set dropped={row.dropped} --set "arguments={{{listed}}}"'


# Of recorded sequences, by the form of the input, without the mask of what was dropped.
_CHANNELS = {"sequence of 182 steps": 3, "161 frames of 20 MFCCs": 20, "waveform of 16,000 samples": 1}


def _command(row: PaperRow, run: Path | None) -> str:
    script = "sequence" if is_sequence(checkpoint_card(row.checkpoint)) else "imagenet"
    model = row.checkpoint if run is None else f"runs/{run.name}"
    if run is None and row.dropped:
        model = "runs/NAME"
    return f"`python eval/{script}.py {model} --data-dir DIR`"


@contextlib.contextmanager
def _silent(title: str) -> Iterator[Callable[[int, int], None]]:
    yield lambda done, total: None
