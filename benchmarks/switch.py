"""Time of `Switcher.set_expert` against what no switch can do without, and against loading full checkpoints.

    python benchmarks/switch.py [--experts DIR] [--numel 100000000] [--dtypes float32 bfloat16] [--repeats 9]

DIR has a folder `base` and one for each expert, in Hugging Face layout. Without it, experts are made up: a normally
distributed base, and two tasks that move a twentieth of its size. Every way is timed in turn, round after round, in one
process; the table has medians. The model is what holds the tensors, and computes nothing. PEFT (pip install
peft==0.21.2) is left out where it is not installed.

- `torch.add`: base + merged, float tensors of the model's dtype, into the model's own tensors: reads two numbers a
  parameter and writes one, which a switch from a base of that dtype does at least.
- `load_state_dict`: of a full expert in memory, and of one in a safetensors file that the system has cached.
- PEFT: unmerge one LoRA adapter of rank 16 and merge another, in linear layers of the shapes of all matrices. Its
  experts are what such adapters can say; it, too, leaves the model as fast as the base.
- `set_expert`, by compiled functions where llvmlite is installed: masks in memory; read by `prefetch` before; or read
  at the switch from files that the system has cached.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from peer_formats import missing, release
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tallstore

WIDTH = 1024
RANK = 16
LORA = f"PEFT, merged LoRA of rank {RANK}"
LAYER = {"attention.weight": (WIDTH, WIDTH), "up.weight": (4 * WIDTH, WIDTH), "norm.weight": (WIDTH,)}


def model_of(state: Mapping[str, Tensor]) -> nn.Module:
    """A module with these parameters, buffers where they are of integers."""
    root = nn.Module()
    for name, tensor in state.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        if tensor.is_floating_point():
            module.register_parameter(leaf, nn.Parameter(tensor.clone(), requires_grad=False))
        else:
            module.register_buffer(leaf, tensor.clone())
    return root


def made_up(numel: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """A base and two fine-tunes of about *numel* parameters, float32, one at a time."""
    layers = max(1, round(numel / sum(torch.Size(shape).numel() for shape in LAYER.values())))
    for seed, task in enumerate(("base", "one", "two")):
        state: dict[str, Tensor] = {}
        for layer in range(layers):
            for number, (part, shape) in enumerate(LAYER.items()):
                place = layer * len(LAYER) + number
                state[f"layers.{layer}.{part}"] = torch.randn(shape, generator=torch.Generator().manual_seed(place))
                if seed:
                    moves = torch.Generator().manual_seed(place + seed * layers * len(LAYER))
                    state[f"layers.{layer}.{part}"] += 0.05 * torch.randn(shape, generator=moves)
        yield task, state


def from_folder(folder: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The base and what is shaped like it of each fine-tune; heads are left out."""
    base = load_file(folder / "base" / "model.safetensors")
    yield "base", base
    for path in sorted(folder.iterdir()):
        if path.name != "base" and (path / "model.safetensors").exists():
            expert = load_file(path / "model.safetensors")
            named = {name: expert.get(name, expert.get(f"bert.{name}", tensor)) for name, tensor in base.items()}
            yield path.name, named


def write_checkpoints(
    states: Iterator[tuple[str, dict[str, Tensor]]], dtype: torch.dtype, root: Path
) -> dict[str, Path]:
    """Files of all states in *dtype*, by task."""
    paths: dict[str, Path] = {}
    for task, state in states:
        paths[task] = root / f"{task}.safetensors"
        save_file(
            {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()},
            paths[task],
            metadata={"format": "pt"},
        )
    return paths


