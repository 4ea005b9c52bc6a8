"""Train, pack, load by name, score; and the tables that say how it went."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import safetensors.torch
import torch
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from torch import Tensor

from tallstore.demo.digits import Task, load_digits, make_tasks
from tallstore.demo.model import ModelConfig, VisionTransformer
from tallstore.demo.training import Recipe, finetune, predict, pretrain
from tallstore.errors import OutputExistsError
from tallstore.loading.bundle import open_bundle
from tallstore.packing import pack

NOTE: Final = "DEMO.md"
NOTE_TEXT: Final = """\
# What `tallstore demo` left here

- `checkpoints/base`: a small vision transformer, pretrained on scikit-learn's digits
- `checkpoints/<task>`: six full fine-tunes of it
- `bundle`: all seven in one tallstore bundle

The next `tallstore demo` into this folder writes over them.
"""


@dataclass(frozen=True)
class TaskScore:
    """How one expert fares on held-out images, as it was trained and as it came back from the bundle.

    Attributes:
        name: the task's name, by which the expert was loaded.
        trained: accuracy of the checkpoint.
        bundled: accuracy of the expert from the bundle.
        agreement: share of the images for which both say the same.
        cosine: between the task vector (checkpoint - base) and what the bundle holds of it, as its manifest says.
    """

    name: str
    trained: float
    bundled: float
    agreement: float
    cosine: float | None


@dataclass(frozen=True)
class DemoReport:
    """What the demo made and measured.

    Attributes:
        scores: one a task.
        bundle: the bundle's folder.
        base_nbytes: the base's checkpoint.
        experts_nbytes: the experts' checkpoints together.
        bundle_nbytes: the bundle, the base embedded in it.
        task_nbytes: what the last task adds: the bundle's size less that of one packed without this task.
        seconds: how long each of the stages took: training, packing, loading, weighing.
    """

    scores: tuple[TaskScore, ...]
    bundle: Path
    base_nbytes: int
    experts_nbytes: int
    bundle_nbytes: int
    task_nbytes: int
    seconds: Mapping[str, float]

    @property
    def ratio(self) -> float:
        """How many times smaller the bundle is than the checkpoints that it replaces, the base among them."""
        return (self.base_nbytes + self.experts_nbytes) / self.bundle_nbytes

    def scores_table(self) -> Table:
        """Return the scores, a row a task."""
        table = _table("Accuracy on held-out images")
        table.add_column("task", overflow="fold")
        for heading in ("expert", "from the bundle", "agreement", "cosine"):
            table.add_column(heading, justify="right", min_width=6, overflow="fold")
        for score in self.scores:
            shares = (f"{share:.1%}" for share in (score.trained, score.bundled, score.agreement))
            table.add_row(score.name, *shares, "-" if score.cosine is None else f"{score.cosine:.3f}")
        return table

    def sizes_table(self) -> Table:
        """Return the sizes on disk."""
        count = len(self.scores)
        table = _table("Size on disk", show_header=False)
        table.add_column()
        table.add_column(justify="right", no_wrap=True)
        table.add_column()
        table.add_row(f"the base and {count} experts", decimal(self.base_nbytes + self.experts_nbytes), "")
        table.add_row("one bundle of them all", decimal(self.bundle_nbytes), f"{self.ratio:.1f} times smaller")
        share = self.experts_nbytes / count / self.task_nbytes
        table.add_row("one more task", decimal(self.task_nbytes), f"1/{share:.0f} of a checkpoint")
        return table


def run_demo(
    out: Path, *, seed: int = 0, recipe: Recipe | None = None, say: Callable[[str], None] | None = None
) -> DemoReport:
    """Train a base and six experts, pack them, load each by name and score it.

    Leaves ``out/checkpoints`` and ``out/bundle``. About half a minute on two cores.

    Args:
        out: a folder that is empty, does not exist, or holds an earlier demo, which is written over.
        seed: the same seed gives the same weights on one machine.
        recipe: how long to train.
        say: called with a line as each stage is done.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        OutputExistsError: *out* holds something else.
    """
    recipe = recipe or Recipe()
    say = say or _say_nothing
    clock = _Clock()
    digits = load_digits()
    _claim(out)

    source, tasks = make_tasks(digits, torch.Generator().manual_seed(seed))
    base = pretrain(source, recipe, seed)
    say(f"pretrained on {source.about}: {_accuracy(predict(base, source.test.images), source):.1%} right")
    checkpoints = out / "checkpoints"
    _save(base, checkpoints / "base")
    experts = {}
    for task, expert in finetune(base, tasks, recipe, seed):
        experts[task.name] = expert
        _save(expert, checkpoints / task.name)
        say(f"fine-tuned on {task.name}: {task.about}")
    clock.lap("training")

    bundle_path = out / "bundle"
    paths = {task.name: checkpoints / task.name for task in tasks}
    pack(checkpoints / "base", paths, bundle_path, embed_base=True, overwrite=True)
    clock.lap("packing")
    say(f"packed {len(tasks)} experts and their base in {clock.seconds['packing']:.1f} s")

    with open_bundle(bundle_path) as bundle:
        entries = {entry.name: entry for entry in bundle.manifest.tasks}
        scores = tuple(
            _score(task, experts[task.name], bundle.state_dict(task.name), entries[task.name].cosine) for task in tasks
        )
    clock.lap("loading")

    # What a task costs is more than its own files: the shared vectors, the configurations and the manifest change too.
    last = tasks[-1].name
    others = {name: path for name, path in paths.items() if name != last}
    without = pack(checkpoints / "base", others, bundle_path, embed_base=True, overwrite=True, dry_run=True)
    clock.lap("weighing")
    say(f"packed the {len(others)} without {last}, to see what one more costs")

    bundle_nbytes = _nbytes(bundle_path)
    return DemoReport(
        scores=scores,
        bundle=bundle_path,
        base_nbytes=_nbytes(checkpoints / "base"),
        experts_nbytes=sum(_nbytes(path) for path in paths.values()),
        bundle_nbytes=bundle_nbytes,
        task_nbytes=bundle_nbytes - without.bundle_nbytes,
        seconds=clock.seconds,
    )


def main(out: Path, *, seed: int = 0, console: Console | None = None, progress: Console | None = None) -> DemoReport:
    """Run the demo, print how it went, and say what to try next.

    Args:
        out: as of `run_demo`, and so are the errors.
        seed: as of `run_demo`.
        console: where results go; standard output, unless given.
        progress: where lines go that say what is done so far; standard error, unless given.
    """
    console, progress = console or Console(), progress or Console(stderr=True)
    with progress.status("training a small vision transformer on digits, and six fine-tunes of it …"):
        report = run_demo(out, seed=seed, say=lambda line: progress.print(line, style="dim", highlight=False))
    progress.print()
    console.print(report.scores_table())
    console.print()
    console.print(report.sizes_table())
    last = report.scores[-1].name
    console.print(f"one more task: this bundle's size less that of one packed without {last}", style="dim")
    console.print(f"\nDone in {sum(report.seconds.values()):.0f} s. The bundle stays here; try next:")
    for command in commands_to_try(report):
        console.print(f"  {command}", style="bold", markup=False, highlight=False, soft_wrap=True)
    return report


def commands_to_try(report: DemoReport) -> tuple[str, ...]:
    """Return commands for the shell that the demo was called from: what is in the bundle, is it whole, get one back."""
    program, bundle, name = _program(), shlex.quote(str(report.bundle)), report.scores[0].name
    export = report.bundle.parent / name
    again = " --overwrite" if export.exists() else ""
    return (
        f"{program} inspect {bundle}",
        f"{program} verify {bundle}",
        f"{program} export {bundle} {name} --out {shlex.quote(str(export))}{again}",
    )


def _table(title: str, *, show_header: bool = True) -> Table:
    return Table(
        title=title,
        title_justify="left",
        show_header=show_header,
        show_edge=False,
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )


def _program() -> str:
    """How to call tallstore from the shell that the demo was called from, where its environment may not be active."""
    if shutil.which("tallstore"):
        return "tallstore"
    script, here = Path(sys.executable).with_name("tallstore"), Path.cwd()
    if not script.exists():
        return f"{shlex.quote(sys.executable)} -m tallstore"
    return shlex.quote(str(script.relative_to(here) if script.is_relative_to(here) else script))


def _say_nothing(_line: str) -> None:
    pass


class _Clock:
    """Seconds of each lap, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._start = now - self._start, now


