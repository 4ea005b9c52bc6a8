"""What is streamed in pieces is what would be packed in one: every path of large tensors, forced upon small ones."""

from __future__ import annotations

import pytest
import torch

from tallstore import SignedMask
from tallstore.checkpoints import open_checkpoint
from tallstore.format import shard_writer
from tallstore.packing.group import GroupPacker
from tallstore.packing.plan import name_experts, parts_by_base_name
from tallstore.packing.stack import Kept, Span, Stack, examine
from tests.packing_cases import METHODS, assert_same, base_model, contents, experts_of, forced, normal, pack, tuned

WIDTHS_BY_ROW = ["ternary", "uniform", "uniform centred"]  # which a piece of a row cannot choose
PATHS = {
    "small tiles": {"tile": 500, "smallest_tile": 500},
    "one row a tile": {"tile": 60, "smallest_tile": 60},
    "pieces of rows": {"tile": 900, "smallest_tile": 300, "longest_row": 1},
    "read again": {"kept": 0},
    "codes are kept": {"kept": 20_000},
    "codes are kept of small tiles": {"tile": 500, "smallest_tile": 500, "kept": 20_000},
    "scratch on disk": {"in_memory": 0},
    "all at once": {"tile": 700, "smallest_tile": 250, "longest_row": 15, "kept": 0, "in_memory": 0},
}


def model():
    """Whole rows, a row of its own, and rows longer than any tile."""
    base = base_model()
    return {name: base[name] for name in ("block.kernel", "block.weight", "norm.weight", "head.bias")}


