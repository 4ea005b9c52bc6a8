"""`tallstore pack`: what it hands to the library, and what it prints."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys

import pytest

import tallstore
from tallstore.cli import methods, progress_bar
from tests.command_line import misused, refused, run
from tests.model_directories import expert_tensors, pack_models, save_model, save_models
from tests.packing_cases import contents


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = save_models(tmp_path_factory.mktemp("models"))
    pack_models(root, root / "bundle")
    return root


@pytest.fixture
def pack(models, tmp_path):
    """Runs `pack` on the folder of models."""
    out = tmp_path / "bundle"
    return lambda *options, **kw: run(
        "pack", "--base", models / "base", "--experts", models, "--out", out, *options, **kw
    )


def test_it_writes_a_bundle_and_says_how_it_went(pack, tmp_path):
    result = pack()
    text = " ".join(result.stdout.split())
    assert re.search(r"packed 3 tasks into .*bundle with SignedMask\(threshold=1.2.*\): .* times smaller", text)
    for task in ("task1", "task2", "task3"):
        assert re.search(rf"^{task} .* 0\.\d\d\d +1\.000", result.stdout, re.MULTILINE)
    assert "stored whole, the base does not have it: head.weight; " in result.stdout
    assert result.stderr == ""  # no progress bar where stderr is no terminal
    assert tallstore.verify(tmp_path / "bundle") == []


def test_processes_write_the_same_bundle(pack, models, tmp_path):
    pack("--workers", "2")
    run("pack", "--base", models / "base", "--experts", models, "--out", tmp_path / "threads")
    assert contents(tmp_path / "bundle") == contents(tmp_path / "threads")


def test_a_pack_takes_at_least_one_worker():
    assert "--workers" in misused("pack", "--base", "b", "--experts", "e", "--out", "o", "--workers", "0")


LOSSES = """\
import torch


def size(task, weights):
    return sum((tensor.float() ** 2).mean() for tensor in weights.values() if tensor.is_floating_point())


def broken(task, weights):
    return weights["absent"]


def number(task, weights):
    return 1.0
