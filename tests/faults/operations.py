"""Everything in tallstore that writes, each with the states that it leads from and to."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

import tallstore
from tallstore import exporting
from tallstore.format import layout
from tests.faults.bundles import Digests, digests, small_inputs
from tests.faults.children import Call, Child, Outcome, without_exchange
from tests.hub.loopback import LoopbackHub

NEW: Mapping[str, Any] = {"method": tallstore.SignedMask(), "embed_base": True}
OLD: Mapping[str, Any] = {"method": tallstore.TallMask(), "embed_base": True}
REPO = "user/experts"


@dataclass(frozen=True)
class Specimens:
    """What operations read, and what is there before them.

    Attributes:
        root: in it "exported", "reported", "some" and "earlier": what was exported and reported of `old`, and what was
            pulled of one task, and before the bundle changed on the Hub.
        base, experts: inputs.
        hub: that has `new`, and had `old` before.
        new, old: directories of the bundles that two methods made.
    """

    root: Path
    base: Path
    experts: Mapping[str, Path]
    hub: LoopbackHub
    new: Path
    old: Path

    @classmethod
    def make(cls, root: Path, hub: LoopbackHub) -> Specimens:
        """In *root*, an empty directory."""
        (root / "inputs").mkdir()
        base, experts = small_inputs(root / "inputs")
        for name, options in (("new", NEW), ("old", OLD)):
            tallstore.pack(base, experts, root / name / "bundle", **options)
            assert tallstore.verify(root / name / "bundle") == []
        made = cls(root, base, experts, hub, root / "new", root / "old")
        exporting.export_all(tallstore.open_bundle(root / "old" / "bundle"), root / "exported" / "experts")
        tallstore.write_report(root / "old" / "bundle", root / "reported" / "report.html")
        hub.add(REPO)
        earlier = hub.repositories[REPO].push(_contents(root / "old" / "bundle"))
        hub.repositories[REPO].push(_contents(root / "new" / "bundle"))
        for name, options in (("some", {"tasks": ["cars"]}), ("earlier", {"revision": earlier})):
            call = functools.partial(pull, root / name / "cache", local_dir=root / name / "bundle", **options)
            outcome = Child(call, functools.partial(speak_with, hub.url)).outcome()
            assert outcome.exit_code == 0, outcome.error
        return made


def _contents(bundle: Path) -> dict[str, bytes]:
    return {path.as_posix(): (bundle / path).read_bytes() for path in digests(bundle)}


@dataclass(frozen=True)
class Operation:
    """Something that writes.

    Attributes:
        call: does it, in a child; writes below `place` alone.
        again: what comes next, after whatever became of it; the same by default.
        place: everything that may be written to.
        targets: paths in the place that change in one step each, and how to look at them.
        before: what the place holds at first: a directory; nothing by default.
        conditions: of the child.
        may_be_missing: whether a target may be neither old nor new for a moment, but away.
        keeps: whether what was gathered stays after an error, for the next run.
    """

    call: Call
    place: Path
    targets: Mapping[str, Look]
    before: Path | None = None
    conditions: tuple[Call, ...] = ()
    may_be_missing: bool = False
    keeps: bool = False
    again: Call | None = None
    _states: dict[str, tuple[Digests | None, Digests | None]] = field(default_factory=dict)
    _end: dict[str, Digests] = field(default_factory=dict)

    def begin(self) -> None:
        """As it is before the operation."""
        shutil.rmtree(self.place, ignore_errors=True)
        if self.before is None:
            self.place.mkdir()
        else:
            shutil.copytree(self.before, self.place, symlinks=True)

    def run(self, *conditions: Call) -> Outcome:
        """Do it, with the place as it is."""
        return self.start(*conditions).outcome()

    def start(self, *conditions: Call) -> Child:
        """As `run`, without waiting for its end."""
        return Child(self.call, *self.conditions, *conditions)

    def learn(self, *conditions: Call) -> Outcome:
        """Do it from the beginning to the end, and keep in mind what was there before and after."""
        self.begin()
        old = {target: self._look(target) for target in self.targets}
        outcome = self.run(*conditions)
        assert outcome.exit_code == 0, outcome.error
        self._states.update({target: (old[target], self._look(target)) for target in self.targets})
        self._end["all"] = everything(self.place)
        return outcome

    def is_sound(self) -> bool:
        """Whether everything is what it was or what it is to be; what is left beside it is no matter."""
        return all(self._is_sound(target, look) for target, look in self.targets.items())

    def is_old(self) -> bool:
        """Whether nothing was done."""
        return all(self._look(target) == old for target, (old, _) in self._states.items())

    def is_new(self) -> bool:
        """Whether everything was done."""
        return all(self._look(target) == new for target, (_, new) in self._states.items())

    def is_clean(self) -> bool:
        """Whether nothing is there but what is there before or after: no staging, no scratch."""
        before = set() if self.before is None else set(everything(self.before))
        return set(everything(self.place)) <= before | set(self._end["all"])

    def run_again(self) -> list[str]:
        """Do what comes next, with the place as it is; what is wrong then, or was left."""
        outcome = Child(self.again or self.call, *self.conditions).outcome()
        if outcome.error is not None:
            return [str(outcome.error)]
        if self.again is None:
            return self.undone()
        beside = {path.name for path in self.place.iterdir()} - {Path(target).parts[0] for target in self.targets}
        return [
            *beside,
            *(str(problem) for target in self.targets for problem in tallstore.verify(self.place / target)),
        ]

    def undone(self) -> list[str]:
        """What is not as after an operation that nothing disturbed, hidden files and empty directories too."""
        found, due = everything(self.place), self._end["all"]
        return sorted(str(path) for path in found.keys() | due.keys() if found.get(path) != due.get(path))

    def _look(self, target: str) -> Digests | None:
        place = self.place / target
        return self.targets[target].state(place) if place.exists() else None

    def _is_sound(self, target: str, look: Look) -> bool:
        old, new = self._states[target]
        state = self._look(target)
        if state is None:
            return old is None or self.may_be_missing
        return look.is_sound(state, old, new)


class Look:
    """How to look at a target that changes in one step: all files of it are the old ones or the new ones."""

    def state(self, place: Path) -> Digests:
        """What there is to see."""
        return digests(place)

    def is_sound(self, state: Digests, old: Digests | None, new: Digests | None) -> bool:
        """Whether that may be there."""
        return state in (old, new)


class Listed(Look):
    """A bundle that changes in place: what its manifest lists; what else lies there by such names is swept later."""

    def state(self, place: Path) -> Digests:
        manifest = place / layout.MANIFEST
        listed = [file["path"] for file in json.loads(manifest.read_bytes())["files"]] if manifest.exists() else []
        found = digests(place)
        strange = [path for path in found if path.as_posix() != layout.MANIFEST and not _may_lie_there(path)]
        assert not strange
        return {path: found[path] for path in map(Path, (layout.MANIFEST, *listed)) if path in found}


class Fetched(Listed):
    """A bundle whose manifest stays, and to which tasks come: some of their files, each whole, are no task yet."""

    def state(self, place: Path) -> Digests:
        assert tallstore.verify(place) == []
        return super().state(place)

    def is_sound(self, state: Digests, old: Digests | None, new: Digests | None) -> bool:
        return (old or {}).items() <= state.items() <= (new or {}).items()


def _may_lie_there(path: Path) -> bool:
    return layout.is_bundle_path(path.as_posix()) or path.parts[0] == ".cache"


class Cached(Look):
    """The Hub's cache: what is in a snapshot is whole, and more comes with every pull."""

    def state(self, place: Path) -> Digests:
        return {path: digest for path, digest in digests(place).items() if "snapshots" in path.parts}

    def is_sound(self, state: Digests, old: Digests | None, new: Digests | None) -> bool:
        return state.items() <= (new or {}).items()


