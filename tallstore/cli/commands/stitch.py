"""`tallstore stitch`."""

from __future__ import annotations

from typing import Final

from tallstore.cli.merged_model import MergedOutput, write_merged
from tallstore.cli.options import BaseOption, BundleArgument, JsonOption, OverwriteOption, TasksOption

USAGE: Final = "BUNDLE --out DIR [OPTIONS]"
EXAMPLES: Final = """\
# one model out of experts that were packed with --method localize
tallstore stitch bundle --base bert --out stitched
# out of two of them
tallstore stitch bundle --base bert --out two --task spam --task mood"""


def stitch(
    bundle: BundleArgument,
    *,
    out: MergedOutput,
    task: TasksOption = None,
    base: BaseOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """One merged model of sparse experts: at every weight, the mean over the tasks that claim it.

    It is written as a Hugging Face directory, with the base's own config and tokenizer.
    """
    write_merged(
        bundle,
        lambda opened: opened.stitch(task or None),
        out,
        name="the stitched model",
        base=base,
        overwrite=overwrite,
        as_json=as_json,
    )
