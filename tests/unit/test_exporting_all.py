"""Exports of every task: all or nothing at the start, one whole directory after the other, progress over all."""

from __future__ import annotations

import shutil

import pytest
from safetensors.torch import load_file

import tallstore
from tallstore.errors import BaseMissingError, NotFetchedError, OutputExistsError, OutputInsideInputError
from tallstore.exporting import export, export_all
from tests.model_directories import pack_models, save_models

TASKS = ("task1", "task2", "task3")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = save_models(tmp_path_factory.mktemp("models"))
    pack_models(root, root / "bundle")
    return root


@pytest.fixture
def bundle(models):
    with tallstore.open_bundle(models / "bundle", base=models / "base") as opened:
        yield opened


def test_every_task_is_written_as_it_would_be_alone(bundle, tmp_path):
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "notes.md").write_text("kept")
    done = export_all(bundle, tmp_path / "all")
    assert [each.task for each in done] == list(TASKS)
    for each in done:
        alone = export(bundle, each.task, tmp_path / "alone", overwrite=True)
        assert each.path == tmp_path / "all" / each.task
        assert (each.tensors, each.nbytes, each.weights, each.companions) == (
            *(alone.tensors, alone.nbytes),
            *(alone.weights, alone.companions),
        )
        names = sorted(path.relative_to(alone.path) for path in alone.path.rglob("*") if path.is_file())
        assert [(each.path / name).read_bytes() for name in names] == [
            (alone.path / name).read_bytes() for name in names
        ]
    assert {path.name for path in (tmp_path / "all").iterdir()} == {*TASKS, "notes.md"}


def test_directories_have_the_names_of_slugs(models, tmp_path):
    experts = {"Ein Name / mit Zeichen": models / "task1", "日本語": models / "task2"}
    tallstore.pack(models / "base", experts, tmp_path / "bundle")
    with tallstore.open_bundle(tmp_path / "bundle", base=models / "base") as bundle:
        done = export_all(bundle, tmp_path / "out")
        slugs = [entry.slug for entry in bundle.manifest.tasks]
    assert [each.task for each in done] == list(experts)
    assert [each.path for each in done] == [tmp_path / "out" / slug for slug in slugs]


def test_progress_is_over_all(bundle, tmp_path):
    calls = []
    export_all(bundle, tmp_path / "out", progress=lambda done, total: calls.append((done, total)))
    total = sum(tensor.nbytes for task in bundle.tasks for tensor in bundle.state_dict(task).values())
    assert calls[0] == (0, total)
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)


def test_nothing_is_written_unless_all_tasks_are_here(models, tmp_path):
    part = shutil.copytree(models / "bundle", tmp_path / "part")
    shutil.rmtree(part / "tasks" / "task1")
    shutil.rmtree(part / "tasks" / "task3")
    with (
        tallstore.open_bundle(part, base=models / "base") as bundle,
        pytest.raises(NotFetchedError, match=r"part: 2 of 3 tasks were not fetched \(task1, task3\); fetch them, or"),
    ):
        export_all(bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_unless_all_directories_are_free(bundle, models, tmp_path):
    export(bundle, "task3", tmp_path / "task3")
    before = (tmp_path / "task3" / "model.safetensors").stat()
    with pytest.raises(OutputExistsError, match="task3: is there already"):
        export_all(bundle, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["task3"]
    (tmp_path / "task2").mkdir()
    (tmp_path / "task2" / "thesis.tex").write_text("precious")
    with pytest.raises(OutputExistsError, match=r"task2: holds what no export wrote \(thesis.tex\)"):
        export_all(bundle, tmp_path, overwrite=True)
    assert (tmp_path / "task3" / "model.safetensors").stat() == before
    for inside in (models / "bundle", models / "base"):
        with pytest.raises(OutputInsideInputError):
            export_all(bundle, inside, inputs=[models / "base"])


def test_no_base_leaves_nothing_behind(models, tmp_path):
    with tallstore.open_bundle(models / "bundle") as bundle, pytest.raises(BaseMissingError):
        export_all(bundle, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_those_that_were_finished(bundle, tmp_path):
    size = sum(tensor.nbytes for tensor in bundle.state_dict("task1").values())

    def interrupt(done, _total):
        if done > 1.5 * size:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_all(bundle, tmp_path / "out", progress=interrupt)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["task1"]
    assert load_file(tmp_path / "out" / "task1" / "model.safetensors").keys() == bundle.state_dict("task1").keys()
