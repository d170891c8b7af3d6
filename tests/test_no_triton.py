"""Where the Triton kernels cannot run, one sentence says why, and nothing else changes."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from smpconv_zoo import gpu


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    gpu.why_no_triton.cache_clear()
    yield
    gpu.why_no_triton.cache_clear()


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    assert "pip install triton" in str(gpu.why_no_triton())


@pytest.mark.parametrize("compiler", [None, "gcc", "clang", "CC"])
def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, compiler: str | None) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: name if name == compiler else None)
    if compiler == "CC":
        monkeypatch.setenv("CC", "cc")
    reason = gpu.why_no_triton()
    assert reason is None if compiler else "install gcc, or set CC" in str(reason)


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_the_oldest_gpu_decides(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], runs: bool) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0) if device == 0 else capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    reason = gpu.why_no_triton()
    assert reason is None if runs else reason == "the kernels need compute capability 8.0, a card has 7.5"


def test_on_an_amd_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    version: Any = torch.version
    monkeypatch.setattr(version, "hip", "6.2")
    assert "this PyTorch is for AMD's" in str(gpu.why_no_triton())


def test_a_function_runs_on_the_device_of_its_first_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    device_of = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: asked.append(tensor) or device_of(tensor))
    x = torch.zeros(2)
    assert gpu.on_the_device_of_tensors(lambda name, tensor, scale: tensor + scale)("x", x, scale=1).sum() == 2
    assert len(asked) == 1 and asked[0] is x
