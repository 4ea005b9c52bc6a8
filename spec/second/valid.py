"""The valid vectors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from second.algebra import row_count
from second.breaking import put
from second.bundles import MANIFEST, Draft
from second.content import codes, patterns, reals, scales13, weights
from second.elements import CHUNK, FLOATS, NBYTES, Array, Doubles, Integers, Singles, array, wide
from second.frames import frame
from second.models import Base, Group, Task, assemble, embedded
from second.shards import compact, safetensors

SHAPES: dict[str, tuple[int, ...]] = {"scalar": (), "vector": (13,), "matrix": (7, 5), "conv": (2, 3, 2, 2)}


@dataclass
class Valid:
    """A valid vector.

    Attributes:
        rules: ids that it exercises.
        base: content of the file that goes beside the bundle, for a base by reference.
        zipped: whether base and expected tensors stand there as zstd frames, since they are long and dull.
        not_fetched: tasks whose files are not there.
        warns: whether a reader of this version has something to warn of.
    """

    draft: Draft
    rules: str
    base: bytes | None = None
    zipped: bool = False
    not_fetched: list[str] = field(default_factory=list)
    warns: bool = False


def worked_example() -> Valid:
    """The thirteen elements that the specification works through."""
    base = embedded({"w": array("BF16", (13,), np.array([1, 0.5, 0, 0.25, 3, -0.0, -1, 0, 2, 0, 4, 0, 0.125]))})
    group = Group(base)
    group.vector("w", "LOG4", np.arange(13), steps=[3 / 64])
    task = Task(group, "t")
    bits = np.zeros(13, np.int64)
    bits[[0, 2, 3, 7, 8, 12]] = 1
    task.mask("w", bits, gain=1.25)
    return Valid(assemble(base, [group], [task]), "REC-1 REC-2 REC-4 BIT-1")


def merged_vector(dtype: str) -> Valid:
    """A merged vector in one dtype; base tensors of every shape in float16, bfloat16, float32 and float64."""
    names = {f"{kind.lower()}.{shape}": (kind, SHAPES[shape]) for kind in FLOATS for shape in SHAPES}
    base = embedded({name: weights(name, kind, shape) for name, (kind, shape) in names.items()})
    group = Group(base)
    for name, (_, shape) in names.items():
        count, rows = math.prod(shape), row_count(shape, 1)
        steps = None
        if dtype in ("I8", "LOG4"):
            steps = scales13(f"step {name}", rows, -7 if dtype == "I8" else -2)
            steps[-1] = 0.0 if rows > 2 else steps[-1]
        match dtype:
            case "I8":
                numbers: Integers | Doubles = codes(f"merged {name}", count, -127, 128)
            case "LOG4":
                numbers = codes(f"merged {name}", count, 0, 16)
            case _:
                numbers = reals(f"merged {name}", count, -2)
        group.vector(name, dtype, numbers, steps=steps)
    mask, signed = Task(group, "mask"), Task(group, "signed")
    for name, (_, shape) in names.items():
        count = math.prod(shape)
        gain = scales13(f"gain {name}", 1, 0)[0]
        mask.mask(name, codes(f"bits {name}", count, 0, 2), gain=gain)
        signed.signed(name, codes(f"fields {name}", count, -1, 2), gain=gain)
    return Valid(assemble(base, [group], [mask, signed]), "REC-1 REC-2 REC-3 REC-4 REC-5 REC-7 NUM-1")


def result_dtypes() -> Valid:
    """Every base dtype under every result dtype: ties, what a second rounding would take for one, and overflow."""
    ties = [1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-11, 1 + 2**-24, 1 + 3 * 2**-24]
    beside = [1 + 2**-11 + 2**-30, 1 + 2**-8 + 2**-45, 1 + 2**-8 - 2**-40, 1 + 2**-24 + 2**-50]
    ends = [65504.0, 65519.0, 65520.0, -65520.0, 1e5, 3.0e38, 2**-24, 2**-25, 3 * 2**-26, 0.0, -0.0]
    numbers = np.array([*ties, *beside, *ends])
    count = numbers.size
    tensors, steps = {}, np.tile([0.0, 2.0**-12, -(2.0**-12), 1.0], count)
    for kind in FLOATS:
        for result in FLOATS:
            tensors[f"{kind}.{result}"] = array(kind, (count, 4), np.repeat(numbers, 4))
    base = embedded(tensors)
    group = Group(base, method="tall-mask")
    task = Task(group, "t")
    for name in tensors:
        group.vector(name, "F32", steps, codec="planes-zstd")
        task.mask(name, np.tile([1, 1, 1, 0], count), dtype=name.partition(".")[2])
    return Valid(assemble(base, [group], [task]), "REC-2 REC-3 REC-5 REC-6")


def every_exponent() -> Valid:
    """Bases over the full exponent range, -0.0, subnormals, infinities and NaN payloads; gains from 2^-60 to 2^60."""
    tensors = {
        # Both signs, every exponent (of F64 every ninth), and two mantissas.
        "f16": patterns("F16", (31, 4), [s << 15 | e << 10 | m for e in range(31) for s in (0, 1) for m in (1, 0x3FF)]),
        "bf16": patterns("BF16", (255, 4), [s << 15 | e << 7 | m for e in range(255) for s in (0, 1) for m in (0, 85)]),
        "f32": patterns(
            "F32", (255, 4), [s << 31 | e << 23 | m for e in range(255) for s in (0, 1) for m in (1, 0x7FFFFF)]
        ),
        "f64": patterns(
            "F64",
            (228, 4),
            [s << 63 | e << 52 | m for e in range(0, 2047, 9) for s in (0, 1) for m in (1, (1 << 52) - 1)],
        ),
        # Zeros, infinities and NaNs whose payloads must survive where nothing is added.
        "special16": patterns("F16", (8,), [0, 0x8000, 0x7C00, 0xFC00, 0x7C01, 0x7E00, 0xFDFF, 0xFFFF]),
        "specialb16": patterns("BF16", (8,), [0, 0x8000, 0x7F80, 0xFF80, 0x7F81, 0x7FC0, 0xFFBF, 0xFFFF]),
        "special32": patterns(
            "F32", (8,), [0, 1 << 31, 0x7F800000, 0xFF800000, 0x7F800001, 0x7FC00000, 0xFFBFFFFF, 0xFFFFFFFF]
        ),
        "special64": patterns("F64", (8,), [0, 1 << 63, 0x7FF << 52, 0xFFF << 52, 0x7FF << 52 | 1, 0xFFF8 << 48, 1, 2]),
    }
    base = embedded(tensors)
    group = Group(base)
    for name, tensor in tensors.items():
        # Magnitudes near the base's own, kept in [2^-60, 2^127]: sums that cancel, round, and become subnormal.
        with np.errstate(over="ignore", invalid="ignore"):
            near = wide(tensor).astype(np.float64) * np.resize([-1.0, 0.5, -0.9990234375], tensor.count)
        if name.startswith("special"):
            near = np.full(tensor.count, 0.5)
        group.vector(name, "F32", np.sign(near) * np.clip(np.abs(near), 2.0**-60, 2.0**127))
    tasks = []
    for name, gain in (("one", 1.0), ("large", 2.0**60), ("small", 2.0**-60), ("minus", -1.5)):
        task = Task(group, name)
        for tensor_name, tensor in tensors.items():
            bits = codes(f"{name} {tensor_name}", tensor.count, 0, 2)
            if tensor_name.startswith("special"):
                bits = np.array([0, 0, 1, 1, 0, 0, 0, 0])
            task.mask(tensor_name, bits, gain=gain)
        tasks.append(task)
    return Valid(assemble(base, [group], tasks), "REC-1 REC-2 REC-3 REC-5 NUM-1")


def fused_traps(count: int) -> tuple[Singles, Singles, float]:
    """Bases, values and a scale whose sum of base and product comes out otherwise when it is rounded only once."""
    value = np.float32(1) + codes("trap value", 4000, 0, 1 << 23).astype(np.float32) * np.float32(2.0**-23)
    start = np.float32(1) + codes("trap base", 4000, 0, 1 << 23).astype(np.float32) * np.float32(2.0**-23)
    scale = np.float32(scales13("trap scale", 1, -3)[0])
    exact = start.astype(np.float64) + float(scale) * value.astype(np.float64)  # in float64
    traps = np.flatnonzero(exact.astype(np.float32) != start + scale * value)[:count]
    return start[traps], value[traps], float(scale)


def rounding_traps() -> Valid:
    """Products that a fused multiply-add keeps too exactly, scales that tie at 13 bits, results that are subnormal."""
    start, value, scale = fused_traps(26)
    ties = [math.ldexp(code, -12) for code in (4097, 4098, 4099, 5001, 8191, 6144, 7001, 4100)]
    tensors = {
        "fma": Array("F32", (26,), start.tobytes()),
        "scale": array("F32", (8, 3), reals("tie base", 24)),
        # base = -2^-119 (1 + 2^-k), delta = 2^-119: what is left has no normal exponent
        "subnormal": array("F32", (13,), np.array([-(2.0**-119) * (1 + 2.0**-k) for k in range(8, 21)])),
        "tiny": array("BF16", (3,), np.array([2.0**-133, -(2.0**-133), 2.0**-126])),
        "vanishing": array("F32", (4, 3), np.full(12, -0.0)),
    }
    base = embedded(tensors)
    group = Group(base)
    group.vector("fma", "F32", value)
    group.vector("scale", "I8", codes("tie codes", 24, -127, 128), steps=[ties[k] for k in (0, 1, 2, 3, 4, 5, 6, 7)])
    group.vector("subnormal", "F32", np.full(13, 2.0**-60))
    group.vector("tiny", "F32", np.full(3, 2.0**-60))
    # The products, in units of 2^-60: just under 1, which 13 bits round up to 1; 0.5, too small; two just over 1.
    group.vector("vanishing", "I8", np.full(12, 127), steps=[8190 / 8192, 0.5, 1.0, 8191 / 8192])
    task = Task(group, "t")
    task.mask("fma", np.ones(26, np.int64), gain=scale)
    task.mask("scale", np.ones(24, np.int64), gains=[ties[k] for k in (1, 1, 3, 2, 4, 6, 7, 0)])
    task.mask("subnormal", np.ones(13, np.int64), gain=2.0**-59)
    task.mask("tiny", np.array([1, 1, 0]), gain=2.0**-60)
    task.mask("vanishing", np.ones(12, np.int64), gain=2.0**-60 * 4097 / 4096)
    return Valid(assemble(base, [group], [task]), "REC-2 REC-4 REC-5 NUM-1")


def rows() -> Valid:
    """Gains and steps by row, over 0, 1 and 2 axes; one row for fewer than two dimensions; gains of 0 and under."""
    shapes = {"matrix": (7, 5), "conv": (2, 3, 2, 2), "vector": (13,), "scalar": ()}
    tensors = {
        f"{name}.{axes}": weights(f"{name}{axes}", "F32", shape)
        for name, shape in shapes.items()
        for axes in (0, 1, 2)
        if axes <= max(1, len(shape))
    }
    base = embedded(tensors)
    group = Group(base)
    by_row, one = Task(group, "by-row"), Task(group, "one")
    for name, tensor in tensors.items():
        axes = int(name[-1])
        count = row_count(tensor.shape, axes)
        stepped = axes != 2
        numbers = codes(name, tensor.count, -127, 128)
        steps = scales13(f"step {name}", count, -8) if stepped else None
        group.vector(name, "I8" if stepped else "BF16", numbers, steps=steps, row_axes=axes)
        gains = scales13(f"gains {name}", count, 0)
        gains[0] = -gains[0]
        gains[-1] = 0.0 if count > 2 else gains[-1]
        how = "planes-zstd" if axes == 1 else "pooled"
        by_row.signed(name, codes(f"side {name}", tensor.count, -1, 2), gains=gains, row_axes=axes, gains_codec=how)
        one.mask(name, codes(f"bit {name}", tensor.count, 0, 2), gain=-0.75 if axes else 0.0, row_axes=axes)
    return Valid(assemble(base, [group], [by_row, one]), "REC-4 REC-5 REC-7 TAB-7 NUM-1")


LIBZSTD_FRAMES = {
    # libzstd 1.5.7 of bytes(i * i % 23 for i in range(600)), level 1; level 19 with a checksum; of the planes of
    # (i - 20) / 8 for i in range(40), float32, level 1
    "level1": "28b52ffd605801f50000b80001040910020d03120c080606080c12030d021009040101007d68359b",
    "level19": "28b52ffd645801f50000b80001040910020d03120c080606080c12030d021009040101007d68359b7174e609",
    "planes": "28b52ffd20a03d0200c40300002018100800f0e0d0c0b0a0908060402000c08000000080c0002040608090a0b0c0d0e0f0000"
    "81018c0c0c0c0c0bfbebebe003e3e3e3f4040404003100086db288bb601",
}


def codecs() -> Valid:
    """Each codec for each payload that may have it: raw, zstd, planes-zstd, pooled; frames of several makes."""
    base = embedded({name: weights(name, "F32", (16, 40)) for name in ("raw", "zstd", "pooled", "log4", "planes")})
    group = Group(base)
    steps = scales13("codec steps", 16, -7)
    ramp = np.repeat(np.arange(16), 40)
    group.vector("raw", "I8", ramp, steps=steps, step_codec="raw")
    group.vector("zstd", "I8", ramp, steps=steps, codec="zstd", step_codec="zstd")
    group.vector("pooled", "I8", ramp, steps=steps, codec="pooled")
    group.vector("log4", "LOG4", ramp, steps=steps, codec="zstd", step_codec="planes-zstd")
    group.vector("planes", "BF16", ramp / 8, codec="planes-zstd")
    bits = (codes("row bits", 16, 0, 2)[:, None] * np.ones(40, np.int64)).reshape(-1)
    masks, fields, whole = Task(group, "masks"), Task(group, "fields"), Task(group, "whole")
    for name, codec in (("raw", "raw"), ("zstd", "zstd"), ("pooled", "pooled"), ("log4", "zstd"), ("planes", "raw")):
        gains = scales13(f"gains {name}", 16, 0) if name != "raw" else None
        how = {"zstd": "zstd", "pooled": "pooled", "log4": "raw", "planes": "planes-zstd"}.get(name, "raw")
        masks.mask(name, bits, codec=codec, gains=gains, gains_codec=how)
        fields.signed(name, bits - np.roll(bits, 40), codec=codec)
    whole.companions["config.json"] = b'{"hidden_size": 40}\n'
    squares = Array("U8", (600,), bytes(i * i % 23 for i in range(600)))
    ramp32 = array("F32", (40,), (np.arange(40) - 20) * 0.125)
    whole.private("level1", squares, "zstd", bytes.fromhex(LIBZSTD_FRAMES["level1"]))
    whole.private("level19", squares, "zstd", bytes.fromhex(LIBZSTD_FRAMES["level19"]))
    whole.private("planes", ramp32, "planes-zstd", bytes.fromhex(LIBZSTD_FRAMES["planes"]))
    whole.private("window8MiB", squares, "zstd", frame(squares.raw, window_log=23))
    whole.private("blocks", squares, "zstd", frame(squares.raw, block_nbytes=100, checksum=True))
    for dtype in FLOATS:
        whole.private(f"planes.{dtype}", array(dtype, (9, 7), np.repeat(reals(dtype, 9), 7)), "planes-zstd")
    whole.private("i64", patterns("I64", (40,), range(40)), "zstd")
    whole.private("bool", patterns("BOOL", (200,), [1] * 100 + [0] * 100), "zstd")
    whole.private("pooled", patterns("U8", (3,), [1, 2, 3]), "pooled")
    draft = assemble(base, [group], [masks, fields, whole])
    draft.pool_codec = "zstd"
    return Valid(draft, "COD-1 COD-2 COD-4 TAB-6")


def chunks() -> Valid:
    """Tensors of just over one chunk: records, ends, padding inside the last byte, rows that cross the boundary."""
    shape, count = (1030, 1019), 1030 * 1019
    dull = b"\x3f\x3f" * count  # bfloat16 0.74609375; two equal bytes, so that run-length blocks hold it
    start = bytearray(dull)
    start[2 * CHUNK - 4 : 2 * CHUNK + 4] = bytes.fromhex("c17f 0080 803f 0080")  # NaN, -0.0 | 1.0, -0.0
    base = Base({name: Array("BF16", shape, bytes(start)) for name in ("mask", "signed", "raw")})
    group = Group(base)
    steps = np.full(1030, 2.0**-9)
    steps[1029] = 2.0**-7  # the row that crosses the boundary
    group.vector("mask", "I8", np.full(count, 37), steps=steps.tolist(), codec="zstd", step_codec="planes-zstd")
    group.vector("signed", "LOG4", np.full(count, 3), steps=steps.tolist(), codec="zstd", step_codec="planes-zstd")
    group.vector("raw", "BF16", np.full(count, 2.0**-3 + 2.0**-4), codec="planes-zstd")
    side = np.zeros(count, np.int64)
    side[3:500] = codes("chunk bits", 497, 0, 2)
    side[CHUNK - 300 : CHUNK - 2] = 1
    side[CHUNK - 1 : CHUNK + 1] = 1  # not the NaN before them
    side[CHUNK + 3 : count] = codes("chunk tail", count - CHUNK - 3, 0, 2)
    task = Task(group, "t")
    task.mask("mask", side, codec="zstd")
    task.signed("signed", side * np.resize([1, -1], count), codec="zstd")
    task.mask("raw", side, codec="raw", gain=-1.0)
    task.private("whole", Array("F32", (CHUNK + 13,), b"<" * (4 * CHUNK + 52)), "planes-zstd")
    file = safetensors(base.tensors)
    return Valid(assemble(base, [group], [task]), "CHK-1 CHK-2 IDX-2 IDX-3", base=file, zipped=True)


def small_base(dtype: str = "F32") -> Base:
    """Two matrices and a vector, embedded."""
    return embedded(
        {"a": weights("a", dtype, (7, 5)), "b": weights("b", dtype, (13,)), "c": weights("c", dtype, (3, 4))}
    )


def small_group(base: Base, number: int = 1, names: Sequence[str] = ()) -> Group:
    """Magnitudes in LOG4, for *names* or every floating-point tensor of *base*."""
    group = Group(base, number)
    for name in names or [*base.tensors, *base.aliases]:
        tensor = base.tensor(name)
        if tensor.dtype in FLOATS:
            count = row_count(tensor.shape, 1)
            numbers = codes(f"{number} {name}", tensor.count, 0, 16)
            group.vector(name, "LOG4", numbers, steps=scales13(f"{number} step {name}", count, -3))
    return group


def sides(name: str, tensor: Array) -> Integers:
    """Pseudo-random sides, -1, 0 and 1."""
    return codes(f"sides {name}", tensor.count, -1, 2)


def base_by_reference() -> Valid:
    """A base that is not in the bundle: tensors on odd offsets, in another order, and one that nobody asks for."""
    base = small_base("BF16")
    base.tensors["ids"] = patterns("I64", (3,), [1, 2, 3])
    base.files = {}
    group = small_group(base)
    task = Task(group, "t")
    for name in ("a", "b", "c"):
        task.signed(name, sides(name, base.tensor(name)))
    task.same("ids")
    file = {"unknown": patterns("U8", (3,), [7, 7, 7])} | dict(reversed(base.tensors.items()))
    return Valid(assemble(base, [group], [task]), "BASE-1 BASE-2", base=safetensors(file))


def base_alias() -> Valid:
    """A base with tied weights: one name is no tensor of its file. A task may keep the tie, or untie it."""
    base = embedded({"embed": weights("embed", "F16", (7, 5)), "norm": weights("norm", "F16", (5,))}, {"head": "embed"})
    group = small_group(base)
    tied, untied, equal = Task(group, "tied"), Task(group, "untied"), Task(group, "equal")
    for task in (tied, untied):
        task.signed("embed", sides(task.name, base.tensor("embed")))
    tied.alias("head", "embed")
    untied.signed("head", sides("head", base.tensor("head")))
    equal.same("head")
    equal.alias("embed", "head")
    return Valid(assemble(base, [group], [tied, untied, equal]), "BASE-3 TAB-3")


def sharded_base() -> Valid:
    """An embedded base in two files with an index, as transformers writes it."""
    base = small_base()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map = {"a": names[0], "b": names[1], "c": names[1]}
    index = {"metadata": {"total_size": sum(len(t.raw) for t in base.tensors.values())}, "weight_map": weight_map}
    base.files = {"config.json": b'{"model_type": "example"}\n', "model.safetensors.index.json": compact(index)}
    for name in names:
        base.files[name] = safetensors({key: base.tensors[key] for key, file in weight_map.items() if file == name})
    group = small_group(base)
    task = Task(group, "t")
    for name in base.tensors:
        task.signed(name, sides(name, base.tensor(name)))
    return Valid(assemble(base, [group], [task]), "BASE-4")


def private_tensors() -> Valid:
    """Whole tensors of every dtype, of 0 dimensions, of 0 elements, with any bits in them."""
    base = small_base()
    group = small_group(base)
    task = Task(group, "t")
    for dtype, nbytes in NBYTES.items():
        raw = hashlib.shake_256(dtype.encode()).digest(35 * nbytes)
        if dtype == "BOOL":
            raw = bytes(byte & 1 for byte in raw)
        task.private(dtype, Array(dtype, (7, 5), raw), "pooled" if dtype in ("BOOL", "U16", "F64") else "raw")
    task.private("scalar", patterns("I64", (), [2**63 + 5]), "pooled")
    task.private("scalar float", patterns("F32", (), [1 << 31]), "planes-zstd")
    task.private("empty", Array("F32", (0,), b""))
    task.private("empty rows", Array("I64", (3, 0, 2), b""))
    task.private("nan", patterns("BF16", (3,), [0x7F81, 0xFFFF, 0x8000]), "pooled")
    first, *_ = base.tensors
    task.private("descends", patterns("I8", (3,), [1, 2, 3]), "pooled", base=first)
    return Valid(assemble(base, [group], [task]), "TAB-2 TAB-6 BOOL-1")


def resized() -> Valid:
    """Vocabularies that grew and shrank, under every kind of leading rows; a bias."""
    tensors = {
        "grown.mask": weights("gm", "BF16", (5, 3)),
        "grown.signed": weights("gs", "F32", (5, 3)),
        "grown.same": weights("ge", "F16", (5, 3)),
        "shrunk.mask": weights("sm", "F32", (5, 2, 2)),
        "shrunk.same": weights("se", "F32", (5, 3)),
        "bias": weights("bi", "F32", (5,)),
        "recast": weights("rc", "F32", (5, 3)),
    }
    base = embedded(tensors | {"ids": patterns("I64", (5,), range(5))})
    group = small_group(base)
    task = Task(group, "t")
    task.extended("grown.mask", "mask", (7, 3), codes("m", 15, 0, 2), further=weights("f1", "BF16", (2, 3)).raw)
    task.extended(
        "grown.signed",
        "signed",
        (6, 3),
        codes("s", 15, -1, 2),
        further=weights("f2", "F32", (1, 3)).raw,
        gains=scales13("grown", 5, 0),
        codec="planes-zstd",
    )
    task.extended("grown.same", "same", (8, 3), further=weights("f3", "F16", (3, 3)).raw, codec="pooled")
    task.extended("shrunk.mask", "mask", (3, 2, 2), codes("k", 12, 0, 2), gain=1.25)
    task.extended("shrunk.same", "same", (1, 3))
    task.extended("bias", "signed", (7,), codes("b", 5, -1, 2), further=weights("f4", "F32", (2,)).raw)
    task.extended(
        "recast", "signed", (6, 3), codes("c", 15, -1, 2), dtype="F16", further=weights("f5", "F16", (1, 3)).raw
    )
    task.extended("ids", "same", (6,), further=(9).to_bytes(8, "little"), codec="pooled")
    return Valid(assemble(base, [group], [task]), "TAB-4 REC-7")


def same_alias_dropped() -> Valid:
    """Tensors that store nothing: equal to the base (cast, under another name, integer, empty), tied, not there."""
    base = embedded(
        {
            "a": weights("a", "F32", (7, 5)),
            "b": weights("b", "F64", (13,)),
            "ids": patterns("I64", (3,), [0, 1, 2]),
            "empty": Array("F16", (0, 4), b""),
            "gone": weights("gone", "F32", (2, 2)),
            "-inf": patterns("F32", (2, 2), [0xFF800000, 0, 0x80000000, 0xFF800000]),
        }
    )
    group = small_group(base, names=["a"])
    task, nothing = Task(group, "t"), Task(group, "nothing")
    task.same("a", dtype="BF16")
    task.same("b", dtype="F16")
    task.same("renamed", base="a")
    task.same("ids")
    task.same("empty")
    task.same("-inf")
    task.alias("tied", "renamed")
    task.dropped("gone")
    task.private("gone ", patterns("U8", (1,), [1]), "pooled")
    nothing.same("a")
    nothing.dropped("gone")
    nothing.dropped("b")
    nothing.fidelity = {"cosine": None, "gain": None, "score": 0.5, "estimates": {}}
    return Valid(assemble(base, [group], [task, nothing]), "TAB-1 TAB-2 TAB-3 TAB-8 REC-1 REC-6")


def companions() -> Valid:
    """Companion files, one of them shared by two tasks; files beside the bundle's, which nothing is said about."""
    base = small_base()
    group = small_group(base)
    tasks = [Task(group, "mnist"), Task(group, "Café ☕ / 書", "cafe")]
    for task in tasks:
        task.signed("a", sides(task.name, base.tensor("a")))
        task.same("b")
        task.dropped("c")
        task.companions["config.json"] = b'{"labels": 10}\n'
        task.fidelity["estimates"] = {"sign": {"cosine": 0.75, "bits": 1.0}, "signed": {"cosine": 0.875, "bits": 1.25}}
    tasks[1].companions["tokenizer/vocab.txt"] = "é\n".encode()
    tasks[1].companions["empty.txt"] = b""
    draft = assemble(base, [group], tasks)
    draft.beside |= {
        "README.md": b"# A bundle\n",
        ".gitattributes": b"*.safetensors filter=lfs\n",
        "LICENSE": b"Apache-2.0\n",
        "plots/sizes.txt": b"###\n",
        "tasks/.hidden": b"a file system's\n",
    }
    return Valid(draft, "FILE-3 MAN-5 PATH-1")


