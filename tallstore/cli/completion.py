"""What a shell completes beyond commands and options: the names of a bundle's tasks."""

from __future__ import annotations

import os
import re
from typing import Any

from tallstore.errors import TallstoreError

_SPECIAL_IN_BASH = re.compile(r"[^\w%+,./:=@^-]")


def task_names(ctx: Any, incomplete: str) -> list[str]:  # noqa: ANN401 - each version of typer has its click elsewhere
    """The tasks of the bundle that the line names so far, those that begin with *incomplete*.

    Reads the manifest. Whatever is wrong with it, there is nothing to complete: a shell is no place for errors.
    """
    from tallstore.hub.pinned import Access  # noqa: PLC0415 - most completions need none
    from tallstore.hub.snapshot import find  # noqa: PLC0415
    from tallstore.inspecting.summary import Tables  # noqa: PLC0415

    # Behind an option that waits for its value, arguments are not parsed yet.
    bundle = ctx.params.get("bundle") or next(iter(ctx.args), None)
    if bundle is None:
        return []
    try:
        root, _ = find(bundle, Access(local_files_only=True))  # a key that was pressed is no reason to ask the Hub
        tasks = Tables(root).manifest.tasks
    except (TallstoreError, OSError):
        return []
    return [_as_typed(task.name, incomplete) for task in tasks if task.name.startswith(incomplete)]


def _as_typed(name: str, incomplete: str) -> str:
    """The name as it has to stand in the line: bash, alone of all, inserts what it is given as it is."""
    is_quoted = _SPECIAL_IN_BASH.search(incomplete) is not None
    if os.environ.get("_TALLSTORE_COMPLETE") != "complete_bash" or is_quoted:
        return name
    return _SPECIAL_IN_BASH.sub(lambda found: f"\\{found[0]}", name)
