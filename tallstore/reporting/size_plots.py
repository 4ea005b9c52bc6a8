"""Plots of how small a bundle is: beside its checkpoints, and what it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tallstore.inspecting.summary import BundleSummary
from tallstore.reporting.drawing import Palette, Plot
from tallstore.sizes import readable, several

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_SEGMENTS: Final = 60
_BAR: Final = 0.62
_OWN: Final = "second"


@dataclass(frozen=True)
class Part:
    """Files of a bundle that are of one sort.

    Attributes:
        label: what they are.
        nbytes: their bytes.
        colour: the palette's.
    """

    label: str
    nbytes: int
    colour: str


def parts_of(summary: BundleSummary) -> tuple[Part, ...]:
    """What the bundle's bytes are; together they are all of them."""
    base = "the base" if summary.base.embedded else "hashes of the base"
    parts = [
        Part(base, summary.base_nbytes, "third"),
        Part("shared by the tasks", summary.shared_nbytes, "first"),
        Part("the tasks' own", summary.tasks_nbytes, _OWN),
        Part("configs and tokenizers", summary.companions_nbytes, "fourth"),
    ]
    rest = summary.nbytes - sum(part.nbytes for part in parts)
    return (*(part for part in parts if part.nbytes), Part("the manifest", rest, "muted"))


def sizes(summary: BundleSummary) -> Plot:
    """The bundle beside its checkpoints, on one scale; and its parts."""
    parts = parts_of(summary)
    made_of = ", ".join(f"{readable(part.nbytes)} {part.label}" for part in parts)
    told = f"The bundle is {readable(summary.nbytes)}: {made_of}."
    if summary.ratio is not None:
        verb = "is" if len(summary.weighed) == 1 and not summary.base.embedded else "are"
        told = (
            f"{_checkpoints(summary)} {verb} {readable(summary.checkpoints_nbytes)}, the bundle is"
            f" {readable(summary.weighed_nbytes)}, {summary.ratio:.1f} times smaller. {told}"
        )

    def draw(figure: Figure, palette: Palette) -> None:
        if summary.ratio is None:
            _draw_parts(figure.subplots(), parts, palette)
            return
        upper, lower = figure.subplots(2, 1, height_ratios=(2, 1))
        _draw_both(upper, summary, parts, palette)
        _draw_parts(lower, parts, palette)

    return Plot("sizes", "The bundle's size beside that of its checkpoints", told, 3.0 if summary.ratio else 1.5, draw)


def _checkpoints(summary: BundleSummary) -> str:
    count = several(len(summary.weighed), "checkpoint")
    return f"{count} and the base's" if summary.base.embedded else count


def _draw_both(axes: Axes, summary: BundleSummary, parts: Sequence[Part], palette: Palette) -> None:
    experts = [task.checkpoint_nbytes or 0 for task in summary.weighed]
    if len(experts) > _MOST_SEGMENTS:
        experts = [sum(experts)]
    base = (summary.base.checkpoint_nbytes or 0) if summary.base.embedded else 0
    _draw_bar(axes, 1, [(size, palette.third) for size in (base, *experts)], palette)
    most, small = summary.checkpoints_nbytes, summary.weighed_nbytes
    absent = summary.nbytes - small  # tasks whose checkpoints' sizes are not known stand in the lower bar alone
    here = [(part.nbytes - absent * (part.colour == _OWN), getattr(palette, part.colour)) for part in parts]
    left = 0
    for nbytes, colour in here:
        axes.barh(0, nbytes, left=left, height=_BAR, color=colour)
        left += nbytes
    for row, nbytes in ((1, most), (0, small)):
        axes.text(nbytes + most * 0.008, row, readable(nbytes), va="center", weight="bold")
    axes.set_yticks((1, 0), (_checkpoints(summary), "this bundle"))
    axes.tick_params(axis="y", labelcolor=palette.ink)
    axes.set_xlim(0, max(most, small) * 1.1)
    axes.set_xticks([])
    axes.spines[["bottom"]].set_visible(False)


def _draw_parts(axes: Axes, parts: Sequence[Part], palette: Palette) -> None:
    _draw_bar(axes, 0, [(part.nbytes, getattr(palette, part.colour)) for part in parts], palette)
    axes.set_axis_off()
    axes.set_title("What the bundle is made of")
    axes.set_xlim(0, sum(part.nbytes for part in parts))
    labels = [f"{part.label}: {readable(part.nbytes)}" for part in parts]
    bars = [axes.barh(0, 0, color=getattr(palette, part.colour)) for part in parts]
    axes.legend(bars, labels, loc="upper left", bbox_to_anchor=(-0.01, 0.0), ncols=3, handlelength=1, handleheight=1)


def _draw_bar(axes: Axes, row: int, segments: Sequence[tuple[int, str]], palette: Palette) -> None:
    left = 0
    for nbytes, colour in segments:
        axes.barh(row, nbytes, left=left, height=_BAR, color=colour, edgecolor=palette.background, linewidth=0.6)
        left += nbytes
