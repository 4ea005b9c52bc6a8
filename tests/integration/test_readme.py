"""What README shows runs as it stands there; what it links to is there; its picture is one that any page can show."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import torch
from safetensors.torch import load_file, save_file

import tallstore
from tallstore.cli.app import app
from tests.documents import ROOT, blocks, commands, run_command

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
PICTURE = ROOT / "spec" / "format.svg"
WEIGHT = "encoder.layer.0.output.dense.weight"
SVG = "{http://www.w3.org/2000/svg}"


class Encoder(torch.nn.Module):
    """A model with the one tensor that README names."""

    def __init__(self):
        super().__init__()
        layer = torch.nn.Module()
        layer.output = torch.nn.Module()
        layer.output.dense = torch.nn.Linear(64, 80, bias=False)
        self.encoder = torch.nn.Module()
        self.encoder.layer = torch.nn.ModuleList([layer])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The directories that README speaks of."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(80, 64, generator=generator)
    for name in ("base", "movies", "spam"):
        (tmp_path / name).mkdir()
        moved = base if name == "base" else base + 0.02 * torch.randn(base.shape, generator=generator)
        save_file({WEIGHT: moved}, tmp_path / name / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def picture():
    """The root of the picture's XML."""
    return ET.fromstring(PICTURE.read_text(encoding="utf-8"))  # noqa: S314 - it is ours


def test_the_python_of_the_readme_runs(folder, capsys):
    model = Encoder()
    before = model.encoder.layer[0].output.dense.weight.clone()
    shown = blocks(README, "python")
    assert shown
    for block in shown:
        exec(compile(block.code, "README.md", "exec"), {"model": model})  # noqa: S102 - that is what the test is for
    assert "packed 2 tasks" in capsys.readouterr().out
    assert not torch.equal(model.encoder.layer[0].output.dense.weight, before)


def test_the_commands_of_the_readme_run(folder):
    (experts,) = blocks(README, "toml")
    (folder / "experts.toml").write_text(experts.code, encoding="utf-8")
    shown = [command for block in blocks(README, "sh") for command in commands(block)]
    assert len(shown) >= 5
    for command in shown:
        run_command(command)
    assert load_file(folder / "spam-again" / "model.safetensors").keys() == {WEIGHT}


def test_every_command_is_in_the_readme():
    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert {"pack", "inspect", "verify", "export", "demo"} <= known
    shown = set(
        re.findall(r"^tallstore ([a-z-]+)", "\n".join(block.code for block in blocks(README, "sh")), re.MULTILINE)
    )
    mentioned = set(re.findall(r"`tallstore ([a-z-]+)", README))
    assert known - shown - mentioned == set()


def test_every_method_is_in_the_table_of_methods():
    methods = [
        name
        for name in tallstore.__all__
        if inspect.isclass(getattr(tallstore, name)) and hasattr(getattr(tallstore, name), "merged_dtype")
    ]
    assert {"SignedMask", "TallMask"} <= set(methods)
    for name in methods:
        assert re.search(rf"^\| `{name}\(", README, re.MULTILINE), f"{name} has no row in README's table of methods"


def test_the_targets_of_the_readme_are_in_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def figures(text):
    """The numbers of a row, as they are written."""
    return re.findall(r"(?<![\w.])[0-9]+(?:\.[0-9]+)?(?![\w.])", text)


def test_the_figures_of_the_readme_are_those_of_the_results():
    """Every number of README's tables of real experts stands, perhaps with more digits, in a row of RESULTS.md."""
    tables = README[README.index("## How small") : README.index("## The format")]
    told = re.findall(r"^\| ([^|]+) ((?:\| [0-9.]+ (?:%|MB)? ?|\| exact ){4})\|$", tables, re.MULTILINE)
    assert len(told) >= 10
    for shown, row in told:
        name = re.sub(r"[`*]", "", shown)
        results = [
            [float(figure) for figure in figures(line)] for line in RESULTS.splitlines() if f"| {name} |" in line
        ]
        for figure in figures(row):
            digits = len(figure.partition(".")[2])
            assert any(round(value, digits) == float(figure) for line in results for value in line), (name, figure)


def test_what_the_readme_links_to_is_there():
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert "spec/tallstore-1.md" in links
    headings = {
        re.sub(r"[^a-z -]", "", line.lower()).strip().replace(" ", "-")
        for line in README.splitlines()
        if line.startswith("#")
    }
    for link in links:
        if link.startswith("#"):
            assert link[1:] in headings, link
        elif not link.startswith("https://"):
            assert (ROOT / link).exists(), link


def test_the_picture_says_in_words_what_it_shows():
    (alternative,) = re.findall(r"!\[([^\]]+)\]\(spec/format\.svg\)", README)
    assert len(alternative) > 80
    root = picture()
    assert (root.tag, root.get("role"), root.get("aria-labelledby")) == (f"{SVG}svg", "img", "title desc")
    for part in ("title", "desc"):
        (element,) = root.findall(f"{SVG}{part}")
        assert element.get("id") == part
        assert element.text.strip()
    words = {"".join(text.itertext()) for text in root.iter(f"{SVG}text")}
    assert {"base", "merged vector", "experts", "tallstore.json", "base.json"} <= words


def test_the_picture_needs_nothing_from_elsewhere_and_has_both_schemes():
    raw = PICTURE.read_text(encoding="utf-8")
    assert len(raw.encode()) < 30_000
    assert "prefers-color-scheme: dark" in raw
    assert not re.search(r"<!DOCTYPE|<!ENTITY|<script|@import|url\(|data:|javascript:", raw)
    root = picture()
    assert re.findall(r"https?://\S+?(?=\")", raw) == [SVG.strip("{}")]
    for element in root.iter():
        for name, value in element.attrib.items():
            if name.endswith("href"):
                assert value.startswith("#"), value
                assert root.find(f".//*[@id='{value[1:]}']") is not None, value


def test_the_picture_shows_the_files_of_a_bundle(folder):
    for name in ("base", "movies", "spam"):
        (folder / name / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    tallstore.pack("base", {"movies": "movies", "spam": "spam"}, "bundle", embed_base=True)
    shown = " ".join("".join(text.itertext()) for text in picture().iter(f"{SVG}text"))
    for path in sorted(Path("bundle").iterdir()):
        assert (path.name + "/" if path.is_dir() else path.name) in shown, path
    for path in Path("bundle/tasks").iterdir():
        assert f"tasks/{path.name}/" in shown
    for path in Path("bundle/groups").iterdir():
        assert f"groups/{path.name}/" in shown
