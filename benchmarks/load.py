"""How long one expert takes to load into memory, beside loading its full checkpoint, in our files and in others'.

    pip install tensorizer==2.12.1 zipnn==0.5.4 flashpack==0.4.5 deltatensors==0.2.0 runai-model-streamer==0.17.0
    python benchmarks/load.py --numel 100_000_000 [--dtypes float32 bfloat16] [--repeats 7] [--cold] [--only TEXT]
    python benchmarks/load.py --experts DIR
    python benchmarks/load.py --built DIR

--numel makes a random base and two fine-tunes of that many parameters; DIR of --experts is as for fidelity.py; DIR of
--built holds `base` and a directory a task, each with a model.safetensors. Every load runs in a forked process of its
own: its memory is new, as it is for whoever loads a model, and what one load leaves behind is no other's gain. Loads
take turns; --cold drops the files that are read from the page cache before each, and adds a second expert, whose own
files are dropped while those that experts share are not. The result is memory of the process's own in every row, of
the checkpoint's dtypes, so that all bytes were moved. Where llvmlite is installed, our bundle is decoded by compiled
functions, if it is large: "compiled before" leaves out the time to load LLVM and compile them. A library that is not
installed, or whose load fails, is left out, with a line that says so.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from apart import apart
from fidelity import copy_as, run_experts
from memory import anonymous_nbytes
from peer_formats import FORMATS, Format, State, missing, release, weights
from safetensors import safe_open
from safetensors.torch import save_file

# Before a process is forked: no load is to wait for imports.
from tallstore import Bundle, Sign, SignedMask, TallMask, __version__, open_bundle, pack
from tallstore.fit import Method

WIDTH = 1024  # of a synthetic layer
REFERENCE = "safetensors, mmap + clone"
MIB = 1 << 20
METHODS: dict[str, Method] = {"signed-mask": SignedMask(), "tall-mask": TallMask(), "sign": Sign()}
PACKAGES = ("safetensors", "llvmlite", *dict.fromkeys(chosen.package for chosen in FORMATS))


@dataclass(frozen=True)
class Loader:
    """One way to load an expert.

    Attributes:
        start: gets ready, and gives the load itself, whose result is the expert's tensors.
        files: that it reads, and that are dropped from the page cache where loads are cold.
        kept: that it reads, and that are in the page cache all the same.
    """

    name: str
    start: Callable[[], Callable[[], State]]
    files: tuple[Path, ...]
    kept: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Measured:
    """One load: seconds, processor seconds, anonymous bytes at their peak beyond the result's."""

    wall: float
    cpu: float
    beyond: float


@dataclass(frozen=True)
class Place:
    """Where checkpoints, our bundle and others' files are.

    Attributes:
        checkpoints: a directory of `base`, and one of each task, each with a model.safetensors.
        scratch: a directory for all other files.
        tasks: the first one's expert is loaded, and the second one's after it.
    """

    checkpoints: Path
    scratch: Path
    tasks: tuple[str, ...]

    @property
    def base(self) -> Path:
        """The base's directory."""
        return self.checkpoints / "base"

    @property
    def expert(self) -> Path:
        """The first expert's directory."""
        return self.checkpoints / self.tasks[0]

    @property
    def bundle(self) -> Path:
        """Our bundle."""
        return self.scratch / "bundle"

    @property
    def pickled(self) -> Path:
        """The first expert in the format of `torch.save`."""
        return self.scratch / "model.pt"

    def in_format(self, chosen: Format) -> Path:
        """The first expert in another library's format."""
        return self.scratch / chosen.file

    def own_files(self, task: str) -> tuple[Path, ...]:
        """What of our bundle is *task*'s alone."""
        with open_bundle(self.bundle) as bundle:
            slug = next(entry.slug for entry in bundle.manifest.tasks if entry.name == task)
        return tuple(path for path in sorted((self.bundle / "tasks" / slug).iterdir()))

    def shared_files(self) -> tuple[Path, ...]:
        """What every expert of our bundle needs."""
        tables = tuple(self.bundle.glob("*.json"))
        return (*tables, *(path for path in sorted(self.bundle.glob("groups/*/*"))), weights(self.base))


