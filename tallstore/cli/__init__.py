"""The command line: `tallstore` and `python -m tallstore`."""

from __future__ import annotations

from tallstore.cli.app import main

__all__ = ["main"]
