"""What `export` writes, read by transformers itself: the same tensors, the same outputs, the same token ids."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

import tallstore
from tallstore.cli.app import main
from tallstore.exporting import export
from tallstore.transformers import from_bundle, tokenizer_from_bundle
from tests.reference import same_bits
from tests.transformers_models import (
    DTYPES,
    FAMILIES,
    NAMED,
    SENTENCES,
    TASKS,
    Family,
    assert_same_outputs,
    bert,
    each,
    go_offline,
    pack,
    save,
    tuned,
)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    go_offline(monkeypatch)


@pytest.fixture(scope="module")
def packed(request, tmp_path_factory):
    name, dtype = request.param
    return pack(FAMILIES[name], DTYPES[dtype], tmp_path_factory.mktemp(f"{name}-{dtype}"))


def load(auto_class, directory):
    """A model that transformers found nothing to complain about."""
    model, info = auto_class.from_pretrained(directory, output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    return model.eval()


def assert_same_weights(model, state, scratch, *, without=frozenset()):
    """Every tensor of *state* is the model's, bit for bit.

    It has no others, but those tied to one, and the tensors *without* which it was loaded.
    """
    found = model.state_dict()
    if not state.keys() <= found.keys():  # transformers renames some tensors (ViT's) between files and modules
        model.save_pretrained(scratch / "saved")
        found = load_file(scratch / "saved" / "model.safetensors")
    for name, tensor in state.items():
        assert same_bits(found[name], tensor), name
    known = {found[name].data_ptr() for name in state}
    assert {name for name, tensor in found.items() if tensor.data_ptr() not in known} == set(without)


# --- each family ------------------------------------------------------------------------------------------------------


@each(*FAMILIES, dtypes=DTYPES)
@torch.inference_mode()
def test_the_model_is_the_one_that_the_state_dict_gives(packed, tmp_path):
    """Loaded from an export, and built from the config and the reconstructed state dict: no bit differs."""
    batch = packed.family.batch(packed.dtype)
    with packed.open() as bundle:
        for task in TASKS:
            out = tmp_path / task
            export(bundle, task, out)
            with safe_open(out / "model.safetensors", "pt") as file:
                assert file.metadata() == {"format": "pt"}
            state = bundle.state_dict(task)
            loaded = load(packed.family.auto_class, out)
            assert loaded.dtype == packed.dtype
            assert_same_weights(loaded, state, tmp_path)
            built = type(loaded).from_pretrained(None, config=loaded.config, state_dict=state, dtype=packed.dtype)
            assert_same_outputs(loaded(**batch), built.eval()(**batch))
            if packed.family.names_are_the_modules:
                plain = packed.family.auto_class.from_config(loaded.config, dtype=packed.dtype)
                assert plain.load_state_dict(state, strict=False).unexpected_keys == []
                assert_same_outputs(loaded(**batch), plain.eval()(**batch))
            original = packed.family.auto_class.from_pretrained(packed.root / task).eval()
            assert not torch.equal(loaded(**batch)[0], original(**batch)[0])  # a reconstruction, no copy


@each(*FAMILIES)
@torch.inference_mode()
def test_auto_model_takes_the_model_without_its_head(packed, tmp_path):
    with packed.open() as bundle:
        export(bundle, "two", tmp_path / "two")
    whole = packed.family.auto_class.from_pretrained(tmp_path / "two").eval()
    body, info = transformers.AutoModel.from_pretrained(tmp_path / "two", output_loading_info=True)
    assert not info["mismatched_keys"]
    assert all("pooler" in name for name in info["missing_keys"])  # which some heads do without
    batch = packed.family.batch(packed.dtype)
    hidden = whole.base_model(**batch).last_hidden_state
    assert torch.equal(body.eval()(**batch).last_hidden_state, hidden)


@each(*FAMILIES)
def test_companions_are_the_experts_own_files(packed, tmp_path):
    with packed.open() as bundle:
        for task in TASKS:
            done = export(bundle, task, tmp_path / task)
            beside = {path.name for path in (packed.root / task).iterdir()} - {"model.safetensors"}
            assert set(done.companions) == beside >= {"config.json"}
            for name in beside:
                written = tmp_path / task / name
                assert written.read_bytes() == (packed.root / task / name).read_bytes()
                assert written.stat().st_mode & 0o111 == 0


@each("bert-classifier", "llama")
def test_tokenizers_give_the_same_ids(packed, tmp_path):
    with packed.open() as bundle:
        for task in TASKS:
            export(bundle, task, tmp_path / task)
            original = transformers.AutoTokenizer.from_pretrained(packed.root / task)
            loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / task)
            assert loaded(SENTENCES, padding=True) == original(SENTENCES, padding=True)
            assert len({tuple(ids) for ids in loaded(SENTENCES)["input_ids"]}) == len(SENTENCES)
            assert loaded.chat_template == original.chat_template
            if loaded.chat_template is not None:
                assert loaded.apply_chat_template([{"role": "user", "content": "fox"}], tokenize=False) == "<s>fox</s>"


@each("vit")
def test_image_processors_give_the_same_pixels(packed, tmp_path):
    with packed.open() as bundle:
        export(bundle, "one", tmp_path / "one")
    image = (torch.arange(20 * 24 * 3).reshape(20, 24, 3) % 251).to(torch.uint8).numpy()
    pixels = [
        transformers.AutoImageProcessor.from_pretrained(directory)(image, return_tensors="pt")
        for directory in (packed.root / "one", tmp_path / "one")
    ]
    assert pixels[0]["pixel_values"].shape == (1, 3, 16, 16)
    assert torch.equal(pixels[0]["pixel_values"], pixels[1]["pixel_values"])


@each("bert-classifier", "vit")
def test_label_names_survive(packed, tmp_path):
    with packed.open() as bundle:
        for task in TASKS:
            export(bundle, task, tmp_path / task)
            config = transformers.AutoConfig.from_pretrained(tmp_path / task)
            assert config.id2label == dict(enumerate(NAMED[task]))
            assert config.label2id == {name: number for number, name in enumerate(NAMED[task])}


@each("bert-tied", dtypes=DTYPES)
def test_shards_load_too(packed, tmp_path):
    with packed.open() as bundle:
        done = export(bundle, "three", tmp_path / "three", max_shard_nbytes=100_000)
        assert len(done.weights) > 2
        model = load(packed.family.auto_class, tmp_path / "three")
        assert_same_weights(model, bundle.state_dict("three"), tmp_path)


@each("bert-tied")
def test_ties_of_a_state_dict_load_under_all_their_names(packed, tmp_path):
    """Experts as they are in memory, where a tied tensor has all its names."""
    experts = {task: packed.family.auto_class.from_pretrained(packed.root / task).state_dict() for task in TASKS}
    base = packed.family.auto_class.from_pretrained(packed.base).state_dict()
    tallstore.pack(base, experts, tmp_path / "bundle")
    with tallstore.open_bundle(tmp_path / "bundle", base=base) as bundle:
        export(bundle, "one", tmp_path / "one")
        state = bundle.state_dict("one")
    shutil.copy(packed.root / "one" / "config.json", tmp_path / "one")  # a state dict comes without
    model = load(packed.family.auto_class, tmp_path / "one")
    own = model.state_dict()
    assert own.keys() == state.keys()
    assert all(same_bits(own[name], tensor) for name, tensor in state.items())
    assert torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)


@each("llama", dtypes=["bfloat16"])
def test_the_command_line_writes_what_the_library_writes(packed, tmp_path):
    arguments = ["export", packed.root / "bundle", "one", "--base", packed.base, "--out", tmp_path / "command"]
    assert main([str(argument) for argument in arguments]) == 0
    with packed.open() as bundle:
        export(bundle, "one", tmp_path / "library")
        model = load(packed.family.auto_class, tmp_path / "command")
        assert_same_weights(model, bundle.state_dict("one"), tmp_path)
    written = {
        out: {path.name: path.read_bytes() for path in (tmp_path / out).iterdir()} for out in ("command", "library")
    }
    assert written["command"] == written["library"]
    assert "generation_config.json" in written["command"]


# --- sentence-transformers --------------------------------------------------------------------------------------------


def test_a_sentence_transformer_keeps_its_layout(tmp_path):
    """The encoder at the top, a folder a module, and what a training run left there, which stays behind."""
    torch.manual_seed(1)
    base = transformers.BertModel(bert())
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    beside = {
        "modules.json": modules,
        "config_sentence_transformers.json": {"prompts": {"query": "query: "}, "similarity_fn_name": "cosine"},
        "sentence_bert_config.json": {"max_seq_length": 48, "do_lower_case": False},
        "1_Pooling/config.json": {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True},
    }
    left = {"checkpoint-500/config.json": {}, "eval/similarity_results.json": {}, "onnx/config.json": {}}
    family = Family(None, lambda _task: transformers.BertModel(bert()), transformers.AutoModel)
    save(family, base, tmp_path / "base")
    for task in TASKS:
        save(family, tuned(family, task, base, torch.float32), tmp_path / task)
        for name, content in (beside | left).items():
            (tmp_path / task / name).parent.mkdir(exist_ok=True)
            (tmp_path / task / name).write_text(json.dumps(content))
    tallstore.pack(tmp_path / "base", {task: tmp_path / task for task in TASKS}, tmp_path / "bundle")
    with tallstore.open_bundle(tmp_path / "bundle", base=tmp_path / "base") as bundle:
        export(bundle, "two", tmp_path / "out")
        state = bundle.state_dict("two")
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    assert written == {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", *beside}
    for name, content in beside.items():
        assert json.loads((tmp_path / "out" / name).read_text()) == content

    model = load(transformers.AutoModel, tmp_path / "out")
    assert_same_weights(model, state, tmp_path)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(SENTENCES)["input_ids"]


# --- experts that somebody has ----------------------------------------------------------------------------------------

EXPERTS = os.environ.get("TALLSTORE_EXPERTS")


@pytest.mark.skipif(EXPERTS is None, reason="TALLSTORE_EXPERTS names no folder of base/ and fine-tunes of it")
def test_experts_from_elsewhere(tmp_path):
    """Hugging Face directories of encoders, base/ and fine-tunes of it: packed, exported, loaded, asked."""
    folder = Path(EXPERTS)
    experts = {path.parent.name: path.parent for path in sorted(folder.glob("*/config.json"))}
    base = experts.pop("base")
    assert len(experts) >= 2
    tallstore.pack(base, experts, tmp_path / "bundle")
    with tallstore.open_bundle(tmp_path / "bundle", base=base) as bundle:
        for task, source in experts.items():
            out = tmp_path / task
            done = export(bundle, task, out)
            assert {name: (out / name).read_bytes() for name in done.companions} == {
                name: (source / name).read_bytes() for name in done.companions
            }
            model, info = transformers.AutoModel.from_pretrained(out, output_loading_info=True)
            _, expected = transformers.AutoModel.from_pretrained(source, output_loading_info=True)
            assert info == expected  # an encoder may come without its pooler, and with a classifier
            state = bundle.state_dict(task)
            state = {name: tensor for name, tensor in state.items() if name not in info["unexpected_keys"]}
            assert_same_weights(model, state, out, without=info["missing_keys"])
            direct = from_bundle(bundle, task, transformers.AutoModel)
            built = transformers.AutoModel.from_config(model.config, dtype=model.dtype)
            assert set(built.load_state_dict(state, strict=False).missing_keys) == info["missing_keys"]
            tokenizer, original = (transformers.AutoTokenizer.from_pretrained(place) for place in (out, source))
            batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
            assert batch["input_ids"].tolist() == original(SENTENCES, padding=True)["input_ids"]
            with torch.inference_mode():
                found, made, got = (encoder.eval()(**batch).last_hidden_state for encoder in (model, built, direct))
            assert torch.equal(found, made)
            assert torch.equal(found, got)
            assert tokenizer_from_bundle(bundle, task)(SENTENCES) == original(SENTENCES)
            shutil.rmtree(out)
