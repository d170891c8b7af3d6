"""Top-1 and top-5 of image networks on ImageNet-1k, -V2, -A, -R, -Sketch, with ReaL's labels, or on your own classes.

python eval/imagenet.py 'smpconv_*' --data-dir ~/in1k/val --device cuda --reparam --channels-last --dtype bfloat16
torchrun --nproc-per-node 8 eval/imagenet.py smpconv_t.in1k --data-dir ~/in1k --device cuda
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from smpconv_zoo.console import print_table, progress_bar, run_script
from smpconv_zoo.evaluation.accuracy import DTYPES, as_csv, as_json, check_records_path, write_records
from smpconv_zoo.evaluation.candidates import Candidate, find_candidates, is_sequence, network_from_file
from smpconv_zoo.evaluation.image_accuracy import HEADER, ImageResult, evaluate_pictures, image_row
from smpconv_zoo.evaluation.image_sets import IMAGE_SETS, open_image_set
from smpconv_zoo.pretrained.cards import CheckpointCard
from smpconv_zoo.training.recipe import ImageRecipe
from smpconv_zoo.training.run_weights import is_run_folder, network_of_run, recipe_of_run
from smpconv_zoo.training.world import join_world

EXAMPLE = (
    "Example: `python eval/imagenet.py smpconv_t.in1k --data-dir ~/in1k --device cuda`, or on eight GPUs "
    "`torchrun --nproc-per-node 8 eval/imagenet.py 'smpconv_*' runs/t --data-dir ~/in1k --device cuda`"
)
app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)


@app.command(epilog=EXAMPLE, context_settings={"help_option_names": ["-h", "--help"]})
def main(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Checkpoints, wildcards ('smpconv_*'), other names of timm, `hf-hub:`, `local-dir:`, folders of runs."
        ),
    ],
    data_dir: Annotated[
        str,
        typer.Option(
            metavar="DIR",
            envvar="SMPCONV_DATA",
            help="Class folders, tar files, WebDataset shards or hfds/NAME; of a split the validation part.",
        ),
    ],
    data_set: Annotated[str, typer.Option(help=f"Which set these are: {', '.join(IMAGE_SETS)}.")] = "in1k",
    partial: Annotated[bool, typer.Option("--partial", help="Classes or pictures may be missing.")] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Weights for the one network named; .safetensors, .pth, .tar.")
    ] = None,
    model_args: Annotated[str, typer.Option(metavar="JSON", help="Its arguments unlike the entrypoint's.")] = "{}",
    ema: Annotated[bool, typer.Option(help="Of a run that averages its weights, take the average.")] = True,
    best: Annotated[bool, typer.Option(help="Of a run, take the best epoch; otherwise the newest checkpoint.")] = True,
    reparam: Annotated[bool, typer.Option("--reparam", help="Merge the network for inference first.")] = False,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Lay pictures out so.")] = False,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}; the last two under autocast.")] = "float32",
    img_size: Annotated[int | None, typer.Option(min=1, help="Pixels of a side; our kernels follow.")] = None,
    crop_pct: Annotated[float | None, typer.Option(help="Share of the resized side; else the network's.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at a time of a process.")] = 100,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read pictures, of each process.")] = 4,
    retry: Annotated[bool, typer.Option("--retry", help="Out of memory: go on with half the batch.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many pictures, spread evenly.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda; under torchrun each process takes its GPU.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="File to write: .csv, .json or .md.")] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print a table for programs.")] = False,
    as_json_: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Measure image networks: every picture once, whatever the number of processes.

    Classes and counts of the data are checked first. Pictures are prepared as the network's pretrained_cfg says.
    """
    if out is not None:
        check_records_path(out)
    pictures = open_image_set(data_set, data_dir, partial)
    candidates, left_out = _candidates(models, checkpoint, model_args, ema, best, data_set)
    results: list[ImageResult] = []
    with join_world(device) as world:
        for sentence in left_out if world.leads else ():
            typer.echo(f"imagenet.py: {sentence}", err=True)
        for candidate in candidates:
            with progress_bar(candidate.name, shown=world.leads) as progress:
                results.append(
                    evaluate_pictures(
                        candidate,
                        pictures,
                        world,
                        img_size=img_size,
                        crop_pct=crop_pct,
                        batch_size=batch_size,
                        workers=workers,
                        dtype=dtype,
                        channels_last=channels_last,
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
        return
    print_table(HEADER, [image_row(result) for result in results], numbers=(2, 3, 4, 5, 6, 7, 9))
    for result in results:
        typer.echo(f"{result.model}: {result.weights}; mean {result.mean}, std {result.std}")
        for note in result.notes:
            typer.echo(f"{result.model}: {note}")


def _candidates(
    models: list[str], checkpoint: Path | None, model_args: str, ema: bool, best: bool, data_set: str
) -> tuple[list[Candidate], list[str]]:
    if checkpoint is not None:
        if len(models) != 1:
            raise typer.BadParameter("--checkpoint is for one network, named alone")
        return [network_from_file(checkpoint, models[0], _json_object(model_args))], []
    if model_args != "{}":
        raise typer.BadParameter("--model-args goes with --checkpoint")

    def wanted(card: CheckpointCard) -> bool:
        return card.data.input.startswith("image") and (data_set == "pictures" or not is_sequence(card))

    found: list[Candidate] = []
    left_out: list[str] = []
    for name in models:
        if is_run_folder(name):
            found.append(_run(Path(name), ema, best))
            continue
        more, without = find_candidates([name], wanted)
        found += more
        left_out += without
    if not found:
        raise FileNotFoundError(f"nothing to measure: {'; '.join(left_out)}")
    return found, left_out


def _run(folder: Path, ema: bool, best: bool) -> Candidate:
    recipe = recipe_of_run(folder)
    if not isinstance(recipe, ImageRecipe):
        raise ValueError(f"{folder} is a run on {recipe.data}: eval/sequence.py measures it")
    run = network_of_run(folder, averaged=ema, best=best)
    return Candidate(
        f"{recipe.id} {folder.name}",
        run.weights,
        lambda: run.model,
        changes={"img_size": recipe.image_size, "crop_pct": recipe.crop},
    )


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"--model-args is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise typer.BadParameter(f"--model-args must be a JSON object, got {text}")
    return value


if __name__ == "__main__":
    run_script("imagenet.py", app)
