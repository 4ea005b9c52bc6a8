"""Pages whose code runs as it stands there: README.md, and those in docs/."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from tallstore.cli.app import main

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r'^( *)```(\w+)(?: title="([^"]+)")?\n(.*?)^\1```$', re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of code: in a language, and where it has a title, the content of that file."""

    language: str
    title: str | None
    code: str


def blocks(text: str, language: str | None = None) -> list[Block]:
    """The blocks of a page, those of one language if it is given."""
    found = [Block(match[2], match[3], textwrap.dedent(match[4])) for match in _BLOCK.finditer(text)]
    return [block for block in found if language in {None, block.language}]


def commands(block: Block) -> list[str]:
    """The commands of a block that a test can run: `tallstore`, and `python` with a script."""
    lines = block.code.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith(("tallstore ", "python "))]


def run_command(command: str) -> None:
    """Run a command as a shell would, and expect it to succeed."""
    program, *arguments = shlex.split(command, comments=True)
    if program == "python":
        subprocess.run([sys.executable, *arguments], check=True)
    else:
        assert main(arguments) == 0, command


def run_page(page: Path, folder: Path) -> None:
    """Run all blocks of a page, from the first to the last, in *folder*: one that has a title becomes a file there."""
    before = Path.cwd()
    os.chdir(folder)
    names: dict[str, object] = {"__name__": "page"}
    try:
        for block in blocks(page.read_text(encoding="utf-8")):
            if block.title is not None:
                Path(block.title).write_text(block.code, encoding="utf-8")
            elif block.language == "python":
                exec(compile(block.code, page.name, "exec"), names)  # noqa: S102 - that is what it is for
            elif block.language == "sh":
                for command in commands(block):
                    run_command(command)
    finally:
        os.chdir(before)
