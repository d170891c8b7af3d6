"""No reference file is forgotten by the tests, and the copies in the repository are still what was made."""

import ast
import re
from pathlib import Path

import pytest
from golden_files import ROOT

SHARED = ROOT.parent / "shared" / "golden"
COPIED = ROOT / "tests" / "golden"


class NamesInTests:
    """The file names that a test module can ask for: strings, and f-strings whose gaps are filled by other constants.

    `f"seq_{task}.json"` covers `seq_smnist.json` only where the module also holds the string "smnist", so that a
    pattern does not cover what nothing runs.
    """

    def __init__(self, module: Path) -> None:
        tree = ast.parse(module.read_text(encoding="utf-8"))
        self.constants = {str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        self.patterns = [
            "".join(re.escape(part.value) if isinstance(part, ast.Constant) else r"(\w+)" for part in node.values)
            for node in ast.walk(tree)
            if isinstance(node, ast.JoinedStr)
        ]

    def mention(self, name: str) -> bool:
        matches = (re.fullmatch(pattern, name) for pattern in self.patterns)
        return name in self.constants or any(match and self.constants.issuperset(match.groups()) for match in matches)


def all_modules() -> list[NamesInTests]:
    return [NamesInTests(path) for path in sorted((ROOT / "tests").glob("test_*.py"))]


@pytest.mark.parametrize("folder", [SHARED, COPIED], ids=["shared", "copied"])
def test_every_reference_file_is_used_by_a_test(folder: Path) -> None:
    if not folder.is_dir():
        pytest.skip("needs shared/golden beside the repository, which is not in this clone")
    names = {path.name for path in folder.iterdir()} - {"README.md"}
    assert names
    modules = all_modules()
    assert sorted(name for name in names if not any(module.mention(name) for module in modules)) == []


def test_a_forgotten_file_would_be_found(tmp_path: Path) -> None:
    module = tmp_path / "test_x.py"
    module.write_text('TASKS = ("smnist",)\nwanted = [f"seq_{task}.json" for task in TASKS] + ["flops.json"]\n')
    names = NamesInTests(module)
    assert names.mention("flops.json") and names.mention("seq_smnist.json")
    assert not names.mention("seq_pmnist.json") and not names.mention("mfcc.safetensors")


def test_copied_reference_files_are_the_shared_ones() -> None:
    if not SHARED.is_dir():
        pytest.skip("needs shared/golden beside the repository, which is not in this clone")
    copied = sorted(COPIED.iterdir())
    assert sum(path.stat().st_size for path in copied) < 12e6
    for path in copied:
        assert path.read_bytes() == (SHARED / path.name).read_bytes(), path.name
