"""The report: each number is the library's own, names do no harm, what is not there is said to be missing."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
import shutil
import sys

import pytest

import tallstore
from tallstore import Emr, LeastSquares, Localize, Sign, SignedMask, TallMask, Uniform
from tallstore.errors import (
    BundleNotFoundError,
    IntegrityError,
    MissingExtraError,
    OutputError,
    OutputExistsError,
    OutputInsideInputError,
)
from tallstore.format.bundle_files import BundleFiles
from tallstore.inspecting.shared_vectors import LEVELS
from tallstore.inspecting.summary import summarise
from tallstore.reporting import tables
from tallstore.reporting.blocks import masked_blocks, shared_blocks
from tallstore.reporting.mask_plots import order_of
from tallstore.reporting.measuring import measure
from tests.command_line import misused, refused, run
from tests.packing_cases import base_model, experts_of, normal, pack
from tests.report_page import Page

HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror="alert(1)">', "a & b </svg></title> $x_1$ 日本"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A bundle whose tasks have names that are no friends of a page."""
    base = base_model()
    experts = dict(zip(HOSTILE, experts_of(base).values(), strict=True))
    root = tmp_path_factory.mktemp("packed") / "bundle"
    tallstore.pack(base, experts, root, embed_base=True, evaluate=lambda task, _state: len(task) / 100)
    return root


@pytest.fixture(scope="module")
def html(bundle, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "report.html"
    assert tallstore.write_report(bundle, out) == out
    return out.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def page_of(root, tmp_path):
    return Page(tallstore.write_report(root, tmp_path / "report.html").read_text(encoding="utf-8"))


# --- every number is the library's own --------------------------------------------------------------------------------


def test_the_tasks_are_those_of_inspect_and_statistics(bundle, page):
    summary, masks = summarise(bundle), tallstore.open_bundle(bundle).statistics()
    assert page.cells("tasks", "task") == HOSTILE
    assert page.values("tasks", "size") == [task.nbytes for task in summary.tasks]
    assert page.values("tasks", "bits") == [task.bits for task in summary.tasks]
    assert page.values("tasks", "cosine") == [task.cosine for task in summary.tasks]
    assert page.values("tasks", "gain") == [task.gain for task in summary.tasks]
    assert page.values("tasks", "score") == [len(task) / 100 for task in HOSTILE]
    assert page.values("tasks", "density") == list(masks.densities.values())
    assert page.values("tasks", "whole") == [task.whole for task in summary.tasks]


def test_the_head_is_that_of_inspect(bundle, page):
    summary = summarise(bundle)
    tiles = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
    assert tiles["experts"] == "3"
    assert tiles["the whole bundle"] == f"{summary.nbytes / 1000:.1f} kB"
    (smaller,) = [label for label in tiles if label.startswith("smaller than 3 checkpoints and the base’s, ")]
    assert tiles[smaller] == f"{summary.ratio:.1f} ×"
    assert smaller.endswith(f", {summary.checkpoints_nbytes / 1000:.1f} kB")
    low, high = min(t.bits for t in summary.tasks), max(t.bits for t in summary.tasks)
    assert tiles["bits a parameter of an expert"] == (
        f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f}–{high:.2f}"
    )


def test_the_parts_of_the_bundle_are_all_of_it(bundle, page):
    summary = summarise(bundle)
    assert sum(page.values("sizes", "size")) == summary.nbytes
    assert dict(zip(page.cells("sizes", "part"), page.values("sizes", "size"), strict=True)) == {
        "the base": summary.base_nbytes,
        "shared by the tasks": summary.shared_nbytes,
        "the tasks' own": summary.tasks_nbytes,
        "the manifest": (bundle / "tallstore.json").stat().st_size,
    }


def test_masks_are_those_of_statistics(bundle, page):
    masks = tallstore.open_bundle(bundle).statistics()
    blocks = masked_blocks(masks)
    assert page.cells("density", "block") == [block.block.label for block in blocks]
    assert page.values("density", "weights") == [
        tensor.numel for block in blocks for tensor in masks.tensors if tensor.name == block.block.label
    ]
    for place, task in enumerate(masks.tasks):
        by_name = {tensor.name: tensor.densities[place] for tensor in masks.tensors}
        assert page.values("density", task) == [by_name[block.block.label] for block in blocks]
        expected = [share if other != place else None for other, share in enumerate(masks.similarity[place])]
        assert page.values("overlap", task) == expected
    assert page.values("agreement", "weights") == list(masks.claimed_by)
    assert page.values("agreement", "share") == list(masks.profile)
    assert page.cells("agreement", "called") == ["catastrophic", "selfish", "", "universal"]
    names = [*(tensor.name for tensor in masks.tensors), *(tensor.name for tensor in masks.left_out)]
    assert page.cells("tensors", "tensor") == names
    assert page.values("tensors", "universal")[: len(masks.tensors)] == [tensor.profile[-1] for tensor in masks.tensors]
    assert page.cells("tensors", "not counted")[len(masks.tensors) :] == [tensor.reason for tensor in masks.left_out]


