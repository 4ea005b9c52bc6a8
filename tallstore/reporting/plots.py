"""Which plots of a bundle are shown where: on the page all of them, in their order; on a model card a few."""

from __future__ import annotations

from tallstore.inspecting.statistics import Statistics
from tallstore.inspecting.summary import BundleSummary
from tallstore.reporting import mask_plots, size_plots, task_plots, vector_plots
from tallstore.reporting.blocks import masked_blocks, shared_blocks
from tallstore.reporting.drawing import Plot
from tallstore.reporting.measuring import Measured

CARD: tuple[str, ...] = ("sizes", "fidelity", "overlap")
"""The names of those that a card may show."""


def plots_of(measured: Measured) -> tuple[Plot, ...]:
    """The plots that there is something to show in."""
    summary, masks = measured.summary, measured.masks
    found = [size_plots.sizes(summary), task_plots.fidelity(summary.tasks)]
    if masks is not None and masks.numel:
        blocks = masked_blocks(masks)
        found += [mask_plots.density(masks, blocks), mask_plots.profile(masks, blocks), mask_plots.overlap(masks)]
    found.append(vector_plots.shared(measured.vectors, shared_blocks(measured.vectors)))
    return tuple(plot for plot in found if plot is not None)


def card_plots(summary: BundleSummary, masks: Statistics | None) -> tuple[Plot, ...]:
    """Those that are small, and say what a table of the tasks does not: of one task, its size alone."""
    if len(summary.tasks) < 2:
        return (size_plots.sizes(summary),)
    overlap = mask_plots.overlap(masks) if masks is not None and masks.numel else None
    found = [size_plots.sizes(summary), task_plots.fidelity(summary.tasks), overlap]
    return tuple(plot for plot in found if plot is not None)
