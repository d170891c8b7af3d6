"""``smpconv-zoo``: parses, calls, prints. What the commands do is in the modules that they call.

Answers go to stdout, progress and errors to stderr. Exit status: 0 done, 1 failed or a figure that differs, 2 wrong
usage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import timm
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from smpconv_zoo._version import __version__
from smpconv_zoo.benchmarks.cpu import PEERS, CpuTime, bench_cpu
from smpconv_zoo.benchmarks.measure import record, write_record
from smpconv_zoo.benchmarks.model import ModelTime, bench_model
from smpconv_zoo.benchmarks.operator import DTYPES, OperatorTime, bench_operator
from smpconv_zoo.benchmarks.sequence import TASKS, SequenceTime, bench_sequence
from smpconv_zoo.benchmarks.synthesis import SynthesisTime, bench_synthesis
from smpconv_zoo.catalogue import NetworkFacts, list_networks, look_up, match_checkpoints, where_weights_come_from
from smpconv_zoo.checkpoints import convert_file
from smpconv_zoo.console import EXPECTED_ERRORS
from smpconv_zoo.console import print_table as _print_table
from smpconv_zoo.console import progress_bar as _progress
from smpconv_zoo.console import sentence as _sentence
from smpconv_zoo.data.checking import CheckedData, check_data
from smpconv_zoo.data.fetching import Fetched, fetch
from smpconv_zoo.data.folders import open_pictures, unreadable_pictures
from smpconv_zoo.data.sources import SOURCES, DataSource
from smpconv_zoo.data.stand_in import write_stand_in
from smpconv_zoo.environment import keep_freed_memory, usable_device
from smpconv_zoo.evaluation.classification import EvaluationResult, evaluate_checkpoint
from smpconv_zoo.evaluation.figures import require_matplotlib
from smpconv_zoo.evaluation.report import HEADER, table_row, write_report
from smpconv_zoo.evaluation.resolution import ResolutionResult, evaluate_resolution
from smpconv_zoo.evaluation.test_sets import TEST_PARTS, EvaluationData, eval_command, open_test_set
from smpconv_zoo.exported import FORMATS
from smpconv_zoo.exporting import Exported, export_network
from smpconv_zoo.importing import Imported, import_checkpoint
from smpconv_zoo.predicting import Prediction, check_output, predict_files, write_predictions
from smpconv_zoo.pretrained.cards import CheckpointCard, checkpoint_card, list_checkpoints
from smpconv_zoo.pretrained.home import card_in_use
from smpconv_zoo.pretrained.signing import generate_keys, sign_checkpoint, signature_required
from smpconv_zoo.pretrained.store import CheckpointError
from smpconv_zoo.publishing import ORGANISATION, Published, publish_checkpoint
from smpconv_zoo.reporting.report import write_report_page
from smpconv_zoo.training.engine import EpochLog, Stopped
from smpconv_zoo.training.finetuning import FREEZES
from smpconv_zoo.training.finetuning import finetune as finetune_network
from smpconv_zoo.training.recipe import PROTOCOLS, ImageRecipe, SequenceRecipe, load_recipe, parse_overrides
from smpconv_zoo.training.run_folder import TRACKERS
from smpconv_zoo.training.running import train as run_training
from smpconv_zoo.training.sequence import finish
from smpconv_zoo.verifying import failed, find, verify_all
from smpconv_zoo.verifying import verify as verify_one

__all__ = ["app", "main"]

CHECKPOINTS = ("checkpoint", "parameters", "status", "data", "paper top-1", "measured top-1")
_VERDICTS = {True: "ok", False: "FAILED", None: "skipped"}
NETWORKS = ("network", "parameters", "family", "input", "classes")

DATA_SETS = ("name", "data", "bytes to fetch", "held against", "licence")
_TRUSTED = {
    "published": "the published one",
    "first use": "trusted on first use, and recorded",
    "known": "the one recorded before",
    "accepted": "another than the one recorded before, accepted as asked",
}
PREDICTIONS = ("file", "index", "rank", "label", "class", "probability")

SEQUENCE_TIMES = (
    "network",
    "input",
    "step, graph ms",
    "step ms",
    "pass, graph ms",
    "pass ms",
    "peak GiB",
    "peer step ms",
    "step",
    "pass",
)
CPU_TIMES = ("network", "work", "batch", "peer", "ours ms", "peer ms", "ours / peer")
SYNTHESIS_TIMES = (
    "kernel",
    "touched",
    "dense fwd ms",
    "bwd ms",
    "scatter fwd ms",
    "bwd ms",
    "faster",
    "dense MiB",
    "scatter MiB",
)
OPERATOR_TIMES = ("N x C x H x W, K", "dtype", "backend", "fwd ms", "dgrad ms", "wgrad ms", "floor ms", "note")

app = typer.Typer(
    name="smpconv-zoo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples at a time.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; PyTorch's choice if not given.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read images or recordings ahead, if there are CPUs.")]


def main() -> None:
    """Run the command line; failures that the package expects become one sentence on stderr and exit status 1."""
    keep_freed_memory()
    try:
        app(prog_name="smpconv-zoo")
    except Stopped as stopped:
        typer.echo(f"smpconv-zoo: {stopped}", err=True)
        sys.exit(128 + stopped.signal_number)
    except EXPECTED_ERRORS as error:
        typer.echo(f"smpconv-zoo: {_sentence(error)}", err=True)
        sys.exit(1)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"smpconv-zoo {__version__}")
        raise typer.Exit


@app.callback(epilog="Example: `smpconv-zoo demo`, or `smpconv-zoo COMMAND --help` for an example of any command")
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and stop.")
    ] = False,
) -> None:
    """SMPConv networks: what there is, converting, evaluating."""


@app.command("list", epilog="Example: `smpconv-zoo list --json`")
def list_(as_json: Json = False) -> None:
    """List all checkpoints and networks."""
    cards = [card_in_use(name) for name in list_checkpoints()]
    networks = list_networks()
    if as_json:
        _print_json({"checkpoints": [_plain(card) for card in cards], "networks": [_plain(n) for n in networks]})
        return
    _print_table(CHECKPOINTS, [_checkpoint_row(card) for card in cards], numbers=(1, 4, 5))
    _print_table(NETWORKS, [_network_row(network) for network in networks], numbers=(1, 4))


@app.command(epilog="Example: `smpconv-zoo info smpconv_tcn_mnist.smnist5k`")
def info(
    name: Annotated[str, typer.Argument(help="A network, or a checkpoint as `network.tag`.")],
    as_json: Json = False,
) -> None:
    """Show what is known about a network or checkpoint."""
    found = look_up(name)
    if as_json:
        _print_json(_plain(found))
        return
    facts = _plain(found)
    if isinstance(found, CheckpointCard):
        facts["weights"] = where_weights_come_from(found)
        del facts["files"]
    for line in _lines(facts):
        typer.echo(line)


@app.command(epilog="Example: `smpconv-zoo convert SMPConv_T.pth --model smpconv_t --out smpconv_t.safetensors`")
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint of the authors' code, .pth or .pth.tar.")],
    model: Annotated[str, typer.Option(help="Network that it belongs to.")],
    out: Annotated[Path, typer.Option(help="File to write, ending in .safetensors.")],
    model_args: Annotated[str, typer.Option(metavar="JSON", help="Network arguments unlike the entrypoint's.")] = "{}",
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint of the authors' code to safetensors, without executing anything in it."""
    done = convert_file(checkpoint, model, out, _json_object(model_args, "--model-args"), overwrite=force)
    if as_json:
        _print_json(_plain(done))
        return
    kind = "averaged weights" if done.averaged else "weights as trained, not averaged"
    place = f", from {done.entry!r}" if done.entry else ""
    typer.echo(f"read    {done.source} ({done.format}): {kind}{place}")
    typer.echo(f"holds   {done.tensors} tensors, {done.parameters:,} parameters of {done.network}")
    typer.echo(f"wrote   {done.out}")
    typer.echo(f"sha256  {done.sha256}")


