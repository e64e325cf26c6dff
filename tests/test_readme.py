"""Every console block of the README is run, in order, in a folder with copies of configs/ and checkpoints/.

Lines that start with `$ ` are commands; the rest is output and is not compared. HTML comments on the lines
before a block say more: `<!-- slow -->` marks it slow; `<!-- reduced: training.tokens=20k -->` appends these
overrides to its `sae train` and `sae harvest` lines. `make` runs in the repository itself.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"((?:^<!--[^\n]*-->[ \t]*\n)*)^```console\n(.*?)^```", re.S | re.M)


@dataclass(frozen=True)
class Block:
    commands: list[str]
    slow: bool
    overrides: list[str] = field(default_factory=list)


def blocks(markdown):
    """The console blocks of a page, in order."""
    found = []
    for comments, text in BLOCK.findall(markdown):
        overrides = [word for words in re.findall(r"reduced:([^>]*?)-->", comments) for word in words.split()]
        commands = re.findall(r"^\$ ((?:.*\\\n)*.*)", text, re.M)
        found.append(Block(commands, bool(re.search(r"\bslow\b", comments)), overrides))
    return found


README = blocks((ROOT / "README.md").read_text(encoding="utf-8"))


def cases():
    for number, block in enumerate(README):
        marks = [pytest.mark.slow, pytest.mark.timeout(3600)] if block.slow else []
        yield pytest.param(block, marks=marks, id=f"{number}-{block.commands[0] if block.commands else 'empty'}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A place where README commands find what a clone has, and may write."""
    here = tmp_path_factory.mktemp("readme")
    for name in ("configs", "checkpoints"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, here / name)
    return here


def shortened(command, overrides):
    runs = re.match(r"sae (train|harvest|calibrate) ", command)
    return f"{command} {' '.join(overrides)}" if runs and overrides else command


@pytest.mark.xdist_group("readme")  # in order, in one process
@pytest.mark.parametrize("block", list(cases()))
def test_commands_of_the_readme_run(block, folder):
    assert block.commands, "a console block without a line that starts with `$ `"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in block.commands:
        place = ROOT if command.startswith("make ") else folder
        said = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", shortened(command, block.overrides)],
            cwd=place, env={**os.environ, "PATH": path}, capture_output=True, text=True,
        )  # fmt: skip
        assert said.returncode == 0, f"$ {command}\n{said.stdout[-2000:]}\n{said.stderr[-2000:]}"


def test_blocks_are_read_with_their_comments():
    page = (
        "text\n\n```console\n$ sae --help\noutput\n```\n\n<!-- slow -->\n<!-- reduced: sae.k=3 out=b -->\n"
        "```console\n$ sae train a.yaml \\\n  sae.k=4\n$ ls\n```\n```python\nx\n```\n"
    )
    assert blocks(page) == [
        Block(["sae --help"], False),
        Block(["sae train a.yaml \\\n  sae.k=4", "ls"], True, ["sae.k=3", "out=b"]),
    ]
    assert shortened("sae train a.yaml", ["sae.k=3"]) == "sae train a.yaml sae.k=3"
    assert shortened("ls", ["sae.k=3"]) == "ls"
