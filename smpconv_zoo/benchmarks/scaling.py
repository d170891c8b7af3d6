"""Images per second of the training engine in one process or many, and what of a step goes into their communication."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from smpconv_zoo.training.engine import Engine
from smpconv_zoo.training.images import ImageData
from smpconv_zoo.training.recipe import ImageRecipe, load_recipe
from smpconv_zoo.training.running import open_data, start_network
from smpconv_zoo.training.world import World

__all__ = ["Speed", "SpeedCase", "measure_speed", "shares_of_communication"]

# Steps of a trace, and those that are left out after the exchange of gradients was switched off.
_TRACED = 3
_SETTLING = 2


@dataclasses.dataclass(frozen=True)
class SpeedCase:
    """A run to time: the recipe of an image network, with the values that decide its speed.

    Args:
        network: ``"smpconv_t"`` or ``"smpconv_b"``.
        pictures: ``"synthetic"``, which lie in the memory of the device, or ``"files"``, read and augmented.
        sync_batch_norm: Whether batch norms share their statistics; of one process there is nothing to share.
        batch_per_process: Pictures of a step on each process.
        dtype: ``"float32"``, or ``"bfloat16"`` under autocast.
        channels_last: Whether pictures are laid out so.
        steps: That are timed.
        warmup: Steps before those. With files, readers work ahead during them: at least as many as they hold.
        image_size: Pixels of a side.
        arguments: Of the network, unlike the recipe's.
    """

    network: str
    pictures: str
    sync_batch_norm: bool
    batch_per_process: int
    dtype: str
    channels_last: bool
    steps: int
    warmup: int
    image_size: int = 224
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def recipe(self, processes: int) -> ImageRecipe:
        """The authors' recipe, with this case's batch for each of some processes."""
        base = load_recipe(f"{self.network}.in1k")
        batch, taken = self.batch_per_process * processes, self.warmup + 2 * self.steps + _SETTLING + _TRACED
        synthetic = {"data": "synthetic", "num_samples": batch * (taken + 1)}
        recipe = load_recipe(
            base.id,
            **(synthetic if self.pictures == "synthetic" else {"data": "pictures"}),
            arguments={**base.arguments, **self.arguments},
            image_size=self.image_size,
            batch_size=batch,
            micro_batches=1,
            dtype=self.dtype,
            channels_last=self.channels_last,
            sync_batch_norm=self.sync_batch_norm,
        )
        assert isinstance(recipe, ImageRecipe)
        return recipe


@dataclasses.dataclass(frozen=True)
class Speed:
    """What was measured of a :class:`SpeedCase`; shares are of the time of a step, None where they were not measured.

    Args:
        processes: That trained together.
        images_per_second: Of all of them.
        step_ms: Mean of the timed steps.
        without_exchange_ms: Of a step under ``DistributedDataParallel.no_sync``: no gradients are exchanged and no
            buffers broadcast; statistics of shared batch norms still are.
        exchange_share: What a step is shorter by then: the exchange that nothing else hid.
        nccl_share: Of a traced step on a GPU, the time in which an NCCL kernel ran, waiting for others included.
        nccl_alone_share: The time in which nothing but NCCL ran.
        peak_gib: The most memory of a GPU in use by tensors, on the process that used most.
    """

    processes: int
    images_per_second: float
    step_ms: float
    without_exchange_ms: float | None = None
    exchange_share: float | None = None
    nccl_share: float | None = None
    nccl_alone_share: float | None = None
    peak_gib: float | None = None


def measure_speed(
    case: SpeedCase,
    world: World,
    data_dir: Path | str | None = None,
    *,
    workers: int = 4,
    on_speed: Callable[[Speed], None] | None = None,
) -> Speed:
    """Time training steps. Every process of ``world`` calls this with the same case.

    Args:
        case: What to time.
        world: This process among those that train together.
        data_dir: Class folders of pictures, for ``pictures="files"``; enough of them for the steps of one epoch.
        workers: Processes that read pictures, for each process that trains.
        on_speed: Called with what is known so far, first when the timed steps are over: what is measured after them
            should not take it along when it fails.

    Raises:
        ValueError: Too few pictures for the steps, or what :class:`Engine` and the data do not take.
    """
    recipe = case.recipe(world.size)
    torch.manual_seed(recipe.seed)
    model = start_network(recipe)
    data = open_data(recipe, model, world, data_dir, workers=workers, check=False)
    try:
        engine = Engine(recipe, model.to(world.device), data, world)
        watch = _Watch(engine, case, on_speed)
        engine.on_step = watch
        if watch.last > engine.updates_per_epoch:
            raise ValueError(
                f"{watch.last} steps of {recipe.batch_size} pictures are to be taken, an epoch has "
                f"{engine.updates_per_epoch}: write more pictures, or take fewer steps"
            )
        with contextlib.suppress(_Measured):
            engine.fit()
        speed = watch.speed
    finally:
        if isinstance(data, ImageData):
            data.close()
    assert speed is not None
    # The next case should find the memory that this one had.
    engine.on_step = None
    del engine, watch, data, model
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return speed


def shares_of_communication(kernels: Iterable[tuple[str, float, float]], span: float) -> tuple[float, float]:
    """How much of a stretch of time NCCL ran, and ran alone, of the kernels of a trace.

    Args:
        kernels: Name, start and end of each, in one unit of time; those of several streams overlap.
        span: Length of the stretch in that unit.

    Returns:
        The share in which an NCCL kernel ran, and that in which no other kernel ran meanwhile.
    """
    kernels = list(kernels)
    nccl = _covered((start, end) for name, start, end in kernels if "nccl" in name.lower())
    others = _covered((start, end) for name, start, end in kernels if "nccl" not in name.lower())
    # What both cover is counted twice in their sum, and once in what either covers.
    either = _covered((start, end) for _, start, end in kernels)
    return nccl / span, (either - others) / span


def _covered(stretches: Iterable[tuple[float, float]]) -> float:
    """Length of what stretches cover together."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(stretches):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


