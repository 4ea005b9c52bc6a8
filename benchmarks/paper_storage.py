"""The storage table of TALL-masks (arXiv 2405.07813) from the bytes on disk of packed bundles.

    python benchmarks/paper_storage.py                 # an eighth of the model, minutes
    python benchmarks/paper_storage.py --scale 1       # all of it

The tensors have the names, shapes and dtype of CLIP ViT-B/32 as the paper counts it: T tasks, P = 87,849,216 parameters
of the visual encoder that are fine-tuned, F = 25,599,489 that stay frozen; T checkpoints of it are 32 (T P + F) bits,
and the paper's layout of base, merged vector and masks is (64 + T) P + 32 F. The values are made up: the base is
normally distributed, task vectors are independent normal numbers at about 1 % of its magnitude, so neither heavy tails
nor anything that tasks have in common makes masks cheaper. Experts are computed whenever a range of them is read, and
are nowhere stored.

Every bundle is packed in a process of its own, which reads its RssAnon every 5 ms, and is deleted once it was measured.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from memory import anonymous_nbytes
from numpy.typing import NDArray

import tallstore
from tallstore.checkpoints import Checkpoint, open_checkpoint
from tallstore.checkpoints.checkpoint import Origin
from tallstore.checkpoints.writer import write_checkpoint
from tallstore.format.dtypes import CHUNK_NUMEL, TensorSpec

Shape = tuple[int, ...]

BASE_SCALE = 0.02  # standard deviation of the base's values
STEP = 0.01  # of task vectors, as a share of it


@dataclass(frozen=True)
class Clip:
    """A CLIP model.

    Attributes:
        name: what it is called.
        patch: pixels along a side of a patch.
        positions: of the visual encoder: its patches and the class.
        width, blocks: of the visual encoder.
        text_width: of the text encoder, and of the space that both embed into.
    """

    name: str
    patch: int
    positions: int
    width: int
    blocks: int
    text_width: int

    @property
    def masked(self) -> dict[str, Shape]:
        """Shapes of the fine-tuned tensors: the visual encoder."""
        width = self.width
        shapes: dict[str, Shape] = {
            "visual.class_embedding": (width,),
            "visual.positional_embedding": (self.positions, width),
            "visual.proj": (width, self.text_width),
            "visual.conv1.weight": (width, 3, self.patch, self.patch),
            "visual.ln_pre.weight": (width,),
            "visual.ln_pre.bias": (width,),
            "visual.ln_post.weight": (width,),
            "visual.ln_post.bias": (width,),
        }
        block: dict[str, Shape] = {
            "ln_1.weight": (width,),
            "ln_1.bias": (width,),
            "attn.in_proj_weight": (3 * width, width),
            "attn.in_proj_bias": (3 * width,),
            "attn.out_proj.weight": (width, width),
            "attn.out_proj.bias": (width,),
            "ln_2.weight": (width,),
            "ln_2.bias": (width,),
            "mlp.c_fc.weight": (4 * width, width),
            "mlp.c_fc.bias": (4 * width,),
            "mlp.c_proj.weight": (width, 4 * width),
            "mlp.c_proj.bias": (width,),
        }
        for number in range(self.blocks):
            shapes |= {f"visual.transformer.resblocks.{number}.{name}": shape for name, shape in block.items()}
        return shapes

    @property
    def frozen(self) -> dict[str, Shape]:
        """Shapes of what stays as it is: the text side without its transformer, which nothing needs any more."""
        return {
            "token_embedding.weight": (49408, self.text_width),
            "positional_embedding": (77, self.text_width),
            "ln_final.weight": (self.text_width,),
            "ln_final.bias": (self.text_width,),
            "text_projection": (self.text_width, self.text_width),
            "logit_scale": (),
        }


VIT_B_32 = Clip("ViT-B/32", patch=32, positions=50, width=768, blocks=12, text_width=512)
VIT_L_14 = Clip("ViT-L/14", patch=14, positions=257, width=1024, blocks=24, text_width=768)

# What the paper's table says, in Gbit for 20 tasks.
REPORTED = {"ViT-B/32": (57.0, 8.2), "ViT-L/14": (195.8, 26.8)}

PUBLISHED = "`TallMask.published()`, float32, not compressed"
LAYOUTS: dict[str, dict[str, Any]] = {
    PUBLISHED: {"method": tallstore.TallMask.published(), "merged_dtype": "float32", "compress": False},
    "`TallMask()`": {"method": tallstore.TallMask()},
    "`SignedMask()`, the default": {"method": tallstore.SignedMask()},
}


# --- arithmetic -------------------------------------------------------------------------------------------------------


def scaled(shapes: Mapping[str, Shape], scale: int) -> dict[str, Shape]:
    """Every first dimension divided by *scale*, rounded up."""
    return {name: (-(-shape[0] // scale), *shape[1:]) if shape else shape for name, shape in shapes.items()}


def parameters(shapes: Mapping[str, Shape]) -> int:
    """Elements of all tensors."""
    return sum(math.prod(shape) for shape in shapes.values())


def checkpoints_nbits(tasks: int, masked: int, frozen: int) -> int:
    """Float32 checkpoints of *tasks* tasks, as the paper counts them: what is frozen once."""
    return 32 * (tasks * masked + frozen)


def published_nbits(tasks: int, masked: int, frozen: int) -> int:
    """The paper's layout: base and merged vector in float32, a bit a parameter a task."""
    return (64 + tasks) * masked + 32 * frozen


