"""What is said where many tasks share a vector: of task vectors that have nothing to do with each other, and others."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

import tallstore
from tallstore import Emr, LeastSquares, Sign, SignedMask, TallMask
from tallstore.checkpoints import open_checkpoint
from tallstore.checkpoints.checkpoint import Checkpoint
from tallstore.packing import advice
from tests.packing_cases import normal

SHAPES = {"w": (120, 90), "v": (60, 100)}


def base_model():
    return {name: normal(*shape, seed=seed) for seed, (name, shape) in enumerate(SHAPES.items())}


def orthogonal(count, power=1):
    """Experts whose task vectors are independent; a larger *power* gives them heavier tails."""
    base = base_model()
    return base, {
        f"t{task:02d}": {
            name: tensor + 0.02 * normal(*tensor.shape, seed=100 * task + place) ** power
            for place, (name, tensor) in enumerate(base.items(), start=1)
        }
        for task in range(1, count + 1)
    }


def families(count, size, own=0.002):
    """Experts of families of *size*: the same step in each but for *own* ones, independent from one to the other."""
    base = base_model()
    _, steps = orthogonal(count // size)
    experts = {}
    for family, moved in steps.items():
        for member in range(size):
            experts[f"{family}-{member}"] = {
                name: tensor + own * normal(*tensor.shape, seed=1000 + 10 * len(experts) + place)
                for place, (name, tensor) in enumerate(moved.items())
            }
    return base, experts


@dataclass
class Said:
    """The numbers of a line."""

    tasks: int
    here: tuple[float, float]
    signs: tuple[float, float]
    instead: str


def said(line):
    number = r"(\d\.\d{3}) at (\d+\.\d\d)"
    found = re.fullmatch(
        rf"over (\d+) tasks, [a-z-]+ is less true than signs alone: cosine {number} bits a parameter,"
        rf" against {number}; take (.*)",
        line,
    )
    assert found is not None, line
    cosine, bits, signs, theirs = map(float, found.groups()[1:5])
    return Said(int(found[1]), (cosine, bits), (signs, theirs), found[6])


def cosine(report):
    return sum(task.cosine for task in report.tasks) / len(report.tasks)


@pytest.mark.parametrize(
    ("count", "method", "is_worn_out"),
    [
        (4, LeastSquares(), False),
        (4, LeastSquares(2), False),
        (16, LeastSquares(2), False),
        (64, LeastSquares(2), False),
        (4, SignedMask(), False),
        (16, SignedMask(), False),
        (64, SignedMask(), False),
        (64, Sign(), False),
        (16, TallMask(), True),
        (16, TallMask.published(), True),
        (16, Emr(), True),
        (16, LeastSquares(), True),
        (64, TallMask(), True),
        (64, TallMask.published(), True),
        (64, Emr(), True),
        (64, LeastSquares(), True),
    ],
    ids=str,
)
def test_it_is_said_where_signs_alone_are_truer(tmp_path, count, method, is_worn_out):
    base, experts = orthogonal(count)
    report = tallstore.pack(base, experts, tmp_path / "bundle", method=method)
    lines = [line for line in report.advice if line.startswith("over ")]
    assert len(lines) == is_worn_out
    signs = tallstore.pack(base, experts, tmp_path / "signs", method=Sign(scale="tensor"))
    share = min(1.0, report.tasks[0].bits / signs.tasks[0].bits)
    assert (cosine(report) < cosine(signs) * share**0.5) == (is_worn_out and not isinstance(method, SignedMask))
    for line in lines:
        found = said(line)
        assert found.tasks == count
        assert found.here[0] == pytest.approx(cosine(report), abs=1e-3)
        assert found.signs == pytest.approx((cosine(signs), 1.0), abs=1e-3)
        assert str(report).splitlines()[-1] == line


def test_what_needs_no_groups_is_named_where_nothing_is_truer_and_smaller(tmp_path):
    base, experts = orthogonal(64)
    (line,) = tallstore.pack(base, experts, tmp_path / "bundle", method=TallMask()).advice
    signed = tallstore.pack(base, experts, tmp_path / "signed")
    name, about = said(line).instead.split(", about ")
    assert name == "SignedMask()"
    assert float(about.split(" at ")[0]) == pytest.approx(cosine(signed), abs=0.01)


def test_groups_are_named_that_are_truer_when_they_are_packed(tmp_path):
    base, experts = families(16, 4)
    method = Emr(gain="one")
    (line,) = tallstore.pack(base, experts, tmp_path / "bundle", method=method).advice
    found = re.search(r"(\d+) groups of (\d+) tasks, about (\d\.\d{3}) at (\d\.\d\d): pack the first group, then", line)
    count, members, predicted, bits = int(found[1]), int(found[2]), float(found[3]), float(found[4])
    assert count * members == 16
    assert members >= 4
    assert line.endswith("then tallstore.add each of the others")
    names = list(experts)
    for start in range(0, 16, members):
        group = {name: experts[name] for name in names[start : start + members]}
        report = tallstore.pack(base, group, tmp_path / f"group {start}", method=method)
        assert cosine(report) == pytest.approx(predicted, abs=0.02)
        assert report.tasks[0].bits == pytest.approx(bits, rel=0.05)
        assert cosine(report) > said(line).signs[0]


def test_both_are_named_where_neither_is_truer_and_smaller(tmp_path):
    base, experts = orthogonal(16)
    (line,) = tallstore.pack(base, experts, tmp_path / "bundle", method=Emr()).advice
    assert re.fullmatch(r"SignedMask\(\), about .*, or 8 groups of 2 tasks, about .*", said(line).instead)


def test_signs_are_named_where_nothing_else_is_truer(tmp_path):
    """One direction for all: a sum over such steps loses them, and a threshold over such magnitudes too."""
    base, experts = families(4, 4, own=0.006)
    (line,) = tallstore.pack(base, experts, tmp_path / "bundle", method=TallMask()).advice
    assert said(line).instead == "Sign()"


@pytest.mark.parametrize("count", [4, 16, 64])
def test_where_few_weights_move_far_masks_are_fine(tmp_path, count):
    base, experts = orthogonal(count, power=3)
    for method in (TallMask(), LeastSquares()):
        report = tallstore.pack(base, experts, tmp_path / method.name, method=method)
        assert [line for line in report.advice if line.startswith("over ")] == []


def test_a_merge_of_somebody_elses_is_not_tried_in_groups(tmp_path):
    base, experts = orthogonal(16)
    merged = {name: base[name] + sum(weights[name] - base[name] for weights in experts.values()) for name in base}
    (line,) = tallstore.pack(base, experts, tmp_path / "bundle", method=TallMask(merge=merged)).advice
    assert "groups" not in said(line).instead


def test_no_room_for_scratch_leaves_the_bundle_as_it_is(tmp_path, monkeypatch):
    base, experts = orthogonal(16)

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(advice, "Trials", full)
    (line,) = tallstore.pack(base, experts, tmp_path / "bundle", method=Emr()).advice
    assert "groups" not in said(line).instead
    assert tallstore.verify(tmp_path / "bundle") == []


# --- what it costs ----------------------------------------------------------------------------------------------------


class Counted(Checkpoint):
    """Somebody's checkpoint that counts what is read of it."""

    def __init__(self, state):
        self._inner = open_checkpoint(state)
        self.nbytes = 0
        super().__init__(self._inner.origin, {name: self._inner.spec(name) for name in self._inner.names})

    def _flat_bytes(self, name, start, stop):
        raw = self._inner.read_bytes(name, start, stop)
        self.nbytes += raw.size
        return raw

    def _release(self):
        self._inner.close()


