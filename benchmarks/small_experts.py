"""Twenty-four small experts, trained here: full fine-tunes of one vision transformer on scikit-learn's digits.

    python benchmarks/small_experts.py OUT [--count 20]

writes OUT/base and OUT/<task>, as fidelity.py and study.py want them with `--small COUNT --trained OUT`. Their 24 tasks
change what is seen (turned, mirrored, shifted, blurred, noisy, …), what is asked (odd, prime, a loop, …) or both. The
first twelve are the more unlike. About 297,000 parameters each, 98 % of them in matrices; a minute or two for 20.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from tallstore.demo.digits import Examples, Task, load_digits
from tallstore.demo.model import ModelConfig, VisionTransformer
from tallstore.demo.training import Recipe, finetune, predict, pretrain

SEED = 0
HELD_OUT = 597  # of 1,797 images: agreement wants many
PRIMES = (2, 3, 5, 7)
LOOPS = (0, 6, 8, 9)
CURVED = (0, 2, 3, 5, 6, 8, 9)

Change = Callable[[Tensor, torch.Generator], Tensor]


def seen(images: Tensor, _generator: torch.Generator) -> Tensor:
    """The images as they are."""
    return images


def turned(quarters: int) -> Change:
    """By quarter turns."""
    return lambda images, _: images.rot90(quarters, (1, 2))


def mirrored(*axes: int) -> Change:
    """Along image axes 1 (down) and 2 (across)."""
    return lambda images, _: images.flip(axes)


def shifted(down: int, across: int) -> Change:
    """In pixels; what leaves one side comes in on the other."""
    return lambda images, _: images.roll((down, across), (1, 2))


def noisy(deviation: float) -> Change:
    """Under normal noise."""
    return lambda images, generator: images + deviation * torch.randn(images.shape, generator=generator)


def shuffled(images: Tensor, generator: torch.Generator) -> Tensor:
    """All pixels in another order, the same for all images."""
    return images.flatten(1)[:, torch.randperm(64, generator=generator)].view(-1, 8, 8)


def scattered(images: Tensor, generator: torch.Generator) -> Tensor:
    """A quarter of the pixels missing, others in each image."""
    return images * (torch.rand(images.shape, generator=generator) > 0.25)


def blurred(images: Tensor, _generator: torch.Generator) -> Tensor:
    """Each pixel the mean of nine."""
    return functional.avg_pool2d(images[:, None], 3, stride=1, padding=1)[:, 0]


def inverted(images: Tensor, _generator: torch.Generator) -> Tensor:
    """Light on dark."""
    return 1 - images


def binary(images: Tensor, _generator: torch.Generator) -> Tensor:
    """Black and white."""
    return (images > 0.5).float()


def half(images: Tensor, _generator: torch.Generator) -> Tensor:
    """The lower half hidden."""
    return images * (torch.arange(8) < 4)[:, None]


Question = Callable[[Tensor, torch.Generator], tuple[Tensor, int]]


def which(labels: Tensor, _generator: torch.Generator) -> tuple[Tensor, int]:
    """Which of the ten digits."""
    return labels, 10


def renamed(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, int]:
    """Which of the ten, under other names."""
    return torch.randperm(10, generator=generator)[labels], 10


def remainder(divisor: int) -> Question:
    """After division."""
    return lambda labels, _: (labels % divisor, divisor)


def above(bound: int) -> Question:
    """Whether it is larger."""
    return lambda labels, _: ((labels > bound).long(), 2)


def among(digits: tuple[int, ...]) -> Question:
    """Whether it is one of them."""
    return lambda labels, _: (torch.isin(labels, torch.tensor(digits)).long(), 2)


TASKS: dict[str, tuple[Change, Question]] = {
    "parity": (seen, remainder(2)),
    "turned-left": (turned(1), which),
    "inverted": (inverted, which),
    "renamed": (seen, renamed),
    "noisy": (noisy(0.25), which),
    "shuffled": (shuffled, which),
    "loop": (seen, among(LOOPS)),
    "upside-down": (turned(2), which),
    "above-four": (seen, above(4)),
    "mirrored": (mirrored(2), which),
    "half": (half, which),
    "prime": (seen, among(PRIMES)),
    "turned-right": (turned(3), which),
    "blurred": (blurred, which),
    "remainder-three": (seen, remainder(3)),
    "shifted": (shifted(2, 2), which),
    "scattered": (scattered, which),
    "binary": (binary, which),
    "curved": (seen, among(CURVED)),
    "flipped": (mirrored(1), which),
    "turned-parity": (turned(1), remainder(2)),
    "inverted-renamed": (inverted, renamed),
    "noisy-above-four": (noisy(0.25), above(4)),
    "shuffled-loop": (shuffled, among(LOOPS)),
}


def make_task(digits: Examples, name: str, *, pretraining: bool = False) -> Task:
    """One task; all tasks hold out the same images, which no expert and no base has seen."""
    change, question = (seen, which) if pretraining else TASKS[name]
    order = torch.randperm(len(digits.labels), generator=torch.Generator().manual_seed(SEED))
    generator = torch.Generator().manual_seed(SEED if pretraining else 1 + list(TASKS).index(name))
    images = change(digits.images, generator)
    labels, num_labels = question(digits.labels, generator)
    test, train = order[:HELD_OUT], order[HELD_OUT:]
    return Task(name, name, num_labels, Examples(images[train], labels[train]), Examples(images[test], labels[test]))


def names(folder: Path) -> list[str]:
    """Of the experts in a folder, in the order in which they were chosen."""
    return [name for name in TASKS if (folder / name / "model.safetensors").is_file()]


def train(out: Path, count: int, recipe: Recipe | None = None) -> None:
    """Pretrain a base and fine-tune it to the first *count* tasks; the same weights each time on one machine."""
    digits, recipe = load_digits(), recipe or Recipe()
    base = pretrain(make_task(digits, "base", pretraining=True), recipe, SEED)
    _save(base, out / "base")
    for task, expert in finetune(base, [make_task(digits, name) for name in list(TASKS)[:count]], recipe, SEED):
        _save(expert, out / task.name)


def score(checkpoints: Path, name: str, files: list[Path]) -> list[tuple[float, float]]:
    """Agreement with the true expert, and accuracy, of each reconstruction on the held-out images."""
    task = make_task(load_digits(), name)
    truth = _predict(task, checkpoints / name / "model.safetensors")
    found = [_predict(task, file) for file in files]
    return [((one == truth).float().mean().item(), (one == task.test.labels).float().mean().item()) for one in found]


def _predict(task: Task, file: Path) -> Tensor:
    model = VisionTransformer(ModelConfig(task.num_labels))
    model.load_state_dict({name: value.float() for name, value in load_file(file).items()})
    return predict(model, task.test.images)


def _save(model: VisionTransformer, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), directory / "model.safetensors", {"format": "pt"})


def main() -> None:
    """Train, and say how well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="an empty folder, or one that does not exist")
    parser.add_argument("--count", type=int, default=20, choices=range(2, len(TASKS) + 1), metavar="COUNT", help="2–24")
    arguments = parser.parse_args()
    if arguments.out.exists() and any(arguments.out.iterdir()):
        parser.error(f"{arguments.out} is not empty")
    train(arguments.out, arguments.count)
    print("| task | accuracy of the expert | agreement of the base's body with it |")
    print("|---|---|---|")
    base = load_file(arguments.out / "base" / "model.safetensors")
    for name in names(arguments.out):
        expert = load_file(arguments.out / name / "model.safetensors")
        body = arguments.out / name / "body.safetensors"
        save_file(expert | {key: value for key, value in base.items() if not key.startswith("head.")}, body)
        (_, accuracy), (agreement, _) = score(arguments.out, name, [arguments.out / name / "model.safetensors", body])
        body.unlink()
        print(f"| {name} | {100 * accuracy:.1f} % | {100 * agreement:.1f} % |")


if __name__ == "__main__":
    main()
