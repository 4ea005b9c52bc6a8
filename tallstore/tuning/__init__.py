"""What learns from the user's own loss: masks of single weights, and the gains of whole tensors."""

from __future__ import annotations

from tallstore.tuning.gains import Calibration
from tallstore.tuning.masks import train_masks

__all__ = ["Calibration", "train_masks"]
