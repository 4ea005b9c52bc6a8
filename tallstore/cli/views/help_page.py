"""`--help`: usage, options by panel, and examples as they are typed. It fits narrow terminals too."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from tallstore.cli import terminal

_WIDEST = 100  # longer lines are hard to read
_NARROW = 72  # under it, help stands below an option instead of beside it
_LABEL_WIDTH = 26
_INDENT = "  "
_ARGUMENTS, _OPTIONS, _COMMANDS, _EXAMPLES = "Arguments", "Options", "Commands", "Examples"


@dataclass(frozen=True)
class _Entry:
    """An argument, an option or a command, and what it is for."""

    label: Text
    text: str


def render(ctx: Any) -> str:  # noqa: ANN401 - each version of typer has its click elsewhere
    """The help page of the command that *ctx* is of, in colours where stdout is a terminal that has them."""
    console = terminal.output()
    width = min(console.width, _WIDEST)
    with console.capture() as page:
        for line in _page(ctx, width):
            console.print(line, soft_wrap=True)
    return page.get()


def _page(ctx: Any, width: int) -> Iterator[Text]:  # noqa: ANN401
    command = ctx.command
    usage = "COMMAND …" if hasattr(command, "commands") else command.options_metavar
    label = "Usage: "
    first, *more = _folded(f"{ctx.command_path} {usage}", width - len(label))
    yield Text.assemble((label, "bold"), first)
    yield from (Text(" " * len(label) + line) for line in more)
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        yield Text()
        yield from map(Text, _folded(" ".join(paragraph.split()), width))
    for panel, entries in _panels(ctx):
        yield Text()
        yield Text(panel, "bold")
        yield from _lines(entries, width)
    if command.epilog:
        yield Text()
        yield Text(_EXAMPLES, "bold")
        yield from (Text(_INDENT + line, "dim" if line.startswith("#") else "") for line in command.epilog.splitlines())


def _panels(ctx: Any) -> Iterator[tuple[str, list[_Entry]]]:  # noqa: ANN401
    """Commands, arguments, options by their panels, and last those of no panel."""
    commands = getattr(ctx.command, "commands", {})
    if commands:
        yield _COMMANDS, [_Entry(Text(name, "cyan"), _summary(command.help)) for name, command in commands.items()]
    panels: dict[str, list[_Entry]] = {_ARGUMENTS: []}
    for parameter in ctx.command.get_params(ctx):
        default = _ARGUMENTS if parameter.param_type_name == "argument" else _OPTIONS
        panel = getattr(parameter, "rich_help_panel", None) or default
        panels.setdefault(panel, []).append(_Entry(_label(parameter), _text(parameter)))
    panels[_OPTIONS] = panels.pop(_OPTIONS, [])
    yield from ((panel, entries) for panel, entries in panels.items() if entries)


def _summary(text: str | None) -> str:
    return (text or "").partition("\n\n")[0]


def _label(parameter: Any) -> Text:  # noqa: ANN401
    if parameter.param_type_name == "argument":
        return Text(parameter.metavar, "cyan")
    label = Text(", ").join(Text(name, "cyan") for name in sorted(parameter.opts, key=len))
    return label if parameter.is_flag else label.append(f" {parameter.metavar}", "default")


def _text(parameter: Any) -> str:  # noqa: ANN401
    """What it is for, and what it is unless given."""
    text: str = parameter.help or ""
    default = getattr(parameter.default, "value", parameter.default)
    shown = getattr(parameter, "show_default", False) is True and default is not None and default is not False
    return f"{text} [default: {default}]" if shown else text


def _lines(entries: Sequence[_Entry], width: int) -> Iterator[Text]:
    """Labels with their texts beside them, or below where there is no room."""
    beside = width >= _NARROW
    widest = max(len(entry.label) for entry in entries)
    column = len(_INDENT) + min(widest, _LABEL_WIDTH) + 2 if beside else 3 * len(_INDENT)
    for entry in entries:
        line = Text(_INDENT).append_text(entry.label)
        folded = _folded(entry.text, width - column)
        if beside and len(line) + 2 <= column and folded:
            line.append(" " * (column - len(line)) + folded.pop(0), "default")
        yield line
        yield from (Text(" " * column + text) for text in folded)


def _folded(text: str, width: int) -> list[str]:
    """Lines of at most *width* characters, broken at blanks alone: options and paths stay whole."""
    lines: list[str] = []
    for given in text.splitlines():
        lines.append("")
        for word in given.split():
            if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
                lines.append("")
            lines[-1] += f" {word}" if lines[-1] else word
    return lines
