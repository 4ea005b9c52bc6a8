"""Add a task to a bundle that was shipped, replace it, remove it, and make one group of all tasks again.

    python examples/add_task.py [--out DIR]

Adding needs the base and the new expert alone, and touches no file of the tasks that are there: no bit of them changes.
Packing all again, as one group, needs every checkpoint; the earlier experts then change a little, since with the
default method every expert has a part in the vector that they share.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import digits
import torch
from torch import Tensor

import tallstore


def weights(bundle: Path, base: Path, tasks: list[str]) -> list[dict[str, Tensor]]:
    with tallstore.open_bundle(bundle, base=base) as opened:
        return [opened.state_dict(task) for task in tasks]


def same(first: list[dict[str, Tensor]], second: list[dict[str, Tensor]]) -> bool:
    return all(torch.equal(one[name], other[name]) for one, other in zip(first, second, strict=True) for name in one)


def right(bundle: Path, base: Path, task: str) -> str:
    model = digits.network()
    with tallstore.open_bundle(bundle, base=base) as opened:
        opened.load_into(model, task)
    return f"{digits.accuracy(model, task):.1%} right"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=digits.OUT, help="folder for checkpoints and bundles")
    out = parser.parse_args().out

    base, experts = digits.checkpoints(out)
    *earlier, new = experts
    bundle = out / "bundle-that-grows"
    report = tallstore.pack(base, {task: experts[task] for task in earlier}, bundle, overwrite=True)
    shipped = weights(bundle, base, earlier)
    print(f"shipped: {', '.join(earlier)}, in {report.bundle_nbytes:,} bytes")

    added = tallstore.add(bundle, {new: experts[new]}, base=base)
    nbytes = experts[new].stat().st_size
    kept = "every bit of the others stayed" if same(shipped, weights(bundle, base, earlier)) else "the others changed"
    print(f"added {new}, a checkpoint of {nbytes:,} bytes: {added.written_nbytes:,} bytes more; ", end="")
    print(f"{right(bundle, base, new)}; {kept}")

    method = tallstore.Uniform(levels=8, scale="tensor")
    truer = tallstore.add(bundle, {new: experts[new]}, base=base, method=method, replace=True)
    (before,), (after,) = added.tasks, truer.tasks
    print(f"replaced {new}, with eight levels: cosine {after.cosine:.3f}, where it was {before.cosine:.3f}")

    print(tallstore.remove(bundle, [new]))

    tallstore.add(bundle, {new: experts[new]}, base=base)
    again = tallstore.repack(bundle, experts, base=base)
    kept = "the others are the same" if same(shipped, weights(bundle, base, earlier)) else "the others changed a little"
    print(f"all packed again, as one group: {again.bundle_nbytes:,} bytes; {right(bundle, base, new)}; {kept}")


if __name__ == "__main__":
    main()
