"""What cannot become a model of transformers, and the one line that says so; and that nothing is ever run for it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers

import tallstore
from tallstore.errors import (
    BundleNotFoundError,
    CompanionError,
    IntegrityError,
    MissingExtraError,
    NotFetchedError,
    OptionError,
    UnknownTaskError,
)
from tallstore.transformers import from_bundle, processor_from_bundle, tokenizer_from_bundle
from tallstore.transformers.models import _entries
from tests.transformers_models import FAMILIES, TASKS, bert, go_offline, pack, save, tuned

ALL = (from_bundle, tokenizer_from_bundle, processor_from_bundle)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    go_offline(monkeypatch)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Classifiers of three, two and four labels."""
    return pack(FAMILIES["bert-classifier"], torch.float32, tmp_path_factory.mktemp("bert"))


@pytest.fixture
def bundle(packed):
    with packed.open() as opened:
        yield opened


def refusal(kind, function, *arguments, **options):
    """The one line of an error."""
    with pytest.raises(kind) as caught:
        function(*arguments, **options)
    assert type(caught.value) is kind
    (line,) = str(caught.value).splitlines()
    return line


def with_companions(packed, tmp_path, content, name="config.json", task="one"):
    """A bundle of the same experts, one of which has another such file."""
    for copied in TASKS:
        shutil.copytree(packed.root / copied, tmp_path / copied)
    if content is None:
        (tmp_path / task / name).unlink()
    else:
        (tmp_path / task / name).write_text(content if isinstance(content, str) else json.dumps(content))
    tallstore.pack(packed.base, {copied: tmp_path / copied for copied in TASKS}, tmp_path / "bundle")
    return tallstore.open_bundle(tmp_path / "bundle", base=packed.base)


def config_of(packed, task="one"):
    return json.loads((packed.root / task / "config.json").read_text())


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ALL)
def test_a_task_or_a_bundle_that_is_not_there(function, bundle, tmp_path):
    assert "did you mean 'one'?" in refusal(UnknownTaskError, function, bundle, "ones")
    assert str(tmp_path) in refusal(BundleNotFoundError, function, tmp_path, "one")


@pytest.mark.parametrize(
    ("auto_class", "told"),
    [
        ("BertForSequenceClasification", "did you mean 'BertForSequenceClassification'?"),
        ("qqqqqqqq", "give a class, or the name of one"),
        ("BertTokenizer", "give a model class of transformers"),
        ("pipeline", "give a model class of transformers"),
        (torch.nn.Linear, "give a model class of transformers"),
        (7, "auto_class is 7"),
        ("AutoModelForImageClassification", "auto_class is AutoModelForImageClassification: "),
    ],
)
def test_classes_that_are_none(auto_class, told, bundle):
    assert told in refusal(OptionError, from_bundle, bundle, "one", auto_class)


@pytest.mark.parametrize("dtype", ["float33", "int8", torch.int64, 4, "nn"])
def test_dtypes_that_are_none(dtype, bundle):
    assert f"dtype is {dtype!r}" in refusal(OptionError, from_bundle, bundle, "one", dtype=dtype)


