"""docs/evaluation.md and the README: the commands are taken by the scripts, the plan is the one that is printed."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
import typer
from eval_scripts import call_script, load_script
from golden_files import ROOT

from smpconv_zoo.evaluation.image_sets import IMAGE_SETS

PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[tuple[str, list[str]]]:
    """Script and arguments of every line that runs one."""
    found = re.findall(r"^(?:python|torchrun --nproc-per-node \d+) eval/(\w+)\.py (.*)$", PAGE + README, flags=re.M)
    return [(name, shlex.split(arguments, comments=True)) for name, arguments in found]


def test_the_commands_are_taken() -> None:
    named = set()
    for name, arguments in commands():
        command: Any = typer.main.get_command(load_script(name).app)
        command.make_context(name, list(arguments))
        named.add(name)
    assert named == {"imagenet", "sequence", "reproduce_tables"}


def test_the_options_that_the_text_names_exist() -> None:
    options = set()
    for name in ("imagenet", "sequence", "reproduce_tables", "rehearse"):
        command: Any = typer.main.get_command(load_script(name).app)
        options |= {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    text = re.sub(r"```.*?```", "", PAGE, flags=re.S)
    written = set(re.findall(r"`(--[a-z-]+)", text)) - {"--help"}
    assert written and written <= options


def test_the_sets_are_those_of_the_script() -> None:
    rows = re.findall(r"^\| (`.*?) \| ([\d, any]+) \|", PAGE, flags=re.M)
    counts = {
        name: count
        for names, numbers in rows
        for name, count in zip(re.findall(r"`(\w+)`", names), re.findall(r"[\d,]*\d|any", numbers), strict=True)
    }
    assert counts == {name: "any" if s.pictures is None else f"{s.pictures:,}" for name, s in IMAGE_SETS.items()}


def test_the_plan_is_the_one_that_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call_script("rehearse", "--markdown", monkeypatch=monkeypatch, capsys=capsys)
    table = re.search(r"<!-- plan: .*? -->\n(.*?)<!-- end -->", PAGE, flags=re.S)
    assert code == 0 and table is not None
    assert table[1] == out.split("\n\n")[0] + "\n"
