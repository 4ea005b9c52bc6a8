"""`tallstore push`."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from tallstore.cli.options import BundleArgument, JsonOption

USAGE: Final = "BUNDLE ORG/NAME [OPTIONS]"
EXAMPLES: Final = """\
# a bundle to the Hub; again after a task was added: only what is new is sent
tallstore push bundle me/experts --private
# what would be sent and deleted
tallstore push bundle me/experts --dry-run
# a proposal to somebody else's repository
tallstore push bundle them/experts --create-pr --message 'Two more tasks'"""


def push(
    bundle: BundleArgument,
    repo_id: Annotated[
        str,
        typer.Argument(metavar="ORG/NAME", help="The repository; made where it is not there.", show_default=False),
    ],
    *,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[
        str | None,
        typer.Option(metavar="BRANCH", help="The branch, main unless given; made from main.", show_default=False),
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of committing to the branch.")
    ] = False,
    message: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The commit's message.", show_default=False)
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN",
            help="Of the Hub; unless given, the one of HF_TOKEN or `hf auth login`, which nobody else here can see.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Push over a bundle of another base or format, or beside files of no bundle."),
    ] = False,
    plots: Annotated[
        bool, typer.Option("--plots/--no-plots", help="Show plots on the model card, where matplotlib is installed.")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be uploaded and deleted; change nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Push a bundle to the Hugging Face Hub: verified, as one commit, and only what the repository lacks."""
    from tallstore.cli import progress_bar, terminal  # noqa: PLC0415 - rich
    from tallstore.cli.views.pushed import as_plain, print_plan, print_pushed  # noqa: PLC0415 - numpy
    from tallstore.hub.pushing import carry_out, plan  # noqa: PLC0415

    with progress_bar.show("checking") as progress:
        planned = plan(
            bundle,
            repo_id,
            private=private or None,
            token=token,
            revision=revision,
            create_pr=create_pr,
            overwrite=overwrite,
            plots=plots,
            progress=progress,
        )
    commit = None if dry_run else carry_out(planned, message)
    if as_json:
        terminal.print_json(as_plain(planned, commit))
    elif commit is None:
        print_plan(planned)
    else:
        print_pushed(planned, commit)
