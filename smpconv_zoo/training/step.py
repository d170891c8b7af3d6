"""One optimizer step of a classifier: forward, backward, Adam, radii clipped; on a GPU as one CUDA graph.

Launching the small kernels of a sequence network one by one takes longer than running them; a captured step is launched
whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smpconv_zoo.layers import clip_radius_

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
        if self.graphed:
            # A captured step reads its rates from memory, where a schedule can change them.
            for group in groups:
                group["lr"] = torch.tensor(group["lr"], device=device)
        self.optimizer = torch.optim.Adam(groups, capturable=self.graphed, fused=on_gpu)
        self.x = torch.zeros(*shape, device=device)
        self.y = torch.zeros(shape[0], dtype=torch.int64, device=device)
        self.loss = torch.zeros((), device=device)
        self.graph: torch.cuda.CUDAGraph | None = None

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
            if self.graph is None:
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
        weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._run()
        self.model.load_state_dict(weights)
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()
