"""The checks of the tables report everything that is wrong, and the loader the first of it."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch

import tallstore
from tallstore.format import tables
from tallstore.format.bundle_files import BundleFiles
from tallstore.format.manifest import GroupTable
from tallstore.format.payloads import group_payloads, task_payloads
from tests.bundle_builder import Bundle, Group, Task, with_tensor


def build(root, **edits) -> Bundle:
    base = {"a": torch.ones(7, 5), "b": torch.ones(13), "ids": torch.arange(3)}
    group = Group(root, base)
    group.vector("a", "LOG4", np.zeros(35), steps=[1.0] * 7)
    group.vector("b", "F16", np.ones(13))
    task = Task(group, "t")
    task.signed("a", np.ones(35), gains=[1.0] * 7)
    task.mask("b", np.ones(13), gain=0.5)
    task.extended("ids", "same", torch.tensor([4]), 3)
    task.private("head", torch.ones(2))
    task.alias("tied", "head")
    return Bundle(root, base, [group], [task], **edits)


def problems(files: BundleFiles, task_changes: dict) -> list[str]:
    """Rules that the task's table breaks once it is changed."""
    task = files.task("t")
    table = msgspec.structs.replace(task.table, **task_changes)
    found = tables.check_task(table, task.entry, task.base, task.group.vectors, files.files)
    return [problem.rule for problem in found]


@pytest.fixture
def files(tmp_path):
    return BundleFiles(build(tmp_path).seal())


def test_sound_tables_have_no_problems(files):
    assert problems(files, {}) == []


def test_every_payload_is_listed_under_its_key(files):
    task = files.task("t")
    assert {stored.key: stored.numel for stored in task_payloads(task.table)} == {
        "fields/a": 35,
        "gains/a": 7,
        "bits/b": 13,
        "further/ids": 1,
        "values/head": 2,
    }
    vectors = list(task.group.vectors.values())
    table = msgspec.structs.replace(_group_table(files), vectors=tuple(vectors))
    assert {stored.key: stored.numel for stored in group_payloads(table, task.base)} == {
        "merged/a": 35,
        "merged.step/a": 7,
        "merged/b": 13,
    }


def _group_table(files: BundleFiles):
    return files._read_table("groups/g0001/group.json", GroupTable)


def test_all_problems_are_reported(files):
    table = files.task("t").table
    a, b, ids, head, tied = table.tensors
    replace = msgspec.structs.replace
    tensors = (
        replace(a, shape=(5, 7), gain=1 / 3, row_axes=2),  # TAB-1, TAB-7 (both), NUM-1, TAB-7 (steps over other axes)
        replace(b, base="c"),  # TAB-2
        replace(ids, rows=2),  # TAB-4
        replace(head, values=None),  # TAB-6
        replace(tied, of="nothing"),  # TAB-3
        replace(head),  # TAB-8
    )
    found = problems(files, {"tensors": tensors, "name": "other"})
    expected = ["MAN-4", "MAN-4", "NUM-1", "TAB-1", "TAB-2", "TAB-3", "TAB-4", "TAB-6", "TAB-7", "TAB-7", "TAB-8"]
    assert sorted(set(found)) == sorted(set(expected))
    assert found.count("TAB-7") == 2


def test_what_needs_a_table_that_cannot_be_read_is_not_checked(files):
    task = files.task("t")
    found = tables.check_task(task.table, task.entry, None, None, files.files)
    assert list(found) == []


