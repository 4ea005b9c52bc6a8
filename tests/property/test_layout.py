"""Slugs of any names, and any paths."""

from __future__ import annotations

import os
from pathlib import PurePosixPath, PureWindowsPath

from hypothesis import given
from hypothesis import strategies as st

from tallstore.format import layout

ANY_TEXT = st.text(st.characters(exclude_categories=[]), max_size=300)
SEGMENTS = st.sampled_from(
    [
        "base",
        "tasks",
        "groups",
        "files",
        "g0001",
        "mnist",
        "task.json",
        "..",
        ".",
        "",
        "con",
        "C:",
        "\\",
        "a\0",
        "base.json",
    ]
)


@given(ANY_TEXT)
def test_every_name_has_a_slug(name):
    slug = layout.slugify(name, ())
    assert layout.is_slug(slug)
    assert layout.is_bundle_path(layout.task_table(slug))
    assert layout.slugify(name, ()) == slug


@given(st.lists(ANY_TEXT | st.sampled_from(["a", "A", "á", "a ", "con", ""]), max_size=20))
def test_slugs_are_unique_even_where_case_does_not_count(names):
    taken = []
    for name in names:
        taken.append(layout.slugify(name, taken))
    assert len({slug.casefold() for slug in taken}) == len(taken)
    assert all(map(layout.is_slug, taken))


LIKE_GROUPS = st.from_regex(r"[ab]?(-?g000[1-3]){0,3}", fullmatch=True)


@given(st.lists(st.lists(ANY_TEXT | LIKE_GROUPS | st.just("x" * 70), max_size=6), min_size=2, max_size=4))
def test_no_two_groups_give_the_same_slug(groups):
    """Whether a group knows of the others or not: they may be gone by then."""
    ever = set()
    for number, names in enumerate(groups, start=1):
        taken = set()
        for name in names:
            taken.add(layout.slugify(name, taken, number))
        assert all(map(layout.is_slug, taken))
        assert not ever & taken
        ever |= taken


@given(ANY_TEXT | st.lists(SEGMENTS, max_size=4).map("/".join))
def test_no_path_of_the_grammar_leaves_the_bundle(path):
    if layout.is_bundle_path(path) or layout.is_companion_name(path):
        assert path.isascii()
        assert path.isprintable()
        for flavour in (PurePosixPath, PureWindowsPath):
            pure = flavour(path)
            assert not pure.anchor
            assert ".." not in pure.parts
            assert pure.as_posix() == path
        assert not any(part.endswith((".", " ")) for part in path.split("/"))
        assert os.path.normpath(path) == path.replace("/", os.sep)
