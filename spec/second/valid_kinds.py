"""The valid vectors of two-level, sign, sparse and uniform tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from second.algebra import row_count
from second.bundles import Draft
from second.content import codes, patterns, reals, scales13, weights
from second.elements import CHUNK, FLOATS, Array, Integers, array, r13
from second.kernels import kernel, own_scales, ranked, two_vectors
from second.models import Base, Group, Task, assemble, embedded
from second.shards import safetensors
from second.valid import SHAPES, Valid, fused_traps

# Zeros of both signs, infinities, NaNs with payloads: what must come back untouched where nothing is added.
SPECIAL32 = [1 << 31, 0x7F800001, 0xFF800000, 0xFFBFFFFF, 0, 0x7F800000]


def shared(group: Group, tensor: str, role: str, dtype: str, *, row_axes: int = 1) -> None:
    """Add a pseudo-random vector, some of whose rows have a step of 0."""
    shape, seed = group.base.tensor(tensor).shape, f"{role} {tensor} {dtype}"
    count, rows = math.prod(shape), row_count(shape, row_axes)
    match dtype:
        case "I8":
            steps = scales13(f"step {seed}", rows, -8)
            steps[-1] = 0.0 if rows > 2 else steps[-1]
            group.vector(tensor, dtype, codes(seed, count, -127, 128), steps=steps, row_axes=row_axes, role=role)
        case "LOG4":
            steps = scales13(f"step {seed}", rows, -3)
            group.vector(tensor, dtype, codes(seed, count, 0, 16), steps=steps, row_axes=row_axes, role=role)
        case _:
            group.vector(tensor, dtype, reals(seed, count, -3), row_axes=row_axes, role=role)


def mixed_gains(seed: str, count: int) -> list[float]:
    """Gains of both signs; of more than three, the last is 0."""
    gains = scales13(seed, count, -1)
    gains[0] = -gains[0]
    gains[-1] = 0.0 if count > 3 else gains[-1]
    return gains


def two_level() -> Valid:
    """Two vectors, each with its own dtype and steps, under one gain and under gains by row; over 0, 1 and 2 axes."""
    pairs = [("I8", "I8"), ("LOG4", "LOG4"), ("F32", "F32"), ("I8", "F32"), ("BF16", "I8"), ("F16", "LOG4")]
    names = {f"{high}.{low}.{axes}": (high, low, axes) for high, low in pairs for axes in (0, 1, 2)}
    tensors = {name: weights(name, FLOATS[i % 4], (4, 2, 2)) for i, name in enumerate(names)}
    for name in ("scalar", "vector"):
        names[name] = ("LOG4", "I8", 1)
        tensors[name] = weights(name, "F32", SHAPES[name])
    base = embedded(tensors | {"lone": weights("lone", "F32", (3, 2)), "unused": weights("unused", "F16", (3,))})
    group = Group(base)
    shared(group, "lone", "merged_lo", "I8")
    shared(group, "unused", "centre", "LOG4")
    by_row, one = Task(group, "by-row"), Task(group, "one")
    for number, (name, (high, low, axes)) in enumerate(names.items()):
        shape = base.tensor(name).shape
        # Without steps, a vector's rows are nobody's: they may differ from those of the gains.
        shared(group, name, "merged", high, row_axes=axes if high in ("I8", "LOG4") else 1)
        shared(group, name, "merged_lo", low, row_axes=axes if low in ("I8", "LOG4") else 0)
        gains = mixed_gains(f"gains {name}", row_count(shape, axes))
        bits = codes(f"bits {name}", math.prod(shape), 0, 2)
        how = ("raw", "zstd", "pooled")[number % 3]
        by_row.two_level(name, bits, gains=gains, row_axes=axes, codec=how, dtype=FLOATS[number // 4 % 4])
        one.two_level(name, 1 - bits, gain=[1.25, -0.75, 0.0][number % 3], codec="pooled")
    mask, signed, rest = Task(group, "mask"), Task(group, "signed"), Task(group, "rest")
    mask.mask("I8.I8.1", codes("mask", 16, 0, 2))  # a group's merged_lo is nothing to a mask
    signed.signed("LOG4.LOG4.2", codes("signed", 16, -1, 2))
    # Vectors that a kind does not need: their steps may be of other rows than the gains.
    rest.sign("I8.I8.1", codes("rest", 16, 0, 2), gains=mixed_gains("rest", 8), row_axes=2)
    rest.mask("F16.LOG4.0", codes("rest lo", 16, 0, 2), gains=mixed_gains("rest lo", 4))
    rest.sign("lone", codes("lone", 6, 0, 2), gain=0.25)
    return Valid(assemble(base, [group], [by_row, one, mask, signed, rest]), "TAB-5 TAB-7 REC-1 REC-4 REC-5 REC-7")


def sign() -> Valid:
    """Signs and scales: every base dtype under every result dtype, every number of axes; a group without a vector."""
    dtypes = {f"{kind}.{result}": (kind, result) for kind in FLOATS for result in FLOATS}
    tensors = {name: weights(name, kind, (3, 3)) for name, (kind, _) in dtypes.items()}
    shapes: dict[str, tuple[int, ...]] = {**SHAPES, "one": (1,), "one by one": (1, 1), "column": (9, 1), "byte": (8,)}
    rows = {
        f"{name}.{axes}": (shape, axes)
        for name, shape in shapes.items()
        for axes in range(max(1, min(2, len(shape))) + 1)
    }
    tensors |= {name: weights(name, "F32", shape) for name, (shape, _) in rows.items()}
    tensors["kept"] = patterns("F32", (4, 3), [*SPECIAL32, *SPECIAL32])
    base = embedded(tensors)
    group = Group(base, method="sign")
    by_row, one = Task(group, "by-row"), Task(group, "one")
    for number, (name, (_, result)) in enumerate(dtypes.items()):
        bits = codes(f"bits {name}", 9, 0, 2)
        by_row.sign(name, bits, gains=mixed_gains(name, 3), dtype=result, codec=("raw", "zstd", "pooled")[number % 3])
    for number, (name, (shape, axes)) in enumerate(rows.items()):
        count, bits = row_count(shape, axes), codes(f"bits {name}", math.prod(shape), 0, 2)
        how = ("pooled", "planes-zstd", "raw", "zstd")[number % 4]
        by_row.sign(name, bits, gains=mixed_gains(name, count), row_axes=axes, gains_codec=how)
        one.sign(name, bits, gain=-0.375 if axes else 0.0, row_axes=axes, codec="pooled")
    by_row.sign("kept", codes("kept", 12, 0, 2), gains=[0.0, 0.0, 0.0, 0.0])
    one.sign("kept", codes("kept", 12, 0, 2), gain=0.0, codec="pooled")
    return Valid(assemble(base, [group], [by_row, one]), "REC-4 REC-5 REC-6 REC-7 TAB-5 BIT-1")


def own_values(seed: str, dtype: str, count: int) -> Array:
    """Pseudo-random values of a sparse tensor; the second is 0."""
    values = reals(seed, count, -3)
    values[values == 0] = 0.5
    values[1:2] = 0.0
    return array(dtype, (count,), values)


def sparse() -> Valid:
    """A tensor's own values: in every dtype over every base, none, one, all; of 0; products that are rounded."""
    own = {f"{dtype}.{kind}": (dtype, kind) for dtype in ("F16", "BF16", "F32") for kind in FLOATS}
    start, value, scale = fused_traps(11)
    edges: dict[str, tuple[tuple[int, ...], list[int]]] = {
        "first": ((13,), [0]),
        "last": ((13,), [12]),
        "all": ((3, 3), [*range(9)]),
        "scalar": ((), [0]),
        "one": ((1, 1), [0]),
        "conv": ((2, 3, 2, 2), [*range(1, 24, 3)]),
    }
    tensors = {name: weights(name, kind, (7, 5)) for name, (_, kind) in own.items()}
    tensors |= {name: weights(name, "F32", shape) for name, (shape, _) in edges.items()}
    for name in ("none", "none pooled", "none absent", "zeros"):
        tensors[name] = patterns("F32", (6,), SPECIAL32)
    base = embedded(tensors | {"fma": Array("F32", (11,), start.tobytes())})
    task = Task(Group(base, method="localize"), "t")
    for number, (name, (dtype, _)) in enumerate(own.items()):
        bits = (codes(f"bits {name}", 35, 0, 4) == 0).astype(np.int64)
        task.sparse(
            name,
            bits,
            own_values(name, dtype, int(bits.sum())),
            gains=mixed_gains(name, 7),  # by the row of the element, not of the value
            dtype=FLOATS[number // 3],
            codec=("raw", "zstd", "pooled")[number % 3],
            own_codec=("planes-zstd", "raw", "pooled", "zstd")[number % 4],
            own_file="private-00001-of-00001.safetensors" if number % 2 else None,
        )
    for number, (name, (shape, at)) in enumerate(edges.items()):
        bits = np.zeros(math.prod(shape), np.int64)
        bits[at] = 1
        axes = min(2, len(shape))
        gains = mixed_gains(name, row_count(shape, axes)) if name != "last" else None
        task.sparse(
            name, bits, own_values(name, "F16", len(at)), gain=-1.5, gains=gains, row_axes=axes,
            codec=("pooled", "raw")[number % 2], unit=[2.0**-60, 2.0**60, 1.0, 0.5][number % 4],
        )  # fmt: skip
    nothing = np.zeros(6, np.int64)
    task.sparse("none", nothing, Array("BF16", (0,), b""))
    task.sparse("none pooled", nothing, Array("F32", (0,), b""), gains=[0.5], codec="pooled")
    task.sparse("none absent", nothing, Array("F16", (0,), b""), codec="zstd")
    for key in ("values", "row_axes"):
        del task.tensors[-1][key]  # absent is null, and 1
    task.sparse("zeros", 1 - nothing, array("BF16", (6,), np.zeros(6)), gain=4.0)
    task.sparse("fma", 1 + np.zeros(11, np.int64), Array("F32", (11,), value.tobytes()), gain=scale)
    return Valid(assemble(base, [task.group], [task]), "TAB-6 TAB-9 TAB-10 IDX-5 NUM-2 REC-1 REC-2 REC-5")


def uniform() -> Valid:
    """Fields of 3, 4, 8 and 16 levels: every code, every padding; over every base dtype, by one scale and by row."""
    by_row: dict[str, tuple[int, int]] = {
        f"{levels}.{axes}": (levels, axes) for levels in (3, 4, 8, 16) for axes in (0, 1, 2)
    }
    tensors = {name: weights(name, FLOATS[i % 4], (4, 3, 1)) for i, name in enumerate(by_row)}
    for levels in (3, 4, 8, 16):
        tensors[f"{levels} every"] = weights(f"every {levels}", "F32", (2 * levels + 1,))
        for size in range(1, 6 if levels < 8 else 3):
            tensors[f"{levels} tail {size}"] = weights(f"tail {levels}", "F32", (size,))
    tensors |= {"3 scalar": weights("3 scalar", "F16", ()), "16 scalar": weights("16 scalar", "BF16", ())}
    tensors |= {f"{levels} kept": patterns("F32", (6,), SPECIAL32) for levels in (3, 16)}
    base = embedded(tensors)
    task = Task(Group(base, method="uniform"), "t")
    for number, name in enumerate(tensors):
        levels, count = int(name.partition(" ")[0].partition(".")[0]), tensors[name].count
        fields = codes(f"fields {name}", count, 0, levels)
        how = ("raw", "zstd", "pooled")[number % 3]
        if name in by_row:
            axes = by_row[name][1]
            gains = mixed_gains(name, row_count((4, 3, 1), axes))
            task.uniform(name, fields, levels, gains=gains, row_axes=axes, codec=how, dtype=FLOATS[number // 4])
        elif "every" in name:
            task.uniform(
                name, np.array([*range(levels), *range(levels), levels - 1]), levels, gain=4097 / 8192, codec=how
            )
        elif "kept" in name:  # three levels have a zero; sixteen have none, and need a gain of 0
            task.uniform(name, np.ones(6, np.int64), levels, gain=1.0 if levels == 3 else 0.0, codec=how)
        else:
            task.uniform(name, fields, levels, gain=-0.3125, codec=how)
    return Valid(assemble(base, [task.group], [task]), "FIELD-1 BIT-1 CHK-2 REC-4 REC-5 REC-7")


def extended_kinds() -> Valid:
    """Vocabularies that grew and shrank, with leading rows of every kind, with and without a centre."""
    shapes = {f"{how}.{kind}": shape for how, shape in (("grown", (5, 3)), ("shrunk", (5, 2, 2))) for kind in
              ("two-level", "sign", "sparse", "uniform")}  # fmt: skip
    tensors = {name: weights(name, FLOATS[i % 4], shape) for i, (name, shape) in enumerate(shapes.items())}
    tensors |= {"bias": weights("bias", "F32", (5,)), "empty": weights("empty", "F16", (3, 2))}
    base = embedded(tensors)
    group = Group(base)
    task = Task(group, "t")
    for name in tensors:
        if "two-level" in name:
            shared(group, name, "merged", "I8")
            shared(group, name, "merged_lo", "LOG4")
        shared(group, name, "centre", "LOG4" if "grown" in name else "I8")
    further = {
        name: weights(f"further {name}", tensor.dtype, (2, *tensor.shape[1:])).raw for name, tensor in tensors.items()
    }
    for name, (rows, *inner) in shapes.items():
        grown, kind = name.startswith("grown"), name.partition(".")[2]
        shape = (rows + 2 if grown else rows - 2, *inner)
        leading = (min(rows, shape[0]), *inner)
        count = math.prod(leading)
        drawn = codes(name, count, 0, 8 if kind == "uniform" else 2)
        own = own_values(name, "BF16", int(drawn.sum())) if kind == "sparse" else None
        task.extended(
            name, kind, shape, drawn, own=own, levels=8 if kind == "uniform" else 0,
            gains=mixed_gains(name, leading[0]) if grown else None, gain=0.75,
            further=further[name] if grown else b"", codec="pooled" if grown else "raw",
        )  # fmt: skip
    task.extended("bias", "sign", (7,), codes("bias", 5, 0, 2), gain=0.25, further=further["bias"])
    nothing = Array("F32", (0,), b"")
    task.extended("empty", "sparse", (5, 2), np.zeros(6, np.int64), own=nothing, further=further["empty"])
    return Valid(assemble(base, [group], [task]), "TAB-4 TAB-5 TAB-6 TAB-9 REC-7")


def kinds_chunks() -> Valid:
    """More than a chunk of bits, fields and values: ranks, and a chunk without a bit; two vectors and a centre."""
    shape, long = (1031, 1019), (3 * CHUNK + 13,)
    # bfloat16 0.74609375, and 3.0 where 577/256 is added: of two equal bytes each, so that run-length blocks hold them
    step = 577 / 256

    def dull(shape: tuple[int, ...]) -> Array:
        return Array("BF16", shape, b"\x3f\x3f" * math.prod(shape))

    shapes = {"ranks": long, "pooled": long, "rows": shape, "uniform": shape, "two-level": shape}
    base = Base({name: dull(shape) for name, shape in shapes.items()})
    group = Group(base, method="several")
    count = math.prod(shape)
    low, middle = [0.25] * 1031, [65 / 256] * 1031
    low[1029], middle[1029] = 2.0, 0.5  # the row that crosses the boundary
    group.vector("two-level", "I8", np.ones(count), steps=[2.0] * 1031, codec="zstd", step_codec="planes-zstd")
    group.vector("two-level", "LOG4", np.full(count, 5), steps=low, codec="zstd", step_codec="zstd", role="merged_lo")
    group.vector("two-level", "LOG4", np.zeros(count), steps=middle, codec="zstd", step_codec="zstd", role="centre")

    def stirred(drawn: Integers, high: int) -> Integers:
        """Other codes at the boundary, at the end, and where a reader may cut a chunk."""
        cuts = np.arange(1 << 15, CHUNK, 1 << 15)
        drawn[cuts - 1], drawn[cuts] = (
            codes("before a cut", cuts.size, 0, high),
            codes("behind a cut", cuts.size, 0, high),
        )
        drawn[CHUNK - 20 : CHUNK + 20] = codes("boundary", 40, 0, high)
        drawn[-7:] = codes("tail", 7, 0, high)
        return drawn

    task = Task(group, "t")
    bits = np.zeros(long, np.int64)
    bits[[3, 4, 700, CHUNK - 1]] = 1
    bits[CHUNK : 2 * CHUNK] = 1  # all of the second chunk, none of the third
    bits[3 * CHUNK :] = codes("last chunk", 13, 0, 2)
    for name, dtype, value, codec in (("ranks", "F32", step, "zstd"), ("pooled", "F16", 2.125, "pooled")):
        values = np.full(int(bits.sum()), value)  # float16 2.125 is of two equal bytes, too
        values[:20] = reals(name, 20)
        values[-20:] = reals(name, 20, -1)
        values[1 << 15 : CHUNK : 1 << 15] = reals(f"{name} cuts", 31)
        values[CHUNK - 3 : CHUNK + 3] = [1, -2, 3, -4, 5, -6]  # where the values' own chunks meet
        own = array(dtype, values.shape, values)
        how = "pooled" if codec == "pooled" else "planes-zstd"
        task.sparse(name, bits, own, codec=codec, own_codec=how, gain=r13(step / value))
    thin = stirred(np.zeros(count, np.int64), 2)
    gains = np.resize([1.0, -1.0, 0.5], 1031).tolist()
    task.sparse("rows", thin, own_values("rows", "F16", int(thin.sum())), codec="zstd", gains=gains)
    task.uniform("uniform", stirred(np.full(count, 4), 8), 8, gain=2 * step, codec="zstd")
    task.two_level("two-level", stirred(np.ones(count, np.int64), 2), codec="zstd")
    draft = assemble(base, [group], [task])
    draft.pool_codec = "zstd"
    return Valid(draft, "CHK-1 CHK-2 IDX-2 IDX-5 TAB-9", base=safetensors(base.tensors), zipped=True)


def unbroken(make: Callable[[], Draft]) -> Valid:
    """A bundle that invalid vectors break, before it is broken."""
    return Valid(make(), "TAB-1 TAB-5 TAB-9")


def unbroken_ranked() -> Valid:
    """The bundle that invalid vectors of ranks break, before it is broken."""
    draft, base = ranked()
    return Valid(draft, "IDX-5 TAB-9", base=base, zipped=True)


VALID_KINDS: dict[str, Callable[[], Valid]] = {
    "two-level": two_level,
    "sign": sign,
    "sparse": sparse,
    "uniform": uniform,
    "extended-kinds": extended_kinds,
    "kinds-chunks": kinds_chunks,
    "unbroken-kernel": partial(unbroken, kernel),
    "unbroken-own-scales": partial(unbroken, own_scales),
    "unbroken-two-vectors": partial(unbroken, two_vectors),
    "unbroken-ranked": unbroken_ranked,
}
