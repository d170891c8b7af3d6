"""The README is true: its Python runs, its table is the cards', its links lead somewhere."""

from __future__ import annotations

import re

import pytest
from golden_files import ROOT

from smpconv_zoo.evaluation.tables import checkpoint_table, weights_page

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_its_python_runs(capsys):
    namespace: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert "torch.Size([2, 10])" in capsys.readouterr().out


def test_its_table_is_read_off_the_cards():
    table = re.search(r"<!-- checkpoints: .*? -->\n(.*?)<!-- end -->", README, flags=re.S)
    assert table is not None
    assert table[1] == checkpoint_table()


def test_the_page_of_the_weights_is_read_off_the_cards():
    assert (ROOT / "weights" / "README.md").read_text(encoding="utf-8") == weights_page()


def test_its_links_lead_to_files_of_the_repository():
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_shell_command_names_a_command_that_exists():
    from smpconv_zoo.cli import app

    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    for group in app.registered_groups:
        commands |= {f"{group.name} {command.name}" for command in group.typer_instance.registered_commands}
    named = set(re.findall(r"^smpconv-zoo ((?:(?:bench|data) )?\w+)", README, flags=re.M))
    assert named
    assert named <= commands
