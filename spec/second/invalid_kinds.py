"""The invalid vectors of two-level, sign, sparse and uniform tensors, and of a centre."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from second.breaking import (
    GROUP_JSON,
    MASK_SHARD,
    MERGED_SHARD,
    REMOVE,
    TASK_JSON,
    Change,
    Invalid,
    again,
    extra,
    float_vector,
    header,
    load,
    numbers,
    put,
    set_bits,
    set_record,
    shard,
    swap,
)
from second.bundles import Draft
from second.content import singles
from second.elements import Json, cast, pack
from second.kernels import own_scales, ranked, two_vectors
from second.shards import Payload

group_table, task_table = (partial(put, path) for path in (GROUP_JSON, TASK_JSON))
tensor = partial(put, TASK_JSON, "tensors")
vector = partial(put, GROUP_JSON, "vectors")


def row(name: str, **fields: object) -> Change:
    """Set fields of a task's tensor, payloads among them, before they are placed; `REMOVE` deletes one.

    Fields of leading rows go by ``leading``.
    """

    def change(draft: Draft) -> None:
        rows = draft.documents[TASK_JSON]["tensors"]
        update(next(item for item in rows if item["name"] == name), fields)

    return change


def update(item: Json, fields: Json) -> None:
    """Set fields of an object, and of the objects in it."""
    for key, value in fields.items():
        if value is REMOVE:
            del item[key]
        elif isinstance(value, dict):
            update(item[key], value)
        else:
            item[key] = value


def shared(tensor_name: str, role: str, **fields: object) -> Change:
    """Set fields of a shared vector, payloads among them, before they are placed."""

    def change(draft: Draft) -> None:
        rows = draft.documents[GROUP_JSON]["vectors"]
        update(next(item for item in rows if (item["tensor"], item["role"]) == (tensor_name, role)), fields)

    return change


def no_vector(tensor_name: str, role: str) -> Change:
    """Let the group lack a vector, of which nothing else speaks."""

    def change(draft: Draft) -> None:
        rows = draft.documents[GROUP_JSON]["vectors"]
        rows[:] = [item for item in rows if (item["tensor"], item["role"]) != (tensor_name, role)]

    return change


def steps(role: str, tensor_name: str, values: list[float]) -> Payload:
    """Steps in the group's pool."""
    file = MERGED_SHARD.rpartition("/")[2]
    return Payload(f"{role}.step/{tensor_name}", "F32", len(values), singles(values), "pooled", file)


def own(name: str, dtype: str, values: list[float], codec: str = "raw") -> Payload:
    """Values of a sparse tensor."""
    return Payload(f"values/{name}", dtype, len(values), cast(np.array(values, np.float64), dtype), codec)


def bits_of(name: str, count: int, at: list[int], codec: str = "raw") -> Payload:
    """Bits of a sparse tensor."""
    bits = np.zeros(count, np.int64)
    bits[at] = 1
    return Payload(f"bits/{name}", "bits", count, pack(bits, 1), codec, ranked=True)


SIGNS = Payload("bits/ids", "bits", 3, b"\5", "pooled")


def gains(name: str, count: int) -> Payload:
    """Gains in the mask's pool."""
    return Payload(f"gains/{name}", "F32", count, singles([1.5] * count), "pooled")


def lo_values(values: list[float]) -> Payload:
    """Another merged_lo of t, in float32."""
    return Payload("merged_lo/t", "F32", 15, singles(values), file=MERGED_SHARD.rpartition("/")[2])


def centre_vector(name: str, count: int) -> Json:
    """A centre in float32."""
    made = float_vector(name, count)
    return made | {"role": "centre", "values": replace(made["values"], key=f"centre/{name}")}


def ranks(*values: int) -> Change:
    """Ranks of the first records of the mask's shard."""

    def change(draft: Draft) -> None:
        for number, rank in enumerate(values):
            shard(MASK_SHARD, set_record(number, rank=rank))(draft)

    return change


def rename(path: str, old: str, new: str) -> Change:
    """Give a payload another key."""
    return header(path, lambda fields: {(new if key == old else key): value for key, value in fields.items()})


