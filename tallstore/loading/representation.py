"""A bundle as it shows itself: in a line, in a few lines of text, or as a table in a notebook.

A number that cannot be had, since files are elsewhere, changed or damaged, is left out: to show a bundle is no error.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from tallstore.errors import TallstoreError
from tallstore.format import layout
from tallstore.format.bundle_files import BundleFiles
from tallstore.format.manifest import TaskEntry, TaskTable
from tallstore.inspecting.summary import Tables
from tallstore.notebook import MAX_ROWS, html_table, number
from tallstore.sizes import readable

_NAMES_IN_A_LINE: Final = 4
_SHORT_HASH: Final = 12


def in_a_line(bundle: BundleFiles) -> str:
    """Path, the first tasks, size. Reads nothing."""
    names = [task.name for task in bundle.manifest.tasks[:_NAMES_IN_A_LINE]]
    more = ", …" if len(bundle.manifest.tasks) > len(names) else ""
    return f"<Bundle {bundle.where!r}: {_count(bundle)} ({', '.join(names)}{more}), {readable(_nbytes(bundle))}>"


def in_lines(bundle: BundleFiles) -> str:
    """What the bundle is, and a line a task for the first of them. Reads nothing, but looks which files are here."""
    sizes, shown = _sizes(bundle), bundle.manifest.tasks[:MAX_ROWS]
    tasks = (f"  {task.name}: {', '.join(_task_facts(bundle, task, sizes))}" for task in shown)
    return "\n".join([*_facts(bundle, sizes), *tasks, *(f"  {note}" for note in _more(bundle))])


def as_html(bundle: BundleFiles) -> str:
    """The same as a table, with the bits that a parameter costs: reads the task.json of the tasks that are shown."""
    sizes, shown = _sizes(bundle), bundle.manifest.tasks[:MAX_ROWS]
    bits = _bits(bundle, shown)
    rows = [
        (
            task.name,
            readable(sizes[layout.task_directory(task.slug)]),
            number(bits.get(task.name), 2),
            number(task.cosine, 4),
            number(task.gain, 4),
        )
        for task in shown
    ]
    absent = [task.name for task in shown if not bundle.is_fetched(task.name)]
    notes = [*_more(bundle), *([f"not fetched: {', '.join(absent)}"] if absent else [])]
    return html_table(_facts(bundle, sizes), ("task", "size", "bits", "cosine", "gain"), rows, notes)


def _facts(bundle: BundleFiles, sizes: Mapping[str, int]) -> list[str]:
    manifest = bundle.manifest
    shared, tasks, base = (
        sum(size for directory, size in sizes.items() if f"{directory}/".startswith(place))
        for place in ("groups/", "tasks/", f"{layout.BASE_DIRECTORY}/")
    )
    parts = [f"{readable(shared)} shared"]
    if manifest.tasks:
        parts.append(f"{readable(tasks / len(manifest.tasks))} a task")
    if base:
        parts.append(f"{readable(base)} of the base")
    methods = dict.fromkeys(group.method.name for group in manifest.groups)
    return [
        f"bundle {bundle.where}: {_count(bundle)}, {readable(_nbytes(bundle))} ({', '.join(parts)})",
        f"{', '.join(methods) or 'no group'}; base {_base(bundle)}; format {manifest.format_version}",
    ]


def _task_facts(bundle: BundleFiles, task: TaskEntry, sizes: Mapping[str, int]) -> Iterable[str]:
    yield readable(sizes[layout.task_directory(task.slug)])
    if task.cosine is None or task.gain is None:
        yield "nothing coded"
    else:
        yield f"cosine {task.cosine:.4f}"
        yield f"gain {task.gain:.4f}"
    if not bundle.is_fetched(task.name):
        yield "not fetched"


def _more(bundle: BundleFiles) -> list[str]:
    count = len(bundle.manifest.tasks) - MAX_ROWS
    return [f"and {count} more in bundle.tasks"] if count > 0 else []


def _count(bundle: BundleFiles) -> str:
    count = len(bundle.manifest.tasks)
    return f"{count} task{'' if count == 1 else 's'}"


def _base(bundle: BundleFiles) -> str:
    pin = bundle.manifest.base
    if pin.repo_id is None:
        return "in the bundle" if pin.embedded else "neither in the bundle nor named"
    revision = "" if pin.revision is None else f"@{pin.revision[:_SHORT_HASH]}"
    return f"{pin.repo_id}{revision}{', in the bundle' if pin.embedded else ''}"


def _sizes(bundle: BundleFiles) -> Counter[str]:
    """Bytes of the listed files by directory."""
    sizes = Counter[str]()
    for file in bundle.manifest.files:
        sizes[file.path.rpartition("/")[0]] += file.size
    return sizes


def _nbytes(bundle: BundleFiles) -> int:
    """All files, here or not: those that the manifest lists, and the manifest."""
    nbytes = sum(file.size for file in bundle.manifest.files)
    with contextlib.suppress(OSError):
        nbytes += (bundle.root / layout.MANIFEST).stat().st_size
    return nbytes


def _bits(bundle: BundleFiles, tasks: Sequence[TaskEntry]) -> Mapping[str, float]:
    """Bits of a coded parameter by task, its share of the shared vectors included, where they are known."""
    bits: dict[str, float] = {}
    with contextlib.suppress(TallstoreError, OSError):
        tables = Tables(bundle.root)
        if tables.manifest.manifest_sha256 != bundle.manifest.manifest_sha256:
            return bits  # another bundle was written there
        for task in tasks:
            with contextlib.suppress(TallstoreError, OSError):
                table = tables.read(layout.task_table(task.slug), TaskTable)
                found = tables.costs.bits(table)
                if found is not None:
                    bits[task.name] = found
    return bits
