"""The valid vectors of a group's centre."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from second.content import codes, patterns, reals, scales13, weights
from second.elements import FLOATS, Array, Doubles, Integers, Singles, array, wide
from second.models import Group, Task, assemble, embedded
from second.valid import Valid
from second.valid_kinds import mixed_gains, own_values, shared

KINDS = ("mask", "signed", "two-level", "sign", "sparse", "uniform")
CENTRES = ("I8", "LOG4", "F16", "BF16", "F32")
SHAPE = (4, 3, 1)
SIGNS = np.resize([-0.0, 1.0, 0.0, -1.0, 0.5, -0.0, 2.0], 12)


def code_all(task: Task, name: str, kind: str, **options: object) -> None:
    """Let *task* code a tensor of `SHAPE`; where the kind can, some elements have no side, or a delta of 0."""
    low, high = {"signed": (-1, 2), "uniform": (0, 3)}.get(kind, (0, 2))
    drawn: Integers = codes(f"{task.name} {name}", 12, low, high)
    match kind:
        case "mask":
            task.mask(name, drawn, **options)
        case "signed":
            task.signed(name, drawn, **options)
        case "two-level":
            task.two_level(name, drawn, **options)
        case "sign":
            task.sign(name, drawn, **options)
        case "sparse":
            task.sparse(name, drawn, own_values(name, "BF16", int(drawn.sum())), **options)
        case _:
            task.uniform(name, drawn, 3, **options)


def centre() -> Valid:
    """A centre in every dtype under every kind: where something moves and nowhere else, by its own rows, no gain."""
    names = {f"{kind}.{dtype}": (kind, dtype) for kind in KINDS for dtype in CENTRES}
    # base -0.0 and 0.0 among the others: kept where nothing moves
    tensors = {name: array(FLOATS[i % 4], SHAPE, SIGNS * reals(name, 12)) for i, name in enumerate(names)}
    tensors |= {"embed": weights("embed", "F32", SHAPE), "lone": weights("lone", "F16", ())}
    base = embedded(tensors, {"head": "embed"})
    group, other = Group(base), Group(base, 2, "sign")
    for number, (name, (kind, dtype)) in enumerate(names.items()):
        if kind in ("mask", "signed", "two-level"):
            shared(group, name, "merged", "I8" if number % 2 else "F32")
        if kind == "two-level":
            shared(group, name, "merged_lo", "I8")
        shared(group, name, "centre", dtype, row_axes=number % 3)
    for name in ("embed", "lone"):
        shared(group, name, "centre", "I8")
    task, second, plain = Task(group, "t"), Task(group, "second"), Task(other, "plain")
    for number, (name, (kind, _)) in enumerate(names.items()):
        if number % 2:
            code_all(task, name, kind, gains=mixed_gains(name, 4), codec="pooled")
        else:
            code_all(task, name, kind, gain=(-2.0, 0.5, 0.0)[number // 2 % 3], dtype=FLOATS[number // 2 % 4])
    task.sign("embed", codes("embed", 12, 0, 2), gain=0.25)
    task.sign("head", codes("head", 12, 0, 2), gain=0.25)  # the centre is embed's: not of the name that is tied to it
    task.sign("lone", np.array([1]), gain=0.25)
    second.same("sign.I8")  # codes nothing: no centre
    second.same("sign.LOG4", dtype="F32")
    second.mask("mask.F32", np.zeros(12, np.int64))
    second.sign("renamed", codes("renamed", 12, 0, 2), base="mask.I8", gain=0.5)
    second.extended("sign.F32", "same", (5, 3, 1), further=weights("more", FLOATS[19 % 4], (1, 3, 1)).raw)
    second.private("sign.F16", weights("whole", "F16", SHAPE))
    for name in ("sign.I8", "sign.BF16", "embed"):
        plain.sign(name, codes(f"plain {name}", 12, 0, 2), gain=0.5)  # the centre is another group's
    return Valid(assemble(base, [group, other], [task, second, plain]), "TAB-5 TAB-7 REC-1 REC-4 REC-5 REC-7")


def two_rounding_traps(count: int) -> tuple[Singles, Singles, Singles, float]:
    """float32 bases, centres, values and a scale whose sum comes out otherwise in every other way to round it."""

    def drawn(seed: str, exponent: int) -> Singles:
        fraction = codes(seed, 4000, 0, 1 << 23).astype(np.float32) * np.float32(2.0**-23)
        return (np.float32(1) + fraction) * np.float32(2.0**exponent)

    start, middle, value = drawn("centre base", 0), drawn("centre middle", -2), drawn("centre value", -3)
    value[::2] *= -1
    scale = scales13("centre scale", 1, 0)[0]
    delta, product = np.float32(scale) * value, scale * value.astype(np.float64)
    right = (start + middle) + delta
    others = (
        (start.astype(np.float64) + middle.astype(np.float64) + product).astype(np.float32),  # rounded once
        ((start + middle).astype(np.float64) + product).astype(np.float32),  # a fused multiply-add
        start + (middle + delta),  # another order
        (start + delta) + middle,
    )
    traps = np.flatnonzero(np.all([right != other for other in others], axis=0))[:count]
    return start[traps], middle[traps], value[traps], scale


def centre_roundings() -> Valid:
    """Two sums, two roundings: what one rounding, another order, a wider or a narrower sum get wrong."""
    eps = 2.0**-30
    # base, centre, delta
    triples = [
        (1, 2**-8 + 2**-26, eps), (1, 2**-11 + 2**-26, eps), (-1, -(2**-8) - 2**-26, -eps),  # ties after the first sum
        (1, 2**-24, 2**-24), (1, 2**-24 + 2**-40, 2**-24), (1, -(2**-25), -(2**-25)),  # each too small, both not
        (1, -1, eps), (1, -1 + 2**-24, 2**-60), (0.5, 0.5, -1), (-0.5, -0.5, 1),  # sums that cancel, to +0.0
        (-0.0, 0.25, -0.25), (-0.0, 0.0, eps), (0.0, 0.0, -eps), (-0.0, 0.0, 0.0), (-0.0, 0.25, 0.0),
        (65504, 65504, -65504), (65504, 16, -16), (3e38, 1e38, -1e38), (-3e38, -1e38, 1e38), (3e38, 1e38, 0.0),
        (2.0**-130, 0.0, 2.0**-60), (2.0**-149, 0.0, -(2.0**-60)), (2.0**-24, 0.0, eps), (-(2.0**-14), 2.0**-25, eps),
    ]  # fmt: skip
    numbers: Doubles = np.array(triples, np.float64).T
    count = numbers.shape[1]
    with np.errstate(over="ignore"):
        tensors = {f"{kind}.{result}": array(kind, (count,), numbers[0] * 1.0) for kind in FLOATS for result in FLOATS}
    start, middle, value, scale = two_rounding_traps(24)
    # A float64 base whose float64 sums are inexact; float32 sums would be far off.
    fine: Doubles = 1 + codes("fine", 24, 0, 1 << 31).astype(np.float64) * 2.0**-31 + 2.0**-52
    tensors["f32 traps"] = Array("F32", (24,), start.tobytes())
    tensors["f64 traps"] = array("F64", (24,), fine)
    base = embedded(tensors)
    group = Group(base, method="several")
    task = Task(group, "t")
    for number, name in enumerate(tensors):
        kind, _, result = name.partition(".")
        if result:
            group.vector(name, "F32", numbers[1], role="centre", codec=("raw", "planes-zstd")[number % 2])
            if number % 2:
                group.vector(name, "F32", numbers[2])
                task.mask(name, np.ones(count, np.int64), dtype=result)
            else:
                own = array("F32", (count,), numbers[2])
                task.sparse(name, np.ones(count, np.int64), own, dtype=result, codec="pooled")
        else:
            tiny = np.float32(2.0**-30 if kind == "f64 traps" else 1)
            group.vector(name, "F32", (middle * tiny).astype(np.float64), role="centre")
            group.vector(name, "F32", (value * tiny).astype(np.float64))
            task.signed(name, np.ones(24, np.int64), gain=scale)
    return Valid(assemble(base, [group], [task]), "REC-2 REC-3 REC-5 REC-6")


def centre_every_exponent() -> Valid:
    """Bases over the full exponent range, with a centre and a delta near them: subnormals, overflow, what cancels."""
    tensors = {
        "f16": patterns("F16", (31, 2), [s << 15 | e << 10 | 0x155 for e in range(31) for s in (0, 1)]),
        "bf16": patterns("BF16", (255, 2), [s << 15 | e << 7 | 85 for e in range(255) for s in (0, 1)]),
        "f32": patterns("F32", (128, 2), [s << 31 | e << 23 | 0x7FFFFF for e in range(0, 255, 2) for s in (0, 1)]),
        "f64": patterns(
            "F64", (89, 2), [s << 63 | e << 52 | 0xFFFFFFFFFFFFF for e in range(0, 2047, 23) for s in (0, 1)]
        ),
    }
    tensors |= {f"{name} subnormal": tensor.rows(1) for name, tensor in tensors.items()}
    tensors |= {
        "special": patterns("F32", (8,), [0, 1 << 31, 0x7F800000, 0xFF800000, 0x7F800001, 0x7FC00000, 0xFFBFFFFF, 1]),
        "special16": patterns("F16", (8,), [0, 1 << 15, 0x7C00, 0xFC00, 0x7C01, 0x7E00, 0xFDFF, 1]),
    }
    base = embedded(tensors)
    group = Group(base, method="several")
    gains = {"one": 1.0, "minus": -0.999755859375, "large": 2.0**60, "small": 2.0**-60}
    for name, tensor in tensors.items():
        with np.errstate(over="ignore", invalid="ignore"):
            near = wide(tensor).astype(np.float64) * np.resize([-1.0, 0.5, -0.75], tensor.count)
        near = np.full(tensor.count, 0.25) if "special" in name else near
        near = np.sign(near) * np.clip(np.abs(near), 2.0**-60, 2.0**126)
        # Half of the centres are 0: so that a subnormal base stays one in the first sum.
        group.vector(name, "F32", near * np.resize([1, 0, 0, 1], tensor.count) + 0.0, role="centre")
        group.vector(name, "BF16", near)
    tasks = []
    for name, gain in gains.items():
        task = Task(group, name)
        for tensor_name, tensor in tensors.items():
            bits = codes(f"{name} {tensor_name}", tensor.count, 0, 2)
            if "special" in tensor_name:
                bits = np.array([0, 0, 1, 1, 0, 0, 0, 1])
            task.mask(tensor_name, bits, gain=gain)
        tasks.append(task)
    return Valid(assemble(base, [group], tasks), "REC-1 REC-2 REC-3 REC-5")


def centre_rows() -> Valid:
    """Steps of a centre over 0, 1 and 2 axes, under gains over 0, 1 and 2 axes, and under steps of two vectors."""
    names = {f"{middle}.{axes}": (middle, axes) for middle in (0, 1, 2) for axes in (0, 1, 2)}
    shapes = dict.fromkeys(names, (4, 3, 2)) | {"vector.1": (13,), "scalar.0": ()}
    base = embedded({name: weights(name, "F32", shape) for name, shape in shapes.items()})
    group = Group(base)
    task = Task(group, "t")
    for name, shape in shapes.items():
        middle, axes = names.get(name, (1, 1))
        count = math.prod(shape[:axes]) if len(shape) > 1 else 1
        shared(group, name, "merged", "I8", row_axes=axes)
        shared(group, name, "merged_lo", "LOG4", row_axes=axes)
        shared(group, name, "centre", "LOG4" if axes else "I8", row_axes=middle)
        bits = codes(name, math.prod(shape), 0, 2)
        task.two_level(name, bits, gains=scales13(f"gains {name}", count, 0), row_axes=axes)
    return Valid(assemble(base, [group], [task]), "REC-4 REC-7 TAB-7")


VALID_CENTRE: dict[str, Callable[[], Valid]] = {
    "centre": centre,
    "centre-rows": centre_rows,
    "centre-roundings": centre_roundings,
    "centre-every-exponent": centre_every_exponent,
}