# --- what is loaded ---


def write_synthetic(root: Path, numel: int, tasks: int = 2) -> None:
    """A random base and fine-tunes of it, in layers of WIDTH, as safetensors in float32."""
    generator = torch.Generator().manual_seed(0)
    layers = max(1, numel // (12 * WIDTH * WIDTH))
    shapes = {"q": (1, 1), "k": (1, 1), "v": (1, 1), "o": (1, 1), "up": (4, 1), "down": (1, 4)}
    base = {
        f"layers.{layer}.{name}.weight": 0.02 * torch.randn(rows * WIDTH, columns * WIDTH, generator=generator)
        for layer in range(layers)
        for name, (rows, columns) in shapes.items()
    }
    base |= {f"layers.{layer}.norm.weight": torch.ones(WIDTH) for layer in range(layers)}
    for name, spread in (("base", 0.0), *((f"task-{number}", 0.002) for number in range(tasks))):
        (root / name).mkdir(parents=True)
        moved = {key: value + spread * torch.randn(value.shape, generator=generator) for key, value in base.items()}
        save_file(moved, root / name / "model.safetensors")


def tasks_in(checkpoints: Path) -> tuple[str, ...]:
    """All names but the base's."""
    return tuple(sorted(path.name for path in checkpoints.iterdir() if path.is_dir() and path.name != "base"))


def prepare(place: Place, method: str) -> None:
    """Pack all experts, and write the first in torch's own format."""
    experts = {task: place.checkpoints / task for task in place.tasks}
    pack(place.base, experts, place.bundle, method=METHODS[method])
    torch.save(read_and_clone(weights(place.expert)), place.pickled)


def prepare_formats(place: Place, wanted: str) -> Iterator[Format]:
    """Write the first expert in each format of a name with *wanted* in it; those that could be written."""
    for chosen in (chosen for chosen in FORMATS if wanted in chosen.name):
        reason = missing(chosen.name, chosen.package)
        if reason is None and not place.in_format(chosen).exists():
            try:
                apart(lambda chosen=chosen: chosen.write(place.expert, place.base, place.in_format(chosen)))
            except SystemExit:
                reason = f"{chosen.name}: left out, {release(chosen.package)} could not write the expert"
        if reason is None:
            yield chosen
        else:
            print(reason, file=sys.stderr)


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


def compiled_before(bundle: Path, base: Path, task: str, verify: str) -> Callable[[], State]:
    """As `load_expert`, in a process that has loaded LLVM and compiled what the load needs."""
    os.environ["TALLSTORE_COMPILE"] = "1"
    with open_bundle(bundle, base=base, verify="never") as opened:
        expert = opened._expert(task)  # noqa: SLF001 - gives the least that can be asked for
        for name in expert.names:
            expert.elements(name, 0, min(1, expert.spec(name).numel))
    return partial(load_expert, bundle, base, task, verify)


def after_another(bundle: Path, base: Path, first: str, second: str) -> Callable[[], State]:
    """The load of a second expert from a bundle that is open, and has given a first one."""
    opened: Bundle = open_bundle(bundle, base=base)
    opened.state_dict(first)
    return lambda: opened.state_dict(second)


def load_format(chosen: Format, place: Place) -> Callable[[], State]:
    """The load from another library's file, which is imported."""
    chosen.ready()
    dtypes = {name: value.dtype for name, value in views(weights(place.expert)).items()}

    def load() -> State:
        state = chosen.read(place.in_format(chosen), place.base)
        return {name: state[name].to(dtype) for name, dtype in dtypes.items()}

    return load


def views(path: Path) -> State:
    """Views of a mapped file, of which nothing is read."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping


def loaders(place: Place, formats: list[Format], wanted: str, *, cold: bool) -> list[Loader]:
    """Everything that is compared, in the order of the table: the reference, and names with *wanted* in them."""
    full, pickled, base = weights(place.expert), place.pickled, place.base
    first, second = place.tasks[:2]
    shared, ours = place.shared_files(), (*place.own_files(first), *place.shared_files())
    found = [
        Loader(REFERENCE, lambda: partial(read_and_clone, full), (full,)),
        Loader("safetensors, pread", lambda: partial(pread, full), (full,)),
        Loader("torch.load", lambda: partial(load_torch, pickled, mapped=False), (pickled,)),
        Loader("torch.load, mmap + clone", lambda: partial(load_torch, pickled, mapped=True), (pickled,)),
        *(
            Loader(
                chosen.name,
                partial(load_format, chosen, place),
                (place.in_format(chosen), *([weights(base)] if chosen.reads_base else [])),
            )
            for chosen in formats
        ),
        *(
            Loader(
                f"tallstore, verify={verify!r}" if verify == "never" else "tallstore",
                lambda verify=verify: partial(load_expert, place.bundle, base, first, verify),
                ours,
            )
            for verify in ("never", "first-read")
        ),
        *(
            Loader(
                f"tallstore, verify={verify!r}, compiled before",
                partial(compiled_before, place.bundle, base, first, verify),
                ours,
            )
            for verify in ("never", "first-read")
            if missing("", "llvmlite") is None
        ),
    ]
    if cold:
        found += [
            Loader(
                "tallstore, one expert, base and merged warm",
                lambda: partial(load_expert, place.bundle, base, first, "first-read"),
                place.own_files(first),
                shared,
            ),
            Loader(
                "tallstore, second expert of an open bundle, base and merged warm",
                lambda: after_another(place.bundle, base, first, second),
                place.own_files(second),
                shared,
            ),
        ]
    return [loader for loader in found if wanted in loader.name or loader.name == REFERENCE]


# --- measuring ---


def measure(loader: Loader, threads: int, *, watch: bool) -> Measured:
    """One load in a process of its own; *watch* reads its memory every millisecond, which costs time."""
    return Measured(*apart(lambda: measure_here(loader, threads, watch=watch)))


def measure_here(loader: Loader, threads: int, *, watch: bool) -> tuple[float, float, float]:
    """One load in this process, as `Measured` takes it."""
    torch.set_num_threads(threads)
    peak = 0
    done = threading.Event()

    def follow() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous_nbytes())

    load = loader.start()
    before = peak = anonymous_nbytes()
    watcher = threading.Thread(target=follow)
    if watch:
        watcher.start()
    cpu, begun = time.process_time(), time.perf_counter()
    state = load()
    wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
    after = anonymous_nbytes()
    peak = max(peak, after)
    if watch:
        done.set()
        watcher.join()
        check_own(state, after - before, loader.name)
    return wall, cpu, peak - before - nbytes(state)


def nbytes(state: State) -> int:
    """Bytes of all tensors."""
    return sum(tensor.nbytes for tensor in state.values())


def check_own(state: State, grown: int, name: str) -> None:
    """Whether the tensors are memory of the process's own: it must have grown by nearly all of them.

    Raises:
        RuntimeError: they are views of files, or of memory that somebody else has.
    """
    if grown < 0.9 * nbytes(state) - 16 * MIB:  # what was free before is used too
        raise RuntimeError(f"{name}: {nbytes(state)} bytes of tensors, and {grown} of memory")


def forget(files: tuple[Path, ...]) -> None:
    """Drop the files from the page cache."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remember(files: tuple[Path, ...]) -> None:
    """Have the files in the page cache."""
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(16 * MIB):
                pass


def try_out(loader: Loader, threads: int) -> float | None:
    """The anonymous bytes of a load beyond its result; None, and a line, where it fails."""
    try:
        return measure(loader, threads, watch=True).beyond
    except SystemExit:
        print(f"{loader.name}: left out, its load failed", file=sys.stderr)
        return None


def rounds(compared: list[Loader], repeats: int, threads: int, *, cold: bool) -> dict[str, list[Measured]]:
    """Every loader *repeats* times, in turns; all files were read before."""
    found: dict[str, list[Measured]] = {loader.name: [] for loader in compared}
    for _ in range(repeats):
        for loader in compared:
            if cold:
                forget(loader.files)
                remember(loader.kept)
            found[loader.name].append(measure(loader, threads, watch=False))
    return found


def table(tried: list[Loader], repeats: int, threads: int, *, cold: bool) -> Iterator[str]:
    """The lines of one table."""
    beyond = {loader.name: found for loader in tried if (found := try_out(loader, threads)) is not None}
    compared = [loader for loader in tried if loader.name in beyond]
    found = rounds(compared, repeats, threads, cold=cold)
    reference = [measured.wall for measured in found[REFERENCE]]
    yield "| | median ms | against the first | lowest, highest ratio of a turn | processor ms | MiB beyond the result |"
    yield "|---|---|---|---|---|---|"
    for loader in compared:
        walls = [measured.wall for measured in found[loader.name]]
        ratios = sorted(wall / first for wall, first in zip(walls, reference, strict=True))
        cpu = statistics.median(measured.cpu for measured in found[loader.name])
        yield (
            f"| {loader.name} | {1e3 * statistics.median(walls):.1f} | {statistics.median(ratios):.2f} |"
            f" {ratios[0]:.2f}, {ratios[-1]:.2f} | {1e3 * cpu:.1f} | {max(0, beyond[loader.name]) / MIB:.0f} |"
        )


def one_more(place: Place) -> str:
    """What one more task takes to read and to keep, beside its expert in float32."""
    own = sum(path.stat().st_size for path in place.own_files(place.tasks[0]))
    full = 4 * sum(tensor.numel() for tensor in views(weights(place.expert)).values())
    return f"One more task: {own / 1e6:.2f} MB of files of its own, 1/{full / own:.1f} of its expert in float32."


@contextlib.contextmanager
def built(arguments: argparse.Namespace) -> Iterator[Path]:
    """The float32 checkpoints that were asked for."""
    with tempfile.TemporaryDirectory(prefix="tallstore-load-") as name:
        checkpoints = arguments.built or Path(name) / "float32"
        if arguments.numel:
            apart(lambda: write_synthetic(checkpoints, arguments.numel, getattr(arguments, "tasks", 2)))
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
    parser.add_argument("--method", choices=list(METHODS), default="signed-mask", help="that our bundle is packed with")
    parser.add_argument("--only", default="", metavar="TEXT", help="leave out what has not this text in its name")
    arguments = parser.parse_args()
    packages = [release(package) for package in PACKAGES if missing("", package) is None]
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, tallstore {__version__}"
    print(f"{os.cpu_count()} processors, {arguments.threads} threads; {', '.join([versions, *packages])}", flush=True)
    with built(arguments) as checkpoints:
        for dtype in arguments.dtypes:
            with tempfile.TemporaryDirectory(prefix="tallstore-load-") as name:
                cast = checkpoints
                if dtype != "float32":
                    cast = Path(name) / dtype
                    apart(partial(copy_as, getattr(torch, dtype), checkpoints, cast))
                place = Place(cast, Path(name), tasks_in(cast))
                apart(partial(prepare, place, arguments.method))
                formats = list(prepare_formats(place, arguments.only))
                for cold in (False, True)[: 1 + arguments.cold]:
                    print(f"\n{dtype}, {'cold' if cold else 'warm'}\n")
                    compared = loaders(place, formats, arguments.only, cold=cold)
                    for line in table(compared, arguments.repeats, arguments.threads, cold=cold):
                        print(line, flush=True)
                print(f"\n{one_more(place)}", flush=True)


if __name__ == "__main__":
    main()
