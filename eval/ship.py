"""From runs of the study to checkpoints of the package: recipe, card with golden logits, verified weights.

Of each data set the run of seed 0 with kernels of points and the options that the log chooses is taken, and measured
again on a CPU: where it does not classify as many test samples right as its line of the log says, nothing is written.
What is written replaces what is there, so that a longer log can be shipped again.

    python eval/ship.py gunpoint japanese-vowels-30 mnist1d --weights runs/weights
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
from torch import Tensor

from smpconv_zoo.checkpoints import create_model
from smpconv_zoo.console import run_script
from smpconv_zoo.data.mnist1d import mnist1d_sequences
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
from smpconv_zoo.reporting.logs import Study, read_study
from smpconv_zoo.training.recipe import SequenceRecipe, make_recipe

EXAMPLE = "Example: `python eval/ship.py gunpoint japanese-vowels-30 mnist1d --weights runs/weights`"
RECIPES = Path("smpconv_zoo/training/recipes")
# Added to the options when test figures had been seen: see DataSet in eval/study.py.
LATE_OPTION = "short"
app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)


@app.command(epilog=EXAMPLE, context_settings={"help_option_names": ["-h", "--help"]})
def main(
    names: Annotated[list[str], typer.Argument(metavar="DATA...", help="Of the study's data, such as gunpoint.")],
    weights: Annotated[Path, typer.Option(help="Folder that `eval/study.py --weights` wrote.")],
    log: Annotated[Path, typer.Option(help="The study's log, by its path in the repository.")] = Path(
        "eval/results/study.jsonl"
    ),
    option: Annotated[
        str | None, typer.Option(help="Options of the run, such as mean+wide; those that the log chooses if not given.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Clone to write into; the one that holds the package.")] = None,
) -> None:
    """Make shipped checkpoints out of runs of the study."""
    root = weights_dir().parent if out is None else out
    study = read_study(log)
    if study is None:
        raise FileNotFoundError(f"{log} is not there, or holds no final run")
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    # All of them are checked before the first is written.
    shipped = []
    for name in names:
        runs = find_runs(records, study, name, option)
        shipped.append(ship(runs, chosen_by(runs, study), weights, log.as_posix()))
    for one in shipped:
        write(one, root)
        measured = one.card.measured
        assert measured is not None
        typer.echo(f"{one.card.id}: {measured.correct} of {measured.total}, {one.card.files[0].bytes:,} bytes")


@dataclasses.dataclass(frozen=True)
class Shipped:
    """A checkpoint ready to be written: its card, its recipe as YAML, and the bytes of its weights."""

    card: CheckpointCard
    recipe: str
    weights: bytes


def find_runs(
    records: Sequence[dict[str, Any]], study: Study, name: str, option: str | None = None
) -> list[dict[str, Any]]:
    """The final runs of a data set with kernels of points, by their seeds.

    Args:
        records: The lines of the log.
        study: The same, read.
        name: As the study calls the data, ``japanese-vowels-30``.
        option: Options of the runs; those that the log chooses if None.

    Raises:
        ValueError: Other data than series and MNIST-1D, or no run of seed 0.
    """
    finals = [r for r in records if (r.get("stage"), r.get("data"), r.get("kernel")) == ("final", name, "points")]
    finals = sorted((run for run in finals if "test" in run), key=lambda run: int(run["seed"]))
    if any(run["recipe"]["data"] not in TESTS for run in finals):
        raise ValueError(f"{name!r} is none of {', '.join(sorted(TESTS))}")
    if option is None and finals:
        found = study.chosen(finals[0]["recipe"]["data"], finals[0]["recipe"]["dropped"], "points")
        option = found[0].option if found else None
    runs = [run for run in finals if run["option"] == option]
    if not runs or runs[0]["seed"] != 0 or "weights" not in runs[0]:
        raise ValueError(f"the log has no final run of {name} with kernels of points and seed 0 that left its weights")
    return runs


@dataclasses.dataclass(frozen=True)
class _Test:
    """Data as a card declares them: the test part, what samples were scaled by, the split and the origin in words."""

    samples: tuple[Tensor, Tensor]
    scaling: Scaling
    split: str
    origin: str


def _series(recipe: SequenceRecipe) -> _Test:
    parts = load_ucr(recipe.data, recipe.dropped)
    return _Test(
        parts.test,
        Scaling(parts.mean, parts.std),
        f"that of the archive: {len(parts.train[1])} to learn from, {len(parts.test[1])} to test on, read once, after "
        "the last epoch",
        archive(recipe.data),
    )


def _mnist1d(recipe: SequenceRecipe) -> _Test:
    # Drawn and handed out centred and scaled: a user's samples of the authors' package need nothing more.
    return _Test(
        mnist1d_sequences("test"),
        Scaling((0.0,), (1.0,)),
        f"that of its authors: {len(mnist1d_sequences('train')[1])} to learn from, 1000 to test on, read once, after "
        "the last epoch",
        "MNIST-1D, which is procedural, no recorded data (Greydanus & Kobak, arXiv 2011.14439): drawn anew as by "
        "make_dataset() of the authors' package mnist1d 0.0.2 (Apache-2.0, https://github.com/greydanus/mnist1d) from "
        "its seed 42",
    )


# How the data of a recipe are read.
TESTS = {**dict.fromkeys(UCR_SETS, _series), "mnist1d": _mnist1d}


def ship(runs: Sequence[dict[str, Any]], chosen: str, folder: Path, log: str) -> Shipped:
    """Measure the first of ``runs`` again, on the CPU, and declare it.

    Args:
        runs: Lines of the log, from seed 0 on.
        chosen: How these weights were chosen.
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
    test = TESTS[recipe.data](recipe)
    # Kernels may be shorter than the samples.
    _, channels, length = test.samples[0].shape
    overlay = {"input_size": (channels, 1, length)}
    model: Any = create_model(recipe.network, pretrained_cfg_overlay=overlay, **recipe.arguments)
    model.load_state_dict(tensors)
    correct, total = top1(model, *test.samples), len(test.samples[1])
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
            split=test.split,
        ),
        scaling=test.scaling,
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
            chosen_by=chosen,
            log=log,
            hardware=run["hardware"],
            versions=run["versions"],
        ),
        golden=golden_logits(model),
        hub=None,
        source=None,
        license="MIT",
        origin=f"trained by smpconv_zoo from random initialisation on {test.origin}",
    )
    return Shipped(card, recipe_text(recipe), path.read_bytes())


