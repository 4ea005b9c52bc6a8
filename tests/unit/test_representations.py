"""What bundles and reports show of themselves: short, true, and safe to put into a page."""

from __future__ import annotations

import dataclasses
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
import torch

import tallstore
from tallstore.fit import described
from tallstore.format.layout import task_directory, task_table
from tallstore.format.manifest import FileEntry, TaskEntry
from tallstore.inspecting.summary import summarise
from tallstore.notebook import MAX_ROWS
from tallstore.packing.comparing import Compared, Comparison
from tests.bundle_builder import Bundle, Group, Task
from tests.packing_cases import base_model, experts_of

HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror="alert(1)">', "a & b"]


class Page(HTMLParser):
    """A fragment of HTML, taken apart: its tags, its attributes, the texts of its cells and lines."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: dict[str, set[str | None]] = {}
        self.rows: list[list[str]] = []
        self.lines: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.tags.add(tag)
        for name, value in attributes:
            self.attributes.setdefault(name, set()).add(value)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] in ("th", "td"):
            self.rows[-1].append(data)
        else:
            self.lines.append(data)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A bundle whose tasks have names that are no friends of a page, and its report."""
    base = base_model()
    experts = dict(zip(HOSTILE, experts_of(base).values(), strict=True))
    root = tmp_path_factory.mktemp("packed") / "bundle"
    return root, tallstore.pack(base, experts, root, embed_base=True)


@pytest.fixture
def copy(packed, tmp_path):
    """A copy of the bundle, to break."""
    return Path(shutil.copytree(packed[0], tmp_path / "bundle"))


@pytest.fixture
def thousand(tmp_path):
    """A partial bundle that lists 1,000 tasks, of which one was fetched."""
    base = {"w": torch.ones(3)}
    group = Group(tmp_path / "bundle", base)
    task = Task(group, "here")
    task.same("w")

    def list_more(manifest):
        entries = [
            TaskEntry(name=f"task {n}", slug=f"task-{n}", group="g0001", parameters=3, cosine=0.5, gain=1.0)
            for n in range(1, 1000)
        ]
        tables = [
            FileEntry(path=task_table(entry.slug), size=1000, sha256="0" * 64, git_oid="0" * 40) for entry in entries
        ]
        listed = sorted([*manifest.files, *tables], key=lambda file: file.path)
        return msgspec.structs.replace(manifest, tasks=(*manifest.tasks, *entries), files=tuple(listed))

    return Bundle(tmp_path / "bundle", base, [group], [task], edit_manifest=list_more).seal()


# --- a bundle ---------------------------------------------------------------------------------------------------------


def test_a_bundle_as_html_holds_what_inspect_says(packed):
    root, report = packed
    with tallstore.open_bundle(root) as bundle:
        page = Page(bundle._repr_html_())
    assert page.rows[0] == ["task", "size", "bits", "cosine", "gain"]
    assert page.rows[1:] == [
        [task.name, f"{task.nbytes / 1000:.1f} kB", f"{task.bits:.2f}", f"{task.cosine:.4f}", f"{task.gain:.4f}"]
        for task in summarise(root).tasks
    ]
    assert [row[3:] for row in page.rows[1:]] == [[f"{t.cosine:.4f}", f"{t.gain:.4f}"] for t in report.tasks]
    assert page.lines[0].startswith(f"bundle {root}: 3 tasks, {report.bundle_nbytes / 1000:.1f} kB (")
    assert "of the base)" in page.lines[0]
    assert page.lines[1] == "signed-mask; base in the bundle; format 1.0"


def test_a_bundle_prints_a_line_a_task(packed):
    root, report = packed
    first, second, *lines = str(tallstore.open_bundle(root)).splitlines()
    assert first.startswith(f"bundle {root}: 3 tasks, {report.bundle_nbytes / 1000:.1f} kB (")
    assert second == "signed-mask; base in the bundle; format 1.0"
    assert lines == [
        f"  {task.name}: {task.nbytes / 1000:.1f} kB, cosine {task.cosine:.4f}, gain {task.gain:.4f}"
        for task in report.tasks
    ]


