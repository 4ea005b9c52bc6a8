"""`push`: what would go where, or what went."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from tallstore.cli import terminal
from tallstore.cli.figures import several
from tallstore.cli.tables import Column, print_table
from tallstore.format.manifest import FileEntry
from tallstore.hub.planning import PushPlan
from tallstore.sizes import readable

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


def print_plan(plan: PushPlan) -> None:
    """What a push would do, a row a file that it would upload or delete."""
    console = terminal.output()
    changes = plan.changes
    made = "" if plan.head is not None else " (to be made)"
    if plan.head is not None and plan.head.is_new_branch:
        made = " (a branch to be made)"
    console.print(f"{plan.repository.where}{made}: {_counts(plan)}", soft_wrap=True)
    rows = [("upload", file) for file in changes.upload]
    gone = [("delete", file) for file in changes.delete]
    if rows or gone:
        print_table(
            console,
            [
                Column("", [verb for verb, _ in rows + gone], "text"),
                Column("file", [file.path for _, file in rows + gone], "name", widest=100),
                Column("size", [readable(file.size) for _, file in rows + gone]),
            ],
        )
    _print_no_plots(plan)
    console.print(Text("nothing was changed: a dry run", "dim"))


def print_pushed(plan: PushPlan, commit: CommitInfo) -> None:
    """What went where, and how to open it."""
    console = terminal.output()
    if plan.changes.is_empty:
        console.print(f"{plan.repository.where}: nothing to push, the repository has all of it", soft_wrap=True)
    else:
        console.print(f"pushed to {plan.repository.where}: {_counts(plan, done=True)}", soft_wrap=True)
    _print_no_plots(plan)
    console.print(commit.pr_url or commit.commit_url, soft_wrap=True)


def as_plain(plan: PushPlan, commit: CommitInfo | None) -> dict[str, Any]:
    """The same as plain JSON types."""

    def listed(files: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - of two classes
        return [{"path": file.path, "size": file.size} for file in files]

    changes = plan.changes
    return {
        "repo_id": plan.repository.id,
        "revision": plan.repository.revision,
        "upload": listed(changes.upload),
        "keep": listed(changes.keep),
        "delete": listed(changes.delete),
        "no_plots": plan.no_plots,
        "commit": None if commit is None else commit.oid,
        "commit_url": None if commit is None else commit.commit_url,
        "pr_url": None if commit is None else commit.pr_url,
    }


def _print_no_plots(plan: PushPlan) -> None:
    if plan.request.plots and plan.no_plots is not None:
        terminal.output().print(Text(f"no plots on the card: {plan.no_plots}", "dim"), soft_wrap=True)


def _counts(plan: PushPlan, *, done: bool = False) -> str:
    """How much goes, or went."""
    changes = plan.changes
    to, uploaded, deleted = ("", "uploaded", "deleted") if done else ("to ", "upload", "delete")
    parts = [f"{_amount(changes.upload)} {to}{uploaded}", f"{_amount(changes.keep)} there already"]
    if changes.delete:
        parts.append(f"{several(len(changes.delete), 'file')} {to}{deleted}")
    return ", ".join(parts)


def _amount(files: Sequence[FileEntry]) -> str:
    return f"{several(len(files), 'file')} ({readable(sum(file.size for file in files))})"
