"""The scripts in ``eval/``, run in this process or by torchrun."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from types import ModuleType

import pytest
from golden_files import ROOT

from smpconv_zoo.console import run_script


def load_script(name: str) -> ModuleType:
    """``eval/NAME.py`` as a module."""
    if (known := sys.modules.get(f"eval_{name}")) is not None:
        return known
    spec = importlib.util.spec_from_file_location(f"eval_{name}", ROOT / "eval" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Annotations of the command line are looked up where the module is known.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def call_script(
    name: str, *arguments: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """Exit status, stdout, stderr."""
    module = load_script(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        run_script(f"{name}.py", module.app)
    return stop.value.code or 0, *capsys.readouterr()  # type: ignore[return-value]


def torchrun(name: str, *arguments: object, processes: int) -> subprocess.CompletedProcess[str]:
    """A script in several processes. On a busy machine gloo's may fail to find each other: they may try again."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [*command, "--max-restarts=5", str(ROOT / "eval" / f"{name}.py"), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
