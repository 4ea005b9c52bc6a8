"""What cannot be packed is refused with a typed error of one line that says where, and leaves nothing behind."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import tallstore
from tallstore import SignedMask, TallMask, errors
from tests.packing_cases import base_model, contents, experts_of, normal, pack

BASE = base_model()


@pytest.fixture
def experts():
    return experts_of(BASE)


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """A function that packs, catches the error, and checks that nothing was left: not the output, not its parents."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))

    def attempt(kind, experts, base=BASE, out=tmp_path / "new" / "bundle", **options):
        before = contents(tmp_path), {path for path in tmp_path.rglob("*") if path.is_dir()}
        with pytest.raises(kind) as caught:
            tallstore.pack(base, experts, out, **options)
        assert (contents(tmp_path), {path for path in tmp_path.rglob("*") if path.is_dir()}) == before
        message = str(caught.value)
        assert "\n" not in message
        return message

    return attempt


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [SignedMask(), TallMask(), TallMask.published()], ids=["signed", "tall", "published"]
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_where_it_would_be_coded(refused, experts, value, method):
    experts["b"]["block.weight"][2, 5] = value
    message = refused(errors.NonFiniteError, experts, method=method)
    assert "expert 'b'" in message
    assert "tensor 'block.weight'" in message
    assert f"element {2 * 65 + 5}" in message
    assert "private='block.weight'" in message


def test_what_is_not_finite_in_the_base_where_an_expert_moved(refused, experts):
    base = {name: tensor.clone() for name, tensor in BASE.items()}
    base["embed.weight"][0, 3] = torch.inf
    message = refused(errors.NonFiniteError, experts, base)
    assert "expert 'a'" in message
    assert "tensor 'embed.weight'" in message
    assert "element 3" in message


def test_infinities_of_base_and_expert_in_a_tensor_that_moved(refused, experts):
    base = {name: tensor.clone() for name, tensor in BASE.items()}
    for state in (base, *experts.values()):
        state["embed.weight"][0, 3] = -torch.inf
    assert "element 3" in refused(errors.NonFiniteError, experts, base)


@pytest.mark.parametrize("suffix", ["qweight", "SCB", "weight.quant_state.bitsandbytes__nf4"])
def test_quantised_weights(refused, experts, suffix):
    experts["b"][f"block.{suffix}"] = torch.zeros(4, dtype=torch.int8)
    message = refused(errors.QuantizedCheckpointError, experts)
    assert "expert 'b'" in message
    assert f"block.{suffix}" in message


