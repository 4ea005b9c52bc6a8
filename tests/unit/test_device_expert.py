"""device_expert: batches reach the device through the ring, what it cannot rebuild comes from the CPU."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
import torch

import tallstore
from tallstore.loading import (
    decode_torch,
    device_decoders,
    device_expert,
    model_weights,
    model_writer,
    sending,
    staging,
)
from tallstore.loading.device_decoders import computes_exactly, decoder_for
from tallstore.loading.device_expert import DeviceExpert
from tallstore.loading.packed import BLOCK_NUMEL, Batch, Form, Piece, Rows
from tallstore.loading.staging import CudaStaging, PlainStaging, staging_for
from tests.bundle_builder import Bundle, Group, Task
from tests.device_cases import LARGE, Net, holds, on_device, write_bundle, write_copies, write_large, write_net
from tests.reference import same_bits

CPU = torch.device("cpu")


class Counting:
    """The torch decoder, and what it was given."""

    def __init__(self):
        self.groups = []

    def __call__(self, packed):
        self.groups.append((packed.form, len(packed.destinations)))
        decode_torch.decode(packed)


# --- which way a tensor takes ---


def test_narrow_floats_and_copies_are_rebuilt_on_the_device_and_the_rest_on_the_cpu(tmp_path, monkeypatch):
    built = write_copies(tmp_path / "bundle")
    with tallstore.open_bundle(built.seal()) as bundle:
        expert, expected = on_device(bundle, Counting()), bundle.state_dict("t")
        rebuilt = []
        tensor = expert._expert.tensor
        monkeypatch.setattr(expert._expert, "tensor", lambda name, dtype: rebuilt.append(name) or tensor(name, dtype))
        found = expert.tensors(bundle.keys("t"))
        assert rebuilt == ["wide"]  # a float64 that is cast
        rebuilt.clear()
        cast = expert.tensors(bundle.keys("t"), torch.float64)
        assert "own.F32" in rebuilt
        assert not {"ids", "flags", "complex", "F64"} & set(rebuilt)
    exact = {name: tensor for name, tensor in expected.items() if not tensor.isnan().any()}
    assert all(same_bits(found[name], tensor) for name, tensor in exact.items())
    assert cast["own.F16"].dtype == torch.float64
    assert cast["count"].item() == -7


def test_without_a_decoder_the_cpu_rebuilds_everything(tmp_path):
    built = write_bundle(tmp_path / "bundle", torch.float32, torch.bfloat16)
    with tallstore.open_bundle(built.seal()) as bundle:
        found = on_device(bundle, None).tensors(bundle.keys("t"))
        expected = bundle.state_dict("t")
    assert all(torch.equal(found[name].nan_to_num(7), tensor.nan_to_num(7)) for name, tensor in expected.items())


def test_a_dtype_that_the_device_lacks_is_refused(tmp_path, monkeypatch):
    built = write_copies(tmp_path / "bundle")
    empty = torch.empty

    def without_float64(*shape, dtype=None, **options):
        if dtype == torch.float64 and isinstance(options["device"], torch.device):  # the CPU is a string
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype\nand more")
        return empty(*shape, dtype=dtype, **options)

    with tallstore.open_bundle(built.seal()) as bundle:
        expert = on_device(bundle, decode_torch.decode)
        monkeypatch.setattr(torch, "empty", without_float64)
        assert expert.tensor("F64", torch.float32).dtype == torch.float32
        with pytest.raises(tallstore.OptionError, match=r"^tensor 'F64' is F64 on cpu: Cannot convert .* dtype$"):
            expert.tensor("F64")


# --- batches ---


def write_small(root, count):
    """Many small tensors, most of them coded alike."""
    random = np.random.default_rng(1)
    base = {f"{number:03}": torch.from_numpy(random.standard_normal((3, 40))).float() for number in range(count)}
    group = Group(root, base)
    task = Task(group, "t")
    for number, name in enumerate(base):
        if number % 5:
            group.vector(name, "LOG4", random.integers(0, 16, 120), steps=[0.5, 1.0, 2.0])
            task.signed(name, random.integers(-1, 2, 120), expect=False)
        else:
            task.private(name, base[name] + 1)
    return Bundle(root, base, [group], [task])


def test_hundreds_of_small_tensors_are_decoded_together(tmp_path):
    root = write_small(tmp_path / "bundle", 300).seal()
    decode = Counting()
    with tallstore.open_bundle(root) as bundle:
        found, expected = on_device(bundle, decode).tensors(bundle.keys("t")), bundle.state_dict("t")
    assert sorted((form.kind, count) for form, count in decode.groups) == [("same", 60), ("signed", 240)]
    assert all(same_bits(found[name], tensor) for name, tensor in expected.items())


def test_batches_keep_to_their_bound_and_a_ring_is_used_again(tmp_path, monkeypatch):
    root = write_large(tmp_path / "bundle", ("mask", "sparse")).seal()
    sizes, rings = [], []
    monkeypatch.setattr(sending, "_BATCH_NBYTES", 4 << 20)
    slot = PlainStaging.slot
    monkeypatch.setattr(PlainStaging, "slot", lambda ring, nbytes: sizes.append(nbytes) or slot(ring, nbytes))
    monkeypatch.setattr(sending, "staging_for", lambda device: rings.append(staging_for(device)) or rings[-1])
    with tallstore.open_bundle(root) as bundle:
        expert = on_device(bundle, decode_torch.decode)
        for name, tensor in bundle.items("t"):
            assert same_bits(expert.tensor(name), tensor), name
        sizes.clear()
        expert.tensors(bundle.keys("t"))
    assert len(sizes) > 2
    assert max(sizes) < 10 << 20  # a chunk of bfloat16 with codes, steps a row of 5 and gains
    assert len(rings) == 1


def test_pieces_of_one_form_lie_behind_each_other_in_whole_blocks():
    def piece(count, value):
        destination = torch.zeros(count, dtype=torch.int16)
        return Piece(
            Form("same", "I16", "I16", "I16"), destination, {"base": lambda: np.full(2 * count, value, np.uint8)}, {}
        )

    batch = Batch([piece(3, 1), piece(BLOCK_NUMEL + 1, 2), piece(5, 3)])
    host = torch.zeros(batch.nbytes, dtype=torch.uint8)
    for job in batch.fill(host.numpy()):
        job()
    (packed,) = batch.packed(host)
    assert packed.region("blocks", torch.int32).tolist() == [0, 1, 1, 2]
    elements = packed.region("base", torch.int16).view(4, BLOCK_NUMEL)
    assert [row.unique().tolist() for row in elements] == [[0, 0x0101], [0x0202], [0, 0x0202], [0, 0x0303]]
    assert batch.nbytes <= sum(member.nbytes() for member in (piece(3, 1), piece(BLOCK_NUMEL + 1, 2), piece(5, 3)))


def test_each_chunk_of_a_sparse_tensor_takes_its_own_values(tmp_path):
    root = write_large(tmp_path / "bundle", ("sparse",)).seal()
    with tallstore.open_bundle(root) as bundle:
        tensor = bundle._files.task("t").tensor("sparse")
        opener = on_device(bundle, decode_torch.decode)._opener
        pieces = list(opener.pieces(tensor, "BF16", torch.empty(LARGE, dtype=torch.bfloat16)))
        read = [piece.sources["values"]().size // 2 for piece in pieces]
    assert read == [piece.value_count for piece in pieces]
    assert min(read) > 0
    assert sum(read) == tensor.count


def coded_piece(kind, count, rows, **fields):
    """A piece whose bits are all set."""
    bits = np.packbits(np.ones(count, np.uint8), bitorder="little")
    sources = {"base": lambda: np.zeros(4 * count, np.uint8), "codes": lambda: bits}
    if kind == "sparse":
        sources["values"] = lambda: np.ones(2 * count, np.uint8)
    form = Form(kind, "F32", "F32", "F32", **fields)
    return Piece(form, torch.zeros(count, dtype=torch.int32), sources, {"values": rows}, count if fields else 0)


def test_no_bit_is_set_behind_the_values_of_a_sparse_piece():
    """A kernel would read what does not belong to the batch."""
    rows = Rows(np.ones(1, np.float32), 1500, 1500)
    batch = Batch([coded_piece("sparse", 1500, rows, values="F16"), coded_piece("sparse", 3, rows, values="F16")])
    host = torch.full((batch.nbytes,), 0xFF, dtype=torch.uint8)
    for job in batch.fill(host.numpy()):
        job()
    (packed,) = batch.packed(host)
    assert int(np.bitwise_count(packed.regions["codes"].numpy()).sum()) == 1503
    assert packed.region("ranks", torch.int32).tolist() == [0, BLOCK_NUMEL, 1500]
    assert packed.regions["values"].numel() == 2 * 1503


@pytest.mark.parametrize(
    ("rows", "run"),
    [
        ([(1, 100, 100)], 0),
        ([(1, 100, 100), (2, 40, 48)], 8),
        ([(1, 99, 99), (2, 40, 48)], 8),
        ([(2, 40, 44)], 1),
        ([(2, 44, 48)], 1),
        ([(2, 40, 48), (3, 5, 5)], 1),
    ],
)
def test_eight_elements_share_a_scale_where_every_row_ends_with_them(rows, run):
    pieces = [coded_piece("sign", 100, Rows(np.ones(count, np.float32), *more)) for count, *more in rows]
    batch = Batch(pieces)
    (packed,) = batch.packed(torch.zeros(batch.nbytes, dtype=torch.uint8))
    assert packed.runs == {"values": run, "values_lo": 0, "centre": 0}


# --- errors ---


@pytest.mark.parametrize("where", ["mask-00001", "merged-00001", "base"])
def test_changed_bytes_are_an_error_and_not_a_tensor(tmp_path, where):
    root = write_large(tmp_path / "bundle", ("mask",)).seal()
    path = next(path for path in root.rglob("*.safetensors") if where in str(path.relative_to(root)))
    with path.open("r+b") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(path.read_bytes()[8:start])
        name = next(name for name in header if name.rpartition("/")[2] == "mask")
        file.seek(start + sum(header[name]["data_offsets"]) // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    with tallstore.open_bundle(root) as bundle:
        with pytest.raises((tallstore.IntegrityError, tallstore.BaseMismatchError)):
            on_device(bundle, decode_torch.decode).tensors(bundle.keys("t"))
        assert on_device(bundle, decode_torch.decode).tensor("first").tolist() == [1.0, 2.0, 3.0]


def test_an_unknown_tensor_is_an_error(tmp_path):
    with tallstore.open_bundle(write_small(tmp_path / "bundle", 1).seal()) as bundle:
        expert = on_device(bundle, decode_torch.decode)
    with pytest.raises(tallstore.UnknownTensorError):
        expert.tensor("nothing")


# --- decoders ---


def test_a_decoder_must_compute_as_the_specification_says():
    assert computes_exactly(decode_torch.decode, CPU)


def broken(kind):
    """A decoder with one fault."""

    def decode(packed):
        decode_torch.decode(packed)
        base = packed.region("base", torch.float32)
        (destination,) = packed.destinations
        if packed.form.result == "BF16":
            if kind == "truncates":
                destination.copy_((packed.region("values", torch.int32) >> 16)[: destination.numel()])
            return
        if packed.form.result == "F16":
            return
        values, scales = packed.region("values", torch.float32)[:4], packed.region("scales", torch.float32)
        total = base[:4].clone()
        if kind == "fuses":
            total = (base[:4].double() + values.double() * scales.double()).float()
        if kind == "adds zeros":
            total = base[:4] + values * scales
        if kind == "flushes":
            total = destination.view(torch.float32).clone()
            total[total.abs() < torch.finfo(torch.float32).tiny] = 0.0
        if kind != "truncates":
            destination.copy_(total.view(torch.int32))

    return decode


@pytest.mark.parametrize("kind", ["truncates", "fuses", "adds zeros", "flushes"])
def test_a_decoder_with_a_fault_is_not_taken(kind):
    assert not computes_exactly(broken(kind), CPU)


def test_a_decoder_that_does_not_run_is_not_taken():
    def decode(_packed):
        raise RuntimeError("no compiler")

    assert not computes_exactly(decode, CPU)


def test_the_first_decoder_that_passes_is_taken_and_none_for_the_cpu(monkeypatch):
    candidates = [broken("fuses"), decode_torch.decode]
    monkeypatch.setattr(device_decoders, "_candidates", lambda _device: iter(candidates))
    monkeypatch.setattr(device_decoders, "computes_exactly", lambda decode, _device: computes_exactly(decode, CPU))
    decoder_for.cache_clear()
    try:
        assert decoder_for(torch.device("xpu", 0)) is decode_torch.decode
        candidates.pop()
        assert decoder_for(torch.device("mps", 0)) is None
        assert decoder_for(CPU) is None
        assert decoder_for(torch.device("meta")) is None
    finally:
        decoder_for.cache_clear()


# --- the ring ---


class Recorder:
    """What stands for CUDA's streams and events, and writes down in which order they were used."""

    def __init__(self, monkeypatch):
        self.calls = []
        recorder = self

        class Stream:
            def __init__(self, name="copies"):
                self.name = name

            def wait_stream(self, other):
                recorder.calls.append(f"{self.name} waits for {other.name}")

        class Event:
            def __init__(self):
                self.number = len(recorder.events)
                recorder.events.append(self)

            def record(self, stream):
                recorder.calls.append(f"event {self.number} on {stream.name}")

            def synchronize(self):
                recorder.calls.append(f"wait for event {self.number}")

        self.events = []
        compute = Stream("compute")

        @contextlib.contextmanager
        def stream(chosen):
            recorder.calls.append(f"on {chosen.name}")
            yield
            recorder.calls.append("back")

        empty = torch.empty

        def unpinned(*shape, pin_memory=False, **options):
            recorder.calls.append(f"{'pinned' if pin_memory else 'device'} {shape[0]}")
            return empty(*shape, **options)

        monkeypatch.setattr(torch.cuda, "Stream", lambda _device: Stream())
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: compute)
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch, "empty", unpinned)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda _tensor, _stream: None)


