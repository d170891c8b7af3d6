"""docs/data.md is true: its table is read off the sources, its commands parse, its links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer.main
from data_on_disk import write_speech
from golden_files import ROOT

from smpconv_zoo.data.speech_commands import ORDER_FILE, list_clips
from smpconv_zoo.evaluation.tables import data_tables
from smpconv_zoo.evaluation.test_sets import TEST_PARTS
from smpconv_zoo.pretrained.cards import checkpoint_card
from smpconv_zoo.training.recipe import PROTOCOLS, list_recipes

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.S)


def test_its_table_is_read_off_the_sources() -> None:
    table = re.search(r"<!-- sources: .*? -->\n(.*?)<!-- end -->", PAGE, flags=re.S)
    assert table is not None and table[1] == data_tables()


def test_its_commands_are_those_of_the_command_line() -> None:
    from smpconv_zoo.cli import app

    program: Any = typer.main.get_command(app)
    named = [shlex.split(line)[1:] for block in BLOCKS for line in block.splitlines() if line.startswith("smpconv-zoo")]
    assert len(named) >= 7
    for name, *arguments in named:
        with program.make_context("smpconv-zoo", [name, *arguments], resilient_parsing=False) as context:
            command = program.get_command(context, name)
            if name == "data":
                command, arguments = command.get_command(context, arguments[0]), arguments[1:]
            command.make_context(name, list(arguments), parent=context)


def test_it_names_every_recipe_of_the_authors_and_every_protocol() -> None:
    for name in list_recipes():
        assert checkpoint_card(name).status == "embedded" or f"`{name}`" in PAGE, name
    for protocol in [*PROTOCOLS, *TEST_PARTS]:
        assert protocol in PAGE
    for file in re.findall(r"`(tests/\w+\.py)`", PAGE):
        assert (ROOT / file).is_file(), file


@pytest.mark.skipif(shutil.which("bash") is None, reason="the loop is for a shell")
def test_its_loop_writes_the_order_of_the_directory(tmp_path: Path) -> None:
    list(write_speech(tmp_path, 5))
    (loop,) = [block for block in BLOCKS if block.startswith("cd ")]
    before = list_clips(tmp_path, "reference")
    script = loop.replace("~/data/speech_commands_v0.02", shlex.quote(str(tmp_path)))
    subprocess.run(["bash", "-euc", script], check=True, env=os.environ)
    assert (tmp_path / ORDER_FILE).is_file() and list_clips(tmp_path, "reference") == before
