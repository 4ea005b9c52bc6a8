"""The command line in a real terminal: bars that come and go, colours, and none of both where they are not wanted."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading

import pytest

from tests.model_directories import pack_models, save_models

# Bars are drawn at once and at every step, so that short work shows them too; one warning comes between.
PROGRAM = """
import sys, warnings, tallstore
from tallstore.cli import main, progress_bar

def verify(path, *, progress, verify=tallstore.verify):
    def told(done, total):
        progress(done, total)
        for bar in bars:
            bar.refresh()
    warnings.warn("look at this")
    return verify(path, progress=told)

class Progress(progress_bar.Progress):
    def __init__(self, *columns, **options):
        super().__init__(*columns, **options)
        bars.append(self)

bars = []
tallstore.verify = verify
progress_bar.Progress = Progress
sys.exit(main())
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    root = save_models(tmp_path_factory.mktemp("models"))
    return pack_models(root, root / "bundle")


def in_a_terminal(*arguments, columns=100, code=0, **environment):
    """What a command draws in a terminal of its own."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in {"COLUMNS", "NO_COLOR", "FORCE_COLOR"}}
    env |= {"TERM": "xterm-256color", **environment}
    drawn = bytearray()

    def read():
        with contextlib.suppress(OSError):  # the other end was closed
            while piece := os.read(leader, 4096):
                drawn.extend(piece)

    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    with subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=env) as child:
        os.close(follower)
        reader = threading.Thread(target=read)
        reader.start()
        assert child.wait(timeout=120) == code
    reader.join(timeout=60)
    os.close(leader)
    return drawn.decode()


def screen(drawn):
    """What is left to be seen: lines as overwritten, by those few sequences that rich uses."""
    rows, row = [""], 0
    for piece in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", drawn):
        if piece == "\n":
            row += 1
            rows.extend([""] * (row + 1 - len(rows)))
        elif piece == "\x1b[2K":
            rows[row] = ""
        elif up := re.fullmatch(r"\x1b\[(\d+)A", piece):
            row -= int(up[1])
        elif not piece.startswith(("\x1b", "\r")):
            rows[row] += piece
    return [line.rstrip() for line in rows if line.strip()]


@pytest.mark.parametrize("columns", [30, 50, 100])
def test_a_bar_comes_and_goes(bundle, columns):
    drawn = in_a_terminal("verify", bundle, columns=columns)
    plain = re.sub(r"\x1b\[[\d;]*m", "", drawn)
    assert re.search("checking [━╸╺]", plain)
    sizes = re.findall(r"([\d.]+)/([\d.]+) kB", plain)
    assert len(set(sizes)) > 3
    assert sizes[-1][0] == sizes[-1][1]
    left = screen(drawn)
    assert left[0] == "warning: look at this"
    assert left[1].startswith("no problems: ")
    assert not any("checking" in line for line in left)


def test_no_bar_where_the_terminal_is_dumb_or_the_work_is_none(bundle):
    drawn = in_a_terminal("verify", bundle, TERM="dumb")
    assert "checking" not in drawn
    assert "\x1b" not in drawn
    assert "checking" not in in_a_terminal("inspect", bundle)


@pytest.mark.parametrize(("arguments", "code"), [(["inspect", "nothing"], 1), (["export", "--help"], 0)])
def test_errors_and_help_are_coloured_unless_asked_not_to(arguments, code):
    colour = re.compile(r"\x1b\[[\d;]*3\dm")
    assert colour.search(in_a_terminal(*arguments, code=code))
    assert not colour.search(in_a_terminal(*arguments, code=code, NO_COLOR="1"))
    assert "\x1b" not in in_a_terminal(*arguments, code=code, TERM="dumb")


def test_tables_are_as_wide_as_the_terminal(bundle):
    narrow, wide = (in_a_terminal("inspect", bundle, columns=columns) for columns in (40, 120))
    assert max(map(len, screen(narrow))) <= 40
    assert "parameters" in next(line for line in screen(wide) if line.startswith("task "))
