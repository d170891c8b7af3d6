"""A copy of the package that tests may change, and a process that runs its command line without importing it anew."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from golden_files import ROOT

# Imports everything once and then forks for every command: a command is a process of its own, with its own exit status,
# that can be killed, and starts in no time. The parent has run nothing, so there are no threads to lose. The pause
# before another attempt at publishing is cut short.
HOST = """
import json, os, sys
from smpconv_zoo import cli, publishing
publishing.PAUSE_SECONDS = 0.05
for line in sys.stdin:
    wanted = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(wanted[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.environ.update(wanted["environment"])
        for name in [name for name, value in wanted["environment"].items() if value == ""]:
            del os.environ[name]
        sys.argv = ["smpconv-zoo", *wanted["arguments"]]
        code = 0
        try:
            exec(wanted["before"])
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 70
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(code)
    os.write(1, b"%d\\n" % child)
    os.write(1, b"%d\\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def copy_package(root: Path) -> Path:
    """A checkout with the package, and the cards and weights that ship with it."""
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("smpconv_zoo", "weights"):
        shutil.copytree(ROOT / folder, root / folder, ignore=ignored)
    return root


@dataclasses.dataclass
class Done:
    """How a command ended; the code is negative where a signal ended it."""

    code: int
    out: str
    err: str

    def assert_one_sentence(self, *parts: str) -> None:
        assert (self.code, self.out) == (1, ""), self
        assert self.err.startswith("smpconv-zoo: ") and self.err.count("\n") == 1 and "Traceback" not in self.err
        for part in parts:
            assert part in self.err, self.err


class Running:
    """A command that has started."""

    def __init__(self, host: ZooHost, pid: int, scratch: Path) -> None:
        self.host, self.pid, self.scratch = host, pid, scratch

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> Done:
        code = int(self.host.line())
        return Done(code, (self.scratch / "out").read_text(), (self.scratch / "err").read_text())


class ZooHost:
    """Runs `smpconv-zoo` of a checkout, one command at a time."""

    def __init__(self, process: subprocess.Popen[str], checkout: Path, scratch: Path) -> None:
        self.process, self.checkout, self.scratch = process, checkout, scratch

    def line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, (self.scratch / "host").read_text()
        return line

    def start(self, *arguments: str, before: str = "", **environment: str) -> Running:
        """Start a command; `before` is Python to run first, an empty variable of the environment is taken out of it."""
        assert self.process.stdin is not None
        names = {name: str(self.scratch / name) for name in ("out", "err")}
        wanted = {"arguments": arguments, "before": before, "environment": environment, **names}
        self.process.stdin.write(json.dumps(wanted) + "\n")
        self.process.stdin.flush()
        return Running(self, int(self.line()), self.scratch)

    def __call__(self, *arguments: str, before: str = "", **environment: str) -> Done:
        return self.start(*arguments, before=before, **environment).wait()


@contextlib.contextmanager
def zoo_host(checkout: Path, scratch: Path, environment: Mapping[str, str]) -> Iterator[ZooHost]:
    """`smpconv-zoo` of `checkout` as a process that takes commands."""
    scratch.mkdir(exist_ok=True)
    with open(scratch / "host", "w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", HOST],
            cwd=checkout,
            # A killed command leaves its temporary folder behind: here, not in the machine's.
            env={**environment, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "TMPDIR": str(scratch)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        yield ZooHost(process, checkout, scratch)
    finally:
        process.kill()
        process.communicate()


def wait_until(condition: object, seconds: float = 30) -> None:
    """Wait for something that another process does."""
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