def two_groups() -> Valid:
    """Two groups over one base, a task each; the second has its own magnitudes and its own dtype."""
    base = small_base()
    first, second = small_group(base), Group(base, 7, "tall-mask")
    second.method = {"name": "tall-mask", "parameters": {"mask_lambda": [0.2, 0.4], "merge": "ties", "k": None}}
    second.vector("a", "F16", reals("second", 35, -3))
    one, other = Task(first, "one"), Task(second, "other")
    for name in base.tensors:
        one.signed(name, sides(name, base.tensor(name)))
    other.mask("a", codes("other", 35, 0, 2), gain=1)  # in JSON, 1 is 1.0
    other.fidelity["gain"] = 1
    other.same("b")
    other.same("c")
    return Valid(assemble(base, [first, second], [one, other]), "MAN-3 MAN-4")


def partial_bundle() -> Valid:
    """Of three tasks in two groups one was fetched: its files and its group's are here, the others' are not."""
    case = two_groups()
    draft = case.draft
    third = {"name": "third", "slug": "third", "group": "g0001", "parameters": 35, "cosine": None, "gain": None}
    draft.manifest["tasks"].append(third)
    table = draft.documents["tasks/one/task.json"]
    draft.documents["tasks/third/task.json"] = table | {"name": "third", "slug": "third"}
    draft.expected = {name: tensor for name, tensor in draft.expected.items() if name.startswith("one/")}

    def fetch_one(files: dict[str, bytes]) -> None:
        for path in [*files]:
            if path.startswith(("tasks/other/", "tasks/third/", "groups/g0007/")):
                del files[path]

    draft.late.append(fetch_one)
    return Valid(draft, "PART-1 PART-2 FILE-4", not_fetched=["other", "third"])


