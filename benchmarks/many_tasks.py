"""How the time of what people do with a bundle grows with the number of its tasks.

    python benchmarks/many_tasks.py [--tasks 10,100,1000] [--tensors 4] [--repeats 9]

Bundles of so many tiny fine-tunes of one base are packed, the base included: tensors of 4,096 elements, the fewest that
are coded, so that what grows is not hidden behind weights. Every call opens the bundle anew; `add` and `remove` change
it and put it back. Commands are timed as whole processes, on a bundle of one task too: that is their start-up. Files
are in the page cache, calls in this process. Medians, and their ratios to those of the bundle with the fewest tasks.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

import tallstore
from tallstore.cli.completion import task_names
from tallstore.format import layout

SIDE = 64  # of a tensor
TASK = "task-{:05d}"

Model = dict[str, Tensor]


def models(tensors: int) -> Iterator[Model]:
    """A base, and then fine-tunes of it without end."""
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{layer}": torch.randn(SIDE, SIDE, generator=generator) for layer in range(tensors)}
    yield base
    while True:
        yield {name: value + 0.01 * torch.randn(value.shape, generator=generator) for name, value in base.items()}


def write_bundle(path: Path, count: int, tensors: int) -> float:
    """Pack *count* tasks; seconds."""
    base, *experts = itertools.islice(models(tensors), count + 1)
    begun = time.perf_counter()
    tallstore.pack(base, {TASK.format(place): model for place, model in enumerate(experts)}, path, embed_base=True)
    return time.perf_counter() - begun


def calls(path: Path, count: int, tensors: int) -> dict[str, Callable[[], object]]:
    """What is timed in this process."""
    task = TASK.format(count // 2)
    _, new = itertools.islice(models(tensors), 2)
    many = {f"new-{number}": new for number in range(4)}
    opened = tallstore.open_bundle(path)
    opened.state_dict(task)
    context = SimpleNamespace(params={"bundle": str(path)}, args=[])
    return {
        "`open_bundle`": lambda: tallstore.open_bundle(path),
        "`open_bundle(…).tasks`": lambda: tallstore.open_bundle(path).tasks,
        "`open_bundle(…).state_dict(task)`": lambda: tallstore.open_bundle(path).state_dict(task),
        "`bundle.state_dict(task)`, opened before": lambda: opened.state_dict(task),
        "`print(bundle)`": lambda: str(opened),
        "a bundle in a notebook": opened._repr_html_,
        "completing a task's name": lambda: task_names(context, "task-0000"),
        "`add` of a task, and `remove` of it": lambda: (
            tallstore.add(path, {"new": new}),
            tallstore.remove(path, ["new"]),
        ),
        "`add` of four tasks, and `remove` of them": lambda: (
            tallstore.add(path, many),
            tallstore.remove(path, list(many)),
        ),
    }


def commands(path: Path, count: int) -> dict[str, Callable[[], object]]:
    """What is timed as whole processes."""
    words = {
        "`tallstore inspect`": ["inspect", str(path)],
        "`tallstore inspect --json`": ["inspect", str(path), "--json"],
        "`tallstore inspect --task`": ["inspect", str(path), "--task", TASK.format(count // 2)],
    }
    return {name: lambda line=line: process(line) for name, line in words.items()}


def process(line: list[str]) -> None:
    """A command, whose output nobody reads."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run([sys.executable, "-m", "tallstore", *line], check=True, stdout=subprocess.DEVNULL, env=environment)


def median(call: Callable[[], object], repeats: int) -> float:
    """Milliseconds of a call that was made once before."""
    call()
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    return 1e3 * statistics.median(seconds)


def main() -> None:
    """Pack the bundles, time all of it, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="10,100,1000", help="numbers of tasks, ascending")
    parser.add_argument("--tensors", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.tasks.split(",")]
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, tallstore {tallstore.__version__}"
    print(f"{os.cpu_count()} processors; {versions}; medians of {arguments.repeats}\n", flush=True)
    columns: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="tallstore-") as name:
        for count in counts:
            path = Path(name) / str(count)
            packed = write_bundle(path, count, arguments.tensors)
            found = {
                way: median(call, arguments.repeats)
                for way, call in (calls(path, count, arguments.tensors) | commands(path, count)).items()
            }
            manifest = (path / layout.MANIFEST).stat().st_size / 1e3
            columns.append(found | {"`pack` of all, a task": 1e3 * packed / count, "tallstore.json, kB": manifest})
    headings = [f"{count:,} tasks" for count in counts]
    print(f"| milliseconds | {' | '.join(headings)} |\n|---|{'---|' * len(counts)}")
    for way in columns[0]:
        first = columns[0][way]
        cells = [f"{first:.1f}", *(f"{column[way]:.1f} ({column[way] / first:.1f})" for column in columns[1:])]
        print(f"| {way} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
