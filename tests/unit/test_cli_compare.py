"""`tallstore compare`: the table in terminals narrow and wide, which methods, and a score of one's own."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import sys

import pytest
from rich.cells import cell_len

import tallstore
from tallstore.cli.methods import MethodName, as_options, compared_settings
from tallstore.packing import Compared, Comparison
from tallstore.packing.comparing import METHODS
from tests.command_line import misused, refused, run
from tests.model_directories import save_models

SCORES = """
from offset import OFFSET

calls = []

def size(task, weights):
    import late  # as people do, for what takes long to import
    calls.append(task)
    return late.total(weights) + OFFSET

def tensor(task, weights):
    return weights["steps"].float().mean()

def nothing(task, weights):
    pass

def several(task, weights):
    return weights["steps"]

def endless(task, weights):
    return float("nan")

def broken(task, weights):
    return helper(weights)

def helper(weights):
    return weights["absent"]  # broken

def wordless(task, weights):
    assert task == "nobody"  # wordless

def spread(task, weights):
    raise ValueError("shapes differ:\\n  4 and\\n  5")  # spread

def of_weights(weights):
    return 1.0

number = 3
"""
BROKEN = {
    "unfinished": "\n[][1]\n",
    "unspelt": "def score(task, weights)\n    return 1\n",
    "needy": "import not_installed_here\n",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"), 2)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current directory, with modules of the user's in it; they are forgotten afterwards."""
    modules = {"scores": SCORES, "offset": "OFFSET = 1000\n", "late": "def total(w):\n    return len(w)\n", **BROKEN}
    for name, text in modules.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in modules:
        sys.modules.pop(name, None)


@pytest.fixture
def inputs(models):
    return ["--base", models / "base", "--experts", models]


@pytest.fixture
def compare(inputs):
    """Runs `compare` with one quick method."""
    return lambda *options, **kw: run("compare", *inputs, "--method", "sign", *options, **kw)


# --- what it prints


@pytest.fixture(scope="module")
def comparison(models):
    return tallstore.compare(models / "base", {name: models / name for name in ("task1", "task2")})


@pytest.fixture
def shown(comparison, inputs, monkeypatch):
    """Prints a comparison that was made before, with some of it replaced."""

    def show(*options, columns=160, rows=comparison.rows):
        monkeypatch.setattr(tallstore, "compare", lambda *_args, **_kw: dataclasses.replace(comparison, rows=rows))
        return run("compare", *inputs, *options, columns=columns).stdout

    return show


@pytest.mark.parametrize("columns", [None, 160, 80, 50, 30])
def test_a_row_a_method_the_smallest_first(comparison, shown, columns):
    text = shown(columns=columns)
    assert max(cell_len(line) for line in text.splitlines()) <= (columns or 200)
    heading, rule, *lines = text.strip().splitlines()
    shown_columns = {
        30: ["--method", "bundle", "cosine"],
        50: ["--method", "bundle", "cosine"],
        80: ["--method", "bundle", "bits", "cosine"],
    }
    assert heading.split() == shown_columns.get(
        columns, ["--method", "bundle", "ratio", "bits", "cosine", "by", "task"]
    )
    assert set(rule) == {"─"}
    rows = sorted(comparison.rows, key=lambda row: row.bundle_nbytes)
    found = [line for line in lines if re.search(r" kB  ", line)]
    assert len(found) == len(rows) == len(METHODS)
    for line, row in zip(found, rows, strict=True):
        assert line.startswith("*") == row.is_best
        assert f"{row.mean_cosine:.4f}" in line
        assert f"{row.bundle_nbytes / 1000:.1f} kB" in line
        if columns is None or columns >= 80:
            assert line[1:].strip().startswith(f"{as_options(row.method)} ")
    footer = " ".join(text.partition("* no other")[2].split())
    assert footer.startswith("is both smaller and truer ")
    assert footer.endswith("of checkpoints; bundles with the base by reference, predicted on a sample of the weights")


