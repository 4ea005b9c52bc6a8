"""Pack the checkpoints of a training loop: the model of every epoch of every run comes back by name.

    python examples/training_loop.py [--out DIR]

The loop saves what such loops save: weights under the names of a wrapped model, the optimizer's state, the epoch. A
bundle is for the models alone: to resume training, keep the last checkpoint of a run.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import digits
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tallstore


def train(task: str, base: Path, folder: Path, epochs: int) -> Iterator[Path]:
    """Fine-tune on a task; yield a checkpoint after every epoch."""
    model = digits.network()
    model.load_state_dict(load_file(base))
    parallel = nn.DataParallel(model)
    for epoch, optimizer in digits.train(parallel, task, epochs):
        path = folder / f"{task}-{epoch}.pt"
        torch.save({"model": parallel.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}, path)
        yield path


def weights(path: Path) -> dict[str, Tensor]:
    """Return the weights in a checkpoint, mapped: the file is read while it is packed, and never as a whole."""
    state = torch.load(path, mmap=True, weights_only=True)["model"]
    return {name.removeprefix("module."): weight for name, weight in state.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=digits.OUT, help="folder for checkpoints and bundle")
    out = parser.parse_args().out

    base, _ = digits.checkpoints(out)
    folder, path = out / "runs", out / "bundle-of-runs"
    folder.mkdir(exist_ok=True)
    saved = [checkpoint for task in ("rotated", "mirrored") for checkpoint in train(task, base, folder, epochs=4)]
    states = {checkpoint.stem: weights(checkpoint) for checkpoint in saved}
    report = tallstore.pack(base, states, path, method=tallstore.Uniform(levels=4), overwrite=True)
    nbytes = sum(checkpoint.stat().st_size for checkpoint in saved)
    print(f"{len(saved)} checkpoints of {nbytes:,} bytes, {report.checkpoints_nbytes:,} of them weights, ", end="")
    print(f"in a bundle of {report.bundle_nbytes:,} bytes")

    trained, model = digits.network(), digits.network()
    print("| run and epoch | checkpoint | from the bundle |\n|---|---|---|")
    with tallstore.open_bundle(path, base=base) as bundle:
        for name, state in states.items():
            task, _, _ = name.partition("-")
            trained.load_state_dict(state)
            bundle.load_into(model, name)
            print(f"| {name} | {digits.accuracy(trained, task):.1%} | {digits.accuracy(model, task):.1%} |")


if __name__ == "__main__":
    main()
