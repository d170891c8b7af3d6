"""A run from its recipe to its last checkpoint: data, network and engine put together, in one process or many."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from smpconv_zoo.data.folders import check_pictures, open_pictures
from smpconv_zoo.training.arrays import ArrayData, open_arrays
from smpconv_zoo.training.engine import Engine, EpochLog, Outcome
from smpconv_zoo.training.images import ImageData, worker_death
from smpconv_zoo.training.recipe import ImageRecipe, SequenceRecipe
from smpconv_zoo.training.run_folder import RunFolder
from smpconv_zoo.training.streams import StreamData, is_stream
from smpconv_zoo.training.synthetic import SyntheticData
from smpconv_zoo.training.world import World, join_world

__all__ = ["Run", "open_data", "start_network", "train"]


@dataclasses.dataclass(frozen=True)
class Run:
    """What came of a run.

    Args:
        outcome: Its epochs.
        model: The network as measured: the average of the weights where the recipe has one.
        data: What it learned from.
        leads: Whether this process is the one that writes and prints.
    """

    outcome: Outcome
    model: nn.Module
    data: ArrayData | ImageData | SyntheticData
    leads: bool


def train(
    recipe: SequenceRecipe | ImageRecipe,
    out: Path | None,
    *,
    data_dir: Path | str | None = None,
    download: bool = False,
    final: bool = False,
    device: str | torch.device = "cpu",
    workers: int = 4,
    check: bool = True,
    resume: bool = False,
    save_every: int | None = None,
    log_every: int = 50,
    tracker: str | None = None,
    dry_run: bool = False,
    network: Callable[[SequenceRecipe | ImageRecipe], nn.Module] | None = None,
    open_: Callable[..., ArrayData | ImageData | SyntheticData] | None = None,
    on_plan: Callable[[dict[str, Any], nn.Module], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    on_epoch: Callable[[EpochLog], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    on_read: Callable[[int, int], None] | None = None,
) -> Run | None:
    """Run a recipe. Under ``torchrun`` each process calls this and takes its share.

    Args:
        recipe: The run.
        out: Folder of the run, see :mod:`~smpconv_zoo.training.run_folder`; None to write nothing.
        data_dir: Where the data lie; none is needed for digits out of a package.
        download: Whether to fetch data that are not there, where that can be done.
        final: For data in memory: everything is chosen, learn from what was chosen by as well.
        device: ``"cpu"``, ``"cuda"``, ...
        workers: Processes that read pictures, for each process that trains.
        check: Whether to look at the header of every picture before the first step; not done of a run that goes on.
        resume: Go on from the last checkpoint in ``out``, if there is one. A process that ``torchrun`` started again
            does so unasked.
        save_every: Optimizer steps between checkpoints, besides those at the ends of epochs.
        log_every: Optimizer steps between lines of the log.
        tracker: Where metrics go besides, ``"trackio"`` or ``"wandb"``.
        dry_run: Stop before the first step, and before anything is written.
        network: Makes the network; from the recipe's entrypoint and arguments if None.
        open_: Opens the data, as :func:`open_data` does.
        on_plan: Called with what is about to run, and the network, before the first step.
        on_step: Called after every optimizer step with those done and in all.
        on_epoch: Called with the log of every epoch.
        on_note: Called with sentences that a user should see.
        on_read: Called with the files read so far and in all, while data are read.

    Returns:
        What came of it; None of a dry run.

    Raises:
        FileExistsError: ``out`` holds another run; nothing was touched.
        FileNotFoundError: The data are not there; the message says how to get them.
        ValueError: Something does not fit: device, data, network, recipe, processes. Nothing was written.
        FloatingPointError: The loss is not finite any more.
        smpconv_zoo.training.engine.Stopped: A signal asked for it; ``resume`` goes on.
        OSError: A file could not be read or written.
    """
    note = on_note or (lambda sentence: None)
    resume = resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    with join_world(device) as world:
        folder = None if out is None else RunFolder(out, tracker if world.leads else None)
        if folder is not None and world.leads:
            folder.check(recipe, resume)
        torch.manual_seed(recipe.seed)
        model = (network or start_network)(recipe)
        opened = (open_ or open_data)(
            recipe,
            model,
            world,
            data_dir,
            download=download,
            final=final,
            workers=workers,
            check=check and not resume,
            progress=on_read,
            note=note,
        )
        model = model.to(world.device)
        engine = Engine(
            recipe,
            model,
            opened,
            world,
            folder,
            save_every=save_every,
            log_every=log_every,
            on_step=on_step if world.leads else None,
            on_epoch=on_epoch if world.leads else None,
        )
        plan = engine.plan()
        if world.leads:
            if on_plan is not None:
                on_plan(plan, model)
            if folder is not None and not dry_run:
                folder.start(recipe, str(world.device), world.size, plan)
        world.wait()
        if dry_run:
            return None
        if resume:
            passed_over = engine.resume()
            if world.leads:
                for sentence in passed_over or ():
                    note(f"passed over a broken checkpoint: {sentence}")
                note(f"goes on after step {engine.update}" if engine.update else "no checkpoint yet: starts anew")
                if engine.update % engine.updates_per_epoch and isinstance(opened, StreamData) and opened.note:
                    note(opened.note)
        try:
            outcome = engine.fit()
        except RuntimeError as error:
            # torch may report the death of a process that reads wherever training is at that moment.
            reason = worker_death(error)
            if reason is None:
                raise
            raise ChildProcessError(reason) from error
        finally:
            if isinstance(opened, ImageData):
                opened.close()
        return Run(outcome, engine.measured.eval(), opened, world.leads)


def start_network(recipe: SequenceRecipe | ImageRecipe) -> nn.Module:
    """The network of a recipe, with random weights of PyTorch's generator."""
    arguments = dict(recipe.arguments)
    size = recipe.image_size if isinstance(recipe, ImageRecipe) else None
    if size is not None and timm.models.get_pretrained_cfg_value(recipe.network, "input_size")[1:] != (size, size):
        # Kernels of the network's own size are read off at the matching one.
        arguments["img_size"] = size
    return timm.create_model(recipe.network, pretrained=False, **arguments)


