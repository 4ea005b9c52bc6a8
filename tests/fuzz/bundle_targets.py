"""Whole bundles, changed inside and sealed again: everything that reads them, and what they load as."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed import checkpoint

import tallstore
from tallstore.checkpoints.torch_dtypes import DTYPE_NAMES
from tallstore.distributed import BundleStorageReader
from tallstore.errors import TallstoreError
from tallstore.exporting import export
from tallstore.format.bundle_files import BundleFiles
from tallstore.inspecting.summary import summarise
from tallstore.inspecting.task_details import describe_task
from tallstore.loading import decode_torch
from tallstore.loading.bundle import Bundle
from tallstore.loading.device_expert import DeviceExpert
from tallstore.reporting.measuring import measure
from tests.fuzz import bundles, second_reader, seeds
from tests.fuzz.choices import Choices
from tests.fuzz.outcomes import Broken, check_message, typed
from tests.fuzz.second_reader import Array

Weights = dict[str, dict[str, Tensor]]


class _Bundles:
    """Bundles in a directory, which is kept: only what differs is written."""

    changes: tuple[bundles.Change, ...]

    def __init__(self, place: Path) -> None:
        self.root = place / "bundle"
        self._there: dict[str, bytes] = {}

    def __call__(self, data: bytes) -> None:
        """Change a sound bundle as *data* says, and put it through everything that reads bundles."""
        choices = Choices(data)
        parts = choices.pick(seeds.bundles()).copy()
        for _ in range(1 + choices.below(3)):
            parts.change(choices, self.changes)
        contents = parts.sealed()
        bundles.write(contents, self.root, self._there)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._read(contents, parts.base, choices)

    def _read(self, contents: Mapping[str, bytes], base: Path | None, choices: Choices) -> None:
        opened = typed(lambda: tallstore.open_bundle(self.root, base=base))
        if isinstance(opened, Bundle):
            with opened:
                tasks = opened.tasks if choices.one_in(4) else opened.tasks[:1]
                loaded = {task: typed(lambda task=task: opened.state_dict(task)) for task in tasks}
                self._compare(contents, base, loaded)
                if choices.one_in(4):
                    choices.pick(READERS)(opened, loaded, choices)
            refused = [found for found in loaded.values() if isinstance(found, tallstore.FormatError)]
        else:
            refused = [opened] if isinstance(opened, tallstore.FormatError) else []
        if choices.one_in(3):
            problems = tallstore.verify(self.root)
            for problem in problems:
                check_message(str(problem))
            if refused and not problems:
                raise Broken(f"verify finds nothing, and loading says: {refused[0]}")

    def _compare(self, contents: Mapping[str, bytes], base: Path | None, loaded: Mapping[str, object]) -> None:
        """What was loaded is what the second implementation makes of the same bytes."""
        manifest = json.loads(contents["tallstore.json"])
        tensors = second_reader.Base(contents, base)
        for task in manifest["tasks"]:
            ours = loaded.get(task["name"])
            if not isinstance(ours, dict):
                continue
            theirs = second_reader.expert(contents, tensors, task["slug"], task["group"])
            if ours.keys() != theirs.keys():
                raise Broken(f"tensors of {task['name']!r}: {sorted(ours)} and {sorted(theirs)}")
            for name, tensor in ours.items():
                if second_reader.differs(as_array(tensor), theirs[name]):
                    raise Broken(f"{name!r} of {task['name']!r} is not what the second implementation makes of it")


class Structure(_Bundles):
    """Anything may change."""

    changes = bundles.STRUCTURE


class Numbers(_Bundles):
    """Gains, steps, values and the base's numbers change."""

    changes = bundles.NUMBERS


def as_array(tensor: Tensor) -> Array:
    """A tensor as the second implementation has it."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return Array(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), raw)


def _sound(loaded: Mapping[str, object]) -> Weights:
    return {task: found for task, found in loaded.items() if isinstance(found, dict)}


# --- what else reads a bundle -----------------------------------------------------------------------------------------


def _inspect(bundle: Bundle, loaded: Mapping[str, object], _choices: Choices) -> None:
    summary = typed(lambda: summarise(bundle.path))
    if not isinstance(summary, TallstoreError):
        json.dumps(summary.to_dict(), allow_nan=False)
        str(summary)
    for task in loaded:
        details = typed(lambda task=task: describe_task(bundle._files, task))
        if not isinstance(details, TallstoreError):
            json.dumps(details.to_dict(), allow_nan=False)


def _measure(bundle: Bundle, _loaded: Mapping[str, object], _choices: Choices) -> None:
    typed(lambda: str(bundle.statistics()))
    typed(lambda: measure(BundleFiles(bundle.path)))


def _one_by_one(bundle: Bundle, loaded: Mapping[str, object], choices: Choices) -> None:
    """`tensor`, and slices as other adapters ask for them."""
    for task, state in _sound(loaded).items():
        for name, tensor in state.items():
            alone = bundle.tensor(task, name)
            start = choices.below(tensor.numel() + 1)
            part = bundle._range(task, name, start, tensor.numel())
            if as_array(alone) != as_array(tensor) or as_array(part).raw != as_array(tensor.reshape(-1)[start:]).raw:
                raise Broken(f"{name!r} of {task!r} is another alone, or in parts")


def _on_device(bundle: Bundle, loaded: Mapping[str, object], _choices: Choices) -> None:
    """As on a device, in torch's own operations."""
    for task, state in _sound(loaded).items():
        expert = DeviceExpert(
            bundle._expert(task), bundle._files, bundle._pinned(), torch.device("cpu"), decode_torch.decode
        )
        for name, tensor in expert.tensors(bundle.keys(task)).items():
            if second_reader.differs(as_array(tensor), as_array(state[name])):
                raise Broken(f"{name!r} of {task!r} is another on a device")


def _switch(bundle: Bundle, loaded: Mapping[str, object], choices: Choices) -> None:
    """A model takes each expert in turn."""
    model = nn.Module()
    for number, state in enumerate(_sound(loaded).values()):
        for name, tensor in state.items() if not number else ():
            model.register_buffer(name.replace(".", "_"), tensor.clone())
    with contextlib.ExitStack() as stack:
        switcher = typed(lambda: bundle.attach(model, strict=choices.one_in(2)))
        if isinstance(switcher, TallstoreError):
            return
        for task in loaded:
            typed(lambda task=task: switcher.set_expert(task))
        typed(lambda: stack.enter_context(switcher.disable_expert()))


def _distributed(bundle: Bundle, loaded: Mapping[str, object], _choices: Choices) -> None:
    for task, state in _sound(loaded).items():
        weights = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        checkpoint.load(weights, storage_reader=BundleStorageReader(bundle, task), no_dist=True)
        for name, tensor in weights.items():
            if second_reader.differs(as_array(tensor), as_array(state[name])):
                raise Broken(f"{name!r} of {task!r} is another through torch.distributed")


def _merge(bundle: Bundle, _loaded: Mapping[str, object], choices: Choices) -> None:
    typed(lambda: bundle.consensus(k=choices.below(3)))
    typed(bundle.stitch)


def _export(bundle: Bundle, loaded: Mapping[str, object], _choices: Choices) -> None:
    out = bundle.path.parent / "exported"
    for task in loaded:
        typed(lambda task=task: export(bundle, task, out, overwrite=True))


READERS = (_inspect, _measure, _one_by_one, _on_device, _switch, _distributed, _merge, _export)
