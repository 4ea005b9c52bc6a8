"""Companion files: which of a directory's files are carried, which stay behind, and what is said about those."""

from __future__ import annotations

import fnmatch
import json
import os
import pickle
import tracemalloc

import pytest
import torch
from safetensors.torch import save_file

import tallstore
from tallstore import DamagedCheckpointError
from tallstore.checkpoints.companion_names import DOWNLOAD_PATTERNS, is_companion
from tallstore.exporting import export
from tallstore.packing.companions import MAX_NBYTES, companions, look_through
from tests.packing_cases import base_model, experts_of

DIRECTORIES = {
    "bert": "config.json tokenizer.json tokenizer_config.json special_tokens_map.json vocab.txt LICENSE",
    "llama": "config.json generation_config.json tokenizer.model tokenizer.json LICENSE.txt USE_POLICY.md",
    "whisper": "preprocessor_config.json normalizer.json added_tokens.json vocab.json merges.txt",
    "clip": "config.json preprocessor_config.json processor_config.json vocab.json merges.txt",
    "camembert": "sentencepiece.bpe.model",
    "marian": "source.spm target.spm vocab.json target_vocab.json",
    "qwen": "qwen.tiktoken chat_template.json chat_template.jinja video_preprocessor_config.json NOTICE",
    "mistral": "tekken.json tiktoken.model params.json",
    "bertweet": "vocab.txt bpe.codes",
    "fairseq": "dict.txt vocab-src.json vocab-tgt.json vocab.bpe spm.vocab",
    "prophetnet": "prophetnet.tokenizer",
    "classifier": "labels.txt classes.json id2label.json TASKS.TXT",
    "licences": "LICENSE-MODEL MODEL_LICENSE LICENCE.md license.rst Notice THIRD_PARTY_NOTICES.txt COPYING",
    "sentence-transformers": "modules.json config_sentence_transformers.json sentence_bert_config.json",
}
LEFT = {
    "weights": "model.safetensors model-00001-of-00002.safetensors pytorch_model.bin tf_model.h5 flax_model.msgpack"
    " rust_model.ot model.onnx ggml-model.gguf consolidated.00.pth weights.npz",
    "indices": "model.safetensors.index.json pytorch_model.bin.index.json model.safetensors.index.fp16.json"
    " tf_model.h5.index.json",
    "code": "modeling_own.py LICENSE.py train.sh notebook.ipynb NOTICE.so license-check.js",
    "training": "optimizer.pt scheduler.pt rng_state.pth training_args.bin trainer_state.json all_results.json"
    " train_results.json eval_results_mnli-mm.json predict_results_mnli.txt eval_nbest_predictions.json"
    " events.out.tfevents.1 trainer_log.jsonl",
    "data": "train.csv train.parquet dev.tsv",
    "others": "README.md .gitattributes .hidden.json hyperparams.yaml notes.rst",
}


def write(directory, *names, content="x"):
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(content)


def modules(directory, *paths, kind="sentence_transformers.models.Pooling"):
    entries = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, path in enumerate(paths)]
    (directory / "modules.json").write_text(json.dumps(entries))


def test_of_names_that_are_one_where_case_does_not_count_the_first_is_carried(tmp_path):
    write(tmp_path, "config.json", "LABELS.TXT", "labels.txt", content="[]")
    assert set(companions(tmp_path)) == {"config.json", "LABELS.TXT"}
    (line,) = look_through({"task": tmp_path})
    assert line == (
        "expert 'task': left out 'labels.txt': where case does not count, it cannot lie beside 'LABELS.TXT'; rename it"
    )


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", DIRECTORIES.values(), ids=DIRECTORIES)
def test_what_makes_weights_a_model_is_carried(tmp_path, names):
    write(tmp_path, *names.split(), content="[]")
    assert companions(tmp_path) == {name: tmp_path / name for name in names.split()}
    assert look_through({"task": tmp_path}) == ()


@pytest.mark.parametrize("names", LEFT.values(), ids=LEFT)
def test_anything_else_stays_behind_in_silence(tmp_path, names):
    write(tmp_path, *names.split())
    assert companions(tmp_path) == {}
    assert look_through({"task": tmp_path}) == ()


@pytest.mark.parametrize("names", DIRECTORIES.values(), ids=DIRECTORIES)
def test_what_is_carried_is_downloaded_from_the_hub(names):
    capitals_as_usual = [name for name in names.split() if name not in {"Notice", "license.rst", "TASKS.TXT"}]
    for name in capitals_as_usual:
        assert any(fnmatch.fnmatchcase(name, pattern) for pattern in DOWNLOAD_PATTERNS), name


