"""Installs the operator alone: ``pip install ./cutlass`` needs PyTorch, and neither timm nor the networks.

The package ``smpconv_cutlass`` is made of the same files as ``smpconv_zoo.ops``, under a name of its own and with a
library of operators of its own, so that both can be used in one process.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from binary_extension import BuildBinary, binary_extensions  # noqa: E402

PACKAGE = "smpconv_cutlass"
# Where the files are: in the repository, or in an archive that `sdist` made.
SOURCES = next(place for place in (HERE / "python", HERE.parent / "smpconv_zoo") if place.is_dir())
FILES = ("_version.py", "operators.py", "ops/*.py", "gpu/*.py")
# Package, library of operators and the variable that names another binary, in the files and here.
NAMES = (
    ("smpconv_zoo", PACKAGE),
    (r"\bsmpconv::", f"{PACKAGE}::"),
    (r"(?<=torch\.ops\.)smpconv\b", PACKAGE),
    ("SMPCONV_CUDA_LIBRARY", "SMPCONV_CUTLASS_LIBRARY"),
)
INIT = '''"""Depthwise convolution with large kernels: the operator of smpconv_zoo, alone."""

from smpconv_cutlass._version import __version__
from smpconv_cutlass.ops import depthwise_conv2d, why_not

__all__ = ["__version__", "depthwise_conv2d", "why_not"]
'''


def sources() -> list[Path]:
    """The files of the package."""
    return sorted(path for pattern in FILES for path in SOURCES.glob(pattern))


def version() -> str:
    """That of the repository."""
    return (SOURCES / "_version.py").read_text(encoding="utf-8").split('"')[1]


class BuildPackage(build_py):
    """Writes the package."""

    def run(self) -> None:
        if getattr(self, "editable_mode", False):
            raise SystemExit("smpconv-cutlass is put together from other files: install it without --editable")
        super().run()
        for path in sources():
            text = path.read_text(encoding="utf-8")
            for ours, theirs in NAMES:
                text = re.sub(ours, theirs, text)
            self._write(path.relative_to(SOURCES), text)
        self._write(Path("__init__.py"), INIT)
        self._write(Path("py.typed"), "")

    def _write(self, name: Path, text: str) -> None:
        place = Path(self.build_lib) / PACKAGE / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")


class WithSources(sdist):
    """Takes the files along."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        for path in sources():
            place = Path(base_dir) / "python" / path.relative_to(SOURCES)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)


binary = binary_extensions(PACKAGE, "csrc", PACKAGE)
setup(
    version=version(),
    py_modules=["depthwise_conv2d_implicit_gemm"],
    ext_modules=binary,
    cmdclass={"build_py": BuildPackage, "build_ext": BuildBinary, "sdist": WithSources},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if binary else {},
)
