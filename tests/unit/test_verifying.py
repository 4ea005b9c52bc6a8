"""`verify` finds every problem of a bundle, and nothing in a sound one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tracemalloc
from dataclasses import FrozenInstanceError

import msgspec
import numpy as np
import pytest
import xxhash
from safetensors.numpy import save_file

from tallstore.errors import BundleNotFoundError
from tallstore.files import hash_file, write_file
from tallstore.format import bits, layout
from tallstore.format.encodings import BITS, GAINS, SHARED, SIGNED, STEPS, WHOLE
from tallstore.format.manifest import (
    BasePin,
    BaseTable,
    BaseTensor,
    CompanionFile,
    Fidelity,
    FileEntry,
    GroupEntry,
    GroupTable,
    Manifest,
    MaskTensor,
    Method,
    PrivateTensor,
    SameTensor,
    SignedTensor,
    TaskEntry,
    TaskTable,
    Vector,
)
from tallstore.format.parsing import parse_manifest, serialise, serialise_manifest
from tallstore.format.r13 import r13
from tallstore.format.shard_reader import LocalFile
from tallstore.format.shard_writer import ShardWriter
from tallstore.verifying import Problem, bundle_checks, verify

METHOD = Method(name="signed-mask", parameters={"threshold": 1.2})
RANDOM = np.random.default_rng(0)
W = RANDOM.standard_normal((70, 64)).astype(np.float32)  # 4,480 elements: payloads of their own
V = RANDOM.standard_normal((5, 3)).astype(np.float32)  # 15: pooled
CONFIG = b'{"labels": 10}\n'


# --- a bundle, without torch ------------------------------------------------------------------------------------------


def write_base(root):
    (root / "base").mkdir(parents=True)
    save_file({"w": W, "v": V}, root / "base" / "model.safetensors")
    tensors = tuple(
        BaseTensor(name=name, dtype="F32", shape=value.shape, chunks=(xxhash.xxh3_128_hexdigest(value.tobytes()),))
        for name, value in (("w", W), ("v", V))
    )
    write_file(root / "base.json", serialise(BaseTable(format="tallstore.base", tensors=tensors)))


def write_group(root, group="g0001", step=0.5):
    directory = root / layout.group_directory(group)
    directory.mkdir(parents=True)
    writer = ShardWriter(directory)
    vectors = []
    for name, value in (("w", W), ("v", V)):
        codes = bits.pack(RANDOM.integers(0, 16, value.size, dtype=np.uint8), 4)
        steps = r13(np.full(len(value), step)).view(np.uint8)
        values = writer.whole("merged", f"merged/{name}", SHARED["LOG4"], value.size, codes)
        by_row = writer.whole("merged", f"merged.step/{name}", STEPS, len(value), steps)
        vectors.append(Vector(tensor=name, role="merged", dtype="LOG4", values=values, step=by_row))
    shards, _ = writer.finish()
    table = GroupTable(
        format="tallstore.group",
        id=group,
        required_features=(),
        method=METHOD,
        shards=shards,
        vectors=tuple(vectors),
    )
    write_file(root / layout.group_table(group), serialise(table))


def write_task(root, name, *, group="g0001", gain=1.5, whole=b"\1\0\1", companion=CONFIG):
    directory = root / layout.task_directory(name)
    directory.mkdir(parents=True)
    writer = ShardWriter(directory)
    fields = bits.pack(RANDOM.integers(0, 3, W.size, dtype=np.uint8), 2)
    mask = bits.pack(RANDOM.integers(0, 2, V.size, dtype=np.uint8), 1)
    gains = r13(np.full(len(V), gain)).view(np.uint8)
    values = np.frombuffer(whole, np.uint8)
    tensors = (
        SignedTensor(
            name="w",
            dtype="F32",
            shape=W.shape,
            gain=gain,
            fields=writer.whole("mask", "fields/w", SIGNED, W.size, fields),
        ),
        MaskTensor(
            name="v",
            dtype="F32",
            shape=V.shape,
            gains=writer.whole("mask", "gains/v", GAINS, len(V), gains),
            bits=writer.whole("mask", "bits/v", BITS, V.size, mask),
        ),
        SameTensor(name="tied.to.v", base="v", dtype="F32", shape=V.shape),
        PrivateTensor(
            name="p",
            dtype="U8",
            shape=(values.size,),
            values=writer.whole("private", "values/p", WHOLE["U8"], values.size, values),
        ),
    )
    shards, _ = writer.finish()
    files = ()
    if companion:
        (root / "files").mkdir(exist_ok=True)
        place = root / "files" / "new"
        written = write_file(place, companion)
        place.rename(root / layout.companion_path(written.sha256))
        files = (CompanionFile(name="config.json", sha256=written.sha256, size=written.size),)
    table = TaskTable(
        format="tallstore.task",
        name=name,
        slug=name,
        group=group,
        required_features=(),
        shards=shards,
        tensors=tensors,
        files=files,
        fidelity=Fidelity(cosine=0.5, gain=1.0, estimates={}),
    )
    write_file(root / layout.task_table(name), serialise(table))
    parameters = W.size + 2 * V.size + values.size
    return TaskEntry(name=name, slug=name, group=group, parameters=parameters, cosine=0.5, gain=1.0)


def seal(root, tasks, *, embedded=True):
    """List what is there, and write the manifest."""
    listed = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    files = []
    for path in listed:
        if not layout.is_bundle_path(path):
            continue
        written = hash_file(root / path)
        oid = None if path.endswith(".safetensors") else written.git_oid
        files.append(FileEntry(path=path, size=written.size, sha256=written.sha256, git_oid=oid))
    groups = sorted({path.split("/")[1] for path in listed if path.startswith("groups/")})
    manifest = Manifest(
        format="tallstore",
        format_version="1.0",
        manifest_sha256="0" * 64,
        generator="tests",
        required_features=(),
        base=BasePin(repo_id=None, revision=None, embedded=embedded),
        next_group=max(map(layout.group_number, groups), default=0) + 1,
        groups=tuple(GroupEntry(id=group, method=METHOD) for group in groups),
        tasks=tuple(tasks),
        files=tuple(files),
    )
    write_file(root / layout.MANIFEST, serialise_manifest(manifest))


def build(root, **options):
    write_base(root)
    write_group(root)
    seal(root, [write_task(root, "cars", **options), write_task(root, "mnist", **options)])
    return root


@pytest.fixture(scope="module")
def sound_bundle(tmp_path_factory):
    return build(tmp_path_factory.mktemp("sound") / "bundle")


@pytest.fixture
def bundle(sound_bundle, tmp_path):
    """A sound bundle of two tasks, to be broken."""
    return shutil.copytree(sound_bundle, tmp_path / "bundle")


def reseal(root):
    """Let the manifest list what is there now, so that what was broken is not merely changed."""
    manifest = parse_manifest((root / layout.MANIFEST).read_bytes(), layout.MANIFEST)
    seal(root, manifest.tasks, embedded=manifest.base.embedded)


def flip(path, position=-1):
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(bytes(raw))


def edit(path, old, new):
    raw = path.read_bytes()
    assert raw.count(old) >= 1
    path.write_bytes(raw.replace(old, new, 1))


def found(root):
    return [(problem.rule, problem.where) for problem in verify(root)]


MASK = "mask-00001-of-00001.safetensors"
PRIVATE = "private-00001-of-00001.safetensors"
MERGED = "groups/g0001/merged-00001-of-00001.safetensors"


# --- sound bundles ----------------------------------------------------------------------------------------------------


def test_a_sound_bundle_has_no_problem(bundle):
    assert verify(bundle) == []
    assert verify(str(bundle)) == []


def test_a_model_card_and_git_attributes_are_nobodys_business(bundle):
    (bundle / "README.md").write_text("anything")
    (bundle / ".gitattributes").write_text("anything")
    assert verify(bundle) == []


@pytest.mark.parametrize("place", ["nowhere", "empty", "file"])
def test_what_is_no_bundle_is_not_found(tmp_path, place):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(BundleNotFoundError, match=place):
        verify(tmp_path / place)


def test_no_torch_is_needed(bundle):
    code = (
        "import sys; from tallstore.verifying import verify; assert verify(sys.argv[1]) == []; "
        "assert 'torch' not in sys.modules and 'numpy' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, bundle], check=True)


def test_memory_does_not_grow_with_the_bundle(tmp_path):
    root = build(tmp_path / "bundle", whole=RANDOM.bytes(16 << 20))
    verify(root)
    tracemalloc.start()
    try:
        assert verify(root) == []
        assert tracemalloc.get_traced_memory()[1] < 8 << 20  # of 32 MiB
    finally:
        tracemalloc.stop()


# --- what a problem is ------------------------------------------------------------------------------------------------


def test_a_problem_is_one_line(bundle):
    (bundle / "files" / "line\nbreak\N{LINE SEPARATOR}").write_bytes(b"")
    (problem,) = verify(bundle)
    assert str(problem) == "files/line\\nbreak\\u2028: is not listed in the manifest; remove it [FILE-3]"
    with pytest.raises(FrozenInstanceError):
        problem.rule = "FILE-1"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems know no names that are not UTF-8")
def test_a_name_that_is_not_utf_8_can_be_shown(bundle):
    (bundle / "files" / os.fsdecode(b"\xff")).write_bytes(b"")
    assert found(bundle) == [("FILE-3", "files/\\xff")]


def test_what_others_keep_beside_the_bundle_is_left_alone(bundle):
    """A clone has .git, the Hub's client .cache, people licences and pictures, file systems hidden files."""
    for place in (".git/HEAD", ".cache/x/y", "LICENSE", "plots/sizes.png", "tasks/.DS_Store", "groups/g0001/.nfs01"):
        (bundle / place).parent.mkdir(parents=True, exist_ok=True)
        (bundle / place).write_text("theirs")
    (bundle / "link").symlink_to("tasks")
    assert verify(bundle) == []


