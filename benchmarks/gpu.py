"""Experts on a GPU: the decoder against copying as many bytes there, loads and switches against full checkpoints.

    python benchmarks/gpu.py [--device cuda] [--numel 400_000_000] [--dtypes float32 bfloat16] [--repeats 9]

Three tables, all medians of interleaved rounds in one process, after one that is not counted:

- decoders: what a decoder reads and writes, a second, and the same for a copy within the device that moves as many
  bytes; for every kind of code, and the dtypes of base and result. Packed bytes lie on the device before.
- loads: `state_dict(device=…)`, from files that the system has cached, with every byte checked and without; beside
  `safetensors.torch.load_file(device=…)` of the full expert. The base is read and sent as well.
- switches: `set_expert` of a model on the device, masks in the CPU's memory, or all kept on the device (`on_device`);
  beside `load_state_dict` of a full expert that is on the device, and of one in a file; and beside `torch.add(base,
  merged, out=)` of float tensors there.

On a GPU the decoder is the one that experts are loaded with there: Triton's kernel, or torch's operations. With
`--device cpu --numel 200_000` it shows that it runs, and nothing else: with TRITON_INTERPRET=1, Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file
from switch import made_up, model_of, write_checkpoints

import tallstore
from tallstore.checkpoints.torch_dtypes import DTYPE_NAMES
from tallstore.format.dtypes import CHUNK_NUMEL, Dtype, itemsize
from tallstore.format.encodings import SHARED
from tallstore.format.manifest import SharedDtype
from tallstore.loading.device_decoders import decoder_for
from tallstore.loading.packed import BITS, Batch, Decode, Form, Kind, Packed, Piece, Region, Rows, Scaled, Source

KINDS: tuple[tuple[Kind, SharedDtype | None, int], ...] = (
    ("signed", "LOG4", 0),
    ("mask", "I8", 0),
    ("mask", "BF16", 0),
    ("mask", "F32", 0),
    ("two-level", "I8", 0),
    ("sign", None, 0),
    ("sparse", "F16", 0),
    ("uniform", None, 3),
    ("uniform", None, 16),
    ("same", None, 0),
)
ROW = 4096  # elements with one scale
DENSITY = 32  # of 256: a byte of a sparse tensor's bits is drawn below it


def chosen_decoder(device: torch.device) -> tuple[str, Decode]:
    """The decoder that loading takes on a device, or one that runs on the CPU; and its name."""
    decode = decoder_for(device)
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            from tallstore.loading.decode_triton import decode  # noqa: PLC0415
        else:
            from tallstore.loading.decode_torch import decode  # noqa: PLC0415
    if decode is None:
        raise SystemExit(f"{device} has no decoder: experts are rebuilt on the CPU there")
    return decode.__module__.rpartition(".")[2], decode


def synchronise(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """How long *run* takes until the device is done."""
    synchronise(device)
    begun = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - begun


def medians(ways: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each way; all take turns."""
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats + 1):
        for way, run in ways.items():
            found[way].append(seconds(run, device))
    return {way: statistics.median(times[1:]) for way, times in found.items()}


# --- decoders ---


