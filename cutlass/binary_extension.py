"""The binary of the CUDA operator as setuptools builds it: shared by the setup.py of both distributions."""

from __future__ import annotations

import sys
from pathlib import Path

import build_cuda
from setuptools import Extension
from setuptools.command.build_ext import build_ext

__all__ = ["BuildBinary", "binary_extensions"]


class BuildBinary(build_ext):
    """Calls the CUDA compiler for an extension that is no Python module, but a library of operators."""

    def build_extension(self, ext: Extension) -> None:
        try:
            build_cuda.build(Path(self.get_ext_fullpath(ext.name)), macros=dict(ext.define_macros))
        except RuntimeError as error:
            if build_cuda.is_wanted() == "1":
                raise
            self.warn(f"goes on without the CUDA kernels: {error}")

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).is_file()]


def binary_extensions(package: str, sources: str, library: str = "smpconv") -> list[Extension]:
    """The binary ``package._cuda``, where it is to be built.

    Args:
        package: Where it is put.
        sources: Folder of the sources, relative to setup.py.
        library: Of PyTorch's, that its operators are registered in.
    """
    wanted = build_cuda.is_wanted()
    editable = "editable_wheel" in sys.argv or "develop" in sys.argv
    if wanted == "0" or (wanted == "auto" and (editable or build_cuda.why_not() is not None)):
        return []
    files = [f"{sources}/{name}" for name in build_cuda.SOURCES]
    macros = [("SMPCONV_LIBRARY", library)]
    return [Extension(f"{package}._cuda", files, define_macros=macros, py_limited_api=True)]
