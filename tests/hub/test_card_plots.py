"""The plots of a model card: what a push draws, sends, keeps and takes away, and what it leaves to others."""

from __future__ import annotations

import html
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import tallstore
from tallstore.hub.card_plots import PATHS
from tallstore.inspecting.summary import summarise
from tallstore.sizes import readable
from tests.hub.pushes import REPO, CommandLine, Pusher, name_base, plots, pushed
from tests.model_directories import save_models

SIZES, FIDELITY, OVERLAP = PATHS
MARKED = "# Mine\n\n<!-- tallstore:begin -->\n<!-- tallstore:end -->\n\nAlso mine.\n"
WARNING = (
    f"{REPO}: {FIDELITY} is there and no plot of a push, so it is left alone, and the card does not have that plot; "
    "give it another name, or push with plots=False"
)


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """The folder of bundles of one, "two" and "three" tasks that have masks."""
    root = save_models(tmp_path_factory.mktemp("models"))
    for name, tasks in (("two", "12"), ("three", "123")):
        experts = {f"task{task}": root / f"task{task}" for task in tasks}
        tallstore.pack(root / "base", experts, root / name)
    tallstore.pack(root / "base", {"task1": root / "task1"}, root / "one", method=tallstore.Uniform(levels=3))
    return root


@pytest.fixture
def push(hub, plain_process):
    return Pusher(plain_process, hub.url, hub.token)


@pytest.fixture
def tool(hub, plain_process):
    return CommandLine(plain_process, hub.url, hub.token)


def warned(outcome):
    """What a push warned of; its client has warnings of its own."""
    return [text for text in outcome.warnings if text.startswith(REPO)]


def card(hub, revision="main"):
    return hub.repositories[REPO].read(revision)["README.md"].decode()