def pieces(form: Form, numel: int, device: torch.device) -> Iterator[Piece]:
    """Made-up pieces of one form, with scales by row; all whole chunks have the same elements."""
    random = np.random.default_rng(1)
    made: dict[int, dict[Region, np.ndarray]] = {}
    for start in range(0, numel, CHUNK_NUMEL):
        count = min(CHUNK_NUMEL, numel - start)
        if count not in made:
            made[count] = made_up_arrays(form, count, random)
        rows = Rows.of(np.ones(-(-numel // ROW), np.float32), ROW, start, count)
        scaled: dict[Scaled, Rows] = {} if form.kind == "same" else {"values": rows}
        if form.values_lo is not None:
            scaled["values_lo"] = rows
        destination = torch.empty(count, dtype=BITS[itemsize(form.wanted)][1], device=device)
        sources = {name: source(array) for name, array in made[count].items()}
        value_count = 0
        if form.kind == "sparse" and form.values is not None:
            value_count = made[count]["values"].size // SHARED[form.values].itemsize
        yield Piece(form, destination, sources, scaled, value_count)


def made_up_arrays(form: Form, count: int, random: np.random.Generator) -> dict[Region, np.ndarray]:
    """What *count* elements are made of."""
    codes = random.integers(0, DENSITY if form.kind == "sparse" else 256, CHUNK_NUMEL, dtype=np.uint8)
    arrays: dict[Region, np.ndarray] = {"base": floats(random, form.base, count)}
    if form.code_width:
        arrays["codes"] = codes[: -(-count * form.code_width // 8)]
    for name, dtype in (("values", form.values), ("values_lo", form.values_lo)):
        if dtype is not None:
            arrays[name] = random.integers(0, 64, -(-count * SHARED[dtype].width // 8), dtype=np.uint8)
    if form.kind == "sparse" and form.values is not None:
        if count % 8:
            arrays["codes"][-1] &= (1 << count % 8) - 1
        set_count = int(np.bitwise_count(arrays["codes"]).sum())
        arrays["values"] = random.integers(0, 64, set_count * SHARED[form.values].itemsize, dtype=np.uint8)
    return arrays


def floats(random: np.random.Generator, dtype: Dtype, count: int) -> np.ndarray:
    """Bytes of normally distributed numbers."""
    numbers = torch.from_numpy(random.standard_normal(count, np.float32))
    return (
        numbers.to({"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[dtype])
        .view(torch.uint8)
        .numpy()
    )


def source(array: np.ndarray) -> Source:
    """What reads an array."""
    return lambda: array


def staged(form: Form, numel: int, device: torch.device) -> tuple[Packed, int]:
    """Packed elements on a device, and how many bytes decoding them reads and writes."""
    batch = Batch(list(pieces(form, numel, device)))
    host = torch.zeros(batch.nbytes, dtype=torch.uint8)
    for job in batch.fill(host.numpy()):
        job()
    (packed,) = batch.packed(host.to(device))
    read = sum(region.nbytes for region in packed.regions.values())
    return packed, read + sum(destination.nbytes for destination in packed.destinations)


def decoder_rows(numel: int, dtypes: Sequence[str], repeats: int, device: torch.device) -> Iterator[str]:
    """The first table."""
    name, decode = chosen_decoder(device)
    yield f"\n{numel / 2**20:.0f} Mi elements, a scale for each {ROW}; decoder: {name}\n"
    yield "| kind | merged | dtype | GB/s | copy GB/s | of the copy's |"
    yield "|---|---|---|---|---|---|"
    for kind, values, levels in KINDS:
        for dtype in (DTYPE_NAMES[getattr(torch, name)] for name in dtypes):
            lower = values if kind == "two-level" else None
            packed, nbytes = staged(Form(kind, dtype, dtype, dtype, levels, values, lower), numel, device)
            origin = torch.zeros(nbytes // 2, dtype=torch.uint8, device=device)
            copy = torch.empty_like(origin)
            found = medians(
                {
                    "decode": lambda packed=packed: decode(packed),
                    "copy": lambda copy=copy, origin=origin: copy.copy_(origin),
                },
                repeats,
                device,
            )
            speeds = {way: nbytes / time_ / 1e9 for way, time_ in found.items()}
            what = f"{kind} of {levels}" if levels else kind
            ratio = speeds["decode"] / speeds["copy"]
            yield f"| {what} | {values or ''} | {dtype} | {speeds['decode']:.4g} | {speeds['copy']:.4g} | {ratio:.3g} |"


# --- loads and switches ---


def load_ways(paths: Mapping[str, Path], bundle: Path, device: torch.device) -> dict[str, Callable[[], object]]:
    """Ways to have a full expert on the device."""

    def load(verify: str) -> object:
        with tallstore.open_bundle(bundle, base=paths["base"], verify=verify) as opened:
            return opened.state_dict("one", device=device)

    return {
        "safetensors, load_file": lambda: load_file(paths["one"], device=str(device)),
        "tallstore, first-read": lambda: load("first-read"),
        "tallstore, never": lambda: load("never"),
    }


def switch_ways(
    paths: Mapping[str, Path], bundle: tallstore.Bundle, device: torch.device
) -> dict[str, Callable[[], object]]:
    """Ways to make a model on the device another expert; the one that is switched to changes from call to call."""
    base, resident = (load_file(paths[name], device=str(device)) for name in ("base", "one"))
    switchers = {on_device: bundle.attach(model_of(base), on_device=on_device) for on_device in (False, True)}
    for switcher in switchers.values():
        for task in ("one", "two"):
            switcher.set_expert(task)
    model = model_of(base)
    targets = [(base[name], resident[name], tensor.detach()) for name, tensor in model.state_dict().items()]

    def add() -> None:
        for before, merged, target in targets:
            torch.add(before, merged, out=target)

    def switch(switcher: tallstore.Switcher) -> None:
        switcher.set_expert("one" if switcher.active_expert == "two" else "two")

    return {
        "torch.add, on the device": add,
        "load_state_dict, on the device": lambda: model.load_state_dict(resident),
        "load_state_dict, from a file": lambda: model.load_state_dict(load_file(paths["one"], device=str(device))),
        "set_expert": lambda: switch(switchers[False]),
        "set_expert, on_device": lambda: switch(switchers[True]),
    }


def expert_rows(numel: int, dtypes: Sequence[str], repeats: int, device: torch.device) -> Iterator[str]:
    """The second and third table."""
    yield "\n| what | dtype | parameters | way | ms | GB/s of the expert | against the first |"
    yield "|---|---|---|---|---|---|---|"
    for dtype in dtypes:
        with tempfile.TemporaryDirectory(prefix="tallstore-gpu-") as name:
            root = Path(name)
            paths = write_checkpoints(made_up(numel), getattr(torch, dtype), root)
            tallstore.pack(paths["base"], {task: paths[task] for task in ("one", "two")}, root / "bundle")
            nbytes = paths["one"].stat().st_size
            parameters = sum(tensor.numel() for tensor in load_file(paths["one"]).values())
            with tallstore.open_bundle(root / "bundle", base=paths["base"]) as bundle:
                for what, ways in (
                    ("load", load_ways(paths, root / "bundle", device)),
                    ("switch", switch_ways(paths, bundle, device)),
                ):
                    found = medians(ways, repeats, device)
                    first = next(iter(found.values()))
                    for way, time_ in found.items():
                        yield (
                            f"| {what} | {dtype} | {parameters / 1e6:.1f} M | {way} | {1000 * time_:.3g} | "
                            f"{nbytes / time_ / 1e9:.3g} | {time_ / first:.3g} |"
                        )


def described(device: torch.device) -> str:
    """The device and the versions, in a line."""
    parts = [f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"]
    if device.type == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        parts.insert(0, f"{torch.cuda.get_device_name(device)} (capability {capability}, {runtime})")
    try:
        import triton  # noqa: PLC0415
    except ImportError:
        triton_version = "no triton"
    else:
        triton_version = f"triton {triton.__version__}"
    versions = f"tallstore {tallstore.__version__}, torch {torch.__version__}, {triton_version}"
    return "; ".join([*parts, f"Python {platform.python_version()}, {versions}, safetensors {safetensors.__version__}"])


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--numel", type=int, default=400_000_000, help="parameters of made-up experts")
    parser.add_argument("--decoded", type=int, default=1 << 28, help="elements that the decoders decode")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    device = torch.empty(0, device=arguments.device).device
    print(f"{device}: {described(device)}; medians of {arguments.repeats}")
    for line in decoder_rows(min(arguments.decoded, arguments.numel), arguments.dtypes, arguments.repeats, device):
        print(line, flush=True)
    for line in expert_rows(arguments.numel, arguments.dtypes, arguments.repeats, device):
        print(line, flush=True)


if __name__ == "__main__":
    main()