JSON = {
    "json-3-levels": load("five levels", tensor("u8", "levels", value=5)),
    "json-3-levels-two": load("two levels", tensor("u3", "levels", value=2)),
    "json-3-levels-missing": load("no levels", tensor("u3", "levels", value=REMOVE)),
    "json-3-levels-text": load("levels in a string", tensor("u8", "levels", value="8")),
    "json-3-count-missing": load("no count", tensor("s", "count", value=REMOVE)),
    "json-3-count-negative": load("a negative count", tensor("s", "count", value=-1)),
    "json-3-count-fraction": load("a fraction for a count", tensor("s", "count", value=5.0)),
    "json-3-values-dtype": load("values in float64", tensor("s", "values_dtype", value="F64")),
    "json-3-values-dtype-codes": load("values in int8", tensor("s", "values_dtype", value="I8")),
    "json-3-values-dtype-missing": load("no dtype of the values", tensor("s", "values_dtype", value=REMOVE)),
    "json-3-no-bits": load("signs without bits", tensor("g", "bits", value=REMOVE)),
    "json-3-no-fields": load("levels without fields", tensor("u3", "fields", value=REMOVE)),
    "json-3-leading-kind": load("private leading rows", tensor("es", "leading", "kind", value="private")),
    "json-3-leading-levels": load("six levels of leading rows", tensor("eu", "leading", "levels", value=6)),
    "ver-3-levels": load("levels of a sign", tensor("g", "levels", value=4)),
    "ver-3-count": load("a count of a uniform tensor", tensor("u3", "count", value=7)),
    "ver-3-values": load("values of a sign", tensor("g", "values", value=None)),
    "ver-3-fields": load("bits of a uniform tensor", tensor("u3", "bits", value=None)),
    "ver-3-leading": load("a dtype of leading rows", tensor("es", "leading", "dtype", value="F32")),
    "ver-4-kind-sparse": load(
        "a kind of this version is no feature", task_table("required_features", value=["sparse"])
    ),
}

OWN_TABLES = {
    "tab-1-sign-integer-base": load(
        "signs over int64", row("ids", kind="sign", dtype="F32", gain=1.0, row_axes=1, bits=SIGNS)
    ),
    "tab-1-sign-integer-result": load("signs that give int32", tensor("g", "dtype", value="I32")),
    "tab-1-sparse-shape": load("a sparse tensor of another shape", tensor("s", "shape", value=[5, 7])),
    "tab-1-uniform-empty": load(
        "levels of a tensor of no elements",
        row(
            "empty",
            kind="uniform",
            levels=3,
            gain=1.0,
            fields=Payload("fields/empty", "2-bit fields", 0, b"", "pooled"),
        ),
    ),
    "tab-1-sparse-empty": load(
        "a sparse tensor of no elements",
        row("empty", kind="sparse", gain=1.0, count=0, values_dtype="F16", bits=bits_of("empty", 0, [], "pooled")),
    ),
    "tab-1-leading-integer": load("levels of leading rows that give int32", tensor("eu", "dtype", value="I32")),
    "tab-2-sign": load("a base tensor that is not there", tensor("g", "base", value="G")),
    "tab-6-sparse-null": load("five bits, and no values", tensor("s", "values", value=None)),
    "tab-6-sparse-absent": load("five bits, and no key for values", tensor("s", "values", value=REMOVE)),
    "tab-6-sparse-empty": load(
        "no bit, and values", row("s", bits=bits_of("s", 35, []), count=0, values=own("s", "BF16", []))
    ),
    "tab-6-sparse-leading": load(
        "three bits of leading rows, and no values", tensor("es", "leading", "values", value=None)
    ),
    "tab-6-sparse-overlap": load("values that lie on their bits", tensor("z", "values", "at", value=8)),
    "tab-6-sparse-range": load("values beyond the pool", tensor("z", "values", "at", value=1 << 20)),
    "tab-7-sign-both": load("gain and gains", tensor("g", "gain", value=1.0)),
    "tab-7-uniform-neither": load("neither gain nor gains", tensor("u3", "gain", value=REMOVE)),
    "tab-7-sparse-row-axes": load("three row axes of two", tensor("s", "row_axes", value=3)),
    "tab-7-leading-row-axes": load("three row axes of two", tensor("eu", "leading", "row_axes", value=3)),
}

