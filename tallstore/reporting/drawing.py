"""How plots are drawn: by matplotlib, the same on every machine, in colours that a page can set.

A plot is drawn once a palette. In the page's own, colours are variables of its style sheet, so that one drawing is
legible in light and in dark; a file has those of the light theme, on a background of its own.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from tallstore.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH: Final = 9.0  # inches
FONT: Final = 9.5  # points
_LONGEST_NAME: Final = 26
_STRONGEST: Final = 0.8  # of a cell's colour: text on it stays legible, in light and in dark
_HEAT: Final = (47, 111, 214)
_DPI: Final = 200
_PADDING: Final = 0.12  # inches around what stands alone, on a background that may not be its surroundings'
_PADS: Final[Any] = ("figure.constrained_layout.w_pad", "figure.constrained_layout.h_pad")
_MARK: Final = "tallstore"
_STYLE: Final[Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tallstore",
    "font.family": ["sans-serif"],
    "font.size": FONT,
    "axes.titlesize": FONT + 0.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "text.parse_math": False,  # a dollar sign in a name is one
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Palette:
    """The colours of a plot: text, thinner text, lines, and what stands for the things that are shown."""

    ink: str
    muted: str
    line: str
    background: str
    first: str
    second: str
    third: str
    fourth: str


LIGHT: Final = Palette("#1b1f27", "#555d6b", "#d8dce3", "#ffffff", "#2f6fd6", "#c8641b", "#8a93a3", "#2e8b57")
# Colours that nothing else has, each standing for a variable of the page's style sheet.
_NAMES: Final = tuple(Palette.__dataclass_fields__)
_PAGE: Final = Palette(*(f"#fe01{number:02x}" for number in range(len(_NAMES))))
_VARIABLES: Final = {getattr(_PAGE, name): f"var(--plot-{name})" for name in _NAMES}

Draw = Callable[["Figure", Palette], None]


@dataclass(frozen=True)
class Plot:
    """A plot of a bundle.

    Attributes:
        name: of a file, without its ending.
        title: what it shows, in a few words.
        description: what it says, in sentences, for those who do not see it.
        height: in inches.
        draw: draws it.
    """

    name: str
    title: str
    description: str
    height: float
    draw: Draw

    def inline(self) -> str:
        """An ``<svg>`` for a page whose style sheet has the colours, labelled by its title and description."""
        drawing = self._render("svg", _PAGE).decode()
        drawing = re.sub("|".join(_VARIABLES), lambda found: _VARIABLES[found[0]], drawing)
        return _embeddable(drawing, self)

    def file(self, kind: Literal["svg", "png"] = "svg") -> bytes:
        """A file that stands alone: the same bytes for the same bundle, by one version of matplotlib."""
        return self._render(kind, LIGHT)

    def _render(self, kind: Literal["svg", "png"], palette: Palette) -> bytes:
        out = io.BytesIO()
        with _matplotlib(palette) as new_figure:
            figure = new_figure((WIDTH, self.height))
            self.draw(figure, palette)
            page = palette is _PAGE
            told = dict.fromkeys(("Date", "Creator", "Format", "Type")) if kind == "svg" else {"Software": _MARK}
            figure.savefig(out, format=kind, dpi=_DPI, metadata=told, facecolor="none" if page else palette.background)
        return out.getvalue()


def is_png_of_ours(raw: bytes) -> bool:
    """Whether a file is what `Plot.file` made: it says so."""
    return raw.startswith(b"\x89PNG") and b"tEXtSoftware\0" + _MARK.encode() in raw[:512]


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def check_matplotlib() -> None:
    """Make sure that plots can be drawn, before anything is measured for them.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    if not can_draw():
        raise MissingExtraError("the report", "matplotlib", "report")


