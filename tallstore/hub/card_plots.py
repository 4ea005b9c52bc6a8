"""The plots on a model card: drawn by a push beside the bundle's files, kept while the bundle stays, or taken away.

They are files of fixed names under ``plots/``, which a repository may have and no bundle lists. What a push drew says
so in itself: a file of such a name that does not is somebody else's, and is neither written over, deleted nor shown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from tallstore.caller_warnings import warn
from tallstore.hub.card import plain
from tallstore.hub.changes import RemoteFile
from tallstore.hub.local_bundle import LocalBundle
from tallstore.reporting.drawing import can_draw, is_png_of_ours
from tallstore.reporting.plots import CARD
from tallstore.sizes import several

_PATH: Final = "plots/tallstore-{}.png"
PATHS: Final = tuple(_PATH.format(name) for name in CARD)
_MOST_NBYTES: Final = 1 << 20  # of a file that may be a plot
_BLOCK: Final = re.compile(r"^!\[[^\n\]]*\]\((plots/tallstore-[a-z]+\.png)\)\r?\n\r?\n\*[^\n]*\*\r?$", re.MULTILINE)


def readable_paths(there: Mapping[str, RemoteFile]) -> list[str]:
    """Files of a repository that may be plots of an earlier push."""
    return [path for path in PATHS if path in there and there[path].size <= _MOST_NBYTES]


class CardPlots:
    """What becomes of the plots in one push.

    Attributes:
        contents: by path, what is to be uploaded; drawn when `blocks` is asked for.
        reason: why no plots are drawn; None where they are, or need not be.
    """

    def __init__(
        self,
        local: LocalBundle,
        where: str,
        there: Mapping[str, RemoteFile],
        known: Mapping[str, bytes],
        *,
        wanted: bool,
        card: str,
        is_same_bundle: bool,
    ) -> None:
        """Draw nothing yet.

        Args:
            local: the bundle.
            where: what to call the repository.
            there: its files.
            known: the contents of those of `readable_paths`, by path.
            wanted: whether the card is to have plots.
            card: the repository's README.md.
            is_same_bundle: whether it has this very bundle.
        """
        self._local, self._where, self._there = local, where, there
        self._ours = {path for path in PATHS if is_png_of_ours(known.get(path, b""))}
        self._shown = {found[1]: found[0] for found in _BLOCK.finditer(card)}
        self._is_kept = wanted and is_same_bundle and bool(self._ours) and self._ours <= self._shown.keys()
        self._kept: set[str] = set()
        self.contents: dict[str, bytes] = {}
        self.reason = None if self._is_kept else _reason(local, wanted=wanted)

    def blocks(self) -> Sequence[str]:
        """The lines of the card, for each plot.

        Raises:
            FormatError: the bundle, which is verified before it is measured, breaks a rule.
        """
        if self._is_kept:
            self._kept = self._ours
            return [self._shown[path] for path in PATHS if path in self._ours]
        if self.reason is not None:
            return []
        blocks = []
        for plot, content in self._local.plots:
            path = _PATH.format(plot.name)
            if path in self._there and path not in self._ours:
                warn(
                    f"{self._where}: {path} is there and no plot of a push, so it is left alone, and the card does not"
                    " have that plot; give it another name, or push with plots=False"
                )
                continue
            self.contents[path] = content
            blocks.append(f"![{plain(plot.description)}]({path})\n\n*{plain(plot.title)}.*")
        return blocks

    @property
    def outdated(self) -> list[RemoteFile]:
        """The plots of earlier pushes that the card does not show any more."""
        return [self._there[path] for path in sorted(self._ours - self._kept - self.contents.keys())]


def _reason(local: LocalBundle, *, wanted: bool) -> str | None:
    if not wanted:
        return "none were asked for"
    if not can_draw():
        return "matplotlib is not installed (the extra report)"
    absent = local.absent_tables()
    return (
        f"{several(len(absent), 'task')} of the bundle {'is' if len(absent) == 1 else 'are'} not here"
        if absent
        else None
    )