def test_showing_a_bundle_is_not_counted_as_reading_it(packed):
    bundle = tallstore.open_bundle(packed[0])
    before = bundle.bytes_read
    assert repr(bundle)
    assert str(bundle)
    assert bundle._repr_html_()
    assert bundle.bytes_read == before


def test_of_a_thousand_tasks_the_first_are_shown_and_the_others_counted(thousand):
    bundle = tallstore.open_bundle(thousand)
    assert len(bundle.tasks) == 1000
    assert repr(bundle).startswith(f"<Bundle {str(thousand)!r}: 1000 tasks (here, task 1, task 2, task 3, …), ")
    lines = str(bundle).splitlines()
    assert len(lines) == 2 + MAX_ROWS + 1
    here = (thousand / task_table("here")).stat().st_size
    assert lines[2] == f"  here: {here} B, nothing coded"
    assert lines[3] == "  task 1: 1.0 kB, cosine 0.5000, gain 1.0000, not fetched"
    assert lines[-1] == f"  and {1000 - MAX_ROWS} more in bundle.tasks"
    html = bundle._repr_html_()
    assert len(html) < 20_000
    page = Page(html)
    assert len(page.rows) == 1 + MAX_ROWS
    assert page.rows[1][2:] == ["–", "–", "–"]
    assert page.rows[2] == ["task 1", "1.0 kB", "–", "0.5000", "1.0000"]
    assert page.lines[-2] == f"and {1000 - MAX_ROWS} more in bundle.tasks"
    assert page.lines[-1].startswith("not fetched: task 1, task 2, ")


@pytest.mark.parametrize("damage", ["table", "task", "bundle", "another"])
def test_a_number_that_cannot_be_had_is_left_out(packed, copy, damage, tmp_path):
    """The bundle was opened, then its files changed or went away."""
    bundle = tallstore.open_bundle(copy)
    whole = Page(bundle._repr_html_())
    slug = bundle.manifest.tasks[0].slug
    match damage:
        case "table":
            (copy / task_table(slug)).write_text("{}")
        case "task":
            shutil.rmtree(copy / task_directory(slug))
        case "bundle":
            shutil.rmtree(copy)
        case "another":
            base = base_model()
            tallstore.pack(base, experts_of(base, 2), tmp_path / "other")
            shutil.rmtree(copy)
            shutil.copytree(tmp_path / "other", copy)
    page = Page(bundle._repr_html_())
    gone = 1 if damage in ("table", "task") else 3
    assert [row[2] for row in page.rows[1:]] == ["–"] * gone + [row[2] for row in whole.rows[1 + gone :]]
    assert [row[3:] for row in page.rows] == [row[3:] for row in whole.rows]
    assert any("not fetched" in line for line in page.lines) == (damage != "table")
    assert ("not fetched" in str(bundle)) == (damage != "table")


@pytest.mark.parametrize(
    ("options", "base"),
    [
        ({}, "neither in the bundle nor named"),
        ({"base_ref": f"org/name@{'0123456789' * 4}"}, "org/name@012345678901"),
        ({"embed_base": True}, "in the bundle"),
    ],
    ids=["nowhere", "named", "embedded"],
)
def test_a_bundle_says_where_its_base_is(tmp_path, options, base):
    weights = {"w": torch.randn(70, 64, generator=torch.Generator().manual_seed(0))}
    experts = {name: {"w": weights["w"] * factor} for name, factor in (("a", 1.01), ("b", 0.99))}
    tallstore.pack(weights, experts, tmp_path / "bundle", **options)
    bundle = tallstore.open_bundle(tmp_path / "bundle")
    assert f"; base {base};" in str(bundle)
    assert f"; base {base};" in bundle._repr_html_()


# --- a report ---------------------------------------------------------------------------------------------------------


