"""Runs the tests of the Triton kernels, `gpu_kernels.py`: in Triton's interpreter, and compiled where a GPU is."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch
from golden_files import ROOT

# A run that collects next to nothing must not pass.
AT_LEAST = 150


def run(**environment: str) -> None:
    names = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu_kernels.py"]
    done = subprocess.run(command, cwd=ROOT, env={**names, **environment}, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= AT_LEAST, done.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_in_tritons_interpreter() -> None:
    run(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, there is none")
def test_the_kernels_compiled() -> None:
    run()
