"""The bundles that invalid vectors break. Each is a valid vector too: or nobody could tell what broke."""

from __future__ import annotations

import numpy as np

from second.bundles import Draft
from second.content import codes, patterns, reals, scales13, weights
from second.elements import CHUNK, Array, array
from second.models import Base, Group, Task, assemble, embedded
from second.shards import safetensors

COMPANION = b'{"labels": 10}\n'


def kernel() -> Draft:
    """The bundle that invalid vectors break: a tensor or two of every kind."""
    base = embedded(
        {
            "w": weights("w", "F32", (7, 5)),
            "v": weights("v", "BF16", (13,)),
            "u": weights("u", "F32", (4,)),
            "e": weights("e", "F32", (4, 3)),
            "ids": patterns("I64", (3,), [1, 2, 3]),
            "gone": weights("gone", "F32", (2,)),
        }
    )
    group = Group(base)
    group.vector("w", "I8", codes("w", 35, -127, 128), steps=scales13("w", 7, -8))
    group.vector("v", "LOG4", codes("v", 13, 0, 16), steps=scales13("v", 1, -3))
    group.vector("u", "F32", reals("u", 4, -3))
    group.vector("e", "F16", reals("e", 12, -3))
    task = Task(group, "mnist")
    task.mask("w", codes("w bits", 35, 0, 2), gain=1.5)
    task.signed("v", codes("v fields", 13, -1, 2), gain=0.75)
    task.mask("u", np.array([1, 0, 1, 1]), gains=[1.25], codec="pooled")
    task.extended(
        "e", "mask", (6, 3), codes("e bits", 12, 0, 2), further=weights("f", "F32", (2, 3)).raw, codec="pooled"
    )
    task.same("ids")
    task.private("head", array("F32", (2, 8), np.repeat([0.5, -0.25], 8)), "zstd")
    task.private("flags", patterns("BOOL", (3,), [1, 0, 1]), "pooled")
    task.private("steps", patterns("I64", (), [1000]), "pooled")
    task.alias("tied", "head")
    task.dropped("gone")
    task.companions["config.json"] = COMPANION
    return assemble(base, [group], [task])


def two_vectors() -> Draft:
    """Two-level tensors, one of them as leading rows; a centre in three dtypes, under three kinds."""
    base = embedded(
        {
            "t": weights("kt", "F32", (5, 3)),
            "c": weights("kc", "F32", (5, 3)),
            "d": weights("kd", "BF16", (5,)),
            "et": weights("ket", "F32", (4, 3)),
            "ids": patterns("I64", (3,), [1, 2, 3]),
            "empty": Array("F32", (0, 3), b""),
        }
    )
    group = Group(base)
    group.vector("t", "I8", codes("kt", 15, -127, 128), steps=scales13("kt", 5, -8))
    group.vector("t", "I8", codes("ktl", 15, -127, 128), steps=scales13("ktl", 5, -9), role="merged_lo")
    group.vector("t", "I8", codes("ktc", 15, -127, 128), steps=scales13("ktc", 5, -9), role="centre")
    group.vector("et", "F32", reals("ket", 12, -3))
    group.vector("et", "LOG4", codes("ketl", 12, 0, 16), steps=scales13("ketl", 4, -3), role="merged_lo")
    group.vector("c", "F32", reals("kc", 15, -3))
    group.vector("c", "LOG4", codes("kcc", 15, 0, 16), steps=scales13("kcc", 5, -3), role="centre")
    group.vector("d", "F32", reals("kdc", 5, -3), role="centre")
    task = Task(group, "mnist")
    task.two_level("t", codes("kt bits", 15, 0, 2), gain=1.5)
    task.mask("c", codes("kc bits", 15, 0, 2))
    task.sign("d", codes("kd bits", 5, 0, 2), gain=0.125)
    further = weights("kf", "F32", (2, 3)).raw
    task.extended("et", "two-level", (6, 3), codes("ket bits", 12, 0, 2), further=further)
    task.same("ids")
    task.same("empty")
    return assemble(base, [group], [task])


def own_scales() -> Draft:
    """Sign, sparse and uniform tensors, on their own and as leading rows; a group without a vector."""
    base = embedded(
        {
            "g": weights("kg", "BF16", (13,)),
            "s": weights("ks", "F32", (7, 5)),
            "z": weights("kz", "F16", (2, 2)),
            "u3": weights("ku3", "F32", (7,)),
            "u8": weights("ku8", "F32", (5,)),
            "es": weights("kes", "F32", (4, 3)),
            "eu": weights("keu", "F32", (3, 3)),
            "ids": patterns("I64", (3,), [1, 2, 3]),
            "empty": Array("F32", (0, 3), b""),
        }
    )
    task = Task(Group(base), "mnist")
    task.sign("g", codes("kg bits", 13, 0, 2), gains=[0.75])
    bits = np.zeros(35, np.int64)
    bits[[2, 3, 11, 20, 34]] = 1
    task.sparse("s", bits, weights("ks own", "BF16", (5,)), gain=1.25)
    task.sparse("z", np.array([1, 0, 1, 0]), weights("kz own", "F32", (2,)), codec="pooled", own_codec="pooled")
    task.uniform("u3", np.array([0, 1, 2, 2, 1, 0, 2]), 3, gain=0.125)
    task.uniform("u8", np.array([0, 7, 3, 4, 1]), 8, gain=0.125)
    leading = np.array([0, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0])
    further = weights("kf", "F32", (2, 3)).raw
    task.extended("es", "sparse", (6, 3), leading, own=weights("kes own", "F16", (3,)), further=further)
    task.extended("eu", "uniform", (5, 3), codes("keu fields", 9, 0, 8), levels=8, further=further)
    task.same("ids")
    task.same("empty")
    return assemble(base, [task.group], [task])


def ranked() -> tuple[Draft, bytes]:
    """A sparse tensor of three chunks, so that its bits have ranks: 0, 3 and 5. The bundle, and its base's file."""
    count = 2 * CHUNK + 13
    base = Base({"s": Array("BF16", (count,), b"\x3f\x3f" * count)})
    task = Task(Group(base), "mnist")
    bits = np.zeros(count, np.int64)
    bits[[5, 77, CHUNK - 1, CHUNK, CHUNK + 9, 2 * CHUNK + 12]] = 1
    task.sparse("s", bits, weights("ranked", "F16", (6,)), codec="zstd")
    return assemble(base, [task.group], [task]), safetensors(base.tensors)
