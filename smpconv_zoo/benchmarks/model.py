"""Images per second of whole image networks: a training step and an inference pass, in both layouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smpconv_zoo.benchmarks.measure import graphed, median_ms

__all__ = ["ModelTime", "bench_model"]

_LAYOUTS = {"NCHW": torch.contiguous_format, "channels last": torch.channels_last}


@dataclasses.dataclass(frozen=True)
class ModelTime:
    """One network at one kind of work, with random images and weights as initialised.

    ``work`` is "training" (forward, backward, AdamW; under autocast unless in float32) or "inference", of a network of
    this package after merging; "..., graph" is one CUDA graph, "..., compiled" is by ``torch.compile``. ``peak_gib`` is
    the most memory of a GPU in use meanwhile.
    """

    network: str
    work: str
    layout: str
    dtype: str
    batch_size: int
    images_per_second: float
    peak_gib: float | None


def bench_model(
    networks: Sequence[str],
    device: torch.device,
    batch_size: int,
    dtype: torch.dtype,
    repeats: int,
    compiled: bool = False,
    on_result: Callable[[Sequence[ModelTime], int], None] | None = None,
) -> list[ModelTime]:
    """Time image networks.

    Args:
        networks: timm's names.
        device: Where.
        batch_size: Images at a time.
        dtype: float32, bfloat16 or float16.
        repeats: Of which the median counts.
        compiled: Whether to time what ``torch.compile`` makes of them as well.
        on_result: Called after each measurement with those so far and their number in all: compiling takes minutes, and
            what was measured before should not be lost with it.
    """
    # A scaled loss, as of float16, asks after every step whether it overflowed: no graph holds that.
    graphs = ["inference", *(["training"] if dtype != torch.float16 else [])] if device.type == "cuda" else []
    works = ["training", "inference", *(f"{work}, graph" for work in graphs)]
    if compiled:
        works += ["training, compiled", "inference, compiled"]
        works += ["training, compiled, graph"] if "training" in graphs else []
    cases = [(name, work, layout) for name in networks for work in works for layout in _LAYOUTS]
    results: list[ModelTime] = []
    for name, work, layout in cases:
        results.append(_measure(name, work, layout, device, batch_size, dtype, repeats))
        if on_result is not None:
            on_result(results, len(cases))
    return results


def _measure(
    name: str, work: str, layout: str, device: torch.device, batch_size: int, dtype: torch.dtype, repeats: int
) -> ModelTime:
    torch.manual_seed(0)
    torch.compiler.reset()
    memory_format = _LAYOUTS[layout]
    model = timm.create_model(name).to(device)
    shape = (batch_size, *model.pretrained_cfg["input_size"])
    x = torch.randn(shape, device=device).contiguous(memory_format=memory_format)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    if work.startswith("training"):
        run = _training(model.to(memory_format=memory_format), x, dtype, "compiled" in work, work.endswith("graph"))
        ms = median_ms(graphed(run) if work.endswith("graph") else run, device, repeats)
    else:
        model = model.eval()
        if hasattr(model, "reparameterize"):
            model.reparameterize()
        model, x = model.to(dtype).to(memory_format=memory_format), x.to(dtype)
        if work.endswith("compiled"):
            model = torch.compile(model)
        with torch.inference_mode():
            ms = median_ms(graphed(lambda: model(x)) if work.endswith("graph") else lambda: model(x), device, repeats)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    kind = str(dtype).removeprefix("torch.")
    return ModelTime(name, work, layout, kind, batch_size, 1e3 * batch_size / ms, peak)


def _training(model: nn.Module, x: Tensor, dtype: torch.dtype, compiled: bool, capturable: bool) -> Callable[[], Any]:
    model = model.train()
    labels = torch.randint(model.num_classes, (len(x),), device=x.device)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True, capturable=capturable)
    network: Any = torch.compile(model) if compiled else model
    scaler = torch.amp.GradScaler(x.device.type, enabled=dtype == torch.float16)

    def step() -> None:
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(network(x), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step
