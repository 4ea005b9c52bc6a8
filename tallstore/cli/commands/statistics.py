"""`tallstore statistics`."""

from __future__ import annotations

import contextlib
from typing import Final

from tallstore.cli.options import BundleArgument, JsonOption, TasksOption

USAGE: Final = "BUNDLE [--task TASK]… [--json]"
EXAMPLES: Final = """\
tallstore statistics bundle
# of two masks alone
tallstore statistics bundle --task spam --task mood
# everything, and tensor by tensor too
tallstore statistics bundle --json"""


def statistics(bundle: BundleArgument, *, task: TasksOption = None, as_json: JsonOption = False) -> None:
    """Show what the masks of a bundle have in common: densities, agreement, overlaps. Reads each mask once.

    Weights that no mask claims are called catastrophic, those that a single one claims selfish, and those that all
    claim universal.
    """
    from tallstore.cli import progress_bar, terminal  # noqa: PLC0415 - rich
    from tallstore.hub.opening import open_files  # noqa: PLC0415 - numpy
    from tallstore.inspecting.statistics import measure_masks  # noqa: PLC0415 - numpy

    with progress_bar.show("counting") as progress, contextlib.closing(open_files(bundle)) as files:
        measured = measure_masks(files, task or None, progress)
    if as_json:
        terminal.print_json(measured.to_dict())
        return

    from tallstore.cli.views.statistics import print_statistics  # noqa: PLC0415 - what this form alone needs

    print_statistics(measured)
