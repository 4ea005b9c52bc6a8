"""`repack`: tasks of several groups become one, from originals, or from what the bundle rebuilds."""

from __future__ import annotations

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

import tallstore
from tallstore.fit import SignedMask, Uniform
from tallstore.format.bundle_files import BundleFiles
from tests.growing_cases import BASE, assert_same, expert, experts, packed, state, weights


@pytest.fixture
def bundle(tmp_path):
    """Two groups: a and b; c and d."""
    packed(tmp_path / "bundle", "ab")
    tallstore.add(tmp_path / "bundle", experts("cd"), base=BASE)
    return tmp_path / "bundle"


def test_from_originals_it_is_a_pack_of_them_all(bundle, tmp_path):
    report = tallstore.repack(bundle, experts("abcd"), base=BASE)
    assert tallstore.verify(bundle) == []
    assert [path.name for path in (bundle / "groups").iterdir()] == ["g0003"]
    alone = weights(packed(tmp_path / "alone", "abcd"))
    found = weights(bundle)
    assert list(found) == list("abcd")
    for task, tensors in alone.items():
        assert_same(found[task], tensors)
    assert report.action == "repack"
    assert not any("rebuilt" in line for line in report.advice)


def test_some_tasks_leave_their_groups_and_the_rest_stays_as_it_is(bundle):
    before, old = state(bundle), weights(bundle)
    tallstore.repack(bundle, experts("bc"), tasks=["c", "b"], base=BASE)
    assert tallstore.verify(bundle) == []
    manifest = BundleFiles(bundle).manifest
    assert [(task.name, task.group) for task in manifest.tasks] == [
        ("a", "g0001"),
        ("b", "g0003"),
        ("c", "g0003"),
        ("d", "g0002"),
    ]
    after = state(bundle)
    kept = [path for path in before if not path.startswith(("tasks/b/", "tasks/c-g0002/"))]
    assert {path: after[path] for path in kept} == {path: before[path] for path in kept}
    for task in "ad":
        assert_same(weights(bundle)[task], old[task])


def test_missing_originals_are_named(bundle):
    before = state(bundle)
    with pytest.raises(tallstore.OptionError, match=r"originals of 'b', 'd' are missing.*reconstructions=True"):
        tallstore.repack(bundle, experts("ac"), base=BASE)
    assert state(bundle) == before


def test_reconstructions_are_packed_where_the_user_insists(bundle, tmp_path):
    old = weights(bundle)
    report = tallstore.repack(bundle, experts("a"), base=BASE, reconstructions=True)
    assert tallstore.verify(bundle) == []
    assert report.advice[0].startswith("packed from what the bundle rebuilt, not from originals: 'b', 'c', 'd'; errors")
    tallstore.pack(BASE, {**old, "a": expert(ord("a"))}, tmp_path / "alone")
    for task, tensors in weights(tmp_path / "alone").items():
        assert_same(weights(bundle)[task], tensors)


def test_reconstructions_go_to_other_processes_too(bundle, tmp_path):
    copy = packed(tmp_path / "copy", "ab")
    tallstore.add(copy, experts("cd"), base=BASE)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        tallstore.repack(bundle, base=BASE, reconstructions=True, executor=executor)
    tallstore.repack(copy, base=BASE, reconstructions=True)
    assert {path: raw for path, (raw, _) in state(bundle).items()} == {
        path: raw for path, (raw, _) in state(copy).items()
    }