# --- every problem, not the first -------------------------------------------------------------------------------------


def test_problems_of_many_files_are_all_found(bundle):
    flip(bundle / "tasks/cars" / MASK, 600)
    flip(bundle / MERGED, 700)
    flip(bundle / "base/model.safetensors")
    (companion,) = (bundle / "files").iterdir()
    companion.unlink()
    (bundle / "tasks/mnist" / PRIVATE).unlink()
    with (bundle / "tasks/mnist" / MASK).open("ab") as file:
        file.write(b"more")
    (bundle / "tasks/notes.txt").write_bytes(b"x")
    edit(bundle / "tasks/mnist/task.json", b'"gain":1.5', b'"gain":0.1')
    problems = found(bundle)
    assert set(problems) == {
        ("FILE-2", "tasks/cars/" + MASK),
        ("IDX-3", f"tasks/cars/{MASK}, 'fields/w', chunk 0"),
        ("FILE-2", MERGED),
        ("IDX-3", f"{MERGED}, 'merged/w', chunk 0"),
        ("FILE-2", "base/model.safetensors"),
        ("BASE-2", "base/model.safetensors, tensor 'w', chunk 0"),
        ("FILE-4", f"files/{companion.name}"),
        ("FILE-4", "tasks/mnist/" + PRIVATE),
        ("FILE-1", "tasks/mnist/" + MASK),
        ("ST-2", "tasks/mnist/" + MASK),
        ("FILE-3", "tasks/notes.txt"),
        ("FILE-2", "tasks/mnist/task.json"),
        ("NUM-1", "tasks/mnist/task.json, tensor 'w'"),
    }
    assert len(problems) == len(set(problems))


