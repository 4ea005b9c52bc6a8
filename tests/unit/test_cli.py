"""The command line: what is printed where, exit codes, and one line an error. A few runs are real processes."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tallstore
from tallstore import demo
from tallstore.cli import app as cli
from tallstore.cli import console
from tallstore.cli.expert_sources import find_experts
from tallstore.errors import InputError, OptionError
from tests.model_directories import base_tensors, expert_tensors, pack_models, save_model, save_models

COMMANDS = ["pack", "inspect", "verify", "export", "demo"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = save_models(tmp_path_factory.mktemp("models"))
    pack_models(root, root / "bundle")
    return root


@pytest.fixture
def bundle(models):
    return models / "bundle"


def run(*arguments, code=0, columns=200, **environment):
    """Run a command in this process; its result, once its exit code is the expected one."""
    environment = {"COLUMNS": str(columns), "NO_COLOR": "1", **environment}
    result = CliRunner().invoke(
        cli.app, [str(argument) for argument in arguments], env=environment, prog_name="tallstore"
    )
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def refused(*arguments, **environment):
    """The one line that a command ends with, and nothing on stdout."""
    result = run(*arguments, code=1, **environment)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


# --- pack


def test_pack_writes_a_bundle_and_says_how_it_went(models, tmp_path):
    result = run("pack", "--base", models / "base", "--experts", models, "--out", tmp_path / "bundle")
    assert re.search(r"packed 3 tasks into .*bundle with SignedMask\(threshold=1.2\): .* times smaller", result.stdout)
    for task in ("task1", "task2", "task3"):
        assert re.search(rf"^{task} .* 0\.\d\d\d +1\.000", result.stdout, re.MULTILINE)
    assert "stored whole, the base does not have it: head.weight; " in result.stdout
    assert result.stderr == ""  # no progress bar where stderr is no terminal
    assert tallstore.verify(tmp_path / "bundle") == []


def test_pack_takes_experts_by_name(models, tmp_path):
    run(
        *("pack", "--base", models / "base", "--out", tmp_path / "bundle"),
        *("--expert", f"first one={models / 'task1'}", "--expert", f"b={models / 'task2' / 'model.safetensors'}"),
    )
    with tallstore.open_bundle(tmp_path / "bundle") as opened:
        assert opened.tasks == ("first one", "b")


def test_pack_prints_its_report_as_json(models, tmp_path):
    result = run("pack", "--base", models / "base", "--experts", models, "--out", tmp_path / "bundle", "--json")
    report = json.loads(result.stdout)
    assert [task["name"] for task in report["tasks"]] == ["task1", "task2", "task3"]
    assert report["bundle_nbytes"] < report["checkpoints_nbytes"]


def test_dry_run_writes_nothing(models, tmp_path):
    result = run("pack", "--base", models / "base", "--experts", models, "--out", tmp_path / "bundle", "--dry-run")
    assert "would pack 3 tasks" in result.stdout
    assert list(tmp_path.iterdir()) == []


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
    ],
)
def test_methods(models, tmp_path, options, recorded):
    out = tmp_path / "bundle"
    run("pack", "--base", models / "base", "--experts", models, "--out", out, *options)
    (group,) = json.loads(run("inspect", out, "--json").stdout)["groups"]
    assert (group["method"], group["parameters"], group["merged_dtypes"]) == recorded


def test_pack_passes_every_option_on(models, tmp_path, monkeypatch):
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
    )
    ((base, experts, out, options),) = calls
    assert (base, out) == (str(models / "base"), tmp_path / "bundle")
    assert experts == {name: models / name for name in ("task1", "task2", "task3")}
    assert callable(options.pop("progress"))
    assert options == {
        "method": tallstore.SignedMask(),
        "merged_dtype": "int8",
        "private": ["block.*", "x"],
        "key_mapping": {r"^model\.": "", "(?=a)": "b"},
        "embed_base": True,
        "base_ref": "org/name@" + "0" * 40,
        "overwrite": True,
        "dry_run": True,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --expert NAME=PATH for each expert"),
        (["--expert", "path"], "'path' is not NAME=PATH"),
        (["--expert", "=path"], "'=path' is not NAME=PATH"),
        (["--expert", "a=x", "--expert", "a=y"], "'a' is given twice"),
        (["--expert", "a=x", "--key-mapping", "x"], "'x' is not REGEX=REPLACEMENT"),
        (["--expert", "a=x", "--method", "best"], "--method"),
        (["--expert", "a=x", "--threshold", "much"], "--threshold"),
        (["--expert", "a=x", "--threshold", "1", "--method", "tall-mask"], "goes with --method signed-mask"),
        (["--expert", "a=x", "--mask-lambda", "1"], "goes with --method tall-mask"),
        (["--expert", "a=x", "--merge", "ties", "--method", "tall-mask-published"], "goes with --method tall-mask"),
        (["--expert", "a=x", "--colour"], "--colour"),
    ],
)
def test_usage_errors_exit_with_2(tmp_path, arguments, message):
    result = run("pack", "--base", "base", "--out", tmp_path / "bundle", *arguments, code=2)
    assert result.stdout == ""
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_in_the_folder_too_is_a_usage_error(models, tmp_path):
    result = run(
        *("pack", "--base", models / "base", "--experts", models, "--expert", "task1=x", "--out", tmp_path / "b"),
        code=2,
    )
    assert "'task1' is among --experts too" in result.stderr


def test_errors_of_packing_are_one_line_in_the_words_of_the_command_line(models, bundle, tmp_path):
    base = ["--base", models / "base"]
    assert refused("pack", *base, "--experts", models, "--out", bundle).endswith("or give --overwrite")
    line = refused("pack", *base, "--experts", models, "--out", tmp_path / "b", "--base-ref", "x")
    assert line.startswith("error: --base-ref: 'x' is no pin")
    assert "at least 2" in refused("pack", *base, "--expert", f"a={models / 'task1'}", "--out", tmp_path / "b")
    assert "threshold is -1.0" in refused("pack", *base, "--experts", models, "--threshold=-1", "--out", tmp_path / "b")
    renamed = {f"model.{name}": tensor for name, tensor in expert_tensors(1).items()}
    save_model(tmp_path / "renamed", renamed)
    experts = ["--expert", f"a={tmp_path / 'renamed'}", "--expert", f"b={models / 'task2'}"]
    line = refused("pack", *base, *experts, "--out", tmp_path / "b")
    mapping = re.search("give --key-mapping '(.*)'$", line)[1]
    assert mapping == r"^model\.="
    run("pack", *base, *experts, "--out", tmp_path / "b", "--key-mapping", mapping)


def test_hints_name_options_and_leave_the_rest_alone():
    assert console.in_options("SignedMask() would be smaller") == "--method signed-mask would be smaller"
    assert console.in_options("x/mask_lambda_1 and a\\\\b") == "x/mask_lambda_1 and a\\\\b"
    assert console.in_options("give key_mapping={regular expression: replacement}") == (
        "give --key-mapping 'REGEX=REPLACEMENT'"
    )


def test_ctrl_c_leaves_nothing_behind(models, tmp_path, monkeypatch):
    @contextlib.contextmanager
    def interrupted(_doing):
        def interrupt(done, _total):
            if done:
                raise KeyboardInterrupt

        yield interrupt

    monkeypatch.setattr(console, "progress", interrupted)
    for arguments in (
        ["pack", "--base", models / "base", "--experts", models, "--out", tmp_path / "out"],
        ["export", models / "bundle", "task1", "--base", models / "base", "--out", tmp_path / "out"],
    ):
        result = run(*arguments, code=130)
        assert (result.stdout, result.stderr) == ("", "interrupted\n")
        assert list(tmp_path.iterdir()) == []


# --- a folder of experts


def test_a_folder_of_experts(models, tmp_path):
    save_model(tmp_path / "zebra", expert_tensors(1))
    save_model(tmp_path / "base", base_tensors())
    save_model(tmp_path / ".cache", expert_tensors(1))
    save_file(expert_tensors(2), tmp_path / "ant.v2.safetensors")
    torch.save(expert_tensors(3), tmp_path / "pytorch_model.bin")
    (tmp_path / "bee").mkdir()
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "bee" / "pytorch_model.bin")
    (tmp_path / "logs").mkdir()
    (tmp_path / "notes.txt").touch()
    expected = {"ant.v2": tmp_path / "ant.v2.safetensors", "bee": tmp_path / "bee", "zebra": tmp_path / "zebra"}
    found = find_experts(tmp_path, tmp_path / "base")
    assert found == expected
    assert list(found) == sorted(expected)
    assert find_experts(tmp_path, str(tmp_path / "base" / "model.safetensors")) == expected
    assert find_experts(tmp_path, "org/name") == expected | {"base": tmp_path / "base"}
    assert find_experts(tmp_path, tmp_path / "ant.v2.safetensors").keys() == {"base", "bee", "zebra"}


def test_folders_that_hold_no_experts(models, tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        find_experts(tmp_path / "missing", "base")
    with pytest.raises(InputError, match="holds no expert"):
        find_experts(tmp_path, "base")
    with pytest.raises(InputError, match="is a checkpoint itself"):
        find_experts(models / "task1", "base")
    save_model(tmp_path / "a", expert_tensors(1))
    save_file(expert_tensors(1), tmp_path / "a.safetensors")
    with pytest.raises(OptionError, match="two of the name 'a'"):
        find_experts(tmp_path, "base")


# --- inspect


def test_inspect_shows_a_row_a_task(bundle):
    result = run("inspect", bundle)
    lines = result.stdout.splitlines()
    assert f"bundle  {bundle} (format 1.0-draft, by tallstore {tallstore.__version__})" in lines[0]
    assert "signed-mask (threshold 1.2), merged in log4, 3 tasks" in result.stdout
    assert re.search(r"ratio .* times smaller than 3 checkpoints \(", result.stdout)
    header = next(line for line in lines if line.startswith("task "))
    assert header.split() == ["task", "parameters", "size", "bits", "cosine", "gain", "coded", "same", "whole", "other"]
    assert [line.split()[0] for line in lines if line.startswith("task")][1:] == ["task1", "task2", "task3"]
    assert result.stderr == ""


@pytest.mark.parametrize("columns", [24, 40, 60, 80, 140])
def test_tables_fit_the_terminal(bundle, columns):
    for arguments in ([], ["--task", "task1"]):
        result = run("inspect", bundle, *arguments, columns=columns)
        assert max(cell_len(line) for line in result.stdout.splitlines()) <= columns
        assert "size" in result.stdout


def test_a_pipe_gets_whole_names(models, tmp_path, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    name = "a task of a name that goes on and on " * 3
    experts = {name: models / "task1", "b": models / "task2"}
    tallstore.pack(models / "base", experts, tmp_path / "bundle")
    assert name.strip() in run("inspect", tmp_path / "bundle", COLUMNS=None).stdout


def test_names_are_no_markup(models, tmp_path):
    name = "[red]ä[/red] 日本 :smile:"
    tallstore.pack(models / "base", {name: models / "task1", "b": models / "task2"}, tmp_path / "bundle")
    assert name in run("inspect", tmp_path / "bundle").stdout
    assert f"no task named {name + 'x'!r}; did you mean {name!r}?" in refused(
        "inspect", tmp_path / "bundle", "--task", name + "x"
    )


def test_inspect_shows_a_row_a_tensor(bundle):
    result = run("inspect", bundle, "--task", "task2")
    assert re.search(r"^block.weight +signed +f32 +80 × 64 +\S+ +\d+ bytes$", result.stdout, re.MULTILINE)
    assert re.search(r"^embed.weight +extended from row 90 +f32", result.stdout, re.MULTILINE)
    assert re.search(r"^head.weight +private +f32 +4 × 64 +– +1.0 kB$", result.stdout, re.MULTILINE)
    assert re.search(r"^norm.bias +dropped +– +– +– +–$", result.stdout, re.MULTILINE)
    assert "config.json (22 bytes)" in result.stdout


def test_inspect_prints_json(bundle):
    summary = json.loads(run("inspect", bundle, "--json", columns=20).stdout)
    assert [task["name"] for task in summary["tasks"]] == ["task1", "task2", "task3"]
    details = json.loads(run("inspect", bundle, "--json", "--task", "task1", columns=20).stdout)
    assert details["task"] == summary["tasks"][0]
    assert {tensor["kind"] for tensor in details["tensors"]} == {"signed", "same", "private", "extended", "dropped"}


def test_inspect_says_what_is_not_here(bundle, tmp_path):
    part = shutil.copytree(bundle, tmp_path / "part")
    shutil.rmtree(part / "tasks" / "task2")
    result = run("inspect", part)
    assert "2 checkpoints of 3" in result.stdout
    assert re.search(r"^task2 .*not fetched$", result.stdout, re.MULTILINE)
    assert "task 'task2' was not fetched" in refused("inspect", part, "--task", "task2")
    assert "not fetched, so not checked: task2" in run("verify", part).stdout


# --- verify


def test_verify_says_how_much_it_checked(bundle):
    files = sum(path.is_file() for path in bundle.rglob("*"))
    assert f"no problems: {files} files checked, " in run("verify", bundle).stdout
    assert json.loads(run("verify", bundle, "--json").stdout) == []


def test_verify_prints_every_problem(bundle, tmp_path):
    damaged = shutil.copytree(bundle, tmp_path / "damaged")
    for slug in ("task1", "task3"):
        path = damaged / "tasks" / slug / "mask-00001-of-00001.safetensors"
        raw = bytearray(path.read_bytes())
        raw[-100] ^= 1
        path.write_bytes(raw)
    problems = tallstore.verify(damaged)
    assert len(problems) >= 2
    result = run("verify", damaged, code=1)
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


# --- all commands


def test_no_bundle_is_one_line(tmp_path):
    for arguments in (["inspect"], ["inspect", "--task", "a"], ["verify"]):
        line = refused(arguments[0], tmp_path / "missing", *arguments[1:])
        assert line == f"error: {tmp_path / 'missing'}: there is no bundle (no tallstore.json); check the path"


def test_an_error_of_the_system_is_one_line(bundle, monkeypatch):
    def fail(_path):
        raise OSError(28, "No space left on device", "some/file")

    monkeypatch.setattr(tallstore, "verify", fail)
    assert refused("verify", bundle) == "error: some/file: No space left on device"


def test_a_missing_library_is_one_line(bundle, monkeypatch):
    def fail(_path):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(tallstore, "verify", fail)
    assert "No module named 'torch'; install it" in refused("verify", bundle)


def test_a_bug_is_not_hidden(bundle, monkeypatch):
    def fail(_path):
        raise ModuleNotFoundError("No module named 'tallstore.nothing'", name="tallstore.nothing")

    monkeypatch.setattr(tallstore, "verify", fail)
    with pytest.raises(ModuleNotFoundError):
        run("verify", bundle)


def test_warnings_are_one_line_on_stderr(bundle, monkeypatch):
    def warn(_path):
        warnings.warn("task.json: ignores\nthe unknown key $.x", stacklevel=1)
        return []

    monkeypatch.setattr(tallstore, "verify", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = run("verify", bundle)
    assert result.stderr == "warning: task.json: ignores the unknown key $.x\n"


def test_demo_passes_its_folder_on(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(demo, "main", calls.append)
    run("demo", "--out", tmp_path / "here")
    run("demo")
    assert calls == [tmp_path / "here", Path("tallstore-demo")]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("columns", [60, 140])
def test_every_command_has_help_with_an_example(command, columns):
    help_text = run(command, "--help", columns=columns).stdout
    assert re.search(r"Examples?: ?\s+tallstore", help_text)
    assert f"tallstore {command} " in help_text
    assert max(cell_len(line) for line in help_text.splitlines()) <= columns


def test_no_command_shows_help():
    result = run(code=2)
    for command in COMMANDS:
        assert re.search(rf"\b{command} ", result.output)


def test_colour_is_the_terminals_choice(bundle):
    plain = run("inspect", bundle, NO_COLOR="1", FORCE_COLOR="1").stdout
    assert not re.search(r"\x1b\[[\d;]*3\dm", plain)


def test_the_version():
    assert run("--version").stdout == f"tallstore {tallstore.__version__}\n"


# --- real processes


def process(*arguments, **environment):
    command = [sys.executable, "-m", "tallstore", *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, **environment},
        timeout=120,
        check=False,
    )


def test_as_a_module(bundle):
    done = process("inspect", bundle)
    assert (done.returncode, done.stderr) == (0, "")
    assert "task3" in done.stdout
    done = process("inspect", bundle / "nothing", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_terminal_that_cannot_show_a_name(models, tmp_path):
    tallstore.pack(models / "base", {"日本": models / "task1", "b": models / "task2"}, tmp_path / "bundle")
    done = process("inspect", tmp_path / "bundle", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "??" in done.stdout


def test_a_reader_that_goes_away(bundle):
    command = [sys.executable, "-m", "tallstore", "inspect", str(bundle), "--json"]
    reader, writer = os.pipe()
    os.close(reader)
    with subprocess.Popen(command, stdout=writer, stderr=subprocess.PIPE, text=True) as child:
        os.close(writer)
        _, errors = child.communicate(timeout=120)
    assert "Traceback" not in errors


def test_the_entry_point_is_main():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    module, _, function = re.search(r'^tallstore = "(.*)"$', project, re.MULTILINE)[1].partition(":")
    assert getattr(importlib.import_module(module), function) is cli.main


def test_main_returns_exit_codes(bundle, capsys):
    assert cli.main(["inspect", str(bundle), "--json"]) == 0
    assert cli.main(["inspect", str(bundle / "nothing")]) == 1
    assert cli.main(["inspect"]) == 2
    assert json.loads(capsys.readouterr().out)["tasks"]