def test_scores_are_shown_where_there_are_some(comparison, shown):
    def scored(row: Compared, score: float) -> Compared:
        return dataclasses.replace(row, score={"task1": score, "task2": score + 0.2}, measured=True)

    rows = tuple(scored(row, place / 100) for place, row in enumerate(comparison.rows))
    text = shown(rows=rows)
    assert text.split("\n")[1].split() == ["--method", "bundle", "ratio", "bits", "cosine", "by", "task", "score"]
    assert re.search(rf"^. +{as_options(rows[4].method)} .* 0\.14$", text, re.MULTILINE)
    assert "* no other is both smaller and of a better score\n" in text
    assert text.endswith("measured on whole packs\n")
    assert max(map(cell_len, shown(rows=rows, columns=50).splitlines())) <= 50


def test_a_method_that_codes_nothing(comparison, shown):
    row = dataclasses.replace(comparison.rows[0], bits=None, cosine={"task1": None, "task2": None})
    assert re.search(r" – +1\.0000$", shown(rows=(row,)), re.MULTILINE)


def test_advice_names_methods_as_they_are_typed(comparison, monkeypatch, inputs):
    worn = "TallMask(mask_lambda=0.4, merge='ties', gain='published'), LeastSquares(levels=2)"
    line = f"over 9 tasks: {worn}; truer would be TallMask() in 2 groups: pack the first, then tallstore.add the other"
    advised = dataclasses.replace(comparison, advice=(line,))
    monkeypatch.setattr(tallstore, "compare", lambda *_args, **_kw: advised)
    assert run("compare", *inputs).stdout.endswith(
        "\nover 9 tasks: tall-mask-published, least-squares --levels 2;"
        " truer would be tall-mask in 2 groups: pack the first, then tallstore add the other\n"
    )


def test_json(comparison, shown):
    assert json.loads(shown("--json", columns=20)) == json.loads(json.dumps(comparison.to_dict()))


# --- which methods


def test_a_row_is_what_pack_takes(models, tmp_path, monkeypatch):
    """Each of the settings, typed as the table has it, is that method again."""
    made = []

    def pack(*_args, method, **_options):
        made.append(method)
        raise KeyboardInterrupt

    monkeypatch.setattr(tallstore, "pack", pack)
    for method in METHODS:
        options = ["--method", *shlex.split(as_options(method))]
        run("pack", "--base", models / "base", "--experts", models, "--out", tmp_path / "b", *options, code=130)
    assert list(map(repr, made)) == list(map(repr, METHODS))


def test_each_method_names_its_settings():
    assert compared_settings([]) is None
    for name in MethodName:
        found = compared_settings([name])
        assert [as_options(method).split()[0] for method in found or ()] or name is MethodName.AUTO
    assert [as_options(method) for method in compared_settings([MethodName.TALL_MASK])] == [
        "tall-mask",
        "tall-mask --merge ties",
        "tall-mask-published",
    ]
    assert compared_settings([MethodName.TALL_MASK_PUBLISHED]) == [tallstore.TallMask.published()]


def test_some_methods_only(inputs):
    chosen = ["--method", "sign", "--method", "tall-mask-published"]
    names = [row["name"] for row in json.loads(run("compare", *inputs, *chosen, "--json").stdout)["rows"]]
    assert names == ["tall-mask", "sign"]


def test_inputs_go_to_the_library(models, tmp_path, monkeypatch):
    calls = []

    def spy(base, experts, **options):
        calls.append((base, experts, options))
        return Comparison((), 0)

    monkeypatch.setattr(tallstore, "compare", spy)
    file = tmp_path / "list.toml"
    file.write_text(f'base = "{models / "base"}"\n[experts]\nz = "{models / "task1"}"\n')
    run("compare", "--experts", file, "--expert", "a=x", "--private", "block.*", "--key-mapping", "^m=", "--json")
    ((base, experts, options),) = calls
    assert (base, experts) == (models / "base", {"z": models / "task1", "a": "x"})
    assert callable(options.pop("progress"))
    assert options == {"methods": None, "private": ["block.*"], "key_mapping": {"^m": ""}, "evaluate": None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--expert: give NAME=PATH for each expert, or --experts with a folder or a .toml file"),
        (["--expert", "a=x"], "--base: give what the experts were fine-tuned from"),
        (["--base", "b", "--expert", "x"], "--expert: 'x' is not NAME=PATH"),
        (
            ["--base", "b", "--expert", "a=x", "--method", "best"],
            "--method METHOD: ",
        ),
        (
            ["--base", "b", "--expert", "a=x", "--method", "auto"],
            "--method: auto chooses among the others; give one of those",
        ),
        (["--base", "b", "--expert", "a=x", "--out", "c"], "no such option: --out"),
    ],
)
def test_usage_errors(arguments, message):
    line = misused("compare", *arguments)
    assert line.startswith(message)
    assert line.endswith(" (see tallstore compare --help)")


