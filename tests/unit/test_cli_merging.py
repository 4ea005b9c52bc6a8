"""`tallstore consensus` and `tallstore stitch`: one merged model out of a bundle, as a directory."""

from __future__ import annotations

import json
import re

import pytest
from safetensors.torch import load_file

import tallstore
from tests.command_line import misused, refused, run
from tests.model_directories import COMPANIONS, base_tensors, pack_models, save_models

METHODS = {"consensus": tallstore.TallMask(), "stitch": tallstore.Localize(0.2)}
NAMES = {"consensus": "the consensus", "stitch": "the stitched model"}
commands = pytest.mark.parametrize("command", METHODS)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base, three experts, and a bundle for each command."""
    root = save_models(tmp_path_factory.mktemp("models"))
    for command, method in METHODS.items():
        pack_models(root, root / command, method=method)
    return root


def merge(models, command, out, *options, **kw):
    """Runs a command on its bundle."""
    return run(command, models / command, "--base", models / "base", "--out", out, *options, **kw)


def merged(models, command, *arguments):
    """What the library makes of it."""
    with tallstore.open_bundle(models / command, base=models / "base") as bundle:
        return getattr(bundle, command)(*arguments)


def assert_written(directory, weights):
    """The directory has these weights, bit for bit, and the base's companion files."""
    found = load_file(directory / "model.safetensors")
    assert found.keys() == weights.keys() == base_tensors().keys()
    assert all(found[name].equal(weights[name]) for name in weights)
    for name, content in COMPANIONS.items():
        assert json.loads((directory / name).read_text()) == content


@commands
def test_a_directory_that_from_pretrained_reads(models, tmp_path, command):
    result = merge(models, command, tmp_path / "out")
    assert re.search(
        rf"^exported {NAMES[command]} to .*out: 5 tensors, [\d.]+ kB in model.safetensors, .*config.json", result.stdout
    )
    assert result.stderr == ""
    assert_written(tmp_path / "out", merged(models, command))


@pytest.mark.parametrize(
    ("command", "options", "arguments"),
    [
        ("consensus", ["--k", "3"], (3,)),
        ("consensus", ["--k", "0", "--scale", "0.33"], (0, 0.33)),
        ("consensus", ["--k", "1", "--scale=-1", "--task", "task1", "--task", "task3"], (1, -1.0, ["task1", "task3"])),
        ("stitch", ["--task", "task2"], (["task2"],)),
        ("stitch", ["--task", "task3", "--task", "task1"], (["task3", "task1"],)),
    ],
)
def test_options_go_to_the_library(models, tmp_path, command, options, arguments):
    merge(models, command, tmp_path / "out", *options)
    weights = merged(models, command, *arguments)
    assert not weights["block.weight"].equal(merged(models, command)["block.weight"])
    assert_written(tmp_path / "out", weights)


@commands
def test_an_embedded_base_needs_no_other(models, tmp_path, command):
    pack_models(models, tmp_path / "bundle", method=METHODS[command], embed_base=True)
    run(command, tmp_path / "bundle", "--out", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found["block.weight"].equal(merged(models, command)["block.weight"])


@commands
def test_a_base_of_one_file_has_no_companions(models, tmp_path, command):
    base = models / "base" / "model.safetensors"
    run(command, models / command, "--base", base, "--out", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


@commands
def test_json(models, tmp_path, command):
    report = json.loads(merge(models, command, tmp_path / "out", "--json", columns=20).stdout)
    assert (report["task"], report["path"], report["tensors"]) == (NAMES[command], str(tmp_path / "out"), 5)
    assert report["weights"] == ["model.safetensors"]
    assert sorted(report["companions"]) == sorted(COMPANIONS)
    assert report["nbytes"] == sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())


@commands
def test_overwrite(models, tmp_path, command):
    out = tmp_path / "out"
    place = [models / command, "--base", models / "base", "--out", out]
    merge(models, command, out, "--task", "task1", *(["--k", "1"] if command == "consensus" else []))
    one = load_file(out / "model.safetensors")
    assert refused(command, *place) == f"{out}: is there already; choose another place, or give --overwrite"
    assert load_file(out / "model.safetensors")["block.weight"].equal(one["block.weight"])
    run(command, *place, "--overwrite")
    assert_written(out, merged(models, command))
    (out / "notes.md").write_text("mine")
    (out / "model.safetensors").unlink()
    assert "holds what no export wrote" in refused(command, *place, "--overwrite")
    inside = [models / command, "--base", models / "base", "--out", models / "base" / "x"]
    assert "lies inside the input" in refused(command, *inside)


@pytest.mark.parametrize(
    ("command", "other", "message"),
    [
        (
            "consensus",
            "stitch",
            "which localize does not have; pack with --method tall-mask",
        ),
        (
            "stitch",
            "consensus",
            "and these are of tall-mask; pack with --method localize",
        ),
    ],
)
def test_the_bundle_of_another_method_says_which_it_takes(models, tmp_path, command, other, message):
    line = refused(command, models / other, "--base", models / "base", "--out", tmp_path / "out")
    assert line.startswith(f"{command}: needs ")
    assert line.endswith(message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("consensus", ["--k", "4"], "--k is 4; give how many of the 3 masks must agree, from 0 to 3"),
        ("consensus", ["--k=-1"], "--k is -1; give how many of the 3 masks must agree, from 0 to 3"),
        ("consensus", ["--task", "task1"], "--k is 2; give how many of the 1 masks must agree, from 0 to 1"),
        ("consensus", ["--scale", "nan"], "--scale is nan; give a finite number, such as 1.0"),
        ("consensus", ["--task", "task4"], "no task named 'task4'; did you mean 'task3'?"),
        ("stitch", ["--task", "task4"], "no task named 'task4'; did you mean 'task3'?"),
    ],
)
def test_what_is_out_of_range_is_one_line(models, tmp_path, command, options, message):
    line = refused(command, models / command, "--base", models / "base", "--out", tmp_path / "out", *options)
    assert line.removeprefix(f"{models / command}: ") == message
    assert list(tmp_path.iterdir()) == []


@commands
def test_the_base_is_asked_for_and_checked(models, tmp_path, command):
    out = ["--out", tmp_path / "out"]
    assert refused(command, models / command, *out).endswith("; give --base")
    assert "[BASE-2]" in refused(command, models / command, "--base", models / "task1", *out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["consensus"], "give BUNDLE"),
        (["consensus", "b"], "give --out DIR"),
        (["consensus", "b", "--out", "c", "--k", "two"], "--k K: "),
        (["consensus", "b", "--out", "c", "--scale", "much"], "--scale X: "),
        (["stitch", "b"], "give --out DIR"),
        (["stitch", "b", "--out", "c", "--k", "2"], "no such option: --k"),
    ],
)
def test_usage_errors(arguments, message):
    line = misused(*arguments)
    assert line.startswith(message)
    assert line.endswith(f" (see tallstore {arguments[0]} --help)")
