"""`pip install ./cutlass`: the operator alone, and the module that other large-kernel networks import."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import pytest
from golden_files import ROOT


def repository(folder: Path) -> Path:
    """A copy of what the build reads."""
    shutil.copytree(ROOT / "cutlass", folder / "cutlass", ignore=shutil.ignore_patterns("build", "*.egg-info", "__py*"))
    for part in ("ops", "gpu"):
        shutil.copytree(ROOT / "smpconv_zoo" / part, folder / "smpconv_zoo" / part)
    for name in ("_version.py", "operators.py"):
        shutil.copyfile(ROOT / "smpconv_zoo" / name, folder / "smpconv_zoo" / name)
    return folder


def pip_install(source: Path, target: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", *options]
    where = [] if "--editable" in options else ["--target", str(target)]
    return subprocess.run(
        [*command, str(source), *where], env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
    )


def python(code: str, path: Path) -> str:
    """What a program prints that finds the installed operator, and PyTorch, and nothing of this repository."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        cwd=path,
        env={**os.environ, "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Installed from the archive that `sdist` makes of it, without a binary."""
    folder = repository(tmp_path_factory.mktemp("repository"))
    code = "from setuptools.build_meta import build_sdist; print(build_sdist('dist'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder / "cutlass", capture_output=True, text=True, check=True, timeout=300
    )
    archive = folder / "cutlass" / "dist" / done.stdout.splitlines()[-1]
    with tarfile.open(archive) as opened:
        opened.extractall(folder / "unpacked", filter="data")
    target = tmp_path_factory.mktemp("site")
    (source,) = (folder / "unpacked").iterdir()
    done = pip_install(source, target, SMPCONV_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    return target


def test_it_stands_alone(installed: Path) -> None:
    said = python(
        """
        import sys, torch, smpconv_cutlass
        from smpconv_cutlass.ops import cuda
        print(sorted({name.partition(".")[0] for name in sys.modules} & {"timm", "torchvision", "smpconv_zoo"}))
        print("SMPCONV_BUILD_CUDA=1" in cuda.why_no_binary(), smpconv_cutlass.__version__)
        x, weight = torch.randn(2, 3, 9, 9), torch.randn(3, 1, 5, 5)
        print(smpconv_cutlass.why_not(x, weight)["fft"])
        # Both in one process: each has its own library of operators.
        torch.ops.smpconv_cutlass.depthwise_conv2d_forward
        """,
        installed,
    )
    version = (ROOT / "smpconv_zoo" / "_version.py").read_text(encoding="utf-8").split('"')[1]
    assert said == f"[]\nTrue {version}\nNone\n"


def test_beside_the_zoo(installed: Path) -> None:
    said = python(
        f"""
        import sys
        sys.path.append({str(ROOT)!r})
        import torch, smpconv_cutlass, smpconv_zoo.ops
        x, weight = torch.randn(2, 3, 9, 9), torch.randn(3, 1, 5, 5)
        print(torch.equal(smpconv_cutlass.depthwise_conv2d(x, weight), smpconv_zoo.ops.depthwise_conv2d(x, weight)))
        """,
        installed,
    )
    assert said == "True\n"


def test_the_module_that_other_networks_import(installed: Path) -> None:
    """As their extension's own test does it: the same numbers as `nn.Conv2d`, forward and both gradients."""
    said = python(
        """
        import torch
        from torch import nn
        from depthwise_conv2d_implicit_gemm import DepthWiseConv2dImplicitGEMM

        torch.manual_seed(0)
        for kernel, size, bias in ((31, 32, False), ((51, 5), 24, True), ([3, 7], 5, False), (1, 4, True)):
            ours = DepthWiseConv2dImplicitGEMM(6, kernel, bias=bias)
            theirs = nn.Conv2d(6, 6, ours.kernel_size, padding=ours.padding, groups=6, bias=bias)
            theirs.load_state_dict(ours.state_dict())
            x = torch.randn(4, 6, size, size)
            for autocast, tolerance in ((False, 1e-4), (True, 3e-2)):
                inputs = [x.clone().requires_grad_() for _ in range(2)]
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    answers = [net(each) for net, each in zip((ours, theirs), inputs)]
                assert answers[0].dtype == (torch.bfloat16 if autocast else torch.float32)
                assert answers[0].shape == x.shape
                grad = torch.randn_like(answers[0])
                pairs = [tuple(answers)]
                for net, each, y in zip((ours, theirs), inputs, answers):
                    net.zero_grad()
                    y.backward(grad)
                pairs += [tuple(each.grad for each in inputs)]
                pairs += [(a.grad, b.grad) for a, b in zip(ours.parameters(), theirs.parameters())]
                for a, b in pairs:
                    error = ((a.float() - b.float()).norm() / b.float().norm()).item()
                    assert error < tolerance, (kernel, autocast, error)
            half = ours.to(torch.bfloat16)(x.to(torch.bfloat16))
            assert half.dtype == torch.bfloat16
        assert isinstance(ours, nn.Conv2d) and ours.padding == (0, 0) and ours.groups == 6
        for wrong in (4, (3, 2), (3, 3, 3), 0):
            try:
                DepthWiseConv2dImplicitGEMM(2, wrong)
            except ValueError as error:
                assert "kernel must be odd" in str(error)
            else:
                raise AssertionError(wrong)
        print("equal")
        """,
        installed,
    )
    assert said == "equal\n"


def test_an_editable_install_is_refused(tmp_path: Path) -> None:
    done = pip_install(repository(tmp_path) / "cutlass", tmp_path, "--editable", SMPCONV_BUILD_CUDA="0")
    assert done.returncode != 0
    assert "install it without --editable" in done.stderr + done.stdout


@pytest.mark.slow
def test_its_binary_builds_and_holds_its_own_library(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("build_cuda", ROOT / "cutlass" / "build_cuda.py")
    assert spec is not None and spec.loader is not None
    build_cuda = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build_cuda)
    if reason := build_cuda.why_not():
        pytest.skip(reason)
    source, target = repository(tmp_path) / "cutlass", tmp_path / "site"
    done = pip_install(source, target, SMPCONV_BUILD_CUDA="1", SMPCONV_CUDA_ARCHITECTURES="90")
    assert done.returncode == 0, done.stderr
    said = python(
        """
        import torch
        from smpconv_cutlass.ops import cuda
        print(cuda.why_no_binary())
        for name in ("forward", "input", "weight"):
            operator = f"smpconv_cutlass::depthwise_conv2d_{name}"
            print(torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CUDA"))
        """,
        target,
    )
    assert said == "None\n" + "True\n" * 3