def test_errors_of_inputs_are_one_line(models, tmp_path):
    base = ["--base", models / "base"]
    assert "at least 2" in refused("compare", *base, "--expert", f"a={models / 'task1'}")
    assert str(tmp_path / "none") in refused("compare", *base, "--expert", f"a={tmp_path / 'none'}", "--expert", "b=c")


# --- a score of one's own


def test_a_score_of_ones_own(here, compare):
    (row,) = json.loads(compare("--evaluate", "scores:size", "--json").stdout)["rows"]
    assert row["score"] == {"task1": 1005.0, "task2": 1005.0}
    assert row["measured"]
    assert sys.modules["scores"].calls == ["task1", "task2"]
    assert str(here) not in sys.path
    assert re.search(r"^\* +sign .* 1\.5$", compare("--evaluate", "scores:tensor").stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("scores", "'scores' is not MODULE:FUNCTION"),
        (":size", "':size' is not MODULE:FUNCTION"),
        ("scores.py:size", "'scores.py' is a file; give the module's name, as in scores:size"),
        ("./here/scores:size", "'./here/scores' is a file; give the module's name, as in scores:size"),
        ("scorse:size", "there is no module 'scorse'; give one that Python finds from here"),
        ("scores.more:size", "there is no module 'scores.more'; give one that Python finds from here"),
        ("nowhere.scores:size", "there is no module 'nowhere'; give one that Python finds from here"),
        ("scores:seize", "scores has no function 'seize'"),
        ("scores:number", "'number' in scores is no function: 3"),
    ],
)
def test_what_is_no_function(here, inputs, place, message):
    line = misused("compare", *inputs, "--evaluate", place)
    assert line == f"--evaluate: {message} (see tallstore compare --help)"
    assert str(here) not in sys.path


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("scores:broken", "broken on task 'task1' raised KeyError: 'absent' (scores.py, line LINE)"),
        ("scores:wordless", "wordless on task 'task1' raised AssertionError (scores.py, line LINE)"),
        ("scores:spread", "spread on task 'task1' raised ValueError: shapes differ: 4 and 5 (scores.py, line LINE)"),
        (
            "scores:of_weights",
            "of_weights on task 'task1' raised TypeError: of_weights() takes 1 positional argument but 2 were given",
        ),
        ("scores:nothing", "nothing gave None for task 'task1'; return a number, larger where it is better"),
        (
            "scores:several",
            "several gave tensor([0, 1, 2, 3]) for task 'task1'; return a number, larger where it is better",
        ),
        ("scores:endless", "gave nan for task 'task1'; give a finite number, larger where it is better"),
        (
            "unfinished:score",
            "importing unfinished raised IndexError: list index out of range (unfinished.py, line 2)",
        ),
        ("unspelt:score", "importing unspelt raised SyntaxError: expected ':' (unspelt.py, line 1)"),
        (
            "needy:score",
            "importing needy raised ModuleNotFoundError: No module named 'not_installed_here' (needy.py, line 1)",
        ),
    ],
)
def test_what_the_users_code_raises_is_one_line_that_says_where(here, inputs, place, message):
    line = refused("compare", *inputs, "--method", "sign", "--evaluate", place)
    marked = re.search(rf"# {place.partition(':')[2]}$", SCORES, re.MULTILINE)
    number = 1 + SCORES.count("\n", 0, marked.start()) if marked else 0
    assert line == f"--evaluate: {message.replace('LINE', str(number))}"
    assert str(here) not in sys.path
