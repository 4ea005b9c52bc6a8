"""All plots of a bundle, in the order of the page."""

from __future__ import annotations

from tallstore.reporting import mask_plots, size_plots, task_plots, vector_plots
from tallstore.reporting.blocks import masked_blocks, shared_blocks
from tallstore.reporting.drawing import Plot
from tallstore.reporting.measuring import Measured


def plots_of(measured: Measured) -> tuple[Plot, ...]:
    """The plots that there is something to show in."""
    summary, masks = measured.summary, measured.masks
    found = [size_plots.sizes(summary), task_plots.fidelity(summary.tasks)]
    if masks is not None and masks.numel:
        blocks = masked_blocks(masks)
        found += [mask_plots.density(masks, blocks), mask_plots.profile(masks, blocks), mask_plots.overlap(masks)]
    found.append(vector_plots.shared(measured.vectors, shared_blocks(measured.vectors)))
    return tuple(plot for plot in found if plot is not None)