TWO_TABLES = {
    "tab-1-centre-integer": load("a centre over int64", extra("vectors", centre_vector("ids", 3))),
    "tab-1-centre-empty": load("a centre over a tensor of no elements", extra("vectors", centre_vector("empty", 0))),
    "tab-2-centre": load("a centre over nothing", extra("vectors", centre_vector("C", 3))),
    "tab-5-no-merged-lo": load("two levels, and no merged_lo", no_vector("t", "merged_lo")),
    "tab-5-no-merged": load("two levels, and no merged", no_vector("t", "merged")),
    "tab-5-leading": load("two levels of leading rows, and no merged_lo", no_vector("et", "merged_lo")),
    "tab-5-centre": load("a mask over a centre, and no merged", no_vector("c", "merged")),
    "tab-6-centre-no-step": load("a centre in LOG4 without steps", shared("c", "centre", step=None)),
    "tab-6-centre-step": load(
        "a centre in float32 with a step", shared("d", "centre", step=steps("centre", "d", [1.0]))
    ),
    "tab-7-centre-row-axes": load("two row axes of one", vector("d", "row_axes", value=2)),
    "tab-7-steps": load(
        "steps of merged by row, one of merged_lo",
        shared("t", "merged_lo", row_axes=0, step=steps("merged_lo", "t", [0.25])),
    ),
    "tab-7-steps-unused": load(
        "steps of merged by row, one of merged_lo, which nothing uses",
        row("t", kind="mask"),
        shared("t", "merged_lo", row_axes=0, step=steps("merged_lo", "t", [0.25])),
    ),
    "tab-7-lo-disagree": load(
        "one gain in a payload, steps of merged_lo by row, none of merged",
        row("et", leading={"gain": REMOVE, "row_axes": 0, "gains": gains("et", 1)}),
    ),
    "tab-7-hi-disagree": load(
        "gains over two axes, steps of merged over one, none of merged_lo",
        row("t", gain=REMOVE, row_axes=2, gains=gains("t", 15)),
        shared("t", "merged_lo", dtype="F32", step=None, values=lo_values([0.5] * 15)),
    ),
    "tab-8-centre": load("a centre twice", again(GROUP_JSON, "vectors", -1)),
    "json-3-centre-dtype": load("a centre in float64", vector("d", "dtype", value="F64")),
    "ver-3-two-level": load("values of a two-level tensor", tensor("t", "values", value=None)),
    "ver-4-role-centre": load(
        "a role of this version is no feature", group_table("required_features", value=["centre"])
    ),
}

FIVE = [0.5, -0.25, 0.125, 1.0, -2.0]
COUNTS = {
    "tab-9-more": load("five bits, six said, and six values", row("s", count=6, values=own("s", "BF16", [*FIVE, 3.0]))),
    "tab-9-fewer": load("five bits, four said, and four values", row("s", count=4, values=own("s", "BF16", FIVE[:4]))),
    "tab-9-none": load("five bits, none said, and no values", row("s", count=0, values=None)),
    "tab-9-no-bit": load("no bit, five said, and five values", row("s", bits=bits_of("s", 35, []))),
    "tab-9-over": load(
        "36 of 35 elements",
        row("s", bits=bits_of("s", 35, [*range(35)]), count=36, values=own("s", "BF16", [0.5] * 36)),
    ),
    "tab-9-huge": load("2^62 of 35 elements, whose bytes are 0 in 64 bits", tensor("s", "count", value=1 << 62)),
    "tab-9-pooled": load(
        "two pooled bits, three said, and three values",
        row("z", count=3, values=own("z", "F32", FIVE[:3], "pooled")),
    ),
    "tab-9-leading": load(
        "three bits of leading rows, two said, and two values",
        row("es", leading={"count": 2, "values": own("es", "F16", FIVE[:2])}),
    ),
}