def test_the_ring_reads_into_one_buffer_while_others_are_copied_and_decoded(monkeypatch):
    recorder = Recorder(monkeypatch)
    ring = CudaStaging(CPU)
    slots = []
    for turn in range(5):
        recorder.calls.append(f"batch {turn}")
        slot = ring.slot(100)
        slots.append(slot)
        slot.host[:100] = turn
        staged = ring.send(slot, 100)
        assert staged.tolist() == [turn] * 100
        ring.release(slot)
    new = ["pinned 128", "device 128", "copies waits for compute"]
    sent = ["on copies", "back", "compute waits for copies"]
    assert recorder.calls == [
        *("batch 0", *new, *sent, "event 0 on compute"),
        *("batch 1", *new, *sent, "event 1 on compute"),
        *("batch 2", *new, *sent, "event 2 on compute"),
        *("batch 3", *new, *sent, "event 3 on compute"),
        *("batch 4", "wait for event 0", *sent, "event 4 on compute"),
    ]
    assert slots[4] is slots[0]
    assert len({slot.host.data_ptr() for slot in slots}) == 4


def test_a_buffer_that_is_too_small_is_replaced_when_it_is_no_longer_used(monkeypatch):
    recorder = Recorder(monkeypatch)
    ring = CudaStaging(CPU)
    for _ in range(4):
        ring.release(ring.slot(100))
    recorder.calls.clear()
    assert ring.slot(200).host.numel() == 256
    assert recorder.calls == ["wait for event 0", "pinned 256", "device 256", "copies waits for compute"]


