"""The process and what computes in it."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
from golden_files import ROOT

from smpconv_zoo import environment


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library is not glibc")
def test_freed_memory_is_kept() -> None:
    # In a process of its own, which nobody else has to live with: the pages of 256 MiB are not asked for again.
    script = """
import resource
import sys
import torch
from smpconv_zoo.environment import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(3):
    torch.ones(2**26)
before = faults()
for _ in range(4):
    torch.ones(2**26)
print(faults() - before)
"""
    faults = {}
    for how in ("keep", "give back"):
        done = subprocess.run(
            [sys.executable, "-c", script, how], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
        )
        faults[how] = int(done.stdout)
    assert faults["keep"] < 0.1 * faults["give back"]


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not environment.keep_freed_memory()
