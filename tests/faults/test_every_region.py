"""Every region of a bundle's files, and what becomes of a byte that changes there: refused, or read by no load."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import checkpoint
from torch.distributed.checkpoint import CheckpointException

import tallstore
from tallstore import exporting
from tallstore.distributed import BundleStorageReader
from tallstore.errors import TallstoreError
from tallstore.loading import expert as expert_module
from tallstore.loading.kernels import Kernels
from tests.faults.bundles import same, small_inputs
from tests.faults.regions import OF_THE_BASE, Outcomes, Region, regions_of, traced
from tests.faults.specimens import Specimen, chance, every_kind, flipped, specimen, specimen_of

_LOG = logging.getLogger(__name__)  # --log-cli-level=INFO shows the tables

#: Why a load reads nothing of a region, for each use that a load may leave alone.
REASONS = {
    "padding": "zeros between payloads (IDX-4)",
    "companion file": "copied by exports, which check its sha256",
    "group.json": "another group's",
    "task.json": "another task's",
    "index": "another owner's",
    "header": "another owner's",
    "length of a header": "another owner's",
    "pool": "another owner's",
    "weights of the base": "of a tensor that no expert has, or not this one",
}
PAYLOADS = {"bits", "fields", "gains", "values", "further", "merged", "merged.step", "merged_lo", "centre"}


@pytest.fixture(scope="module", params=["pooled", "raw", "zstd", "planes-zstd", "packed"])
def kind(request, tmp_path_factory) -> Specimen:
    """Bundles with every kind of tensor under each codec, and one that was packed, with companion files."""
    root = tmp_path_factory.mktemp("kind")
    if request.param == "packed":
        return specimen(root, small_inputs(root, moved=0.05), 0, embed_base=True)
    return specimen_of(every_kind(root / "bundle", {"pooled": None}.get(request.param, request.param)).seal(), None)


@pytest.fixture(params=["torch", "compiled"])
def decoder(request, monkeypatch):
    """Decoded by torch, and by compiled functions."""
    if request.param == "compiled":
        pytest.importorskip("llvmlite")
    monkeypatch.setenv("TALLSTORE_COMPILE", "1" if request.param == "compiled" else "0")
    monkeypatch.setattr(expert_module, "kernels", Kernels())
    return request.param


def regions(bundle: Specimen) -> list[Region]:
    return [region for path, content in bundle.content.items() for region in regions_of(path, content)]


def positions(region: Region, count: int) -> range:
    """At most so many of its bytes, its first one among them."""
    return range(region.start, region.stop, math.ceil((region.stop - region.start) / count))


def readers(bundle: Specimen) -> dict[Region, set[str]]:
    """The tasks whose load reads a region, as it is seen to read."""
    found: dict[Region, set[str]] = {region: set() for region in regions(bundle)}
    for task in bundle.weights:
        with (
            traced(bundle.path) as reads,
            tallstore.open_bundle(bundle.path, base=bundle.base) as opened,
        ):
            opened.state_dict(task)
        for region, tasks in found.items():
            if reads.reads(region):
                tasks.add(task)
    return found


def test_a_trace_sees_every_byte_that_is_counted(kind):
    with traced(kind.path) as reads, tallstore.open_bundle(kind.path, base=kind.base) as opened:
        for task in opened.tasks:
            opened.state_dict(task)
        counted = opened.bytes_read
    uncounted = sum(
        region.stop - region.start for region in regions(kind) if region.use in OF_THE_BASE and reads.reads(region)
    )
    assert reads.nbytes == counted + uncounted


def test_every_use_of_bytes_is_there(kind):
    uses = {region.use for region in regions(kind)}
    due = {"manifest", "base.json", "group.json", "task.json", "length of a header", "header", "padding", "index"}
    assert uses > due | {"header of the base's file", "weights of the base"}
    if "packed" in str(kind.path) or "companion file" in uses:
        assert uses > {"companion file", "other file of the base", "payload fields", "payload merged", "pool"}
    elif "pool" not in uses:
        assert {f"payload {use}" for use in PAYLOADS} <= uses


@pytest.mark.parametrize(("every", "count"), [(3, 1), pytest.param(1, 1 << 30, marks=pytest.mark.slow)])
def test_a_changed_byte_is_refused_by_the_loads_that_read_it_and_by_no_other(kind, decoder, every, count):
    """And where no load reads it, that is where it cannot matter: `verify` says so nevertheless (below)."""
    generator, table = chance(30), Outcomes()
    count = count if decoder == "torch" else min(count, 5)
    for region, tasks in list(readers(kind).items())[::every]:
        for position in positions(region, count):
            # Tasks that read nothing of it come back every time in the ordinary run, now and then in the long one.
            wanted = kind.weights if every > 1 or not tasks or not position % 8 else tasks
            with kind.changed({region.path: flipped(kind.content[region.path], position, generator)}):
                found = kind.outcomes(wanted)
            if region.use in OF_THE_BASE:  # the weights are the same, or it was refused: no third outcome
                table.add(region.use, "refused" if "refused" in found.values() else "read, the same weights")
                continue
            due = {task: "refused" if task in tasks else "the same" for task in wanted}
            assert found == due, (region, position)
            if not tasks:
                assert region.use in REASONS, region
            table.add(region.use, "refused" if tasks else f"read by no load: {REASONS[region.use]}")
    assert table.total("refused") > table.total() / 2
    _LOG.info("%s changed bytes, %s", table.total(), table)


@pytest.mark.parametrize("count", [1, pytest.param(1 << 30, marks=pytest.mark.slow)])
def test_verify_names_the_file_of_every_changed_byte(kind, count):
    """One region of each file at a time."""
    generator = chance(31)
    others = {path: [] for path in kind.content if path != "tallstore.json"}
    for region in regions(kind):
        if region.path in others:
            others[region.path] += positions(region, count)
    for turn in range(max(map(len, others.values()))):
        now = {path: places[turn] for path, places in others.items() if turn < len(places)}
        with kind.changed({path: flipped(kind.content[path], at, generator) for path, at in now.items()}):
            named = {problem.where for problem in tallstore.verify(kind.path) if problem.rule == "FILE-2"}
            assert named == now.keys(), now
    assert tallstore.verify(kind.path) == []


@pytest.mark.slow
def test_every_bit_of_the_first_byte_of_every_region(kind, decoder):
    read = readers(kind)
    for region, tasks in read.items():
        for bit in range(8):
            with kind.changed({region.path: flipped(kind.content[region.path], region.start, chance(0), bit)}):
                found = kind.outcomes()
                assert tallstore.verify(kind.path), region
            if region.use not in OF_THE_BASE:
                assert {task for task, outcome in found.items() if outcome == "refused"} == tasks, (region, bit)


@pytest.mark.parametrize("verify", ["first-read", "always"])
@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_byte_that_changes_while_the_bundle_is_open(kind, decoder, verify, every):
    """What was loaded before is loaded again: tables, headers and pools that were read stay, the rest is refused."""
    generator, table = chance(32), Outcomes()
    for region, tasks in list(readers(kind).items())[::every]:
        with tallstore.open_bundle(kind.path, base=kind.base, verify=verify) as opened:
            for task in opened.tasks:
                opened.state_dict(task)
            with kind.changed({region.path: flipped(kind.content[region.path], region.start, generator)}):
                found = {task: kind.outcome(opened, task) for task in opened.tasks}
        changed = {task for task, outcome in found.items() if outcome == "refused"}
        is_base = region.path == "base/model.safetensors"  # a file that somebody writes to is no base any more
        due = set(kind.weights) if is_base else tasks
        assert changed <= due, region
        if region.use.startswith("payload") or is_base:
            assert changed == due, region
        table.add(region.use, "refused" if changed else "the same")
    assert every > 1 or table.total("refused")
    _LOG.info("verify=%r: %s", verify, table)


def ways(kind: Specimen, task: str, out):
    """Every other way to an expert than a state dict: calls that give its tensors by name."""
    weights = kind.weights[task]

    def items(bundle):
        return dict(bundle.items(task))

    def tensors(bundle):
        return {name: bundle.tensor(task, name) for name in weights}

    def ranges(bundle):
        spans = {name: (tensor.numel() // 3, tensor.numel()) for name, tensor in weights.items()}
        found = {name: bundle._range(task, name, *span) for name, span in spans.items()}
        assert all(
            same({task: {name: part}}, {task: {name: weights[name].reshape(-1)[slice(*spans[name])]}})
            for name, part in found.items()
        )
        return weights

    def model_of():
        model = torch.nn.Module()
        for name, tensor in weights.items():
            model.register_buffer(name, torch.zeros_like(tensor))
        return model

    def load_into(bundle):
        model = model_of()
        bundle.load_into(model, task)
        return dict(model.named_buffers())

    def switch(bundle):
        model = model_of()
        bundle.attach(model, strict=False).set_expert(task)
        return dict(model.named_buffers())

    def export(bundle):
        exporting.export(bundle, task, out, overwrite=True)
        return load_file(out / "model.safetensors")

    def distributed(bundle):
        filled = {name: torch.zeros_like(tensor) for name, tensor in weights.items() if tensor.numel()}
        checkpoint.load(filled, storage_reader=BundleStorageReader(bundle, task), no_dist=True)
        return weights | filled

    return [items, tensors, ranges, load_into, switch, export, distributed]


def is_typed(error: CheckpointException) -> bool:
    """Whether each rank's error, which torch wraps, is one of ours."""
    return all(isinstance(each, TallstoreError) for each, _ in error.failures.values())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("every", [17, pytest.param(1, marks=pytest.mark.slow)])
def test_every_way_to_an_expert_refuses_what_its_state_dict_refuses(kind, decoder, tmp_path, every):
    generator = chance(33)
    sampled = [region for region in regions(kind) if region.use not in OF_THE_BASE]
    sampled = sampled[generator.randrange(every) :: every]
    task = next(iter(kind.weights))
    read = readers(kind)
    for way in ways(kind, task, tmp_path / "out"):
        with tallstore.open_bundle(kind.path, base=kind.base) as bundle:
            assert same({task: way(bundle)}, {task: kind.weights[task]})
        for region in sampled:
            position = generator.randrange(region.start, region.stop)
            with kind.changed({region.path: flipped(kind.content[region.path], position, generator)}):
                try:
                    with tallstore.open_bundle(kind.path, base=kind.base) as bundle:
                        assert same({task: way(bundle)}, {task: kind.weights[task]}), region
                    refused = False
                except (TallstoreError, CheckpointException) as error:
                    refused = isinstance(error, TallstoreError) or is_typed(error)
            assert refused or task not in read[region], (region, way)