@pytest.mark.parametrize("name", ["x/model.safetensors.index.json", "a/b/modeling.py", "LICENSE/run.bin", "json", ""])
def test_folders_do_not_change_what_a_name_is(name):
    assert not is_companion(name)


def test_no_directory_has_no_companions():
    assert companions(None) == {}
    assert look_through({"task": None}) == ()


# --- folders ----------------------------------------------------------------------------------------------------------


def test_folders_of_the_model_are_carried(tmp_path):
    carried = [
        "config.json",
        "modules.json",
        "1_Pooling/config.json",
        "2_Asym/config.json",
        "2_Asym/query_Dense/config.json",
        "additional_chat_templates/rag.jinja",
        "qformer_tokenizer/vocab.txt",
        "tokenizer/tokenizer.json",
    ]
    write(
        tmp_path,
        *carried,
        "1_Pooling/pooling.py",
        "1_Pooling/.cache.json",
        "1_Pooling/.git/x.json",
        "1_Pooling/a/b/c.json",
    )
    modules(tmp_path, "", "1_Pooling", "2_Asym", "3_Normalize")
    assert sorted(companions(tmp_path)) == sorted(carried)
    assert look_through({"task": tmp_path}) == ()


@pytest.mark.parametrize("folder", ["checkpoint-500", "runs", "onnx", "openvino", "eval", "original", "1_Pooling"])
def test_other_folders_are_not(tmp_path, folder):
    write(tmp_path, "config.json", f"{folder}/config.json", f"{folder}/vocab.txt")
    assert list(companions(tmp_path)) == ["config.json"]


@pytest.mark.parametrize("path", ["..", "../other", "/etc", "a/../..", ".", "*", ".git", None, 7, ["x"]])
def test_no_folder_leads_out_of_the_directory(tmp_path, path):
    expert = tmp_path / "expert"
    write(tmp_path, "config.json", "other/config.json", "expert/x/config.json", "expert/.git/config.json")
    modules(expert, path)
    assert list(companions(expert)) == ["modules.json"]


@pytest.mark.parametrize("text", ["", "{", "[1, null]", "[" * 100_000, '{"path": "x"}', "\xff"])
def test_a_modules_file_of_another_kind_names_no_folder(tmp_path, text):
    write(tmp_path, "x/config.json")
    (tmp_path / "modules.json").write_text(text, encoding="latin-1")
    assert list(companions(tmp_path)) == ["modules.json"]
    assert look_through({"task": tmp_path}) == ()


@pytest.mark.skipif(os.name != "posix", reason="links and pipes are made as POSIX has them")
def test_links_are_followed_and_pipes_are_not_waited_for(tmp_path):
    """The Hub's cache has links to blobs without a suffix."""
    write(tmp_path, "blobs/0a1b", content="{}")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "config.json").symlink_to("../blobs/0a1b")
    (tmp_path / "snapshot" / "gone.json").symlink_to("../blobs/nothing")
    os.mkfifo(tmp_path / "snapshot" / "pipe.json")
    found = companions(tmp_path / "snapshot")
    assert {name: path.read_text() for name, path in found.items()} == {"config.json": "{}"}


# --- contents ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenizer.model", "labels.txt", "vocab.json", "LICENSE"])
@pytest.mark.parametrize("kind", [*range(2, pickle.HIGHEST_PROTOCOL + 1), "torch"])
def test_pickles_are_told_by_their_content(tmp_path, name, kind):
    if kind == "torch":
        torch.save({"w": torch.ones(2)}, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps({"w": [1]}, protocol=kind))
    assert companions(tmp_path) == {}
    (line,) = look_through({"task": tmp_path})
    assert line == f"expert 'task': left out {name!r}: it is a pickle or an archive by its content"


