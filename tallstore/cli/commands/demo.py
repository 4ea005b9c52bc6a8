"""`tallstore demo`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final

import typer

from tallstore.cli.options import JsonOption

USAGE: Final = "[--out DIR] [--json]"
EXAMPLES: Final = """\
tallstore demo
tallstore demo --out somewhere-else"""


def demo(
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Where the checkpoints and the bundle are left; ./tallstore-demo unless given.",
            show_default=False,
        ),
    ] = Path("tallstore-demo"),
    as_json: JsonOption = False,
) -> None:
    """Train six small experts, pack them, load each by name, score it. Under a minute.

    Needs scikit-learn: pip install 'tallstore[demo]'.
    """
    from tallstore.cli import progress_bar, terminal  # noqa: PLC0415 - rich

    with progress_bar.show("starting"):
        from tallstore import demo as demonstration  # noqa: PLC0415 - torch

    report = demonstration.main(out, console=terminal.aside() if as_json else terminal.output())
    if as_json:
        terminal.print_json(asdict(report) | {"bundle": str(report.bundle), "ratio": report.ratio})
