"""The metadata at the head of a README: single keys are set, and what else is written there stays as it is.

It is YAML between two lines of dashes. It is edited as text, not written anew, for comments, the order of keys and
plain words such as ``no`` would not come back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import yaml

from tallstore.errors import CardError

MAX_LENGTH: Final = 1 << 20
"""Characters of metadata: the longest ones list some thousand results."""

_MAX_DEPTH: Final = 32
_BLOCK: Final = re.compile(r"\A\ufeff?\s*^---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)


def split(readme: str) -> tuple[str, str]:
    """A README's metadata, without the dashes, and the text behind them."""
    found = _BLOCK.match(readme)
    return (found[1], readme[found.end() :]) if found else ("", readme)


def join(metadata: str, text: str) -> str:
    """The README of both."""
    return f"---\n{metadata}---\n{text}"


def parse(metadata: str, where: str) -> dict[str, Any]:
    """What the metadata say.

    Raises:
        CardError: they are no YAML, or no mapping; or they are such as could take any time or memory.
    """
    try:
        _refuse_bombs(metadata, where)
        parsed = yaml.safe_load(metadata)
    except (yaml.YAMLError, ValueError) as error:  # a ValueError: a date that no calendar has
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 2}"
        raise CardError(f"{where}{line}", "the metadata between the dashes are no YAML; correct them") from None
    if parsed is None:
        return {}
    if not isinstance(parsed, dict):
        raise CardError(where, "the metadata between the dashes are no mapping of keys; correct them")
    return {str(key): value for key, value in parsed.items()}


def _refuse_bombs(metadata: str, where: str) -> None:
    """Refuse what grows when it is read: a few aliases of aliases stand for a billion values."""
    if len(metadata) > MAX_LENGTH:
        raise CardError(where, f"the metadata between the dashes have {len(metadata):,} characters; shorten them")
    depth = 0
    for event in yaml.parse(metadata, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise CardError(
                f"{where}, line {event.start_mark.line + 2}", "the metadata have an alias; write out what it stands for"
            )
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise CardError(where, f"the metadata between the dashes are nested more than {_MAX_DEPTH} deep")


def set_keys(metadata: str, values: Mapping[str, object]) -> str:
    """Metadata, as `parse` takes them, in which some keys have these values; one that has its value is left alone."""
    parsed = yaml.safe_load(metadata) or {}
    wrong = {key: value for key, value in values.items() if key not in parsed or parsed[key] != value}
    root = yaml.compose(metadata, Loader=yaml.SafeLoader)
    if root is not None and root.flow_style:  # {one: line}
        return _dump({**parsed, **wrong})
    places = {key: (start, end) for key, start, end in _places(root)} if wrong else {}
    for key, (start, end) in sorted(places.items(), key=lambda place: place[1], reverse=True):
        if key in wrong:
            metadata = metadata[:start] + _dump({key: wrong.pop(key)}).rstrip("\n") + metadata[end:]
    if metadata and not metadata.endswith("\n"):
        metadata += "\n"
    return metadata + (_dump(wrong) if wrong else "")


def _places(root: Any) -> Iterator[tuple[str, int, int]]:  # noqa: ANN401 - yaml has no types
    """Each top-level key, and where it and its value are in the text."""
    for key, value in [] if root is None else root.value:
        yield str(key.value), key.start_mark.index, max(key.end_mark.index + 1, _end(value))


def _end(node: Any) -> int:  # noqa: ANN401
    """Where a value's last word ends; the end that yaml has for a block is that of the blanks and comments behind."""
    if isinstance(node, yaml.ScalarNode) or node.flow_style or not node.value:
        return int(node.end_mark.index)
    last = node.value[-1]
    return _end(last[1] if isinstance(last, tuple) else last)


def _dump(values: Mapping[str, object]) -> str:
    return str(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=1000))