def test_a_report_as_html_holds_what_it_prints(packed):
    _, report = packed
    page = Page(report._repr_html_())
    first, *lines = str(report).splitlines()
    assert page.lines == [first]
    assert page.rows[0] == ["task", "size", "bits", "cosine", "gain", "tensors whole"]
    printed = [
        f"  {name}: {size}, cosine {cosine}, gain {gain}, {bits} bits a parameter, {whole} tensors whole"
        for name, size, bits, cosine, gain, whole in page.rows[1:]
    ]
    assert printed == lines
    assert repr(report) == f"<PackReport {str(report.path)!r}: {first}>"


def test_a_report_shows_scores_and_advice_where_there_are_any(packed):
    _, report = packed
    scored = tuple(dataclasses.replace(task, score=0.1 * number) for number, task in enumerate(report.tasks))
    page = Page(dataclasses.replace(report, tasks=scored, advice=("<b>smaller</b>",))._repr_html_())
    assert [row[-1] for row in page.rows] == ["score", "0.0000", "0.1000", "0.2000"]
    assert page.lines[-1] == "<b>smaller</b>"


def test_a_report_of_a_thousand_tasks_stays_short(packed):
    _, report = packed
    many = dataclasses.replace(report, tasks=(report.tasks * 334)[:1000])
    page = Page(many._repr_html_())
    assert len(page.rows) == 1 + MAX_ROWS
    assert page.lines[-1] == f"and {1000 - MAX_ROWS} more in report.tasks"
    assert str(many).splitlines()[-1] == f"  and {1000 - MAX_ROWS} more in report.tasks"
    assert len(str(many).splitlines()) == 1 + MAX_ROWS + 1
    assert len(many.to_dict()["tasks"]) == 1000


# --- a comparison -----------------------------------------------------------------------------------------------------


def test_a_comparison_as_html_holds_its_rows_and_stars():
    def row(method, nbytes, cosine, **more):
        return Compared(method, nbytes, 1.5, {"a": cosine, "b": None}, {"a": 1.0, "b": None}, **more)

    rows = (row(tallstore.SignedMask(), 20_000, 0.5, is_best=True), row(tallstore.Sign(), 30_000, 0.25))
    page = Page(Comparison(rows, 400_000)._repr_html_())
    assert page.lines == ["400.0 kB of checkpoints", "* no other is both smaller and truer"]
    assert page.rows == [
        ["method", "size", "bits", "mean cosine"],
        [f"* {described(rows[0].method)}", "20.0 kB", "1.50", "0.7500"],
        [described(rows[1].method), "30.0 kB", "1.50", "0.6250"],
    ]
    scored = dataclasses.replace(rows[0], score={"a": 0.5, "b": 0.75})
    page = Page(Comparison((scored, rows[1]), 400_000)._repr_html_())
    assert [cells[-1] for cells in page.rows] == ["mean score", "0.6250", "–"]


# --- a page -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whose", ["bundle", "report"])
def test_hostile_names_stay_text_and_nothing_reaches_out_of_the_table(packed, whose):
    root, report = packed
    html = (tallstore.open_bundle(root) if whose == "bundle" else report)._repr_html_()
    page = Page(html)
    assert [row[0] for row in page.rows[1:]] == HOSTILE
    assert page.tags == {"div", "strong", "table", "thead", "tbody", "tr", "th", "td"}
    assert set(page.attributes) == {"style"}
    for style in page.attributes["style"]:
        assert "url(" not in style
        assert set(re.findall(r"color:? *([^;]+)", style, re.IGNORECASE)) <= {"inherit"}


# --- what a load found ------------------------------------------------------------------------------------------------


def test_a_load_that_matched_says_so(packed):
    root, _ = packed
    with tallstore.open_bundle(root) as bundle:
        model = torch.nn.Module()
        for name in bundle.keys(HOSTILE[0]):
            *path, leaf = name.split(".")
            module = model
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            module.register_buffer(leaf, torch.empty_like(bundle.tensor(HOSTILE[0], name)))
        assert repr(bundle.load_into(model, HOSTILE[0])) == "<LoadResult: all names matched>"
        del model.temperature
        result = bundle.load_into(model, HOSTILE[0], strict=False)
    assert repr(result) == "LoadResult(missing_keys=[], unexpected_keys=['temperature'])"
    assert str(result) == repr(result)
