"""The command line as a whole: exit codes, one line an error, help, streams. A few runs are real processes."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import typer
from rich.cells import cell_len

import tallstore
from tallstore import demo
from tallstore.cli import app as cli
from tallstore.cli.hints import in_options
from tests.command_line import misused, refused, run
from tests.model_directories import base_tensors, expert_tensors, pack_models, save_model, save_models

COMMANDS = typer.main.get_command(cli.app).commands
NEEDY = {"demo", "push"}  # whose examples take long, or need a Hub: other tests run them


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    root = save_models(tmp_path_factory.mktemp("models"))
    return pack_models(root, root / "bundle")


@pytest.fixture
def verify(monkeypatch):
    """Puts something in the place of `tallstore.verify`."""
    return lambda function: monkeypatch.setattr(tallstore, "verify", function)


# --- errors


@pytest.mark.parametrize("arguments", [["inspect"], ["inspect", "--task", "a"], ["verify"]])
def test_no_bundle_is_one_line(tmp_path, arguments):
    line = refused(arguments[0], tmp_path / "missing", *arguments[1:])
    assert line == f"{tmp_path / 'missing'}: there is no bundle (no tallstore.json); check the path"


def test_an_error_of_the_system_is_one_line(bundle, verify):
    def fail(_path, *, progress):
        raise OSError(28, "No space left on device", "some/file")

    verify(fail)
    assert refused("verify", bundle) == "some/file: No space left on device"


def test_a_missing_library_is_one_line(bundle, verify):
    def fail(_path, *, progress):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    verify(fail)
    assert "No module named 'torch'; install it" in refused("verify", bundle)


def test_a_bug_is_not_hidden(bundle, verify):
    def fail(_path, *, progress):
        raise ModuleNotFoundError("No module named 'tallstore.nothing'", name="tallstore.nothing")

    verify(fail)
    with pytest.raises(ModuleNotFoundError):
        run("verify", bundle)


def test_warnings_are_one_line_on_stderr(bundle, verify):
    def warn(_path, *, progress):
        warnings.warn("task.json: ignores\nthe unknown key $.x", stacklevel=1)
        return []

    verify(warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = run("verify", bundle)
    assert result.stderr == "warning: task.json: ignores the unknown key $.x\n"


def test_hints_name_options_and_leave_the_rest_alone():
    assert in_options("SignedMask() would be smaller") == "--method signed-mask would be smaller"
    assert in_options("take Sign()") == "take --method sign"
    assert in_options("then tallstore.add each") == "then tallstore add each"
    assert in_options("k is 9; give fewer") == "--k is 9; give fewer"
    assert in_options("tasks: there are none") == "--task: there are none"
    assert in_options("evaluate: gave nan") == "--evaluate: gave nan"
    assert in_options("bundle: a task k is not fetched") == "bundle: a task k is not fetched"
    assert in_options("x/mask_lambda_1 and a\\\\b") == "x/mask_lambda_1 and a\\\\b"
    assert in_options("give key_mapping={regular expression: replacement}") == (
        "give --key-mapping 'REGEX=REPLACEMENT'"
    )


# --- usage


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["verfy"], "no such command 'verfy'; did you mean 'verify'? (see tallstore --help)"),
        (["--colour"], "no such option: --colour (see tallstore --help)"),
        (["inspect"], "give BUNDLE (see tallstore inspect --help)"),
        (["export", "b", "t"], "give --out DIR (see tallstore export --help)"),
        (["export", "b", "t", "--out"], "option '--out' requires an argument (see tallstore export --help)"),
    ],
)
def test_usage_errors_say_what_to_give_and_where_to_look(arguments, line):
    assert misused(*arguments) == line


def test_no_command_shows_help():
    result = run(code=2)
    for command in COMMANDS:
        assert re.search(rf"^  {command}  +\S", result.output, re.MULTILINE)
    assert result.output == run("--help").output


def test_the_version():
    assert run("--version").stdout == f"tallstore {tallstore.__version__}\n"


# --- help


def pages():
    return [[], *([command] for command in COMMANDS)]


@pytest.mark.parametrize("page", pages())
@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_help_fits_the_terminal(page, columns):
    text, _, examples = run(*page, "--help", columns=columns).stdout.partition("\nExamples\n")
    assert max(cell_len(line) for line in text.splitlines()) <= min(columns, 100)
    assert text.startswith("Usage: tallstore ")
    assert examples  # as they are typed: a terminal wraps what is too long
    assert "…" not in text.partition("\n\n")[2]
    assert max(cell_len(line) for line in examples.splitlines()) <= 80


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_described_and_named_whole(command):
    parameters = COMMANDS[command].params
    assert parameters
    for columns in (40, 200):
        text = run(command, "--help", columns=columns).stdout
        for parameter in parameters:
            assert parameter.help, parameter.name
            label = parameter.metavar if parameter.param_type_name == "argument" else parameter.opts[0]
            if not getattr(parameter, "is_flag", False) and label != parameter.metavar:
                label += f" {parameter.metavar}"
            assert re.search(rf"^  (-\w, )?{re.escape(label)}( {{2,}}\S|$)", text, re.MULTILINE), label


def examples(*page):
    """The commands of a page's examples, and its comments."""
    lines = run(*page, "--help").stdout.partition("\nExamples\n")[2].replace("\\\n", "").splitlines()
    commands = [line for line in lines if line.startswith("  tallstore ")]
    comments = [line.removeprefix("  #") for line in lines if line.startswith("  #")]
    assert len(commands) + len(comments) == len(lines)
    return [shlex.split(command)[1:] for command in commands], "\n".join(comments)


