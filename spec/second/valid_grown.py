"""Valid vectors of bundles that grew: groups were added and removed, and their numbers tell."""

from __future__ import annotations

from collections.abc import Callable

from second.models import Group, Task, assemble
from second.valid import Valid, sides, small_base, small_group


def grown() -> Valid:
    """Three groups of more that were: numbers with gaps, slugs with the group's id, a companion file of two groups."""
    base = small_base()
    first, third, last = small_group(base, 1), small_group(base, 3), Group(base, 12_345, "uniform")
    tasks = [
        Task(first, "kept"),
        Task(first, "Kept g0003", "kept-g0003-g0001"),
        Task(third, "added", "added-g0003"),
        Task(third, "kept ", "kept-g0003"),
        Task(last, "packed again", "packed-again-g12345"),
    ]
    for task in tasks[:-1]:
        task.signed("a", sides(task.name, base.tensor("a")))
        task.same("b")
        task.dropped("c")
    for name in base.tensors:
        tasks[-1].uniform(name, sides(name, base.tensor(name)) + 1, 3, gain=0.25)
    for task in (tasks[0], tasks[-1]):
        task.companions["config.json"] = b'{"labels": 10}\n'
    draft = assemble(base, [first, third, last], tasks)
    draft.manifest["next_group"] = 12_347
    return Valid(draft, "MAN-2 MAN-3 MAN-6 PATH-1")


def last_group() -> Valid:
    """A bundle with the last group that there can be: its next_group is the number of none."""
    base = small_base()
    group = small_group(base, 9_999_999)
    task = Task(group, "t", "t-g9999999")
    for name in base.tensors:
        task.signed(name, sides(name, base.tensor(name)))
    return Valid(assemble(base, [group], [task]), "LIM-1 MAN-6")


VALID_GROWN: dict[str, Callable[[], Valid]] = {"grown": grown, "last-group": last_group}