def measure(
    ways: Mapping[str, tuple[Callable[[str], None], Callable[[str], None]]], tasks: list[str], repeats: int
) -> dict[str, float]:
    """Median seconds of each way: prepared, timed, with tasks in turn; the first round is not counted."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(repeats + 1):
        task = tasks[number % len(tasks)]
        for way, (prepare, run) in ways.items():
            prepare(task)
            begun = time.perf_counter()
            run(task)
            seconds[way].append(time.perf_counter() - begun)
    return {way: statistics.median(found[1:]) for way, found in seconds.items()}


def lora_switch(base: Mapping[str, Tensor], tasks: list[str]) -> Callable[[str], None]:
    """Takes the adapter that is merged out of linear layers of all matrices' shapes, and merges a task's."""
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415 - heavy, and may be missing

    layers = nn.ModuleDict()
    for name, tensor in base.items():
        if tensor.ndim == 2 and tensor.is_floating_point() and min(tensor.shape) >= RANK:
            layer = nn.Linear(*reversed(tensor.shape), bias=False, device="meta")
            layer.weight = nn.Parameter(tensor.clone(), requires_grad=False)
            layers[name.replace(".", "-")] = layer
    options = LoraConfig(r=RANK, target_modules=list(layers))
    adapters = {task: f"adapter-{number}" for number, task in enumerate(tasks)}
    model = get_peft_model(layers, options, adapter_name=adapters[tasks[0]])
    for task in tasks[1:]:
        model.add_adapter(adapters[task], options)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # begins at 0
            nn.init.normal_(parameter.data, std=0.01)
    tuner = model.base_model
    tuner.merge_adapter([adapters[tasks[0]]])

    def switch(task: str) -> None:
        tuner.unmerge_adapter()
        tuner.set_adapter(adapters[task])
        tuner.merge_adapter([adapters[task]])

    return switch


def compare(paths: Mapping[str, Path], root: Path, repeats: int) -> tuple[dict[str, float], int]:
    """Pack, check that a switch gives the expert's bits, time every way.

    Returns:
        median seconds by way, and the number of parameters.
    """
    tasks = [task for task in paths if task != "base"]
    tallstore.pack(paths["base"], {task: paths[task] for task in tasks}, root / "bundle")
    base = load_file(paths["base"])
    model, merged = model_of(base), {name: torch.randn(t.shape).to(t.dtype) for name, t in base.items()}
    weights = {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}
    checkpoint = load_file(paths[tasks[0]])
    with tallstore.open_bundle(root / "bundle", base=paths["base"]) as bundle:
        switcher, forgetful = bundle.attach(model), bundle.attach(model, cache_nbytes=0)
        for task in reversed(tasks):
            switcher.set_expert(task)
        largest = max(base, key=lambda name: base[name].numel())
        if not torch.equal(weights[largest], bundle.tensor(tasks[0], largest)):
            raise RuntimeError("the switch did not give the expert")

        def add(_task: str) -> None:
            for name, tensor in base.items():
                torch.add(tensor, merged[name], out=weights[name])

        def nothing(_task: str) -> None:
            pass

        def forget(task: str) -> None:
            forgetful.set_expert(tasks[tasks.index(task) - 1])  # shared vectors stay in memory, masks do not

        def prefetch(task: str) -> None:
            forget(task)
            forgetful.prefetch(task).result()

        ways: dict[str, tuple[Callable[[str], None], Callable[[str], None]]] = {
            "torch.add": (nothing, add),
            "load_state_dict, in memory": (nothing, lambda _: model.load_state_dict(checkpoint) and None),
            "load_state_dict, from a file": (
                nothing,
                lambda task: model.load_state_dict(load_file(paths[task])) and None,
            ),
            **({LORA: (nothing, lora_switch(base, tasks))} if missing(LORA, "peft") is None else {}),
            "set_expert": (nothing, switcher.set_expert),
            "set_expert, prefetched": (prefetch, forgetful.set_expert),
            "set_expert, masks read": (forget, forgetful.set_expert),
        }
        return measure(ways, tasks, repeats), sum(tensor.numel() for tensor in base.values())


def main() -> None:
    """Compare the ways for every dtype, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=Path, help="a folder with `base` and experts")
    parser.add_argument("--numel", type=int, default=100_000_000, help="parameters of made-up experts")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    lacking = missing(LORA, "peft")
    if lacking is not None:
        print(lacking, file=sys.stderr)
    present = [release(package) for package in ("llvmlite", "peft") if missing("", package) is None]
    versions = ", ".join([f"torch {torch.__version__}, tallstore {tallstore.__version__}", *present])
    print(f"{versions}; {torch.get_num_threads()} threads; medians of {arguments.repeats}\n")
    print("| experts | parameters | dtype | way | ms | against torch.add |")
    print("|---|---|---|---|---|---|")
    for dtype in arguments.dtypes:
        states = from_folder(arguments.experts) if arguments.experts else made_up(arguments.numel)
        with tempfile.TemporaryDirectory(prefix="tallstore-switch-") as name:
            paths = write_checkpoints(states, getattr(torch, dtype), Path(name))
            medians, parameters = compare(paths, Path(name), arguments.repeats)
        what = "real" if arguments.experts else "made up"
        for way, seconds in medians.items():
            ratio = seconds / medians["torch.add"]
            print(f"| {what} | {parameters / 1e6:.1f} M | {dtype} | {way} | {1000 * seconds:.3g} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