def everything(root: Path) -> Digests:
    """As `digests`; and the directories, so that one that should have gone is noticed."""
    # The Hub's client makes these for a moment; they go when they have been there for a minute (test_leftovers.py).
    momentary = re.compile(r"tmp_.*|tmp[a-z0-9_]{8}|main\.[0-9a-f]{8}\.tmp")
    folders = {path.relative_to(root): "" for path in root.rglob("*") if path.is_dir() and not path.is_symlink()}
    found = {**folders, **digests(root)}
    return {path: what for path, what in found.items() if not any(map(momentary.fullmatch, path.parts))}


# --- what is called ---


def pack(base: Path, experts: Mapping[str, Path], out: Path, **options: Any) -> None:
    tallstore.pack(base, experts, out, overwrite=True, **{**NEW, **options})


def export(bundle: Path, task: str, out: Path) -> None:
    with tallstore.open_bundle(bundle) as opened:
        exporting.export(opened, task, out, overwrite=True)


def export_all(bundle: Path, out: Path) -> None:
    with tallstore.open_bundle(bundle) as opened:
        exporting.export_all(opened, out, overwrite=True)


def report(bundle: Path, out: Path) -> None:
    tallstore.write_report(bundle, out, overwrite=True)


def pull(cache: Path, **options: Any) -> None:
    tallstore.pull(REPO, cache_dir=cache, max_workers=1, **options)


