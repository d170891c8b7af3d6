"""One optimizer step of a classifier: forward, backward, Adam, radii clipped; on a GPU as one CUDA graph.

Launching the small kernels of a sequence network one by one takes longer than running them; a captured step is launched
whole. Its transforms have the length that the points needed when it was captured, and some to spare; should a point
move out of that, the step is captured again before it is taken again. Points that are moved from outside are noticed as
well, unless through ``.data``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smpconv_zoo.layers import SMPConv1d, clip_radius_

__all__ = ["TrainingStep"]


class TrainingStep:
    """Takes Adam steps on batches of one shape.

    Args:
        model: Classifier in training mode, on ``device``.
        groups: Parameter groups of the optimizer, each with ``lr`` and a factor ``lr_scale``.
        shape: Shape of a batch, ``(N, ...)``.
        device: Where the model is.
        input_drop_rate: Dropout of the input.
        graph: Whether to capture the step in a CUDA graph; None for wherever there is a GPU.

    Raises:
        ValueError: A graph is asked for where there is no GPU.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict[str, Any]],
        shape: Sequence[int],
        device: torch.device,
        input_drop_rate: float = 0.0,
        graph: bool | None = None,
    ) -> None:
        self.model = model
        self.input_drop_rate = input_drop_rate
        on_gpu = device.type == "cuda"
        self.graphed = on_gpu if graph is None else graph
        if self.graphed and not on_gpu:
            raise ValueError(f"a CUDA graph needs a GPU, the model is on {device}: leave graph=None")
        if self.graphed:
            # A captured step reads its rates from memory, where a schedule can change them.
            for group in groups:
                group["lr"] = torch.tensor(group["lr"], device=device)
        self.optimizer = torch.optim.Adam(groups, capturable=self.graphed, fused=on_gpu)
        self.x = torch.zeros(*shape, device=device)
        self.y = torch.zeros(shape[0], dtype=torch.int64, device=device)
        self.loss = torch.zeros((), device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.captures = 0
        self.room = _Room(model, device) if self.graphed else None

    def set_lr(self, lr: float) -> None:
        """Set the learning rate; each group multiplies it by its ``lr_scale``."""
        for group in self.optimizer.param_groups:
            rate = lr * group["lr_scale"]
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Take one step; returns the loss, in a tensor that the next step overwrites."""
        self.x.copy_(x)
        self.y.copy_(y)
        if not self.graphed:
            self._run()
        else:
            assert self.room is not None
            if self.graph is None or self.room.outgrown():
                self._capture()
            assert self.graph is not None
            self.graph.replay()
        return self.loss

    def _run(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        x = F.dropout(self.x, self.input_drop_rate) if self.input_drop_rate > 0 else self.x
        loss = F.cross_entropy(self.model(x), self.y)
        loss.backward()
        self.optimizer.step()
        clip_radius_(self.model)
        self.loss.copy_(loss.detach())

    def _capture(self) -> None:
        """Warm up on a side stream, then record; weights and optimizer state are put back as they were."""
        assert self.room is not None
        self.graph = None
        weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        moments = [(value, value.clone()) for state in self.optimizer.state.values() for value in state.values()]
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with self.room.promised():
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self._run()
                    self.room.look()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                self._run()
                self.room.look()
        torch.cuda.current_stream().synchronize()
        self.graph = graph
        self.captures += 1
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
        self.settle()

    @contextlib.contextmanager
    def promised(self) -> Iterator[None]:
        """Let the layers count on a reach, with room to move, while they are recorded."""
        for layer, limit in zip(self.layers, self.limits, strict=True):
            taps = layer.kernel_size[0]
            layer.promised_reach = min(taps, layer.reach() * 9 // 8 + 16)
            oldest = -math.inf if layer.promised_reach == taps else float(layer.grid[0, taps - layer.promised_reach])
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
