"""Processes that load checkpoints: each with an environment, a checkout and a Hub client of its own.

Importing PyTorch takes most of such a process's time. One process imports PyTorch and torchvision, which read none of
the variables that matter here, and forks; what huggingface_hub, timm and smpconv_zoo do at import, every child does
for itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

PARENT = """
import json, os, sys, traceback
import torch, torchvision
assert not {"huggingface_hub", "timm", "smpconv_zoo"} & set(sys.modules)
torch.set_num_threads(1)
def child(job):
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    sys.path[0] = job["checkout"]
    try:
        exec(compile(job["code"], "<test>", "exec"), {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job:
        answer = os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1])
    else:
        answer = os.fork()
        if answer == 0:
            child(job)
    print(answer, flush=True)
"""

# What the tests' code finds at hand.
CHILD = """
import hashlib, json, os, sys, time
from pathlib import Path
import timm, torch

def answer(**values):
    path = Path(os.environ["TEST_ANSWER"])
    path.with_suffix(".part").write_text(json.dumps(values))
    path.with_suffix(".part").rename(path)

def digest(model):
    total = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        total.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return total.hexdigest()

def load(name, create=timm.create_model, **options):
    start = time.monotonic()
    try:
        result = digest(create(name, pretrained=True, **options))
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
    load.seconds = time.monotonic() - start
    return result
"""


class Clients:
    """Starts processes and collects what they answer; to be used in a ``with`` block."""

    def __enter__(self) -> Clients:
        self._folder = tempfile.TemporaryDirectory()
        pipe = subprocess.PIPE
        self._parent = subprocess.Popen([sys.executable, "-c", PARENT], stdin=pipe, stdout=pipe, text=True)
        self._jobs: dict[int, Path] = {}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._parent.communicate()
        self._folder.cleanup()

    def _ask(self, **job: Any) -> int:
        assert self._parent.stdin and self._parent.stdout
        self._parent.stdin.write(json.dumps(job) + "\n")
        self._parent.stdin.flush()
        return int(self._parent.stdout.readline())

    def start(self, environment: dict[str, str], code: str, folder: Path, checkout: Path | None) -> int:
        """Run ``code`` in ``folder`` with the package of ``checkout``, or with none; the process's id."""
        answer = Path(self._folder.name) / f"{len(list(Path(self._folder.name).iterdir()))}.json"
        answer.with_suffix(".log").touch()
        job = {"environment": {**environment, "TEST_ANSWER": str(answer)}, "log": str(answer.with_suffix(".log"))}
        code = CHILD + ("import smpconv_zoo\n" if checkout else "") + code
        pid = self._ask(**job, code=code, folder=str(folder), checkout=str(checkout or folder))
        self._jobs[pid] = answer
        return pid

    def wait(self, pid: int) -> dict[str, Any]:
        """What a process answers with its ``answer(...)``."""
        code, answer = self._ask(wait=pid), self._jobs.pop(pid)
        assert code == 0, answer.with_suffix(".log").read_text()
        return json.loads(answer.read_text())

    def kill(self, pid: int) -> None:
        """End a process at once, wherever it is."""
        os.kill(pid, 9)
        assert self._ask(wait=pid) == -9
        self._jobs.pop(pid)

    def run(self, environment: dict[str, str], code: str, folder: Path, checkout: Path) -> dict[str, Any]:
        """`start` and `wait`."""
        return self.wait(self.start(environment, code, folder, checkout))
