"""Experts written into models whose tensors transformers renames, stacks or cuts as it loads: in place, bit for bit."""

from __future__ import annotations

import pytest
import torch
import transformers

import tallstore
from tallstore.errors import OptionError
from tallstore.transformers import from_bundle
from tests.reference import same_bits
from tests.transformers_models import (
    DTYPES,
    FAMILIES,
    LARGER_FAMILIES,
    SIZES,
    Family,
    assert_same_outputs,
    bytes_of_text,
    each,
    go_offline,
    images,
    pack,
    pixels,
    vit_config,
)


def qwen_moe(_task=None):
    config = transformers.Qwen2MoeConfig(
        vocab_size=320, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=72,
        shared_expert_intermediate_size=80, **SIZES,
    )  # fmt: skip
    return transformers.Qwen2MoeForCausalLM(config)


def dinov2(_task=None):
    """Files have the two halves of its gated layers as one tensor, the model has them as two."""
    sizes = {key: SIZES[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    config = transformers.Dinov2Config(image_size=16, patch_size=4, use_swiglu_ffn=True, **sizes)
    return transformers.Dinov2ForImageClassification(config)


ALL = {
    "vit": Family(
        FAMILIES["vit"].base,
        lambda _task: transformers.ViTForImageClassification(vit_config()),  # heads of one shape: it takes every expert
        transformers.AutoModelForImageClassification,
        images,
        pixels,
        names_are_the_modules=False,
    ),
    "mixtral": LARGER_FAMILIES["mixtral"],
    "qwen-moe": Family(qwen_moe, qwen_moe, transformers.AutoModelForCausalLM, bytes_of_text),
    "dinov2": Family(dinov2, dinov2, transformers.AutoModelForImageClassification, images, pixels),
}
RENAMED = ("vit", "mixtral", "qwen-moe")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    go_offline(monkeypatch)


@pytest.fixture(scope="module")
def packed(request, tmp_path_factory):
    name, dtype = request.param
    return pack(ALL[name], DTYPES[dtype], tmp_path_factory.mktemp(f"{name}-{dtype}"))


def assert_same_weights(found, expected):
    weights = expected.state_dict()
    assert found.state_dict().keys() == weights.keys()
    for name, tensor in found.state_dict().items():
        assert same_bits(tensor, weights[name]), name


def base_of(packed):
    """The base itself, as `from_pretrained` makes it."""
    return packed.family.auto_class.from_pretrained(packed.base)


def unloaded(packed):
    """A model of the class that the experts have, which no file was loaded into."""
    config = transformers.AutoConfig.from_pretrained(packed.base)
    return packed.family.auto_class.from_config(config, dtype=packed.dtype).eval()


@each(*RENAMED, dtypes=DTYPES)
@torch.inference_mode()
def test_a_switched_model_is_the_one_that_from_bundle_makes(packed):
    batch = packed.family.batch(packed.dtype)
    with packed.open() as bundle:
        for model in (from_bundle(bundle, "one"), base_of(packed), unloaded(packed)):
            switcher = bundle.attach(model)
            for task in ("two", "three", "two", "one"):
                switcher.set_expert(task)
                expected = from_bundle(bundle, task)
                assert_same_weights(model, expected)
            assert_same_outputs(model(**batch), expected(**batch))


@each(*RENAMED, dtypes=DTYPES)
def test_without_an_expert_the_model_is_the_base_again(packed):
    """What the base has not is the model's own: here, nothing."""
    with packed.open() as bundle:
        model = base_of(packed)
        places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
        switcher = bundle.attach(model)
        switcher.set_expert("two")
        with switcher.disable_expert():
            assert_same_weights(model, base_of(packed))
        assert_same_weights(model, from_bundle(bundle, "two"))
        switcher.set_expert(None)
        assert_same_weights(model, base_of(packed))
    assert places == {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}


@each(*RENAMED)
def test_an_expert_is_loaded_into_a_model(packed):
    with packed.open() as bundle:
        for model in (unloaded(packed), from_bundle(bundle, "one")):
            result = bundle.load_into(model, "two")
            assert result == ([], [])
            assert_same_weights(model, from_bundle(bundle, "two"))


@each(*RENAMED)
def test_the_models_dtype_is_cast_to(packed):
    with packed.open() as bundle:
        expected = from_bundle(bundle, "two", dtype=torch.bfloat16)
        model = from_bundle(bundle, "one", dtype=torch.bfloat16)
        bundle.attach(model).set_expert("two")
        assert_same_weights(model, expected)
        model = from_bundle(bundle, "one", dtype=torch.bfloat16)
        bundle.load_into(model, "two")
        assert_same_weights(model, expected)


@each("vit", "mixtral")
def test_frozen_parameters_are_written_to_once(packed):
    """Also where several tensors of a file are parts of one parameter, whose writes torch counts together."""
    with packed.open(verify="never") as bundle:
        model = from_bundle(bundle, "one").requires_grad_(False)
        switcher = bundle.attach(model)
        switcher.set_expert("two")
        versions = {name: tensor._version for name, tensor in model.named_parameters()}
        switcher.set_expert("two")
        assert versions == {name: tensor._version for name, tensor in model.named_parameters()}
        with torch.no_grad():
            next(model.parameters()).add_(1)
        switcher.set_expert("two")
        assert_same_weights(model, from_bundle(bundle, "two"))


@each("mixtral")
def test_a_model_that_was_moved_is_found_where_it_is(packed):
    with packed.open() as bundle:
        model = from_bundle(bundle, "one")
        switcher = bundle.attach(model)
        switcher.set_expert("two")
        model.to(torch.float64)
        switcher.set_expert("three")
        assert_same_weights(model, from_bundle(bundle, "three", dtype=torch.float64))


@each("vit", "mixtral")
def test_graphs_notice_that_a_part_of_a_parameter_was_written_to(packed):
    with packed.open() as bundle:
        model = from_bundle(bundle, "one")
        switcher = bundle.attach(model)
        outputs = model(**packed.family.batch(packed.dtype)).logits.sum()
        switcher.set_expert("two")
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            outputs.backward()


@each("vit", "mixtral")
def test_a_bundle_of_the_models_own_names_is_taken_by_them(packed, tmp_path):
    """State dicts of models in memory have the names of the modules."""
    base = packed.family.auto_class.from_pretrained(packed.base).state_dict()
    experts = {
        task: packed.family.auto_class.from_pretrained(packed.root / task).state_dict() for task in ("one", "two")
    }
    tallstore.pack(base, experts, tmp_path / "bundle")
    with tallstore.open_bundle(tmp_path / "bundle", base=base) as bundle:
        model = packed.family.auto_class.from_pretrained(packed.base)
        bundle.attach(model).set_expert("one")
        expected = bundle.state_dict("one")
        assert all(same_bits(tensor, expected[name]) for name, tensor in model.state_dict().items())
        assert bundle.load_into(model, "two") == ([], [])


@each("dinov2")
def test_what_is_computed_from_a_files_tensor_is_refused_and_nothing_written(packed):
    with packed.open() as bundle:
        model = from_bundle(bundle, "one")
        if any(name.endswith("mlp.weights_in.weight") for name in model.state_dict()):
            pytest.skip("this version of transformers leaves the halves as the files have them")
        for write in (bundle.attach, lambda model: bundle.load_into(model, "two", strict=False)):
            with pytest.raises(
                OptionError, match=r"^tensor '.*mlp.weights_in.*' cannot be written in place: "
            ) as error:
                write(model)
            assert str(error.value).endswith("take tallstore.transformers.from_bundle")
        assert_same_weights(model, from_bundle(bundle, "one"))


@each("mixtral")
def test_another_model_is_refused_by_names(packed):
    with packed.open() as bundle, pytest.raises(OptionError, match=r"lacks \d+ of the other's tensors"):
        bundle.load_into(ALL["qwen-moe"].base(), "one")