def test_problems_of_one_file_are_all_found(bundle):
    path = bundle / "tasks/cars" / MASK
    raw = path.read_bytes()
    data = 8 + int.from_bytes(raw[:8], "little")
    spans = {key: entry["data_offsets"] for key, entry in msgspec.json.decode(raw[8:data]).items() if "shape" in entry}
    for key in ("fields/w", "pool"):
        first, end = spans[key]
        flip(path, data + first)
        flip(path, data + end - 1)
    reseal(bundle)
    assert sorted(found(bundle)) == [
        ("IDX-3", f"tasks/cars/{MASK}, 'fields/w', chunk 0"),
        ("IDX-3", f"tasks/cars/{MASK}, 'pool', chunk 0"),
        ("IDX-4", f"tasks/cars/{MASK}, 'fields/w'"),
        ("IDX-4", f"tasks/cars/{MASK}, 'pool'"),
    ]


def test_every_broken_chunk_is_named(tmp_path):
    root = build(tmp_path / "bundle", whole=RANDOM.bytes((3 << 20) + 5))
    path = root / "tasks/mnist" / PRIVATE
    data = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    flip(path, data)
    flip(path, data + (2 << 20))
    flip(path, data + (3 << 20) + 4)
    place = f"tasks/mnist/{PRIVATE}, 'values/p', chunk"
    assert found(root) == [
        ("FILE-2", "tasks/mnist/" + PRIVATE),
        *(("IDX-3", f"{place} {chunk}") for chunk in (0, 2, 3)),
    ]


