"""Bundles that tasks are added to, removed from, and packed again in, in any order."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

import tallstore
from tallstore.fit import Sign
from tallstore.format.bundle_files import BundleFiles
from tests.growing_cases import BASE, assert_same, expert, packed, weights

# Names whose slugs meet each other, or look like those of other groups.
NAMES = st.sampled_from(["a", "A", "b", "a g0002", "a-g0003", "a-g0002-g0003", "con", "日本"])
SOME = st.lists(NAMES, min_size=1, max_size=3, unique=True)
STEPS = st.lists(st.tuples(st.sampled_from(["add", "remove", "repack"]), SOME), min_size=1, max_size=6)


def listed(bundle: Path) -> dict[str, str]:
    """The sha256 of everything that the manifest lists."""
    return {file.path: file.sha256 for file in BundleFiles(bundle).manifest.files}


@settings(max_examples=12, deadline=None)
@given(STEPS)
def test_no_path_ever_has_other_bytes_and_no_other_task_ever_changes(steps):
    with tempfile.TemporaryDirectory() as scratch:
        bundle = packed(Path(scratch) / "bundle", "ab", method=Sign())
        ever = listed(bundle)
        for number, (step, names) in enumerate(steps):
            before = weights(bundle)
            manifest = BundleFiles(bundle).manifest
            there = [name for name in names if name in before]
            given_now = {name: expert(number) for name in names}
            if step == "add":
                tallstore.add(bundle, given_now, base=BASE, method=Sign(), replace=True)
                touched = set(names)
            elif step == "remove" and 0 < len(there) < len(before):
                tallstore.remove(bundle, there)
                touched = set(there)
            elif step == "repack" and there:
                originals = {name: given_now[name] for name in there[:1]}
                tallstore.repack(
                    bundle, originals, tasks=there, base=BASE, method=Sign(), reconstructions=len(there) > 1
                )
                touched = set(there)
            else:
                continue
            assert tallstore.verify(bundle) == []
            after, found = weights(bundle), BundleFiles(bundle).manifest
            expected = (
                set(before) | touched if step == "add" else set(before) - (touched if step == "remove" else set())
            )
            assert set(after) == expected
            for name in set(before) - touched:
                assert_same(after[name], before[name])
            assert found.next_group == manifest.next_group + (step != "remove")
            for path, sha256 in listed(bundle).items():
                assert ever.setdefault(path, sha256) == sha256, path
            assert sorted(
                path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()
            ) == sorted([*listed(bundle), "tallstore.json"])