@contextmanager
def _matplotlib(palette: Palette) -> Iterator[Callable[[tuple[float, float]], Figure]]:
    """Matplotlib in our style, whatever the user's is; what makes a figure. No other thread should draw meanwhile.

    Raises:
        MissingExtraError: it is not installed.
    """
    check_matplotlib()
    import matplotlib as mpl  # noqa: PLC0415 - an extra
    from matplotlib.figure import Figure  # noqa: PLC0415

    log = logging.getLogger("matplotlib.font_manager")
    level = log.level
    with warnings.catch_warnings(), mpl.rc_context():
        # A browser has the characters that the font for measuring lacks.
        warnings.simplefilter("ignore")
        log.setLevel(logging.ERROR)
        try:
            mpl.rcdefaults()
            mpl.rcParams.update(_STYLE)
            mpl.rcParams.update(
                {
                    "text.color": palette.ink,
                    "axes.labelcolor": palette.muted,
                    "xtick.color": palette.muted,
                    "ytick.color": palette.muted,
                    "axes.edgecolor": palette.line,
                    "grid.color": palette.line,
                }
            )
            if palette is not _PAGE:
                mpl.rcParams.update(dict.fromkeys(_PADS, _PADDING))
            yield lambda size: Figure(figsize=size)
        finally:
            log.setLevel(level)


def _embeddable(drawing: str, plot: Plot) -> str:
    """What of a drawing a page takes: without a prolog, ids of its own, no font, no size but that of its place."""
    body = drawing[drawing.index("<svg") :]
    head, _, rest = body.partition(">")
    (view,) = re.findall(r'viewBox="[^"]*"', head)
    rest = re.sub(r"<metadata>.*?</metadata>|<style\b.*?</style>", "", rest, flags=re.DOTALL)
    rest = re.sub(r'\bid="([^"]*)"', rf'id="{plot.name}-\1"', rest)
    rest = re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\1{plot.name}-", rest)
    # Matplotlib before 3.11 writes weight, size and families as one property.
    rest = re.sub(r"font: (?:(\d+) )?([\d.]+px) [^;\"]*", _size_and_weight, rest)
    rest = re.sub(r"font-family: [^;\"]*; ?", "", rest)
    rest = rest.replace("xlink:href", "href")
    title, text = f"{plot.name}-title", f"{plot.name}-description"
    return (
        f'<svg {view} role="img" aria-labelledby="{title}" aria-describedby="{text}">'
        f'<title id="{title}">{escape(plot.title)}</title><desc id="{text}">{escape(plot.description)}</desc>'
        f"{rest.strip()}"
    )


def _size_and_weight(font: re.Match[str]) -> str:
    weight, size = font.groups()
    return f"font-size: {size}" if weight is None else f"font-weight: {weight}; font-size: {size}"


def shown(name: str, longest: int = _LONGEST_NAME) -> str:
    """A name that fits beside an axis, its middle left out where it is too long."""
    name = re.sub(r"[\ud800-\udfff\ufffe\uffff]", "\ufffd", name)  # what XML has no place for
    if len(name) <= longest:
        return name
    kept = longest - 1
    return f"{name[: -(-kept // 2)]}…{name[-(kept // 2) :]}"


def shown_tensor(name: str, longest: int = _LONGEST_NAME) -> str:
    """The name of a tensor, or of a block, that fits: of a longer one, the last parts, which tell it from others."""
    name = name.removesuffix(".weight")
    kept = name
    while len(kept) >= longest and "." in kept:
        kept = kept.partition(".")[2]
    return name if kept == name and len(name) <= longest else shown(kept if kept == name else f"…{kept}", longest)


def label_ticks(axes: Axes, which: Literal["x", "y"], labels: list[str], most: int | None = None) -> None:
    """Put *labels* at 0, 1, 2, …: every second one, or third, … where there are more than *most*."""
    step = 1 if most is None else max(1, -(-len(labels) // most))
    places = list(range(0, len(labels), step))
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_ticks(places, [labels[place] for place in places])


def heat(values: NDArray[np.float64], low: float, high: float) -> NDArray[np.uint8]:
    """A picture of *values*, [rows, columns] to [rows, columns, 4]: one colour, the stronger the larger; NaN is clear.

    On a white page small values are white, on a dark one they are dark.
    """
    share = (values - low) / (high - low) if high > low else np.full_like(values, 0.5)
    alpha = np.where(np.isnan(values), 0.0, 0.03 + (_STRONGEST - 0.03) * np.clip(share, 0, 1))
    picture = np.empty((*values.shape, 4), np.uint8)
    picture[..., :3] = _HEAT
    picture[..., 3] = np.rint(255 * np.nan_to_num(alpha))
    return picture