def test_a_table_that_cannot_be_read_does_not_stop_the_others(bundle):
    (bundle / "base.json").write_bytes(b"{")
    (bundle / "tasks/cars/task.json").write_bytes(b"[]")
    flip(bundle / "tasks/mnist" / MASK, 600)
    flip(bundle / MERGED, 700)
    reseal(bundle)
    assert found(bundle) == [
        ("JSON-1", "base.json"),
        ("JSON-1", "tasks/cars/task.json"),
        ("IDX-3", f"tasks/mnist/{MASK}, 'fields/w', chunk 0"),
    ]


def test_a_group_that_cannot_be_read_does_not_stop_its_tasks(bundle):
    edit(bundle / "groups/g0001/group.json", b'"LOG4"', b'"LOG5"')
    flip(bundle / "tasks/mnist" / MASK, 600)
    reseal(bundle)
    assert found(bundle) == [
        ("JSON-3", "groups/g0001/group.json"),
        ("IDX-3", f"tasks/mnist/{MASK}, 'fields/w', chunk 0"),
    ]


def test_a_header_that_cannot_be_read_does_not_stop_other_shards(bundle):
    flip(bundle / "tasks/cars" / MASK, 20)
    flip(bundle / "tasks/cars" / PRIVATE, 20)
    reseal(bundle)
    assert found(bundle) == [("ST-5", f"tasks/cars/{MASK}"), ("ST-5", f"tasks/cars/{PRIVATE}")]


