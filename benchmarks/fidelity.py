"""How often a packed expert predicts what the true expert predicts, beside the dense float64 formula of the same fit.

    pip install deltatensors==0.2.0
    python benchmarks/fidelity.py --experts DIR [--tasks NAME,NAME] [--fits TEXT ...] [--no-formulas]
    python benchmarks/fidelity.py --small 20 [--trained OUT]

DIR holds fine-tunes and an `experts.py` that builds their checkpoints (`build OUT`) and scores reconstructions
(`score OUT TASK FILE...`); --small trains its experts itself (small_experts.py). Every expert is packed, loaded back
from the bundle's bytes, written with `export`, and scored. A peer that is not installed is left out, and told of.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import dense_fits
import small_experts
import torch
from dense_fits import DenseFit, Weights
from peer_stores import Expert, Peer, peers
from safetensors.torch import load_file, save_file

import tallstore
from tallstore.exporting import export
from tallstore.fit import Method

AT_ONCE = 5  # fits whose reconstructions are on the disk together, and scored in one go a task
MOST_COLUMNS = 4  # more tasks than that get no column each


@dataclass(frozen=True)
class Fit:
    """What is packed, or stored by a peer, and its formula; one of them may be missing."""

    name: str
    method: Method | None = None
    dense: DenseFit | None = None
    nominal_bits: float | None = None
    peer: Peer | None = None


def formula(name: str, dense: DenseFit, nominal_bits: float | None = None) -> Fit:
    """A fit that is no more than a formula."""
    return Fit(name, None, dense, nominal_bits)


FITS = (
    Fit("SignedMask()", tallstore.SignedMask(), DenseFit(dense_fits.signed_mask(1.2))),
    Fit("SignedMask(threshold=0.9)", tallstore.SignedMask(0.9), DenseFit(dense_fits.signed_mask(0.9))),
    Fit("SignedMask(scale='row')", tallstore.SignedMask(scale="row"), DenseFit(dense_fits.signed_mask(1.2, "row"))),
    Fit("TallMask()", tallstore.TallMask(), DenseFit(dense_fits.tall_mask(1.0))),
    Fit(
        "TallMask.published()",
        tallstore.TallMask.published(),
        DenseFit(dense_fits.tall_mask(0.4, ties=True), "published", kept=0.2),
    ),
    Fit("Emr()", tallstore.Emr(), DenseFit(dense_fits.emr, "magnitudes", by="task")),
    Fit("Emr(gain='one')", tallstore.Emr(gain="one"), DenseFit(dense_fits.emr)),
    Fit("LeastSquares()", tallstore.LeastSquares(), DenseFit(dense_fits.least_squares(1))),
    Fit("LeastSquares(levels=2)", tallstore.LeastSquares(levels=2), DenseFit(dense_fits.least_squares(2))),
    Fit("Sign()", tallstore.Sign(), DenseFit(dense_fits.sign("row"))),
    Fit("Sign(scale='tensor')", tallstore.Sign(scale="tensor"), DenseFit(dense_fits.sign())),
    Fit(
        "BitDelta: Sign(scale='tensor', gain='published')",
        tallstore.Sign(scale="tensor", gain="published"),
        DenseFit(dense_fits.sign(), "published"),
    ),
    Fit("Uniform(levels=3)", tallstore.Uniform(levels=3), DenseFit(dense_fits.uniform(3))),
    Fit(
        "Uniform(levels=3, scale='tensor')",
        tallstore.Uniform(levels=3, scale="tensor"),
        DenseFit(dense_fits.uniform(3, "tensor")),
    ),
    Fit(
        "Uniform(levels=3, scale='tensor', threshold=1.5)",
        tallstore.Uniform(levels=3, scale="tensor", threshold=1.5),
        DenseFit(dense_fits.uniform(3, "tensor", threshold=1.5)),
    ),
    Fit(
        "Uniform(levels=3, threshold=1.0)",
        tallstore.Uniform(levels=3, threshold=1.0),
        DenseFit(dense_fits.uniform(3, threshold=1.0)),
    ),
    Fit("Uniform()", tallstore.Uniform(), DenseFit(dense_fits.uniform(4))),
    Fit("Uniform(levels=8)", tallstore.Uniform(levels=8), DenseFit(dense_fits.uniform(8))),
    Fit("Localize()", tallstore.Localize(), DenseFit(dense_fits.localize, kept=0.01)),
    Fit(
        "Localize(gain='published')",
        tallstore.Localize(gain="published"),
        DenseFit(dense_fits.localize, "published", kept=0.01),
    ),
    Fit("Auto(1.1)", tallstore.Auto(1.1)),
    Fit("Auto(0.75)", tallstore.Auto(0.75)),
    *(
        formula(f"TVQ, {nbits} bits", DenseFit(dense_fits.asymmetric(nbits), "published"), float(nbits))
        for nbits in (2, 3, 4)
    ),
    *(Fit(peer.name, peer=peer) for peer in peers("float32") if peer.package == "deltatensors"),
)

Scorer = Callable[[str, list[Path]], list[tuple[float, float]]]


@dataclass(frozen=True)
class Family:
    """A base and its experts in one dtype, and what scores their reconstructions.

    Attributes:
        dtype: of all of them.
        checkpoints: `base` and a directory a task, with `model.safetensors`.
        tasks: those that are packed together.
        score: agreement and accuracy, from 0 to 1, of each file, for a task.
    """

    dtype: str
    checkpoints: Path
    tasks: tuple[str, ...]
    score: Scorer

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """Of one expert, or of the base."""
        return load_file(self.checkpoints / name / "model.safetensors")


@dataclass(frozen=True)
class Row:
    """One fit.

    Attributes:
        dense, packed: agreement in percent by task, from the formula, and from the bundle or a peer's files; empty
            where there is none.
        accuracy: by task, in percent; from the bundle where there is one.
        cosine: mean over the tasks, of what is coded; from the bundle where there is one.
        bits: a parameter costs that was to be coded (see `tallstore.inspecting.cost`); of a peer, any parameter.
        nbytes: of the bundle; of a peer, of its files.
        whole: tensors that were stored whole because the fit degenerated, over all tasks; *bits* has them too.
        seconds: `pack` took.
    """

    dtype: str
    fit: str
    dense: Mapping[str, float]
    packed: Mapping[str, float]
    accuracy: Mapping[str, float]
    cosine: float
    bits: float | None = None
    nbytes: int | None = None
    whole: int = 0
    seconds: float | None = None

    @property
    def agreement(self) -> Mapping[str, float]:
        """From the bundle where there is one."""
        return self.packed or self.dense


def run_experts(folder: Path, *arguments: str) -> str:
    """What experts.py prints."""
    command = [sys.executable, str(folder / "experts.py"), "--folder", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def score(folder: Path, checkpoints: Path, task: str, files: list[Path], limit: int) -> list[tuple[float, float]]:
    """Agreement and accuracy of each file."""
    printed = run_experts(folder, "score", str(checkpoints), task, *map(str, files), "--limit", str(limit))
    found = re.findall(r"agreement ([0-9.]+) accuracy ([0-9.]+)", printed)
    return [(float(agreement), float(accuracy)) for agreement, accuracy in found]


def copy_as(dtype: torch.dtype, source: Path, target: Path) -> None:
    """The same checkpoints in another dtype."""
    for directory in sorted(path for path in source.iterdir() if path.is_dir()):
        (target / directory.name).mkdir(parents=True)
        weights = {name: value.to(dtype) for name, value in load_file(directory / "model.safetensors").items()}
        save_file(weights, target / directory.name / "model.safetensors", {"format": "pt"})


@contextlib.contextmanager
def encoders(folder: Path, dtype: str, tasks: Sequence[str], limit: int) -> Iterator[Family]:
    """The experts of a folder with an experts.py; all of them where *tasks* names none."""
    with tempfile.TemporaryDirectory(prefix="tallstore-fidelity-") as scratch:
        checkpoints = Path(scratch) / "float32"
        run_experts(folder, "build", str(checkpoints))
        if dtype != "float32":
            copy_as(getattr(torch, dtype), checkpoints, Path(scratch) / dtype)
            checkpoints = Path(scratch) / dtype
        found = sorted(path.name for path in checkpoints.iterdir() if path.is_dir() and path.name != "base")
        chosen = tuple(tasks) or tuple(found)
        yield Family(dtype, checkpoints, chosen, lambda task, files: score(folder, checkpoints, task, files, limit))


@contextlib.contextmanager
def small(count: int, dtype: str, trained: Path | None) -> Iterator[Family]:
    """The first *count* experts that small_experts.py trains, or has trained already."""
    with tempfile.TemporaryDirectory(prefix="tallstore-fidelity-") as scratch:
        checkpoints = trained or Path(scratch) / "float32"
        if trained is None:
            small_experts.train(checkpoints, count)
        tasks = small_experts.names(checkpoints)[:count]
        if len(tasks) < count:
            raise SystemExit(f"{checkpoints} has {len(tasks)} experts: train more with small_experts.py")
        if dtype != "float32":
            copy_as(getattr(torch, dtype), checkpoints, Path(scratch) / dtype)
            checkpoints = Path(scratch) / dtype
        yield Family(
            dtype, checkpoints, tuple(tasks), lambda task, files: small_experts.score(checkpoints, task, files)
        )


@dataclass(frozen=True)
class Made:
    """One fit's row, and its reconstructions to be scored: files by task, from the formula and from the bundle."""

    row: Row
    dense: Mapping[str, Path] = field(default_factory=dict)
    packed: Mapping[str, Path] = field(default_factory=dict)


