"""What the site shows runs as it stands there, says what was measured, and needs nothing from elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

import tallstore
from tests.documents import ROOT, blocks, run_page
from tests.hub.client_process import client_process
from tests.hub.loopback import LoopbackHub

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
WITH_CODE = [page for page in PAGES if any(block.language in {"python", "sh"} for block in blocks(page.read_text()))]
PACKING = {"index.md", "choosing.md", "pack.md"}  # they begin with checkpoints alone


def name_of(page):
    return page.relative_to(DOCS).as_posix()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """What the pages speak of: a base, two fine-tunes of it, and a bundle of them."""
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("models")
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    config = transformers.BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=64, num_labels=2)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        base = transformers.BertForMaskedLM(config)
        base.save_pretrained(root / "base")
        base.bert.save_pretrained(root / "encoder")
        for task in ("movies", "spam"):
            expert = transformers.BertForSequenceClassification(config)
            expert.load_state_dict(base.state_dict(), strict=False)
            with torch.no_grad():
                for parameter in expert.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.01)
            expert.save_pretrained(root / task)
            shutil.copytree(root / task, root / "fine-tunes" / task)
    tallstore.pack(root / "base", {task: root / task for task in ("movies", "spam")}, root / "bundle")
    return root


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """A process that has pages run, signed in to a Hub that is not the real one."""
    with (
        LoopbackHub() as hub,
        client_process(hub.url, tmp_path_factory.mktemp("client"), token=hub.token) as running,
    ):
        yield running


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_the_code_of_a_page_runs(page, models, process, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(models, folder)
    if page.name in PACKING:
        shutil.rmtree(folder / "bundle")
    process.submit(run_page, page, folder).result(600)


def test_no_code_is_left_out_unseen():
    """What is not run is of a language that says so: `py` needs libraries that tests do not have."""
    assert {page.name for page in WITH_CODE} >= PACKING | {"load.md", "hub.md", "cluster.md"}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.count("```") == 2 * len(blocks(text)), f"{name_of(page)} has a block of no language"
        assert {block.language for block in blocks(text)} <= {"python", "py", "sh", "toml", "text"}, name_of(page)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_figures_are_those_that_were_measured(page):
    measured = (ROOT / "benchmarks" / "RESULTS.md").read_text() + (ROOT / "README.md").read_text()
    known = set(re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?![\w])", measured))
    for figure in re.findall(r"(\d[\d,]*(?:\.\d+)?) (?:%|bits?|ms|s|MB|GB|Gbit)\b", page.read_text(encoding="utf-8")):
        assert figure in known, f"{name_of(page)}: {figure} is neither in RESULTS.md nor in README.md"


def test_every_public_name_is_in_the_reference():
    reference = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    shown = set(re.findall(r"^::: tallstore\.(\w+)$", reference, re.MULTILINE))
    errors = {name for name in tallstore.__all__ if getattr(tallstore, name) is getattr(tallstore.errors, name, None)}
    assert shown == {"errors", *tallstore.__all__} - errors
    index = (DOCS / "reference" / "index.md").read_text(encoding="utf-8")
    assert {name for name in {*tallstore.__all__} - errors if f"`{name}`" not in index} == set()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built; warnings are errors."""
    if find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: pip install '.[docs]'")
    built = tmp_path_factory.mktemp("site")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", built],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return built


def test_the_site_has_what_lives_elsewhere(site):
    for path in (
        "spec/tallstore-1/index.html",
        "spec/format.svg",
        "benchmarks/RESULTS/index.html",
        "CHANGELOG/index.html",
    ):
        assert (site / path).is_file(), path
    assert "there MUST NOT be a file that the manifest does" in (site / "spec/tallstore-1/index.html").read_text()
    for page, told in {
        "limits": "It is lossy",
        "choosing": "worst task",
        "reference/command-line": "--merged-dtype",
    }.items():
        assert told in (site / page / "index.html").read_text(encoding="utf-8"), page


def test_the_site_needs_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=[\"']?(?:https?:)?//", text), page
        assert 'class="mermaid"' not in text, page  # the theme would fetch its library
    for sheet in site.rglob("*.css"):
        assert not re.search(r"@import|url\([\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet
