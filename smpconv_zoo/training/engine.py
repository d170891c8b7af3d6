"""The training loop: any network, any data of :class:`TrainingData`, one process or many, and nothing lost on a crash.

What a run learns is decided by its recipe and its data. A run that was killed and goes on from its last checkpoint
takes the same steps, bit for bit on one process, as one that was not.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from itertools import islice
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from smpconv_zoo.checkpoints import write_safetensors
from smpconv_zoo.training.batches import TrainingData
from smpconv_zoo.training.checkpointing import random_state, restore_random_state
from smpconv_zoo.training.groups import image_parameter_groups, sequence_parameter_groups
from smpconv_zoo.training.recipe import Recipe, SequenceRecipe
from smpconv_zoo.training.run_folder import RunFolder
from smpconv_zoo.training.schedules import cosine_schedule, sequence_schedule, warmup_cosine
from smpconv_zoo.training.step import CAPTURABLE, TrainingStep
from smpconv_zoo.training.sync_norm import convert_sync_batch_norm
from smpconv_zoo.training.world import World

__all__ = ["Engine", "EpochLog", "Outcome", "Stopped", "learning_rates"]

# Optimizer steps after which several processes ask one another whether somebody was told to stop.
_ASK_EVERY = 10


class Stopped(Exception):  # noqa: N818 - it is no error
    """The run was asked to stop, by a signal, and did so with a checkpoint.

    Args:
        signal_number: The signal.
        update: Optimizer steps taken.
    """

    def __init__(self, signal_number: int, update: int) -> None:
        name = signal.Signals(signal_number).name
        super().__init__(f"stopped by {name} after {update} steps, with a checkpoint: go on by --resume")
        self.signal_number = signal_number
        self.update = update


@dataclasses.dataclass(frozen=True)
class EpochLog:
    """What is logged of an epoch: losses are means over samples, accuracies percent, time seconds of training alone."""

    epoch: int
    update: int
    train_loss: float
    validation_loss: float | None
    top1: float | None
    top5: float | None
    lr: float
    seconds: float
    samples_per_second: float


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Args:
        last: The last epoch.
        best: The epoch of highest accuracy on what is chosen by; of equal ones that of lower loss. None if there is
            nothing to choose by.
        stopped_early: Whether nothing had improved for as long as the recipe waits.
    """

    last: EpochLog
    best: EpochLog | None
    stopped_early: bool