def archive(data: str) -> str:
    """Whose data they are, and where they are from."""
    name, is_multivariate = UCR_SETS[data].files, load_ucr(data).train[0].size(1) > 1
    kind = "UEA" if is_multivariate else "UCR"
    return f"{name} of the {kind} archive (https://timeseriesclassification.com), from the files inside aeon"


def chosen_by(runs: Sequence[dict[str, Any]], study: Study) -> str:
    """How options and weights were chosen, with what all seeds reach."""
    first = runs[0]
    data, dropped, option = first["recipe"]["data"], first["recipe"]["dropped"], first["option"]
    tried = {
        share: [r for r in study.runs if (r.stage, r.data, r.dropped, r.kernel) == ("choose", data, share, "points")]
        for share in (dropped, 0)
    }
    share = dropped if tried[dropped] else 0
    options = list(dict.fromkeys(_words(run.option) for run in tried[share]))
    if options:
        draws = len({run.seed for run in tried[share]})
        part = f"{100 * first['recipe']['held_out']:g} % of the training data, held out {_times(draws)}"
        whose = ", without anything dropped" if dropped and not share else ""
        how = f"options {_words(option)}, best of {', '.join(sorted(options))} on {part}{whose}"
        if LATE_OPTION in option.split("+"):
            how += f" ({LATE_OPTION} was put among them after test figures of short fixed kernels had been seen)"
    else:
        how = f"options {_words(option)}, among which nothing was chosen"
    figures = [run["test"]["top1"] for run in runs]
    seeds = f"seeds {first['seed']} to {runs[-1]['seed']}"
    spread = f", standard deviation {statistics.stdev(figures):.2f}" if len(figures) > 1 else ""
    return (
        f"{how}; of the weights nothing (the first seed, the last epoch); {seeds} reach "
        f"{statistics.fmean(figures):.2f} % in the mean{spread}"
    )


def _words(option: str) -> str:
    return option or "reference"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def recipe_text(recipe: SequenceRecipe) -> str:
    """The recipe as the package's files have it: what differs from the defaults, under a line that says what it is."""
    defaults = {field.name: field.default for field in dataclasses.fields(recipe)}
    values = {
        name: value
        for name, value in dataclasses.asdict(recipe).items()
        if name != "id" and (value != defaults[name] or name in ("seed", "input"))
    }
    name = UCR_SETS[recipe.data].files if recipe.data in UCR_SETS else "MNIST-1D"
    title = f"# {name}, as eval/study.py trains it; see eval/results/study.jsonl.\n"
    return title + yaml.safe_dump(values, sort_keys=False)


def write(shipped: Shipped, root: Path) -> None:
    """Put weights, recipe and card into a clone, the card last."""
    card = shipped.card
    write_whole(root / "weights" / card.files[0].name, shipped.weights)
    write_whole(root / RECIPES / f"{card.id}.yaml", shipped.recipe.encode())
    write_whole(root / "weights" / f"{card.id}.json", card_bytes(card))


if __name__ == "__main__":
    run_script("ship.py", app)
