"""`tallstore inspect`: one task or two hundred, in terminals narrow and wide, and in pipes."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from rich.cells import cell_len

import tallstore
from tallstore.cli.views.bundle import print_bundle
from tallstore.inspecting.summary import summarise
from tests.command_line import refused, run
from tests.model_directories import pack_models, save_models

COUNT = 200


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = save_models(tmp_path_factory.mktemp("models"))
    pack_models(root, root / "bundle")
    return root


@pytest.fixture
def bundle(models):
    return models / "bundle"


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    """A bundle of two hundred tasks, in an order of its own."""
    generator = torch.Generator().manual_seed(0)
    base = {"block.weight": torch.randn(70, 64, generator=generator)}
    experts = {
        f"task {position * 77 % COUNT:03d} in words": {
            "block.weight": base["block.weight"] + 0.01 * torch.randn(70, 64, generator=generator)
        }
        for position in range(COUNT)
    }
    path = tmp_path_factory.mktemp("crowd") / "bundle"
    tallstore.pack(base, experts, path)
    return path, list(experts)


def test_a_row_a_task(bundle):
    result = run("inspect", bundle)
    lines = result.stdout.splitlines()
    assert f"bundle  {bundle} (format 1.0, by tallstore {tallstore.__version__})" in lines[0]
    assert re.search(r"signed-mask \(threshold 1.2, .*\), merged in log4, 3 tasks", result.stdout)
    assert re.search(r"^tasks   3; cosine 0\.\d{3}", result.stdout, re.MULTILINE)
    assert re.search(r"ratio .* times smaller than 3 checkpoints \(", result.stdout)
    header = next(line for line in lines if line.startswith("task "))
    assert header.split() == ["task", "parameters", "size", "bits", "cosine", "gain", "coded", "same", "whole", "other"]
    assert [line.split()[0] for line in lines if re.match(r"task\d", line)] == ["task1", "task2", "task3"]
    assert result.stderr == ""


def rows(text):
    """The tasks' rows."""
    return re.findall(r"^task \d{3}", text, re.MULTILINE)


@pytest.mark.parametrize("columns", [None, 40, 60, 80, 200])
def test_two_hundred_tasks_in_the_order_of_the_bundle(crowd, columns):
    path, names = crowd
    text = run("inspect", path, columns=columns).stdout
    assert rows(text) == [name[:8] for name in names]
    header = text.partition("\n\n")[0]
    assert len(header.splitlines()) <= (6 if columns in {None, 200} else 18)
    assert "200; cosine 0." in header
    assert "200 checkpoints" in " ".join(header.split())
    assert max(cell_len(line) for line in text.splitlines()) <= (columns or 200)
    if columns is None or columns >= 60:
        assert all(re.search(rf"^{re.escape(name)} ", text, re.MULTILINE) for name in names)


def test_one_task_reads_well(bundle, capsys):
    summary = summarise(bundle)
    group = replace(summary.groups[0], tasks=1)
    print_bundle(replace(summary, tasks=summary.tasks[:1], groups=(group,)))
    text = capsys.readouterr().out
    assert "1 task, " in text
    assert "times smaller than 1 checkpoint (" in text
    assert "each" not in text
    assert not re.search(r"^tasks ", text, re.MULTILINE)