@pytest.mark.parametrize("page", [[], *([command] for command in COMMANDS if command not in NEEDY)])
def test_examples_run_as_they_stand(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(Path("bert"), base_tensors())
    for seed, name in enumerate(("spam", "mood", "topic")):
        save_model(Path("fine-tunes", name), expert_tensors(seed))
    for seed, place in enumerate(("runs/news", "runs/mood", "more-runs/jokes", "more-runs/cats"), start=3):
        save_model(Path(place), expert_tensors(seed))
    method = {"consensus": "tall-mask", "stitch": "localize"}.get("".join(page), "signed-mask")
    run("pack", "--base", "bert", "--experts", "fine-tunes", "--out", "bundle", "--method", method)
    commands, comments = examples(*page)
    listed = "\n".join(line for line in comments.splitlines() if line.startswith("   "))
    Path("experts.toml").write_text(listed.replace("hub:org/bert-mood@main", "fine-tunes/mood"))
    Path("my_scores.py").write_text(textwrap.dedent(listed).replace("…", "right, count = 1, 2"))
    for command in commands:
        if command[0] == "pack":
            shutil.rmtree("bundle")
        on_hub = any(argument.startswith("org/name") for argument in command)  # those run in tests/hub
        if not on_hub and command not in (["demo"], ["--install-completion"]):
            run(*command)
        if "--dry-run" not in command:
            assert Path("bundle", "tallstore.json").exists()


def test_the_demo_passes_its_folder_on(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(demo, "main", lambda out, **_options: calls.append(out))
    run("demo", "--out", tmp_path / "here")
    run("demo")
    assert calls == [tmp_path / "here", Path("tallstore-demo")]


def test_the_demo_prints_json(tmp_path, monkeypatch):
    score = demo.TaskScore("parity", 0.98, 0.97, 0.99, 0.91)
    report = demo.DemoReport((score,), tmp_path / "bundle", 100, 300, 200, 50, {"training": 1.5})

    def main(out, *, console):
        console.print(report.scores_table())
        return report

    monkeypatch.setattr(demo, "main", main)
    result = run("demo", "--out", tmp_path, "--json")
    printed = json.loads(result.stdout)
    assert printed["scores"] == [
        {"name": "parity", "trained": 0.98, "bundled": 0.97, "agreement": 0.99, "cosine": 0.91}
    ]
    assert (printed["bundle"], printed["ratio"]) == (str(tmp_path / "bundle"), 2.0)
    assert "parity" in result.stderr
    assert "from the bundle" in run("demo", "--out", tmp_path).stdout


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


def test_a_terminal_that_cannot_show_a_name(tmp_path):
    models = save_models(tmp_path)
    tallstore.pack(models / "base", {"日本": models / "task1", "b": models / "task2"}, tmp_path / "bundle")
    done = process("inspect", tmp_path / "bundle", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "??" in done.stdout
    done = process("inspect", tmp_path / "bundle", "--tásk", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no such option: --t?sk" in done.stderr


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
    assert cli.main([]) == 2
    assert json.loads(capsys.readouterr().out)["tasks"]
