"""Bytes of a bundle that changed after it was written: `verify` says where, and no load gives other weights."""

from __future__ import annotations

import pytest

import tallstore
from tallstore.errors import TallstoreError
from tests.faults.bundles import large_inputs, load, same, small_inputs
from tests.faults.specimens import Specimen, chance, flipped, specimen

MANIFEST = "tallstore.json"
OF_A_LOAD = ("tallstore.json", "base.json", "base/", "groups/", "tasks/")  # files that loading every task reads


@pytest.fixture(scope="module", params=["tall", "signed"])
def small(request, tmp_path_factory):
    """A bundle of a few kB; the second, sampled in the ordinary run, has its base in it."""
    root = tmp_path_factory.mktemp(request.param)
    inputs = small_inputs(root, moved=0.05)
    if request.param == "signed":
        return specimen(root, inputs, 300, embed_base=True)
    return specimen(root, inputs, 5000, method=tallstore.TallMask())


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A bundle of a few MB, whose tensors have more than one chunk."""
    root = tmp_path_factory.mktemp("large")
    return specimen(root, large_inputs(root, tensors=2, numel=(1 << 20) + 1024), 0, method=tallstore.TallMask())


def is_refused_or_the_same(bundle: Specimen) -> bool:
    """Whether loading every task is refused with a typed error; False where it gives what it gave before."""
    try:
        weights = load(bundle.path, bundle.base)
    except TallstoreError:
        return True
    assert same(weights, bundle.weights), "other weights, and no error"
    return False


def reported(bundle: Specimen) -> set[str]:
    """The files in which `verify` finds the wrong size or the wrong sha256."""
    problems = tallstore.verify(bundle.path)
    return {problem.where for problem in problems if problem.rule in {"FILE-1", "FILE-2"}}


def test_the_bundles_have_every_kind_of_file_and_of_tensor(small):
    kinds = {"mask" if small.base else "signed", "private", "extended", "same", "alias", "dropped"}
    tables = b"".join(small.content[f"tasks/{task}/task.json"] for task in ("cars", "birds"))
    assert {kind for kind in kinds if f'"kind":"{kind}"'.encode() in tables} == kinds
    assert all(codec in tables for codec in (b'"pooled"', b'"zstd"', b'"further":{'))
    assert {path.partition("/")[0] for path in small.content} >= {"base.json", "files", "groups", "tasks", MANIFEST}


def test_any_one_byte_of_the_manifest_is_noticed(small):
    generator = chance(0)
    for position in small.positions(MANIFEST):
        with small.changed({MANIFEST: flipped(small.content[MANIFEST], position, generator)}):
            with pytest.raises(TallstoreError):
                tallstore.open_bundle(small.path)
            assert position % 5 or tallstore.verify(small.path), f"byte {position}"


def test_any_one_byte_of_any_other_file_is_noticed(small):
    """One byte of every file at a time, and every file is named: none hides what happened to another."""
    generator = chance(1)
    others = {path: small.positions(path) for path in small.content if path != MANIFEST}
    for turn in range(max(map(len, others.values()))):
        positions = {path: positions[turn] for path, positions in others.items() if turn < len(positions)}
        with small.changed(
            {path: flipped(small.content[path], position, generator) for path, position in positions.items()}
        ):
            assert reported(small) == positions.keys(), positions
    assert tallstore.verify(small.path) == []


def test_no_changed_byte_changes_weights(small):
    """Some hundred bytes, of every file that a load reads."""
    generator = chance(2)
    refused = looked = 0
    for path, content in small.content.items():
        if path.startswith(OF_A_LOAD):
            for position in range(generator.randrange(37), len(content), 37):
                with small.changed({path: flipped(content, position, generator)}):
                    refused += is_refused_or_the_same(small)
                looked += 1
    assert refused > 0.8 * looked > 200  # paddings, and what only `verify` reads, are of no consequence to a load
    assert same(load(small.path, small.base), small.weights)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_each_byte_on_its_own_is_noticed_and_changes_no_weights(small, part):
    generator = chance(3 + part)
    for path, content in small.content.items():
        for position in range(part, len(content), 8):
            with small.changed({path: flipped(content, position, generator)}):
                assert tallstore.verify(small.path), f"{path}, byte {position}"
                if path.startswith(OF_A_LOAD):
                    is_refused_or_the_same(small)


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_bytes_of_a_large_bundle_are_noticed(large, count):
    generator = chance(20)
    paths = sorted(large.content)
    sizes = [len(large.content[path]) for path in paths]
    for turn in range(count):
        # Every other byte wherever it falls, which is in a large shard; the others in a file like any other.
        path = generator.choices(paths, sizes if turn % 2 else None)[0]
        position = generator.randrange(len(large.content[path]))
        with large.changed({path: flipped(large.content[path], position, generator)}):
            assert tallstore.verify(large.path), f"{path}, byte {position}"
            if turn % 10 == 0 and path.startswith(OF_A_LOAD):
                is_refused_or_the_same(large)
    assert tallstore.verify(large.path) == []


# --- whole files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [97, pytest.param(1, marks=pytest.mark.slow)])
def test_truncation_at_any_length_is_noticed(small, step):
    """Every file cut to the same length at a time, and every file is named."""
    for length in range(0, max(map(len, small.content.values())), step):
        cut = {
            path: content[:length]
            for path, content in small.content.items()
            if len(content) > length and path != MANIFEST
        }
        with small.changed(cut):
            assert reported(small) == cut.keys(), f"{length} bytes"
            is_refused_or_the_same(small)
    assert tallstore.verify(small.path) == []


@pytest.mark.parametrize("step", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_a_truncated_manifest_is_refused(small, step):
    content = small.content[MANIFEST]
    for length in range(0, len(content), step):
        with small.changed({MANIFEST: content[:length]}):
            assert tallstore.verify(small.path), f"{length} bytes"
            with pytest.raises(TallstoreError):
                tallstore.open_bundle(small.path)


@pytest.mark.parametrize("further", [b"\0", b" ", b"\n", b"{}"])
def test_what_was_appended_to_a_file_is_noticed(small, further):
    for path, content in small.content.items():
        with small.changed({path: content + further}):
            assert tallstore.verify(small.path), path
            is_refused_or_the_same(small)


def test_a_missing_file_is_noticed(small):
    for path in small.content:
        with small.changed({path: b""}):
            (small.path / path).unlink()
            if path == MANIFEST:
                with pytest.raises(tallstore.BundleNotFoundError):
                    tallstore.verify(small.path)
                with pytest.raises(tallstore.BundleNotFoundError):
                    tallstore.open_bundle(small.path)
                continue
            assert tallstore.verify(small.path), path
            assert is_refused_or_the_same(small) is path.startswith(OF_A_LOAD) or path == "base/config.json", path


def test_files_that_changed_places_are_noticed(small):
    """Every two files, those of two tasks and two shards of one task among them."""
    paths = list(small.content)
    for number, first in enumerate(paths):
        for second in paths[:number]:
            with small.changed({first: small.content[second], second: small.content[first]}):
                assert tallstore.verify(small.path), f"{first} for {second}"
                is_refused_or_the_same(small)


def test_directories_of_two_tasks_that_changed_places_are_noticed(small):
    tasks, aside = small.path / "tasks", small.path.parent / "aside"

    def exchange():
        (tasks / "cars").rename(aside)
        (tasks / "birds").rename(tasks / "cars")
        aside.rename(tasks / "birds")

    exchange()
    try:
        assert tallstore.verify(small.path)
        assert is_refused_or_the_same(small)
    finally:
        exchange()
    assert tallstore.verify(small.path) == []


def test_a_file_of_another_pack_of_the_same_names_is_noticed(small, tmp_path):
    """An old shard in a new bundle: every table of its own is sound."""
    tallstore.pack(*small_inputs(tmp_path, moved=1.0), tmp_path / "bundle", embed_base=True)
    replaced = 0
    for path, content in small.content.items():
        other = tmp_path / "bundle" / path
        if other.exists() and other.read_bytes() != content:
            with small.changed({path: other.read_bytes()}):
                problems = tallstore.verify(small.path)
                refused = is_refused_or_the_same(small)
            # A whole other manifest is sound, and the files are not those that it lists.
            assert problems, path
            assert refused, path
            replaced += 1
    assert replaced > 5