@pytest.mark.parametrize("function", ALL)
def test_the_library_is_an_extra(function, bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'tallstore[transformers]'" in refusal(MissingExtraError, function, bundle, "one")


def test_an_older_library_is_none(bundle, monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")  # which it may have put there anew
    assert "transformers 5 or newer" in refusal(MissingExtraError, from_bundle, bundle, "one")


def test_devices_need_what_the_extra_installs(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    line = refusal(MissingExtraError, from_bundle, bundle, "one", device_map="cpu")
    assert line == "device_map needs accelerate: pip install 'tallstore[transformers]'"
    assert from_bundle(bundle, "one").num_labels == 2


# --- configs ----------------------------------------------------------------------------------------------------------


def test_a_config_for_other_shapes_names_the_first(packed, tmp_path):
    with with_companions(packed, tmp_path, config_of(packed, "three")) as bundle:
        line = refusal(CompanionError, from_bundle, bundle, "one")
    assert "task 'one': 'classifier.bias' is [2], where BertForSequenceClassification" in line


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "its config.json cannot be loaded"),
        ("[1]", "its config.json holds no JSON object"),
        ({}, "its config.json has no model_type"),
        ({"model_type": "no-such", "architectures": ["BertModel"], "hidden_size": "wide"}, "BertModel"),
        ({"model_type": "no-such"}, "its config.json cannot be loaded"),
        ({"model_type": "bert", "architectures": ["NoSuchModel"]}, "names 'NoSuchModel', which transformers does not"),
        ({"model_type": "bert", "architectures": [7]}, "names 7, which transformers does not"),
        ({"model_type": "bert", "architectures": ["BertModel"], "hidden_act": "no-such"}, "BertModel cannot be loaded"),
    ],
)
def test_configs_that_are_none(content, told, packed, tmp_path):
    if isinstance(content, str):  # no packer takes it
        (tmp_path / "config.json").write_text(content)
        assert told in refusal(CompanionError, _entries, tmp_path, "b: task 'one'")
        return
    with with_companions(packed, tmp_path, content) as bundle:
        line = refusal(CompanionError, from_bundle, bundle, "one")
    assert line.startswith(f"{bundle.path}: task 'one': ")
    assert told in line


def test_a_config_for_quantised_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "quantization_config": {}}))
    assert "quantised" in refusal(CompanionError, _entries, tmp_path, "b: task 'one'")


# --- code -------------------------------------------------------------------------------------------------------------


def with_code(packed, tmp_path, **of_the_config):
    """A base and an expert whose config asks for a module beside it, which would leave a trace."""
    trace = tmp_path / "trace"
    code = f"import pathlib\npathlib.Path({str(trace)!r}).touch()\nfrom transformers import BertConfig as Own\n"
    auto = {"AutoConfig": "own.Own", "AutoModel": "own.Own", "AutoModelForSequenceClassification": "own.Own"}
    auto |= {"AutoTokenizer": ["own.Own", None], "AutoProcessor": "own.Own"}
    shutil.copytree(packed.base, tmp_path / "base")
    for task in TASKS:
        shutil.copytree(packed.root / task, tmp_path / task)
    for place in (tmp_path / "base", tmp_path / "one"):
        (place / "own.py").write_text(code)
        config = config_of(packed)
        (place / "config.json").write_text(json.dumps(config | {"auto_map": auto} | of_the_config))
    report = tallstore.pack(tmp_path / "base", {task: tmp_path / task for task in TASKS}, tmp_path / "bundle")
    assert "own.py" in " ".join(report.advice)
    return tallstore.open_bundle(tmp_path / "bundle", base=tmp_path / "base"), trace


def test_a_class_that_transformers_has_is_taken_and_no_code_run(packed, tmp_path):
    bundle, trace = with_code(packed, tmp_path)
    with bundle:
        for auto_class in (None, "AutoModelForSequenceClassification", "BertForSequenceClassification"):
            assert type(from_bundle(bundle, "one", auto_class)) is transformers.BertForSequenceClassification
        assert tokenizer_from_bundle(bundle, "one")("win")["input_ids"]
    assert not trace.exists()


def test_a_model_of_code_of_its_own_is_refused(packed, tmp_path):
    bundle, trace = with_code(packed, tmp_path, model_type="own", architectures=["Own"])
    with bundle:
        assert "names 'Own', which transformers does not have" in refusal(CompanionError, from_bundle, bundle, "one")
        for auto_class in ("AutoModel", transformers.AutoModelForSequenceClassification):
            assert "code of its own, which is never run" in refusal(
                CompanionError, from_bundle, bundle, "one", auto_class
            )
    assert not trace.exists()


@pytest.mark.parametrize("value", ["org/kernel", "org/kernel@v1:function", {"": "sdpa", "text_config": "org/kernel"}])
def test_kernels_of_the_hub_are_code_too(value, packed, tmp_path):
    content = config_of(packed) | {"attn_implementation": value}
    with with_companions(packed, tmp_path, content) as bundle:
        line = refusal(CompanionError, from_bundle, bundle, "one")
    assert "names code on the Hub in 'attn_implementation', which is never run" in line