UNITS = {
    "tab-10-three": load("a unit of 3", tensor("s", "unit", value=3.0)),
    "tab-10-zero": load("a unit of 0", tensor("s", "unit", value=0.0)),
    "tab-10-negative": load("a unit of -1/2", tensor("s", "unit", value=-0.5)),
    "tab-10-small": load("a unit of 2^-61", tensor("s", "unit", value=2.0**-61)),
    "tab-10-large": load("a unit of 2^61", tensor("z", "unit", value=2.0**61)),
    "tab-10-leading": load("a unit of 3/4 of leading rows", tensor("es", "leading", "unit", value=0.75)),
    "json-3-unit": load("a unit in a string", tensor("s", "unit", value="1")),
    "ver-3-unit": load("a unit of signs", tensor("g", "unit", value=1.0)),
}

INDEXES = {
    "idx-5-one-chunk": load("a rank of the only chunk: its own bits", ranks(0, 5)),
    "idx-5-sign": load("a rank of signs", ranks(6)),
    "st-6-sparse-values": load("no key for a sparse tensor's values", rename(MASK_SHARD, "values/s", "own/s")),
}

RANKED = {  # rightly 0, 3 and 5, and 0 of the values
    "idx-5-first": load("a first rank of 1", ranks(1)),
    "idx-5-descending": load("ranks that descend", ranks(0, 5, 3)),
    "idx-5-middle": load("another rank of the second chunk", ranks(0, 2)),
    "idx-5-last": load("another rank of the last chunk", ranks(0, 3, 6)),
    "idx-5-own": load("ranks that count their own chunk", ranks(3, 5, 6)),
    "idx-5-zero": load("ranks of 0", ranks(0, 0, 0)),
    "idx-5-before": load("ranks that count the chunk before alone", ranks(0, 3, 2)),
    "idx-5-huge": load("a rank of 2^64 - 1", ranks(0, (1 << 64) - 1)),
    "idx-5-values": load("a rank of the values", ranks(0, 3, 5, 6)),
    "tab-9-chunks-more": load(
        "six bits in three chunks, seven said, and seven values", row("s", count=7, values=own("s", "F16", [0.5] * 7))
    ),
    "tab-9-chunks-fewer": load(
        "six bits in three chunks, five said, and five values", row("s", count=5, values=own("s", "F16", [0.5] * 5))
    ),
}

OWN_CONTENTS = {
    "bit-1-sign": load("a bit behind element 12 of signs", set_bits("bits/g", -1, 0x20)),
    "bit-1-sparse": load("a bit behind element 34, and no value for it", set_bits("bits/s", -1, 0x08)),
    "bit-1-sparse-counted": load(
        "a bit behind element 34, and a value for it",
        set_bits("bits/s", -1, 0x08),
        row("s", count=6),
        swap("values/s", count=6, raw=cast(np.array([*FIVE, 3.0]), "BF16")),
    ),
    "bit-1-levels": load("2 bits behind element 6", set_bits("fields/u3", -1, 0x40)),
    "bit-1-levels-wide": load("4 bits behind element 4", set_bits("fields/u8", -1, 0x10)),
    "bit-1-levels-leading": load("4 bits behind element 8 of leading rows", set_bits("fields/eu", -1, 0x40)),
    "field-1-levels": load("code 3 of three levels", set_bits("fields/u3", 0, 0x03)),
    "field-1-levels-8": load("code 8 of eight levels", swap("fields/u8", raw=pack(np.array([0, 7, 8, 4, 1]), 4))),
    "field-1-levels-15": load("code 15 of eight levels", swap("fields/u8", raw=pack(np.array([0, 7, 3, 4, 15]), 4))),
    "field-1-leading": load("code 12 or more of eight levels of leading rows", set_bits("fields/eu", 2, 0xC0)),
    "num-1-sign-gains": load("14 significant bits", numbers("gains/g", 1 + 2.0**-13)),
    "num-1-uniform-gain": load("0.1", tensor("u3", "gain", value=0.1)),
    "num-1-leading-gain": load("-0.0", tensor("eu", "leading", "gain", value=-0.0)),
    "num-2-values-nan": load("a NaN", numbers("values/z", math.nan)),
    "num-2-values-infinity": load("-infinity", numbers("values/z", 0.5, -math.inf)),
    "num-2-values-negative-zero": load("-0.0", numbers("values/z", 0.5, -0.0)),
    "num-2-values-small": load("2^-61", numbers("values/z", 2.0**-61)),
    "num-2-values-bfloat16": load("bfloat16 -0.0", swap("values/s", raw=bytes(8) + b"\x00\x80")),
    "num-2-values-bfloat16-small": load("bfloat16 2^-61", swap("values/s", raw=bytes(8) + b"\x00\x21")),
    "num-2-values-float16": load("a float16 infinity", swap("values/es", raw=b"\x00\x7c" + bytes(4))),
    "cod-4-levels": load("planes of 4-bit fields", swap("fields/u8", codec="planes-zstd", stored=(b"x",))),
    "cod-4-sparse-bits": load("planes of a sparse tensor's bits", swap("bits/s", codec="planes-zstd", stored=(b"x",))),
    "cod-5-levels": load("eight levels in 2 bits each", swap("fields/u8", raw=pack(np.array([0, 3, 2, 1, 0]), 2))),
    "cod-5-values": load("a value too few", swap("values/s", raw=cast(np.array(FIVE[:4]), "BF16"))),
    "cod-5-values-dtype": load("values of another dtype", swap("values/s", raw=singles(FIVE))),
}