def add(bundle: Path, experts: Mapping[str, Path]) -> None:
    tallstore.add(bundle, experts, replace=True)


def speak_with(url: str) -> None:
    """A condition: the Hub's client, which was imported before, knows of this Hub and no other."""
    from huggingface_hub import constants  # noqa: PLC0415

    from tallstore.hub import retrying  # noqa: PLC0415

    constants.ENDPOINT = url
    constants.HUGGINGFACE_CO_URL_TEMPLATE = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_PROGRESS_BARS = True
    retrying._WAITS = (0.001,) * 4


# --- the operations ---

#: By name, whether the ordinary run has all that stops an operation (2), kills alone (1), or nothing (0).
_ORDINARY: Mapping[str, int] = {
    "pack to a free place": 0,
    "pack over a bundle": 2,
    "pack over a bundle in two steps": 1,
    "export to a free place": 0,
    "export over an export": 0,
    "export all over exports": 2,
    "report to a free place": 0,
    "report over a report": 1,
    "pull into the cache": 0,
    "pull to a free place": 1,
    "pull more tasks": 0,
    "pull over an older bundle": 2,
    "add a task": 1,
    "add in the place of a task": 2,
    "remove a task": 1,
    "repack over its groups": 1,
}
NAMES = tuple(_ORDINARY)
#: How many moments of an operation the slow tests stop it at: TALLSTORE_MOMENTS=100000 is every one, and takes hours.
MOST = int(os.environ.get("TALLSTORE_MOMENTS", "100"))


def spread(moments: Sequence[object], most: int = MOST) -> list[int]:
    """At most so many moments of an operation, evenly apart, and its last twenty, when the new becomes the old."""
    count = len(moments)
    return sorted({*range(0, count, -(-count // most) or 1), *range(max(count - 20, 0), count)})


def some(least: int = 2, names: Sequence[str] = NAMES) -> list[Any]:
    """Parameters of a test: the names of all operations, of which the ordinary run leaves some out."""
    slow = pytest.mark.slow
    return [name if _ORDINARY[name] >= least else pytest.param(name, marks=slow) for name in names]


def operation(name: str, specimens: Specimens, place: Path) -> Operation:
    """The operation of that name, in a *place* of its own."""
    verb, _, how = name.partition(" ")
    there = how.split(" ")[0] not in {"to", "into"}
    if verb == "pack":
        call = functools.partial(pack, specimens.base, specimens.experts, place / "bundle")
        made = Operation(call, place, {"bundle": Look()}, specimens.old if there else None)
        if how.endswith("in two steps"):
            return replace(made, conditions=(without_exchange,), may_be_missing=True)
        return made
    if verb in {"add", "remove", "repack"}:
        return _growth(name, specimens, place)
    bundle = specimens.new / "bundle"
    if verb == "report":
        call = functools.partial(report, bundle, place / "report.html")
        return Operation(call, place, {"report.html": Look()}, specimens.root / "reported" if there else None)
    if verb == "export":
        call = functools.partial(export, bundle, "cars", place / "experts" / "cars")
        targets: dict[str, Look] = {"experts/cars": Look()}
        if how.startswith("all"):
            call = functools.partial(export_all, bundle, place / "experts")
            targets["experts/birds"] = Look()
        return Operation(call, place, targets, specimens.root / "exported" if there else None)
    return _pull(how, specimens, place)


def _growth(name: str, specimens: Specimens, place: Path) -> Operation:
    """A change of a bundle in its place. Whoever changes it next, removes what is left."""
    bundle = place / "bundle"
    calls: dict[str, Call] = {
        "add a task": functools.partial(add, bundle, {"planes": specimens.experts["cars"]}),
        "add in the place of a task": functools.partial(add, bundle, {"birds": specimens.experts["cars"]}),
        "remove a task": functools.partial(tallstore.remove, bundle, ["birds"]),
        "repack over its groups": functools.partial(tallstore.repack, bundle, specimens.experts),
    }
    again = functools.partial(add, bundle, {"last": specimens.experts["birds"]})
    return Operation(calls[name], place, {"bundle": Listed()}, specimens.old, again=again)


def _pull(how: str, specimens: Specimens, place: Path) -> Operation:
    before = {"more tasks": "some", "over an older bundle": "earlier"}.get(how)
    options = {} if how == "into the cache" else {"local_dir": place / "bundle"}
    return Operation(
        functools.partial(pull, place / "cache", **options),
        place,
        {"bundle": Fetched() if how == "more tasks" else Listed()} if options else {"cache": Cached()},
        None if before is None else specimens.root / before,
        (functools.partial(speak_with, specimens.hub.url),),
        keeps=True,
    )