def test_groups_that_were_made_alike_share_a_line(bundle, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    summary = summarise(bundle)
    (first,) = summary.groups
    alone = [replace(first, id=f"g{number:04d}", method="sign", parameters={}, tasks=1) for number in range(2, 40)]
    print_bundle(replace(summary, groups=(first, *alone)))
    text = capsys.readouterr().out
    facts = re.findall(r"^group   (.*)", text, re.MULTILINE)
    assert len(facts) == 2
    assert re.match(r"g0001: signed-mask \(threshold 1.2, .*\), merged in log4, 3 tasks, ", facts[0])
    assert facts[1].startswith("g0002 to g0039: sign, merged in log4, 38 tasks in 38 groups, ")
    print_bundle(replace(summary, groups=(first, *alone[:2])))
    assert len(re.findall(r"^group   g000", capsys.readouterr().out, re.MULTILINE)) == 3


@pytest.mark.parametrize("columns", [24, 40, 60, 80, 140])
def test_tables_fit_the_terminal(bundle, columns):
    for arguments in ([], ["--task", "task1"]):
        result = run("inspect", bundle, *arguments, columns=columns)
        assert max(cell_len(line) for line in result.stdout.splitlines()) <= columns
        assert "size" in result.stdout


def test_columns_give_way_to_names_before_names_are_folded(crowd):
    path, names = crowd
    text = run("inspect", path, columns=44).stdout
    assert not re.search(r"^task .*gain", text, re.MULTILINE)
    assert "cosine" in text
    assert all(re.search(rf"^{re.escape(name)} ", text, re.MULTILINE) for name in names)


def test_a_pipe_gets_whole_names(models, tmp_path):
    name = "a task of a name that goes on and on " * 3
    tallstore.pack(models / "base", {name: models / "task1", "b": models / "task2"}, tmp_path / "bundle")
    assert name.strip() in run("inspect", tmp_path / "bundle", columns=None).stdout


def test_names_are_no_markup(models, tmp_path):
    name = "[red]ä[/red] 日本 :smile:"
    tallstore.pack(models / "base", {name: models / "task1", "b": models / "task2"}, tmp_path / "bundle")
    assert name in run("inspect", tmp_path / "bundle").stdout
    assert f"no task named {name + 'x'!r}; did you mean {name!r}?" in refused(
        "inspect", tmp_path / "bundle", "--task", name + "x"
    )


def test_a_row_a_tensor(bundle):
    result = run("inspect", bundle, "--task", "task2")
    assert re.search(r"^block.weight +signed +f32 +80 × 64 +\S+ +\d+ B$", result.stdout, re.MULTILINE)
    assert re.search(r"^embed.weight +extended from row 90 +f32", result.stdout, re.MULTILINE)
    assert re.search(r"^head.weight +private +f32 +4 × 64 +– +1.0 kB$", result.stdout, re.MULTILINE)
    assert re.search(r"^norm.bias +dropped +– +– +– +–$", result.stdout, re.MULTILINE)
    assert "config.json (22 B)" in result.stdout


def test_json(bundle):
    summary = json.loads(run("inspect", bundle, "--json", columns=20).stdout)
    assert [task["name"] for task in summary["tasks"]] == ["task1", "task2", "task3"]
    details = json.loads(run("inspect", bundle, "--json", "--task", "task1", columns=20).stdout)
    assert details["task"] == summary["tasks"][0]
    assert {tensor["kind"] for tensor in details["tensors"]} == {"signed", "same", "private", "extended", "dropped"}


def test_what_is_not_here(bundle, tmp_path):
    part = shutil.copytree(bundle, tmp_path / "part")
    shutil.rmtree(part / "tasks" / "task2")
    result = run("inspect", part)
    assert "tasks   3, 2 of them here; " in result.stdout
    assert "2 checkpoints of 3" in result.stdout
    assert re.search(r"^task2 .*not fetched$", result.stdout, re.MULTILINE)
    assert "task 'task2' was not fetched" in refused("inspect", part, "--task", "task2")


def test_colour_is_the_terminals_choice(bundle):
    terminal = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    partial = ["inspect", bundle, "--task", "nothing"]
    assert "\x1b[1;31merror: " in run(*partial, code=1, NO_COLOR=None, **terminal).stderr
    assert not re.search(r"\x1b\[[\d;]*3\dm", run(*partial, code=1, **terminal).stderr)
    assert "\x1b" not in run(*partial, code=1, NO_COLOR=None).stderr
    assert "\x1b" not in run("inspect", bundle, NO_COLOR=None).stdout
