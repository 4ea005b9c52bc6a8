"""`tallstore verify` and `tallstore export`: what they print, and what they write."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from safetensors.torch import load_file

import tallstore
from tests.command_line import misused, refused, run
from tests.model_directories import pack_models, save_models


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = save_models(tmp_path_factory.mktemp("models"))
    pack_models(root, root / "bundle")
    return root


@pytest.fixture
def bundle(models):
    return models / "bundle"


@pytest.fixture
def part(bundle, tmp_path):
    """The bundle without one of its tasks."""
    path = shutil.copytree(bundle, tmp_path / "part")
    shutil.rmtree(path / "tasks" / "task2")
    return path


# --- verify


def test_verify_says_how_much_it_checked(bundle):
    files = sum(path.is_file() for path in bundle.rglob("*"))
    assert f"no problems: {files} files checked, " in run("verify", bundle).stdout
    assert json.loads(run("verify", bundle, "--json").stdout) == []


def test_verify_says_what_it_could_not_check(part):
    assert "not fetched, so not checked: task2" in run("verify", part).stdout


def test_verify_prints_every_problem(bundle, tmp_path):
    damaged = shutil.copytree(bundle, tmp_path / "damaged")
    for slug in ("task1", "task3"):
        path = damaged / "tasks" / slug / "mask-00001-of-00001.safetensors"
        raw = bytearray(path.read_bytes())
        raw[-100] ^= 1
        path.write_bytes(raw)
    problems = tallstore.verify(damaged)
    assert len(problems) >= 2
    result = run("verify", damaged, code=1, columns=40)
    assert result.stdout.splitlines() == [str(problem) for problem in problems]
    assert result.stderr == f"error: {damaged}: {len(problems)} problems; fetch or pack the bundle again\n"
    result = run("verify", damaged, "--json", code=1)
    assert json.loads(result.stdout) == [
        {"rule": problem.rule, "where": problem.where, "message": problem.message} for problem in problems
    ]


# --- export


def test_export_writes_a_directory(models, bundle, tmp_path):
    arguments = ["export", bundle, "task1", "--base", models / "base", "--out", tmp_path / "out"]
    result = run(*arguments)
    assert re.search(r"exported task1 to .*out: 5 tensors, [\d.]+ kB in model.safetensors, ", result.stdout)
    assert result.stderr == ""
    with tallstore.open_bundle(bundle, base=models / "base") as opened:
        expected = opened.state_dict("task1")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == expected.keys()
    assert refused(*arguments).endswith("or give --overwrite")
    run(*arguments, "--overwrite")


def test_export_says_how_to_give_the_base(models, bundle, tmp_path):
    out = ["--out", tmp_path / "out"]
    assert refused("export", bundle, "task1", *out).endswith("; give --base")
    assert "[BASE-2]" in refused("export", bundle, "task1", "--base", models / "task1", *out)
    base = ["--base", models / "base"]
    assert "lies inside the input" in refused("export", bundle, "task1", *base, "--out", models / "base" / "x")
    assert list(tmp_path.iterdir()) == []


def test_export_of_all_tasks(models, bundle, tmp_path):
    out = tmp_path / "experts"
    arguments = ["export", bundle, "--all", "--base", models / "base", "--out", out]
    result = run(*arguments)
    assert re.search(rf"^exported 3 tasks to {out}: [\d.]+ kB$", result.stdout, re.MULTILINE)
    for task in ("task1", "task2", "task3"):
        assert re.search(rf"^{task} +{out}/{task} +5 +[\d.]+ kB +model.safetensors$", result.stdout, re.MULTILINE)
        assert (out / task / "model.safetensors").is_file()
    assert refused(*arguments).endswith("or give --overwrite")
    assert len(run(*arguments, "--overwrite", columns=40).stdout.splitlines()) >= 6
    # What comes out is what `pack --experts` takes.
    run("pack", "--base", models / "base", "--experts", out, "--out", tmp_path / "again")
    with tallstore.open_bundle(tmp_path / "again") as opened:
        assert opened.tasks == ("task1", "task2", "task3")


def test_export_as_json(models, bundle, tmp_path):
    base = ["--base", models / "base"]
    one = json.loads(run("export", bundle, "task1", *base, "--out", tmp_path / "one", "--json").stdout)
    assert (one["task"], one["path"], one["tensors"]) == ("task1", str(tmp_path / "one"), 5)
    assert one["weights"] == ["model.safetensors"]
    every = json.loads(run("export", bundle, "--all", *base, "--out", tmp_path / "all", "--json").stdout)
    assert [each["task"] for each in every] == ["task1", "task2", "task3"]
    assert every[0] == one | {"path": str(tmp_path / "all" / "task1")}


def test_export_of_all_needs_all(models, part, tmp_path):
    out = tmp_path / "experts"
    line = refused("export", part, "--all", "--base", models / "base", "--out", out)
    assert line.startswith(f"{part}: 1 of 3 tasks were not fetched (task2); ")
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "TASK: give a TASK of the bundle, or --all"),
        (["task1", "--all"], "--all: stands for every task; leave out 'task1', or --all"),
    ],
)
def test_export_takes_a_task_or_all(bundle, tmp_path, arguments, message):
    assert misused("export", bundle, *arguments, "--out", tmp_path / "out").startswith(message)
    assert list(tmp_path.iterdir()) == []
