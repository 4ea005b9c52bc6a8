"""What is decided from names, dtypes and shapes alone: which tensor meets which, and what is not coded."""

from __future__ import annotations

import pytest
import torch

from tallstore.checkpoints import open_checkpoint
from tallstore.errors import NameMismatchError
from tallstore.packing.plan import is_private, is_text, name_experts, parts_by_base_name


def checkpoint(**shapes):
    """A checkpoint of zeros; a shape, or a pair of a shape and a dtype."""
    state = {}
    for name, shape in shapes.items():
        size, dtype = shape if shape and isinstance(shape[0], tuple) else (shape, torch.float32)
        state[name.replace("__", ".")] = torch.zeros(size, dtype=dtype)
    return open_checkpoint(state)


def named(base, key_mapping=None, **experts):
    return name_experts(base, experts, key_mapping or {})


def part(base_shape, shape, private=()):
    """The one part of a base and an expert of one tensor."""
    base = checkpoint(w=base_shape)
    (found,) = parts_by_base_name(base, named(base, a=checkpoint(w=shape)), private)["w"]
    return found


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_meet_where_they_are_equal():
    base = checkpoint(a=(2,), b=(2,), c=(2,))
    (expert,) = named(base, x=checkpoint(b=(3,), d=(2,)))
    assert expert.base_names == {"b": "b", "d": None}
    assert expert.dropped == ("a", "c")
    assert expert.where == "expert 'x' (a state dict)"


def test_mappings_apply_in_their_order_and_anywhere():
    base = checkpoint(block__0__w=(2,))
    (expert,) = named(base, {"layer": "block", "^model.": "", "w$": "w"}, x=checkpoint(model__layer__0__w=(2,)))
    assert expert.base_names == {"model.layer.0.w": "block.0.w"}


def test_parts_are_in_the_order_of_the_base_names_and_of_the_experts():
    base = checkpoint(b=(5000,), a=(5000,), c=(5000,))
    experts = named(base, z=checkpoint(a=(5000,), b=(5000,)), y=checkpoint(b=(5000,), head=(3,)))
    parts = parts_by_base_name(base, experts, ())
    assert list(parts) == ["a", "b"]
    assert [[found.expert.task for found in parts[name]] for name in parts] == [["z"], ["z", "y"]]


@pytest.mark.parametrize(
    ("expert", "hint"),
    [
        (
            {"model__a__w": (2,), "model__b": (2,)},
            'the prefix \'model.\' seems to differ: give key_mapping={"^model\\\\.": ""}',
        ),
        ({"x__y__a__w": (2,)}, "the prefix 'x.y.' seems to differ"),
        ({"w": (2,)}, 'the prefix \'a.\' seems to differ: give key_mapping={"^": "a."}'),
        ({"q": (2,)}, "give key_mapping={regular expression: replacement}"),
        ({"one__a__w": (2,), "two__a__w": (2,), "two__b": (2,)}, "the prefix 'two.' seems to differ"),
    ],
)
def test_the_prefix_that_most_names_differ_by_is_the_hint(expert, hint):
    with pytest.raises(NameMismatchError) as caught:
        named(checkpoint(a__w=(2,), b=(2,)), x=checkpoint(**expert))
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("name", "patterns", "expected"),
    [
        ("head.weight", ["head.*"], True),
        ("head.weight", ["*.weight"], True),
        ("head.weight", ["head"], False),
        ("head.weight", ["HEAD.*"], False),
        ("head.0.weight", ["head.?.weight"], True),
        ("head.0.weight", ["head.[1-9].weight", "nothing"], False),
        ("head.weight", [], False),
    ],
)
def test_patterns(name, patterns, expected):
    assert is_private(name, patterns) is expected


@pytest.mark.parametrize("name", ["plain", "ümläut", "名", "a b", "a/b", "\U0001f600", ""])
def test_text(name):
    assert is_text(name)


@pytest.mark.parametrize("name", ["\n", "a\tb", "\x00", "\x7f", "\x9f", "\ud800"])
def test_no_text(name):
    assert not is_text(name)


# --- ties -------------------------------------------------------------------------------------------------------------


