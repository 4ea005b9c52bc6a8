"""Texts that people write: model cards, lists of experts, and where a directory was pulled from."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tallstore.cli.expert_file import read_expert_file
from tallstore.errors import TallstoreError
from tallstore.format.origin import ORIGIN, read_origin
from tallstore.hub import card, front_matter
from tallstore.inspecting.summary import BundleSummary, summarise
from tests.fuzz import seeds
from tests.fuzz.outcomes import Broken, typed

_CARD = """---
license: apache-2.0
tags:
- merging
- "quoted"
base_model: org/name  # why
extra: {a: [1, 2], b: 2020-01-01}
---
# Title

text

<!-- tallstore:begin -->
old
<!-- tallstore:end -->

more
"""


@cache
def _summary() -> BundleSummary:
    return summarise(seeds.VECTORS / "valid" / "unbroken-kernel" / "bundle")


def card_seeds() -> list[bytes]:
    """READMEs: of a user, of a push, without metadata, with none but metadata."""
    pushed = card.render(_summary(), "org/name", None, _CARD, lambda _id, _revision: {})
    metadata, text = front_matter.split(_CARD)
    others = [
        f"---\n{{a: 1, b: [c]}}\n---\n{text}",
        f"---\n{metadata}---\n",
        text,
        "---\na: &x {b: 1}\nc: {<<: *x}\n---\n",
    ]
    return [each.encode() for each in (_CARD, pushed, *others)]


def readme(data: bytes) -> None:
    """A card on the Hub, pushed over and over: the second time, nothing changes."""
    written = data.decode("utf-8", "replace")
    arguments = (_summary(), "org/name", None)
    first = typed(lambda: card.render(*arguments, written, lambda _id, _revision: {"license": "mit"}))
    if isinstance(first, TallstoreError):
        return
    second = card.render(*arguments, first, lambda _id, _revision: {"license": "mit"})
    if second != first:
        raise Broken("a second push changes the card")


class ExpertFiles:
    """The TOML file of --experts."""

    def __init__(self, place: Path) -> None:
        self._path = place / "experts.toml"

    def __call__(self, data: bytes) -> None:
        """Write it and read it."""
        self._path.write_bytes(data)
        typed(lambda: read_expert_file(self._path))


def expert_file_seeds() -> list[bytes]:
    """Such files."""
    return [
        b'base = "../bert"\n[experts]\nspam = "runs/spam"\nmovies = "hub:org/bert@main"\n"a.b" = "~/x"\n',
        b'[experts]\n# c\na.b = "x"\nn = 1\nd = 2020-01-01T00:00:00Z\nl = [1e5, {x = "\\u00e9"}]\n[[t]]\nm = """x"""\n',
        b"base = '~nobody/x'\nexperts = {a = 'b', c = 0x1F}\n",
    ]


class Origins:
    """What a pulled directory remembers."""

    def __init__(self, place: Path) -> None:
        self._root = place
        self._path = place / ORIGIN
        self._path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, data: bytes) -> None:
        """Write it and read it: what is not understood is not known."""
        self._path.write_bytes(data)
        read_origin(self._root)


def origin_seeds() -> list[bytes]:
    """Such files."""
    return [b'{"repo_id": "org/name", "sha": "' + b"0" * 40 + b'"}\n', b'{"repo_id":"a/b","sha":"main"}']
