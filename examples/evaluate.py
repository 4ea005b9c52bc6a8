"""Evaluate every task of a bundle: one model, each expert in turn, beside the checkpoint that it was packed from.

    python examples/evaluate.py [--out DIR] [--at-least 0.95]

Fails if an expert agrees with its checkpoint on fewer test images than that: a gate before anything is shipped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import digits
from safetensors.torch import load_file

import tallstore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=digits.OUT, help="folder for checkpoints and bundle")
    parser.add_argument("--at-least", type=float, default=0.95, help="share of test images on which they must agree")
    arguments = parser.parse_args()

    base, experts = digits.checkpoints(arguments.out)
    path = arguments.out / "bundle"
    method = tallstore.Uniform(levels=3, scale="tensor")
    report = tallstore.pack(base, experts, path, method=method, embed_base=True, overwrite=True)

    trained, model = digits.network(), digits.network()
    failed = []
    print("| task | base | checkpoint | from the bundle | agreement | cosine |\n|---|---|---|---|---|---|")
    with tallstore.open_bundle(path) as bundle:
        switcher = bundle.attach(model)
        for packed in report.tasks:
            task = packed.name
            trained.load_state_dict(load_file(experts[task]))
            with switcher.disable_expert():
                untuned = digits.accuracy(model, task)
            switcher.set_expert(task)
            agreement = (digits.predict(model, task) == digits.predict(trained, task)).double().mean().item()
            scores = (untuned, digits.accuracy(trained, task), digits.accuracy(model, task), agreement)
            print(f"| {task} | {' | '.join(f'{score:.1%}' for score in scores)} | {packed.cosine:.3f} |")
            if agreement < arguments.at_least:
                failed.append(f"{task}: agrees on {agreement:.1%}, less than {arguments.at_least:.1%}")
    if failed:
        sys.exit("\n".join([*failed, "more bits make them truer: Uniform(levels=4), 8 or 16; see `tallstore compare`"]))


if __name__ == "__main__":
    main()