def test_shared_vectors_are_those_that_were_measured(bundle, page):
    with contextlib.closing(BundleFiles(bundle)) as files:
        vectors = measure(files).vectors
    numel = sum(vector.numel for vector in vectors)
    assert page.values("groups", "values") == [numel]
    assert page.values("groups", "largest") == [max(vector.largest for vector in vectors)]
    assert page.values("groups", "root mean square") == [(sum(v.sum_of_squares for v in vectors) / numel) ** 0.5]
    used = [
        (level, sum(counts))
        for level, counts in zip(LEVELS["LOG4"], zip(*(v.counts for v in vectors), strict=True), strict=True)
    ]
    assert page.values("levels", "level") == [level for level, count in used if count]
    assert page.values("levels", "values") == [count for _, count in used if count]
    assert page.values("magnitudes", "root mean square") == [block.rms for block in shared_blocks(vectors)]


# --- a page that needs nothing and harms nobody -----------------------------------------------------------------------


def test_names_are_text(html, page):
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert not re.search(r"<script>alert|<img|</svg></title>", html)


def test_the_page_asks_for_nothing_and_allows_its_one_script(html, page):
    for value in [*page.all("href"), *page.all("src")]:
        assert value.startswith(("#", "data:")), value
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", html)
    (policy,) = [value for value in page.all("content") if value.startswith("default-src")]
    (script,) = page.texts["script"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}';" in policy


def test_ids_are_used_once_and_what_refers_to_them_finds_them(page):
    ids = page.all("id")
    assert len(ids) == len(set(ids))
    referred = [value.removeprefix("#") for value in page.all("href") if value.startswith("#")]
    referred += [
        part for name in ("aria-labelledby", "aria-describedby") for value in page.all(name) for part in value.split()
    ]
    assert set(referred) <= set(ids)
    assert (
        page.tags.count("svg")
        == len([tag for tag, name, value in page.attributes if (name, value) == ("role", "img")])
        == 6
    )


def test_plots_take_the_pages_colours(html):
    assert "#fe01" not in html
    assert {f"var(--plot-{name})" for name in ("ink", "muted", "line", "first", "second", "third", "fourth")} <= set(
        re.findall(r"var\(--plot-\w+\)", html)
    )


# --- what there is not ------------------------------------------------------------------------------------------------


def test_of_a_partial_bundle_the_other_tasks_are_named(bundle, tmp_path):
    root = shutil.copytree(bundle, tmp_path / "bundle")
    slug = tallstore.open_bundle(root).manifest.tasks[1].slug
    shutil.rmtree(root / "tasks" / slug)
    page = page_of(root, tmp_path)
    assert page.cells("tasks", "state") == ["", "not fetched", ""]
    assert page.values("tasks", "bits")[1] is None
    assert "1 task of 3 not fetched, and left out of all that needs their files: " in page.texts["p"]
    assert page.tables["overlap"][0] == [(text, None) for text in ("task", HOSTILE[0], HOSTILE[2])]
    masks = tallstore.open_bundle(root).statistics()
    assert page.values("agreement", "weights") == list(masks.claimed_by)


def test_without_any_task_there_are_sizes_alone(bundle, tmp_path):
    root = shutil.copytree(bundle, tmp_path / "bundle")
    shutil.rmtree(root / "tasks")
    page = page_of(root, tmp_path)
    assert sorted(page.tables) == ["groups", "sizes", "tasks"]
    assert page.cells("tasks", "state") == ["not fetched"] * 3
    assert page.tags.count("svg") == 2  # sizes; cosines and gains, which the manifest has


@pytest.mark.parametrize(
    ("method", "has_masks", "has_vectors"),
    [
        (Sign(), False, False),
        (Sign(centre=True), False, True),
        (Uniform(3), True, False),
        (Localize(0.1), True, False),
        (LeastSquares(2), False, True),
        (Emr("published"), True, True),
        (SignedMask(scale="row"), True, True),
    ],
    ids=str,
)
def test_every_method_has_a_report(tmp_path, method, has_masks, has_vectors):
    base = base_model()
    packed = pack(base, experts_of(base), tmp_path / "bundle", method=method)
    page = page_of(packed.root, tmp_path)
    assert ("overlap" in page.tables) == has_masks
    assert (
        "Nothing to count: of no tensor does every task have a mask that leaves weights out." in page.texts["p"]
    ) != has_masks
    assert ("levels" in page.tables) == has_vectors
    assert ("The tasks share no vectors: each has all that is its own." in page.texts["p"]) != has_vectors


def test_one_task_overlaps_with_nobody(tmp_path):
    base = base_model()
    packed = pack(base, experts_of(base, 1), tmp_path / "bundle", method=Uniform(3))
    page = page_of(packed.root, tmp_path)
    assert "overlap" not in page.tables
    assert page.cells("agreement", "called") == ["catastrophic", "universal"]
    assert page.cells("tasks", "task") == ["a"]


