"""One optimizer step of a classifier: forward, backward, the optimizer, radii clipped; on a GPU as one CUDA graph.

Launching the small kernels of a sequence network one by one takes longer than running them; a captured step is launched
whole. Its transforms have the length that the points needed when it was captured, and some to spare; should a point
move out of that, the step is captured again before it is taken again. Points that are moved from outside are noticed as
well, unless through ``.data``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import timm.optim
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from smpconv_zoo.layers import SMPConv1d, clip_radius_

__all__ = ["CAPTURABLE", "TrainingStep"]

# Optimizers whose steps a CUDA graph can hold, and that PyTorch has as one kernel.
CAPTURABLE = ("adam", "adamw")


class TrainingStep:
    """Takes optimizer steps.

    Args:
        model: Classifier in training mode, on ``device``.
        groups: Parameter groups of the optimizer, each with ``lr`` and a factor ``lr_scale``.
        device: Where the model is.
        optimizer: A name of :func:`timm.optim.create_optimizer_v2`.
        network: What runs in place of ``model`` and shares its parameters: compiled, or spread over processes.
        processes: The part of ``network`` that adds up gradients over processes, if there are several.
        loss: Mean loss of logits and targets.
        dtype: Of the computation, under autocast unless float32; float16 scales its losses.
        input_drop_rate: Dropout of the input.
        clip_grad: Largest norm of the gradient.
        average: Called once a step, to average weights.
        reference: The authors' order: ``average`` sees the weights before the clip, and radii are clipped after every
            part of a batch. Otherwise the clip comes first.
        graph: Whether to capture the step in a CUDA graph; None for wherever there is a GPU.

    Raises:
        ValueError: A graph is asked for where there is no GPU, or of what it cannot hold.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict[str, Any]],
        device: torch.device,
        *,
        optimizer: str = "adam",
        network: Callable[[Tensor], Tensor] | None = None,
        processes: DistributedDataParallel | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        dtype: torch.dtype = torch.float32,
        input_drop_rate: float = 0.0,
        clip_grad: float | None = None,
        average: Callable[[], None] | None = None,
        reference: bool = False,
        graph: bool | None = None,
    ) -> None:
        self.model = model
        self.network = model if network is None else network
        self.processes = processes
        self.device = device
        self.loss_of = loss
        self.dtype = dtype
        self.input_drop_rate = input_drop_rate
        self.clip_grad = clip_grad
        self.average = average
        self.reference = reference
        on_gpu = device.type == "cuda"
        self.graphed = on_gpu if graph is None else graph
        if self.graphed and not on_gpu:
            raise ValueError(f"a CUDA graph needs a GPU, the model is on {device}: leave graph=None")
        if self.graphed and (optimizer not in CAPTURABLE or dtype == torch.float16 or (reference and average)):
            raise ValueError(
                "a CUDA graph holds steps of adam and adamw, in float32 and bfloat16, without the authors' average: "
                "set graph=false"
            )
        if self.graphed:
            # A captured step reads its rates from memory, where a schedule can change them.
            for group in groups:
                group["lr"] = torch.tensor(group["lr"], device=device)
        options = {"capturable": self.graphed, "fused": on_gpu} if optimizer in CAPTURABLE else {}
        self.optimizer = timm.optim.create_optimizer_v2(groups, optimizer, **options)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.loss = torch.zeros((), device=device)
        self.batch: tuple[Tensor, Tensor] | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.captures = 0
        self.room = _Room(model, device) if self.graphed else None

    def set_lr(self, lr: float) -> None:
        """Set the learning rate; each group multiplies it by its ``lr_scale``."""
        self.set_rates([lr * group["lr_scale"] for group in self.optimizer.param_groups])

    def set_rates(self, rates: Iterable[float]) -> None:
        """Set the learning rate of each group."""
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Take one step; returns the loss, in a tensor that the next step overwrites."""
        return self.take([(x, y)], 1)

    def take(self, parts: Iterable[tuple[Tensor, Tensor]], count: int) -> Tensor:
        """Take one step on a batch that comes in ``count`` parts of one size, one of them at a time in memory.

        Returns:
            The mean loss over parts, in a tensor that the next step overwrites.
        """
        if not self.graphed:
            self._run(parts, count)
        else:
            (batch,) = parts
            self._replay(*batch)
        if self.graphed and self.average is not None:
            self.average()
        return self.loss

    def state_dict(self) -> dict[str, Any]:
        """What the steps to come depend on besides the weights: the optimizer, loss scale, reach of a captured step."""
        reach = None if self.room is None else self.room.reach
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(), "reach": reach}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the step that gave :meth:`state_dict` would have."""
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            if self.graphed:
                # Rates come as they were stored, on the CPU, where no captured step would see them change.
                group["lr"] = torch.tensor(float(group["lr"]), device=self.device)
        # What was captured writes to the tensors that were replaced.
        self.graph = None
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        if self.room is not None:
            self.room.reach = state["reach"]

    def _run(self, parts: Iterable[tuple[Tensor, Tensor]], count: int) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        total = None
        for number, (x, y) in enumerate(parts, start=1):
            # Processes add up their gradients once a step, with those of the last part.
            apart = number < count and self.processes is not None
            with self.processes.no_sync() if apart else contextlib.nullcontext():  # type: ignore[union-attr]
                loss = self._loss(x, y) if count == 1 else self._loss(x, y) / count
                self.scaler.scale(loss).backward()
            total = loss.detach() if total is None else total + loss.detach()
            if self.reference and number < count:
                clip_radius_(self.model)
        assert total is not None
        self._update()
        self.loss.copy_(total)

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        if self.input_drop_rate > 0:
            x = F.dropout(x, self.input_drop_rate)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.loss_of(self.network(x), y)

    def _update(self) -> None:
        if self.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        average = None if self.graphed else self.average
        if self.reference and average is not None:
            average()
        clip_radius_(self.model)
        if not self.reference and average is not None:
            average()

    def _replay(self, x: Tensor, y: Tensor) -> None:
        assert self.room is not None
        if self.batch is None:
            self.batch = (torch.empty_like(x), torch.empty_like(y))
        if x.shape != self.batch[0].shape:
            # The last batch of an epoch may be smaller.
            self._run([(x, y)], 1)
            return
        for kept, given in zip(self.batch, (x, y), strict=True):
            kept.copy_(given)
        if self.graph is None or self.room.outgrown():
            self._capture()
        assert self.graph is not None
        self.graph.replay()

    def _capture(self) -> None:
        """Warm up on a side stream, then record; weights, optimizer state and draws are put back as they were."""
        assert self.room is not None and self.batch is not None
        if self.graph is not None:
            self.room.reach = None
        self.graph = None
        weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        moments = [(value, value.clone()) for state in self.optimizer.state.values() for value in state.values()]
        draws = torch.cuda.get_rng_state(self.device)
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with self.room.promised():
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self._run([self.batch], 1)
                    self.room.look()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                self._run([self.batch], 1)
                self.room.look()
        torch.cuda.current_stream().synchronize()
        self.graph = graph
        self.captures += 1
        torch.cuda.set_rng_state(draws, self.device)
        self.model.load_state_dict(weights)
        if moments:
            for value, before in moments:
                value.copy_(before)
        else:
            for state in self.optimizer.state.values():
                for value in state.values():
                    value.zero_()
        self.room.settle()


