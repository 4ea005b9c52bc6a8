"""Tables with any names and numbers in them, and any bytes in their place."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallstore.errors import FormatError
from tallstore.format.manifest import (
    BaseTable,
    BaseTensor,
    CompanionFile,
    Fidelity,
    GroupTable,
    Manifest,
    MaskTensor,
    Payload,
    PrivateTensor,
    SignTensor,
    SparseTensor,
    TaskTable,
    TwoLevelTensor,
    UniformTensor,
)
from tallstore.format.parsing import parse, parse_manifest, serialise

NAMES = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=40)
SHAPES = st.lists(st.integers(0, 2**63 - 1), max_size=16).map(tuple)
DTYPES = st.sampled_from(["F32", "BF16", "I64", "BOOL", "F8_E4M3"])
NATURALS = st.integers(0, 2**63 - 1)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
PAYLOADS = st.builds(
    Payload, shard=NATURALS, codec=st.sampled_from(["raw", "zstd", "planes-zstd", "pooled"]), at=NATURALS
)
WHOLE = {"name": NAMES, "dtype": DTYPES, "shape": SHAPES}
CODED = WHOLE | {"gain": st.none() | FLOATS, "gains": st.none() | PAYLOADS, "row_axes": st.integers(0, 16)}
TENSORS = st.one_of(
    *(st.builds(kind, **CODED, bits=PAYLOADS) for kind in (MaskTensor, TwoLevelTensor, SignTensor)),
    st.builds(
        SparseTensor,
        **CODED,
        bits=PAYLOADS,
        count=NATURALS,
        values_dtype=st.sampled_from(["F16", "BF16", "F32"]),
        values=st.none() | PAYLOADS,
    ),
    st.builds(UniformTensor, **CODED, fields=PAYLOADS, levels=st.sampled_from([3, 4, 8, 16])),
    st.builds(PrivateTensor, **WHOLE, values=st.none() | PAYLOADS),
)
TASKS = st.builds(
    TaskTable,
    format=st.just("tallstore.task"),
    name=NAMES,
    slug=st.just("slug"),
    group=st.just("g0001"),
    required_features=st.just(()),
    shards=st.just(()),
    tensors=st.lists(TENSORS, max_size=3).map(tuple),
    files=st.lists(st.builds(CompanionFile, name=NAMES, sha256=st.just("0" * 64), size=NATURALS), max_size=1).map(
        tuple
    ),
    fidelity=st.builds(Fidelity, cosine=FLOATS, gain=st.none(), score=st.none() | FLOATS, estimates=st.just({})),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOATS | st.text(max_size=5),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=5), children, max_size=4),
    max_leaves=10,
)


@given(TASKS)
def test_a_table_says_the_same_however_it_is_spaced(table):
    raw = serialise(table)
    spaced = json.dumps(json.loads(raw), indent=1).encode()
    assert parse(raw, TaskTable, "here") == parse(spaced, TaskTable, "here") == table


@given(TASKS)
def test_a_task_table_round_trips(table):
    raw = serialise(table)
    assert parse(raw, TaskTable, "here") == table
    assert serialise(parse(raw, TaskTable, "here")) == raw


@given(st.lists(st.builds(BaseTensor, name=NAMES, dtype=DTYPES, shape=SHAPES, chunks=st.just(()))).map(tuple))
def test_a_base_table_round_trips(tensors):
    table = BaseTable(format="tallstore.base", tensors=tensors)
    assert parse(serialise(table), BaseTable, "here") == table


@pytest.mark.parametrize("table", [BaseTable, GroupTable, TaskTable, Manifest])
@given(raw=st.binary(max_size=50) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_refused_with_a_rule(table, raw):
    with pytest.raises(FormatError) as caught:
        parse_manifest(raw, "here") if table is Manifest else parse(raw, table, "here")
    assert caught.value.rule.startswith(("JSON-", "VER-"))


@given(TASKS, JSON, st.data())
def test_any_value_at_any_place_is_read_or_refused_with_a_rule(table, value, data):
    """No value, however wrong its type, escapes as another exception."""
    document = json.loads(serialise(table))
    place = document
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = value
    rule = None
    try:
        parse(json.dumps(document).encode(), TaskTable, "here")
    except FormatError as error:
        rule = error.rule
    assert rule in {None, "JSON-1", "JSON-3", "VER-3", "VER-4", "LIM-1"}
