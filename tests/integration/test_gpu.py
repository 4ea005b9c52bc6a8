"""On a GPU: every form bit for bit as on the CPU, through the real ring of pinned buffers, streams and kernels.

Where no GPU is there, these are skipped; `tests/unit/test_decode_triton.py` and `test_device_expert.py` try the same on
the CPU.
"""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint

import tallstore
from tallstore.distributed import BundleStorageReader
from tallstore.loading import decode_torch, device_expert, device_memory, sending
from tallstore.loading.device_decoders import computes_exactly, decoder_for
from tallstore.loading.device_expert import DeviceExpert
from tallstore.loading.staging import CudaStaging, staging_for
from tests.device_cases import (
    NARROW,
    differing,
    remembered,
    write_bundle,
    write_copies,
    write_large,
    write_unmoved,
)
from tests.reference import same_bits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

PAIRS = list(itertools.product(NARROW.values(), repeat=2))
KINDS = ("mask", "signed", "two-level", "sign", "sparse", "uniform")


@pytest.fixture
def device():
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(params=["decode_triton", "decode_torch"])
def decode(request, monkeypatch):
    """Each decoder that a GPU may take."""
    if request.param == "decode_torch":
        for module in (device_expert, device_memory):
            monkeypatch.setattr(module, "decoder_for", lambda _device: decode_torch.decode)
    else:
        pytest.importorskip("triton")
        assert decoder_for(torch.device("cuda", 0)).__module__.endswith("decode_triton")
    return request.param


def on_cpu(tensors):
    """Copied from the device, after what it was given is done."""
    return {name: tensor.cpu() for name, tensor in tensors.items()}


# --- the numbers ---


def test_both_decoders_compute_exactly(device):
    decode_triton = pytest.importorskip("tallstore.loading.decode_triton")
    assert computes_exactly(decode_triton.decode, device)
    assert computes_exactly(decode_torch.decode, device)


@pytest.mark.parametrize(("base", "result"), PAIRS, ids=str)
@pytest.mark.usefixtures("decode")
def test_every_form_is_the_reference(tmp_path, base, result):
    turn = PAIRS.index((base, result))
    built = write_bundle(tmp_path / "bundle", base, result, turn)
    with tallstore.open_bundle(built.seal()) as bundle:
        for wanted in (None, base):
            found = bundle.state_dict("t", device="cuda", dtype=wanted)
            assert {tensor.device.type for tensor in found.values()} == {"cuda"}
            expected = {name: t.to(wanted or t.dtype) for name, t in built.tasks[0].expected.items()}
            assert differing(on_cpu(found), expected) == []


@pytest.mark.usefixtures("decode")
def test_copies_keep_every_bit(tmp_path):
    built = write_copies(tmp_path / "bundle")
    expected = built.tasks[0].expected
    moved = {"F16", "F32", "cast", "wide"}  # what is added to a NaN, or cast, is a NaN of any payload
    with tallstore.open_bundle(built.seal()) as bundle:
        found = on_cpu(bundle.state_dict("t", device="cuda"))
    assert [name for name in found if name not in moved and not same_bits(found[name], expected[name])] == []
    assert differing(found, expected) == []


@pytest.mark.parametrize("dtype", NARROW.values(), ids=str)
@pytest.mark.usefixtures("decode")
def test_where_nothing_is_added_the_base_keeps_every_bit(tmp_path, dtype):
    built = write_unmoved(tmp_path / "bundle", dtype)
    with tallstore.open_bundle(built.seal()) as bundle:
        found = on_cpu(bundle.state_dict("t", device="cuda"))
    assert [name for name, tensor in found.items() if not same_bits(tensor, built.base[name])] == []


@pytest.mark.usefixtures("decode")
def test_tensors_of_several_chunks_go_through_a_small_ring(tmp_path, monkeypatch):
    """Every buffer is used many times over while the device is at work."""
    monkeypatch.setattr(sending, "_BATCH_NBYTES", 4 << 20)
    with tallstore.open_bundle(write_large(tmp_path / "bundle", KINDS).seal()) as bundle:
        expected = bundle.state_dict("t")
        for _ in range(5):
            found = on_cpu(bundle.state_dict("t", device="cuda"))
            assert [name for name, tensor in expected.items() if not same_bits(found[name], tensor)] == []


