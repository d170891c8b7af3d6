"""What pyproject.toml cannot say: whether and how the binary of the CUDA operator is built.

``SMPCONV_BUILD_CUDA=auto`` (or not set) builds it into wheels where a CUDA compiler and PyTorch's headers are found,
and goes on without it where they are not. An editable install builds it with ``SMPCONV_BUILD_CUDA=1`` only, into the
source tree: it takes half a minute, and every install would repeat it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "cutlass"))

import build_cuda  # noqa: E402


class BuildBinary(build_ext):
    """Calls the CUDA compiler for an extension that is no Python module, but a library of operators."""

    def build_extension(self, ext: Extension) -> None:
        try:
            build_cuda.build(Path(self.get_ext_fullpath(ext.name)))
        except RuntimeError as error:
            if build_cuda.is_wanted() == "1":
                raise
            self.warn(f"goes on without the CUDA kernels: {error}")

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).is_file()]


def extensions() -> list[Extension]:
    """The binary, where it is to be built."""
    wanted = build_cuda.is_wanted()
    editable = "editable_wheel" in sys.argv or "develop" in sys.argv
    if wanted == "0" or (wanted == "auto" and (editable or build_cuda.why_not() is not None)):
        return []
    sources = [f"cutlass/csrc/{name}" for name in build_cuda.SOURCES]
    return [Extension("smpconv_zoo._cuda", sources, py_limited_api=True)]


binary = extensions()
setup(
    ext_modules=binary,
    cmdclass={"build_ext": BuildBinary},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if binary else {},
)
