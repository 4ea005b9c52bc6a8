"""How long one expert takes to load into memory, beside loading its full checkpoint.

    python benchmarks/load.py --numel 100_000_000 [--dtypes float32 bfloat16] [--repeats 7] [--cold]
    python benchmarks/load.py --experts DIR
    python benchmarks/load.py --built DIR

--numel makes a random base and two fine-tunes of that many parameters; DIR of --experts is as for fidelity.py; DIR of
--built holds `base` and a directory a task, each with a model.safetensors. Every load runs in a forked process of its
own: its memory is new, as it is for whoever loads a model, and what one load leaves behind is no other's gain. Loads
take turns; --cold drops the files that are read from the page cache before each. The result is memory of the
process's own in every row, so that all bytes were moved.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fidelity import copy_as, run_experts
from memory import anonymous_nbytes
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tallstore import __version__, open_bundle, pack  # before a process is forked: no load is to wait for imports

WIDTH = 1024  # of a synthetic layer
REFERENCE = "safetensors, mmap + clone"
MIB = 1 << 20

State = dict[str, Tensor]


@dataclass(frozen=True)
class Loader:
    """One way to load an expert.

    Attributes:
        load: gives its tensors.
        files: that it reads.
    """

    name: str
    load: Callable[[], State]
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Measured:
    """One load: seconds, processor seconds, anonymous bytes at their peak beyond the result's."""

    wall: float
    cpu: float
    beyond: float


# --- what is loaded ---


