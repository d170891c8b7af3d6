"""The least progress that a download has to make: a server that stalls or drips holds nobody for ever.

Timeouts of HTTP clients count from byte to byte, so one byte every few seconds keeps them waiting without end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator

__all__ = ["Pace", "Watch", "watched"]

# Of a second: how often a watch is looked at.
LOOK_EVERY = 0.1


@dataclasses.dataclass(frozen=True)
class Pace:
    """So many bytes have to come in any so many seconds.

    Args:
        bytes: With 0 a download may take as long as it likes.
        seconds: How long so many bytes may take.
    """

    bytes: int = 512 * 2**10
    seconds: float = 60.0

    @classmethod
    def of_environment(cls) -> Pace:
        """The pace of ``SMPCONV_STALL_BYTES`` and ``SMPCONV_STALL_SECONDS``; by default 512 KiB in 60 s (8.7 kB/s).

        Raises:
            ValueError: One of them is no such number.
        """
        least = _number("SMPCONV_STALL_BYTES", cls.bytes, 0)
        seconds = _number("SMPCONV_STALL_SECONDS", cls.seconds, 1e-3)
        return cls(int(least), seconds)

    def __str__(self) -> str:
        return f"less than {self.bytes:,} bytes came within {self.seconds:g} s"


class Watch:
    """Counts what comes and says whether it is too little. It counts from when it is started."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self._came = 0
        self._mark: tuple[float, int] | None = None

    @property
    def came(self) -> int:
        """Bytes so far."""
        return self._came

    def start(self) -> None:
        """Count the time from now on; a watch that runs already is left alone."""
        if self._mark is None:
            self._mark = (time.monotonic(), self._came)

    def add(self, count: int) -> None:
        """So many bytes more came."""
        self._came += count
        mark = self._mark
        if mark is not None and self._came - mark[1] >= self.pace.bytes:
            self._mark = (time.monotonic(), self._came)

    def stalled(self) -> bool:
        """Whether the pace was not kept."""
        mark = self._mark
        return mark is not None and self.pace.bytes > 0 and time.monotonic() - mark[0] > self.pace.seconds


@contextlib.contextmanager
def watched(pace: Pace, on_stall: Callable[[], None]) -> Iterator[Watch]:
    """A started watch; ``on_stall`` is called once, in another thread, if the block does not keep the pace."""
    watch, ended = Watch(pace), threading.Event()
    watch.start()

    def look() -> None:
        while not ended.wait(LOOK_EVERY):
            if watch.stalled():
                on_stall()
                return

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        ended.set()
        thread.join()


def _number(name: str, default: float, least: float) -> float:
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    # Written so that NaN fails.
    if not least <= number < 1e12:
        raise ValueError(f"{name}={text} is no number of {name.rpartition('_')[2].lower()}")
    return number