TWO_CONTENTS = {
    "bit-1-two-level": load("a bit behind element 14", set_bits("bits/t", -1, 0x80)),
    "bit-1-centre": load("a code behind element 14 of a centre", set_bits("centre/c", -1, 0x20)),
    "int8-1-centre": load("code -128 of a centre", swap("centre/t", raw=b"\x80" + bytes(14))),
    "int8-1-merged-lo": load("code -128 of merged_lo", swap("merged_lo/t", raw=bytes(14) + b"\x80")),
    "num-1-lo-step": load("14 significant bits", numbers("merged_lo.step/t", 1 + 2.0**-13)),
    "num-1-centre-step": load("14 significant bits", numbers("centre.step/c", 1 + 2.0**-13)),
    "num-2-centre": load("infinity in a centre", numbers("centre/d", math.inf)),
    "num-2-centre-negative-zero": load("-0.0 in a centre", numbers("centre/d", -0.0)),
    "num-2-merged-lo": load(
        "2^-61 in merged_lo",
        shared("t", "merged_lo", dtype="F32", step=None, values=lo_values([*[0.5] * 14, 2.0**-61])),
    ),
    "num-3-lo-scale": load(
        "2^40 times 2^40 of merged_lo", tensor("t", "gain", value=2.0**40), numbers("merged_lo.step/t", 2.0**40)
    ),
    "num-3-leading-scale": load(
        "2^40 times 2^40 of leading rows",
        tensor("et", "leading", "gain", value=2.0**40),
        numbers("merged_lo.step/et", 1.0, 2.0**40),
    ),
    "num-4-centre-step": load("a negative step of a centre", numbers("centre.step/c", -0.5)),
    "num-4-lo-step": load("a negative step of merged_lo", numbers("merged_lo.step/t", 0.5, -0.5)),
    "cod-4-centre": load("planes of LOG4 codes", swap("centre/c", codec="planes-zstd", stored=(b"x",))),
    "st-6-centre": load("no key for a centre", rename(MERGED_SHARD, "centre/c", "center/c")),
}


def on(make: Callable[[], Draft], cases: dict[str, Invalid]) -> dict[str, Invalid]:
    """*cases*, of another kernel."""
    return {name: replace(case, make=make) for name, case in cases.items()}


def on_ranked(cases: dict[str, Invalid]) -> dict[str, Invalid]:
    """*cases* of the tensor that has ranks; its base is beside the bundle."""
    file = ranked()[1]
    return {name: replace(case, make=lambda: ranked()[0], base=file, zipped=True) for name, case in cases.items()}


INVALID_KINDS: dict[str, Invalid] = {
    **on(own_scales, JSON | OWN_TABLES | COUNTS | UNITS | INDEXES | OWN_CONTENTS),
    **on(two_vectors, TWO_TABLES | TWO_CONTENTS),
    **on_ranked(RANKED),
}
