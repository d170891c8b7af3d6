"""timm's own tests of its models, run on the image networks of this package.

    python tests/run_timm_suite.py PATH/TO/timm/tests/test_models.py [ARGUMENTS OF PYTEST]

The file comes from a checkout or source release of the timm that is installed; nothing of it is changed or kept here.
Of its tests, those run that are parametrised over every model. The sequence networks take (N, C, L), which timm's tests
do not know of; tests/test_models.py asks the same of them. Needs pytest and pytest-timeout. Not collected by pytest.
"""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm

import smpconv_zoo  # noqa: F401  (registers the networks)

NETWORKS = ("smpconv_t", "smpconv_b", "test_smpconv", "smpconv_resnet", "smpconv_resnet_cifar")


def only_ours(list_names: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """``timm.list_models`` or ``timm.list_pretrained`` that knows of our image networks alone."""

    def listed(filter: Any = "", *args: Any, module: Any = "", **kwargs: Any) -> list[str]:
        # timm's tests name the modules of its own models that have forward_intermediates(); ours all have it.
        names = list_names(filter, *args, **kwargs)
        return [name for name in names if name.partition(".")[0] in NETWORKS]

    return listed


class Selection:
    """Plugin that keeps the tests whose parameter is one of our networks, and counts what became of them."""

    def __init__(self) -> None:
        self.outcomes: dict[str, dict[str, int]] = {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        def ours(item: pytest.Item) -> bool:
            name = getattr(item, "callspec", None) and item.callspec.params.get("model_name")
            return isinstance(name, str) and any(fnmatch.fnmatch(name, f"{network}*") for network in NETWORKS)

        kept = [item for item in items if ours(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            counts = self.outcomes.setdefault(report.nodeid.rpartition("::")[2].partition("[")[0], {})
            counts[report.outcome] = counts.get(report.outcome, 0) + 1

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section("our networks in the tests of timm")
        for test, counts in self.outcomes.items():
            terminalreporter.line(f"{test}: {', '.join(f'{n} {outcome}' for outcome, n in sorted(counts.items()))}")


def main(arguments: list[str]) -> int:
    if not arguments or not Path(arguments[0]).is_file():
        sys.stderr.write(f"{__doc__}\n")
        return 2
    timm.list_models = only_ours(timm.list_models)
    timm.list_pretrained = only_ours(timm.list_pretrained)
    return int(pytest.main(["-p", "no:cacheprovider", *arguments], plugins=[Selection()]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