def measure(
    family: Family, fits: Sequence[Fit], scratch: Path, precision: torch.dtype = torch.float64
) -> Iterator[Row]:
    """Pack with every fit, compute its formula in *precision*, and score both; fits that refuse are told of."""
    base = family.weights("base")
    experts = {task: family.weights(task) for task in family.tasks}
    for first in range(0, len(fits), AT_ONCE):
        with tempfile.TemporaryDirectory(dir=scratch) as place:
            made = []
            for number, fit in enumerate(fits[first : first + AT_ONCE]):
                one = Made(Row(family.dtype, fit.name, {}, {}, {}, 0.0, fit.nominal_bits))
                if fit.dense is not None:
                    one = _compute(
                        one, fit.dense, base, experts, place=Path(place) / f"{number}-dense", precision=precision
                    )
                try:
                    if fit.peer is not None:
                        one = _store(one, fit.peer, family, Path(place) / f"{number}-peer")
                    elif fit.method is not None:
                        one = _pack(one, fit.method, family, Path(place) / f"{number}-packed")
                except (tallstore.OptionError, ValueError) as error:  # a peer's, of heads of different classes
                    print(f"{fit.name}: {error}", file=sys.stderr)
                if one.dense or one.packed:
                    made.append(one)
            yield from _scored(family, made)


