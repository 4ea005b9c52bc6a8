"""Bundles that change: tasks are added, removed, packed again. Whoever reads, at any moment, finds a whole one."""