def tied(*names, other=None):
    tensor = torch.zeros(5, 2)
    return open_checkpoint(dict.fromkeys(names, tensor) | ({other: torch.zeros(3)} if other else {}))


@pytest.mark.parametrize(
    ("base", "carrier"),
    [
        (checkpoint(a=(5, 2), b=(5, 2), c=(5, 2)), "a"),
        (checkpoint(b=(5, 2)), "b"),
        (checkpoint(c=(5, 2)), "c"),
        (checkpoint(other=(3,)), "a"),
    ],
    ids=["all", "second", "last", "none"],
)
def test_a_tie_is_carried_by_the_first_name_that_the_base_has(base, carrier):
    (expert,) = named(base, x=tied("a", "b", "c", other="other"))
    assert expert.aliases == {name: carrier for name in "abc" if name != carrier}
    assert expert.base_names.keys() == {carrier, "other"}
    assert "a" not in expert.dropped


def test_a_tie_is_carried_by_its_mapped_name():
    (expert,) = named(checkpoint(b=(5, 2)), {"^m.": ""}, x=tied("m.a", "m.b"))
    assert (expert.aliases, expert.base_names) == ({"m.a": "m.b"}, {"m.b": "b"})


def test_what_the_base_ties_is_dropped_only_where_every_name_is_lacking():
    base = tied("a", "b", other="other")
    for names, dropped in ((("a",), ("other",)), (("b",), ("other",)), (("other",), ("a",))):
        (expert,) = named(base, x=checkpoint(**dict.fromkeys(names, (5, 2))))
        assert expert.dropped == dropped


# --- what is coded ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("base_dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(4096,), (64, 64), (4, 4, 16, 16), (1, 4096), (4096, 1)])
def test_floats_of_at_least_4096_elements_are_coded(shape, base_dtype, dtype):
    found = part((shape, base_dtype), (shape, dtype))
    assert found.whole_because is None
    assert (found.numel, found.is_resized) == (4096, False)


@pytest.mark.parametrize(
    ("base_shape", "shape", "reason"),
    [
        ((4095,), (4095,), "fewer than 4,096 elements"),
        ((), (), "fewer than 4,096 elements"),
        ((0, 9), (0, 9), "fewer than 4,096 elements"),
        ((64, 64), (4096,), "its shape is not the base's [64, 64]"),
        ((64, 64), (64, 65), "its shape is not the base's [64, 64]"),
        ((64, 64), (64, 64, 1), "its shape is not the base's [64, 64]"),
        ((), (4096,), "its shape is not the base's []"),
        ((4096,), (), "its shape is not the base's [4096]"),
        (((5000,), torch.int64), ((5000,), torch.int64), "I64 is not coded"),
        (((5000,), torch.float32), ((5000,), torch.int32), "I32 is not coded"),
        (((5000,), torch.bool), ((5000,), torch.float32), "BOOL is not coded"),
        (((5000,), torch.float8_e4m3fn), ((5000,), torch.float32), "F8_E4M3 is not coded"),
        ((100, 64), (63, 64), "fewer than 4,096 elements"),
        ((63, 64), (100, 64), "fewer than 4,096 elements"),
        ((100, 64), (0, 64), "fewer than 4,096 elements"),
    ],
    ids=str,
)
def test_what_is_not_coded_and_why(base_shape, shape, reason):
    assert part(base_shape, shape).whole_because == reason


def test_private_comes_before_every_other_reason():
    assert part((64, 64), (64, 64), ["w"]).whole_because == "asked for by private="
    assert part((3,), (4,), ["w"]).whole_because == "asked for by private="


@pytest.mark.parametrize(
    ("base_shape", "shape", "rows", "numel"),
    [((100, 64), (130, 64), 100, 6400), ((100, 64), (64, 64), 64, 4096), ((5000,), (4096,), 4096, 4096)],
)
def test_resized_tensors_have_leading_rows(base_shape, shape, rows, numel):
    found = part(base_shape, shape)
    assert found.whole_because is None
    assert (found.is_resized, found.rows, found.numel) == (True, rows, numel)