def build_kinds(root, **edits) -> Bundle:
    """Tensors of the kinds that need no merged vector, or two; one more is sparse in its leading rows."""
    base = {name: torch.ones(4, 3) for name in ("two", "sign", "sparse", "uniform", "long")} | {"bare": torch.ones(2)}
    group = Group(root, base)
    group.vector("two", "I8", np.ones(12), steps=[1.0] * 4)
    group.vector("two", "LOG4", np.ones(12), steps=[0.5] * 4, role="merged_lo")
    group.vector("sign", "I8", np.ones(12), steps=[0.5], row_axes=0, role="centre")
    task = Task(group, "t", codec="raw")  # records do not overlap as members of a pool do when a size is changed
    task.coded("two-level", "two", np.arange(12) % 2, gains=[1.0] * 4)
    task.coded("sign", "sign", np.arange(12) % 2, gains=[1.0] * 4)
    task.coded("sparse", "sparse", np.arange(12) % 2, own=np.arange(1.0, 7.0), values_dtype="F16")
    task.coded("uniform", "uniform", np.arange(12) % 8, levels=8, gain=0.5)
    task.coded("sparse", "bare", np.zeros(2))
    task.extended("long", "sparse", torch.ones(2, 3), 4, np.arange(12) % 3 == 0, own=np.arange(1.0, 5.0))
    return Bundle(root, base, [group], [task], **edits)


@pytest.fixture
def kinds(tmp_path):
    return BundleFiles(build_kinds(tmp_path).seal())


def test_every_payload_of_every_kind_is_listed_under_its_key(kinds):
    listed = {stored.key: stored for stored in task_payloads(kinds.task("t").table)}
    assert {key: (stored.numel, stored.set_count) for key, stored in listed.items()} == {
        "bits/two": (12, None),
        "gains/two": (4, None),
        "bits/sign": (12, None),
        "gains/sign": (4, None),
        "bits/sparse": (12, 6),
        "values/sparse": (6, None),
        "fields/uniform": (12, None),
        "bits/bare": (2, 0),
        "bits/long": (12, 4),
        "values/long": (4, None),
        "further/long": (6, None),
    }
    assert {stored.encoding.name for stored in listed.values()} >= {"bits", "uniform of 8 levels", "F16", "F32"}


def test_sound_tables_of_every_kind_have_no_problems(kinds):
    """Steps of a centre, and vectors that a kind does not use, have rows of their own."""
    assert problems(kinds, {}) == []


@pytest.mark.parametrize(
    ("name", "changes", "rules"),
    [
        ("two", {"base": "sign"}, ["TAB-5", "TAB-5"]),
        ("two", {"row_axes": 2}, ["TAB-7", "TAB-7"]),
        ("two", {"dtype": "I32"}, ["TAB-1"]),
        ("two", {"gain": 1.0}, ["TAB-7"]),
        ("sign", {"gains": None}, ["TAB-7"]),
        ("sign", {"row_axes": 3}, ["TAB-7"]),
        ("sign", {"base": "b"}, ["TAB-2"]),
        ("sparse", {"values": None}, ["TAB-6"]),
        ("sparse", {"count": 0}, ["TAB-6"]),
        ("sparse", {"count": 12}, []),  # nothing that a table alone tells
        ("sparse", {"count": 13}, ["TAB-9"]),
        ("sparse", {"unit": 2.0**-60}, []),
        *(("sparse", {"unit": unit}, ["TAB-10"]) for unit in (0.0, -1.0, 3.0, 2.0**-61, 2.0**61, float("inf"))),
        ("bare", {"count": 1}, ["TAB-6"]),
        ("uniform", {"gain": 0.1}, ["NUM-1"]),
        ("uniform", {"shape": (3, 4)}, ["TAB-1"]),
    ],
)
def test_problems_of_every_kind(kinds, name, changes, rules):
    table = with_tensor(name, **changes)(kinds.task("t").table)
    found = problems(kinds, {"tensors": table.tensors})
    assert [rule for rule in found if rule != "MAN-4"] == rules


def test_leading_rows_of_a_new_kind_are_checked(kinds):
    table = kinds.task("t").table
    (leading,) = (tensor.leading for tensor in table.tensors if tensor.name == "long")
    for changes, rule in (
        ({"values": None}, "TAB-6"),
        ({"count": 13}, "TAB-9"),
        ({"row_axes": 3}, "TAB-7"),
        ({"unit": 0.75}, "TAB-10"),
    ):
        changed = with_tensor("long", leading=msgspec.structs.replace(leading, **changes))(table)
        assert problems(kinds, {"tensors": changed.tensors}) == [rule]


