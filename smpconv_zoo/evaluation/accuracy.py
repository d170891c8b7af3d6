"""Top-1 and top-5 over a test part, by one process or several, every sample once; and the records of it as files.

Unlike :mod:`smpconv_zoo.evaluation.classification`, which measures checkpoints of the zoo as their cards say, this
takes any classifier: in half precision, channels last, on more than one GPU.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from smpconv_zoo.evaluation.tables import markdown_table
from smpconv_zoo.evaluation.test_sets import batches
from smpconv_zoo.files import write_whole

__all__ = [
    "DTYPES",
    "Measurement",
    "Processes",
    "as_csv",
    "as_json",
    "check_records_path",
    "measure",
    "spread",
    "write_records",
]

Progress = Callable[[int, int], None]

DTYPES = ("float32", "bfloat16", "float16")
# How PyTorch's allocators say so: of GPUs, of the CPU.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class Processes(Protocol):
    """The processes that measure together, such as a :class:`smpconv_zoo.training.world.World`."""

    @property
    def device(self) -> torch.device:
        """Of this process."""

    @property
    def rank(self) -> int:
        """Its number, from 0."""

    @property
    def size(self) -> int:
        """Number of processes."""

    def total(self, values: Tensor) -> Tensor:
        """Sums over processes of the entries of a tensor."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What a network said of every sample of a test part, in the order of that part.

    Args:
        labels: ``(N,)`` int64.
        predictions: ``(N, k)`` int64, most probable class first; k is 5, or the number of classes if there are fewer.
        seconds: From the first sample asked for to the last answer, reading included, of the slowest process.
        network_seconds: Of that, in the network.
        batch_size: Samples at a time of a process, after what memory forced upon it.
    """

    labels: Tensor
    predictions: Tensor
    seconds: float
    network_seconds: float
    batch_size: int

    def correct(self, k: int = 1) -> int:
        """Samples whose label is among the k most probable classes."""
        return int((self.predictions[:, :k] == self.labels[:, None]).sum())

    def percent(self, k: int = 1) -> float:
        """:meth:`correct` in percent."""
        return 100 * self.correct(k) / len(self.labels)

    @property
    def per_second(self) -> float:
        """Samples a second, of all processes together, reading included."""
        return len(self.labels) / max(self.seconds, 1e-9)


def measure(
    model: nn.Module,
    samples: Dataset[Any],
    processes: Processes,
    *,
    batch_size: int = 100,
    workers: int = 0,
    dtype: str = "float32",
    channels_last: bool = False,
    retry: bool = False,
    columns: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Measurement:
    """Classify every sample once, whatever the number of processes.

    Process r of S takes the samples r, r + S, r + 2 S, ...: one more or less than another, and none twice to fill up.

    Args:
        model: On the device of the process; it is put into eval mode.
        samples: ``samples[i]`` is (x, y).
        processes: This process among those that measure together.
        batch_size: Samples at a time of a process.
        workers: Processes that read ahead, of each process.
        dtype: One of :data:`DTYPES`; all but float32 under autocast.
        channels_last: Whether pictures are laid out with channels last.
        retry: Whether to go on with half the samples at a time when memory runs out, and half of that.
        columns: The logits to choose among, for data of fewer classes than the network has; predictions and labels
            count these.
        progress: Called with the samples that this process has done, and all of its own.

    Returns:
        The same on every process.

    Raises:
        ValueError: A size out of range, a sample that cannot be read, labels that the network has not, or memory that
            does not suffice.
        RuntimeError: A sample was counted twice or not at all, which would be a fault of this function.
    """
    total = len(samples)  # type: ignore[arg-type]
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if total < processes.size:
        raise ValueError(f"{processes.size} processes for {total} samples: take fewer")
    device = processes.device
    model.eval()
    if channels_last:
        model.to(memory_format=torch.channels_last)
    chosen = None if columns is None else torch.tensor(columns, device=device)
    mine = range(processes.rank, total, processes.size)
    size, done, network_seconds = batch_size, 0, 0.0
    labels, predictions = [], []
    begin = time.perf_counter()
    for x, y in batches(Subset(samples, mine), batch_size, workers, pin_memory=device.type == "cuda"):
        start = time.perf_counter()
        x = x.to(device, non_blocking=True)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        found, size = _top5(model, x, size, dtype, chosen, retry)
        network_seconds += time.perf_counter() - start
        predictions.append(found)
        labels.append(y)
        done += len(y)
        if progress is not None:
            progress(done, len(mine))
    seconds = time.perf_counter() - begin
    return _gathered(processes, total, torch.cat(labels), torch.cat(predictions), (seconds, network_seconds, size))


def spread(total: int, limit: int) -> list[int]:
    """``limit`` of ``total`` numbers, evenly apart: test parts are sorted by class more often than not."""
    return torch.linspace(0, total - 1, min(limit, total), dtype=torch.float64).round().long().tolist()


def as_json(records: Sequence[Any]) -> str:
    """Records, dataclasses all, as a JSON list."""
    return json.dumps([dataclasses.asdict(record) for record in records], indent=2) + "\n"


def as_csv(records: Sequence[Any]) -> str:
    """Records of one kind as a table, a row each; lists are joined by semicolons."""
    if not records:
        return ""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in dataclasses.fields(records[0])])
    for record in records:
        writer.writerow([_cell(value) for value in dataclasses.asdict(record).values()])
    return text.getvalue()


def write_records(path: Path, records: Sequence[Any]) -> None:
    """Write records as ``.csv``, ``.json`` or ``.md``, whole or not at all.

    Raises:
        ValueError: Another suffix.
        OSError: The file cannot be written.
    """
    check_records_path(path)
    forms: dict[str, Callable[[Sequence[Any]], str]] = {".csv": as_csv, ".json": as_json, ".md": _as_markdown}
    write_whole(path, forms[path.suffix](records).encode())


def check_records_path(path: Path) -> None:
    """Whether :func:`write_records` can write there, before anything is computed.

    Raises:
        ValueError: Another suffix than .csv, .json and .md.
        FileNotFoundError: No such folder.
    """
    if path.suffix not in (".csv", ".json", ".md"):
        raise ValueError(f"the output has to end in .csv, .json or .md, got {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no folder: make it first")


def _as_markdown(records: Sequence[Any]) -> str:
    names = [field.name for field in dataclasses.fields(records[0])] if records else []
    rows = [[_cell(value).replace("|", "\\|") for value in dataclasses.asdict(record).values()] for record in records]
    return markdown_table(names, rows)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return "; ".join(map(str, value))
    if isinstance(value, dict):
        return "; ".join(f"{key} {entry}" for key, entry in value.items())
    return str(value)


def _top5(
    model: nn.Module, x: Tensor, size: int, dtype: str, columns: Tensor | None, retry: bool
) -> tuple[Tensor, int]:
    """Most probable classes of a batch, on the CPU, ``size`` samples at a time; and the size that went through."""
    while True:
        reason = None
        try:
            return torch.cat([_predict(model, part, dtype, columns) for part in x.split(size)]), size
        except RuntimeError as error:
            reason = str(error).splitlines()[0] if _out_of_memory(error) else None
            if reason is None:
                raise
        # Out of the handler: the error holds on to what the network had allocated.
        if not retry or size == 1:
            more = "" if retry else ", or --retry, which halves it until it fits"
            raise ValueError(f"out of memory with {size} at a time: take a smaller --batch-size{more} ({reason})")
        size = max(1, size // 2)
        if x.device.type == "cuda":
            torch.cuda.empty_cache()


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


@torch.inference_mode()
def _predict(model: nn.Module, x: Tensor, dtype: str, columns: Tensor | None) -> Tensor:
    kind = getattr(torch, dtype)
    with torch.autocast(x.device.type, kind, enabled=kind != torch.float32):
        logits = model(x).float()
    if columns is not None:
        logits = logits[:, columns]
    return logits.topk(min(5, logits.shape[1]), dim=1).indices.cpu()


def _gathered(
    processes: Processes, total: int, labels: Tensor, predictions: Tensor, figures: Iterable[float]
) -> Measurement:
    """All processes' answers, in the order of the samples, every one of them once."""
    rank, size, device = processes.rank, processes.size, processes.device
    table = torch.zeros(total, 2 + predictions.shape[1], dtype=torch.int64)
    table[rank::size] = torch.cat([torch.ones(len(labels), 1, dtype=torch.int64), labels[:, None], predictions], dim=1)
    table = processes.total(table.to(device)).cpu()
    if not (table[:, 0] == 1).all():
        wrong = int((table[:, 0] != 1).sum())
        raise RuntimeError(f"{wrong} of {total} samples were not counted once over {size} processes")
    each = torch.zeros(size, 3, dtype=torch.float64)
    each[rank] = torch.tensor(list(figures), dtype=torch.float64)
    each = processes.total(each.to(device)).cpu()
    seconds, network_seconds = each[:, :2].max(dim=0).values.tolist()
    return Measurement(table[:, 1], table[:, 2:], seconds, network_seconds, int(each[:, 2].min()))
