"""Builds the binary of the CUDA operator.
Used by both setup.py and by the tests; needs no GPU and imports no torch.

    python cutlass/build_cuda.py OUTPUT.so

Read from the environment:

- ``SMPCONV_BUILD_CUDA``: ``auto`` (build where that is possible), ``0`` (never) or ``1`` (fail where it is not).
- ``SMPCONV_CUDA_ARCHITECTURES``: such as ``80;90``; those of :data:`ARCHITECTURES` that the compiler knows, if not set.
- ``CUDA_HOME``, ``NVCC``: where the compiler is, if not on the path.
"""

from __future__ import annotations

import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path

__all__ = ["ARCHITECTURES", "build", "compile_source", "find_nvcc", "find_torch", "is_wanted", "why_not"]

#: A100, H100 and B200; the last one's virtual machine code comes along for GPUs that are newer.
ARCHITECTURES = ("80", "90", "100")
# What the stable interface has to hold: everything used came with PyTorch 2.10.
_OLDEST_TORCH = (2, 10)
_STABLE_TARGET = "0x020a000000000000"
SOURCES = ("forward.cu", "weight.cu", "operators.cpp")


def is_wanted() -> str:
    """``auto``, ``0`` or ``1``.

    Raises:
        ValueError: The environment asks for something else.
    """
    wanted = os.environ.get("SMPCONV_BUILD_CUDA", "auto") or "auto"
    if wanted not in ("auto", "0", "1"):
        raise ValueError(f"SMPCONV_BUILD_CUDA is {wanted!r}; it can be 'auto', '0' or '1'")
    return wanted


def find_nvcc() -> str | None:
    """Path of the CUDA compiler."""
    named = [os.environ.get("NVCC"), *(f"{os.environ[name]}/bin/nvcc" for name in ("CUDA_HOME",) if name in os.environ)]
    for candidate in (*named, "nvcc", "/usr/local/cuda/bin/nvcc"):
        if candidate and (found := shutil.which(candidate)):
            return found
    return None


def find_torch() -> Path | None:
    """PyTorch's folder, in the environment that is being installed into, which pip may hide from the build."""
    places = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for place in places:
        folder = Path(place or ".") / "torch"
        if (folder / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
            return folder
    return None


def why_not() -> str | None:
    """None if the binary can be built here, else the reason why not."""
    if not sys.platform.startswith("linux"):
        return f"the CUDA kernels are built on Linux, this is {sys.platform}"
    if find_nvcc() is None:
        return "no CUDA compiler (nvcc) was found: put it on the path, or name its folder in CUDA_HOME"
    torch = find_torch()
    if torch is None:
        return "PyTorch's headers were not found: install torch first"
    version = re.search(r"__version__ = '(\d+)\.(\d+)", (torch / "version.py").read_text(encoding="utf-8"))
    if version is None or (int(version[1]), int(version[2])) < _OLDEST_TORCH:
        found = f"{version[1]}.{version[2]}" if version else "another"
        return f"the CUDA kernels need PyTorch {_OLDEST_TORCH[0]}.{_OLDEST_TORCH[1]} or newer, found {found}"
    return None


def architectures(nvcc: str) -> list[str]:
    """Compute capabilities to build for."""
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    asked = os.environ.get("SMPCONV_CUDA_ARCHITECTURES")
    if asked:
        return [name for name in re.split(r"[;, ]+", asked) if name]
    return [name for name in ARCHITECTURES if f"sm_{name}" in known]


def compile_source(
    source: Path, output: Path, names: list[str], nvcc: str, torch: Path, macros: Mapping[str, str | None] | None = None
) -> None:
    """Compile one file for the compute capabilities ``names``; warnings are errors.

    Raises:
        RuntimeError: With what the compiler said.
    """
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    targets.append(f"-gencode=arch=compute_{names[-1]},code=compute_{names[-1]}")
    command = [
        nvcc,
        "-O3",
        "-std=c++17",
        "-Xcompiler=-fPIC,-Wall,-Wextra,-fvisibility=hidden",
        "-Werror=all-warnings",
        f"-DTORCH_TARGET_VERSION={_STABLE_TARGET}",
        "-DUSE_CUDA",
        *(f"-D{name}" if value is None else f"-D{name}={value}" for name, value in (macros or {}).items()),
        f"-isystem={torch / 'include'}",
        *targets,
        *("-c", str(source), "-o", str(output)),
    ]
    _run(command)


def build(output: Path, sources: Path | None = None, macros: Mapping[str, str | None] | None = None) -> None:
    """Build the binary.

    Args:
        output: File to write.
        sources: Folder of the sources; that beside this file if None.
        macros: For the compiler: ``SMPCONV_LIBRARY`` names the library that the operators are registered in.

    Raises:
        RuntimeError: It cannot be built here, or a compiler failed; the message says why.
    """
    reason = why_not()
    if reason is not None:
        raise RuntimeError(reason)
    nvcc, torch = find_nvcc(), find_torch()
    assert nvcc is not None and torch is not None
    folder = Path(__file__).resolve().parent / "csrc" if sources is None else sources
    names = architectures(nvcc)
    with tempfile.TemporaryDirectory() as scratch, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [Path(scratch) / f"{name}.o" for name in SOURCES]
        jobs = [
            pool.submit(compile_source, folder / name, path, names, nvcc, torch, macros)
            for name, path in zip(SOURCES, objects, strict=True)
        ]
        for job in jobs:
            job.result()
        # CUDA's runtime comes along, so that its version does not have to be that of PyTorch.
        output.parent.mkdir(parents=True, exist_ok=True)
        written = output.with_name(output.name + ".part")
        libraries = [f"-L{torch / 'lib'}", "-Xlinker=--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
        _run([nvcc, "-shared", "-cudart=static", "-o", str(written), *map(str, objects), *libraries])
        os.replace(written, output)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python build_cuda.py OUTPUT.so")
    build(Path(sys.argv[1]))
