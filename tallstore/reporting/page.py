"""The report as one HTML page that needs nothing else: no network, no font, no script but its own.

The script sorts tables; without it everything is there, and nothing pretends to be a button. What a bundle's author
wrote is text in it, and the page's policy lets no script run but the one whose hash it names.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Final

from tallstore.inspecting.statistics import Statistics
from tallstore.inspecting.summary import BundleSummary
from tallstore.reporting import tables
from tallstore.reporting.blocks import masked_blocks, shared_blocks
from tallstore.reporting.drawing import Plot
from tallstore.reporting.markup import Markup, join, name, tag
from tallstore.reporting.mask_plots import MOST_NAMED, MOST_ROWS
from tallstore.reporting.measuring import Measured
from tallstore.reporting.plots import plots_of
from tallstore.reporting.tables import Cell, Column, Table
from tallstore.sizes import count, readable, several

_SHORT_HASH: Final = 12
_SHOWN_NAMES: Final = 8
_MOST_SHOWN: Final = 25  # rows of a table; those beyond are scrolled


def render(measured: Measured) -> str:
    """The page of a bundle: the same for the same bundle, by one version of matplotlib.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    plots = {plot.name: plot for plot in plots_of(measured)}
    title = f"{measured.name}: {several(len(measured.summary.tasks), 'expert')} in one bundle"
    sections = list(_sections(measured, plots))
    style, script = _resource("page.css"), _resource("page.js")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(script)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="generator", content="tallstore"),
        tag("title", title),
        tag("link", rel="icon", href="data:,"),
        tag("style", Markup(style)),
    )
    contents = [tag("li", tag("a", heading, href=f"#{anchor}")) for anchor, heading, _ in sections]
    body = tag(
        "body",
        tag("a", "Skip to the content", class_="skip", href="#content"),
        _header(measured),
        tag("nav", tag("ul", *contents), aria_label="Contents"),
        tag("main", *_notices(measured), *(_section(*section) for section in sections), id="content", tabindex="-1"),
        _footer(measured.summary),
        tag("p", class_="unseen", role="status", id="status"),
        tag("script", Markup(script)),
    )
    return f'<!doctype html>\n<html lang="en">{head}{body}</html>\n'


def _resource(file: str) -> str:
    return (resources.files(__package__) / file).read_text(encoding="utf-8")


