"""Verifying: every problem of a bundle, not the first. Without torch."""

from __future__ import annotations

from tallstore.verifying.bundle_checks import Problem, verify

__all__ = ["Problem", "verify"]
