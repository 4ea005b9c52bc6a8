"""The model card: what a push writes into it, and what it leaves as the user wrote it."""

from __future__ import annotations

import ast
import dataclasses
import html
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import tallstore
from tallstore.errors import CardError
from tallstore.hub import front_matter
from tallstore.hub.card import BEGIN, END, MAX_ROWS, TAGS, render
from tallstore.inspecting.summary import BaseSummary, BundleSummary, GroupSummary, TaskSummary, summarise
from tallstore.sizes import readable

REPO = "user/experts"
PIN = "a" * 40
TASK = TaskSummary("spam", "spam", "g0001", 10_000, 1234, 0.8369, 1.0004, fetched=True, bits=1.118)
NAMED = BaseSummary("org/bert", PIN, embedded=False, tensors=1, parameters=10_000, checkpoint_nbytes=40_000)


def summary(*tasks, base=NAMED, method="sign"):
    group = GroupSummary("g0001", method, {"gain": "one"}, None, len(tasks), 500)
    return BundleSummary(None, "", "1.0", "tallstore 0", base, (group,), tasks or (TASK,), 5000, 600, 0)


def no_licence(_repo_id, _revision):
    return {}


def card(of=None, *, local=None, remote=None, licence_of=no_licence):
    return render(of or summary(), REPO, local, remote, licence_of)


def metadata(readme):
    assert readme.startswith("---\n")
    return yaml.safe_load(readme.split("---\n")[1])


def around(readme):
    """The text before and behind the generated part, the metadata and the last line left out."""
    text = front_matter.split(readme)[1]
    before, _, rest = text.partition(BEGIN)
    return before, rest.partition(END)[2].rpartition("<!-- tallstore:text")[0]


def rows(readme):
    """The cells of the table, as they are read."""
    lines = [line for line in readme.splitlines() if line.startswith("| ")]
    return [[html.unescape(cell.strip()) for cell in line.strip("|").split("|")] for line in lines]


def snippet(readme):
    (code,) = re.findall(r"^```python\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    return code


# --- what is generated


def test_the_metadata_are_the_bundles():
    assert metadata(card()) == {
        "library_name": "tallstore",
        "base_model": "org/bert",
        "base_model_relation": "merge",
        "tags": list(TAGS),
    }


def test_a_base_without_a_name_is_not_named():
    base = dataclasses.replace(NAMED, repo_id=None, revision=None)
    assert not metadata(card(summary(base=base))).keys() & {"base_model", "base_model_relation"}


def test_the_licence_is_the_bases():
    asked = []

    def licence_of(*base):
        asked.append(base)
        return {"license": "other", "license_name": "theirs"}

    found = metadata(card(licence_of=licence_of))
    assert (found["license"], found["license_name"]) == ("other", "theirs")
    assert asked == [("org/bert", PIN)]


def test_the_licence_that_is_given_stays():
    given = "---\nlicense: mit\n---\n# Mine\n"
    assert metadata(card(remote=given, licence_of=lambda *_: {"license": "gpl"}))["license"] == "mit"
    # Also where the text here is another: what the Hub says of the licence is not lost.
    assert metadata(card(local="# Here\n", remote=given.replace("# Mine\n", "")))["license"] == "mit"


@pytest.mark.parametrize("embedded", [False, True])
def test_a_bundles_table_has_every_task_and_the_snippet_runs(models, tmp_path, embedded, monkeypatch):
    experts = {name: models / f"task{seed}" for seed, name in enumerate(("spam", "mood | tone", '"<b>`'), start=1)}
    scores = dict(zip(experts, (0.91, 0.5, 1.0), strict=True))
    tallstore.pack(
        models / "base", experts, tmp_path / "bundle", embed_base=embedded, evaluate=lambda task, _: scores[task]
    )
    found = summarise(tmp_path / "bundle")
    text = card(found)
    heading, _, *tasks = rows(text)
    assert heading == ["task", "size", "bits", "cosine", "gain", "score"]
    assert tasks == [
        [
            task.name,
            readable(task.nbytes),
            f"{task.bits:.2f}",
            f"{task.cosine:.3f}",
            f"{task.gain:.3f}",
            f"{scores[task.name]:.4g}",
        ]
        for task in found.tasks
    ]
    assert readable(found.nbytes) in text
    code = snippet(text)
    assert len([line for line in code.splitlines() if line]) == 3
    assert ("base=" in code) is not embedded
    monkeypatch.chdir(models)
    code = code.replace(REPO, str(tmp_path / "bundle")).replace("path/to/the/base", "base")
    names = {}
    exec(compile(code, "card", "exec"), names)  # noqa: S102 - what a reader would type
    assert names["weights"].keys() == names["bundle"].state_dict("spam").keys()


def test_what_is_not_known_is_a_dash():
    task = TaskSummary("spam", "spam", "g0001", 10, 0, None, None, fetched=False)
    assert rows(card(summary(task)))[2] == ["spam", "0 B", "–", "–", "–"]


def test_a_thousand_rows_are_enough():
    tasks = [dataclasses.replace(TASK, name=f"task{number}") for number in range(MAX_ROWS + 5)]
    text = card(summary(*tasks))
    assert len(rows(text)) == MAX_ROWS + 2
    assert "And 5 more tasks." in text


@given(st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=40))
def test_any_name_is_one_cell_and_no_markup(name):
    task = dataclasses.replace(TASK, name=name)
    text = card(summary(task))
    _, _, *found = rows(text)
    assert [row[0] for row in found] == [" ".join(name.split())]
    raw = next(line for line in text.splitlines() if line.startswith("| ") and "1.2 kB" in line).split(" | ")[0]
    assert not set(raw.removeprefix("| ")) & set("<>`*_[]{}\\~$|")
    assert ast.literal_eval(snippet(text).partition("state_dict(")[2].rpartition(")")[0]) == name
    assert card(summary(task), remote=text) == text


