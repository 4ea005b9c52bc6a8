"""How long a bundle of many tasks takes to open and to list, and how long the command line takes to start.

    python benchmarks/opening.py [--tasks 1000] [--tensors 400] [--repeats 9]

A base and two fine-tunes of as many tensors of 4,096 elements, the fewest that are coded, are packed; the bundle of
many tasks is that one, its second task listed again and again under other names. Calls are timed in forked processes
that have imported tallstore and nothing else done, one process a call, files in the page cache; commands as whole
processes, in turns. `inspect` of a bundle of two tasks is its start-up; of the large one, it reads the table of every
task, which `open_bundle` does not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import msgspec
import torch
from apart import apart
from safetensors.torch import load_file, save_file

from tallstore import Bundle, __version__, files, open_bundle, pack
from tallstore.format import layout, manifest, parsing

NUMEL = 4096
TASK = "task-{:04d}"
Seconds = tuple[float, float]  # of the clock, and of processors

PYTHON = "python -c 'import numpy'"


# --- bundles ---


def write_checkpoints(root: Path, tensors: int) -> None:
    """A base and two fine-tunes of it as safetensors, in float32."""
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{layer}.weight": torch.randn(NUMEL // 64, 64, generator=generator) for layer in range(tensors)}
    for name in ("base", "first", TASK.format(0)):
        moved = {key: value + 0.01 * torch.randn(value.shape, generator=generator) for key, value in base.items()}
        save_file(base if name == "base" else moved, root / f"{name}.safetensors")


def write_bundles(root: Path, tasks: int, tensors: int) -> None:
    """The checkpoints, a bundle `small` of two of them, and `large` of *tasks* tasks."""
    write_checkpoints(root, tensors)
    experts = {name: root / f"{name}.safetensors" for name in ("first", TASK.format(0))}
    for name in ("small", "large"):
        pack(root / "base.safetensors", experts, root / name)
    multiply(root / "large", TASK.format(0), tasks - len(experts))


def multiply(bundle: Path, task: str, copies: int) -> None:
    """List *task* again as often, each time with a directory of its own whose shards are links to the first's."""
    old = parsing.parse_manifest((bundle / layout.MANIFEST).read_bytes(), layout.MANIFEST)
    entry = next(entry for entry in old.tasks if entry.name == task)
    raw = (bundle / layout.task_table(entry.slug)).read_bytes()
    table = parsing.parse(raw, manifest.TaskTable, "task.json")
    own = f"{layout.task_directory(entry.slug)}/"
    shards = [file for file in old.files if file.path.startswith(own) and file.path.endswith(".safetensors")]
    entries, listed = list(old.tasks), {file.path: file for file in old.files}
    for number in range(1, copies + 1):
        name = TASK.format(number)
        renamed = {"name": name, "slug": layout.slugify(name, ())}
        directory = layout.task_directory(renamed["slug"])
        (bundle / directory).mkdir()
        for file in shards:
            path = file.path.replace(own, f"{directory}/")
            os.link(bundle / file.path, bundle / path)
            listed[path] = msgspec.structs.replace(file, path=path)
        path, copied = f"{directory}/task.json", parsing.serialise(msgspec.structs.replace(table, **renamed))
        (bundle / path).write_bytes(copied)
        file = files.hash_file(bundle / path)
        listed[path] = manifest.FileEntry(path=path, size=file.size, sha256=file.sha256, git_oid=file.git_oid)
        entries.append(msgspec.structs.replace(entry, **renamed))
    grown = msgspec.structs.replace(old, tasks=tuple(entries), files=tuple(listed[path] for path in sorted(listed)))
    (bundle / layout.MANIFEST).write_bytes(parsing.serialise_manifest(grown))


# --- calls ---


def clocked(call: Callable[[], object], processor: Callable[[], float] = time.process_time) -> Seconds:
    """A call in this process."""
    cpu, begun = processor(), time.perf_counter()
    call()
    return time.perf_counter() - begun, processor() - cpu


def first_call(bundle: Path, base: Path, call: Callable[[Bundle], object]) -> Seconds:
    """The first call on a bundle that was just opened."""
    with open_bundle(bundle, base=base) as opened:
        return clocked(lambda: call(opened))


def later_task(bundle: Path, base: Path, tasks: int) -> Seconds:
    """An expert when another one was rebuilt before."""
    with open_bundle(bundle, base=base) as opened:
        opened.state_dict(TASK.format(0))
        return clocked(lambda: opened.state_dict(TASK.format(tasks - 2)))


