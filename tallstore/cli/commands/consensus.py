"""`tallstore consensus`."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from tallstore.cli.merged_model import MergedOutput, write_merged
from tallstore.cli.options import BaseOption, BundleArgument, JsonOption, OverwriteOption, TasksOption

USAGE: Final = "BUNDLE --out DIR [OPTIONS]"
EXAMPLES: Final = """\
# one model for all tasks of a bundle of --method tall-mask
tallstore consensus bundle --base bert --out merged
# only what three tasks agree on, at a third
tallstore consensus bundle --base bert --out agreed --k 3 --scale 0.33"""


def consensus(
    bundle: BundleArgument,
    *,
    out: MergedOutput,
    k: Annotated[int, typer.Option("--k", metavar="K", help="How many of the tasks' masks must claim a weight.")] = 2,
    scale: Annotated[
        float,
        typer.Option(
            metavar="X",
            help="What the merged vector is multiplied by; best chosen on validation data.",
        ),
    ] = 1.0,
    task: TasksOption = None,
    base: BaseOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """One merged model: what at least K masks claim of the merged vector (Consensus Merging).

    It is written as a Hugging Face directory, with the base's own config and tokenizer.
    """
    write_merged(
        bundle,
        lambda opened: opened.consensus(k, scale, task or None),
        out,
        name="the consensus",
        base=base,
        overwrite=overwrite,
        as_json=as_json,
    )
