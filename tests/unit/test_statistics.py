"""Statistics of masks against plain numpy on unpacked codes."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tallstore
from tallstore import Emr, LeastSquares, Localize, Sign, SignedMask, TallMask, Uniform
from tallstore.errors import IntegrityError, NotFetchedError, OptionError, UnknownTaskError
from tallstore.format import bits
from tallstore.format.bundle_files import BundleFiles
from tallstore.format.dtypes import CHUNK_NUMEL
from tallstore.inspecting import statistics
from tallstore.inspecting.agreement import at_least, overlaps, profile, tally
from tallstore.inspecting.claims import other_than
from tallstore.inspecting.lineage import lineages
from tests.bundle_builder import Bundle, Group, Task
from tests.few_files import few_files
from tests.packing_cases import base_model, experts_of, pack, tuned

# --- counting on packed bits ------------------------------------------------------------------------------------------


def rows_of_words(masks: np.ndarray) -> np.ndarray:
    """Bool [masks, weights] as words."""
    packed = np.packbits(masks, axis=1, bitorder="little")
    padded = np.zeros((len(masks), -(-masks.shape[1] // 64) * 8), np.uint8)
    padded[:, : packed.shape[1]] = packed
    return padded.view(np.uint64)


@st.composite
def some_masks(draw):
    """Of 1 to 40 tasks, thin or full, over a number of weights that fills no word."""
    count, numel = draw(st.integers(1, 40)), draw(st.integers(1, 300))
    random = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    return random.random((count, numel)) < draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))


@given(some_masks())
def test_counts_are_those_of_the_unpacked_masks(masks):
    count, numel = masks.shape
    digits = tally(rows_of_words(masks))
    sums = masks.sum(0)
    assert len(digits) == count.bit_length()
    assert profile(digits, count, numel).tolist() == np.bincount(sums, minlength=count + 1).tolist()
    for k in range(count + 2):
        reached = np.unpackbits(at_least(digits, k).view(np.uint8), count=numel, bitorder="little")
        assert (reached == (sums >= k)).all()
    wide = masks.astype(np.int64)
    assert (overlaps(rows_of_words(masks)) == wide @ wide.T).all()


def test_overlaps_of_more_words_than_a_block():
    masks = np.random.default_rng(0).random((3, 64 * 5000)) < 0.3
    wide = masks.astype(np.int64)
    assert (overlaps(rows_of_words(masks)) == wide @ wide.T).all()


@given(st.lists(st.integers(0, 2), min_size=1, max_size=200), st.integers(0, 2))
def test_fields_that_are_not_absent_are_bits_in_their_order(codes, absent):
    fields = bits.pack(np.array(codes, np.uint8), 2)
    found = other_than(fields, len(codes), absent)
    assert bits.unpack(found, len(codes), 1).tolist() == [code != absent for code in codes]
    assert found.size == -(-len(codes) // 8)
    assert bits.padding_is_zero(found, len(codes), 1)


# --- what statistics are due ------------------------------------------------------------------------------------------


def assert_counts(found, claims):
    """The statistics are those of *claims*: by tensor, a bool array a task; None where it has no such tensor."""
    tasks = len(found.tasks)
    assert [tensor.name for tensor in found.tensors] == [name for name in claims if name in by_name(found)]
    assert sorted(by_name(found)) == sorted(claims)
    overlap = np.zeros((tasks, tasks), np.int64)
    either = np.zeros((tasks, tasks), np.int64)
    sums = np.zeros(tasks + 1, np.int64)
    for name, masks in claims.items():
        tensor = by_name(found)[name]
        assert tensor.claimed == tuple(0 if mask is None else int(mask.sum()) for mask in masks)
        assert tensor.weights == tuple(0 if mask is None else mask.size for mask in masks)
        assert tensor.densities == tuple(None if mask is None else mask.mean() for mask in masks)
        full = np.zeros((tasks, tensor.numel), bool)
        for row, mask in zip(full, masks, strict=True):
            row[: 0 if mask is None else mask.size] = False if mask is None else mask
        counts = np.bincount(full.sum(0), minlength=tasks + 1)
        assert tensor.claimed_by == tuple(counts.tolist())
        assert tensor.profile == pytest.approx(counts / tensor.numel)
        sums += counts
        overlap += np.array([[(one & other).sum() for other in full] for one in full])
        either += np.array([[(one | other).sum() for other in full] for one in full])
    assert found.numel == sums.sum()
    assert found.claimed_by == tuple(sums.tolist())
    assert (found.catastrophic, found.selfish, found.universal) == tuple(sums[[0, 1, tasks]] / found.numel)
    assert found.overlap == tuple(map(tuple, overlap.tolist()))
    for row, boths, eithers in zip(found.similarity, overlap, either, strict=True):
        assert row == tuple(both / some if some else None for both, some in zip(boths, eithers, strict=True))
    for place, task in enumerate(found.tasks):
        had = [masks[place] for masks in claims.values() if masks[place] is not None]
        due = np.concatenate(had).mean() if had else None
        assert found.densities[task] == (None if due is None else pytest.approx(due))
    everything = np.concatenate([mask for masks in claims.values() for mask in masks if mask is not None])
    assert found.density == pytest.approx(everything.mean())


def by_name(found):
    return {tensor.name: tensor for tensor in found.tensors}


def claims_of(packed, name, absent=0):
    """What each task's mask of a tensor claims, from the codes one a byte; nothing where it equals the base's."""
    numel = packed.files.base[name].shape
    found = []
    for task in packed.tables:
        kind = packed.kinds(task)[name]
        nothing = np.zeros(int(np.prod(numel)), bool)
        found.append(nothing if kind == "same" else packed.codes(task, name).numpy().reshape(-1) != absent)
    return found


CODED = ["block.kernel", "block.weight", "embed.weight", "norm.weight"]


@pytest.mark.parametrize(
    ("method", "absent"),
    [
        (TallMask(), 0),
        (TallMask.published(), 0),
        (SignedMask(), 0),
        (Emr(), 0),
        (LeastSquares(), 0),
        (Localize(0.1), 0),
        (Uniform(3), 1),
    ],
    ids=["tall", "published", "signed", "emr", "least squares", "localize", "ternary"],
)
def test_every_mask_that_is_packed(tmp_path, method, absent):
    base = base_model()
    experts = experts_of(base, 4)
    experts["b"]["block.weight"] = base["block.weight"].clone()
    packed = pack(base, experts, tmp_path / "bundle", method=method)
    found = tallstore.open_bundle(tmp_path / "bundle").statistics()
    assert found.tasks == ("a", "b", "c", "d")
    assert_counts(found, {name: claims_of(packed, name, absent) for name in CODED})
    assert {(left.name, left.numel, left.reason) for left in found.left_out} == {
        ("head.bias", 7, "stored whole by 'a'"),
        ("temperature", 1, "stored whole by 'a'"),
    }
    assert found.left_out_numel == 8


# --- by hand: kinds beside each other, borders of chunks, tensors that some lack --------------------------------------


class Hand:
    """A bundle of two groups over the same base, that is put together tensor by tensor."""

    def __init__(self, root, base):
        self.root, self.base = root, base
        self.groups = [Group(root, base, number) for number in (1, 2)]
        for group in self.groups:
            for name, tensor in base.items():
                if tensor.is_floating_point():
                    group.vector(name, "F32", torch.ones_like(tensor))
        self.tasks = []
        self.random = np.random.default_rng(0)

    def task(self, name, group=1):
        self.tasks.append(Task(self.groups[group - 1], name))
        return self.tasks[-1]

    def mask(self, task, kind, name, density=0.3, *, rows=None, further=None):
        """Add a mask of a kind; what it claims."""
        shape = self.base[name].shape if rows is None else (rows, *self.base[name].shape[1:])
        claims = self.random.random(int(np.prod(shape))) < density
        options = {"expect": False}
        codes = claims.astype(np.int8)
        if kind == "signed":
            codes = np.where(self.random.random(claims.size) < 0.5, -codes, codes)
        if kind == "uniform":
            codes = np.where(claims, self.random.choice([0, 2], claims.size), 1)
            options["levels"] = 3
        if kind == "sparse":
            options["own"] = torch.ones(int(claims.sum()))
        if rows is None:
            task.coded(kind, name, codes, **options)
        else:
            task.extended(name, kind, further, rows, codes, **options)
        return claims

    def seal(self, **options):
        return Bundle(self.root, self.base, self.groups, self.tasks, **options).seal()


def test_masks_of_every_kind_over_one_tensor(tmp_path):
    """They count the same weights, whatever their width and group, over the borders of chunks."""
    base = {"w": torch.ones(CHUNK_NUMEL + 1013)}
    hand = Hand(tmp_path / "bundle", base)
    claims = []
    for number, kind in enumerate(["mask", "signed", "sparse", "uniform", "signed", "mask", "uniform"]):
        claims.append(hand.mask(hand.task(f"{number} {kind}", 1 + number % 2), kind, "w", density=0.1 + 0.1 * number))
    hand.task("unmoved").same("w")
    claims.append(np.zeros(CHUNK_NUMEL + 1013, bool))
    assert_counts(tallstore.open_bundle(hand.seal()).statistics(), {"w": claims})


@pytest.mark.parametrize("numel", [1, 7, 8, 9, 63, 64, 65, 4095, 4096, 4097])
def test_masks_of_any_length(tmp_path, numel):
    hand = Hand(tmp_path / "bundle", {"w": torch.ones(numel)})
    claims = [hand.mask(hand.task(kind), kind, "w", 0.5) for kind in ("mask", "signed", "sparse", "uniform")]
    assert_counts(tallstore.open_bundle(hand.seal()).statistics(), {"w": claims})


def test_leading_rows_are_what_counts_of_a_resized_tensor(tmp_path):
    base = {"w": torch.ones(13, 5), "same": torch.ones(20, 3)}
    hand = Hand(tmp_path / "bundle", base)
    claims = {"w": [], "same": []}
    for name, kind, rows, further in (
        ("longer", "mask", 13, torch.ones(4, 5)),
        ("cut", "signed", 9, None),
        ("longer yet", "uniform", 13, torch.ones(9, 5)),
    ):
        task = hand.task(name)
        claims["w"].append(hand.mask(task, kind, "w", 0.5, rows=rows, further=further))
        claims["same"].append(hand.mask(task, "mask", "same"))
    task = hand.task("cut and the same")
    task.extended("w", "same", None, 7)
    claims["w"].append(np.zeros(35, bool))
    task.same("same")
    claims["same"].append(np.zeros(60, bool))
    assert_counts(tallstore.open_bundle(hand.seal()).statistics(), claims)


def test_a_tensor_that_a_task_lacks_is_no_weight_of_its(tmp_path):
    hand = Hand(tmp_path / "bundle", {"w": torch.ones(30, 30), "v": torch.ones(50)})
    one, other = hand.task("one"), hand.task("other")
    claims = {"w": [hand.mask(one, "mask", "w"), hand.mask(other, "mask", "w")], "v": [hand.mask(one, "mask", "v")]}
    other.dropped("v")
    claims["v"].append(None)
    assert_counts(tallstore.open_bundle(hand.seal()).statistics(), claims)


def test_what_no_mask_claims_is_catastrophic(tmp_path):
    hand = Hand(tmp_path / "bundle", {"w": torch.ones(30), "frozen": torch.ones(50), "steps": torch.arange(4)})
    claims = {"w": [], "frozen": [np.zeros(50, bool)] * 2}
    for name in "ab":
        task = hand.task(name)
        claims["w"].append(hand.mask(task, "mask", "w"))
        task.same("frozen")
        task.same("steps")
    assert_counts(tallstore.open_bundle(hand.seal()).statistics(), claims)


def test_what_is_no_mask_is_left_out_and_said_to_be(tmp_path):
    base = {name: torch.ones(40) for name in ("w", "two-level", "sign", "uniform", "whole", "mine", "steps")}
    base["steps"] = torch.arange(5)
    hand = Hand(tmp_path / "bundle", base)
    hand.groups[0].vector("two-level", "F32", torch.ones(40), role="merged_lo")
    one, other = hand.task("one"), hand.task("other")
    claims = {"w": [hand.mask(one, "mask", "w"), hand.mask(other, "signed", "w")]}
    for name in ("two-level", "sign", "uniform"):
        hand.mask(one, "mask", name)
        other.coded(name, name, np.zeros(40), levels=4, expect=False)
    hand.mask(one, "mask", "whole")
    other.private("whole", torch.zeros(40))
    other.private("mine elsewhere", torch.zeros(8))
    one.private("steps", torch.arange(5))
    bundle = tallstore.open_bundle(hand.seal())
    found = bundle.statistics()
    assert_counts(found, claims)
    assert {left.name: left.reason for left in found.left_out} == {
        "two-level": "the two-level code of 'other' leaves nothing out",
        "sign": "the sign code of 'other' leaves nothing out",
        "uniform": "the uniform code of 'other' leaves nothing out",
        "whole": "stored whole by 'other'",
        "mine": "no task has it under the base's name",
    }
    assert found.left_out_numel == 200
    assert [tensor.name for tensor in bundle.statistics(["one"]).tensors] == [
        "w",
        "two-level",
        "sign",
        "uniform",
        "whole",
    ]


def test_a_bundle_without_masks_has_nothing_to_count(tmp_path):
    base = base_model()
    tallstore.pack(base, experts_of(base), tmp_path / "bundle", method=Sign())
    found = tallstore.open_bundle(tmp_path / "bundle").statistics()
    assert (found.tensors, found.numel, found.density, found.universal) == ((), 0, None, None)
    assert found.densities == dict.fromkeys("abc")
    assert found.similarity == ((None,) * 3,) * 3
    first, *tasks, last = str(found).splitlines()
    assert first == f"statistics of {tmp_path / 'bundle'}: 3 masks over 0 weights"
    assert tasks == ["  a: density –", "  b: density –", "  c: density –"]
    assert last.startswith("  left out: 20,865 weights in 6 tensors, such as block.kernel (the sign code of 'a'")
    assert "–" in found._repr_html_()
    assert json.dumps(found.to_dict())


# --- which tensor is whose --------------------------------------------------------------------------------------------


def test_a_tensor_belongs_to_the_name_that_is_in_use(tmp_path):
    """Of names that the base ties, each that is in use is a tensor of its own; the others go with the first of them."""
    base = {name: torch.ones(4) for name in ("a", "b", "c", "d", "w")}
    hand = Hand(tmp_path / "bundle", base)
    one, other = hand.task("one"), hand.task("other")
    for task, names in ((one, "bdw"), (other, "b")):
        for name in names:
            task.same(name)
    other.mask("mine", np.ones(4), base="w")
    other.private("w", torch.zeros(4))  # has the name of the base's, and is none of its
    files = BundleFiles(hand.seal(base_aliases=dict.fromkeys("bcd", "a")))
    tasks = [files.task("one"), files.task("other")]

    def found(**options):
        return {
            lineage.name: (lineage.names, [tensor and tensor.name for tensor in lineage.made])
            for lineage in lineages(files.base, tasks, **options)
        }

    assert found() == {
        "b": (("a", "b", "c"), ["b", "b"]),
        "d": (("d",), ["d", None]),
        "w": (("w",), ["w", "mine"]),
    }
    assert found(shared=["c"]) == found() | {"b": (("a", "b"), ["b", "b"]), "c": (("c",), [None, None])}
    tasks.clear()
    assert found() == {"a": (("a", "b", "c", "d"), []), "w": (("w",), [])}


# --- ties -------------------------------------------------------------------------------------------------------------


def test_tied_names_count_once(tmp_path):
    base = base_model()
    experts = experts_of(base)
    for state in (base, *experts.values()):
        state["a_head.weight"] = state["embed.weight"]
    packed = pack(base, experts, tmp_path / "bundle")
    found = tallstore.open_bundle(tmp_path / "bundle").statistics()
    names = ["a_head.weight", "block.kernel", "block.weight", "norm.weight"]
    assert_counts(found, {name: claims_of(packed, name) for name in names})


def test_experts_that_have_the_other_name_of_a_tie(tmp_path):
    base = base_model()
    experts = experts_of(base)
    base["a_head.weight"] = base["embed.weight"]
    packed = pack(base, experts, tmp_path / "bundle")
    found = tallstore.open_bundle(tmp_path / "bundle").statistics()
    assert_counts(found, {name: claims_of(packed, name) for name in sorted(CODED, key="embed.weight".__ne__)})


def test_names_that_an_expert_untied_count_apart(tmp_path):
    base = base_model()
    base["lm_head.weight"] = base["embed.weight"]
    experts = {"apart": tuned(base, 1), "tied": tuned(base_model(), 2)}
    experts["tied"]["lm_head.weight"] = experts["tied"]["embed.weight"]
    tallstore.pack(base, experts, tmp_path / "bundle")
    found = by_name(tallstore.open_bundle(tmp_path / "bundle").statistics())
    assert found["embed.weight"].weights == (6000, 6000)
    assert found["lm_head.weight"].weights == (6000, 0)


# --- which tasks ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    base = base_model()
    return pack(base, experts_of(base, 4), tmp_path_factory.mktemp("statistics") / "bundle", method=SignedMask())


@pytest.fixture
def copy(packed, tmp_path):
    """A copy of the bundle, to break."""
    return shutil.copytree(packed.root, tmp_path / "copy")


@pytest.mark.parametrize("tasks", [["a"], ["d", "b"], ["c", "a", "c"]])
def test_some_tasks_in_the_order_asked_for(packed, tasks):
    found = tallstore.open_bundle(packed.root).statistics(tasks)
    assert found.tasks == tuple(dict.fromkeys(tasks))
    places = ["abcd".index(task) for task in found.tasks]
    assert_counts(found, {name: [claims_of(packed, name)[place] for place in places] for name in CODED})
    assert found.not_fetched == ()


def test_a_partial_bundle_counts_what_is_here_and_names_the_rest(packed, copy):
    shutil.rmtree(copy / "tasks" / "b")
    bundle = tallstore.open_bundle(copy)
    found = bundle.statistics()
    assert (found.tasks, found.not_fetched) == (("a", "c", "d"), ("b",))
    assert_counts(found, {name: [claims_of(packed, name)[place] for place in (0, 2, 3)] for name in CODED})
    assert "not fetched: b" in str(found)
    assert "not fetched: b" in found._repr_html_()
    with pytest.raises(NotFetchedError, match="'b'"):
        bundle.statistics(["a", "b"])
    for task in "acd":
        shutil.rmtree(copy / "tasks" / task)
    with pytest.raises(NotFetchedError, match="no task's files are here"):
        bundle.statistics()


@pytest.mark.parametrize(
    ("tasks", "error", "message"),
    [
        ("abc", OptionError, "tasks is 'abc'; give a list of names, or None"),
        ([], OptionError, r"tasks is \[\]"),
        (["a", "e"], UnknownTaskError, "no task named 'e'"),
    ],
)
def test_tasks_that_are_none(packed, tasks, error, message):
    with pytest.raises(error, match=message):
        tallstore.open_bundle(packed.root).statistics(tasks)


def test_bytes_that_changed_are_no_statistics(copy):
    shard = next((copy / "tasks" / "c").glob("mask-*"))
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(IntegrityError):
        tallstore.open_bundle(copy).statistics()
    tallstore.open_bundle(copy).statistics(["a", "b", "d"])


def test_a_base_is_not_needed_and_nothing_else_is_read(packed):
    with tallstore.open_bundle(packed.root) as bundle:
        bundle.statistics()
        masks = sum(path.stat().st_size for path in packed.root.glob("tasks/*/mask-*"))
        tables = sum(path.stat().st_size for path in packed.root.rglob("*.json"))
        assert bundle.bytes_read <= masks + tables


def test_more_tasks_than_may_be_open_at_once(tmp_path, monkeypatch):
    hand = Hand(tmp_path / "bundle", {"w": torch.ones(5000)})
    claims = [hand.mask(hand.task(f"task {number}"), "signed", "w") for number in range(30)]
    root = hand.seal()
    monkeypatch.setattr(statistics, "MAX_HELD", 10)
    with few_files(monkeypatch):
        found = tallstore.open_bundle(root).statistics()
    assert_counts(found, {"w": claims})


def test_progress_goes_from_nothing_to_all_of_the_masks(packed):
    told = []
    tallstore.open_bundle(packed.root).statistics(progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    words = sum(-(-int(np.prod(packed.files.base[name].shape)) // 64) for name in CODED)
    assert told[0] == (0, 4 * 8 * words)
    assert told[-1] == told[-2] == (4 * 8 * words,) * 2


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_statistics_as_plain_types(packed):
    found = tallstore.open_bundle(packed.root).statistics()
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["path"] == str(packed.root)
    assert plain["tasks"] == list("abcd")
    assert plain["densities"] == found.densities
    assert plain["claimed_by"] == list(found.claimed_by)
    assert plain["profile"] == list(found.profile)
    assert plain["similarity"] == [list(row) for row in found.similarity]
    assert plain["overlap"] == [list(row) for row in found.overlap]
    assert plain["left_out"][0] == {"name": "head.bias", "numel": 7, "reason": "stored whole by 'a'"}
    assert plain["left_out_numel"] == 8
    tensor = plain["tensors"][0]
    assert tensor["densities"] == [claimed / tensor["numel"] for claimed in tensor["claimed"]]
    assert sum(tensor["claimed_by"]) == tensor["numel"]
    assert tensor["profile"] == list(found.tensors[0].profile)


def test_statistics_print_a_line_a_task(packed):
    found = tallstore.open_bundle(packed.root).statistics()
    first, second, *lines = str(found).splitlines()
    assert first == f"statistics of {packed.root}: 4 masks over {found.numel:,} weights"
    none, one, two, three, every = (f"{100 * share:.1f} %" for share in found.profile)
    assert second == (
        f"weights claimed by none (catastrophic): {none}, by 1 (selfish): {one}, by 2: {two}, by 3: {three},"
        f" by all 4 (universal): {every}"
    )
    nearest = max((share, task) for share, task in zip(found.similarity[0][1:], "bcd", strict=True))
    assert lines[0] == (
        f"  a: density {100 * found.densities['a']:.1f} %, {100 * nearest[0]:.1f} % in common with {nearest[1]}"
    )
    assert lines[-1] == "  left out: 8 weights in 2 tensors, such as head.bias (stored whole by 'a')"
    assert len(lines) == 5
    assert repr(found) == f"<Statistics {str(packed.root)!r}: 4 masks over {found.numel:,} weights>"


def test_many_tasks_are_counted_and_the_first_shown(tmp_path):
    hand = Hand(tmp_path / "bundle", {"w": torch.ones(200)})
    names = [f"<b>{number}</b>" for number in range(23)]
    claims = [hand.mask(hand.task(name), "mask", "w", 0.4) for name in names]
    found = tallstore.open_bundle(hand.seal()).statistics()
    assert_counts(found, {"w": claims})
    _, second, *lines = str(found).splitlines()
    middle = sum(found.claimed_by[3:23]) / 200
    assert f", by 3 to 22: {100 * middle:.1f} %, by all 23 (universal): 0.0 %" in second
    assert len(lines) == 21
    assert lines[-1] == "  and 3 more in statistics.tasks"
    html = found._repr_html_()
    assert html.count("<tr>") == 21
    assert "<b>" not in html
    assert "&lt;b&gt;0&lt;/b&gt;" in html


def test_of_one_task_nothing_is_in_common(packed):
    found = tallstore.open_bundle(packed.root).statistics(["b"])
    lines = str(found).splitlines()
    assert lines[0].endswith(f"1 mask over {found.numel:,} weights")
    density = f"{100 * found.density:.1f} %"
    assert lines[2] == f"  b: density {density}"
    assert f"by 1 (selfish): {density}" in lines[1]
    assert found.selfish == found.universal == found.density
