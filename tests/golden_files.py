"""Where the reference values are: one place for every test module to ask."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def golden(name: str) -> Path:
    """Path of the reference file `name`, or a skip that says which file is missing.

    Looked for in the folder named by the environment variable SMPCONV_GOLDEN, in tests/golden, and in
    ../shared/golden beside the repository root; the first hit wins. The large files are not in a plain clone.
    """
    folders = [ROOT / "tests" / "golden", ROOT.parent / "shared" / "golden"]
    if chosen := os.environ.get("SMPCONV_GOLDEN"):
        folders.insert(0, Path(chosen))
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    pytest.skip(f"needs golden/{name}, which is not in this clone")
