"""Input checkpoints: whatever weights come in, as one set of named tensors that are read range by range."""

from __future__ import annotations

from tallstore.checkpoints.checkpoint import Checkpoint, HubRef
from tallstore.checkpoints.source import CheckpointSource, open_checkpoint, open_hub_checkpoint

__all__ = ["Checkpoint", "CheckpointSource", "HubRef", "open_checkpoint", "open_hub_checkpoint"]
