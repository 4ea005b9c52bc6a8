"""`from_bundle`: the very model that `from_pretrained` makes of an export, with no export."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

import tallstore
from tallstore.errors import OptionError
from tallstore.exporting import export
from tallstore.transformers import from_bundle
from tests.reference import same_bits
from tests.transformers_models import (
    DTYPES,
    FAMILIES,
    LARGER_FAMILIES,
    TASKS,
    assert_same_outputs,
    bert,
    each,
    go_offline,
    llama,
    pack,
    tuned,
)

ALL = FAMILIES | LARGER_FAMILIES


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    go_offline(monkeypatch)


@pytest.fixture(scope="module")
def packed(request, tmp_path_factory):
    name, dtype = request.param
    options = {"max_shard_size": "40KB"} if name == "llama" else {}
    return pack(ALL[name], DTYPES[dtype], tmp_path_factory.mktemp(f"{name}-{dtype}"), **options)


def sharing(model):
    """Which names of a model are one parameter, and which only one memory."""
    by_identity, by_memory = {}, {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_identity.setdefault(id(parameter), set()).add(name)
        by_memory.setdefault(parameter.data_ptr(), set()).add(name)
    return sorted(map(sorted, by_identity.values())), sorted(map(sorted, by_memory.values()))


def assert_same_model(found, expected):
    """Class, config, weights, ties, mode: everything but where they came from."""
    assert type(found) is type(expected)
    assert not found.training
    ours, theirs = (model.config.to_dict() for model in (found, expected))
    assert {**ours, "_name_or_path": None} == {**theirs, "_name_or_path": None}
    if expected.can_generate():
        assert found.generation_config.to_dict() == expected.generation_config.to_dict()
    weights = expected.state_dict()
    assert found.state_dict().keys() == weights.keys()
    for name, tensor in found.state_dict().items():
        assert same_bits(tensor, weights[name]), name
    for ours, theirs in zip(found.named_parameters(), expected.named_parameters(), strict=True):
        assert (ours[0], ours[1].requires_grad) == (theirs[0], theirs[1].requires_grad)
    for ours, theirs in zip(found.named_buffers(), expected.named_buffers(), strict=True):
        assert ours[0] == theirs[0]
        assert same_bits(ours[1], theirs[1]), ours[0]
    assert sharing(found) == sharing(expected)


# --- each family ------------------------------------------------------------------------------------------------------


@each(*ALL, dtypes=DTYPES)
@torch.inference_mode()
def test_the_model_is_the_one_that_an_export_gives(packed, tmp_path):
    """Float32 and bfloat16, ties, names that differ between files and modules, fused weights, a base in shards."""
    batch = packed.family.batch(packed.dtype)
    with packed.open() as bundle:
        for task in TASKS[:2]:
            export(bundle, task, tmp_path / task)
            expected = packed.family.auto_class.from_pretrained(tmp_path / task)
            found = from_bundle(bundle, task)
            assert_same_model(found, expected)
            assert_same_outputs(found(**batch), expected(**batch))
            assert found.name_or_path == found.config.name_or_path == str(bundle.path)


@each("bert-tied", "vit", "mixtral")
def test_a_dtype_is_the_one_that_from_pretrained_casts_to(packed, tmp_path):
    with packed.open() as bundle:
        export(bundle, "one", tmp_path / "one")
        for dtype in (torch.bfloat16, "float16", "torch.float64", "auto", None):
            expected = dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype
            assert_same_model(
                from_bundle(bundle, "one", dtype=dtype),
                packed.family.auto_class.from_pretrained(tmp_path / "one", dtype=expected),
            )


@each("bert-classifier", "bert-tied", "clip")
def test_every_way_to_name_a_class(packed, tmp_path):
    with packed.open() as bundle:
        export(bundle, "one", tmp_path / "one")
        own = type(from_bundle(bundle, "one"))
        for auto_class in (own, own.__name__, packed.family.auto_class, packed.family.auto_class.__name__):
            assert type(from_bundle(bundle, "one", auto_class)) is own
        assert_same_body(from_bundle(bundle, "one", transformers.AutoModel), transformers.AutoModel, tmp_path / "one")


def assert_same_body(found, auto_class, directory):
    """As of a class whose weights are not all in the expert: those are made anew, and differ every time."""
    expected, info = auto_class.from_pretrained(directory, output_loading_info=True)
    assert type(found) is type(expected)
    weights = expected.state_dict()
    for name, tensor in found.state_dict().items():
        assert name in info["missing_keys"] or same_bits(tensor, weights[name]), name


@each("clip")
def test_a_class_may_take_a_part_of_the_config(packed, tmp_path):
    with packed.open() as bundle:
        export(bundle, "one", tmp_path / "one")
        found = from_bundle(bundle, "one", transformers.CLIPTextModel)
        assert_same_model(found, transformers.CLIPTextModel.from_pretrained(tmp_path / "one"))


class HeadOfOnesOwn(transformers.BertForSequenceClassification):
    """A class that is not transformers'."""

    def forward(self, *arguments, **keywords):
        return super().forward(*arguments, **keywords).logits.softmax(-1)