@pytest.mark.parametrize("shape", [(512, 4096), (4, 1 << 19)], ids=["rows", "few long rows"])
def test_groups_are_found_on_a_small_share_of_few_experts(tmp_path, monkeypatch, shape):
    """Tensors of few long rows are not sampled: of those, one has to do."""
    base = {f"w{number}": normal(*shape, seed=number) for number in range(2)} | {"small": normal(100, 90, seed=9)}

    def read(*, tries):
        experts = {
            f"t{task}": Counted(
                {name: tensor + 0.02 * normal(*tensor.shape, seed=50 + task) for name, tensor in base.items()}
            )
            for task in range(4)
        }
        if not tries:
            monkeypatch.setattr(advice, "in_groups", lambda *_args: None)
        report = tallstore.pack(base, experts, tmp_path / f"{tries}", method=Emr("one"))
        assert ("groups" in report.advice[0]) == tries
        return [expert.nbytes for expert in experts.values()]

    tried, packed = read(tries=True), read(tries=False)
    numel = sum(tensor.numel() for tensor in base.values())
    extra = [more - less for more, less in zip(tried, packed, strict=True)]
    assert extra[2:] == [0, 0]
    passes = 3
    assert 0 < max(extra) <= passes * 4 * max(1 << 17, numel // 32)


# --- compare ----------------------------------------------------------------------------------------------------------


def test_compare_says_it_of_the_methods_that_it_is_true_of():
    base, experts = orthogonal(16)
    methods = [SignedMask(), TallMask(), Emr(), LeastSquares(2)]
    found = tallstore.compare(base, experts, methods=methods)
    (line,) = found.advice
    assert re.match(
        r"over 16 tasks, these are less true than signs alone \(cosine 0\.79\d at 1\.\d\d bits a parameter\):"
        r" TallMask\(\), Emr\(\); truer would be Emr\(\) in 8 groups of 2 tasks, about ",
        line,
    )
    assert str(found).splitlines()[-1] == line
    assert found.to_dict()["advice"] == [line]
    assert line.split(":")[0] in found._repr_html_()
    with_signs = tallstore.compare(base, experts, methods=[*methods, Sign(scale="tensor")])
    assert with_signs.advice == found.advice


@pytest.mark.parametrize("methods", [[SignedMask(), Sign()], [LeastSquares(2)]])
def test_compare_has_nothing_to_say_where_all_is_well(methods):
    base, experts = orthogonal(4)
    assert tallstore.compare(base, experts, methods=methods).advice == ()


def test_where_nothing_moved_that_is_all_there_is_to_say(tmp_path):
    """A folder of experts may hold their base."""
    base, experts = orthogonal(2)
    same = {"a": dict(base), "t01": experts["t01"], "t02": experts["t02"]}
    for method in (SignedMask(), TallMask()):
        (line,) = tallstore.pack(base, same, tmp_path / method.name, method=method).advice[:1]
        assert line == "task 'a' equals the base in every tensor; leave it out if it is the base"
    assert tallstore.compare(base, {"a": base, "b": base}, methods=[TallMask()]).advice == ()
