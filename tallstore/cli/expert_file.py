"""The TOML file of `--experts`: which experts there are, and what they were fine-tuned from.

base = "../bert"                       # optional; --base comes before it

[experts]
spam = "runs/spam"                     # a path, from the file's own folder
movies = "hub:org/bert-movies@main"    # a Hub id behind "hub:"
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tallstore.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HUB = "hub:"
_BASE, _EXPERTS = "base", "experts"
_MAX_NBYTES = 1 << 20
_MAX_DOTS = 64


@dataclass(frozen=True)
class ExpertFile:
    """What the file says.

    Attributes:
        base: a path, or a Hub id as a str; None where the file names none.
        experts: by task name, in the file's order, the same.
    """

    base: Path | str | None
    experts: dict[str, Path | str]


def read_expert_file(path: Path) -> ExpertFile:
    """Read the file at *path*; whether its checkpoints are there is not looked at.

    Raises:
        InputError: it cannot be read, is not TOML, or says anything but a base and experts.
    """
    where = str(path)
    try:
        parsed = tomllib.loads(_text(path))
    except OSError as error:
        raise InputError(
            where, f"cannot be read ({error.strerror}); give a .toml file or a folder of experts"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(where, f"is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except ValueError as error:  # tomllib's own, and integers of thousands of digits
        raise InputError(where, f"is not TOML: {error}") from None
    except RecursionError:
        raise InputError(where, "is not TOML: it is nested too deeply") from None
    for key in parsed.keys() - {_BASE, _EXPERTS}:
        raise InputError(where, f"has the key {key!r}, which means nothing here; {_suggestion(key, (_BASE, _EXPERTS))}")
    base, experts = parsed.get(_BASE), parsed.get(_EXPERTS)
    if not isinstance(experts, dict) or not experts:
        problem = f"{_EXPERTS} is {_kind(experts)}" if _EXPERTS in parsed else f"has no table [{_EXPERTS}]"
        raise InputError(where, f'{problem}; give one with a line such as spam = "runs/spam" for each expert')
    return ExpertFile(
        base=None if base is None else _source(where, _BASE, base, path.parent),
        experts={name: _source(where, f"{_EXPERTS}.{name}", value, path.parent) for name, value in experts.items()},
    )


def _text(path: Path) -> str:
    """The file's text, unless it is such as a parser of TOML takes hours for: keys of very many parts."""
    where = str(path)
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise InputError(where, "is not a regular file; give a .toml file or a folder of experts")
    with path.open("rb") as file:
        raw = file.read(min(os.fstat(file.fileno()).st_size, _MAX_NBYTES) + 1)
    if len(raw) > _MAX_NBYTES:
        raise InputError(where, f"is larger than {_MAX_NBYTES:,} bytes; give fewer experts")
    text = raw.decode("utf-8")
    for number, line in enumerate(text.split("\n"), start=1):
        if line.count(".") > _MAX_DOTS:
            raise InputError(where, f"line {number} has more than {_MAX_DOTS} dots; give shorter keys and paths")
    return text


def _source(where: str, key: str, value: object, folder: Path) -> Path | str:
    """A checkpoint's path, from the file's folder, or its Hub id. A path that is not there is no Hub id."""
    if not isinstance(value, str) or not value.removeprefix(HUB):
        hint = f'give a path, or "{HUB}org/name", in quotes'
        if isinstance(value, dict):
            hint += f'; a name that has dots goes in quotes too: "{".".join([key.partition(".")[2], *value])}"'
        raise InputError(where, f"{key} is {_kind(value)}; {hint}")
    if "\0" in value:
        raise InputError(where, f"{key} has a null character in it, which no path has")
    if value.startswith(HUB):
        return value.removeprefix(HUB)
    return folder / os.path.expanduser(value)  # noqa: PTH111 - pathlib's raises where there is no such user


def _suggestion(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"an expert goes under [{_EXPERTS}]"


def _kind(value: object) -> str:
    """What a value of TOML is, in words."""
    match value:
        case dict():
            return "a table" if value else "an empty table"
        case list():
            return "an array"
        case bool():
            return "true" if value else "false"
        case "":
            return "empty"
        case str():
            return repr(value)
        case _:
            return str(value)