def _compute(
    one: Made, dense: DenseFit, base: Weights, experts: Mapping[str, Weights], *, place: Path, precision: torch.dtype
) -> Made:
    rebuilt = dense_fits.rebuild(dense, base, experts, precision)
    found = [dense_fits.cosine(dense, base, experts[task], rebuilt[task]) for task in experts]
    return replace(one, row=replace(one.row, cosine=statistics.mean(found)), dense=_save(rebuilt, place))


def _save(rebuilt: Mapping[str, Weights], place: Path) -> dict[str, Path]:
    place.mkdir()
    files = {task: place / f"{task}.safetensors" for task in rebuilt}
    for task, weights in rebuilt.items():
        save_file({name: value.contiguous() for name, value in weights.items()}, files[task])
    return files


def _pack(one: Made, method: Method, family: Family, place: Path) -> Made:
    base = family.checkpoints / "base"
    begun = time.perf_counter()
    report = tallstore.pack(base, {task: family.checkpoints / task for task in family.tasks}, place, method=method)
    seconds = time.perf_counter() - begun
    with tallstore.open_bundle(place, base=base) as bundle:
        for task in family.tasks:
            export(bundle, task, place.with_name(f"{place.name}-{task}"))
    row = replace(
        one.row,
        cosine=statistics.mean(task.cosine or 0.0 for task in report.tasks),
        bits=statistics.mean(task.bits or 0.0 for task in report.tasks),
        nbytes=report.bundle_nbytes,
        whole=sum(stored.degenerate for task in report.tasks for stored in task.whole),
        seconds=seconds,
    )
    files = {task: place.with_name(f"{place.name}-{task}") / "model.safetensors" for task in family.tasks}
    return replace(one, row=row, packed=files)


