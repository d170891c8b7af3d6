"""Settings shared by all test modules; the reference files are found by `golden_files.golden`."""

import os
import tempfile

import pytest
from hypothesis import settings

# No deadline: the first call of a torch function can take longer than hypothesis allows one example on a busy machine.
# Derandomized, so that a run repeats exactly.
settings.register_profile("smpconv_zoo", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("smpconv_zoo")

# What the user of this machine has imported must not matter; the package looks when it is imported.
_HOME = tempfile.TemporaryDirectory(prefix="smpconv_home")
os.environ["SMPCONV_HOME"] = _HOME.name


def pytest_unconfigure(config: pytest.Config) -> None:
    _HOME.cleanup()
