"""`--experts`: which experts a folder holds, and which a TOML file lists."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tallstore.cli.expert_file import read_expert_file
from tallstore.cli.expert_folder import find_experts
from tallstore.errors import CheckpointNotFoundError, InputError, OptionError
from tests.command_line import refused
from tests.model_directories import base_tensors, expert_tensors, save_model

# --- a folder


def test_a_folder_of_experts(tmp_path):
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


def test_folders_that_hold_no_experts(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        find_experts(tmp_path / "missing", "base")
    with pytest.raises(InputError, match="holds no expert"):
        find_experts(tmp_path, "base")
    save_model(tmp_path / "a", expert_tensors(1))
    with pytest.raises(InputError, match="is a checkpoint itself"):
        find_experts(tmp_path / "a", "base")
    save_file(expert_tensors(1), tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"is a file; give a folder of experts, or a \.toml file"):
        find_experts(tmp_path / "a.safetensors", "base")
    with pytest.raises(OptionError, match="two of the name 'a'"):
        find_experts(tmp_path, "base")


# --- a file


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_paths_start_at_the_file(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    monkeypatch.setenv("HOME", "/home/somebody")
    file = write(
        tmp_path / "deep" / "experts.toml",
        'base = "../bert"\n[experts]\nzebra = "runs/zebra"\n"映画 1.5" = "/absolute"\n'
        'home = "~/runs"\nown = "~no~one/x"\n',
    )
    read = read_expert_file(file)
    assert read.base == tmp_path / "deep" / "../bert"
    assert read.experts == {
        "zebra": tmp_path / "deep" / "runs" / "zebra",
        "映画 1.5": Path("/absolute"),
        "home": Path("/home/somebody/runs"),
        "own": tmp_path / "deep" / "~no~one" / "x",
    }
    assert list(read.experts) == ["zebra", "映画 1.5", "home", "own"]


def test_hub_ids_stand_behind_hub(tmp_path):
    read = read_expert_file(
        write(tmp_path / "x.toml", 'base = "hub:org/bert@main"\nexperts.a = "hub:org/a"\nexperts.b = "org/b"\n')
    )
    assert (read.base, read.experts["a"]) == ("org/bert@main", "org/a")
    # A path that is not there is never looked for on the Hub, though it reads like a Hub id.
    assert isinstance(read.experts["b"], Path)


def test_no_base_need_be_named(tmp_path):
    assert read_expert_file(write(tmp_path / "x.toml", '[experts]\na = "a"\n')).base is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", r'has no table \[experts\]; give one with a line such as spam = "runs/spam" for each expert'),
        ("[experts]\n", r"experts is an empty table; give one with a line such as"),
        ('experts = ["a", "b"]\n', "experts is an array; give one with"),
        ('[experts]\na = "x"\nb\n', r"is not TOML: .*line 3"),
        ('[experts]\na = "x"\na = "y"\n', r"is not TOML: .*line 3"),
        ('[expert]\na = "x"\n', "has the key 'expert', which means nothing here; did you mean 'experts'"),
        ('spam = "x"\n[experts]\na = "x"\n', r"has the key 'spam', .*; an expert goes under \[experts\]"),
        ("[experts]\na = 3\n", 'experts.a is 3; give a path, or "hub:org/name", in quotes'),
        ("[experts]\na = true\n", "experts.a is true; give a path"),
        ('[experts]\na = ""\n', "experts.a is empty; give a path"),
        ('[experts]\na = "hub:"\n', "experts.a is 'hub:'; give a path"),
        ('[experts]\nv1.5 = "x"\n', 'experts.v1 is a table; .* a name that has dots goes in quotes too: "v1.5"'),
        ('[experts]\na = { path = "x" }\n', "experts.a is a table; give a path"),
        ('base = ["b"]\n[experts]\na = "x"\n', "base is an array; give a path"),
    ],
)
def test_files_that_say_anything_else(tmp_path, text, problem):
    file = write(tmp_path / "x.toml", text)
    with pytest.raises(InputError, match=problem) as raised:
        read_expert_file(file)
    assert str(raised.value).startswith(f"{file}: ")
    assert "\n" not in str(raised.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match=r"missing.toml: cannot be read \(No such file or directory\)"):
        read_expert_file(tmp_path / "missing.toml")
    (tmp_path / "latin.toml").write_bytes('[experts]\nä = "x"\n'.encode("latin-1"))
    with pytest.raises(InputError, match=r"is not UTF-8 \(byte 10\)"):
        read_expert_file(tmp_path / "latin.toml")
    nested = write(tmp_path / "nested.toml", "experts = " + "[" * 100_000)
    with pytest.raises(InputError, match="is not TOML: it is nested too deeply"):
        read_expert_file(nested)


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    save_model(tmp_path / "base", base_tensors())
    file = write(tmp_path / "x.toml", 'base = "base"\n[experts]\na = "org/a"\nb = "org/b"\n')
    line = refused("pack", "--experts", file, "--out", tmp_path / "bundle")
    assert line == f"expert 'a' ({tmp_path / 'org' / 'a'}): there is no such file or directory"
    assert CheckpointNotFoundError.__name__  # the error behind that line is of the library