def _store(one: Made, peer: Peer, family: Family, place: Path) -> Made:
    if missing := peer.missing():
        raise ValueError(missing)
    base, sizes, cosines, packed = family.weights("base"), [], [], {}
    for task in family.tasks:
        folder = place / task
        folder.mkdir(parents=True)
        stored = peer.store(Expert(family.checkpoints / "base", family.checkpoints / task, folder), folder)
        sizes.append(stored.nbytes)
        packed[task] = place / f"{task}.safetensors"
        save_file({name: value.contiguous() for name, value in stored.weights.items()}, packed[task])
        cosines.append(dense_fits.cosine(DenseFit(dense_fits.sign()), base, family.weights(task), stored.weights))
    bits = 8 * statistics.mean(sizes) / sum(value.numel() for value in base.values())
    row = replace(one.row, cosine=statistics.mean(cosines), bits=bits, nbytes=sum(sizes))
    return replace(one, row=row, packed=packed)


def _scored(family: Family, made: Sequence[Made]) -> list[Row]:
    agreement: dict[Path, float] = {}
    accuracy: dict[Path, float] = {}
    for task in family.tasks:
        files = [files[task] for one in made for files in (one.dense, one.packed) if files]
        for file, (agreed, right) in zip(files, family.score(task, files), strict=True):
            agreement[file], accuracy[file] = 100 * agreed, 100 * right
    return [
        replace(
            one.row,
            dense={task: agreement[file] for task, file in one.dense.items()},
            packed={task: agreement[file] for task, file in one.packed.items()},
            accuracy={task: accuracy[file] for task, file in (one.packed or one.dense).items()},
        )
        for one in made
    ]


def heading(tasks: Sequence[str]) -> str:
    """Of the table."""
    columns = ["dtype", "fit", "agreement (formula)", "difference", "worst task", "accuracy", "cosine", "bits", "MB"]
    columns += tasks if len(tasks) <= MOST_COLUMNS else []
    return f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"


def line(row: Row) -> str:
    """Of the table."""
    agreement, accuracy = (statistics.mean(values.values()) for values in (row.agreement, row.accuracy))
    cells = [row.dtype, row.fit, f"{agreement:.2f}", "", f"{min(row.agreement.values()):.2f}", f"{accuracy:.2f}"]
    if row.dense:
        dense = statistics.mean(row.dense.values())
        cells[2] = f"{agreement:.2f} ({dense:.2f})" if row.packed else f"({dense:.2f})"
        cells[3] = f"{agreement - dense:+.2f}" if row.packed else ""
    cells.append(f"{row.cosine:.4f}")
    cells.append("" if row.bits is None else f"{row.bits:.2f}" + (f", {row.whole} tensors whole" if row.whole else ""))
    cells.append("" if row.nbytes is None else f"{row.nbytes / 1e6:.2f}")
    if len(row.agreement) <= MOST_COLUMNS:
        for task in row.agreement:
            told = [f"{row.packed[task]:.2f}"] if row.packed else []
            told += [f"({row.dense[task]:.2f})"] if row.dense else []
            cells.append(" ".join(told))
    return f"| {' | '.join(cells)} |"


def add_source(parser: argparse.ArgumentParser) -> None:
    """The options that say which experts."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--experts", type=Path, metavar="DIR", help="with experts.py and the fine-tunes")
    source.add_argument("--small", type=int, metavar="COUNT", help="how many small experts, 2 to 24")
    parser.add_argument("--trained", type=Path, metavar="OUT", help="where small_experts.py left its experts")
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=[], help="of DIR, with commas between")
    parser.add_argument("--limit", type=int, default=400, help="test examples a task of DIR")


def open_family(arguments: argparse.Namespace, dtype: str) -> contextlib.AbstractContextManager[Family]:
    """The experts that were asked for."""
    if arguments.small is not None:
        return small(arguments.small, dtype, arguments.trained)
    return encoders(arguments.experts, dtype, arguments.tasks, arguments.limit)


def main() -> None:
    """Build, pack, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source(parser)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--fits", nargs="+", default=[""], metavar="TEXT", help="only those with a TEXT in their name")
    parser.add_argument("--no-formulas", action="store_true", help="score what was packed alone, in half the time")
    arguments = parser.parse_args()
    fits = [fit for fit in FITS if any(text in fit.name for text in arguments.fits)]
    if arguments.no_formulas:
        fits = [fit if fit.method is None else replace(fit, dense=None) for fit in fits]
    for dtype in arguments.dtypes:
        with open_family(arguments, dtype) as family, tempfile.TemporaryDirectory() as scratch:
            if dtype == arguments.dtypes[0]:
                print("Agreement with the true expert in %, from the bundle (from the dense float64 formula):\n")
                print(heading(family.tasks))
            for row in measure(family, fits, Path(scratch)):
                print(line(row), flush=True)


if __name__ == "__main__":
    main()
