"""load_into: an expert's tensors in a model's own storage, or an error and an untouched model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import tallstore
from tests.bundle_builder import Bundle, Group, Task
from tests.reference import same_bits


class Net(nn.Module):
    """An embedding that a decoder may be tied to, a convolution, and buffers."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.conv = nn.Conv2d(2, 3, 2)
        self.decoder = nn.Linear(5, 7, bias=False)
        if tied:
            self.decoder.weight = self.embed.weight
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)


def pack(root, *names: str, untied: bool = False) -> Bundle:
    """A task 't' with the tensors of *names*, and its tie."""
    torch.manual_seed(1)
    base = {name: tensor.clone() for name, tensor in Net(tied=False).state_dict().items()}
    group, random = Group(root, base), np.random.default_rng(1)
    task = Task(group, "t")
    for name in names:
        if name == "count":
            task.private(name, torch.tensor(41))
        else:
            group.vector(name, "F16", random.standard_normal(base[name].numel()))
            task.signed(name, random.integers(-1, 2, base[name].numel()), gain=0.25)
    if not untied and "decoder.weight" not in names:
        task.alias("decoder.weight", "embed.weight")
    return Bundle(root, base, [group], [task])


NAMES = ("embed.weight", "conv.weight", "conv.bias", "count")


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    assert all(same_bits(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_tensors_are_written_in_place(tmp_path):
    built, model = pack(tmp_path, *NAMES), Net()
    kept = {name: (tensor, tensor.data_ptr()) for name, tensor in model.state_dict(keep_vars=True).items()}
    result = tallstore.open_bundle(built.seal()).load_into(model, "t")
    assert result == ([], [])
    assert result.missing_keys == result.unexpected_keys == []
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is kept[name][0]
        assert tensor.data_ptr() == kept[name][1]
        assert tensor.requires_grad is isinstance(tensor, nn.Parameter)
        assert same_bits(tensor.detach(), built.tasks[0].expected[name])
    assert model.decoder.weight is model.embed.weight


def test_a_model_that_was_used_can_be_loaded_into(tmp_path):
    """Parameters that a graph holds notice the change, as with any write in place."""
    built, model = pack(tmp_path, *NAMES), Net()
    loss = (model.conv.weight**2).sum()
    tallstore.open_bundle(built.seal()).load_into(model, "t")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_keeps_its_own_dtype(tmp_path, dtype):
    built, model = pack(tmp_path, *NAMES), Net().to(dtype)
    tallstore.open_bundle(built.seal()).load_into(model, "t")
    for name, expected in built.tasks[0].expected.items():
        found = model.state_dict()[name]
        assert same_bits(found, expected.to(dtype) if expected.is_floating_point() else expected)


def test_tensors_that_are_not_contiguous(tmp_path):
    built, model = pack(tmp_path, *NAMES), Net().to(memory_format=torch.channels_last)
    assert not model.conv.weight.is_contiguous()
    tallstore.open_bundle(built.seal()).load_into(model, "t")
    assert torch.equal(model.conv.weight, built.tasks[0].expected["conv.weight"])
    assert not model.conv.weight.is_contiguous()


def test_one_name_of_a_tied_parameter_is_enough(tmp_path):
    """As in files that keep one name of the two."""
    built, model = pack(tmp_path, *NAMES, untied=True), Net()
    assert "decoder.weight" not in built.tasks[0].expected
    assert tallstore.open_bundle(built.seal()).load_into(model, "t") == ([], [])
    assert torch.equal(model.decoder.weight, built.tasks[0].expected["embed.weight"])


def test_a_tie_of_the_expert_fills_both_parameters_of_an_untied_model(tmp_path):
    built, model = pack(tmp_path, *NAMES), Net(tied=False)
    tallstore.open_bundle(built.seal()).load_into(model, "t")
    assert torch.equal(model.decoder.weight, model.embed.weight)
    assert torch.equal(model.decoder.weight, built.tasks[0].expected["embed.weight"])


def test_a_tied_model_cannot_hold_an_expert_that_is_not(tmp_path):
    built, model = pack(tmp_path, *NAMES, "decoder.weight"), Net()
    before = snapshot(model)
    with pytest.raises(tallstore.OptionError, match=r"ties 'embed\.weight' and 'decoder\.weight', which differ"):
        tallstore.open_bundle(built.seal()).load_into(model, "t")
    assert_untouched(model, before)


def test_a_tied_model_can_hold_equal_tensors(tmp_path):
    built, model = pack(tmp_path, "conv.weight", "conv.bias", "count", untied=True), Net()
    for name in ("embed.weight", "decoder.weight"):
        built.tasks[0].private(name, torch.ones(7, 5))
    tallstore.open_bundle(built.seal()).load_into(model, "t")
    assert torch.equal(model.embed.weight, torch.ones(7, 5))


def test_other_names_are_refused_before_anything_is_written(tmp_path):
    built, model = pack(tmp_path, "embed.weight", "count", "conv.bias"), Net()
    del model.conv.bias
    model.conv.register_parameter("bias", None)
    before = snapshot(model)
    bundle = tallstore.open_bundle(built.seal())
    with pytest.raises(tallstore.OptionError) as caught:
        bundle.load_into(model, "t")
    assert str(caught.value) == (
        "task 't' lacks 1 of the other's tensors: 'conv.weight'; "
        "the model lacks 1 of the other's tensors: 'conv.bias'; "
        "give the model that the expert is of, or strict=False"
    )
    assert_untouched(model, before)
    assert bundle.load_into(model, "t", strict=False) == (["conv.weight"], ["conv.bias"])
    assert torch.equal(model.embed.weight, built.tasks[0].expected["embed.weight"])
    assert torch.equal(model.conv.weight, before["conv.weight"])


@pytest.mark.parametrize("strict", [True, False])
def test_another_shape_is_refused_by_name_before_anything_is_written(tmp_path, strict):
    built, model = pack(tmp_path, *NAMES), Net()
    model.conv = nn.Conv2d(2, 3, 3)
    before = snapshot(model)
    with pytest.raises(
        tallstore.OptionError, match=r"'conv\.weight' is \[3, 2, 3, 3\] in the model, \[3, 2, 2, 2\] in"
    ):
        tallstore.open_bundle(built.seal()).load_into(model, "t", strict=strict)
    assert_untouched(model, before)


def test_tensors_without_memory_are_refused(tmp_path):
    bundle = tallstore.open_bundle(pack(tmp_path, *NAMES).seal())
    with torch.device("meta"):
        model = Net()
    with pytest.raises(tallstore.OptionError, match="has no memory"):
        bundle.load_into(model, "t")
    lazy = Net()
    lazy.conv = nn.LazyConv2d(3, 2)
    with pytest.raises(tallstore.OptionError, match=r"'conv\.weight' of the model has no memory"):
        bundle.load_into(lazy, "t")


def test_in_inference_mode(tmp_path):
    built, model = pack(tmp_path, *NAMES), Net()
    with torch.inference_mode():
        tallstore.open_bundle(built.seal()).load_into(model, "t")
    assert torch.equal(model.conv.weight, built.tasks[0].expected["conv.weight"])
