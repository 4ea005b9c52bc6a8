"""Tokenizers and processors from a bundle: the ones that `from_pretrained` makes of the expert's own directory."""

from __future__ import annotations

import gc
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from tallstore.transformers import from_bundle, processor_from_bundle, tokenizer_from_bundle
from tests.transformers_models import (
    DTYPES,
    FAMILIES,
    LARGER_FAMILIES,
    NAMED,
    SENTENCES,
    TASKS,
    each,
    go_offline,
    pack,
)

ALL = FAMILIES | LARGER_FAMILIES
IMAGE = (np.arange(20 * 24 * 3).reshape(20, 24, 3) % 251).astype(np.uint8)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    go_offline(monkeypatch)


@pytest.fixture(scope="module")
def packed(request, tmp_path_factory):
    name, dtype = request.param
    return pack(ALL[name], DTYPES[dtype], tmp_path_factory.mktemp(f"{name}-{dtype}"))


@each("bert-classifier", "llama", "clip")
def test_tokenizers_give_the_same_ids(packed):
    for task in TASKS:
        expected = transformers.AutoTokenizer.from_pretrained(packed.root / task)
        found = tokenizer_from_bundle(packed.root / "bundle", task)  # needs no base
        assert type(found) is type(expected)
        assert found(SENTENCES, padding=True) == expected(SENTENCES, padding=True)
        assert len({tuple(row) for row in found(SENTENCES)["input_ids"]}) == len(SENTENCES)
        assert found.chat_template == expected.chat_template
        assert found.name_or_path == str(packed.root / "bundle")


@each("llama")
def test_a_tokenizer_goes_to_other_processes_and_into_files(packed, tmp_path):
    with packed.open() as bundle:
        found = tokenizer_from_bundle(bundle, "one")
    gc.collect()
    expected = found(SENTENCES)["input_ids"]
    assert pickle.loads(pickle.dumps(found))(SENTENCES)["input_ids"] == expected  # noqa: S301 - our own
    found.save_pretrained(tmp_path)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)(SENTENCES)["input_ids"] == expected


@each("llama")
def test_its_files_stay_as_long_as_the_tokenizer(packed, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = tokenizer_from_bundle(packed.root / "bundle", "one")
    (directory,) = tmp_path.iterdir()
    assert (directory / "tokenizer.json").is_file()
    assert not list(directory.glob("*.safetensors"))
    del found
    gc.collect()
    assert list(Path(tmp_path).iterdir()) == []


@each("vit")
def test_image_processors_give_the_same_pixels(packed):
    expected = transformers.AutoImageProcessor.from_pretrained(packed.root / "one")
    with packed.open() as bundle:
        found = processor_from_bundle(bundle, "one")
    pixels = [processor(IMAGE, return_tensors="pt")["pixel_values"] for processor in (found, expected)]
    assert pixels[0].shape == (1, 3, 16, 16)
    assert torch.equal(*pixels)


@each("clip")
@torch.inference_mode()
def test_a_processor_of_text_and_pictures(packed):
    expected = transformers.AutoProcessor.from_pretrained(packed.root / "two")
    with packed.open() as bundle:
        found, model = processor_from_bundle(bundle, "two"), from_bundle(bundle, "two")
    assert type(found) is type(expected) is transformers.CLIPProcessor
    batches = [
        processor(text=SENTENCES[:2], images=[IMAGE], padding=True, return_tensors="pt")
        for processor in (found, expected)
    ]
    assert batches[0].keys() == batches[1].keys() >= {"input_ids", "pixel_values"}
    assert all(torch.equal(value, batches[1][key]) for key, value in batches[0].items())
    assert model(**batches[0]).logits_per_image.shape == (1, 2)


@each("bert-classifier")
def test_the_processor_of_a_model_of_text_is_its_tokenizer(packed):
    with packed.open() as bundle:
        found = processor_from_bundle(bundle, "one")
    expected = transformers.AutoTokenizer.from_pretrained(packed.root / "one")
    assert found(SENTENCES)["input_ids"] == expected(SENTENCES)["input_ids"]


@each("bert-classifier")
def test_a_pipeline_takes_what_a_bundle_gives(packed):
    with packed.open() as bundle:
        for task in TASKS:
            model, tokenizer = from_bundle(bundle, task), tokenizer_from_bundle(bundle, task)
            classify = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)
            assert {answer["label"] for answer in classify(SENTENCES, top_k=None)[0]} == set(NAMED[task])