# --- files ------------------------------------------------------------------------------------------------------------


def stored(bundle, task, name):
    """Where a companion file of a task is in its bundle."""
    (file,) = (file for file in bundle._files.task(task).table.files if file.name == name)
    return bundle.path / "files" / file.sha256


@pytest.mark.parametrize("function", ALL)
def test_companions_that_are_damaged_or_not_here(function, packed, tmp_path):
    shutil.copytree(packed.root / "bundle", tmp_path / "bundle")
    name = "config.json" if function is from_bundle else "tokenizer_config.json"
    with tallstore.open_bundle(tmp_path / "bundle", base=packed.base) as bundle:
        path = stored(bundle, "one", name)
        path.write_bytes(path.read_bytes()[:-1] + b" ")
        assert "FILE-2" in refusal(IntegrityError, function, bundle, "one")
        path.unlink()
        assert f"{name!r} of task 'one' was not fetched" in refusal(NotFetchedError, function, bundle, "one")


def test_a_flipped_bit_of_a_weight_is_an_integrity_error(packed, tmp_path):
    shutil.copytree(packed.root / "bundle", tmp_path / "bundle")
    (path,) = (tmp_path / "bundle" / "tasks" / "two").glob("mask-*.safetensors")
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with tallstore.open_bundle(tmp_path / "bundle", base=packed.base) as bundle:
        assert path.name in refusal(IntegrityError, from_bundle, bundle, "two")
        assert from_bundle(bundle, "one").num_labels == 2


# --- nothing beside the weights ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def states(packed):
    """Experts as they are in memory, which come without any file."""
    base = transformers.BertForMaskedLM.from_pretrained(packed.base)
    return {task: tuned(FAMILIES["bert-tied"], task, base, torch.float32).state_dict() for task in TASKS}


def test_what_a_task_lacks_the_bases_directory_has(packed, states, tmp_path):
    tallstore.pack(packed.base, states, tmp_path / "bundle")
    tallstore.pack(packed.base, states, tmp_path / "whole", embed_base=True)
    expected = transformers.AutoTokenizer.from_pretrained(packed.base)("win")["input_ids"]
    for path, base in ((tmp_path / "bundle", packed.base), (tmp_path / "whole", None)):
        with tallstore.open_bundle(path, base=base) as bundle:
            assert type(from_bundle(bundle, "one")) is transformers.BertForMaskedLM
            for function in (tokenizer_from_bundle, processor_from_bundle):
                assert function(bundle, "one")("win")["input_ids"] == expected


def test_neither_the_task_nor_the_base_has_files(states, tmp_path):
    base = transformers.BertForMaskedLM(bert()).state_dict()
    tallstore.pack(base, states, tmp_path / "bundle")
    with tallstore.open_bundle(tmp_path / "bundle", base=base) as bundle:
        for function, what in zip(ALL, ("config", "tokenizer", "processor"), strict=True):
            line = refusal(CompanionError, function, bundle, "one")
            assert line.startswith(f"{tmp_path / 'bundle'}: task 'one': has no {what}, nor has its base; ")


def test_a_task_with_a_config_alone_takes_the_bases_tokenizer(packed, tmp_path):
    family = FAMILIES["bert-classifier"]
    base = transformers.BertForMaskedLM.from_pretrained(packed.base)
    for task in TASKS:
        tuned(family, task, base, torch.float32).save_pretrained(tmp_path / task)
    save(family, base, tmp_path / "base")
    tallstore.pack(tmp_path / "base", {task: tmp_path / task for task in TASKS}, tmp_path / "bundle")
    with tallstore.open_bundle(tmp_path / "bundle", base=tmp_path / "base") as bundle:
        assert from_bundle(bundle, "two").num_labels == 3
        expected = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
        assert tokenizer_from_bundle(bundle, "two")("a film")["input_ids"] == expected("a film")["input_ids"]


def test_nothing_is_left_in_the_temporary_directory(packed, bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    from_bundle(bundle, "one")
    refusal(OptionError, from_bundle, bundle, "one", "NoSuchClass")
    assert list(Path(tmp_path).iterdir()) == []
