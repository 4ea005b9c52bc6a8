"""Whole files that are others': refused by the loads that read them, named by `verify`, and harmless to other tasks."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable

import pytest

import tallstore
from tallstore.format import shard_writer
from tests.faults.bundles import large_inputs
from tests.faults.specimens import Specimen, chance, every_kind, readers, specimen, specimen_of

_LOG = logging.getLogger(__name__)  # --log-cli-level=INFO shows how many
MANIFEST = "tallstore.json"
PAGE = 4096


def several_shards(root, seed: int = 3) -> Specimen:
    """A bundle whose groups and tasks have several shards each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer, "MAX_SHARD_NBYTES", 150)
        return specimen_of(every_kind(root / "bundle", "raw", seed).seal(), None)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return several_shards(tmp_path_factory.mktemp("several"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another bundle of the same names, shapes and sizes: other experts of another base."""
    return several_shards(tmp_path_factory.mktemp("other"), seed=4)


@pytest.fixture(scope="module")
def read(bundle):
    return readers(bundle)


def check(bundle: Specimen, read: dict[str, set[str]], paths: Iterable[str], *, named: bool = True) -> None:
    """The files at *paths* are others now: all tasks that read one are refused, others the same; `verify` names all."""
    paths = list(paths)
    due = set().union(*(read[path] for path in paths))
    assert bundle.outcomes() == {task: "refused" if task in due else "the same" for task in bundle.weights}, paths
    problems = tallstore.verify(bundle.path)
    if MANIFEST in paths:
        assert problems, paths
    elif named:
        assert {problem.where for problem in problems if problem.rule in {"FILE-1", "FILE-2", "FILE-4"}} == set(paths)


def test_the_bundle_has_several_shards_of_groups_and_tasks(bundle, read):
    stems = {path.rpartition("-0")[0].rpartition("-0")[0] for path in bundle.content if "-of-00001" not in path}
    assert {"tasks/all/mask", "tasks/all/private", "groups/g0001/merged"} <= stems
    assert all(read[path] for path in bundle.content)
    assert {frozenset(tasks) for tasks in read.values()} >= {frozenset({task}) for task in bundle.weights}


@pytest.mark.parametrize("every", [47, pytest.param(1, marks=pytest.mark.slow)])
def test_every_two_files_that_changed_places(bundle, read, every):
    """Shards of one task or group, files of two tasks, of two groups, tables and shards."""
    paths = list(bundle.content)
    pairs = [(first, second) for number, first in enumerate(paths) for second in paths[:number]]
    count = 0
    for first, second in pairs[::every]:
        if bundle.content[first] != bundle.content[second]:
            with bundle.changed({first: bundle.content[second], second: bundle.content[first]}):
                check(bundle, read, (first, second))
            count += 1
    _LOG.info("%s pairs of files", count)


@pytest.mark.parametrize(
    ("one", "another"), [("tasks/all", "tasks/few"), ("tasks/few", "tasks/apart"), ("groups/g0001", "groups/g0002")]
)
def test_directories_that_changed_places(bundle, read, one, another):
    first, second, aside = bundle.path / one, bundle.path / another, bundle.path.parent / "aside"

    def exchange():
        first.rename(aside)
        second.rename(first)
        aside.rename(second)

    exchange()
    try:
        moved = [path for path in bundle.content if path.startswith((f"{one}/", f"{another}/"))]
        check(bundle, read, moved, named=False)
        assert {problem.where for problem in tallstore.verify(bundle.path)} >= set(moved)
    finally:
        exchange()
    assert tallstore.verify(bundle.path) == []


def test_each_file_of_another_bundle(bundle, other, read):
    """Of the same name and size, sound in itself, as when copies of two packs are mixed: manifest and base.json too."""
    assert other.content.keys() == bundle.content.keys()
    count = 0
    for path, content in other.content.items():
        if content != bundle.content[path]:
            with bundle.changed({path: content}):
                check(bundle, read, [path])
            count += 1
    assert count > 20
    _LOG.info("%s files of another bundle", count)


def test_all_files_of_a_task_of_another_bundle(bundle, other, read):
    for directory in ("tasks/all", "tasks/apart", "groups/g0001", "base"):
        moved = {path: content for path, content in other.content.items() if path.startswith(directory)}
        changed = {path: content for path, content in moved.items() if content != bundle.content[path]}
        with bundle.changed(changed):
            check(bundle, read, changed)


def test_a_manifest_over_the_files_of_another_bundle(bundle, other):
    with bundle.changed({MANIFEST: other.content[MANIFEST]}):
        assert set(bundle.outcomes().values()) == {"refused"}
        named = {problem.where for problem in tallstore.verify(bundle.path) if problem.rule == "FILE-2"}
        assert named == {
            path for path in bundle.content if path != MANIFEST and other.content[path] != bundle.content[path]
        }


@pytest.mark.parametrize("step", [900, pytest.param(1, marks=pytest.mark.slow)])
def test_each_file_cut_at_every_length(bundle, read, step):
    generator, count = chance(40), 0
    for path, content in bundle.content.items():
        for length in range(generator.randrange(min(step, len(content))), len(content), step):
            with bundle.changed({path: content[:length]}):
                tasks = read[path] if step == 1 and length % 16 else bundle.weights
                due = {task: "refused" if task in read[path] else "the same" for task in tasks}
                assert bundle.outcomes(tasks) == due, (path, length)
                if step > 1 or not length % 16:
                    assert tallstore.verify(bundle.path), (path, length)
            count += 1
    _LOG.info("%s truncations", count)


def test_each_file_with_more_behind_it(bundle, read):
    for path, content in bundle.content.items():
        for further in (b"\0", b"\0" * 64):
            with bundle.changed({path: content + further}):
                check(bundle, read, [path])


def test_a_missing_file(bundle, read):
    for path, content in bundle.content.items():
        if path == MANIFEST:
            continue
        (bundle.path / path).unlink()
        try:
            check(bundle, read, [path])
        finally:
            (bundle.path / path).write_bytes(content)


def test_companions_that_changed_places(tmp_path):
    """They are under their hashes: an export refuses what is not what its name says, and a load does not care."""
    base, experts = large_inputs(tmp_path, tensors=1, numel=1 << 13)
    for task in ("cars", "birds"):
        (tmp_path / task).mkdir()
        shutil.move(experts[task], tmp_path / task / "model.safetensors")
        (tmp_path / task / "config.json").write_text(f'{{"of": "{task:>9}"}}')
    packed = specimen(tmp_path, (base, {task: tmp_path / task for task in experts}), 0)
    first, second = [path for path in packed.content if path.startswith("files/")]
    with packed.changed({first: packed.content[second], second: packed.content[first]}):
        assert set(packed.outcomes().values()) == {"the same"}
        assert {problem.where for problem in tallstore.verify(packed.path)} == {first, second}
        with tallstore.open_bundle(packed.path, base=packed.base) as opened:
            for task in opened.tasks:
                with pytest.raises(tallstore.IntegrityError, match="FILE-2"):
                    tallstore.exporting.export(opened, task, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- more than a byte of a large bundle -------------------------------------------------------------------------------


@pytest.fixture(
    scope="module",
    params=[(1, (1 << 20) + 1024), pytest.param((8, 1 << 23), marks=pytest.mark.slow)],
    ids=["small", "large"],
)
def large(request, tmp_path_factory):
    """Some MB; in the long run some hundreds."""
    root = tmp_path_factory.mktemp("large")
    tensors, numel = request.param
    made = specimen(
        root, large_inputs(root, tensors=tensors, numel=numel), 0, method=tallstore.TallMask(), embed_base=True
    )
    _LOG.info("a bundle of %s bytes", sum(map(len, made.content.values())))
    return made


def damages(large: Specimen, count: int):
    """Where what is torn: a byte, a burst of random bytes, a page of zeros, a page of what was there before."""
    generator = chance(50)
    paths = sorted(large.content)
    sizes = [len(large.content[path]) for path in paths]
    for turn in range(count):
        path = generator.choices(paths, sizes)[0]
        content = large.content[path]
        at = generator.randrange(len(content))
        page = content[at - at % PAGE :][:PAGE]
        match turn % 4:
            case 0:
                start, data = at, bytes([content[at] ^ 1 << generator.randrange(8)])
            case 1:
                start, data = at, generator.randbytes(min(generator.randint(2, 300), len(content) - at))
            case 2:
                start, data = at - at % PAGE, bytes(len(page))
            case _:
                start, data = at - at % PAGE, content[:PAGE][: len(page)]
        if content[start : start + len(data)] != data:
            yield turn, path, start, data


@pytest.mark.parametrize("count", [24, pytest.param(400, marks=pytest.mark.slow)])
def test_bytes_bursts_and_torn_pages(large, count):
    done = loads = refused = 0
    for turn, path, start, data in damages(large, count):
        with large.patched(path, start, data):
            named = {problem.where for problem in tallstore.verify(large.path) if problem.rule == "FILE-2"}
            assert named == {path} or (path == MANIFEST and tallstore.verify(large.path))
            if turn % 8 < 4:
                outcomes = large.outcomes()
                loads += 1
                refused += "refused" in outcomes.values()
        done += 1
    assert refused == loads  # hardly a byte of a large bundle is none that a load reads
    assert tallstore.verify(large.path) == []
    _LOG.info("%s damages, %s of them loaded, %s refused", done, loads, refused)
