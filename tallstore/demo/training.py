"""Pretraining, fine-tuning and scoring. The same seed gives the same weights on one machine, however many threads."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tallstore.demo.digits import Examples, Task
from tallstore.demo.model import ModelConfig, VisionTransformer

WARM_UP = 0.2


@dataclass(frozen=True)
class Phase:
    """How long and how fast to train: epochs, and the highest learning rate."""

    epochs: int
    peak_rate: float


@dataclass(frozen=True)
class Recipe:
    """How the base and its fine-tunes are trained."""

    pretraining: Phase = Phase(epochs=20, peak_rate=2e-3)
    finetuning: Phase = Phase(epochs=12, peak_rate=2e-3)
    batch: int = 64
    weight_decay: float = 0.05


def pretrain(task: Task, recipe: Recipe, seed: int) -> VisionTransformer:
    """Train a model on *task* from scratch."""
    model = _initialise(task.num_labels, seed)
    with _one_thread_an_operation():
        _train(model, task.train, recipe, recipe.pretraining, seed)
    return model


def finetune(
    base: VisionTransformer, tasks: Sequence[Task], recipe: Recipe, seed: int
) -> Iterator[tuple[Task, VisionTransformer]]:
    """Train all weights of a copy of *base* on each task; yield them in order, each when it is done.

    As many train at once as torch may use threads. A head is new where the number of labels is not the base's.
    """
    models = [_adapt(base, task, seed) for task in tasks]  # here, not in the threads: see _initialise
    with _one_thread_an_operation() as threads:
        pool = ThreadPoolExecutor(threads)
        try:
            runs = [
                pool.submit(_train, model, task.train, recipe, recipe.finetuning, seed)
                for task, model in zip(tasks, models, strict=True)
            ]
            for task, model, run in zip(tasks, models, runs, strict=True):
                run.result()
                yield task, model
        finally:
            pool.shutdown(cancel_futures=True)


def predict(model: VisionTransformer, images: Tensor) -> Tensor:
    """Return the likeliest label of each image: int64 [n]."""
    with _one_thread_an_operation(), torch.inference_mode():
        return torch.argmax(model(images), dim=1)


@contextlib.contextmanager
def _one_thread_an_operation() -> Iterator[int]:
    """Keep torch's operations to one thread each, and yield how many threads they might have had.

    Operations this small gain little from two threads, lose much when another program is on one of the cores,
    and round alike everywhere when there is one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _adapt(base: VisionTransformer, task: Task, seed: int) -> VisionTransformer:
    model = _initialise(task.num_labels, seed)
    weights = base.state_dict()
    if task.num_labels != base.config.num_labels:
        weights = {name: weight for name, weight in weights.items() if not name.startswith("head.")}
    model.load_state_dict(weights, strict=False)
    return model


def _initialise(num_labels: int, seed: int) -> VisionTransformer:
    with torch.random.fork_rng(devices=[]):  # torch initialises from the caller's generator: leave that as it was
        torch.manual_seed(seed)
        return VisionTransformer(ModelConfig(num_labels))


def _train(model: VisionTransformer, examples: Examples, recipe: Recipe, phase: Phase, seed: int) -> None:
    """Train with AdamW, in place; the rate climbs to its peak, then falls to zero along a cosine."""
    batch, steps_an_epoch = recipe.batch, len(examples.labels) // recipe.batch
    steps = phase.epochs * steps_an_epoch
    warm_up = WARM_UP * steps

    def rate(step: int) -> float:
        return min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * max(0.0, step - warm_up) / (steps - warm_up)))

    optimizer = torch.optim.AdamW(model.parameters(), lr=phase.peak_rate, weight_decay=recipe.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(phase.epochs):
        order = torch.randperm(len(examples.labels), generator=generator)
        for start in range(0, steps_an_epoch * batch, batch):
            chosen = order[start : start + batch]
            loss = functional.cross_entropy(model(examples.images[chosen]), examples.labels[chosen])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