@each("bert-classifier")
@torch.inference_mode()
def test_a_class_of_ones_own(packed):
    with packed.open() as bundle:
        found = from_bundle(bundle, "two", HeadOfOnesOwn)
        expected = from_bundle(bundle, "two")
    batch = packed.family.batch(packed.dtype)
    assert torch.equal(found(**batch), expected(**batch).logits.softmax(-1))


@each("llama")
def test_a_path_will_do_where_the_bundle_has_its_base(packed, tmp_path):
    tallstore.pack(packed.base, {task: packed.root / task for task in TASKS}, tmp_path / "bundle", embed_base=True)
    with packed.open() as bundle:
        expected = from_bundle(bundle, "one")
    for path in (tmp_path / "bundle", str(tmp_path / "bundle")):
        assert_same_model(from_bundle(path, "one"), expected)
        assert_same_model(tallstore.transformers.from_bundle(path, "one"), expected)


@each("bert-classifier", "t5")
def test_without_a_dtype_in_the_config_the_weights_decide(packed, tmp_path):
    experts = {}
    for task in TASKS:
        model = packed.family.auto_class.from_pretrained(packed.root / task).to(torch.bfloat16)
        model.save_pretrained(tmp_path / task)
        config = json.loads((tmp_path / task / "config.json").read_text())
        del config["dtype"]
        (tmp_path / task / "config.json").write_text(json.dumps(config))
        experts[task] = tmp_path / task
    tallstore.pack(packed.base, experts, tmp_path / "bundle")
    with tallstore.open_bundle(tmp_path / "bundle", base=packed.base) as bundle:
        export(bundle, "one", tmp_path / "out")
        found = from_bundle(bundle, "one")
    assert found.dtype == torch.bfloat16
    assert_same_model(found, packed.family.auto_class.from_pretrained(tmp_path / "out"))


@each("llama", "whisper")
def test_what_generate_does_by_default_comes_too(packed, tmp_path):
    """From generation_config.json; from the config, where older models have it."""
    for task in TASKS:
        packed.family.auto_class.from_pretrained(packed.root / task).save_pretrained(tmp_path / task)
        (tmp_path / task / "generation_config.json").unlink()
        config = json.loads((tmp_path / task / "config.json").read_text())
        (tmp_path / task / "config.json").write_text(json.dumps(config | {"num_beams": 4, "max_length": 7}))
    (tmp_path / "two" / "generation_config.json").write_text(json.dumps({"num_beams": 2, "top_k": 11}))
    tallstore.pack(packed.base, {task: tmp_path / task for task in TASKS}, tmp_path / "bundle")
    with tallstore.open_bundle(tmp_path / "bundle", base=packed.base) as bundle:
        for task, beams in {"one": 4, "two": 2}.items():
            export(bundle, task, tmp_path / "out", overwrite=True)
            found = from_bundle(bundle, task)
            assert_same_model(found, packed.family.auto_class.from_pretrained(tmp_path / "out"))
            assert found.generation_config.num_beams == beams


# --- ties -------------------------------------------------------------------------------------------------------------


