"""Packing: checkpoints in, a bundle out, streamed tensor by tensor."""

from __future__ import annotations

from tallstore.meter import Progress
from tallstore.packing.comparing import Compared, Comparison, compare
from tallstore.packing.outcome import Action, PackedTask, PackReport
from tallstore.packing.packer import pack
from tallstore.packing.recipe import Evaluate

__all__ = ["Action", "Compared", "Comparison", "Evaluate", "PackReport", "PackedTask", "Progress", "compare", "pack"]
