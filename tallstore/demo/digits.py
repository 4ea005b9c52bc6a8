"""Scikit-learn's handwritten digits (1,797 images of 8 x 8 pixels, shipped with it), and the tasks made of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tallstore.errors import MissingExtraError

HELD_OUT = 450
NOISE = 0.25


@dataclass(frozen=True)
class Examples:
    """Images [n, 8, 8] in float32 from 0 to 1, and labels [n] in int64."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Task:
    """What a model is trained on, and the held-out examples that score it."""

    name: str
    about: str
    num_labels: int
    train: Examples
    test: Examples


def load_digits() -> Examples:
    """Return all digits.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets  # noqa: PLC0415 - an extra: only the demo needs it
    except ImportError as error:
        raise MissingExtraError("the demo", "scikit-learn", "demo") from error
    digits = datasets.load_digits()
    return Examples(torch.from_numpy(digits.images).float() / 16, torch.from_numpy(digits.target).long())


def make_tasks(digits: Examples, generator: torch.Generator) -> tuple[Task, tuple[Task, ...]]:
    """Return the pretraining task, and the six to fine-tune on.

    All share one split of the images: what scores an expert was seen by neither it nor its base.
    """
    images, labels = digits.images, digits.labels
    order = torch.randperm(len(labels), generator=generator)
    test, train = order[:HELD_OUT], order[HELD_OUT:]

    def task(name: str, about: str, num_labels: int, images: Tensor = images, labels: Tensor = labels) -> Task:
        return Task(
            name, about, num_labels, Examples(images[train], labels[train]), Examples(images[test], labels[test])
        )

    new_names = torch.randperm(10, generator=generator)
    noise = NOISE * torch.randn(images.shape, generator=generator)
    return task("digits", "which of the ten digits", 10), (
        task("parity", "odd or even", 2, labels=labels % 2),
        task("above-four", "more than four or not", 2, labels=(labels > 4).long()),
        task("rotated", "turned by a quarter", 10, images=images.rot90(1, (1, 2))),
        task("inverted", "light on dark", 10, images=1 - images),
        task("permuted", "the ten labels in another order", 10, labels=new_names[labels]),
        task("noisy", "under noise", 10, images=images + noise),
    )