@pytest.mark.parametrize("name", [BEGIN, END, "---", "```", "<!-- tallstore:text 0123456789abcdef -->"])
def test_a_name_that_looks_like_a_mark_is_none(name):
    text = card(summary(dataclasses.replace(TASK, name=name), method=name))
    changed = text.replace("# experts\n", "# experts\n\nMine.\n") + "Also mine.\n"
    again = card(remote=changed)
    assert around(again)[0] == "# experts\n\nMine.\n\n"
    assert "Also mine." in around(again)[1]


# --- what is the user's


def test_a_second_push_changes_nothing():
    assert card(remote=card()) == card()
    assert card(local=card(), remote=card()) == card()


def test_what_was_written_around_the_generated_part_stays():
    first = card()
    edited = first.replace("# experts\n", "# My experts\n\nBefore | <b>it</b>.\r\n").replace(
        f"{END}\n", f"{END}\n\nAfter.\n"
    )
    again = card(summary(dataclasses.replace(TASK, name="mood")), remote=edited)
    assert around(again)[0] == "# My experts\n\nBefore | <b>it</b>.\r\n\n"
    assert around(again)[1].strip() == "After."
    assert [row[0] for row in rows(again)] == ["task", "---", "mood"]


def test_what_was_taken_away_does_not_come_back():
    assert around(card(remote=card().replace("# experts\n\n", "")))[0] == ""


def test_what_was_written_into_the_generated_part_is_written_anew():
    assert card(remote=card().replace("| spam |", "| ham |")) == card()


METADATA = """\
# of mine
language: no   # Norwegian
tags: [mine, tallstore]
thumbnail: 'x: y'
license: mit
model-index:
- name: a
  results: []
  # behind it
base_model:
- org/other
- org/bert
date: 2024-01-01
"""


def test_the_users_metadata_stay_as_they_are_written():
    text = front_matter.split(card(remote=f"---\n{METADATA}---\nText.\n"))[0]
    kept = METADATA.replace("[mine, tallstore]", "\n- mine\n- tallstore\n- model-merging").replace(
        "tags: \n", "tags:\n"
    )
    assert text == f"{kept}library_name: tallstore\nbase_model_relation: merge\n"


