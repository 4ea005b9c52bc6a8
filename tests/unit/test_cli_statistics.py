"""`tallstore statistics`: profile, densities and overlaps of a few masks or of two hundred, in any terminal."""

from __future__ import annotations

import itertools
import json
import re
import shutil

import pytest
import torch
from rich.cells import cell_len

import tallstore
from tests.command_line import misused, refused, run
from tests.model_directories import pack_models, save_models

COUNT = 30


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    root = save_models(tmp_path_factory.mktemp("models"))
    return pack_models(root, root / "bundle", method=tallstore.TallMask())


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    """A bundle of many tasks, of which two are nearly the same."""
    generator = torch.Generator().manual_seed(0)
    base = {"block.weight": torch.randn(70, 64, generator=generator)}
    moves = [torch.randn(70, 64, generator=generator) for _ in range(COUNT)]
    moves[7] = moves[20] + 0.1 * moves[7]
    path = tmp_path_factory.mktemp("crowd") / "bundle"
    experts = {f"task {n:02d} in words": {"block.weight": base["block.weight"] + 0.01 * m} for n, m in enumerate(moves)}
    tallstore.pack(base, experts, path, method=tallstore.TallMask())
    return path


def measured(path, tasks=None):
    with tallstore.open_bundle(path) as opened:
        return opened.statistics(tasks)


