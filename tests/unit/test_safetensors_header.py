"""The strict safetensors header parser."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save

from tallstore.format.dtypes import DTYPES
from tallstore.format.safetensors_header import (
    MAX_HEADER_NBYTES,
    Entry,
    HeaderProblem,
    UnknownDtypeProblem,
    header_nbytes,
    parse_header,
)


def file_of(header, data=b"", *, length=None):
    """The bytes of a file: *header* as JSON text, as bytes, or as what to make JSON of."""
    if not isinstance(header, (bytes, str)):
        header = json.dumps(header)
    raw = header.encode() if isinstance(header, str) else header
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(dtype="U8", shape=(1,), start=0, stop=1):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def parse(raw):
    return parse_header(raw, len(raw))


def test_a_header_is_parsed_with_offsets_of_the_file():
    raw = file_of({"__metadata__": {"format": "pt"}, "b": entry("F16", (2, 3), 1, 13), "a": entry()}, bytes(13))
    header = parse(raw)
    start = len(raw) - 13
    assert header.nbytes == start
    assert header.metadata == {"format": "pt"}
    assert list(header.tensors.items()) == [
        ("b", Entry("F16", (2, 3), start + 1, start + 13)),
        ("a", Entry("U8", (1,), start, start + 1)),
    ]


@pytest.mark.parametrize(
    ("header", "nbytes"),
    [
        ({}, 0),
        ("{}   ", 0),
        ({"": entry()}, 1),  # any text is a name
        ({"é\n": entry()}, 1),
        ({"scalar": entry("F64", (), 0, 8)}, 8),
        ({"empty": entry("F32", (0, 2**62), 0, 0), "other": entry(), "end": entry("I8", (0,), 1, 1)}, 1),
        ({"x": entry(), "__metadata__": {}}, 1),
        *(({"x": entry(dtype, (3,), 0, 3 * width)}, 3 * width) for dtype, width in DTYPES.items()),
    ],
)
def test_unusual_headers_are_accepted(header, nbytes):
    assert len(parse(file_of(header, bytes(nbytes))).tensors) == len(
        json.loads(header) if isinstance(header, str) else header
    ) - ("__metadata__" in header)


HUGE = "9" * 30

REFUSED = {
    "empty file": ("ST-2", b"", "0 bytes are no safetensors file"),
    "seven bytes": ("ST-2", bytes(7), "7 bytes are no safetensors file"),
    "no JSON": ("ST-1", bytes(8), "not a JSON object"),
    "length over the limit": ("ST-1", file_of({}, length=MAX_HEADER_NBYTES + 1), "over the limit"),
    "length beyond the file": ("ST-2", file_of({}, length=3), "is truncated: the header takes 3 bytes"),
    "array": ("ST-1", file_of([]), "not a JSON object"),
    "leading space": ("ST-1", file_of(" {}"), "not a JSON object"),
    "trailing newline": ("ST-1", file_of("{}\n"), "not a JSON object"),
    "two objects": ("ST-1", file_of("{}{}"), "not JSON"),
    "cut JSON": ("ST-1", file_of('{"a": }'), "not JSON"),
    "NaN": ("ST-1", file_of('{"a": NaN}'), "NaN is no number"),
    "not UTF-8": ("ST-1", file_of(b'{"\xff": 1}'), "not UTF-8, from byte 2"),
    "deep nesting": ("ST-1", file_of('{"a":' + "[" * 100_000 + "}"), "not JSON"),
    "integer of thousands of digits": ("ST-1", file_of('{"a": ' + "9" * 5000 + "}"), "not JSON"),
    "tensor twice": ("ST-1", file_of('{"a": 1, "a": 1}'), "'a' twice"),
    "key of an entry twice": ("ST-1", file_of('{"a": {"dtype": 1, "dtype": 1}}'), "'dtype' twice"),
    "half a surrogate pair": ("ST-1", file_of('{"\\ud800": 1}'), "not Unicode text"),
    "entry is no object": ("ST-1", file_of({"a": 1}), "describes tensor 'a' by other keys"),
    "unknown key": ("ST-1", file_of({"a": {**entry(), "strides": [1]}}, b"x"), "by other keys"),
    "missing key": ("ST-1", file_of({"a": {"dtype": "U8", "shape": []}}, b"x"), "by other keys"),
    "dtype is no text": ("ST-1", file_of({"a": entry(dtype=8)}, b"x"), "a dtype that is not text"),
    "unknown dtype": ("ST-1", file_of({"a": entry(dtype="F4")}, b"x"), "has tensor 'a' in 'F4', not one of BOOL"),
    "shape is no list": ("ST-1", file_of({"a": {**entry(), "shape": 1}}, b"x"), "a shape that is not a list"),
    "negative dimension": ("ST-1", file_of({"a": entry(shape=[-1])}, b"x"), "a shape that is not a list"),
    "boolean dimension": ("ST-1", file_of({"a": entry(shape=[True])}, b"x"), "a shape that is not a list"),
    "decimal dimension": ("ST-1", file_of({"a": entry(shape=[1.0])}, b"x"), "a shape that is not a list"),
    "huge dimension": (
        "ST-1",
        file_of(f'{{"a": {{"dtype": "U8", "shape": [0, {HUGE}], "data_offsets": [0, 0]}}}}'),
        "2^63",
    ),
    "one offset": ("ST-1", file_of({"a": {**entry(), "data_offsets": [0]}}, b"x"), "two ascending integers"),
    "offsets are text": ("ST-1", file_of({"a": {**entry(), "data_offsets": "01"}}, b"x"), "two ascending integers"),
    "negative offset": ("ST-1", file_of({"a": entry(start=-1, stop=0)}, b"x"), "two ascending integers"),
    "boolean offset": ("ST-1", file_of({"a": entry(start=False)}, b"x"), "two ascending integers"),
    "descending offsets": ("ST-1", file_of({"a": entry(start=1, stop=0)}, b"x"), "two ascending integers"),
    "too small": ("ST-1", file_of({"a": entry("F32")}, b"x"), "1 bytes, which is not the size of F32 [1]"),
    "too large": ("ST-1", file_of({"a": entry(stop=2)}, b"xx"), "2 bytes, which is not the size of U8 [1]"),
    "a million dimensions": ("ST-1", file_of({"a": entry(shape=[2**62] * 10**6)}, b"x"), "1000000 dimensions"),
    "overlap": (
        "ST-2",
        file_of({"a": entry("U16", (1,), 0, 2), "b": entry(start=1, stop=2)}, b"xx"),
        "1 bytes too early",
    ),
    "same place": ("ST-2", file_of({"a": entry(), "b": entry()}, b"x"), "tensor 'b' begin 1 bytes too early"),
    "empty inside another": (
        "ST-2",
        file_of({"a": entry("U16", (1,), 0, 2), "b": entry("U8", (0,), 1, 1)}, b"xx"),
        "early",
    ),
    "hole": (
        "ST-2",
        file_of({"a": entry(), "b": entry(start=3, stop=4)}, bytes(4)),
        "a hole of 2 bytes before tensor 'b'",
    ),
    "hole at the beginning": ("ST-2", file_of({"a": entry(start=1, stop=2)}, bytes(2)), "a hole of 1 bytes"),
    "trailing bytes": ("ST-2", file_of({"a": entry()}, bytes(3)), "2 bytes after the last tensor"),
    "trailing bytes, no tensors": ("ST-2", file_of({}, bytes(3)), "3 bytes after the last tensor"),
    "truncated": ("ST-2", file_of({"a": entry(shape=(4,), stop=4)}, bytes(3)), "is truncated: tensor 'a' ends at byte"),
    "metadata is text": ("ST-4", file_of({"__metadata__": "x"}), "not an object"),
    "metadata has a number": ("ST-4", file_of({"__metadata__": {"a": 1}}), "other than text at 'a'"),
    "metadata has half a surrogate pair": (
        "ST-4",
        file_of('{"__metadata__": {"a": "\\udfff"}}'),
        "other than text at 'a'",
    ),
}


@pytest.mark.parametrize(("rule", "raw", "problem"), REFUSED.values(), ids=REFUSED)
def test_a_malformed_header_is_refused_by_its_rule(rule, raw, problem):
    with pytest.raises(HeaderProblem) as caught:
        parse(raw)
    assert caught.value.rule == rule
    assert problem in caught.value.problem
    assert "\n" not in caught.value.problem
    assert len(caught.value.problem) < 400
    assert str(caught.value) == f"{caught.value.problem} [{rule}]"


def test_an_unknown_dtype_can_be_told_apart():
    with pytest.raises(UnknownDtypeProblem) as caught:
        parse(file_of({"a": entry("F8_E8M0")}, b"x"))
    assert (caught.value.tensor, caught.value.dtype) == ("a", "F8_E8M0")


def test_a_long_name_is_cut_in_the_message():
    with pytest.raises(HeaderProblem, match="x'… by other keys") as caught:
        parse(file_of({"x" * 10**6: {}}))
    assert len(str(caught.value)) < 400


def test_what_was_read_may_be_shorter_than_the_file():
    raw = file_of({"a": entry(shape=(4,), stop=4)}, bytes(4))
    assert header_nbytes(raw[:8], len(raw)) == len(raw) - 4
    assert parse_header(raw[:-4], len(raw)) == parse(raw)
    with pytest.raises(HeaderProblem, match="could be read") as caught:
        parse_header(raw[:-5], len(raw))
    assert caught.value.rule == "ST-2"


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 9) | st.floats() | st.text(max_size=4),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values, max_size=3),
    max_leaves=8,
)
NEAR_ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F4"]) | JSON_VALUES,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | JSON_VALUES,
        "data_offsets": st.lists(st.integers(-1, 20), min_size=2, max_size=2) | JSON_VALUES,
    }
)
NEAR_HEADERS = st.dictionaries(st.text(max_size=3), NEAR_ENTRIES | JSON_VALUES, max_size=3)


@given(st.binary(max_size=200))
@example(b"\x02" + bytes(7) + b"{}")
def test_arbitrary_bytes_raise_nothing_else(raw):
    """Whatever the bytes are, they are a header or a HeaderProblem."""
    with contextlib.suppress(HeaderProblem):
        parse(raw)
    with contextlib.suppress(HeaderProblem):
        parse(file_of(raw))


@given(NEAR_HEADERS, st.integers(0, 24))
def test_nearly_right_headers_raise_nothing_else(header, nbytes):
    """JSON of the right form with wrong values is refused, and what is accepted fills the file exactly."""
    raw = file_of(header, bytes(nbytes))
    try:
        parsed = parse(raw)
    except HeaderProblem:
        return
    assert sum(place.stop - place.start for place in parsed.tensors.values()) == nbytes


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
NUMPY_DTYPES = [np.bool_, np.uint8, np.int16, np.float16, np.uint32, np.float32, np.float64, np.int64, np.complex64]


@given(
    arrays=st.dictionaries(
        TEXT.filter(lambda name: name != "__metadata__"),
        st.builds(
            lambda dtype, shape: np.ones(shape, dtype),
            st.sampled_from(NUMPY_DTYPES),
            st.lists(st.integers(0, 4), max_size=4),
        ),
        max_size=5,
    ),
    # An empty dictionary makes the library write broken JSON.
    metadata=st.none() | st.dictionaries(TEXT, TEXT, min_size=1),
)
def test_agrees_with_the_safetensors_library(tmp_path_factory, arrays, metadata):
    """What the library writes is accepted, with the names, dtypes, shapes, bytes and metadata that it reads back."""
    raw = save(arrays, metadata)
    header = parse(raw)
    path = tmp_path_factory.getbasetemp() / "agrees.safetensors"
    path.write_bytes(raw)
    with safe_open(path, framework="np") as theirs:
        assert set(theirs.keys()) == set(header.tensors)
        assert (theirs.metadata() or {}) == header.metadata
        for name, place in header.tensors.items():
            assert theirs.get_slice(name).get_dtype() == place.dtype
            assert tuple(theirs.get_slice(name).get_shape()) == place.shape
            assert raw[place.start : place.stop] == arrays[name].tobytes()
