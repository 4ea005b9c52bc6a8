"""The demo: its training half for real but short, the whole of it short, and the whole as people run it (slow)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file

import tallstore
from tallstore.demo import DemoReport, TaskScore, main, run_demo
from tallstore.demo.digits import Task, load_digits, make_tasks
from tallstore.demo.model import ModelConfig, VisionTransformer
from tallstore.demo.run import _program, commands_to_try
from tallstore.demo.training import Phase, Recipe, finetune, predict, pretrain

ROOT = Path(__file__).parents[2]
TASKS = ["parity", "above-four", "rotated", "inverted", "permuted", "noisy"]
SHORT = Recipe(pretraining=Phase(2, 2e-3), finetuning=Phase(1, 1e-3))


@pytest.fixture(scope="module")
def tasks() -> tuple[Task, tuple[Task, ...]]:
    return make_tasks(load_digits(), torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DemoReport]:
    out = tmp_path_factory.mktemp("demo")
    return out, run_demo(out, recipe=SHORT)


def test_six_tasks_share_one_split(tasks):
    source, finetuning = tasks
    assert [task.name for task in finetuning] == TASKS
    assert len(source.train.labels) + len(source.test.labels) == 1797
    for task in finetuning:
        assert task.test.images.shape == source.test.images.shape
        assert int(task.train.labels.max()) == task.num_labels - 1
    named = dict(zip(TASKS, finetuning, strict=True))
    assert torch.equal(named["parity"].test.labels, source.test.labels % 2)
    assert torch.equal(named["inverted"].test.images, 1 - source.test.images)
    assert not torch.equal(named["permuted"].test.labels, source.test.labels)


def test_most_of_the_model_is_worth_a_mask():
    sizes = [parameter.numel() for parameter in VisionTransformer(ModelConfig(10)).parameters()]
    assert sum(size for size in sizes if size >= 4096) > 0.95 * sum(sizes)


def test_training_repeats_itself_with_any_number_of_threads(tasks):
    source, finetuning = tasks

    def weights(threads: int) -> list[dict[str, torch.Tensor]]:
        torch.set_num_threads(threads)
        base = pretrain(source, SHORT, 7)
        return [model.state_dict() for _, model in finetune(base, finetuning[:2], SHORT, 7)]

    threads, state = torch.get_num_threads(), torch.get_rng_state()
    try:
        alone, together = weights(1), weights(2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)
    for first, second in zip(alone, together, strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_finetune_moves_every_tensor_and_learns(tasks):
    source, (parity, *_) = tasks
    base = pretrain(source, SHORT, 0)
    ((task, expert),) = finetune(base, [parity], SHORT, 0)
    assert task is parity
    for name, weight in base.state_dict().items():
        assert not torch.equal(weight, expert.state_dict()[name]), name
    right = predict(expert, parity.test.images) == parity.test.labels
    assert right.float().mean() > 0.6


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(tallstore.TallstoreError, match=r"needs scikit-learn: pip install 'tallstore\[demo\]'"):
        load_digits()


def test_every_expert_is_scored(demo):
    _, report = demo
    assert [score.name for score in report.scores] == TASKS
    # After so short a training only the easy tasks have margins that a reconstruction must keep.
    for score in report.scores[:2]:
        assert score.agreement > 0.9
        assert abs(score.trained - score.bundled) < 0.05
    assert report.ratio > 3


def test_one_more_task_costs_what_the_last_one_added(demo, tmp_path):
    out, report = demo
    experts = {name: out / "checkpoints" / name for name in TASKS[:-1]}
    tallstore.pack(out / "checkpoints" / "base", experts, tmp_path / "five", embed_base=True)
    sizes = [
        sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
        for bundle in (tmp_path / "five", report.bundle)
    ]
    assert report.bundle_nbytes == sizes[1]
    assert report.task_nbytes == sizes[1] - sizes[0]
    assert report.task_nbytes < report.base_nbytes / 10


def test_the_cosine_is_that_of_the_weights(demo):
    out, report = demo
    with tallstore.open_bundle(report.bundle) as bundle:
        for score in report.scores:
            base, trained = (
                load_file(out / "checkpoints" / name / "model.safetensors") for name in ("base", score.name)
            )
            bundled = bundle.state_dict(score.name)
            matrices = [name for name, weight in base.items() if weight.numel() >= 4096]
            task_vector, found = (
                torch.cat([(weights[name] - base[name]).double().flatten() for name in matrices])
                for weights in (trained, bundled)
            )
            assert score.cosine == pytest.approx(torch.cosine_similarity(task_vector, found, dim=0).item(), abs=1e-4)


def test_the_bundle_stays_and_verifies(demo):
    out, report = demo
    assert report.bundle == out / "bundle"
    assert tallstore.verify(report.bundle) == []
    with tallstore.open_bundle(report.bundle) as bundle:
        assert sorted(bundle.tasks) == sorted(TASKS)


def test_checkpoints_are_in_hugging_face_layout(demo):
    out, _ = demo
    for name in ["base", *TASKS]:
        folder = out / "checkpoints" / name
        labels = json.loads((folder / "config.json").read_text())["num_labels"]
        assert labels == (2 if name in {"parity", "above-four"} else 10)
        with safe_open(folder / "model.safetensors", framework="pt") as weights:
            assert weights.get_slice("head.weight").get_shape() == [labels, 96]


def test_an_earlier_demo_is_written_over_and_anything_else_is_not(demo, tmp_path):
    out, report = demo
    again = run_demo(out, recipe=SHORT)
    assert again.scores == report.scores
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(tallstore.TallstoreError, match="is there already"):
        run_demo(tmp_path, recipe=SHORT)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("width", [40, 50, 80, 200])
def test_tables_read_well_at_any_width(width, tmp_path):
    score = TaskScore("above-four", 0.9822, 0.98, 0.9956, 0.912)
    report = DemoReport((score,) * 6, tmp_path, 1_200_000, 7_200_000, 1_700_000, 56_000, {})
    console = Console(width=width, record=True)
    console.print(report.scores_table(), report.sizes_table())
    text = console.export_text()
    assert ("above-four" in text) == (width >= 50)  # below, a name is folded
    assert "99.6%" in text
    assert "0.912" in text
    assert "56.0 kB" in text
    assert "1/21 of a" in text
    assert all(len(line) <= width for line in text.splitlines())


def test_commands_to_try_can_be_called_without_activating_the_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / ".venv" / "bin"))
    assert _program() == f"{sys.executable} -m tallstore"
    script = tmp_path / ".venv" / "bin" / "tallstore"
    script.parent.mkdir(parents=True)
    script.touch(mode=0o755)
    assert _program() == "tallstore"
    monkeypatch.setenv("PATH", "")
    assert _program() == ".venv/bin/tallstore"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert _program() == str(script)


def test_the_commands_to_try_run_as_they_are_printed_twice(demo):
    _, report = demo
    for _ in range(2):  # the second time, what the first one exported is there
        commands = commands_to_try(report)
        assert len(commands) == 3
        for command in commands:
            run = subprocess.run(  # noqa: S602 - as people type it
                command,
                shell=True,
                check=False,
                capture_output=True,
                text=True,
                env={**os.environ, "COLUMNS": "80", "PYTHONPATH": str(ROOT)},
            )
            assert run.returncode == 0, f"{command}: {run.stderr}"
            assert run.stderr == ""
    exported = load_file(report.bundle.parent / "parity" / "model.safetensors")
    with tallstore.open_bundle(report.bundle) as bundle:
        assert all(torch.equal(weight, exported[name]) for name, weight in bundle.items("parity"))


@pytest.mark.slow
def test_the_whole_demo_as_people_run_it(tmp_path):
    console = Console(width=100, record=True)
    out = tmp_path / "with a space"
    start = time.process_time()
    report = main(out, console=console, progress=Console(quiet=True))
    assert time.process_time() - start < 60  # of all threads together: two cores that nobody else uses take less
    text = console.export_text()
    for score in report.scores:
        assert score.trained > 0.85
        assert score.agreement > 0.95
        assert abs(score.trained - score.bundled) < 0.03
        shares = (f"{share:.1%}" for share in (score.trained, score.bundled, score.agreement))
        assert [score.name, *shares, f"{score.cosine:.3f}"] in [line.split() for line in text.splitlines()]
    assert f"{report.ratio:.1f} times smaller" in text
    assert list(commands_to_try(report)) == [line[2:] for line in text.splitlines()[-3:]]
    assert out / "bundle" == report.bundle
    assert tallstore.verify(report.bundle) == []