def many_shards() -> Valid:
    """Payloads over several shards, a pool in each; headers that list their tensors in another order than the data."""
    base = small_base()
    group = Group(base)
    for number, name in enumerate(base.tensors, start=1):
        tensor, file = base.tensor(name), f"merged-{number:05d}-of-00003.safetensors"
        group.vector(name, "F16", reals(name, tensor.count, -3), file=file)
    task = Task(group, "t")
    for number, name in enumerate(base.tensors, start=1):
        task.mask_file = f"mask-{number:05d}-of-00003.safetensors"
        shape = base.tensor(name).shape
        task.signed(name, sides(name, base.tensor(name)), gains=scales13(name, row_count(shape, 1), 0))
    for number in (1, 2):
        task.private_file = f"private-{number:05d}-of-00002.safetensors"
        task.private(f"p{number}", weights(f"p{number}", "F16", (3, 3)))
        task.private(f"q{number}", weights(f"q{number}", "F32", (3, 3)), "pooled")
    draft = assemble(base, [group], [task])

    def reverse(sealed: Draft) -> None:
        for shard in sealed.shards.values():
            shard.header_edits.append(lambda header: dict(reversed(header.items())))

    draft.edits.append(reverse)
    return Valid(draft, "ST-2 ST-3 ST-6 TAB-6")