class _Measured(Exception):  # noqa: N818 - it is no error
    """All is measured: the rest of the epoch is not needed."""


class _Watch:
    """Called after every step of an engine: reads the clock, and switches the exchange and the trace on and off."""

    def __init__(self, engine: Engine, case: SpeedCase, on_speed: Callable[[Speed], None] | None) -> None:
        self.engine = engine
        self.case = case
        self.on_speed = on_speed
        self.speed: Speed | None = None
        self.start = 0.0
        self.trace: Any = None
        self.apart = contextlib.ExitStack()
        world = engine.world
        timed = case.warmup + case.steps
        # The steps after which something happens.
        self.calls: dict[int, list[Callable[[], None]]] = {case.warmup: [self._begin], timed: [self._end]}
        if world.size > 1:
            self.calls[timed].append(self._separate)
            self.calls[timed + _SETTLING] = [self._begin]
            timed += _SETTLING + case.steps
            self.calls[timed] = [self._end_separate]
            if world.device.type == "cuda":
                self.calls[timed].append(self._begin_trace)
                timed += _TRACED
                self.calls[timed] = [self._end_trace]
        self.last = timed
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(world.device)

    def __call__(self, done: int, total: int) -> None:
        for call in self.calls.get(done, ()):
            call()
        if done == self.last:
            raise _Measured

    def _begin(self) -> None:
        self.engine.world.wait()
        self._synchronize()
        self.start = time.perf_counter()

    def _elapsed_ms(self) -> float:
        self._synchronize()
        # The slowest process counts.
        return 1e3 * max(self.engine.world.gathered(time.perf_counter() - self.start))

    def _end(self) -> None:
        world, ms = self.engine.world, self._elapsed_ms() / self.case.steps
        peak = None
        if world.device.type == "cuda":
            peak = max(world.gathered(torch.cuda.max_memory_allocated(world.device))) / 2**30
        self._tell(Speed(world.size, 1e3 * self.engine.recipe.batch_size / ms, ms, peak_gib=peak))

    def _separate(self) -> None:
        assert self.engine.step.processes is not None
        self.apart.enter_context(self.engine.step.processes.no_sync())

    def _end_separate(self) -> None:
        assert self.speed is not None
        ms = self._elapsed_ms() / self.case.steps
        self.apart.close()
        share = 1 - ms / self.speed.step_ms
        self._tell(dataclasses.replace(self.speed, without_exchange_ms=ms, exchange_share=share))

    def _begin_trace(self) -> None:
        # From here on weights differ between processes, which takes as long to compute.
        self._begin()
        self.trace = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self.trace.start()
        self.start = time.perf_counter()

    def _end_trace(self) -> None:
        self._synchronize()
        span = time.perf_counter() - self.start
        self.trace.stop()
        kernels = [
            (event.name, event.time_range.start, event.time_range.end)
            for event in self.trace.events()
            # Names of stretches of the program, such as DDP's forward, are drawn beside the kernels.
            if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
        ]
        assert self.speed is not None
        # A trace counts in microseconds.
        nccl, alone = shares_of_communication(kernels, 1e6 * span) if kernels else (None, None)
        self._tell(dataclasses.replace(self.speed, nccl_share=nccl, nccl_alone_share=alone))

    def _tell(self, speed: Speed) -> None:
        self.speed = speed
        if self.on_speed is not None:
            self.on_speed(speed)

    def _synchronize(self) -> None:
        if self.engine.world.device.type == "cuda":
            torch.cuda.synchronize(self.engine.world.device)