def test_keys_that_a_push_sets_are_set_in_place():
    before = "library_name: transformers\nbase_model:\n- org/other\n# mine\ntags: x\npipeline_tag: y\n"
    text = front_matter.split(card(remote=f"---\n{before}---\n"))[0]
    assert text == (
        "library_name: tallstore\nbase_model: org/bert\n# mine\ntags:\n- x\n- tallstore\n- model-merging\n"
        "pipeline_tag: y\nbase_model_relation: merge\n"
    )


@pytest.mark.parametrize(
    "block", ["{license: mit, tags: [a]}\n", "license: mit\r\ntags:\r\n- a\r\n", "license: mit\ntags: [a]"]
)
def test_metadata_may_be_written_in_any_way(block):
    newline = "" if block.endswith("\n") else "\n"
    found = metadata(card(remote=f"---\n{block}{newline}---\nText.\n"))
    assert found["license"] == "mit"
    assert found["tags"] == ["a", *TAGS]
    assert found["library_name"] == "tallstore"


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ("a: [", "README.md on the Hub, line 3: the metadata between the dashes are no YAML; correct them"),
        ("- a", "README.md on the Hub: the metadata between the dashes are no mapping of keys; correct them"),
        ("a: 2024-99-99", "README.md on the Hub: the metadata between the dashes are no YAML; correct them"),
    ],
)
def test_metadata_that_are_none_are_refused(block, problem):
    with pytest.raises(CardError, match=f"^{re.escape(problem)}$"):
        card(remote=f"---\n{block}\n---\n")


def test_a_text_without_the_comments_is_left_alone():
    found = card(remote="# Mine\n\nAll of it.\n")
    assert front_matter.split(found)[1].startswith("# Mine\n\nAll of it.\n")
    assert "| task |" not in found
    assert metadata(found)["library_name"] == "tallstore"
    assert card(remote=found) == found


def test_the_comments_may_be_put_anywhere():
    found = card(remote="# Mine\n\n<!-- tallstore:begin -->\n<!-- tallstore:end -->\n\nMore.\n")
    assert around(found)[0] == "# Mine\n\n"
    assert around(found)[1].strip() == "More."
    assert "| task |" in found


@pytest.mark.parametrize("remote", ["", "\n", "---\nlicense: mit\n---\n", "---\nlicense: mit\n---"])
def test_a_readme_without_a_text_gets_one(remote):
    found = card(remote=remote)
    assert around(found)[0] == "# experts\n\n"
    assert "| task |" in found


# --- two that differ

LAST = card(remote="# Mine\n\n<!-- tallstore:begin -->\n<!-- tallstore:end -->\n")


def edited(text):
    return LAST.replace("# Mine", text)


@pytest.mark.parametrize(
    ("local", "remote", "kept"),
    [
        (None, edited("# There"), "# There"),
        (edited("# Here"), None, "# Here"),
        (LAST, edited("# There"), "# There"),  # as it was pulled
        (edited("# Here"), LAST, "# Here"),
        ("# Here\n", LAST, "# Here"),
        ("# Here\n", "---\nlicense: mit\n---\n", "# Here"),
        (
            "# Mine\n<!-- tallstore:begin -->\n<!-- tallstore:end -->\n",
            edited("# There"),
            "# There",
        ),  # as it was pushed
        (LAST, card(local=edited("# There"), remote=LAST), "# There"),  # pushed from elsewhere since
    ],
)
def test_who_edited_the_readme_is_heard(local, remote, kept):
    assert f"\n{kept}\n" in card(local=local, remote=remote)


def test_where_both_were_edited_the_hubs_is_kept_and_it_is_said():
    with pytest.warns(
        UserWarning, match=r"^user/experts: README.md was edited on the Hub, and here: the Hub's text is"
    ):
        found = card(local=edited("# Here"), remote=edited("# There"))
    assert "\n# There\n" in found


def test_metadata_that_were_edited_count_as_text():
    assert "pipeline_tag: x" in card(local=LAST, remote=LAST.replace("tags:", "pipeline_tag: x\ntags:"))
    assert "pipeline_tag: x" in card(local=LAST.replace("tags:", "pipeline_tag: x\ntags:"), remote=LAST)