def test_an_expert_goes_through_the_ring(tmp_path, monkeypatch):
    """Many more batches than buffers: each is waited for before it is read into again."""
    root = write_small(tmp_path / "bundle", 300).seal()
    monkeypatch.setattr(sending, "_BATCH_NBYTES", 1 << 17)
    monkeypatch.setattr(sending, "staging_for", CudaStaging)
    with tallstore.open_bundle(root) as bundle:
        expected, expert = bundle.state_dict("t"), on_device(bundle, decode_torch.decode)
        recorder = Recorder(monkeypatch)
        found = expert.tensors(bundle.keys("t"))
    assert all(same_bits(found[name], tensor) for name, tensor in expected.items())
    count = len(recorder.events)
    assert count > 6
    waits = [call for call in recorder.calls if call.startswith("wait for")]
    assert waits == [f"wait for event {number}" for number in range(count - 4)]


def test_other_devices_take_plain_copies():
    ring = staging_for(CPU)
    assert isinstance(ring, PlainStaging)
    slot = ring.slot(3)
    slot.host[:3] = torch.tensor([1, 2, 3])
    staged = ring.send(slot, 3)
    ring.release(slot)
    ring.slot(3).host.zero_()
    assert staged.tolist() == [1, 2, 3]
    assert ring.slot(300).host.numel() >= 300
    assert staging.staging_for(torch.device("mps")).__class__ is PlainStaging


