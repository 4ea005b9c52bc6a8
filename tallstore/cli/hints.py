"""The library's messages name Python's arguments; whoever reads them here needs the options of the command line."""

from __future__ import annotations

import re
from collections.abc import Callable

_OPTIONS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"key_mapping=\{regular expression: replacement\}"), lambda _: "--key-mapping 'REGEX=REPLACEMENT'"),
    (
        re.compile(r'key_mapping=\{"(.*?)": "(.*?)"\}'),
        lambda found: f"--key-mapping '{found[1]}={found[2]}'".replace("\\\\", "\\"),
    ),
    (
        re.compile(r"give it: \w+\((?:path|bundle, …), base=…\) takes a path, a state dict or a Hub id"),
        lambda _: "give --base",
    ),
    (
        re.compile(r"give a copy of it: \w+\((?:path|bundle, …), base=…\)"),
        lambda _: "give a copy of it with --base",
    ),
    (re.compile(r"\bSignedMask\(\)"), lambda _: "--method signed-mask"),
    (re.compile(r"\bSign\(\)"), lambda _: "--method sign"),
    (re.compile(r"\btallstore\.add\b"), lambda _: "tallstore add"),
    (re.compile(r"\bLocalize\(\)"), lambda _: "--method localize"),
    (re.compile(r"\bTallMask\(\)"), lambda _: "--method tall-mask"),
    (re.compile(r"\b(?:overwrite|replace|reconstructions)=True"), lambda found: "--" + found[0].removesuffix("=True")),
    (re.compile(r"\bgive them in experts(?=, or )"), lambda _: "give them with --expert or --experts"),
    (re.compile(r"^experts(?= has )"), lambda _: "--expert"),
    (re.compile(r"^tasks(?=: )"), lambda _: "--task"),
    (re.compile(r"^(?:(?:k|scale)(?= is )|evaluate(?=: ))"), lambda found: f"--{found[0]}"),
    (re.compile(r"\bprivate=True\b"), lambda _: "--private"),
    (re.compile(r"\bprivate="), lambda _: "--private"),
    (re.compile(r"\btoken=…"), lambda _: "--token"),
    (re.compile(r"^(?:token(?=: )|revision(?= is ))"), lambda found: f"--{found[0]}"),
    (re.compile(r"^repo_id(?= is )"), lambda _: "ORG/NAME"),
    (
        re.compile(r"\b(?:base_ref|merged_dtype|mask_lambda|key_mapping)\b"),
        lambda found: "--" + found[0].replace("_", "-"),
    ),
)


def in_options(message: str) -> str:
    """A message of the library with the command line's options in the place of Python's arguments."""
    for argument, option in _OPTIONS:
        message = argument.sub(option, message)
    return message