def test_a_pointer_of_git_lfs_is_refused_before_any_work(tmp_path):
    base = base_model()
    save_file(base, tmp_path / "base.safetensors")
    for task, state in experts_of(base).items():
        (tmp_path / task).mkdir()
        save_file(state, tmp_path / task / "model.safetensors")
    write(
        tmp_path / "b", "tokenizer.model", content="version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )
    calls = []
    with pytest.raises(DamagedCheckpointError, match=r"tokenizer\.model: is a Git LFS pointer.*`git lfs pull`"):
        tallstore.pack(
            base, {task: tmp_path / task for task in "abc"}, tmp_path / "out", progress=lambda *done: calls.append(done)
        )
    assert calls == []
    assert not (tmp_path / "out").exists()


def test_a_data_set_is_left_out(tmp_path):
    for name, nbytes in (("tokenizer.json", MAX_NBYTES), ("train.json", MAX_NBYTES + 1)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(nbytes)  # takes no room
    assert list(companions(tmp_path)) == ["tokenizer.json"]
    assert look_through({"task": tmp_path}) == ("expert 'task': left out 'train.json': it is larger than 1.0 GB",)


@pytest.mark.parametrize("name", ["label map.txt", "étiquettes.json", "nul.txt", f"{'x' * 130}.txt"])
def test_names_that_no_bundle_holds_are_said(tmp_path, name):
    write(tmp_path, name)
    assert companions(tmp_path) == {}
    (line,) = look_through({"task": tmp_path})
    assert line.startswith(f"expert 'task': left out {name!r}: ")
    assert line.endswith("; rename it")


# --- what a bundle does not carry -------------------------------------------------------------------------------------


def config_with(directory, name, auto_map):
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(json.dumps({"auto_map": auto_map}))


@pytest.mark.parametrize(
    ("name", "auto_map", "files"),
    [
        ("config.json", {"AutoModel": "own_model.Own", "AutoConfig": "own.Own"}, "own.py, own_model.py"),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_own.Own", None]}, "tokenization_own.py"),
        ("preprocessor_config.json", {"AutoImageProcessor": "images.Own"}, "images.py"),
    ],
)
def test_code_that_a_model_needs_is_named(tmp_path, name, auto_map, files):
    config_with(tmp_path, name, auto_map)
    (line,) = look_through({"spam": tmp_path})
    assert line == (
        f"expert 'spam': a bundle carries no code, and the model needs {files}; copy it into each export, and load with"
        " trust_remote_code=True"
    )


@pytest.mark.parametrize(
    "auto_map", [{"AutoModel": "org/name--modeling.Own"}, {}, None, "x", {"AutoModel": 7}, {"a": "../b"}]
)
def test_code_of_another_repository_is_not_missing(tmp_path, auto_map):
    config_with(tmp_path, "config.json", auto_map)
    assert look_through({"spam": tmp_path}) == ()


def test_code_of_modules_is_named(tmp_path):
    write(tmp_path, "custom_st.py")
    modules(tmp_path, "", kind="custom_st.Transformer")
    (line,) = look_through({"spam": tmp_path})
    assert "needs custom_st.py;" in line


def test_experts_with_one_problem_share_a_line(tmp_path):
    for task in "abcde":
        config_with(tmp_path / task, "config.json", {"AutoModel": "modeling_own.Own"})
    (line,) = look_through({task: tmp_path / task for task in "abcde"} | {"f": None})
    assert line.startswith("experts 'a', 'b', 'c' and 2 more: ")


@pytest.mark.parametrize(
    ("kind", "held"),
    [
        ("sentence_transformers.models.Dense", ["2_Dense/model.safetensors"]),
        ("own.Layer", ["2_Dense/inner/pytorch_model.bin"]),
        ("sentence_transformers.models.Dense", []),
    ],
)
def test_weights_of_modules_are_warned_of(tmp_path, kind, held):
    """Those of a model on the Hub are not downloaded: a Dense counts though its weights are not there."""
    base = base_model()
    experts = experts_of(base)
    for task, state in experts.items():
        (tmp_path / task).mkdir()
        save_file(state, tmp_path / task / "model.safetensors")
    write(tmp_path / "a", "2_Dense/config.json", *held)
    modules(tmp_path / "a", "", "2_Dense", kind=kind)
    with pytest.warns(UserWarning, match=r"expert 'a': .* weights of the module '2_Dense'; copy") as caught:
        report = tallstore.pack(base, {task: tmp_path / task for task in experts}, tmp_path / "bundle")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert report.advice == ()


def test_advice_is_in_the_report(tmp_path):
    base = base_model()
    experts = dict(experts_of(base))
    (tmp_path / "a").mkdir()
    save_file(experts["a"], tmp_path / "a" / "model.safetensors")
    config_with(tmp_path / "a", "config.json", {"AutoModel": "modeling_own.Own"})
    experts["a"] = tmp_path / "a"
    for options in ({"dry_run": True}, {}):
        report = tallstore.pack(base, experts, tmp_path / "bundle", **options)
        assert [line for line in report.advice if "modeling_own.py" in line]
        assert "modeling_own.py" in str(report)


# --- in a bundle, and out of it ---------------------------------------------------------------------------------------


def test_each_content_is_stored_once_however_many_tasks(tmp_path):
    base = base_model()
    experts = experts_of(base, 6)
    shared = {"tokenizer.json": "[1]" * 1000, "vocab.txt": "a\nb\n", "1_Pooling/config.json": "{}", "same.json": "{}"}
    for task, state in experts.items():
        (tmp_path / task).mkdir()
        save_file(state, tmp_path / task / "model.safetensors")
        for name, text in shared.items():
            write(tmp_path / task, name, content=text)
        modules(tmp_path / task, "", "1_Pooling")
        write(tmp_path / task, "labels.txt", content=task)
    bundle = tmp_path / "bundle"
    tallstore.pack(base, {task: tmp_path / task for task in experts}, bundle)
    stored = {path.name: path.read_bytes() for path in (bundle / "files").iterdir()}
    assert len(stored) == 4 + len(experts)  # "{}" is two files and one content; each task has its labels
    assert len(set(stored.values())) == len(stored)
    assert tallstore.verify(bundle) == []
    with tallstore.open_bundle(bundle, base=base) as opened:
        for task in experts:
            done = export(opened, task, tmp_path / "out" / task)
            assert set(done.companions) == {*shared, "modules.json", "labels.txt"}
            for name in done.companions:
                assert (tmp_path / "out" / task / name).read_bytes() == (tmp_path / task / name).read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_nothing_executable_comes_out(tmp_path):
    base = base_model()
    experts = dict(experts_of(base))
    (tmp_path / "a").mkdir()
    save_file(experts["a"], tmp_path / "a" / "model.safetensors")
    write(tmp_path / "a", "labels.txt", content="#!/bin/sh\nexit 1\n")
    (tmp_path / "a" / "labels.txt").chmod(0o777)
    tallstore.pack(base, experts | {"a": tmp_path / "a"}, tmp_path / "bundle")
    with tallstore.open_bundle(tmp_path / "bundle", base=base) as opened:
        export(opened, "a", tmp_path / "out")
    for path in [*(tmp_path / "bundle").rglob("*"), *(tmp_path / "out").rglob("*")]:
        assert path.is_dir() or path.stat().st_mode & 0o111 == 0, path


def test_a_bundle_brings_no_pickles(tmp_path, monkeypatch):
    base = base_model()
    experts = dict(experts_of(base))
    (tmp_path / "a").mkdir()
    save_file(experts["a"], tmp_path / "a" / "model.safetensors")
    write(tmp_path / "a", "config.json", content="{}")
    (tmp_path / "a" / "tokenizer.model").write_bytes(pickle.dumps({"w": [1]}))
    with monkeypatch.context() as careless:
        careless.setattr("tallstore.packing.companions.is_pickle", lambda _path: False)
        tallstore.pack(base, experts | {"a": tmp_path / "a"}, tmp_path / "bundle")
    assert len(list((tmp_path / "bundle" / "files").iterdir())) == 2
    with (
        tallstore.open_bundle(tmp_path / "bundle", base=base) as opened,
        pytest.warns(UserWarning, match="left out the companion file 'tokenizer.model': it is a pickle"),
    ):
        done = export(opened, "a", tmp_path / "out")
    assert done.companions == ("config.json",)
    assert not (tmp_path / "out" / "tokenizer.model").exists()


def test_large_tokenizers_are_streamed(tmp_path):
    base = base_model()
    experts = dict(experts_of(base))
    for task in "ab":
        (tmp_path / task).mkdir()
        save_file(experts[task], tmp_path / task / "model.safetensors")
        with (tmp_path / task / "tokenizer.json").open("wb") as file:
            file.truncate(32 << 20)
        experts[task] = tmp_path / task
    tallstore.pack(base, experts, tmp_path / "warm", dry_run=True)
    tracemalloc.start()
    try:
        tallstore.pack(base, experts, tmp_path / "bundle")
        with tallstore.open_bundle(tmp_path / "bundle", base=base) as opened:
            export(opened, "a", tmp_path / "out")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out" / "tokenizer.json").stat().st_size == 32 << 20
    assert peak < 8 << 20
