"""`tallstore verify`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Final

import typer

import tallstore
from tallstore.cli.options import BundleArgument, JsonOption

USAGE: Final = "BUNDLE [--json]"
EXAMPLES: Final = """\
tallstore verify bundle
tallstore verify bundle --json
tallstore verify org/name"""

_OF_NEWER: Final = {"VER-1", "VER-2", "VER-4"}


def verify(bundle: BundleArgument, as_json: JsonOption = False) -> None:
    """Check every rule of the format and every byte; print each problem, and exit with 1 if there is one.

    Of a bundle on the Hub, only the manifest is downloaded: the Hub's own hashes and sizes of the other files are
    compared with it.
    """
    from tallstore.cli import progress_bar, terminal  # noqa: PLC0415 - rich
    from tallstore.cli.figures import several  # noqa: PLC0415

    with progress_bar.show("checking") as progress:
        problems = tallstore.verify(bundle, progress=progress)

    from tallstore.cli.views.verified import print_compared, print_problems, print_verified  # noqa: PLC0415 - numpy
    from tallstore.hub.snapshot import find  # noqa: PLC0415
    from tallstore.inspecting.summary import presence  # noqa: PLC0415

    if as_json:
        terminal.print_json([asdict(problem) for problem in problems])
    elif problems:
        print_problems(problems)
    else:
        root, on_hub = find(bundle)
        print_verified(presence(root)) if on_hub is None else print_compared(on_hub)
    if problems:
        is_newer = all(problem.rule in _OF_NEWER for problem in problems)
        advice = "a newer tallstore can judge it" if is_newer else "fetch or pack the bundle again"
        terminal.report_error(f"{bundle}: {several(len(problems), 'problem')}; {advice}")
        raise typer.Exit(1)
