"""From runs of the study to checkpoints of the package: recipe, card with golden logits, verified weights.

Of each data set the run of seed 0 with kernels of points is taken, and measured again on a CPU: where it does not
classify as many test samples right as its line of the log says, nothing is written. What is written replaces what is
there, so that a longer log can be shipped again.

    python eval/ship.py gunpoint italy-power-demand basic-motions --weights runs/weights
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from smpconv_zoo.checkpoints import create_model
from smpconv_zoo.console import run_script
from smpconv_zoo.data.ucr import UCR_SETS, load_ucr
from smpconv_zoo.environment import hardware, versions
from smpconv_zoo.evaluation.classification import top1
from smpconv_zoo.evaluation.complexity import count_macs
from smpconv_zoo.evaluation.golden import golden_logits
from smpconv_zoo.files import write_whole
from smpconv_zoo.models.build import sample_shape
from smpconv_zoo.pretrained.cards import (
    CheckpointCard,
    Data,
    MeasuredResult,
    Scaling,
    Training,
    WeightFile,
    card_bytes,
    weights_dir,
)
from smpconv_zoo.pretrained.store import read_safetensors
from smpconv_zoo.training.recipe import SequenceRecipe, make_recipe

EXAMPLE = "Example: `python eval/ship.py gunpoint basic-motions --weights runs/weights`"
RECIPES = Path("smpconv_zoo/training/recipes")
app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)


@app.command(epilog=EXAMPLE, context_settings={"help_option_names": ["-h", "--help"]})
def main(
    names: Annotated[list[str], typer.Argument(metavar="DATA...", help="Series of the study, such as gunpoint.")],
    weights: Annotated[Path, typer.Option(help="Folder that `eval/study.py --weights` wrote.")],
    log: Annotated[Path, typer.Option(help="The study's log, by its path in the repository.")] = Path(
        "eval/results/study.jsonl"
    ),
    option: Annotated[str, typer.Option(help="Options of the run; none for the reference's.")] = "",
    out: Annotated[Path | None, typer.Option(help="Clone to write into; the one that holds the package.")] = None,
) -> None:
    """Make shipped checkpoints out of runs of the study."""
    root = weights_dir().parent if out is None else out
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    # All of them are checked before the first is written.
    for shipped in [ship(find_runs(records, name, option), weights, log.as_posix()) for name in names]:
        write(shipped, root)
        measured = shipped.card.measured
        assert measured is not None
        typer.echo(f"{shipped.card.id}: {measured.correct} of {measured.total}, {shipped.card.files[0].bytes:,} bytes")


@dataclasses.dataclass(frozen=True)
class Shipped:
    """A checkpoint ready to be written: its card, its recipe as YAML, and the bytes of its weights."""

    card: CheckpointCard
    recipe: str
    weights: bytes


def find_runs(records: Sequence[dict[str, Any]], data: str, option: str = "") -> list[dict[str, Any]]:
    """The final runs of a data set with kernels of points, by their seeds.

    Raises:
        ValueError: Other data than series, or no run of seed 0.
    """
    if data not in UCR_SETS:
        raise ValueError(f"{data!r} is none of the series: {', '.join(sorted(UCR_SETS))}")
    wanted = ("final", data, "points", option)
    runs = [r for r in records if (r.get("stage"), r.get("data"), r.get("kernel"), r.get("option")) == wanted]
    runs = sorted((run for run in runs if "test" in run), key=lambda run: int(run["seed"]))
    if not runs or runs[0]["seed"] != 0 or "weights" not in runs[0]:
        raise ValueError(f"the log has no final run of {data} with kernels of points and seed 0 that left its weights")
    return runs


def ship(runs: Sequence[dict[str, Any]], folder: Path, log: str) -> Shipped:
    """Measure the first of ``runs`` again, on the CPU, and declare it.

    Args:
        runs: Lines of the log, from seed 0 on.
        folder: Of the weights.
        log: Path of the log in the repository.

    Raises:
        ValueError: Another number of test samples is right than the log says.
        CheckpointError: Weights that are not there, or not those of the run.
        FileNotFoundError: The data are not there; the message says how to get them.
    """
    run = runs[0]
    values = {name: value for name, value in run["recipe"].items() if name != "id"}
    recipe = make_recipe(run["recipe"]["id"], values)
    assert isinstance(recipe, SequenceRecipe)
    path = folder / run["weights"]["file"]
    tensors, _ = read_safetensors(path, run["weights"]["sha256"])
    model: Any = create_model(recipe.network, **recipe.arguments)
    model.load_state_dict(tensors)
    parts = load_ucr(recipe.data, recipe.dropped)
    correct, total = top1(model, *parts.test), len(parts.test[1])
    if (correct, total) != (run["test"]["correct"], run["test"]["total"]):
        raise ValueError(
            f"{recipe.id} classifies {correct} of {total} test samples, the log says {run['test']['correct']} of "
            f"{run['test']['total']}: not shipped"
        )
    card = CheckpointCard(
        id=recipe.id,
        network=recipe.network,
        arguments=recipe.arguments,
        status="embedded",
        files=(WeightFile(path.name, run["weights"]["sha256"], path.stat().st_size),),
        tensors=len(tensors),
        parameters=sum(p.numel() for p in model.parameters()),
        macs=count_macs(model, (1, *sample_shape(model)))["total"],
        data=Data(
            name=recipe.data,
            input=f"sequence, {recipe.dropped} % dropped" if recipe.dropped else "sequence",
            split=f"that of the archive: {len(parts.train[1])} to learn from, {total} to test on, read once, after the "
            "last epoch",
        ),
        scaling=Scaling(parts.mean, parts.std),
        paper=None,
        measured=MeasuredResult(
            top1=100 * correct / total,
            correct=correct,
            total=total,
            command=f"smpconv-zoo eval {recipe.id}",
            log=log,
            hardware=hardware("cpu"),
            versions=versions(),
        ),
        training=Training(
            command=run["command"],
            seed=recipe.seed,
            chosen_by=chosen_by(runs),
            log=log,
            hardware=run["hardware"],
            versions=run["versions"],
        ),
        golden=golden_logits(model),
        hub=None,
        source=None,
        license="MIT",
        origin=f"trained by smpconv_zoo from random initialisation on {archive(recipe.data)}",
    )
    return Shipped(card, recipe_text(recipe), path.read_bytes())


def archive(data: str) -> str:
    """Whose data they are, and where they are from."""
    name, is_multivariate = UCR_SETS[data].files, load_ucr(data).train[0].size(1) > 1
    kind = "UEA" if is_multivariate else "UCR"
    return f"{name} of the {kind} archive (https://timeseriesclassification.com), from the files inside aeon"


def chosen_by(runs: Sequence[dict[str, Any]]) -> str:
    """How the weights were chosen, with what all seeds reach."""
    figures = [run["test"]["top1"] for run in runs]
    seeds = f"seeds {runs[0]['seed']} to {runs[-1]['seed']}"
    spread = f", standard deviation {statistics.stdev(figures):.2f}" if len(figures) > 1 else ""
    how = (
        f"options {runs[0]['option']}, chosen on held-out training data; the first seed"
        if runs[0]["option"]
        else "nothing (options of the reference, the first seed, the last epoch)"
    )
    return f"{how}; {seeds} reach {statistics.fmean(figures):.2f} % in the mean{spread}"


def recipe_text(recipe: SequenceRecipe) -> str:
    """The recipe as the package's files have it: what differs from the defaults, under a line that says what it is."""
    defaults = {field.name: field.default for field in dataclasses.fields(recipe)}
    values = {
        name: value
        for name, value in dataclasses.asdict(recipe).items()
        if name != "id" and (value != defaults[name] or name in ("seed", "input"))
    }
    title = f"# {UCR_SETS[recipe.data].files}, as eval/study.py trains it; see eval/results/study.jsonl.\n"
    return title + yaml.safe_dump(values, sort_keys=False)


def write(shipped: Shipped, root: Path) -> None:
    """Put weights, recipe and card into a clone, the card last."""
    card = shipped.card
    write_whole(root / "weights" / card.files[0].name, shipped.weights)
    write_whole(root / RECIPES / f"{card.id}.yaml", shipped.recipe.encode())
    write_whole(root / "weights" / f"{card.id}.json", card_bytes(card))


if __name__ == "__main__":
    run_script("ship.py", app)
