"""Packing: checkpoints in, a bundle out, streamed tensor by tensor."""

from __future__ import annotations

from tallstore.packing.meter import Progress
from tallstore.packing.outcome import PackedTask, PackReport
from tallstore.packing.packer import Evaluate, pack

__all__ = ["Evaluate", "PackReport", "PackedTask", "Progress", "pack"]