def write_synthetic(root: Path, numel: int) -> None:
    """A random base and two fine-tunes of it, in layers of WIDTH, as safetensors in float32."""
    generator = torch.Generator().manual_seed(0)
    layers = max(1, numel // (12 * WIDTH * WIDTH))
    shapes = {"q": (1, 1), "k": (1, 1), "v": (1, 1), "o": (1, 1), "up": (4, 1), "down": (1, 4)}
    base = {
        f"layers.{layer}.{name}.weight": 0.02 * torch.randn(rows * WIDTH, columns * WIDTH, generator=generator)
        for layer in range(layers)
        for name, (rows, columns) in shapes.items()
    }
    base |= {f"layers.{layer}.norm.weight": torch.ones(WIDTH) for layer in range(layers)}
    for name, spread in (("base", 0.0), ("one", 0.002), ("two", 0.002)):
        (root / name).mkdir(parents=True)
        moved = {key: value + spread * torch.randn(value.shape, generator=generator) for key, value in base.items()}
        save_file(moved, root / name / "model.safetensors")


def prepare(checkpoints: Path, scratch: Path) -> str:
    """Pack all experts, and write one in torch's own format; that one's name."""
    tasks = sorted(path.name for path in checkpoints.iterdir() if path.is_dir() and path.name != "base")
    pack(checkpoints / "base", {task: checkpoints / task for task in tasks}, scratch / "bundle")
    torch.save(read_and_clone(checkpoints / tasks[0] / "model.safetensors"), scratch / "model.pt")
    return tasks[0]


# --- how it is loaded ---


def read_and_clone(path: Path) -> State:
    """As most do it: a view of the mapped file, copied."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - it is no mapping


def pread(path: Path) -> State:
    """Every tensor read from the file into memory of its own."""
    state = {}
    with safe_open(path, "pt") as file, path.open("rb", buffering=0) as raw:
        length = int.from_bytes(raw.read(8), "little")
        offsets = {
            name: entry["data_offsets"] for name, entry in json.loads(raw.read(length)).items() if "dtype" in entry
        }
        for name, (begin, end) in offsets.items():
            tensor = torch.empty_like(file.get_tensor(name))
            buffer, done = tensor.view(-1).view(torch.uint8).numpy().data, 0
            while done < end - begin:
                done += os.preadv(raw.fileno(), [buffer[done:]], 8 + length + begin + done)
            state[name] = tensor
    return state


def load_torch(path: Path, *, mapped: bool) -> State:
    """A file in the format of `torch.save`."""
    state = torch.load(path, mmap=mapped, weights_only=True)
    return {name: value.clone() for name, value in state.items()} if mapped else state


def load_expert(bundle: Path, base: Path, task: str, verify: str) -> State:
    """From a bundle that was not open before."""
    with open_bundle(bundle, base=base, verify=verify) as opened:
        return opened.state_dict(task)


def loaders(checkpoints: Path, scratch: Path, task: str) -> list[Loader]:
    """Everything that is compared, in the order of the table."""
    full, pickled = checkpoints / task / "model.safetensors", scratch / "model.pt"
    bundle, base = scratch / "bundle", checkpoints / "base"
    ours = (*(path for path in sorted(bundle.rglob("*")) if path.is_file()), base / "model.safetensors")
    return [
        Loader(REFERENCE, lambda: read_and_clone(full), (full,)),
        Loader("safetensors, pread", lambda: pread(full), (full,)),
        Loader("torch.load", lambda: load_torch(pickled, mapped=False), (pickled,)),
        Loader("torch.load, mmap + clone", lambda: load_torch(pickled, mapped=True), (pickled,)),
        # Other stores of weights go here: each a Loader of the same expert.
        Loader("tallstore, verify='never'", lambda: load_expert(bundle, base, task, "never"), ours),
        Loader("tallstore", lambda: load_expert(bundle, base, task, "first-read"), ours),
    ]


# --- measuring ---


def apart(work: Callable[[], Any]) -> Any:  # noqa: ANN401 - whatever JSON holds
    """What *work* returns, from a process of its own.

    This process itself computes nothing: OpenMP's threads, once begun, do not come along to a forked process.
    """
    sys.stdout.flush()
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.write(sender, json.dumps(work()).encode())
            status = 0
        except Exception:  # noqa: BLE001 - said here, and told by the status
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(sender)
    with open(receiver, "rb") as pipe:  # noqa: PTH123 - a descriptor
        raw = pipe.read()
    if os.waitpid(child, 0)[1]:
        raise SystemExit("it failed")
    return json.loads(raw)


def measure(loader: Loader, threads: int, *, watch: bool) -> Measured:
    """One load in a process of its own; *watch* reads its memory every millisecond, which costs time."""
    return Measured(*apart(lambda: measure_here(loader, threads, watch=watch)))


def measure_here(loader: Loader, threads: int, *, watch: bool) -> tuple[float, float, float]:
    """One load in this process, as `Measured` takes it."""
    torch.set_num_threads(threads)
    before = peak = anonymous_nbytes()
    done = threading.Event()

    def follow() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous_nbytes())

    watcher = threading.Thread(target=follow)
    if watch:
        watcher.start()
    cpu, begun = time.process_time(), time.perf_counter()
    state = loader.load()
    wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
    peak = max(peak, anonymous_nbytes())
    if watch:
        done.set()
        watcher.join()
    return wall, cpu, peak - before - sum(tensor.nbytes for tensor in state.values())


def forget(files: tuple[Path, ...]) -> None:
    """Drop the files from the page cache."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def rounds(compared: list[Loader], repeats: int, threads: int, *, cold: bool) -> dict[str, list[Measured]]:
    """Every loader *repeats* times, in turns."""
    found: dict[str, list[Measured]] = {loader.name: [] for loader in compared}
    for turn in range(repeats + 1):
        for loader in compared:
            if cold:
                forget(loader.files)
            measured = measure(loader, threads, watch=False)
            if turn:  # the first brings the files into the cache
                found[loader.name].append(measured)
    return found


def table(compared: list[Loader], repeats: int, threads: int, *, cold: bool) -> Iterator[str]:
    """The lines of one table."""
    found = rounds(compared, repeats, threads, cold=cold)
    reference = [measured.wall for measured in found[REFERENCE]]
    yield "| | median ms | against the first | lowest, highest ratio of a turn | processor ms | MiB beyond the result |"
    yield "|---|---|---|---|---|---|"
    for loader in compared:
        walls = [measured.wall for measured in found[loader.name]]
        ratios = sorted(wall / first for wall, first in zip(walls, reference, strict=True))
        cpu = statistics.median(measured.cpu for measured in found[loader.name])
        beyond = measure(loader, threads, watch=True).beyond
        yield (
            f"| {loader.name} | {1e3 * statistics.median(walls):.1f} | {statistics.median(ratios):.2f} |"
            f" {ratios[0]:.2f}, {ratios[-1]:.2f} | {1e3 * cpu:.1f} | {max(0, beyond) / MIB:.0f} |"
        )


@contextlib.contextmanager
def built(arguments: argparse.Namespace) -> Iterator[Path]:
    """The float32 checkpoints that were asked for."""
    with tempfile.TemporaryDirectory(prefix="tallstore-load-") as name:
        checkpoints = arguments.built or Path(name) / "float32"
        if arguments.numel:
            apart(lambda: write_synthetic(checkpoints, arguments.numel))
        elif arguments.experts:
            run_experts(arguments.experts, "build", str(checkpoints))
        yield checkpoints


def main() -> None:
    """Make or find the experts, load them every way, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--numel", type=int, metavar="N", help="parameters of a synthetic model")
    source.add_argument("--experts", type=Path, metavar="DIR", help="with experts.py and the fine-tunes")
    source.add_argument("--built", type=Path, metavar="DIR", help="checkpoints in float32")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=7, help="5 or more")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cold", action="store_true", help="also with nothing in the page cache")
    arguments = parser.parse_args()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, tallstore {__version__}"
    print(f"{os.cpu_count()} processors, {arguments.threads} threads; {versions}", flush=True)
    with built(arguments) as checkpoints:
        for dtype in arguments.dtypes:
            with tempfile.TemporaryDirectory(prefix="tallstore-load-") as name:
                scratch, cast = Path(name), checkpoints
                if dtype != "float32":
                    cast = scratch / dtype
                    apart(partial(copy_as, getattr(torch, dtype), checkpoints, cast))
                task = apart(partial(prepare, cast, scratch))
                compared = loaders(cast, scratch, task)
                for cold in (False, True)[: 1 + arguments.cold]:
                    print(f"\n{dtype}, {'cold' if cold else 'warm'}\n")
                    for line in table(compared, arguments.repeats, arguments.threads, cold=cold):
                        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
