"""A bar on stderr for whatever takes longer than a moment; nothing where nobody looks."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Literal

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column
from rich.text import Text

from tallstore.cli import terminal

_WIDTH_FOR_A_TIME = 45
_WIDTH_FOR_A_RATE = 70


class _Bytes(DownloadColumn):
    """Bytes done and in all, once those are known; on one line however narrow the terminal is."""

    def get_table_column(self) -> Column:
        return Column(no_wrap=True)

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else super().render(task)


class _Rate(TransferSpeedColumn):
    """Bytes a second, once there are some."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.completed else Text()


@contextlib.contextmanager
def show(doing: str, unit: Literal["bytes", "pieces"] = "bytes") -> Iterator[Callable[[int, int], None]]:
    """Draw a bar with bytes, rate and time left, or with pieces done; until the first are told, one that only moves.

    Warnings inside the block are printed above it.

    Yields:
        what to call with how much is done, and how much there is in all.
    """
    console = terminal.aside()
    console.width -= len("^C") + 1  # what the terminal writes behind the bar must not begin another line
    if not (sys.stderr.isatty() and console.is_interactive):
        yield lambda _done, _total: None
        return
    amount: ProgressColumn = _Bytes() if unit == "bytes" else MofNCompleteColumn()
    rate = [_Rate()] if unit == "bytes" and console.width >= _WIDTH_FOR_A_RATE else []
    left = [TimeRemainingColumn(compact=True)] if console.width >= _WIDTH_FOR_A_TIME else []
    columns = (TextColumn(doing, markup=False), BarColumn(bar_width=None), amount, *rate, *left)
    with Progress(*columns, console=console, transient=True, expand=True) as bar, warnings.catch_warnings():
        warnings.showwarning = lambda message, *_args, **_options: terminal.report_warning(str(message), console)
        task = bar.add_task(doing, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