def test_a_manifest_that_was_edited_is_still_used(bundle):
    edit(bundle / "tallstore.json", b'"cosine": 0.5', b'"cosine": 0.9')
    flip(bundle / "tasks/mnist" / MASK, 600)
    assert found(bundle) == [
        ("MAN-1", "tallstore.json"),
        ("FILE-2", f"tasks/mnist/{MASK}"),
        ("MAN-4", "tasks/cars/task.json"),
        ("IDX-3", f"tasks/mnist/{MASK}, 'fields/w', chunk 0"),
    ]


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"{", "JSON-1"),
        (b"{}", "JSON-3"),
        (b'{"format": "tallstore", "format_version": "2.0"}', "VER-1"),
        (b'{"format": "tallstore", "format_version": "1.0", "manifest_sha256": "%b"}' % (b"0" * 64), "MAN-1"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_one_problem_or_two(bundle, content, rule):
    (bundle / "tallstore.json").write_bytes(content)
    problems = found(bundle)
    assert problems[0] == (rule, "tallstore.json")
    assert all(where == "tallstore.json" for _, where in problems)


def test_every_flipped_byte_is_found(bundle):
    paths = [path for path in bundle.rglob("*") if path.is_file()]
    for turn in range(150):
        path = paths[turn % len(paths)]
        raw = path.read_bytes()
        flip(path, int(RANDOM.integers(len(raw))))
        assert verify(bundle), path
        path.write_bytes(raw)


VALUES = [
    None,
    True,
    -1,
    0,
    3,
    1 << 20,
    1 << 62,
    1 << 63,
    0.5,
    -0.0,
    1e300,
    "",
    "w",
    "pooled",
    "I8",
    [],
    [1 << 30] * 2,
    {},
]


def places(node, path=()):
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield (*path, key)
        if isinstance(node[key], dict | list):
            yield from places(node[key], (*path, key))


@pytest.mark.parametrize("table", ["base.json", "groups/g0001/group.json", "tasks/cars/task.json"])
def test_no_table_however_wrong_is_an_accident(bundle, table):
    """Any value anywhere, in a bundle whose hashes are right: problems, and no other exception."""
    random = np.random.default_rng(1)
    original = (bundle / table).read_bytes()
    for _ in range(40):
        document = msgspec.json.decode(original)
        spots = list(places(document))
        *parents, last = spots[random.integers(len(spots))]
        node = document
        for key in parents:
            node = node[key]
        node[last] = VALUES[random.integers(len(VALUES))]
        (bundle / table).write_bytes(msgspec.json.encode(document))
        reseal(bundle)
        assert all(str(problem) for problem in verify(bundle))


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_task_that_was_not_fetched_is_no_problem(bundle):
    shutil.rmtree(bundle / "tasks/cars")
    assert verify(bundle) == []
    shutil.rmtree(bundle / "tasks/mnist")
    assert verify(bundle) == []
    shutil.rmtree(bundle / "files")  # nobody who needs it is here
    shutil.rmtree(bundle / "groups")
    assert verify(bundle) == []


def test_a_task_that_is_half_here_lacks_files(bundle):
    (bundle / "tasks/cars/task.json").unlink()
    (bundle / "tasks/mnist" / MASK).unlink()
    assert found(bundle) == [("FILE-4", "tasks/cars/task.json"), ("FILE-4", f"tasks/mnist/{MASK}")]


def test_only_what_a_task_here_needs_must_be_here(tmp_path):
    root = tmp_path / "bundle"
    write_base(root)
    write_group(root)
    write_group(root, "g0002")
    seal(root, [write_task(root, "cars"), write_task(root, "mnist", group="g0002", companion=b"other")])
    assert verify(root) == []
    shutil.rmtree(root / "tasks/mnist")
    shutil.rmtree(root / "groups/g0002")
    (root / layout.companion_path("d9298a10d1b0735837dc4bd85dac641b0f3cef27a47e5d53a54f2f3f5b2fcffa")).unlink()
    assert verify(root) == []
    shutil.rmtree(root / "groups/g0001")
    assert found(root) == [("FILE-4", "groups/g0001/group.json"), ("FILE-4", MERGED)]


def test_the_base_is_always_due(bundle):
    (bundle / "base.json").unlink()
    shutil.rmtree(bundle / "base")
    assert found(bundle) == [("FILE-4", "base.json"), ("FILE-4", "base/model.safetensors")]


def test_a_group_that_no_task_here_needs_may_be_half_here(bundle):
    shutil.rmtree(bundle / "tasks/cars")
    (bundle / MERGED).unlink()
    assert found(bundle) == [("FILE-4", MERGED)]
    shutil.rmtree(bundle / "tasks/mnist")
    assert verify(bundle) == []


def test_files_that_nobody_lists_are_found_wherever_they_are(bundle):
    (bundle / "tasks/cars/old").mkdir()
    (bundle / "groups/g0009").mkdir()
    for path in ["tasks/cars/old/x", "tasks/cars/README.md", "tasks/a", "groups/g0009/group.json", "base/more"]:
        (bundle / path).write_bytes(b"")
    (bundle / "tasks/link").symlink_to("cars")
    (bundle / "tasks/empty").mkdir()
    assert {where for rule, where in found(bundle) if rule == "FILE-3"} == {
        "tasks/cars/old/x",
        "tasks/cars/README.md",
        "tasks/a",
        "groups/g0009/group.json",
        "base/more",
        "tasks/link",
    }


def test_listed_files_that_nothing_refers_to_are_found(bundle):
    shutil.copy(bundle / "tasks/cars" / MASK, bundle / "tasks/cars/mask-00002-of-00002.safetensors")
    shutil.copytree(bundle / "tasks/cars", bundle / "tasks/other")
    write_file(bundle / "files" / "new", b"unused")
    (bundle / "files" / "new").rename(bundle / layout.companion_path(hash_file(bundle / "files" / "new").sha256))
    reseal(bundle)
    problems = verify(bundle)
    assert {problem.rule for problem in problems} == {"MAN-3"}
    assert len(problems) == 1 + 4 + 1


def test_links_and_other_things_in_the_place_of_files_are_refused(bundle):
    task = bundle / "tasks/cars"
    (task / MASK).rename(bundle.parent / "mask")
    (task / MASK).symlink_to(bundle.parent / "mask")
    (task / PRIVATE).unlink()
    (task / PRIVATE).mkdir()
    (bundle / "tasks/mnist").rename(bundle.parent / "mnist")
    (bundle / "tasks/mnist").symlink_to(bundle.parent / "mnist")
    (bundle / "base.json").unlink()
    os.mkfifo(bundle / "base.json")  # reading it would wait for ever
    assert found(bundle) == [
        ("PATH-2", "base.json"),
        ("PATH-2", f"tasks/cars/{MASK}"),
        ("PATH-2", f"tasks/cars/{PRIVATE}"),
        ("PATH-2", f"tasks/mnist/{MASK}"),
        ("PATH-2", f"tasks/mnist/{PRIVATE}"),
        ("PATH-2", "tasks/mnist/task.json"),
    ]


def test_a_file_that_the_system_cannot_read_is_a_problem(bundle, monkeypatch):
    def hash_all_but_one(path, advance):
        if path.name == "base.json":
            raise PermissionError(13, "Permission denied")
        return hash_file(path, advance)

    def read(self, start, stop):
        if "mnist" in self.where and start:
            raise OSError(5, "Input/output error")
        return read_as_ever(self, start, stop)

    read_as_ever = LocalFile.read
    monkeypatch.setattr(bundle_checks, "hash_file", hash_all_but_one)
    monkeypatch.setattr(LocalFile, "read", read)
    problems = verify(bundle)
    assert Problem("FILE-4", "base.json", "cannot be read (Permission denied)") in problems
    assert Problem("FILE-4", f"tasks/mnist/{MASK}", "cannot be read (Input/output error)") in problems


def test_the_git_blob_id_is_checked_where_the_bytes_are_right(bundle):
    manifest = parse_manifest((bundle / "tallstore.json").read_bytes(), "")
    files = [
        msgspec.structs.replace(file, git_oid="f" * 40) if file.path == "base.json" else file for file in manifest.files
    ]
    write_file(bundle / "tallstore.json", serialise_manifest(msgspec.structs.replace(manifest, files=tuple(files))))
    assert found(bundle) == [("FILE-5", "base.json")]


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_scales_above_the_limit_are_found_for_one_gain_and_for_gains_by_row(tmp_path):
    root = tmp_path / "bundle"
    write_base(root)
    write_group(root, step=2.0**30)
    seal(root, [write_task(root, "cars", gain=2.0**31), write_task(root, "mnist", gain=2.0**30)])
    assert found(root) == [
        ("NUM-3", "tasks/cars/task.json, tensor 'w'"),
        ("NUM-3", "tasks/cars/task.json, tensor 'v'"),
    ]


# --- the embedded base ------------------------------------------------------------------------------------------------


def test_a_base_by_reference_is_not_looked_for(bundle):
    shutil.rmtree(bundle / "base")
    manifest = parse_manifest((bundle / "tallstore.json").read_bytes(), "")
    seal(bundle, manifest.tasks, embedded=False)
    assert verify(bundle) == []


def test_a_base_in_several_files_is_put_together(bundle):
    (bundle / "base/model.safetensors").unlink()
    save_file({"w": W}, bundle / "base/a.safetensors")
    save_file({"v": V, "unused": V}, bundle / "base/b.safetensors")
    index = bundle / "base/model.safetensors.index.json"
    index.write_bytes(b'{"metadata": {}, "weight_map": {"w": "a.safetensors", "v": "b.safetensors"}}')
    reseal(bundle)
    assert verify(bundle) == []


@pytest.mark.parametrize(
    ("index", "rules"),
    [
        (b"{", ["BASE-4"]),
        (b"[]", ["BASE-4"]),
        (b'{"weight_map": {}}', ["BASE-4"]),
        (b'{"weight_map": {"w": 1}}', ["BASE-4"]),
        (b'{"weight_map": {"w": "../../w.safetensors"}}', ["BASE-4"]),
        (b'{"weight_map": {"w": "a.safetensors"}}', ["BASE-1"]),
        (b'{"weight_map": {"w": "b.safetensors", "v": "a.safetensors"}}', ["BASE-4", "BASE-4"]),
        (b'{"weight_map": {"w": "a.safetensors", "v": "c.safetensors"}}', ["BASE-4", "BASE-4"]),
    ],
)
def test_an_index_that_is_wrong_is_refused(bundle, index, rules):
    (bundle / "base/model.safetensors").unlink()
    save_file({"w": W}, bundle / "base/a.safetensors")
    save_file({"v": V}, bundle / "base/b.safetensors")
    save_file({"w": W, "v": V}, bundle / "base/c.safetensors")
    (bundle / "base/model.safetensors.index.json").write_bytes(index)
    reseal(bundle)
    assert [rule for rule, _ in found(bundle)] == rules


def test_a_base_without_weights_is_refused(bundle):
    (bundle / "base/model.safetensors").rename(bundle / "base/weights.safetensors")
    reseal(bundle)
    assert found(bundle)[0] == ("BASE-4", "base")


def test_a_base_of_other_tensors_is_refused_tensor_by_tensor(bundle):
    save_file({"w": W.astype(np.float16), "v": V.reshape(3, 5)}, bundle / "base/model.safetensors")
    reseal(bundle)
    assert found(bundle) == [
        ("BASE-1", "base/model.safetensors, tensor 'w'"),
        ("BASE-1", "base/model.safetensors, tensor 'v'"),
    ]
    save_file({"v": -V}, bundle / "base/model.safetensors")
    reseal(bundle)
    assert found(bundle) == [
        ("BASE-1", "base, tensor 'w'"),
        ("BASE-2", "base/model.safetensors, tensor 'v', chunk 0"),
    ]


def test_a_tied_tensor_may_be_in_the_file_under_its_other_name(bundle):
    table = msgspec.json.decode((bundle / "base.json").read_bytes())
    table["tensors"].append({"name": "tied", "dtype": "F32", "shape": [5, 3], "chunks": [], "alias_of": "v"})
    (bundle / "base.json").write_bytes(msgspec.json.encode(table))
    save_file({"w": W, "tied": V}, bundle / "base/model.safetensors")
    reseal(bundle)
    assert verify(bundle) == []


def test_a_damaged_base_file_is_refused_once(bundle):
    raw = (bundle / "base/model.safetensors").read_bytes()
    (bundle / "base/model.safetensors").write_bytes(raw[:-1])
    reseal(bundle)
    assert found(bundle) == [("ST-2", "base/model.safetensors")]
