"""What pyproject.toml cannot say: whether and how the binary of the CUDA operator is built.

``SMPCONV_BUILD_CUDA=auto`` (or not set) builds it into wheels where a CUDA compiler and PyTorch's headers are found,
and goes on without it where they are not. An editable install builds it with ``SMPCONV_BUILD_CUDA=1`` only, into the
source tree: it takes half a minute, and every install would repeat it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "cutlass"))

from binary_extension import BuildBinary, binary_extensions

binary = binary_extensions("smpconv_zoo", "cutlass/csrc")
setup(
    ext_modules=binary,
    cmdclass={"build_ext": BuildBinary},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if binary else {},
)
