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
        ValueError: A device that is not there, fewer GPUs than processes, a GPU by number for several processes, or
            numbers of processes that do not fit together.
        ConnectionError: The processes did not find each other.
    """
    wanted = torch.device(device)
    size = _number("WORLD_SIZE", 1)
    if "RANK" not in os.environ or size == 1:
        yield World(usable_device(wanted))
        return
    rank = _number("RANK", 0)
    if not 0 <= rank < size:
        raise ValueError(f"RANK={rank} and WORLD_SIZE={size} do not fit: processes are numbered from 0 to {size - 1}")
    if wanted.type == "cuda":
        if wanted.index is not None:
            raise ValueError(f"torchrun gives every process its GPU: use --device cuda in place of {wanted}")
        local, there = _number("LOCAL_RANK", rank), torch.cuda.device_count()
        if local >= there:
            raise ValueError(
                f"torchrun started process {local + 1} of this machine, which has {there} GPUs: lower --nproc-per-node"
            )
        wanted = torch.device("cuda", local)
        torch.cuda.set_device(wanted)
    try:
        dist.init_process_group("nccl" if wanted.type == "cuda" else "gloo", timeout=timeout)
    except (dist.DistError, ValueError) as error:
        raise ConnectionError(_why_alone(error, rank, size)) from error
    try:
        yield World(usable_device(wanted), dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def _number(variable: str, otherwise: int) -> int:
    text = os.environ.get(variable, str(otherwise))
    if not text.isdecimal():
        raise ValueError(f"{variable}={text!r} is no number of a process: start by torchrun, which sets it")
    return int(text)


def _why_alone(error: Exception, rank: int, size: int) -> str:
    """One sentence about processes that did not find each other."""
    address, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if not address or not port.isdecimal():
        return "MASTER_ADDR and MASTER_PORT say where processes meet, and one is missing: start by torchrun"
    if "address already in use" in str(error).lower():
        return (
            f"port {port} is in use on {address}, perhaps by another run: choose another by torchrun --master-port, or "
            "let torchrun --standalone find a free one"
        )
    return (
        f"process {rank + 1} of {size} did not find the others at {address}:{port} ({text}): are {size} processes "
        "running, with the same address and port?"
    )