def test_nothing_coded_at_all(tmp_path):
    base = {"w": normal(30, 20)}
    packed = pack(base, {"a": {"w": normal(30, 20, seed=1)}, "b": {"w": normal(30, 20, seed=2)}}, tmp_path / "bundle")
    page = page_of(packed.root, tmp_path)
    assert [text for text, _ in page.tables["tasks"][0]] == ["task", "method", "parameters", "size", "whole"]
    assert page.tags.count("svg") == 1


def test_many_tasks_are_ordered_by_likeness_and_have_no_column_each(tmp_path):
    base = {f"block.{layer}.weight": normal(70, 60, seed=layer) for layer in range(2)}
    family = [{name: normal(70, 60, seed=100 + 10 * n + layer) for layer, name in enumerate(base)} for n in range(2)]
    experts = {
        f"task {n}": {
            name: base[name] + 0.01 * (2 * family[n % 2][name] + normal(70, 60, seed=1000 + 10 * n + layer))
            for layer, name in enumerate(base)
        }
        for n in range(42)
    }
    packed = pack(base, experts, tmp_path / "bundle", method=TallMask())
    masks = tallstore.open_bundle(packed.root).statistics()
    order = order_of(masks)
    assert sorted(order) == list(range(42))
    assert {frozenset(place % 2 for place in half) for half in (order[:21], order[21:])} == {
        frozenset({0}),
        frozenset({1}),
    }
    page = page_of(packed.root, tmp_path)
    assert [text for text, _ in page.tables["density"][0]] == ["block", "weights", "all masks", "least", "most"]
    assert [text for text, _ in page.tables["overlap"][0]] == ["task", "nearest task", "in common"]
    for place, (share, name) in enumerate(
        zip(page.values("overlap", "in common"), page.cells("overlap", "nearest task"), strict=True)
    ):
        others = {masks.tasks[other]: both for other, both in enumerate(masks.similarity[place]) if other != place}
        assert share == max(others.values()) == others[name]
    assert any("42 tasks are too many to name" in text for text in page.texts["figcaption"])


def test_tables_end_somewhere(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MOST_ROWS", 2)
    page = page_of(bundle, tmp_path)
    assert len(page.tables["tasks"]) == 1 + 2
    assert "and 1 more; tallstore inspect and statistics, with --json, have all of them" in page.texts["p"]


# --- writing ----------------------------------------------------------------------------------------------------------


def test_a_file_that_is_there_is_kept_unless_told_otherwise(bundle, tmp_path):
    out = tmp_path / "report.html"
    out.write_text("mine")
    with pytest.raises(
        OutputExistsError, match=r"report\.html: is there already; choose another place, or give overwrite=True"
    ):
        tallstore.write_report(bundle, out)
    assert out.read_text() == "mine"
    tallstore.write_report(bundle, out, overwrite=True)
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]


def test_no_page_inside_the_bundle_nor_over_a_directory(bundle, tmp_path):
    with pytest.raises(OutputInsideInputError, match="is inside the bundle"):
        tallstore.write_report(bundle, bundle / "report.html")
    with pytest.raises(OutputExistsError, match="is a directory; give the name of a file"):
        tallstore.write_report(bundle, tmp_path, overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        tallstore.write_report(bundle, tmp_path / "file" / "report.html")


def test_a_damaged_bundle_makes_no_page(bundle, tmp_path):
    root = shutil.copytree(bundle, tmp_path / "bundle")
    shard = next(root.glob("groups/g0001/*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[-100] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(IntegrityError):
        tallstore.write_report(root, tmp_path / "report.html")
    with pytest.raises(BundleNotFoundError):
        tallstore.write_report(tmp_path, tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_without_matplotlib_an_extra_is_named_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path_importer_cache", {})
    with pytest.raises(MissingExtraError, match=r"the report needs matplotlib: pip install 'tallstore\[report\]'"):
        tallstore.write_report(tmp_path, tmp_path / "report.html")


def test_the_command_writes_it_and_says_where(bundle, html, tmp_path):
    out = tmp_path / "new" / "report.html"
    assert (
        run("report", bundle, "--out", out, "--overwrite").stdout
        == f"reported {bundle} in {out}: {out.stat().st_size / 1000:.1f} kB\n"
    )
    assert out.read_text(encoding="utf-8") == html
    assert (
        refused("report", bundle, "--out", out) == f"{out}: is there already; choose another place, or give --overwrite"
    )
    assert misused("report", bundle).startswith("give --out FILE")
    assert "no bundle" in refused("report", tmp_path, "--out", tmp_path / "none.html")


def test_progress_goes_on_and_ends(bundle, tmp_path):
    told = []
    tallstore.write_report(bundle, tmp_path / "report.html", progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert {total for _, total in told} == {told[-1][0]}