def test_a_quantised_directory(refused, experts, tmp_path):
    (tmp_path / "model").mkdir()
    save_file(experts["b"], tmp_path / "model/model.safetensors")
    (tmp_path / "model/config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    message = refused(errors.QuantizedCheckpointError, experts | {"b": tmp_path / "model"})
    assert "expert 'b'" in message
    assert "gptq" in message


def test_an_adapter_directory(refused, experts, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    save_file({"x.lora_A.weight": normal(4, 4)}, tmp_path / "adapter/adapter_model.safetensors")
    message = refused(errors.AdapterCheckpointError, experts | {"b": tmp_path / "adapter"})
    assert "expert 'b'" in message
    assert "merge_and_unload" in message


def test_a_truncated_file(refused, experts, tmp_path):
    save_file(experts["b"], tmp_path / "b.safetensors")
    raw = (tmp_path / "b.safetensors").read_bytes()
    (tmp_path / "b.safetensors").write_bytes(raw[:-1000])
    message = refused(errors.DamagedCheckpointError, experts | {"b": tmp_path / "b.safetensors"})
    assert "expert 'b'" in message


def test_a_pickle_of_more_than_weights(refused, experts, tmp_path):
    torch.save({"w": normal(4), "path": tmp_path}, tmp_path / "b.pt")
    message = refused(errors.UnsafeCheckpointError, experts | {"b": tmp_path / "b.pt"})
    assert "expert 'b'" in message


def test_a_path_that_is_not_there(refused, experts, tmp_path):
    message = refused(errors.CheckpointNotFoundError, experts | {"b": tmp_path / "none"})
    assert "expert 'b'" in message
    assert "expert" not in refused(errors.CheckpointNotFoundError, experts, str(tmp_path / "none"))


@pytest.mark.parametrize("name", ["", "a\nb", "a\x7fb", "x" * 1025, "\ud800"])
def test_a_tensor_name_that_a_bundle_cannot_hold(refused, experts, name):
    experts["b"][name] = normal(3)
    assert "expert 'b'" in refused(errors.InputError, experts)
    assert "the base" in refused(errors.InputError, experts_of(BASE), BASE | {name: normal(3)})


def test_a_tensor_of_more_dimensions_than_a_bundle_holds(refused, experts):
    experts["b"]["deep"] = torch.zeros([1] * 17)
    assert "'deep'" in refused(errors.InputError, experts)


# --- names ------------------------------------------------------------------------------------------------------------


def renamed(experts, prefix):
    return experts | {"b": {prefix + name: tensor for name, tensor in experts["b"].items()}}


def test_no_name_in_common_names_the_prefix_that_the_expert_has(refused, experts):
    message = refused(errors.NameMismatchError, renamed(experts, "model.x+y."))
    assert "expert 'b'" in message
    assert "'model.x+y.'" in message
    hint = message.partition("give key_mapping=")[2]
    assert hint == '{"^model\\\\.x\\\\+y\\\\.": ""}'
    assert eval(hint) == {r"^model\.x\+y\.": ""}  # noqa: S307 - what the user will type


def test_the_hint_works(tmp_path, experts):
    pack(BASE, renamed(experts, "model.x+y."), tmp_path / "bundle", key_mapping={r"^model\.x\+y\.": ""})


def test_no_name_in_common_names_the_prefix_that_the_base_has(refused, experts):
    message = refused(errors.NameMismatchError, experts, {f"bert.{name}": tensor for name, tensor in BASE.items()})
    assert "'bert.'" in message
    assert message.endswith('give key_mapping={"^": "bert."}')


def test_no_name_in_common_and_no_prefix(refused, experts):
    message = refused(errors.NameMismatchError, experts | {"b": {"other": normal(5)}})
    assert "it has 'other', the base has 'block.kernel'" in message
    assert "key_mapping" in message


def test_two_names_that_a_mapping_makes_one(refused, experts):
    mapping = {"block.kernel|block.weight": "embed.weight"}
    message = refused(errors.NameMismatchError, experts, key_mapping=mapping)
    assert "'block.kernel' and 'block.weight' both to 'embed.weight'" in message


@pytest.mark.parametrize("mapping", [{"(": ""}, {"embed": r"\1"}, {"embed": r"\g<name>"}, {"(?P<a>embed)": r"\g<"}])
def test_a_mapping_that_is_no_regular_expression(refused, experts, mapping):
    assert "key_mapping" in refused(errors.OptionError, experts, key_mapping=mapping)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [SignedMask(), TallMask()], ids=["signed", "tall"])
def test_fewer_than_two_experts(refused, experts, method):
    for few in ({}, {"a": experts["a"]}):
        message = refused(errors.TooFewExpertsError, few, method=method)
        assert f"was given {len(few)}" in message
        assert method.name in message


@pytest.mark.parametrize("task", ["", "a\nb", "x" * 257, "\x00", "\ud800"])
def test_a_task_name_that_a_bundle_cannot_hold(refused, experts, task):
    assert "task name" in refused(errors.OptionError, experts | {task: experts["a"]})


def test_several_lambdas_without_evaluate(refused, experts):
    message = refused(errors.OptionError, experts, method=TallMask((0.2, 0.4)))
    assert "2 candidates" in message
    assert "evaluate=" in message


@pytest.mark.parametrize("dtype", ["float8", "log4", torch.int32, ""])
def test_a_merged_dtype_that_the_method_does_not_have(refused, experts, dtype):
    message = refused(errors.OptionError, experts, method=TallMask(), merged_dtype=dtype)
    assert message.endswith("give one of 'float32', 'bfloat16', 'float16', 'int8'")


def test_a_merged_vector_beyond_float16(refused, experts):
    base = BASE | {"w": torch.zeros(80, 60)}
    for expert in experts.values():
        expert["w"] = torch.full((80, 60), 40000.0)
    message = refused(errors.OptionError, experts, base, method=TallMask(), merged_dtype="float16")
    assert "'w'" in message
    assert "bfloat16" in message


@pytest.mark.parametrize("reference", ["org/name", "org/name@main", f"org/name@{'A' * 40}", f"a/b/c@{'a' * 40}", ""])
def test_a_base_ref_that_pins_nothing(refused, experts, reference):
    assert "base_ref" in refused(errors.OptionError, experts, base_ref=reference)


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_no_number(refused, experts, score):
    for method in (None, TallMask((0.2, 0.4))):
        assert "evaluate" in refused(errors.OptionError, experts, method=method, evaluate=lambda *_: score)


# --- the output -------------------------------------------------------------------------------------------------------


def test_an_output_that_is_there(refused, experts, tmp_path):
    pack(BASE, experts, tmp_path / "bundle")
    message = refused(errors.OutputExistsError, experts, out=tmp_path / "bundle")
    assert "overwrite=True" in message


def test_an_output_that_is_a_file(refused, experts, tmp_path):
    (tmp_path / "bundle").write_text("mine")
    for overwrite in (False, True):
        assert "is a file" in refused(errors.OutputExistsError, experts, out=tmp_path / "bundle", overwrite=overwrite)


def test_a_directory_that_is_no_bundle_is_never_overwritten(refused, experts, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("mine")
    for overwrite in (False, True):
        assert "no bundle" in refused(errors.OutputExistsError, experts, out=tmp_path / "thesis", overwrite=overwrite)


def test_an_output_inside_an_input_and_an_input_inside_the_output(refused, experts, tmp_path):
    directory = tmp_path / "models" / "b"
    directory.mkdir(parents=True)
    save_file(experts["b"], directory / "model.safetensors")
    given = experts | {"b": directory}
    for out in (directory, directory / "bundle", directory / "two/levels", tmp_path / "models", tmp_path):
        refused(errors.OutputInsideInputError, given, out=out, overwrite=True)
    file = experts | {"b": directory / "model.safetensors"}
    for out in (directory, tmp_path / "models"):
        refused(errors.OutputInsideInputError, file, out=out, overwrite=True)
    pack(BASE, given, tmp_path / "models" / "bundle")
    pack(BASE, file, directory / "bundle")


def test_an_output_that_leads_into_an_input_by_a_link(refused, experts, tmp_path):
    directory = tmp_path / "b"
    directory.mkdir()
    save_file(experts["b"], directory / "model.safetensors")
    (tmp_path / "link").symlink_to(directory)
    refused(errors.OutputInsideInputError, experts | {"b": directory}, out=tmp_path / "link" / "bundle")


# --- what the user's own functions raise ------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_an_error_in_progress_leaves_nothing(refused, experts, error, call):
    calls = []

    def progress(done, total):
        calls.append(done)
        if len(calls) == call:
            raise error

    refused(error, experts, progress=progress)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("method", [SignedMask(), TallMask((0.2, 0.4))], ids=["score", "choice"])
@pytest.mark.parametrize("dry_run", [False, True])
def test_an_error_in_evaluate_leaves_nothing(refused, experts, error, method, dry_run):
    def evaluate(task, _state):
        if task == "b":
            raise error
        return 0.0

    refused(error, experts, method=method, evaluate=evaluate, dry_run=dry_run)


def test_an_error_leaves_the_bundle_that_was_there(refused, experts, tmp_path):
    pack(BASE, experts, tmp_path / "bundle")

    def progress(done, _total):
        if done:
            raise KeyboardInterrupt

    refused(KeyboardInterrupt, experts, out=tmp_path / "bundle", overwrite=True, progress=progress)
    assert tallstore.verify(tmp_path / "bundle") == []