def open_data(
    recipe: SequenceRecipe | ImageRecipe,
    model: nn.Module,
    world: World,
    data_dir: Path | str | None,
    *,
    download: bool = False,
    final: bool = False,
    workers: int = 4,
    check: bool = True,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> ArrayData | ImageData | SyntheticData:
    """The data of a recipe, checked against the network; of pictures, ``check`` looks at the headers of all of them.

    Raises:
        FileNotFoundError: They are not there; the message says how to get them.
        ValueError: They do not fit the network, the recipe or the number of processes.
    """
    if isinstance(recipe, SequenceRecipe):
        place = None if data_dir is None else Path(data_dir)
        arrays = open_arrays(recipe, world, place, download, final, progress, note)
        notes = arrays.check(model)
        if note is not None and world.leads:
            for sentence in notes:
                note(sentence)
        return arrays
    if recipe.data == "synthetic":
        return SyntheticData(recipe, model, world)
    if data_dir is None:
        raise FileNotFoundError(
            "--data-dir is missing: a folder of class folders, with train/ and val/ or without, tar files, shards, "
            "hfds/NAME, or a stream: wds/ADDRESS, hfids/NAME, tfds/NAME"
        )
    if is_stream(data_dir):
        streamed = StreamData(recipe, str(data_dir), model, world, workers=workers)
        if check:
            streamed.check(progress if world.leads else None)
        return streamed
    pictures = open_pictures(data_dir)
    opened = ImageData(recipe, pictures, model, world, workers=workers)
    if check:
        check_pictures(
            pictures,
            progress=progress if world.leads else None,
            share=(world.rank, world.size),
            gather=world.gathered,
        )
    return opened
