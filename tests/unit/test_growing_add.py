"""`add`: what is there stays, byte for byte; what comes is what a pack of its own would have made."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

import tallstore
from tallstore.fit import SignedMask, Uniform
from tallstore.format.bundle_files import BundleFiles
from tests.growing_cases import BASE, assert_same, expert, experts, packed, state, weights
from tests.packing_cases import METHODS, SINGLE


def test_old_files_are_not_touched_and_new_tasks_are_those_of_a_pack(tmp_path):
    bundle = packed(tmp_path / "bundle")
    before, old = state(bundle), weights(bundle)
    report = tallstore.add(bundle, experts("defg"), base=BASE)
    assert tallstore.verify(bundle) == []
    after = state(bundle)
    assert {path: after[path] for path in before} == before
    alone = weights(packed(tmp_path / "alone", "defg"))
    found = weights(bundle)
    assert list(found) == list("abcdefg")
    for task, tensors in {**old, **alone}.items():
        assert_same(found[task], tensors)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    new = sum(len(raw) for path, (raw, _) in after.items() if path not in before)
    manifest = (bundle / "tallstore.json").stat().st_size
    assert report.written_nbytes == new
    assert report.bundle_nbytes == manifest + sum(len(raw) for raw, _ in after.values())
    assert (report.action, report.dry_run, report.path) == ("add", False, bundle)
    assert str(report).startswith("added 4 tasks with SignedMask(")
    assert "; the bundle has " in str(report)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_adds_what_it_packs(tmp_path, method):
    names = "d" if method in SINGLE else "de"
    bundle = packed(tmp_path / "bundle", "ab")
    tallstore.add(bundle, experts(names), base=BASE, method=METHODS[method])
    packed(tmp_path / "alone", names, method=METHODS[method])
    assert tallstore.verify(bundle) == []
    for task, tensors in weights(tmp_path / "alone").items():
        assert_same(weights(bundle)[task], tensors)


def test_a_method_that_chooses_among_others_adds_too(tmp_path):
    bundle = packed(tmp_path / "bundle", "ab")
    report = tallstore.add(bundle, experts("de"), base=BASE, method=tallstore.Auto(max_bits=6.0))
    assert report.method == "Auto(max_bits=6.0)"
    assert tallstore.verify(bundle) == []
    assert len(weights(bundle)) == 4


def test_groups_are_numbered_on_and_slugs_carry_the_number(tmp_path):
    bundle = packed(tmp_path / "bundle", "a", method=Uniform(3))
    tallstore.add(bundle, {"b": expert(1), "B": expert(2)}, base=BASE)
    tallstore.add(bundle, {"run g0002": expert(3)}, base=BASE)
    manifest = BundleFiles(bundle).manifest
    assert [group.id for group in manifest.groups] == ["g0001", "g0002", "g0003"]
    assert manifest.next_group == 4
    slugs = [task.slug for task in manifest.tasks]
    assert slugs[:2] == ["a", "b-g0002"]
    assert slugs[2].startswith("b-")
    assert slugs[2].endswith("-g0002")
    assert slugs[3] == "run-g0002-g0003"


@pytest.mark.parametrize(
    ("names", "name"), [("d", "uniform"), ("de", "uniform"), ("def", "signed-mask"), ("defg", "signed-mask")]
)
def test_few_experts_share_nothing_by_default(tmp_path, names, name):
    bundle = packed(tmp_path / "bundle", "ab")
    tallstore.add(bundle, experts(names), base=BASE)
    files = BundleFiles(bundle)
    assert files.manifest.groups[1].method.name == name
    assert (files.group("g0002").shards == ()) == (name == "uniform")


# --- the base ---------------------------------------------------------------------------------------------------------


def test_an_embedded_base_need_not_be_given(tmp_path):
    bundle = packed(tmp_path / "bundle", "ab", embed_base=True)
    before = state(bundle)
    tallstore.add(bundle, experts("de"))
    assert {path: state(bundle)[path] for path in before} == before
    with_base = packed(tmp_path / "with base", "ab")
    tallstore.add(with_base, experts("de"), base=BASE)
    with tallstore.open_bundle(bundle) as opened:
        for task, tensors in weights(with_base).items():
            assert_same(opened.state_dict(task), tensors)


def test_further_tensors_of_the_base_count_as_not_there(tmp_path):
    bundle = packed(tmp_path / "bundle", "ab")
    more = torch.ones(80, 80)
    given = {"d": expert(1) | {"more": more + 1}}
    tallstore.add(bundle, given, base={**BASE, "more": more})
    tallstore.add(bundle, {"e": given["d"]}, base=BASE)
    assert tallstore.verify(bundle) == []
    found = weights(bundle)
    assert_same(found["d"], found["e"])
    assert torch.equal(found["d"]["more"], more + 1)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"norm.weight": BASE["norm.weight"] + 1}, "BASE-2"),
        ({"norm.weight": BASE["norm.weight"].half()}, "BASE-1"),
        ({"norm.weight": BASE["norm.weight"][:5]}, "BASE-1"),
        ({"norm.weight": None}, "BASE-1"),
    ],
)
def test_another_base_is_refused_by_its_first_tensor(tmp_path, change, rule):
    bundle = packed(tmp_path / "bundle", "ab")
    before = state(bundle)
    other = {name: tensor for name, tensor in {**BASE, **change}.items() if tensor is not None}
    with pytest.raises(tallstore.BaseMismatchError, match=r"norm\.weight") as caught:
        tallstore.add(bundle, experts("d"), base=other)
    assert caught.value.rule == rule
    assert state(bundle) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_without_a_base_the_message_says_where_to_give_it(tmp_path):
    bundle = packed(tmp_path / "bundle", "ab")
    with pytest.raises(tallstore.BaseMissingError, match=r"give it: add\(bundle, …, base=…\)"):
        tallstore.add(bundle, experts("d"))


@pytest.mark.parametrize("kept", ["embed", "head"])
@pytest.mark.parametrize("untied", [False, True])
def test_ties_are_those_of_the_bundle_whatever_copy_of_the_base_is_read(tmp_path, kept, untied):
    """Files of a model with tied weights have one of their names, and not always the same."""
    embed = torch.randn(90, 60, generator=torch.Generator().manual_seed(1))
    tied = {"embed": embed, "head": embed, "norm": torch.ones(3)}
    given = {
        name: {**tied, "embed": moved, "head": moved + 1 if untied else moved}
        for name, moved in (("a", embed + 0.01), ("b", embed - 0.01))
    }
    tallstore.pack(tied, {"a": given["a"]}, tmp_path / "bundle", method=Uniform(3))
    save_file({kept: embed.clone(), "norm": torch.ones(3)}, tmp_path / "base.safetensors")
    tallstore.add(tmp_path / "bundle", {"b": given["b"]}, base=tmp_path / "base.safetensors", method=Uniform(3))
    tallstore.pack(tied, {"b": given["b"]}, tmp_path / "alone", method=Uniform(3))
    assert tallstore.verify(tmp_path / "bundle") == []
    with (
        tallstore.open_bundle(tmp_path / "bundle", base=tied) as grown,
        tallstore.open_bundle(tmp_path / "alone", base=tied) as alone,
    ):
        assert_same(grown.state_dict("b"), alone.state_dict("b"))


def test_resized_dropped_and_unknown_tensors_come_back(tmp_path):
    bundle = packed(tmp_path / "bundle", "ab")
    grown = torch.cat([BASE["block.weight"] * 1.01, torch.ones(3, 65)])
    tallstore.add(bundle, {"d": {"block.weight": grown, "head": torch.ones(4, 2)}}, base=BASE)
    assert tallstore.verify(bundle) == []
    found = weights(bundle, "d")["d"]
    assert found.keys() == {"block.weight", "head"}
    assert torch.equal(found["block.weight"][70:], torch.ones(3, 65))
    assert torch.equal(found["head"], torch.ones(4, 2))


# --- replace, dry_run, what else pack takes ---------------------------------------------------------------------------


def test_a_name_that_is_there_is_refused_unless_it_is_replaced(tmp_path):
    bundle = packed(tmp_path / "bundle")
    before, old = state(bundle), weights(bundle)
    with pytest.raises(tallstore.OutputExistsError, match=r"'b' already; give another name, or replace=True"):
        tallstore.add(bundle, {"d": expert(1), "b": expert(2)}, base=BASE)
    assert state(bundle) == before
    tallstore.add(bundle, {"d": expert(1), "b": expert(2)}, base=BASE, replace=True)
    assert tallstore.verify(bundle) == []
    found = weights(bundle)
    assert list(found) == ["a", "b", "c", "d"]
    assert_same(found["a"], old["a"])
    assert not torch.equal(found["b"]["norm.weight"], old["b"]["norm.weight"])
    assert not (bundle / "tasks" / "b").exists()
    assert (bundle / "tasks" / "b-g0002").exists()


def test_a_bundle_may_be_replaced_task_by_task(tmp_path):
    bundle = packed(tmp_path / "bundle", "ab")
    tallstore.add(bundle, experts("ab"), base=BASE, replace=True)
    assert tallstore.verify(bundle) == []
    assert [path.name for path in (bundle / "groups").iterdir()] == ["g0002"]
    assert list(weights(bundle)) == ["a", "b"]


def test_a_dry_run_changes_nothing(tmp_path):
    bundle = packed(tmp_path / "bundle")
    before, manifest = state(bundle), (bundle / "tallstore.json").read_bytes()
    report = tallstore.add(bundle, experts("de"), base=BASE, dry_run=True)
    assert (state(bundle), (bundle / "tallstore.json").read_bytes()) == (before, manifest)
    assert str(report).startswith("would add 2 tasks")
    real = tallstore.add(bundle, experts("de"), base=BASE)
    assert (real.tasks, real.written_nbytes) == (report.tasks, report.written_nbytes)


def test_scores_are_those_of_the_new_tasks(tmp_path):
    bundle = packed(tmp_path / "bundle", "ab")
    asked = []

    def evaluate(task, tensors):
        asked.append((task, sorted(tensors)))
        return len(asked)

    report = tallstore.add(bundle, experts("de"), base=BASE, evaluate=evaluate)
    assert asked == [("d", sorted(BASE)), ("e", sorted(BASE))]
    assert [task.score for task in report.tasks] == [1.0, 2.0]
    assert BundleFiles(bundle).task("e").table.fidelity.score == 2.0
    assert tallstore.verify(bundle) == []


def test_mask_lambda_is_chosen_for_new_tasks(tmp_path):
    bundle = packed(tmp_path / "bundle", "ab")
    method = tallstore.TallMask(mask_lambda=(0.4, 1.0))

    def nonzero(_task, tensors):
        return float((tensors["block.weight"] != BASE["block.weight"]).float().mean())

    report = tallstore.add(bundle, experts("de"), base=BASE, method=method, evaluate=nonzero)
    assert [task.mask_lambda for task in report.tasks] == [0.4, 0.4]
    assert all(task.score > 0 for task in report.tasks)
    assert tallstore.verify(bundle) == []


def test_gains_can_be_calibrated(tmp_path):
    bundle = packed(tmp_path / "bundle", "ab")
    target = expert(ord("d"))["block.weight"]

    def loss(task, tensors):
        return ((tensors["block.weight"] - target) ** 2).sum()

    tallstore.add(bundle, experts("d"), base=BASE, calibrate=tallstore.Calibration(loss, steps=20), method=Uniform(3))
    plain = packed(tmp_path / "plain", "d", method=Uniform(3))
    assert tallstore.verify(bundle) == []
    far = ((weights(plain)["d"]["block.weight"] - target) ** 2).sum()
    assert ((weights(bundle)["d"]["block.weight"] - target) ** 2).sum() < far


def test_an_executor_writes_the_same_bytes(tmp_path):
    here, there = packed(tmp_path / "here", "ab"), packed(tmp_path / "there", "ab")
    tallstore.add(here, experts("def"), base=BASE)
    with ThreadPoolExecutor(2) as executor:
        tallstore.add(there, experts("def"), base=BASE, executor=executor)
    assert {path: raw for path, (raw, _) in state(here).items()} == {
        path: raw for path, (raw, _) in state(there).items()
    }


def test_progress_ends_at_the_whole(tmp_path):
    bundle = packed(tmp_path / "bundle", "ab")
    told = []
    tallstore.add(bundle, experts("de"), base=BASE, progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] > 0


# --- companions, partial bundles --------------------------------------------------------------------------------------


def directory(root, name, **companions):
    """A checkpoint in a Hugging Face directory."""
    (root / name).mkdir()
    save_file(expert(len(name)), root / name / "model.safetensors")
    for file, text in companions.items():
        (root / name / f"{file}.json").write_text(json.dumps(text))
    return root / name


def test_a_companion_file_that_is_there_is_shared(tmp_path):
    one = directory(tmp_path, "one", config={"x": 1}, vocab={"a": 1})
    another = directory(tmp_path, "another", config={"x": 1}, vocab={"b": 2})
    tallstore.pack(BASE, {"one": one}, tmp_path / "bundle", method=Uniform(3))
    before = state(tmp_path / "bundle")
    tallstore.add(tmp_path / "bundle", {"another": another}, base=BASE)
    after = state(tmp_path / "bundle")
    assert tallstore.verify(tmp_path / "bundle") == []
    assert {path: after[path] for path in before} == before
    assert sum(path.startswith("files/") for path in after) == 3


def test_a_partial_bundle_grows_and_fetches_nothing(tmp_path):
    one = directory(tmp_path, "one", config={"x": 1})
    another = directory(tmp_path, "another", config={"x": 1})
    tallstore.pack(BASE, {"one": one, "two": expert(2)}, tmp_path / "bundle")
    files = BundleFiles(tmp_path / "bundle")
    stored = [path for path in files.files if path.startswith(("tasks/one/", "files/"))]
    for path in stored:
        (tmp_path / "bundle" / path).unlink()
    (tmp_path / "bundle" / "tasks" / "one").rmdir()
    (tmp_path / "bundle" / "files").rmdir()
    tallstore.add(tmp_path / "bundle", {"another": another}, base=BASE)
    assert tallstore.verify(tmp_path / "bundle") == []
    with tallstore.open_bundle(tmp_path / "bundle", base=BASE) as bundle:
        assert [bundle.is_fetched(task) for task in bundle.tasks] == [False, True, True]
        bundle.state_dict("another")
    assert len(list((tmp_path / "bundle" / "files").iterdir())) == 1
    tallstore.add(tmp_path / "bundle", {"one": one}, base=BASE, replace=True)
    assert tallstore.verify(tmp_path / "bundle") == []


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_is_wrong_with_the_experts_leaves_the_bundle_as_it_was(tmp_path):
    bundle = packed(tmp_path / "bundle")
    before = state(bundle)
    for wrong, error in (
        ({}, tallstore.TooFewExpertsError),
        ({"d": tmp_path / "nothing"}, tallstore.CheckpointNotFoundError),
        ({"d": {"block.weight": torch.full((70, 65), torch.nan)}}, tallstore.NonFiniteError),
        ({"d": {"other": torch.ones(3)}}, tallstore.NameMismatchError),
        ({"a\nb": expert(1)}, tallstore.OptionError),
    ):
        with pytest.raises(error) as caught:
            tallstore.add(bundle, wrong, base=BASE)
        assert "\n" not in str(caught.value)
    with pytest.raises(tallstore.TooFewExpertsError):
        tallstore.add(bundle, experts("d"), base=BASE, method=tallstore.TallMask())
    with pytest.raises(tallstore.OptionError, match="calibrate"):
        tallstore.add(bundle, experts("d"), base=BASE, calibrate=3)
    with pytest.raises(tallstore.OptionError, match="merged_dtype"):
        tallstore.add(bundle, experts("d"), base=BASE, method=SignedMask(), merged_dtype="int7")
    assert state(bundle) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
