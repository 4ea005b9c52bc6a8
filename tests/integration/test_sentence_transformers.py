"""sentence-transformers itself: exports that it loads, and a loaded model that takes one expert after the other."""

from __future__ import annotations

import importlib

import pytest
import torch
import transformers

import tallstore
from tallstore.exporting import export
from tests.transformers_models import SENTENCES, TASKS, Family, bert, go_offline, tuned, words

sentence_transformers = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
FAMILY = Family(
    lambda: transformers.BertModel(bert()), lambda _task: transformers.BertModel(bert()), transformers.AutoModel
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its own names move


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    go_offline(monkeypatch)


def save(encoder, directory, scratch):
    """As a SentenceTransformer of three modules, by its own hand."""
    encoder.save_pretrained(scratch)
    words(scratch)
    modules = importlib.import_module("sentence_transformers.models")
    parts = [
        modules.Transformer(str(scratch), max_seq_length=40),
        modules.Pooling(64, pooling_mode="cls"),
        modules.Normalize(),
    ]
    sentence_transformers.SentenceTransformer(modules=parts, prompts={"query": "find: "}, device="cpu").save(
        str(directory)
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A base, three fine-tunes, their bundle."""
    root = tmp_path_factory.mktemp("sentences")
    torch.manual_seed(1)
    base = FAMILY.base()
    save(base, root / "base", root / "encoder-of-base")
    for task in TASKS:
        save(tuned(FAMILY, task, base, torch.float32), root / task, root / f"encoder-of-{task}")
    tallstore.pack(root / "base", {task: root / task for task in TASKS}, root / "bundle")
    return root


def embeddings(model):
    return model.encode(SENTENCES, prompt_name="query", convert_to_tensor=True)


def test_an_export_is_a_sentence_transformer(root, tmp_path):
    with tallstore.open_bundle(root / "bundle", base=root / "base") as bundle:
        export(bundle, "two", tmp_path / "two")
        state = bundle.state_dict("two")
    found = sentence_transformers.SentenceTransformer(str(tmp_path / "two"), device="cpu")
    expected = sentence_transformers.SentenceTransformer(str(root / "two"), device="cpu")
    assert [type(module) for module in found] == [type(module) for module in expected]
    assert (found.max_seq_length, found.prompts) == (expected.max_seq_length, expected.prompts)
    assert found[1].get_config_dict() == expected[1].get_config_dict()
    assert not torch.equal(embeddings(found), embeddings(expected))  # a reconstruction
    expected[0].auto_model.load_state_dict(state)
    assert torch.equal(embeddings(found), embeddings(expected))


def test_a_loaded_one_takes_one_expert_after_the_other(root, tmp_path):
    with tallstore.open_bundle(root / "bundle", base=root / "base") as bundle:
        expected = {}
        for task in TASKS:
            export(bundle, task, tmp_path / task)
            expected[task] = embeddings(sentence_transformers.SentenceTransformer(str(tmp_path / task), device="cpu"))
        model = sentence_transformers.SentenceTransformer(str(root / "base"), device="cpu")
        base = embeddings(model)
        switcher = bundle.attach(model[0].auto_model)
        for task in (*TASKS, TASKS[0]):
            switcher.set_expert(task)
            assert torch.equal(embeddings(model), expected[task])
        with switcher.disable_expert():
            assert torch.equal(embeddings(model), base)
        bundle.load_into(model[0].auto_model, "three")
        assert torch.equal(embeddings(model), expected["three"])
