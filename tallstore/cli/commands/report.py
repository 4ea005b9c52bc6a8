"""`tallstore report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from tallstore.cli.options import BundleArgument, OverwriteOption

USAGE: Final = "BUNDLE --out FILE [--overwrite]"
EXAMPLES: Final = """\
tallstore report bundle --out report.html
tallstore report org/name@v1 --out report.html"""


def report(
    bundle: BundleArgument,
    *,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page to write.", show_default=False)],
    overwrite: OverwriteOption = False,
) -> None:
    """Write a report of a bundle: one page for a browser, which needs no network.

    Sizes, how true each task is, densities, agreement and overlap of the masks, the values of the shared vectors: as
    plots, and as tables that can be sorted. Reads each mask and shared vector once;
    of a bundle on the Hub, they are downloaded.
    """
    from tallstore.cli import progress_bar, terminal  # noqa: PLC0415 - rich
    from tallstore.hub.reporting import write_report  # noqa: PLC0415 - numpy
    from tallstore.sizes import readable  # noqa: PLC0415

    with progress_bar.show("measuring") as progress:
        written = write_report(bundle, out, overwrite=overwrite, progress=progress)
    terminal.output().print(f"reported {bundle} in {written}: {readable(written.stat().st_size)}")
