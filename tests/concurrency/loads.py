"""What threads, forked and spawned processes do with a bundle; each result is a digest that serial ones are held to."""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import os
import random
import signal
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

import tallstore
from tallstore import exporting

PATIENCE = 100  # seconds; what takes longer hangs


def digest(weights: Mapping[str, Tensor]) -> str:
    """Of names, dtypes, shapes and bits."""
    found = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def model_of(weights: Mapping[str, Tensor]) -> nn.Module:
    """A model of buffers with these names, dtypes and shapes; zeros."""
    model = nn.Module()
    for name, tensor in weights.items():
        *path, last = name.split(".")
        module = model
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        module.register_buffer(last, torch.zeros_like(tensor))
    return model


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """Of `model_of`."""
    return dict(model.named_buffers())


def state_dict(bundle: tallstore.Bundle, task: str) -> str:
    return digest(bundle.state_dict(task))


def items(bundle: tallstore.Bundle, task: str) -> str:
    return digest(dict(bundle.items(task)))


def tensors(bundle: tallstore.Bundle, task: str) -> str:
    return digest({name: bundle.tensor(task, name) for name in bundle.keys(task)})


def ranges(bundle: tallstore.Bundle, task: str) -> str:
    """Every tensor in two ranges."""
    found = {}
    for name, whole in bundle.items(task):
        numel = whole.numel()
        parts = [bundle._range(task, name, 0, numel // 3), bundle._range(task, name, numel // 3, numel)]
        found[name] = torch.cat(parts).view(whole.shape)
    return digest(found)


def load_into(bundle: tallstore.Bundle, task: str) -> str:
    model = model_of(bundle.state_dict(task))
    bundle.load_into(model, task)
    return digest(buffers(model))


def export(bundle: tallstore.Bundle, task: str) -> str:
    with tempfile.TemporaryDirectory() as root:
        exporting.export(bundle, task, Path(root) / "out")
        return digest(load_file(Path(root) / "out" / "model.safetensors"))


WAYS: dict[str, Callable[[tallstore.Bundle, str], str]] = {
    way.__name__: way for way in (state_dict, items, tensors, ranges, load_into, export)
}


def switches(bundle: tallstore.Bundle, expected: Mapping[str, str], seed: int, count: int) -> None:
    """Have one model become one expert after another, with and without read-ahead; each must be right."""
    chance = random.Random(seed)  # noqa: S311 - nothing is kept secret by it
    tasks = sorted(expected)
    switchers = {}
    for task in tasks:  # experts have other shapes than each other: a model each
        model = model_of(bundle.state_dict(task))
        switchers[task] = bundle.attach(model, strict=False), model
    for _ in range(count):
        task = chance.choice(tasks)
        switcher, model = switchers[task]
        if chance.random() < 0.3:
            switcher.prefetch(task).result(PATIENCE)
        switcher.set_expert(None)
        switcher.set_expert(task)
        assert digest(buffers(model)) == expected[task], task


def all_ways(bundle: tallstore.Bundle, expected: Mapping[str, str], seed: int, rounds: int = 1) -> None:
    """Every task in every way, in an order of its own."""
    chance = random.Random(seed)  # noqa: S311
    pairs = [(task, way) for task in expected for way in WAYS] * rounds
    chance.shuffle(pairs)
    for task, way in pairs:
        assert WAYS[way](bundle, task) == expected[task], (task, way)


def in_a_process(bundle: tallstore.Bundle, expected: Mapping[str, str], seed: int) -> None:
    """What a forked or spawned process does."""
    torch.set_num_threads(1)  # as DataLoader's workers do: of torch's threads a forked process has none
    all_ways(bundle, expected, seed)
    switches(bundle, expected, seed, 6)


class Experts(Dataset):
    """Digests of a bundle's experts, by number."""

    def __init__(self, bundle: tallstore.Bundle, length: int) -> None:
        self.bundle, self.length = bundle, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> tuple[int, str]:
        tasks = self.bundle.tasks
        return os.getpid(), state_dict(self.bundle, tasks[number % len(tasks)])


def forked(work: Callable[[], object]) -> int:
    """Run *work* in a forked process that is waited for; its exit code, 0 if it went well."""
    child = os.fork()
    if not child:
        code = 1
        with contextlib.suppress(BaseException):
            torch.set_num_threads(1)  # of torch's threads, it has none
            faulthandler.register(signal.SIGALRM, chain=True)  # says where a child hangs, and ends it
            signal.alarm(PATIENCE // 2)
            work()
            code = 0
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
