"""What computes: a device that is there, and the versions and hardware kept with every measurement."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import safetensors
import timm
import torch

from smpconv_zoo._version import __version__

__all__ = ["hardware", "keep_freed_memory", "usable_device", "versions"]

# Parameters of glibc's mallopt.
_TRIM_THRESHOLD = -1
_MMAP_MAX = -4
_LARGEST_INT = 2**31 - 1


def versions() -> dict[str, str]:
    """Versions of what computes."""
    return {
        "smpconv_zoo": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "safetensors": safetensors.__version__,
        "python": platform.python_version(),
    }


def usable_device(name: str | torch.device) -> torch.device:
    """The device of this name, tried out.

    Raises:
        ValueError: There is no such device here; the message says why.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0].partition(". ")[0].rstrip(".")
        raise ValueError(f"device {str(name)!r} cannot be used: {reason}") from error
    return device


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, whatever its size, for what it allocates next.

    glibc gives blocks of more than 32 MiB back to the system at once. To get them again, page by page, takes longer
    than most layers of a network take to fill them. For programs: a library has no business to decide this for others.
    The environment does the same: ``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647``.

    Returns:
        Whether that could be arranged; False where the C library is another one.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_MMAP_MAX, 0) and libc.mallopt(_TRIM_THRESHOLD, _LARGEST_INT))


def hardware(device: str | torch.device) -> str:
    """Name of the GPU, or of the CPU and the threads in use."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