def _claim(out: Path) -> None:
    """Make *out* the demo's: it must be new, empty, or an earlier demo's."""
    if out.exists() and not (out / NOTE).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise OutputExistsError(f"{out}: is there already, and not from an earlier demo; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    (out / NOTE).write_text(NOTE_TEXT, encoding="utf-8")


def _save(model: VisionTransformer, folder: Path) -> None:
    """Write a checkpoint in Hugging Face's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_json(), indent=2) + "\n", encoding="utf-8")
    # Not save_file, whose files nobody else may read.
    (folder / "model.safetensors").write_bytes(safetensors.torch.save(model.state_dict(), {"format": "pt"}))


def _score(task: Task, trained: VisionTransformer, weights: dict[str, Tensor], cosine: float | None) -> TaskScore:
    bundled = VisionTransformer(ModelConfig(task.num_labels))
    bundled.load_state_dict(weights)
    expected, found = predict(trained, task.test.images), predict(bundled, task.test.images)
    return TaskScore(
        name=task.name,
        trained=_accuracy(expected, task),
        bundled=_accuracy(found, task),
        agreement=(expected == found).double().mean().item(),
        cosine=cosine,
    )


def _accuracy(predictions: Tensor, task: Task) -> float:
    return (predictions == task.test.labels).double().mean().item()


def _nbytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
