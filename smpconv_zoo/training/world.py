"""The processes that train together: one alone, or those that ``torchrun`` started."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from smpconv_zoo.environment import usable_device

__all__ = ["World", "join_world"]


@dataclasses.dataclass(frozen=True)
class World:
    """Which of how many processes this one is, and where it computes.

    Args:
        device: Of this process.
        rank: Its number, from 0.
        size: Number of processes.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes files and prints."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """Sums over processes of the entries of a tensor, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def agreed(self, value: bool) -> bool:
        """Whether any process says so."""
        if self.size == 1:
            return value
        flag = torch.tensor(int(value), device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def shared(self, value: Any) -> Any:
        """What the process that leads has."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def gathered(self, value: Any) -> list[Any]:
        """What each process has, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def join_world(device: str | torch.device, timeout: timedelta | None = None) -> Iterator[World]:
    """The world of this process; under ``torchrun`` its process group, NCCL on GPUs and gloo elsewhere.

    Args:
        device: ``"cpu"``, ``"cuda"`` (under ``torchrun`` the GPU of the local rank), or one GPU by number.
        timeout: How long processes wait for each other before they give up; PyTorch's own if None.

    Raises:
        ValueError: A device that is not there, fewer GPUs than processes, or a GPU by number for several processes.
    """
    wanted = torch.device(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if "RANK" not in os.environ or size == 1:
        yield World(usable_device(wanted))
        return
    if wanted.type == "cuda":
        if wanted.index is not None:
            raise ValueError(f"torchrun gives every process its GPU: use --device cuda in place of {wanted}")
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise ValueError(
                f"torchrun started process {local + 1} of this machine, which has {there} GPUs: lower --nproc-per-node"
            )
        wanted = torch.device("cuda", local)
        torch.cuda.set_device(wanted)
    dist.init_process_group("nccl" if wanted.type == "cuda" else "gloo", timeout=timeout)
    try:
        yield World(usable_device(wanted), dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