@app.command(
    "import",
    epilog="Example: `smpconv-zoo import smpconv_t.in1k`, or with `--file SMPConv_T.pth.tar` if it is here already",
)
def import_(
    checkpoint_id: Annotated[str, typer.Argument(metavar="ID", help="Checkpoint to import.")],
    file: Annotated[Path | None, typer.Option(help="The published file, if it need not be downloaded.")] = None,
    accept_new: Annotated[
        bool, typer.Option("--accept-new", help="Take another file than the one imported before.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Fetch a checkpoint that its authors publish, convert it without executing anything in it, and keep it."""
    done = import_checkpoint(checkpoint_id, file, accept_new=accept_new)
    if as_json:
        _print_json(_plain(done))
        return
    for line in _import_lines(done):
        typer.echo(line)


@app.command(epilog="Example: `smpconv-zoo publish smpconv_tcn_mnist.smnist5k --dry-run`")
def publish(
    checkpoint_id: Annotated[str, typer.Argument(metavar="ID", help="Checkpoint whose weights are on this machine.")],
    org: Annotated[
        str | None,
        typer.Option(help=f"Organisation or user; where it is published already, or else {ORGANISATION}."),
    ] = None,
    sign: Annotated[
        Path | None,
        typer.Option(metavar="KEY", help="Sign with this private key (PEM); its password: SMPCONV_KEY_PASSWORD."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be pushed; send nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Publish a checkpoint on the Hugging Face Hub, read it back, and pin the revision in its card.

    The token is the Hub client's own: HF_TOKEN, or that of `hf auth login`.
    """
    password = os.environ.get("SMPCONV_KEY_PASSWORD")
    done = publish_checkpoint(checkpoint_id, org, dry_run=dry_run, sign=sign, password=password)
    if as_json:
        _print_json(_plain(done))
        return
    for line in _publish_lines(done):
        typer.echo(line)


@app.command(
    "eval",
    epilog="Example: `smpconv-zoo eval 'smpconv_tcn_mnist.*' --json`, "
    "or `smpconv-zoo eval smpconv_t.in1k --data-dir ~/imagenet --device cuda`",
)
def eval_(
    ids: Annotated[list[str], typer.Argument(help="Checkpoints; wildcards such as 'smpconv_tcn*' are taken.")],
    data_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            envvar="SMPCONV_DATA",
            help="Folder with the data of the authors' checkpoints; what is missing is said, with the place to get it.",
        ),
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch data that are not there into the folder; ImageNet needs a login.")
    ] = False,
    protocol: Annotated[
        str,
        typer.Option(
            help=f"How the test part is made: {', '.join(TEST_PARTS)}. Of Speech Commands and permuted MNIST it can be "
            "in several ways."
        ),
    ] = "sound",
    batch_size: BatchSize = 100,
    workers: Workers = 4,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure the top-1 accuracy of checkpoints beside the paper's and the card's; status 1 if the card's differs."""
    results = _evaluate(ids, batch_size, device, threads, workers, data_dir, download, protocol)
    if as_json:
        _print_json([_plain(result) for result in results])
    else:
        _print_results(results)
    _exit_on_difference(results)


@app.command(epilog="Example: `smpconv-zoo verify --all`, or `smpconv-zoo verify ./folder --public-key zoo.pem --json`")
def verify(
    targets: Annotated[
        list[str] | None, typer.Argument(metavar="[ID|PATH]...", help="Checkpoints, weight files, or folders of one.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All embedded and imported checkpoints.")] = False,
    require_signature: Annotated[
        bool, typer.Option("--require-signature", help="Without a valid signature, fail; so does --public-key.")
    ] = False,
    public_key: Annotated[
        Path | None, typer.Option(metavar="PEM", help="Trusted key; SMPCONV_PUBLIC_KEY if not given.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check checkpoints against their cards, offline: hash, structure, load, golden logits, signature."""
    if bool(targets) == every:
        raise typer.BadParameter("give checkpoints, or --all")
    # Whoever names a key wants it used: a file without a signature must not pass for one that has it.
    mode: Literal["auto", "require"] = (
        "require" if require_signature or public_key is not None or signature_required() else "auto"
    )
    found = (
        verify_all(mode, public_key) if every else {name: verify_one(name, mode, public_key) for name in targets or ()}
    )
    faults = {name: failed(steps) for name, steps in found.items()}
    if as_json:
        _print_json(
            [
                {"target": name, "ok": faults[name] is None, "steps": [_plain(step) for step in steps]}
                for name, steps in found.items()
            ]
        )
    else:
        for name, steps in found.items():
            for step in steps:
                typer.echo(f"{name}  {step.name:9}  {_VERDICTS[step.ok]:7}  {step.message}")
    if wrong := [f"{name} ({step})" for name, step in faults.items() if step]:
        typer.echo(f"smpconv-zoo: not verified: {', '.join(wrong)}", err=True)
        raise typer.Exit(1)


@app.command(epilog="Example: `smpconv-zoo sign smpconv_tcn_mnist.smnist5k --key keys/private.pem --out smnist5k.sig`")
def sign(
    target: Annotated[str, typer.Argument(metavar="ID|PATH", help="A checkpoint, a weight file, or a folder of one.")],
    key: Annotated[Path, typer.Option(help="Private key, PEM; its password is read from SMPCONV_KEY_PASSWORD.")],
    out: Annotated[Path, typer.Option(help="Bundle to write.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite the bundle if it exists.")] = False,
) -> None:
    """Sign a checkpoint's weights and card into a detached OpenSSF Model Signing bundle."""
    weights, card = find(target)
    if card is None:
        raise CheckpointError(f"{weights} has no card beside it; weights are signed together with their card")
    sign_checkpoint(weights, card, key, out, os.environ.get("SMPCONV_KEY_PASSWORD"), overwrite=force)
    typer.echo(f"signed  {weights}")
    typer.echo(f"wrote   {out}")


@app.command(epilog="Example: `smpconv-zoo keygen --out ~/smpconv-keys`")
def keygen(
    out: Annotated[Path, typer.Option(help="Folder for private.pem and public.pem; neither may exist.")],
) -> None:
    """Make a P-256 key pair for signing; SMPCONV_KEY_PASSWORD, if it is set, encrypts the private key."""
    private, public = generate_keys(out, os.environ.get("SMPCONV_KEY_PASSWORD"))
    typer.echo(f"private key  {private}: keep it to yourself, and out of every repository")
    typer.echo(f"public key   {public}: hand it to those who are to check your signatures")


@app.command(epilog="Example: `smpconv-zoo demo --out demo`, then open `demo/index.html`")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("demo"),
    batch_size: BatchSize = 100,
    device: Device = "cpu",
    threads: Threads = None,
    resolution: Annotated[
        bool, typer.Option("--resolution", help="Also measure them at other resolutions; takes minutes on a CPU.")
    ] = False,
) -> None:
    """Evaluate every checkpoint that ships with the package and write a report with pictures."""
    require_matplotlib()
    results = _evaluate(["*"], batch_size, device, threads)
    resolutions: list[ResolutionResult] = []
    digits = [name for name in match_checkpoints(["*"]) if checkpoint_card(name).data.name == "mnist5k"]
    for name in digits if resolution else ():
        with _progress(f"{name}, other resolutions") as progress:
            resolutions += evaluate_resolution(name, batch_size=batch_size, device=device, progress=progress)
    report = write_report(results, out, resolutions)
    _print_results(results)
    typer.echo(f"report: {report}")
    _exit_on_difference(results)


@app.command(epilog="Example: `smpconv-zoo report --out report.html --png figures`, in a clone of the repository")
def report(
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    png: Annotated[Path | None, typer.Option(metavar="DIR", help="Also write every figure as a PNG file.")] = None,
    repository: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Clone whose logs are shown; the one that holds this package if not given."),
    ] = None,
    batch_size: BatchSize = 100,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Write one HTML page of what was measured: tables, curves, kernels and points, each with its log.

    The shipped checkpoints are measured again, which takes a minute; status 1 if one is not what its card says.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    with _progress("checkpoints") as progress:
        written = write_report_page(out, repository=repository, png=png, batch_size=batch_size, progress=progress)
    for sentence in written.left_out:
        typer.echo(f"smpconv-zoo: {sentence}", err=True)
    if as_json:
        _print_json(
            {
                "page": str(written.page),
                "pictures": [str(path) for path in written.pictures],
                "differing": list(written.differing),
                "left_out": list(written.left_out),
            }
        )
    else:
        typer.echo(f"report: {written.page} ({written.page.stat().st_size:,} bytes)")
    if written.differing:
        typer.echo(f"smpconv-zoo: not equal to the card's figure: {', '.join(written.differing)}", err=True)
        raise typer.Exit(1)


@app.command(
    epilog="Example: `smpconv-zoo train smpconv_tcn_mnist.smnist5k --device cuda --out runs/try`, or "
    "`torchrun --nproc-per-node 8 -m smpconv_zoo train smpconv_t.in1k --data-dir ~/in1k --device cuda --out runs/t`"
)
def train(
    checkpoint_id: Annotated[str, typer.Argument(metavar="ID", help="Checkpoint whose recipe to run.")],
    out: Annotated[Path, typer.Option(help="Folder to write to; it must not hold another run.")],
    data_dir: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            envvar="SMPCONV_DATA",
            help="Where the data lie, or a stream (wds/ADDRESS, hfids/NAME); the digits of MNIST-5k need none.",
        ),
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch data that are missing, where it can be.")] = False,
    device: Device = "cpu",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the recipe (YAML).")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")] = False,
    final: Annotated[
        bool,
        typer.Option(
            "--final", help="Everything is chosen: learn from what was chosen by as well; MNIST-5k is tested, once."
        ),
    ] = False,
    workers: Workers = 4,
    check: Annotated[bool, typer.Option(help="Look at the header of every picture before the first step.")] = True,
    save_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between checkpoints; ends of epochs alone if not given.")
    ] = None,
    log_every: Annotated[int, typer.Option(min=1, help="Steps between lines of the log.")] = 50,
    track: Annotated[str | None, typer.Option(help=f"Metrics also go to one of {', '.join(TRACKERS)}.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, and stop.")] = False,
) -> None:
    """Train a checkpoint by its recipe, in one process or under torchrun; log, checkpoints, weights go to a folder.

    After a crash, a kill or SIGTERM, `--resume` goes on from the last checkpoint as if nothing had happened.
    """
    recipe = load_recipe(checkpoint_id, **parse_overrides(overrides or []))
    if recipe.id.partition(".")[0] != recipe.network:
        raise ValueError(f"{recipe.id} cannot be made from another network, {recipe.network!r}")

    def show(plan: dict[str, Any], model: torch.nn.Module) -> None:
        for title, entries in (("recipe", _plain(recipe)), ("plan", plan)):
            typer.echo(f"{title}:")
            for name, value in entries.items():
                typer.echo(f"  {name:24} {value}")
        typer.echo(f"protocol {recipe.protocol}: {PROTOCOLS[recipe.protocol]}")

    with _progress(recipe.id) as progress:
        run = run_training(
            recipe,
            out,
            data_dir=data_dir,
            download=download,
            final=final,
            device=device,
            workers=workers,
            check=check,
            resume=resume,
            save_every=save_every,
            log_every=log_every,
            tracker=track,
            dry_run=dry_run,
            on_plan=show,
            on_step=progress,
            on_epoch=_echo_epoch,
            on_note=lambda sentence: typer.echo(f"smpconv-zoo: {sentence}", err=True),
            on_read=progress,
        )
    if run is None or not run.leads:
        return
    best, last = run.outcome.best, run.outcome.last
    if run.outcome.stopped_early:
        typer.echo(f"stopped early: nothing better for {recipe.early_stop} epochs")
    typer.echo(f"loss {last.train_loss:.4f} in the last of {last.epoch} epochs")
    if best is not None:
        chosen = "test" if recipe.protocol == "reference" else "validation"
        typer.echo(f"{chosen} top-1 {last.top1:.2f} % in the last epoch, {best.top1:.2f} % in the best, {best.epoch}")
    if final and isinstance(recipe, SequenceRecipe) and recipe.data == "mnist5k":
        card = finish(run, recipe, out, device)
        assert card.measured is not None
        typer.echo(f"test top-1 {card.measured.top1:.2f} % ({card.measured.correct} of {card.measured.total})")
    typer.echo(f"wrote {out}")


@app.command(
    epilog="Example: `smpconv-zoo finetune smpconv_t --data-dir my_images --out runs/mine --device cuda`, "
    "or `smpconv-zoo finetune smpconv_tcn --data-dir my_sequences --out runs/mine`"
)
def finetune(
    name: Annotated[
        str, typer.Argument(metavar="ID", help="A network, a checkpoint, `local-dir:PATH` or `hf-hub:ORG/NAME`.")
    ],
    data_dir: Annotated[
        str, typer.Option(metavar="DIR", help="A folder of class folders, with train/ and val/ or without.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write to; it must not hold another run.")],
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels of a side; the network's own if not given. Kernels follow.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the data, at most.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=2, help="Samples of a step; by their number if not given.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Highest rate.")] = None,
    freeze: Annotated[
        str, typer.Option(help=f"What stays as it is: {', '.join(FREEZES)}. With backbone the classifier alone learns.")
    ] = "none",
    pretrained: Annotated[
        bool | None, typer.Option(help="Start from weights, or from random ones; from weights wherever there are some.")
    ] = None,
    keep_head: Annotated[
        bool, typer.Option("--keep-head", help="Go on with the classifier of the weights; the classes have to be its.")
    ] = False,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the recipe (YAML).")
    ] = None,
    device: Device = "cpu",
    workers: Workers = 4,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")] = False,
    track: Annotated[str | None, typer.Option(help=f"Metrics also go to one of {', '.join(TRACKERS)}.")] = None,
    license: Annotated[str, typer.Option(help="Of the weights to come, for their card.")] = "not stated",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a network on your own pictures, or .csv and .npy sequences, with any number of classes.

    A part is set aside to choose by, unless there is a val/. The best epoch is saved with the names of the classes, in
    a folder that `predict`, `export` and `timm.create_model` take.
    """
    values = {"image_size": image_size, "epochs": epochs, "batch_size": batch_size, "lr": lr}
    chosen = {key: value for key, value in values.items() if value is not None} | parse_overrides(overrides or [])

    def say(line: str) -> None:
        # Of JSON nothing else may be on stdout.
        typer.echo(line, err=as_json)

    def show(recipe: SequenceRecipe | ImageRecipe) -> None:
        say("recipe:")
        for field, value in _plain(recipe).items():
            say(f"  {field:24} {value}")

    def plan(entries: dict[str, Any], model: torch.nn.Module) -> None:
        say("plan:")
        for field, value in entries.items():
            say(f"  {field:24} {value}")

    with _progress(name) as progress:
        done = finetune_network(
            name,
            data_dir,
            out,
            overrides=chosen,
            pretrained=pretrained,
            freeze=freeze,
            keep_head=keep_head,
            device=device,
            workers=workers,
            resume=resume,
            tracker=track,
            license=license,
            dry_run=dry_run,
            on_recipe=show,
            on_plan=plan,
            on_step=progress,
            on_epoch=lambda epoch: _echo_epoch(epoch, err=as_json),
            on_note=lambda sentence: typer.echo(f"smpconv-zoo: {sentence}", err=True),
        )
    if done is None:
        return
    if as_json:
        _print_json(
            {
                "folder": str(done.folder),
                "classes": list(done.classes),
                "card": _plain(done.card),
                "best": None if done.outcome.best is None else _plain(done.outcome.best),
                "last": _plain(done.outcome.last),
                "stopped_early": done.outcome.stopped_early,
                "predict": done.predict_command,
            }
        )
        return
    best, last = done.outcome.best, done.outcome.last
    if done.outcome.stopped_early:
        typer.echo(f"stopped early, after epoch {last.epoch}")
    if best is not None:
        typer.echo(f"validation top-1 {best.top1:.2f} % in epoch {best.epoch}, which was kept")
    typer.echo(f"wrote   {done.folder}: {len(done.classes)} classes, sha256 {done.card.files[0].sha256}")
    typer.echo(f"next    {done.predict_command}")


@app.command(
    epilog="Example: `smpconv-zoo export smpconv_tcn_mnist.smnist5k --format onnx --out digits.onnx`, "
    "or `smpconv-zoo export smpconv_t --untrained --format torch-export --out smpconv_t.pt2`"
)
def export(
    name: Annotated[
        str,
        typer.Argument(
            metavar="ID", help="A checkpoint, `hf-hub:ORG/NAME` or `local-dir:PATH`; with --untrained a network."
        ),
    ],
    format: Annotated[str, typer.Option(help=f"One of {', '.join(FORMATS)}.")],
    out: Annotated[Path, typer.Option(help=f"File to write, ending in {', '.join(dict.fromkeys(FORMATS.values()))}.")],
    untrained: Annotated[
        bool, typer.Option("--untrained", help="Take random weights: to try a runtime out, or to time it.")
    ] = False,
    model_args: Annotated[str, typer.Option(metavar="JSON", help="Network arguments unlike the entrypoint's.")] = "{}",
    device: Annotated[str, typer.Option(help="What aot-inductor compiles for; other files run anywhere.")] = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Write a network as a file that runs without this package, checked against the network itself.

    Batch size and size of the input stay free. Classes, preprocessing and origin of the weights are inside.
    """
    arguments = _json_object(model_args, "--model-args")
    if format not in FORMATS:
        raise typer.BadParameter(f"--format must be one of {', '.join(FORMATS)}, got {format}")
    with _progress(f"{name} to {format}") as progress:
        done = export_network(
            name,
            out,
            format,
            untrained=untrained,
            arguments=arguments,
            device=device,
            overwrite=force,
            progress=progress,
        )
    if as_json:
        _print_json(_plain(done))
        return
    for line in _export_lines(done):
        typer.echo(line)


@app.command(
    epilog="Example: `smpconv-zoo predict smpconv_tcn_mnist.smnist5k digits/ --out digits.csv`, "
    "or `smpconv-zoo predict digits.onnx digits/7.png`"
)
def predict(
    name: Annotated[
        str,
        typer.Argument(
            metavar="ID|FILE", help="A checkpoint, `hf-hub:ORG/NAME`, `local-dir:PATH`, or an exported file."
        ),
    ],
    inputs: Annotated[
        list[Path], typer.Argument(help="Pictures, .npy or .csv sequences, or folders of them, as the network takes.")
    ],
    out: Annotated[Path | None, typer.Option(help="File to write, .csv or .json.")] = None,
    batch_size: BatchSize = 32,
    top_k: Annotated[int, typer.Option(min=1, help="Classes to give for a sample, most probable first.")] = 1,
    any_length: Annotated[
        bool, typer.Option("--any-length", help="Take sequences of other lengths than the network was made for.")
    ] = False,
    workers: Workers = 4,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Say what class files are of; status 1 if any of them cannot be read, the others go on.

    Sequences are (C, L) or (N, C, L), for one channel also (L,) or (N, L); a row of a .csv is a channel, or, for one
    channel, a sequence. Values are in the unit of the data, before mean and deviation; pixels count from 0 to 1.
    """
    if out is not None:
        check_output(out)
    if threads is not None:
        torch.set_num_threads(threads)
    with _progress("files") as progress:
        found = predict_files(
            name,
            inputs,
            batch_size=batch_size,
            top_k=top_k,
            device=device,
            workers=workers,
            any_length=any_length,
            leave_out=out,
            progress=progress,
        )
    if out is not None:
        write_predictions(out, found)
    if as_json:
        _print_json(_plain(found))
    elif out is None:
        _print_table(PREDICTIONS, [_prediction_row(row) for row in found.predictions], numbers=(1, 2, 3, 5))
    else:
        files = len({row.file for row in found.predictions})
        samples = len({(row.file, row.index) for row in found.predictions})
        typer.echo(f"wrote {out}: {samples:,} samples of {files:,} files")
    for failed_file in found.unreadable:
        typer.echo(f"smpconv-zoo: {failed_file.file}: {failed_file.reason}", err=True)
    if found.unreadable:
        raise typer.Exit(1)


data = typer.Typer(no_args_is_help=True, help="Fetch data sets, look at those that are here, and make stand-ins.")
app.add_typer(data, name="data")


@data.command("check", epilog="Example: `smpconv-zoo data check ~/in1k --full`")
def data_check(
    place: Annotated[
        str,
        typer.Argument(
            metavar="DIR",
            help="Pictures in class folders, tar files, shards or hfds/NAME; or the files of MNIST, CIFAR-10, "
            "Speech Commands, or a set in .ts files.",
        ),
    ],
    full: Annotated[
        bool, typer.Option("--full", help="Decode every picture or recording; its header and its end if not.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Threads.")] = 8,
    as_json: Json = False,
) -> None:
    """Count samples and classes, and name every file that cannot be read; status 1 if there is one.

    Of the data of the authors' tasks it also says how they would be split, by either protocol.
    """
    with _progress("files") as progress:
        found = check_data(Path(place).expanduser(), full, progress)
    if found is not None:
        _print_checked(found, as_json)
        return
    pictures = open_pictures(place)
    with _progress("pictures") as progress:
        bad = unreadable_pictures(pictures, full=full, workers=workers, progress=progress)
    parts = {"train": pictures.train, "validation": pictures.validation}
    counts = {name: 0 if part is None else len(part.labels) for name, part in parts.items()}
    if as_json:
        unreadable = [{"file": name, "reason": reason} for name, reason in bad]
        _print_json({"kind": pictures.kind, "classes": len(pictures.classes), **counts, "unreadable": unreadable})
    else:
        typer.echo(
            f"{place}: {pictures.kind}, {len(pictures.classes):,} classes, {counts['train']:,} pictures to learn from, "
            f"{counts['validation']:,} to validate on"
        )
        for name, reason in bad:
            typer.echo(f"{name}: {reason}")
    if bad:
        typer.echo(f"smpconv-zoo: {len(bad):,} pictures cannot be read", err=True)
        raise typer.Exit(1)


@data.command(
    "fetch",
    epilog="Example: `smpconv-zoo data fetch mnist --data-dir ~/data`, or `smpconv-zoo data fetch --list`",
)
def data_fetch(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help=f"Of {', '.join(SOURCES)}; or all.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", envvar="SMPCONV_DATA", help="Folder to put them into.")
    ] = None,
    list_: Annotated[
        bool, typer.Option("--list", help="Show what there is, its size and licence; fetch nothing.")
    ] = False,
    url: Annotated[
        str | None,
        typer.Option(
            help="Another address of the archive (of mnist, of the folder of its four), or its path here; a published "
            "sha256 has to be its."
        ),
    ] = None,
    accept_new: Annotated[
        bool, typer.Option("--accept-new", help="Take another archive than the one fetched before.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what lies in their place and is not them.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the archives in DIR/.smpconv-data.")] = False,
    as_json: Json = False,
) -> None:
    """Fetch the data of the authors' tasks from where they are published; what is here already is not fetched again.

    A download that stopped is gone on with. Every archive is held against the published sha256; where nobody publishes
    one, the first is trusted, recorded, and the only one that is taken from then on.
    """
    if list_:
        if as_json:
            _print_json([_source_facts(source) for source in SOURCES.values()])
        else:
            _print_table(DATA_SETS, [_source_row(source) for source in SOURCES.values()], numbers=(2,))
        return
    if not names or data_dir is None:
        raise typer.BadParameter("name the data and, by --data-dir, a folder; --list shows what there is")
    chosen = [name for name, source in SOURCES.items() if source.files] if names == ["all"] else names
    if url is not None and len(chosen) > 1:
        raise typer.BadParameter("--url is the address of one archive: name one data set")
    results = []
    for name in chosen:
        with _transfer() as progress:
            results.append(
                fetch(
                    name,
                    data_dir,
                    url=url,
                    accept_new=accept_new,
                    force=force,
                    keep=keep,
                    progress=progress,
                    on_note=_echo_note,
                )
            )
        if not as_json:
            for line in _fetch_lines(results[-1]):
                typer.echo(line)
    if as_json:
        _print_json([_plain(result) for result in results])


@data.command("stand-in", epilog="Example: `smpconv-zoo data stand-in stand_in --classes 100 --per-class 128`")
def data_stand_in(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make.")],
    classes: Annotated[int, typer.Option(min=2, max=1000, help="Classes.")] = 1000,
    per_class: Annotated[int, typer.Option(min=1, help="Pictures of each to learn from.")] = 4,
    validation_per_class: Annotated[int, typer.Option(min=0, help="Pictures of each to validate on.")] = 1,
    width: Annotated[int, typer.Option(min=8, help="Pixels.")] = 500,
    height: Annotated[int, typer.Option(min=8, help="Pixels.")] = 375,
    seed: Annotated[int, typer.Option(help="Of the pictures.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Threads.")] = 8,
) -> None:
    """Write a folder of ImageNet's form, of synthetic JPEGs of its usual size: to rehearse a run and to time it."""
    with _progress("pictures") as progress:
        written = write_stand_in(
            folder,
            classes,
            per_class,
            (width, height),
            seed,
            validation_per_class=validation_per_class,
            workers=workers,
            progress=progress,
        )
    typer.echo(f"wrote {folder}: {written:,} pictures of {classes:,} classes, synthetic")


bench = typer.Typer(no_args_is_help=True, help="Measure speed on this machine.")
app.add_typer(bench, name="bench")

Repeats = Annotated[int, typer.Option(min=1, help="Repetitions, of which the median counts.")]
Record = Annotated[Path | None, typer.Option("--out", help="Also write a record as JSON, with versions and hardware.")]


@bench.command("sequence", epilog="Example: `smpconv-zoo bench sequence --device cuda --out sequence.json`")
def bench_sequence_(
    networks: Annotated[list[str] | None, typer.Argument(help="Networks; those of the authors' tasks if none.")] = None,
    device: Device = "cpu",
    batch_size: Annotated[int | None, typer.Option(min=1, help="Samples at a time; the authors' if not given.")] = None,
    repeats: Repeats = 10,
    peer: Annotated[
        bool | None, typer.Option(help="Time dense synthesis and torch.fft too; done on CPU if not said.")
    ] = None,
    threads: Threads = None,
    out: Record = None,
    as_json: Json = False,
) -> None:
    """Time training steps and inference of the sequence networks."""
    unknown = sorted(set(networks or ()) - TASKS.keys())
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no network of a sequence task; there are {', '.join(TASKS)}")
    target = _prepare(device, threads, out)
    chosen = {name: batch_size or TASKS[name] for name in networks or TASKS}
    with _progress("networks") as progress:
        results = bench_sequence(chosen, target, repeats, target.type == "cpu" if peer is None else peer, progress)
    _report(record(target, repeats=repeats, results=[_plain(result) for result in results]), out, as_json)
    if not as_json:
        _print_table(SEQUENCE_TIMES, [_sequence_row(result) for result in results], numbers=range(2, 10))


@bench.command("cpu", epilog="Example: `smpconv-zoo bench cpu smpconv_t --batch-size 1 --batch-size 8`")
def bench_cpu_(
    networks: Annotated[list[str] | None, typer.Argument(help="smpconv_t, smpconv_b; both if none.")] = None,
    batch_sizes: Annotated[list[int] | None, typer.Option("--batch-size", min=1, help="Images; 1 and 8.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Of weights and images, for inference.")
    ] = "float32",
    train: Annotated[bool, typer.Option(help="Also time a training step, beside F.conv2d.")] = False,
    repeats: Repeats = 10,
    threads: Threads = None,
    out: Record = None,
    as_json: Json = False,
) -> None:
    """Time image networks on the CPU, in turns with timm's ConvNeXt of the same size."""
    unknown = sorted(set(networks or ()) - PEERS.keys())
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: there is no peer for it; choose of {', '.join(PEERS)}")
    target = _prepare("cpu", threads, out)
    with _progress("measurements") as progress:
        results = bench_cpu(
            networks or list(PEERS), batch_sizes or [1, 8], getattr(torch, dtype), train, repeats, progress
        )
    _report(
        record(
            target, threads=torch.get_num_threads(), repeats=repeats, results=[_plain(result) for result in results]
        ),
        out,
        as_json,
    )
    if not as_json:
        _print_table(CPU_TIMES, [_cpu_row(result) for result in results], numbers=range(4, 7))


@bench.command("synthesis", epilog="Example: `smpconv-zoo bench synthesis --out synthesis.json`")
def bench_synthesis_(
    device: Device = "cpu", repeats: Repeats = 10, threads: Threads = None, out: Record = None, as_json: Json = False
) -> None:
    """Time the rendering of kernels from points, by touched taps and densely."""
    target = _prepare(device, threads, out)
    with _progress("kernels") as progress:
        results = bench_synthesis(target, repeats, progress)
    _report(record(target, repeats=repeats, results=[_plain(result) for result in results]), out, as_json)
    if not as_json:
        _print_table(SYNTHESIS_TIMES, [_synthesis_row(result) for result in results], numbers=range(1, 9))


@bench.command("model", epilog="Example: `smpconv-zoo bench model smpconv_t convnext_tiny --device cuda`")
def bench_model_(
    networks: Annotated[
        list[str] | None, typer.Argument(help="timm's names, peers too; smpconv_t and smpconv_b if none.")
    ] = None,
    device: Device = "cpu",
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 128,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="To compute in.")] = "bfloat16",
    compiled: Annotated[bool, typer.Option("--compile", help="Also what torch.compile makes of them.")] = False,
    repeats: Repeats = 10,
    threads: Threads = None,
    out: Record = None,
    as_json: Json = False,
) -> None:
    """Time training and inference of image networks, in images per second."""
    chosen = networks or list(PEERS)
    unknown = [name for name in chosen if not timm.is_model(name)]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: timm knows no such network")
    target = _prepare(device, threads, out)

    def entry(results: Sequence[ModelTime]) -> dict[str, Any]:
        tf32 = torch.backends.cudnn.allow_tf32
        return record(target, repeats=repeats, tf32=tf32, results=[_plain(result) for result in results])

    with _progress("measurements") as progress:

        def keep(results: Sequence[ModelTime], total: int) -> None:
            progress(len(results), total)
            if out is not None:
                write_record(out, entry(results))

        results = bench_model(chosen, target, batch_size, getattr(torch, dtype), repeats, compiled, keep)
    _report(entry(results), out, as_json)
    if not as_json:
        rows = [
            (
                result.network,
                result.work,
                result.layout,
                f"{result.images_per_second:,.0f}",
                "" if result.peak_gib is None else f"{result.peak_gib:.2f}",
            )
            for result in results
        ]
        _print_table(("network", "work", "layout", "images/s", "peak GiB"), rows, numbers=range(3, 5))


@bench.command("op", epilog="Example: `smpconv-zoo bench op --device cuda --out operator.json`")
def bench_op(
    device: Device = "cpu",
    batch_sizes: Annotated[
        list[int] | None,
        typer.Option("--batch-size", min=1, help="Of the four stages; 1, 16, 64, 128 and 256 if none."),
    ] = None,
    dtypes: Annotated[
        list[str] | None, typer.Option("--dtype", help=f"{', '.join(DTYPES)}; bfloat16 and float32 if none.")
    ] = None,
    native: Annotated[bool, typer.Option(help="Time PyTorch's own kernels, too, which takes most of the time.")] = True,
    repeats: Repeats = 10,
    threads: Threads = None,
    out: Record = None,
    as_json: Json = False,
) -> None:
    """Time the depthwise convolution of SMPConvNet and both its gradients, by every backend."""
    chosen = dtypes or ["bfloat16", "float32"]
    unknown = sorted(set(chosen) - DTYPES.keys())
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no dtype of this benchmark; there are {', '.join(DTYPES)}")
    target = _prepare(device, threads, out)
    with _progress("convolutions") as progress:
        results = bench_operator(target, chosen, batch_sizes or [1, 16, 64, 128, 256], repeats, native, progress)
    tf32 = torch.backends.cudnn.allow_tf32
    _report(record(target, repeats=repeats, tf32=tf32, results=[_plain(result) for result in results]), out, as_json)
    if not as_json:
        _print_table(OPERATOR_TIMES, [_operator_row(result) for result in results], numbers=range(3, 7))


def _source_row(source: DataSource) -> tuple[str, ...]:
    size = "login needed" if not source.files else "not known" if source.bytes is None else f"{source.bytes:,}"
    published = all(file.sha256 for file in source.files)
    checked = "-" if not source.files else "published sha256" if published else "the first fetched"
    return source.name, source.title, size, checked, source.licence


def _source_facts(source: DataSource) -> dict[str, Any]:
    facts = dataclasses.asdict(dataclasses.replace(source, rename=str))
    del facts["rename"]
    return facts | {"bytes": source.bytes}


def _fetch_lines(done: Fetched) -> Iterator[str]:
    for file in done.sources if done.changed else ():
        yield f"read    {file.url} ({file.bytes:,} bytes)"
        yield f"sha256  {file.sha256}, {_TRUSTED[file.trusted]}"
    yield f"{'wrote' if done.changed else 'kept ':7} {done.place}: {done.files:,} files, {done.bytes:,} bytes"
    if not done.changed:
        yield (
            f"They are here, fetched on {done.date}: nothing was done."
            if done.date
            else ("They were here, and not from this command: they were looked at, and nothing was done.")
        )


def _print_checked(found: CheckedData, as_json: bool) -> None:
    unreadable = [{"file": name, "reason": reason} for name, reason in found.unreadable]
    if as_json:
        facts = _plain(found) | {"place": str(found.place), "samples": found.samples, "unreadable": unreadable}
        _print_json(facts)
    else:
        counts = ", ".join(f"{count:,} {part}" for part, count in found.files.items()) or "nothing that can be read"
        typer.echo(f"{found.place}: {found.name}, {found.classes:,} classes, {counts}")
        for name, parts in found.protocols.items():
            typer.echo(
                f"protocol {name}: learns from {parts['train']:,}, chooses by {parts['chosen_by']:,}, is tested on "
                f"{parts['test']:,} ({parts['split']})"
            )
        for note in found.notes:
            typer.echo(note)
        for name, reason in found.unreadable:
            typer.echo(f"{name}: {reason}")
    if found.unreadable:
        typer.echo(f"smpconv-zoo: {len(found.unreadable):,} files cannot be used", err=True)
        raise typer.Exit(1)


def _prepare(device: str, threads: int | None, out: Path | None) -> torch.device:
    """The device of a benchmark, and a place for its record, before any time is spent."""
    if out is not None and not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent} is no folder: make it before the benchmark runs")
    if threads is not None:
        torch.set_num_threads(threads)
    return usable_device(device)


def _report(entry: dict[str, Any], out: Path | None, as_json: bool) -> None:
    if out is not None:
        write_record(out, entry)
    if as_json:
        _print_json(entry)


def _sequence_row(result: SequenceTime) -> tuple[str, ...]:
    def ratio(peer: float | None, ours: float | None) -> str:
        return "" if peer is None or not ours else f"{peer / ours:.1f} x"

    return (
        result.network,
        " x ".join(map(str, result.shape)),
        *(
            "" if value is None else f"{value:.2f}"
            for value in (
                result.train_graph_ms,
                result.train_ms,
                result.inference_graph_ms,
                result.inference_ms,
                result.peak_gib,
                result.peer_train_ms,
            )
        ),
        ratio(result.peer_train_ms, result.train_ms),
        ratio(result.peer_inference_ms, result.inference_ms),
    )


def _cpu_row(result: CpuTime) -> tuple[str, ...]:
    return (
        result.network,
        f"{result.work}, {result.dtype}",
        str(result.batch_size),
        result.peer,
        f"{result.ours_ms:.1f}",
        f"{result.peer_ms:.1f}",
        f"{result.ratio:.2f}",
    )


def _operator_row(result: OperatorTime) -> tuple[str, ...]:
    times = (result.forward_ms, result.input_ms, result.weight_ms, result.floor_ms)
    return (
        f"{result.batch} x {result.channels} x {result.height} x {result.width}, {result.kernel}",
        result.dtype,
        result.backend,
        *("" if time is None else f"{time:.4f}" for time in times),
        result.note,
    )


def _synthesis_row(result: SynthesisTime) -> tuple[str, ...]:
    dense = result.dense_forward_ms + result.dense_backward_ms
    scatter = result.scatter_forward_ms + result.scatter_backward_ms
    return (
        result.kernel,
        f"{100 * result.touched:.1f} %",
        f"{result.dense_forward_ms:.3f}",
        f"{result.dense_backward_ms:.3f}",
        f"{result.scatter_forward_ms:.3f}",
        f"{result.scatter_backward_ms:.3f}",
        f"{dense / scatter:.1f} x",
        f"{result.dense_bytes / 2**20:.1f}",
        f"{result.scatter_bytes / 2**20:.1f}",
    )


def _import_lines(done: Imported) -> Iterator[str]:
    source = done.source
    yield f"read    {source.name} ({source.bytes:,} bytes): {'averaged' if source.averaged else 'trained'} weights"
    yield f"sha256  {source.sha256}"
    yield f"{'wrote' if done.changed else 'kept ':7} {done.path} ({done.bytes:,} bytes)"
    yield f"sha256  {done.sha256}"
    if done.trusted == "declared":
        yield f"These are the bytes that the card of {done.id} declares."
    elif done.trusted == "first use":
        yield "Trusted on first use: nobody publishes a hash of this file. From now on no other is taken unasked."
    elif done.trusted == "accepted":
        yield "Another file than the one imported before, accepted as asked. From now on this one is the recorded one."
    if not done.changed:
        yield "This very file was imported before; nothing was done."
    card = checkpoint_card(done.id)
    yield f"Whether these weights are as good as published: {eval_command(card)}"
    if "PATH" in eval_command(card):
        yield f"PATH: your folder of {card.data.name}; without it the command says what it needs and where to get it."


def _export_lines(done: Exported) -> Iterator[str]:
    origin = done.description
    weights = "random weights" if origin.weights_sha256 is None else f"weights of sha256 {origin.weights_sha256}"
    yield f"network {origin.checkpoint or origin.network}, {weights}"
    yield f"free    {', '.join(done.dynamic)}"
    for check in done.checks:
        yield f"checked {' x '.join(map(str, check.shape))}: differs by {check.error:.1e} of the largest logit"
    yield f"wrote   {done.path} ({done.bytes:,} bytes)"
    yield f"sha256  {done.sha256}"


def _prediction_row(row: Prediction) -> tuple[str, ...]:
    name = "-" if row.name is None else row.name
    return row.file, str(row.index), str(row.rank), str(row.label), name, f"{row.probability:.4f}"


def _publish_lines(done: Published) -> Iterator[str]:
    for file in done.files:
        yield f"{file.name:17}  {file.bytes:>11,} bytes  sha256 {file.sha256}"
    if done.revision is None:
        yield f"Would be pushed to {done.repo}; nothing was sent. The README.md:"
        yield ""
        yield done.readme.rstrip()
        return
    yield f"{'Pushed to' if done.committed else 'Already at'} {done.repo}, revision {done.revision}"
    yield "Read back into an empty cache: every file equal, bit for bit."
    if done.pinned:
        yield f"The card of {done.id} now names this revision: commit the change."
    else:
        yield f"The card of {done.id} names this revision already: nothing was changed."


def _evaluate(
    patterns: Sequence[str],
    batch_size: int,
    device: str,
    threads: int | None,
    workers: int = 0,
    data_dir: Path | None = None,
    download: bool = False,
    protocol: str = "sound",
) -> list[EvaluationResult]:
    if threads is not None:
        torch.set_num_threads(threads)
    # All data are opened before the first network is loaded: nothing is computed in vain.
    opened: dict[str, EvaluationData] = {}
    missing: list[FileNotFoundError] = []
    with _transfer() as progress:
        for name in match_checkpoints(patterns):
            try:
                opened[name] = open_test_set(card_in_use(name), data_dir, download, protocol, progress, _echo_note)
            except FileNotFoundError as error:
                # Of those that a wildcard stands for, what can be measured is.
                if name in patterns:
                    raise
                missing.append(error)
                typer.echo(f"smpconv-zoo: {name} is left out: {error}", err=True)
    if not opened:
        raise missing[0]
    results = []
    for name, data in opened.items():
        with _progress(name) as progress:
            results.append(
                evaluate_checkpoint(
                    name, data=data, batch_size=batch_size, workers=workers, device=device, progress=progress
                )
            )
    return results


@contextlib.contextmanager
def _transfer() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr for each file that is fetched or unpacked, in bytes, while there is someone to see it."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=None)
            bar.update(tasks[what], completed=done, total=total or None)

        yield show


def _echo_note(sentence: str) -> None:
    typer.echo(f"smpconv-zoo: {sentence}", err=True)


def _echo_epoch(epoch: EpochLog, err: bool = False) -> None:
    chosen = "" if epoch.top1 is None else f"  top-1 {epoch.top1:.2f} %"
    speed = f"{epoch.samples_per_second:,.0f} samples/s"
    typer.echo(f"epoch {epoch.epoch}  loss {epoch.train_loss:.4f}{chosen}  lr {epoch.lr:.2e}  {speed}", err=err)


def _exit_on_difference(results: Sequence[EvaluationResult]) -> None:
    differing = [result.id for result in results if result.agrees is False]
    if differing:
        typer.echo(f"smpconv-zoo: not equal to the card's figure: {', '.join(differing)}", err=True)
        raise typer.Exit(1)


def _print_results(results: Sequence[EvaluationResult]) -> None:
    _print_table(HEADER, [table_row(result) for result in results], numbers=range(3, len(HEADER)))
    for result in results:
        for note in result.notes:
            typer.echo(f"{result.id}: {note}")


def _checkpoint_row(card: CheckpointCard) -> tuple[str, ...]:
    paper = "-" if card.paper is None else f"{card.paper.top1:.2f}"
    measured = "-" if card.measured is None else f"{card.measured.top1:.2f}"
    return card.id, f"{card.parameters:,}", card.status, f"{card.data.name}, {card.data.input}", paper, measured


def _network_row(network: NetworkFacts) -> tuple[str, ...]:
    shape = " x ".join(map(str, network.input_shape))
    return network.name, f"{network.parameters:,}", network.family, shape, str(network.num_classes)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def _plain(record: Any) -> dict[str, Any]:
    return dataclasses.asdict(record)


def _lines(facts: dict[str, Any], indent: str = "") -> Iterator[str]:
    """Nested facts, one a line, keys in a column."""
    width = max((len(key) for key in facts), default=0)
    for key, value in facts.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{key}"
            yield from _lines(value, indent + "  ")
        else:
            yield f"{indent}{key:{width}}  {_shown(value)}"


def _shown(value: Any) -> str:
    if value is None or value in ({}, (), []):
        return "-"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)


def _json_object(text: str, option: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"{option} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise typer.BadParameter(f"{option} must be a JSON object, got {text}")
    return value


if __name__ == "__main__":
    main()
