"""What shells complete: commands, options, the tasks of a bundle. Real processes, as the shells' scripts call them."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import tallstore
from tallstore.cli import app
from tests.model_directories import save_models

TASKS = ["first one", "it's $5", "spam", "映画"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a bundle and a program `tallstore` on its own path."""
    root = tmp_path_factory.mktemp("completion")
    models = save_models(root / "models")
    tallstore.pack(
        models / "base", {task: models / f"task{1 + i % 3}" for i, task in enumerate(TASKS)}, root / "bundle"
    )
    program = root / "bin" / "tallstore"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m tallstore "$@"\n')
    program.chmod(0o755)
    return root


def process(folder, *command, **environment):
    path = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", **environment}
    done = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, encoding="utf-8", timeout=120, check=True
    )
    assert done.stderr == ""
    return done.stdout


def completed(folder, line, shell="bash"):
    """What *shell* is offered for the last word of *line*."""
    words = line.split(" ")
    environment = {
        "bash": {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)},
        "zsh": {"_TYPER_COMPLETE_ARGS": line},
        "fish": {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    return process(folder, "tallstore", _TALLSTORE_COMPLETE=f"complete_{shell}", **environment).splitlines()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("tallstore ", list(typer.main.get_command(app.app).commands)),
        ("tallstore in", ["inspect"]),
        ("tallstore pack --method tall", ["tall-mask", "tall-mask-published"]),
        ("tallstore pack --no", ["--normalise", "--no-compress"]),
        ("tallstore export bundle ", [r"first\ one", r"it\'s\ \$5", "spam", "映画"]),
        ("tallstore export bundle s", ["spam"]),
        ("tallstore export --all bundle 映", ["映画"]),
        ("tallstore re", ["remove", "repack", "report"]),
        ("tallstore remove bundle s", ["spam"]),
        ("tallstore remove bundle spam fi", [r"first\ one"]),
        ("tallstore repack bundle --task s", ["spam"]),
        ("tallstore add bundle --expert x=y --method tall", ["tall-mask", "tall-mask-published"]),
        ("tallstore inspect bundle --task ", [r"first\ one", r"it\'s\ \$5", "spam", "映画"]),
        ("tallstore inspect --json bundle --task s", ["spam"]),
        ("tallstore inspect --task s", []),
        ("tallstore export nothing ", []),
        ("tallstore export models ", []),
        ("tallstore export bin/tallstore ", []),
    ],
)
def test_bash(folder, line, expected):
    assert [word for word in completed(folder, line) if word] == expected


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_zsh_and_fish(folder, shell):
    commands = "\n".join(completed(folder, "tallstore ", shell))
    assert "inspect" in commands
    assert "Pack fine-tunes of one base into a bundle." in commands
    tasks = "\n".join(completed(folder, "tallstore export bundle ", shell))
    assert "first one" in tasks  # these shells put in what a name needs
    assert "映画" in tasks
    assert "pack" not in tasks
    assert "spam" in "\n".join(completed(folder, "tallstore inspect bundle --task s", shell))


def test_a_manifest_that_is_damaged_completes_nothing(folder, tmp_path):
    damaged = shutil.copytree(folder / "bundle", tmp_path / "damaged")
    (damaged / "tallstore.json").write_bytes(b"{" + (damaged / "tallstore.json").read_bytes())
    assert not any(completed(folder, f"tallstore export {damaged} "))


def test_completion_reads_no_more_than_it_needs(folder):
    code = "import sys; from tallstore.cli import main; main(); print(*sys.modules, file=sys.stderr)"
    environment = {**os.environ, "_TALLSTORE_COMPLETE": "complete_bash", "COMP_CWORD": "3"}
    environment["COMP_WORDS"] = f"tallstore\nexport\n{folder / 'bundle'}\ns"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split() == ["spam"]
    assert not {"torch", "numpy", "rich", "huggingface_hub"} & set(done.stderr.split())


@pytest.mark.parametrize(
    ("shell", "script"),
    [
        ("bash", "complete -o default -F _tallstore_completion tallstore"),
        ("zsh", "#compdef tallstore"),
        ("fish", "complete --command tallstore"),
    ],
)
def test_the_script_can_be_shown(folder, shell, script):
    assert script in process(folder, "tallstore", _TALLSTORE_COMPLETE=f"source_{shell}")


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_with_the_installed_script(folder, tmp_path):
    """What `--install-completion` leaves, sourced by bash, completes."""
    home = {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    said = process(folder, "tallstore", "--install-completion", "bash", **home)
    assert "bash completion installed in" in said
    script = """
        source ~/.bash_completions/tallstore.sh
        COMP_WORDS=(tallstore export bundle fi) COMP_CWORD=3
        _tallstore_completion tallstore
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    assert process(folder, "bash", "-c", script, **home) == "first\\ one\n"