def test_reconstructions_bring_ties_names_and_companion_files(tmp_path):
    embed = torch.randn(90, 60, generator=torch.Generator().manual_seed(1))
    base = {"model.embed": embed, "model.head": embed, "model.norm": torch.ones(3)}
    moved = embed + 0.01 * torch.randn(90, 60, generator=torch.Generator().manual_seed(2))
    (tmp_path / "one").mkdir()
    save_file({"embed": moved, "norm": torch.zeros(3), "extra": torch.ones(2)}, tmp_path / "one" / "model.safetensors")
    (tmp_path / "one" / "config.json").write_text(json.dumps({"x": 1}))
    two = {"head": moved, "embed": moved, "norm": torch.ones(3), "flags": torch.tensor([True, False])}
    bundle = tmp_path / "bundle"
    tallstore.pack(base, {"one": tmp_path / "one", "two": two}, bundle, key_mapping={"^": "model."})

    def opened():
        with tallstore.open_bundle(bundle, base=base) as there:
            return {task: there.state_dict(task) for task in there.tasks}

    before = opened()
    tallstore.repack(bundle, base=base, reconstructions=True, method=Uniform(16))
    assert tallstore.verify(bundle) == []
    after = opened()
    for task, tensors in before.items():
        assert list(after[task]) == list(tensors)
        for name in set(tensors) - {"embed", "head"}:
            assert torch.equal(after[task][name], tensors[name])
        assert (after[task]["embed"] - tensors["embed"]).abs().max() < 0.01
    assert after["two"]["head"].data_ptr() == after["two"]["embed"].data_ptr()
    files = BundleFiles(bundle)
    assert [file.name for file in files.task("one").table.files] == ["config.json"]
    assert [tensor.kind for tensor in kinds(files, "one") if tensor.name == "embed"] == ["uniform"]


def kinds(files, task):
    """The tensors of a task with their kinds."""

    class Kind:
        def __init__(self, tensor):
            self.name, self.kind = tensor.name, tensor.__struct_config__.tag

    return [Kind(tensor) for tensor in files.task(task).table.tensors]


def test_a_large_tensor_is_rebuilt_chunk_by_chunk(tmp_path):
    base = {"w": torch.zeros(1100, 1000)}  # more than one chunk of 2^20 elements
    generator = torch.Generator().manual_seed(3)
    given = {name: {"w": torch.randn(1100, 1000, generator=generator)} for name in "ab"}
    bundle = tmp_path / "bundle"
    tallstore.pack(base, given, bundle)
    with tallstore.open_bundle(bundle, base=base) as opened:
        old = {task: opened.state_dict(task) for task in "ab"}
    tallstore.repack(bundle, base=base, reconstructions=True, method=SignedMask())
    tallstore.pack(base, old, tmp_path / "alone", method=SignedMask())
    with (
        tallstore.open_bundle(bundle, base=base) as again,
        tallstore.open_bundle(tmp_path / "alone", base=base) as alone,
    ):
        for task in "ab":
            assert_same(again.state_dict(task), alone.state_dict(task))


def test_a_task_that_is_not_here_cannot_be_rebuilt(bundle):
    for path in (bundle / "tasks" / "b").iterdir():
        path.unlink()
    before = state(bundle)
    with pytest.raises(tallstore.NotFetchedError, match="task 'b' was not fetched"):
        tallstore.repack(bundle, base=BASE, reconstructions=True)
    assert state(bundle) == before
    tallstore.repack(bundle, experts("b"), base=BASE, reconstructions=True)
    assert tallstore.verify(bundle) == []
    assert list(weights(bundle)) == list("abcd")


def test_a_dry_run_changes_nothing(bundle):
    before, manifest = state(bundle), (bundle / "tallstore.json").read_bytes()
    report = tallstore.repack(bundle, experts("abcd"), base=BASE, dry_run=True)
    assert str(report).startswith("would repack 4 tasks")
    assert (state(bundle), (bundle / "tallstore.json").read_bytes()) == (before, manifest)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"experts": experts("x"), "reconstructions": True}, tallstore.UnknownTaskError, "no task named 'x'"),
        ({"tasks": ["x"]}, tallstore.UnknownTaskError, "no task named 'x'"),
        ({"tasks": "ab"}, tallstore.OptionError, "give a list of names"),
        ({"tasks": []}, tallstore.OptionError, "tasks is empty"),
        ({"experts": experts("abcd"), "tasks": ["a", "b"]}, tallstore.OptionError, "experts has 'c'"),
        (
            {"experts": experts("a"), "tasks": ["a"], "method": tallstore.TallMask()},
            tallstore.TooFewExpertsError,
            "at least 2",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(bundle, arguments, error, message):
    before = state(bundle)
    with pytest.raises(error, match=message):
        tallstore.repack(bundle, base=BASE, **arguments)
    assert state(bundle) == before
