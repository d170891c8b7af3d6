"""Accuracy of sequence networks, and of those for small images in memory, on the test parts of their tasks.

python eval/sequence.py '*' --data-dir ~/data --device cuda
python eval/sequence.py runs/ct_dropped --data-dir ~/data --dropped 30 --dropped 50 --dropped 70 --out ct.csv
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smpconv_zoo.console import print_table, progress_bar, run_script
from smpconv_zoo.evaluation.accuracy import DTYPES, as_csv, as_json, check_records_path, write_records
from smpconv_zoo.evaluation.candidates import Candidate, find_candidates, is_sequence
from smpconv_zoo.evaluation.sequence_accuracy import HEADER, SequenceResult, evaluate_sequences, sequence_row
from smpconv_zoo.evaluation.test_sets import EvaluationData, dropped_share, open_test_set
from smpconv_zoo.pretrained.cards import CheckpointCard
from smpconv_zoo.training.recipe import PROTOCOLS, SequenceRecipe, list_recipes, load_recipe
from smpconv_zoo.training.run_weights import (
    is_run_folder,
    network_of_run,
    open_test_set_of_run,
    recipe_of_run,
    task_of_run,
)
from smpconv_zoo.training.world import join_world

Task = tuple[Candidate, CheckpointCard, int, EvaluationData]

EXAMPLE = (
    "Example: `python eval/sequence.py 'smpconv_tcn_mnist.*'`, or of a run on irregular samples "
    "`python eval/sequence.py runs/ct30 --data-dir ~/data --dropped 0 --dropped 30 --device cuda`"
)
app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)


@app.command(epilog=EXAMPLE, context_settings={"help_option_names": ["-h", "--help"]})
def main(
    models: Annotated[
        list[str], typer.Argument(help="Checkpoints, wildcards ('smpconv_tcn*'), folders of `smpconv-zoo train`.")
    ],
    data_dir: Annotated[
        Path | None,
        typer.Option(metavar="PATH", envvar="SMPCONV_DATA", help="Folder with the data that no package holds."),
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch data that are not there.")] = False,
    dropped: Annotated[
        list[int] | None,
        typer.Option(min=0, max=99, help="Percent of the time steps that are left out; several may be given."),
    ] = None,
    best: Annotated[bool, typer.Option(help="Of a run, take the best epoch; otherwise the newest checkpoint.")] = True,
    reparam: Annotated[bool, typer.Option("--reparam", help="Merge the network for inference first.")] = False,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}; the last two under autocast.")] = "float32",
    batch_size: Annotated[int, typer.Option(min=1, help="Samples at a time of a process.")] = 100,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read recordings, of each process.")] = 4,
    retry: Annotated[bool, typer.Option("--retry", help="Out of memory: go on with half the batch.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many samples, spread evenly.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda; under torchrun each process takes its GPU.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="File to write: .csv, .json or .md.")] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print a table for programs.")] = False,
    as_json_: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Measure sequence networks: every test sample once; status 1 if a card's figure differs.

    The protocol says how the weights were chosen: reference, on the test part, as the authors do, or sound.
    """
    if out is not None:
        check_records_path(out)
    tasks, left_out = _tasks(models, data_dir, download, dropped, best)
    results: list[SequenceResult] = []
    with join_world(device) as world:
        for sentence in left_out if world.leads else ():
            typer.echo(f"sequence.py: {sentence}", err=True)
        for candidate, card, rate, data in tasks:
            with progress_bar(candidate.name, shown=world.leads) as progress:
                results.append(
                    evaluate_sequences(
                        candidate,
                        card,
                        data,
                        world,
                        dropped=rate,
                        batch_size=batch_size,
                        workers=workers,
                        dtype=dtype,
                        reparam=reparam,
                        retry=retry,
                        limit=limit,
                        progress=progress,
                    )
                )
        if not world.leads:
            return
    if out is not None:
        write_records(out, results)
    if as_json_ or csv:
        typer.echo((as_json if as_json_ else as_csv)(results), nl=False)
    else:
        _show(results)
    if differing := [result.model for result in results if result.agrees is False]:
        typer.echo(f"sequence.py: not equal to the card's figure: {', '.join(differing)}", err=True)
        raise typer.Exit(1)


def _show(results: list[SequenceResult]) -> None:
    print_table(HEADER, [sequence_row(result) for result in results], numbers=(2, 4, 5, 6, 7, 8))
    for protocol in dict.fromkeys(result.protocol for result in results):
        if protocol is not None:
            typer.echo(f"protocol {protocol}: {PROTOCOLS[protocol]}")
    for result in results:
        typer.echo(f"{result.model}: {result.weights}; {result.split}")
        for note in result.notes:
            typer.echo(f"{result.model}: {note}")


def _tasks(
    models: list[str], data_dir: Path | None, download: bool, dropped: list[int] | None, best: bool
) -> tuple[list[Task], list[str]]:
    """What to measure on what; all data are opened before the first network is loaded."""
    tasks: list[Task] = []
    left_out: list[str] = []
    for name in models:
        if is_run_folder(name):
            tasks += _run(Path(name), data_dir, download, dropped, best)
            continue
        found, missing = find_candidates([name], is_sequence)
        left_out += missing
        wildcard = bool(set(name) & set("*?["))
        for candidate in found:
            card = candidate.card
            if card is None or not is_sequence(card):
                raise ValueError(
                    f"{name} is no checkpoint of a sequence task: eval/imagenet.py measures image networks"
                )
            protocol = load_recipe(card.id).protocol if card.id in list_recipes() else None
            stated = Candidate(candidate.name, candidate.weights, candidate.build, card, protocol=protocol)
            for rate in dropped or [dropped_share(card)]:
                try:
                    tasks.append((stated, card, rate, open_test_set(card, data_dir, download, dropped=rate)))
                except FileNotFoundError as error:
                    # Of those that a wildcard names, what can be measured is.
                    if not wildcard:
                        raise
                    left_out.append(f"left out: {error}")
    if not tasks:
        raise FileNotFoundError(f"nothing to measure: {'; '.join(left_out)}")
    return tasks, left_out


def _run(folder: Path, data_dir: Path | None, download: bool, dropped: list[int] | None, best: bool) -> list[Task]:
    recipe = recipe_of_run(folder)
    if not isinstance(recipe, SequenceRecipe):
        raise ValueError(f"{folder} is a run on pictures: eval/imagenet.py measures it")
    card = task_of_run(recipe)
    opened = [
        (rate, open_test_set_of_run(recipe, data_dir, download, dropped=rate)) for rate in dropped or [recipe.dropped]
    ]
    run = network_of_run(folder, best=best)
    candidate = Candidate(f"{recipe.id} {folder.name}", run.weights, lambda: run.model, protocol=recipe.protocol)
    return [(candidate, card, rate, data) for rate, data in opened]


if __name__ == "__main__":
    run_script("sequence.py", app)