def lines_after(text, heading):
    """The rows of the table whose heading begins so."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.lstrip().startswith(heading):
            next(lines)
            return list(itertools.takewhile(str.strip, lines))
    raise AssertionError(heading)


def test_what_is_counted_and_what_is_not(bundle):
    text = run("statistics", bundle).stdout
    found = measured(bundle)
    counted = f"3 masks over 13.8 k weights in 3 tensors, density {100 * found.density:.1f} %"
    assert text.splitlines()[:3] == [
        f"bundle    {bundle}",
        f"counted   {counted}",
        "left out  64 weights in 1 tensor, no task has it under the base's name: norm.bias",
    ]


@pytest.mark.parametrize("columns", [50, 80, 200])
def test_the_profile_is_a_line_a_number_of_masks_with_a_bar(bundle, columns):
    rows = lines_after(run("statistics", bundle, columns=columns).stdout, "claimed by")
    found = measured(bundle)
    assert [row[:19].strip() for row in rows] == ["none (catastrophic)", "one (selfish)", "2", "all 3 (universal)"]
    bars = []
    for row, number, share in zip(rows, found.claimed_by, found.profile, strict=True):
        weights = f"{number / 1000:.1f} k" if number >= 1000 else str(number)
        assert re.search(rf" {re.escape(weights)} +{100 * share:.1f} %", row)
        bars.append(len(row.partition(" %")[2].strip()))
    longest = max(bars)
    assert longest == min(40, columns - 38)
    assert bars == [pytest.approx(longest * share / max(found.profile), abs=1) for share in found.profile]


def test_overlaps_are_a_matrix_where_there_is_room(bundle):
    found = measured(bundle)
    text = run("statistics", bundle, columns=60).stdout
    rows = lines_after(text, "task ")
    assert next(line for line in text.splitlines() if "density  " in line).split() == ["task", "density", "1", "2", "3"]
    for place, (row, task) in enumerate(zip(rows, found.tasks, strict=False)):
        shares = [f"{100 * share:.1f}" for other, share in enumerate(found.similarity[place]) if other != place]
        assert row.split() == [str(place + 1), task, f"{100 * found.densities[task]:.1f}", "%", *shares]
    assert "of the weights that either of two masks claims, the % that both claim" in " ".join(text.split())


@pytest.mark.parametrize("columns", [None, 50, 80, 120, 200])
def test_many_tasks_show_their_nearest_and_the_nearest_pairs(crowd, columns):
    text = run("statistics", crowd, columns=columns).stdout
    found = measured(crowd)
    assert max(cell_len(line) for line in text.splitlines()) <= (columns or 200)
    profile = [row.partition("  ")[0] for row in lines_after(text, "claimed by")]
    assert profile[:4] == ["none (catastrophic)", "one (selfish)", "2 to 5", "6 to 9"]
    assert profile[-2:] == ["26 to 29", f"all {COUNT} (universal)"]
    rows = [line for line in text.splitlines() if re.match(r"task \d\d", line)]
    assert [row[:7] for row in rows] == [task[:7] for task in found.tasks]
    best = f"{100 * found.similarity[7][20]:.1f} %"
    assert rows[7].endswith(best)
    flat = " ".join(text.split())
    assert f"nearest task 07 in words and task 20 in words: {best} " in flat
    pairs = [(share, one, other) for one, row in enumerate(found.similarity) for other, share in enumerate(row[:one])]
    share, one, other = min(pairs)
    names = sorted((found.tasks[one], found.tasks[other]))
    assert f"farthest {names[0]} and {names[1]}: {100 * share:.1f} %" in flat


def test_twelve_tasks_fit_a_wide_terminal_and_no_narrow_one(crowd):
    tasks = measured(crowd).tasks
    twelve = [word for task in tasks[:12] for word in ("--task", task)]
    assert "1, 2, …" in run("statistics", crowd, *twelve, columns=140).stdout
    assert "nearest task" in run("statistics", crowd, *twelve, columns=80).stdout
    thirteen = [*twelve, "--task", tasks[12]]
    assert "nearest task" in run("statistics", crowd, *thirteen, columns=200).stdout
    rows = lines_after(run("statistics", crowd, *twelve).stdout, "claimed by")
    assert [row.split()[0] for row in rows] == ["none", "one", *map(str, range(2, 12)), "all"]


def test_some_tasks_and_one_alone(bundle):
    text = run("statistics", bundle, "--task", "task3", "--task", "task1").stdout
    assert "counted   2 masks over " in text
    assert [row.split()[1] for row in lines_after(text, "task ")[:2]] == ["task3", "task1"]
    text = run("statistics", bundle, "--task", "task2").stdout
    assert [row[:19].strip() for row in lines_after(text, "claimed by")] == ["none (catastrophic)", "the mask"]
    assert lines_after(text, "task ") == [f"task2   {100 * measured(bundle).densities['task2']:.1f} %"]


def test_nothing_to_count(tmp_path):
    base = {"w": torch.randn(80, 64), "v": torch.randn(80, 64)}
    experts = {name: {key: value + 0.01 * torch.randn(80, 64) for key, value in base.items()} for name in "ab"}
    tallstore.pack(base, experts, tmp_path / "bundle", method=tallstore.Sign())
    text = run("statistics", tmp_path / "bundle").stdout
    assert "counted   2 masks over 0 weights in 0 tensors\n" in text
    assert "left out  10.2 k weights in 2 tensors, the sign code of 'a' leaves nothing out: v, w\n" in text
    assert "claimed by" not in text
    assert lines_after(text, "task ") == ["a           –", "b           –"]


def test_reasons_beyond_the_first_are_counted_together(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = {f"w{n}": torch.randn(80, 64, generator=generator) for n in range(8)}
    experts = {}
    for n in range(6):
        move = {key: value + 0.01 * torch.randn(80, 64, generator=generator) for key, value in base.items()}
        experts[f"task{n}"] = {key: base[key] if key != f"w{n}" else value for key, value in move.items()}
        experts[f"task{n}"]["w7"] = move["w7"]
    tallstore.pack(base, experts, tmp_path / "bundle", private=[f"w{n}" for n in range(6)])
    text = run("statistics", tmp_path / "bundle").stdout
    for n in range(4):
        assert f"left out  5.1 k weights in 1 tensor, stored whole by 'task{n}': w{n}\n" in text
    assert "left out  10.2 k weights in 2 tensors, for 2 other reasons\n" in text


def test_what_was_not_fetched(bundle, tmp_path):
    part = shutil.copytree(bundle, tmp_path / "part")
    shutil.rmtree(part / "tasks" / "task2")
    text = run("statistics", part).stdout
    assert "counted   2 masks over " in text
    assert text.endswith("not fetched, so not counted: task2\n")
    assert "task 'task2' was not fetched" in refused("statistics", part, "--task", "task2")


def test_json(bundle):
    found = json.loads(run("statistics", bundle, "--json", columns=20).stdout)
    assert found == json.loads(json.dumps(measured(bundle).to_dict()))
    found = json.loads(run("statistics", bundle, "--json", "--task", "task2").stdout)
    assert found["tasks"] == ["task2"]


def test_errors_are_one_line(bundle, tmp_path):
    assert refused("statistics", tmp_path).endswith("there is no bundle (no tallstore.json); check the path")
    assert "no task named 'task4'; did you mean 'task3'?" in refused("statistics", bundle, "--task", "task4")
    assert misused("statistics").startswith("give BUNDLE")
    damaged = shutil.copytree(bundle, tmp_path / "damaged")
    path = damaged / "tasks" / "task1" / "mask-00001-of-00001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1
    path.write_bytes(raw)
    assert "mask-00001-of-00001.safetensors" in refused("statistics", damaged)