def _policy(script: str) -> str:
    """What the page may do: show itself, and run the one script that it has. Plots have styles and pictures inside."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}';"
        " base-uri 'none'; form-action 'none'"
    )


# --- around the sections ----------------------------------------------------------------------------------------------


def _header(measured: Measured) -> Markup:
    summary, base = measured.summary, measured.summary.base
    revision = "" if base.revision is None else f"@{base.revision[:_SHORT_HASH]}"
    of = name(base.repo_id + revision) if base.repo_id else "one base"
    place = "which is in the bundle" if base.embedded else "which is not in the bundle"
    size = ""
    if base.parameters is not None and base.tensors is not None:
        size = f" ({count(base.parameters)} parameters in {several(base.tensors, 'tensor')})"
    tiles = [
        (f"{len(summary.tasks):,}", "expert" if len(summary.tasks) == 1 else "experts"),
        (readable(summary.nbytes), "the whole bundle"),
    ]
    if summary.ratio is not None:
        whom = several(len(summary.weighed), "checkpoint")
        whom += f" of {len(summary.tasks)}" if len(summary.weighed) < len(summary.tasks) else ""
        whom += " and the base’s" if base.embedded else ""
        tiles.append((f"{summary.ratio:.1f} ×", f"smaller than {whom}, {readable(summary.checkpoints_nbytes)}"))
    bits = [task.bits for task in summary.tasks if task.bits is not None]
    if bits:
        tiles.append((_span(bits, 2), "bits a parameter of an expert"))
    cosines = [task.cosine for task in summary.tasks if task.cosine is not None]
    if cosines:
        tiles.append((_span(cosines, 3), "cosine with the true task vectors"))
    return tag(
        "header",
        tag("p", "A tallstore bundle", class_="kind"),
        tag("h1", name(measured.name)),
        tag("p", f"{several(len(summary.tasks), 'expert')} of ", of, f"{size}, {place}."),
        tag("dl", *(tag("div", tag("dt", label), tag("dd", value)) for value, label in tiles), class_="tiles"),
    )


def _span(values: Sequence[float], digits: int) -> str:
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low}–{high}"


def _notices(measured: Measured) -> Iterator[Markup]:
    """What of the bundle the page does not tell, since it is not here or cannot be read."""
    if measured.not_fetched:
        yield _notice(
            f"{several(len(measured.not_fetched), 'task')} of {len(measured.summary.tasks)} not fetched, and left"
            " out of all that needs their files: ",
            measured.not_fetched,
        )
    if measured.unreadable:
        yield _notice(
            f"{several(len(measured.unreadable), 'task')} that only a newer tallstore reads: ", measured.unreadable
        )


def _notice(text: str, tasks: Sequence[str]) -> Markup:
    shown = [name(task) for task in tasks[:_SHOWN_NAMES]]
    parts = [part for each in shown for part in (each, ", ")][:-1]
    more = f", and {len(tasks) - len(shown):,} more" if len(tasks) > len(shown) else ""
    return tag("p", text, *parts, f"{more}.", class_="notice")


def _footer(summary: BundleSummary) -> Markup:
    return tag("footer", tag("p", f"Format {summary.format_version}, packed by {summary.generator}."))


# --- sections ---------------------------------------------------------------------------------------------------------

_Section = tuple[str, str, Markup]  # its id, its heading, what is below


def _section(anchor: str, heading: str, content: Markup) -> Markup:
    return tag(
        "section", tag("h2", heading, id=f"{anchor}-heading"), content, id=anchor, aria_labelledby=f"{anchor}-heading"
    )


def _sections(measured: Measured, plots: Mapping[str, Plot]) -> Iterator[_Section]:
    summary, masks = measured.summary, measured.masks
    yield "tasks", "Tasks", join(_table(tables.tasks(summary, masks)), _figure(plots.get("fidelity"), _FIDELITY))
    yield "sizes", "Sizes", join(_figure(plots["sizes"], _SIZES), _folded(tables.sizes(summary)))
    if masks is None or not masks.numel:
        yield "masks", "Masks", _no_masks(measured)
    else:
        yield from _mask_sections(masks, plots)
    blocks = shared_blocks(measured.vectors)
    if blocks:
        content = [
            _figure(plots["shared"], _SHARED),
            _folded(tables.groups(summary, measured.vectors)),
            _folded(tables.levels(measured.vectors)),
            _folded(tables.magnitudes(blocks)),
        ]
    else:
        content = [
            tag("p", "The tasks share no vectors: each has all that is its own."),
            _table(tables.groups(summary, ())),
        ]
    yield "shared", "Shared vectors", join(*content)
    yield "use", "Load an expert", _use(measured)


_FIDELITY: Final = (
    "What a task costs and how true it is. Bits count a coded parameter, the task’s share of the shared vectors"
    " included; the cosine is that of the task vector (fine-tuned less base) and what the bundle makes of it. The table"
    " has every number."
)
_SIZES: Final = "Above, on one scale, the bundle and the checkpoints that it stands for; below, the bundle alone."
_DENSITY: Final = (
    "The share of weights that each task’s mask claims; the others stay as they are in the base. Blocks are in the"
    " order that their names suggest."
)
_AGREEMENT: Final = (
    "Weights by how many of the masks claim them: none (catastrophic), one (selfish), … all (universal), as in the"
    " TALL-masks paper."
)
_OVERLAP: Final = "Of the weights that either of two tasks’ masks claims, the share that both claim."
_SHARED: Final = (
    "Left, how often each code of the shared vectors is used; right, how large their values are (root mean square), at"
    " gain one."
)


def _mask_sections(masks: Statistics, plots: Mapping[str, Plot]) -> Iterator[_Section]:
    blocks = masked_blocks(masks)
    counted = (
        f"Counted: {several(len(masks.tasks), 'mask')} over {count(masks.numel)} weights in"
        f" {several(len(masks.tensors), 'tensor')}, density {100 * (masks.density or 0):.1f} %."
    )
    if masks.left_out:
        counted += (
            f" {count(masks.left_out_numel)} weights in {several(len(masks.left_out), 'tensor')} are not: the table of"
            " tensors says why."
        )
    crowd = _crowd(len(masks.tasks))
    yield (
        "density",
        "Density by layer",
        join(
            tag("p", counted),
            _figure(plots["density"], _DENSITY + crowd),
            _folded(tables.density(masks, blocks)),
            _folded(tables.tensors(masks)),
        ),
    )
    yield (
        "agreement",
        "Agreement",
        join(_figure(plots["agreement"], _AGREEMENT), _folded(tables.agreement(masks))),
    )
    if "overlap" in plots:
        content = join(_figure(plots["overlap"], _OVERLAP + crowd), _folded(tables.overlap(masks)))
        yield "overlap", "Overlap of the tasks", content


def _crowd(tasks: int) -> str:
    """What is different about the rows of many tasks."""
    if tasks <= MOST_NAMED:
        return ""
    shown = f"{MOST_ROWS} of {tasks:,} tasks are drawn" if tasks > MOST_ROWS else f"{tasks} tasks are too many to name"
    return f" {shown}; rows are ordered so that masks which have more in common than chance stand side by side."


def _no_masks(measured: Measured) -> Markup:
    """Why there is nothing to show of masks."""
    masks = measured.masks
    if masks is None:
        return tag("p", "No task’s files are here, so no mask can be counted.")
    why = tag("p", "Nothing to count: of no tensor does every task have a mask that leaves weights out.")
    return join(why, _folded(tables.tensors(masks)))


def _use(measured: Measured) -> Markup:
    summary = measured.summary
    task = next(
        (task.name for task in summary.tasks if task.fetched), summary.tasks[0].name if summary.tasks else "task"
    )
    base = "" if summary.base.embedded or summary.base.repo_id else ', base="path/to/the/base"'
    code = (
        "import tallstore\n\n"
        f"with tallstore.open_bundle({measured.name!r}{base}) as bundle:\n"
        f"    weights = bundle.state_dict({task!r})  # a state dict, rebuilt when it is asked for\n"
        f"    bundle.load_into(model, {task!r})  # or into a model, in place"
    )
    return tag("pre", tag("code", code), tabindex="0", aria_label="Code", role="region")


# --- figures and tables -----------------------------------------------------------------------------------------------


def _figure(plot: Plot | None, caption: str) -> Markup:
    if plot is None:
        return Markup()
    box = tag("div", Markup(plot.inline()), class_="scroll plot", tabindex="0", role="region", aria_label=plot.title)
    return tag("figure", box, tag("figcaption", caption))


def _folded(table: Table) -> Markup:
    return tag("details", tag("summary", f"Table: {table.caption[:1].lower()}{table.caption[1:]}"), _table(table))


def _table(table: Table) -> Markup:
    caption = f"table-{table.id}-caption"
    head = tag("thead", tag("tr", *(_heading(column) for column in table.columns)))
    body = tag("tbody", *(_row(table.columns, row) for row in table.rows))
    note = tag("p", table.note) if table.note else Markup()
    element = tag(
        "table", tag("caption", table.caption, id=caption), head, body, id=f"table-{table.id}", class_="sortable"
    )
    tall = " tall" if len(table.rows) > _MOST_SHOWN else ""
    box = tag("div", element, class_=f"scroll{tall}", tabindex="0", role="region", aria_labelledby=caption)
    return join(box, note, _meanings(table.columns))


def _heading(column: Column) -> Markup:
    return tag("th", name(column.heading), scope="col", class_=column.kind)


def _meanings(columns: Sequence[Column]) -> Markup:
    """What headings mean that are not plain."""
    told = [tag("li", tag("b", column.heading), f": {column.about}") for column in columns if column.about]
    return tag("ul", *told, class_="meanings") if told else Markup()


def _row(columns: Sequence[Column], cells: Sequence[Cell]) -> Markup:
    first, *others = zip(columns, cells, strict=True)
    return tag("tr", _cell("th", *first, scope="row"), *(_cell("td", column, cell) for column, cell in others))


def _cell(element: str, column: Column, cell: Cell, scope: str | None = None) -> Markup:
    text = cell.text if column.kind == "number" else name(cell.text)
    value = None if cell.value is None else repr(cell.value)
    return tag(element, text, scope=scope, class_=column.kind, data_value=value)