class _Room:
    """How far back the kernels of a captured step reach, and whether the points have stayed within that."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, SMPConv1d)]
        self.limits = [torch.full_like(layer.radius, -math.inf) for layer in self.layers]
        self.flag = torch.zeros((), dtype=torch.bool, device=device)
        self.seen = torch.zeros((), dtype=torch.bool, pin_memory=True)
        # Taps that each layer was captured with. A run that goes on needs the same ones: other lengths of transforms
        # round otherwise.
        self.reach: list[int] | None = None
        self.settle()

    @contextlib.contextmanager
    def promised(self) -> Iterator[None]:
        """Let the layers count on a reach, with room to move, while they are recorded."""
        if self.reach is None or any(layer.reach() > r for layer, r in zip(self.layers, self.reach, strict=True)):
            self.reach = [min(layer.kernel_size[0], layer.reach() * 9 // 8 + 16) for layer in self.layers]
        for layer, limit, reach in zip(self.layers, self.limits, self.reach, strict=True):
            taps = layer.kernel_size[0]
            layer.promised_reach = reach
            oldest = -math.inf if reach == taps else float(layer.grid[0, taps - reach])
            limit.fill_(oldest)
        try:
            yield
        finally:
            for layer in self.layers:
                layer.promised_reach = None

    def look(self) -> None:
        """Record the question that :meth:`outgrown` answers."""
        if self.layers:
            oldest = torch.cat([layer.coords.detach().flatten() for layer in self.layers])
            oldest = oldest - torch.cat([layer.radius.detach().flatten() for layer in self.layers])
            torch.any(oldest < torch.cat([limit.flatten() for limit in self.limits]), out=self.flag)
        self.seen.copy_(self.flag, non_blocking=True)

    def settle(self) -> None:
        """Take the points for such as have room, as they are now."""
        self.seen.fill_(False)
        self.versions = self._versions()

    def _versions(self) -> list[int]:
        """How often somebody wrote to the points; what a captured step writes does not count."""
        return [tensor._version for layer in self.layers for tensor in (layer.coords, layer.radius)]

    def outgrown(self) -> bool:
        """Whether the last step moved a point out of the room, or somebody did since; waits for that step."""
        if self._versions() != self.versions:
            self.versions = self._versions()
            self.look()
        torch.cuda.current_stream().synchronize()
        return bool(self.seen)
