"""Where the command line prints: results on stdout, everything else in single lines on stderr."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment
from rich.text import Text

from tallstore.cli.hints import in_options

_WIDTH_OF_A_PIPE = 200  # nothing is cut short where nobody looks at the lines' length
# What a terminal acts on, and what turns the direction of a line.
_UNPRINTABLE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


class _Console(Console):
    """A console that prints what a bundle's author wrote, and nothing that a terminal would act on."""

    def render(self, *arguments: Any, **options: Any) -> Iterable[Segment]:  # noqa: ANN401 - rich's
        for text, style, control in super().render(*arguments, **options):
            yield Segment(text if control else _UNPRINTABLE.sub(_escaped, text), style, control)


def _escaped(found: re.Match[str]) -> str:
    return ascii(found[0])[1:-1]


def output() -> Console:
    """Where results go. Lines are as long as the terminal is wide, and in a pipe as long as they need be."""
    width = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else _WIDTH_OF_A_PIPE
    return _Console(width=width, highlight=False, markup=False, emoji=False)


def aside() -> Console:
    """Where everything else goes."""
    return _Console(stderr=True, highlight=False, markup=False, emoji=False)


def print_json(value: object) -> None:
    """A result for a script, on stdout. Characters that a terminal may lack are escaped."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def report_error(message: str) -> None:
    """One line on stderr."""
    _say("error: ", "bold red", message, aside())


def report_warning(message: str, console: Console | None = None) -> None:
    """One line on stderr, or on the *console* that a bar is drawn on."""
    _say("warning: ", "yellow", message, aside() if console is None else console)


def report_interrupt() -> None:
    """One line on stderr."""
    _say("interrupted", "bold red", "", aside())


def _say(label: str, style: str, message: str, console: Console) -> None:
    """Print one line, however long: a terminal wraps it, a log keeps it whole."""
    line = " ".join(in_options(message).split())
    console.print(Text.assemble((label, style), line), soft_wrap=True)
