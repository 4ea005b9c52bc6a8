"""`tallstore add`, `remove` and `repack`: what they hand to the library, what they print, what they ask."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys

import pytest

import tallstore
from tallstore import Sign, SignedMask, Uniform
from tallstore.cli import main
from tallstore.cli.hints import in_options
from tests.command_line import misused, refused, run
from tests.model_directories import expert_tensors, pack_models, save_model, save_models
from tests.packing_cases import contents


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Models, and a bundle of the first two of them."""
    root = save_models(tmp_path_factory.mktemp("models"), 2)
    pack_models(root, root / "bundle")
    for seed in (3, 4, 5):
        save_model(root / f"more/task{seed}", expert_tensors(seed))
    return root


@pytest.fixture
def bundle(packed, tmp_path):
    return shutil.copytree(packed / "bundle", tmp_path / "bundle")


@pytest.fixture
def base(packed):
    return ["--base", packed / "base"]


def tasks(bundle):
    return tallstore.open_bundle(bundle).tasks


def methods(bundle):
    """By task, the name of the method that its group was packed with."""
    manifest = tallstore.open_bundle(bundle).manifest
    names = {group.id: group.method.name for group in manifest.groups}
    return {task.name: names[task.group] for task in manifest.tasks}


# --- add --------------------------------------------------------------------------------------------------------------


def test_a_task_is_added_and_the_others_stay_as_they_are(bundle, packed, base):
    before = contents(bundle)
    text = run("add", bundle, *base, "--expert", f"new one={packed / 'more/task3'}").stdout
    assert text.startswith(f"added 1 task to {bundle} with Uniform(levels=3, scale='tensor'")
    assert "times smaller; the bundle has " in text
    assert "new one" in text
    assert tasks(bundle) == ("task1", "task2", "new one")
    assert tallstore.verify(bundle) == []
    after = contents(bundle)
    assert {path: after[path] for path in before if path != "tallstore.json"} == {
        path: digest for path, digest in before.items() if path != "tallstore.json"
    }


def test_a_folder_of_experts_becomes_a_group(bundle, packed, base):
    run("add", bundle, *base, "--experts", packed / "more")
    assert methods(bundle) == dict.fromkeys(tasks(bundle), "signed-mask")
    assert len(tallstore.open_bundle(bundle).manifest.groups) == 2


def test_the_base_of_a_bundle_that_has_it_need_not_be_named(packed, tmp_path):
    bundle = pack_models(packed, tmp_path / "bundle", embed_base=True)
    run("add", bundle, "--expert", f"x={packed / 'more/task3'}", "--method", "sign")
    assert methods(bundle)["x"] == "sign"


def test_a_list_may_name_the_base(bundle, packed, tmp_path):
    file = tmp_path / "more.toml"
    file.write_text(f'base = "{packed / "base"}"\n[experts]\nx = "{packed / "more/task3"}"\n')
    run("add", bundle, "--experts", file)
    assert tasks(bundle)[-1] == "x"


def test_a_task_takes_the_place_of_another_if_asked(bundle, packed, base):
    expert = ["--expert", f"task1={packed / 'more/task3'}"]
    before = contents(bundle)
    line = refused("add", bundle, *base, *expert)
    assert line == f"{bundle}: there is a task 'task1' already; give another name, or --replace to put it in its place"
    assert contents(bundle) == before
    run("add", bundle, *base, *expert, "--replace")
    assert tasks(bundle) == ("task1", "task2")
    assert methods(bundle) == {"task1": "uniform", "task2": "signed-mask"}


def test_a_dry_run_changes_nothing(bundle, packed, base):
    before = contents(bundle)
    text = run("add", bundle, *base, "--experts", packed / "more", "--dry-run").stdout
    assert text.startswith("would add 3 tasks to ")
    assert contents(bundle) == before


def test_the_report_of_what_was_added_as_json(bundle, packed, base):
    report = json.loads(run("add", bundle, *base, "--experts", packed / "more", "--json").stdout)
    assert (report["action"], report["dry_run"]) == ("add", False)
    assert [task["name"] for task in report["tasks"]] == ["task3", "task4", "task5"]
    assert report["written_nbytes"] < report["bundle_nbytes"]