"""


@pytest.fixture
def losses(tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "losses.py").write_text(LOSSES)
    monkeypatch.chdir(folder)
    yield
    sys.modules.pop("losses", None)


@pytest.mark.usefixtures("losses")
def test_gains_are_calibrated_on_a_loss_of_ones_own(pack, tmp_path):
    pack()
    plain = [task.gain for task in tallstore.open_bundle(tmp_path / "bundle").manifest.tasks]
    report = json.loads(pack("--calibrate", "losses:size", "--overwrite", "--json").stdout)
    assert plain == pytest.approx([1.0] * 3, abs=1e-3)
    assert all(abs(task["gain"] - 1) > 0.01 for task in report["tasks"])


@pytest.mark.usefixtures("losses")
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("losses:broken", "--calibrate: broken on task 'task1' raised KeyError: 'absent' (losses.py, line 9)"),
        ("losses:number", "gave an object of type float; return a tensor of one number"),
    ],
)
def test_a_loss_that_fails_is_one_line(models, tmp_path, place, message):
    out = ["--base", models / "base", "--experts", models, "--out", tmp_path / "bundle"]
    assert message in refused("pack", *out, "--calibrate", place)
    assert not (tmp_path / "bundle").exists()


def test_a_loss_that_is_nowhere_is_misuse(models, tmp_path):
    out = ["--base", models / "base", "--experts", models, "--out", tmp_path / "bundle"]
    assert misused("pack", *out, "--calibrate", "losses").startswith("--calibrate: 'losses' is not MODULE:FUNCTION")


def test_experts_by_name(models, tmp_path):
    run(
        *("pack", "--base", models / "base", "--out", tmp_path / "bundle"),
        *("--expert", f"first one={models / 'task1'}", "--expert", f"b={models / 'task2' / 'model.safetensors'}"),
    )
    with tallstore.open_bundle(tmp_path / "bundle") as opened:
        assert opened.tasks == ("first one", "b")


def test_experts_and_base_of_a_file(models, tmp_path):
    file = tmp_path / "experts.toml"
    file.write_text(f'base = "{models / "base"}"\n[experts]\nz = "{models / "task1"}"\na = "{models / "task2"}"\n')
    run("pack", "--experts", file, "--out", tmp_path / "bundle", "--expert", f"more={models / 'task3'}")
    with tallstore.open_bundle(tmp_path / "bundle") as opened:
        assert opened.tasks == ("z", "a", "more")
    # --base comes first: this one is of other values, so that the experts are of another base.
    result = run("pack", "--experts", file, "--base", models / "task3", "--out", tmp_path / "other", "--dry-run")
    assert "the base does not have it" not in result.stdout
    file.write_text('[experts]\na = "x"\n')
    assert misused("pack", "--experts", file, "--out", tmp_path / "b").startswith(
        "--base: give it here, or a line base ="
    )


def test_the_report_as_json(pack):
    report = json.loads(pack("--json").stdout)
    assert [task["name"] for task in report["tasks"]] == ["task1", "task2", "task3"]
    assert report["bundle_nbytes"] < report["checkpoints_nbytes"]


def test_a_dry_run_writes_nothing(pack, tmp_path):
    assert "would pack 3 tasks" in pack("--dry-run").stdout
    assert list(tmp_path.iterdir()) == []


def test_without_compression_the_bundle_is_larger_and_the_same(pack, models, tmp_path):
    nbytes = json.loads(pack("--json").stdout)["bundle_nbytes"]
    states = []
    for options in ([], ["--no-compress"]):
        report = json.loads(pack("--overwrite", "--json", *options).stdout)
        with tallstore.open_bundle(tmp_path / "bundle", base=models / "base") as opened:
            states.append(opened.state_dict("task1"))
    assert report["bundle_nbytes"] > nbytes
    assert all(states[0][name].equal(states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    ("options", "recorded"),
    [
        ([], ("signed-mask", {"threshold": 1.2}, ["LOG4"])),
        (["--threshold", "0.5", "--merged-dtype", "bfloat16"], ("signed-mask", {"threshold": 0.5}, ["BF16"])),
        (["--method", "tall-mask"], ("tall-mask", {"mask_lambda": 1.0, "merge": "sum", "gain": "one"}, ["I8"])),
        (
            ["--method", "tall-mask", "--mask-lambda", "0.5", "--merge", "mean", "--gain", "published"],
            ("tall-mask", {"mask_lambda": 0.5, "merge": "mean", "gain": "published"}, ["I8"]),
        ),
        (
            ["--method", "tall-mask-published"],
            ("tall-mask", {"mask_lambda": 0.4, "merge": "ties", "gain": "published"}, ["I8"]),
        ),
        (["--method", "least-squares", "--levels", "1"], ("least-squares", {"levels": 1}, ["I8"])),
        (["--method", "emr", "--gain", "least-squares"], ("emr", {"gain": "least-squares"}, ["I8"])),
        (["--method", "sign", "--scale", "row", "--centre"], ("sign", {"scale": "row", "centre": True}, ["I8"])),
        (["--method", "uniform", "--levels", "3"], ("uniform", {"levels": 3}, [])),
        (["--method", "localize", "--density", "0.05"], ("localize", {"density": 0.05}, [])),
    ],
)
def test_methods(pack, tmp_path, options, recorded):
    pack(*options)
    (group,) = json.loads(run("inspect", tmp_path / "bundle", "--json").stdout)["groups"]
    name, parameters, dtypes = recorded
    assert (group["method"], group["merged_dtypes"]) == (name, dtypes)
    assert {key: group["parameters"][key] for key in parameters} == parameters


def test_auto_chooses_under_a_budget(pack, tmp_path):
    pack("--method", "auto", "--max-bits", "2")
    assert tallstore.verify(tmp_path / "bundle") == []


def test_every_method_of_the_library_has_a_name_and_its_options():
    classes = {name for name in tallstore.__all__ if hasattr(getattr(tallstore, name), "minimum_experts")}
    assert {name for name, _ in methods._METHODS.values()} == classes
    assert methods._METHODS.keys() == set(methods.MethodName)
    for name, options in methods._METHODS.values():
        fields = {field.name for field in dataclasses.fields(getattr(tallstore, name))}
        assert options in (fields - {"masks"}, set())  # masks are tensors; the published form has no options


def test_every_option_is_passed_on(models, tmp_path, monkeypatch):
    calls = []
    real = tallstore.pack

    def spy(base, experts, out, **options):
        calls.append((base, experts, out, options))
        return real(base, experts, out, **options)

    monkeypatch.setattr(tallstore, "pack", spy)
    run(
        *("pack", "--base", models / "base", "--experts", models, "--out", tmp_path / "bundle", "--overwrite"),
        *("--private", "block.*", "--private", "x", "--key-mapping", r"^model\.=", "--key-mapping", "(?=a)=b"),
        *("--embed-base", "--base-ref", "org/name@" + "0" * 40, "--merged-dtype", "int8", "--dry-run"),
        *("--no-compress", "--threshold", "1.3", "--gain", "published"),
    )
    ((base, experts, out, options),) = calls
    assert (base, out) == (str(models / "base"), tmp_path / "bundle")
    assert experts == {name: models / name for name in ("task1", "task2", "task3")}
    assert callable(options.pop("progress"))
    assert options == {
        "method": tallstore.SignedMask(threshold=1.3, gain="published"),
        "merged_dtype": "int8",
        "private": ["block.*", "x"],
        "key_mapping": {r"^model\.": "", "(?=a)": "b"},
        "embed_base": True,
        "base_ref": "org/name@" + "0" * 40,
        "calibrate": None,
        "compress": False,
        "overwrite": True,
        "dry_run": True,
        "executor": None,
    }


EXPERT = ("--expert", "a=x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--expert: give NAME=PATH for each expert, or --experts with a folder or a .toml file"),
        (["--expert", "path"], "--expert: 'path' is not NAME=PATH"),
        (["--expert", "=path"], "--expert: '=path' is not NAME=PATH"),
        ([*EXPERT, "--expert", "a=y"], "--expert: 'a' is given twice"),
        ([*EXPERT, "--key-mapping", "x"], "--key-mapping: 'x' is not REGEX=REPLACEMENT"),
        ([*EXPERT, "--method", "best"], "--method METHOD: "),
        ([*EXPERT, "--threshold", "much"], "--threshold X: "),
        (
            [*EXPERT, "--threshold", "1", "--method", "tall-mask"],
            "--threshold: goes with --method signed-mask or uniform, not tall-mask",
        ),
        ([*EXPERT, "--mask-lambda", "1"], "--mask-lambda: goes with --method tall-mask, not signed-mask"),
        (
            [*EXPERT, "--merge", "ties", "--method", "tall-mask-published"],
            "--merge: goes with --method tall-mask, not tall-mask-published",
        ),
        ([*EXPERT, "--method", "auto"], "--max-bits: give it with --method auto"),
        ([*EXPERT, "--colour"], "no such option: --colour"),
    ],
)
def test_usage_errors(tmp_path, arguments, message):
    line = misused("pack", "--base", "base", "--out", tmp_path / "bundle", *arguments)
    assert line.startswith(message)
    assert line.endswith(" (see tallstore pack --help)")
    assert list(tmp_path.iterdir()) == []


def test_the_base_is_asked_for(models, tmp_path):
    line = misused("pack", "--experts", models, "--out", tmp_path / "bundle")
    assert line.startswith("--base: give what the experts were fine-tuned from")


def test_a_name_that_is_in_the_folder_too(models, tmp_path):
    base = ["--base", models / "base"]
    line = misused("pack", *base, "--experts", models, "--expert", "task1=x", "--out", tmp_path / "b")
    assert line.startswith("--expert: 'task1' is among --experts too; give it once")


def test_errors_are_one_line_in_the_words_of_the_command_line(models, tmp_path):
    base = ["--base", models / "base"]
    assert refused("pack", *base, "--experts", models, "--out", models / "bundle").endswith("or give --overwrite")
    line = refused("pack", *base, "--experts", models, "--out", tmp_path / "b", "--base-ref", "x")
    assert line.startswith("--base-ref: 'x' is no pin")
    assert "at least 2" in refused("pack", *base, "--expert", f"a={models / 'task1'}", "--out", tmp_path / "b")
    assert "threshold is -1.0" in refused("pack", *base, "--experts", models, "--threshold=-1", "--out", tmp_path / "b")
    assert "cannot be read" in refused("pack", "--experts", tmp_path / "x.toml", "--out", tmp_path / "b")
    renamed = {f"model.{name}": tensor for name, tensor in expert_tensors(1).items()}
    save_model(tmp_path / "renamed", renamed)
    experts = ["--expert", f"a={tmp_path / 'renamed'}", "--expert", f"b={models / 'task2'}"]
    line = refused("pack", *base, *experts, "--out", tmp_path / "b")
    mapping = re.search("give --key-mapping '(.*)'$", line)[1]
    assert mapping == r"^model\.="
    run("pack", *base, *experts, "--out", tmp_path / "b", "--key-mapping", mapping)


def test_ctrl_c_leaves_nothing_behind(models, tmp_path, monkeypatch):
    @contextlib.contextmanager
    def interrupted(_doing):
        def interrupt(done, _total):
            if done:
                raise KeyboardInterrupt

        yield interrupt

    monkeypatch.setattr(progress_bar, "show", interrupted)
    for arguments in (
        ["pack", "--base", models / "base", "--experts", models, "--out", tmp_path / "out"],
        ["export", models / "bundle", "task1", "--base", models / "base", "--out", tmp_path / "out"],
        ["verify", models / "bundle"],
    ):
        result = run(*arguments, code=130)
        assert (result.stdout, result.stderr) == ("", "interrupted\n")
        assert list(tmp_path.iterdir()) == []