def test_steps_of_merged_and_merged_lo_are_over_the_same_axes(tmp_path):
    base = {"w": torch.ones(4, 3)}
    group = Group(tmp_path, base)
    group.vector("w", "I8", np.ones(12), steps=[1.0] * 4)
    group.vector("w", "I8", np.ones(12), steps=[1.0], row_axes=0, role="merged_lo")
    task = Task(group, "t")
    task.mask("w", np.ones(12))
    bundle = tallstore.open_bundle(Bundle(tmp_path, base, [group], [task]).seal())
    with pytest.raises(tallstore.FormatError, match="steps over 1 axes, its merged_lo over 0") as caught:
        bundle.keys("t")
    assert caught.value.rule == "TAB-7"
    assert [problem.rule for problem in tallstore.verify(tmp_path)] == ["TAB-7"]


@pytest.mark.parametrize("role", ["merged", "merged_lo"])
def test_a_scale_of_either_level_above_2_to_the_60_is_refused(tmp_path, role):
    base = {"w": torch.ones(2, 2)}
    group = Group(tmp_path, base)
    for one in ("merged", "merged_lo"):
        group.vector("w", "I8", np.ones(4), steps=[1.0, 2.0**40 if one == role else 1.0], role=one)
    group.vector("w", "I8", np.ones(4), steps=[1.0, 2.0**40], role="centre")  # no gain scales it
    task = Task(group, "t")
    task.coded("two-level", "w", np.ones(4), gain=2.0**30, expect=False)
    bundle = tallstore.open_bundle(Bundle(tmp_path, base, [group], [task]).seal())
    with pytest.raises(tallstore.FormatError, match=r"tensor 'w'.*above 2\^60 \[NUM-3\]"):
        bundle.state_dict("t")
    assert [problem.rule for problem in tallstore.verify(tmp_path)] == ["NUM-3"]


@pytest.mark.parametrize("count", [5, 7])
def test_a_count_that_is_not_the_bits_is_found(tmp_path, count):
    root = build_kinds(tmp_path, edit_task=with_tensor("sparse", count=count)).seal()
    with pytest.raises(tallstore.FormatError) as caught:
        tallstore.open_bundle(root).tensor("t", "sparse")
    assert caught.value.rule == "TAB-9"
    assert "TAB-9" in {problem.rule for problem in tallstore.verify(root)}


@pytest.mark.parametrize(
    ("edits", "rule"),
    [
        ({"edit_task": with_tensor("b", shape=(14,))}, "MAN-4"),
        ({"edit_task": with_tensor("b", dtype="I32")}, "TAB-1"),
        ({"edit_task": with_tensor("tied", of="b ")}, "TAB-3"),
        ({"edit_task": with_tensor("b", gain=0.1)}, "NUM-1"),
        ({"edit_task": with_tensor("b", gain=None)}, "TAB-7"),
        ({"edit_group": with_tensor("b", tensor="c")}, "TAB-2"),
        ({"edit_group": with_tensor("b", role="centre")}, "TAB-5"),
        ({"edit_group": with_tensor("a", step=None)}, "TAB-6"),
        ({"edit_base": with_tensor("b", chunks=())}, "BASE-2"),
        ({"edit_base": with_tensor("b", chunks=(), alias_of="b")}, "BASE-3"),
    ],
)
def test_the_loader_refuses_the_first_problem(tmp_path, edits, rule):
    bundle = tallstore.open_bundle(build(tmp_path, **edits).seal())
    with pytest.raises(tallstore.FormatError) as caught:
        bundle.keys("t")
    assert caught.value.rule == rule


def test_a_scale_above_2_to_the_60_is_refused(tmp_path):
    base = {"a": torch.ones(2, 2)}
    group = Group(tmp_path, base)
    group.vector("a", "I8", np.ones(4), steps=[1.0, 2.0**40])
    task = Task(group, "t")
    task.mask("a", np.ones(4), gain=2.0**30, expect=False)
    bundle = tallstore.open_bundle(Bundle(tmp_path, base, [group], [task]).seal())
    with pytest.raises(tallstore.FormatError, match=r"tensor 'a'.*above 2\^60 \[NUM-3\]"):
        bundle.state_dict("t")
