"""What the examples pack, in the place of your models: a small network for handwritten digits, and fine-tunes of it.

Needs scikit-learn, which ships the 1,797 images: pip install 'tallstore[demo]'.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

OUT = Path("tallstore-examples")
BASE_TASK = "upright"
TASKS = ("rotated", "inverted", "mirrored", "renamed")
BATCH, WIDTH = 64, 512


def network() -> nn.Sequential:
    """Images [n, 64] in, logits [n, 10] out; 300,000 parameters."""
    inner = [nn.Linear(64, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU()]
    return nn.Sequential(nn.LayerNorm(64), *inner, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10))


@functools.cache
def examples(task: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return a task's images [n, 64] in float32 and labels [n], those to train on and those to test on."""
    digits = load_digits()
    images, labels = torch.from_numpy(digits.images).float() / 16, torch.from_numpy(digits.target).long()
    if task == "rotated":
        images = images.rot90(1, (1, 2))
    elif task == "inverted":
        images = 1 - images
    elif task == "mirrored":
        images = images.flip(2)
    elif task == "renamed":
        labels = 9 - labels
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images.reshape(-1, 64)[order], labels[order]
    return (images[450:], labels[450:]), (images[:450], labels[:450])


def train(model: nn.Module, task: str, epochs: int) -> Iterator[tuple[int, torch.optim.Optimizer]]:
    """Train in place; yield after every epoch its number, from 1, and the optimizer."""
    (images, labels), _ = examples(task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-3, epochs=epochs, steps_per_epoch=-(-len(images) // BATCH)
    )
    generator = torch.Generator().manual_seed(0)
    for epoch in range(1, epochs + 1):
        for chosen in torch.randperm(len(images), generator=generator).split(BATCH):
            loss = functional.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        yield epoch, optimizer


@torch.inference_mode()
def predict(model: nn.Module, task: str) -> Tensor:
    """Return the likeliest label of each of a task's test images: int64 [450]."""
    return model(examples(task)[1][0]).argmax(1)


def accuracy(model: nn.Module, task: str) -> float:
    """Return the share of a task's test images that the model gets right."""
    return (predict(model, task) == examples(task)[1][1]).double().mean().item()


def checkpoints(out: Path) -> tuple[Path, dict[str, Path]]:
    """Return the base's file, and the experts' by name; what is not in *out* is trained first."""
    folder = out / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    base, *tuned = paths = [folder / f"{task}.safetensors" for task in (BASE_TASK, *TASKS)]
    torch.set_num_threads(1)  # operations this small lose by more
    for path in paths:
        if not path.exists():
            torch.manual_seed(0)
            model = network()
            if path != base:
                model.load_state_dict(load_file(base))
            for _ in train(model, path.stem, epochs=10 if path == base else 6):
                pass
            save_file(model.state_dict(), path)
    return base, dict(zip(TASKS, tuned, strict=True))