@pytest.mark.parametrize(("base", "result"), PAIRS[::4], ids=str)
@pytest.mark.usefixtures("decode")
def test_every_form_is_the_reference_from_what_is_kept_on_the_device(tmp_path, base, result, device):
    built = write_bundle(tmp_path / "bundle", base, result, 5)
    found = remembered(built.seal(), device_memory.decoder_for(device), device)
    assert differing(on_cpu(found), built.tasks[0].expected) == []


# --- the ways in ---


@pytest.fixture
def packed(tmp_path):
    """Base, two experts and their bundle, as people make them; odd shapes among them."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"embed.weight": (700, 96), "layer.weight": (384, 96), "layer.bias": (384,), "norm.weight": (96,)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    base["steps"] = torch.tensor(3)
    experts = {}
    for task in ("one", "two"):
        experts[task] = {
            name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in base.items()
        }
        experts[task]["head.weight"] = torch.randn(5, 96, generator=generator)
    tallstore.pack(base, experts, tmp_path / "bundle")
    with tallstore.open_bundle(tmp_path / "bundle", base=base) as bundle:
        yield bundle, base


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.usefixtures("decode")
def test_distributed_checkpoints_are_loaded_onto_it(tmp_path):
    """What is whole and contiguous is rebuilt there, the rest comes by way of the CPU."""
    with tallstore.open_bundle(write_large(tmp_path / "bundle", KINDS).seal()) as bundle:
        expected = bundle.state_dict("t")
        for turned in (False, True):
            weights = {
                name: torch.zeros(tensor.shape[::-1], dtype=tensor.dtype, device="cuda").T
                if turned and tensor.ndim == 2
                else torch.zeros(tensor.shape, dtype=tensor.dtype, device="cuda")
                for name, tensor in expected.items()
            }
            checkpoint.load(weights, storage_reader=BundleStorageReader(bundle, "t"), no_dist=True)
            found = on_cpu(weights)
            assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(700, 96)
        self.layer = nn.Linear(96, 384)
        self.norm = nn.RMSNorm(96)
        self.head = nn.Linear(96, 5, bias=False)
        self.register_buffer("steps", torch.tensor(0))


def holds(model, expected):
    return all(same_bits(tensor.cpu(), expected[name].to(tensor.dtype)) for name, tensor in model.state_dict().items())


@pytest.mark.usefixtures("decode")
def test_every_way_to_load_gives_what_the_cpu_gives(packed):
    bundle, _ = packed
    expected = bundle.state_dict("one")
    assert all(same_bits(tensor.cpu(), expected[name]) for name, tensor in bundle.items("one", device="cuda"))
    for name, tensor in expected.items():
        assert same_bits(bundle.tensor("one", name, device="cuda").cpu(), tensor), name
    narrow, narrow_cpu = (bundle.state_dict("one", device=where, dtype=torch.bfloat16) for where in ("cuda", "cpu"))
    assert all(same_bits(narrow[name].cpu(), tensor) for name, tensor in narrow_cpu.items())
    model = Net().cuda()
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    versions = model.layer.weight._version
    assert bundle.load_into(model, "one") == ([], [])
    assert holds(model, expected)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == places
    assert model.layer.weight._version > versions


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("decode")
def test_a_model_switches_in_place_without_drift(packed, dtype, on_device):
    bundle, base = packed
    experts = {task: bundle.state_dict(task) for task in ("one", "two")}
    model = Net().cuda().to(dtype)
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    switcher = bundle.attach(model, on_device=on_device)
    for task in itertools.islice(itertools.cycle(experts), 20):
        switcher.set_expert(task)
        assert holds(model, experts[task])
    switcher.prefetch("one").result()
    with switcher.using("one"):
        assert holds(model, experts["one"])
    with switcher.disable_expert():
        assert torch.equal(model.layer.weight.cpu(), base["layer.weight"].to(dtype))
    assert holds(model, experts["two"])
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == places
    assert bool(switcher.device_nbytes) == on_device


def test_a_model_split_between_gpu_and_cpu_switches(packed):
    bundle, _ = packed
    model = Net()
    model.layer.cuda()
    switcher = bundle.attach(model, on_device=True)
    for task in ("one", "two"):
        switcher.set_expert(task)
        assert holds(model, bundle.state_dict(task))
    assert model.layer.weight.is_cuda
    assert not model.embed.weight.is_cuda


def test_a_compiled_or_captured_model_sees_each_switch(packed):
    """A CUDA graph holds addresses: a switch must write to them."""
    bundle, _ = packed
    model = Net().cuda().requires_grad_(False)
    switcher = bundle.attach(model)
    switcher.set_expert("one")
    tokens = torch.arange(0, 700, 7, device="cuda")

    def forward():
        return model.layer(model.norm(model.embed(tokens)))

    forward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = forward()
    for task in ("two", "one", "two"):
        switcher.set_expert(task)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(output, forward()), task
        assert holds(model, bundle.state_dict(task))


def test_a_switch_that_fails_halfway_leaves_the_old_expert(packed, monkeypatch):
    bundle, _ = packed
    model = Net().cuda()
    switcher = bundle.attach(model)
    switcher.set_expert("one")
    write, calls = DeviceExpert.write, []

    def failing(expert, destinations):
        write(expert, destinations)
        calls.append(expert)
        if len(calls) == 1:
            raise RuntimeError("the device is lost")

    monkeypatch.setattr(DeviceExpert, "write", failing)
    with pytest.raises(RuntimeError, match="the device is lost"):
        switcher.set_expert("two")
    assert switcher.active_expert == "one"
    assert holds(model, bundle.state_dict("one"))


# --- streams, threads, memory, errors ---


def test_work_is_ordered_by_the_callers_stream(packed):
    """What is read on the stream that loaded is whole; freed memory is not written to by a later load."""
    bundle, _ = packed
    expected = bundle.state_dict("one")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(20):
            spare = torch.full((700, 96), 7.0, device="cuda")
            total = spare.sum()
            del spare
            found = bundle.state_dict("one", device="cuda")
            copies = {name: tensor.clone() for name, tensor in found.items()}
            del found
            assert total.item() == 7.0 * 700 * 96
    stream.synchronize()
    assert all(same_bits(copies[name].cpu(), tensor) for name, tensor in expected.items())


def test_threads_load_at_once(packed):
    bundle, _ = packed
    expected = {task: bundle.state_dict(task) for task in ("one", "two")}

    def load(turn):
        task = ("one", "two")[turn % 2]
        found = bundle.state_dict(task, device="cuda")
        return all(same_bits(found[name].cpu(), tensor) for name, tensor in expected[task].items())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(load, range(40)))


def test_memory_on_the_device_is_the_result_and_the_ring(tmp_path):
    base = {"weight": torch.randn(4096, 4096, generator=torch.Generator().manual_seed(1))}
    experts = {task: {"weight": base["weight"] + 0.01 * number} for number, task in enumerate("ab", 1)}
    tallstore.pack(base, experts, tmp_path / "bundle")
    with tallstore.open_bundle(tmp_path / "bundle", base=base) as bundle:
        bundle.state_dict("a", device="cuda")  # kernels are compiled
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = bundle.state_dict("a", device="cuda")
        peak = torch.cuda.max_memory_allocated() - before
    assert found["weight"].nbytes == 64 << 20
    assert peak <= (64 << 20) + 4 * (32 << 20)


def test_the_ring_is_pinned_and_copies_beside_the_work(device):
    ring = staging_for(device)
    assert isinstance(ring, CudaStaging)
    for turn in range(9):
        slot = ring.slot(1 << 20)
        assert slot.host.is_pinned()
        slot.host[: 1 << 20] = turn
        staged = ring.send(slot, 1 << 20)
        total = staged.to(torch.int64).sum()
        ring.release(slot)
        assert total.item() == turn << 20


def test_changed_bytes_are_an_error_and_not_a_tensor(tmp_path):
    root = write_large(tmp_path / "bundle", ("mask",)).seal()
    path = next(path for path in root.rglob("*.safetensors") if "mask-00001" in path.name)
    with path.open("r+b") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(path.read_bytes()[8:start])
        name = next(name for name in header if name.rpartition("/")[2] == "mask")
        file.seek(start + sum(header[name]["data_offsets"]) // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    with tallstore.open_bundle(root) as bundle:
        with pytest.raises(tallstore.IntegrityError):
            bundle.state_dict("t", device="cuda")
        assert bundle.tensor("t", "first", device="cuda").tolist() == [1.0, 2.0, 3.0]