@pytest.mark.parametrize("command", ["add", "repack"])
def test_every_option_of_packing_is_passed_on(bundle, packed, base, monkeypatch, command):
    calls = []
    monkeypatch.setattr(tallstore, command, lambda *arguments, **options: calls.append((arguments, options)) or _stop())
    own = {
        "add": (["--replace"], {"replace": True}),
        "repack": (
            ["--reconstructions", "--task", "task2"],
            {"reconstructions": True, "tasks": ["task2"]},
        ),
    }
    typed, passed = own[command]
    run(
        *(command, bundle, *base, "--expert", "task2=x", *typed, "--private", "block.*", "--key-mapping", r"^model\.="),
        *("--merged-dtype", "int8", "--dry-run", "--no-compress", "--threshold", "1.3", "--gain", "published"),
        code=130,
    )
    ((arguments, options),) = calls
    assert arguments == (str(bundle), {"task2": "x"})
    assert callable(options.pop("progress"))
    assert options == passed | {
        "base": str(packed / "base"),
        "method": SignedMask(threshold=1.3, gain="published"),
        "merged_dtype": "int8",
        "private": ["block.*"],
        "key_mapping": {r"^model\.": ""},
        "calibrate": None,
        "compress": False,
        "dry_run": True,
        "executor": None,
    }


def _stop():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("typed", "method"),
    [([], None), (["--method", "sign"], Sign()), (["--method", "uniform", "--levels", "8"], Uniform(8))],
)
def test_without_a_method_the_library_chooses(bundle, base, monkeypatch, typed, method):
    calls = []
    monkeypatch.setattr(tallstore, "add", lambda *_, **options: calls.append(options["method"]) or _stop())
    run("add", bundle, *base, "--expert", "x=y", *typed, code=130)
    assert calls == [method]


def test_processes_add_the_same(bundle, packed, base, tmp_path):
    other = shutil.copytree(bundle, tmp_path / "other")
    run("add", bundle, *base, "--experts", packed / "more")
    run("add", other, *base, "--experts", packed / "more", "--workers", "2")
    assert contents(bundle) == contents(other)


# --- repack -----------------------------------------------------------------------------------------------------------


def test_what_was_added_one_by_one_shares_again(bundle, packed, base, tmp_path):
    for seed in (3, 4):
        run("add", bundle, *base, "--expert", f"task{seed}={packed / f'more/task{seed}'}")
    originals = tmp_path / "originals"
    originals.mkdir()
    for seed in range(1, 6):  # the fifth is no task of the bundle
        place = packed / (f"task{seed}" if seed < 3 else f"more/task{seed}")
        (originals / f"task{seed}").symlink_to(place)
    text = run("repack", bundle, *base, "--experts", originals).stdout
    assert text.startswith(f"repacked 4 tasks in {bundle} with SignedMask(")
    assert methods(bundle) == dict.fromkeys(("task1", "task2", "task3", "task4"), "signed-mask")
    assert len(tallstore.open_bundle(bundle).manifest.groups) == 1
    assert tallstore.verify(bundle) == []


def test_some_tasks_with_another_method(bundle, packed, base):
    run("repack", bundle, *base, "--experts", packed, "--task", "task2", "--method", "sign")
    assert methods(bundle) == {"task1": "signed-mask", "task2": "sign"}


def test_without_originals_it_says_what_would_have_to_be_allowed(bundle, packed, base):
    before = contents(bundle)
    line = refused("repack", bundle, *base, "--expert", f"task1={packed / 'task1'}")
    assert line.startswith(f"{bundle}: the originals of 'task2' are missing; give them with --expert or --experts, or")
    assert " --reconstructions to pack " in line
    assert contents(bundle) == before
    assert misused("repack", bundle, *base).startswith("--expert: give NAME=PATH for each expert, or --experts ")
    text = run("repack", bundle, *base, "--reconstructions").stdout
    assert "packed from what the bundle rebuilt, not from originals: 'task1', 'task2'" in text
    assert tallstore.verify(bundle) == []


# --- remove -----------------------------------------------------------------------------------------------------------


