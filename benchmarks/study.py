"""Behind the defaults: what each choice in a fit is worth, on real experts or on small ones.

    python benchmarks/study.py gain whole shared     --experts DIR [--tasks NAME,NAME] [--limit 400]
    python benchmarks/study.py frontier              --small 20 [--trained OUT]

gain      which one number scales a reconstruction best, and over how much of it: a row, a tensor, a layer, all
whole     what had better be stored whole
shared    what the tasks of SignedMask had better share, at equal density
frontier  agreement by bits, packed: SignedMask and Uniform(3) over their thresholds, Auto, and fits without a choice

The first three are formulas on whole tensors in float32, nothing quantised; the last is read from bundles' bytes.
Experts are as for fidelity.py.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import dense_fits
import torch
from dense_fits import By, DenseFit, Gain, Shape, Span, signed_mask
from fidelity import Family, Fit, Row, add_source, formula, heading, line, measure, open_family

import tallstore

SHAPES: dict[str, Shape] = {
    "SignedMask(1.2)": signed_mask(1.2),
    "SignedMask(2.0, row)": signed_mask(2.0, "row"),
    "TallMask(1.0)": dense_fits.tall_mask(1.0),
    "Sign(tensor)": dense_fits.sign(),
    "Sign(row)": dense_fits.sign("row"),
    "Emr()": dense_fits.emr,
    "LeastSquares(1, row)": dense_fits.least_squares(1),
    "LeastSquares(1, tensor)": dense_fits.least_squares(1, "tensor"),
    "Uniform(3, threshold=1.0)": dense_fits.uniform(3, threshold=1.0),
}
RULES: tuple[Gain, ...] = ("one", "norm", "magnitudes", "least-squares")
BITS = (0.5, 0.75, 1.0, 1.5, 2.0)


def gains(_family: Family) -> list[Fit]:
    """Every rule a tensor; gain one a row, a layer and a task; and a little less and more than one."""
    fits = [formula(f"{name}: {rule}", DenseFit(shape, rule)) for name, shape in SHAPES.items() for rule in RULES]
    spans: tuple[Span, ...] = ("row", "layer", "task")
    for name in ("SignedMask(1.2)", "TallMask(1.0)", "Sign(tensor)"):
        shape = SHAPES[name]
        fits += [formula(f"{name}: one, a {span}", DenseFit(shape, by=span)) for span in spans]
        fits += [formula(f"{name}: {times} times one", DenseFit(shape, times=times)) for times in (0.9, 1.1)]
    return fits


def whole(family: Family) -> list[Fit]:
    """SignedMask at a thin mask, with more and with less of the model stored whole."""
    base = family.weights("base")
    layers = list(dict.fromkeys(dense_fits.layer_of(name) for name in base if "." in name))
    numbered = [layer for layer in layers if layer[-1].isdigit()]
    others = tuple(name for name in base if dense_fits.layer_of(name) not in numbered)
    choices = {
        "all under 4,096 elements whole": DenseFit(signed_mask(1.6)),
        "all coded but single numbers": DenseFit(signed_mask(1.6), small=2),
        "all that is in no numbered layer whole": DenseFit(signed_mask(1.6), whole=others),
        f"{numbered[0]} whole": DenseFit(signed_mask(1.6), whole=(f"{numbered[0]}.",)),
        f"{numbered[-1]} whole": DenseFit(signed_mask(1.6), whole=(f"{numbered[-1]}.",)),
    }
    return [formula(f"SignedMask(1.6): {name}", fit, whole_bits(fit, base)) for name, fit in choices.items()]


def whole_bits(fit: DenseFit, base: dense_fits.Weights) -> float:
    """What a parameter costs for tensors in float32 that are stored whole."""
    kept = sum(value.numel() for name, value in base.items() if not dense_fits.is_coded(fit, base, name))
    return 32 * kept / sum(value.numel() for value in base.values())


def shared(family: Family) -> list[Fit]:
    """What SignedMask shares, each rule at the threshold that keeps as much as a mean magnitude does at 1.2."""
    stacks = _sampled(family)
    fits = []
    for by in ("tensor", "row"):
        target = _density(signed_mask(1.2, by), stacks)
        for rule in (
            dense_fits.mean_magnitude,
            dense_fits.root_mean_square,
            dense_fits.median,
            dense_fits.alternating,
        ):
            threshold = _at_density(target, rule, by, stacks)
            name = f"{rule.__name__.replace('_', ' ')} by {by}, threshold {threshold:.2f}"
            fits.append(formula(name, DenseFit(signed_mask(threshold, by, rule)), _entropy(target)))
    return fits


def _sampled(family: Family) -> list[torch.Tensor]:
    base, experts = family.weights("base"), [family.weights(task) for task in family.tasks]
    fit = DenseFit(dense_fits.emr)
    names = [name for name in base if dense_fits.is_coded(fit, base, name)]
    return [
        torch.stack([dense_fits.task_vector(base[name], weights[name], torch.float32)[:256] for weights in experts])
        for name in names[:: max(1, len(names) // 8)]
    ]


def _density(shape: Shape, stacks: Iterable[torch.Tensor]) -> float:
    kept = [(shape(stack, ()) != 0).float().mean().item() for stack in stacks]
    return statistics.mean(kept)


def _at_density(
    target: float, rule: Callable[[torch.Tensor, float], torch.Tensor], by: By, stacks: Sequence[torch.Tensor]
) -> float:
    low, high = 0.0, 8.0
    for _ in range(12):
        middle = (low + high) / 2
        denser = _density(signed_mask(middle, by, rule), stacks) > target
        low, high = (middle, high) if denser else (low, middle)
    return (low + high) / 2


def _entropy(density: float) -> float:
    """Of a field that is plus or minus with equal chance, in bits."""
    parts = (1 - density, density / 2, density / 2)
    return -sum(part * math.log2(part) for part in parts if part)


def frontier(_family: Family) -> list[Fit]:
    """What is packed at many sizes."""
    fits = []
    for by in ("tensor", "row"):
        for threshold in (0.6, 0.9, 1.2, 1.5, 1.8, 2.2, 2.7, 3.3):
            method = tallstore.SignedMask(threshold, scale=by)
            fits.append(Fit(f"SignedMask by {by}, {threshold}", method))
        for bound in (None, 1.0, 1.5, 2.0, 2.5, 3.0):
            given = tallstore.Uniform(levels=3, scale=by, threshold=bound)
            fits.append(Fit(f"Uniform(3) by {by}, {bound}", given))
        fits.append(Fit(f"Sign by {by}", tallstore.Sign(scale=by)))
        fits.append(Fit(f"LeastSquares(1) by {by}", tallstore.LeastSquares(levels=1, scale=by)))
        fits.append(Fit(f"LeastSquares(2) by {by}", tallstore.LeastSquares(levels=2, scale=by)))
        fits.append(Fit(f"Uniform(4) by {by}", tallstore.Uniform(levels=4, scale=by)))
    return fits + [Fit(f"Auto({bits})", tallstore.Auto(bits)) for bits in BITS]


def at_bits(rows: Sequence[Row]) -> str:
    """Agreement, and cosine, of what has a threshold, where its line crosses some numbers of bits.

    Bundles of which a fit left large tensors whole have no place on the line.
    """
    series: dict[str, list[Row]] = {}
    for row in rows:
        family, comma, _ = row.fit.partition(", ")
        if comma and not row.whole:
            series.setdefault(family, []).append(row)
    lines = [f"| | {' | '.join(f'{bits} bits' for bits in BITS)} |", "|---" * (len(BITS) + 1) + "|"]
    for family, of_family in series.items():
        points = sorted((row.bits, statistics.mean(row.agreement.values()), row.cosine) for row in of_family)
        lines.append(f"| {family} | {' | '.join(_crossing(points, bits) for bits in BITS)} |")
    return "\n".join(lines)


def _crossing(points: Sequence[tuple[float, float, float]], bits: float) -> str:
    for (below, agreement, cosine), (above, higher, truer) in pairwise(points):
        if below <= bits <= above:
            share = (bits - below) / (above - below) if above > below else 0.0
            return f"{agreement + share * (higher - agreement):.2f}, {cosine + share * (truer - cosine):.3f}"
    return ""


STUDIES: dict[str, Callable[[Family], list[Fit]]] = {
    "gain": gains,
    "whole": whole,
    "shared": shared,
    "frontier": frontier,
}


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", choices=tuple(STUDIES))
    parser.add_argument("--fits", nargs="+", default=[""], metavar="TEXT", help="only those with a TEXT in their name")
    add_source(parser)
    arguments = parser.parse_args()
    with open_family(arguments, "float32") as family, tempfile.TemporaryDirectory() as scratch:
        for study in arguments.studies:
            fits = [fit for fit in STUDIES[study](family) if any(text in fit.name for text in arguments.fits)]
            print(f"\n{study}, {len(family.tasks)} tasks\n\n{heading(family.tasks)}")
            rows = []
            for row in measure(family, fits, Path(scratch), torch.float32):
                rows.append(row)
                print(line(row), flush=True)
            if study == "frontier":
                print(f"\nAgreement and cosine, between the rows:\n\n{at_bits(rows)}")


if __name__ == "__main__":
    main()