def tied_in_memory(tmp_path, **of_the_config):
    """A bundle of state dicts, where a tied tensor has all its names; configs that say *of_the_config* beside them."""
    torch.manual_seed(1)
    base = transformers.BertForMaskedLM(bert(tie_word_embeddings=True))
    experts = {task: tuned(FAMILIES["bert-tied"], task, base, torch.float32).state_dict() for task in TASKS}
    bert(architectures=["BertForMaskedLM"], **of_the_config).save_pretrained(tmp_path / "base")
    torch.save(base.state_dict(), tmp_path / "base" / "pytorch_model.bin")
    tallstore.pack(tmp_path / "base", experts, tmp_path / "bundle")
    return tallstore.open_bundle(tmp_path / "bundle", base=tmp_path / "base", verify="never")


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_one_tensor_in_the_bundle_is_one_in_the_model_if_its_config_says_so(tie, dtype, tmp_path):
    with tied_in_memory(tmp_path, tie_word_embeddings=tie) as bundle:
        carriers = {bundle._expert("one").carrier(name) for name in bundle.keys("one")}
        assert len(carriers) < len(bundle.keys("one"))
        found = from_bundle(bundle, "one", dtype=dtype)
        export(bundle, "one", tmp_path / "out")
    bert(architectures=["BertForMaskedLM"], tie_word_embeddings=tie).save_pretrained(tmp_path / "out")
    assert_same_model(found, transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out", dtype=dtype))
    one, other = found.get_output_embeddings().weight, found.get_input_embeddings().weight
    assert (one is other) == (one.data_ptr() == other.data_ptr())
    assert tie or one is not other


def read_by(bundle, load):
    before = bundle.bytes_read
    load()
    return bundle.bytes_read - before


@each("bert-untied", "whisper", "mixtral", dtypes=["bfloat16"])
def test_each_weight_is_read_once(packed):
    with packed.open(verify="never") as bundle:
        bundle.state_dict("one")  # tables too
        once = read_by(bundle, lambda: bundle.state_dict("one"))
        assert read_by(bundle, lambda: from_bundle(bundle, "one", dtype="float16")) == once > 0


def test_each_tie_is_read_once(tmp_path):
    with tied_in_memory(tmp_path) as bundle:
        bundle.state_dict("one")
        once = read_by(bundle, lambda: bundle.state_dict("one"))
        assert read_by(bundle, lambda: from_bundle(bundle, "one")) == once > 0


# --- devices ----------------------------------------------------------------------------------------------------------


@each("llama", "bert-tied", "mixtral")
def test_a_device_map_leads_to_the_same_model(packed):
    pytest.importorskip("accelerate")
    with packed.open() as bundle:
        expected = from_bundle(bundle, "one")
        for device_map in ("cpu", "auto", torch.device("cpu"), {"": "cpu"}):
            found = from_bundle(bundle, "one", device_map=device_map)
            assert_same_model(found.to("cpu"), expected)  # "auto" is a GPU, where there is one
        halves = {name: "cpu" for name, _ in expected.named_children()}
        assert_same_model(from_bundle(bundle, "one", device_map=halves), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each("bert-tied", "llama", "vit", "mixtral", dtypes=DTYPES)
def test_weights_are_rebuilt_on_the_device(packed):
    with packed.open() as bundle:
        expected = from_bundle(bundle, "one")
        for device_map in ("cuda", 0, "auto"):
            found = from_bundle(bundle, "one", device_map=device_map)
            assert {parameter.device.type for parameter in found.parameters()} == {"cuda"}
            assert_same_model(found.to("cpu"), expected)


@each("llama")
def test_devices_that_are_none(packed):
    pytest.importorskip("accelerate")
    with packed.open() as bundle:
        without = [] if torch.cuda.is_available() else ["cuda", 0, {"model": "cuda", "lm_head": "cpu"}]
        for device_map in ("nowhere", -1, 0.5, {"model": "nowhere", "lm_head": "cpu"}, *without):
            with pytest.raises(OptionError, match=r"^device_map is ") as caught:
                from_bundle(bundle, "one", device_map=device_map)
            assert "\n" not in str(caught.value)
        with pytest.raises(OptionError, match="'disk'"):
            from_bundle(bundle, "one", device_map={"model": "cpu", "lm_head": "disk"})


# --- beyond one model -------------------------------------------------------------------------------------------------


@each("llama")
@torch.inference_mode()
def test_experts_of_one_class_switch_in_place(packed):
    batch = packed.family.batch(packed.dtype)
    with packed.open() as bundle:
        model = from_bundle(bundle, "one")
        switcher = bundle.attach(model)
        for task in ("two", "three", "one"):
            switcher.set_expert(task)
            assert_same_outputs(model(**batch), from_bundle(bundle, task)(**batch))


def test_buffers_that_no_file_has_are_made(tmp_path):
    """Rotary tables are computed, not stored: they must not stay without memory."""
    packed = pack(FAMILIES["llama"], torch.float32, tmp_path)
    with packed.open() as bundle:
        model = from_bundle(bundle, "one")
    fresh = transformers.LlamaForCausalLM(llama())
    assert torch.equal(model.model.rotary_emb.inv_freq, fresh.model.rotary_emb.inv_freq)