# --- models on a device ---


@pytest.fixture
def models_elsewhere(monkeypatch):
    """Models' contiguous tensors are taken for those of another device; the names that were written there."""
    written = []

    write = DeviceExpert.write
    monkeypatch.setattr(
        DeviceExpert, "write", lambda expert, targets: written.extend(targets) or write(expert, targets)
    )
    monkeypatch.setattr(device_expert, "decoder_for", lambda _device: decode_torch.decode)
    for module in (model_weights, model_writer):
        monkeypatch.setattr(module, "is_sent", lambda target: target.is_contiguous())
        monkeypatch.setattr(module, "is_direct", lambda _target: False)
    return written


def test_load_into_rebuilds_on_the_device_of_the_model(tmp_path, models_elsewhere):
    model = Net()
    versions = model.layer.weight._version
    with tallstore.open_bundle(write_net(tmp_path / "bundle").seal()) as bundle:
        assert bundle.load_into(model, "a") == ([], [])
        assert holds(model, bundle.state_dict("a"))
    assert sorted(models_elsewhere) == ["count", "layer.weight", "narrow"]
    assert model.layer.weight._version > versions


def test_a_switch_rebuilds_on_the_device_of_the_model(tmp_path, models_elsewhere):
    built, model = write_net(tmp_path / "bundle"), Net()
    with tallstore.open_bundle(built.seal()) as bundle:
        switcher = bundle.attach(model)
        for task in ("a", "b", "a"):
            models_elsewhere.clear()
            switcher.set_expert(task)
            assert sorted(models_elsewhere) == ["count", "layer.weight", "narrow"]
            assert holds(model, bundle.state_dict(task))
        with switcher.disable_expert():
            assert holds(model, built.base)
        assert holds(model, bundle.state_dict("a"))


def test_targets_are_grouped_by_their_devices():
    targets = {
        "cpu": torch.zeros(2),
        "meta": torch.zeros(2, 3, device="meta"),
        "turned": torch.zeros(2, 3, device="meta").t(),
        "other": torch.zeros(1, device="meta"),
    }
    found = model_weights.by_device(targets)
    assert {device: {name: t.shape for name, t in group.items()} for device, group in found.items()} == {
        torch.device("meta"): {"meta": (6,), "other": (1,)}
    }


def test_any_device_of_torch_has_a_way(tmp_path):
    with tallstore.open_bundle(write_small(tmp_path / "bundle", 1).seal()) as bundle:
        expert = DeviceExpert.on(bundle._expert("t"), bundle._files, bundle._pinned(), torch.device("meta"))
        assert expert.tensor("000").is_meta