def shown(hub, revision="main"):
    """What the card says of each picture that it shows; every one of them is there."""
    found = {path: html.unescape(alt) for alt, path in re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", card(hub, revision))}
    assert found.keys() <= hub.repositories[REPO].read(revision).keys()
    return found


# --- what is drawn


def test_the_card_shows_what_the_report_would(hub, push, masked):
    assert warned(push(masked / "three", REPO)) == []
    assert list(shown(hub)) == list(PATHS)
    assert plots(hub).keys() == set(PATHS)
    for content in plots(hub).values():
        assert 5_000 < len(content) < 120_000
        with Image.open(io.BytesIO(content)) as picture:
            picture.verify()
            assert (picture.format, picture.width) == ("PNG", 1800)
            assert 200 < picture.height < 1000


def test_figures_are_those_of_the_library(hub, push, masked):
    push(masked / "three", REPO)
    summary, said = summarise(masked / "three"), shown(hub)
    assert f"{summary.ratio:.1f} times smaller" in said[SIZES]
    assert readable(summary.nbytes) in said[SIZES]
    cosines = [task.cosine for task in summary.tasks]
    assert f"cosine {min(cosines):.4f} to {max(cosines):.4f}" in said[FIDELITY]
    with tallstore.open_bundle(masked / "three") as bundle:
        similarity = np.array(bundle.statistics().similarity, np.float64)
    shares = 100 * similarity[np.triu_indices(3, 1)]
    assert f"{shares.min():.1f} % to {shares.max():.1f} %" in said[OVERLAP]


def test_each_plot_has_a_caption_below_the_table(hub, push, masked):
    push(masked / "three", REPO)
    text = card(hub)
    assert text.index("| task3 |") < text.index("```python") < text.index("![")
    assert text.rindex("![") < text.index("<!-- tallstore:end -->")
    captions = re.findall(r"\.png\)\n\n\*([^*\n]+)\*\n", text)
    assert [html.unescape(caption) for caption in captions] == [
        "The bundle's size beside that of its checkpoints.",
        "What a task costs, and how true it is.",
        "What each two masks have in common.",
    ]


def test_of_one_task_its_size_is_shown(hub, push, masked):
    push(masked / "one", REPO)
    assert list(shown(hub)) == list(plots(hub)) == [SIZES]


def test_without_masks_there_is_nothing_to_compare(hub, push, bundles):
    push(bundles / "two", REPO)
    assert list(shown(hub)) == [SIZES, FIDELITY]


# --- what is sent


@pytest.mark.parametrize("without", [None, "matplotlib"])
def test_a_push_without_changes_is_none(hub, push, masked, without):
    """Nor is anything drawn again: another version of matplotlib draws other bytes."""
    first = push(masked / "three", REPO).oid
    hub.log.clear()
    assert push(masked / "three", REPO, without=without).oid == first
    assert not hub.log.select("POST")
    assert list(shown(hub)) == list(PATHS)


def test_of_another_bundle_they_are_others(hub, push, masked):
    push(masked / "two", REPO)
    before = plots(hub)
    push(masked / "three", REPO)
    assert plots(hub).keys() == before.keys()
    assert all(content != before[path] for path, content in plots(hub).items())
    assert "Over 3 tasks" in shown(hub)[FIDELITY]
    push(masked / "two", REPO)
    assert plots(hub) == before


def test_they_come_back_where_one_was_taken_away(hub, push, masked):
    push(masked / "three", REPO)
    before = plots(hub)
    hub.repositories[REPO].push({}, delete=["README.md"])
    push(masked / "three", REPO)
    assert plots(hub) == before
    assert list(shown(hub)) == list(PATHS)


def test_a_branch_and_a_pull_request_have_their_own(hub, push, masked):
    push(masked / "two", REPO)
    push(masked / "three", REPO, revision="next")
    push(masked / "three", REPO, create_pr=True)
    assert "Over 2 tasks" in shown(hub)[FIDELITY]
    for revision in ("next", "refs/pr/1"):
        assert "Over 3 tasks" in shown(hub, revision)[FIDELITY]
        assert plots(hub, revision) != plots(hub)


# --- what is taken away


@pytest.mark.parametrize("options", [{"plots": False}, {"without": "matplotlib"}])
def test_plots_of_another_bundle_go_where_none_are_drawn(hub, push, masked, options):
    push(masked / "two", REPO)
    push(masked / "three", REPO, **options)
    assert plots(hub) == shown(hub) == {}
    assert "| task3 |" in card(hub)
    push(masked / "three", REPO)
    assert list(shown(hub)) == list(PATHS)


def test_where_none_are_wanted_those_of_this_bundle_go_too(hub, push, masked):
    push(masked / "two", REPO)
    outcome = push(masked / "two", REPO, plots=False)
    assert plots(hub) == shown(hub) == {}
    hub.log.clear()
    assert push(masked / "two", REPO, plots=False).oid == outcome.oid
    assert not hub.log.select("POST")


def test_without_matplotlib_the_card_is_as_ever(hub, push, masked):
    assert warned(push(masked / "two", REPO, without="matplotlib")) == []
    assert plots(hub) == shown(hub) == {}
    assert "| task2 |" in card(hub)


def test_tasks_that_are_not_here_are_not_drawn(hub, push, tool, bundles, tmp_path):
    """Of the very bundle that is there, the plots stay; of another one, there are none."""
    part = shutil.copytree(bundles / "two", tmp_path / "part")
    shutil.rmtree(part / "tasks/task2")
    push(bundles / "two", REPO)
    whole = plots(hub)
    (part / "README.md").write_text(MARKED)
    push(part, REPO)
    assert "# Mine" in card(hub)
    assert (list(shown(hub)), plots(hub)) == ([SIZES, FIDELITY], whole)
    name_base(part, "org/base")
    printed, _ = tool("push", part, REPO)
    assert "no plots on the card: 1 task of the bundle is not here\n" in printed
    assert plots(hub) == shown(hub) == {}


# --- what is not a push's


def test_the_users_text_stays_around_them(hub, push, masked, tmp_path):
    part = shutil.copytree(masked / "three", tmp_path / "three")
    (part / "README.md").write_text(MARKED)
    push(part, REPO)
    push(masked / "two", REPO)
    before, _, rest = card(hub).partition("<!-- tallstore:begin")
    assert before.endswith("# Mine\n\n")
    assert "Also mine." in rest.partition("<!-- tallstore:end -->")[2]
    assert list(shown(hub)) == list(PATHS)


def test_a_text_without_a_place_for_them_has_none(hub, push, masked):
    push(masked / "three", REPO)
    hub.repositories[REPO].push({"README.md": b"# Mine\n\nAll of it.\n"})
    push(masked / "three", REPO)
    assert plots(hub) == shown(hub) == {}
    assert "# Mine\n\nAll of it.\n" in card(hub)


@pytest.mark.parametrize("content", [b"mine", b"\x89PNG\r\n\x1a\n mine", b"\0" * (2 << 20)])
def test_a_file_of_somebody_elses_is_left_alone_and_told_of(hub, push, masked, content):
    hub.add(REPO).push({FIDELITY: content, "plots/other.png": b"other"})
    for bundle, told in (("two", [WARNING]), ("three", [WARNING]), ("three", [])):  # the last one changes nothing
        assert warned(push(masked / bundle, REPO)) == told
        assert list(shown(hub)) == [SIZES, OVERLAP]
        assert plots(hub)[FIDELITY] == content
    assert warned(push(masked / "three", REPO, plots=False)) == []
    assert plots(hub) == {FIDELITY: content}
    assert hub.repositories[REPO].read()["plots/other.png"] == b"other"


def test_a_plot_that_somebody_replaced_is_theirs(hub, push, masked):
    push(masked / "two", REPO)
    hub.repositories[REPO].push({FIDELITY: b"mine"})
    assert warned(push(masked / "three", REPO)) == [WARNING]
    assert list(shown(hub)) == [SIZES, OVERLAP]
    assert plots(hub)[FIDELITY] == b"mine"


# --- who never sees them


def test_a_pull_leaves_them_there(push, tool, masked, tmp_path):
    push(masked / "two", REPO)
    tool("pull", REPO, "--out", tmp_path / "pulled")
    assert not tallstore.verify(tmp_path / "pulled")
    assert not (tmp_path / "pulled/plots").exists()


def test_a_repository_that_has_them_is_sound(push, tool, masked):
    push(masked / "two", REPO)
    tool("verify", REPO)


def test_options_of_the_command(hub, tool, masked):
    planned = json.loads(tool("push", masked / "two", REPO, "--dry-run", "--json")[0])
    assert {*PATHS, "README.md"} <= {file["path"] for file in planned["upload"]}
    assert planned["no_plots"] is None
    printed, _ = tool("push", masked / "two", REPO, "--no-plots")
    assert "plots" not in printed
    assert plots(hub) == {}
    assert pushed(hub)
