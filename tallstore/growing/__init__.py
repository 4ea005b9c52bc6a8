"""Bundles that change: tasks are added, removed, packed again. Whoever reads, at any moment, finds a whole one."""

from __future__ import annotations

from tallstore.growing.adding import add
from tallstore.growing.removing import RemoveReport, remove
from tallstore.growing.repacking import repack

__all__ = ["RemoveReport", "add", "remove", "repack"]