def resized_experts(base):
    """Two that cut rows off and one that added some: other tasks cover other rows."""
    experts = experts_of(base)
    experts["a"] = {name: tensor[: tensor.shape[0] * 9 // 10] for name, tensor in experts["a"].items()}
    experts["b"] = {name: torch.cat([tensor, tensor[:3]]) for name, tensor in experts["b"].items()}
    experts["c"] = {name: tensor[: tensor.shape[0] * 19 // 20] for name, tensor in experts["c"].items()}
    return experts


# --- the same bundle --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The files of a method's bundle, packed in one piece; each is packed once."""
    found = {}

    def of(name):
        if name not in found:
            root = tmp_path_factory.mktemp("whole") / "bundle"
            pack(model(), experts_of(model()), root, method=METHODS[name])
            found[name] = contents(root)
        return found[name]

    return of


@pytest.mark.parametrize(
    ("name", "path"),
    [
        *((name, path) for path in PATHS if path != "all at once" for name in ("signed", "tall ties")),
        *((name, "one row a tile") for name in ["signed rows", "sign rows", *WIDTHS_BY_ROW]),
        *((name, "all at once") for name in METHODS),
    ],
)
def test_the_bundle_is_the_same_byte_for_byte(tmp_path, monkeypatch, whole, name, path):
    expected = whole(name)
    forced(monkeypatch, **PATHS[path])
    pack(model(), experts_of(model()), tmp_path / "pieces", method=METHODS[name])
    pieces = contents(tmp_path / "pieces")
    differ = {file for file in expected if expected[file] != pieces.get(file)}
    if path == "all at once" and name in WIDTHS_BY_ROW:
        assert differ
        return
    assert pieces.keys() == expected.keys()
    if name not in {"signed", "signed rows"} and "tile" in PATHS[path]:
        # But for the estimates of other methods, which are taken from some of the tiles.
        assert differ <= {"tallstore.json", *(f"tasks/{task}/task.json" for task in "abc")}
    else:
        assert not differ


@pytest.mark.parametrize("name", WIDTHS_BY_ROW)
def test_pieces_of_rows_have_the_width_of_a_normal_distribution(tmp_path, monkeypatch, name):
    """Which is nearly the best for these."""
    base, experts = model(), experts_of(model())
    whole = pack(base, experts, tmp_path / "whole", method=METHODS[name])
    forced(monkeypatch, **PATHS["all at once"])
    pieces = pack(base, experts, tmp_path / "pieces", method=METHODS[name])
    for found, expected in zip(pieces.report.tasks, whole.report.tasks, strict=True):
        assert found.cosine == pytest.approx(expected.cosine, abs=0.02)
        assert found.gain == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        *(("signed", path) for path in PATHS),
        *(("uniform", path) for path in ("one row a tile", "read again")),
        *((name, "all at once") for name in ("signed rows", "tall mean", "two levels", "sign centred", "localize")),
    ],
)
def test_resized_tensors_are_the_same_too(tmp_path, monkeypatch, name, path):
    base = model()
    experts = resized_experts(base)
    whole = pack(base, experts, tmp_path / "whole", method=METHODS[name])
    forced(monkeypatch, **PATHS[path])
    pieces = pack(base, experts, tmp_path / "pieces", method=METHODS[name])
    for task in experts:
        assert_same(pieces.states[task], whole.states[task])
        assert pieces.kinds(task) == whole.kinds(task)
    found, expected = contents(tmp_path / "pieces"), contents(tmp_path / "whole")
    assert [file for file in expected if file.endswith(".safetensors") and found[file] != expected[file]] == []


@pytest.mark.parametrize("merged_dtype", ["float32", "bfloat16", "float16", "int8", "log4"])
def test_every_shared_dtype_in_pieces_of_rows_and_on_disk(tmp_path, monkeypatch, merged_dtype):
    base = model()
    experts = experts_of(base)
    pack(base, experts, tmp_path / "whole", merged_dtype=merged_dtype)
    forced(monkeypatch, **PATHS["all at once"])
    pack(base, experts, tmp_path / "pieces", merged_dtype=merged_dtype)
    assert contents(tmp_path / "pieces") == contents(tmp_path / "whole")
    assert not [path for path in (tmp_path / "pieces").rglob("*") if "tmp" in path.name]


def test_overflow_in_a_late_piece_leaves_no_trace_of_the_earlier_ones(tmp_path, monkeypatch):
    forced(monkeypatch, tile=300, smallest_tile=300)
    base = {"w": normal(80, 60).half(), "x": normal(80, 60, seed=1).half()}
    base["w"][-1] = 63400.0
    base["w"][-1, 30:] = 59000.0
    experts = {}
    for seed, (task, first, second) in enumerate([("down", -5500, -2000), ("up", 2000, 5500)], start=1):
        expert = experts[task] = tuned(base, seed)
        expert["w"][-1] = base["w"][-1] + first
        expert["w"][-1, 30:] = base["w"][-1, 30:] + second
    packed = pack(base, experts, tmp_path / "bundle", method=SignedMask(0))
    assert packed.whole("down") == {}
    assert packed.whole("up") == {"w": "its reconstruction overflows F16"}
    assert_same(packed.states["up"], experts["up"], "w")


def test_a_tensor_of_several_chunks_and_a_row_across_them(tmp_path):
    """Chunks of 2^20 elements, and rows that do not end where they do."""
    base = {"w": normal(3, 400_001)}
    experts = {task: tuned(base, seed) for seed, task in enumerate("ab", start=1)}
    packed = pack(base, experts, tmp_path / "bundle")
    for task, expert in experts.items():
        tau, step = expert["w"] - base["w"], packed.states[task]["w"] - base["w"]
        for row in range(3):
            assert torch.dot(step[row].double(), tau[row].double()) / (tau[row].double() ** 2).sum() == pytest.approx(
                1, abs=0.01
            )


@pytest.mark.parametrize(("limit", "value"), [("MAX_SHARD_NBYTES", 3000), ("MAX_SHARD_PAYLOADS", 1)])
def test_bundles_of_many_shards(tmp_path, monkeypatch, limit, value):
    base = base_model()
    experts = experts_of(base)
    one = pack(base, experts, tmp_path / "one", private="norm.*")
    monkeypatch.setattr(shard_writer, limit, value)
    many = pack(base, experts, tmp_path / "many", private="norm.*", embed_base=True)
    assert len(many.group.shards) > 1
    assert len(many.tables["a"].shards) > len(one.tables["a"].shards)
    for task in experts:
        assert_same(many.states[task], one.states[task])


# --- how far it has come ----------------------------------------------------------------------------------------------


def told_by_tensor(monkeypatch, *arguments, **options):
    """What a pack tells: all of it, and how far it was when each tensor was done."""
    told, ends = [], {}
    pack_tensor = GroupPacker.pack

    def spied(group, name, *arguments):
        pack_tensor(group, name, *arguments)
        ends[name] = told[-1][0]

    monkeypatch.setattr(GroupPacker, "pack", spied)
    pack(*arguments, progress=lambda *how: told.append(how), **options)
    return told, ends


@pytest.mark.parametrize("name", ["signed", "tall", "two levels", "localize"])
def test_a_large_tensor_moves_the_bar_tile_by_tile(tmp_path, monkeypatch, name):
    forced(monkeypatch, tile=320, smallest_tile=320)
    base = {name: normal(80, 64, seed=seed) for seed, name in enumerate(("first", "second"))}
    experts = experts_of(base)
    told, ends = told_by_tensor(monkeypatch, base, experts, tmp_path / "bundle", method=METHODS[name])
    share = len(experts) * base["first"].nbytes
    done, total = [how[0] for how in told], told[-1][1]
    start = total - 2 * share  # some methods read whole task vectors before
    assert {how[1] for how in told} == {total}
    assert done == sorted(done)
    assert done[-1] == total
    # The two passes over a tensor's sixteen tiles tell of each, and do not run into the share of the next tensor.
    assert len({value for value in done if start < value <= start + share}) > 2 * 16
    assert share * 0.98 <= ends["first"] - start <= share
    assert share * 0.98 <= ends["second"] - start - share <= share
    assert start + share in done


def test_no_tensor_tells_more_than_its_share(tmp_path, monkeypatch):
    """Resized, equal to the base, of integers, or the expert's alone: what is not coded is told as a whole."""
    forced(monkeypatch, tile=300, smallest_tile=300)
    base = model()
    experts = resized_experts(base) | {"d": {**base, "own": normal(7, 9)}}
    for expert in (base, *experts.values()):
        expert["steps"] = torch.arange(5000)
    told, ends = told_by_tensor(monkeypatch, base, experts, tmp_path / "bundle")
    before = 0
    for name, end in ends.items():
        share = sum(expert[name].nbytes for expert in experts.values())
        assert before <= end <= before + share
        before += share
    assert ends.keys() == base.keys()
    assert told[-1] == (before + 7 * 9 * 4, before + 7 * 9 * 4)


# --- spans and tiles --------------------------------------------------------------------------------------------------


def stack_of(base, *experts):
    opened = open_checkpoint({"w": base})
    named = name_experts(opened, {str(n): open_checkpoint({"w": expert}) for n, expert in enumerate(experts)}, {})
    parts = parts_by_base_name(opened, named, ())["w"]
    rooms = Kept().rooms([part.numel for part in parts])
    return Stack(opened, "w", [examine(opened, "w", part, room) for part, room in zip(parts, rooms, strict=True)])


def spans(stack):
    return [(span.start, span.stop, span.row, span.rows) for span in stack.spans]


def test_a_small_tensor_is_one_span():
    base = normal(80, 64)
    assert spans(stack_of(base, tuned({"w": base}, 1)["w"])) == [(0, 5120, 0, 80)]


@pytest.mark.parametrize("shape", [(80, 63), (1000, 5), (1000, 1, 3, 3), (5040,)])
def test_short_rows_are_one_row(shape):
    """A scale and a step for each would cost a bit a parameter."""
    base = normal(*shape)
    stack = stack_of(base, tuned({"w": base}, 1)["w"])
    assert spans(stack) == [(0, base.numel(), 0, 1)]
    assert (stack.rows, stack.row_axes, stack.row_length) == (1, 1 if len(shape) == 1 else 0, base.numel())


def test_spans_are_whole_rows(monkeypatch):
    forced(monkeypatch, tile=420, smallest_tile=150)
    base = normal(80, 70)
    experts = [tuned({"w": base}, seed)["w"] for seed in (1, 2)]
    assert spans(stack_of(base, *experts)) == [
        (start, start + 210, start // 70, 3) for start in range(0, 5460, 210)
    ] + [(5460, 5600, 78, 2)]


def test_spans_end_where_an_expert_ends():
    base = normal(150, 64)
    experts = [tuned({"w": base}, seed)["w"][:rows] for seed, rows in ((1, 120), (2, 150), (3, 140))]
    stack = stack_of(base, *experts)
    assert spans(stack) == [(0, 7680, 0, 120), (7680, 8960, 120, 20), (8960, 9600, 140, 10)]
    tiles = [stack.tile(span) for span in stack.spans]
    assert [tile.tasks for tile in tiles] == [("0", "1", "2"), ("1", "2"), ("1",)]
    assert [tile.shared_by for tile in tiles] == [3, 2, 1]
    assert stack.tile(stack.spans[1], only=2).tasks == ("2",)
    assert stack.tile(stack.spans[1], only=2).shared_by == 2


def test_long_rows_are_cut_and_no_piece_crosses_a_row(monkeypatch):
    forced(monkeypatch, longest_row=1000, tile=900, smallest_tile=900)
    base = normal(3, 2000)
    stack = stack_of(base, tuned({"w": base}, 1)["w"])
    assert not stack.rows_are_whole
    expected = [
        Span(row * 2000 + start, row * 2000 + min(start + 900, 2000), row, 1)
        for row in range(3)
        for start in range(0, 2000, 900)
    ]
    assert list(stack.spans) == expected


def test_a_tensor_of_one_dimension_is_one_row_in_pieces_where_experts_differ_in_length():
    base = normal(6000)
    experts = [tuned({"w": base}, seed)["w"][:length] for seed, length in ((1, 5000), (2, 6000))]
    assert spans(stack_of(base, *experts)) == [(0, 5000, 0, 1), (5000, 6000, 0, 1)]


@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_tiles_are_the_task_vectors(monkeypatch, kept):
    forced(monkeypatch, tile=700, smallest_tile=700, kept=kept)
    base = normal(80, 60)
    experts = [tuned({"w": base}, seed)["w"] for seed in (1, 2, 3)]
    stack = stack_of(base, *experts)
    tiles = [stack.tile(span) for span in stack.spans]
    for position, expert in enumerate(experts):
        found = torch.cat([tile.task_vectors[position] for tile in tiles])
        assert torch.equal(found, (expert - base).view(-1))
        assert stack.statistics[position].sum_squares == pytest.approx(((expert - base).double() ** 2).sum().item())


def test_one_tasks_tile_reads_no_other_task(monkeypatch):
    """A pass over one task costs one task, not all of them."""
    forced(monkeypatch, kept=0)
    base = normal(80, 60)
    stack = stack_of(base, *[tuned({"w": base}, seed)["w"] for seed in (1, 2, 3)])
    for part in stack.parts[1:]:
        part.expert.checkpoint.close()
    assert stack.tile(stack.spans[0], only=0).tasks == ("0",)
    with pytest.raises(ValueError, match="closed"):
        stack.tile(stack.spans[0])