# --- checkpoints ------------------------------------------------------------------------------------------------------


def normals(task: int, tensor: int, start: int, stop: int) -> NDArray[np.float32]:
    """Elements [start, stop) of the endless normally distributed vector of that task and tensor."""
    # Philox counts: it can begin anywhere, at multiples of 8 float32. Box-Muller makes two normal numbers of each pair.
    first = start // 8 * 8
    bits = np.random.Philox(key=np.array([task, tensor], np.uint64))
    bits.advance(first // 8)
    uniform = np.random.Generator(bits).random(-(-(stop - first) // 2) * 2, dtype=np.float32)
    radius = np.sqrt(-2 * np.log(1 - uniform[::2]))
    angle = np.float32(2 * np.pi) * uniform[1::2]
    drawn = np.empty_like(uniform)
    np.multiply(radius, np.cos(angle), out=drawn[::2])
    np.multiply(radius, np.sin(angle), out=drawn[1::2])
    return drawn[start - first : stop - first]


class FineTune(Checkpoint):
    """A fine-tune of a base, computed whenever it is read.

    Attributes:
        seconds: of a processor that each read took to compute.
    """

    def __init__(self, task: int, base: Checkpoint) -> None:
        """Task vectors of *task*, a number from 1, on everything in the visual encoder of *base*."""
        super().__init__(Origin(f"fine-tune {task}"), {name: base.spec(name) for name in base.names})
        self._task, self._base = task, base
        self.seconds: list[float] = []

    def _flat_bytes(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        base = self._base.read_bytes(name, start, stop)
        if not name.startswith("visual."):
            return base
        begun = time.thread_time()
        tensor = self.names.index(name)
        # Tensors move up to four times as far as others, and in each of them tasks up to twice as far as others.
        octaves = np.random.default_rng(tensor).uniform(-1, 1)
        octaves += np.random.default_rng((self._task, tensor)).uniform(-0.5, 0.5)
        scale = BASE_SCALE * STEP * 2**octaves
        moved = base.view("<f4") + np.float32(scale) * normals(self._task, tensor, start, stop)
        raw: NDArray[np.uint8] = moved.astype("<f4", copy=False).view(np.uint8)
        self.seconds.append(time.thread_time() - begun)
        return raw

    def _release(self) -> None:
        pass


def write_base(directory: Path, shapes: Mapping[str, Shape]) -> Path:
    """A base of those shapes, in float32; its file."""
    specs = {name: TensorSpec("F32", shape) for name, shape in sorted(shapes.items())}

    def read(name: str) -> Iterator[bytes]:
        numel, tensor = specs[name].numel, list(specs).index(name)
        for start in range(0, numel, CHUNK_NUMEL):
            drawn = normals(0, tensor, start, min(start + CHUNK_NUMEL, numel))
            yield (np.float32(BASE_SCALE) * drawn).astype("<f4").tobytes()

    write_checkpoint(directory, specs, read)
    return directory / "model.safetensors"


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A bundle with its base embedded.

    Attributes:
        base, shared, tasks, rest: bytes on disk of base/, of groups/, of tasks/, and of the other files.
        imports, peak: anonymous bytes before the pack and at its peak.
        seconds: of the pack, by the clock.
        cpu_seconds: of the pack, over all threads.
        computing: those of them that computed experts.
    """

    base: int
    shared: int
    tasks: int
    rest: int
    imports: int
    peak: int
    seconds: float
    cpu_seconds: float
    computing: float

    @property
    def by_reference(self) -> int:
        """Bytes without the base."""
        return self.shared + self.tasks + self.rest

    @property
    def embedded(self) -> int:
        """Bytes of the whole bundle."""
        return self.base + self.by_reference


def watched(work: Callable[[], object]) -> tuple[int, float, float]:
    """This process's peak of anonymous memory while *work* is done, in bytes; its seconds, and those of processors."""
    peak = anonymous_nbytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous_nbytes())

    thread = threading.Thread(target=watch)
    thread.start()
    begun, cpu_begun = time.perf_counter(), time.process_time()
    try:
        work()
    finally:
        done.set()
        thread.join()
    return peak, time.perf_counter() - begun, time.process_time() - cpu_begun


def measure(layout: str, base: Path, tasks: int, bundle: Path) -> Measured:
    """Pack *tasks* fine-tunes of *base* into *bundle*, and measure it."""
    with open_checkpoint(base) as opened:
        experts = {f"task-{number:02d}": FineTune(number, opened) for number in range(1, tasks + 1)}
        imports = anonymous_nbytes()
        peak, seconds, cpu_seconds = watched(
            lambda: tallstore.pack(base, experts, bundle, embed_base=True, **LAYOUTS[layout])
        )
    sizes = {path.relative_to(bundle): path.stat().st_size for path in bundle.rglob("*") if path.is_file()}
    parts = {
        part: sum(size for path, size in sizes.items() if path.parts[0] == part) for part in ("base", "groups", "tasks")
    }
    return Measured(
        base=parts["base"],
        shared=parts["groups"],
        tasks=parts["tasks"],
        rest=sum(sizes.values()) - sum(parts.values()),
        imports=imports,
        peak=peak,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        computing=sum(sum(expert.seconds) for expert in experts.values()),
    )


def measure_apart(layout: str, base: Path, tasks: int) -> Measured:
    """`measure` in a process of its own, in a directory beside *base* that is deleted."""
    with tempfile.TemporaryDirectory(prefix="bundle-", dir=base.parent) as scratch:
        request = json.dumps({"layout": layout, "base": str(base), "tasks": tasks, "bundle": f"{scratch}/bundle"})
        command = [sys.executable, __file__, "--measure", request]
        return Measured(**json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))


# --- tables -----------------------------------------------------------------------------------------------------------


def line(tasks: int, layout: str, nbits: float, checkpoints: float, further: str = " | | ") -> str:
    """A row of Markdown."""
    return f"| {tasks} | {layout} | {nbits / 1e9:.4g} | {checkpoints / nbits:.2f} | {nbits / 8e9:.3g} | {further} |"


def arithmetic_lines(model: Clip, tasks: int, masked: int, frozen: int, *, is_full: bool) -> list[str]:
    """What needs no bundle: checkpoints, the paper's formula, and what the paper says."""
    checkpoints, published = (count(tasks, masked, frozen) for count in (checkpoints_nbits, published_nbits))
    reported = REPORTED[model.name] if is_full and tasks == 20 else None
    notes = ["", ""] if reported is None else [f"; the paper says {gbit}" for gbit in reported]
    return [
        line(tasks, f"checkpoints (arithmetic{notes[0]})", checkpoints, checkpoints),
        line(tasks, f"the paper's layout (arithmetic{notes[1]})", published, checkpoints),
    ]


def measured_lines(tasks: int, layout: str, found: Measured, checkpoints: int) -> list[str]:
    """A bundle with its base, and the same without."""
    mebibyte = 1 << 20
    memory = f"{found.peak / mebibyte:.0f} ({(found.peak - found.imports) / mebibyte:.0f})"
    further = f"{memory} | {found.seconds:.0f} | {found.cpu_seconds:.0f} ({found.computing:.0f})"
    embedded = line(tasks, f"{layout}, base embedded", 8 * found.embedded, checkpoints, further)
    if layout == PUBLISHED:
        return [embedded]
    return [embedded, line(tasks, f"{layout}, base by reference", 8 * found.by_reference, checkpoints)]


def extrapolated_lines(model: Clip, tasks: int, measured: Mapping[str, Measured], masked: int) -> list[str]:
    """The table of another model, from what a masked parameter cost in the bundles of *tasks* tasks."""
    to_masked, to_frozen = parameters(model.masked), parameters(model.frozen)
    checkpoints = checkpoints_nbits(tasks, to_masked, to_frozen)
    lines = arithmetic_lines(model, tasks, to_masked, to_frozen, is_full=True)
    for layout, found in measured.items():
        by_reference = 8 * (found.shared + found.tasks) * to_masked / masked
        base = 32 * (to_masked + to_frozen)
        lines.append(line(tasks, f"{layout}, base embedded (extrapolated)", base + by_reference, checkpoints))
        if layout != PUBLISHED:
            lines.append(line(tasks, f"{layout}, base by reference (extrapolated)", by_reference, checkpoints))
    return lines


HEADER = (
    "| tasks | layout | Gbit | checkpoints are larger by | GB | peak anonymous MiB (after the imports)"
    " | pack s | CPU s (of them computing experts) |\n|---|---|---|---|---|---|---|---|"
)


def run(scale: int, task_counts: list[int], out: Path) -> None:
    """Pack every layout at every number of tasks, and print the tables."""
    masked, frozen = (scaled(shapes, scale) for shapes in (VIT_B_32.masked, VIT_B_32.frozen))
    counts = parameters(masked), parameters(frozen)
    base = write_base(out, masked | frozen)
    size = "full size" if scale == 1 else f"SCALED: every first dimension divided by {scale}"
    print(f"{VIT_B_32.name}, {size}: {counts[0]:,} masked and {counts[1]:,} frozen parameters, float32.\n\n{HEADER}")
    measured: dict[str, Measured] = {}
    for tasks in task_counts:
        print("\n".join(arithmetic_lines(VIT_B_32, tasks, *counts, is_full=scale == 1)), flush=True)
        for layout in LAYOUTS:
            measured[layout] = measure_apart(layout, base, tasks)
            lines = measured_lines(tasks, layout, measured[layout], checkpoints_nbits(tasks, *counts))
            print("\n".join(lines), flush=True)
    bundles = f"{'' if scale == 1 else 'SCALED '}bundles of {task_counts[-1]} tasks"
    print(
        f"\n{VIT_L_14.name}, EXTRAPOLATED from bits a masked parameter in the {bundles} above:"
        f" {parameters(VIT_L_14.masked):,} masked and {parameters(VIT_L_14.frozen):,} frozen parameters.\n\n{HEADER}"
    )
    print("\n".join(extrapolated_lines(VIT_L_14, task_counts[-1], measured, counts[0])))


def main() -> None:
    """Read the options, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, default=8, help="divide every first dimension by it; 1 is the full size")
    parser.add_argument("--tasks", type=int, nargs="+", default=[8, 14, 20])
    parser.add_argument(
        "--out", type=Path, help="where the base and one bundle at a time are put; needs 2 GB at scale 1"
    )
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        request = arguments.measure
        found = measure(request["layout"], Path(request["base"]), request["tasks"], Path(request["bundle"]))
        print(json.dumps(vars(found)))
        return
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tallstore-paper-", dir=arguments.out) as scratch:
        run(arguments.scale, arguments.tasks, Path(scratch))


if __name__ == "__main__":
    main()
