"""device_memory, device_writes: what is kept packed on a device, decoded on the CPU as if that were another one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import tallstore
from tallstore.loading import decode_torch, device_expert, device_memory, device_writes, model_weights, model_writer
from tallstore.loading.contents import OfBase
from tallstore.loading.device_memory import DeviceMemory
from tallstore.loading.device_pieces import Opener
from tests.bundle_builder import Bundle, Group, Task
from tests.device_cases import NARROW, Net, differing, holds, remembered, write_bundle, write_large, write_net
from tests.reference import same_bits

CPU = torch.device("cpu")
KINDS = ("mask", "signed", "two-level", "sign", "sparse", "uniform")


# --- the numbers ---


@pytest.mark.parametrize(("base", "result"), [("F32", "BF16"), ("BF16", "F32"), ("F16", "F16")])
def test_every_form_is_the_reference(tmp_path, base, result):
    built = write_bundle(tmp_path / "bundle", NARROW[base], NARROW[result], 3)
    found = remembered(built.seal(), decode_torch.decode)
    assert found.keys() == built.tasks[0].expected.keys()
    assert differing(found, built.tasks[0].expected) == []


def test_tensors_of_several_chunks(tmp_path):
    root = write_large(tmp_path / "bundle", KINDS).seal()
    found = remembered(root, decode_torch.decode)
    with tallstore.open_bundle(root) as bundle:
        assert [name for name, tensor in bundle.items("t") if not same_bits(found[name], tensor)] == []


# --- what is kept ---


def write_groups(root):
    """Tasks "a" and "b" of one group, "c" of another one; over one base of 5,000 float32 elements."""
    random = np.random.default_rng(5)
    base = {"w": torch.from_numpy(random.standard_normal(5000)).float()}
    groups, tasks = [], []
    for number, names in enumerate(("ab", "c"), 1):
        group = Group(root, base, number)
        group.vector("w", "I8", random.integers(-127, 128, 5000), steps=[0.5])
        groups.append(group)
        for name in names:
            task = Task(group, name)
            task.mask("w", random.integers(0, 2, 5000))
            tasks.append(task)
    return Bundle(root, base, groups, tasks)


BLOCKS = 5 * 1024  # elements, in whole blocks
BASE, VECTOR = 4 * BLOCKS, BLOCKS


@pytest.fixture
def groups(tmp_path):
    with tallstore.open_bundle(write_groups(tmp_path / "bundle").seal()) as bundle:
        yield bundle


def hold(memory, bundle, task, keep):
    target = torch.zeros(5000)
    opener = Opener(bundle._expert(task).task, bundle._files, bundle._pinned())
    memory.hold(opener, {"w": target}, keep)
    return target


def test_tasks_of_a_group_share_the_base_and_its_vectors(groups):
    memory = DeviceMemory(CPU, decode_torch.decode, 1 << 30)
    first, read = hold(memory, groups, "a", {"a"}), groups.bytes_read
    own = memory.nbytes - BASE - VECTOR
    assert 5000 / 8 < own < 2048
    second = hold(memory, groups, "b", {"b"})
    assert memory.nbytes == BASE + VECTOR + 2 * own
    assert groups.bytes_read - read < 5000  # a mask, tables and hashes; neither the base nor the vector
    hold(memory, groups, "c", {"c"})
    assert memory.nbytes == BASE + 2 * VECTOR + 3 * own
    for task, target in (("b", second), ("a", first)):
        memory.write(task)
        assert same_bits(target, groups.tensor(task, "w"))


def test_beyond_the_bound_the_task_that_was_used_last_stays_and_the_vectors_that_it_needs(groups):
    memory = DeviceMemory(CPU, decode_torch.decode, 0)
    first = hold(memory, groups, "a", {"a"})
    own = memory.nbytes - BASE - VECTOR
    second = hold(memory, groups, "b", {"a", "b"})  # neither may go
    assert memory.nbytes == BASE + VECTOR + 2 * own
    assert memory.holds("a", {"w": first})
    hold(memory, groups, "c", {"c"})
    assert memory.nbytes == BASE + VECTOR + own
    assert not memory.holds("a", {"w": first})
    assert not memory.holds("b", {"w": second})


def test_another_target_is_packed_anew(groups):
    memory = DeviceMemory(CPU, decode_torch.decode, 1 << 30)
    first, nbytes = hold(memory, groups, "a", {"a"}), memory.nbytes
    second = hold(memory, groups, "a", {"a"})
    assert memory.nbytes == nbytes
    assert not memory.holds("a", {"w": first})
    memory.write("a")
    assert not first.any()
    assert same_bits(second, groups.tensor("a", "w"))


def test_tensors_of_the_base_are_cast_on_their_way(groups):
    memory, target = DeviceMemory(CPU, decode_torch.decode, 0), torch.zeros(5000, dtype=torch.bfloat16)
    writes = [(target, OfBase(groups._files.base["w"], torch.float16))]
    memory.hold_base(groups._pinned(), writes)
    assert memory.nbytes == BASE
    memory.write_base(groups._pinned(), writes)
    assert same_bits(target, groups._pinned().read("w", 0, 5000).to(torch.float16).to(torch.bfloat16))


def test_too_little_memory_is_an_error_that_says_so(groups, monkeypatch):
    memory, empty = DeviceMemory(CPU, decode_torch.decode, 0), torch.empty

    def full(*shape, **options):
        if options.get("dtype") == torch.uint8:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(tallstore.OptionError, match=r"^cpu lacks the memory .* attach the model without on_device$"):
        hold(memory, groups, "a", {"a"})
    assert memory.nbytes == 0


def test_a_fault_of_the_bundle_leaves_nothing_behind(groups):
    path = next(path for path in groups.path.rglob("merged-*.safetensors") if "g0001" in str(path))
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    first, last = max(spans, key=lambda span: span[1] - span[0])
    raw[start + (first + last) // 2] ^= 1
    path.write_bytes(raw)
    memory = DeviceMemory(CPU, decode_torch.decode, 1 << 30)
    with pytest.raises(tallstore.IntegrityError):
        hold(memory, groups, "a", {"a"})
    assert memory.nbytes == 0
    hold(memory, groups, "c", {"c"})


# --- models ---


@pytest.fixture
def kept(monkeypatch):
    """Models' contiguous tensors are taken for those of another device; the tasks that were decoded from its memory."""
    written = []
    write = DeviceMemory.write
    monkeypatch.setattr(DeviceMemory, "write", lambda memory, task: written.append(task) or write(memory, task))
    for module in (device_expert, device_memory):
        monkeypatch.setattr(module, "decoder_for", lambda _device: decode_torch.decode)
    for module in (model_weights, model_writer, device_writes):
        monkeypatch.setattr(module, "is_sent", lambda target: target.is_contiguous())
    for module in (model_weights, model_writer):
        monkeypatch.setattr(module, "is_direct", lambda _target: False)
    return written


