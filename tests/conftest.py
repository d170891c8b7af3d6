"""Settings and fixtures shared by all test modules; the reference files are found by `golden_files.golden`."""

import os
import sys
import tempfile
from collections.abc import Callable

import pytest
from hypothesis import settings

# No deadline: the first call of a torch function can take longer than hypothesis allows one example on a busy machine.
# Derandomized, so that a run repeats exactly.
settings.register_profile("smpconv_zoo", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("smpconv_zoo")

# What the user of this machine has imported must not matter; the package looks when it is imported.
_HOME = tempfile.TemporaryDirectory(prefix="smpconv_home")
os.environ["SMPCONV_HOME"] = _HOME.name
# Installs of the tests are about the Python package; what builds its binary says so.
os.environ["SMPCONV_BUILD_CUDA"] = "0"


def pytest_unconfigure(config: pytest.Config) -> None:
    _HOME.cleanup()


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `smpconv-zoo` with the given arguments, in this process: exit status, stdout, stderr."""
    from smpconv_zoo import cli

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["smpconv-zoo", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code or 0, *capsys.readouterr()

    return run
