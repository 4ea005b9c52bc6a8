"""open_bundle: experts come back bit for bit, from the bytes that they need, and nothing wrong goes unnoticed."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import tallstore
from tallstore.checkpoints import open_checkpoint
from tallstore.format import bundle_files, layout
from tallstore.format.dtypes import CHUNK_NUMEL
from tallstore.format.safetensors_header import parse_header
from tallstore.format.shard_reader import LocalFile, ShardReader
from tallstore.format.shards import RECORD_NBYTES
from tallstore.loading import pinned_base
from tests import reference
from tests.bundle_builder import Bundle, Group, Task
from tests.reference import same_bits

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def weights(seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def sides(seed: int, count: int, low: int = -1) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, 2, count)


def numbers(dtype: str, seed: int, count: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    match dtype:
        case "LOG4":
            return random.integers(0, 16, count)
        case "I8":
            return random.integers(-127, 128, count)
        case _:
            return random.standard_normal(count)


def small_base() -> dict[str, torch.Tensor]:
    return {
        "embed": weights(1, (7, 5)),
        "conv": weights(2, (2, 3, 2, 2), torch.bfloat16),
        "bias": weights(3, (13,), torch.float16),
        "scale": weights(4, (), torch.float64),
        "positions": torch.arange(6).view(2, 3),
        "-inf": torch.full((2, 2), -math.inf),
        "empty": torch.empty(0, 4),
        "head": weights(5, (3, 5)),
    }


def build(root: Path, base: dict[str, torch.Tensor] | None = None, codec: str | None = None, **options) -> Bundle:
    """A bundle of two tasks that have every kind of tensor; not sealed yet."""
    base = small_base() if base is None else base
    group = Group(root, base, codec=codec)
    group.vector("embed", "LOG4", numbers("LOG4", 1, 35), steps=[2.0**-3, 0.0, 1.5, 2.0**-9, 1, 2, 3])
    group.vector("conv", "I8", numbers("I8", 2, 24), steps=[2.0**-8] * 6, row_axes=2)
    group.vector("bias", "BF16", numbers("BF16", 3, 13))
    group.vector("scale", "F32", numbers("F32", 4, 1))
    group.vector("head", "F16", numbers("F16", 5, 15))
    everything, little = Task(group, "Every thing", codec), Task(group, "little", codec)
    everything.signed("embed", sides(1, 35), gain=-1.25)
    everything.mask("conv", sides(2, 24, 0), gains=[1.0, 0.5, 0.0, -1.0, 2.0, 1.5], row_axes=2)
    everything.signed("bias", sides(3, 13), dtype=torch.float32)
    everything.mask("scale", sides(4, 1, 0) | 1)
    everything.same("positions")
    everything.same("-inf")
    everything.same("empty")
    everything.same("renamed", base="embed", dtype=torch.float16)
    everything.extended("head", "signed", weights(6, (2, 5)), 3, sides(5, 15), gain=0.5)
    everything.private("classifier", weights(7, (4, 3), torch.float64))
    everything.private("steps", torch.tensor(2**40))
    everything.private("flags", torch.tensor([True, False, True]))
    everything.private("nothing", torch.empty(3, 0, dtype=torch.int32))
    everything.alias("tied", "embed")
    little.same("embed")
    little.extended("head", "same", None, 2)
    little.private("conv", weights(8, (2, 3, 2, 2), torch.bfloat16))
    for name in ("bias", "scale", "positions", "-inf", "empty"):
        little.dropped(name)
    return Bundle(root, base, [group], [everything, little], **options)


@pytest.fixture
def built(tmp_path):
    bundle = build(tmp_path / "bundle")
    bundle.seal()
    return bundle


def expect(bundle: Bundle, number: int = 0) -> dict[str, torch.Tensor]:
    return bundle.tasks[number].expected


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not same_bits(found[name], expected[name])] == []


# --- what comes back ---


@pytest.mark.parametrize("codec", [None, "raw", "zstd", "planes-zstd"])
def test_every_kind_of_tensor_comes_back(tmp_path, codec):
    built = build(tmp_path / "bundle", codec=codec)
    with tallstore.open_bundle(built.seal()) as bundle:
        assert bundle.tasks == ("Every thing", "little")
        for number, task in enumerate(bundle.tasks):
            assert_same(bundle.state_dict(task), expect(built, number))
            assert bundle.keys(task) == tuple(expect(built, number))
            assert_same(dict(bundle.items(task)), expect(built, number))
            assert_same({name: bundle.tensor(task, name) for name in bundle.keys(task)}, expect(built, number))


@pytest.mark.parametrize("shared", ["LOG4", "I8", "BF16", "F16", "F32"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_coded_tensors_are_the_references_bit_for_bit(tmp_path, dtype, shared):
    """Every dtype of the base, of the shared vector and of the result, masks and signed masks, every shape, by row."""
    shapes = {"scalar": (), "vector": (13,), "matrix": (7, 5), "conv": (2, 3, 2, 2)}
    base = {name: weights(len(name), shape, dtype) for name, shape in shapes.items()}
    group = Group(tmp_path, base)
    rows = {"scalar": 1, "vector": 1, "matrix": 7, "conv": 2}
    steps = {name: [2.0**-7 * (1 + row) for row in range(count)] for name, count in rows.items()}
    for name, tensor in base.items():
        step = steps[name] if shared in ("LOG4", "I8") else None
        group.vector(name, shared, numbers(shared, len(name), tensor.numel()), steps=step)
    tasks = []
    for result in FLOATS:
        task = Task(group, f"to {result}")
        for name, tensor in base.items():
            if len(tasks) % 2:
                task.mask(name, sides(9, tensor.numel(), 0), dtype=result, gain=1 + 2.0**-12)
            else:
                task.signed(name, sides(9, tensor.numel()), dtype=result, gains=steps[name])
        tasks.append(task)
    built = Bundle(tmp_path, base, [group], tasks)
    bundle = tallstore.open_bundle(built.seal())
    for number, task in enumerate(bundle.tasks):
        assert_same(bundle.state_dict(task), expect(built, number))


def large_bundle(root: Path) -> tuple[Bundle, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Tensors of more than one chunk, whose rows and bytes do not end with it; and the numbers and sides in them."""
    shape, count = (1031, 1021), 1031 * 1021
    base = {"mask": weights(1, shape, torch.bfloat16), "signed": weights(2, shape)}
    group, codes = Group(root, base), {}
    steps = [2.0**-8 * (1 + row % 7) for row in range(1031)]
    for name, shared in (("mask", "I8"), ("signed", "LOG4")):
        codes[name] = numbers(shared, 3, count), sides(4, count, 0 if name == "mask" else -1)
        group.vector(name, shared, codes[name][0], steps=steps)
    task = Task(group, "t")
    task.mask("mask", codes["mask"][1], expect=False)
    task.signed("signed", codes["signed"][1], expect=False)
    task.private("whole", torch.arange(count, dtype=torch.int32))
    return Bundle(root, base, [group], [task], embed=False), codes


def test_tensors_of_several_chunks_and_ranges_of_them(tmp_path):
    built, codes = large_bundle(tmp_path)
    bundle = tallstore.open_bundle(built.seal(), base=built.base)
    state = bundle.state_dict("t")
    assert torch.equal(state["whole"], torch.arange(1031 * 1021, dtype=torch.int32))
    count = 1031 * 1021
    sample = {*range(20), *range(CHUNK_NUMEL - 20, CHUNK_NUMEL + 20), *range(count - 20, count), *range(0, count, 9973)}
    for name, base in built.base.items():
        value, (code, side) = (float if name == "mask" else reference.log4), codes[name]
        dtypes = dict.fromkeys(("base_dtype", "result_dtype"), reference.NAMES[base.dtype])
        for i in sorted(sample):
            pattern = reference.patterns(base.view(-1)[i : i + 1])[0]
            scale = 2.0**-8 * (1 + i // 1021 % 7)
            expected = reference.element(pattern, int(side[i]), value(int(code[i])), scale, **dtypes)
            assert reference.patterns(state[name].view(-1)[i : i + 1]) == [expected], (name, i)
    for name, whole in state.items():
        for start, stop in ((0, 0), (5, 6), (CHUNK_NUMEL - 3, CHUNK_NUMEL + 11), (CHUNK_NUMEL, count), (0, count)):
            assert same_bits(bundle._range("t", name, start, stop), whole.view(-1)[start:stop])
        with pytest.raises(IndexError, match=name):
            bundle._range("t", name, 5, count + 1)
    halved = bundle.tensor("t", "signed", dtype="float16")
    assert same_bits(halved, state["signed"].to(torch.float16))


def test_a_range_of_an_extended_tensor_may_cross_its_border(built):
    bundle, expected = tallstore.open_bundle(built.root), expect(built)["head"].view(-1)
    for start, stop in itertools.combinations((0, 3, 14, 15, 16, 25), 2):
        assert same_bits(bundle._range("Every thing", "head", start, stop), expected[start:stop])


def test_ties_share_storage_in_a_state_dict(built):
    state = tallstore.open_bundle(built.root).state_dict("Every thing")
    assert state["tied"] is state["embed"]


def test_items_come_one_at_a_time(built):
    """Nothing is kept: a consumer may change what it got, the tied tensor comes as new."""
    for name, tensor in tallstore.open_bundle(built.root).items("Every thing"):
        assert same_bits(tensor, expect(built)[name])
        tensor.zero_()


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
def test_dtype_casts_the_finished_expert_and_leaves_integers(built, dtype):
    state = tallstore.open_bundle(built.root).state_dict("Every thing", dtype=dtype)
    for name, tensor in expect(built).items():
        expected = tensor
        if tensor.is_floating_point():
            patterns = [reference.encode(float(x), "BF16") for x in tensor.view(-1).tolist()]
            expected = reference.from_patterns(patterns, torch.bfloat16, tensor.shape)
        assert same_bits(state[name], expected), name


@pytest.mark.parametrize("dtype", ["int64", torch.bool, "float17", "nn", 3])
def test_an_impossible_dtype_is_refused(built, dtype):
    with pytest.raises(tallstore.OptionError, match="dtype is"):
        tallstore.open_bundle(built.root).tensor("little", "embed", dtype=dtype)


def test_any_device_of_torch(built):
    bundle = tallstore.open_bundle(built.root)
    assert bundle.tensor("little", "embed", device=torch.device("meta")).is_meta
    assert all(tensor.is_meta for tensor in bundle.state_dict("little", device="meta").values())
    for device in ("nonsense", "cuda:99"):
        with pytest.raises(tallstore.OptionError, match=f"device is '{device}'"):
            bundle.items("little", device=device)


def test_a_default_device_does_not_reach_into_loading(built):
    with torch.device("meta"):
        state = tallstore.open_bundle(built.root).state_dict("Every thing")
    assert_same(state, expect(built))


# --- what is read ---


def sizes(bundle: tallstore.Bundle) -> dict[str, int]:
    return {file.path: file.size for file in bundle.manifest.files}


def payload_start(path: Path) -> int:
    """Bytes of a shard before its payloads."""
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def test_opening_reads_the_manifest_and_nothing_else(built):
    for path in ("base.json", "groups", "tasks", "base"):
        place = built.root / path
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    bundle = tallstore.open_bundle(built.root)
    assert bundle.tasks == ("Every thing", "little")
    assert bundle.bytes_read == (built.root / layout.MANIFEST).stat().st_size


def test_only_the_bytes_of_one_tensor_are_read(tmp_path):
    """Manifest, three tables, headers and indexes of two shards, and of both chunks the ones that the range lies in."""
    built, _ = large_bundle(tmp_path)
    bundle = tallstore.open_bundle(built.seal(), base=built.base)
    size = sizes(bundle)
    bundle.keys("t")
    tables = bundle.bytes_read
    assert tables == (tmp_path / layout.MANIFEST).stat().st_size + sum(
        size[path] for path in ("base.json", "groups/g0001/group.json", "tasks/t/task.json")
    )
    task = bundle._files.task("t")
    signed = task.tensor("signed")
    part = bundle._range("t", "signed", CHUNK_NUMEL + 1, CHUNK_NUMEL + 3)
    assert part.shape == (2,)
    due = 4 * (1031 * 1021 - CHUNK_NUMEL)  # the base's second chunk
    for owner, payload in ((task, signed.fields), (task.group, task.group.vector("signed", "merged").values)):
        shard = owner.shards[payload.shard]
        path = tmp_path / owner.directory / shard.file
        with contextlib.closing(LocalFile(path, "shard")) as file:
            reader = ShardReader(file, shard)
            end = reader._ends.tolist()
        # The header's length is read once more, before the header.
        due += 8 + payload_start(path) + len(end) * RECORD_NBYTES + end[payload.at + 1] - end[payload.at]
        if owner is task.group:
            due += end[shard.pool.at]  # the steps, which are in the pool, which is one chunk
    assert bundle.bytes_read - tables == due


def test_a_chunk_of_the_base_is_read_whole_only_while_it_is_unverified(built):
    bundle = tallstore.open_bundle(built.root)
    read = []
    for _ in range(2):
        before = bundle.bytes_read
        bundle._range("little", "embed", 0, 1)
        read.append(bundle.bytes_read - before)
    assert read[0] > 35 * 4
    assert read[1] == 4


def damage(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("shard", ["tasks/every-thing/mask", "tasks/every-thing/private", "groups/g0001/merged"])
def test_a_flipped_bit_is_found_on_first_read_unless_told_otherwise(tmp_path, shard):
    built = build(tmp_path / "bundle", codec="raw")
    built.seal()
    path = built.root / f"{shard}-00001-of-00001.safetensors"
    key = {"mask": "fields/embed", "private": "values/classifier", "merged": "merged/scale"}[shard.rpartition("/")[2]]
    damage(path, parse_header(path.read_bytes(), path.stat().st_size).tensors[key].start)
    for verify in ("first-read", "always"):
        with pytest.raises(tallstore.IntegrityError, match=shard) as caught:
            tallstore.open_bundle(built.root, verify=verify).state_dict("Every thing")
        assert caught.value.rule == "IDX-3"
    state = tallstore.open_bundle(built.root, verify="never").state_dict("Every thing")
    assert any(not same_bits(state[name], tensor) for name, tensor in expect(built).items())


def test_what_was_written_to_after_it_was_read_is_verified_again(tmp_path):
    built = build(tmp_path / "bundle", codec="raw")
    built.seal()
    bundles = {verify: tallstore.open_bundle(built.root, verify=verify) for verify in ("first-read", "always", "never")}
    for bundle in bundles.values():
        bundle.state_dict("Every thing")
    path = built.root / "tasks/every-thing/private-00001-of-00001.safetensors"
    damage(path, payload_start(path))
    bundles["never"].state_dict("Every thing")
    for verify in ("first-read", "always"):
        with pytest.raises(tallstore.IntegrityError, match="IDX-3"):
            bundles[verify].state_dict("Every thing")


def test_a_verify_that_is_none_is_refused(built):
    with pytest.raises(tallstore.OptionError, match="verify is 'sometimes'"):
        tallstore.open_bundle(built.root, verify="sometimes")


@pytest.mark.parametrize("path", ["base.json", "groups/g0001/group.json", "tasks/little/task.json"])
def test_a_changed_table_is_refused(built, path):
    damage(built.root / path, -3)
    with pytest.raises(tallstore.IntegrityError, match=path) as caught:
        tallstore.open_bundle(built.root).keys("little")
    assert caught.value.rule == "FILE-2"
    with (built.root / path).open("ab") as file:
        file.write(b" ")
    with pytest.raises(tallstore.IntegrityError, match=path) as caught:
        tallstore.open_bundle(built.root).keys("little")
    assert caught.value.rule == "FILE-1"


# --- the base ---


def test_a_base_is_given_as_a_path_or_a_state_dict(tmp_path):
    built = build(tmp_path / "bundle", embed=False)
    built.seal()
    path = tmp_path / "base.safetensors"
    save_file(dict(built.base), path)
    for base in (path, str(path), dict(built.base), {"model": dict(built.base)}):
        assert_same(tallstore.open_bundle(built.root, base=base).state_dict("Every thing"), expect(built))


def test_a_given_base_takes_precedence_over_the_embedded_one(built):
    shutil.rmtree(built.root / "base")
    assert_same(tallstore.open_bundle(built.root, base=built.base).state_dict("Every thing"), expect(built))


def test_a_base_that_is_nowhere_is_asked_for(tmp_path):
    built = build(tmp_path / "bundle", embed=False)
    bundle = tallstore.open_bundle(built.seal())
    assert bundle.keys("little")
    assert torch.equal(bundle.tensor("little", "conv"), expect(built, 1)["conv"])  # private: needs no base
    with pytest.raises(tallstore.BaseMissingError, match="base="):
        bundle.state_dict("little")


def test_a_pinned_base_is_opened_by_its_commit(tmp_path, monkeypatch):
    built = build(tmp_path / "bundle", embed=False, repo_id="org/name")
    asked = []

    def open_hub_checkpoint(repo_id, revision, access):
        asked.append((repo_id, revision))
        return open_checkpoint(built.base)

    monkeypatch.setattr(pinned_base, "open_hub_checkpoint", open_hub_checkpoint)
    assert_same(tallstore.open_bundle(built.seal()).state_dict("Every thing"), expect(built))
    assert asked == [("org/name", None)]


@pytest.mark.parametrize(("given", "problem"), [({}, "is missing"), ({"empty": torch.zeros(3, 0)}, r"\[3, 0\]")])
def test_a_tensor_without_elements_must_be_in_the_base_too(tmp_path, given, problem):
    base = {"w": torch.randn(64, 64), "empty": torch.zeros(0, 3)}
    tallstore.pack(
        base, {"t": {**base, "w": base["w"] + 0.01 * torch.randn(64, 64)}}, tmp_path / "bundle", method=tallstore.Sign()
    )
    with tallstore.open_bundle(tmp_path / "bundle", base={"w": base["w"], **given}) as bundle:
        model = torch.nn.Module()
        model.register_buffer("empty", torch.zeros(0, 3))
        for load in (lambda: bundle.tensor("t", "empty"), lambda: bundle.attach(model, strict=False).set_expert("t")):
            with pytest.raises(tallstore.BaseMismatchError, match=problem):
                load()


@pytest.mark.parametrize(
    ("change", "rule", "problem"),
    [
        ({"embed": None}, "BASE-1", "is missing"),
        ({"embed": weights(1, (7, 5), torch.bfloat16)}, "BASE-1", r"is BF16 \[7, 5\], where F32 \[7, 5\] is due"),
        ({"embed": weights(1, (5, 7))}, "BASE-1", r"is F32 \[5, 7\]"),
        ({"embed": weights(11, (7, 5))}, "BASE-2", "has other values"),
    ],
)
def test_another_base_is_refused_by_the_tensor_that_differs(built, change, rule, problem):
    base = {name: change.get(name, tensor) for name, tensor in built.base.items()}
    bundle = tallstore.open_bundle(built.root, base={name: t for name, t in base.items() if t is not None})
    with pytest.raises(tallstore.BaseMismatchError, match=f"a state dict: tensor 'embed' {problem}") as caught:
        bundle.state_dict("little")
    assert (caught.value.rule, caught.value.tensor) == (rule, "embed")


def test_one_flipped_bit_of_the_base_is_found_unless_told_otherwise(built):
    damage(built.root / "base" / "model.safetensors", -1)
    with pytest.raises(tallstore.BaseMismatchError):
        tallstore.open_bundle(built.root).state_dict("Every thing")
    tallstore.open_bundle(built.root, verify="never").state_dict("Every thing")


def test_a_missing_or_shortened_embedded_base_is_named(built):
    path = built.root / "base" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(tallstore.IntegrityError, match=r"base/model.safetensors.*FILE-1"):
        tallstore.open_bundle(built.root).state_dict("little")
    path.unlink()
    with pytest.raises(tallstore.FormatError, match=r"base/model.safetensors.*FILE-4"):
        tallstore.open_bundle(built.root).state_dict("little")


def test_tied_tensors_of_the_base_are_found_under_either_name(tmp_path):
    """base.json has both names; a file of the base has one of them, whichever its writer kept."""
    embed = weights(1, (7, 5))
    base = {"embed": embed, "head": embed, "norm": weights(2, (5,))}
    group = Group(tmp_path, base)
    for name in ("embed", "head"):
        group.vector(name, "F16", numbers("F16", len(name), 35))
    task = Task(group, "t")
    task.signed("embed", sides(1, 35))
    task.mask("head", sides(2, 35, 0))
    task.same("norm")
    built = Bundle(tmp_path, base, [group], [task], base_aliases={"head": "embed"})
    built.seal()
    for given in (None, base, {"embed": embed, "norm": base["norm"]}, {"head": embed, "norm": base["norm"]}):
        assert_same(tallstore.open_bundle(tmp_path, base=given).state_dict("t"), task.expected)


# --- names, and what is not there ---


def test_unknown_names_suggest_the_nearest(built):
    bundle = tallstore.open_bundle(built.root)
    with pytest.raises(tallstore.UnknownTaskError, match="did you mean 'little'"):
        bundle.keys("litle")
    with pytest.raises(tallstore.UnknownTaskError):
        bundle.is_fetched("litle")
    with pytest.raises(
        tallstore.UnknownTensorError, match="task 'little': no tensor named 'embedd'; did you mean 'embed'"
    ):
        bundle.tensor("little", "embedd")
    with pytest.raises(tallstore.UnknownTensorError):
        bundle.tensor("little", "bias")  # dropped


def test_a_task_that_was_not_fetched_says_how_to_fetch_it(built):
    shutil.rmtree(built.root / "tasks" / "every-thing")
    bundle = tallstore.open_bundle(built.root)
    assert not bundle.is_fetched("Every thing")
    assert bundle.is_fetched("little")
    with pytest.raises(tallstore.NotFetchedError, match=r"task 'Every thing' was not fetched.*copy its files"):
        bundle.keys("Every thing")
    assert_same(bundle.state_dict("little"), expect(built, 1))


def test_a_task_without_a_shard_was_not_fetched_either(built):
    (built.root / "tasks/little/private-00001-of-00001.safetensors").unlink()
    bundle = tallstore.open_bundle(built.root)
    assert not bundle.is_fetched("little")
    with pytest.raises(tallstore.NotFetchedError, match="private-00001"):
        bundle.state_dict("little")


def test_a_missing_file_of_the_group_or_the_base_is_a_fault(built):
    for path in ("groups/g0001/merged-00001-of-00001.safetensors", "base.json", "groups/g0001/group.json"):
        (built.root / path).unlink()
        with pytest.raises(tallstore.FormatError, match=rf"{path}: is missing.*FILE-4"):
            tallstore.open_bundle(built.root).state_dict("Every thing")


def test_a_symbolic_link_is_not_followed(built, tmp_path):
    path = built.root / "tasks/little/task.json"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    bundle = tallstore.open_bundle(built.root)
    assert not bundle.is_fetched("little")
    with pytest.raises(tallstore.FormatError, match="PATH-2"):
        bundle.keys("little")


def test_no_bundle_there(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(tallstore.BundleNotFoundError, match=r"no tallstore\.json"):
            tallstore.open_bundle(path)


# --- many readers, many files ---


def test_several_threads_read_the_same(built):
    bundle, states = tallstore.open_bundle(built.root), []

    def load(task):
        states.extend((task, bundle.state_dict(task)) for _ in range(3))

    threads = [threading.Thread(target=load, args=(task,)) for task in bundle.tasks * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(states) == 18
    for task, state in states:
        assert_same(state, expect(built, bundle.tasks.index(task)))


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files as Linux lists them")
def test_few_files_stay_open_and_close_gives_them_back(built, monkeypatch):
    monkeypatch.setattr(bundle_files, "_MAX_OPEN_SHARDS", 1)
    gc.collect()
    before = open_files()
    bundle = tallstore.open_bundle(built.root)
    for number, task in enumerate(bundle.tasks):
        assert_same(bundle.state_dict(task), expect(built, number))
        assert open_files() <= before + 1
    bundle.close()
    assert open_files() == before
    assert_same(bundle.state_dict("little"), expect(built, 1))  # opens what it needs again
    del bundle
    gc.collect()
    assert open_files() == before


def test_repr_says_what_it_is(built):
    text = repr(tallstore.open_bundle(built.root))
    assert text.startswith(f"<Bundle '{built.root}': 2 tasks (Every thing, little), ")
    assert text.endswith("kB>")