@pytest.fixture
def net(tmp_path):
    built = write_net(tmp_path / "bundle")
    with tallstore.open_bundle(built.seal()) as bundle:
        yield bundle, built.base


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_a_switch_reads_nothing_once_the_tasks_are_kept(net, kept, limit):
    bundle, base = net
    experts = {task: bundle.state_dict(task) for task in ("a", "b")}
    model = Net()
    switcher = bundle.attach(model, cache_nbytes=limit, on_device=True)
    assert switcher.device_nbytes == 0
    switcher.set_expert("a")
    first = switcher.device_nbytes
    switcher.set_expert("b")
    read, nbytes = bundle.bytes_read, switcher.device_nbytes
    assert first > 0
    assert (nbytes == first) == (limit == 0)
    for task in ("a", "b", "a"):
        kept.clear()
        switcher.set_expert(task)
        assert kept == [task]
        assert holds(model, experts[task])
    assert bundle.bytes_read == read or not limit
    assert switcher.device_nbytes == nbytes
    with switcher.disable_expert():
        assert holds(model, base)
    assert holds(model, experts["a"])


def test_a_model_whose_memory_moved_is_written_where_it_is(net, kept):
    bundle, _ = net
    model = Net()
    switcher = bundle.attach(model, on_device=True)
    switcher.set_expert("a")
    old = model.layer.weight.detach()
    model.layer.weight = torch.nn.Parameter(torch.zeros(3, 40), requires_grad=False)
    switcher.set_expert("b")
    assert holds(model, bundle.state_dict("b"))
    assert same_bits(old, bundle.tensor("a", "layer.weight"))
    assert kept == ["a", "b"]


def test_what_was_written_to_by_others_is_written_again(net, kept):
    bundle, _ = net
    model = Net().requires_grad_(requires_grad=False)
    switcher = bundle.attach(model, on_device=True)
    switcher.set_expert("a")
    model.narrow.zero_()
    switcher.set_expert("a")
    assert holds(model, bundle.state_dict("a"))
    assert kept == ["a", "a"]


def test_a_switch_that_fails_is_undone(net, kept, monkeypatch):
    bundle, _ = net
    model = Net()
    switcher = bundle.attach(model, on_device=True)
    switcher.set_expert("a")
    write, failures = DeviceMemory.write, ["lost"]

    def failing(memory, task):
        write(memory, task)
        if failures:
            raise RuntimeError(failures.pop())

    monkeypatch.setattr(DeviceMemory, "write", failing)
    with pytest.raises(RuntimeError, match="lost"):
        switcher.set_expert("b")
    assert switcher.active_expert == "a"
    assert holds(model, bundle.state_dict("a"))
    assert kept


def test_without_it_nothing_is_kept(net, kept):
    bundle, _ = net
    switcher = bundle.attach(Net())
    switcher.set_expert("a")
    assert switcher.device_nbytes == 0
    assert kept == []


def test_a_model_on_the_cpu_keeps_nothing_there(net):
    bundle, _ = net
    model = Net()
    switcher = bundle.attach(model, on_device=True)
    switcher.set_expert("a")
    assert switcher.device_nbytes == 0
    assert holds(model, bundle.state_dict("a"))