class Engine:
    """Trains.

    Args:
        recipe: The run.
        model: A classifier on the device of ``world``.
        data: What it learns from.
        world: This process among those that train together.
        folder: Where to write; None for nowhere.
        save_every: Optimizer steps between checkpoints, besides those at the ends of epochs.
        log_every: Optimizer steps between lines of the log.
        on_step: Called after every optimizer step with those done and in all.
        on_epoch: Called with the log of every epoch.

    Raises:
        ValueError: Data without a single optimizer step, or a recipe that these processes cannot run.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        data: TrainingData,
        world: World,
        folder: RunFolder | None = None,
        *,
        save_every: int | None = None,
        log_every: int = 50,
        on_step: Callable[[int, int], None] | None = None,
        on_epoch: Callable[[EpochLog], None] | None = None,
    ) -> None:
        self.recipe = recipe
        self.data = data
        self.world = world
        self.folder = folder
        self.save_every = save_every
        self.log_every = log_every
        self.on_step = on_step
        self.on_epoch = on_epoch
        self.updates_per_epoch = data.batches // recipe.micro_batches
        if self.updates_per_epoch < 1:
            raise ValueError(
                f"the data fill no step of {recipe.batch_size} samples: lower batch_size to at most their number"
            )
        self.total_updates = recipe.epochs * self.updates_per_epoch
        self.model = _prepared(model, recipe, world)
        self.reference = recipe.protocol == "reference"
        self.average = _average(self.model, recipe)
        self.update = 0
        self.epoch = 0
        self.waited = 0
        self.best: EpochLog | None = None
        self.last: EpochLog | None = None
        self._loss = torch.zeros((), device=world.device, dtype=torch.float64)
        self._seconds = 0.0
        self._data_state: dict[str, Any] = {}
        self._signals: list[int] = []
        network, processes = _network(self.model, recipe, world)
        self.step = TrainingStep(
            self.model,
            _groups(self.model, recipe),
            world.device,
            optimizer=recipe.optimizer,
            network=network,
            processes=processes,
            loss=_loss(recipe),
            dtype=getattr(torch, recipe.dtype),
            input_drop_rate=getattr(recipe, "input_drop_rate", 0.0),
            clip_grad=recipe.clip_grad,
            average=None if self.average is None else self._update_average,
            reference=self.reference,
            graph=_graphed(recipe, world),
        )
        self.rates = [
            learning_rates(recipe, self.updates_per_epoch, group["lr_scale"])
            for group in self.step.optimizer.param_groups
        ]

    def plan(self) -> dict[str, Any]:
        """What a user should see before the first step."""
        parameters = list(self.model.parameters())
        return {
            "parameters": sum(p.numel() for p in parameters),
            "trained": sum(p.numel() for p in parameters if p.requires_grad),
            "processes": self.world.size,
            "steps": self.total_updates,
            "steps_per_epoch": self.updates_per_epoch,
            **self.data.describe(),
        }

    @property
    def measured(self) -> nn.Module:
        """The network that is measured and kept: the average of the weights if there is one."""
        return self.model if self.average is None else self.average.module

    def resume(self) -> tuple[str, ...] | None:
        """Go on from the newest checkpoint of the folder.

        Returns:
            Checkpoints that were passed over because they are broken, each with the reason; None if there is nothing
            to go on from.

        Raises:
            ValueError: All checkpoints are broken.
        """
        found = self.folder.newest() if self.folder is not None and self.world.leads else None
        found = self.world.shared(found)
        if found is None:
            return None
        state = found.state
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        self.step.load_state_dict(state["step"])
        self.update, self.epoch, self.waited = state["update"], state["epoch"], state["waited"]
        self._loss.fill_(state["loss"])
        self._seconds = state["seconds"]
        self.best, self.last = (None if state[k] is None else EpochLog(**state[k]) for k in ("best", "last"))
        self._data_state = state["data"]
        self.data.load_state_dict(self._data_state)
        states = state["random"]
        if len(states) == self.world.size:
            restore_random_state(states[self.world.rank], self.world.device)
        else:
            # As many other streams as there are processes now: none of them could go on with one of the old.
            torch.manual_seed(hash((self.recipe.seed, self.update, self.world.rank)) % 2**63)
        return found.passed_over

    def fit(self) -> Outcome:
        """Train to the end.

        Raises:
            FloatingPointError: Loss or weights are not finite any more; the last checkpoint is from before that.
            Stopped: A signal asked for it; a checkpoint was written.
            OSError: A file could not be written; the last checkpoint is intact.
        """
        if self.folder is not None and self.world.leads:
            self.folder.rewind(self.update)
        stopped_early = self._waited_enough()
        with self._listening(), _deterministic(self.world.device):
            try:
                while self.epoch < self.recipe.epochs and not stopped_early:
                    self._train_epoch()
                    stopped_early = self._waited_enough()
            finally:
                if self.folder is not None:
                    self.folder.close()
        assert self.last is not None
        if self.folder is not None and self.world.leads:
            self._write_weights("last")
        return Outcome(self.last, self.best, stopped_early)

    def _train_epoch(self) -> None:
        recipe, done = self.recipe, self.update - self.epoch * self.updates_per_epoch
        if done == 0:
            self._data_state = copy.deepcopy(self.data.state_dict())
        batches = self.data.epoch(self.epoch, done * recipe.micro_batches)
        self.model.train()
        start, before, looked = time.perf_counter(), self._seconds, self.update
        for _ in range(done, self.updates_per_epoch):
            self.step.set_rates(float(rate[self.update]) for rate in self.rates)
            taken = islice(batches, recipe.micro_batches)
            # In double precision, where the order of a run's parts makes no difference that could be seen.
            self._loss += self.step.take(taken, recipe.micro_batches)
            self.update += 1
            if self.on_step is not None:
                self.on_step(self.update, self.total_updates)
            self._seconds = before + time.perf_counter() - start
            last = self.update % self.updates_per_epoch == 0
            if not last and self.update % self.log_every == 0:
                self._look(looked)
                looked = self.update
                self._log_step()
            if not last and self.save_every is not None and self.update % self.save_every == 0:
                self._save(looked)
            asks = self.world.size == 1 or self.update % _ASK_EVERY == 0
            if not last and asks and self.world.agreed(bool(self._signals)):
                self._save(looked)
                raise Stopped(self._signals[0] if self._signals else signal.SIGTERM, self.update)
        self._look(looked, weights=True)
        self._seconds = before + time.perf_counter() - start
        self._end_epoch()

    def _end_epoch(self) -> None:
        recipe = self.recipe
        figures = self._measure()
        mean = self._mean_loss(self.updates_per_epoch)
        self.last = EpochLog(
            epoch=self.epoch + 1,
            update=self.update,
            train_loss=mean,
            validation_loss=figures.get("loss"),
            top1=figures.get("top1"),
            top5=figures.get("top5"),
            lr=float(self.rates[0][self.update - 1] / self.step.optimizer.param_groups[0]["lr_scale"]),
            seconds=round(self._seconds, 3),
            samples_per_second=round(self.updates_per_epoch * recipe.batch_size / max(self._seconds, 1e-9), 2),
        )
        improved = _better(self.last, self.best)
        if improved:
            self.best = self.last
            self.waited = 0
        elif not (self.reference and self.best is not None and self.last.top1 == self.best.top1):
            # The authors count the epochs of lower accuracy alone.
            self.waited += 1
        self.epoch += 1
        self._loss.zero_()
        self._seconds = 0.0
        self._data_state = copy.deepcopy(self.data.state_dict())
        if self.folder is not None and self.world.leads:
            self.folder.log({"kind": "epoch", **dataclasses.asdict(self.last)})
            if improved:
                self._write_weights("best")
        self._save(self.update)
        if self.on_epoch is not None:
            self.on_epoch(self.last)
        if self.epoch < recipe.epochs and self.world.agreed(bool(self._signals)):
            raise Stopped(self._signals[0] if self._signals else signal.SIGTERM, self.update)

    def _measure(self) -> dict[str, float]:
        """Mean loss and percent right over the part to choose by; empty if there is none."""
        network = self.measured.eval()
        dtype = getattr(torch, self.recipe.dtype)
        sums = torch.zeros(4, dtype=torch.float64, device=self.world.device)
        with torch.inference_mode(), torch.autocast(self.world.device.type, dtype, enabled=dtype != torch.float32):
            for x, y in self.data.validation():
                logits = network(_laid_out(x, self.recipe)).float()
                nearest = logits.topk(min(5, logits.shape[1])).indices == y[:, None]
                loss = F.cross_entropy(logits, y, reduction="sum")
                sums += torch.stack([nearest[:, 0].sum(), nearest.sum(), loss, sums.new_tensor(len(y))]).to(sums)
        right, among, loss, count = self.world.total(sums).tolist()
        if count == 0:
            return {}
        return {"loss": loss / count, "top1": 100 * right / count, "top5": 100 * among / count}

    def _mean_loss(self, updates: int) -> float:
        """Of the epoch under way, over its updates and the processes."""
        return float(self.world.total(self._loss.clone()) / (updates * self.world.size))

    def _look(self, looked: int, weights: bool = False) -> None:
        finite = math.isfinite(float(self._loss))
        if weights and finite:
            # A step can spoil the weights after a loss that was finite.
            norms = torch._foreach_norm(list(self.model.parameters()))
            finite = bool(torch.stack([norm.double() for norm in norms]).isfinite().all())
        # Every process asks: what is not finite on one is so on all, through the gradients, a step later.
        if self.world.agreed(not finite):
            newest = self.folder.newest() if self.folder is not None and self.world.leads else None
            kept = "" if newest is None else f"; the checkpoint {newest.path.name} is from before that"
            raise FloatingPointError(
                f"the loss or the weights are not finite any more between steps {looked} and {self.update}{kept}: "
                f"lower the rate lr={self.recipe.lr}, or set clip_grad"
            )

    def _log_step(self) -> None:
        done = self.update - self.epoch * self.updates_per_epoch
        loss = self._mean_loss(done)
        if self.folder is None or not self.world.leads:
            return
        entry = {
            "kind": "step",
            "update": self.update,
            "epoch": self.epoch + 1,
            "train_loss": loss,
            "lr": float(self.rates[0][self.update - 1]),
            "samples_per_second": round(done * self.recipe.batch_size / max(self._seconds, 1e-9), 2),
        }
        if self.world.device.type == "cuda":
            entry["peak_gib"] = round(torch.cuda.max_memory_allocated(self.world.device) / 2**30, 3)
        self.folder.log(entry)

    def _save(self, looked: int) -> None:
        """Write a checkpoint, unless loss or weights are not finite."""
        if self.folder is None:
            return
        self._look(looked, weights=True)
        states = self.world.gathered(random_state(self.world.device))
        loss = float(self.world.total(self._loss.clone())) / self.world.size
        if self.world.leads:
            state = {
                "recipe": dataclasses.asdict(self.recipe),
                "update": self.update,
                "epoch": self.epoch,
                "waited": self.waited,
                "model": self.model.state_dict(),
                "average": None if self.average is None else self.average.module.state_dict(),
                "step": self.step.state_dict(),
                "loss": loss,
                "seconds": self._seconds,
                "best": None if self.best is None else dataclasses.asdict(self.best),
                "last": None if self.last is None else dataclasses.asdict(self.last),
                "data": self._data_state,
                "random": states,
            }
            self.folder.save(self.update, state)
        self.world.wait()

    def _write_weights(self, name: str) -> None:
        assert self.folder is not None and self.last is not None
        metadata = {"id": self.recipe.id, "epoch": str(self.last.epoch)}
        write_safetensors(self.folder.path / f"{name}.safetensors", dict(self.measured.state_dict()), metadata)

    def _waited_enough(self) -> bool:
        patience = self.recipe.early_stop
        return patience is not None and self.best is not None and self.waited >= patience

    def _update_average(self) -> None:
        if isinstance(self.average, ModelEmaV3):
            self.average.update(self.model, step=self.update + 1)
        elif self.average is not None:
            self.average.update(self.model)

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """Take note of SIGTERM and SIGINT and go on to the next look; a second one ends the process as ever."""

        def note(number: int, frame: FrameType | None) -> None:
            if self._signals:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self._signals.append(number)

        try:
            before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:
            # Only the main thread may listen.
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def learning_rates(recipe: Recipe, updates_per_epoch: int, scale: float = 1.0) -> np.ndarray:
    """Rate of every optimizer step for a group of factor ``scale``, ``(epochs * updates_per_epoch,)`` float64."""
    total, warmup = recipe.epochs * updates_per_epoch, recipe.warmup_epochs * updates_per_epoch
    if recipe.protocol == "sound":
        return scale * warmup_cosine(recipe.lr, total, warmup, recipe.final_lr)
    if isinstance(recipe, SequenceRecipe):
        return sequence_schedule(recipe.lr * scale, total, warmup, recipe.final_lr)
    return scale * cosine_schedule(recipe.lr, recipe.final_lr, recipe.epochs, updates_per_epoch, recipe.warmup_epochs)


def _loss(recipe: Recipe) -> Callable[[Tensor, Tensor], Tensor]:
    smoothing = getattr(recipe, "smoothing", 0.0)

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        # Mixed labels (N, classes) come smoothed already.
        return F.cross_entropy(logits.float(), target, label_smoothing=smoothing if target.dim() == 1 else 0.0)

    return loss


def _better(epoch: EpochLog, best: EpochLog | None) -> bool:
    if epoch.top1 is None or epoch.validation_loss is None:
        return False
    if best is None or best.top1 is None or best.validation_loss is None:
        return True
    return (epoch.top1, -epoch.validation_loss) > (best.top1, -best.validation_loss)


def _prepared(model: nn.Module, recipe: Recipe, world: World) -> nn.Module:
    if recipe.grad_checkpointing:
        if not hasattr(model, "set_grad_checkpointing"):
            raise ValueError(f"{recipe.network} cannot checkpoint gradients: set grad_checkpointing=false")
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if recipe.sync_batch_norm and world.size > 1:
        model = convert_sync_batch_norm(model, world.device)
    # Every process began with the same weights; from here on each draws for itself.
    if world.rank > 0:
        torch.manual_seed(recipe.seed + world.rank)
    return model.train()


def _network(
    model: nn.Module, recipe: Recipe, world: World
) -> tuple[Callable[[Tensor], Tensor], DistributedDataParallel | None]:
    processes = None
    if world.size > 1:
        processes = DistributedDataParallel(model, device_ids=[world.device] if world.device.type == "cuda" else None)
    network: Any = model if processes is None else processes
    if recipe.compile:
        network = torch.compile(network)
    return (lambda x: network(_laid_out(x, recipe))), processes


def _laid_out(x: Tensor, recipe: Recipe) -> Tensor:
    return x.to(memory_format=torch.channels_last) if recipe.channels_last and x.dim() == 4 else x


def _average(model: nn.Module, recipe: Recipe) -> ModelEmaV2 | ModelEmaV3 | None:
    if recipe.ema_decay is None:
        return None
    if recipe.protocol == "reference":
        # The same sums as of the first version, which the authors use: every entry, buffers included.
        return ModelEmaV2(model, decay=recipe.ema_decay)
    # The average begins short: of 0.9999 and a thousand steps, nine tenths would be the weights of initialisation.
    return ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True)


def _groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    if isinstance(recipe, SequenceRecipe):
        return sequence_parameter_groups(model, recipe.lr, recipe.weight_decay, recipe.layer_decay)
    groups = image_parameter_groups(model, recipe.weight_decay, recipe.layer_decay)
    return [{**group, "lr": recipe.lr * group["lr_scale"]} for group in groups]


def _graphed(recipe: Recipe, world: World) -> bool:
    """Whether a step is one CUDA graph: asked for, or of data in memory, where launching takes longest."""
    can = (
        world.device.type == "cuda"
        and world.size == 1
        and recipe.micro_batches == 1
        and recipe.optimizer in CAPTURABLE
        and recipe.dtype != "float16"
        and not (recipe.protocol == "reference" and recipe.ema_decay is not None)
        and not recipe.compile
    )
    if recipe.graph and not can:
        raise ValueError(
            "a step is one CUDA graph on one GPU, whole, by adam or adamw, in float32 or bfloat16, not compiled, and "
            "without the authors' average: set graph=false"
        )
    return can and (recipe.graph or (recipe.graph is None and isinstance(recipe, SequenceRecipe)))


@contextlib.contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """cuDNN may choose kernels whose sums depend on scheduling; a seed should decide a run."""
    if device.type != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield
