"""Inspecting: what a bundle holds, from its tables alone. Without torch; a summary needs no numpy either."""