def calls(root: Path, tasks: int) -> dict[str, Callable[[], Seconds]]:
    """What is timed in forked processes."""
    large, base, last = root / "large", root / "base.safetensors", TASK.format(tasks - 2)
    return {
        "`json.loads` of tallstore.json": lambda: clocked(lambda: json.loads((large / layout.MANIFEST).read_bytes())),
        "`open_bundle`": lambda: clocked(lambda: open_bundle(large, base=base)),
        "`bundle.tasks`, first call": lambda: first_call(large, base, lambda bundle: bundle.tasks),
        "`bundle.keys(task)`, first call": lambda: first_call(large, base, lambda bundle: bundle.keys(last)),
        "`bundle.state_dict(task)`, first call": lambda: first_call(
            large, base, lambda bundle: bundle.state_dict(last)
        ),
        "`bundle.state_dict(task)` of a second task": lambda: later_task(large, base, tasks),
        "safetensors `load_file` of one full checkpoint": lambda: clocked(lambda: load_file(base)),
    }


# --- commands ---


def commands(root: Path, tasks: int) -> dict[str, list[str]]:
    """What is timed as whole processes."""
    tallstore = [sys.executable, "-m", "tallstore"]
    return {
        PYTHON: [sys.executable, "-c", "import numpy"],
        "python -c pass": [sys.executable, "-c", "pass"],
        "tallstore --version": [*tallstore, "--version"],
        "tallstore inspect, 2 tasks": [*tallstore, "inspect", str(root / "small")],
        "tallstore inspect --json, 2 tasks": [*tallstore, "inspect", "--json", str(root / "small")],
        "tallstore inspect --task": [*tallstore, "inspect", str(root / "small"), "--task", "first"],
        f"tallstore inspect, {tasks:,} tasks": [*tallstore, "inspect", str(root / "large")],
    }


def of_children() -> float:
    """Processor seconds of all processes that were waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run(command: list[str]) -> Seconds:
    """A whole process, whose modules are compiled already, as they are wherever they were installed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return clocked(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment), of_children)


# --- measuring ---


def rounds(ways: Mapping[str, Callable[[], Seconds]], repeats: int) -> dict[str, list[Seconds]]:
    """Every way *repeats* times, in turns; the first turn fills the caches and is not counted."""
    found: dict[str, list[Seconds]] = {way: [] for way in ways}
    for turn in range(repeats + 1):
        for way, measure in ways.items():
            seconds = measure()
            if turn:
                found[way].append(seconds)
    return found


def row(way: str, seconds: list[Seconds], against: list[Seconds] | None) -> str:
    """A line of a table; the ratio is the median of those within a turn."""
    walls, cpus = zip(*seconds, strict=True)
    cells = [way, milliseconds(statistics.median(walls)), f"{milliseconds(min(walls))}, {milliseconds(max(walls))}"]
    if against is not None:
        cells.append(f"{statistics.median(wall / of[0] for wall, of in zip(walls, against, strict=True)):.2f}")
    return f"| {' | '.join([*cells, milliseconds(statistics.median(cpus))])} |"


def milliseconds(seconds: float) -> str:
    """With one decimal."""
    return f"{1e3 * seconds:.1f}"


def main() -> None:
    """Make the bundles, time calls and commands, print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=1000, help="3 or more")
    parser.add_argument("--tensors", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=9, help="5 or more")
    arguments = parser.parse_args()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, tallstore {__version__}"
    print(f"{os.cpu_count()} processors; {versions}; medians of {arguments.repeats}", flush=True)
    with tempfile.TemporaryDirectory(prefix="tallstore-opening-") as name:
        root = Path(name)
        apart(partial(write_bundles, root, arguments.tasks, arguments.tensors))
        size = (root / "large" / layout.MANIFEST).stat().st_size
        print(f"{arguments.tasks:,} tasks, {arguments.tensors} tensors each, a manifest of {size / 1e6:.2f} MB\n")
        print("| call | median ms | lowest, highest | processor ms |\n|---|---|---|---|")
        timed = {way: partial(apart, call) for way, call in calls(root, arguments.tasks).items()}
        for way, seconds in rounds(timed, arguments.repeats).items():
            print(row(way, seconds, None), flush=True)
        print(f"\n| process | median ms | lowest, highest | against {PYTHON} | processor ms |\n|---|---|---|---|---|")
        timed = {way: partial(run, command) for way, command in commands(root, arguments.tasks).items()}
        found = rounds(timed, arguments.repeats)
        for way, seconds in found.items():
            print(row(way, seconds, found[PYTHON]), flush=True)


if __name__ == "__main__":
    main()