def newer_minor() -> Valid:
    """A bundle of a later 1.x with keys that 1.0 does not know: they are ignored, with a warning."""
    base = small_base()
    group = small_group(base)
    task = Task(group, "t")
    for name in base.tensors:
        task.signed(name, sides(name, base.tensor(name)))
    draft = assemble(base, [group], [task])
    draft.manifest["format_version"] = "1.999"
    for change in (
        put(MANIFEST, "future", value={"any": [1, None]}),
        put(MANIFEST, "tasks", "t", "future", value=1),
        put("groups/g0001/group.json", "future", value=1.5),
        put("tasks/t/task.json", "tensors", "a", "future", value="x"),
    ):
        change(draft)
    return Valid(draft, "VER-1 VER-3", warns=True)


def metadata() -> Valid:
    """A bundle with texts of its user's, and a task with some: nobody acts on them."""
    base = small_base()
    group = small_group(base)
    task = Task(group, "t")
    for name in base.tensors:
        task.signed(name, sides(name, base.tensor(name)))
    draft = assemble(base, [group], [task])
    put(MANIFEST, "metadata", value={"licence": "CC-BY-4.0", "org.example.owner": "Größe ☃", "": ""})(draft)
    put(MANIFEST, "tasks", "t", "metadata", value={"languages": '["de", "en"]', "kind": "mask"})(draft)
    return Valid(draft, "JSON-3")


VALID: dict[str, Callable[[], Valid]] = {
    "metadata": metadata,
    "worked-example": worked_example,
    **{f"merged-{dtype.lower()}": partial(merged_vector, dtype) for dtype in ("LOG4", "I8", "BF16", "F16", "F32")},
    "result-dtypes": result_dtypes,
    "every-exponent": every_exponent,
    "rounding-traps": rounding_traps,
    "rows": rows,
    "codecs": codecs,
    "chunks": chunks,
    "base-by-reference": base_by_reference,
    "base-alias": base_alias,
    "base-sharded": sharded_base,
    "private": private_tensors,
    "resized": resized,
    "same-alias-dropped": same_alias_dropped,
    "companions": companions,
    "two-groups": two_groups,
    "partial": partial_bundle,
    "many-shards": many_shards,
    "newer-minor": newer_minor,
}
