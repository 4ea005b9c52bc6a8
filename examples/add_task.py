"""Add a task to experts that were shipped: in a bundle of its own, or by packing all of them again.

    python examples/add_task.py [--out DIR]

A bundle of its own needs the base and the new expert, and touches nothing that exists. Packing again makes one bundle
of all, and needs every checkpoint. Where the method shares a vector, as the default does, the earlier experts then
change a little, since every expert has a part in that vector; where it shares nothing, every bit of them stays.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import digits
import torch
from torch import Tensor

import tallstore

SHARES_NOTHING = tallstore.Uniform(levels=3, scale="tensor")


def nbytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first | second)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=digits.OUT, help="folder for checkpoints and bundles")
    out = parser.parse_args().out

    base, experts = digits.checkpoints(out)
    *earlier, added = experts
    shipped = {task: experts[task] for task in earlier}
    print(
        f"shipped: {', '.join(earlier)}; to be added: {added}, a checkpoint of {experts[added].stat().st_size:,} bytes"
    )
    model = digits.network()

    own = out / "bundle-of-one"  # of one expert, which has nothing to share
    tallstore.pack(base, {added: experts[added]}, own, method=SHARES_NOTHING, overwrite=True)
    with tallstore.open_bundle(own, base=base) as bundle:
        bundle.load_into(model, added)
    print(f"in a bundle of its own: {nbytes(own):,} bytes more, {digits.accuracy(model, added):.1%} right")

    for name, method in (("sharing nothing", SHARES_NOTHING), ("by the default", tallstore.SignedMask())):
        before, after = out / "bundle-before", out / "bundle-after"
        tallstore.pack(base, shipped, before, method=method, overwrite=True)
        tallstore.pack(base, experts, after, method=method, overwrite=True)
        with tallstore.open_bundle(before, base=base) as old, tallstore.open_bundle(after, base=base) as new:
            new.load_into(model, added)
            kept = all(same(old.state_dict(task), new.state_dict(task)) for task in earlier)
        print(f"all packed again, {name}: {nbytes(after) - nbytes(before):,} bytes more, ", end="")
        print(f"{digits.accuracy(model, added):.1%} right; the earlier experts {'are the same' if kept else 'changed'}")


if __name__ == "__main__":
    main()
