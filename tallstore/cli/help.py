"""The classes of commands: they start fast, and have help pages of their own.

A page has usage, options by panel, and examples as they are typed; it fits narrow terminals too.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

from tallstore.cli.plain_values import spare_pydantic


class _Lean:
    """Mixed into typer's classes, whose contexts come from wherever each version of it has its click."""

    def get_params(self, ctx: Any) -> Any:  # noqa: ANN401
        """All parameters of the command, `--help` among them."""
        parameters = super().get_params(ctx)  # type: ignore[misc]
        for parameter in parameters:
            spare_pydantic(parameter)
        return parameters

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401
        """Write the page of the command that *ctx* is of."""
        from tallstore.cli.views.help_page import render  # noqa: PLC0415 - rich, which no other use of a command needs

        formatter.write(render(ctx))


class Command(_Lean, TyperCommand):
    """A command. Its epilog is examples, as they are typed; its options' metavar is all of its usage."""


class Group(_Lean, TyperGroup):
    """Several commands. Its epilog is examples."""