def test_a_task_is_removed_and_what_it_was_is_said(bundle, packed, base):
    run("add", bundle, *base, "--expert", f"new={packed / 'more/task3'}")
    size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    report = json.loads(run("remove", bundle, "new", "--dry-run", "--json").stdout)
    assert tasks(bundle) == ("task1", "task2", "new")
    text = run("remove", bundle, "new").stdout
    assert text.startswith(f"removed 1 task from {bundle}: ")
    assert text.endswith(" freed\n  new\n  g0002, a group, with its last task\n")
    assert tasks(bundle) == ("task1", "task2")
    freed = size - sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    manifest_nbytes = 1000  # the manifest shrinks too
    assert report == {
        "path": str(bundle),
        "tasks": ["new"],
        "groups": ["g0002"],
        "nbytes": pytest.approx(freed - manifest_nbytes / 2, abs=manifest_nbytes),
        "dry_run": True,
    }
    assert tallstore.verify(bundle) == []


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["task3"], "no task named 'task3'; did you mean 'task"),
        (["task1", "task2"], "no task would be left; delete the directory instead"),
    ],
)
def test_what_cannot_be_removed(bundle, names, message):
    before = contents(bundle)
    assert message in refused("remove", bundle, *names)
    assert contents(bundle) == before


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def remove_in_terminal(bundle, monkeypatch):
    """Runs `remove` where somebody answers; its exit code, and what is said on stderr."""

    def remove(answer, *options):
        stderr = Terminal()
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        monkeypatch.setattr(sys, "stderr", stderr)
        return main(["remove", str(bundle), "task1", *options]), stderr.getvalue()

    return remove


@pytest.mark.parametrize(
    ("answer", "is_yes"), [("y\n", True), ("Yes\n", True), ("\n", False), ("no\n", False), ("", False)]
)
def test_in_a_terminal_it_shows_what_goes_and_asks(bundle, remove_in_terminal, capsys, answer, is_yes):
    code, said = remove_in_terminal(answer)
    assert said.startswith("would remove 1 task from ")
    assert "\n  task1\nremove? [y/N] " in said
    assert said.endswith("nothing was removed\n") != is_yes
    assert code == (0 if is_yes else 1)
    assert tasks(bundle) == (("task2",) if is_yes else ("task1", "task2"))
    assert ("freed" in capsys.readouterr().out) == is_yes


@pytest.mark.parametrize("option", ["--yes", "-y", "--dry-run"])
def test_in_a_terminal_it_asks_nothing_where_it_need_not(bundle, remove_in_terminal, option):
    assert remove_in_terminal("", option) == (0, "")
    assert ("task1" in tasks(bundle)) == (option == "--dry-run")


def test_a_pipe_is_not_asked(bundle):
    done = subprocess.run(
        [sys.executable, "-m", "tallstore", "remove", bundle, "task1"],
        input="",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stderr == ""
    assert tasks(bundle) == ("task2",)


def test_removing_needs_no_torch(bundle):
    code = "import sys; from tallstore.cli import main; main(); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code, "remove", bundle, "task1"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert not {"torch", "huggingface_hub"} & set(done.stderr.split())


# --- what all of them refuse ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["add"], "give BUNDLE"),
        (["add", "b"], "--expert: give NAME=PATH for each expert, or --experts with a folder or a .toml file"),
        (["add", "b", "--expert", "x"], "--expert: 'x' is not NAME=PATH"),
        (["add", "b", "--expert", "a=x", "--mask-lambda", "1"], "--mask-lambda: goes with --method tall-mask, not "),
        (["add", "b", "--expert", "a=x", "--out", "c"], "no such option: --out"),
        (["repack", "b", "--expert", "a=x", "--method", "auto"], "--max-bits: give it with --method auto"),
        (["remove", "b"], "give TASK"),
        (["remove", "b", "a", "--force"], "no such option: --force"),
    ],
)
def test_usage_errors(arguments, message):
    line = misused(*arguments)
    assert line.startswith(message)
    assert line.endswith(f" (see tallstore {arguments[0]} --help)")


@pytest.mark.parametrize("command", ["add", "repack", "remove"])
def test_where_there_is_no_bundle(tmp_path, command):
    more = ["task1"] if command == "remove" else ["--expert", "task1=x"]
    assert "there is no bundle" in refused(command, tmp_path / "none", *more)


def test_the_base_is_asked_for_where_the_bundle_does_not_say(bundle, packed):
    line = refused("add", bundle, "--expert", f"x={packed / 'more/task3'}")
    assert line.endswith("the bundle neither embeds its base nor says where it is; give --base")


def test_another_base_is_an_error_that_names_a_tensor(bundle, packed, tmp_path):
    other = save_model(tmp_path / "other", {**expert_tensors(9)})
    before = contents(bundle)
    assert "tensor " in refused("add", bundle, "--base", other, "--expert", f"x={packed / 'more/task3'}")
    assert contents(bundle) == before


def test_messages_speak_of_options():
    assert in_options("give a copy of it: add(bundle, …, base=…)") == "give a copy of it with --base"
    assert in_options("experts has 'x', which is not") == "--expert has 'x', which is not"
