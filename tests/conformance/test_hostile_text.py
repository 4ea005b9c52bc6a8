"""What a bundle's author wrote is shown as text: no terminal, page or card acts on it. Nor is it executed."""

from __future__ import annotations

import hashlib
import html
import json
import pickle
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

import tallstore
from tallstore.format import layout
from tallstore.hub.card import render
from tallstore.inspecting.summary import summarise
from tests.command_line import refused, run
from tests.resealed import VECTORS, resealed, with_key, write_manifest

TWO = VECTORS / "two-groups" / "bundle"
GROUP = "groups/g0001/group.json"
ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b31m\rnever\u202eseen\u2028twice"
MARKUP = "<script>alert(1)</script><img src=x onerror=alert(1)>"
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def with_parameter(text):
    def edit(document):
        method = {"name": "signed-mask", "parameters": {text: text, "list": [text]}}
        (document["groups"][0] if "groups" in document else document)["method"] = method

    return {layout.MANIFEST: edit, GROUP: edit}


@pytest.mark.parametrize(
    "command", [["inspect"], ["inspect", "--task", "one"], ["verify"], ["statistics"], ["inspect", "--json"]]
)
def test_a_terminal_gets_no_control_characters(command, tmp_path):
    bundle = resealed(TWO, tmp_path / "bundle", with_parameter(ESCAPES))
    result = run(command[0], bundle, *command[1:])
    assert CONTROL.search(result.stdout + result.stderr) is None


@pytest.mark.parametrize("text", [ESCAPES, "[bold]rich[/bold]", ":smile:"])
def test_what_is_shown_is_what_was_written(text, tmp_path):
    bundle = resealed(TWO, tmp_path / "bundle", with_parameter(text))
    shown = run("inspect", bundle, columns=2000).stdout
    assert text[:4].replace("\x1b", "\\x1b") in shown


@pytest.mark.parametrize(
    ("path", "place", "key"),
    [
        (layout.MANIFEST, (), ESCAPES),
        ("tasks/one/task.json", ("tensors", 0), ESCAPES),
        (GROUP, ("vectors", 0), ESCAPES),
    ],
)
def test_a_refusal_is_one_line_that_a_terminal_can_show(path, place, key, tmp_path):
    bundle = resealed(TWO, tmp_path / "bundle", {path: with_key(place, key)})
    for line in (refused("export", bundle, "one", "--out", tmp_path / "expert"), *map(str, tallstore.verify(bundle))):
        assert line.isprintable()
        assert line.endswith("[VER-3]")


def test_a_report_shows_markup_as_text(tmp_path):
    pytest.importorskip("matplotlib")
    bundle = resealed(TWO, tmp_path / "bundle", {**with_parameter(MARKUP), layout.MANIFEST: hostile_manifest})
    page = tallstore.write_report(bundle, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "alert(1)" in page
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert "default-src 'none'" in html.unescape(page)


def hostile_manifest(document):
    document["generator"] = MARKUP
    with_parameter(MARKUP)[layout.MANIFEST](document)


def test_a_card_shows_markup_as_text(tmp_path):
    def rename(document):
        (document["tasks"][0] if "tasks" in document else document)["name"] = f"{MARKUP} | `code` [link](javascript:x)"

    bundle = resealed(TWO, tmp_path / "bundle", {layout.MANIFEST: rename, "tasks/one/task.json": rename})
    card = render(summarise(bundle), "user/experts", None, None, lambda _: None)
    assert card.count("```") == 2
    card = re.sub(r"^```python\n.*?^```$", "", card, flags=re.MULTILINE | re.DOTALL)  # where nothing is markup
    assert "alert(1)" in card
    assert "<script>alert" not in card
    assert "<img" not in card
    assert "[link](javascript" not in card


# --- what is executed -------------------------------------------------------------------------------------------------


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("what", ["trap", "weights"])
def test_an_embedded_base_is_no_pickle(what, tmp_path):
    """Not even one of plain weights, which hold what base.json says."""
    bundle = tmp_path / "bundle"
    shutil.copytree(TWO, bundle)
    place = bundle / "base" / "pytorch_model.bin"
    if what == "trap":
        place.write_bytes(pickle.dumps(Trap(str(tmp_path / "sprung"))))
    else:
        torch.save(load_file(bundle / "base" / "model.safetensors"), place)
    (bundle / "base" / "model.safetensors").unlink()
    raw = place.read_bytes()
    entry = {
        "path": "base/pytorch_model.bin",
        "size": len(raw),
        "sha256": hashlib.sha256(raw).hexdigest(),
        "git_oid": hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest(),  # noqa: S324 - as git does
    }
    manifest = json.loads((bundle / layout.MANIFEST).read_bytes())
    others = [file for file in manifest["files"] if not file["path"].startswith("base/")]
    write_manifest(bundle, manifest | {"files": sorted([*others, entry], key=lambda file: file["path"])})
    with tallstore.open_bundle(bundle) as opened, pytest.raises(tallstore.FormatError, match=r"\[BASE-4\]$"):
        opened.state_dict("one")
    assert {problem.rule for problem in tallstore.verify(bundle)} == {"BASE-4"}
    assert not (tmp_path / "sprung").exists()
