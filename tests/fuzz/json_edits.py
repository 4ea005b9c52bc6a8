"""Edits of JSON documents that keep them JSON: one place at a time, with values that are likely to hurt."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from tests.fuzz.choices import Choices

HUGE = 10**400
NUMBERS = (
    *(
        0,
        1,
        -1,
        2,
        3,
        4,
        7,
        8,
        9,
        15,
        16,
        17,
        35,
        64,
        255,
        256,
        1 << 20,
        (1 << 20) + 1,
        (1 << 31) - 1,
        1 << 31,
        1 << 32,
    ),
    *(1 << 40, (1 << 40) + 1, 1 << 53, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, -(1 << 63), HUGE),
    *(0.0, -0.0, 0.5, 1.0, 1.5, -1.5, 35.0, 1e-300, 5e-324, 1.7e308, 0.1, 2.0**-60, 2.0**-61, 2.0**60, 2.0**61),
    *(4097 / 4096, 8191 / 8192, 8193 / 8192, float("inf"), float("-inf"), float("nan")),
)
NAMES = (
    *("", ".", "..", "../x", "a/../../x", "/etc/passwd", "a\\b", "C:", "C:x", "c:/x", "\\\\host\\x", "nul", "NUL.txt"),
    *(
        "con",
        "aux.json",
        "com1",
        "lpt9.x",
        "a.",
        "a ",
        " a",
        "a\0b",
        "a\nb",
        "a\x1b[31mb",
        "a\x7f",
        "a\x9bb",
        "-rf",
        "~",
    ),
    *("config.json", "Config.json", "CONFIG.JSON", "config.json/x.json", "model.safetensors/x.json", "a/b/c.json"),
    *("mnist", "Mnist", "\u043cnist", "mn\u0131st", "e\u0301", "\u00e9", "\ufb01", "\u202egnp", "\u2028", "\ud800"),
    *(
        "\U0001f600",
        "[/x]",
        "[link=x]",
        "<script>",
        "|a|",
        "`a`",
        "x" * 300,
        "\u00e9" * 600,
        "%s",
        "{0}",
        "index",
        "pool",
    ),
    *("__metadata__", "tallstore.json", "base.json", ".git/config", "files/x", "$ref"),
)
WORDS = (
    *("BOOL", "U8", "I8", "F8_E4M3", "I16", "F16", "BF16", "F32", "F64", "I64", "C64", "LOG4", "raw", "zstd"),
    *("planes-zstd", "pooled", "mask", "signed", "two-level", "sign", "sparse", "uniform", "private", "extended"),
    *("same", "alias", "dropped", "merged", "merged_lo", "centre", "g0001", "g0002", "g9999", "0" * 64, "f" * 32),
    *("1.0", "1.0-draft", "1.7", "2.0", "tallstore"),
)
CONTAINERS: tuple[Any, ...] = ({}, [], [[]], {"": {}}, [{}], [0], [None], {"a": 1}, [HUGE], [[[[[[]]]]]])

Place = tuple[Any, Any]  # an object or array, and a key or position in it


def places(document: Any) -> list[Place]:
    """Every place of a document where a value stands."""
    return list(_places(document))


def _places(node: Any) -> Iterator[Place]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield node, key
        yield from _places(value)


def edit(document: Any, choices: Choices) -> None:
    """Change one place of *document*, in place."""
    found = places(document)
    if not found:
        return
    holder, key = choices.pick(found)
    choices.pick(EDITS)(document, holder, key, choices)


def _replace(_document: Any, holder: Any, key: Any, choices: Choices) -> None:
    values: tuple[Any, ...] = choices.pick((NUMBERS, NAMES, WORDS, (None, True, False), CONTAINERS))
    holder[key] = copy.deepcopy(choices.pick(values))


def _replace_in_kind(_document: Any, holder: Any, key: Any, choices: Choices) -> None:
    """By a value of the same type, so that what is deeper is reached."""
    match holder[key]:
        case bool() as value:
            holder[key] = not value
        case int() as value:
            steps = (
                value + 1,
                max(0, value - 1),
                value * 2,
                value // 2,
                choices.below(64),
                abs(choices.pick(NUMBERS[:25])),
            )
            holder[key] = choices.pick(steps)
        case float() as value:
            holder[key] = choices.pick((value * 2, -value, value / 3, *NUMBERS))
        case str():
            holder[key] = choices.pick(choices.pick((NAMES, WORDS)))
        case list() as value if value:
            value.insert(choices.below(len(value) + 1), copy.deepcopy(choices.pick(value)))
        case _:
            _replace(_document, holder, key, choices)


def _copy_from_elsewhere(document: Any, holder: Any, key: Any, choices: Choices) -> None:
    found = places(document)
    alike = [place for place in found if place[1] == key] if choices.one_in(2) else found
    other, there = choices.pick(alike or found)
    holder[key] = copy.deepcopy(other[there])


def _swap(document: Any, holder: Any, key: Any, choices: Choices) -> None:
    other, there = choices.pick(places(document))
    first, second = copy.deepcopy(holder[key]), copy.deepcopy(other[there])
    holder[key] = second
    other[there] = first


def _remove(_document: Any, holder: Any, key: Any, _choices: Choices) -> None:
    del holder[key]


def _rename(_document: Any, holder: Any, key: Any, choices: Choices) -> None:
    if isinstance(holder, dict):
        holder[choices.pick(NAMES + WORDS)] = holder.pop(key)
    elif holder:
        holder.reverse()


def _grow(_document: Any, holder: Any, key: Any, choices: Choices) -> None:
    if isinstance(holder, dict):
        holder[choices.pick(NAMES)] = copy.deepcopy(holder[key])
    else:
        holder.append(copy.deepcopy(holder[key]))


Edit = Callable[[Any, Any, Any, Choices], None]
EDITS: tuple[Edit, ...] = (
    *(_replace_in_kind, _replace_in_kind, _replace_in_kind, _copy_from_elsewhere, _copy_from_elsewhere),
    *(_replace, _swap, _remove, _rename, _grow),
)
