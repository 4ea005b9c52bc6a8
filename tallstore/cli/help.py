"""Help pages: usage, options by panel, and examples as they are typed. They fit narrow terminals too."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup


class _HelpPage:
    """Mixed into typer's classes, whose contexts come from wherever each version of it has its click."""

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401
        """Write the page of the command that *ctx* is of."""
        from tallstore.cli.views.help_page import render  # noqa: PLC0415 - rich, which no other use of a command needs

        formatter.write(render(ctx))


class Command(_HelpPage, TyperCommand):
    """A command. Its epilog is examples, as they are typed; its options' metavar is all of its usage."""


class Group(_HelpPage, TyperGroup):
    """Several commands. Its epilog is examples."""
